"""All that a GPU has to show, in three parts of at most eight minutes: make gpu-check.

    python -m lab.gpu_check                     # the three parts, one after the other
    python -m lab.gpu_check --part=2 --out=DIR  # one of them; rows in DIR/bench/gpu.jsonl

Part 1: kernels against the oracles, GPU tests, the MoE layer (G1, G2). Part 2: the masked FFN (G3)
and decoding (G7). Part 3: short training runs, whose logs give G4 to G6. Each step is a process
with a time limit, each row is written as it is measured; a step that dies leaves its reason in
DIR/gpu_check.txt and lets the next one run.
"""
import csv
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import kernels
import moe
from configurator import fail, parse
from lab import bench
from lab.bench import agree, dense_ffn, forward_backward, leaves
from model import ModelConfig
from support import budget
from train import TrainConfig


@dataclass
class CheckConfig:
    part: int = 0  # 1, 2 or 3; 0: all
    case: int = 0  # with the name of a bench: this of its cases
    out: str = "results"  # folder: gpu_check.txt, and bench/gpu.jsonl with the rows
    repeat: int = 0  # timed rounds; 0: as many as the bench thinks right

    def __post_init__(self):
        if self.part not in range(4):
            raise ValueError(f"part={self.part}: expected 1, 2 or 3, or 0 for all")


# ---- the steps: name, limit in seconds, words after `python`

RUNS = {"gpt2_small": [], "moe_182m": [], "unipool_182m": [], "infmoe_small": [], "llama_182m": [],
        "wide": ["--d_ff=6144"]}  # wide: gpt2_small with the FFN of infmoe_small
SHORT_RUN = ["--dataset=data/stdlib", "--max_steps=80", "--batch_tokens=65536", "--micro_batch=16",
             "--warmup_steps=10", "--eval_every=0", "--eval_tokens=131072", "--save_every=0",
             "--log_every=5", "--overwrite"]


def steps(config):
    """{part: [(name, limit, words)]}; the limits of a part add up to eight minutes at most."""
    case = lambda name, i, limit: (
        f"{name} {i}", limit, ["-m", "lab.gpu_check", name, f"--case={i}", f"--out={config.out}"])
    run = lambda name, more: (f"train {name}", 72, [
        "train.py", f"config/{name.replace('wide', 'gpt2_small')}.py", f"--out_dir=out/gpu-{name}",
        *SHORT_RUN, *more])
    tests = lambda *files: ["-m", "pytest", "-q", "-m", "gpu and not slow", *files]
    return {
        1: [("kernels", 100, ["kernels.py"]),
            ("tests of kernels", 100, tests("tests/test_kernels.py")),
            ("tests of models", 50, tests("tests/test_flavours.py", "tests/test_train.py")),
            *(case("layer", i, 55) for i in range(4))],
        2: [*(case("infmoe", i, 120) for i in range(3)), case("decode", 0, 60)],
        3: [("data", 30, ["prepare_data.py", "stdlib", "--overwrite"]),
            *(run(name, more) for name, more in RUNS.items()), case("train", 0, 15)]}


def run_step(words, limit):
    """python WORDS, at most `limit` seconds -> "ok", or how it ended"""
    with tempfile.TemporaryFile("w+") as errors:
        try:
            code = subprocess.run([sys.executable, *words], timeout=limit, stderr=errors).returncode
        except subprocess.TimeoutExpired:
            code = None
        errors.seek(0)
        said = errors.read().strip()
    print(said, file=sys.stderr)
    if code is None:
        return f"stopped at its limit of {limit} s; rows measured before stay"
    last = said.rpartition("\n")[2] or "without a word"
    return f"exit code {code}, {last}" if code else "ok"


def run_steps(todo, out):
    """Each in a process of its own -> how many did not end well. Reasons go to gpu_check.txt."""
    failed = 0
    for name, limit, words in todo:
        print(f"\n=== {name}: python {' '.join(words)}", flush=True)
        began = time.monotonic()
        reason = run_step(words, limit)
        failed += reason != "ok"
        line = f"{name}: {reason} after {time.monotonic() - began:.0f} s"
        print(line, flush=True)
        with open(Path(out, "gpu_check.txt"), "a") as f:
            f.write(line + "\n")
    return failed


