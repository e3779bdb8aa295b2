"""Ask a trained router what it knows: probes of experts, on our checkpoints and on transformers'.

    python probe.py                            # newest finished run: --random-router-from --routing
    python probe.py --random-router-from 12    # UniPool's probe, one layer at a time from 12 on
    python probe.py --random-router-from --choice=both --all-at-once  # the deep half, together
    python probe.py --random-router-from --tasks=arc_easy,piqa        # measured on benchmarks
    python probe.py --routing --overlap --pathways   # who is used; do experts differ; any paths?
    python probe.py --page --compare=out/x     # a page to look at, two models side by side
    python probe.py --samples=1,2,4,8          # infinity-MoE: quality and speed against K
    python probe.py --hf=mistralai/Mixtral-8x7B-v0.1 --dataset=notes.txt --load_in_4bit \\
                    --device_map=auto --routing

Each probe prints a table and leaves NAME.json and NAME.png in save_dir; those of an earlier one are
kept as NAME-1 and so on. The model is only watched, or rerouted while a probe runs: afterwards it
is the same, bit for bit. What is random depends on (seed, layer, place in the held-out text) alone:
not on the batch size, and is the same for a checkpoint and for its export. Layers count from 0.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import contextlib
import dataclasses
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map
from tqdm import tqdm

import kernels
import losses
import moe
from configurator import parse
from model import load_checkpoint
from support import figures, files, page
from support.results import changed, columns_of, print_table, save_results, summary
from support.routers import another_choice, find_blocks, gates_and_ids, hooked, replayed
from support.subjects import find_model, load_hf, load_ours
from support.usage import one_line


@dataclass
class ProbeConfig:
    out_dir: str | None = None  # folder of a checkpoint; None: the newest finished one under out/
    train: Literal["auto", "never"] = "auto"  # the demo's model, where out/ holds no checkpoint
    hf: str | None = None  # instead: a model of transformers', its name on the hub or its folder
    dataset: str | None = None  # folder of shards, or a text file; None: as trained
    save_dir: str | None = None  # receives JSON and figures; None: out_dir, or out/hf_NAME
    random_router_from: bool | int | None = None  # first layer to randomise; bare: the deep half
    all_at_once: bool = False  # randomise those layers together instead of one at a time
    choice: Literal["all", "matched", "both"] = "all"  # of all experts, or the layer's most used
    matched_experts: int = 8  # how many those are: as many as a private bank has
    gates: Literal["learned", "uniform"] = "learned"  # the router's K gates, or each their mean
    controls: Literal["both", "skip", "hash", "none"] = "both"  # no experts; by token id
    seeds: int = 3
    tasks: str | None = None  # measure on these benchmarks (lab.evaluate), not on held-out text
    include_path: str | None = None  # folder of task files (YAML) for --tasks
    limit: int | None = None  # items per task
    routing: bool = False  # use of experts per layer and summed, entropy, unused experts
    overlap: bool = False  # mean |cos| between the activations of one token's experts
    pathways: bool = False  # path consistency, transitions, placement on devices, cache of experts
    page: bool = False  # page.html: click through the first tokens and see who works on them
    compare: str | None = None  # page: folder of a second checkpoint, beside the first
    devices: int = 4  # pathways: devices that the experts are spread over
    samples: tuple | None = None  # infmoe: compare these numbers of samples K
    tokens: int = 16384  # held-out tokens, always the first ones
    batch_size: int = 16  # sequences in a forward pass, fewer where the vocabulary is large
    block_size: int | None = None  # context; None: the model's, for hf at most 1024
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of weights; auto: as saved
    device_map: str | None = None  # hf: passed on, such as auto
    load_in_4bit: bool = False  # hf: with bitsandbytes

    def __post_init__(self):
        for name in ("seeds", "tokens", "batch_size", "devices", "matched_experts", "limit",
                     "block_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.out_dir and self.hf:
            raise ValueError(f"out_dir={self.out_dir} and hf={self.hf}: one model at a time")
        if any(not isinstance(k, int) or k < 1 for k in self.samples or ()):
            raise ValueError(f"samples={self.samples}: whole numbers from 1, such as 1,2,4")
        if self.compare and not self.page:
            raise ValueError(f"compare={self.compare} is a second model on the page: add --page")
        asked = self.routing or self.overlap or self.pathways or self.samples or self.page
        if self.random_router_from is None and not asked:
            self.random_router_from = self.routing = True
        if self.random_router_from is False:
            self.random_router_from = None


# ---- 1. watching and rerouting: forward hooks, gone when the `with` ends


@contextlib.contextmanager
def rerouted(subject, layers, how, seed=0, among=None, gates="learned"):
    """While it is open, `layers` choose otherwise.

    how: random (per token), hash (random, but fixed per token id), or skip (no experts at all).
    among: experts to draw from, by layer index; None: all. gates: learned or uniform.
    """
    noise_seeds = {"seen": 0}

    def note(module, args, kwargs):
        ids = (args[0] if args else kwargs["input_ids"]).flatten()  # (T,)
        first = noise_seeds["seen"]
        noise_seeds["hash"] = ids
        noise_seeds["random"] = torch.arange(first, first + len(ids), device=ids.device)
        noise_seeds["seen"] += len(ids)

    def hook(layer):
        if how == "skip":
            return layer.block, nothing
        chosen = among and among[layer.index]
        return layer.router, lambda module, args, output: another_choice(
            layer, output, noise_seeds[how], seed, chosen, gates)

    handle = subject.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with hooked(map(hook, layers)):
            yield
    finally:
        handle.remove()


def nothing(module, args, output):
    """A hook that makes a layer's experts add nothing."""
    if isinstance(output, tuple):
        return torch.zeros_like(output[0]), *output[1:]
    return torch.zeros_like(output)


