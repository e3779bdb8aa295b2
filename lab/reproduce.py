"""Do the papers' claims hold at a scale anyone can run? Seeds, equal budgets, and a report.

    python -m lab.reproduce --list                    # what there is to run, and what is done
    python -m lab.reproduce --only=a,b --seeds=1,2,3  # the experiments of claims a and b
    python -m lab.reproduce --minutes=60 --jobs=2     # as many as fit, two at a time
    python -m lab.reproduce --report                  # results/claims.md and its figures

A run is train.py's own, in a folder under out/reproduce; its record is one small file in
results/runs/, and the report is made of these alone. Finished runs are skipped, interrupted ones
resumed; records and checkpoints of other settings than the table's count for nothing. While
out/timing.lock exists (lab.bench holds it), all runs pause.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import ast
import contextlib
import csv
import ctypes
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev

from support.files import write_atomically

# ---- what is run

# Widths are shares of the dense FFN's (`width`), so that one table serves every size. init_std at
# cpu size is 0.02 * sqrt(768 / 64), as 0.02 belongs to GPT-2's width of 768; with 0.02 at width 64
# seeds ended up to 0.1 apart (results/log.md).
SIZES = {
    "cpu": dict(
        dataset="data/stdlib", arch="llama", n_layer=8, n_head=2, d_model=64, d_ff=128,
        block_size=128, vocab_size=257, init_std=0.07, batch_tokens=2048, micro_batch=16,
        max_steps=500, warmup_steps=40, min_lr=0.0, weight_decay=0.1, eval_every=100,
        eval_tokens=65536, save_every=100, log_every=10, device="cpu", dtype="float32",
        compile="false"),
    "gpu": dict(
        dataset="data/packages", arch="llama", n_layer=8, n_head=8, n_kv_head=4, d_model=512,
        d_ff=1024, block_size=512, vocab_size=50304, batch_tokens=65536, micro_batch=32,
        max_steps=480, warmup_steps=40, weight_decay=0.1, eval_every=60, eval_tokens=1048576,
        save_every=240, log_every=10),
}
LR = {"cpu": {"dense": 8e-3, "moe": 4e-3, "unipool": 4e-3, "infmoe": 8e-3},
      "gpu": {"dense": 1e-3, "moe": 1e-3, "unipool": 1e-3, "infmoe": 1e-3}}
SWEPT = ("dense", "vanilla", "unipool", "infmoe")
SWEEP = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)  # learning rates, the same for all, in half the steps

DENSE, VANILLA = dict(flavour="dense"), dict(flavour="switch")
INFMOE = dict(flavour="infmoe", infmoe_dz=32)
UNIPOOL = dict(flavour="unipool")  # the pool loss of raw scores, as published
SHORT = INFMOE | dict(steps=0.5)  # half of the tokens: where infinity-MoE is explored
TOP2 = dict(flavour="topk", width=0.5)  # 2 of 8 experts of half width
SHARED = dict(flavour="switch", pool_groups=1, n_experts=64)  # one pool, everything else as vanilla
DEEP = dict(n_layer=12)
DEEP_INFMOE = SHORT | dict(infmoe_depth=2, width=1, infmoe_rate=(0.5, 0.25))
SP, CP = dict(specialization_coef=2e-3), dict(coupling_coef=1e-3)
PATH = CP | dict(coupling="path")
POOL2 = UNIPOOL | dict(n_experts=64, top_k=2, width=0.5)
ALWAYS_ON = dict(flavour="deepseek", width=0.5, top_k=2)

EXPERIMENTS = {  # name: (claims, overrides)
    "dense": ("ae", DENSE),
    "vanilla": ("abcdfgh", VANILLA),
    "unipool": ("abcdgh", UNIPOOL),
    "dense-12": ("a", DENSE | DEEP),
    "vanilla-12": ("acg", VANILLA | DEEP),
    "unipool-12": ("acg", UNIPOOL | DEEP),
    "vanilla-bias": ("b", VANILLA | dict(router="sigmoid", balance="bias")),  # DeepSeek's balancing
    "vanilla-norm": ("b", VANILLA | dict(router="norm", balance_scores="normalised")),
    "shared-layer": ("b", SHARED),
    "shared-pool": ("b", SHARED | dict(balance="pool")),
    "unipool-G8": ("b", UNIPOOL | dict(pool_groups=8, n_experts=8)),
    "unipool-G4": ("b", UNIPOOL | dict(pool_groups=4, n_experts=16)),
    "unipool-G2": ("b", UNIPOOL | dict(pool_groups=2, n_experts=32)),
    "unipool-67%": ("c", UNIPOOL | dict(n_experts=43)),
    "unipool-50%": ("c", UNIPOOL | dict(n_experts=32)),
    "unipool-33%": ("c", UNIPOOL | dict(n_experts=21)),
    "unipool-12-67%": ("c", UNIPOOL | DEEP | dict(n_experts=64)),
    "unipool-12-50%": ("c", UNIPOOL | DEEP | dict(n_experts=48)),
    "unipool-12-33%": ("c", UNIPOOL | DEEP | dict(n_experts=32)),
    "vanilla-16/2": ("d", VANILLA | dict(n_experts=16, top_k=2, width=0.5)),
    "unipool-16/2": ("d", UNIPOOL | dict(n_experts=128, top_k=2, width=0.5)),
    "vanilla-32/4": ("d", VANILLA | dict(n_experts=32, top_k=4, width=0.25)),
    "unipool-32/4": ("d", UNIPOOL | dict(n_experts=256, top_k=4, width=0.25)),
    "dense-1.5": ("e", DENSE | dict(ffn=1.5)),  # as infmoe with its router
    "dense-wide": ("e", DENSE | dict(ffn=2)),  # equal total
    "switch-2": ("e", VANILLA | dict(n_experts=2)),  # equal total, equal active
    "top2-of-4": ("e", TOP2 | dict(n_experts=4)),  # the paper's MoE: equal total, equal active
    "infmoe": ("eh", INFMOE),
    "infmoe-no-topn": ("e", INFMOE | dict(infmoe_rate=1.0, infmoe_mean=True)),
    "infmoe-no-noise": ("e", INFMOE | dict(infmoe_rate=0.5, infmoe_mean=True)),
    "dense-short": ("e2", DENSE | dict(steps=0.5)),
    "infmoe-short": ("e2e3h", SHORT),
    "infmoe-K1": ("e2", SHORT | dict(infmoe_samples=1)),
    "infmoe-K4": ("e2", SHORT | dict(infmoe_samples=4)),
    "infmoe-N12": ("e2", SHORT | dict(infmoe_rate=0.125)),
    "infmoe-N50": ("e2", SHORT | dict(infmoe_rate=0.5)),
    "infmoe-dz8": ("e2", SHORT | dict(infmoe_dz=8)),
    "infmoe-dz64": ("e2", SHORT | dict(infmoe_dz=64)),
    "infmoe-pre": ("e3", SHORT | dict(infmoe_mask="pre")),
    "infmoe-deep": ("e3", DEEP_INFMOE),
    "infmoe-deep-shared": ("e3", DEEP_INFMOE | dict(infmoe_z="shared")),
    "infmoe-deep-hier": ("e3", DEEP_INFMOE | dict(infmoe_z="hierarchical")),
    "infmoe-deep-pre": ("e3", DEEP_INFMOE | dict(infmoe_mask="pre")),
    "infmoe-mixture": ("e3", SHORT | dict(infmoe_components=4)),
    "infmoe-balance": ("e3", SHORT | dict(balance="layer")),
    "infmoe-pool": ("e3h", SHORT | dict(pool_groups=1, width=16, infmoe_rate=1 / 32)),  # one bank
    "top2": ("f", TOP2),
    "top2-sp": ("f", TOP2 | SP),
    "top2-cp": ("f", TOP2 | CP),
    "top2-path": ("f", TOP2 | PATH),
    "top2-sp-cp": ("f", TOP2 | SP | CP),
    "top2-sp-path": ("f", TOP2 | SP | PATH),
    "top2-z": ("f2", TOP2 | dict(z_coef=1e-3)),
    "top2-z-sp-cp": ("f2", TOP2 | SP | CP | dict(z_coef=1e-3)),
    "shared-expert": ("f2", ALWAYS_ON),
    "shared-expert-sp-cp": ("f2", ALWAYS_ON | SP | CP),
    "pool2": ("f2h", POOL2),
    "pool2-sp-cp": ("f2", POOL2 | SP | CP),
    "pool2-sp-path": ("h", POOL2 | SP | PATH),
    "tune-top2": ("f3", TOP2 | dict(tune="top2")),  # a trained model goes on with other text
    "tune-top2-sp-cp": ("f3", TOP2 | SP | CP | dict(tune="top2")),
    "unipool-stale": ("h", UNIPOOL | dict(stale=True)),  # f of the last micro-batch
    "unipool-local": ("h", UNIPOOL | dict(micro_batch=2)),  # balance over 2 sequences
    "unipool-8x": ("h", UNIPOOL | dict(balance_coef=8e-2)),  # the pool loss in every layer
    "unipool-normalised": ("ah", UNIPOOL | dict(balance_scores="normalised")),
}

# ---- what is claimed

# kept from log.csv; imbalance was called balance once
ROUTING_COLUMNS = (
    "imbalance", "balance", "entropy", "max_share", "dead_share", "sigma", "mu_spread")

# The left side is below the right one: NAME (its validation loss) or NAME:MEASURE of its record.

CLAIMS = [
    ("a", "MoE below dense, equal active FLOPs (182M: 1.9317 < 2.042)", "vanilla", "dense"),
    ("a", "UniPool below vanilla, equal expert parameters (182M: -0.0288)", "unipool", "vanilla"),
    ("a", "the same, normalised scores in the pool loss [ours]", "unipool-normalised", "vanilla"),
    ("a", "the same with 12 layers: MoE below dense", "vanilla-12", "dense-12"),
    ("a", "the same with 12 layers: UniPool below vanilla", "unipool-12", "vanilla-12"),
    ("b", "NormRouter alone does not help vanilla (+0.0058), raw scores", "vanilla", "unipool-G8"),
    ("b", "the same, normalised scores", "vanilla", "vanilla-norm"),
    ("b", "sigmoid scores balanced by a bias improve vanilla (-0.0078)", "vanilla-bias", "vanilla"),
    ("b", "a shared pool with the layer loss is worse (+0.0163)", "vanilla", "shared-layer"),
    ("b", "a shared pool with pool loss and softmax is better (-0.0137)", "shared-pool", "vanilla"),
    ("b", "NormRouter improves the pool further (-0.0137 to -0.0288)", "unipool", "shared-pool"),
    ("b", "one pool is better than private banks (G = 1 against G = L)", "unipool", "unipool-G8"),
    ("b", "G = 4 is better than vanilla (-0.0218)", "unipool-G4", "vanilla"),
    ("b", "G = 2 is better than vanilla (-0.0104)", "unipool-G2", "vanilla"),
    ("b", "one pool is better than two (-0.0288 against -0.0104)", "unipool", "unipool-G2"),
    ("c", "a pool of 67 % of the experts still beats vanilla (182M)", "unipool-67%", "vanilla"),
    ("c", "a pool of 50 % still beats vanilla (469M and 650M)", "unipool-50%", "vanilla"),
    ("c", "a pool of 33 % does (not claimed)", "unipool-33%", "vanilla"),
    ("c", "12 layers: 67 % beats vanilla", "unipool-12-67%", "vanilla-12"),
    ("c", "12 layers: 50 % beats vanilla", "unipool-12-50%", "vanilla-12"),
    ("c", "12 layers: 33 % beats vanilla (not claimed)", "unipool-12-33%", "vanilla-12"),
    ("d", "UniPool keeps its gain with half the width, top 2", "unipool-16/2", "vanilla-16/2"),
    ("d", "UniPool keeps its gain with a quarter, top 4", "unipool-32/4", "vanilla-32/4"),
    ("e", "infinity-MoE below dense, equal active (router: +27 %, paper 4 %)", "infmoe", "dense"),
    ("e", "the same with its router counted [ours]", "infmoe", "dense-1.5"),
    ("e", "infinity-MoE below dense, equal total (not claimed)", "infmoe", "dense-wide"),
    ("e", "infinity-MoE below Switch, equal active and total", "infmoe", "switch-2"),
    ("e", "infinity-MoE below top 2 of 4, equal active and total", "infmoe", "top2-of-4"),
    ("e", "the top-N mask matters: below z = mu without it [ours]", "infmoe", "infmoe-no-topn"),
    ("e", "sampling matters: below z = mu with the mask [ours]", "infmoe", "infmoe-no-noise"),
    ("e", "more samples help at inference", "infmoe:loss at K=8", "infmoe:loss at K=1"),
    ("e", "infinity-MoE below dense at half of the tokens too", "infmoe-short", "dense-short"),
    ("e", "K = 2 in training below K = 1 [ours]", "infmoe-short", "infmoe-K1"),
    ("e", "K = 4 in training below K = 2 [ours]", "infmoe-K4", "infmoe-short"),
    ("e", "dz = 32 below 8 (the paper: gains up to 128)", "infmoe-short", "infmoe-dz8"),
    ("e", "dz = 64 below 32 (the paper: gains up to 128)", "infmoe-dz64", "infmoe-short"),
    ("e", "N = 25 % below 12.5 % [ours]", "infmoe-short", "infmoe-N12"),
    ("e", "N = 50 % below 25 % [ours]", "infmoe-N50", "infmoe-short"),
    ("e", "masks after the activation below masks before it", "infmoe-short", "infmoe-pre"),
    ("e", "a balance loss for neurons lowers the loss [ours]", "infmoe-balance", "infmoe-short"),
    ("e", "two hidden layers below one [extension]", "infmoe-deep", "infmoe-short"),
    ("e", "deep: masks before the activation help [extension]", "infmoe-deep-pre", "infmoe-deep"),
    ("e", "deep: hierarchical below independent z [extension]", "infmoe-deep-hier", "infmoe-deep"),
    ("e", "deep: independent below shared z [extension]", "infmoe-deep", "infmoe-deep-shared"),
    ("e", "a mixture of Gaussians below one [extension]", "infmoe-mixture", "infmoe-short"),
    ("f", "the specialization loss lowers the loss", "top2-sp", "top2"),
    ("f", "the coupling loss lowers the loss", "top2-cp", "top2"),
    ("f", "both lower the loss (perplexity 12.50 -> 12.27)", "top2-sp-cp", "top2"),
    ("f", "specialization lowers the overlap of experts", "top2-sp:overlap", "top2:overlap"),
    ("f", "both lower the routing entropy", "top2-sp-cp:routing entropy", "top2:routing entropy"),
    ("f", "both raise path consistency", "top2:path consistency", "top2-sp-cp:path consistency"),
    ("f", "path weights below the published coupling [ours]", "top2-path", "top2-cp"),
    ("f", "specialization with path weights lowers the loss [ours]", "top2-sp-path", "top2"),
    ("f", "both lower the loss, with z-loss on both sides", "top2-z-sp-cp", "top2-z"),
    ("f", "the same, an always-on expert (12.33 -> 12.16)", "shared-expert-sp-cp", "shared-expert"),
    ("f", "both lower the loss in a pool [ours]", "pool2-sp-cp", "pool2"),
    ("f", "both lower the loss in fine-tuning on other text", "tune-top2-sp-cp", "tune-top2"),
    ("g", "random routing costs a pool more", "vanilla:random, all", "unipool:random, all"),
    ("g", "the same with 12 layers", "vanilla-12:random, all", "unipool-12:random, all"),
    ("g", "the same among the 8 used most", "vanilla:random, all", "unipool:random, matched"),
    ("g", "12 layers, 8 used most", "vanilla-12:random, all", "unipool-12:random, matched"),
    ("h", "exact pool loss below the one-step-behind one [ours]", "unipool", "unipool-stale"),
    ("h", "the pool loss in every layer (8 x) below once [ours]", "unipool-8x", "unipool"),
    ("h", "balance over the batch below over 2 sequences [Qiu et al.]", "unipool", "unipool-local"),
    ("h", "normalised below raw scores in the pool loss [ours]", "unipool-normalised", "unipool"),
    ("h", "specialization and path coupling help a pool [ours]", "pool2-sp-path", "pool2"),
    ("h", "one continuous pool below private ones [ours]", "infmoe-pool", "infmoe-short"),
]


# ---- settings

@dataclass
class ReproduceConfig:
    only: str = ""  # claims (a to h, e2, e3, f2, f3) or experiments, with commas
    seeds: tuple = (1, 2, 3)  # --seeds="(1, 2, 3)" or --seeds=1
    size: str = "cpu"  # cpu (bytes, minutes a run) | gpu (GPT-2's BPE)
    sweep: bool = False  # the learning-rate sweep instead of the claims
    minutes: float = 0.0  # start and continue runs for so long; 0: until all are done
    jobs: int = 1  # runs at a time
    threads: int = 1  # CPU threads of each
    report: bool = False  # write results/claims.md and figures from the records
    list: bool = False  # print the experiments and which are done
    child: str = ""  # (internal) the one run of this process

    def __post_init__(self):
        whole = all(isinstance(seed, int) and seed >= 0 for seed in self.seeds)
        for name, right, expected in (
                ("size", self.size in SIZES, " or ".join(SIZES)),
                ("seeds", self.seeds and whole, "whole numbers, such as 1,2,3"),
                ("jobs", self.jobs >= 1, "1 or more"),
                ("minutes", self.minutes >= 0, "0 (until all is done) or more"),
                ("threads", 1 <= self.threads <= os.cpu_count(), f"1 to {os.cpu_count()} (CPUs)"),
                ("only", self.only.strip(", ") or not self.only, "names that --list shows")):
            if not right:
                raise ValueError(f"{name}={getattr(self, name)}: expected {expected}")


def sweep_names():
    return [f"lr/{base}/{lr}" for base in SWEPT for lr in SWEEP]


def overrides_of(name):
    if name in EXPERIMENTS:
        return EXPERIMENTS[name][1]
    if name not in sweep_names():
        raise ValueError(f"no experiment {name} (--list shows them)")
    _, base, lr = name.split("/")
    return EXPERIMENTS[base][1] | dict(lr=float(lr), steps=0.5)


def settings_of(size, name):
    """-> (the settings of a run, complete, for ModelConfig and TrainConfig; what is special)"""
    settings = SIZES[size] | overrides_of(name)
    special = {k: settings.pop(k, None) for k in ("stale", "tune", "width", "ffn", "steps")}
    settings["d_ff"] = int(settings["d_ff"] * (special["ffn"] or 1))
    if special["width"]:
        settings["d_expert"] = int(settings["d_ff"] * special["width"])
    settings["max_steps"] = int(settings["max_steps"] * (special["steps"] or 1))
    settings.setdefault("lr", LR[size].get(settings["flavour"], LR[size]["moe"]))
    if special["tune"]:
        settings["dataset"] = "data/prose" if size == "cpu" else "data/prose_gpt2"
        settings["lr"] /= 4
        settings["max_steps"] //= 2
    return settings, special


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
    return Path("out/reproduce", record_path(size, name, seed).stem)


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

NUMBER = (int, float)
FIELDS = dict(
    run=str, size=str, seed=int, settings=dict, val_loss=NUMBER, n_params=int, n_active_params=int,
    tokens=int, flops_per_token=int, seconds=NUMBER, hardware=str, torch=str, commit=str,
    curve=list, routing=dict, measures=dict)


def record_path(size, name, seed):
    name = name.replace("/", "x").replace("%", "pc")
    return Path("results/runs", f"{size}-{name}-s{seed}.json")


def read_record(path):
    """The record in a file; None where there is no file or, after a line on stderr, no record."""
    try:
        return check_record(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, OverflowError, RecursionError) as error:
        print(f"{path} is damaged and left out ({error})", file=sys.stderr)


def check_record(record):
    """The record itself; ValueError or TypeError for another thing."""
    for name, kind in FIELDS.items():
        if not isinstance(dict(record).get(name), kind):
            raise ValueError(f"{name} is {dict(record).get(name)!r:.40}")
    if not record["curve"] or record["run"] not in (*EXPERIMENTS, *sweep_names()):
        raise ValueError(f"no run {record['run']!r:.40}, or a run without a curve")
    points = [x for tokens, seconds, loss in record["curve"] for x in (tokens, seconds, loss)]
    for x in (record["val_loss"], record["seconds"], *record["routing"].values(),
              *record["measures"].values(), *points):
        if not math.isfinite(x) or record["tokens"] >= 2**63:
            raise ValueError(f"{x!r:.40} is no finite number")
    return record


def is_current(record):
    """Has a record the settings that the table has now?"""
    name, size = record["run"], record["size"]
    known = size in SIZES and name in (*EXPERIMENTS, *sweep_names())
    return known and record["settings"] == in_json(settings_of(size, name)[0])


def is_done(size, name, seed):
    record = read_record(record_path(size, name, seed))
    return record is not None and is_current(record)


# ---- one run

def run_one(size, name, seed):
    """Train (or resume) one run, measure it, write its record."""
    from train import train

    (settings, special), folder = settings_of(size, name), folder_of(size, name, seed)
    start = str(folder_of(size, special["tune"], seed)) if special["tune"] else "scratch"
    resume = holds(folder, settings)
    configs = configs_of(
        settings, out_dir=str(folder), seed=seed, quiet=True, overwrite=not resume,
        init_from="resume" if resume else start)
    with stale_pool_loss() if special["stale"] else contextlib.nullcontext():
        result = train(*configs)
    if not result["finished"]:
        sys.exit(128 + signal.SIGTERM)
    path, record = record_path(size, name, seed), make_record(size, name, seed, result["val_loss"])
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, sort_keys=True) + "\n"
    write_atomically(path, lambda f: f.write(text.encode()))


def make_record(size, name, seed, val_loss):
    import torch

    from model import GPT
    from support.budget import flops_per_token

    folder, (settings, _) = folder_of(size, name, seed), settings_of(size, name)
    with open(folder / "log.csv") as f:
        logged = list(csv.DictReader(f))
    # by the median speed: a run may have been paused, which a clock would count
    speed = median(float(row["tokens_per_second"]) for row in logged)
    curve = [[int(row["tokens"]), round(int(row["tokens"]) / speed, 1),
              round(float(row["val_loss"]), 5)] for row in logged if row["val_loss"]]
    last = [row for row in logged if row["val_loss"]][-1]
    model = GPT.from_checkpoint(folder, "cuda" if torch.cuda.is_available() else "cpu")
    claims, c = EXPERIMENTS[name][0] if name in EXPERIMENTS else "", model.config
    measures = measure(model, settings, folder, claims)
    return dict(
        run=name, size=size, seed=seed, settings=settings, val_loss=val_loss,
        n_params=c.n_params(), n_active_params=c.n_active_params(),
        flops_per_token=flops_per_token(c), tokens=curve[-1][0], seconds=curve[-1][1],
        hardware=hardware(), torch=torch.__version__, commit=commit(), curve=curve,
        routing={k: round(float(last[k]), 5) for k in ROUTING_COLUMNS if last.get(k)},
        measures={k: round(v, 6) for k, v in measures.items()})


def measure(model, settings, folder, claims):
    """What the claims ask of a trained model beside its loss, on 64 held-out windows."""
    import torch

    from support.shards import ShardReader
    if not claims or settings["flavour"] == "dense":
        return {}
    reader = ShardReader(settings["dataset"], "val", model.config.block_size)
    windows = torch.from_numpy(reader.sequential(0, min(64, reader.n_windows)))
    windows = windows.to(model.wte.weight.device)
    with torch.no_grad():
        if settings["flavour"] == "infmoe":
            return losses_by_samples(model, windows[:, :-1], windows[:, 1:])
        found = routing_measures(model, windows[:, :-1])
    return found | (probe_losses(folder, settings) if "g" in claims else {})


def routing_measures(model, tokens):
    import torch

    import losses
    kept = []
    for block in model.blocks:  # each layer is asked for its experts' activations, too
        block.ffn.register_forward_pre_hook(lambda _, args: (*args[:4], True))
        block.ffn.register_forward_hook(lambda _, args, output: kept.append(output[2]))
    routings = model(tokens, return_routings=True).routings
    n, pairs = model.config.n_experts, list(zip(routings, routings[1:]))
    found = {
        "routing entropy": mean(losses.routing_entropy(r.scores).item() for r in routings),
        "path consistency": mean(losses.path_consistency(a.ids, b.ids, n).item() for a, b in pairs)}
    if model.config.top_k > 1:
        found["overlap"] = mean(losses.overlap(activations).item() for activations in kept)
    if model.config.pool_groups == 1:
        ids = torch.stack([r.ids for r in routings])
        found["unique experts"] = losses.unique_experts(ids).item()
    return found


def probe_losses(folder, settings):
    """UniPool's routing probe: how much the loss rises when one layer of the deep half chooses
    at random; mean over layers."""
    import probe
    config = probe.ProbeConfig(
        out_dir=str(folder), dataset=settings["dataset"], random_router_from=True, choice="both",
        controls="none", seeds=2)
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


def losses_by_samples(model, tokens, targets):
    """infmoe: the loss with K samples at inference, and with z = mu."""
    if model.config.infmoe_mean:
        return {}
    found = {}
    for k in (1, 2, 4, 8):
        model.set_samples(k)
        found[f"loss at K={k}"] = model(tokens, targets).loss.item()
    model.set_samples(mean=True)
    found["loss at z=mu"] = model(tokens, targets).loss.item()
    return found


@contextlib.contextmanager
def stale_pool_loss():
    """UniPool's released code takes f from the previous micro-batch; so does the loss in here."""
    import losses
    exact, before = losses.BALANCES["pool"], []

    def stale(scores, counts):
        before.append([c.detach().clone() for c in counts])
        return exact(scores, before.pop(0) if len(before) > 1 else before[0])

    losses.BALANCES["pool"] = stale
    try:
        yield
    finally:
        losses.BALANCES["pool"] = exact


