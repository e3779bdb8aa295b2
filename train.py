"""Train a language model, dense or mixture of experts, on a folder of token shards.

One loop, from one CPU to many nodes:

    python train.py                                     # a small dense GPT on data/stdlib, on a CPU
    python train.py config/tiny_moe.py --lr=5e-4        # a config file, and what differs from it
    python train.py --init_from=resume --out_dir=out/x  # go on, on a CPU bit for bit
    python train.py config/unipool_978m.py --plan=8     # memory, FLOPs, time on 8 GPUs: no training
    torchrun --standalone --nproc_per_node=8 train.py config/unipool_182m.py
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 \\
        train.py config/unipool_978m.py # the same line on every node; out_dir on a disk they share

out_dir receives ckpt.pt, the one before it as ckpt.prev.pt, config.json, log.csv and loss.png.
Ctrl-C or SIGTERM saves and leaves (exit code 130 or 143). Data, noise and dropout are pure
functions of (seed, step), so settings, model, optimizer and step are all that a checkpoint needs.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import contextlib
import functools
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from configurator import parse
from model import GPT, ModelConfig
from support import budget, checkpoint, cpu, experts_over_ranks, files, folder, machine, rules
from support.auxiliary import log_columns
from support.report import (
    CollapseWatch,
    describe,
    draw_loss,
    log_row,
    open_trackers,
    progress,
    summary,
    tell,
)
from support.shards import ShardReader, load_meta
from support.usage import one_line


@dataclass
class TrainConfig:
    dataset: str = "data/stdlib"  # folder of token shards, made by prepare_data.py
    out_dir: str = "out/run"  # receives ckpt.pt, config.json, log.csv, loss.png
    init_from: str = "scratch"  # scratch | resume | a checkpoint's folder | gpt2 | hf:NAME_OR_DIR;
    # a dense model may become one with experts: --flavour=topk (support/upcycle.py)
    upcycle_noise: float = 0.0  # on the copies that experts then start as, in standard deviations
    overwrite: bool = False  # start anew although out_dir holds a checkpoint
    plan: bool | int = False  # print memory, FLOPs and time (--plan=8: on 8 ranks), and leave
    max_steps: int = 300  # optimizer steps of the whole run
    batch_tokens: int = 4096  # tokens of one step, over all ranks; gradient accumulation follows
    micro_batch: int = 16  # sequences per rank in one forward pass
    lr: float = 1e-3  # peak learning rate (AdamW)
    min_lr: float | None = None  # end of the cosine; None: lr / 10
    warmup_steps: int = 20  # linear warm-up
    weight_decay: float = 0.1  # on matrices, experts and embeddings; not on norms and biases
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    eval_every: int = 50  # steps between validations; 0: only at the end
    eval_tokens: int = 32768  # tokens of a validation, always the same ones
    save_every: int = 50  # steps between checkpoints; 0: only at the end
    log_every: int = 1  # steps between rows of log.csv
    seed: int = 1  # of weights, data order, noise and dropout
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products
    compile: Literal["auto", "true", "false"] = "auto"  # torch.compile
    recompute: bool = False  # run blocks again in the backward pass: less memory, a third more time
    shard: Literal["none", "zero1", "fsdp", "ep"] = "none"  # over ranks: nothing | optimizer | all
    # | all, and tokens travel to the experts' ranks rather than experts to the tokens'
    download: Literal["auto", "never"] = "auto"  # make a dataset that is missing, if it is known
    timeout: int = 600  # seconds that ranks wait for one another before they call one lost
    tensorboard: bool = False  # event files in out_dir as well
    wandb: str = ""  # Weights & Biases project to log to as well
    quiet: bool = False  # print nothing but errors

    def __post_init__(self):
        rules.check(rules.training_rules(self))


# ---- one run: data, model, optimizer

def lr_at(config, step):
    """Linear warm-up, then a cosine from lr to min_lr."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    low = config.lr / 10 if config.min_lr is None else config.min_lr
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return low + (config.lr - low) * (1 + math.cos(math.pi * min(1, progress))) / 2


