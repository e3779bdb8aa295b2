"""model.py: configurations and what they refuse, parameter counts, the transformer against loops
in float64, cache, generation, checkpoints. What every flavour must survive is in test_flavours.py.

  1. what a flavour sets       4. the transformer          7. state that outlives a step
  2. what is refused           5. the forward contract     8. sampling
  3. parameter counts          6. cache and generation     9. checkpoints
"""
import dataclasses
import itertools
import math
import re
from typing import get_args, get_type_hints

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from moe_helpers import (
    CELLS,
    FAMILIES,
    build,
    gradients,
    literal_activation,
    literal_continuous,
    literal_moe,
    random_tokens,
    small,
)
from torch import nn

import moe
from model import GPT, ModelConfig
from support import auxiliary, cpu, decoding, noise, rules
from support.decoding import sample_token

FIELDS = [f.name for f in dataclasses.fields(ModelConfig)]


# ---- 1. What a flavour sets unless it is set by hand.

@pytest.mark.parametrize("overrides, expected", [
    # what a flavour's paper has
    (dict(flavour="switch"),
     dict(n_experts=8, top_k=1, router="softmax", norm_topk_prob=False, balance="layer",
          balance_coef=1e-2, balance_scores="raw", pool_groups=0, n_shared_experts=0, d_expert=64)),
    (dict(flavour="topk"), dict(n_experts=8, top_k=2, router="softmax", norm_topk_prob=True,
                                balance="layer", balance_coef=1e-2)),
    (dict(flavour="deepseek"), dict(n_experts=8, top_k=2, router="sigmoid", norm_topk_prob=True,
                                    balance="bias", balance_coef=1e-3, n_shared_experts=1,
                                    balance_scores=None)),
    (dict(flavour="unipool"), dict(n_experts=16, top_k=1, router="norm", norm_topk_prob=False,
                                   balance="pool", balance_coef=1e-2, pool_groups=1)),  # M = 8 L
    (dict(flavour="infmoe"), dict(infmoe_samples=2, infmoe_rate=0.25, infmoe_dz=64, infmoe_depth=1,
                                  infmoe_mask="post", balance="none", balance_coef=0.0,
                                  d_expert=128,  # 2 * d_ff
                                  n_experts=None, router=None, top_k=None)),
    # what None means
    (dict(), dict(d_ff=64, head_dim=8, n_kv_head=2, tie_embeddings=True, bias=True,
                  activation="gelu", n_experts=None, router=None, balance=None, pool_groups=None,
                  infmoe_rate=None)),
    (dict(arch="llama"), dict(tie_embeddings=False, bias=False, activation="swiglu")),
    (dict(flavour="topk", top_k=1), dict(norm_topk_prob=False)),  # K = 1 never renormalises
    (dict(flavour="deepseek", top_k=1), dict(norm_topk_prob=False)),
    (dict(flavour="unipool", pool_groups=2), dict(n_experts=8)),  # per layer, whatever the groups
    (dict(flavour="unipool", moe_every=2), dict(n_experts=8)),  # counted over layers with experts
    (dict(flavour="unipool", n_layer=6, pool_groups=3), dict(n_experts=16)),
    (dict(flavour="unipool", pool_groups=0, balance="layer"), dict(n_experts=8)),
    (dict(flavour="unipool", n_experts=5), dict(n_experts=5)),  # a reduced pool by one override
    # sigmoid scores sum to anything; the coefficient follows the balance
    (dict(flavour="deepseek", balance="layer"),
     dict(balance_scores="normalised", balance_coef=1e-2)),
    (dict(flavour="switch", balance="none"), dict(balance_coef=0.0)),
    (dict(flavour="infmoe", infmoe_depth=2, infmoe_share_mask=True), dict(infmoe_z="shared")),
    (dict(dropout=0), dict(dropout=0.0)),  # a whole number is a float, too
], ids=str)
def test_defaults(overrides, expected):
    config = ModelConfig(**{"n_layer": 2, "n_head": 2, "d_model": 16, **overrides})
    for name, value in expected.items():
        assert getattr(config, name) == value and type(getattr(config, name)) is type(value), name


@pytest.mark.parametrize("n_layer, moe_every, expected",
                         [(4, 1, [0, 1, 2, 3]), (4, 2, [1, 3]), (5, 2, [1, 3]), (3, 3, [2])])
def test_moe_every_counts_from_the_end_of_each_group(n_layer, moe_every, expected):
    config = small(flavour="switch", n_layer=n_layer, moe_every=moe_every)
    assert config.moe_layers() == expected
    blocks = GPT(config).blocks
    assert [i for i, block in enumerate(blocks) if isinstance(block.ffn, moe.MoE)] == expected
    assert small().moe_layers() == []


# ---- 2. What is refused, with words that name the fields and the way out.

