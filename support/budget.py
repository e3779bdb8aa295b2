"""What a run will cost: parameters, FLOPs, memory, time; and whether it fits this machine."""

import contextlib
import math
import os
import resource
import time
from dataclasses import replace
from pathlib import Path

import torch

from support import experts_over_ranks
from support.shards import ShardReader

PEAK_FLOPS = {  # dense bf16 FLOP/s by the makers' data sheets; the first name that fits counts
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "H800": 989e12,
    "H20": 148e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12, "A6000": 155e12, "A40": 150e12,
    "A10": 125e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12, "3090": 71e12, "MI300X": 1307e12}
BANDWIDTH = {  # of its memory, bytes a second, likewise
    "H100 PCIe": 2e12, "H100 NVL": 3.9e12, "H100": 3.35e12, "H200": 4.8e12, "H800": 3.35e12,
    "H20": 4e12, "B200": 8e12, "A100": 2e12, "A800": 2e12, "A6000": 768e9, "A40": 696e9,
    "A10": 600e9, "L40S": 864e9, "L4": 300e9, "4090": 1008e9, "3090": 936e9, "MI300X": 5.3e12}
REACHED = 0.4  # share of the peak that a training run reaches, for estimates of time

# ---- words for numbers


def amount(n):
    """1234567 -> 1.23M"""
    units = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
    size, unit = next((pair for pair in units if abs(n) >= pair[0]), (1, ""))
    return f"{n / size:.3g}{unit}"


def span(seconds):
    """4000 -> 67 min"""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def table(**rows):
    return "\n".join(f"{name:9}{text}" for name, text in rows.items())


# ---- counts


def check_size(settings):
    """ValueError for sizes that take minutes only to count. settings: a configuration's fields."""
    names = ("d_model", "d_expert", "n_experts")
    sizes = [settings.get(name) or 1 for name in names]
    others = ("vocab_size", "block_size", "d_ff", "d_model")
    widest = max(settings.get(name) or 1 for name in others)
    if math.prod(sizes) * widest > 10**18:  # torch counts bytes in 64 bits
        given = ", ".join(f"{name}={size}" for name, size in zip(names, sizes))
        raise ValueError(f"{given} and another width of {widest} are beyond any machine")


def part_of(name):
    """Which part of the model the parameter `name` belongs to."""
    if name.split(".")[0] in ("wte", "wpe", "head"):
        return "embeddings"
    parts = {".attention.": "attention", ".router.": "routers", "bank.": "experts",
             "pools.": "experts", ".ffn.": "dense FFN"}
    return next((part for key, part in parts.items() if key in name), "norms")


def print_parameters(model, n_active):
    """Parameters by part, stored, and used by one token (n_active). The model may be on meta."""
    stored, c = {}, model.config
    for name, p in model.named_parameters():
        stored[part_of(name)] = stored.get(part_of(name), 0) + p.numel()
    total = sum(stored.values())
    print(f"{c.arch} {c.flavour}, {c.n_layer} layers")
    print(f"{'parameters':12}{'stored':>16}{'active':>16}")
    for part, n in stored.items():
        used = n_active - total + n if part == "experts" else n  # all else is used by every token
        print(f"{part:12}{n:16,}{used:16,}")
    print(f"{'total':12}{total:16,}{n_active:16,}")


def flops_per_token(model_config):
    """Of a training step, forward and backward: 6 N + 12 L D S. N: the active parameters, apart
    from a table of which a token reads one row."""
    c = model_config
    attention = 12 * c.n_layer * c.n_head * c.head_dim * c.block_size
    return 6 * (c.n_active_params() - lookup_table(c)) + attention


def lookup_table(m):
    """Parameters of a table of token embeddings that the head does not share."""
    return 0 if m.tie_embeddings else m.vocab_size * m.d_model


