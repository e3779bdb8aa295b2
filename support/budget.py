"""What a run will cost: parameters, FLOPs, memory, time; and whether it fits this machine."""

import math
import os
import resource
import time
from pathlib import Path

import torch

from support.shards import ShardReader

PEAK_FLOPS = {  # dense bf16 FLOP/s by the makers' data sheets; the first name that fits counts
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "H800": 989e12,
    "H20": 148e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12, "A6000": 155e12, "A40": 150e12,
    "A10": 125e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12, "3090": 71e12, "MI300X": 1307e12}
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
    """Of a training step, forward and backward: 6 N_active + 12 L D S."""
    c = model_config
    return 6 * c.n_active_params() + 12 * c.n_layer * c.n_head * c.head_dim * c.block_size


def peak_flops(device):
    """Dense bf16 FLOP/s of the GPU at hand; None where it is not in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


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


def memory_per_rank(model, c, n_ranks):
    """Bytes by use, for a model on the meta device. Weights, gradients and AdamW's two moments are
    float32; activations are an estimate."""
    m = model.config
    sizes = [p.numel() for p in model.parameters()]
    total = sum(sizes)
    blocks = [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    # With autocast the residual stream stays float32: bytes of it, and of what matrices see.
    wide, narrow = (4, 4) if c.dtype == "float32" else (3, 2)
    gpt2 = m.arch == "gpt2"
    ffn = (2 if m.activation == "gelu" else 4) * (m.d_expert or m.d_ff) + 2 * m.d_model
    if m.top_k:  # their backward runs the activation again
        ffn //= 2
    chosen = (m.top_k or 1) + (m.n_shared_experts or 0)
    block = wide * (8 if gpt2 else 12) * m.d_model + narrow * chosen * ffn  # bytes per token
    block += 16 * (m.infmoe_samples or 0) * (m.infmoe_dz or 0)  # noise, codes, and their gradients
    kept = block + 4 * m.d_model * m.n_layer if c.recompute else block * m.n_layer
    kept += m.vocab_size * (narrow + 8)  # logits, their float32 copy, its gradient
    part = total / n_ranks if c.shard == "fsdp" else total
    memory = {"weights": 4 * part, "gradients": 4 * part, "AdamW": 8 * part,
              "activations": c.micro_batch * m.block_size * kept}
    if c.shard == "zero1":  # whole tensors are dealt out
        memory["AdamW"] = 8 * max(total / n_ranks, max(sizes))
    if c.shard == "fsdp":  # pools and embeddings stay, blocks come and go by twos, in bf16, with
        memory["gathered"] = 8 * (total - sum(blocks) + 2 * max(blocks))  # bf16 gradients, a buffer
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


def check_memory(model, c, n_ranks, device, held=0):
    """ValueError, in one line with what would fit, where a run cannot fit the memory at hand.

    held: bytes of a checkpoint in memory that the run takes over. An estimate that is a third too
    high stops nobody.
    """
    memory, (free, where) = memory_per_rank(model, c, n_ranks), free_memory(device)
    free += held
    fixed = sum(size for use, size in memory.items() if use != "activations")
    if fixed + 0.7 * memory["activations"] <= free:
        return
    advice = "fewer or smaller layers (or a smaller batch_tokens) would"
    micro = fitting(c, memory, free)
    if micro:
        advice = f"--micro_batch={micro} would fit"
    elif not c.recompute and fixed < free:
        advice = f"--recompute takes less, {advice}"
    advice += f"; {twin(model.config)} is a small twin"
    raise ValueError(f"this run needs about {sum(memory.values()) / 1e9:,.1f} GB "
                     f"({in_gigabytes(memory)}), and {free / 1e9:,.1f} GB are {where}: {advice}")


def fitting(c, memory, free):
    """The largest power of two for micro_batch that fits in `free` bytes, a tenth of which is left
    to others; 0: none."""
    per_sequence = memory["activations"] / c.micro_batch
    fixed = sum(size for use, size in memory.items() if use != "activations")
    room = int((0.9 * free - fixed) // per_sequence)
    return 2 ** int(math.log2(room)) if room >= 1 else 0


def choose_micro_batch(model, c, n_ranks, device, held=0):
    """-> (micro_batch, "") as configured, or on a single rank the largest that fits and why.

    The step stays what it is, in more micro-steps. ValueError where nothing fits.
    """
    try:
        check_memory(model, c, n_ranks, device, held)
        return c.micro_batch, ""
    except ValueError:
        memory, (free, where) = memory_per_rank(model, c, n_ranks), free_memory(device)
        micro = fitting(c, memory, free + held)
        if n_ranks > 1 or not micro or c.batch_tokens % (micro * model.config.block_size):
            raise
        need = sum(memory.values())
        return micro, (f"micro_batch {c.micro_batch} would take about {need / 1e9:,.1f} GB, and "
                       f"{(free + held) / 1e9:,.1f} GB are {where}: {micro} instead, in more "
                       "micro-steps; batch_tokens stays")


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
    gpu, peak = "H100 (none here)", peak_flops(device) or PEAK_FLOPS["H100"]
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
    elif n == 1:
        gpu, peak = f"this CPU ({torch.get_num_threads()} threads)", cpu_flops()
    return table(
        model=f"{m.arch} {m.flavour}, {m.n_layer} layers, width {m.d_model}",
        weights=f"{amount(m.n_params())} stored, {amount(m.n_active_params())} active",
        step=step_sizes(m, c, n),
        run=f"{c.max_steps} steps, {amount(tokens)} tokens",
        epoch=epoch,
        memory=f"{sum(memory.values()) / 1e9:.2f} GB a rank with shard={c.shard}, "
               f"recompute={c.recompute}: {in_gigabytes(memory)}; {free / 1e9:.1f} GB are {where}",
        compute=f"{amount(flops)} FLOPs per token (6 N_active + 12 L D S), "
                f"{flops * tokens:.2e} in all",
        time=f"{span(flops * tokens / (REACHED * peak * n))} on {n} x {gpu}, "
             f"if they reach {REACHED:.0%} of {peak / 1e12:.3g} TFLOP/s".replace("%", " %"))