class Trainer:
    """Everything that one training run holds."""

    def __init__(self, model_config, config, start, ranks):
        self.model_config, self.config, self.ranks = model_config, config, ranks
        size = model_config.block_size
        budget.accumulation_steps(config, size, ranks.size)  # a first look: does batch_tokens fit?
        shape = dict(block_size=size, vocab_size=model_config.vocab_size, seed=config.seed)
        self.train_data = ShardReader(config.dataset, "train", **shape)
        self.val_data = ShardReader(config.dataset, "val", **shape)
        self.tokenizer = load_meta(config.dataset)["tokenizer"]
        self.moved = lambda done: None  # called after each micro-step with how many are done
        held = sum(t.nbytes for t in start["model"].values()) if start else 0
        micro, self.memory_note = budget.choose_micro_batch(
            on_meta(model_config), config, ranks.size, ranks.device, 4 * held)
        config = self.config = replace(config, micro_batch=micro)
        self.accumulation = budget.accumulation_steps(config, size, ranks.size)
        self.n_params, self.n_active = model_config.n_params(), model_config.n_active_params()
        device = ranks.device
        self.compiled, self.compile_reason = machine.pick_compile(config, device, self.n_active)
        self.dtype, self.dtype_reason = machine.pick_dtype(config, device, self.compiled)
        self.model = make_model(self, start)
        self.forward, self.ddp = self.model, None
        if self.compiled and config.shard in ("fsdp", "ep"):
            machine.compile_blocks(self.model)
        elif self.compiled:
            self.forward = torch.compile(self.model, fullgraph=True, dynamic=False)
        if ranks.size > 1 and config.shard in ("none", "zero1"):
            self.ddp = DistributedDataParallel(self.forward, gradient_as_bucket_view=True)
        self.optimizer = make_optimizer(self)
        fp16 = self.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=fp16)
        self.saved = None  # step of the checkpoint in out_dir
        if config.init_from == "resume":
            machine.load_optimizer(self.optimizer, start["optimizer"])
            if start["scaler"]:  # empty where the run had another dtype
                self.scaler.load_state_dict(start["scaler"])
            self.saved = start["step"]

    def autocast(self):
        low = self.dtype != torch.float32
        return torch.autocast(self.ranks.device.type, self.dtype, enabled=low)

    def batch(self, windows):
        """windows (B, S+1) -> tokens, targets (B, S) on the device; a GPU works on meanwhile."""
        windows = torch.from_numpy(windows)
        if self.ranks.device.type == "cuda":
            windows = windows.pin_memory()
        windows = windows.to(self.ranks.device, non_blocking=True)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    @contextlib.contextmanager
    def micro_step(self, last):
        """Around a forward and backward pass: only a step's last one exchanges gradients."""
        if self.config.shard in ("fsdp", "ep"):
            self.model.set_requires_gradient_sync(last)
        quiet = self.ddp is not None and not last
        with self.ddp.no_sync() if quiet else contextlib.nullcontext():
            yield
        if self.config.shard == "fsdp":
            for pool in self.model.pools:
                pool.reshard()

    def last_checkpoint(self):
        if not self.saved:
            return "no checkpoint had been saved"
        before = Path(self.config.out_dir, folder.PREVIOUS).exists()
        return (f"the last good checkpoint is {self.config.out_dir}/ckpt.pt (step {self.saved})"
                + f", the one before it {folder.PREVIOUS}" * before)


def on_meta(model_config):
    """The model without memory for its weights."""
    with torch.device("meta"):
        return GPT(model_config)


def make_model(trainer, start):
    torch.manual_seed(trainer.config.seed)
    model = GPT(trainer.model_config)
    if start is not None:
        folder.load_weights(model, start, trainer.config)
    model.recompute = trainer.config.recompute
    if trainer.config.shard in ("fsdp", "ep"):
        machine.shard_model(model, trainer.ranks, trainer.dtype, trainer.config.shard)
    return model.to(trainer.ranks.device)