def batches(subject, config, title=None):
    """The held-out windows (n, S + 1), a few at a time: a batch's logits stay below a gigabyte."""
    size = subject.windows.shape[1] - 1
    n = max(1, min(config.batch_size, 2**28 // (size * subject.vocab_size)))
    device = next(subject.model.parameters()).device
    for first in tqdm(range(0, len(subject.windows), n), desc=title, unit="batch", leave=False,
                      disable=None if title else True):
        yield torch.tensor(subject.windows[first:first + n], device=device)


@torch.no_grad()
def held_out(subject, config, seconds=None) -> np.ndarray:
    """-> (windows, 2): each one's mean cross-entropy in nats, next-token accuracy in percent.

    The list `seconds` receives the time per token of every batch.
    """
    rows, seconds = [], [] if seconds is None else seconds
    for batch in batches(subject, config):
        began = time.perf_counter()
        logits = subject.model(batch[:, :-1], **subject.options).logits
        for row, targets in zip(logits, batch[:, 1:].to(logits.device)):  # no float32 copy of all
            right = (row.argmax(-1) == targets).float().mean().item()
            rows.append((F.cross_entropy(row.float(), targets).item(), 100 * right))
        seconds.append((time.perf_counter() - began) / batch[:, 1:].numel())
    return np.array(rows)


@torch.no_grad()
def watch(subject, config, title, see):
    """Run over the held-out text; see(k, input, output) is called for layer k's router."""
    def hook(k):
        return lambda module, args, output: see(k, args[0], output)

    with hooked([(layer.router, hook(k)) for k, layer in enumerate(subject.layers)]):
        for batch in batches(subject, config, title):
            subject.model(batch[:, :-1], **subject.options)


def record(subject, config):
    """-> all choices (L, T, K) int16, and the mean entropy of each router's scores (L,).

    A choice with a gate of zero, as NormRouter makes, has the id E: no expert. Entropy 1 is
    undecided; transformers' routers return logits, so it is that of their softmax.
    """
    ids, entropy = [[] for _ in subject.layers], np.zeros(len(subject.layers))

    def see(k, x, output):
        gates, chosen = gates_and_ids(output)
        chosen = torch.where(gates == 0, subject.layers[k].n_experts, chosen)
        ids[k].append(chosen.to("cpu", torch.int16))
        ours = isinstance(output, moe.Routing)
        scores = output.scores if ours else output[0].float().softmax(-1)
        entropy[k] += losses.routing_entropy(scores).item() * len(chosen)

    watch(subject, config, "routing", see)
    ids = torch.stack([torch.cat(layer) for layer in ids])
    return ids, entropy / ids.shape[1]


def counted(ids, n_experts):
    """One layer's choices (T, K) from record -> counts (E + 1,), the last: no expert."""
    return losses.expert_counts(ids.long(), n_experts + 1)


def thinned(tree, n, most=512):
    """Subsample a router's input or output of n tokens to about `most`: this bounds memory."""
    step = -(-n // most)
    return tree_map(lambda t: t[::step] if isinstance(t, torch.Tensor) else t, tree)


# ---- 2. the random-router probe


def random_router(subject, config, save):
    layers = layers_from(subject, config.random_router_from)
    groups, labels = [[layer] for layer in layers], [str(layer.index) for layer in layers]
    if config.all_at_once:
        groups, labels = [layers], ["together"]
    kinds = interventions(subject, config)
    metric = benchmarks(subject, config) if config.tasks else lambda: held_out(subject, config)
    base, changes = metric(), defaultdict(list)  # (units, columns): units are windows or tasks
    runs = len(groups) * sum(seeds for *_, seeds in kinds.values())
    with tqdm(total=runs, desc="another router", unit="run", leave=False, disable=None) as bar:
        for group in groups:
            # held-out text comes to the first of these layers as it did before
            start = 0 if config.tasks else group[0].index
            with replayed(find_blocks(subject.model), start, metric):
                for name, kind in kinds.items():
                    found = with_another_router(subject, config, group, kind, metric, bar)
                    changes[name].append(found - base)
    changes = {name: np.stack(groups) for name, groups in changes.items()}
    rows = []
    for name, change in changes.items():
        parts = [(label, change[i:i + 1]) for i, label in enumerate(labels)]
        if len(labels) > 1:
            parts.append(("mean", change))
        for label, part in parts:
            row = {"router": name, "layer": label, "seeds": part.shape[1]}
            rows.append(row | summary(base, part, bool(config.tasks)))
    learned = dict(zip(columns_of(base), base.mean(0)))
    print_random_router(subject, config, len(base), learned, rows, list(changes))
    over = "seeds" if config.tasks else "windows of held-out text"
    note = f"bars: mean of {config.seeds} seeds\nwhiskers: ± standard error over {over}"
    save("random_router", {"learned": learned, "rows": rows},
         lambda: figures.random_router(subject.name, rows, note))


def with_another_router(subject, config, layers, kind, metric, bar):
    """-> the metric (seeds, units, columns) while these layers are rerouted as interventions say"""
    how, among, seeds = kind
    found = []
    for seed in range(seeds):
        with rerouted(subject, layers, how, seed, among, config.gates):
            found.append(metric())
        bar.update()
    return np.stack(found)


def layers_from(subject, start):
    """The layers with experts from block `start` on; True: from the middle of the depth on."""
    middle = subject.depth // 2
    if start is not True and start >= subject.depth:
        print(f"layer {start} is beyond the {subject.depth} layers of this model: its deep half "
              f"instead, from layer {middle} on")
        start = True
    start = middle if start is True else start
    layers = [layer for layer in subject.layers if layer.index >= start]
    if start < 0 or not layers:
        raise ValueError(f"random_router_from={start} leaves nothing to randomise: {subject.name} "
                         f"has layers 0 to {subject.depth - 1}, the last with experts is "
                         f"{subject.layers[-1].index}; without a number: {middle}")
    return layers


def interventions(subject, config):
    """-> {its name: (how, {layer index: experts to draw from} or None, seeds)}"""
    n, top_k = subject.layers[0].n_experts, subject.layers[0].top_k
    own = {layer.index: (layer.router.lost < 1).nonzero().flatten().cpu()
           for layer in subject.layers if hasattr(layer.router, "lost")}  # UniPool-lock's owners
    has = min(map(len, own.values()), default=n)
    few, kinds = min(config.matched_experts, has), {}
    if subject.continuous and (config.choice != "all" or config.gates != "learned"):
        raise ValueError(f"choice={config.choice}, gates={config.gates}: infmoe has neither, its "
                         "codes are drawn from N(0, I)")
    if config.choice != "all" and top_k > few:
        raise ValueError(f"choice={config.choice} draws from matched_experts={few}, and every "
                         f"token takes {top_k}: raise --matched_experts")
    if config.choice in ("all", "both"):
        name = "random z" if subject.continuous else f"random of {has}"
        kinds[name] = "random", own or None, config.seeds
    if config.choice in ("matched", "both"):
        ids, _ = record(subject, config)
        most = {}
        for k, layer in enumerate(subject.layers):
            mine = own.get(layer.index, torch.arange(n))
            most[layer.index] = mine[counted(ids[k], n)[mine].topk(few).indices]
        kinds[f"random of top {few}"] = "random", most, config.seeds
    if config.controls in ("both", "hash"):
        kinds["hash"] = "hash", own or None, config.seeds
    if config.controls in ("both", "skip"):
        kinds["skipped"] = "skip", None, 1
    return kinds


def benchmarks(subject, config):
    """The metric of --tasks: a function without arguments -> (tasks, 1) accuracies in percent."""
    from lab import evaluate  # the harness behind it is an extra
    lm = evaluate.language_model(subject.model, subject.tokenizer)

    def measure():
        found = evaluate.run(lm, config.tasks, config.include_path, limit=config.limit)
        scores = [evaluate.score_of(values, "acc_norm")[0] for values in found.values()]
        return 100 * np.array(scores)[:, None]

    return measure


def print_random_router(subject, config, n_units, learned, rows, names):
    units = {"loss": f"nats per {subject.unit}", "accuracy": "%"}
    digits = {"loss": 4, "accuracy": 2}
    parts = [f"{c} {v:.{digits[c]}f} {units[c]}" for c, v in learned.items()]
    print(f"learned router: {', '.join(parts)}")
    where = "all these layers at once" if config.all_at_once else "one layer"
    over = "seeds" if config.tasks else f"{n_units} held-out windows"
    print(f"with another router in {where} (gates: {config.gates}): change ± standard error over "
          f"{over}; {config.seeds} seeds")
    for column in learned:
        title = {"loss": "loss, nats", "accuracy": "accuracy, points"}[column]
        table = defaultdict(list)
        for row in rows:  # by router, then by layer
            table[row["layer"]].append(changed(row, column, digits[column]))
        print_table([f"{title}; layer", *names], [[label, *row] for label, row in table.items()])
    if learned.get("loss", 0) > np.log(subject.vocab_size):
        print("WARNING: this is worse than guessing: was the text made with another tokenizer?")
    if not subject.continuous:
        print("in the UniPool paper: -1.0 to -1.6 points in production models, -1.3 to -1.5 with\n"
              "private experts, -4.1 (matched) and -3.8 to -4.0 (all) with a pool; mean benchmark\n"
              "accuracy, one layer of the deep half at a time")


# ---- 3. who is used


def routing(subject, config, save):
    continuous = subject.continuous
    things = "neurons" if continuous else "experts"
    from lab.continuous import neuron_use  # lazily: it builds on this file
    rows, use, banks, facts = (neuron_use if continuous else expert_use)(subject, config)
    labels, pools = [row["layer"] for row in rows], [bank for bank in banks if len(bank) > 1]
    for bank in pools:
        label = f"{labels[bank[0]]} to {labels[bank[-1]]}"
        rows.append({"layer": label} | use_columns(sum(use[r] for r in bank)))
    print(f"use of {things}. entropy of the use: H/log n, 1 = even; largest: the most used one's "
          "share times n, 1 = even")
    if not continuous:
        print("no expert: share of the gates that are zero, where the token skips the layer; not "
              "counted as use")
    print_table(list(rows[0]), [[row.get(name) for name in rows[0]] for row in rows])
    for text, value in facts.items():
        print(f"{text}: {value:.1%}")
    none = None if continuous else np.array([row["no expert"] for row in rows[:len(use)]])
    save("routing", {"rows": rows, "facts": facts, "use": [counts.tolist() for counts in use]},
         lambda: figures.use(subject.name, labels, use, banks, things, none))


def use_columns(counts):
    """counts (n,): how often each expert or neuron was used -> table columns."""
    counts = torch.as_tensor(counts)
    return {"entropy of use": round(losses.usage_entropy(counts).item(), 4),
            "largest": round(losses.max_share(counts).item(), 2),
            "unused": int((counts == 0).sum())}


def expert_use(subject, config):
    """-> table rows, counts (n,) of every layer, layers by bank, further facts"""
    (ids, entropy), rows, use = record(subject, config), [], []
    for k, layer in enumerate(subject.layers):
        *counts, none = counted(ids[k], layer.n_experts).tolist()
        use.append(np.array(counts))
        further = {"entropy of scores": entropy[k], "no expert": none / ids[k].numel()}
        further = {name: round(value, 4) for name, value in further.items()}
        rows.append({"layer": str(layer.index)} | use_columns(use[k]) | further)
    pools = [bank for bank in subject.banks if len(bank) > 1]
    if not pools:
        return rows, use, subject.banks, {}
    met = 0.0
    for bank in pools:
        none = ids[bank] == subject.layers[bank[0]].n_experts  # (layers, T, K)
        met += losses.unique_experts(ids[bank]).item() * len(bank)
        met -= none.any(0).any(-1).float().mean().item() / ids.shape[2]  # "no expert" is none
    text = ("distinct experts that a token meets over the depth, of those it could (the paper with "
            "top 1: 94.1 % at 12 layers, 89.5 % at 24, 83.4 % at 36)")
    return rows, use, subject.banks, {text: met / sum(map(len, pools))}


# ---- 4. do experts differ?


def overlap(subject, config, save):
    """mean |cos| of the activations of the experts (or samples) that one token uses."""
    sums, tokens = np.zeros(len(subject.layers)), np.zeros(len(subject.layers))

    def see(k, x, output):
        x = x.flatten(0, -2)  # (T, D)
        activations = hidden_activations(subject.layers[k], *thinned((x, output), len(x)))
        if activations.shape[1] < 2:
            raise ValueError(f"it compares the experts of one token, and {subject.name} uses one")
        sums[k] += losses.overlap(activations).item() * len(activations)
        tokens[k] += len(activations)

    watch(subject, config, "overlap", see)
    labels, values = [str(layer.index) for layer in subject.layers], sums / tokens
    print("overlap: mean |cos| between the activations of one token's experts (infmoe: samples)")
    table = [*zip(labels, values), ("mean", values.mean())]
    print_table(["layer", "overlap"], [[label, f"{value:.4f}"] for label, value in table])
    save("overlap", {"layers": labels, "overlap": values.tolist()},
         lambda: figures.overlap(subject.name, labels, values))


def hidden_activations(layer, x, output):
    """(T, K, F) of the chosen experts: x (T, D) and what the router said of it."""
    if isinstance(layer.block, moe.MoE):
        return layer.experts(x, output, keep_activations=True)[1]
    w_in, w_out = (getattr(layer.experts, name, None) for name in ("gate_up_proj", "down_proj"))
    if w_in is None or w_in.ndim != 3 or w_in.shape[1] != 2 * w_out.shape[-1]:
        raise ValueError(f"it cannot read {type(layer.experts).__name__}: only stacked [gate; up] "
                         "experts without biases")
    return kernels.expert_ffn(x, *gates_and_ids(output), w_in, w_out, "swiglu",
                              keep_activations=True)[1]


# ---- 5. a page to look at

PAGE_TOKENS = 96  # a page of them stays below 300 kB


def write_page(subject, config, save):
    """page.html: who works on the first held-out tokens; with --compare, in two models."""
    subjects = [subject]
    if config.compare:
        other = dict(out_dir=config.compare, hf=None, dataset=dataset_of(config))
        subjects.append(load_ours(dataclasses.replace(config, **other)))
    page.write_subjects(folder_of(config), subjects, PAGE_TOKENS)


def dataset_of(config):
    """The text that the first model reads."""
    if config.dataset or config.hf:
        return config.dataset
    return load_checkpoint(Path(config.out_dir, "ckpt.pt"))["train_config"]["dataset"]


# ---- 6. the command line


def saver(subject, config):
    """-> save(name, results, draw): name.json, and name.png if matplotlib is there."""
    head = {"model": subject.name, "held_out_tokens": subject.windows[:, 1:].size,
            "settings": dataclasses.asdict(config)}
    folder = folder_of(config)
    return lambda name, results, draw: save_results(folder, name, head | results, draw)


def folder_of(config):
    """What receives the files of a probe."""
    theirs = f"out/hf_{Path(config.hf).name}" if config.hf else config.out_dir
    return Path(config.save_dir or theirs)


def probe(config: ProbeConfig) -> int:
    """Run the probes that the configuration asks for, each whatever became of the others.

    -> how many could not be done; each of these says why in one line on stderr.
    """
    if not config.hf:
        config.out_dir = config.out_dir or find_model(config)
    with files.lock(folder_of(config), "save_dir"):
        subject = load_hf(config) if config.hf else load_ours(config)
        n, windows = subject.windows[:, 1:].size, len(subject.windows)
        print(f"{subject.name}\n{n:,} held-out tokens in {windows} windows\n")
        return run_probes(subject, config)


def run_probes(subject, config):
    from lab.continuous import samples  # lazily: they build on this file
    from lab.pathways import pathways
    save, failed = saver(subject, config), 0
    asked = {random_router: config.random_router_from is not None, routing: config.routing,
             overlap: config.overlap, pathways: config.pathways, samples: config.samples,
             write_page: config.page}
    for run in (run for run, wanted in asked.items() if wanted):
        try:
            run(subject, config, save)
        except (ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
            reason = str(error).replace("\n", " ")
            name = run.__name__.removeprefix("write_")
            print(f"error: --{name}: {reason}", file=sys.stderr)
            failed += 1
    return failed


def main():
    config = parse(ProbeConfig, doc=__doc__).make(ProbeConfig)
    with one_line("stopped by Ctrl-C: what is written is whole"):
        sys.exit(2 if probe(config) else 0)


if __name__ == "__main__":
    main()
