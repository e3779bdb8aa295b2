"""Speed on a CPU: each row a ratio to a reference that is timed in the same process, in turns.

    python -m lab.bench all                  # every row, under ten minutes (make bench)
    python -m lab.bench moe --quick          # one bench, its first shape
    python -m lab.bench train --nanogpt=DIR  # beside karpathy/nanoGPT, cloned into DIR
    python -m lab.bench page                 # cpu.md again from the rows of all machines

Benches: train, tiny, moe, infmoe, pool, decode. Two ways to compute one thing are compared before
they are timed: one that disagrees has no row. A row is written as soon as it is measured, to
bench/cpu.jsonl in --out; `all` ends with the page. Where transformers is installed its Mixtral and
OLMoE blocks are references, too.
"""
import contextlib
import importlib.util
import io
import itertools
import json
import operator
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

import kernels
import moe
import train
from configurator import fail, parse
from lab import plots
from lab.reproduce import configs_of, cpu_name, settings_of
from model import GPT, ModelConfig
from support import cpu, hf, machine, trust
from support.usage import one_line


@dataclass
class BenchConfig:
    quick: bool = False  # one shape per bench
    out: str = "results"  # folder of cpu.md, and of bench/ with the rows and the picture
    repeat: int = 0  # timed rounds; 0: as many as the bench thinks right
    nanogpt: str | None = None  # a clone of karpathy/nanoGPT; None: without

    def __post_init__(self):
        if self.repeat < 0:
            raise ValueError(f"repeat={self.repeat}: expected 0 or more")
        if self.nanogpt and not Path(self.nanogpt, "model.py").exists():
            raise ValueError(f"nanogpt={self.nanogpt} has no model.py: git clone "
                             "https://github.com/karpathy/nanoGPT, and name that folder")


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


def agree(name, ours, reference, limit):
    """ArithmeticError where two results, each a tensor or several, are further apart (relative to
    the reference) than the limit: a wrong result has no speed."""
    many = lambda x: x if isinstance(x, (tuple, list)) else (x,)
    for a, b in zip(many(ours), many(reference), strict=True):
        if (found := trust.distance(a, b)) > limit:
            raise ArithmeticError(f"{name} disagrees with its reference: "
                                  f"relative distance {found:.2e} > {limit:.0e}")


