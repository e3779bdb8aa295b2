"""The machine that a model runs on: device, precision, ranks, signals, and sharding."""

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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._pytree import tree_map

from support import experts_over_ranks

# ---- device and precision

def pick_device(name, local_rank=0):
    """auto | cpu | cuda | cuda:N | mps -> torch.device; ValueError where there is none such."""
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
        raise ValueError(f"device={name}: torch {torch.__version__} sees {seen} here; leave "
                         "--device out or use cpu")
    torch.cuda.set_device(number)
    return torch.device(f"cuda:{number}")


def keep_memory():
    """Have glibc keep freed memory. It hands blocks of over 32 MB back to the system, which zeroes
    each page again at the next step; with them kept, steps with large activations took a quarter
    less time (results/log.md). Other C libraries are left alone."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no block gets a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the end of the heap back


def pick_compile(config, device, n_active):
    """Whether to torch.compile -> (bool, reason).

    By device and size alone, so that a resumed run picks the same.
    """
    if config.compile != "auto":
        return config.compile == "true", "as asked"
    if device.type == "cuda":
        triton = importlib.util.find_spec("triton") is not None
        return triton, "a GPU gains from fused kernels" if triton else "triton is not installed"
    if device.type != "cpu":
        return False, "not tried on it"
    if n_active < 5e6:
        return False, "a small model is bound by overhead that compiling leaves"
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        return False, "there is no C++ compiler"
    return True, "large enough for a CPU to gain"


def pick_dtype(config, device, compiled):
    """The dtype of matrix products -> (dtype, reason)."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype), "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU has bf16 tensor cores"
        return torch.float32, "the GPU has no bf16; --dtype=float16 is faster"
    if device.type != "cpu":
        return torch.float32, "safe"
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if compiled and native:
        return torch.bfloat16, "the CPU multiplies bf16, which pays once compiled"
    return torch.float32, "bf16 pays on a CPU only with bf16 instructions and torch.compile"


# ---- ranks, and how a run ends before its time

@dataclass
class Ranks:
    """This process among those that torchrun started: rank of size, and its device."""
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
    """Meet the other processes that torchrun started, if any -> Ranks. Errors name a lost one."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
    ranks = Ranks(rank, size, device)
    if size == 1:
        if config.shard != "none":
            raise ValueError(f"shard={config.shard} needs several ranks: start with torchrun "
                             "--nproc_per_node=N, or shard=none")
        yield ranks
        return
    wait = timedelta(seconds=config.timeout)
    # torchrun's store outlives a lost rank; prefixed, because a process may train several times.
    store = next(dist.rendezvous("env://", timeout=wait))[0]
    store = dist.PrefixStore(f"train{store.add(f'joined{rank}', 1)}", store)
    backend = "cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
    try:
        yield ranks
    except RuntimeError as error:
        exchange = isinstance(error, dist.DistError) or "gloo" in str(error)
        lost = lost_ranks(ranks, store) if exchange else ""
        if lost:
            raise ConnectionError(f"rank {lost} of {size} has vanished or hangs; --init_from="
                                  "resume goes on from the last checkpoint, on any number of "
                                  "ranks") from error
        raise
    finally:
        # gloo's threads need the GIL to free the last tensors; to join them while holding it hangs.
        time.sleep(0.1)
    dist.destroy_process_group()


def lost_ranks(ranks, store, patience=10):
    """An exchange failed: which ranks are not here to say so? -> "1, 3", or "" if all are."""
    deadline, missing = time.monotonic() + patience, [0]
    with contextlib.suppress(RuntimeError):  # no store either: it lives on the first node
        store.set(f"here/{ranks.rank}", "1")
        while missing and time.monotonic() < deadline:
            missing = [r for r in range(ranks.size) if not store.check([f"here/{r}"])]
            time.sleep(0.2 if missing else 0)
    return ", ".join(map(str, missing))


class Stop(list):
    """Signals received."""
    nothing_to_save = False


@contextlib.contextmanager
def stop_signals():
    """-> Stop, which the loop looks at after each step. A second Ctrl-C leaves at once, and so does
    any signal while there is nothing to save, unless other ranks would be left alone. A compiler's
    callbacks may lose the exception, without a word then: it is raised again after two seconds."""
    received, alarm = Stop(), getattr(signal, "SIGALRM", None)  # Windows has none
    received.nothing_to_save = os.environ.get("WORLD_SIZE", "1") == "1"

    def note(number, frame):
        if number == alarm:
            if not received.nothing_to_save:  # the step has ended after all
                return
            number = received[-1]
        leave = received.nothing_to_save or signal.SIGINT in received
        received.append(number)
        if alarm and received.nothing_to_save:
            signal.setitimer(signal.ITIMER_REAL, 2)
        if number == signal.SIGINT and leave:
            raise KeyboardInterrupt
        if received.nothing_to_save:  # SIGTERM: a first step may take an hour
            raise SystemExit(128 + number)
        if number == signal.SIGINT and sys.stderr.isatty():  # os.write: a print may be under way
            os.write(2, b"\nstopping once this step is done and saved; Ctrl-C again: at once\n")

    if threading.current_thread() is not threading.main_thread():  # where Python allows no handlers
        yield received
        return
    numbers = filter(None, (signal.SIGINT, signal.SIGTERM, alarm))
    before, lost = {number: signal.signal(number, note) for number in numbers}, sys.unraisablehook
    sys.unraisablehook = lambda u: received or lost(u)
    try:
        yield received
    finally:
        sys.unraisablehook = lost
        if alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- a model and its optimizer, spread over ranks

def shard_model(model, ranks, dtype, shard):
    """FSDP2 with these units, each gathered when it is used: banks of experts, blocks, the rest.

    Banks travel in `dtype`; the rest in float32, because routers and norms are read at full
    precision. A pool stays gathered from its first use until micro_step ends, or every layer would
    fetch it again, forward and backward; infmoe's banks stay too, because GPT reads them once more
    for its statistics. shard=ep: banks do not travel, their tokens do (experts_over_ranks).
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if shard == "ep":
        experts_over_ranks.check(model.config, ranks.size)
    # Harmless unless such a view is written to.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(ranks.device.type, (ranks.size,))
    banks, owned = banks_of(model), set()
    again = [*model.pools, *(banks if model.config.flavour == "infmoe" else [])]
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    for bank in banks:
        if shard == "ep":
            experts_over_ranks.spread(bank, mesh)
            owned.update(bank.parameters())
        else:
            fully_shard(bank, mesh=mesh, mp_policy=policy, reshard_after_forward=bank not in again)
    for pool in model.pools if shard == "fsdp" else []:
        pool.set_reshard_after_backward(False)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, ignored_params=owned)
    fully_shard(model, mesh=mesh, ignored_params=owned)