def peak_flops(device, table=None):
    """Dense bf16 FLOP/s of the GPU at hand, or what another table says of it; None: not there."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for key, peak in (table or PEAK_FLOPS).items() if key in name), None)


def cpu_flops():
    """FLOP/s of a float32 matrix product here, the best of five."""
    a, seconds = torch.ones(1024, 1024), []
    for _ in range(5):
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    return 2 * 1024**3 / min(seconds)


def accumulation_steps(config, block_size, n_ranks):
    """Micro-steps that make up batch_tokens; ValueError where none do."""
    micro = config.micro_batch * block_size * n_ranks
    if config.batch_tokens % micro:
        raise ValueError(f"batch_tokens={config.batch_tokens} is not a multiple of {micro} = "
                         f"micro_batch {config.micro_batch} x block_size {block_size} x {n_ranks} "
                         f"ranks; try {math.ceil(config.batch_tokens / micro) * micro}")
    return config.batch_tokens // micro


def step_sizes(m, c, n_ranks):
    counts = {"micro-step": accumulation_steps(c, m.block_size, n_ranks), "rank": n_ranks,
              "sequence": c.micro_batch}
    product = " x ".join(f"{n} {noun}{'s' * (n != 1)}" for noun, n in counts.items())
    return f"{c.batch_tokens} tokens = {product} x {m.block_size} tokens"


# ---- memory


def kept_per_token(m, n):
    """Bytes that autograd keeps for one token, a number for each block; n: bytes of the dtype that
    matrices read. With autocast (n = 2) residuals, norms and routers stay float32."""
    wide = 2 if m.activation == "swiglu" else 1  # rows of w_in for a neuron
    attention = (8 + 2 * n) * m.d_model + 4 * n * m.n_head * m.head_dim  # residuals; q, k, v, out
    dense = attention + 2 * n * wide * m.d_ff  # before the activation, and after it
    if m.flavour == "dense":
        return [dense] * m.n_layer
    router = attention + (4 * m.d_model if n == 2 else 0)  # it reads float32
    if m.top_k:  # the backward pass runs the activation again
        experts = router + 16 * m.n_experts + n * wide * m.top_k * m.d_expert
        experts += 2 * n * wide * m.n_shared_experts * m.d_expert
    elif m.infmoe_depth == 1 and m.infmoe_mask == "post":
        experts = router + 12 * m.infmoe_samples * m.infmoe_dz + n * wide * m.d_expert
    else:  # whole masks, in torch
        experts = router + 9 * m.infmoe_samples * m.d_expert * m.infmoe_depth
    return [experts if i in m.moe_layers() else dense for i in range(m.n_layer)]


def count(modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def sizes(model):
    """Parameters of the model; of its experts; of those in pools."""
    banks = {bank for _, bank in model.expert_layers()}
    return count([model]), count(banks), count(model.pools)


def memory_per_rank(model, c, n_ranks):
    """Bytes by use at the peak of a step, for a model on the meta device. Weights, gradients and
    AdamW's two moments are float32. lab/memory.py traces the same on the real code."""
    if c.shard == "ep":
        experts_over_ranks.check(model.config, n_ranks)
    m, n, sharded = model.config, 4 if c.dtype == "float32" else 2, c.shard in ("fsdp", "ep")
    total, banks, pools = sizes(model)
    root = total - pools - count(model.blocks)  # embeddings, the head
    part, tokens = total / n_ranks if sharded else total, c.micro_batch * m.block_size
    memory = {"weights": 4 * part, "gradients": 4 * part, "AdamW": 8 * part}
    if c.shard == "zero1":
        memory["AdamW"] /= n_ranks
    layers = len(m.moe_layers())
    stay = 0 if c.shard == "fsdp" else banks  # experts' weights to be cast
    if c.shard == "ep":
        stay, pools = banks / n_ranks, pools / n_ranks
    if sharded:  # what is fetched stays for a while, and gradients are whole between exchanges
        fetched = total - banks if c.shard == "ep" else total
        memory["gradients"] += 4 * fetched * (c.batch_tokens > tokens * n_ranks)
        memory["fetched"] = 4 * root + (n * pools if c.shard == "fsdp" else 0)
    memory["bf16 weights"] = 2 * (total - banks - lookup_table(m) + stay) if n == 2 else 0
    blocks = kept_per_token(m, n)
    if c.shard == "ep":  # rows as they were sent, and as they arrived
        blocks = [b + n * (2 * m.top_k - 1) * m.d_model for b in blocks]
    factors = 0  # of the product that is an expert's gradient: x, dy, act, dh
    if m.top_k:
        wide = 3 if m.activation == "swiglu" else 2
        factors = n * (2 * m.d_model + m.top_k * wide * m.d_expert)
    loss = max(12 * m.vocab_size, factors)  # log-probabilities, and two gradients of logits
    kept = sum(blocks) + loss
    if c.recompute:  # a block's input, and one block or the loss
        kept = 4 * m.d_model * m.n_layer + max(*blocks, loss)
    memory["activations"] = tokens * kept
    if m.top_k and pools:  # their gradients, and both factors of the product twice
        late = (n if c.shard == "fsdp" else 4) * pools + 2 * tokens * layers * factors
        early = memory["activations"] + memory["bf16 weights"]  # gone by then
        memory["pool gradient"] = max(0, late - early)
    memory["others"] = sum(b.nbytes for b in model.buffers()) + 16 * c.batch_tokens / m.block_size
    return memory