def describe(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    able = " with AVX-512" if torch.backends.cpu.get_cpu_capability() == "AVX512" else ""
    able = " with AMX" if torch.cpu._is_amx_tile_supported() else able
    return f"{cpu_name()}{able}, {torch.get_num_threads()} threads"


SIGNS = {">=": operator.ge, "<=": operator.le, ">": operator.gt}
WORDS = {None: "", True: "reached", False: "NOT REACHED"}
SCALES = {"s": ("ms", 1e3), "B": ("MB", 1e-6), "": ("", 1)}


class Table:
    """Rows of a bench: printed, and appended to a file of JSON lines, as they are measured."""

    def __init__(self, config, device="cpu"):
        self.config, self.device, self.rows = config, device, []
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.path = Path(config.out, "bench", f"{'cpu' if device == 'cpu' else 'gpu'}.jsonl")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.machine = dict(
            machine=describe(device), date=time.strftime("%Y-%m-%d"), torch=torch.__version__,
            triton=getattr(sys.modules.get("triton"), "__version__", None))

    def time(self, functions, rounds):
        return interleave(functions, self.device, self.config.repeat or rounds)

    def row(self, what, reference, theirs, ours, reach="", unit="s", invert=False):
        """Ours over theirs (inverted: the reverse), which must satisfy reach: "<= 1.25".

        what: in words, with shapes; reference: whose `theirs` is. Both values in seconds ("s"),
        bytes ("B") or of another kind ("").
        """
        ratio = theirs / ours if invert else ours / theirs
        sign, limit = reach.split() if reach else (None, 0)
        reached = SIGNS[sign](ratio, float(limit)) if reach else None
        row = dict(what=what, reference=reference, theirs=theirs, ours=ours, unit=unit,
                   ratio=round(ratio, 3), reach=reach, reached=reached)
        self.rows.append(row)
        with open(self.path, "a") as f:
            f.write(json.dumps(self.machine | row) + "\n")
        shown, scale = SCALES[unit]
        print(f"{what}, to {reference}:\n    {theirs * scale:.2f} {shown}, ours {ours * scale:.2f} "
              f"{shown}, ratio {ratio:.2f}  {reach} {WORDS[reached]}", flush=True)

    def faster(self, what, reference, theirs, ours, reach=""):
        """A row whose ratio is how many times faster ours is."""
        self.row(what, reference, theirs, ours, reach, invert=True)


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


# ---- layers, and their references

def moe_layer(x, router, w_in, w_out, top_k, normalise=False, experts=kernels.expert_ffn):
    weights, ids = (x @ router.T).softmax(-1).topk(top_k)  # (T, K)
    weights = weights / weights.sum(-1, keepdim=True) if normalise else weights
    return experts(x, weights, ids, w_in, w_out, "swiglu")[0]


def transformers_blocks(family, x, router, w_in, w_out, top_k):
    """{backend: layer} of transformers' block, which takes the same inputs; {} where it is not
    installed. Not batched_mm: it copies every token's experts, 25 GB here."""
    if not importlib.util.find_spec("transformers"):
        return {}
    name = family.lower()
    modeling = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    made = {}
    for backend in ("eager", "grouped_mm"):
        config = getattr(modeling, f"{family}Config")(
            hidden_size=x.shape[1], intermediate_size=w_out.shape[2], num_experts_per_tok=top_k,
            num_local_experts=len(w_in), num_experts=len(w_in))
        config._experts_implementation = backend
        block = getattr(modeling, f"{family}SparseMoeBlock")(config)
        made[backend] = partial(call_block, block)
    return made


def call_block(block, x, router, w_in, w_out):
    """Its modules use our leaves as they stand, gradients included."""
    inner = {"gate.weight": router, "experts.gate_up_proj": w_in, "experts.down_proj": w_out}
    return torch.func.functional_call(block, inner, (x[None],))[0]


def infmoe_masked(x, z, w_in, w_out, w_z, n_keep):
    """The sum moved inside W_2, over the whole width: decoding's reference, which skips rows."""
    mask = kernels.topn_mask(z @ w_z.T, n_keep).mean(1)
    return (mask * moe.activate(x @ w_in.T, "gelu")) @ w_out.T


def dense_ffn(x, w_in, w_out, activation="gelu"):
    return moe.activate(x @ w_in.T, activation) @ w_out.T


def bench_moe(table):
    """One SwiGLU layer with its router, forward and backward."""
    shapes = [(4096, 256, 1024, 8, 2, "Mixtral"), (2048, 256, 512, 64, 4, "Olmoe")]
    for t, d, f, e, k, family in shapes[:1] if table.config.quick else shapes:
        inputs = leaves(table, (t, d), (e, d), (e, 2 * f, d), (e, d, f))
        layer = partial(moe_layer, top_k=k, normalise=family == "Mixtral")
        loop = partial(layer, experts=moe.expert_ffn_loop)
        layers = {"loop": loop, **transformers_blocks(family, *inputs, top_k=k), "ours": layer}
        for name, other in layers.items():
            agree(f"the MoE layer ({name})", other(*inputs), loop(*inputs), 1e-5)
        times = table.time({n: forward_backward(f, *inputs) for n, f in layers.items()}, 7)
        what = f"MoE layer, forward + backward, T={t} D={d} F={f} E={e} K={k}"
        table.faster(what, "moe.py's loop over experts", times["loop"], times["ours"])
        if theirs := [name for name in layers if name not in ("loop", "ours")]:
            best = min(theirs, key=times.get)
            table.faster(what, f"transformers' {family} block, its fastest backend",
                         times[best], times["ours"], ">= 1.5")


def bench_infmoe(table):
    """The FFN of infinity-MoE, and by activation rate, which is a figure of the paper."""
    t, d, f, dz, k = 1024, 768, 6144, 64, 2
    x, _, w_in, w_out, _ = args = leaves(table, (t, d), (t, k, dz), (f, d), (d, f), (f, dz))
    curve = {}
    for rate in (0.25,) if table.config.quick else (0.05, 0.25, 0.5, 1.0):
        options = dict(n_keep=int(rate * f + 0.5), activation="gelu")
        ours, loop = (partial(g, **options) for g in (kernels.masked_ffn, moe.masked_ffn_loop))
        agree("infmoe's FFN", ours(*args), loop(*args), 1e-5)
        what = f"T={t} D={d} F={f} N={rate:.0%} K={k}"
        calls = {"loop": (loop, *args), "ours": (ours, *args),
                 "dense": (dense_ffn, x, w_in, w_out)}
        with torch.no_grad():
            times = curve[rate] = table.time({n: partial(*call) for n, call in calls.items()}, 9)
        infmoe_rows(table, f"forward, {what}", times, "<= 1.3" if rate == 0.25 else "")
        if rate == 0.25:
            steps = {name: forward_backward(*call) for name, call in calls.items()}
            infmoe_rows(table, f"forward + backward, {what}", table.time(steps, 5), "<= 1.5")
    if len(curve) > 1:
        draw_latency(curve, table, f"K={k} samples, {t} tokens, {d} wide, {f} neurons")


def infmoe_rows(table, what, times, reach):
    table.row(f"infmoe's FFN, {what}", "a dense FFN of its width", times["dense"], times["ours"],
              reach)
    table.faster(f"infmoe's FFN, {what}", "moe.py's loop over samples", times["loop"],
                 times["ours"])


def draw_latency(curve, table, case):
    if not plots.available():
        return
    figure, axes = plots.pyplot().subplots(figsize=(5.5, 3.8), layout="constrained")
    for name, label in (("loop", "K FFNs, one a sample"), ("ours", "ours"),
                        ("dense", "dense FFN of the same width")):
        times = [1e3 * t[name] for t in curve.values()]
        axes.plot([100 * rate for rate in curve], times, marker="o", markersize=4, label=label)
    plots.finish(axes, xlabel="activation rate N (%)", ylabel="forward latency (ms)",
                 ylim=(0, None), title=f"infmoe FFN, {describe(table.device)}\n{case}")
    plots.save(table.path.with_name(f"infmoe_latency_{table.device}.png"), figure)


def bench_pool(table):
    """One layer as its pool grows."""
    d, f, t = 256, 512, 16384
    layer = partial(moe_layer, top_k=1)
    inputs = {m: leaves(table, (t, d), (m, d), (m, 2 * f, d), (m, d, f)) for m in (8, 96)}
    agree("a pool of 96", layer(*inputs[96]), layer(*inputs[96], experts=moe.expert_ffn_loop), 1e-5)
    times = table.time({m: forward_backward(layer, *args) for m, args in inputs.items()}, 5)
    table.row(f"one layer, forward + backward, pool of 96 experts, T={t} D={d} F={f} K=1",
              "a pool of 8", times[8], times[96], "<= 1.3")


def bench_decode(table):
    """One token through the infmoe layer with its router."""
    for k, reach in ((1, ">= 2.0"), (2, ">= 1.3")):
        functions = decoders(k)
        with torch.no_grad():
            agree("decoding", functions["ours"](), functions["whole"](), 1e-5)
            times = table.time(functions, 200)
        what = f"infmoe layer with its router, one token, D=768 F=6144 N=25% K={k}"
        table.faster(what, "its whole width, masked", times["whole"], times["ours"], reach)
        table.row(what, "bound: the kept weights, read as fast as a dense FFN reads its own",
                  times["dense"] * (1 - 0.75**k), times["ours"])


def decoders(k):
    layer = GPT(ModelConfig(flavour="infmoe", n_layer=1, n_head=12, d_model=768, d_expert=6144,
                            infmoe_samples=k)).eval().blocks[0].ffn
    x, seeds, bank = torch.randn(1, 768), torch.tensor([1]), layer.bank
    w_in, w_out, w_z = bank.w_in[0], bank.w_out, bank.w_z["0"]
    return {
        "whole": lambda: infmoe_masked(x, layer.router(x, seeds)[0].z, w_in, w_out, w_z, 1536),
        "dense": lambda: dense_ffn(x, w_in, w_out),
        "ours": lambda: layer(x, None, seeds)[0]}


# ---- training steps

class Step:
    """An optimizer step on fixed tokens as train.py takes it, with clipping and AdamW."""

    def __init__(self, model, forward, loss, dtype, tokens, optimizer=None):
        device = tokens.device
        scaler = torch.amp.GradScaler(device.type, enabled=False)
        self.trainer = SimpleNamespace(config=train.TrainConfig(), model=model, scaler=scaler,
                                       ranks=SimpleNamespace(device=device), ddp=None)
        self.trainer.optimizer = optimizer or train.make_optimizer(self.trainer)
        self.forward, self.loss, self.dtype = forward, loss, dtype
        self.tokens = tokens

    def backward(self):
        tokens, low = self.tokens, self.dtype != torch.float32
        with torch.autocast(tokens.device.type, self.dtype, enabled=low):
            out = self.forward(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
            loss = self.loss(out)
        loss.backward()
        return loss.detach()

    def __call__(self):
        loss = self.backward()
        train.update(self.trainer, 1e-4)
        return loss

    def without_optimizer(self):
        self.backward()
        self.trainer.optimizer.zero_grad(set_to_none=True)

    def results(self, name):
        """Loss, and the gradient of the parameter of this name: what is compared."""
        found = self.backward(), self.trainer.model.get_parameter(name).grad.clone()
        self.trainer.optimizer.zero_grad(set_to_none=True)
        return found


def training_step(config, device, batch, oracle=False, compiled=None):
    """A Step with train.py's defaults for this device; the oracle: eager, fp32, literal loops."""
    torch.manual_seed(0)
    c, place = train.TrainConfig(), torch.device(device)
    model = GPT(config).to(device)
    if oracle:
        for layer in model.modules():
            if hasattr(layer, "backend"):
                layer.backend = "loop"
    elif compiled is None:
        compiled = machine.pick_compile(c, place, config.n_active_params())[0]
    dtype = torch.float32 if oracle else machine.pick_dtype(c, place, compiled)[0]
    forward = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    loss = lambda out: out.loss + sum(out.aux.values())
    return Step(model, forward, loss, dtype, fixed_tokens(config, device, batch))


def fixed_tokens(config, device, batch):
    generator = torch.Generator().manual_seed(1)
    shape = batch, config.block_size + 1
    return torch.randint(config.vocab_size, shape, generator=generator).to(device)


def nanogpt_steps(folder, config, batch):
    """nanoGPT's training step with our weights: as it is on a CPU, and its best there; bf16 where
    the CPU multiplies it (elsewhere it takes 25 times as long)."""
    spec = importlib.util.spec_from_file_location("nanogpt", Path(folder, "model.py"))
    nanogpt = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(nanogpt)
    c, steps = config, {}
    torch.manual_seed(0)
    weights = GPT(config).state_dict()
    for name in ("eager", "best"):
        with contextlib.redirect_stdout(io.StringIO()):
            model = nanogpt.GPT(nanogpt.GPTConfig(
                c.block_size, c.vocab_size, c.n_layer, c.n_head, c.d_model, 0.0, c.bias))
            optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), "cpu")
        model.load_state_dict({hf.their_names(key, "gpt2")[0]: w for key, w in weights.items()})
        forward, dtype = model, torch.float32
        if name == "best":
            optimizer = torch.optim.AdamW(optimizer.param_groups, fused=True)
            forward = torch.compile(model)
            dtype = machine.pick_dtype(train.TrainConfig(), torch.device("cpu"), True)[0]
        steps[name] = Step(model, forward, lambda out: out[1], dtype,
                           fixed_tokens(c, "cpu", batch), optimizer)
    return steps


