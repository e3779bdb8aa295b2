"""Do the papers' claims hold at a scale anyone can run? Many seeds, equal budgets, one table.

    python -m lab.reproduce --list                   # what there is to run, and how much is done
    python -m lab.reproduce --minutes=60             # as many runs as fit into an hour
    python -m lab.reproduce --only=dense,vanilla --seeds=1,2,3
    python -m lab.reproduce --report                 # results/claims.md and its figures

A run is train.py's own; its record is a line of results/runs.jsonl, and the report is made of these
lines alone. Finished runs are skipped, interrupted ones go on. The same command started twice
shares the work; `sort -u` of several machines' files joins their records.
"""
import contextlib
import csv
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy
import torch

import probe
import train
from configurator import parse
from lab import statistics
from model import GPT, ModelConfig
from support import files
from support.budget import flops_per_token
from support.missing import make_missing
from support.shards import ShardReader, load_meta
from support.usage import one_line

# ---- what is run

# init_std at cpu size is 0.02 * sqrt(768 / 64): 0.02 belongs to GPT-2's width of 768, and at width
# 64 it left seeds up to 0.1 apart (results/log.md).
SIZES = {
    "cpu": dict(
        dataset="data/stdlib", arch="llama", n_layer=8, n_head=2, d_model=64, d_ff=128,
        block_size=128, vocab_size=257, init_std=0.07, batch_tokens=2048, micro_batch=16,
        max_steps=1000, warmup_steps=80, min_lr=0.0, weight_decay=0.1, eval_every=100,
        eval_tokens=65536, save_every=100, log_every=50, device="cpu", dtype="float32",
        compile="false"),
    "gpu": dict(  # five runs by three seeds: meant for forty minutes on one card
        dataset="data/packages", arch="llama", n_layer=8, n_head=8, d_model=512, d_ff=1024,
        block_size=512, vocab_size=257, batch_tokens=65536, micro_batch=32, max_steps=600,
        warmup_steps=40, weight_decay=0.1, eval_every=60, eval_tokens=1048576, save_every=300,
        log_every=20),
}
SEEDS = {"cpu": 12, "gpu": 3}  # of every primary run, fixed beforehand
UNTUNED = {"gpu": 1e-3}  # no sweep at this size
SWEEP_SEEDS = (101, 102, 103)
# The share of the neurons that any of a token's two masks keeps: early in training, and at its end.
UNION, UNION_AT_END = 0.375, 0.27

# Beside fields of ModelConfig: ffn, width: d_ff and d_expert as multiples of the size's d_ff;
# anneal: infmoe's rate falls from 1 over the first half.
VANILLA, UNIPOOL = dict(flavour="switch"), dict(flavour="unipool")
TOP2, TOP2_OF_4 = dict(flavour="topk", width=0.5), dict(flavour="topk", width=0.5, n_experts=4)
GPT2 = dict(arch="gpt2", ffn=2)  # an FFN of 4 D
INFMOE = dict(flavour="infmoe", infmoe_dz=32)
GPT2_INFMOE = GPT2 | INFMOE
DEEP = GPT2_INFMOE | dict(infmoe_depth=2, width=2, infmoe_rate=(0.5, 0.25))
SP, CP = dict(specialization_coef=2e-3), dict(coupling_coef=1e-3)