def in_gigabytes(memory):
    return ", ".join(f"{use} {size / 1e9:.2f}" for use, size in memory.items() if size > 5e6)


def free_memory(device):
    """-> (bytes that this process may still take, who says so)"""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], "free on the GPU"
    found, share = [(math.inf, "free")], int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        found.append((limit - used, "left of the limit on address space (ulimit -v)"))
    for path, word in (("/proc/meminfo", "MemAvailable:"), ("/sys/fs/cgroup/memory.max", "")):
        try:
            words = Path(path).read_text().split()
            size = 1024 * int(words[words.index(word) + 1]) if word else int(words[0])
            found.append((size / share, "free on this machine"))
        except (OSError, ValueError):  # another system, or "max"
            continue
    return min(found)


def choose_micro_batch(model, c, n_ranks, device, held=0):
    """-> (micro_batch, "") as configured, or on a single rank the largest that fits and why.

    The step stays what it is, in more micro-steps. ValueError, in one line with what would fit,
    where nothing does. An estimate that is a third too high stops nobody. held: bytes of a
    checkpoint in memory that the run takes over.
    """
    memory, (free, where) = memory_per_rank(model, c, n_ranks), free_memory(device)
    free, need, kept = free + held, sum(memory.values()), memory["activations"]
    if need - 0.3 * kept <= free:
        return c.micro_batch, ""
    micro, at_hand = fitting(c, memory, free), f"{free / 1e9:,.1f} GB are {where}"
    if n_ranks == 1 and micro and c.batch_tokens % (micro * model.config.block_size) == 0:
        return micro, (f"micro_batch {c.micro_batch} would take about {need / 1e9:,.1f} GB, and "
                       f"{at_hand}: {micro} instead, in more micro-steps; batch_tokens stays")
    advice = "fewer or smaller layers (or a smaller batch_tokens) would"
    if micro:
        advice = f"--micro_batch={micro} would fit"
    elif not c.recompute and need - kept < free:
        advice = f"--recompute takes less, {advice}"
    raise ValueError(f"this run needs about {need / 1e9:,.1f} GB ({in_gigabytes(memory)}), and "
                     f"{at_hand}: {advice}; {twin(model.config)} is a small twin")


