"""Train a language model, dense or mixture of experts, on a folder of token shards: one loop, from one CPU to many nodes.

    python train.py                                        # a small dense GPT on data/stdlib: minutes on a CPU
    python train.py config/tiny_moe.py --lr=5e-4           # a config file, and what differs from it
    python train.py --init_from=resume --out_dir=out/x     # go on where a run stopped: the same curve, bit for bit on a CPU
    python train.py config/unipool_978m.py --plan=8        # parameters, memory, FLOPs and time on 8 GPUs; trains nothing
    torchrun --standalone --nproc_per_node=8 train.py config/unipool_182m.py
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py config/unipool_978m.py \\
        --shard=fsdp --recompute                           # the same line on every node; out_dir on a disk they share

out_dir receives ckpt.pt, config.json, log.csv and loss.png. Ctrl-C or SIGTERM saves and leaves (exit code 130 or 143).
Data, noise and dropout are pure functions of (seed, step), so model, optimizer and step are all that a checkpoint needs.
"""

import contextlib
import csv
import functools
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from configurator import fail, parse
from model import GPT, ModelConfig
from support import checkpoint
from support.checkpoint import gather_state, load_optimizer, lock, write_atomically
from support.machine import (
    accumulation_steps,
    flops_per_token,
    join_ranks,
    keep_memory,
    peak_flops,
    pick_compile,
    pick_dtype,
    shard_model,
    stop_signals,
)
from support.report import NOT_KEPT, amount, describe, draw_loss, open_trackers, plan, span, summary
from support.shards import ShardReader, load_meta


