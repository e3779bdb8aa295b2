"""Speed and memory, each as a ratio to a reference that is timed in the same process, interleaved.

    python -m lab.bench all                  # the CPU table C1 to C10, in under ten minutes (make bench)
    python -m lab.bench moe --quick          # one table at one shape
    python -m lab.bench infmoe               # latency against activation rate, as a table and a picture
    python -m lab.bench gpu_check --out=DIR  # on a GPU: kernels, tests, G1 to G7, short real runs, in nine minutes

Benches: moe, infmoe, decode, train, pool, all, gpu_check. Two ways to compute one thing are compared before they are timed: one
that disagrees prints no speed. Tables go to the screen, and as JSON with hardware, versions and shapes into --out.
While it runs it holds out/timing.lock, which pauses the runs of reproduce.py.
"""
import contextlib
import dataclasses
import json
import math
import operator
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F

import kernels
import moe
from configurator import fail, parse
from model import GPT, ModelConfig
from support.machine import flops_per_token, keep_memory, peak_flops, pick_compile, pick_device, pick_dtype
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
            raise ValueError(f"threads={self.threads}: expected 0 to {os.cpu_count()}, the CPUs of this machine")
        if self.repeat < 0:
            raise ValueError(f"repeat={self.repeat}: expected 0 (the bench's own choice) or more")


# ----------------------------------------------------------------------------------------------------------------------
# Measuring

def clock(device):
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def interleave(functions, device, rounds):
    """Median seconds of each function: {name: f}. Round by round in turn, so that a busy moment hits all of them alike."""
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


def tolerance(dtype):
    return 1e-5 if dtype == torch.float32 else 2e-2


def agree(name, out, reference, limit):
    """Relative distance of two outputs; SystemExit above the tolerance, because a wrong result has no speed."""
    distance = ((out.double() - reference.double()).norm() / reference.double().norm().clamp_min(1e-30)).item()
    if not distance <= limit:
        fail(f"{name} disagrees with its reference: relative distance {distance:.2e} > {limit:.0e}; nothing was timed")
    return distance


class Table:
    """Rows of one bench: printed as they come, appended to a JSON file at the end."""

    def __init__(self, name, config, device):
        self.name, self.config, self.device, self.rows = name, config, device, []
        print(f"\n{name} on {describe(device)}\n{'id':4} {'what':58} {'reference':>11} {'ours':>11} {'ratio':>7}  reach")

    def row(self, id, what, reference, ours, ratio, reach, unit="s", **more):
        """ratio is what is claimed; reach is a text such as ">= 1.1" that it must satisfy. Values are in s, B or unit-free."""
        sign, _, limit = reach.partition(" ")
        ok = {">=": operator.ge, "<=": operator.le, ">": operator.gt}[sign](ratio, float(limit)) if reach else None
        shown, scale = {"s": ("ms", 1e3), "B": ("MB", 1e-6), "": ("", 1)}[unit]
        self.rows.append(dict(id=id, what=what, reference=reference, ours=ours, unit=unit, ratio=round(ratio, 3), reach=reach,
                              reached=ok, **more))
        print(f"{id:4} {what:58} {reference * scale:8.2f} {shown:2} {ours * scale:8.2f} {shown:2} {ratio:7.2f}  {reach or ''}"
              f" {'' if ok is None else 'reached' if ok else 'NOT REACHED'}", flush=True)

    def faster(self, id, what, reference, ours, reach, **more):
        """A row whose ratio is how many times faster ours is."""
        self.row(id, what, reference, ours, reference / ours, reach, **more)

    def save(self):
        folder = Path(self.config.out)
        folder.mkdir(parents=True, exist_ok=True)
        record = dict(bench=self.name, hardware=describe(self.device), torch=torch.__version__, triton=triton_version(),
                      threads=torch.get_num_threads(), command=" ".join(["python -m lab.bench", *sys.argv[1:]]),
                      date=time.strftime("%Y-%m-%d"), rows=self.rows)
        with open(folder / f"{self.name}.jsonl", "a") as f:
            f.write(json.dumps(record) + "\n")


