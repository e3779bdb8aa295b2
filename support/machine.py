"""The machine that a model runs on: device, precision and speed, ranks, signals, and how a model is spread over ranks."""

import contextlib
import ctypes
import importlib.util
import math
import os
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

# ---- device and precision

PEAK_FLOPS = {  # dense bf16 FLOP/s by the makers' data sheets; the first name that fits counts
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "H20": 148e12, "B200": 2250e12,
    "A100": 312e12, "A800": 312e12, "A6000": 155e12, "A40": 150e12, "A10": 125e12, "L40S": 362e12, "L4": 121e12,
    "4090": 165e12, "3090": 71e12, "MI300X": 1307e12}


def pick_device(name, local_rank=0):
    """auto | cpu | cuda | cuda:N | mps -> torch.device; ValueError where there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda", "mps"):
        raise ValueError(f"device={name}: expected auto, cpu, cuda, cuda:N or mps")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={name}: torch {torch.__version__} sees no GPU here; leave --device out or use cpu")
    device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


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


def peak_flops(device):
    """Dense bf16 FLOP/s of the GPU at hand; None where it is not in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def flops_per_token(model_config):
    """Of a training step, forward and backward: 6 N_active + 12 L D S."""
    c = model_config
    return 6 * c.n_active_params() + 12 * c.n_layer * c.n_head * c.head_dim * c.block_size


def accumulation_steps(config, block_size, n_ranks):
    """Micro-steps that make up batch_tokens; ValueError where none do."""
    micro = config.micro_batch * block_size * n_ranks
    if config.batch_tokens % micro:
        raise ValueError(f"batch_tokens={config.batch_tokens} is not a multiple of {micro} = micro_batch {config.micro_batch} x "
                         f"block_size {block_size} x {n_ranks} ranks; try {math.ceil(config.batch_tokens / micro) * micro}")
    return config.batch_tokens // micro


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


@contextlib.contextmanager
def stop_signals():
    """-> the list of signals received, which the loop looks at after each step. A second Ctrl-C leaves at once."""
    received = []

    def note(number, frame):
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)

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