def hardware():
    import torch
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} thread(s)"


def commit():
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True).stdout.strip() or "unknown"


# ---- data

def make_data(dataset):
    """The text of a run, where it is not there yet: source of the library or of the installed
    packages, or (prose) the packages' docstrings."""
    from prepare_data import DataConfig, list_files, prepare
    from support.shards import load_meta
    with contextlib.suppress(FileNotFoundError):
        return load_meta(dataset)
    name = source = Path(dataset).name
    if name.startswith("prose"):  # 8 MB of what people write about code, in place of code
        source, size = f"{dataset}.jsonl", 0
        Path(source).parent.mkdir(exist_ok=True)
        with open(source, "w") as f:
            for file in list_files("packages", DataConfig()):
                if size < 2**23 and (text := docstrings(file.name)):
                    size += f.write(json.dumps({"text": text}) + "\n")
    print(f"preparing {dataset}", flush=True)
    tokenizer = "gpt2" if name in ("packages", "prose_gpt2") else "bytes"
    prepare([source], DataConfig(out_dir=dataset, tokenizer=tokenizer))


def docstrings(path):
    """The docstrings of a Python file; nothing for a file that does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, RecursionError):
        return ""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
    return "\n\n".join(filter(None, found))


# ---- many runs

def claims_of(text):
    """"abe2" -> ["a", "b", "e2"]"""
    return re.findall(r"[a-z]\d?", text)


def wanted(config):
    """(experiment, seed) in the order of the table, the first seed of all before the second."""
    only = set(filter(None, config.only.split(",")))
    of = {name: {name, *claims_of(claims)} for name, (claims, _) in EXPERIMENTS.items()}
    if wrong := only.difference(*of.values()):
        raise ValueError(f"only={config.only}: {', '.join(sorted(wrong))} is no claim and no "
                         "experiment (--list shows them)")
    names = sweep_names() if config.sweep else [n for n in of if not only or only & of[n]]
    return [(name, seed) for seed in dict.fromkeys(config.seeds) for name in names]


def is_ready(size, name, seed):
    """A fine-tuning run waits for the finished run whose model it tunes, in this folder."""
    tune = overrides_of(name).get("tune")
    return not tune or (is_done(size, tune, seed)
                        and holds(folder_of(size, tune, seed), settings_of(size, tune)[0]))


def prepare_runs(config):
    """What is to be done, its data in place -> [(experiment, seed)]"""
    todo = [(name, seed) for name, seed in wanted(config) if not is_done(config.size, name, seed)]
    for name, seed in todo:
        tuned = overrides_of(name).get("tune")
        if (tuned, seed) not in todo and not is_ready(config.size, name, seed):
            raise ValueError(f"{name} seed {seed} tunes the model of {tuned}, which is not in "
                             "out/reproduce: remove its record, and run it again here")
    for dataset in sorted({settings_of(config.size, name)[0]["dataset"] for name, _ in todo}):
        make_data(dataset)
    print(f"{len(todo)} runs to do", flush=True)
    return todo


def run_all(config):
    """A child a run, `jobs` at a time, until all are done or time is up -> names that failed."""
    # TERM ends by way of `finally`: no child outlives us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    todo, children, failed, paused = prepare_runs(config), {}, [], False
    deadline = time.monotonic() + config.minutes * 60 if config.minutes else math.inf
    try:
        while children or (todo and time.monotonic() < deadline):
            # start what is ready
            ready = [run for run in todo if is_ready(config.size, *run)]
            while ready and len(children) < config.jobs and not paused:
                run = ready.pop(0)
                todo.remove(run)
                children[start_child(config, *run)] = (*run, time.monotonic())
            if not children:
                break
            # pause all while something is being timed
            if paused != timing():
                paused = not paused
                send(children, signal.SIGSTOP if paused else signal.SIGCONT)
            # at the deadline each saves and ends
            if time.monotonic() > deadline and not paused:
                send(children, signal.SIGTERM)
                deadline = math.inf
                todo.clear()
            # collect those that ended
            for child in [c for c in children if c.poll() is not None]:
                if not finish(config, *children.pop(child), child.returncode):
                    failed.append(child)
            time.sleep(0.5)
    finally:
        send(children, signal.SIGCONT)
        send(children, signal.SIGTERM)
        for child in children:
            child.wait()
    return failed


def send(children, number):
    for child in children:
        child.send_signal(number)


def timing():
    """Is something being timed? A lock whose process has gone counts for nothing."""
    with contextlib.suppress(OSError, ValueError):
        os.kill(int(Path("out/timing.lock").read_text()), 0)
        return True
    return False


def start_child(config, name, seed):
    words = ["-m", "lab.reproduce", f"--child={name}", f"--seeds={seed}", f"--size={config.size}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(config.threads)}
    return subprocess.Popen([sys.executable, *words], env=environment, preexec_fn=follow_parent)


def follow_parent():
    """In a child, before it starts: Ctrl-C is the parent's to handle, and (on Linux) the system
    kills the child when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def finish(config, name, seed, begun, code):
    """Say how a child ended -> whether that is all right"""
    stopped = code in (128 + signal.SIGTERM, -signal.SIGTERM)
    how = "stopped, resumes next time" if stopped else f"failed with exit code {code}"
    if code == 0:
        loss = read_record(record_path(config.size, name, seed))["val_loss"]
        how = f"validation loss {loss:.4f} ({(time.monotonic() - begun) / 60:.1f} min)"
    print(f"{name} seed {seed}: {how}", flush=True)
    return stopped or code == 0