PRIMARY = {
    "dense": {},
    "dense-total": dict(ffn=8),
    "vanilla": VANILLA,
    "unipool": UNIPOOL,
    "softmax-pool": VANILLA | dict(pool_groups=1, n_experts=64, balance="pool"),
    "private-norm": UNIPOOL | dict(pool_groups=8, n_experts=8),
    "unipool-50%": UNIPOOL | dict(n_experts=32),
    "vanilla-16/2": VANILLA | dict(n_experts=16, top_k=2),  # experts keep their width
    "unipool-16/2": UNIPOOL | dict(n_experts=128, top_k=2),
    "top2": TOP2,
    "top2-sp-cp": TOP2 | SP | CP,
    "gpt2-dense": GPT2,
    "gpt2-top2-of-4": GPT2 | TOP2_OF_4 | dict(width=1),
    "gpt2-infmoe": GPT2_INFMOE,
    "gpt2-no-mask": GPT2_INFMOE | dict(infmoe_rate=1.0, infmoe_mean=True, width=4 * UNION),
    "gpt2-no-noise": GPT2_INFMOE | dict(infmoe_rate=UNION, infmoe_mean=True),
    "gpt2-no-mask-27%": GPT2_INFMOE | dict(
        infmoe_rate=1.0, infmoe_mean=True, width=4 * UNION_AT_END),
    "gpt2-no-noise-27%": GPT2_INFMOE | dict(infmoe_rate=UNION_AT_END, infmoe_mean=True),
    "top2-of-4": TOP2_OF_4,
    "infmoe": INFMOE,
}
EXPLORED = {  # name: (beside which run, what differs)
    "no-ffn": ("dense", dict(ffn=1 / 128)),  # one neuron
    "gpt2-dense-1.5": ("gpt2-infmoe", dict(arch="gpt2", ffn=3)),  # its router counted
    "vanilla-norm": ("vanilla", VANILLA | dict(router="norm", balance_scores="normalised")),
    "vanilla-bias": ("vanilla", VANILLA | dict(router="sigmoid", balance="bias")),
    "unipool-normalised": ("unipool", UNIPOOL | dict(balance_scores="normalised")),
    "unipool-G2": ("unipool", UNIPOOL | dict(pool_groups=2, n_experts=32)),
    "unipool-33%": ("vanilla", UNIPOOL | dict(n_experts=21)),
    "vanilla-thin": ("vanilla", VANILLA | dict(n_experts=16, top_k=2, width=0.5)),  # equal budget
    "unipool-thin": ("vanilla-thin", UNIPOOL | dict(n_experts=128, top_k=2, width=0.5)),  # [ours]
    "infmoe-K1": ("gpt2-infmoe", GPT2_INFMOE | dict(infmoe_samples=1)),
    "infmoe-K4": ("gpt2-infmoe", GPT2_INFMOE | dict(infmoe_samples=4)),
    "infmoe-N12": ("gpt2-infmoe", GPT2_INFMOE | dict(infmoe_rate=0.125)),
    "infmoe-anneal": ("gpt2-infmoe", GPT2_INFMOE | dict(anneal=True)),
    "infmoe-dz8": ("gpt2-infmoe", GPT2_INFMOE | dict(infmoe_dz=8)),
    "infmoe-dz64": ("gpt2-infmoe", GPT2_INFMOE | dict(infmoe_dz=64)),
    "infmoe-dz128": ("gpt2-infmoe", GPT2_INFMOE | dict(infmoe_dz=128)),
    "infmoe-pre": ("gpt2-infmoe", GPT2_INFMOE | dict(infmoe_mask="pre")),
    "infmoe-mixture": ("gpt2-infmoe", GPT2_INFMOE | dict(infmoe_components=4)),
    "infmoe-balance": ("gpt2-infmoe", GPT2_INFMOE | dict(balance="layer")),
    "infmoe-deep": ("gpt2-infmoe", DEEP),
    "infmoe-deep-pre": ("infmoe-deep", DEEP | dict(infmoe_mask="pre")),
    "infmoe-deep-shared": ("infmoe-deep", DEEP | dict(infmoe_z="shared")),
    "infmoe-deep-hier": ("infmoe-deep", DEEP | dict(infmoe_z="hierarchical")),
    "top2-sp": ("top2", TOP2 | SP),
    "top2-cp": ("top2", TOP2 | CP),
    "top2-path": ("top2", TOP2 | CP | dict(coupling="path")),
}
GRID_RUNS, WIDTHS, DEPTHS = ("dense", "vanilla", "unipool", "infmoe"), (64, 96, 128), (4, 8, 16)


def at(name, width, depth):
    """The name of a run of the grid; one of its cells is among the primary ones."""
    return name if (width, depth) == (64, 8) else f"{name}@{width}x{depth}"


