"""What a training run says: its first and last screen, its plan, its picture, and trackers beside log.csv."""

import csv
import importlib.util
import math
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import kernels
from model import GPT
from support.machine import PEAK_FLOPS, accumulation_steps, flops_per_token, peak_flops, pick_device
from support.shards import ShardReader

NOT_KEPT = ("out_dir", "init_from", "overwrite", "plan", "quiet")  # settings that a resumed run does not inherit


def amount(n):
    """1234567 -> 1.23M"""
    size, unit = next(((s, u) for s, u in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")) if abs(n) >= s), (1, ""))
    return f"{n / size:.3g}{unit}"


def span(seconds):
    """4000 -> 67 min"""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def table(**rows):
    return "\n".join(f"{name:9}{text}" for name, text in rows.items())


def step_sizes(m, c, n_ranks):
    counts = {"micro-step": accumulation_steps(c, m.block_size, n_ranks), "rank": n_ranks, "sequence": c.micro_batch}
    product = " x ".join(f"{n} {noun}{'s' * (n != 1)}" for noun, n in counts.items())
    return f"{c.batch_tokens} tokens = {product} x {m.block_size} tokens"


def describe(run, start):
    """The first lines of a run: what trains, on what, how, and why so."""
    m, c, ranks = run.model_config, run.config, run.ranks
    experts = f", {m.n_experts} experts, {m.top_k} per token" if m.n_experts else ""
    epoch = run.train_data.n_windows * m.block_size / c.batch_tokens
    machine = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    rows = dict(
        model=f"{m.arch} {m.flavour}, {m.n_layer} layers, width {m.d_model}{experts}: {amount(run.n_params)} parameters, "
              f"{amount(run.n_active)} active",
        data=f"{c.dataset}: {amount(run.train_data.n_tokens)} tokens ({run.tokenizer}), {epoch:,.1f} steps an epoch; "
             f"{amount(run.val_data.n_tokens)} for validation",
        step=step_sizes(m, c, ranks.size),
        device=f"{ranks.device.type} ({machine}), shard={c.shard}",
        dtype=f"{str(run.dtype)[6:]} ({run.dtype_reason})",
        compile=f"{'yes' if run.compiled else 'no'} ({run.compile_reason})")
    if m.flavour != "dense":
        backend, reason = kernels.choose_backend(torch.empty(0, dtype=run.dtype, device=ranks.device))
        backend = "torch" if m.flavour == "infmoe" and backend == "grouped" else backend  # it has one FFN, nothing to group
        rows["experts"] = f"{backend} ({reason})" if m.backend == "auto" else f"{m.backend} (as asked)"
    if c.init_from == "resume":
        before = {k: start["train_config"].get(k, v) for k, v in asdict(c).items() if k not in NOT_KEPT}
        changes = [f"{k} was {v}, is {getattr(c, k)}" for k, v in before.items() if v != getattr(c, k)]
        rows["start"] = "; ".join([f"after step {start['step']}", *changes])
    elif c.init_from != "scratch":
        rows["start"] = c.init_from
    return table(**rows)


def summary(run, result, picture):
    """The last screen of a finished run."""
    out, loss = run.config.out_dir, result["val_loss"]
    unit = f"nats per byte ({loss / math.log(2):.3f} bits)" if run.tokenizer == "bytes" else "nats per token"
    gpu = torch.cuda.max_memory_allocated(run.ranks.device) if run.ranks.device.type == "cuda" else 0
    return table(
        finished=f"{result['step']} steps, {amount(result['tokens'])} tokens in {span(result['seconds'])}",
        speed=f"{amount(result['tokens'] / result['seconds'])} tokens/s, validations and checkpoints included"
              + (f"; {gpu / 1e9:.1f} GB of GPU memory at most" if gpu else ""),
        loss=f"validation {loss:.4f} {unit}, training {result['train_loss']:.4f}",
        files=f"{out}/: ckpt.pt, config.json, log.csv{', loss.png' if picture else ''}",
        next=f"python sample.py --out_dir={out}")


def plan(m, c):
    """What a run would take, without running it -> text. m: ModelConfig, c: TrainConfig."""
    n = int(c.plan) if c.plan is not True else int(os.environ.get("WORLD_SIZE", 1))
    flops, tokens, device = flops_per_token(m), c.max_steps * c.batch_tokens, pick_device(c.device)
    gpu, peak = "H100 (none here)", PEAK_FLOPS["H100"]
    if peak_flops(device):
        gpu, peak = torch.cuda.get_device_name(device), peak_flops(device)
    try:
        windows = ShardReader(c.dataset, "train", m.block_size).n_windows
        epoch = f"{windows * m.block_size / c.batch_tokens:,.1f} steps, all of {c.dataset}"
    except (OSError, ValueError) as error:
        epoch = f"unknown: {error}"
    memory = memory_per_rank(m, c, n)
    return table(
        model=f"{m.arch} {m.flavour}, {m.n_layer} layers, width {m.d_model}",
        weights=f"{amount(m.n_params())} stored, {amount(m.n_active_params())} active",
        step=step_sizes(m, c, n),
        run=f"{c.max_steps} steps, {amount(tokens)} tokens",
        epoch=epoch,
        memory=f"{sum(memory.values()) / 1e9:.2f} GB a rank with shard={c.shard}, recompute={c.recompute}: "
               + ", ".join(f"{name} {size / 1e9:.2f}" for name, size in memory.items()),
        compute=f"{amount(flops)} FLOPs per token (6 N_active + 12 L D S), {flops * tokens:.2e} in all",
        time=f"{span(flops * tokens / (0.4 * peak * n))} on {n} x {gpu}, if they reach 40 % of {peak / 1e12:.0f} TFLOP/s")


def memory_per_rank(m, c, n_ranks):
    """Bytes by use. Weights, gradients and AdamW's two moments are float32; activations are an estimate."""
    with torch.device("meta"):
        model = GPT(m)
    sizes = [p.numel() for p in model.parameters()]
    total, blocks = sum(sizes), [sum(p.numel() for p in block.parameters()) for block in model.blocks]
    wide, narrow = (4, 4) if c.dtype == "float32" else (3, 2)  # bytes: with autocast the residual stream stays float32
    chosen, gpt2 = (m.top_k or 1) + (m.n_shared_experts or 0), m.arch == "gpt2"
    ffn = (2 if gpt2 else 4) * (m.d_expert or m.d_ff) + 2 * m.d_model
    if m.top_k:  # their backward runs the activation again
        ffn //= 2
    block = wide * (8 if gpt2 else 12) * m.d_model + narrow * chosen * ffn  # bytes per token
    kept = block + 4 * m.d_model * m.n_layer if c.recompute else block * m.n_layer
    activations = c.micro_batch * m.block_size * (kept + m.vocab_size * (narrow + 8))  # logits, their float32 copy, its gradient
    part = total / n_ranks if c.shard == "fsdp" else total
    memory = {"weights": 4 * part, "gradients": 4 * part, "AdamW": 8 * part, "activations": activations}
    if c.shard == "zero1":  # whole tensors are dealt out
        memory["AdamW"] = 8 * max(total / n_ranks, max(sizes))
    if c.shard == "fsdp":  # pools and embeddings stay, blocks come and go by twos; bf16 weights and gradients, a float32 buffer
        memory["gathered"] = 8 * (total - sum(blocks) + 2 * max(blocks))
    return memory


def draw_loss(run):
    """out_dir/loss.png from log.csv; False where matplotlib is not installed."""
    if not importlib.util.find_spec("matplotlib"):
        return False
    from matplotlib.figure import Figure
    out_dir = Path(run.config.out_dir)
    with open(out_dir / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    tokens, train, val = (np.array([float(row[name] or "nan") for row in rows]) for name in ("tokens", "train_loss", "val_loss"))
    seen, window = ~np.isnan(val), np.ones(1 + len(train) // 50)
    smooth = np.convolve(train, window, "same") / np.convolve(np.ones(len(train)), window, "same")
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(tokens, train, color="#9ecae1", linewidth=0.8, label="training, each step")
    axes.plot(tokens, smooth, color="#2171b5", linewidth=1.8, label="training, smoothed")
    axes.plot(tokens[seen], val[seen], "o-", color="#d94801", markersize=3.5, label=f"validation, {val[seen][-1]:.3f}")
    shown = np.concatenate((smooth[len(smooth) // 30:], val[seen]))  # the first steps would flatten the rest
    title = f"{out_dir.name}: {run.model_config.flavour}, {amount(run.n_params)} parameters, {amount(run.n_active)} active"
    margin = 0.05 * np.ptp(shown) + 1e-3
    axes.set(xlim=(0, tokens[-1] * 1.01), ylim=(shown.min() - margin, shown.max() + 2 * margin), xlabel="tokens",
             ylabel="cross-entropy, nats per token", title=title)
    axes.xaxis.set_major_formatter(lambda x, _: amount(x))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(out_dir / "loss.png")
    return True


def open_trackers(config, settings, stack):
    """tensorboard and wandb, if asked for: functions that take a row of the log; `stack` closes them."""
    def need(module):
        try:
            return importlib.import_module(module)
        except ImportError:
            raise ValueError(f'{module.split(".")[-1]} is not installed: pip install "nanoexperts[log]"') from None

    trackers = []
    if config.tensorboard:
        board = need("torch.utils.tensorboard").SummaryWriter(config.out_dir)
        stack.callback(board.close)
        trackers.append(lambda row: [board.add_scalar(k, v, row["step"]) for k, v in row.items() if v is not None])
    if config.wandb:
        online = need("wandb").init(project=config.wandb, name=Path(config.out_dir).name, dir=config.out_dir, config=settings)
        stack.callback(online.finish)
        trackers.append(lambda row: online.log({k: v for k, v in row.items() if v is not None}, step=row["step"]))
    return trackers