def describe(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def triton_version():
    try:
        import triton
        return triton.__version__
    except ImportError:
        return None


@contextlib.contextmanager
def timing_lock():
    """Ask reproduce.py's runs to pause."""
    path = Path("out/timing.lock")
    path.parent.mkdir(exist_ok=True)
    try:
        path.write_text(str(os.getpid()))
        time.sleep(1.5)  # it looks twice a second
        yield
    finally:
        path.unlink(missing_ok=True)


def forward_backward(f, *inputs):
    """A closure that runs f(*inputs), then the backward pass from a fixed gradient, with no gradients left from before."""
    with torch.no_grad():
        grad = torch.randn_like(f(*inputs))

    def run():
        for x in inputs:
            x.grad = None
        f(*inputs).backward(grad)
    return run


# ----------------------------------------------------------------------------------------------------------------------
# References: the formulas as the papers write them

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


def experts_by_grouped_mm(x, weights, ids, w_in, w_out):
    """torch's grouped_mm and its own autograd, which keeps every intermediate: the reference of G1 and G2."""
    order, ends = kernels.sort_by_expert(ids, w_in.shape[0])
    rows = x.index_select(0, order // ids.shape[1])  # (N, D), by expert
    act = moe.activate(F.grouped_mm(rows, w_in.transpose(1, 2), offs=ends), "swiglu")  # (N, F)
    out = kernels.undo_order(F.grouped_mm(act, w_out.transpose(1, 2), offs=ends), order)  # (N, D), by token
    return (out.view(*ids.shape, -1) * weights.to(x.dtype).unsqueeze(-1)).sum(1)


def moe_by_grouped_mm(x, router, w_in, w_out, top_k):
    weights, ids = (x @ router.T).softmax(-1).topk(top_k)
    return experts_by_grouped_mm(x, weights, ids, w_in, w_out)


def infmoe_literal(x, z, w_in, w_out, w_z, n_keep):
    """y = (1/K) sum_k W_2 ( TopN(W_z z_k) * act(W_1 x) ), K FFNs with torch.topk."""
    y = 0
    for k in range(z.shape[1]):
        scores = z[:, k] @ w_z.T  # (T, F)
        top = scores.topk(n_keep, dim=-1)
        mask = torch.zeros_like(scores).scatter(1, top.indices, top.values)
        y = y + (mask * moe.activate(x @ w_in.T, "gelu")) @ w_out.T
    return y / z.shape[1]


def dense_ffn(x, w_in, w_out):
    return moe.activate(x @ w_in.T, "gelu") @ w_out.T


# ----------------------------------------------------------------------------------------------------------------------
# Benches

def bench_moe(table, c, device, dtype):
    """C2: one SwiGLU layer with its router, forward and backward."""
    shapes = [(4096, 256, 1024, 8, 2, ">= 1.1"), (4096, 256, 1024, 96, 1, ">= 1.5")]
    for t, d, f, e, k, reach in shapes[:1] if c.quick else shapes:
        x, router, w_in, w_out = leaves(device, dtype, (t, d), (e, d), (e, 2 * f, d), (e, d, f))
        experts = [[w.detach().clone().requires_grad_() for w in stack] for stack in (w_in, w_out)]
        ours = forward_backward(partial(moe_ours, top_k=k), x, router, w_in, w_out)
        by_masks = lambda x, router, *w, k=k, e=e: moe_by_masks(x, router, w[:e], w[e:], k)
        reference = forward_backward(by_masks, x, router, *experts[0], *experts[1])
        agree("moe", moe_ours(x, router, w_in, w_out, k), moe_by_masks(x, router, *experts, k), tolerance(dtype))
        times = interleave({"reference": reference, "ours": ours}, device, c.repeat or 7)
        table.faster("C2", f"MoE layer fwd+bwd, T={t} D={d} F={f} E={e} K={k}", times["reference"], times["ours"], reach)


def bench_infmoe(table, c, device, dtype):
    """C3, C4, and latency against the activation rate: the paper's figure."""
    t, d, f, dz, k = 1024, 768, 6144, 64, 2
    x, z, w_in, w_out, w_z = leaves(device, dtype, (t, d), (t, k, dz), (f, d), (d, f), (f, dz))
    rates = (0.25,) if c.quick else (0.05, 0.25, 0.5, 1.0)
    curve = {}
    for rate in rates:
        n = max(1, math.floor(rate * f + 0.5))
        ours, literal = partial(kernels.masked_ffn, n_keep=n, activation="gelu"), partial(infmoe_literal, n_keep=n)
        args = x, z, w_in, w_out, w_z
        agree("infmoe", ours(*args), literal(*args), tolerance(dtype))
        with torch.no_grad():
            functions = {"literal": partial(literal, *args), "ours": partial(ours, *args)}
            functions["dense"] = partial(dense_ffn, x, w_in, w_out)
            times = interleave(functions, device, c.repeat or 9)
        curve[rate] = times
        main = rate == 0.25
        table.faster("C3", f"infmoe FFN forward, N={rate:.0%} K={k}", times["literal"], times["ours"], ">= 2.6" if main else "")
        table.row("C3", f"the same against a dense FFN of its width, N={rate:.0%}", times["dense"], times["ours"],
                  times["ours"] / times["dense"], "<= 1.3" if main else "")
        if main:
            both = {name: forward_backward(g, *args) for name, g in (("literal", literal), ("ours", ours))}
            times = interleave(both, device, c.repeat or 5)
            table.faster("C4", f"infmoe FFN forward + backward, N={rate:.0%} K={k}", times["literal"], times["ours"], ">= 2.0")
    if len(curve) > 1:
        draw_latency(curve, c, device)


def bench_decode(table, c, device, dtype):
    """C5: one token through the infmoe layer, router and masks on both sides. C8: generation with and without the cache."""
    for k, reach in ((1, ">= 3.0"), (2, ">= 1.3")):
        config = ModelConfig(flavour="infmoe", n_layer=1, n_head=12, d_model=768, d_expert=6144, infmoe_samples=k)
        layer = GPT(config).to(device).eval().blocks[0].ffn
        args = layer, torch.randn(1, 768, device=device), torch.tensor([1], device=device)
        with torch.no_grad():
            agree("decode", decode_ours(*args), masked_dense(*args), 1e-5)
            functions = {"reference": partial(masked_dense, *args), "ours": partial(decode_ours, *args)}
            times = interleave(functions, device, c.repeat or 200)
        table.faster("C5", f"infmoe layer, one token, N=25% K={k}, to masked dense", times["reference"], times["ours"], reach)
    model = GPT(ModelConfig(n_layer=6, d_model=384, block_size=1024, vocab_size=257)).to(device).eval()
    tokens, n = torch.zeros(1, 1, dtype=torch.int64, device=device), 64 if c.quick else 512
    generate = lambda use_cache: torch.cat(list(model.generate(tokens, n, temperature=0, use_cache=use_cache)), 1)
    if not torch.equal(generate(True)[:, :64], generate(False)[:, :64]):
        fail("generation with the cache disagrees with generation without it; nothing was timed")
    times = {}
    for use_cache in (False, True):
        start = clock(device)
        generate(use_cache)
        times[use_cache] = clock(device) - start
    table.faster("C8", f"{n} new tokens with the KV cache, 6 layers", times[False], times[True], "" if c.quick else ">= 8.0")


def masked_dense(layer, x, keys):
    """The infmoe layer with its whole width computed and masked."""
    bank, z = layer.bank, layer.router(x, keys)[0].z
    mask = kernels.topn_mask(z @ bank.w_z["0"].T, bank.n_keep[0]).mean(1)
    return (mask * moe.activate(x @ bank.w_in[0].T, "gelu")) @ bank.w_out.T


def decode_ours(layer, x, keys):
    return layer(x, None, keys)[0]


def training_step(config, device, batch, plain=False):
    """A closure that takes one optimizer step on a fixed batch, with train.py's defaults for this device (or plain: eager,
    fp32, unfused). Its `gradient` is one weight's, for the comparison."""
    torch.manual_seed(0)
    model = GPT(config).to(device)
    t = TrainConfig()
    compiled = not plain and pick_compile(t, torch.device(device), config.n_active_params())[0]
    dtype = torch.float32 if plain else pick_dtype(t, torch.device(device), compiled)[0]
    forward = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=not plain, foreach=False)
    tokens = torch.randint(config.vocab_size, (batch, config.block_size + 1)).to(device)

    def step():
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            out = forward(tokens[:, :-1], tokens[:, 1:])
        (out.loss + sum(out.aux.values())).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return out.loss

    def gradient():
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            forward(tokens[:, :-1], tokens[:, 1:]).loss.backward()
        grad = model.blocks[0].attention.qkv.weight.grad
        optimizer.zero_grad(set_to_none=True)
        return grad

    step.gradient = gradient
    return step


def bench_train(table, c, device, dtype):
    """C1, C6, C7, C9: whole training steps, optimizer included."""
    dense = ModelConfig(n_layer=6, n_head=6, d_model=384, block_size=256, vocab_size=8192)
    steps = {"plain": training_step(dense, device, 8, plain=True), "ours": training_step(dense, device, 8)}
    agree("training step", steps["ours"].gradient(), steps["plain"].gradient(), 5e-2)
    times = interleave(steps, device, c.repeat or 7)
    table.faster("C1", "training step, GPT 6 layers d=384, against plain eager fp32", times["plain"], times["ours"], ">= 2.2")
    if c.quick:
        return
    base = dict(arch="llama", n_layer=8, n_head=4, d_model=256, d_ff=512, block_size=256, vocab_size=257)
    models = {"dense": ModelConfig(**base), "vanilla": ModelConfig(flavour="switch", **base),
              "unipool": ModelConfig(flavour="unipool", **base), "top2": ModelConfig(flavour="topk", d_expert=256, **base)}
    models["losses"] = dataclasses.replace(models["top2"], specialization_coef=2e-3, coupling_coef=1e-3)
    times = interleave({name: training_step(m, device, 64) for name, m in models.items()}, device, c.repeat or 5)  # 16k tokens
    for id, what, reference, ours, reach in (
            ("C6", "training step, UniPool M = 8 L, against vanilla MoE", "vanilla", "unipool", "<= 1.25"),
            ("C7", "training step, top 1 of 8, against dense of equal FLOPs", "dense", "vanilla", "<= 1.25"),
            ("C9", "training step with specialization and coupling, against off", "top2", "losses", "<= 1.05")):
        table.row(id, what, times[reference], times[ours], times[ours] / times[reference], reach)


def bench_pool(table, c, device, dtype):
    """C10: one layer as the pool grows, time and activation memory; and memory as T grows."""
    d, f, t = 256, 512, 16384
    functions, memory = {}, {}
    for m in (8, 96):
        x, router, w_in, w_out = leaves(device, dtype, (t, d), (m, d), (m, 2 * f, d), (m, d, f))
        functions[m] = forward_backward(partial(moe_ours, top_k=1), x, router, w_in, w_out)
        memory[m] = saved_bytes(x, router, w_in, w_out)
    times = interleave(functions, device, c.repeat or 5)
    table.row("C10", f"one layer fwd+bwd, pool of 96 against 8, T={t}", times[8], times[96], times[96] / times[8], "<= 1.5")
    table.row("C10", "activations kept for the backward, pool of 96 against 8", memory[8], memory[96], memory[96] / memory[8],
              "<= 1.25", "B")
    kept = {}
    for tokens in (t // 4, t):
        x, router, w_in, w_out = leaves(device, dtype, (tokens, d), (96, d), (96, 2 * f, d), (96, d, f))
        kept[tokens] = saved_bytes(x, router, w_in, w_out)
    table.row("C10", "activations at 4 T against T, pool of 96 (linear: 4)", kept[t // 4], kept[t], kept[t] / kept[t // 4],
              "<= 4.2", "B")


def saved_bytes(x, *parameters):
    """Bytes that autograd keeps for the backward pass of the layer, parameters apart."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in parameters}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = moe_ours(x, *parameters, top_k=1)
    del out  # not before here: while the graph lives, no address is used twice
    return sum(kept.values())


def leaves(device, dtype, *shapes):
    """Random tensors that need gradients; weights (all but the first) at the scale of an initialised layer."""
    generator = torch.Generator().manual_seed(0)
    scales = [1.0] + [1.0 if len(s) == 3 and s[-1] <= 128 else s[-1] ** -0.5 for s in shapes[1:]]
    tensors = [torch.randn(s, generator=generator) * scale for s, scale in zip(shapes, scales)]
    return [x.to(device, dtype).requires_grad_() for x in tensors]


def draw_latency(curve, c, device):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(5.5, 3.8), dpi=150, layout="constrained")
    axes = figure.subplots()
    for name, label in (("literal", "K FFNs with torch.topk"), ("ours", "ours"), ("dense", "dense FFN of the same width")):
        axes.plot([100 * r for r in curve], [1e3 * t[name] for t in curve.values()], marker="o", markersize=4, label=label)
    axes.set(xlabel="activation rate N (%)", ylabel="forward latency (ms)", ylim=(0, None))
    axes.set_title(f"infmoe FFN, {describe(device)}")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    Path(c.out).mkdir(parents=True, exist_ok=True)
    figure.savefig(Path(c.out, f"infmoe_latency_{device}.png"))


BENCHES = {"moe": bench_moe, "infmoe": bench_infmoe, "decode": bench_decode, "train": bench_train, "pool": bench_pool}


# ----------------------------------------------------------------------------------------------------------------------
# On a GPU: G1 to G7

def bench_gpu_layer(table, c, device, dtype):
    """G1, G2: the Triton layer against grouped_mm and against a dense FFN of equal FLOPs, time and memory."""
    t, shapes = 32768, [(768, 3072, 8, 1), (768, 3072, 96, 1), (1024, 512, 64, 8), (2048, 768, 128, 8)]
    for d, f, e, k in shapes[:1] if c.quick else shapes:
        x, router, w_in, w_out = leaves(device, dtype, (t, d), (e, d), (e, 2 * f, d), (e, d, f))
        layer = {"triton": partial(moe_ours, top_k=k, backend="triton"), "grouped": partial(moe_by_grouped_mm, top_k=k)}
        agree("triton", layer["triton"](x, router, w_in, w_out), layer["grouped"](x, router, w_in, w_out), 2e-2)
        runs = {name: forward_backward(g, x, router, w_in, w_out) for name, g in layer.items()}
        rows, a, b = leaves(device, dtype, (t * k, d), (2 * f, d), (d, f))
        runs["dense"] = forward_backward(lambda x, a, b: moe.activate(x @ a.T, "swiglu") @ b.T, rows, a, b)
        times = interleave(runs, device, c.repeat or 20)
        what = f"MoE layer fwd+bwd D={d} F={f} E={e} K={k}"
        table.faster("G1", f"{what}, against grouped_mm", times["grouped"], times["triton"], ">= 1.2")
        table.faster("G1", f"{what}, share of cuBLAS", times["dense"], times["triton"], ">= 0.7")
        memory = {name: peak_bytes(runs[name], (x, router, w_in, w_out)) for name in layer}
        table.row("G2", f"peak activation memory, E={e} K={k}", memory["grouped"], memory["triton"],
                  memory["triton"] / memory["grouped"], "<= 0.6", "B")


def peak_bytes(step, parameters):
    """Peak memory of a step beyond what stood before it and the gradients of its inputs."""
    for p in parameters:
        p.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before - sum(p.numel() * p.element_size() for p in parameters)


def infmoe_inside(x, z, w_in, w_out, w_z, n_keep):
    """The sum moved inside W_2, in plain torch: what torch.compile is given for comparison (b)."""
    scores = z @ w_z.T  # (T, K, F)
    threshold = scores.kthvalue(scores.shape[-1] - n_keep + 1, dim=-1, keepdim=True).values
    mask = (scores * (scores >= threshold)).mean(1)
    return (mask * moe.activate(x @ w_in.T, "gelu")) @ w_out.T


def bench_gpu_infmoe(table, c, device, dtype):
    """G3: the masked FFN, forward and forward + backward, over activation rates and samples."""
    t, d, f, dz = 16384, 768, 6144, 64
    compiled, curve = torch.compile(infmoe_inside), {}
    for k in (2,) if c.quick else (1, 2, 4):
        x, z, w_in, w_out, w_z = leaves(device, dtype, (t, d), (t, k, dz), (f, d), (d, f), (f, dz))
        for rate in (0.25,) if c.quick else (0.05, 0.25, 0.5, 1.0):
            n = max(1, math.floor(rate * f + 0.5))
            args = x, z, w_in, w_out, w_z
            functions = {"literal": partial(infmoe_literal, n_keep=n), "inside": partial(compiled, n_keep=n),
                         "ours": partial(kernels.masked_ffn, n_keep=n, activation="gelu", backend="triton")}
            for name in ("ours", "inside"):
                agree(name, functions[name](*args), functions["literal"](*args), 3e-2)
            with torch.no_grad():
                forward = interleave({m: partial(g, *args) for m, g in functions.items()}, device, c.repeat or 10)
            both = interleave({m: forward_backward(g, *args) for m, g in functions.items()}, device, c.repeat or 10)
            for label, times in (("forward", forward), ("fwd+bwd", both)):
                what = f"infmoe FFN {label}, N={rate:.0%} K={k}"
                table.faster("G3", f"{what}, against literal", times["literal"], times["ours"], ">= 2.0")
                table.faster("G3", f"{what}, against compiled", times["inside"], times["ours"], "> 1.0")
            curve[k, rate] = forward["ours"]
    for k in sorted({k for k, _ in curve}):
        times = [s for (kk, _), s in curve.items() if kk == k]
        table.row("G3", f"slowest over fastest rate, K={k} (flat)", min(times), max(times), max(times) / min(times), "<= 1.1")


def bench_gpu_train(table, c, device, dtype):
    """G4, G5, G6: tokens a second of whole training steps, and model FLOPs at the card's peak."""
    peak = peak_flops(torch.device("cuda"))
    rounds = c.repeat or 8
    speed = {}
    plain = [(name, {}) for name in ("gpt2_small", "llama_182m", "moe_182m", "unipool_182m", "infmoe_small")]
    for config_name, overrides in [*plain, ("gpt2_small", dict(d_ff=6144))]:
        parsed = parse(ModelConfig, TrainConfig, argv=[f"config/{config_name}.py"], words=("config",))
        given = {**parsed.given, **overrides}
        config = ModelConfig(**{k: v for k, v in given.items() if k in ModelConfig.__dataclass_fields__})
        step = training_step(config, device, 16)
        seconds = interleave({"step": step}, device, rounds)["step"]
        speed[config_name + "-wide" * bool(overrides)] = (16 * config.block_size / seconds, config, step().item())
        del step
        torch.cuda.empty_cache()
    tokens, config, _ = speed["gpt2_small"]
    if peak:
        table.row("G4", "GPT-2 124M training, share of the peak (MFU)", peak, tokens * flops_per_token(config),
                  tokens * flops_per_token(config) / peak, ">= 0.42", "")
    for id, ours, reference, reach in (("G5", "moe_182m", "llama_182m", ">= 0.8"), ("G5", "unipool_182m", "llama_182m", ">= 0.8"),
                                       ("G6", "infmoe_small", "gpt2_small-wide", ">= 0.85")):
        (theirs, *_), (mine, _, loss) = speed[reference], speed[ours]
        table.row(id, f"tokens/s, {ours} against {reference}", theirs, mine, mine / theirs, reach, "", loss=loss)


def bench_gpu_decode(table, c, device, dtype):
    """G7: infmoe decoding, batch 1 and 8, against masked dense."""
    for batch in (1, 8):
        args = leaves(device, dtype, (batch, 768), (batch, 1, 64), (6144, 768), (768, 6144), (6144, 64))
        x, z, w_in, w_out, w_z = args
        masked = lambda x=x, z=z, w_in=w_in, w_out=w_out, w_z=w_z: (
            kernels.topn_mask(z @ w_z.T, 1536).mean(1) * moe.activate(x @ w_in.T, "gelu")) @ w_out.T
        functions = {"reference": masked, "ours": partial(kernels.masked_ffn, *args, 1536, "gelu")}
        with torch.no_grad():
            agree("decode", functions["ours"](), functions["reference"](), 3e-2)
            times = interleave(functions, device, c.repeat or 200)
        table.faster("G7", f"infmoe decoding, batch {batch}, N=25% K=1", times["reference"], times["ours"], ">= 2.0")


GPU_BENCHES = {"gpu_layer": bench_gpu_layer, "gpu_infmoe": bench_gpu_infmoe, "gpu_train": bench_gpu_train,
               "gpu_decode": bench_gpu_decode}
SHORT_RUN = ["--dataset=data/stdlib", "--max_steps=60", "--batch_tokens=131072", "--micro_batch=16", "--warmup_steps=10",
             "--eval_every=20", "--eval_tokens=131072", "--save_every=0", "--log_every=5", "--overwrite"]


def gpu_check(c):
    """Everything that wants a GPU, in the order of what matters most, printed as it goes; under nine minutes."""
    begin, out = time.monotonic(), Path(c.out)

    def left(seconds, what):
        enough = 530 - (time.monotonic() - begin) > seconds
        print(f"\n=== {what}" + ("" if enough else ": left out, the nine minutes are nearly over"), flush=True)
        return enough

    def command(what, words, seconds):
        if not left(seconds, what):
            return
        try:
            limit = min(seconds * 3, 560 - (time.monotonic() - begin))
            run = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit)
            text, how = run.stdout.decode(), f"exit code {run.returncode}"
        except subprocess.TimeoutExpired as error:
            text, how = (error.stdout or b"").decode(), f"stopped after {limit:.0f} s"
        with open(out / "gpu_check.log", "a") as log:
            log.write(f"=== {what}\n{text}\n{how}\n")
        print(text[-3000:] + f"\n{how}", flush=True)

    command("kernel parity", [sys.executable, "kernels.py"], 60)
    for name, bench in GPU_BENCHES.items():
        if left(70, name):
            try:
                run_bench(name, bench, c, "cuda", torch.bfloat16)
            except (Exception, SystemExit) as error:  # one broken table must not cost the others
                print(f"{name} failed: {type(error).__name__}: {error}", flush=True)
    command("tests that want a GPU", [sys.executable, "-m", "pytest", "-q", "-m", "gpu"], 60)
    command("data", [sys.executable, "prepare_data.py", "stdlib", "--overwrite"], 20)
    for config in ("gpt2_small", "moe_182m", "unipool_182m", "infmoe_small"):
        words = [sys.executable, "train.py", f"config/{config}.py", f"--out_dir=out/gpu-{config}", *SHORT_RUN]
        command(f"train {config}", words, 45)


def run_bench(name, bench, c, device, dtype):
    table = Table(name, c, device)
    try:
        bench(table, c, device, dtype)
    finally:
        if table.rows:
            table.save()


def main():
    parsed = parse(BenchConfig, words=("bench",), doc=__doc__)
    c, name = parsed.make(BenchConfig), "all" if parsed.words["bench"] is None else parsed.words["bench"]
    if name not in (*BENCHES, *GPU_BENCHES, "all", "gpu_check"):
        fail(f"unknown bench '{name}': expected {', '.join([*BENCHES, 'all', 'gpu_check'])}")
    if name in (*GPU_BENCHES, "gpu_check") and not torch.cuda.is_available():
        fail(f"{name} needs a CUDA device, and this torch sees none; `make test` and `make bench` check what a CPU can")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # by way of `finally`: the lock goes
    try:
        device = "cpu" if c.device == "auto" and not torch.cuda.is_available() else pick_device(c.device).type
        if c.threads:
            torch.set_num_threads(c.threads)
        keep_memory()  # as train.py does
        Path(c.out).mkdir(parents=True, exist_ok=True)
        with timing_lock():
            run_benches(name, c, device)
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def run_benches(name, c, device):
    if name == "gpu_check":
        return gpu_check(c)
    if name in GPU_BENCHES:
        return run_bench(name, GPU_BENCHES[name], c, "cuda", torch.bfloat16)
    for each in BENCHES if name == "all" else [name]:
        run_bench(each, BENCHES[each], c, device, torch.float32 if device == "cpu" else torch.bfloat16)


if __name__ == "__main__":
    main()