GRID = {at(name, width, depth): PRIMARY[name] | dict(
            d_model=width, n_head=width // 32, ffn=width / 64, n_layer=depth,
            init_std=0.02 * math.sqrt(768 / width))
        for width in WIDTHS for depth in DEPTHS for name in GRID_RUNS if (width, depth) != (64, 8)}
EXPERIMENTS = PRIMARY | {name: differs for name, (_, differs) in EXPLORED.items()} | GRID
GROUPS = dict(primary=PRIMARY, explored=EXPLORED, grid=GRID)
SHOWN = {"cpu": EXPERIMENTS, "gpu": ("dense", "vanilla", "unipool", "gpt2-dense", "gpt2-infmoe")}
SWEPT = {  # families share a learning rate: the run whose rate is swept
    "dense": "dense", "switch": "vanilla", "unipool": "unipool", "topk": "top2", "infmoe": "infmoe",
    "gpt2-dense": "gpt2-dense", "gpt2-topk": "gpt2-top2-of-4", "gpt2-infmoe": "gpt2-infmoe",
    "gpt2-infmoe-deep": "infmoe-deep"}


def family_of(name):
    """Flavour and blocks; runs of the sweep are called lr/FAMILY/K."""
    if name.startswith("lr/"):
        return name.split("/")[1]
    given = EXPERIMENTS[name]
    parts = given.get("arch"), given.get("flavour", "dense"), "deep" * ("infmoe_depth" in given)
    return "-".join(filter(None, parts))


# ---- settings

@dataclass
class ReproduceConfig:
    only: str = ""  # primary, explored, grid, or names of runs, with commas; empty: all, in turn
    seeds: tuple = ()  # such as 1,2,3; empty: all of primary runs, 3 of the grid, 1 of others
    size: str = "cpu"  # cpu (minutes a run) | gpu
    minutes: float = 0.0  # stop after so long (what runs is saved); 0: when all is done
    keep: bool = False  # keep the folders of finished runs, for probe.py
    report: bool = False  # write results/claims.md and figures from the records
    list: bool = False  # print the runs and which are done

    def __post_init__(self):
        whole = all(isinstance(seed, int) and 0 <= seed < 101 for seed in self.seeds)
        known = {*EXPERIMENTS, *GROUPS}
        for name, right, expected in (
                ("size", self.size in SIZES, " or ".join(SIZES)),
                ("seeds", whole, "whole numbers below 101 (the sweep's), such as 1,2,3"),
                ("minutes", self.minutes >= 0, "0 (until all is done) or more"),
                ("only", not self.only or known.issuperset(self.only.split(",")),
                 f"{', '.join(GROUPS)}, or names that --list shows")):
            if not right:
                raise ValueError(f"{name}={getattr(self, name)}: expected {expected}")


def settings_of(size, name, lr=None):
    """-> (settings of a run for ModelConfig and TrainConfig, whether its mask rate is annealed)"""
    swept = name.startswith("lr/")
    settings = {"flavour": "dense"} | SIZES[size]
    settings |= EXPERIMENTS[SWEPT[family_of(name)] if swept else name]
    ffn, width, anneal = (settings.pop(key, None) for key in ("ffn", "width", "anneal"))
    if width:
        settings["d_expert"] = int(settings["d_ff"] * width)
    settings["d_ff"] = max(1, int(settings["d_ff"] * (ffn or 1)))
    if swept:  # half of the tokens
        settings["max_steps"] //= 2
        lr = rate_number(int(name.split("/")[2]))
    return settings | dict(lr=lr), bool(anneal)


def configs_of(settings, **of_run):
    """-> ModelConfig, TrainConfig"""
    fields = train.TrainConfig.__dataclass_fields__
    model = {k: v for k, v in settings.items() if k not in fields}
    training = {k: v for k, v in settings.items() if k in fields}
    return ModelConfig(**model), train.TrainConfig(**training, **of_run)


def in_json(value):
    return json.loads(json.dumps(value))


def folder_of(size, name, seed, settings):
    """One per setting, so that a checkpoint of other settings is never gone on with."""
    mark = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return Path("out/reproduce", f"{size}-{name.replace('/', '_')}-s{seed}-{mark}")