def compile_blocks(model):
    """torch.compile block by block, where whole graphs cannot be: fsdp's hooks and ep's exchanges
    stay between them, and so does a bank, which is one operator anyway."""
    for bank in banks_of(model):
        bank.forward = torch.compiler.disable(bank.forward)
    for block in model.blocks:
        block.forward = torch.compile(block.forward, dynamic=False)
    model._loss = torch.compile(model._loss, dynamic=False)


def banks_of(model):
    """Every bank of experts once: pools, or the blocks' own."""
    return list(dict.fromkeys(bank for _, bank in model.expert_layers()))


class ShardedAdamW(torch.optim.AdamW):
    """ZeRO-1: AdamW on this rank's rows of every tensor, after which the ranks gather all rows.

    Rows, not tensors, are dealt out: a pool's two tensors are nearly all of a model. To AdamW a
    tensor is a DTensor, whose local part is a view of the weights; gradients stay whole (DDP).
    """
    def __init__(self, groups, ranks, **options):
        self.mesh = init_device_mesh(ranks.device.type, (ranks.size,))
        self.whole = [p for group in groups for p in group["params"]]
        super().__init__([group | {"params": list(map(self.rows, group["params"]))}
                          for group in groups], **options)

    def rows(self, tensor):
        """This rank's rows of a tensor; the last ranks may have fewer, or none."""
        chunks, rank = tensor.detach().chunk(self.mesh.size()), self.mesh.get_local_rank()
        mine = chunks[rank] if rank < len(chunks) else tensor.detach()[:0]
        return DTensor.from_local(mine, self.mesh, [Shard(0)], run_check=False, shape=tensor.shape,
                                  stride=tensor.stride())

    @torch.no_grad()
    def step(self):
        mine = [p for group in self.param_groups for p in group["params"]]
        for rows, tensor in zip(mine, self.whole):
            rows.grad = self.rows(tensor.grad)
        super().step()
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name
        for rows, tensor in zip(mine, self.whole):  # changed in torch 2.13
            if len(tensor) % self.mesh.size():  # small ones, by way of a copy
                tensor.copy_(rows.full_tensor())
            else:
                gather(tensor.detach(), rows.to_local(), self.mesh.get_group())

    def zero_grad(self, set_to_none=True):
        super().zero_grad()
        for tensor in self.whole:
            tensor.grad = None if set_to_none else tensor.grad.zero_()


def load_optimizer(optimizer, saved):
    """A checkpoint's states into an optimizer that may hold a part of each, or of all.

    The optimizer's options (rates, betas, decay) stay as they are configured now.
    """
    def part(value, param):
        if isinstance(param, DTensor) and value.shape == param.shape:
            return distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
        return value

    params = [param for group in optimizer.param_groups for param in group["params"]]
    options = [dict(group) for group in optimizer.param_groups]
    state = {i: {name: part(value, params[i]) for name, value in entry.items()}
             for i, entry in saved["state"].items()}
    numbers = [{"params": group["params"]} for group in saved["param_groups"]]
    groups = [option | number for option, number in zip(options, numbers)]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for group, option in zip(optimizer.param_groups, options):
        group.update({name: value for name, value in option.items() if name != "params"})


def gather_state(model, optimizer, ranks):
    """State dictionaries of model and optimizer, the same for every way to shard.

    All ranks must come; rank 0 alone is sure to get them.
    """
    def fetch(value):  # one tensor at a time: a GPU has no room for all of them
        if isinstance(value, DTensor):
            value = value.full_tensor()
            return value.cpu() if ranks.rank == 0 else None
        return value

    state = tree_map(fetch, optimizer.state_dict())
    return {name: fetch(value) for name, value in model.state_dict().items()}, state