# ---- the report: a pure function of results/runs/

FIGURES = {  # title: experiments
    "pool": "dense vanilla unipool",
    "pool-12": "dense-12 vanilla-12 unipool-12",
    "ablation":
        "vanilla vanilla-bias vanilla-norm shared-layer shared-pool unipool-G8 unipool-G4 "
        "unipool-G2 unipool",
    "size": "vanilla unipool unipool-67% unipool-50% unipool-33%",
    "size-12": "vanilla-12 unipool-12 unipool-12-67% unipool-12-50% unipool-12-33%",
    "granularity": "vanilla unipool vanilla-16/2 unipool-16/2 vanilla-32/4 unipool-32/4",
    "infmoe": "dense dense-wide switch-2 top2-of-4 infmoe",
    "controls": "dense-1.5 infmoe infmoe-no-topn infmoe-no-noise",
    "samples":
        "dense-short infmoe-short infmoe-K1 infmoe-K4 infmoe-N12 infmoe-N50 infmoe-dz8 "
        "infmoe-dz64",
    "extensions":
        "infmoe-short infmoe-pre infmoe-deep infmoe-deep-shared infmoe-deep-hier "
        "infmoe-deep-pre infmoe-mixture infmoe-balance infmoe-pool",
    "losses": "top2 top2-sp top2-cp top2-path top2-sp-cp top2-sp-path",
    "losses-elsewhere":
        "top2-z top2-z-sp-cp shared-expert shared-expert-sp-cp pool2 pool2-sp-cp pool2-sp-path",
    "tuning": "tune-top2 tune-top2-sp-cp",
    "ours": "unipool unipool-normalised unipool-stale unipool-local unipool-8x",
}
MEASURES = ("routing entropy", "overlap", "path consistency", "unique experts", "imbalance",
            "max_share", "dead_share", "random, all", "random, matched", "loss at K=1",
            "loss at K=8", "loss at z=mu")
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262,
         12: 2.179, 16: 2.120, 20: 2.086, 30: 2.042, 40: 2.021, 60: 2.000}