# ---- records

RECORDS = Path("results/runs.jsonl")


def numbers_of(record):
    """Its losses, and what else was measured."""
    curve = [x for point in record["curve"] for x in point]
    return [record["val_loss"], *record["measures"].values(), *curve]


def is_current(record):
    """Has a record the settings that the table has now? The rate may be that of another sweep."""
    size, name = record["size"], record["run"]
    known = name in EXPERIMENTS or re.fullmatch(r"lr/(.+)/-?\d+", name)
    if size not in SIZES or not known or family_of(name) not in SWEPT:
        return False
    lr = record["settings"].get("lr")
    return record["settings"] == in_json(settings_of(size, name, lr)[0])


def load_records(size):
    """{(run, seed): record} of the table's present settings; damaged lines are named, left out."""
    found, lines = {}, RECORDS.read_bytes().splitlines() if RECORDS.exists() else []
    for i, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not all(map(math.isfinite, numbers_of(record))):
                raise ValueError("a number is not finite")
            if record["size"] == size and is_current(record):
                found.setdefault((record["run"], record["seed"]), record)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            print(f"{RECORDS}, line {i} is damaged and left out ({error})", file=sys.stderr)
    return found


def append_record(record):
    """A line more, whole: a kill in an earlier write costs that line alone."""
    RECORDS.parent.mkdir(exist_ok=True)
    with open(RECORDS, "ab+") as f:
        f.seek(max(0, f.tell() - 1))
        torn = f.read() not in (b"", b"\n")
        f.write(b"\n" * torn + json.dumps(record).encode() + b"\n")


# ---- learning rates: steps of sqrt 2, the minimum of a parabola

def rate_number(k):
    return float(f"{8e-3 * 2 ** (k / 2):.3g}")


def sweep(records, family):
    """-> (runs that the sweep of a family still lacks, {k: mean loss over the seeds}).

    Three rates, then further ones on the side of the lowest mean until that lies inside.
    """
    name, rates = lambda k: f"lr/{family}/{k}", [-2, -1, 0]
    while True:
        runs = [(name(k), seed) for seed in SWEEP_SEEDS for k in rates]
        if missing := [run for run in runs if run not in records]:
            return missing, {}
        means = {k: mean(records[name(k), s]["val_loss"] for s in SWEEP_SEEDS) for k in rates}
        best = min(rates, key=means.get)
        if best not in (rates[0], rates[-1]):
            return [], means
        rates = sorted([*rates, best + (1 if best == rates[-1] else -1)])


def learning_rate(records, size, family):
    """Of a family's runs; None while its sweep is not complete."""
    if size in UNTUNED:
        return UNTUNED[size]
    _, means = sweep(records, family)
    return rate_number(statistics.parabola_minimum(means)) if means else None


def rate_of(name, size, family_rate):
    """One of a family's runs at another width: Adam's rate goes with 1 / width (2203.03466)."""
    width = SIZES[size]["d_model"]
    return float(f"{family_rate * width / EXPERIMENTS[name].get('d_model', width):.3g}")


# ---- one run

def run_one(config, name, seed, lr):
    """Train (or resume) one run, measure it, append its record. -> may another run follow?"""
    settings, anneal = settings_of(config.size, name, lr)
    folder, began = folder_of(config.size, name, seed, settings), time.process_time()
    start = "resume" if (folder / "ckpt.pt").exists() else "scratch"
    configs = configs_of(settings, out_dir=str(folder), seed=seed, quiet=True, init_from=start)
    honest = train.train_step
    if anneal:
        train.train_step = falling_rate(honest)
    try:
        result = train.train(*configs)
    except FloatingPointError as error:  # it counts as a run that has learnt nothing
        result = dict(finished=True, val_loss=math.log(settings["vocab_size"]), diverged=str(error))
    finally:
        train.train_step = honest
    if result["finished"]:
        record = dict(run=name, seed=seed, size=config.size)
        record |= make_record(folder, settings, result)
        seconds = round(time.process_time() - began, 1)
        append_record(record | dict(cpu_seconds=seconds if start == "scratch" else None))
        if not config.keep:
            shutil.rmtree(folder, ignore_errors=True)  # none where the first step failed
    return not result.get("signal")  # a finished one may have been told to stop, too


