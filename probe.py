"""Ask a trained router what it knows: probes and diagnostics of experts, on our checkpoints and on transformers' models.

    python probe.py                                   # newest checkpoint under out/: --random-router-from and --routing
    python probe.py --random-router-from 12           # UniPool's probe: a random choice in one layer at a time, from 12 on
    python probe.py --random-router-from --choice=both --all-at-once      # from the middle on; also from 8 experts; together
    python probe.py --random-router-from --tasks=arc_easy,piqa            # measured on benchmarks (evaluate.py)
    python probe.py --routing --overlap --pathways    # who is used; do experts differ; do tokens keep to paths
    python probe.py --samples=1,2,4,8                 # infinity-MoE: quality and speed against K
    python probe.py --hf=mistralai/Mixtral-8x7B-v0.1 --dataset=notes.txt --load_in_4bit --device_map=auto --routing

Each probe prints a table and leaves NAME.json and NAME.png in save_dir. The model is only watched, or rerouted while a probe
runs: afterwards it is the same, bit for bit. What is random is a pure function of (seed, layer, place in the held-out text):
not of the batch size, and the same for a checkpoint and for its export. Layers are numbered from 0.
"""
import contextlib
import dataclasses
import json
import re
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map
from tqdm import tqdm

import kernels
import moe
from configurator import fail, parse
from lab import evaluate
from support import figures, hf
from support.checkpoint import newest_run
from support.machine import pick_device
from support.shards import ShardReader, load_meta

FAMILIES = "Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2, DeepSeek-V3, gpt-oss and Granite-MoE"