@dataclass
class TrainConfig:
    dataset: str = "data/stdlib"  # folder of token shards, made by prepare_data.py
    out_dir: str = "out/run"  # receives ckpt.pt, config.json, log.csv, loss.png
    init_from: str = "scratch"  # scratch | resume | a folder with a checkpoint | gpt2 | hf:NAME_OR_DIR
    overwrite: bool = False  # start anew although out_dir holds a checkpoint
    plan: bool | int = False  # print parameters, memory, FLOPs and time (--plan=8: on 8 ranks), and leave
    max_steps: int = 300  # optimizer steps of the whole run
    batch_tokens: int = 4096  # tokens of one step, over all ranks; gradient accumulation follows from it
    micro_batch: int = 16  # sequences per rank in one forward pass
    lr: float = 1e-3  # peak learning rate (AdamW)
    min_lr: float | None = None  # end of the cosine; None: lr / 10
    warmup_steps: int = 20  # linear warm-up
    weight_decay: float = 0.1  # on matrices, stacked experts and embeddings; not on norms, biases and scales
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    eval_every: int = 50  # steps between validations; 0: only at the end
    eval_tokens: int = 32768  # tokens of a validation, always the same ones
    save_every: int = 50  # steps between checkpoints; 0: only at the end
    log_every: int = 1  # steps between rows of log.csv
    seed: int = 1  # of weights, data order, noise and dropout
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; weights stay float32
    compile: Literal["auto", "true", "false"] = "auto"  # torch.compile
    recompute: bool = False  # run each block again in the backward pass: less memory, a third more time
    shard: Literal["none", "zero1", "fsdp"] = "none"  # spread over ranks: nothing | optimizer | optimizer, gradients, weights
    timeout: int = 600  # seconds that ranks wait for one another before they call one lost
    tensorboard: bool = False  # event files in out_dir as well
    wandb: str = ""  # Weights & Biases project to log to as well
    quiet: bool = False  # print nothing but errors

    def __post_init__(self):
        for name in ("max_steps", "batch_tokens", "micro_batch", "eval_tokens", "log_every", "timeout"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("lr", "warmup_steps", "weight_decay", "grad_clip", "eval_every", "save_every", "seed", "plan"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.min_lr is not None and not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr={self.min_lr} must lie between 0 and lr={self.lr}: change it or leave it out")
        if self.shard == "fsdp" and (self.dtype == "float16" or self.compile == "true"):
            raise ValueError("shard=fsdp needs dtype=bfloat16 or float32, and compile=false: its hooks break the graph")


# ---- one run: data, model, optimizer

def lr_at(config, step):
    """Linear warm-up, then a cosine from lr to min_lr."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    low = config.lr / 10 if config.min_lr is None else config.min_lr
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return low + (config.lr - low) * (1 + math.cos(math.pi * min(1, progress))) / 2


class Run:
    """Everything that one training run holds."""

    def __init__(self, model_config, config, start, ranks):
        self.model_config, self.config, self.ranks = model_config, config, ranks
        self.accumulation = accumulation_steps(config, model_config.block_size, ranks.size)
        shape = dict(block_size=model_config.block_size, vocab_size=model_config.vocab_size, seed=config.seed)
        self.train_data, self.val_data = (ShardReader(config.dataset, split, **shape) for split in ("train", "val"))
        self.tokenizer = load_meta(config.dataset)["tokenizer"]
        self.n_params, self.n_active = model_config.n_params(), model_config.n_active_params()
        self.compiled, self.compile_reason = pick_compile(config, ranks.device, self.n_active)
        self.dtype, self.dtype_reason = pick_dtype(config, ranks.device, self.compiled)
        self.model = make_model(self, start)
        self.forward = torch.compile(self.model, fullgraph=True, dynamic=False) if self.compiled else self.model
        self.ddp = None
        if ranks.size > 1 and config.shard != "fsdp":
            self.ddp = DistributedDataParallel(self.forward, gradient_as_bucket_view=True)
        self.optimizer = make_optimizer(self)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.dtype == torch.float16)
        self.saved = None  # step of the checkpoint in out_dir
        if config.init_from == "resume":
            load_optimizer(self.optimizer, start["optimizer"])
            self.scaler.load_state_dict(start["scaler"])
            self.saved = start["step"]

    def autocast(self):
        return torch.autocast(self.ranks.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def batch(self, windows):
        """windows (B, S+1) -> tokens, targets (B, S) on the device; the copy overlaps with what a GPU is doing."""
        windows = torch.from_numpy(windows)
        if self.ranks.device.type == "cuda":
            windows = windows.pin_memory()
        windows = windows.to(self.ranks.device, non_blocking=True)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    @contextlib.contextmanager
    def micro_step(self, last):
        """Around a forward and backward pass: only the last of an optimizer step exchanges gradients."""
        if self.config.shard == "fsdp":
            self.model.set_requires_gradient_sync(last)
        with contextlib.nullcontext() if self.ddp is None or last else self.ddp.no_sync():
            yield
        if self.config.shard == "fsdp":
            for pool in self.model.pools:
                pool.reshard()

    def last_checkpoint(self):
        path = Path(self.config.out_dir, "ckpt.pt")
        return f"the last good checkpoint is {path} (step {self.saved})" if self.saved else "no checkpoint had been saved"


def make_model(run, start):
    torch.manual_seed(run.config.seed)
    model = GPT(run.model_config)
    if start is not None:
        load_weights(model, start["model"], run.config.init_from)
    model.recompute = run.config.recompute
    if run.config.shard == "fsdp":
        shard_model(model, run.ranks, run.dtype)
    return model.to(run.ranks.device)


def load_weights(model, weights, source):
    """Buffers may be missing (a fine-tuning run may turn on a loss that keeps one), parameters may not."""
    try:
        missing, unknown = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # a shape: the line after the title names it
        raise ValueError(f"init_from={source}: {str(error).splitlines()[1].strip()}") from None
    missing = set(missing) & {name for name, _ in model.named_parameters()}
    if missing or unknown:
        raise ValueError(f"init_from={source} holds another model: {len(missing)} of the weights here are missing there and "
                         f"{len(unknown)} of those there are unknown here, among them {sorted([*missing, *unknown])[0]}")


def make_optimizer(run):
    """AdamW, fused; weight decay on everything that multiplies, not on norms, biases and scales."""
    c, (decayed, plain) = run.config, checkpoint.parameter_groups(run.model)
    groups = [{"params": decayed, "weight_decay": c.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    options = dict(lr=c.lr, betas=(c.beta1, c.beta2), fused=run.ranks.device.type in ("cpu", "cuda"))
    if c.shard == "zero1":
        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **options)
    return torch.optim.AdamW(groups, **options)


# ---- one step, one validation

def train_step(run, step):
    """One optimizer step -> loss, auxiliary loss, gradient norm and routing statistics, over all ranks and micro-steps.

    Micro-step a takes, on rank r of R, the windows [(aR+r)B, (aR+r+1)B) of the step's list: what a step sees does not
    depend on R. The same slice of the step's random keys fixes the noise of each sequence.
    """
    c, ranks, stats = run.config, run.ranks, {}
    windows = c.batch_tokens // run.model_config.block_size  # of the step
    keys = np.random.Philox(np.random.SeedSequence((c.seed, step))).random_raw(windows) >> 1  # alike in every numpy
    losses = torch.zeros(2, device=ranks.device)
    for a in range(run.accumulation):
        first = (a * ranks.size + ranks.rank) * c.micro_batch
        tokens, targets = run.batch(run.train_data.batch(step * windows + first, c.micro_batch))
        noise_key = torch.from_numpy(keys[first:first + c.micro_batch].astype(np.int64)).to(ranks.device)
        torch.manual_seed(int(keys[first]))  # dropout
        with run.micro_step(last=a == run.accumulation - 1):
            with run.autocast():
                out = (run.ddp or run.forward)(tokens, targets, noise_key=noise_key)
            aux = sum(out.aux.values(), start=torch.zeros_like(out.loss))
            run.scaler.scale((out.loss + aux) / run.accumulation).backward()
        losses += torch.stack((out.loss, aux)).detach()
        stats = {name: value.detach() + stats.get(name, 0) for name, value in out.stats.items()}
    norm = update(run, lr_at(c, step))
    if ranks.size > 1:
        for value in stats.values():
            dist.all_reduce(value)
    run.model.update_balance(stats)
    loss, aux = (total / run.accumulation / ranks.size for total in ranks.sum(*losses.tolist()))
    return loss, aux, norm, stats


def update(run, lr):
    """Clip, step, forget the gradients -> gradient norm before clipping."""
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.config.grad_clip or math.inf)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


@torch.no_grad()
def validate(run):
    """Mean cross-entropy in nats per token over the first eval_tokens of the validation split, shared out over the ranks.

    All ranks run the same number of batches of one shape (fsdp gathers weights in each, compile wants one shape): the
    rows beyond the slice have targets that count for nothing.
    """
    c, ranks, size = run.config, run.ranks, run.model_config.block_size
    n, total = min(max(1, c.eval_tokens // size), run.val_data.n_windows), 0.0
    run.model.eval()
    for first in range(ranks.rank * c.micro_batch, ranks.rank * c.micro_batch + n, c.micro_batch * ranks.size):
        real = min(max(0, n - first), c.micro_batch)
        windows = np.zeros((c.micro_batch, size + 1), dtype=np.int64)
        if real:
            windows[:real] = run.val_data.sequential(first, real)
        tokens, targets = run.batch(windows)
        targets[real:] = -100
        with run.autocast():
            loss = run.forward(tokens, targets).loss
        total += loss.item() * real if real else 0.0
    run.model.train()
    return ranks.sum(total)[0] / n


# ---- what a run leaves on disk

def save(run, step, seconds, val_loss):
    """out_dir/ckpt.pt, the same on any number of ranks: all gather, rank 0 writes, all hear how it went."""
    c, problem = run.config, None
    model, optimizer = gather_state(run.model, run.optimizer, run.ranks)
    if run.ranks.rank == 0:
        state = {"step": step, "seconds": seconds, "val_loss": val_loss, "model": model, "optimizer": optimizer,
                 "scaler": run.scaler.state_dict(), "tokenizer": run.tokenizer, "model_config": asdict(run.model_config),
                 "train_config": asdict(c)}
        try:
            write_atomically(Path(c.out_dir, "ckpt.pt"), lambda f: torch.save(state, f))
        except (OSError, RuntimeError) as error:  # torch hides a full disk in a RuntimeError
            problem = str(error).splitlines()[0]
    if run.ranks.sum(problem is not None)[0]:
        raise OSError(f"could not save step {step} to {c.out_dir}: {problem or 'see rank 0'}; {run.last_checkpoint()}")
    run.saved = step


def open_folder(model_config, config, step):
    """Make out_dir ready for the steps after `step`: nothing of an older run may be taken for this one's. -> settings"""
    folder, settings = Path(config.out_dir), {"model": asdict(model_config), "train": asdict(config)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.json", lambda f: f.write(json.dumps(settings, indent=1).encode()))
        if config.init_from == "resume":
            trim_log(folder / "log.csv", step)
        else:
            for name in ("ckpt.pt", "log.csv", "loss.png"):
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise OSError(f"out_dir={folder} cannot be written: {error.strerror or error}") from error
    return settings


def trim_log(path, step):
    """Drop the rows after `step`, and a last line that a crash cut short."""
    if path.exists():
        lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        lines = lines[:1] + [line for line in lines[1:] if int(line.split(b",")[0]) <= step]
        write_atomically(path, lambda f: f.writelines(lines))


def log_row(path, row):
    """Append to log.csv, opened and closed each time: a row is there whatever comes next."""
    try:
        with open(path, "a", newline="") as f:
            writer = csv.DictWriter(f, row)
            if f.tell() == 0:
                writer.writeheader()
            writer.writerow({k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()})
    except OSError as error:
        raise OSError(f"step {row['step']} cannot be written to {path}: {error.strerror}") from error


# ---- the loop

def load_start(config):
    """What a run starts from: None, or a dictionary like a checkpoint's."""
    if config.init_from == "scratch":
        return None
    if config.init_from == "gpt2" or config.init_from.startswith("hf:"):
        model = GPT.from_hf(config.init_from.removeprefix("hf:"))
        return {"model": model.state_dict(), "model_config": asdict(model.config)}
    folder = config.out_dir if config.init_from == "resume" else config.init_from
    return checkpoint.load(Path(folder, "ckpt.pt"), ModelConfig, GPT, resume=config.init_from == "resume")


def check_start(model_config, config, start):
    """Refuse to overwrite a checkpoint by accident, and to go on from one of another model or tokenizer."""
    path, meta = Path(config.out_dir, "ckpt.pt"), load_meta(config.dataset)
    if config.init_from != "resume" and path.exists() and not config.overwrite:
        raise ValueError(f"{path} exists: --init_from=resume goes on, --overwrite starts anew, --out_dir=... goes elsewhere")
    if config.init_from == "resume":
        theirs = start["model_config"]
        other = [f"{k} is {theirs.get(k)} there, {v} here" for k, v in asdict(model_config).items() if theirs.get(k) != v]
        if other:
            raise ValueError(f"{path} holds another model: {'; '.join(other)}")
    tokenizer = (start or {}).get("tokenizer", meta["tokenizer"])
    if tokenizer != meta["tokenizer"]:
        raise ValueError(f"init_from={config.init_from} reads {tokenizer} tokens, and {config.dataset} holds {meta['tokenizer']}")
    if model_config.vocab_size < meta["vocab_size"]:
        raise ValueError(f"vocab_size={model_config.vocab_size} is less than the {meta['vocab_size']} of {config.dataset}")


def train(model_config, config, start=None):
    """Train as configured; leave checkpoint, log and picture in config.out_dir.

    start: what load_start returns, where the caller has it already (it is emptied). -> {"step", "finished", "signal",
    "val_loss", ...}: the last row of the log, and how it ended. Raises ValueError for a setting, a shard or a checkpoint that
    does not fit, OSError for a full disk or a lost rank, FloatingPointError for a loss that is not finite.
    """
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_signals())  # before the ranks: torchrun sends SIGTERM while a lost one is looked for
        ranks = stack.enter_context(join_ranks(config))
        keep_memory()
        stack.enter_context(torch.random.fork_rng([ranks.device.index] if ranks.device.type == "cuda" else []))
        say = functools.partial(say_line, ranks.rank == 0 and not config.quiet)
        start = start or load_start(config)
        check_start(model_config, config, start)
        first, before = (start["step"], start["seconds"]) if config.init_from == "resume" else (0, 0.0)
        if first >= config.max_steps:
            say(f"{config.out_dir} is finished: {first} of {config.max_steps} steps; --max_steps=N goes on")
            return {"step": first, "finished": True, "signal": None, "val_loss": start["val_loss"]}
        run = Run(model_config, config, start, ranks)
        if run.compiled:
            stack.callback(torch.compiler.reset)  # the next run in this process compiles its own model
        say(describe(run, start))
        (start or {}).clear()  # a run needs the memory
        trackers = []
        if ranks.rank == 0:
            settings = open_folder(model_config, config, first)
            trackers = [functools.partial(log_row, Path(config.out_dir, "log.csv")), *open_trackers(config, settings, stack)]
        result = loop(run, first, before, stop, trackers, say)
        if not result["finished"]:
            say(f"stopped by {signal.Signals(result['signal']).name} after step {result['step']}, which is saved; to go on: "
                f"python train.py --init_from=resume --out_dir={config.out_dir}")
        elif ranks.rank == 0:
            say(summary(run, result, picture=draw_loss(run)))
        return result


def say_line(aloud, text):
    if aloud:
        tqdm.write(text)  # above the progress bar
        sys.stdout.flush()


def loop(run, first, before, stop, trackers, say):
    """The steps after `first` -> what train returns. before: seconds spent already; stop: signals received."""
    c, ranks, result = run.config, run.ranks, {"n_params": run.n_params, "n_active_params": run.n_active, "val_loss": None}
    began, peak, flops = time.perf_counter() - before, peak_flops(ranks.device), flops_per_token(run.model_config)
    hidden = ranks.rank > 0 or c.quiet or not sys.stderr.isatty()
    bar = tqdm(total=c.max_steps, initial=first, disable=hidden, unit="step", dynamic_ncols=True)
    for step in range(first + 1, c.max_steps + 1):
        tick = time.perf_counter()
        loss, aux, norm, stats = train_step(run, step - 1)
        now = time.perf_counter()
        if not math.isfinite(loss) or not (math.isfinite(norm) or run.scaler.is_enabled()):
            raise FloatingPointError(f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}; {run.last_checkpoint()}")
        row = {"step": step, "tokens": step * c.batch_tokens, "seconds": now - began, "lr": lr_at(c, step - 1),
               "train_loss": loss, "val_loss": validate(run) if due(step, c.eval_every, c) else None, "grad_norm": norm,
               "tokens_per_second": c.batch_tokens / (now - tick)} | ({"aux_loss": aux} if stats else {})
        if trackers and (row["val_loss"] is not None or due(step, c.log_every, c)):
            row |= run.model.routing_columns(stats)
            for tracker in trackers:
                tracker(row)
        speed = f"{amount(row['tokens_per_second'])} tokens/s"
        if peak:
            speed += f", MFU {row['tokens_per_second'] * flops / peak / ranks.size:.1%}"
        bar.update()
        bar.set_postfix_str(f"loss {loss:.3f}, {speed}")
        if row["val_loss"] is not None:
            say(f"step {step:{len(str(c.max_steps))}}/{c.max_steps}  train {loss:.4f}  val {row['val_loss']:.4f}  "
                f"gradient {norm:.2f}  {speed}  {span(row['seconds'])}")
        result |= {k: v for k, v in row.items() if v is not None}
        stopped = ranks.sum(bool(stop))[0] > 0
        if stopped or due(step, c.save_every, c):
            save(run, step, time.perf_counter() - began, result["val_loss"])
        if stopped:
            break
    bar.close()
    finished = step == c.max_steps
    return result | {"finished": finished, "signal": None if finished else stop[0] if stop else signal.SIGTERM}


def due(step, every, config):
    """Is it time for what is done at every n-th step, and always at the last?"""
    return step == config.max_steps or (every > 0 and step % every == 0)


def settings(parsed):
    """The command line -> ModelConfig, TrainConfig, and what load_start found.

    A resumed run keeps the settings it was saved with, a run from other weights their model; what is given comes first.
    """
    config, given, model_fields = parsed.make(TrainConfig), dict(parsed.given), {f.name for f in fields(ModelConfig)}
    start = load_start(config)
    if start is None:
        with contextlib.suppress(FileNotFoundError) if config.plan else contextlib.nullcontext():
            parsed.given.setdefault("vocab_size", load_meta(config.dataset)["vocab_size"])
        return parsed.make(ModelConfig), config, None
    model_config = ModelConfig(**(start["model_config"] | {k: v for k, v in given.items() if k in model_fields}))
    if config.init_from == "resume":
        kept = {k: v for k, v in start["train_config"].items() if k not in NOT_KEPT}
        config = TrainConfig(**(kept | {k: v for k, v in given.items() if k not in model_fields}))
    return model_config, config, start


def main():
    parsed = parse(ModelConfig, TrainConfig, words=("config",), doc=__doc__)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        model_config, config, start = settings(parsed)
        if config.plan:
            if rank == 0:
                print(plan(model_config, config))
            return
        result = train(model_config, config, start)
    except torch.OutOfMemoryError as error:
        problem = f"out of memory; lower --micro_batch, or try --recompute (--plan estimates): {str(error).splitlines()[0]}"
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, FloatingPointError) as error:
        problem = error
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        problem = f"torch.compile failed, --compile=false does without: {str(error).splitlines()[0]}"
    else:
        sys.exit(0 if result["finished"] else 128 + result["signal"])
    fail(f"rank {rank}: {problem}" if size > 1 else problem)


if __name__ == "__main__":
    main()
