"""Do the papers' claims hold at a scale anyone can run? Many seeds, equal budgets, one table.

    python -m lab.reproduce --list                   # what there is to run, and how much is done
    python -m lab.reproduce --minutes=60             # as many runs as fit into an hour
    python -m lab.reproduce --only=dense,vanilla --seeds=1,2,3
    python -m lab.reproduce --report                 # results/claims.md and its figures

A run is train.py's own; its record is a line of results/runs.jsonl, and the report is made of these
lines alone. Finished runs are skipped, interrupted ones go on. The same command started twice
shares the work; `sort -u` of several machines' files joins their records. While out/timing.lock
exists (lab.bench holds it), runs wait.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import contextlib
import csv
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from lab import statistics
from support import files

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
    "gpu": dict(  # five runs by three seeds: forty minutes on one card
        dataset="data/packages", arch="llama", n_layer=8, n_head=8, d_model=512, d_ff=1024,
        block_size=512, vocab_size=257, batch_tokens=65536, micro_batch=32, max_steps=600,
        warmup_steps=40, weight_decay=0.1, eval_every=60, eval_tokens=1048576, save_every=300,
        log_every=20),
}
SEEDS = {"cpu": 12, "gpu": 3}  # of every primary run, fixed beforehand
UNTUNED = {"gpu": 1e-3}  # no sweep at this size
SWEEP_SEEDS = (101, 102, 103)
UNION = 0.375  # share of infmoe's neurons that K = 2 masks of 25 % keep, measured: controls have it

# Beside fields of ModelConfig: ffn, width: d_ff and d_expert as multiples of the size's d_ff;
# steps: a share of them; anneal: infmoe's rate falls from 1 over the first half.
VANILLA, UNIPOOL, TOP2 = dict(flavour="switch"), dict(flavour="unipool"), dict(flavour="topk")
TOP2, TOP2_OF_4 = TOP2 | dict(width=0.5), TOP2 | dict(width=0.5, n_experts=4)
INFMOE = dict(flavour="infmoe", infmoe_dz=32)
GPT2 = dict(arch="gpt2", ffn=2)  # an FFN of 4 D
GPT2_TOP2_OF_4 = GPT2 | TOP2_OF_4 | dict(width=1)
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
    "gpt2-top2-of-4": GPT2_TOP2_OF_4,
    "gpt2-infmoe": GPT2_INFMOE,
    "gpt2-no-mask": GPT2_INFMOE | dict(infmoe_rate=1.0, infmoe_mean=True, width=4 * UNION),
    "gpt2-no-noise": GPT2_INFMOE | dict(infmoe_rate=UNION, infmoe_mean=True),
    "top2-of-4": TOP2_OF_4,
    "infmoe": INFMOE,
}
EXPLORED = {
    "no-ffn": dict(ffn=1 / 128),  # one neuron
    "gpt2-dense-1.5": dict(arch="gpt2", ffn=3),  # as gpt2-infmoe with its router
    "vanilla-norm": VANILLA | dict(router="norm", balance_scores="normalised"),
    "vanilla-bias": VANILLA | dict(router="sigmoid", balance="bias"),
    "unipool-normalised": UNIPOOL | dict(balance_scores="normalised"),
    "unipool-G2": UNIPOOL | dict(pool_groups=2, n_experts=32),
    "unipool-G4": UNIPOOL | dict(pool_groups=4, n_experts=16),
    "unipool-67%": UNIPOOL | dict(n_experts=43),
    "unipool-33%": UNIPOOL | dict(n_experts=21),
    "vanilla-thin": VANILLA | dict(n_experts=16, top_k=2, width=0.5),  # equal budget [ours]
    "unipool-thin": UNIPOOL | dict(n_experts=128, top_k=2, width=0.5),
    "gpt2-infmoe-K1": GPT2_INFMOE | dict(infmoe_samples=1),
    "gpt2-infmoe-K4": GPT2_INFMOE | dict(infmoe_samples=4),
    "gpt2-infmoe-N12": GPT2_INFMOE | dict(infmoe_rate=0.125),
    "gpt2-infmoe-N50": GPT2_INFMOE | dict(infmoe_rate=0.5),
    "gpt2-infmoe-anneal": GPT2_INFMOE | dict(anneal=True),
    "gpt2-infmoe-dz8": GPT2_INFMOE | dict(infmoe_dz=8),
    "gpt2-infmoe-dz16": GPT2_INFMOE | dict(infmoe_dz=16),
    "gpt2-infmoe-dz64": GPT2_INFMOE | dict(infmoe_dz=64),
    "gpt2-infmoe-dz128": GPT2_INFMOE | dict(infmoe_dz=128),
    "gpt2-infmoe-pre": GPT2_INFMOE | dict(infmoe_mask="pre"),
    "gpt2-infmoe-mixture": GPT2_INFMOE | dict(infmoe_components=4),
    "gpt2-infmoe-balance": GPT2_INFMOE | dict(balance="layer"),
    "gpt2-deep": DEEP,
    "gpt2-deep-pre": DEEP | dict(infmoe_mask="pre"),
    "gpt2-deep-shared": DEEP | dict(infmoe_z="shared"),
    "gpt2-deep-hier": DEEP | dict(infmoe_z="hierarchical"),
    "top2-sp": TOP2 | SP,
    "top2-cp": TOP2 | CP,
    "top2-path": TOP2 | CP | dict(coupling="path"),
    "pool2": UNIPOOL | dict(n_experts=64, top_k=2, width=0.5),
    "pool2-sp-cp": UNIPOOL | dict(n_experts=64, top_k=2, width=0.5) | SP | CP,
}
GRID_RUNS, WIDTHS, DEPTHS = ("dense", "vanilla", "unipool", "infmoe"), (64, 96, 128), (4, 8, 16)


def at(name, width, depth):
    """The name of a run of the grid; one of its corners is among the primary ones."""
    return name if (width, depth) == (64, 8) else f"{name}@{width}x{depth}"


GRID = {at(name, width, depth): PRIMARY[name] | dict(
            d_model=width, n_head=width // 32, ffn=width / 64, n_layer=depth,
            init_std=0.02 * math.sqrt(768 / width))
        for name in GRID_RUNS for width in WIDTHS for depth in DEPTHS if (width, depth) != (64, 8)}
EXPERIMENTS = PRIMARY | EXPLORED | GRID
GROUPS = dict(primary=PRIMARY, explored=EXPLORED, grid=GRID)
SHOWN = {"cpu": EXPERIMENTS, "gpu": "dense vanilla unipool gpt2-dense gpt2-infmoe".split()}


def family_of(name):
    """Runs of one family share a learning rate: flavour and architecture, and the deep ones."""
    if name.startswith("lr/"):
        return name.split("/")[1]
    given = EXPERIMENTS[name]
    return "-".join(filter(None, [given.get("arch"), given.get("flavour", "dense"),
                                  "deep" * ("infmoe_depth" in given)]))


SWEPT = {  # family: the run whose rate is swept
    "dense": "dense", "switch": "vanilla", "unipool": "unipool", "topk": "top2", "infmoe": "infmoe",
    "gpt2-dense": "gpt2-dense", "gpt2-topk": "gpt2-top2-of-4", "gpt2-infmoe": "gpt2-infmoe",
    "gpt2-infmoe-deep": "gpt2-deep"}


# ---- settings

@dataclass
class ReproduceConfig:
    only: str = ""  # primary, explored, grid, or names of runs, with commas; empty: all, in turn
    seeds: tuple = ()  # such as 1,2,3; empty: all of the primary runs, 3 of the grid, 1 of others
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
                ("only", all(word in known for word in self.only.split(",") if self.only),
                 f"{', '.join(GROUPS)}, or names that --list shows")):
            if not right:
                raise ValueError(f"{name}={getattr(self, name)}: expected {expected}")


def settings_of(size, name, lr=None):
    """-> (settings of a run for ModelConfig and TrainConfig, whether its mask rate is annealed)"""
    swept = name.startswith("lr/")
    settings = SIZES[size] | EXPERIMENTS[SWEPT[family_of(name)] if swept else name]
    settings = {"flavour": "dense"} | settings
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
    from model import ModelConfig
    from train import TrainConfig
    of_training = TrainConfig.__dataclass_fields__.keys() & settings
    model = {k: v for k, v in settings.items() if k not in of_training}
    return ModelConfig(**model), TrainConfig(**{k: settings[k] for k in of_training}, **of_run)


def in_json(value):
    return json.loads(json.dumps(value))


def folder_of(size, name, seed):
    return Path("out/reproduce", f"{size}-{name.replace('/', '_')}-s{seed}")


def holds(folder, settings):
    """Does the folder hold a checkpoint of a run with these settings?"""
    try:
        found = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return False
    model, train = (in_json(asdict(config)) for config in configs_of(settings))
    asked = train.keys() & settings
    return ((folder / "ckpt.pt").exists() and found["model"] == model
            and all(train[k] == found["train"].get(k) for k in asked))


# ---- records

RECORDS = Path("results/runs.jsonl")
FIELDS = dict(run=str, seed=int, size=str, val_loss=float, curve=list, measures=dict, settings=dict,
              n_params=int, n_active_params=int, flops_per_token=int, machine=str, versions=dict)


def check_record(record):
    """The record itself; ValueError or TypeError for another thing."""
    for name, kind in FIELDS.items():
        if not isinstance(dict(record).get(name), kind):
            raise ValueError(f"{name} is {dict(record).get(name)!r:.40}")
    numbers = [record["val_loss"], *record["measures"].values()]
    for x in numbers + [x for point in record["curve"] for x in point]:
        if not math.isfinite(x):
            raise ValueError(f"{x!r:.40} is no finite number")
    return record


def is_current(record):
    """Has a record the settings that the table has now? The rate may be that of another sweep."""
    size, name = record["size"], record["run"]
    if size not in SIZES or name not in EXPERIMENTS and family_of_sweep(name) not in SWEPT:
        return False
    lr = record["settings"].get("lr")
    return record["settings"] == in_json(settings_of(size, name, lr)[0])


def family_of_sweep(name):
    return family_of(name) if name.startswith("lr/") else None


def load_records(size):
    """{(run, seed): record} of the table's present settings; damaged lines are named, left out."""
    found, lines = {}, RECORDS.read_text().splitlines() if RECORDS.exists() else []
    for i, line in enumerate(lines, 1):
        try:
            record = check_record(json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            print(f"{RECORDS}, line {i} is damaged and left out ({error})", file=sys.stderr)
            continue
        if record["size"] == size and is_current(record):
            found.setdefault((record["run"], record["seed"]), record)
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
    return float(f"{8e-3 * 2 ** (statistics.parabola_minimum(means) / 2):.3g}") if means else None


# ---- one run

def run_one(config, name, seed, lr):
    """Train (or resume) one run, measure it, append its record. -> is it finished?"""
    import train
    (settings, anneal), folder = (
        settings_of(config.size, name, lr), folder_of(config.size, name, seed))
    resume, began = holds(folder, settings), time.process_time()
    configs = configs_of(settings, out_dir=str(folder), seed=seed, quiet=True, overwrite=not resume,
                         init_from="resume" if resume else "scratch")
    honest, train.train_step = train.train_step, before_each_step(train.train_step, anneal)
    try:
        result = train.train(*configs)
    except FloatingPointError as error:  # it counts as a run that has learnt nothing
        result = dict(finished=True, val_loss=math.log(settings["vocab_size"]), diverged=str(error))
    finally:
        train.train_step = honest
    if result["finished"]:
        seconds = None if resume else round(time.process_time() - began, 1)
        append_record(make_record(config.size, name, seed, settings, result, seconds))
        if not config.keep:
            shutil.rmtree(folder)
    return result["finished"]


def before_each_step(train_step, anneal):
    """train.train_step, which waits while something is timed, and lets fall the share of neurons
    that infmoe's masks keep."""
    def step(trainer, number):
        while is_timing():
            time.sleep(0.5)
        if anneal:
            share = min(1, 2 * number / trainer.config.max_steps)
            for _, bank in trainer.model.expert_layers():
                last = trainer.model_config.infmoe_rate * bank.w_out.shape[1]
                bank.n_keep = [round(bank.w_out.shape[1] * (1 - share) + last * share)]
        return train_step(trainer, number)
    return step


def is_timing():
    """Is something being timed? A lock whose process has gone counts for nothing."""
    with contextlib.suppress(OSError, ValueError):
        os.kill(int(Path("out/timing.lock").read_text()), 0)
        return True
    return False


def make_record(size, name, seed, settings, result, cpu_seconds):
    from model import GPT
    from support.budget import flops_per_token
    folder, measures, rows = folder_of(size, name, seed), {}, []
    if "diverged" not in result:
        with open(folder / "log.csv") as f:
            rows = [row for row in csv.DictReader(f) if row["val_loss"]]
        measures = measure(GPT.from_checkpoint(folder, device_of_runs()), settings, folder, rows[-1])
    c = configs_of(settings)[0]
    number = lambda row, key: round(float(row[key]), 5)
    # the share of all layers' neurons, sigma and the spread of mu while it trains (infmoe)
    routing = [[int(row["tokens"]), *(number(row, k) for k in ("entropy", "sigma", "mu_spread"))]
               for row in rows if row.get("sigma")]
    return dict(
        run=name, seed=seed, size=size, val_loss=round(result["val_loss"], 6),
        curve=[[int(row["tokens"]), number(row, "val_loss")] for row in rows],
        measures={k: round(v, 6) for k, v in measures.items()}, routing=routing,
        diverged=result.get("diverged", ""), settings=in_json(settings), n_params=c.n_params(),
        n_active_params=c.n_active_params(), flops_per_token=flops_per_token(c),
        seconds=number(rows[-1], "seconds") if rows else 0.0, cpu_seconds=cpu_seconds,
        machine=machine(), versions=versions(), data=data_of(settings["dataset"]), commit=commit())


def device_of_runs():
    import torch
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine():
    import torch
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [platform.processor() or platform.machine()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(": ")[2] for line in lines if line.startswith("model name")] + names
    return f"{names[0]} ({torch.backends.cpu.get_cpu_capability()})"


def versions():
    import numpy
    import torch
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=numpy.__version__)