def falling_rate(train_step):
    """train.train_step, before which the share of neurons that infmoe's masks keep falls."""
    def step(trainer, number):
        for _, bank in trainer.model.expert_layers():
            full, last = bank.w_out.shape[1], trainer.model_config.infmoe_rate
            done = min(1, 2 * number / trainer.config.max_steps)
            bank.n_keep = [round(full * (1 - done * (1 - last)))]
        return train_step(trainer, number)
    return step


def make_record(folder, settings, result):
    rows, (c, _) = [], configs_of(settings)
    if "diverged" not in result:
        with open(folder / "log.csv") as f:
            rows = [row for row in csv.DictReader(f) if row["val_loss"]]
    of = lambda *keys: [[int(row["tokens"]), *(round(float(row[k]), 5) for k in keys)]
                        for row in rows if row.get(keys[-1])]
    shards = load_meta(settings["dataset"]).get("shards") or {}  # the text: it differs by Python
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return dict(
        val_loss=round(result["val_loss"], 6), curve=of("val_loss"),
        measures=measure(folder, settings) if rows else {},
        routing=of("entropy", "sigma", "mu_spread"),  # of infmoe, while it trains
        diverged=result.get("diverged", ""), settings=in_json(settings), n_params=c.n_params(),
        n_active_params=c.n_active_params(), flops_per_token=flops_per_token(c),
        seconds=round(float(rows[-1]["seconds"]), 1) if rows else 0.0, machine=machine(),
        versions=dict(python=platform.python_version(), torch=torch.__version__,
                      numpy=numpy.__version__),
        data=next((shard["sha256"][:12] for shard in shards.values()), "unknown"),
        commit=commit.stdout.strip() or "unknown")


def machine():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{cpu_name()} ({torch.backends.cpu.get_cpu_capability()})"


def cpu_name():
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text() if path.exists() else "")
    return found[1] if found else platform.processor() or platform.machine()


# ---- what is measured of a trained model beside its loss, on 64 held-out windows

def measure(folder, settings):
    model = GPT.from_checkpoint(folder, "cuda" if torch.cuda.is_available() else "cpu")
    reader = ShardReader(settings["dataset"], "val", model.config.block_size)
    windows = torch.from_numpy(reader.sequential(0, min(64, reader.n_windows)))
    windows = windows.to(model.wte.weight.device)
    ask = {"infmoe": ask_infmoe, "topk": losses_by_top_k, "switch": random_routing,
           "unipool": random_routing}.get(settings["flavour"], lambda *_: {})
    with torch.no_grad():
        found = ask(model, windows[:, :-1], windows[:, 1:], folder, settings["dataset"])
    return {name: round(value, 6) for name, value in found.items()}


def random_routing(_, __, ___, folder, dataset):
    """UniPool's probe: what the loss gains when one layer of the deep half chooses at random among
    all of its experts, or the 8 it uses most; mean over layers."""
    config = probe.ProbeConfig(out_dir=str(folder), dataset=dataset, random_router_from=True,
                               choice="both", controls="none", seeds=2)
    subject, found = probe.load_ours(config), {}
    loss = lambda: probe.held_out(subject, config)[:, 0].mean()
    layers, base = probe.layers_from(subject, True), loss()
    for how, among, seeds in probe.interventions(subject, config).values():
        rises = []
        for layer in layers:
            for seed in range(seeds):
                with probe.rerouted(subject, [layer], how, seed, among):
                    rises.append(loss() - base)
        found["random, matched" if among else "random, all"] = float(mean(rises))
    return found