MOE, INF = dict(flavour="topk"), dict(flavour="infmoe")
DEEP = dict(INF, infmoe_depth=2)
ONE_MASK = dict(DEEP, infmoe_share_mask=True)
LOCK = dict(flavour="lock", n_layer=4, n_experts=8, top_k=2, lock_steps=4)
REFUSED = [
    # each field by itself
    (dict(n_layer=0), "n_layer=0|at least 1"), (dict(d_model=-4), "d_model=-4"),
    (dict(vocab_size=0), "vocab_size"), (dict(moe_every=0), "moe_every=0"),
    (dict(n_head=0), "n_head=0"), (dict(n_kv_head=0), "n_kv_head=0"),
    (dict(n_layer=2.5), "n_layer=2.5|int"), (dict(n_layer="2"), "n_layer='2'"),
    (dict(bias=1), "bias=1|bool"), (dict(arch="bert"), "arch='bert'|gpt2|llama"),
    (dict(arch=None), "arch=None"), (dict(flavour="moe"), "flavour='moe'|unipool"),
    (dict(flavour="topk", router="linear"), "router='linear'|sigmoid"),
    (dict(dropout=1.0), "dropout=1.0"), (dict(dropout=-0.1), "dropout=-0.1"),
    (dict(init_std=-1.0), "init_std"), (dict(norm_eps=0.0), "norm_eps"),
    (dict(rope_base=math.inf), "rope_base"), (dict(rope_base=0.0), "rope_base"),
    # sizes that no machine builds: refused before anything is
    (dict(n_layer=100_000), "n_layer=100000|10000"),
    (dict(MOE, n_experts=10**8), "n_experts=100000000"),
    (dict(INF, infmoe_depth=1000), "infmoe_depth=1000"), (dict(d_model=2**41), "d_model"),
    # shapes
    (dict(n_head=4, n_kv_head=3, d_model=16), "n_kv_head=3|n_head=4"),
    (dict(n_head=3), "n_head=3|d_model=16|head_dim"),
    (dict(head_dim=4), "head_dim=4|n_head=2|d_model=16|arch=gpt2"),
    (dict(arch="llama", head_dim=5), "head_dim=5|even"),
    # fields of experts in a dense model
    (dict(n_experts=4), "n_experts|flavour=dense"), (dict(d_expert=8), "d_expert"),
    (dict(top_k=1, router="softmax"), "top_k|router"), (dict(pool_groups=1), "pool_groups"),
    (dict(moe_every=2), "moe_every"), (dict(z_coef=1e-3), "z_coef"),
    (dict(infmoe_rate=0.5), "infmoe_rate"), (dict(coupling="path"), "coupling"),
    # discrete experts
    (dict(MOE, top_k=9), "top_k=9|n_experts=8"), (dict(MOE, top_k=0), "top_k=0"),
    (dict(MOE, n_experts=0), "n_experts=0"), (dict(MOE, d_expert=0), "d_expert=0"),
    (dict(MOE, n_shared_experts=-1), "n_shared_experts=-1"),
    (dict(MOE, top_k=1, norm_topk_prob=True), "norm_topk_prob=True|top_k=1|gradient|top_k >= 2"),
    (dict(MOE, infmoe_samples=2), "infmoe_samples|flavour=topk"),
    (dict(MOE, moe_every=3), "moe_every=3|n_layer=2"),
    # pools and balance
    (dict(MOE, balance="pool"), "balance=pool|pool_groups|balance=layer"),
    (dict(MOE, pool_groups=-1), "pool_groups=-1"),
    (dict(MOE, n_layer=4, pool_groups=3), "pool_groups=3|4 layers"),
    (dict(MOE, n_layer=4, moe_every=2, pool_groups=4), "pool_groups=4|2 layers"),
    (dict(MOE, balance_coef=-1e-2), "balance_coef"), (dict(MOE, z_coef=-1e-3), "z_coef"),
    (dict(MOE, balance="none", balance_coef=1e-2), "balance_coef=0.01|balance=none"),
    (dict(MOE, balance="bias", balance_scores="raw"), "balance_scores=raw|balance=bias"),
    (dict(MOE, balance="none", balance_scores="raw"), "balance_scores=raw|balance=none"),
    (dict(flavour="unipool", pool_groups=0), "balance=pool|pool_groups=0"),
    # specialization and coupling
    (dict(MOE, top_k=1, specialization_coef=2e-3), "specialization_coef|top_k >= 2"),
    (dict(MOE, specialization_coef=-1.0), "specialization_coef"),
    (dict(MOE, coupling_coef=-1.0), "coupling_coef"),
    (dict(MOE, n_layer=1, coupling_coef=1e-3), "coupling_coef|n_layer=1|coupling_coef=0"),
    (dict(MOE, moe_every=2, coupling_coef=1e-3), "coupling_coef|moe_every=2"),
    (dict(MOE, coupling="path"), "coupling=path|coupling_coef"),
    # infinity-MoE
    (dict(INF, top_k=2), "top_k|flavour=infmoe"),
    (dict(INF, n_experts=4, router="norm"), "n_experts|router"),
    (dict(INF, n_shared_experts=0), "n_shared_experts"),
    (dict(INF, balance_scores="raw"), "balance_scores"),
    (dict(INF, balance="bias"), "balance=bias|balance=none"),
    (dict(INF, balance="pool"), "balance=pool"), (dict(INF, z_coef=1e-3), "z_coef"),
    (dict(INF, coupling_coef=1e-3), "coupling_coef"),
    (dict(INF, coupling="path"), "coupling|flavour=infmoe"),
    (dict(INF, backend="grouped"), "backend=grouped|backend=auto"),
    (dict(INF, infmoe_samples=0), "infmoe_samples=0"), (dict(INF, infmoe_dz=0), "infmoe_dz=0"),
    (dict(INF, infmoe_hidden=-1), "infmoe_hidden=-1"),
    (dict(INF, infmoe_components=0), "infmoe_components=0"),
    (dict(INF, infmoe_depth=0), "infmoe_depth=0"),
    (dict(INF, infmoe_rate=0.0), "infmoe_rate=0.0|(0, 1]"),
    (dict(INF, infmoe_rate=1.5), "infmoe_rate=1.5"),
    (dict(INF, infmoe_rate=(0.5, 0.25)), "infmoe_rate|2 entries|infmoe_depth=1"),
    (dict(DEEP, infmoe_rate=(None, None)), "infmoe_rate|flavour=dense"),
    (dict(DEEP, infmoe_rate=(0.5, "x")), "infmoe_rate"),
    (dict(INF, infmoe_rate=()), "infmoe_rate=()"),
    (dict(INF, infmoe_mean_from=1), "infmoe_mean_from=1|infmoe_depth - 1 = 0"),
    (dict(DEEP, infmoe_mean=True, infmoe_mean_from=1), "infmoe_mean=True|infmoe_mean_from=1"),
    (dict(INF, infmoe_share_mask=True), "infmoe_share_mask|infmoe_depth >= 2"),
    (dict(ONE_MASK, infmoe_rate=(0.5, 0.25)), "infmoe_share_mask|infmoe_rate"),
    (dict(ONE_MASK, infmoe_mean_from=1), "infmoe_share_mask|infmoe_mean_from=1"),
    (dict(ONE_MASK, infmoe_z="independent"), "infmoe_share_mask|infmoe_z"),
    (dict(INF, infmoe_samples=1, specialization_coef=1e-3),
     "specialization_coef|infmoe_samples >= 2"),
    (dict(INF, infmoe_mean=True, specialization_coef=1e-3), "specialization_coef|infmoe_mean"),
    (dict(flavour="peer", n_experts=16, top_k=2, specialization_coef=1e-3), "one neuron|d_expert"),
    (dict(INF, infmoe_mean_from=0, specialization_coef=1e-3),
     "specialization_coef|infmoe_mean_from=0"),
    (dict(DEEP, infmoe_rate=(None, 0.5), infmoe_mean_from=1, specialization_coef=1e-3),
     "specialization_coef|infmoe_mean_from=1"),  # the only masked layer uses z = mu
    # UniPool-lock
    (dict(LOCK, n_experts=9), "n_experts=9|4"), (dict(LOCK, pool_groups=0), "pool_groups"),
    (dict(LOCK, top_k=3), "top_k=3"), (dict(LOCK, router="norm"), "lock_steps"),
    (dict(LOCK, balance="bias"), "balance=bias"), (dict(LOCK, lock_steps=-1), "lock_steps=-1"),
]