# Student's t, two-sided 95 %, by degrees of freedom


def load_records(size):
    """{(experiment, seed): record}, those of older settings left out."""
    paths = sorted(Path("results/runs").glob(f"{size}-*.json"))
    records = filter(None, map(read_record, paths))
    return {(r["run"], r["seed"]): r for r in records if is_current(r)}


def of_name(records, name):
    """The records of an experiment, one a seed."""
    return [record for (n, _), record in sorted(records.items()) if n == name]


def compare(records, left, right):
    """[(left, right)] over the seeds that both sides of a claim have."""
    def values(side):
        name, _, measure = side.partition(":")
        return {r["seed"]: (r["measures"] | {"": r["val_loss"]})[measure]
                for r in of_name(records, name) if not measure or measure in r["measures"]}

    a, b = values(left), values(right)
    return [(a[seed], b[seed]) for seed in a if seed in b]


def common_spread(records):
    """Standard deviation of a paired difference of two losses, and its degrees of freedom.

    One error for all runs, by a two-way analysis of variance over the R experiments that have seeds
    1, 2 and 3: what remains of a loss without the mean of its experiment and that of its seed has
    (R - 1) (3 - 1) degrees of freedom. Three seeds alone would leave a pair two.
    """
    seeds = (1, 2, 3)
    table = [[records[name, seed]["val_loss"] for seed in seeds] for name in EXPERIMENTS
             if all((name, seed) in records for seed in seeds)]
    freedom = 2 * (len(table) - 1)
    if freedom < 2:
        return 0.0, 0
    of_seed, overall = [mean(column) for column in zip(*table)], mean(map(mean, table))
    errors = [loss - mean(row) - of_all + overall
              for row in table for loss, of_all in zip(row, of_seed)]
    return math.sqrt(2 * sum(e * e for e in errors) / freedom), freedom