DENSE = dict(n_layer=6, n_head=6, d_model=384, block_size=256, vocab_size=257)
TOP2 = DENSE | dict(flavour="topk", d_expert=768)
MODELS = {
    "dense": DENSE, "wide": DENSE | dict(d_ff=3072), "switch": DENSE | dict(flavour="switch"),
    "unipool": DENSE | dict(flavour="unipool"), "infmoe": DENSE | dict(flavour="infmoe"),
    "top2": TOP2, "losses": TOP2 | dict(specialization_coef=2e-3, coupling_coef=1e-3)}
PAIRS = (  # what, ours, in words: whose time it is beside, theirs, reach
    ("switch, 1 of 8 experts", "switch", "dense of equal FLOPs", "dense", "<= 1.45"),
    ("UniPool, 1 of 48 experts", "unipool", "switch of equal stored and active parameters",
     "switch", "<= 1.15"),
    ("infmoe, K=2 N=25%", "infmoe", "dense with an FFN of its width", "wide", "<= 1.35"),
    ("top 2 of 8 experts of half width", "top2", "dense of equal FLOPs", "dense", ""),
    ("top 2 of 8 with specialization and coupling losses", "losses", "the same without", "top2",
     "<= 1.05"))


def bench_train(table):
    """Whole training steps: 6 layers, width 384, context 256, 16 sequences, 257 ids."""
    steps = {}  # each is compiled and compared when it is first needed

    def step(name):
        if name not in steps:
            steps.update(checked_steps({name: ModelConfig(**MODELS[name])}, 16, 5e-2))
        return steps[name]

    if table.config.nanogpt:
        nanogpt_rows(table, step("dense"))
    for what, ours, reference, theirs, reach in PAIRS[:1] if table.config.quick else PAIRS:
        pair = {"theirs": step(theirs), "ours": step(ours)}
        if ours == "switch":
            apart = {name: each.without_optimizer for name, each in pair.items()}
            times = table.time(apart, 6)
            table.row(f"training step without the optimizer, {what}", reference, times["theirs"],
                      times["ours"], "<= 1.2")
        times = table.time(pair, 6)
        table.row(f"training step, {what}", reference, times["theirs"], times["ours"], reach)