def make_optimizer(trainer):
    """AdamW, fused; weight decay on everything that multiplies, not on norms, biases and scales."""
    c, (decayed, plain) = trainer.config, checkpoint.parameter_groups(trainer.model)
    groups = [{"params": decayed, "weight_decay": c.weight_decay},
              {"params": plain, "weight_decay": 0.0}]
    fused = trainer.ranks.device.type in ("cpu", "cuda")
    options = dict(lr=c.lr, betas=(c.beta1, c.beta2), fused=fused)
    if c.shard == "zero1":
        return machine.ShardedAdamW(groups, trainer.ranks, **options)
    return torch.optim.AdamW(groups, **options)


# ---- one step, one validation

def train_step(trainer, step):
    """One optimizer step -> loss, auxiliary loss, gradient norm and routing statistics.

    They are over all ranks and micro-steps. Micro-step a takes, on rank r of R, the windows
    [(aR+r)B, (aR+r+1)B) of the step's list, and the same slice of its noise seeds: what a step sees
    does not depend on R. What R ranks promise: with micro_batch x R unchanged and no dropout, the
    numbers of one rank (to 6.3e-7, measured). With micro_batch itself unchanged, a balance loss, a
    product of means over a micro-step, sees R times as many tokens: topk and unipool then differ by
    up to 2.1e-4 between 1 and 3 ranks.
    """
    c, ranks, stats = trainer.config, trainer.ranks, {}
    windows = c.batch_tokens // trainer.model_config.block_size  # of the step
    # One seed for each window's noise, from raw bits that are alike in every version of numpy.
    bits = np.random.Philox(np.random.SeedSequence((c.seed, step)))
    noise_seeds = (bits.random_raw(windows) >> 1).astype(np.int64)
    losses = torch.zeros(2, device=ranks.device)
    for a in range(trainer.accumulation):
        # This rank's share of the micro-step.
        first = (a * ranks.size + ranks.rank) * c.micro_batch
        share = trainer.train_data.batch(step * windows + first, c.micro_batch)
        tokens, targets = trainer.batch(share)  # (B, S) each
        seeds = torch.from_numpy(noise_seeds[first:first + c.micro_batch]).to(ranks.device)  # (B,)
        torch.manual_seed(int(noise_seeds[first]))  # dropout
        with trainer.micro_step(last=a == trainer.accumulation - 1):
            # Forward, then backward; gradients add up over the micro-steps to those of their mean.
            with trainer.autocast():
                out = (trainer.ddp or trainer.forward)(tokens, targets, noise_key=seeds)
            aux = sum(out.aux.values(), start=torch.zeros_like(out.loss))
            trainer.scaler.scale((out.loss + aux) / trainer.accumulation).backward()
        losses += torch.stack((out.loss, aux)).detach()
        trainer.moved(a + 1)
        stats = {name: value.detach() + stats.get(name, 0) for name, value in out.stats.items()}
    # Clip, and move the weights.
    norm = update(trainer, lr_at(c, step))
    # Move the state that follows the routing (biases, paths, owners), alike on every rank.
    if ranks.size > 1:
        for value in stats.values():
            dist.all_reduce(value)
    trainer.model.update_balance(stats, step + 1)
    # What is logged are means over micro-steps and ranks.
    sums = ranks.sum(*losses.tolist())
    loss, aux = (total / trainer.accumulation / ranks.size for total in sums)
    return loss, aux, norm, stats


