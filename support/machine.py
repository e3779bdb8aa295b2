"""The machine that a model runs on: device, precision and speed, ranks, signals, and how a model is spread over ranks."""

import contextlib
import ctypes
import importlib.util
import os
import re
import shutil
import signal
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

# ---- device and precision

def pick_device(name, local_rank=0):
    """auto | cpu | cuda | cuda:N | mps -> torch.device; ValueError where there is no such device."""
    gpus, apple = torch.cuda.device_count(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if gpus else "mps" if apple else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise ValueError(f"device={name}: expected auto, cpu, cuda, cuda:N or mps")
    if name == "mps" and not apple:
        raise ValueError(f"device=mps: torch {torch.__version__} sees no Apple GPU here; use cpu")
    if not name.startswith("cuda"):
        return torch.device(name)
    number = int(name.partition(":")[2] or local_rank)
    if number >= gpus:
        seen = f"{gpus} GPUs" if gpus else "no GPU"
        raise ValueError(f"device={name}: torch {torch.__version__} sees {seen} here; leave --device "
                         "out or use cpu")
    torch.cuda.set_device(number)
    return torch.device(f"cuda:{number}")


def keep_memory():
    """glibc hands freed blocks of over 32 MB back to the system, which zeroes each page again at the next step: tell it to
    keep them. Steps with large activations took a quarter less time (results/log.md). Other C libraries are left alone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the end of the heap back


def pick_compile(config, device, n_active):
    """Whether to torch.compile, by device and size alone, so that a resumed run picks the same -> (bool, reason)."""
    if config.compile != "auto":
        return config.compile == "true", "as asked"
    if config.shard == "fsdp":
        return False, "fsdp's hooks break the graph"
    if device.type == "cuda":
        triton = importlib.util.find_spec("triton") is not None
        return triton, "a GPU gains from fused kernels" if triton else "triton is not installed"
    if device.type != "cpu" or n_active < 5e6:
        return False, "a small model is bound by overhead that compiling leaves" if device.type == "cpu" else "not tried on it"
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        return False, "there is no C++ compiler"
    return True, "large enough for a CPU to gain; the first step takes half a minute"


def pick_dtype(config, device, compiled):
    """The dtype of matrix products -> (dtype, reason)."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype), "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU has bf16 tensor cores"
        return torch.float32, "the GPU has no bf16; --dtype=float16 is faster"
    if device.type == "cpu" and compiled and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return torch.bfloat16, "the CPU multiplies bf16, which pays once compiled"
    return torch.float32, "bf16 pays on a CPU only with bf16 instructions and torch.compile" if device.type == "cpu" else "safe"


# ---- ranks, and how a run ends before its time

@dataclass
class Ranks:
    """This process among those that torchrun started: rank of size, and the device it computes on."""
    rank: int
    size: int
    device: torch.device

    def sum(self, *values):
        """Sums of numbers over the ranks, in float64 and by way of the CPU."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(total)
        return total.tolist()


@contextlib.contextmanager
def join_ranks(config):
    """Meet the other processes that torchrun started, if any -> Ranks. If one is lost on the way, the error names it."""
    rank, size, local_rank = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    ranks = Ranks(rank, size, pick_device(config.device, local_rank))
    if size == 1:
        if config.shard != "none":
            raise ValueError(f"shard={config.shard} needs several ranks: start with torchrun --nproc_per_node=N, or shard=none")
        yield ranks
        return
    wait = timedelta(seconds=config.timeout)
    store = next(dist.rendezvous("env://", timeout=wait))[0]  # torchrun's own: it outlives a lost rank
    store = dist.PrefixStore(f"train{store.add(f'joined{rank}', 1)}", store)  # a process may train several times
    backend = "cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
    try:
        yield ranks
    except RuntimeError as error:
        lost = lost_ranks(ranks, store) if isinstance(error, dist.DistError) or "gloo" in str(error) else ""
        if lost:
            raise ConnectionError(f"rank {lost} of {size} has vanished or hangs; --init_from=resume goes on from the last "
                                  "checkpoint, on any number of ranks") from error
        raise
    finally:
        time.sleep(0.1)  # gloo's threads free the last tensors, for which they need the GIL; joining them with it held hangs
    dist.destroy_process_group()


def lost_ranks(ranks, store, patience=10):
    """An exchange failed: which ranks are not here to say so? -> "1, 3", or "" if all are."""
    deadline, missing = time.monotonic() + patience, [0]
    with contextlib.suppress(RuntimeError):  # no store either: it lives on the first node, with rank 0
        store.set(f"here/{ranks.rank}", "1")
        while (missing := [r for r in range(ranks.size) if not store.check([f"here/{r}"])]) and time.monotonic() < deadline:
            time.sleep(0.2)
    return ", ".join(map(str, missing))


class Stop(list):
    """Signals received. As long as there is nothing to save, before the first step is done, one
    leaves at once, where it need not take other ranks along."""
    nothing_to_save = False


@contextlib.contextmanager
def stop_signals():
    """-> Stop, which the loop looks at after each step. A second Ctrl-C leaves at once."""
    received = Stop()
    received.nothing_to_save = os.environ.get("WORLD_SIZE", "1") == "1"

    def note(number, frame):
        second = number == signal.SIGINT and signal.SIGINT in received
        received.append(number)  # also if what it interrupts, a compiler say, swallows the exception
        if second or received.nothing_to_save:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield received
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- a model and its optimizer, spread over ranks

def shard_model(model, ranks, dtype):
    """FSDP2 with these units, each gathered when it is used: every bank of experts, every block, the rest.

    Banks travel in `dtype`; the rest in float32, because routers and norms are read at full precision. A shared pool stays
    gathered from its first use until micro_step ends, or every layer would fetch it again, forward and backward; infmoe's
    banks stay too, because GPT reads them once more for its statistics.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # harmless unless written to
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for pool in model.pools:
        fully_shard(pool, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        pool.set_reshard_after_backward(False)
    for block in model.blocks:
        bank = getattr(block.ffn, "bank", None)
        if bank is not None:
            fully_shard(bank, mesh=mesh, mp_policy=policy, reshard_after_forward=model.config.flavour != "infmoe")
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def load_optimizer(optimizer, saved):
    """A checkpoint's states into an optimizer that may hold a part of each, or of all.

    The optimizer's options (rates, betas, decay) stay as they are configured now.
    """
    def part(value, param):
        if isinstance(param, DTensor) and value.shape == param.shape:
            return distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
        return value

    params = [param for group in optimizer.param_groups for param in group["params"]]
    options = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    state = {i: {k: part(v, params[i]) for k, v in entry.items()} for i, entry in saved["state"].items()}
    numbers = [group["params"] for group in saved["param_groups"]]
    groups = [{**option, "params": number} for option, number in zip(options, numbers)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for group, configured in zip(optimizer.param_groups, options):
        group.update(configured)


def gather_state(model, optimizer, ranks):
    """State dictionaries of model and optimizer, the same for every way to shard.

    All ranks must come; rank 0 alone is sure to get them.
    """
    def fetch(value):  # one tensor at a time: a GPU has no room for all of them
        if isinstance(value, DTensor):
            value = value.full_tensor()
            return value.cpu() if ranks.rank == 0 else None
        return value

    if isinstance(optimizer, ZeroRedundancyOptimizer):
        optimizer.consolidate_state_dict(to=0)
        state = optimizer.state_dict() if ranks.rank == 0 else None
    else:
        state = tree_map(fetch, optimizer.state_dict())
    return {name: fetch(value) for name, value in model.state_dict().items()}, state