# ---- G1, G2: the MoE layer

def by_grouped_mm(x, router, w_in, w_out, top_k):
    """torch's grouped_mm and its own autograd, which keeps every intermediate."""
    weights, ids = (x @ router.T).softmax(-1).topk(top_k)
    order, ends = kernels.sort_by_expert(ids, w_in.shape[0])
    rows = x.index_select(0, order // ids.shape[1])  # (N, D), by expert
    act = moe.activate(F.grouped_mm(rows, w_in.transpose(1, 2), offs=ends), "swiglu")  # (N, F)
    out = kernels.undo_order(F.grouped_mm(act, w_out.transpose(1, 2), offs=ends), order)  # by token
    return (out.view(*ids.shape, -1) * weights.to(x.dtype).unsqueeze(-1)).sum(1)


def check_layer(table, case):
    """The Triton layer to grouped_mm and to a dense FFN of equal FLOPs, time and memory."""
    t, (d, f, e, k) = 32768, ((768, 3072, 8, 1), (768, 3072, 96, 1), (1024, 512, 64, 8),
                              (2048, 768, 128, 8))[case]
    args = leaves(table, (t, d), (e, d), (e, 2 * f, d), (e, d, f))
    triton = partial(kernels.expert_ffn, backend="triton")
    functions = {"ours": partial(bench.moe_layer, top_k=k, experts=triton),
                 "grouped": partial(by_grouped_mm, top_k=k)}
    agree("triton", functions["ours"](*args), functions["grouped"](*args), 2e-2)
    run = {name: forward_backward(g, *args) for name, g in functions.items()}
    memory = {name: peak_bytes(step, args) for name, step in run.items()}
    dense = partial(dense_ffn, activation="swiglu")
    wide = leaves(table, (t * k, d), (2 * f, d), (d, f))
    run["dense"] = forward_backward(dense, *wide)
    run["compiled"] = forward_backward(torch.compile(dense), *wide)
    times = table.time(run, 20)
    what = f"MoE layer in Triton, forward + backward, T={t} D={d} F={f} E={e} K={k}"
    for reference, name, reach in (("grouped_mm", "grouped", ">= 1.2"),
                                   ("dense of equal FLOPs, eager", "dense", ">= 0.7"),
                                   ("dense of equal FLOPs, compiled", "compiled", ">= 0.7")):
        table.faster(f"G1 {what}", reference, times[name], times["ours"], reach)
    table.row(f"G2 peak activation memory, {what}", "grouped_mm", memory["grouped"],
              memory["ours"], "<= 0.6", "B")


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


# ---- G3, G7: continuous experts

def infmoe_inside(x, z, w_in, w_out, w_z, n_keep, activation="gelu"):
    """The sum moved inside W_2, in plain torch: what torch.compile is given."""
    scores = z @ w_z.T  # (T, K, F)
    threshold = scores.kthvalue(scores.shape[-1] - n_keep + 1, dim=-1, keepdim=True).values
    mask = (scores * (scores >= threshold)).mean(1)
    return (mask * moe.activate(x @ w_in.T, activation)) @ w_out.T


def check_infmoe(table, case):
    """The masked FFN of K samples, forward and backward, over activation rates."""
    t, d, f, dz, k = 16384, 768, 6144, 64, (2, 1, 4)[case]
    args, forward = leaves(table, (t, d), (t, k, dz), (f, d), (d, f), (f, dz)), []
    inside = torch.compile(infmoe_inside)
    for rate in (0.25, 0.05, 0.5, 1.0):
        options = dict(n_keep=int(rate * f + 0.5), activation="gelu")
        functions = {"ours": partial(kernels.masked_ffn, backend="triton", **options),
                     "loop": partial(moe.masked_ffn_loop, **options),
                     "inside": partial(inside, **options)}
        for name in ("ours", "inside"):
            agree(name, functions[name](*args), functions["loop"](*args), 3e-2)
        what = f"T={t} D={d} F={f} N={rate:.0%} K={k}"
        with torch.no_grad():
            times = table.time({name: partial(g, *args) for name, g in functions.items()}, 10)
        infmoe_rows(table, f"forward, {what}", times)
        forward.append(times["ours"])
        both = {name: forward_backward(g, *args) for name, g in functions.items()}
        infmoe_rows(table, f"forward + backward, {what}", table.time(both, 10))
    table.row(f"G3 infmoe's FFN, forward, slowest rate, K={k}", "its fastest rate (flat: 1)",
              min(forward), max(forward), "<= 1.1")


def infmoe_rows(table, what, times):
    for name, reference, reach in (("loop", "moe.py's loop over samples", ">= 2.0"),
                                   ("inside", "the sum inside W_2, compiled", "> 1.0")):
        table.faster(f"G3 infmoe's FFN, {what}", reference, times[name], times["ours"], reach)


def check_decode(table, case):
    """infmoe decoding, batch 1 and 8."""
    for batch in (1, 8):
        shapes = (batch, 768), (batch, 1, 64), (6144, 768), (768, 6144), (6144, 64)
        args = *leaves(table, *shapes), 1536
        functions = {"masked": partial(bench.infmoe_masked, *args),
                     "ours": partial(kernels.masked_ffn, *args, "gelu")}
        with torch.no_grad():
            agree("decode", functions["ours"](), functions["masked"](), 3e-2)
            times = table.time(functions, 200)
        table.faster(f"G7 infmoe decoding, batch {batch}, D=768 F=6144 N=25% K=1",
                     "its whole width, masked", times["masked"], times["ours"], ">= 2.0")


# ---- G4 to G6: training

def check_train(table, case):
    """Loss and tokens a second of the short runs, off their logs, as far as they have come."""
    speed = {}
    for name in RUNS:
        log = Path(f"out/gpu-{name}/log.csv")
        rows = list(csv.DictReader(log.open())) if log.exists() else []
        late = [float(row["tokens_per_second"]) for row in rows if int(row["step"]) > 20]
        if late:
            speed[name] = statistics.median(late)
            print(f"{name}: {speed[name]:,.0f} tokens a second, "
                  f"loss {rows[-1]['train_loss']} after step {rows[-1]['step']}", flush=True)
    if "gpt2_small" in speed and (peak := budget.peak_flops(torch.device("cuda"))):
        parsed = parse(ModelConfig, TrainConfig, argv=["config/gpt2_small.py"], words=("config",))
        flops = speed["gpt2_small"] * budget.flops_per_token(parsed.make(ModelConfig))
        table.row("G4 GPT-2 124M training, FLOP/s", "the card's peak in bf16", peak, flops,
                  ">= 0.42", "")
    for what, ours, theirs, reference, reach in (
            ("G5 vanilla MoE, 182M", "moe_182m", "llama_182m", "dense, 182M", ">= 0.8"),
            ("G5 UniPool, 182M", "unipool_182m", "llama_182m", "dense, 182M", ">= 0.8"),
            ("G6 infmoe_small", "infmoe_small", "wide", "dense, its FFN's width", ">= 0.85")):
        if {ours, theirs} <= speed.keys():
            table.row(f"{what}, tokens a second in training", reference, speed[theirs],
                      speed[ours], reach, "")


CHECKS = {"layer": check_layer, "infmoe": check_infmoe, "decode": check_decode,
          "train": check_train}


def main():
    parsed = parse(CheckConfig, words=("bench",), doc=__doc__)
    config, name = parsed.make(CheckConfig), parsed.words["bench"]
    if name is not None and name not in CHECKS:
        fail(f"unknown bench '{name}': expected {', '.join(CHECKS)}; none for all")
    if not torch.cuda.is_available():
        fail("gpu_check needs a CUDA device, and this torch sees none; "
             "`make test` and `make bench` check what a CPU can")
    try:
        if name:
            return CHECKS[name](bench.Table(config, "cuda"), config.case)
        Path(config.out).mkdir(parents=True, exist_ok=True)
        parts = steps(config)
        todo = [step for part in ([config.part] if config.part else parts) for step in parts[part]]
        sys.exit(min(run_steps(todo, config.out), 1))
    except (ArithmeticError, ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main()