def data_of(dataset):
    """Which text it is: the library's differs between versions of Python."""
    from support.shards import load_meta
    shards = load_meta(dataset).get("shards") or {}
    return next((shard["sha256"][:12] for shard in shards.values()), "unknown")


def commit():
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"


# ---- what is measured of a trained model beside its loss, on 64 held-out windows

def measure(model, settings, folder, last):
    import torch

    from support.shards import ShardReader
    if settings["flavour"] == "dense":
        return {}
    reader = ShardReader(settings["dataset"], "val", model.config.block_size)
    windows = torch.from_numpy(reader.sequential(0, min(64, reader.n_windows)))
    windows = windows.to(model.wte.weight.device)
    tokens, targets = windows[:, :-1], windows[:, 1:]
    found = {k: float(last[k]) for k in ("imbalance", "max_share", "dead_share") if last.get(k)}
    with torch.no_grad():
        if settings["flavour"] == "infmoe":
            return found | union(model, tokens) | losses_by_samples(model, tokens, targets)
        found |= routing_measures(model, tokens)
        if settings["flavour"] == "topk":
            found |= losses_by_top_k(model, tokens, targets)
    if settings["flavour"] in ("switch", "unipool"):
        found |= random_routing(folder, settings["dataset"])
    return found


def routing_measures(model, tokens):
    import losses
    kept = []
    for block in model.blocks:  # each layer is asked for its experts' activations, too
        block.ffn.register_forward_pre_hook(lambda _, args: (*args[:4], True))
        block.ffn.register_forward_hook(lambda _, args, output: kept.append(output[2]))
    routings = model(tokens, return_routings=True).routings
    for block in model.blocks:
        block.ffn._forward_pre_hooks.clear()
        block.ffn._forward_hooks.clear()
    n, pairs = model.config.n_experts, list(zip(routings, routings[1:]))
    found = {
        "routing entropy": mean(losses.routing_entropy(r.scores).item() for r in routings),
        "path consistency": mean(losses.path_consistency(a.ids, b.ids, n).item() for a, b in pairs)}
    if model.config.top_k > 1:
        found["overlap"] = mean(losses.overlap(activations).item() for activations in kept)
    return found


