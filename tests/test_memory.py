"""--plan against a trace of the real code on tensors without numbers (lab/memory.py)."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import train
from lab import memory
from support import budget

PAPERS = ("llama_182m", "moe_182m", "unipool_182m", "unipool_lock_182m", "unipool_469m",
          "unipool_650m", "unipool_830m", "unipool_978m", "gpt2_small", "gpt2_medium", "moe_small",
          "switch_small", "infmoe_small", "infmoe_medium", "infmoe_deep")
FEW = [("llama_182m", "zero1"), ("moe_182m", "ep"), ("infmoe_small", "fsdp"),
       ("unipool_469m", "none"), ("unipool_830m", "fsdp"), ("unipool_978m", "ep")]


def planned(model_config, config, n):
    return sum(budget.memory_per_rank(train.on_meta(model_config), config, n).values())


def test_count():
    """Storages count once, while they live; a view is no storage."""
    with FakeTensorMode(), memory.Count() as count:
        a = torch.zeros(1000)
        b = a.view(10, 100).T
        c = a + 1
        assert count.now == 8000
        del a, c
        assert count.now == 4000 and b.shape == (100, 10)
        del b
    assert (count.now, count.peak) == (0, 8000)


@pytest.mark.parametrize(("name", "shard"), FEW)
def test_plan_is_what_lives(name, shard):
    """At a fraction of the depth and of the pool."""
    model_config, config = memory.configured(name, shard=shard, n_layer=2, micro_batch=4)
    if model_config.pool_groups:
        model_config = train.replace(model_config, n_experts=16)
    found = memory.trace(model_config, config, 4)
    assert planned(model_config, config, 4) == pytest.approx(found, rel=0.1)


def test_unipool_469m_fits_one_card_of_80_gb():
    assert memory.trace(*memory.configured("unipool_469m", shard="none")) < 80e9


@pytest.mark.parametrize("options", [{}, dict(flavour="infmoe"), dict(flavour="topk", n_experts=5),
                                     dict(flavour="peer", n_experts=16, top_k=4)])
def test_ep_is_not_planned_where_it_cannot_run(options):
    model = train.on_meta(train.ModelConfig(n_layer=2, **options))
    config = train.TrainConfig(shard="ep", micro_batch=1)
    with pytest.raises(ValueError, match="shard=ep"):
        budget.memory_per_rank(model, config, 4)
    assert "=ep" not in budget.cheapest(model, config, 4, 80e9)


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["none", "zero1", "fsdp", "ep"])
@pytest.mark.parametrize("name", PAPERS)
def test_plan_of_the_papers_runs(name, shard):
    model_config, config = memory.configured(name, shard=shard)
    n = 8 if (model_config.n_experts or 8) % 8 == 0 else 2
    if shard == "ep" and not model_config.n_experts:
        pytest.skip("no experts to deal out")
    found = memory.trace(model_config, config, n)
    assert planned(model_config, config, n) == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("options", [
    dict(arch="gpt2"), dict(arch="llama"), dict(flavour="switch"), dict(flavour="infmoe"),
    dict(arch="llama", flavour="topk"), dict(arch="llama", flavour="deepseek")])
def test_plan_in_float32(options):
    """As on a CPU; every flavour's forward and backward pass, and AdamW, on shapes alone."""
    shape = dict(n_layer=4, d_model=64, n_head=4, block_size=64)
    model_config = train.ModelConfig(**shape, **options)
    config = train.TrainConfig(micro_batch=64, batch_tokens=8192, dtype="float32")
    found = memory.trace(model_config, config)
    assert planned(model_config, config, 1) == pytest.approx(found, rel=0.1)


def test_zero1_deals_out_all_but_a_rank_s_share():
    model_config, config = memory.configured("unipool_182m", n_layer=2, n_experts=16, micro_batch=1)
    peaks = [memory.trace(model_config, train.replace(config, shard=shard), 4)
             for shard in ("none", "zero1")]
    assert peaks[0] - peaks[1] == pytest.approx(8 * model_config.n_params() * 3 / 4, rel=0.01)


class Sent(TorchDispatchMode):
    """Bytes of the rows given to all_to_all."""
    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "all_to_all" in function.name() and args[0].dim() == 2 and args[0].shape[1] > 1:
            self.total += args[0].nbytes
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", [False, True])
def test_ep_sends_what_the_plan_says(recompute):
    model_config, config = memory.configured("moe_182m", n_layer=3, micro_batch=2, top_k=2,
                                             n_experts=4, shard="ep", recompute=recompute)
    with Sent() as sent:
        memory.trace(model_config, config, 4)
    model, micro_steps = train.on_meta(model_config), 3
    of = lambda **changes: budget.link_traffic(model, train.replace(config, **changes), 4) * 4 / 3
    half = config.batch_tokens // 2
    rows = of() - of(micro_batch=1, batch_tokens=half)  # half of them: the rest is alike
    tokens = 3 * 2 * 2 * 1024  # layers x choices x sequences x positions
    assert sent.total == micro_steps * tokens * 768 * 2 * (6 if recompute else 4)
    assert rows == pytest.approx(sent.total / micro_steps / 2, rel=1e-6)


class Products(TorchDispatchMode):
    """How often the weights' gradients are computed."""
    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.n += function.name() == "nanoexperts::weight_grads"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shard", ["fsdp", "ep"])
def test_a_sharded_pool_gets_one_gradient(shard, recompute):
    """In each of the trace's three micro-steps, not one for each layer."""
    model_config, config = memory.configured("unipool_182m", n_layer=3, n_experts=4, micro_batch=1,
                                             shard=shard, recompute=recompute)
    with Products() as products:
        memory.trace(model_config, config, 2)
    assert products.n == 3


def test_cheapest():
    """The least traffic among what fits; smaller micro-batches last; or none."""
    model_config, config = memory.configured("unipool_978m", micro_batch=8)
    model = train.on_meta(model_config)
    of = lambda n, gigabytes: budget.cheapest(model, config, n, gigabytes * 1e9)
    assert of(8, 80) == "--shard=ep" and of(1, 1000) == "--shard=none"
    assert of(8, 33) == "--shard=ep --recompute"
    assert of(8, 25) == "--shard=ep --micro_batch=4"
    assert of(1, 80) == of(7, 10) == "none: more GPUs"  # 7 divides no 192 experts