def verdict(differences, common=(0.0, 0)):
    """holds: the 95 % interval of the paired mean lies below zero; does not hold here: above.

    common: a deviation known better than from these differences, and its degrees of freedom.
    """
    n = len(differences)
    if n < 2:
        return "undecided at this scale"
    deviation, freedom = max(common[0], stdev(differences)), max(common[1], n - 1)
    margin = T_975[max(k for k in T_975 if k <= freedom)] * deviation / math.sqrt(n)
    if abs(mean(differences)) <= margin:
        return "undecided at this scale"
    return "holds" if mean(differences) < 0 else "does not hold here"


def commits_of(records):
    return ", ".join(sorted({r["commit"] for r in records}))


def spread(values):
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def table_row(*cells):
    return f"| {' | '.join(map(str, cells))} |"


def table_head(*cells):
    return table_row(*cells).replace("|  |", "| |", 1), "|" + "---|" * len(cells)


def claim_row(records, common, claim, text, left, right):
    pairs = compare(records, left, right)
    if not pairs:
        return f"| {claim} | {text} | `{left}` | `{right}` | not run yet | | | |"
    lefts, rights = zip(*pairs)
    differences = [x - y for x, y in pairs]
    decided = verdict(differences, (0.0, 0) if ":" in left else common)
    return table_row(claim, text, f"`{left}` {spread(lefts)}", f"`{right}` {spread(rights)}",
                     spread(differences), len(pairs), decided)