def update(trainer, lr):
    """Clip, step, forget the gradients -> gradient norm before clipping."""
    trainer.scaler.unscale_(trainer.optimizer)
    if trainer.config.shard == "ep":
        experts_over_ranks.average_gradients(machine.banks_of(trainer.model), trainer.ranks.size)
    limit = trainer.config.grad_clip or math.inf
    norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), limit)
    for group in trainer.optimizer.param_groups:
        group["lr"] = lr
    trainer.scaler.step(trainer.optimizer)
    trainer.scaler.update()
    # DDP's gradients live in its buckets: emptied, not dropped, or a step would hold them twice.
    trainer.optimizer.zero_grad(set_to_none=trainer.ddp is None)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


@torch.no_grad()
def validate(trainer, eval_tokens):
    """Mean cross-entropy in nats per token over the first eval_tokens of the validation split.

    The ranks share them out. All run the same number of batches of one shape (fsdp gathers weights
    in each, compile wants one shape): rows beyond the slice have targets that count for nothing.
    """
    c, ranks, size = trainer.config, trainer.ranks, trainer.model_config.block_size
    n, total = min(max(1, eval_tokens // size), trainer.val_data.n_windows), 0.0
    mine = ranks.rank * c.micro_batch
    trainer.model.eval()
    for first in range(mine, mine + n, c.micro_batch * ranks.size):
        real = min(max(0, n - first), c.micro_batch)
        windows = np.zeros((c.micro_batch, size + 1), dtype=np.int64)
        if real:
            windows[:real] = trainer.val_data.sequential(first, real)
        tokens, targets = trainer.batch(windows)
        targets[real:] = -100
        with trainer.autocast():
            loss = trainer.forward(tokens, targets).loss
        total += loss.item() * real if real else 0.0
    trainer.model.train()
    return ranks.sum(total)[0] / n


# ---- the loop

def train(model_config, config, start=None):
    """Train as configured; leave checkpoint, log and picture in config.out_dir.

    start: what folder.load_start returns, where the caller has it already (it is emptied).
    -> {"step", "finished", "signal", "val_loss", ...}: the last row of the log, and how it ended.
    Raises ValueError for a setting, a shard or a checkpoint that does not fit, OSError for a full
    disk, a folder in use or a lost rank, FloatingPointError for a loss that is not finite.
    """
    with contextlib.ExitStack() as stack:
        # Signals before the ranks: torchrun sends SIGTERM while a lost one is looked for.
        stop = stack.enter_context(machine.stop_signals())
        ranks = stack.enter_context(machine.join_ranks(config))
        machine.keep_memory()
        here = [ranks.device.index] if ranks.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(here))
        say = functools.partial(folder.say_line, ranks.rank == 0 and not config.quiet)
        # What it starts from, and whether that is allowed.
        start = start or folder.load_start(config, ModelConfig, GPT)
        folder.check_start(model_config, config, start)
        resume = config.init_from == "resume"
        first, before = (start["step"], start["seconds"]) if resume else (0, 0.0)
        if first >= config.max_steps:
            say(f"{config.out_dir} is finished: {first} of {config.max_steps} steps; --max_steps=N "
                "goes on")
            if ranks.rank == 0:  # a kill may have come between the last checkpoint and it
                draw_loss(model_config, config.out_dir)
            return {"step": first, "finished": True, "signal": None, "val_loss": start["val_loss"]}
        if ranks.rank == 0:
            stack.enter_context(files.lock(config.out_dir))
        trainer = Trainer(model_config, config, start, ranks)
        config = trainer.config
        allow_compiling(trainer, stack)
        say(describe(trainer, start))
        (start or {}).clear()  # a run needs the memory
        # Everything that can fail is open before the loop deletes what an older run left.
        trackers, settings = [], {"model": asdict(model_config), "train": asdict(config)}
        if ranks.rank == 0:
            trackers = [functools.partial(log_row, Path(config.out_dir, "log.csv"))]
            trackers += open_trackers(config, settings, stack)
        ready = functools.partial(folder.open_folder, trainer, settings, first)
        bar = stack.enter_context(progress(trainer, first, say))
        result = loop(trainer, first, before, stop, ready, trackers, bar, say)
        if not result["finished"]:
            name = signal.Signals(result["signal"]).name
            say(f"stopped by {name} after step {result['step']}, which is saved; to go on: "
                f"python train.py --init_from=resume --out_dir={config.out_dir}")
        elif ranks.rank == 0:
            say(summary(trainer, result, picture=draw_loss(model_config, config.out_dir)))
        return result


def allow_compiling(trainer, stack):
    """--compile=false means none: the experts' own operators ask, too."""
    cpu.allow_compile(trainer.config.compile != "false")
    stack.callback(cpu.allow_compile, False)
    if trainer.compiled:
        stack.callback(torch.compiler.reset)  # the next run in this process compiles its own model


def loop(trainer, first, before, stop, ready, trackers, bar, say):
    """The steps after `first` -> what train returns.

    before: seconds spent already; stop: signals received; ready: to be called after the first step.
    """
    c, ranks, size = trainer.config, trainer.ranks, trainer.model_config.block_size
    result = {"n_params": trainer.n_params, "n_active_params": trainer.n_active, "val_loss": None}
    began, peak = time.perf_counter() - before, budget.peak_flops(ranks.device)
    watch = CollapseWatch(trainer.model, say)
    for step in range(first + 1, c.max_steps + 1):
        # One step; a loss that is not finite would only get worse.
        tick = time.perf_counter()
        loss, aux, norm, stats = train_step(trainer, step - 1)
        now = time.perf_counter()
        if not math.isfinite(loss) or not (math.isfinite(norm) or trainer.scaler.is_enabled()):
            raise FloatingPointError(f"step {step}: loss {loss:.4g}, gradient norm {norm:.4g}; "
                                     f"{trainer.last_checkpoint()}; a lower --lr may help")
        if step == first + 1:
            stop.nothing_to_save = False
            if ranks.rank == 0:
                ready()
        # A validation, and a row of the log.
        val_loss = validate(trainer, c.eval_tokens) if due(step, c.eval_every, c) else None
        row = {"step": step, "tokens": step * c.batch_tokens, "seconds": now - began,
               "lr": lr_at(c, step - 1), "train_loss": loss, "val_loss": val_loss,
               "grad_norm": norm, "tokens_per_second": c.batch_tokens / (now - tick)}
        if stats:
            row["aux_loss"] = aux
        if trackers and (val_loss is not None or due(step, c.log_every, c)):
            row |= log_columns(trainer.model.config, stats)
            watch(stats)
            for tracker in trackers:
                tracker(row)
        tell(trainer, row, bar, say, peak)
        result |= {name: value for name, value in row.items() if value is not None}
        # A checkpoint, if it is time for one or for the end.
        stopped = ranks.sum(bool(stop))[0] > 0
        if stopped or due(step, c.save_every, c):
            good = validate(trainer, c.micro_batch * size) if val_loss is None else val_loss
            folder.check_good(trainer, step, good)
            folder.save(trainer, step, time.perf_counter() - began, result["val_loss"])
        if stopped:
            break
    finished = step == c.max_steps
    number = stop[0] if stop else None if finished else signal.SIGTERM  # another rank's
    return result | {"finished": finished, "signal": number}


def due(step, every, config):
    """True every n steps, and at the last."""
    return step == config.max_steps or (every > 0 and step % every == 0)


# ---- the command line

def main():
    parsed = parse(ModelConfig, TrainConfig, words=("config",), doc=__doc__)
    cpu.prepare_process()
    with one_line(memory="lower --micro_batch, or try --recompute (--plan estimates)"):
        model_config, config, start = folder.settings(parsed, ModelConfig, TrainConfig, GPT)
        if not config.plan:
            result = train(model_config, config, start)
            sys.exit(0 if result["finished"] else 128 + result["signal"])
        if int(os.environ.get("RANK", 0)) == 0:
            device = machine.pick_device(config.device)
            print(budget.plan(on_meta(model_config), config, device))


if __name__ == "__main__":
    main()
