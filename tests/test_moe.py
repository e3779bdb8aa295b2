"""moe.py and losses.py against literal formulas: loops in float64 that a reader can check line by
line; transformers where it has the model.

  1. discrete routers          4. infinity-MoE: noise            7. losses
  2. NormRouter's constant     5. infinity-MoE: routers          8. diagnostics
  3. routers with experts      6. infinity-MoE: the bank
"""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from moe_helpers import code_router, initialise, literal_continuous
from scipy import stats
from torch import nn
from torch.autograd import gradcheck

import losses
import moe
from support import noise
from support.deep import gated

T, D, E, K = 7, 5, 6, 3  # tokens, model width, experts, choices: all different, none aligned
WIDTH = 4  # of an expert
DZ, SAMPLES = 4, 3  # of a code; per token


def normal(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make(module, std=0.7):
    """A module in float64 without small weights: a zero or a one would hide a missing term."""
    initialise(module, std, std)
    for p in module.parameters():
        if p.ndim == 1 or not p.any():
            nn.init.normal_(p, mean=0.3, std=0.3)
    return module.double()


def equal(ours, theirs, atol=1e-12):
    return torch.allclose(ours, theirs, atol=atol)


def gradients(loss, parameters):
    return torch.autograd.grad(loss, list(parameters), retain_graph=True)


def gradients_are_finite_differences(module, outputs, *inputs):
    """Of outputs(module(*inputs)) in the first input and every parameter."""
    names, (x, *rest) = [n for n, _ in module.named_parameters()], inputs
    call = lambda x, *p: outputs(
        torch.func.functional_call(module, dict(zip(names, p)), (x, *rest)))
    return gradcheck(call, (x, *module.parameters()), atol=1e-6)


# ---- 1. Discrete routers: for every token, the formula in plain Python.

LITERAL_SCORES = {
    "softmax": lambda z, router: [math.exp(v) / sum(map(math.exp, z)) for v in z],
    "sigmoid": lambda z, router: [1 / (1 + math.exp(-v)) for v in z],
    "norm": lambda z, router: [router.sigma.item() * router.c * max(0, v) / (math.hypot(*z) + 1e-8)
                               for v in z]}


@pytest.mark.parametrize("kind", moe.ROUTERS)
@pytest.mark.parametrize("top_k", [1, 2, E])
def test_every_router_gives_a_routing(kind, top_k):
    """Shapes, finite gates and gradients, float32 under autocast, tokens that ignore each other."""
    if (moe.ROUTERS[kind].max_top_k or E) < top_k:
        return
    router, x, token_ids = make(moe.ROUTERS[kind](D, E, top_k)), normal(T, D), torch.arange(T) * 37
    routing = router(x.requires_grad_(), None, token_ids)
    assert routing.ids.shape == routing.weights.shape == (T, router.n_choices)
    assert routing.ids.dtype == torch.int64
    assert routing.scores.shape == routing.logits.shape and len(routing.scores) == T
    assert all(part.isfinite().all() for part in routing)
    assert all(len(set(row)) == router.n_choices and set(row) <= set(range(E))
               for row in routing.ids.tolist())
    alone = router(x[2:3], None, token_ids[2:3])
    assert torch.equal(alone.ids[0], routing.ids[2]) and equal(alone.weights[0], routing.weights[2])
    if routing.weights.requires_grad:
        loss = (routing.weights * normal(T, router.n_choices, seed=3)).sum()
        grads = gradients(loss, [x, *router.parameters()])
        assert all(g.isfinite().all() for g in grads) and (grads[1].any() or top_k == E)
    else:
        assert not list(router.parameters())
    half = x.detach().bfloat16()
    exact, router = router(half.double(), None, token_ids), router.float()
    for given in (half, half.float()):
        with torch.autocast("cpu", torch.bfloat16):
            found = router(given, None, token_ids)
        assert found.weights.dtype == found.scores.dtype == found.logits.dtype == torch.float32
        assert torch.equal(found.ids, exact.ids) and equal(found.logits, exact.logits.float(), 1e-5)


@pytest.mark.parametrize("top_k", [1, 3, E])
def test_hash_router_is_the_formula(top_k):
    """Expert hash(token) mod E and those after it, each at 1/K; the input vector plays no role."""
    router, tokens = moe.HashRouter(D, E, top_k), torch.tensor([0, 1, 256, 50256, 1])
    routing = router(normal(5, D), None, tokens)
    for t, token in enumerate(tokens.tolist()):
        ids = [(noise.hash32(token) + k) % E for k in range(top_k)]
        assert routing.ids[t].tolist() == ids
        assert routing.weights[t].tolist() == pytest.approx([1 / top_k] * top_k)
        expected = [1 / top_k if e in ids else 0 for e in range(E)]
        assert routing.scores[t].tolist() == pytest.approx(expected)
    assert not list(router.parameters()) and not router.state_dict()
    assert torch.equal(router(normal(5, D, seed=2), None, tokens).ids, routing.ids)
    load = losses.expert_counts(router(normal(50_000, 1), None, torch.arange(50_000)).ids, E)
    assert losses.max_share(load) < 1.05  # a hash spreads the vocabulary evenly


@pytest.mark.parametrize("kind", LITERAL_SCORES)
@pytest.mark.parametrize("top_k, normalised, biased", [
    (1, False, False),  # Switch: the raw probability is the gate
    (K, False, False),  # OLMoE, UniPool: raw scores at every K
    (K, True, False),   # Mixtral: gates sum to 1
    (K, True, True),    # DeepSeek-V3: the bias chooses and does not weigh
    (E, True, False),   # K = E: everybody works
    (E, False, True),   # K = E: the bias changes the order and nothing else
])
def test_router_is_the_formula(kind, top_k, normalised, biased):
    router = make(moe.ROUTERS[kind](D, E, top_k, normalised, selection_bias=biased))
    if biased:
        router.bias.copy_(normal(E, seed=2))
    x = normal(T, D)
    routing = router(x)
    for t in range(T):
        logits = [sum(a * b for a, b in zip(row, x[t].tolist())) for row in router.weight.tolist()]
        scores = LITERAL_SCORES[kind](logits, router)
        choice = [s + b for s, b in zip(scores, router.bias.tolist() if biased else [0] * E)]
        chosen = routing.ids[t].tolist()  # among equals any
        best = sorted(choice, reverse=True)[:top_k]
        assert [choice[e] for e in chosen] == pytest.approx(best, abs=1e-12)
        gates = [scores[e] for e in chosen]
        if normalised:
            gates = [g / max(sum(gates), 1e-20) for g in gates]
        assert routing.logits[t].tolist() == pytest.approx(logits, abs=1e-12)
        assert routing.scores[t].tolist() == pytest.approx(scores, abs=1e-12)
        assert routing.weights[t].tolist() == pytest.approx(gates, abs=1e-12)


@pytest.mark.parametrize("kind", LITERAL_SCORES)
@pytest.mark.parametrize("normalised", [False, True])
def test_router_gradients_are_finite_differences(kind, normalised):
    router, x = make(moe.ROUTERS[kind](D, E, 2, normalised)), normal(T, D).requires_grad_()
    differentiable = lambda routing: (routing.weights, routing.scores, routing.logits)
    assert gradients_are_finite_differences(router, differentiable, x)


def test_router_and_experts_equal_deepseeks_in_transformers():
    """Logits, gates, chosen experts, output and its gradient in x, with the same weights. (Mixtral,
    OLMoE and Qwen3-MoE: whole models in test_hf.py.)"""
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
    block = DeepseekV3MoE(transformers.DeepseekV3Config(
        hidden_size=16, num_experts_per_tok=3, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12, moe_intermediate_size=12, norm_topk_prob=True, n_routed_experts=8,
        n_shared_experts=2, n_group=1, topk_group=1, routed_scaling_factor=1.0))
    for p in (*block.parameters(), block.gate.e_score_correction_bias):
        nn.init.normal_(p, std=0.5)
    router = moe.SigmoidRouter(16, 8, 3, True, selection_bias=True)
    bank, shared = moe.ExpertBank(16, 12, 8, "swiglu"), moe.FFN(16, 2 * 12, "swiglu")
    theirs = block.shared_experts
    with torch.no_grad():
        router.weight.copy_(block.gate.weight)
        router.bias.copy_(block.gate.e_score_correction_bias)
        bank.w_in.copy_(block.experts.gate_up_proj)
        bank.w_out.copy_(block.experts.down_proj)
        shared.w_in.weight.copy_(torch.cat((theirs.gate_proj.weight, theirs.up_proj.weight)))
        shared.w_out.weight.copy_(theirs.down_proj.weight)
    x = torch.randn(1, 33, 16, requires_grad=True)
    logits, gates, ids = block.gate(x)
    routing = router(x[0])
    assert equal(routing.logits, logits.view(33, -1), atol=1e-5)
    order, our_order = ids.argsort(-1), routing.ids.argsort(-1)  # theirs are unsorted
    assert torch.equal(routing.ids.gather(1, our_order), ids.gather(1, order))
    assert equal(routing.weights.gather(1, our_order), gates.gather(1, order), atol=1e-5)
    y, expected = moe.MoE(router, bank, shared)(x[0])[0], block(x)[0]
    direction = torch.randn(33, 16)
    ours, literal = (gradients((out * direction).sum(), [x])[0] for out in (y, expected))
    assert equal(y, expected, atol=1e-4) and equal(ours, literal, atol=1e-4)


def test_selection_bias_moves_against_the_load():
    """b += rate * sign(mean - load), and never by the forward pass or a gradient."""
    router = make(moe.SigmoidRouter(D, 4, 2, True, selection_bias=True))
    router(normal(T, D))
    assert not router.bias.any() and "bias" not in dict(router.named_parameters())
    assert "bias" in router.state_dict()
    router.update_bias(torch.tensor([9.0, 1.0, 5.0, 5.0]), 0.25)  # mean 5
    assert router.bias.tolist() == [-0.25, 0.25, 0, 0]
    router.update_bias(torch.tensor([0.0, 0.0, 0.0, 8.0]), 0.25)
    assert router.bias.tolist() == [0, 0.5, 0.25, -0.25]
    assert moe.SigmoidRouter(D, 4, 2).bias is None


# ---- 2. NormRouter: its constant, and tokens that nobody wants.

TABLE = {(8, 1): 2.27, (16, 2): 1.91, (32, 4): 1.77, (64, 1): 3.50,
         (96, 1): 4.02, (192, 1): 5.17, (288, 1): 6.01, (384, 1): 6.72}


@pytest.mark.parametrize("n_experts, top_k", TABLE)
@pytest.mark.parametrize("n_draws", [20_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_norm_router_constant_is_the_papers(n_experts, top_k, n_draws):
    c = moe.norm_router_constant(n_experts, top_k, n_draws)
    assert c == pytest.approx(TABLE[n_experts, top_k], rel=0.03)


def test_norm_router_constant_by_a_literal_loop():
    """Another generator, one draw at a time; at (2, 1) a quarter has no positive entry."""
    for n_experts, top_k in ((2, 1), (5, 2), (3, 3)):
        total, used = 0.0, 0
        for g in normal(20_000, n_experts, seed=3).tolist():
            top = sorted((max(0.0, v / math.hypot(*g)) for v in g), reverse=True)[:top_k]
            length = math.hypot(*top)
            if length >= 0.05:
                total, used = total + 1 / length, used + 1
        assert moe.norm_router_constant(n_experts, top_k) == pytest.approx(total / used, rel=0.03)


def test_norm_router_constant_is_finite_fixed_and_cached():
    # one expert: relu(g/|g|) is 1 or 0, and the zeros are left out
    assert moe.norm_router_constant(1, 1) == pytest.approx(1.0)
    first = moe.norm_router_constant(8, 1)
    assert math.isfinite(first)  # infinite in the official code
    moe.norm_router_constant.cache_clear()
    torch.manual_seed(5)  # another seed of torch changes nothing
    assert moe.norm_router_constant(8, 1) == moe.norm_router_constant(8, 1) == first
    assert moe.norm_router_constant.cache_info().hits == 1


@pytest.mark.parametrize("logits", [
    [-1.0, -2.0, -3.0, -0.5, -1.0, -4.0],  # all negative: relu leaves nothing
    [0.0] * E,                             # all zero: the norm is zero too
    [-1.0, 2.0, -1.0, -1.0, -1.0, -1.0],   # one positive, K = 3: two experts are chosen at gate 0
])
def test_norm_router_survives_tokens_without_positive_logits(logits):
    router = moe.NormRouter(E, E, K).double()
    router.init_weights(0.1)
    nn.init.eye_(router.weight)  # logits = x
    x = torch.tensor([logits, [1.0, 2, 3, -1, -2, 0.5]]).double().requires_grad_()
    routing = router(x)
    expected = sorted(LITERAL_SCORES["norm"](logits, router), reverse=True)[:K]
    assert routing.weights[0].tolist() == pytest.approx(expected, abs=1e-12)
    assert len(set(routing.ids[0].tolist())) == K
    assert losses.expert_counts(routing.ids, E).sum() == 2 * K  # zero gates count like the others
    for scores in (routing.scores, losses.normalise_scores(routing.scores)):
        balance = moe.load_balance_loss(scores, losses.expert_counts(routing.ids, E))
        grads = gradients(routing.weights.sum() + balance, [x, *router.parameters()])
        assert all(g.isfinite().all() for g in grads)
    assert losses.routing_entropy(routing.scores).isfinite()


# ---- 3. Router, experts, shared experts: the whole layer as a loop over tokens.

@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("kind", moe.BANKS)
def test_every_bank_is_a_sum_over_the_chosen_experts(kind, activation):
    """Linear in the gates, token by token; idle experts have zeros; uses no more than is stored."""
    bank, x = make(moe.BANKS[kind](D, WIDTH, E, activation)), normal(T, D).requires_grad_()
    ids, weights = torch.tensor([[0, 4], [4, 2]]).repeat(4, 1)[:T], normal(T, 2).requires_grad_()
    apply = lambda x, w, ids, keep=False: bank(x, moe.Routing(w, ids, None, None), keep)
    y, acts = apply(x, weights, ids, True)
    assert y.shape == (T, D) and acts.shape[:2] == (T, 2)
    assert equal(apply(x, weights, ids)[0], y) and apply(x, weights, ids)[1] is None
    singles = sum(apply(x, weights[:, k:k + 1], ids[:, k:k + 1])[0] for k in range(2))
    assert equal(singles, y) and equal(apply(x, 3 * weights, ids)[0], 3 * y)
    assert equal(apply(x[3:4], weights[3:4], ids[3:4])[0], y[3:4])
    assert equal(apply(x, weights.flip(1), ids.flip(1))[0], y)
    grads = gradients(y.square().sum() + acts.square().sum(), [x, weights, *bank.parameters()])
    assert all(g.isfinite().all() and g.any() for g in grads)
    stacked = [(p, g) for p, g in zip(bank.parameters(), grads[2:]) if len(p) == E]
    assert stacked and not any(g[[1, 3, 5]].any() for _, g in stacked)
    stored = sum(p.numel() for p in bank.parameters())
    assert 0 < bank.n_active(1) < bank.n_active(2) <= bank.n_active(E) == stored


# ---- 4. Noise: a pure function that looks like a standard normal.

def likelihood(samples, distribution):
    """How likely numbers so far from it are (Kolmogorov and Smirnov)."""
    return stats.kstest(samples.numpy(), distribution, method="asymp").pvalue


def uncorrelated(a, b):
    return stats.pearsonr(a.double(), b.double()).pvalue > 6e-5  # four standard errors


KEYS = noise.noise_seeds(torch.arange(64) + 1000, torch.arange(64))  # 64 sequences of 64 positions


def test_uniform_noise_is_uniform():
    u = noise.uniform_noise(KEYS, 3, 16)
    # log(u), log(-log(u)) are finite
    assert u.shape == (4096, 16) and u.dtype == torch.float32 and u.min() > 0 and u.max() < 1
    assert likelihood(u.flatten(), "uniform") > 1e-3
    for bit in range(1, 9):  # the leading bits, each a fair coin
        ones = ((u * 2**bit).long() & 1).double().mean().item()
        assert abs(ones - 0.5) * 2 * math.sqrt(u.numel()) < 4


def test_uniform_noise_stays_below_one():
    """float32 rounds 2^24 - 1/2 up to 2^24; -log(-log(1)) would be Gumbel noise without end."""
    topmost = torch.tensor([269198])  # with stream 1, number 3 has all of its 24 bits set
    u = noise.uniform_noise(topmost, 1, 4)
    assert u[0, 3] == 1 - 2.0**-24 and (u < 1).all()
    router = make(moe.GaussianRouter(D, 3, 1, n_components=4)).float()
    codes = router(normal(1, 1, D).float(), topmost)
    codes.z.sum().backward()
    assert codes.z.isfinite().all() and all(p.grad.isfinite().all() for p in router.parameters())


def test_the_hash_is_one_node_of_a_compiled_graph():
    """Its rounds, each of which uses x twice, keep torch's compiler busy for minutes."""
    graphs = []

    def look(graph, inputs):
        graphs.append(graph)
        return graph.forward

    f = lambda keys, positions: noise.normal_noise(noise.noise_seeds(keys, positions), 3, 5)
    given = torch.tensor([1, 2**40]), torch.arange(7)
    assert torch.equal(torch.compile(f, backend=look, fullgraph=True)(*given), f(*given))
    names = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert any("noise_seeds" in name for name in names) and not any("xor" in name for name in names)


@pytest.mark.parametrize("n", [1, 2, 7, 16])  # odd counts: Box-Muller makes pairs
def test_normal_noise_is_standard_normal(n):
    g = noise.normal_noise(KEYS, 5, n)
    assert g.shape == (4096, n) and g.isfinite().all()
    flat = g.flatten().double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = (flat**power).mean().item() - moment
        assert abs(error) < 4 * math.sqrt(variance / g.numel())
    assert likelihood(flat, "norm") > 1e-3
    assert all(likelihood(column, "norm") > 1e-4 for column in g.unbind(1))


def test_noise_is_independent_over_keys_positions_streams_and_components():
    g = noise.normal_noise(KEYS, 5, 8)  # (B*S, 8)
    grid = g.view(64, 64, 8)
    pairs = {
        "components": (g[:, 0], g[:, 1]), "halves": (g[:, 0], g[:, 4]),
        "neighbours": (g[:, 2], g[:, 3]),
        "positions": (grid[:, :-1].flatten(), grid[:, 1:].flatten()),
        "keys": (grid[:-1].flatten(), grid[1:].flatten()),
        "streams": (g.flatten(), noise.normal_noise(KEYS, 6, 8).flatten()),
        "distant streams": (g.flatten(), noise.normal_noise(KEYS, 5 + 64, 8).flatten()),
        "stream against component": (g[:, 1:].flatten(),
                                     noise.normal_noise(KEYS, 6, 8)[:, :-1].flatten()),
        "key against position": (grid[:-1, 1:].flatten(), grid[1:, :-1].flatten()),
    }
    for name, (a, b) in pairs.items():
        assert uncorrelated(a, b) and uncorrelated(a**2, b**2), name  # independent, too
    for values in (KEYS, g.flatten()):
        assert values.unique().numel() > 0.99 * values.numel()  # no two tokens share their noise


@pytest.mark.parametrize("first, second", [
    (0, 1), (0, 2**32), (5, 5 + 2**32), (-1, 2**32 - 1), (2**62, 2**62 + 2**40), (0, -(2**63)),
])
def test_all_64_bits_of_a_key_count(first, second):
    a, b = (noise.noise_seeds(torch.tensor([key]), torch.arange(512)) for key in (first, second))
    assert (a == b).double().mean() < 0.01
    assert uncorrelated(*(noise.normal_noise(keys, 0, 4).flatten() for keys in (a, b)))


def test_noise_is_a_pure_function_of_its_keys():
    """Not of the batch around it, of the generator, of how many are drawn beside it."""
    keys = noise.noise_seeds(torch.tensor([11, 22, 33]), torch.arange(10))
    torch.manual_seed(1)
    all_of_it = noise.normal_noise(keys, 4, 12)
    torch.manual_seed(2)
    few = noise.noise_seeds(torch.tensor([22]), torch.arange(4, 7))
    assert torch.equal(noise.normal_noise(few, 4, 12), all_of_it[14:17])
    # K = 1 draws what K = 2 drew first
    assert torch.equal(noise.normal_noise(keys, 4, 5), all_of_it[:, :5])
    assert torch.equal(noise.uniform_noise(keys, 4, 5), noise.uniform_noise(keys, 4, 12)[:, :5])
    assert torch.equal(noise.noise_seeds(torch.tensor([22]), torch.arange(10)), keys[10:20])
    assert not torch.equal(keys[:10], keys[10:20])


def test_hash_is_one_to_one_and_mixes():
    values = torch.arange(100_000)
    hashed = noise.hash32(values)
    assert hashed.unique().numel() == 100_000 and hashed.min() >= 0 and hashed.max() < 2**32
    few = [0, 1, 12345, 2**32 - 1]
    assert [noise.hash32(v) for v in few] == noise.hash32(torch.tensor(few)).tolist()
    # avalanche: flipping one bit of the input flips each bit of the output half of the time
    for bit in range(17):
        flips = noise.hash32(values ^ (1 << bit)) ^ hashed
        share = torch.stack([(flips >> b & 1).double().mean() for b in range(32)])
        assert (share - 0.5).abs().max() < 0.1, bit


# ---- 5. Gaussian routers: the densities, their samples, and how hidden layers' codes relate.

def gaussian(**options):
    return make(moe.GaussianRouter(D, DZ, SAMPLES, **{"stream": 2, **options}))


@pytest.mark.parametrize("d_hidden", [0, 6])
def test_gaussian_router_is_the_reparameterised_formula(d_hidden):
    """z = mu + exp(logvar / 2) * eps, number by number; sample k has noise k*dz to k*dz + dz."""
    router, x, keys = gaussian(d_hidden=d_hidden), normal(T, D), torch.arange(T)
    codes = router(x[:, None], keys)
    eps = noise.normal_noise(keys, 2 * 2, SAMPLES * DZ).double()
    assert codes.z.shape == (T, SAMPLES, DZ) and codes.mu.shape == codes.logvar.shape == (T, 1, DZ)
    if d_hidden:
        x = F.silu(x @ router.hidden.weight.T + router.hidden.bias)
    for t, k, c in itertools.product(range(T), range(SAMPLES), range(DZ)):
        mu = (router.mu.weight[c] @ x[t] + router.mu.bias[c]).item()
        logvar = (router.logvar.weight[c] @ x[t] + router.logvar.bias[c]).item()
        assert codes.mu[t, 0, c].item() == pytest.approx(mu, abs=1e-12)
        assert codes.logvar[t, 0, c].item() == pytest.approx(min(4, max(-10, logvar)), abs=1e-12)
        z = mu + math.exp(codes.logvar[t, 0, c].item() / 2) * eps[t, k * DZ + c].item()
        assert codes.z[t, k, c].item() == pytest.approx(z, abs=1e-12)


def test_gaussian_router_starts_at_the_identity_and_clamps():
    router = moe.GaussianRouter(D, DZ, SAMPLES)
    router.init_weights(0.02)
    assert not router(normal(T, 1, D).float(), torch.arange(T)).logvar.any()
    for bias, clamped in ((100.0, 4.0), (-100.0, -10.0)):
        nn.init.constant_(router.logvar.bias, bias)
        codes = router(normal(T, 1, D).float(), torch.arange(T))
        assert (codes.logvar == clamped).all() and codes.z.isfinite().all()


@pytest.mark.parametrize("options", [dict(), dict(d_hidden=6), dict(n_components=3),
                                     dict(n_components=2, mean=True)])
def test_gaussian_router_gradients_reach_every_parameter(options):
    router, x = gaussian(**options), normal(T, 1, D).requires_grad_()
    (router(x, torch.arange(T)).z * normal(T, 1, DZ, seed=6)).sum().backward()
    for name, p in (("x", x), *router.named_parameters()):
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
    if "n_components" not in options:  # a component's choice jumps
        assert gradients_are_finite_differences(router, lambda codes: codes.z, x, torch.arange(T))


def test_mixture_draws_components_with_their_probabilities():
    """20,000 keys: shares within 4 standard errors, mu and logvar those of the component."""
    router = moe.GaussianRouter(D, DZ, 1, n_components=3)
    router.init_weights(0.5)
    with torch.no_grad():
        router.mixture.weight.zero_()
        router.mixture.bias.copy_(torch.tensor([0.2, 0.3, 0.5]).log())
        router.logvar.bias.copy_(torch.arange(12) / 12)
    n = 20_000
    x = normal(1, 1, D).float().expand(n, 1, D)
    codes = router(x, noise.hash32(torch.arange(n)))
    means = router.mu(x[0, 0]).view(3, DZ)
    component = (codes.mu[:, 0, None] - means).abs().sum(-1).argmin(-1)
    assert equal(codes.mu[:, 0], means[component], atol=1e-6)  # one component, no blend
    assert equal(codes.logvar[:, 0], router.logvar.bias.view(3, DZ)[component], atol=1e-6)
    for c, p in enumerate((0.2, 0.3, 0.5)):
        assert abs((component == c).double().mean().item() - p) < 4 * math.sqrt(p * (1 - p) / n)
    residual = ((codes.z - codes.mu) / (codes.logvar / 2).exp()).flatten()  # has noise of its own
    assert likelihood(residual.detach(), "norm") > 1e-3
    several = moe.GaussianRouter(D, DZ, 5, n_components=3)
    several.load_state_dict(router.state_dict())
    picks = several.component(x[:1000], noise.hash32(torch.arange(1000)))  # one per sample
    assert picks.shape == (1000, 5, 3) and picks.argmax(-1).float().std(1).gt(0).any()


def test_mixture_gradient_is_the_soft_choices():
    router, x, keys = gaussian(n_components=3), normal(T, 1, D), torch.arange(T)
    hard = router.component(x, keys)
    assert torch.equal(hard.sum(-1), torch.ones(T, SAMPLES, dtype=hard.dtype))
    assert (hard.max(-1).values - 1).abs().max() < 1e-15
    u = noise.uniform_noise(keys, 2 * 2 + 1, SAMPLES * 3).view(T, SAMPLES, 3)
    soft = (router.mixture(x) - torch.log(-torch.log(u))).softmax(-1)
    direction = normal(T, SAMPLES, 3, seed=7)
    a, b = (gradients((p * direction).sum(), [router.mixture.weight])[0] for p in (hard, soft))
    assert equal(a, b, atol=1e-6)  # the Gumbel noise is float32


def test_mixture_at_its_mean_takes_the_likeliest_component():
    router, x = gaussian(n_components=3, mean=True), normal(T, D)
    best = (x @ router.mixture.weight.T + router.mixture.bias).argmax(-1)
    mu = (x @ router.mu.weight.T + router.mu.bias).view(T, 3, DZ)[torch.arange(T), best]
    assert equal(router(x[:, None], torch.arange(T)).mu[:, 0], mu)


def codes_of(z, rates=(0.5, 0.5, 0.5), n_samples=SAMPLES, **options):
    router = make(code_router(D, DZ, n_samples, rates, z, **options))
    return router, normal(T, D), torch.arange(T)


def test_code_router_independent_and_shared():
    router, x, keys = codes_of("independent", layer=5)
    codes = router(x, keys)
    for i, code in enumerate(codes):
        density = router.densities[str(i)]
        assert density.stream == 5 * 3 + i  # no two hidden layers of the model share their noise
        assert torch.equal(code.z, density(x[:, None], keys).z)
    assert not torch.allclose(*((c.z - c.mu) / (c.logvar / 2).exp() for c in codes[:2]))
    router, x, keys = codes_of("shared")
    codes = router(x, keys)
    assert list(router.densities) == ["0"] and all(torch.equal(c.z, codes[0].z) for c in codes)
    router, x, keys = codes_of("shared", mean_from=2)
    codes = router(x, keys)
    assert torch.equal(codes[1].z, codes[0].z) and torch.equal(codes[2].z, codes[0].mu)


def test_code_router_hierarchical():
    """z_{i+1} ~ N(mu_i(x, z_i), Sigma_i(x, z_i)): one chain, and the gradient runs through it."""
    router, x, keys = codes_of("hierarchical")
    codes, literal = router(x, keys), None
    for code, density in zip(codes, router.densities.values()):
        eps = noise.normal_noise(keys, 2 * density.stream, SAMPLES * DZ).double()
        wide = x[:, None].expand(T, SAMPLES, D)
        given = wide if literal is None else torch.cat((wide, literal), -1)
        logvar = density.logvar(given).clamp(-10, 4)
        literal = density.mu(given) + (logvar / 2).exp() * eps.view(T, SAMPLES, DZ)
        assert equal(code.z, literal)
    direction = normal(T, SAMPLES, DZ, seed=6)
    grads = [gradients((z * direction).sum(), router.parameters()) for z in (codes[2].z, literal)]
    for name, ours, expected in zip(dict(router.named_parameters()), *grads):
        assert expected.any() and equal(ours, expected, 1e-10), name


@pytest.mark.parametrize("z", ["independent", "shared", "hierarchical"])
def test_code_router_dense_and_mean_layers(z):
    router, x, keys = codes_of(z, rates=(None, 0.5, None, 0.25), mean_from=3)
    codes = router(x, keys)
    assert codes[0] is None and codes[2] is None and codes[1].z.shape == (T, SAMPLES, DZ)
    assert codes[1].logvar.isfinite().all() and torch.equal(codes[3].z, codes[3].mu)
    assert codes[3].mu.shape == (T, SAMPLES if z == "hierarchical" else 1, DZ)
    router, x, keys = codes_of(z, mean=True)
    for code in router(x, keys):
        assert torch.equal(code.z, code.mu) and code.z.shape == (T, 1, DZ)
        assert not code.logvar.exp().any()


# ---- 6. The continuous bank against K literal FFNs.

BANKS = {  # (rates, CodeRouter options, bank options)
    "paper": ((0.25,), {}, {}),
    "one neuron": ((0.001,), {}, {}),                 # max(1, ...): a rate never keeps nothing
    "all raw values": ((1.0,), {}, {}),               # a rate of 1 still multiplies
    "pre": ((0.5,), {}, dict(mask="pre")),
    "deep": ((0.5, 0.5), {}, {}),                     # averaging inner masks would be wrong
    "deep pre": ((0.5, 0.25, 0.75), {}, dict(mask="pre")),
    "rates with dense layers": ((0.75, None, 0.25), {}, {}),
    "dense first": ((None, 0.5), {}, {}),
    "dense last": ((0.5, None), {}, dict(mask="pre")),
    "shared z": ((0.5, 0.25), dict(z="shared"), {}),
    "hierarchical": ((0.5, 0.25), dict(z="hierarchical"), {}),
    "mean from the second": ((0.5, 0.25), dict(mean_from=1), {}),
    "shared z, then its mean": ((0.5, 0.25, 0.25), dict(z="shared", mean_from=2), {}),
    "hierarchical, then its mean": ((0.5, 0.25), dict(z="hierarchical", mean_from=1), {}),
    "share_mask": ((0.5, 0.5, 0.5), dict(z="shared"), dict(share_mask=True)),
    "share_mask pre": ((0.5, 0.5), dict(z="shared"), dict(share_mask=True, mask="pre")),
    "mean": ((0.5,), dict(mean=True), {}),
    "mixture": ((0.5,), dict(n_components=3), {}),
}


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("name", BANKS)
def test_continuous_ffn_is_k_literal_ffns(name, activation):
    """Output and every gradient (x, W_1..W_H, W_2, W_z, router), activations kept or not."""
    rates, density, options = BANKS[name]
    router = make(code_router(D, DZ, SAMPLES, rates, **density))
    bank = make(moe.ContinuousBank(D, 9, DZ, rates, activation, **options))
    layer, x, keys = moe.MoE(router, bank), normal(T, D).requires_grad_(), torch.arange(T)
    y, codes, _ = layer(x, noise_seeds=keys)
    kept_y, _, acts = layer(x, noise_seeds=keys, keep_activations=True)
    expected, direction = literal_continuous(x, codes, bank), normal(T, D, seed=8)
    names = ["x", *dict(layer.named_parameters())]
    literal, *ours = (gradients((out * direction).sum(), [x, *layer.parameters()])
                      for out in (expected, y, kept_y))
    for name, *grads in zip(names, literal, *ours):
        assert grads[0].any() and all(equal(g, grads[0], 1e-6) for g in grads), name
    assert equal(y, expected, 1e-6) and equal(kept_y, expected, 1e-6)
    assert equal(F.linear(acts.mean(1), bank.w_out), expected, 1e-9)  # h (T, K, F) before W_2
    assert acts.shape == (T, max(c.z.shape[1] for c in codes if c is not None), 9)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("mask", ["post", "pre"])
@pytest.mark.parametrize("d, f, std", [(64, 256, 0.07), (256, 1024, 0.035)])
def test_inner_matrices_keep_the_variance(activation, mask, d, f, std):
    """Each W_i h_{i-1} starts with the spread of W_1 x; one layer is as it always was."""
    torch.manual_seed(0)
    bank = moe.ContinuousBank(d, f, DZ, (0.5, None, 0.25), activation, mask)
    bank.init_weights(std, std)
    code = moe.Codes(torch.randn(256, 2, DZ), None, None)
    h, spreads = torch.randn(256, 1, d), []
    for w, m in zip(bank.w_in, bank.masks([code, None, code])):
        spreads.append((h @ w.T).std().item())
        h = gated(h @ w.T, m, bank.mask, bank.activation)
    assert spreads[:2] == pytest.approx([std * d**0.5] * 2, rel=0.15)
    assert 0.5 < spreads[2] / spreads[0] < 2  # tokens differ: SwiGLU's fourth moments are large
    assert bank.w_in[0].std().item() == pytest.approx(std, rel=0.02)
    assert h.square().mean().sqrt().item() > 0.03  # with W_1's std: 1e-5 under SwiGLU


@pytest.mark.parametrize("rate, width, n", [(0.25, 6144, 1536), (0.5, 5, 3), (0.5, 4, 2),
                                            (0.3, 5, 2), (0.1, 5, 1), (1e-6, 5, 1),
                                            (1.0, 5, 5), (0.7, 5, 4), (0.499, 3, 1)])
def test_number_of_kept_neurons(rate, width, n):
    """N = max(1, floor(rate * F + 0.5)): half up, never Python's half to even, never none."""
    assert moe.ContinuousBank(2, width, 2, (rate,), "gelu").n_keep == [n]


def test_bank_starts_with_mask_entries_of_unit_variance():
    torch.manual_seed(3)
    bank = moe.ContinuousBank(8, 512, 64, (0.25,), "gelu")
    bank.init_weights(0.02, 0.01)
    scores = torch.randn(256, 1, 64) @ bank.w_z["0"].T
    assert scores.var().item() == pytest.approx(1, rel=0.05)
    assert bank.w_in[0].std().item() == pytest.approx(0.02, rel=0.1)
    assert bank.w_out.std().item() == pytest.approx(0.01, rel=0.1)


# ---- 7. Losses: literal loops, cases by hand, gradients where they belong.

def scores_and_counts(layers):
    """Random softmax scores (T, E) and counts of their top 2, for several layers."""
    scores = [normal(T, E, seed=9 + i).softmax(-1).requires_grad_() for i in range(layers)]
    return scores, [losses.expert_counts(s.topk(2, -1).indices, E) for s in scores]


@pytest.mark.parametrize("layers", [1, 4])
def test_pool_loss_is_the_double_loop(layers):
    """M * sum_i (mean_l f_i^l)(mean_l P_i^l); of one layer it is Switch's."""
    scores, counts = scores_and_counts(layers)
    total = 0
    for i in range(E):
        f = sum(n[i].item() / n.sum().item() for n in counts) / layers
        p = sum(s[t, i] for s in scores for t in range(T)) / T / layers
        total = total + E * f * p
    # f is a share: counts of a global batch, 8 times as many tokens, give the same loss
    ours = [moe.pool_loss(scores, [m * n for n in counts]) for m in (1, 8)]
    if layers == 1:
        ours.append(moe.load_balance_loss(scores[0], counts[0]))
    for loss in ours:
        assert loss.item() == pytest.approx(total.item(), rel=1e-6)
        for a, b in zip(gradients(loss, scores), gradients(total, scores)):
            assert equal(a, b, 1e-7)  # counts are float32


def test_balanced_and_collapsed_by_hand():
    """One expert for all costs E; layers of a pool, each collapsed onto its half, are balanced."""
    collapsed = torch.eye(4)[:1].expand(12, 4), torch.tensor([12.0, 0, 0, 0])
    assert moe.load_balance_loss(*collapsed).item() == pytest.approx(4)
    halves = [torch.tensor([[0.5, 0.5, 0, 0]]).expand(6, 4),
              torch.tensor([[0, 0, 0.5, 0.5]]).expand(6, 4)]
    counts = [torch.tensor([6.0, 6, 0, 0]), torch.tensor([0.0, 0, 6, 6])]
    assert moe.pool_loss(halves, counts).item() == pytest.approx(1)
    for s, n in zip(halves, counts):  # which no layer's loss can say
        assert moe.load_balance_loss(s, n).item() == pytest.approx(2)


@pytest.mark.parametrize("n_experts, expected", [(96, 15.75), (8, 2.64)])
def test_norm_router_balance_constant(n_experts, expected):
    """Balanced, raw NormRouter scores cost sum_e P_e = M * c * E[relu(u)], u on the unit sphere.
    Normalised ones cost 1: tokens without a positive logit add nothing."""
    # E|u_1|
    ratio = math.exp(math.lgamma(n_experts / 2) - math.lgamma((n_experts + 1) / 2))
    sphere, c = ratio / math.sqrt(math.pi), moe.norm_router_constant(n_experts, 1)
    assert n_experts * c * sphere / 2 == pytest.approx(expected, rel=0.01)
    router = moe.NormRouter(n_experts, n_experts, 1)
    router.init_weights(0.1)
    nn.init.eye_(router.weight)
    scores, counts = router(normal(20_000, n_experts).float()).scores, torch.ones(n_experts)
    assert moe.load_balance_loss(scores, counts).item() == pytest.approx(expected, rel=0.03)
    normalised = moe.load_balance_loss(losses.normalise_scores(scores), counts).item()
    assert normalised == pytest.approx(1, rel=0.01)


def test_z_loss():
    logits = normal(T, E).requires_grad_()
    expected = sum(math.log(sum(math.exp(z) for z in row)) ** 2 for row in logits.tolist()) / T
    assert moe.z_loss(logits).item() == pytest.approx(expected, rel=1e-12)
    assert moe.z_loss(torch.zeros(3, 8)).item() == pytest.approx(math.log(8) ** 2)
    large = moe.z_loss(torch.full((1, 2), 300.0)).item()  # no overflow
    assert large == pytest.approx((300 + math.log(2)) ** 2)
    assert gradcheck(moe.z_loss, logits)


def literal_specialization(activations, form):
    """mean over tokens and pairs e != v of cos(a_e, a_v)^2 (or |cos|, cos), pair by pair."""
    values = []
    for token in activations:
        for a, b in itertools.permutations(range(len(token)), 2):
            dot, na, nb = ((token[i] * token[j]).sum() for i, j in ((a, b), (a, a), (b, b)))
            cos = dot / (na.sqrt().clamp_min(1e-12) * nb.sqrt().clamp_min(1e-12))
            values.append({"square": cos**2, "abs": cos.abs(), "plain": cos}[form])
    return torch.stack(values).mean()


@pytest.mark.parametrize("form", ["square", "abs", "plain"])
@pytest.mark.parametrize("k", [2, 3, 5])
def test_specialization_is_the_literal_loop(form, k):
    a = normal(T, k, WIDTH).requires_grad_()
    ours, literal = moe.specialization_loss(a, form), literal_specialization(a, form)
    assert ours.item() == pytest.approx(literal.item(), rel=1e-12)
    assert equal(*(gradients(loss, [a])[0] for loss in (ours, literal)))
    assert gradcheck(lambda a: moe.specialization_loss(a, form), a)


@pytest.mark.parametrize("form", ["square", "abs", "plain"])
def test_specialization_of_a_silent_expert_and_of_a_single_one(form):
    """Zeros are orthogonal to everything, and no NaN; one expert has nobody to differ from."""
    pair = torch.tensor([[[1.0, 0, 0], [0, 0, 0]]]).requires_grad_()
    loss = moe.specialization_loss(pair, form)
    assert loss.item() == 0 and gradients(loss, [pair])[0].isfinite().all()
    with pytest.raises(ValueError, match="K >= 2"):
        moe.specialization_loss(torch.ones(3, 1, 4), form)


def test_specialization_is_computed_in_float32():
    a = normal(64, 2, 32).bfloat16()
    loss, literal = moe.specialization_loss(a), literal_specialization(a.double(), "square")
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(literal.item(), rel=1e-5)


def literal_coupling(s, ids, n, next_ids, paths):
    """- mean_x sum_{e in TopK_l} sum_{v in TopK_{l+1}} w_ev s_e s_v, of normalised scores."""
    total = 0
    for t in range(len(s)):
        for e, v in itertools.product(ids[t].tolist(), next_ids[t].tolist()):
            w = 1 if paths is None else paths[e, v].item()
            total = total + w * (s[t, e] / s[t].sum()) * (n[t, v] / n[t].sum())
    return -total / len(s)


COUPLED = [name for name, kind in moe.ROUTERS.items() if "coupling" in kind.supports]
assert set(COUPLED) >= set(LITERAL_SCORES)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", COUPLED)
def test_coupling_is_the_literal_loop(kind, weighted):
    routers = [make(moe.ROUTERS[kind](D, E, k)) for k in (2, 2)]
    x = normal(T, D)
    a, b = (r(x) for r in routers)
    paths = normal(E, E).softmax(-1).requires_grad_() if weighted else None
    loss, literal = (form(a.scores, a.ids, b.scores, b.ids, paths)
                     for form in (moe.coupling_loss, literal_coupling))
    assert loss.item() == pytest.approx(literal.item(), rel=1e-12)
    weights = [r.weight for r in routers]
    for ours, theirs in zip(gradients(loss, weights), gradients(literal, weights)):
        assert equal(ours, theirs) and theirs.any()
    if weighted:  # an estimate, not a parameter
        assert torch.autograd.grad(loss, paths, allow_unused=True) == (None,)
    s, n = a.scores.detach().requires_grad_(), b.scores.detach().requires_grad_()
    assert gradcheck(lambda s, n: moe.coupling_loss(s, a.ids, n, b.ids, paths), (s, n))


def test_neuron_balance_is_the_literal_sum():
    """F * sum_j q_j mean_{x,k} softmax(W_z z)_j: even costs 1, one neuron for all costs F."""
    scores, width = normal(T, SAMPLES, 6).requires_grad_(), 6
    counts = torch.tensor([5.0, 0, 3, 2, 0, 1])
    total, rows = 0, scores.flatten(0, 1).exp()
    for j in range(width):
        p = sum(row[j] / row.sum() for row in rows) / len(rows)
        total = total + width * counts[j].item() / 11 * p
    loss = losses.neuron_balance_loss(scores, counts)
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    assert equal(*(gradients(v, [scores])[0] for v in (loss, total)), atol=1e-7)
    even = losses.neuron_balance_loss(torch.zeros(T, 2, 6), torch.ones(6))
    first = torch.eye(6)[0]
    peaked = losses.neuron_balance_loss(50 * first.expand(T, 2, 6), 9 * first)
    assert even.item() == pytest.approx(1) and peaked.item() == pytest.approx(6)


# ---- 8. Diagnostics, by hand.

def test_expert_counts():
    ids = torch.tensor([[0, 2], [2, 3], [2, 0]])
    assert losses.expert_counts(ids, 5).tolist() == [2, 0, 3, 1, 0]
    assert losses.expert_counts(ids[:0], 2).tolist() == [0, 0]


def test_load_diagnostics():
    # collapse, even, half, nothing counted
    counts = torch.tensor([[4.0, 0, 0, 0], [1, 1, 1, 1], [2, 2, 0, 0], [0, 0, 0, 0]])
    assert losses.max_share(counts).tolist() == [4, 1, 2, 0]
    assert losses.dead_share(counts).tolist() == [0.75, 0, 0.5, 1]
    assert losses.imbalance(counts).tolist() == [4, 1, 2, 0]
    assert losses.usage_entropy(counts).tolist() == pytest.approx([0, 1, 0.5, 0])
    assert losses.shares(counts)[2].tolist() == [0.5, 0.5, 0, 0]
    assert losses.usage_entropy(torch.ones(2, 1)).tolist() == [0, 0]  # a single expert: not NaN


@pytest.mark.parametrize("scores, expected", [
    (torch.full((3, 8), 0.3), 1),  # undecided, whatever the scale
    (torch.eye(4), 0), (torch.tensor([[0.5, 0.5, 0, 0], [1, 0, 0, 0]]), (0.5 + 0) / 2),
    (torch.zeros(2, 4), 0),  # NormRouter, all logits negative
    (torch.ones(3, 1), 0),  # a single expert: not NaN
], ids=str)
def test_routing_entropy(scores, expected):
    assert losses.routing_entropy(scores).item() == pytest.approx(expected)


def test_paths():
    """Counts of (expert here, expert in the next layer); consistency of first choices only."""
    ids = torch.tensor([[0, 1], [0, 2], [0, 1], [1, 0]])
    following = torch.tensor([[2, 1], [2, 0], [1, 0], [0, 2]])
    expected = torch.zeros(3, 3)
    for e, v in zip(ids.tolist(), following.tolist()):
        for i, j in itertools.product(e, v):
            expected[i, j] += 1
    assert torch.equal(losses.path_counts(ids, following, 3), expected)
    # first choices: 0->2, 0->2, 0->1, 1->0: most often 2 follows 0 (2 of 3), 0 follows 1 (1 of 1)
    assert losses.path_consistency(ids, following, 3).item() == pytest.approx(3 / 4)


def test_unique_experts():
    """UniPool's figure: distinct experts per token over depth, over L*K."""
    # L = 4, T = 2: {0, 3}, met in turns, and {1, 2, 3, 4}
    ids = torch.tensor([[[0], [1]], [[3], [2]], [[0], [3]], [[3], [4]]])
    assert losses.unique_experts(ids).item() == pytest.approx((2 / 4 + 4 / 4) / 2)
    # top-2: {0, 1, 2} of 4
    assert losses.unique_experts(torch.tensor([[[0, 1]], [[1, 2]]])).item() == pytest.approx(3 / 4)


def test_overlap():
    a = torch.tensor([[[1.0, 0], [0, 1]], [[1, 0], [-2, 0]]])  # orthogonal; opposite
    assert losses.overlap(a).item() == pytest.approx(0.5)
    assert losses.pair_cosines(normal(T, 4, 3)).shape == (T, 6)


@pytest.mark.parametrize("k", [2, 3, 4, 5])  # up to 4: sums of products; 5: matrix products
def test_pair_cosines_in_a_compiled_graph(k):
    a = normal(T, k, 7).requires_grad_()
    compiled = torch.compile(losses.pair_cosines, backend="aot_eager")
    results = [(cos := f(a), *torch.autograd.grad(cos.square().sum(), a))
               for f in (losses.pair_cosines, compiled)]
    assert all(torch.allclose(x, y, rtol=1e-12, atol=1e-14) for x, y in zip(*results))