def run_row(records, name):
    mine = of_name(records, name)
    r, losses = mine[0], [m["val_loss"] for m in mine]
    return table_row(
        f"`{name}`", spread(losses), len(mine), f"{r['n_params'] / 1e6:.2f}M",
        f"{r['n_active_params'] / 1e6:.2f}M", f"{r['tokens'] / 1e6:.2f}M",
        f"{r['flops_per_token'] * r['tokens']:.2e}", f"{mean(m['seconds'] for m in mine):.0f}")


def measure_rows(records, names):
    """One row per experiment that has a router."""
    for name in names:
        mine = [r["measures"] | r["routing"] for r in of_name(records, name)]
        for values in mine:
            if "balance" in values:  # the column's name in older logs
                values["imbalance"] = values["balance"]
        cells = [f"{mean(values[key] for values in mine):.3f}"
                 if all(key in values for values in mine) else "" for key in MEASURES]
        if any(cells):
            yield table_row(f"`{name}`", *cells)


def sweep_rows(records):
    """One row per family: the loss at each learning rate of the sweep, the lowest in bold."""
    for base in SWEPT:
        found = [records.get((f"lr/{base}/{lr}", 1)) for lr in SWEEP]
        losses = [f"{record['val_loss']:.4f}" if record else "-" for record in found]
        best = min((loss for loss in losses if loss != "-"), key=float, default=None)
        yield table_row(base, *(f"**{loss}**" if loss == best else loss for loss in losses))