@pytest.mark.parametrize("overrides, words", REFUSED, ids=lambda v: str(v)[:60])
def test_combinations_without_a_meaning_are_refused(overrides, words):
    with pytest.raises(ValueError) as caught:
        ModelConfig(**{"n_layer": 2, "n_head": 2, "d_model": 16, **overrides})
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words.split("|")), message


HINTS = get_type_hints(ModelConfig)
VALUES = dict(  # what Hypothesis may write into each field: sensible values and their edges
    n_layer=[1, 2, 3, 4, 6], n_head=[1, 2, 4], n_kv_head=[1, 2], d_model=[8, 12, 16],
    d_ff=[1, 7, 16], head_dim=[1, 2, 4, 8], block_size=[8, 9], vocab_size=[257, 300],
    dropout=[0, 0.1], norm_eps=[1e-6, 0], rope_base=[1e4, 100], init_std=[0.02, 0.5, 0],
    n_experts=[1, 2, 7, 8, 13], top_k=[1, 2, 3, 5], n_shared_experts=[0, 1, 2], d_expert=[1, 6, 8],
    balance_coef=[0, 1e-2], z_coef=[0.0, 1e-3], pool_groups=[0, 1, 2, 3], moe_every=[1, 2, 3],
    specialization_coef=[0, 2e-3], coupling_coef=[0, 1e-3], lock_steps=[0, 1, 3],
    lock_coef=[0, 5e-3],
    infmoe_samples=[1, 2, 3], infmoe_dz=[1, 3, 8], infmoe_depth=[1, 2, 3],
    infmoe_rate=[0.25, 1, 1e-9, (0.5, None), (0.75, 0.25), (None, 0.5, 0.5)],
    infmoe_components=[1, 2], infmoe_mean_from=[0, 1, 2], infmoe_hidden=[0, 5],
    backend=["auto", "loop", "grouped"])
for name, hint in HINTS.items():  # the other fields: all they may be
    kinds = [k for k in get_args(hint) or (hint,) if k is not type(None)]
    words = get_args(kinds[0]) or kinds  # of a Literal, or of Literal | None
    words = kinds if isinstance(kinds[0], str) else words
    VALUES.setdefault(name, [True, False] if kinds == [bool] else list(words))
ODD = [None, 0, -1, 1000, -0.5, math.nan, math.inf, "yes", "", True, (), (0.5, "x"), [0.5]]


class Limited(moe.SoftmaxRouter):
    """A router whose scores serve a layer's balance loss and nothing else, one expert a token."""
    max_top_k, supports = 1, frozenset({"layer"})


@pytest.mark.parametrize("overrides, words", [
    (dict(balance="bias"), "balance=bias"), (dict(balance="pool", pool_groups=1), "balance=pool"),
    (dict(z_coef=1e-3), "z_coef=0.001"), (dict(coupling_coef=1e-3), "coupling_coef=0.001"),
    (dict(z_coef=1e-3, balance="bias"), "z_coef|balance=bias"),
    (dict(top_k=2), "at most 1|top_k=2"),
], ids=str)
def test_a_router_is_refused_what_its_class_does_not_support(overrides, words, monkeypatch):
    monkeypatch.setitem(moe.ROUTERS, "softmax", Limited)
    plain = dict(flavour="switch", balance="layer")
    assert small(**plain).router == "softmax"
    with pytest.raises(ValueError, match="router=softmax") as caught:
        small(**{**plain, **overrides})
    message = str(caught.value)
    assert all(word in message for word in words.split("|")) and "\n" not in message
    monkeypatch.undo()
    small(**{**plain, **overrides})  # the class that supports it all


@st.composite
def configurations(draw):
    """A flavour and a few fields, mostly its own; one in ten has a field of any value and type."""
    flavour = draw(st.sampled_from([*VALUES["flavour"], "infmoe"]))
    config = {"n_layer": 2, "n_head": 2, "d_model": 16, "block_size": 8, "flavour": flavour}
    shape = list(rules.OF_THE_BACKBONE)
    experts = [f for f in FIELDS if f not in shape and f.startswith("infmoe_")
               == (flavour == "infmoe")]
    likely = shape if flavour == "dense" else shape + 3 * experts
    for name in draw(st.lists(st.sampled_from(2 * likely + FIELDS), max_size=7, unique=True)):
        config[name] = draw(st.sampled_from(VALUES[name]))
    if draw(st.integers(0, 9)) == 9:
        config[draw(st.sampled_from(FIELDS))] = draw(st.sampled_from(ODD))
    return config