def nanogpt_rows(table, ours):
    theirs = nanogpt_steps(table.config.nanogpt, ModelConfig(**DENSE), 16)
    for step in theirs.values():
        agree("dense, to nanoGPT", ours.results("blocks.0.attention.qkv.weight"),
              step.results("transformer.h.0.attn.c_attn.weight"), 5e-2)
    times = table.time(theirs | {"ours": ours}, 6)
    for name, reference, reach in (("eager", "as it is on a CPU: eager, fp32", ""),
                                   ("best", "at its best: compiled, fused AdamW", ">= 1.1")):
        table.faster("training step, dense", f"nanoGPT {reference}", times[name], times["ours"],
                     reach)


def checked_steps(models, batch, limit, **options):
    """{name: ModelConfig} -> {name: Step}, loss and a gradient of each compared with the oracle's.

    With bf16 a token near the boundary of two experts may change sides: hence a limit of percents,
    or of half as much again as bf16 changes the oracle itself.
    """
    steps = {}
    for name, config in models.items():
        steps[name] = training_step(config, "cpu", batch, **options)
        oracle = training_step(config, "cpu", batch, oracle=True)
        weight = "blocks.0.attention.qkv.weight"
        ours, exact, allowed = steps[name].results(weight), oracle.results(weight), limit
        if max(map(trust.distance, ours, exact)) > limit:
            oracle.dtype = steps[name].dtype
            allowed = 1.5 * max(map(trust.distance, oracle.results(weight), exact))
        agree(f"{name}'s step", ours, exact, allowed)
    return steps