@dataclass
class ProbeConfig:
    out_dir: str | None = None  # folder of a checkpoint; None: the newest under out/
    hf: str | None = None  # instead of out_dir: a model of transformers', by its name on the hub or its folder
    dataset: str | None = None  # folder of shards (its held-out split) or a text file; None: what the checkpoint was trained on
    save_dir: str | None = None  # receives JSON and figures; None: out_dir, or out/hf_NAME
    random_router_from: bool | int | None = None  # first layer to randomise; without a number: the deep half
    all_at_once: bool = False  # randomise all those layers together instead of one at a time
    choice: Literal["all", "matched", "both"] = "all"  # draw from all experts, or from those that the layer uses most
    matched_experts: int = 8  # how many those are: as many as a private bank has
    gates: Literal["learned", "uniform"] = "learned"  # keep the router's K gate values, or share their sum out evenly
    controls: Literal["both", "skip", "hash", "none"] = "both"  # skip: no experts at all; hash: fixed random ones per token id
    seeds: int = 3
    tasks: str | None = None  # measure on these benchmarks instead of held-out text, as in evaluate.py
    include_path: str | None = None  # folder of task files (YAML) for --tasks
    limit: int | None = None  # items per task
    routing: bool = False  # use of experts per layer and summed, entropy, unused experts
    overlap: bool = False  # mean |cos| between the activations of the experts that one token chose
    pathways: bool = False  # path consistency, transitions, placement on devices, cache of experts
    devices: int = 4  # pathways: devices that the experts are spread over
    samples: tuple | None = None  # infmoe: compare these numbers of samples K
    tokens: int = 16384  # held-out tokens, always the first ones
    batch_size: int = 16  # sequences in a forward pass, fewer where the vocabulary is large
    block_size: int | None = None  # context; None: the model's, for hf at most 1024
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; auto: as they are saved
    device_map: str | None = None  # hf: passed on, such as auto
    load_in_4bit: bool = False  # hf: with bitsandbytes

    def __post_init__(self):
        for name in ("seeds", "tokens", "batch_size", "devices", "matched_experts", "limit", "block_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.out_dir and self.hf:
            raise ValueError(f"out_dir={self.out_dir} and hf={self.hf}: one model at a time")
        if any(not isinstance(k, int) or k < 1 for k in self.samples or ()):
            raise ValueError(f"samples={self.samples}: whole numbers from 1 on, such as --samples=1,2,4,8")
        asked = self.routing or self.overlap or self.pathways or self.samples
        if self.random_router_from is None and not asked:
            self.random_router_from = self.routing = True
        if self.random_router_from is False:
            self.random_router_from = None


# ----------------------------------------------------------------------------------------------------------------------
# 1. What is probed, and on what.

class Layer(NamedTuple):
    """One layer with experts."""
    index: int  # of its block
    router: nn.Module  # returns Routing, a tuple of Codes, or transformers' (logits, gates, ids)
    block: nn.Module  # router and experts together
    experts: nn.Module  # layers that share a pool have the same object here
    n_experts: int  # to choose from; infmoe: hidden neurons
    top_k: int


@dataclass
class Subject:
    name: str
    model: nn.Module
    layers: list  # of Layer
    depth: int  # blocks, with experts or without
    vocab_size: int
    windows: np.ndarray  # (n, S + 1) held-out tokens
    tokenizer: Any
    options: dict  # further arguments of the forward pass

    @property
    def continuous(self):
        return isinstance(self.layers[0].router, moe.CodeRouter)

    @property
    def banks(self):
        """Places in `layers`, those that share their experts together: one list per pool, or per layer."""
        shared = defaultdict(list)
        for k, layer in enumerate(self.layers):
            shared[id(layer.experts)].append(k)
        return list(shared.values())


def load_ours(config):
    model, tokenizer, saved = evaluate.load(config.out_dir, config.device, config.dtype)
    c, dataset = model.config, config.dataset or saved["train_config"]["dataset"]
    blocks = [(i, block.ffn) for i, block in enumerate(model.blocks) if isinstance(block.ffn, moe.MoE)]
    layers = [Layer(i, ffn.router, ffn, ffn.bank or model.pool_of(k), c.n_experts or c.d_expert, c.top_k or c.infmoe_samples)
              for k, (i, ffn) in enumerate(blocks)]
    theirs = load_meta(dataset)["tokenizer"] if Path(dataset).is_dir() else tokenizer.name
    if theirs != tokenizer.name:
        raise ValueError(f"{config.out_dir} was trained on {tokenizer.name} tokens, and {dataset} holds {theirs}")
    windows = read_windows(config, dataset, min(config.block_size or c.block_size, c.block_size), c.vocab_size, tokenizer.encode)
    kind = f"{c.flavour}, {c.n_layer} layers" + (f", {c.n_experts} experts, top {c.top_k}" if c.n_experts else "")
    name = f"{config.out_dir} ({kind}, step {saved['step']})"
    return Subject(name, model, layers, c.n_layer, c.vocab_size, windows, tokenizer, {})


def load_hf(config):
    """Any model of transformers' whose routers are *TopKRouter modules."""
    transformers = hf.need_transformers()
    if config.dataset is None:
        raise ValueError("--hf needs --dataset: a text file, or a folder of shards made with that model's tokenizer")
    options = {"dtype": config.dtype} | ({"device_map": config.device_map} if config.device_map else {})
    if config.load_in_4bit:
        options["quantization_config"] = transformers.BitsAndBytesConfig(load_in_4bit=True)
    model = hf.load_theirs(config.hf, **options)
    if not (config.device_map or config.load_in_4bit):
        model.to(pick_device(config.device))
    c, layers = model.config.get_text_config(), []
    for name, router in model.named_modules():
        if type(router).__name__.lower().endswith("topkrouter"):
            block, index = model.get_submodule(name.rpartition(".")[0]), int(re.search(r"\.(\d+)\.", name)[1])
            experts = getattr(block, "experts", block)
            layers.append(Layer(index, router, block, experts, len(router.weight), c.num_experts_per_tok))
    if not layers:
        raise ValueError(f"{config.hf}: {type(model).__name__} has no *TopKRouter module to hook, as {FAMILIES} have")
    encode = lambda text: transformers.AutoTokenizer.from_pretrained(config.hf, trust_remote_code=False)(text, verbose=False).input_ids
    size = min(config.block_size or 1024, getattr(c, "max_position_embeddings", None) or 1024)
    windows = read_windows(config, config.dataset, size, c.vocab_size, encode)
    kind = f"{type(model).__name__}, {c.num_hidden_layers} layers, {layers[0].n_experts} experts, top {layers[0].top_k}"
    options = {"use_cache": False}
    return Subject(f"{config.hf} ({kind})", model, layers, c.num_hidden_layers, c.vocab_size, windows, config.hf, options)


def read_windows(config, dataset, size, vocab_size, encode):
    """The first held-out tokens as (n, size + 1): from a folder of shards, or a text file."""
    if Path(dataset).is_file():
        ids = np.array(encode(Path(dataset).read_text(errors="replace")), dtype=np.int64)[:config.tokens + 1]
        if len(ids) <= size:
            raise ValueError(f"{dataset}: {len(ids)} tokens do not fill a window of {size + 1}: lower --block_size")
        return np.lib.stride_tricks.sliding_window_view(ids, size + 1)[::size]
    reader = ShardReader(dataset, "val", size, vocab_size)
    return reader.sequential(0, min(max(1, config.tokens // size), reader.n_windows))


# ----------------------------------------------------------------------------------------------------------------------
# 2. Watching and rerouting: forward hooks, gone when the `with` ends.

@contextlib.contextmanager
def hooked(hooks):
    """hooks: pairs of a module and a forward hook."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gates_and_ids(output):
    """The gates (T, K) and choices (T, K) in a discrete router's output, ours or transformers'."""
    if isinstance(output, moe.Routing):
        return output.weights, output.ids
    if not isinstance(output, tuple) or len(output) != 3 or output[1].shape != output[2].shape or output[2].is_floating_point():
        raise ValueError(f"this router does not return (logits, gates, ids), as those of {FAMILIES} do")
    return output[1:]


@contextlib.contextmanager
def rerouted(subject, layers, how, seed=0, among=None, gates="learned"):
    """While it is open, `layers` choose otherwise. how: random (per token), hash (random, but fixed per token id), skip (no
    experts at all). among: the experts to draw from, by layer index; None: all. gates: learned or uniform."""
    keys = {"seen": 0}

    def note(module, args, kwargs):
        ids = (args[0] if args else kwargs["input_ids"]).flatten()  # (T,)
        keys["hash"], keys["random"] = ids, torch.arange(keys["seen"], keys["seen"] + len(ids), device=ids.device)
        keys["seen"] += len(ids)

    def reroute(layer):
        chosen, stream = among and among[layer.index], 64 * (1000 * seed + layer.index)  # 64: hidden layers of a deep infmoe
        return lambda module, args, output: another_choice(layer, output, keys[how], stream, chosen, gates)

    handle = subject.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        with hooked([(layer.block, nothing) if how == "skip" else (layer.router, reroute(layer)) for layer in layers]):
            yield
    finally:
        handle.remove()


def nothing(module, args, output):
    """A hook that makes a layer's experts add nothing."""
    return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)


def another_choice(layer, output, keys, stream, among, gates):
    """A router's output with K distinct experts drawn uniformly, or codes from N(0, I), and the rest as it was. The noise
    is a pure function of keys (T,) and stream."""
    if isinstance(layer.router, moe.CodeRouter):
        streams = [stream + (i if layer.router.z != "shared" else 0) for i in range(len(output))]
        draw = lambda z, stream: moe.normal_noise(keys, stream, z[0].numel()).view_as(z).to(z)
        return tuple(code and code._replace(z=draw(code.z, s)) for code, s in zip(output, streams))
    weights, ids = gates_and_ids(output)
    among = torch.arange(layer.n_experts) if among is None else among
    noise = moe.uniform_noise(keys.to(ids.device), stream, len(among))  # (T, choices)
    ids = among.to(ids)[noise.topk(ids.shape[1]).indices]  # (T, K)
    if gates == "uniform":
        weights = weights.mean(-1, keepdim=True).expand_as(weights)
    return output._replace(weights=weights, ids=ids) if isinstance(output, moe.Routing) else (output[0], weights, ids)


def batches(subject, config, title=None):
    """The held-out windows (n, S + 1), a few at a time: logits of one batch stay below a gigabyte."""
    size = subject.windows.shape[1] - 1
    n = max(1, min(config.batch_size, 2**28 // (size * subject.vocab_size)))
    device = next(subject.model.parameters()).device
    for first in tqdm(range(0, len(subject.windows), n), desc=title, unit="batch", leave=False, disable=None if title else True):
        yield torch.tensor(subject.windows[first:first + n], device=device)


@torch.no_grad()
def held_out(subject, config, seconds=None):
    """-> (windows, 2): mean cross-entropy in nats, and next-token accuracy in percent, of every held-out window. The list
    `seconds` receives the time per token of every batch."""
    rows, seconds = [], [] if seconds is None else seconds
    for batch in batches(subject, config):
        began = time.perf_counter()
        logits = subject.model(batch[:, :-1], **subject.options).logits
        for row, targets in zip(logits, batch[:, 1:].to(logits.device)):  # one by one: no float32 copy of all logits
            rows.append((F.cross_entropy(row.float(), targets).item(), 100 * (row.argmax(-1) == targets).float().mean().item()))
        seconds.append((time.perf_counter() - began) / batch[:, 1:].numel())
    return np.array(rows)


@torch.no_grad()
def watch(subject, config, title, see):
    """Run over the held-out text and call see(k, input, output) for the k-th layer's router in each batch."""
    hooks = [(layer.router, lambda module, args, output, k=k: see(k, args[0], output)) for k, layer in enumerate(subject.layers)]
    with hooked(hooks):
        for batch in batches(subject, config, title):
            subject.model(batch[:, :-1], **subject.options)


def record(subject, config):
    """-> all choices (L, T, K) int16; the mean entropy of each router's scores (L,), 1 = undecided (transformers' routers
    return logits: of their softmax); and the share of its gates that are zero (L,), as happens to NormRouter's."""
    ids, entropy, zero = [[] for _ in subject.layers], np.zeros(len(subject.layers)), np.zeros(len(subject.layers))

    def see(k, x, output):
        weights, chosen = gates_and_ids(output)
        ids[k].append(chosen.to("cpu", torch.int16))
        scores = output.scores if isinstance(output, moe.Routing) else output[0].float().softmax(-1)
        entropy[k] += moe.routing_entropy(scores).item() * len(chosen)
        zero[k] += (weights == 0).float().mean().item() * len(chosen)

    watch(subject, config, "routing", see)
    ids = torch.stack([torch.cat(layer) for layer in ids])
    return ids, entropy / ids.shape[1], zero / ids.shape[1]


def thinned(tree, n, most=512):
    """Every few of the n tokens in a router's input or output, about `most` of them: what bounds the memory of a probe."""
    return tree_map(lambda t: t[::-(-n // most)] if isinstance(t, torch.Tensor) else t, tree)


# ----------------------------------------------------------------------------------------------------------------------
# 3. The random-router probe.

def random_router(subject, config, save):
    layers = layers_from(subject, config.random_router_from)
    groups = [layers] if config.all_at_once else [[layer] for layer in layers]
    labels = ["together"] if config.all_at_once else [str(layer.index) for layer in layers]
    kinds = interventions(subject, config)
    metric = benchmarks(subject, config) if config.tasks else lambda: held_out(subject, config)
    base, changes = metric(), {}  # (units, columns): units are windows or tasks
    with tqdm(total=len(groups) * sum(seeds for *_, seeds in kinds.values()), desc="another router", unit="run", leave=False,
              disable=None) as bar:
        for name, (how, among, seeds) in kinds.items():
            changes[name] = np.empty((len(groups), seeds, *base.shape))
            for i, j in np.ndindex(len(groups), seeds):
                with rerouted(subject, groups[i], how, j, among, config.gates):
                    changes[name][i, j] = metric() - base
                bar.update()
    rows = [{"router": name, "layer": label, "seeds": part.shape[1]} | summary(base, part, bool(config.tasks))
            for name, change in changes.items() for label, part in with_mean(labels, change)]
    learned = dict(zip(columns_of(base), base.mean(0)))
    print_random_router(config, len(base), learned, rows, list(changes))
    if learned.get("loss", 0) > np.log(subject.vocab_size):
        print("WARNING: this is worse than guessing: was the text made with another tokenizer than the model's?")
    if not subject.continuous:
        print("in the UniPool paper: -1.0 to -1.6 points in production models, -1.3 to -1.5 with private experts, -4.1\n"
              "(matched) and -3.8 to -4.0 (all) with a pool; mean benchmark accuracy, one layer of the deep half at a time")
    save("random_router", {"learned": learned, "rows": rows}, lambda: figures.random_router(rows, "accuracy"))


def layers_from(subject, start):
    """The layers with experts from block `start` on; True: from the middle of the depth on."""
    middle = subject.depth // 2
    start = middle if start is True else start
    layers = [layer for layer in subject.layers if layer.index >= start]
    if start < 0 or not layers:
        raise ValueError(f"random_router_from={start} leaves nothing to randomise: {subject.name} has layers 0 to "
                         f"{subject.depth - 1}, the last with experts is {subject.layers[-1].index}; without a number: {middle}")
    return layers


def interventions(subject, config):
    """-> {its name: (how, {layer index: experts to draw from} or None, seeds)}"""
    n, few = subject.layers[0].n_experts, min(config.matched_experts, subject.layers[0].n_experts)
    if subject.continuous and (config.choice != "all" or config.gates != "learned"):
        raise ValueError(f"choice={config.choice}, gates={config.gates}: infmoe has neither, its codes are drawn from N(0, I)")
    if config.choice != "all" and subject.layers[0].top_k > few:
        raise ValueError(f"choice={config.choice} draws from matched_experts={config.matched_experts}, and every token takes "
                         f"{subject.layers[0].top_k}: raise --matched_experts")
    kinds = {}
    if config.choice in ("all", "both"):
        kinds["random z" if subject.continuous else f"random of {n}"] = "random", None, config.seeds
    if config.choice in ("matched", "both"):
        ids, *_ = record(subject, config)
        most = {layer.index: moe.expert_counts(ids[k].long(), n).topk(few).indices for k, layer in enumerate(subject.layers)}
        kinds[f"random of top {few}"] = "random", most, config.seeds
    if config.controls in ("both", "hash"):
        kinds["hash"] = "hash", None, config.seeds
    if config.controls in ("both", "skip"):
        kinds["skipped"] = "skip", None, 1
    return kinds


def benchmarks(subject, config):
    """The metric of --tasks: a function without arguments -> (tasks, 1) accuracies in percent."""
    lm = evaluate.language_model(subject.model, subject.tokenizer)
    run = lambda: evaluate.run(lm, config.tasks, config.include_path, limit=config.limit)
    return lambda: 100 * np.array(list(evaluate.accuracies(run()).values()))[:, None]


def columns_of(values):
    """What the last dimension holds: benchmarks have no loss."""
    return ["loss", "accuracy"][-values.shape[-1]:]


def with_mean(labels, change):
    """change (groups of layers, seeds, units, columns) -> pairs of a label and its part; the last is the mean, if of many."""
    return [(label, change[i:i + 1]) for i, label in enumerate(labels)] + [("mean", change)] * (len(labels) > 1)


def summary(base, change, over_seeds):
    """Mean change and its standard error. The error comes from the scatter over held-out windows (that of the seeds is part
    of it), for benchmarks from that over seeds; None where there is one."""
    row = {}
    for j, column in enumerate(columns_of(change)):
        seeds, units = change[..., j].mean((0, 2)), change[..., j].mean((0, 1))
        row |= {column: base[:, j].mean() + units.mean(), f"{column}_change": units.mean(),
                f"{column}_error": standard_error(seeds if over_seeds else units),
                f"{column}_error_over_seeds": standard_error(seeds)}
    return row


def standard_error(values):
    return values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else None


def changed(change, error, digits):
    return f"{change:+.{digits}f}" + ("" if error is None else f" ±{error:.{digits}f}")


def print_random_router(config, n_units, learned, rows, names):
    print("learned router: " + ", ".join(f"{c} {v:.4f} nats" if c == "loss" else f"{c} {v:.2f} %" for c, v in learned.items()))
    print(f"with another router in {'all these layers at once' if config.all_at_once else 'one layer'} (gates: {config.gates}): "
          f"change ± standard error over {'seeds' if config.tasks else f'{n_units} held-out windows'}; {config.seeds} seeds")
    for column in learned:
        title, digits = ("loss, nats", 4) if column == "loss" else ("accuracy, points", 2)
        cell = lambda row, c=column, d=digits: changed(row[f"{c}_change"], row[f"{c}_error"], d)
        labels = list(dict.fromkeys(row["layer"] for row in rows))
        print_table([f"{title}; layer", *names], [[label, *[cell(r) for r in rows if r["layer"] == label]] for label in labels])


# ----------------------------------------------------------------------------------------------------------------------
# 4. Who is used.

def routing(subject, config, save):
    things = "neurons" if subject.continuous else "experts"
    rows, use, banks, facts = (neuron_use if subject.continuous else expert_use)(subject, config)
    labels = [row["layer"] for row in rows]
    pools = [bank for bank in banks if len(bank) > 1]
    rows += [{"layer": f"{labels[bank[0]]} to {labels[bank[-1]]}"} | use_columns(sum(use[r] for r in bank)) for bank in pools]
    print(f"use of {things}. entropy of the use: H/log n, 1 = even; largest: the most used one's share times n, 1 = even")
    print_table(list(rows[0]), [[row.get(name) for name in rows[0]] for row in rows])
    for text, value in facts.items():
        print(f"{text}: {value:.1%}")
    save("routing", {"rows": rows, "facts": facts, "use": [counts.tolist() for counts in use]},
         lambda: figures.use(labels, use, banks, things))


def use_columns(counts):
    """counts (n,): how often each expert or neuron was used -> table columns."""
    counts = torch.as_tensor(counts)
    return {"entropy of use": round(moe.usage_entropy(counts).item(), 4), "largest": round(moe.max_share(counts).item(), 2),
            "unused": int((counts == 0).sum())}


def expert_use(subject, config):
    """-> table rows, counts (n,) of every layer, layers by bank, further facts"""
    ids, entropy, zero = record(subject, config)
    use = [moe.expert_counts(ids[k].long(), layer.n_experts).numpy() for k, layer in enumerate(subject.layers)]
    rows = [{"layer": str(layer.index)} | use_columns(u) | {"entropy of scores": round(h, 4), "zero gates": round(z, 4)}
            for layer, u, h, z in zip(subject.layers, use, entropy, zero)]
    pools = [bank for bank in subject.banks if len(bank) > 1]
    if not pools:
        return rows, use, subject.banks, {}
    met = sum(moe.unique_experts(ids[bank]).item() * len(bank) for bank in pools) / sum(map(len, pools))
    return rows, use, subject.banks, {"distinct experts that a token meets over the depth, of those it could (the paper with "
                                      "top 1: 94.1 % at 12 layers, 89.5 % at 24, 83.4 % at 36)": met}


def neuron_use(subject, config):
    """infmoe: how often each hidden neuron is selected, the width of the densities and the spread of their means. Returns
    the same as expert_use, a row for every mask."""
    use, sums = defaultdict(float), defaultdict(float)

    def see(k, x, output):
        bank, codes = subject.layers[k].experts, thinned(output, len(x))
        for i, (_, counts) in zip(bank.w_z, bank.usage(codes)):
            mu, sigma = codes[int(i)].mu.float().mean(1), (codes[int(i)].logvar.float() / 2).exp().mean(1)  # (T, dz)
            use[k, i] = use[k, i] + counts.cpu().numpy()
            sums[k, i] += torch.stack((mu, mu.square(), sigma, torch.ones_like(mu))).sum(1).cpu()  # (4, dz)

    watch(subject, config, "routing", see)
    rows = []
    for (k, i), counts in use.items():
        mu, square, sigma, _ = sums[k, i] / sums[k, i][-1]
        rows.append({"layer": f"{subject.layers[k].index}" + f".{i}" * (len(use) > len(subject.layers))} | use_columns(counts) | {
            "sigma": round(sigma.mean().item(), 4), "spread of mu": round((square - mu**2).clamp_min(0).sqrt().mean().item(), 4)})
    masks = dict.fromkeys(i for _, i in use)
    banks = [[list(use).index((k, i)) for k in bank] for bank in subject.banks for i in masks]
    return rows, list(use.values()), banks, {}


# ----------------------------------------------------------------------------------------------------------------------
# 5. Do experts differ, and do tokens keep to paths?

def overlap(subject, config, save):
    """mean |cos| of the activations of the experts (or samples) that one token uses; the specialization loss lowers it."""
    sums, tokens = np.zeros(len(subject.layers)), np.zeros(len(subject.layers))

    def see(k, x, output):
        x = x.flatten(0, -2)  # (T, D)
        activations = hidden_activations(subject.layers[k], *thinned((x, output), len(x)))
        if activations.shape[1] < 2:
            raise ValueError(f"--overlap compares the experts of one token, and {subject.name} uses one")
        sums[k] += moe.overlap(activations).item() * len(activations)
        tokens[k] += len(activations)

    watch(subject, config, "overlap", see)
    labels, values = [str(layer.index) for layer in subject.layers], sums / tokens
    print("overlap: mean |cos| between the activations of the experts (infmoe: samples) of one token")
    print_table(["layer", "overlap"], [[label, f"{v:.4f}"] for label, v in [*zip(labels, values), ("mean", values.mean())]])
    save("overlap", {"layers": labels, "overlap": values.tolist()}, lambda: figures.overlap(labels, values))


def hidden_activations(layer, x, output):
    """(T, K, F) of the chosen experts: x (T, D) and what the router said of it."""
    if isinstance(layer.block, moe.MoE):
        return layer.experts(x, output, keep_activations=True)[1]
    w_in, w_out = (getattr(layer.experts, name, None) for name in ("gate_up_proj", "down_proj"))
    if w_in is None or w_in.ndim != 3 or w_in.shape[1] != 2 * w_out.shape[-1]:
        raise ValueError(f"--overlap cannot read {type(layer.experts).__name__}: it knows stacked [gate; up] experts")
    return kernels.expert_ffn(x, *gates_and_ids(output), w_in, w_out, "swiglu", backend="loop", keep_activations=True)[1]


def pathways(subject, config, save):
    if subject.continuous or len(subject.layers) < 2:
        raise ValueError(f"--pathways follows tokens between layers of discrete experts, and {subject.name} has none or one")
    n, (ids, *_) = subject.layers[0].n_experts, record(subject, config)
    if n < config.devices:
        raise ValueError(f"devices={config.devices}: more than the {n} experts of a layer")
    titles = [f"layers {a.index} to {b.index}" for a, b in zip(subject.layers, subject.layers[1:])]
    consistent = [moe.path_consistency(a, b, n).item() for a, b in zip(ids.long(), ids[1:].long())]
    chance = [moe.shares(moe.expert_counts(b, n)).max().item() for b in ids[1:, :, 0].long()]
    print("path consistency: share of tokens whose next first choice is the usual successor of this one; chance: were the\n"
          "layers independent")
    print_table(["", "consistency", "chance"], [[title, f"{c:.3f}", f"{r:.3f}"] for title, c, r in zip(
        [*titles, "mean"], [*consistent, np.mean(consistent)], [*chance, np.mean(chance)])])
    half = ids.shape[1] // 2
    seen, new = traffic(subject, ids[:, :half]), traffic(subject, ids[:, half:])
    in_order = {bank: np.arange(n) * config.devices // n for bank in range(len(subject.banks))}
    swapped = partition(seen, in_order, config.devices)
    crossing = {"in order": crossings(new, in_order), "by graph partition": crossings(new, swapped),
                "at random": 1 - 1 / config.devices}
    print(f"hops to an expert of the next layer that change device, with experts on {config.devices} devices; the partition is\n"
          "made from one half of the text, and all are judged on the other")
    print_table(["placement", "crossing"], [[name, f"{value:.1%}"] for name, value in crossing.items()])
    hits = cache_hits(accesses(subject, ids), len(subject.banks) * n)
    sizes = sorted({max(1, round(len(hits) * share)) for share in (0.05, 0.1, 0.25, 0.5, 0.75, 1)})
    print("a cache of the experts used last, decoding one token after another")
    print_table(["experts held", "hit rate"], [[f"{size} of {len(hits)}", f"{hits[size - 1]:.1%}"] for size in sizes])
    save("pathways", {"pairs": titles, "path_consistency": consistent, "chance": chance, "crossing": crossing,
                      "cache_hit_rate": hits.tolist()},
         lambda: figures.pathways(titles, [moe.path_counts(a, b, n).numpy() for a, b in zip(ids.long(), ids[1:].long())], hits))


def bank_numbers(subject):
    """For every layer the number of its bank."""
    return [next(b for b, bank in enumerate(subject.banks) if k in bank) for k in range(len(subject.layers))]


def traffic(subject, ids):
    """ids (L, T, K) -> {(bank, next bank): (E, E) how often a token goes from this expert to that one}"""
    n, bank, total = subject.layers[0].n_experts, bank_numbers(subject), defaultdict(float)
    for k, (here, there) in enumerate(zip(ids.long(), ids[1:].long())):
        total[bank[k], bank[k + 1]] += moe.path_counts(here, there, n).double().numpy()
    return total


def crossings(traffic, place):
    """Share of the hops between experts on different devices; place: {bank: (E,) device of each expert}."""
    away = sum(w[place[a][:, None] != place[b][None, :]].sum() for (a, b), w in traffic.items())
    return float(away / sum(w.sum() for w in traffic.values()))


def partition(traffic, place, n_devices, sweeps=10):
    """A placement with fewer crossings: within each bank swap two experts while that helps (Kernighan and Lin 1970), so that
    every device keeps its number of experts of every bank."""
    place = {bank: devices.copy() for bank, devices in place.items()}
    for _ in range(sweeps):
        if not sum(improve(traffic, place, bank, n_devices) for bank in place):
            break
    return place


def improve(traffic, place, bank, n_devices):
    """The best swap within one bank, again and again until none helps; changes place[bank]. -> how many"""
    devices, eye, swaps = place[bank], np.eye(n_devices), 0
    inside = np.zeros((len(devices), len(devices))) + sum(w + w.T for pair, w in traffic.items() if pair == (bank, bank))
    np.fill_diagonal(inside, 0)  # staying on one expert never crosses
    outside = sum(w @ eye[place[b]] if a == bank else w.T @ eye[place[a]]
                  for (a, b), w in traffic.items() if (a == bank) != (b == bank))
    while swaps < 4 * len(devices):
        pull = outside + inside @ eye[devices]  # (E, devices): hops between an expert and those on a device
        gain = pull[:, devices] - pull[np.arange(len(devices)), devices][:, None]  # (E, E): of i, were it where j is
        gain = (gain + gain.T - 2 * inside) * (devices[:, None] != devices[None, :])
        i, j = np.unravel_index(gain.argmax(), gain.shape)
        if gain[i, j] <= 1e-9:
            break
        devices[i], devices[j], swaps = devices[j], devices[i], swaps + 1
    return swaps


def accesses(subject, ids, most=2**18):
    """The experts that decoding would fetch, token by token and layer by layer: ids (L, T, K) -> numbers (n,)."""
    first = torch.tensor(bank_numbers(subject)) * subject.layers[0].n_experts  # (L,)
    return (ids.long() + first[:, None, None]).transpose(0, 1).flatten()[:most].numpy()  # (T, L, K) -> (n,)


def cache_hits(sequence, n_experts):
    """Hit rate of a cache that drops what was used least recently, for all its sizes at once: how deep in the stack of
    experts by last use was the one asked for (Mattson 1970)? -> (n_experts,)"""
    stack, hits = [], np.zeros(n_experts)
    for expert in sequence.tolist():
        if expert in stack:
            depth = stack.index(expert)
            hits[depth] += 1
            del stack[depth]
        stack.insert(0, expert)
    return hits.cumsum() / len(sequence)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Infinity-MoE: more samples, or none.

def samples(subject, config, save):
    if not subject.continuous or subject.model.config.infmoe_mean:
        raise ValueError(f"--samples counts the draws of infmoe's routers, and {subject.name} draws none")
    trained, base, rows = subject.model.config.infmoe_samples, held_out(subject, config), []
    try:
        for k in tqdm([*config.samples, "z = mu"], desc="samples", leave=False, disable=None):
            subject.model.set_samples(*(trained, True) if k == "z = mu" else (k, False))
            seconds = []
            change = held_out(subject, config, seconds) - base
            rows.append({"K": k, **summary(base, change[None, None], False), "tokens_per_second": 1 / np.median(seconds)})
    finally:
        subject.model.set_samples(trained, False)
    print(f"samples K at inference, trained with {trained}: change of the loss ± standard error over windows; speed of scoring")
    print_table(["K", "loss", "change", "accuracy, %", "tokens/s"], [
        [row["K"], f"{row['loss']:.4f}", changed(row["loss_change"], row["loss_error"], 4), f"{row['accuracy']:.2f}",
         f"{row['tokens_per_second']:.0f}"] for row in rows])
    save("samples", {"rows": rows}, lambda: figures.samples(rows))


# ----------------------------------------------------------------------------------------------------------------------
# 7. Tables, files, the command line.

def print_table(names, rows):
    """Columns as wide as they need be; the first to the left, the others to the right."""
    cells = [list(map(str, names)), *[["" if cell is None else str(cell) for cell in row] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print("  " + "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip())


def saver(subject, config):
    """-> save(name, results, draw): writes name.json, and name.png where matplotlib is installed."""
    folder = Path(config.save_dir or (f"out/hf_{Path(config.hf).name}" if config.hf else config.out_dir))
    folder.mkdir(parents=True, exist_ok=True)

    def save(name, results, draw):
        head = {"model": subject.name, "held_out_tokens": subject.windows[:, 1:].size, "settings": dataclasses.asdict(config)}
        (folder / f"{name}.json").write_text(json.dumps(head | results, indent=1))
        if figures.pyplot() is None:
            print(f'wrote {folder / name}.json; its figure needs matplotlib: pip install "nanoexperts[plot]"\n')
            return
        figure = draw()
        figure.savefig(folder / f"{name}.png", dpi=200)
        figures.pyplot().close(figure)
        print(f"wrote {folder / name}.json and {folder / name}.png\n")

    return save


def probe(config):
    """Run the probes that the configuration asks for."""
    if not config.hf:
        config.out_dir = config.out_dir or str(newest_run())
    subject = load_hf(config) if config.hf else load_ours(config)
    if not subject.layers:
        raise ValueError(f"{subject.name} is dense: there is no router to ask")
    print(f"{subject.name}\n{subject.windows[:, 1:].size:,} held-out tokens in {len(subject.windows)} windows\n")
    save = saver(subject, config)
    asked = {random_router: config.random_router_from is not None, routing: config.routing, overlap: config.overlap,
             pathways: config.pathways, samples: config.samples}
    for run in (run for run, wanted in asked.items() if wanted):
        run(subject, config, save)


def main():
    config = parse(ProbeConfig, doc=__doc__).make(ProbeConfig)
    try:
        probe(config)
    except (ValueError, OSError, ImportError) as error:
        fail(error)


if __name__ == "__main__":
    main()