def ask_infmoe(model, tokens, targets, *_):
    """The share of the neurons that any of a token's masks keeps; the loss with K samples at
    inference, and with z = mu."""
    routings = model(tokens, return_routings=True).routings
    masks = [mask for (_, bank), codes in zip(model.expert_layers(), routings)
             for mask in bank.masks(codes) if mask is not None]  # (T, K, F) each
    found = {"union": mean((mask != 0).any(1).float().mean().item() for mask in masks)}
    if model.config.infmoe_mean:
        return found
    for k in (1, 2, 4, 8):
        model.set_samples(k)
        found[f"loss at K={k}"] = model(tokens, targets).loss.item()
    model.set_samples(mean=True)
    return found | {"loss at z=mu": model(tokens, targets).loss.item()}


def losses_by_top_k(model, tokens, targets, *_):
    """Discrete experts: the loss with another top k at inference (infinity-MoE, section 5.1)."""
    found = {}
    for k in range(1, min(4, model.config.n_experts) + 1):
        for layer, _ in model.expert_layers():
            layer.router.n_choices = k
        found[f"loss at top {k}"] = model(tokens, targets).loss.item()
    return found


# ---- many runs

def seeds_of(config, name):
    n = SEEDS[config.size] if name in PRIMARY else 3 if name in GRID else 1
    return config.seeds or range(1, n + 1)


def wanted(config):
    """[(run, seed)] of each group: the first seed of all its runs before the second."""
    for word in config.only.split(",") if config.only else GROUPS:
        names = [name for name in GROUPS.get(word, [word]) if name in SHOWN[config.size]]
        yield [(name, seed) for seed in range(101) for name in names
               if seed in seeds_of(config, name)]


def todo(config, records):
    """What can begin now: (run, seed, rate), all of the first group that is not done. Its sweeps
    come first, the first seed of all families before the second."""
    for group in wanted(config):
        runs = [run for run in group if run not in records]
        families = dict.fromkeys(family_of(name) for name, _ in runs)
        rates = {f: learning_rate(records, config.size, f) for f in families}
        missing = [(*run, None) for f in rates if rates[f] is None for run in sweep(records, f)[0]]
        if runs:
            return (sorted(missing, key=lambda run: run[1])
                    or [(*run, rate_of(run[0], config.size, rates[family_of(run[0])]))
                        for run in runs])
    return []


def run_all(config):
    """One run after the other until all are done or time is up -> exit status."""
    make_missing(SIZES[config.size]["dataset"], True, print)
    late = threading.Timer(60 * config.minutes, os.kill, (os.getpid(), signal.SIGTERM))
    late.daemon = True
    if config.minutes:
        late.start()
    while runs := todo(config, load_records(config.size)):
        for name, seed, lr in runs:
            lock = f"out/reproduce/{config.size}-{name.replace('/', '_')}-s{seed}.lock"
            with contextlib.suppress(BlockingIOError), files.lock(lock):
                if (name, seed) in load_records(config.size):
                    break  # another process has done it meanwhile
                began = time.monotonic()
                if not run_one(config, name, seed, lr):
                    print(f"{name} seed {seed}: stopped; the next start goes on")
                    return 0 if config.minutes and not late.is_alive() else 128 + signal.SIGTERM
                loss, took = load_records(config.size)[name, seed]["val_loss"], time.monotonic()
                print(f"{name} seed {seed}: validation loss {loss:.4f} "
                      f"({(took - began) / 60:.1f} min)", flush=True)
                break
        else:
            time.sleep(5)  # other processes have them all
    return 0


def show_list(config):
    records, rows = load_records(config.size), []
    for name in dict.fromkeys(name for group in wanted(config) for name, _ in group):
        seeds = seeds_of(config, name)
        done = sum((name, seed) in records for seed in seeds)
        rows.append(f"{name:20} {done} of {len(seeds)} seeds\n")
    print("".join(rows), end="", flush=True)  # in one piece: `--list | head` is no broken pipe


def main():
    config = parse(ReproduceConfig, doc=__doc__).make(ReproduceConfig)
    with one_line():
        if config.list:
            show_list(config)
        elif config.report:
            from lab import claims
            claims.report(config.size)
        else:
            sys.exit(run_all(config))


if __name__ == "__main__":
    main()