def fitting(c, memory, free):
    """The largest power of two for micro_batch that fits in `free` bytes, a tenth of which is left
    to others; 0: none."""
    per_sequence = memory["activations"] / c.micro_batch
    fixed = sum(size for use, size in memory.items() if use != "activations")
    room = int((0.9 * free - fixed) // per_sequence)
    return 2 ** int(math.log2(room)) if room >= 1 else 0


def twin(m):
    """The config file of the same idea that takes minutes on a CPU."""
    return f"config/tiny_{m.flavour if m.flavour in ('dense', 'infmoe', 'unipool') else 'moe'}.py"


def long_run(m, c, n_ranks, device, steps):
    """A sentence about a run of more than a day; "" for shorter ones, and for unknown hardware."""
    peak = cpu_flops() if device.type == "cpu" else peak_flops(device)
    seconds = flops_per_token(m) * steps * c.batch_tokens / (REACHED * n_ranks * (peak or math.inf))
    if seconds < 86400:
        return ""
    return (f"about {seconds / 86400:,.0f} days here (--plan says how that is counted); "
            f"{twin(m)} is a small twin, minutes on a CPU. It starts; Ctrl-C saves")


# ---- the plan


def pool_traffic(model, c, n_ranks):
    """Bytes that a micro-step moves through a GPU's memory because layers share pools: each layer
    reads all experts in bf16, forward, backward and where blocks run again; then the gradient and
    AdamW."""
    pools = count(model.pools) if model.config.top_k else 0
    layers = len(model.config.moe_layers()) / max(1, len(model.pools))
    steps = accumulation_steps(c, model.config.block_size, n_ranks)
    gradients = 12 if c.shard == "fsdp" else 18  # one is written (in fsdp in bf16), read and added
    own = n_ranks if c.shard == "ep" else 1
    reads = 6 if c.recompute else 4
    return pools / own * (reads * layers + gradients + 28 / steps)


def link_traffic(model, c, n_ranks):
    """Bytes that a rank sends to others in a micro-step: a collective's bytes times (R - 1) / R."""
    m, steps = model.config, accumulation_steps(c, model.config.block_size, n_ranks)
    total, banks, pools = sizes(model)
    others = total - banks
    sent = 8 * total / steps  # gradients all-reduced, or scattered and weights gathered
    if c.shard == "fsdp":  # weights forward and backward; pools once
        sent = 8 * others + 4 * (banks - pools) + 2 * pools + 4 * total / steps
    if c.shard == "ep":  # rows there and back, forward and backward
        rows = c.micro_batch * m.block_size * m.top_k * len(m.moe_layers())
        sent = 8 * others + 4 * others / steps + rows * m.d_model * 2 * (6 if c.recompute else 4)
    return sent * (n_ranks - 1) / n_ranks


def seconds_moving(model, c, n_ranks):
    """What a micro-step's traffic takes on H100s, at 400 GB/s from a rank to the others."""
    pools, links = pool_traffic(model, c, n_ranks), link_traffic(model, c, n_ranks)
    return pools / BANDWIDTH["H100"] + links / 400e9


def cheapest(model, c, n_ranks, room):
    """The options that fit `room` bytes and move the least, recompute and smaller micro-batches
    where nothing else fits -> text"""
    ways = ["none"]
    if n_ranks > 1:
        ways += ["zero1", "fsdp"]
        with contextlib.suppress(ValueError):
            experts_over_ranks.check(model.config, n_ranks)
            ways.append("ep")
    micro = c.micro_batch
    while micro:
        for again in (False, True):
            tries = [replace(c, shard=shard, micro_batch=micro, recompute=again) for shard in ways]
            fit = [t for t in tries if sum(memory_per_rank(model, t, n_ranks).values()) <= room]
            if fit:
                best = min(fit, key=lambda t: seconds_moving(model, t, n_ranks))
                smaller = f" --micro_batch={micro}" if micro < c.micro_batch else ""
                return f"--shard={best.shard}" + " --recompute" * again + smaller
        micro //= 2
    return "none: more GPUs"


def plan(model, c, device):
    """What a run would take, without running it -> text. model: on the meta device."""
    m, n = model.config, int(c.plan) if c.plan is not True else int(os.environ.get("WORLD_SIZE", 1))
    flops, tokens = flops_per_token(m), c.max_steps * c.batch_tokens
    try:
        windows = ShardReader(c.dataset, "train", m.block_size).n_windows
        epoch = f"{windows * m.block_size / c.batch_tokens:,.1f} steps, all of {c.dataset}"
    except (OSError, ValueError) as error:
        epoch = f"unknown: {error}"
    memory, (free, where) = memory_per_rank(model, c, n), free_memory(device)
    gpu, peak, room = "H100 (none here)", PEAK_FLOPS["H100"], 80e9
    speed = peak_flops(device, BANDWIDTH) or BANDWIDTH["H100"]
    if device.type == "cuda":
        gpu, peak, room = torch.cuda.get_device_name(device), peak_flops(device) or peak, free
    elif c.plan is True and n == 1:
        gpu, peak, room = f"this CPU ({torch.get_num_threads()} threads)", cpu_flops(), free
        speed = math.inf
    pools, links = pool_traffic(model, c, n), link_traffic(model, c, n)
    moved = tokens / (c.micro_batch * m.block_size * n) * pools / speed
    seconds = flops * tokens / (REACHED * peak * n) * (4 / 3 if c.recompute else 1)
    return table(
        model=f"{m.arch} {m.flavour}, {m.n_layer} layers, width {m.d_model}",
        weights=f"{amount(m.n_params())} stored, {amount(m.n_active_params())} active",
        step=step_sizes(m, c, n),
        run=f"{c.max_steps} steps, {amount(tokens)} tokens",
        epoch=epoch,
        memory=f"{sum(memory.values()) / 1e9:.2f} GB a rank with shard={c.shard}, "
               f"recompute={c.recompute}: {in_gigabytes(memory)}; {free / 1e9:.1f} GB are {where}",
        fits=f"{room / 1e9:.0f} GB a rank, moving the least: "
             f"{cheapest(model, c, n, 0.95 * room)}",
        traffic=f"{links / 1e9:.2f} GB a micro-step from a rank to others; pools move "
                f"{pools / 1e9:.1f} GB through its memory",
        compute=f"{amount(flops)} FLOPs per token (6 N + 12 L D S), {flops * tokens:.2e} in all",
        time=f"{span(seconds + moved)} on {n} x {gpu}, if they reach {REACHED:.0%} of "
             f"{peak / 1e12:.3g} TFLOP/s".replace("%", " %")
             + (f", {span(moved)} of it for the pools' traffic" if moved else ""))