def report(size):
    """results/claims.md (claims-gpu.md) and figures, from the records alone."""
    records = load_records(size)
    if not records:
        raise ValueError(f"no records of size {size} in results/runs: run some first: "
                         "python -m lab.reproduce --only=a --seeds=1")
    suffix = "" if size == "cpu" else f"-{size}"
    text = "\n".join(report_lines(size, records, suffix))
    write_atomically(f"results/claims{suffix}.md", lambda f: f.write(text.encode()))
    print(f"wrote results/claims{suffix}.md from {len(records)} runs")
    draw_curves(records, suffix)


HEAD = """\
# What holds at {size} size

Written by `python -m lab.reproduce --report --size={size}` from results/runs/.
{arch} blocks, {n_layer} layers (12 where it says so), width {d_model}, context {block_size},
{dataset}; loss in nats per {unit}, {eval_tokens:,} of them. {n} runs on {machines};
commits {commits}.

The left side is claimed to be below the right one. Paired over seeds; "holds" and "does not hold
here" mean that the 95 % t-interval of the paired difference lies on one side of zero, "undecided"
that it does not, or that there is one seed. The interval of losses takes one error for all runs
with seeds 1, 2 and 3 (two-way analysis of variance: paired differences deviate by {deviation:.4f},
with {freedom} degrees of freedom), or the pair's own where that is larger; measures other than the
loss take their own, with n - 1. Of claims without any effect one in twenty gets a verdict by
chance. Initial scale, raw scores and rates were chosen on trial runs with seeds 1 to 3, which are
among these seeds (log.md).
"""
RUNS_NOTE = """
FLOPs: (6 N_active + 12 L D S) times tokens. Seconds: tokens by a run's median speed, validations
apart, on a machine that was shared; compare them with care.
"""
ROUTERS_NOTE = "Means over seeds, on 64 held-out windows; imbalance and shares at the last step.\n"


