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
import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map
from tqdm import tqdm

from configurator import fail, parse
from model import GPT, ModelConfig, load_checkpoint
from prepare_data import ShardReader, load_meta


@dataclass
class TrainConfig:
    dataset: str = "data/stdlib"  # folder of token shards, made by prepare_data.py
    out_dir: str = "out/run"  # receives ckpt.pt, config.json, log.csv, loss.png
    init_from: str = "scratch"  # scratch | resume | a folder with a checkpoint | gpt2 | hf:NAME_OR_DIR
    overwrite: bool = False  # start from scratch although out_dir holds a checkpoint
    plan: bool | int = False  # print parameters, memory, FLOPs and time (--plan=8: on 8 ranks), and leave
    max_steps: int = 300  # optimizer steps of the whole run
    batch_tokens: int = 4096  # tokens of one step, over all ranks; gradient accumulation follows from it
    micro_batch: int = 16  # sequences per rank in one forward pass
    lr: float = 1e-3  # peak learning rate (AdamW)
    min_lr: float | None = None  # end of the cosine; None: lr / 10
    warmup_steps: int = 20  # linear warm-up
    weight_decay: float = 0.1  # on matrices and stacked expert weights; not on norms, biases, scales
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    eval_every: int = 50  # steps between validations; 0: only at the end
    eval_tokens: int = 32768  # validation tokens, always the first ones
    save_every: int = 50  # steps between checkpoints; 0: only at the end
    log_every: int = 1  # steps between rows of log.csv
    seed: int = 1  # weights, data order, noise, dropout
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the matrix products; weights stay float32
    compile: Literal["auto", "true", "false"] = "auto"  # torch.compile
    recompute: bool = False  # run each block again in the backward pass: less memory, a third more time
    shard: Literal["none", "zero1", "fsdp"] = "none"  # over the ranks: nothing | optimizer | optimizer, gradients, weights
    timeout: int = 600  # seconds that ranks wait for one another before they call a rank lost
    tensorboard: bool = False  # write event files into out_dir
    wandb: str = ""  # Weights & Biases project to log to
    quiet: bool = False  # print nothing but errors

    def __post_init__(self):
        for name in ("max_steps", "batch_tokens", "micro_batch", "eval_tokens", "log_every", "timeout"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("lr", "warmup_steps", "weight_decay", "grad_clip", "eval_every", "save_every", "seed", "plan"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.min_lr is not None and not 0 <= self.min_lr <= self.lr:
            raise ValueError(f"min_lr={self.min_lr} must lie between 0 and lr={self.lr}: lower it or leave it out")
        if self.shard == "fsdp" and (self.dtype == "float16" or self.compile == "true"):
            raise ValueError("shard=fsdp works with dtype=bfloat16 or float32 and compile=false: its hooks break the graph")


# ---- the machine: ranks, device, precision

# Dense bf16 tensor-core peaks in FLOP/s, from the makers' data sheets; the first name that fits counts.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "H20": 148e12,
              "B200": 2250e12, "A100": 312e12, "A800": 312e12, "A6000": 155e12, "A40": 150e12, "A10": 125e12, "L40S": 362e12,
              "L4": 121e12, "4090": 165e12, "3090": 71e12, "MI300X": 1307e12}


@dataclass
class Ranks:
    """This process among those that torchrun started: rank of size, and the device it computes on."""
    rank: int
    size: int
    device: torch.device

    def sum(self, *values):
        """Sums of numbers over the ranks, in float64, by way of the CPU."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()


def pick_device(name, local_rank=0):
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device={name}: expected auto, cpu, cuda, cuda:N or mps")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={name}: this torch ({torch.__version__}) sees no GPU; leave --device out or use cpu")
    device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def join_ranks(config):
    """Meet the other processes that torchrun started, if any -> Ranks. If one is lost on the way, the error names it."""
    rank, size, local_rank = (int(os.environ.get(name, d)) for name, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    ranks = Ranks(rank, size, pick_device(config.device, local_rank))
    if size == 1:
        if config.shard != "none":
            raise ValueError(f"shard={config.shard} needs several ranks: start with torchrun --nproc_per_node=N, or shard=none")
        yield ranks
        return
    wait = timedelta(seconds=config.timeout)
    store = next(dist.rendezvous("env://", timeout=wait))[0]  # a key-value server that survives the loss of a rank
    backend = "cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.PrefixStore("train", store), rank=rank, world_size=size, timeout=wait)
    try:
        yield ranks
    except RuntimeError as error:
        lost = lost_ranks(ranks, store)
        if lost:
            raise ConnectionError(f"rank {lost} of {size} vanished or hung ({str(error).splitlines()[0]:.120})") from error
        raise
    dist.destroy_process_group()


def lost_ranks(ranks, store, patience=10):
    """Called where a collective failed: who else is here to say so? -> "1, 3", the ranks that are not; "" if all are."""
    try:
        store.set(f"here/{ranks.rank}", "1")
        deadline = time.monotonic() + patience
        while True:
            lost = [r for r in range(ranks.size) if not store.check([f"here/{r}"])]
            if not lost or time.monotonic() > deadline:
                return ", ".join(map(str, lost))
            time.sleep(0.2)
    except RuntimeError:  # the store lives on the first node
        return "0"


def pick_compile(config, device, n_active):
    """Whether to torch.compile, by device and size only, so that a resumed run picks the same -> (bool, reason)."""
    if config.compile != "auto":
        return config.compile == "true", "asked for"
    if config.shard == "fsdp":
        return False, "fsdp's hooks break the graph"
    if device.type == "cuda":
        triton = importlib.util.find_spec("triton") is not None
        return triton, "a GPU gains from fused kernels" if triton else "triton is not installed"
    if device.type != "cpu":
        return False, f"not tried on {device.type}"
    if n_active < 5e6:
        return False, "a tiny model is bound by overhead that compiling does not remove"
    if not (shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")):
        return False, "no C++ compiler on this machine"
    return True, "large enough for a CPU to gain; the first step takes half a minute"


def pick_dtype(config, device, compiled):
    """The dtype of the matrix products -> (dtype, reason)."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype), "asked for"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU has bf16 tensor cores"
        return torch.float32, "the GPU has no bf16; --dtype=float16 is faster and needs more care"
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if device.type == "cpu" and has_bf16 and compiled:
        return torch.bfloat16, "the CPU multiplies bf16, which pays once compiled"
    return torch.float32, "bf16 pays on a CPU only with bf16 instructions and torch.compile" if device.type == "cpu" else "safe"


def peak_flops(device):
    """Dense bf16 FLOP/s of the GPU at hand, None where it is not in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def flops_per_token(model_config):
    """Forward and backward: 6 N_active + 12 L D S."""
    c = model_config
    return 6 * c.n_active_params() + 12 * c.n_layer * c.n_head * c.head_dim * c.block_size


@contextlib.contextmanager
def stop_signals():
    """Ctrl-C and SIGTERM go into a list that the loop looks at after each step; a second Ctrl-C leaves at once."""
    received = []

    def note(number, frame):
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield received
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- one run: model, optimizer, data

def lr_at(config, step):
    """Linear warm-up, then a cosine from lr to min_lr."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    low = config.lr / 10 if config.min_lr is None else config.min_lr
    progress = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return low + (config.lr - low) * (1 + math.cos(math.pi * min(1, progress))) / 2


def accumulation_steps(config, block_size, n_ranks):
    micro = config.micro_batch * block_size * n_ranks
    if config.batch_tokens % micro:
        near = max(1, round(config.batch_tokens / micro)) * micro
        raise ValueError(f"batch_tokens={config.batch_tokens} is not a multiple of {micro} = micro_batch {config.micro_batch} x "
                         f"block_size {block_size} x {n_ranks} rank{'s' * (n_ranks > 1)}: use --batch_tokens={near}, or another micro_batch")
    return config.batch_tokens // micro


def make_optimizer(model, config, device):
    """AdamW, fused; weight decay on what multiplies (matrices, stacked experts, embeddings), not on norms, biases, scales."""
    params = list(model.parameters())
    groups = [{"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]
    options = dict(lr=config.lr, betas=(config.beta1, config.beta2), fused=device.type in ("cpu", "cuda"))
    if config.shard == "zero1":
        return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **options)
    return torch.optim.AdamW(groups, **options)


def shard_model(model, ranks, dtype):
    """FSDP2: every bank of experts, every block, then the rest, each a unit that is gathered when it is used.

    Banks travel in `dtype`; the rest in float32, because routers and norms are read at full precision. A pool that
    several layers share stays gathered from its first use to the end of the backward pass (`release_pools`): otherwise
    each layer would fetch all of it again, twice.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for pool in model.pools:
        fully_shard(pool, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        pool.set_reshard_after_backward(False)
    for block in model.blocks:
        if getattr(block.ffn, "bank", None) is not None:
            fully_shard(block.ffn.bank, mesh=mesh, mp_policy=policy)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


class Run:
    """Everything that one training run holds."""

    def __init__(self, model_config, config, start, ranks):
        self.model_config, self.config, self.ranks = model_config, config, ranks
        self.accumulation = accumulation_steps(config, model_config.block_size, ranks.size)
        shape = dict(block_size=model_config.block_size, vocab_size=model_config.vocab_size, seed=config.seed)
        self.train_data, self.val_data = (ShardReader(config.dataset, split, **shape) for split in ("train", "val"))
        self.n_params, self.n_active = model_config.n_params(), model_config.n_active_params()
        self.compiled, self.compile_reason = pick_compile(config, ranks.device, self.n_active)
        self.dtype, self.dtype_reason = pick_dtype(config, ranks.device, self.compiled)
        self.model = self.make_model(start)
        self.forward = torch.compile(self.model, fullgraph=True, dynamic=False) if self.compiled else self.model
        self.ddp = None
        if ranks.size > 1 and config.shard != "fsdp":  # around the compiled model; no buffer moves, all ranks compute them alike
            self.ddp = DistributedDataParallel(self.forward, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.optimizer = make_optimizer(self.model, config, ranks.device)
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=self.dtype == torch.float16)
        self.saved = None  # step of the checkpoint in out_dir
        if config.init_from == "resume":
            load_optimizer(self.optimizer, start["optimizer"])
            self.scaler.load_state_dict(start["scaler"])
            self.saved = start["step"]

    def last_checkpoint(self):
        path = Path(self.config.out_dir, "ckpt.pt")
        return f"The last good checkpoint is {path} (step {self.saved})" if self.saved else "No checkpoint had been saved"

    def make_model(self, start):
        torch.manual_seed(self.config.seed)
        model = GPT(self.model_config)
        if start is not None:
            load_weights(model, start["model"], self.config.init_from)
        model.recompute = self.config.recompute
        if self.config.shard == "fsdp":
            shard_model(model, self.ranks, self.dtype)
        return model.to(self.ranks.device)

    def autocast(self):
        return torch.autocast(self.ranks.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def batch(self, windows):
        """windows (B, S+1) -> tokens, targets (B, S) on the device; the copy overlaps with what the GPU is doing."""
        windows = torch.from_numpy(windows)
        if self.ranks.device.type == "cuda":
            windows = windows.pin_memory().to(self.ranks.device, non_blocking=True)
        windows = windows.to(self.ranks.device)
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    @contextlib.contextmanager
    def gradients(self, last):
        """Around one micro-step: only the last one of a step exchanges gradients."""
        if self.config.shard == "fsdp":
            self.model.set_requires_gradient_sync(last)
        with self.ddp.no_sync() if self.ddp is not None and not last else contextlib.nullcontext():
            yield
        if self.config.shard == "fsdp":
            for pool in self.model.pools:
                pool.reshard()


def load_weights(model, weights, source):
    """Into `model`; buffers may be missing (a fine-tuning run may turn on a loss that keeps one), parameters may not."""
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # a shape: the first line after the title names it
        raise ValueError(f"init_from={source}: {str(error).splitlines()[1].strip()}") from None
    missing = set(missing) & {name for name, _ in model.named_parameters()}
    if missing or unexpected:
        raise ValueError(f"init_from={source} holds another model: {len(missing)} weights are missing and {len(unexpected)} are "
                         f"unknown here, {sorted([*missing, *unexpected])[0]} among them")


def load_optimizer(optimizer, saved):
    """The whole state, as a checkpoint has it, into an optimizer that may hold a part of it. Options stay as configured."""
    def part(value, param):
        if isinstance(param, DTensor) and value.shape == param.shape:
            return distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
        return value

    params = [param for group in optimizer.param_groups for param in group["params"]]
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    state = {i: {k: part(v, params[i]) for k, v in entry.items()} for i, entry in saved["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
    for group, mine in zip(optimizer.param_groups, options):
        group.update(mine)


def train_step(run, step):
    """One optimizer step -> its loss, auxiliary loss, gradient norm and routing statistics, of all ranks and micro-steps.

    Micro-step a takes, on rank r of R, the windows [(aR+r)B, (aR+r+1)B) of the step's list: what a step sees does not
    depend on R. The same slice of a list of random keys fixes the noise of each sequence.
    """
    c, ranks = run.config, run.ranks
    windows = c.batch_tokens // run.model_config.block_size  # of the whole step
    keys = (np.random.Philox(np.random.SeedSequence((c.seed, step))).random_raw(windows) >> 1).astype(np.int64)  # as any numpy draws it
    losses, stats = torch.zeros(2, dtype=torch.float64, device="cpu" if ranks.device.type == "mps" else ranks.device), {}
    for a in range(run.accumulation):
        first = (a * ranks.size + ranks.rank) * c.micro_batch
        tokens, targets = run.batch(run.train_data.batch(step * windows + first, c.micro_batch))
        noise_key = torch.from_numpy(keys[first : first + c.micro_batch]).to(ranks.device)
        torch.manual_seed(int(keys[first]))  # dropout
        with run.gradients(last=a == run.accumulation - 1):
            with run.autocast():
                out = (run.ddp or run.forward)(tokens, targets, noise_key=noise_key)
            aux = sum(out.aux.values(), start=torch.zeros_like(out.loss))
            run.scaler.scale((out.loss + aux) / run.accumulation).backward()
        losses += torch.stack((out.loss, aux)).detach().to(losses)
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
    return whole(norm).item()


@torch.no_grad()
def validate(run):
    """Mean cross-entropy, in nats per token, over the first eval_tokens of the validation split, shared out over the ranks.

    Every rank runs the same number of batches of the same shape (fsdp gathers weights in each, compile wants one shape):
    rows beyond the slice have targets that count for nothing.
    """
    c, ranks, size = run.config, run.ranks, run.model_config.block_size
    n, total = min(max(1, c.eval_tokens // size), run.val_data.n_windows), 0.0
    run.model.eval()
    for i in range(math.ceil(n / (c.micro_batch * ranks.size))):
        first = (i * ranks.size + ranks.rank) * c.micro_batch
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

def whole(value):
    """A sharded tensor, gathered (all ranks must come); anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def save(run, step, seconds, val_loss):
    """Write out_dir/ckpt.pt: the same file whatever the number of ranks. All ranks gather, rank 0 writes, all hear how it went."""
    c, problem = run.config, None
    if isinstance(run.optimizer, ZeroRedundancyOptimizer):
        run.optimizer.consolidate_state_dict(to=0)
    alone = isinstance(run.optimizer, ZeroRedundancyOptimizer) and run.ranks.rank > 0
    optimizer = None if alone else tree_map(whole, run.optimizer.state_dict())
    model = {name: whole(value) for name, value in run.model.state_dict().items()}
    if run.ranks.rank == 0:
        state = {"model": model, "optimizer": optimizer, "scaler": run.scaler.state_dict(), "step": step, "seconds": seconds,
                 "val_loss": val_loss, "tokenizer": load_meta(c.dataset)["tokenizer"],
                 "model_config": dataclasses.asdict(run.model_config), "train_config": dataclasses.asdict(c)}
        try:
            write_atomically(Path(c.out_dir, "ckpt.pt"), lambda f: torch.save(state, f))
        except (OSError, RuntimeError) as error:
            problem = str(error).splitlines()[0]
    if run.ranks.sum(problem is not None)[0]:
        raise OSError(f"could not save step {step} in {c.out_dir}: {problem or 'see rank 0'}. {run.last_checkpoint()}")
    run.saved = step


def write_atomically(path, write):
    """A temporary file, fsync, rename: a crash or a full disk at any moment leaves what was there before."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the rename, too, must reach the disk
    os.close(folder)


def log_row(path, row):
    """Append to log.csv; opened and closed, so that the row is there whatever comes next."""
    with open(path, "a", newline="") as f:
        writer = csv.DictWriter(f, row)
        if f.tell() == 0:
            writer.writeheader()
        writer.writerow({k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()})


def trim_log(path, step):
    """Drop the rows after `step`, and a last line that a crash cut short."""
    if path.exists():
        lines = path.read_bytes().splitlines(keepends=True)
        keep = [line for i, line in enumerate(lines) if line.endswith(b"\n") and (i == 0 or int(line.split(b",")[0]) <= step)]
        write_atomically(path, lambda f: f.writelines(keep))


def read_log(path):
    """{column: list of floats, nan where a cell is empty}"""
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    return {name: [float(row[name] or "nan") for row in rows] for name in (rows[0] if rows else ())}


def draw_loss(out_dir):
    """out_dir/loss.png from log.csv. None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    log = read_log(Path(out_dir, "log.csv"))
    tokens, train, val = (np.array(log[name]) for name in ("tokens", "train_loss", "val_loss"))
    smooth, weight = train.copy(), min(0.98, 1 - 10 / max(20, len(train)))
    for i in range(1, len(train)):
        smooth[i] = weight * smooth[i - 1] + (1 - weight) * train[i]
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(tokens, train, color="#9ecae1", linewidth=0.8, label="training, each step")
    axes.plot(tokens, smooth, color="#2171b5", linewidth=1.8, label="training, smoothed")
    seen = ~np.isnan(val)
    axes.plot(tokens[seen], val[seen], color="#d94801", marker="o", markersize=3.5, label=f"validation, {val[seen][-1]:.3f} at the end")
    later = np.concatenate((train[len(train) // 20 :], val[seen]))  # the first steps would flatten the rest
    axes.set_ylim(later.min() - 0.05 * np.ptp(later), later.max() + 0.1 * np.ptp(later) + 1e-3)
    axes.set_xlim(0, tokens[-1])
    axes.xaxis.set_major_formatter(lambda x, _: amount(x))
    axes.set(xlabel="tokens", ylabel="cross-entropy (nats per token)", title=str(out_dir))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(Path(out_dir, "loss.png"))
    return Path(out_dir, "loss.png")


def open_trackers(config, settings, stack):
    """Functions that take a row of the log: tensorboard and wandb, if asked for; `stack` closes them."""
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
        run = need("wandb").init(project=config.wandb, name=Path(config.out_dir).name, dir=config.out_dir, config=settings)
        stack.callback(run.finish)
        trackers.append(lambda row: run.log({k: v for k, v in row.items() if v is not None}, step=row["step"]))
    return trackers


# ---- what a run says

def amount(n):
    """1234567 -> 1.23M"""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= size:
            return f"{n / size:.3g}{unit}"
    return f"{n:.3g}"


def span(seconds):
    """4000 -> 1 h 07 min"""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60:,} h {minutes % 60:02} min"


def describe(run, start):
    """The first lines of a run: what trains, on what, how, and why so."""
    m, c, ranks = run.model_config, run.config, run.ranks
    experts = f", {m.n_experts} experts, top {m.top_k}" if m.n_experts else ""
    windows = c.batch_tokens // m.block_size
    gpu = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    lines = [f"model    {m.arch} {m.flavour}: {m.n_layer} layers, width {m.d_model}{experts}; {amount(run.n_params)} parameters, "
             f"{amount(run.n_active)} active per token",
             f"data     {c.dataset}: {amount(run.train_data.n_tokens)} tokens, an epoch is {run.train_data.n_windows / windows:,.0f} steps; "
             f"{amount(run.val_data.n_tokens)} for validation",
             f"step     {c.batch_tokens:,} tokens = {c.micro_batch} sequences x {m.block_size} tokens x {ranks.size} ranks x "
             f"{run.accumulation} micro-steps",
             f"device   {ranks.size} x {gpu}" + (f", shard={c.shard}" if ranks.size > 1 else ""),
             f"dtype    {str(run.dtype).removeprefix('torch.')} ({run.dtype_reason})",
             f"compile  {'yes' if run.compiled else 'no'} ({run.compile_reason})"]
    if c.init_from != "scratch":
        lines.append(f"start    {c.init_from}: step {start.get('step', 0) if c.init_from == 'resume' else 0}" + changes(c, start))
    return "\n".join(lines)


def changes(config, start):
    """What differs from the settings that a resumed run was saved with, and so bends its curve."""
    before, now = start.get("train_config", {}), dataclasses.asdict(config)
    names = [k for k in now if before.get(k, now[k]) != now[k] and k not in ("init_from", "overwrite", "plan", "quiet", "out_dir")]
    return "".join(f"; {k} was {before[k]}, is {now[k]}" for k in names) if config.init_from == "resume" else ""


def plan(model_config, config):
    """What a run would take, without running it -> text."""
    m, c = model_config, config
    n_ranks = c.plan if type(c.plan) is int else int(os.environ.get("WORLD_SIZE", 1))
    n_params, device = m.n_params(), pick_device(c.device)
    flops = flops_per_token(m)
    accumulation = accumulation_steps(c, m.block_size, n_ranks)
    try:
        data = ShardReader(c.dataset, "train", m.block_size, m.vocab_size)
        epoch = f"{data.n_windows * m.block_size / c.batch_tokens:,.1f} steps ({amount(data.n_tokens)} tokens in {c.dataset})"
    except (OSError, ValueError) as error:
        epoch = f"unknown: {error}"
    name, peak = ("H100", PEAK_FLOPS["H100"])
    if device.type == "cuda" and peak_flops(device):
        name, peak = torch.cuda.get_device_name(device), peak_flops(device)
    tokens = c.max_steps * c.batch_tokens
    lines = [f"model       {m.arch} {m.flavour}, {m.n_layer} layers, width {m.d_model}",
             f"parameters  {amount(n_params)} stored, {amount(m.n_active_params())} active per token",
             f"FLOPs       {amount(flops)} per token (6 N_active + 12 L D S), {flops * tokens:.2e} for the run",
             f"step        {c.batch_tokens:,} tokens = {c.micro_batch} x {m.block_size} x {n_ranks} ranks x {accumulation} micro-steps",
             f"run         {c.max_steps:,} steps, {amount(tokens)} tokens",
             f"epoch       {epoch}",
             f"time        {span(flops * tokens / (0.4 * peak * n_ranks))} on {n_ranks} x {name} if they reach 40 % of their peak "
             f"({peak / 1e12:.0f} TFLOP/s, bf16)" + (" [no GPU here]" if device.type != "cuda" else ""),
             f"memory      GB per rank, of {n_ranks}:", memory_table(m, c, n_ranks)]
    return "\n".join(lines)


def memory_table(m, c, n_ranks):
    """Gigabytes per rank for each way to shard. Weights, gradients and AdamW's two moments are float32; activations an estimate."""
    with torch.device("meta"):
        model = GPT(m)
    sizes = [p.numel() for p in model.parameters()]
    total, share = sum(sizes), sum(sizes) / n_ranks
    pools = sum(p.numel() for p in model.pools.parameters())
    block = max(sum(p.numel() for p in b.parameters()) for b in model.blocks)
    root = total - pools - sum(p.numel() for b in model.blocks for p in b.parameters())
    gathered = pools + root + 2 * block  # pools and the rest stay; blocks come and go, two at a time
    kept = activation_bytes(m, c)
    rows = {"none": (4 * total, 4 * total, 8 * total, 0), "zero1": (4 * total, 4 * total, 8 * max(share, max(sizes)), 0),
            "fsdp": (4 * share, 4 * share, 8 * share, 8 * gathered)}  # gathered: bf16 weights and gradients, and a float32 buffer
    lines = ["  shard    weights  gradients  optimizer  gathered  activations    total"]
    for name, row in rows.items():
        cells = [x / 1e9 for x in (*row, kept, sum(row) + kept)]
        lines.append(f"{'* ' if name == c.shard else '  '}{name:6} {cells[0]:9.2f} {cells[1]:10.2f} {cells[2]:10.2f} {cells[3]:9.2f} "
                     f"{cells[4]:12.2f} {cells[5]:8.2f}")
    return "\n".join(lines)


def activation_bytes(m, c):
    """What the backward pass needs of one micro-batch; with recompute only each block's input and one block whole."""
    width = 4 if c.dtype == "float32" else 2
    hidden = (m.d_expert or m.d_ff) * (m.top_k or 1) + (m.n_shared_experts or 0) * (m.d_expert or 0)
    block = width * (12 * m.d_model + (2 if m.arch == "gpt2" else 3) * hidden)
    logits = m.vocab_size * (width + 8)  # and the float32 copy and gradient that cross-entropy makes
    tokens = c.micro_batch * m.block_size
    return tokens * (logits + (block + m.n_layer * 4 * m.d_model if c.recompute else m.n_layer * block))


def progress_line(config, row, mfu):
    """What is printed at each validation."""
    width = len(str(config.max_steps))
    return (f"step {row['step']:>{width}}/{config.max_steps}  train {row['train_loss']:.4f}  val {row['val_loss']:.4f}  "
            f"grad norm {row['grad_norm']:.2f}  {amount(row['tokens_per_second'])} tokens/s" + (f"  MFU {mfu:.0%}" if mfu else ""))


def summary(run, result):
    """The last screen of a finished run."""
    c, per_byte = run.config, load_meta(run.config.dataset)["tokenizer"] == "bytes"
    unit = f"nats per byte, {result['val_loss'] / math.log(2):.3f} bits per byte" if per_byte else "nats per token"
    picture = draw_loss(c.out_dir)
    lines = [f"finished {result['step']:,} steps, {amount(result['tokens'])} tokens in {span(result['seconds'])} "
             f"({amount(result['tokens'] / result['seconds'])} tokens/s, everything included)",
             f"loss     validation {result['val_loss']:.4f} {unit}; training {result['train_loss']:.4f}",
             f"files    {Path(c.out_dir, 'ckpt.pt')}, log.csv" + (", loss.png" if picture else ""),
             f"next     python sample.py --out_dir={c.out_dir}"]
    if run.ranks.device.type == "cuda":
        lines.insert(2, f"memory   {torch.cuda.max_memory_allocated(run.ranks.device) / 1e9:.1f} GB at most, on rank 0")
    return "\n".join(lines)


# ---- the loop

def load_start(config):
    """What a run starts from, as a dictionary like a checkpoint's; None from scratch."""
    if config.init_from == "scratch":
        return None
    if config.init_from == "gpt2" or config.init_from.startswith("hf:"):
        model = GPT.from_hf(config.init_from.removeprefix("hf:"))
        return {"model": model.state_dict(), "model_config": dataclasses.asdict(model.config)}
    folder = config.out_dir if config.init_from == "resume" else config.init_from
    return load_checkpoint(os.path.join(folder, "ckpt.pt"))


def check_start(model_config, config, start):
    """Refuse to overwrite a checkpoint by accident, and to go on from one of another model."""
    path = Path(config.out_dir, "ckpt.pt")
    if config.init_from != "resume" and path.exists() and not config.overwrite:
        raise ValueError(f"{path} exists: go on with --init_from=resume, start anew with --overwrite, or choose another --out_dir")
    if config.init_from == "resume":
        mine, theirs = dataclasses.asdict(model_config), start["model_config"]
        other = [f"{k} is {theirs.get(k)} there and {v} here" for k, v in mine.items() if theirs.get(k) != v]
        if other:
            raise ValueError(f"{path} holds another model: {', '.join(other)}")
    tokenizer = load_meta(config.dataset)["tokenizer"]
    if start is not None and start.get("tokenizer", tokenizer) != tokenizer:
        raise ValueError(f"init_from={config.init_from} was trained on {start['tokenizer']} tokens, and {config.dataset} holds {tokenizer}")


def open_folder(model_config, config, step):
    """Make out_dir ready for the steps after `step`: nothing of an older run may be taken for this one's."""
    folder = Path(config.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if config.init_from == "resume":
        trim_log(folder / "log.csv", step)
    else:
        for name in ("ckpt.pt", "log.csv", "loss.png"):
            (folder / name).unlink(missing_ok=True)
    settings = {"model": dataclasses.asdict(model_config), "train": dataclasses.asdict(config)}
    write_atomically(folder / "config.json", lambda f: f.write(json.dumps(settings, indent=1).encode()))
    return settings


def train(model_config, config, start=None):
    """Train as configured and leave checkpoint, log and picture in config.out_dir.

    start: what load_start returned, where the caller has it already (it is emptied). Returns {"step", "finished", "signal",
    "train_loss", "val_loss", "tokens", "seconds", "n_params", "n_active_params"}. Raises ValueError for a setting, a shard or
    a checkpoint that does not fit, OSError for a disk that is full or a rank that is lost, FloatingPointError for a loss
    that is not finite.
    """
    with contextlib.ExitStack() as stack:
        ranks, stop = stack.enter_context(join_ranks(config)), stack.enter_context(stop_signals())
        stack.enter_context(torch.random.fork_rng([ranks.device.index] if ranks.device.type == "cuda" else []))
        say = print if ranks.rank == 0 and not config.quiet else lambda *_: None
        start = start or load_start(config)
        check_start(model_config, config, start)
        first = start["step"] if config.init_from == "resume" else 0
        if first >= config.max_steps:
            say(f"{config.out_dir} is finished: {first} of {config.max_steps} steps; --max_steps=N goes on")
            return {"step": first, "finished": True, "signal": None, "val_loss": start["val_loss"]}
        run = Run(model_config, config, start, ranks)
        say(describe(run, start))
        before = start["seconds"] if first else 0.0
        start = None if start is None else start.clear()  # its memory is needed
        trackers = []
        if ranks.rank == 0:
            trackers = [lambda row: log_row(Path(config.out_dir, "log.csv"), row)]
            trackers += open_trackers(config, open_folder(model_config, config, first), stack)
        result = loop(run, first, before, stop, trackers, say)
        if result["finished"] and ranks.rank == 0:
            say(summary(run, result))
        elif not result["finished"]:
            say(f"stopped by {signal.Signals(result['signal']).name} after step {result['step']}, which is saved: "
                f"python train.py --init_from=resume --out_dir={config.out_dir}")
        return result


def loop(run, first, before, stop, trackers, say):
    """The steps after `first` -> what train returns. before: seconds already spent; stop: signals received."""
    c, ranks, result = run.config, run.ranks, {"n_params": run.n_params, "n_active_params": run.n_active}
    began, peak, flops = time.perf_counter() - before, peak_flops(ranks.device), flops_per_token(run.model_config)
    hidden = ranks.rank > 0 or c.quiet or not sys.stderr.isatty()
    bar = tqdm(total=c.max_steps, initial=first, disable=hidden, unit="step", dynamic_ncols=True)
    for step in range(first + 1, c.max_steps + 1):
        tick = time.perf_counter()
        loss, aux, norm, stats = train_step(run, step - 1)
        now = time.perf_counter()
        if not math.isfinite(loss) or not (math.isfinite(norm) or run.scaler.is_enabled()):
            raise FloatingPointError(f"step {step}: the loss is {loss:.4g}, the gradient norm {norm:.4g}. {run.last_checkpoint()}")
        row = {"step": step, "tokens": step * c.batch_tokens, "seconds": now - began, "lr": lr_at(c, step - 1), "train_loss": loss,
               "val_loss": validate(run) if due(step, c.eval_every, c) else None, "grad_norm": norm,
               "tokens_per_second": c.batch_tokens / (now - tick)} | ({"aux_loss": aux} if stats else {})
        mfu = row["tokens_per_second"] * flops / (peak * ranks.size) if peak else None
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}", **{"tok/s": amount(row["tokens_per_second"])}, **({"MFU": f"{mfu:.0%}"} if mfu else {}))
        if trackers and (row["val_loss"] is not None or due(step, c.log_every, c)):
            row |= run.model.routing_columns(stats)
            for tracker in trackers:
                tracker(row)
        if row["val_loss"] is not None:
            say(progress_line(c, row, mfu))
        result |= {k: v for k, v in row.items() if v is not None}
        stopped = ranks.sum(bool(stop))[0] > 0
        if stopped or due(step, c.save_every, c):
            save(run, step, time.perf_counter() - began, result.get("val_loss"))
        if stopped:
            break
    bar.close()
    return result | {"finished": step == c.max_steps, "signal": stop[0] if stop else None}


def due(step, every, config):
    """Is it time for something done at `every` n-th step, and always at the last?"""
    return step == config.max_steps or (every > 0 and step % every == 0)


def settings(parsed):
    """The command line -> ModelConfig, TrainConfig, and what load_start found.

    A resumed run keeps the settings it was saved with, and a run from other weights their model; what is given comes first.
    """
    config, given = parsed.make(TrainConfig), parsed.given
    start = load_start(config)
    if start is None:
        if "vocab_size" not in given and not config.plan:
            given["vocab_size"] = load_meta(config.dataset)["vocab_size"]
        return parsed.make(ModelConfig), config, None
    model_fields = {f.name for f in dataclasses.fields(ModelConfig)}
    model_config = ModelConfig(**(start["model_config"] | {k: v for k, v in given.items() if k in model_fields}))
    if config.init_from == "resume":
        kept = {k: v for k, v in start["train_config"].items() if k not in ("out_dir", "init_from", "overwrite", "plan", "quiet")}
        config = TrainConfig(**(kept | {k: v for k, v in given.items() if k not in model_fields}))
    return model_config, config, start


def main():
    parsed = parse(ModelConfig, TrainConfig, words=("config",), doc=__doc__)
    rank = int(os.environ.get("RANK", 0))
    try:
        model_config, config, start = settings(parsed)
        if config.plan:
            print(plan(model_config, config) if rank == 0 else "", end="\n" * (rank == 0))
            return
        result = train(model_config, config, start)
    except torch.OutOfMemoryError:
        problem = f"out of memory with micro_batch={config.micro_batch}: lower --micro_batch, or try --recompute (--plan estimates)"
    except (ValueError, OSError, FloatingPointError) as error:
        problem = error
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        problem = f"torch.compile failed ({str(error).splitlines()[0]}): --compile=false does without"
    else:
        sys.exit(128 + result["signal"] if not result["finished"] else 0)
    fail(f"rank {rank}: {problem}" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else problem)


if __name__ == "__main__":
    main()
