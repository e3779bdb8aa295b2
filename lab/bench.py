"""Speed and memory, each as a ratio to a reference that is timed in the same process, in turns.

    python -m lab.bench all                  # all that a CPU can show, in ten minutes (make bench)
    python -m lab.bench moe --quick          # one table at one shape
    python -m lab.bench infmoe               # latency by activation rate, as a table and a picture
    python -m lab.bench gpu_check --out=DIR  # on a GPU: kernels, tests, tables, short runs, 9 min

Benches: moe, infmoe, decode, train, pool, all, gpu_check. Two ways to compute one thing are
compared, then timed: one that disagrees prints no speed. Tables go to the screen, and as JSON with
hardware, versions and shapes into --out. C1 to C10 and G1 to G7 are the rows of results/cpu.md and
results/h200.md. Meanwhile out/timing.lock pauses the runs of lab.reproduce.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import contextlib
import json
import math
import operator
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

import kernels
import moe
from configurator import fail, parse
from model import GPT, ModelConfig
from support import budget, machine
from train import TrainConfig


@dataclass
class BenchConfig:
    quick: bool = False  # one shape per table, fewer repetitions
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    out: str = "results/bench"  # folder for the JSON and pictures
    repeat: int = 0  # timed rounds; 0: as many as the bench thinks right
    threads: int = 0  # CPU threads; 0: torch's own choice

    def __post_init__(self):
        if not 0 <= self.threads <= os.cpu_count():
            raise ValueError(f"threads={self.threads}: expected 0 to {os.cpu_count()} (CPUs here)")
        if self.repeat < 0:
            raise ValueError(f"repeat={self.repeat}: expected 0 or more")


# ---- measuring

def clock(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def interleave(functions, device, rounds):
    """{name: f} -> {name: median seconds}. All in turn, so that a busy moment hits all alike."""
    times = {name: [] for name in functions}
    for f in functions.values():  # warm up: compilation, caches, autotuning
        f()
        f()
    for _ in range(rounds):
        for name, f in functions.items():
            start = clock(device)
            f()
            times[name].append(clock(device) - start)
    return {name: statistics.median(t) for name, t in times.items()}


def agree(name, out, reference, limit):
    """Relative distance of two outputs; SystemExit above the limit: a wrong result has no speed."""
    out, reference = out.double(), reference.double()
    distance = ((out - reference).norm() / reference.norm().clamp_min(1e-30)).item()
    if not distance <= limit:
        fail(f"{name} disagrees with its reference: relative distance {distance:.2e} > {limit:.0e}")


SIGNS = {">=": operator.ge, "<=": operator.le, ">": operator.gt}
WORDS = {None: "", True: "reached", False: "NOT REACHED"}


class Table:
    """Rows of one bench: printed as they come, appended to a JSON file at the end."""

    def __init__(self, name, config, device):
        self.name, self.config, self.device, self.rows = name, config, device, []
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.tolerance = 1e-5 if device == "cpu" else 2e-2
        print(f"\n{name} on {describe(device)}\n{'id':4} {'what is compared':70} "
              f"{'reference':>11} {'ours':>11} {'ratio':>7}  reach")

    def time(self, functions, rounds):
        return interleave(functions, self.device, self.config.repeat or rounds)

    def row(self, id, what, reference, ours, reach="", unit="s", invert=False, **more):
        """Ours over the reference (inverted: the reverse), which must satisfy reach: "<= 1.25".

        reference, ours: in seconds ("s"), bytes ("B"), or of another kind (""); more: kept too.
        """
        ratio = reference / ours if invert else ours / reference
        sign, limit = reach.split() if reach else (None, 0)
        reached = SIGNS[sign](ratio, float(limit)) if reach else None
        self.rows.append(dict(id=id, what=what, reference=reference, ours=ours, unit=unit,
                              ratio=round(ratio, 3), reach=reach, reached=reached, **more))
        shown, scale = {"s": ("ms", 1e3), "B": ("MB", 1e-6), "": ("", 1)}[unit]
        print(f"{id:4} {what:70} {reference * scale:8.2f} {shown:2} {ours * scale:8.2f} {shown:2} "
              f"{ratio:7.2f}  {reach} {WORDS[reached]}", flush=True)

    def faster(self, id, what, reference, ours, reach=""):
        """A row whose ratio is how many times faster ours is."""
        self.row(id, what, reference, ours, reach, invert=True)

    def save(self):
        record = dict(
            bench=self.name, hardware=describe(self.device), torch=torch.__version__,
            triton=getattr(sys.modules.get("triton"), "__version__", None),
            threads=torch.get_num_threads(), date=time.strftime("%Y-%m-%d"),
            command=" ".join(["python -m lab.bench", *sys.argv[1:]]), rows=self.rows)
        with open(Path(self.config.out, f"{self.name}.jsonl"), "a") as f:
            f.write(json.dumps(record) + "\n")


def describe(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


@contextlib.contextmanager
def timing_lock():
    """Ask the runs of lab.reproduce to pause."""
    path = Path("out/timing.lock")
    path.parent.mkdir(exist_ok=True)
    try:
        path.write_text(str(os.getpid()))
        time.sleep(1.5)  # it looks twice a second
        yield
    finally:
        path.unlink(missing_ok=True)


def forward_backward(f, *inputs):
    """A closure: f(*inputs), then the backward pass from a fixed gradient."""
    with torch.no_grad():
        grad = torch.randn_like(f(*inputs))

    def step():
        for x in inputs:
            x.grad = None
        f(*inputs).backward(grad)
    return step


def leaves(table, *shapes):
    """Random tensors that need gradients; all but the first at the scale of initialised weights."""
    generator = torch.Generator().manual_seed(0)
    scales = [1.0] + [1.0 if len(s) == 3 and s[-1] <= 128 else s[-1] ** -0.5 for s in shapes[1:]]
    tensors = [torch.randn(s, generator=generator) * scale for s, scale in zip(shapes, scales)]
    return [x.to(table.device, table.dtype).requires_grad_() for x in tensors]


# ---- references: the formulas as the papers write them

def moe_by_masks(x, router, w_in, w_out, top_k):
    """A list of experts, looped over with boolean masks: what most codebases start with."""
    weights, ids = (x @ router.T).softmax(-1).topk(top_k)  # (T, K)
    y = torch.zeros_like(x)
    for e, (a, b) in enumerate(zip(w_in, w_out)):
        chosen = ids == e  # (T, K)
        rows = chosen.any(-1)
        gate = (weights * chosen).sum(-1)[rows, None].to(x.dtype)
        y[rows] = y[rows] + gate * (moe.activate(x[rows] @ a.T, "swiglu") @ b.T)
    return y


def moe_ours(x, router, w_in, w_out, top_k, backend="auto"):
    weights, ids = (x @ router.T).softmax(-1).topk(top_k)
    return kernels.expert_ffn(x, weights, ids, w_in, w_out, "swiglu", backend=backend)[0]


def moe_by_grouped_mm(x, router, w_in, w_out, top_k):
    """torch's grouped_mm and its own autograd, which keeps every intermediate."""
    weights, ids = (x @ router.T).softmax(-1).topk(top_k)
    order, ends = kernels.sort_by_expert(ids, w_in.shape[0])
    rows = x.index_select(0, order // ids.shape[1])  # (N, D), by expert
    act = moe.activate(F.grouped_mm(rows, w_in.transpose(1, 2), offs=ends), "swiglu")  # (N, F)
    out = kernels.undo_order(F.grouped_mm(act, w_out.transpose(1, 2), offs=ends), order)  # by token
    return (out.view(*ids.shape, -1) * weights.to(x.dtype).unsqueeze(-1)).sum(1)


def infmoe_literal(x, z, w_in, w_out, w_z, n_keep):
    """y = (1/K) sum_k W_2 ( TopN(W_z z_k) * act(W_1 x) ), K FFNs with torch.topk."""
    y = 0
    for k in range(z.shape[1]):
        scores = z[:, k] @ w_z.T  # (T, F)
        top = scores.topk(n_keep, dim=-1)
        mask = torch.zeros_like(scores).scatter(1, top.indices, top.values)
        y = y + (mask * moe.activate(x @ w_in.T, "gelu")) @ w_out.T
    return y / z.shape[1]


def infmoe_inside(x, z, w_in, w_out, w_z, n_keep):
    """The same with the sum moved inside W_2, in plain torch: what torch.compile is given."""
    scores = z @ w_z.T  # (T, K, F)
    threshold = scores.kthvalue(scores.shape[-1] - n_keep + 1, dim=-1, keepdim=True).values
    mask = (scores * (scores >= threshold)).mean(1)
    return (mask * moe.activate(x @ w_in.T, "gelu")) @ w_out.T


def infmoe_masked(x, z, w_in, w_out, w_z, n_keep):
    """The same with our masks over the whole width: the reference of decoding, which skips rows."""
    mask = kernels.topn_mask(z @ w_z.T, n_keep).mean(1)
    return (mask * moe.activate(x @ w_in.T, "gelu")) @ w_out.T


def dense_ffn(x, w_in, w_out, activation="gelu"):
    return moe.activate(x @ w_in.T, activation) @ w_out.T


# ---- layers

def bench_moe(table):
    """One SwiGLU layer with its router, forward and backward."""
    shapes = [(4096, 256, 1024, 8, 2, ">= 1.1"), (4096, 256, 1024, 96, 1, ">= 1.5")]
    for t, d, f, e, k, reach in shapes[:1] if table.config.quick else shapes:
        x, router, w_in, w_out = leaves(table, (t, d), (e, d), (e, 2 * f, d), (e, d, f))
        a, b = ([w.detach().clone().requires_grad_() for w in stack] for stack in (w_in, w_out))
        ours, masks = moe_ours(x, router, w_in, w_out, k), moe_by_masks(x, router, a, b, k)
        agree("moe", ours, masks, table.tolerance)
        by_masks = lambda x, router, *w, k=k, e=e: moe_by_masks(x, router, w[:e], w[e:], k)
        times = table.time({
            "masks": forward_backward(by_masks, x, router, *a, *b),
            "ours": forward_backward(partial(moe_ours, top_k=k), x, router, w_in, w_out)}, 7)
        what = f"MoE layer fwd+bwd to a loop with masks, T={t} D={d} F={f} E={e} K={k}"
        table.faster("C2", what, times["masks"], times["ours"], reach)


def bench_infmoe(table):
    """The infmoe FFN by activation rate, which is a figure of the paper."""
    t, d, f, dz, k = 1024, 768, 6144, 64, 2
    x, _, w_in, w_out, _ = args = leaves(table, (t, d), (t, k, dz), (f, d), (d, f), (f, dz))
    curve = {}
    for rate in (0.25,) if table.config.quick else (0.05, 0.25, 0.5, 1.0):
        n, main, case = max(1, math.floor(rate * f + 0.5)), rate == 0.25, f"N={rate:.0%} K={k}"
        ours = partial(kernels.masked_ffn, n_keep=n, activation="gelu")
        literal = partial(infmoe_literal, n_keep=n)
        agree("infmoe", ours(*args), literal(*args), table.tolerance)
        with torch.no_grad():
            times = curve[rate] = table.time({
                "literal": partial(literal, *args), "ours": partial(ours, *args),
                "dense": partial(dense_ffn, x, w_in, w_out)}, 9)
        table.faster("C3", f"infmoe FFN forward to K FFNs with torch.topk, {case}",
                     times["literal"], times["ours"], ">= 2.6" if main else "")
        table.row("C3", f"infmoe FFN forward to a dense FFN of its width, {case}",
                  times["dense"], times["ours"], "<= 1.3" if main else "")
        if main:
            both = table.time({"literal": forward_backward(literal, *args),
                               "ours": forward_backward(ours, *args)}, 5)
            table.faster("C4", f"infmoe FFN fwd+bwd to K FFNs with torch.topk, {case}",
                         both["literal"], both["ours"], ">= 2.0")
    if len(curve) > 1:
        draw_latency(curve, table, f"K={k} samples, {t} tokens, {d} wide, {f} neurons")


def draw_latency(curve, table, case):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print('no picture: pip install -e ".[plot]"')
    figure = Figure(figsize=(5.5, 3.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name, label in (("literal", "K FFNs with torch.topk"), ("ours", "ours"),
                        ("dense", "dense FFN of the same width")):
        times = [1e3 * t[name] for t in curve.values()]
        axes.plot([100 * rate for rate in curve], times, marker="o", markersize=4, label=label)
    axes.set(xlabel="activation rate N (%)", ylabel="forward latency (ms)", ylim=(0, None),
             title=f"infmoe FFN, {describe(table.device)}\n{case}")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(Path(table.config.out, f"infmoe_latency_{table.device}.png"))


def bench_decode(table):
    """One token through the infmoe layer, and generation with and without the cache."""
    device = table.device
    for k, reach in ((1, ">= 3.0"), (2, ">= 1.3")):
        config = ModelConfig(
            flavour="infmoe", n_layer=1, n_head=12, d_model=768, d_expert=6144, infmoe_samples=k)
        layer = GPT(config).to(device).eval().blocks[0].ffn
        x, seeds = torch.randn(1, 768, device=device), torch.tensor([1], device=device)
        functions = {"masked": partial(masked_layer, layer, x, seeds),
                     "ours": lambda layer=layer, x=x, seeds=seeds: layer(x, None, seeds)[0]}
        with torch.no_grad():
            agree("decode", functions["ours"](), functions["masked"](), 1e-5)
            times = table.time(functions, 200)
        table.faster("C5", f"infmoe layer, one token, to its whole width masked, N=25% K={k}",
                     times["masked"], times["ours"], reach)
    bench_cache(table, 64 if table.config.quick else 512)


def masked_layer(layer, x, noise_seeds):
    """The infmoe layer, its router included, with its whole width computed and masked."""
    bank, z = layer.bank, layer.router(x, noise_seeds)[0].z
    return infmoe_masked(x, z, bank.w_in[0], bank.w_out, bank.w_z["0"], bank.n_keep[0])


def bench_cache(table, n):
    config = ModelConfig(n_layer=6, d_model=384, block_size=1024, vocab_size=257)
    model = GPT(config).to(table.device).eval()
    tokens = torch.zeros(1, 1, dtype=torch.int64, device=table.device)
    texts, times = {}, {}
    for use_cache in (True, False, True):  # the first one only warms up
        start = clock(table.device)
        texts[use_cache] = torch.cat(list(model.generate(tokens, n, 0, use_cache=use_cache)), 1)
        times[use_cache] = clock(table.device) - start
    if not torch.equal(texts[True][:, :64], texts[False][:, :64]):
        fail("generation with the cache disagrees with generation without it; no time is given")
    table.faster("C8", f"{n} new tokens with the KV cache to none, GPT of 6 layers d=384",
                 times[False], times[True], "" if table.config.quick else ">= 8.0")


def bench_pool(table):
    """One layer as its pool grows, time and activation memory; and memory as T grows."""
    d, f, t = 256, 512, 16384
    layer = lambda t, m: leaves(table, (t, d), (m, d), (m, 2 * f, d), (m, d, f))
    small, large, short = layer(t, 8), layer(t, 96), layer(t // 4, 96)
    step = partial(moe_ours, top_k=1)
    times = table.time({8: forward_backward(step, *small), 96: forward_backward(step, *large)}, 5)
    table.row("C10", f"one layer fwd+bwd, pool of 96 experts to one of 8, T={t}",
              times[8], times[96], "<= 1.5")
    kept = saved_bytes(*large)
    for what, reference, reach in (
            ("for backward, pool of 96 experts to one of 8", small, "<= 1.25"),
            ("at 4 T to T, pool of 96 experts (linear: 4)", short, "<= 4.2")):
        table.row("C10", f"activations kept {what}", saved_bytes(*reference), kept, reach, "B")


def saved_bytes(x, *parameters):
    """Bytes that autograd keeps for the backward pass of the layer, parameters apart."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in parameters}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = moe_ours(x, *parameters, top_k=1)
    del out  # not before here: while the graph lives, no address is used twice
    return sum(kept.values())


# ---- training steps

def training_step(config, device, batch, plain=False):
    """A closure that takes one optimizer step on a fixed batch, with train.py's defaults for this
    device (plain: eager, fp32, unfused). Its `gradient` is one weight's, for the comparison."""
    torch.manual_seed(0)
    model, t, place = GPT(config).to(device), TrainConfig(), torch.device(device)
    compiled = not plain and machine.pick_compile(t, place, config.n_active_params())[0]
    dtype = torch.float32 if plain else machine.pick_dtype(t, place, compiled)[0]
    forward = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=not plain, foreach=False)
    tokens = torch.randint(config.vocab_size, (batch, config.block_size + 1)).to(device)

    def forward_pass():
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return forward(tokens[:, :-1], tokens[:, 1:])

    def step():
        out = forward_pass()
        (out.loss + sum(out.aux.values())).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return out.loss

    def gradient():
        forward_pass().loss.backward()
        grad = model.blocks[0].attention.qkv.weight.grad
        optimizer.zero_grad(set_to_none=True)
        return grad

    step.gradient = gradient
    return step


def bench_train(table):
    """Whole training steps, optimizer included."""
    dense = ModelConfig(n_layer=6, n_head=6, d_model=384, block_size=256, vocab_size=8192)
    steps = {"plain": training_step(dense, table.device, 8, plain=True),
             "ours": training_step(dense, table.device, 8)}
    agree("training step", steps["ours"].gradient(), steps["plain"].gradient(), 5e-2)
    times = table.time(steps, 7)
    table.faster("C1", "training step to plain eager fp32, GPT of 6 layers d=384",
                 times["plain"], times["ours"], ">= 2.2")
    if table.config.quick:
        return
    config = partial(ModelConfig, arch="llama", n_layer=8, n_head=4, d_model=256, d_ff=512,
                     block_size=256, vocab_size=257)
    top2 = partial(config, flavour="topk", d_expert=256)
    models = {"dense": config(), "vanilla": config(flavour="switch"), "top2": top2(),
              "unipool": config(flavour="unipool"),
              "losses": top2(specialization_coef=2e-3, coupling_coef=1e-3)}
    steps = {name: training_step(m, table.device, 64) for name, m in models.items()}  # 16k tokens
    times = table.time(steps, 5)
    for id, what, reference, ours, reach in (
            ("C6", "of UniPool (M = 8 L) to vanilla MoE", "vanilla", "unipool", "<= 1.25"),
            ("C7", "of a MoE, top 1 of 8, to dense of equal FLOPs", "dense", "vanilla", "<= 1.25"),
            ("C9", "with specialization and coupling losses to without", "top2", "losses",
             "<= 1.05")):
        table.row(id, f"training step {what}", times[reference], times[ours], reach)


BENCHES = {"moe": bench_moe, "infmoe": bench_infmoe, "decode": bench_decode, "train": bench_train,
           "pool": bench_pool}


# ---- on a GPU

def bench_gpu_layer(table):
    """The Triton layer to grouped_mm and to a dense FFN of equal FLOPs, time and memory."""
    t = 32768
    shapes = [(768, 3072, 8, 1), (768, 3072, 96, 1), (1024, 512, 64, 8), (2048, 768, 128, 8)]
    for d, f, e, k in shapes[:1] if table.config.quick else shapes:
        args = leaves(table, (t, d), (e, d), (e, 2 * f, d), (e, d, f))
        ours = partial(moe_ours, top_k=k, backend="triton")
        grouped = partial(moe_by_grouped_mm, top_k=k)
        agree("triton", ours(*args), grouped(*args), 2e-2)
        functions = {"triton": ours, "grouped": grouped}
        steps = {name: forward_backward(g, *args) for name, g in functions.items()}
        memory = {name: peak_bytes(step, args) for name, step in steps.items()}
        dense = partial(dense_ffn, activation="swiglu")
        steps["dense"] = forward_backward(dense, *leaves(table, (t * k, d), (2 * f, d), (d, f)))
        times = table.time(steps, 20)
        case = f"D={d} F={f} E={e} K={k}"
        table.faster("G1", f"Triton MoE layer fwd+bwd to grouped_mm, {case}",
                     times["grouped"], times["triton"], ">= 1.2")
        table.faster("G1", f"Triton MoE layer fwd+bwd to dense of equal FLOPs, {case}",
                     times["dense"], times["triton"], ">= 0.7")
        table.row("G2", f"peak activation memory to grouped_mm, {case}",
                  memory["grouped"], memory["triton"], "<= 0.6", "B")


def peak_bytes(step, parameters):
    """Peak memory of a step beyond what stood before it and the gradients of its inputs."""
    step()  # compilation and autotuning take memory of their own
    for p in parameters:
        p.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    own = sum(p.numel() * p.element_size() for p in parameters)
    return torch.cuda.max_memory_allocated() - before - own


def bench_gpu_infmoe(table):
    """The masked FFN, forward and backward, over activation rates and samples."""
    t, d, f, dz, quick = 16384, 768, 6144, 64, table.config.quick
    compiled = torch.compile(infmoe_inside)
    for k in (2,) if quick else (1, 2, 4):
        args, forward = leaves(table, (t, d), (t, k, dz), (f, d), (d, f), (f, dz)), []
        for rate in (0.25,) if quick else (0.05, 0.25, 0.5, 1.0):
            n, case = max(1, math.floor(rate * f + 0.5)), f"N={rate:.0%} K={k}"
            ours = partial(kernels.masked_ffn, n_keep=n, activation="gelu", backend="triton")
            functions = {"literal": partial(infmoe_literal, n_keep=n),
                         "inside": partial(compiled, n_keep=n), "ours": ours}
            for name in ("ours", "inside"):
                agree(name, functions[name](*args), functions["literal"](*args), 3e-2)
            with torch.no_grad():
                times = table.time({m: partial(g, *args) for m, g in functions.items()}, 10)
            infmoe_rows(table, f"forward, {case}", times)
            forward.append(times["ours"])
            both = {m: forward_backward(g, *args) for m, g in functions.items()}
            infmoe_rows(table, f"fwd+bwd, {case}", table.time(both, 10))
        table.row("G3", f"infmoe FFN forward, slowest to fastest rate, K={k} (flat)",
                  min(forward), max(forward), "<= 1.1")


def infmoe_rows(table, case, times):
    table.faster("G3", f"infmoe FFN to K FFNs with torch.topk, {case}",
                 times["literal"], times["ours"], ">= 2.0")
    table.faster("G3", f"infmoe FFN to torch.compile of the sum inside, {case}",
                 times["inside"], times["ours"], "> 1.0")


def bench_gpu_train(table):
    """Tokens a second of whole training steps, and model FLOPs beside the card's peak."""
    speed, configs = {}, {}
    for name in ("gpt2_small", "llama_182m", "moe_182m", "unipool_182m", "infmoe_small"):
        parsed = parse(ModelConfig, TrainConfig, argv=[f"config/{name}.py"], words=("config",))
        configs[name] = parsed.make(ModelConfig)
    configs["wide"] = replace(configs["gpt2_small"], d_ff=6144)
    for name, config in configs.items():
        speed[name] = tokens_per_second(table, config)
    if peak := budget.peak_flops(torch.device("cuda")):
        flops = speed["gpt2_small"][0] * budget.flops_per_token(configs["gpt2_small"])
        what = "GPT-2 124M training, FLOP/s to the card's peak"
        table.row("G4", what, peak, flops, ">= 0.42", "")
    for id, ours, reference, title, reach in (
            ("G5", "moe_182m", "llama_182m", "dense", ">= 0.8"),
            ("G5", "unipool_182m", "llama_182m", "dense", ">= 0.8"),
            ("G6", "infmoe_small", "wide", "dense of its width", ">= 0.85")):
        (mine, loss), (theirs, _) = speed[ours], speed[reference]
        what = f"tokens a second in training, {ours} to {title}"
        table.row(id, what, theirs, mine, reach, "", loss=loss)


def tokens_per_second(table, config):
    """-> (tokens a second of a training step of 16 sequences, the last loss)"""
    step = training_step(config, table.device, 16)
    seconds = table.time({"step": step}, 8)["step"]
    loss = step().item()
    del step
    torch.cuda.empty_cache()
    return 16 * config.block_size / seconds, loss


def bench_gpu_decode(table):
    """infmoe decoding, batch 1 and 8."""
    for batch in (1, 8):
        shapes = (batch, 768), (batch, 1, 64), (6144, 768), (768, 6144), (6144, 64)
        args = *leaves(table, *shapes), 1536
        functions = {"masked": partial(infmoe_masked, *args),
                     "ours": partial(kernels.masked_ffn, *args, "gelu")}
        with torch.no_grad():
            agree("decode", functions["ours"](), functions["masked"](), 3e-2)
            times = table.time(functions, 200)
        table.faster("G7", f"infmoe decoding to its whole width masked, batch {batch}, N=25% K=1",
                     times["masked"], times["ours"], ">= 2.0")


GPU_BENCHES = {"gpu_layer": bench_gpu_layer, "gpu_infmoe": bench_gpu_infmoe,
               "gpu_train": bench_gpu_train, "gpu_decode": bench_gpu_decode}
SHORT_RUN = ["--dataset=data/stdlib", "--max_steps=60", "--batch_tokens=131072", "--micro_batch=16",
             "--warmup_steps=10", "--eval_every=20", "--eval_tokens=131072", "--save_every=0",
             "--log_every=5", "--overwrite"]


def gpu_check(config):
    """All that wants a GPU, what matters most first, a process each; nine minutes at most."""
    train = lambda name: ["train.py", f"config/{name}.py", f"--out_dir=out/gpu-{name}", *SHORT_RUN]
    commands = [
        ["kernels.py"],
        *(["-m", "lab.bench", name, f"--out={config.out}"] for name in GPU_BENCHES),
        ["-m", "pytest", "-q", "-m", "gpu"],
        ["prepare_data.py", "stdlib", "--overwrite"],
        *map(train, ("gpt2_small", "moe_182m", "unipool_182m", "infmoe_small"))]
    end = time.monotonic() + 540
    for words in commands:
        print(f"\n=== python {' '.join(words)}", flush=True)
        limit = min(150, end - time.monotonic())
        try:
            code = subprocess.run([sys.executable, *words], timeout=max(1, limit)).returncode
            print(f"exit code {code}", flush=True)
        except subprocess.TimeoutExpired:
            print(f"stopped after {limit:.0f} s", flush=True)


# ---- the command line

def run_bench(name, config, device):
    table = Table(name, config, "cuda" if name in GPU_BENCHES else device)
    try:
        (BENCHES | GPU_BENCHES)[name](table)
    finally:
        if table.rows:
            table.save()


def main():
    parsed = parse(BenchConfig, words=("bench",), doc=__doc__)
    config, name = parsed.make(BenchConfig), parsed.words["bench"]
    name = "all" if name is None else name
    if name not in (*BENCHES, *GPU_BENCHES, "all", "gpu_check"):
        fail(f"unknown bench '{name}': expected {', '.join([*BENCHES, 'all', 'gpu_check'])}")
    if name in (*GPU_BENCHES, "gpu_check") and not torch.cuda.is_available():
        fail(f"{name} needs a CUDA device, and this torch sees none; "
             "`make test` and `make bench` check what a CPU can")
    # TERM ends by way of `finally`: the lock goes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        on_cpu = config.device == "auto" and not torch.cuda.is_available()
        device = "cpu" if on_cpu else machine.pick_device(config.device).type
        if config.threads:
            torch.set_num_threads(config.threads)
        machine.keep_memory()  # as train.py does
        Path(config.out).mkdir(parents=True, exist_ok=True)
        if name == "gpu_check":
            return gpu_check(config)
        with timing_lock():
            for each in BENCHES if name == "all" else [name]:
                run_bench(each, config, device)
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
