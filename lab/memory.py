"""Peak memory of a training step by trace: the real code on tensors without numbers, no GPU needed.

    python -m lab.memory        # writes results/memory.md

torch's FakeTensorMode gives every tensor a shape and a dtype and no memory; a process group that
moves nothing stands in for the other ranks. All storages are counted while they live: weights,
gradients, AdamW's moments, what autograd keeps, what passes by. Run eagerly in bf16, on 1/R of the
rows where experts are spread: a compiled model keeps less.
"""
import contextlib
import importlib
import weakref
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

import train
from support import budget, experts_over_ranks, machine


class Count(TorchDispatchMode):
    """Bytes of all storages that live now, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = weakref.WeakKeyDictionary()  # storage: [bytes]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local part comes by next
        results = function(*args, **(kwargs or {}))
        for tensor in tree_iter(results):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        self.peak = max(self.peak, self.now + within(function, args))
        return results

    def note(self, storage):
        if storage not in self.sizes:
            self.sizes[storage] = size = [0]
            weakref.finalize(storage, self.resize, size, 0)
        self.resize(self.sizes[storage], storage.nbytes())

    def resize(self, size, to):
        self.now += to - size[0]
        size[0] = to
        self.peak = max(self.peak, self.now)


def within(function, args):
    """Bytes that pass by inside the experts' operators, which their fake versions do not show."""
    if function.name() == "nanoexperts::experts":  # activations (N, F)
        return args[5].numel() * args[4].shape[2] * args[1].element_size()
    if function.name() == "nanoexperts::weight_grads":  # the layers' rows, one after the other
        several = len(args[1]) > 1
        return several * sum(factor.nbytes for of_layers in args[1:5] for factor in of_layers)
    return 0


@contextlib.contextmanager
def other_ranks(n_ranks, rows, count):
    """Stand-ins: ranks that answer at once, balanced routing, storages that FSDP resizes."""
    real, ddp, rules = torch.UntypedStorage.resize_, DistributedDataParallel, ShardingPropagator
    shapes = rules._propagate_tensor_meta_non_cached

    def resize(storage, size):
        real(storage, size)
        count.note(storage)

    def shapes_alone(*arguments):  # DTensor asks what a whole tensor would be: none is made
        with _disable_current_modes():
            return shapes(*arguments)

    def balanced(sizes):  # (2, R): rows of this rank's tokens to each rank, and from each
        return [[rows // n_ranks] * n_ranks] * 2

    with contextlib.ExitStack() as stack:
        replace = lambda *args: stack.enter_context(mock.patch.object(*args))
        if n_ranks > 1:
            from torch.testing._internal.distributed.fake_pg import FakeStore
            dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n_ranks)
            stack.callback(dist.destroy_process_group)
            mesh = init_device_mesh("cpu", (n_ranks,))
            replace(machine, "init_device_mesh", lambda *_: mesh)
        replace(torch.UntypedStorage, "resize_", resize)
        replace(rules, "_propagate_tensor_meta_non_cached", shapes_alone)
        replace(experts_over_ranks, "rows_by_rank", balanced)
        replace(train.GPT, "to", lambda model, _: model)
        replace(train.GPT, "init_weights", lambda model: None)
        # on a GPU one kernel, which keeps its input, as LayerNorm's here
        replace(torch.nn.RMSNorm, "forward", lambda norm, x: F.layer_norm(
            x, x.shape[-1:], norm.weight))
        replace(ddp, "_pre_forward", lambda _, *inputs, **options: (inputs, options))
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


def trace(model_config, config, n_ranks=1):
    """Bytes of a rank at the peak of a step of two micro-steps, AdamW's moments at hand -> int."""
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    rows = config.micro_batch * model_config.block_size * (model_config.top_k or 1)
    count, ranks = Count(), machine.Ranks(0, n_ranks, torch.device("cpu"))
    with other_ranks(n_ranks, rows, count), count:
        trainer = SimpleNamespace(model_config=model_config, config=config, ranks=ranks, ddp=None,
                                  dtype=dtype)
        trainer.model = forward = train.make_model(trainer, None)
        optimizer = train.make_optimizer(trainer)
        if n_ranks > 1 and config.shard in ("none", "zero1"):
            forward = trainer.ddp = DistributedDataParallel(
                forward, gradient_as_bucket_view=True, init_sync=False)
            trainer.ddp.register_comm_hook(None, at_once)
        count.peak = 0
        for last in (True, False, True):  # the first for the moments
            with train.Trainer.micro_step(trainer, last):
                run(trainer, forward)
            if last:
                torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=trainer.ddp is None)
    return count.peak


def at_once(_, bucket):
    """DDP's exchange of a bucket."""
    done = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def run(trainer, forward):
    tokens = torch.zeros(trainer.config.micro_batch, trainer.model_config.block_size).long()
    with torch.autocast("cpu", trainer.dtype, enabled=trainer.dtype != torch.float32):
        out = forward(tokens, tokens)
        loss = sum(out.aux.values(), start=out.loss)
    loss.backward()


# ---- results/memory.md

RUNS = [  # a configuration, --shard, ranks, GB by this trace at commit 885439b
    ("moe_182m", "none", 1, "30.1"), ("unipool_182m", "none", 1, "45.4"),
    ("unipool_469m", "none", 1, "178.6"),
    ("unipool_469m", "zero1", 8, ""), ("unipool_978m", "fsdp", 8, ""),
    ("unipool_978m", "ep", 8, "")]
HEAD = """# Peak memory of a training step

By `python -m lab.memory`: traced on tensors without numbers, not measured on a GPU. GB a rank, with
weights, gradients and AdamW, in bf16, run eagerly; sequences of 1,024 tokens. `before` is the same
trace of commit 885439b, where each layer cast the whole pool and kept the cast; compiled, that code
had all layers' pool-sized gradients alive at once (126 GB for unipool_469m before AdamW, by an
audit of its graphs).

| run | ranks x sequences | before | by trace | by --plan | of which, by --plan |
|---|---|---|---|---|---|"""


def configured(name, **changes):
    """config/NAME.py -> ModelConfig, TrainConfig"""
    settings = vars(importlib.import_module(f"config.{name}")) | changes
    return [kind(**{f.name: settings[f.name] for f in fields(kind) if f.name in settings})
            for kind in (train.ModelConfig, train.TrainConfig)]


def main():
    lines = [HEAD]
    for name, shard, n, before in RUNS:
        model_config, config = configured(name, shard=shard)
        plan = budget.memory_per_rank(train.on_meta(model_config), config, n)
        lines.append(
            f"| {name} --shard={shard}{' --recompute' * config.recompute} | {n} x "
            f"{config.micro_batch} | {before} | {trace(model_config, config, n) / 1e9:.1f} | "
            f"{sum(plan.values()) / 1e9:.1f} | {budget.in_gigabytes(plan)} |")
        print(lines[-1], flush=True)
    Path("results/memory.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