def check_random_configurations(overrides):
    """It trains a step, or is refused in one line that names a field."""
    try:
        config = ModelConfig(**overrides)
    except ValueError as error:
        named = [f for f in FIELDS if re.search(rf"\b{f}\b", str(error))]
        assert named and "\n" not in str(error), f"refused without naming a field: {error}"
        return
    assert ModelConfig(**dataclasses.asdict(config)) == config
    # 1000 layers are right, and slow
    hypothesis.assume(config.vocab_size < 5000 and config.n_params() < 10**7)
    torch.manual_seed(0)
    model, tokens = GPT(config), random_tokens(2, config.block_size)
    check_counts(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss, grads = gradients(model, tokens, tokens, noise_key=torch.tensor([1, 2]))
    assert loss.isfinite(), "the loss"
    for name, grad in grads.items():
        assert grad is not None and grad.isfinite().all(), name
    optimizer.step()
    output = model(tokens, tokens)
    model.update_balance(output.stats)
    assert all(math.isfinite(v) for v in auxiliary.log_columns(model.config, output.stats).values())
    assert all(p.isfinite().all() for p in model.parameters())
    logits = model.eval()(tokens[:, :3]).logits
    assert logits.shape == (2, 3, config.vocab_size) and logits.isfinite().all()


def on_random_configurations(examples, **options):
    """The check above as a test."""
    test = hypothesis.given(configurations())(check_random_configurations)
    return hypothesis.settings(max_examples=examples, deadline=None, **options,
                               suppress_health_check=list(hypothesis.HealthCheck))(test)


test_random_configurations_train_a_step_or_are_refused = on_random_configurations(
    150, derandomize=True)
test_many_random_configurations_train_a_step_or_are_refused = pytest.mark.slow(
    on_random_configurations(4000))


# ---- 3. Parameter counts: closed forms, written without looking at any module.

def has_closed_form(c):
    """Parts that were added later are counted by their modules alone."""
    return c.flavour != "dense" and c.expert in (None, "ffn") and c.router != "relu"


def active_of_banks(c):
    """Per layer top_k experts, or min(1, K*N) of W_1 and W_2 and all of W_z."""
    rows = 2 if c.activation == "swiglu" else 1  # it has a gate
    n_moe = c.n_layer // c.moe_every
    if c.flavour != "infmoe":
        return n_moe * c.top_k * (rows + 1) * c.d_model * c.d_expert
    rates = c.rates()
    first = [r is not None for r in rates].index(True)
    shares = [1.0]
    for i, r in enumerate(rates):
        drawn_at = first if c.infmoe_z == "hierarchical" else i
        is_mean = c.infmoe_mean or (c.infmoe_mean_from is not None
                                    and drawn_at >= c.infmoe_mean_from)
        shares.append(1.0 if r is None else min(1.0, (1 if is_mean else c.infmoe_samples) * r))
    widths, total = [c.d_model] + [c.d_expert] * len(rates), 0
    for i in range(len(rates)):
        total += round(widths[i] * rows * widths[i + 1] * shares[i] * shares[i + 1])
    masks = 1 if c.infmoe_share_mask else sum(r is not None for r in rates)
    return n_moe * (total + round(c.d_expert * c.d_model * shares[-1])
                    + masks * c.d_expert * c.infmoe_dz)


def check_counts(model):
    """Of the modules themselves; what a token uses of the banks by the closed form."""
    config = model.config
    assert config.n_params() == sum(p.numel() for p in model.parameters())
    in_banks = {p for _, bank in model.expert_layers() for p in bank.parameters()}
    rest = sum(p.numel() for p in model.parameters() if p not in in_banks)
    if has_closed_form(config):
        assert config.n_active_params() == rest + active_of_banks(config)
    if config.flavour == "dense":
        assert config.n_active_params() == config.n_params()


@pytest.mark.parametrize("name", [*CELLS, *FAMILIES])
def test_counts_are_the_closed_forms_and_the_modules(name):
    config = small(**{**CELLS, **FAMILIES}[name])
    model = GPT(config)
    check_counts(model)
    assert config.n_active_params() <= config.n_params() or config.pool_groups  # counted per use
    assert model.config is config


def unipool(n_layer, d_model, n_head, **overrides):
    return ModelConfig(arch="llama", flavour="unipool", n_layer=n_layer, d_model=d_model,
                       n_head=n_head, n_kv_head=4, vocab_size=51200, block_size=1024,
                       rope_base=1e6, **overrides)


@pytest.mark.parametrize("n_layer, d_model, n_head, pool, expected", [
    (12, 768, 12, 96, "777.9M"), (24, 1024, 16, 192, "2.588B"), (36, 1024, 16, 288, "3.834B"),
    (48, 1024, 16, 384, "5.081B"), (24, 1536, 16, 192, "5.742B"),
])
def test_unipools_published_sizes(monkeypatch, n_layer, d_model, n_head, pool, expected):
    """As published, to the digits given, counted on the meta device from the modules."""
    # its value has tests of its own
    monkeypatch.setattr(moe, "norm_router_constant", lambda *a: 1.0)
    config = unipool(n_layer, d_model, n_head)
    n = config.n_params()
    assert config.n_experts == pool
    assert (f"{n / 1e6:.1f}M" if n < 1e9 else f"{n / 1e9:.3f}B") == expected
    private = unipool(n_layer, d_model, n_head, pool_groups=0, balance="layer")
    # vanilla MoE stores as much as the pool, but for the narrower routers
    assert private.n_experts == 8
    assert n - private.n_params() == n_layer * (pool - 8) * d_model


def test_infinity_moes_published_sizes():
    """129M active and 186M stored within 1 %, without the position table (as published)."""
    config = ModelConfig(flavour="infmoe", n_layer=12, d_model=768, n_head=12, vocab_size=50257,
                         block_size=1024)
    positions = 1024 * 768
    assert config.d_expert == 6144 and config.infmoe_dz == 64
    assert config.n_params() - positions == pytest.approx(186e6, rel=0.01)
    assert config.n_active_params() - positions == pytest.approx(129e6, rel=0.01)


def test_gpt2_small_is_124m():
    config = ModelConfig(n_layer=12, d_model=768, n_head=12, vocab_size=50257, block_size=1024)
    assert config.n_params() == config.n_active_params() == 124_439_808  # as published


# ---- 4. The transformer in plain loops, float64: one sequence, head by head, position by position.

def literal_norm(x, norm, eps):
    if isinstance(norm, nn.LayerNorm):
        y = (x - x.mean()) / ((x - x.mean()).square().mean() + eps).sqrt() * norm.weight
        return y if norm.bias is None else y + norm.bias
    return x / (x.square().mean() + eps).sqrt() * norm.weight


def literal_rotation(x, position, base):
    """RoPE as complex numbers: the pair (x_j, x_{j + d/2}) turned by position * base^(-2j/d)."""
    half = len(x) // 2
    pairs = torch.complex(x[:half], x[half:])
    angle = position * base ** (-2 * torch.arange(half, dtype=torch.float64) / len(x))
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((turned.real, turned.imag))


def literal_attention(xs, layer, c):
    """xs: list of S vectors (D,) -> list of S vectors (D,)."""
    def project(x, position):
        y = layer.qkv.weight @ x + (layer.qkv.bias if c.bias else 0)
        q, k, v = y.split([n * c.head_dim for n in (c.n_head, c.n_kv_head, c.n_kv_head)])
        if c.qk_norm == "full":
            q = literal_norm(q, layer.q_norm, c.norm_eps)
            k = literal_norm(k, layer.k_norm, c.norm_eps)
        q, k, v = (list(t.split(c.head_dim)) for t in (q, k, v))
        if c.qk_norm == "head":
            q = [literal_norm(h, layer.q_norm, c.norm_eps) for h in q]
            k = [literal_norm(h, layer.k_norm, c.norm_eps) for h in k]
        if c.arch == "llama":
            q, k = ([literal_rotation(h, position, c.rope_base) for h in t] for t in (q, k))
        return q, k, v
    qkv, out = [project(x, i) for i, x in enumerate(xs)], []
    for i in range(len(xs)):
        heads = []
        for h in range(c.n_head):
            g = h * c.n_kv_head // c.n_head  # adjacent query heads share a key/value head
            weights = torch.stack([qkv[i][0][h] @ qkv[j][1][g] / math.sqrt(c.head_dim)
                                   for j in range(i + 1)]).softmax(0)
            heads.append(sum(w * qkv[j][2][g] for j, w in enumerate(weights)))
        out.append(layer.out.weight @ torch.cat(heads) + (layer.out.bias if c.bias else 0))
    return out


def literal_ffn(xs, model, i, keys, tokens):
    """The i-th block's FFN on one sequence; pools are groups of adjacent layers."""
    c, layer, stacked = model.config, model.blocks[i].ffn, torch.stack(xs)
    if isinstance(layer, moe.FFN):
        hidden = [literal_activation(layer.w_in.weight @ x + (layer.w_in.bias if c.bias else 0),
                                     layer.activation) for x in xs]
        return [layer.w_out.weight @ h + (layer.w_out.bias if c.bias else 0) for h in hidden]
    place, n_moe = c.moe_layers().index(i), len(c.moe_layers())
    bank = model.pools[place // (n_moe // c.pool_groups)] if c.pool_groups else layer.bank
    if c.flavour != "infmoe":
        return list(literal_moe(stacked, layer, bank, tokens)[0])
    return list(literal_continuous(stacked, layer.router(stacked, keys), bank))


def literal_gpt(model, tokens, noise_key=0):
    """tokens (S,) -> logits (S, V)."""
    c, keys = model.config, noise.noise_seeds(torch.tensor([noise_key]), torch.arange(len(tokens)))
    xs = [model.wte.weight[t] + (model.wpe.weight[i] if c.arch == "gpt2" else 0)
          for i, t in enumerate(tokens)]
    for i, block in enumerate(model.blocks):
        attended = literal_attention([literal_norm(x, block.norm1, c.norm_eps) for x in xs],
                                     block.attention, c)
        xs = [x + a for x, a in zip(xs, attended)]
        fed = literal_ffn([literal_norm(x, block.norm2, c.norm_eps) for x in xs], model, i, keys,
                          tokens)
        xs = [x + f for x, f in zip(xs, fed)]
    return torch.stack([model.head.weight @ literal_norm(x, model.norm, c.norm_eps) for x in xs])


LITERAL = [
    dict(), dict(bias=False), dict(qk_norm="full", n_kv_head=1, tie_embeddings=False),
    dict(arch="llama"), dict(arch="llama", rope_base=100, norm_eps=0.1),
    dict(arch="llama", bias=True, tie_embeddings=True, activation="gelu"),
    dict(arch="llama", n_head=4, n_kv_head=2, qk_norm="head"),
    dict(arch="llama", n_head=4, n_kv_head=2, qk_norm="full"),
    dict(arch="llama", n_head=3, n_kv_head=1, head_dim=6),  # head_dim * n_head != D
    dict(flavour="switch", n_experts=13), dict(flavour="topk", n_experts=5, top_k=5),  # K = E
    dict(flavour="topk", n_layer=4, moe_every=2, arch="llama"),
    dict(flavour="topk", backend="loop"), dict(flavour="topk", router="norm", top_k=3),
    dict(flavour="deepseek", n_shared_experts=2, d_expert=5, arch="llama"),
    dict(flavour="deepseek", activation="swiglu"),
    dict(flavour="hash", top_k=3, n_experts=5), dict(flavour="hash", pool_groups=1, arch="llama"),
    dict(flavour="unipool", n_layer=4, pool_groups=2),
    dict(flavour="unipool", n_layer=6, pool_groups=3, top_k=2, arch="llama"),
    dict(flavour="unipool", n_layer=4, pool_groups=4),
    dict(flavour="unipool", n_layer=4, moe_every=2, pool_groups=2),
    dict(flavour="infmoe", infmoe_dz=4, activation="swiglu"),
    dict(flavour="infmoe", infmoe_dz=4, n_layer=4, pool_groups=2, arch="llama"),
    dict(flavour="infmoe", infmoe_dz=4, infmoe_depth=2, infmoe_z="hierarchical", infmoe_mask="pre",
         arch="llama"),
]


@pytest.mark.parametrize("overrides", LITERAL, ids=str)
def test_gpt_is_the_literal_transformer(overrides):
    """Logits, and the gradient of every parameter."""
    model = build(block_size=7, vocab_size=11, **overrides).double().eval()
    for p in model.parameters():
        if p.ndim == 1:
            nn.init.normal_(p, 1, 0.3)  # norms and biases must matter
    tokens, keys = random_tokens(2, 6, 11), torch.tensor([0, 2**40 + 1])
    logits = model(tokens, noise_key=keys).logits
    expected = torch.stack([literal_gpt(model, *pair) for pair in zip(tokens, keys.tolist())])
    atol = 1e-9 if model.config.arch == "gpt2" else 1e-6  # rotary angles are float32
    assert torch.allclose(logits, expected, atol=atol)
    assert torch.allclose(model(tokens[:1]).logits, logits[:1], atol=1e-12)  # no key is key 0
    parameters = list(model.parameters())
    ours, literal = (torch.autograd.grad(y.sin().sum(), parameters) for y in (logits, expected))
    for (name, _), a, b in zip(model.named_parameters(), ours, literal):
        assert torch.allclose(a, b, rtol=1e-5, atol=10 * atol) and b.any(), name


def test_initial_scales():
    """init_std, or / sqrt(2 L) for what writes into the residual stream; first loss log V."""
    model = GPT(ModelConfig(n_layer=8, n_head=2, d_model=64, vocab_size=500, init_std=0.02))
    block = model.blocks[3]
    for weight in (model.wte.weight, model.wpe.weight, block.attention.qkv.weight,
                   block.ffn.w_in.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    for weight in (block.attention.out.weight, block.ffn.w_out.weight):
        assert weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    loss = model(random_tokens(4, 64, 500), random_tokens(4, 64, 500, seed=1)).loss.item()
    assert loss == pytest.approx(math.log(500), rel=0.02)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_built_on_the_meta_device_is_the_same_model(name):
    """to_empty leaves garbage in parameters and buffers; init_weights must overwrite it all."""
    config = small(**FAMILIES[name])
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu")
    for t in (*model.parameters(), *model.buffers()):
        t.data.fill_(math.nan)
    torch.manual_seed(0)
    model.init_weights()
    torch.manual_seed(0)
    expected = GPT(config).state_dict()
    assert list(model.state_dict()) == list(expected)
    for key, value in model.state_dict().items():
        assert value.isfinite().all(), key
        assert value.numel() < 16 or value.std() == pytest.approx(expected[key].std(), rel=0.5), key


# ---- 5. What forward returns.

@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_in_training_evaluation_and_inference(name):
    """The loss is the mean of -log p over the targets that count: a negative one is left out."""
    model, tokens = build(**FAMILIES[name]), random_tokens(2, 9)
    targets = random_tokens(2, 9, seed=1)
    targets[0, :3], targets[1, 5] = -100, -1
    layers = len(model.config.moe_layers())
    training = model.train()(tokens, targets, return_routings=True)
    assert training.logits is None and training.loss.ndim == 0 and len(training.routings) == layers
    for output in (model.eval()(tokens, targets), model.train()(tokens)):
        assert output.aux == {} and output.stats == {} and output.routings == []
    evaluation, inference = model.eval()(tokens, targets), model(tokens)
    assert torch.equal(evaluation.logits, inference.logits) and inference.loss is None
    terms = [-evaluation.logits[b, s].double().softmax(-1)[targets[b, s]].log()
             for b, s in itertools.product(range(2), range(9)) if targets[b, s] >= 0]
    expected = pytest.approx(sum(terms).item() / 14, rel=1e-5)
    assert evaluation.loss.item() == expected and training.loss.item() == expected


def test_too_many_positions_are_refused():
    model = build().eval()
    with pytest.raises(ValueError, match=r"17 positions .* block_size=16"):
        model(random_tokens(1, 17))
    cache = decoding.KVCache(model.config, 1, "cpu", torch.float32)
    model(random_tokens(1, 10), cache=cache)
    with pytest.raises(ValueError, match=r"17 positions"):
        model(random_tokens(1, 7), cache=cache)
    assert cache.length == 10


@pytest.mark.parametrize("name", FAMILIES)
def test_dropout_has_its_four_places(name, monkeypatch):
    """GPT-2's: embeddings, attention weights, and what attention and FFN add; in training alone."""
    model, calls, weights = build(dropout=0.3, **FAMILIES[name]), [], []
    for module in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        assert module.p == 0.3
        module.register_forward_hook(lambda *args: calls.append(1))
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention",
                        lambda *a, **k: weights.append(k["dropout_p"]) or attend(*a, **k))
    for training, p in ((True, 0.3), (False, 0.0)):
        calls.clear(), weights.clear()
        model.train(training)(random_tokens(1, 4))
        assert len(calls) == 1 + 2 * model.config.n_layer and weights == [p] * model.config.n_layer


@pytest.mark.parametrize("overrides", [dict(), dict(infmoe_depth=2), dict(pool_groups=1)], ids=str)
def test_layers_draw_different_noise(overrides):
    """Every hidden layer of every block has its own stream: no two standardised samples agree."""
    model = build(flavour="infmoe", infmoe_dz=16, n_layer=3, **overrides).eval()
    codes = sum(model(random_tokens(2, 16), return_routings=True).routings, ())
    noise = torch.stack([((c.z - c.mu) / (c.logvar / 2).exp()).flatten() for c in codes])
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 5 / math.sqrt(noise.shape[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_recompute_changes_nothing(name):
    """Blocks run again in the backward pass: loss, gradients, generator equal bit for bit."""
    model, keys, results = build(dropout=0.2, **FAMILIES[name]), torch.tensor([3, 4]), []
    tokens, targets = random_tokens(2, 9), random_tokens(2, 9, seed=1)
    for model.recompute in (False, True):
        torch.manual_seed(3)
        results.append((*gradients(model, tokens, targets, noise_key=keys), torch.get_rng_state()))
    (loss, grads, rng), (loss2, grads2, rng2) = results
    assert torch.equal(loss, loss2) and torch.equal(rng, rng2)
    for key in grads:
        assert torch.equal(grads[key], grads2[key]), key


# ---- 6. KV cache and generation (every flavour is in test_flavours.py).

@pytest.mark.parametrize("pieces", [(16,), (1,) * 16, (5, 1, 7, 3), (15, 1), (1, 15), (8, 8)])
@pytest.mark.parametrize("overrides", [dict(), dict(arch="llama", n_head=4, n_kv_head=2),
                                       dict(flavour="infmoe", arch="llama")],
                         ids=str)
def test_prefill_in_pieces_equals_one_piece(overrides, pieces):
    """A chunk sees the cache and itself up to the diagonal; positions and noise go on."""
    model, tokens = build(**overrides).double().eval(), random_tokens(2, 16)
    cache, logits = decoding.KVCache(model.config, 2, "cpu", torch.float64), []
    with torch.no_grad():
        for piece in tokens.split(pieces, dim=1):
            logits.append(model(piece, cache=cache).logits)
        expected = model(tokens).logits
    assert cache.length == 16 and torch.allclose(torch.cat(logits, dim=1), expected, atol=1e-9)
    assert cache.k.shape[2] == model.config.n_kv_head  # not one per query


# shorter, one below, exactly, one above, far above the context
@pytest.mark.parametrize("prompt, size", [*itertools.product([1, 15, 16, 17, 40], [16]), (3, 1)])
def test_context_slides_past_block_size(prompt, size):
    """At block_size + 1 tokens the newest half stays: generate against that rule."""
    model, tokens = build(block_size=size).eval(), random_tokens(1, prompt)
    kept, expected = tokens, []
    with torch.no_grad():
        for _ in range(30):
            if kept.shape[1] > size:
                kept = kept[:, -max(1, size // 2):]
            expected.append(model(kept).logits[:, -1].argmax(-1, keepdim=True))
            kept = torch.cat((kept, expected[-1]), dim=1)
    for use_cache in (True, False):
        got = list(model.generate(tokens, 30, temperature=0, use_cache=use_cache))
        assert len(got) == 30 and all(t.shape == (1, 1) for t in got)
        assert torch.equal(torch.cat(got), torch.cat(expected))


def test_generation_is_lazy_and_costs_one_position_per_token(monkeypatch):
    model, lengths, forward = build().eval(), [], GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, tokens, **k: lengths.append(tokens.shape[1])
                        or forward(self, tokens, **k))
    stream = model.generate(random_tokens(1, 5), 4)
    assert lengths == [] and next(stream) is not None and lengths == [5]
    assert len(list(stream)) == 3 and lengths == [5, 1, 1, 1]
    list(model.generate(random_tokens(1, 5), 3, use_cache=False))
    assert lengths[4:] == [5, 6, 7]


# ---- 7. State that outlives a step, and the log's columns.

def stats_of(counts, tokens=10.0, entropy=0.0):
    counts = torch.tensor(counts, dtype=torch.float32)
    return {"counts": counts, "tokens": torch.tensor([tokens]),
            "entropy": torch.full((len(counts),), entropy * tokens)}


def test_biases_move_by_the_load_of_their_bank():
    """Private experts: by their own; two pools of two layers: by the sum of the layers' counts."""
    model = build(flavour="deepseek", n_experts=4, balance_coef=0.5)
    model.update_balance(stats_of([[6, 1, 1, 0], [2, 2, 2, 2]]))  # means 2 and 2
    biases = lambda model: [b.ffn.router.bias.tolist() for b in model.blocks]
    assert biases(model) == [[-0.5, 0.5, 0.5, 0.5], [0, 0, 0, 0]]
    pooled = build(flavour="deepseek", n_layer=4, n_experts=2, top_k=1, pool_groups=2,
                   balance_coef=0.5)
    pooled.update_balance(stats_of([[3, 1], [0, 4], [4, 0], [1, 1]]))  # pools: [3, 5] and [5, 1]
    assert biases(pooled) == [[0.5, -0.5]] * 2 + [[-0.5, 0.5]] * 2


def test_path_estimates_are_a_running_mean_of_transitions():
    """paths moves a tenth of the way to observed transitions; rows of idle experts stay."""
    model = build(flavour="topk", n_experts=3, n_layer=3, coupling_coef=1e-3, coupling="path")
    assert torch.equal(model.paths, torch.full((2, 3, 3), 1 / 3)) and "paths" in model.state_dict()
    counts = torch.tensor([[[2.0, 1, 1], [0, 0, 0], [0, 5, 0]], [[1, 1, 1], [0, 0, 9], [0, 0, 0]]])
    model.update_balance({**stats_of([[1, 1, 1]] * 3), "paths": counts})
    for pair, e, v in itertools.product(range(2), range(3), range(3)):
        seen = counts[pair, e].sum().item()
        expected = 1 / 3 if seen == 0 else 0.9 / 3 + 0.1 * counts[pair, e, v].item() / seen
        assert model.paths[pair, e, v].item() == pytest.approx(expected, abs=1e-6)
    assert torch.allclose(model.paths.sum(-1), torch.ones(2, 3))


def test_routing_columns_by_hand():
    """Means over banks; a pool's counts are added over its layers before."""
    counts = [[8, 0, 0, 0], [2, 2, 2, 2]]
    private = auxiliary.log_columns(
        ModelConfig(flavour="switch", n_experts=4, n_layer=2), stats_of(counts, entropy=0.3))
    assert private == pytest.approx({"imbalance": 2.5, "entropy": 0.3, "max_share": 2.5,
                                     "dead_share": 0.375})
    # [10, 2, 2, 2] of 16
    pooled = auxiliary.log_columns(
        ModelConfig(flavour="unipool", n_experts=4, n_layer=2), stats_of(counts, entropy=0.3))
    assert pooled == pytest.approx({"imbalance": 4 * 112 / 256, "entropy": 0.3, "max_share": 2.5,
                                    "dead_share": 0})


@pytest.mark.parametrize("overrides", [
    dict(), dict(infmoe_depth=2, infmoe_z="hierarchical"), dict(balance="layer", pool_groups=1)
], ids=str)
def test_infmoe_columns_against_the_codes(overrides):
    """sigma and the spread of mu from the codes; neurons' use counted from the masks."""
    model, tokens = build(flavour="infmoe", infmoe_dz=8, **overrides).train(), random_tokens(4, 16)
    for density in [m for m in model.modules() if isinstance(m, moe.GaussianRouter)]:
        nn.init.normal_(density.logvar.bias)
    output = model(tokens, tokens, return_routings=True)
    columns = auxiliary.log_columns(model.config, output.stats)
    codes = [c for layer in output.routings for c in layer]
    sigma = torch.stack([(c.logvar / 2).exp().mean() for c in codes]).mean()
    assert columns["sigma"] == pytest.approx(sigma.item(), rel=1e-4)
    mu = torch.stack([c.mu.mean(1) for c in codes])  # (codes, T, dz)
    assert columns["mu_spread"] == pytest.approx(mu.std(1, correction=0).mean().item(), rel=1e-3)
    banks = [model.pools[0] if model.pools else b.ffn.bank for b in model.blocks]
    masks = [m for bank, layer in zip(banks, output.routings) for m in bank.masks(layer)]
    counts = torch.stack([(m != 0).float().sum((0, 1)) for m in masks])
    assert torch.equal(output.stats["counts"], counts)
    q = counts / counts.sum(-1, keepdim=True)
    entropy = -(q * q.clamp_min(1e-30).log()).sum(-1) / math.log(64)
    assert columns["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-4)
    assert columns["dead_share"] == pytest.approx((counts == 0).float().mean().item())


@pytest.mark.parametrize("balance, seen", [("none", 192), ("layer", 576)])
def test_infmoe_statistics_of_a_long_batch(balance, seen):
    """Of at most 256 tokens (here every third), and of all where they are balanced."""
    model, tokens = build(flavour="infmoe", block_size=64, balance=balance), random_tokens(9, 64)
    assert model.train()(tokens, tokens).stats["tokens"].item() == seen


def test_infmoe_statistics_meet_other_positions_in_every_sequence(monkeypatch):
    """At block_size 1024 an even stride would ask the same few positions of all sequences."""
    model = build(flavour="infmoe", n_layer=1, block_size=1024).train()
    met = []
    every_nth = auxiliary.every_nth

    def spy(codes, step):
        index = torch.arange(codes[0].mu.shape[0])
        met.append(every_nth([moe.Codes(index, index, index)], step)[0].mu)
        return every_nth(codes, step)
    monkeypatch.setattr(auxiliary, "every_nth", spy)
    for batch in (2, 4):
        tokens = random_tokens(batch, 1024)
        model(tokens, tokens)
        assert len(met[-1]) > 200 and (met[-1] % 1024).unique().numel() == len(met[-1])


def test_set_samples():
    """Any K at inference (more come nearer to the mean), or z = mu, and back."""
    model, tokens = build(flavour="infmoe", infmoe_dz=8).double().eval(), random_tokens(1, 16)
    at = lambda key: model(tokens, noise_key=torch.tensor([key]), return_routings=True)
    trained = at(1).logits
    spread = {}
    for n in (1, 16, 256):
        model.set_samples(n)
        assert at(1).routings[0][0].z.shape[1] == n
        spread[n] = (at(1).logits - at(2).logits).norm().item()
    assert spread[1] > spread[16] > spread[256]
    model.set_samples(mean=True)
    assert torch.equal(at(1).logits, at(2).logits) and at(1).routings[0][0].z.shape[1] == 1
    model.set_samples(2, mean=False)
    assert torch.equal(at(1).logits, trained)


def test_set_samples_keeps_what_was_trained_without_sigma():
    model = build(flavour="infmoe", infmoe_depth=2, infmoe_mean_from=1).eval()
    tokens = random_tokens(1, 8)
    before = model(tokens).logits
    model.set_samples(mean=False)  # the second hidden layer has no Sigma to return to
    assert torch.equal(model(tokens).logits, before)
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"n_samples={bad}"):
            model.set_samples(bad)
    with pytest.raises(ValueError, match="flavour=switch"):
        build(flavour="switch").set_samples(2)


# ---- 8. Sampling one token, by hand.

LOGITS = torch.tensor([[0.5, 0.05, 0.25, 0.2]]).log()


def drawn(logits=LOGITS, n=600, temperature=1.0, top_k=None, top_p=None):
    generator = torch.Generator().manual_seed(0)
    tokens = sample_token(logits.expand(n, -1), temperature, top_k, top_p, generator)
    assert tokens.shape == (n, 1)
    return torch.bincount(tokens.flatten(), minlength=logits.shape[1]) / n


@pytest.mark.parametrize("options, expected", [
    (dict(), [0.5, 0.05, 0.25, 0.2]),
    (dict(top_k=1), [1, 0, 0, 0]), (dict(top_k=2), [2 / 3, 0, 1 / 3, 0]),
    (dict(top_k=100), [0.5, 0.05, 0.25, 0.2]),
    (dict(top_p=0.5), [1, 0, 0, 0]),  # the first token alone reaches 0.5
    (dict(top_p=0.51), [2 / 3, 0, 1 / 3, 0]),  # and here it does not
    (dict(top_p=0.76), [0.5 / 0.95, 0, 0.25 / 0.95, 0.2 / 0.95]), (dict(top_p=1e-9), [1, 0, 0, 0]),
    (dict(top_p=1.0), [0.5, 0.05, 0.25, 0.2]),
    # top_p of what top_k left: 0.526 + 0.263 < 0.8
    (dict(top_k=3, top_p=0.8), [0.5 / 0.95, 0, 0.25 / 0.95, 0.2 / 0.95]),
    (dict(top_k=3, top_p=0.7), [2 / 3, 0, 1 / 3, 0]),
    (dict(temperature=0.5), [0.7246, 0.0072, 0.1812, 0.1159]),  # squares, normalised
    (dict(temperature=0), [1, 0, 0, 0]), (dict(temperature=0, top_k=3, top_p=0.1), [1, 0, 0, 0]),
])
def test_sample_token(options, expected):
    shares = drawn(**options)
    assert torch.equal(shares == 0, torch.tensor(expected) == 0)  # nothing outside the set
    assert (shares - torch.tensor(expected)).abs().max() < 0.08


@pytest.mark.parametrize("top_k, top_p", [(None, None), (2, None), (None, 0.9)])
def test_sample_token_rows_are_independent(top_k, top_p):
    logits = torch.full((3, 5), -1e9)
    logits[torch.arange(3), torch.tensor([4, 0, 2])] = 0
    assert sample_token(logits, 1.0, top_k, top_p, None).flatten().tolist() == [4, 0, 2]


# ---- 9. Checkpoints.

def test_every_weight_has_one_name():
    for name, overrides in CELLS.items():
        model = build(**overrides)
        names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
        tied = {"head.weight"} if model.config.tie_embeddings else set()
        assert len(names) - len(tied) == len(list(model.parameters())), name
        assert sum(".bank." in n for n in names) == 0 or not model.config.pool_groups, name


def test_missing_checkpoint_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.py --out_dir="):
        GPT.from_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize("shape", [(2, 3, 7, 4), (1, 1, 2, 8), (1, 2, 512, 4)])
def test_plain_attention_is_torchs(shape):
    """What a CPU uses in bf16: outputs and gradients of torch's fused attention, in float64."""
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    ours = cpu.plain_attention(*inputs)
    fused = F.scaled_dot_product_attention(*inputs, is_causal=True)
    assert torch.allclose(ours, fused, atol=1e-6)  # scores are fp32
    grads = [torch.autograd.grad((out * inputs[0]).sum(), inputs) for out in (ours, fused)]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*grads))


@pytest.mark.parametrize("length, plain", [(1, False), (2, True), (512, True), (513, False)])
def test_bf16_on_a_cpu_takes_plain_attention_up_to_512_tokens(monkeypatch, length, plain):
    gpt = GPT(ModelConfig(n_layer=1, n_head=2, d_model=16, block_size=513, vocab_size=20))
    tokens, called = torch.randint(20, (1, length)), []
    exact = gpt(tokens).logits
    honest = cpu.plain_attention
    monkeypatch.setattr(cpu, "plain_attention", lambda *a: called.append(1) or honest(*a))
    with torch.autocast("cpu", torch.bfloat16):
        logits = gpt(tokens).logits
    assert bool(called) == plain and (logits - exact).norm() < 0.02 * exact.norm()