def report_lines(size, records, suffix):
    deviation, freedom = common = common_spread(records)
    done = [name for name in EXPERIMENTS if of_name(records, name)]
    machines = {f"{r['hardware']}, torch {r['torch']}" for r in records.values()}
    yield HEAD.format(
        **SIZES[size], size=size, unit="byte" if size == "cpu" else "token", n=len(records),
        machines="; ".join(sorted(machines)), commits=commits_of(records.values()),
        deviation=deviation, freedom=freedom)
    yield from table_head("", "claim", "left", "right", "difference", "seeds", "verdict")
    for claim in CLAIMS:
        yield claim_row(records, common, *claim)
    yield "\n## Runs\n\nLoss against tokens, FLOPs and seconds, with the range of the seeds:"
    yield ", ".join(f"[{title}](claims{suffix}-{title}.png)" for title in FIGURES) + ".\n"
    yield from table_head("run", "validation loss", "seeds", "stored", "active", "tokens", "FLOPs",
                          "seconds")
    for name in done:
        yield run_row(records, name)
    yield f"{RUNS_NOTE}\n## What the routers do\n\n{ROUTERS_NOTE}"
    yield from table_head("run", *MEASURES)
    yield from measure_rows(records, done)
    yield f"\n## Learning rates\n\nOne seed, half of the steps. Used: {LR[size]}.\n"
    yield from table_head("", *(f"{lr:g}" for lr in SWEEP))
    yield from sweep_rows(records)
    yield ""


def draw_curves(records, suffix):
    """Loss against tokens, FLOPs and seconds: means over seeds, and the range of the seeds."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print('no figures: pip install -e ".[plot]"')
    for title, names in FIGURES.items():
        groups = [group for name in names.split() if (group := of_name(records, name))]
        if not groups:
            continue
        figure = Figure(figsize=(11, 4.2), dpi=110, layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        for group in groups:
            draw_run(panels, group)
        for axes, label in zip(panels, ("tokens (M)", "training FLOPs (1e12)", "seconds")):
            axes.set_xlabel(label)
            axes.grid(alpha=0.25)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("validation loss (nats)")
        figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, fontsize=7,
                      loc="outside lower center", ncols=2)
        shown = [r for group in groups for r in group]
        tokens, machine = max(r["tokens"] for r in shown) / 1e6, shown[0]["hardware"]
        heading = f"{tokens:.2f}M tokens, {machine}, commit {commits_of(shown)}"
        figure.suptitle(heading, fontsize=8)
        save = partial(figure.savefig, format="png", metadata={"Software": None})
        write_atomically(f"results/claims{suffix}-{title}.png", save)


def draw_run(panels, group):
    """One experiment of a figure: `group` are its records, one a seed."""
    r, n = group[0], len(group)
    label = (f"{r['run']}: {n} seed{'s' * (n > 1)}, {r['n_params'] / 1e6:.2f}M stored, "
             f"{r['n_active_params'] / 1e6:.2f}M active")
    points = [list(zip(*of_seeds)) for of_seeds in zip(*(r["curve"] for r in group))]
    tokens, seconds, losses = ([mean(point[i]) for point in points] for i in range(3))
    flops = [t * r["flops_per_token"] / 1e12 for t in tokens]
    low, high = [min(p[2]) for p in points], [max(p[2]) for p in points]
    for axes, x in zip(panels, ([t / 1e6 for t in tokens], flops, seconds)):
        line, = axes.plot(x, losses, marker="o", markersize=3, label=label)
        axes.fill_between(x, low, high, alpha=0.15, color=line.get_color())


def show_list(config):
    rows = []
    for name in dict.fromkeys(name for name, _ in wanted(config)):
        done = [seed for seed in config.seeds if is_done(config.size, name, seed)] or "-"
        claims = ",".join(claims_of(EXPERIMENTS.get(name, ("",))[0]))
        rows.append(f"{name:22} claims {claims:14} seeds done {done}  {overrides_of(name)}")
    print("\n".join(rows), flush=True)  # in one piece, so that `--list | head` is no broken pipe


def main():
    from configurator import fail, parse
    config = parse(ReproduceConfig, doc=__doc__).make(ReproduceConfig)
    try:
        if config.child:
            run_one(config.size, config.child, config.seeds[0])
        elif config.list:
            show_list(config)
        elif config.report:
            report(config.size)
        elif run_all(config):
            sys.exit(1)
    except (ValueError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:  # `finally` has stopped the children, each after saving
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    main()