def bench_tiny(table):
    """Training steps of the size that results/claims.md is made of: one thread, fp32, eager."""
    runs = dict(dense="dense", switch="vanilla", unipool="unipool", infmoe="infmoe")
    models = {name: configs_of(settings_of("cpu", run, 1e-3)[0])[0] for name, run in runs.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cpu.allow_compile(False)  # as these runs do
    try:
        times = table.time(checked_steps(models, 16, 1e-3, compiled=False), 25)
    finally:
        torch.set_num_threads(threads)
        cpu.allow_compile(True)
    for name, reach in (("switch", "<= 1.15"), ("unipool", "<= 1.25"), ("infmoe", "<= 1.6")):
        table.row(f"tiny training step, {name}, 8 layers, width 64, one thread",
                  "dense of equal active FLOPs", times["dense"], times[name], reach)


BENCHES = {"train": bench_train, "tiny": bench_tiny, "moe": bench_moe, "infmoe": bench_infmoe,
           "pool": bench_pool, "decode": bench_decode}


# ---- the page

def write_page(out):
    """Put all machines' rows (the newest of each) into the table of cpu.md, a column a machine."""
    lines = Path(out, "bench", "cpu.jsonl").read_text().splitlines()
    found, dates = {}, {}
    for row in map(json.loads, lines):
        found.setdefault((row["what"], row["reference"]), {})[row["machine"]] = row
        dates[row["machine"]] = max(row["date"], dates.get(row["machine"], ""))
    machines = sorted(dates, key=dates.get)
    head = ["what", "reference", "reach", *(f"{m}, {dates[m]}" for m in machines)]
    table = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for (what, reference), cells in found.items():
        reach = cells[max(cells, key=dates.get)]["reach"]
        cells = [cell(cells.get(m)) for m in machines]
        table.append(f"| {' | '.join([what, reference, reach, *cells])} |")
    page = Path(out, "cpu.md")
    text = page.read_text().splitlines() if page.exists() else ["# On a CPU", "", "|"]
    first = next(i for i, line in enumerate(text) if line.startswith("|"))
    old = list(itertools.takewhile(lambda line: line.startswith("|"), text[first:]))
    text[first:first + len(old)] = table  # the page's other tables are written by hand
    page.write_text("\n".join(text) + "\n")


def cell(row):
    """The ratio, bold where it reaches what it should, and our own value."""
    if row is None:
        return "-"
    unit, scale = SCALES[row["unit"]]
    ratio = f"{row['ratio']:.2f}"
    own = (row["ours"] or 0) * scale
    digits = f"{own:,.0f}" if own >= 100 else f"{own:.3g}"
    return (f"**{ratio}**" if row["reached"] else ratio) + f" ({digits} {unit})" * bool(own)


# ---- the command line

def run_benches(names, config):
    """All of them, whatever one comes to -> how many failed."""
    failed = 0
    for name in names:
        table = Table(config)
        print(f"\n{name} on {describe('cpu')}", flush=True)
        try:
            BENCHES[name](table)
        except (ArithmeticError, RuntimeError) as error:
            failed += 1
            print(f"{name}: {error}".splitlines()[0], file=sys.stderr, flush=True)
    return failed


def main():
    parsed = parse(BenchConfig, words=("bench",), doc=__doc__)
    config, name = parsed.make(BenchConfig), parsed.words["bench"]
    name = "all" if name is None else name
    if name not in (*BENCHES, "all", "page"):
        fail(f"unknown bench '{name}': expected {', '.join([*BENCHES, 'all', 'page'])}")
    failed = 0
    with one_line():
        if name != "page":
            machine.keep_memory()  # as train.py does
            cpu.allow_compile(True)
            failed = run_benches(BENCHES if name == "all" else [name], config)
        if name in ("all", "page"):
            write_page(config.out)
    sys.exit(min(failed, 1))


if __name__ == "__main__":
    main()