def random_routing(folder, dataset):
    """UniPool's probe: what the loss gains when one layer of the deep half chooses at random among
    all of its experts, or the 8 it uses most; mean over layers."""
    import probe
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


def union(model, tokens):
    """infmoe: the share of the neurons that any of a token's K masks keeps."""
    shares, layers = [], model.expert_layers()
    routings = model(tokens, return_routings=True).routings
    for (_, bank), codes in zip(layers, routings):
        shares += [(m != 0).any(1).float().mean().item() for m in bank.masks(codes) if m is not None]
    return {"union": mean(shares)}


def losses_by_samples(model, tokens, targets):
    """infmoe: the loss with K samples at inference, and with z = mu."""
    if model.config.infmoe_mean:
        return {}
    found = {}
    for k in (1, 2, 4, 8):
        model.set_samples(k)
        found[f"loss at K={k}"] = model(tokens, targets).loss.item()
    model.set_samples(mean=True)
    return found | {"loss at z=mu": model(tokens, targets).loss.item()}


def losses_by_top_k(model, tokens, targets):
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
    """[(run, seed)]: of each group the first seed of all its runs before the second."""
    only = config.only.split(",") if config.only else list(GROUPS)
    names = [[n for n in GROUPS.get(word, [word]) if n in SHOWN[config.size]] for word in only]
    return [(name, seed) for group in names for seed in range(101) for name in group
            if seed in seeds_of(config, name)]


def todo(config, records):
    """-> (what can begin now: (run, seed, rate); is there more once other processes are done?)

    The sweeps come first; the runs of a family wait for its rate.
    """
    runs = [run for run in wanted(config) if run not in records]
    families = list(dict.fromkeys(family_of(name) for name, _ in runs))
    rates = {f: learning_rate(records, config.size, f) for f in families}
    swept = [(*run, None) for f in families if rates[f] is None for run in sweep(records, f)[0]]
    swept.sort(key=lambda run: run[1])  # the first seed of all sweeps before the second
    ready = [(*run, rates[family_of(run[0])]) for run in runs if rates[family_of(run[0])]]
    return ([] if swept else ready) or swept


def run_all(config):
    """One run after the other until all are done or time is up -> exit status."""
    from prepare_data import make_missing
    make_missing(SIZES[config.size]["dataset"], True, print)
    late = threading.Timer(60 * config.minutes, os.kill, (os.getpid(), signal.SIGTERM))
    late.daemon = True
    if config.minutes:
        late.start()
    while runs := todo(config, load_records(config.size)):
        for name, seed, lr in runs:
            folder = folder_of(config.size, name, seed)
            with contextlib.suppress(BlockingIOError), files.lock(f"{folder}.lock"):
                if (name, seed) in load_records(config.size):
                    continue
                began = time.monotonic()
                if not run_one(config, name, seed, lr):
                    print(f"{name} seed {seed}: stopped, resumes next time")
                    return 0 if config.minutes and not late.is_alive() else 128 + signal.SIGTERM
                loss = load_records(config.size)[name, seed]["val_loss"]
                minutes = (time.monotonic() - began) / 60
                print(f"{name} seed {seed}: validation loss {loss:.4f} ({minutes:.1f} min)",
                      flush=True)
                break
        else:
            time.sleep(5)  # other processes have them all
    return 0


def show_list(config):
    records, rows = load_records(config.size), []
    for name in dict.fromkeys(name for name, _ in wanted(config)):
        seeds = seeds_of(config, name)
        done = sum((name, seed) in records for seed in seeds)
        rows.append(f"{name:22} {done} of {len(seeds)} seeds  {EXPERIMENTS[name]}")
    print("\n".join(rows), flush=True)  # in one piece, so that `--list | head` is no broken pipe


def main():
    from configurator import fail, parse
    config = parse(ReproduceConfig, doc=__doc__).make(ReproduceConfig)
    try:
        if config.list:
            show_list(config)
        elif config.report:
            from lab import claims
            claims.report(config.size)
        else:
            sys.exit(run_all(config))
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
