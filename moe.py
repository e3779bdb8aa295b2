"""Mixture-of-experts layers: every flavour of this repository in one file.

    y = sum over e in TopK(scores(x)) of  gate_e(x) * expert_e(x)              discrete experts
    y = (1/K) sum over k of  f(x, z_k),   z_k ~ p(z | x)                       continuous experts

Flavours differ in three kinds of parts (support/auxiliary.py has the two exceptions):
  1. a *router* looks at a token and says who works: `Routing` (discrete) or `Codes` (continuous);
  2. a *bank* holds the experts' weights and does the work. A layer may own it (private experts),
     or many layers may share one (a pool);
  3. a *loss* is a pure function of what the routers returned: losses.py.
FLAVOURS, at the end, names the combinations that papers have published.

Letters in shapes: T tokens (batch x sequence), D model width, F expert width, E experts to choose
from, K chosen experts (or samples), dz width of a code z, C components of a mixture of Gaussians,
H hidden layers of a continuous FFN.

Papers: Switch (arXiv 2101.03961), DeepSeekMoE and V3 (2401.06066, 2412.19437), Hash Layers
(2106.04426), UniPool with KERN's NormRouter (2605.06665), ReMoE (2412.14711), PEER (2407.04153),
MoRE (2609.18176), infinity-MoE (2601.17680). "[ours]" marks a choice that no paper makes.
"""
import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from losses import (  # noqa: F401  (BALANCES is used here, the losses are passed on)
    BALANCES,
    coupling_loss,
    load_balance_loss,
    pool_loss,
    specialization_loss,
    z_loss,
)
from support.deep import gated, inner_scale
from support.noise import gumbel_noise, hash32, normal_noise
from support.norm_constant import norm_router_constant
from support.ops import activate, best_pairs, row_products, sum_of_rows


class Routing(NamedTuple):
    """What a discrete router decided for T tokens."""
    weights: Tensor  # (T, K) gates of the chosen experts
    ids: Tensor      # (T, K) int64, the chosen, distinct (PEER: within a head); learned: best first
    scores: Tensor   # (T, E) scores of all experts, before the cut (PEER: of its keys)
    logits: Tensor   # (T, E) what scores are made of: W_r x; for fixed routers, the scores again


class Codes(NamedTuple):
    """What a Gaussian router drew for T tokens: points in the continuous space of experts."""
    z: Tensor       # (T, K, dz) samples
    mu: Tensor      # (T, 1 or K, dz) means
    logvar: Tensor  # (T, 1 or K, dz) log of the diagonal of Sigma


def linear_fp32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias in float32 at least: routing must not depend on bf16 rounding."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def init_linear(layer: nn.Linear, std: float) -> None:
    """Normal weights, no bias."""
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


# --------------------------------------------------------------------------------------------------
# 1. Discrete routers: they differ in the map from logits to scores


class Router(nn.Module):
    """Scores all experts and picks the top K. Subclasses define `scores`, (T, E) -> (T, E).

    norm_topk_prob: divide the gates by their sum. selection_bias: choose on score + bias, gate
    without it (DeepSeek-V3); the buffer is read here and written only by `update_bias`.
    The class says what it supports, and support/rules.py refuses the rest.
    """
    max_top_k = None  # the largest K; None: any up to E
    zero_is_idle = False  # True: a choice with gate 0 counts as none
    pooled = False  # True: only for a pool that layers share
    supports = frozenset({*BALANCES, "bias", "z", "coupling"})  # what may act on scores and logits
    balance_scores = "raw"  # what balance losses see by default; "normalised": sums to 1

    def __init__(self, d_model: int, n_experts: int, top_k: int, norm_topk_prob: bool = False,
                 selection_bias: bool = False):
        super().__init__()
        self.n_choices, self.norm_topk_prob = top_k, norm_topk_prob
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))  # (E, D)
        self.register_buffer("bias", torch.zeros(n_experts) if selection_bias else None)

    def init_weights(self, std: float, out_std: float | None = None) -> None:
        nn.init.normal_(self.weight, std=std)
        for buffer in self.buffers():
            buffer.zero_()

    def forward(self, x: Tensor, noise_seeds=None, token_ids=None) -> Routing:
        """x (T, D) -> Routing. noise_seeds and token_ids (T,) are for routers that need them."""
        logits = linear_fp32(x, self.weight)  # (T, E)
        scores = self.scores(logits)
        choice = scores if self.bias is None else scores + self.bias
        ids = choice.detach().topk(self.n_choices, dim=-1).indices  # (T, K)
        weights = scores.gather(-1, ids)  # (T, K)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
        return Routing(weights, ids, scores, logits)

    @torch.no_grad()
    def update_bias(self, load: Tensor, rate: float) -> None:
        """b_e += rate * sign(mean load - load_e): load (E,) of one step, over all ranks (V3)."""
        self.bias += rate * torch.sign(load.mean() - load)


class SoftmaxRouter(Router):
    """Switch, GShard, Mixtral, OLMoE: s = softmax(W_r x)."""

    def scores(self, logits):
        return logits.softmax(-1)


class SigmoidRouter(Router):
    """DeepSeek-V3: s = sigmoid(W_r x), experts do not compete for mass."""
    balance_scores = "normalised"

    def scores(self, logits):
        return logits.sigmoid()


class NormRouter(Router):
    """UniPool, after KERN: s = sigma * c * relu(z / ||z||), z = W_r x.

    The length of x and of W_r's rows cancels: routers at all depths score on one scale. Tokens with
    fewer than K positive logits choose zero-score experts too (ties): gate 0, counted as chosen.
    """

    def __init__(self, d_model, n_experts, top_k, norm_topk_prob=False, selection_bias=False):
        super().__init__(d_model, n_experts, top_k, norm_topk_prob, selection_bias)
        self.sigma = nn.Parameter(torch.ones(1))  # one per router; (1,) as FSDP shards no scalars
        self.c = norm_router_constant(n_experts, top_k)  # the chosen scores' norm: about sigma

    def init_weights(self, std, out_std=None):
        super().init_weights(std, out_std)
        nn.init.ones_(self.sigma)

    def scores(self, logits):
        unit = logits / (torch.linalg.vector_norm(logits, dim=-1, keepdim=True) + 1e-8)
        return self.sigma.to(logits.dtype) * self.c * unit.relu()


class LockRouter(NormRouter):
    """UniPool-lock: every layer sees the whole pool for a while, then keeps experts of its own.

    lost (E,): for an expert that another layer owns, the fraction of its score already taken away,
    0 to 1. That happens after the norm, so that no score jumps at the end; a bias of -1e9 then
    keeps ties from choosing it. support/lock.py moves the buffers, once a step.
    """
    pooled, supports = True, NormRouter.supports - {"bias"}

    def __init__(self, d_model, n_experts, top_k, norm_topk_prob=False, selection_bias=False):
        super().__init__(d_model, n_experts, top_k, norm_topk_prob, selection_bias=True)
        self.register_buffer("lost", torch.zeros(n_experts))
        self.register_buffer("seen", torch.zeros(n_experts))  # running shares of the assignments
        self.register_buffer("steps", torch.zeros(1))  # done so far

    def scores(self, logits):
        return super().scores(logits) * (1 - self.lost)


class ReluRouter(Router):
    """ReMoE: s = relu(W_r x), and whoever is above zero works: no choice that could jump.

    top_k is the wanted average. The layer loss of such scores is an L1 norm, heavier on busy
    experts; after each step its coefficient is multiplied or divided by 1.2 to approach that
    average (support/auxiliary.py). [ours]: counts of a layer divided by their own sum in that loss,
    and all experts computed, idle ones with gate 0, so that no shape depends on values.
    """
    zero_is_idle, supports = True, frozenset({*BALANCES, "z"})

    def __init__(self, d_model, n_experts, top_k, norm_topk_prob=False, selection_bias=False):
        super().__init__(d_model, n_experts, top_k, norm_topk_prob)
        self.n_choices, self.wanted = n_experts, top_k / n_experts
        self.register_buffer("ups", torch.zeros(1))

    def scores(self, logits):
        return logits.relu()


class HashRouter(nn.Module):
    """Hash Layers: experts hash(token id) mod E and the K - 1 after it, with gates 1/K.

    Nothing is learned: what a learned router is worth shows against it. (All routers are made with
    the same arguments; this one has no use for the last two.)
    """
    max_top_k, zero_is_idle, pooled, balance_scores = None, False, False, "raw"
    supports = frozenset()  # scores are constants: no loss can move them

    def __init__(self, d_model, n_experts, top_k, norm_topk_prob=False, selection_bias=False):
        super().__init__()
        self.n_experts, self.n_choices, self.bias = n_experts, top_k, None

    def choose(self, x, token_ids):
        first = hash32(token_ids) % self.n_experts  # (T,)
        return (first[:, None] + torch.arange(self.n_choices, device=x.device)) % self.n_experts

    def forward(self, x, noise_seeds=None, token_ids=None):
        ids = self.choose(x, token_ids)  # (T, K)
        dtype = torch.promote_types(x.dtype, torch.float32)
        gates = torch.full(ids.shape, 1 / self.n_choices, device=x.device, dtype=dtype)  # (T, K)
        scores = gates.new_zeros(len(x), self.n_experts).scatter(1, ids, gates)  # (T, E)
        return Routing(gates, ids, scores, scores)


class RandomRouter(HashRouter):
    """The K largest entries of W x, with a W drawn once and for all, and gates 1/K [ours]."""

    def choose(self, x, token_ids):
        w = normal_noise(torch.arange(self.n_experts, device=x.device), 0, x.shape[1])  # (E, D)
        return linear_fp32(x.detach(), w).topk(self.n_choices, dim=-1).indices


class ProductRouter(HashRouter):
    """PEER: an expert's key is a pair, its score q1 . k1 + q2 . k2; the best K of E = a * b.

    One query (head) for every 16 choices, as in the paper's 8 x 16, of width D / 4, and normed by
    itself [ours: the paper's batch norm would look at other tokens].
    """

    def __init__(self, d_model, n_experts, top_k, norm_topk_prob=False, selection_bias=False):
        super().__init__(d_model, n_experts, top_k)
        self.heads = 1 if top_k % 16 else top_k // 16
        half = max(1, d_model // 8)
        a = max(i for i in range(1, math.isqrt(n_experts) + 1) if n_experts % i == 0)
        self.query = nn.Parameter(torch.empty(self.heads * 2 * half, d_model))
        self.first = nn.Parameter(torch.empty(a, half))
        self.second = nn.Parameter(torch.empty(n_experts // a, half))

    def init_weights(self, std, out_std=None):
        for w in (self.query, self.first, self.second):
            nn.init.normal_(w, std=w.shape[1] ** -0.5)

    def forward(self, x, noise_seeds=None, token_ids=None):
        q = linear_fp32(x, self.query).unflatten(-1, (self.heads, 2, -1))  # (T, heads, 2, half)
        q1, q2 = F.rms_norm(q, q.shape[-1:]).unbind(2)
        keys = linear_fp32(q1, self.first), linear_fp32(q2, self.second)  # (T, heads, a), (.., b)
        best, ids = best_pairs(*keys, self.n_choices // self.heads)  # (T, heads, K / heads)
        logits = torch.cat(keys, -1).mean(1)  # (T, a + b)
        return Routing(best.sigmoid().flatten(1), ids.flatten(1), logits.softmax(-1), logits)


ROUTERS = dict(softmax=SoftmaxRouter, sigmoid=SigmoidRouter, norm=NormRouter, lock=LockRouter,
               relu=ReluRouter, product=ProductRouter, hash=HashRouter, random=RandomRouter)


# --------------------------------------------------------------------------------------------------
# 2. Discrete experts


class FFN(nn.Module):
    """GPT-2's (gelu) or LLaMA's (swiglu) dense FFN; n times as wide: n always-on experts."""

    def __init__(self, d_model: int, d_ff: int, activation: str, bias: bool = False):
        super().__init__()
        self.activation = activation
        d_in = d_ff * (2 if activation == "swiglu" else 1)  # swiglu: [gate; up] rows
        self.w_in = nn.Linear(d_model, d_in, bias=bias)
        self.w_out = nn.Linear(d_ff, d_model, bias=bias)

    def init_weights(self, std, out_std):
        init_linear(self.w_in, std)
        init_linear(self.w_out, out_std)

    def forward(self, x):
        return self.w_out(activate(self.w_in(x), self.activation))


def expert_ffn_loop(x, weights, ids, w_in, w_out, activation, keep_activations=False):
    """The mathematics, and the oracle of every backend: for each expert, the tokens that chose it.

    x (T, D), weights and ids (T, K), w_in (E, F or 2F, D), w_out (E, D, F) -> y (T, D) and the
    hidden activations (T, K, F) or None.
    """
    y = x.new_zeros(x.shape)
    acts = x.new_zeros(*ids.shape, w_out.shape[2]) if keep_activations else None
    for e, (w_in_e, w_out_e) in enumerate(zip(w_in.unbind(0), w_out.unbind(0))):
        token, choice = (ids == e).nonzero(as_tuple=True)
        act = activate(x[token] @ w_in_e.T, activation)  # (n, F)
        gate = weights[token, choice, None]  # (n, 1)
        y = y.index_add(0, token, ((act @ w_out_e.T) * gate).to(y.dtype))
        if keep_activations:
            acts = acts.index_put((token, choice), act.to(acts.dtype))
    return y, acts


class ExpertBank(nn.Module):
    """E expert FFNs with stacked weights: a layer's own experts, or a pool that layers share.

    Stacked, so that one grouped matmul serves all of them and an idle expert has a zero gradient
    rather than none (DDP would wait for it forever). No biases, as in the papers' models.
    """
    one_gradient = True  # of a pool, for all layers together (kernels.open_pool)

    def __init__(self, d_model: int, d_expert: int, n_experts: int, activation: str,
                 backend: str = "auto"):
        super().__init__()
        self.activation, self.backend = activation, backend
        d_in = d_expert * (2 if activation == "swiglu" else 1)  # swiglu: [gate; up] rows
        self.w_in = nn.Parameter(torch.empty(n_experts, d_in, d_model))  # (E, F or 2F, D)
        self.w_out = nn.Parameter(torch.empty(n_experts, d_model, d_expert))  # (E, D, F)

    def init_weights(self, std, out_std):
        nn.init.normal_(self.w_in, std=std)
        nn.init.normal_(self.w_out, std=out_std)

    def n_active(self, n_choices: int) -> int:
        """Parameters that one use of the bank reads: those of the chosen experts."""
        return n_choices * (self.w_in[0].numel() + self.w_out[0].numel())

    def open(self, n_layers, x, top_k):
        """For each layer that shares this pool what it calls in its place, in one forward pass: in
        training the pool goes through one node of autograd, so that its gradient is computed once
        for all layers. x (T, D): an example of a layer's input."""
        if self.backend == "loop" or not self.one_gradient:
            return [self] * n_layers
        if hasattr(self, "unshard"):  # fsdp: gathered from here on
            self.unshard()
        opened = kernels.open_pool(self.w_in, self.w_out, n_layers, x, top_k, self.backend)
        return [functools.partial(self.forward, opened=weights) for weights in opened]

    def forward(self, x, routing, keep_activations=False, opened=None):
        """x (T, D) -> y (T, D), activations (T, K, F) or None: y = sum_k weights_k expert_k(x)."""
        w_in, w_out, tickets = opened or (self.w_in, self.w_out, ())
        arguments = x, routing.weights, routing.ids, w_in, w_out, self.activation
        if self.backend == "loop":
            return expert_ffn_loop(*arguments, keep_activations)
        return kernels.expert_ffn(*arguments, self.backend, keep_activations, tickets)


class NeuronBank(ExpertBank):
    """PEER: experts of one neuron (or a few), so many that tokens gather the rows they need."""
    one_gradient = False

    def forward(self, x, routing, keep_activations=False):
        act = activate(row_products(x, routing.ids, self.w_in), self.activation)  # (T, K, F)
        y = sum_of_rows(act * routing.weights[..., None], routing.ids, self.w_out.mT)  # (T, D)
        return y.to(x.dtype), act if keep_activations else None


BANKS = dict(ffn=ExpertBank, neuron=NeuronBank)  # all are made as ExpertBank is


class MoE(nn.Module):
    """Router, experts, always-on experts: the layer that takes the FFN's place in a block.

    bank None: the experts come as an argument (a pool of GPT's), so that every weight has exactly
    one name in a checkpoint. shared: the always-on experts. d_depth, D or 0: a learned vector is
    added to x, so that experts which layers share know where they are (MoRE, eq. 3).
    """

    def __init__(self, router: nn.Module, bank=None, shared: FFN | None = None, d_depth: int = 0):
        super().__init__()
        self.router, self.bank, self.shared = router, bank, shared
        self.depth = nn.Embedding(1, d_depth) if d_depth else None

    def forward(self, x, pool=None, noise_seeds=None, token_ids=None, keep_activations=False):
        """x (T, D) -> y (T, D), Routing or tuple of Codes, activations (T, K, F) or None."""
        x = x if self.depth is None else x + self.depth.weight
        routing = self.router(x, noise_seeds, token_ids)
        bank = pool if self.bank is None else self.bank
        y, activations = bank(x, routing, keep_activations)
        return y if self.shared is None else y + self.shared(x), routing, activations


# --------------------------------------------------------------------------------------------------
# 3. Infinity-MoE: experts indexed by a continuous code


class GaussianRouter(nn.Module):
    """p(z | x) = N(mu(x), diag Sigma(x)) (infinity-MoE, section 3.2).

    mu and logvar are linear in x, or share one hidden layer. n_components > 1 makes it a mixture
    of Gaussians, its component drawn by straight-through Gumbel-softmax [ours]. stream numbers
    this router's noise. mean: z = mu, and no Sigma is made, as DDP would wait for the gradient of
    an unused parameter. A layer calls it through CodeRouter (support/deep.py), also at depth 1.
    """

    def __init__(self, d_in: int, dz: int, n_samples: int, n_components: int = 1,
                 d_hidden: int = 0, mean: bool = False, stream: int = 0):
        super().__init__()
        self.dz, self.n_samples, self.n_components = dz, n_samples, n_components
        self.mean, self.stream = mean, stream
        d = d_hidden or d_in
        self.hidden = nn.Linear(d_in, d_hidden) if d_hidden else None
        self.mu = nn.Linear(d, n_components * dz)
        self.logvar = None if mean else nn.Linear(d, n_components * dz)
        self.mixture = nn.Linear(d, n_components) if n_components > 1 else None

    def init_weights(self, std, out_std=None):
        for layer in (self.hidden, self.mu, self.mixture):
            if layer is not None:
                init_linear(layer, std)
        if self.logvar is not None:  # Sigma starts at the identity, for every token
            nn.init.zeros_(self.logvar.weight)
            nn.init.zeros_(self.logvar.bias)

    def of_component(self, layer, x, pick):
        """x (T, 1 or K, d_in), pick (T, 1 or K, C) or None -> mu or logvar (T, 1 or K, dz)."""
        y = linear_fp32(x, layer.weight, layer.bias)
        y = y.unflatten(-1, (self.n_components, self.dz))  # (T, 1 or K, C, dz)
        return y[..., 0, :] if pick is None else (pick[..., None] * y).sum(-2)

    def forward(self, x: Tensor, noise_seeds: Tensor) -> Codes:
        """x (T, 1 or K, d_in), seeds (T,) -> Codes, z (T, K, dz), or mu itself where z = mu."""
        if self.hidden is not None:
            x = F.silu(linear_fp32(x, self.hidden.weight, self.hidden.bias))
        pick = self.component(x, noise_seeds)
        mu = self.of_component(self.mu, x, pick)
        if self.mean:
            return Codes(mu, mu, torch.full_like(mu, -math.inf))
        logvar = self.of_component(self.logvar, x, pick).clamp(-10, 4)
        noise = normal_noise(noise_seeds, 2 * self.stream, self.n_samples * self.dz)
        noise = noise.unflatten(-1, (self.n_samples, self.dz)).to(mu.dtype)  # (T, K, dz)
        return Codes(mu + (logvar / 2).exp() * noise, mu, logvar)  # reparameterised

    def component(self, x, noise_seeds):
        """One-hot choice (T, 1 or K, C), its gradient the soft one's; the likeliest if z = mu."""
        if self.mixture is None:
            return None
        logits = linear_fp32(x, self.mixture.weight, self.mixture.bias)  # (T, 1 or K, C)
        if not self.mean:
            shape = self.n_samples, self.n_components
            noise = gumbel_noise(noise_seeds, 2 * self.stream + 1, math.prod(shape))
            logits = logits + noise.unflatten(-1, shape).to(logits.dtype)  # (T, K, C)
        soft = logits.softmax(-1)
        best = logits.argmax(-1, keepdim=True)
        hard = torch.zeros_like(soft).scatter(-1, best, 1.0)  # F.one_hot would wait for the host
        return hard - soft.detach() + soft


def masked_ffn_loop(x, z, w_in, w_out, w_z, n_keep, activation):
    """The mathematics, and the oracle of every backend: K whole FFNs, as the paper writes it.

    x (T, D), z (T, K, dz), w_in (F or 2F, D), w_out (D, F), w_z (F, dz) -> y (T, D).
    """
    y = 0
    for scores in F.linear(z, w_z).unbind(1):  # (T, F) each
        best = scores.argsort(dim=-1, descending=True, stable=True)[:, :n_keep]
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)
        mask = torch.where(kept, scores, 0)
        y = y + F.linear(activate(F.linear(x, w_in), activation) * mask, w_out)
    return y / z.shape[1]


class ContinuousBank(nn.Module):
    """One wide FFN whose hidden neurons a code z switches on: every z is an expert (section 3.2).

        m_k = TopN%( W_z z_k )    f(x, z_k) = W_2 ( m_k * act(W_1 x) )    y = (1/K) sum_k f(x, z_k)

    The N% largest entries keep their raw value, which carries the gradient to W_z and the router;
    the choice itself has none. The sum over samples moves inside W_2, because W_2 is linear: K
    samples cost one FFN and K thin mask products. Not so with masks before the activation or with
    H > 1 hidden layers, h_i = m_i * act(W_i h_{i-1}): there only W_1 x and W_2 are shared.

    rates: N per hidden layer, None for one without a mask. mask: "post", or "pre": act(m * W x).
    share_mask: one mask for all hidden layers.
    """

    def __init__(self, d_model: int, d_ff: int, dz: int, rates: tuple, activation: str,
                 mask: str = "post", share_mask: bool = False, backend: str = "auto"):
        super().__init__()
        self.activation, self.mask, self.share_mask = activation, mask, share_mask
        self.backend, self.rates = backend, rates
        self.n_keep = [None if r is None else max(1, math.floor(r * d_ff + 0.5)) for r in rates]
        widths = [d_model] + [d_ff] * (len(rates) - 1)
        d_in = d_ff * (2 if activation == "swiglu" else 1)
        self.w_in = nn.ParameterList([torch.empty(d_in, w) for w in widths])  # W_1 .. W_H
        self.w_out = nn.Parameter(torch.empty(d_model, d_ff))  # the paper's W_2
        masked = [str(i) for i, n in enumerate(self.n_keep) if n is not None]
        owners = masked[:1] if share_mask else masked
        self.w_z = nn.ParameterDict({i: torch.empty(d_ff, dz) for i in owners})

    def init_weights(self, std, out_std):
        for i, w in enumerate(self.w_in):
            nn.init.normal_(w, std=std)
            if i > 0:
                w.data.mul_(inner_scale(self, i, std))
        nn.init.normal_(self.w_out, std=out_std)
        for w in self.w_z.values():
            nn.init.normal_(w, std=w.shape[1] ** -0.5)  # W_z z starts at unit variance [ours]

    def n_active(self, n_choices: list[int]) -> int:
        """Parameters that a token uses at most: the share min(1, masks * N) of rows and columns;
        n_choices: masks that it has in each hidden layer (1 where z = mu)."""
        share = [1.0]  # of the input, then of each hidden layer
        for masks, rate in zip(n_choices, self.rates):
            share.append(1.0 if rate is None else min(1.0, masks * rate))
        matrices = zip([*self.w_in, self.w_out], share, [*share[1:], 1.0])
        used = sum(round(w.numel() * below * above) for w, below, above in matrices)
        return used + sum(w.numel() for w in self.w_z.values())

    def mask_scores(self, codes):
        """W_z z of every masked hidden layer that has its own mask: list of (T, K, F)."""
        return [linear_fp32(codes[int(i)].z, w) for i, w in self.w_z.items()]

    def usage(self, codes):
        """For each hidden layer with a W_z: scores (T, K, F), and each neuron's selections (F,)."""
        usage = []
        for i, scores in zip(self.w_z, self.mask_scores(codes)):
            selected = kernels.topn_mask(scores.detach(), self.n_keep[int(i)]) != 0
            usage.append((scores, selected.float().sum((0, 1))))
        return usage

    def masks(self, codes):
        """The H masks (T, K, F), None where the hidden layer is dense."""
        scores = zip(self.w_z, self.mask_scores(codes))
        kept = {i: kernels.topn_mask(s, self.n_keep[int(i)]) for i, s in scores}
        if self.share_mask:
            return [next(iter(kept.values()))] * len(codes)
        return [kept.get(str(i)) for i in range(len(codes))]

    def forward(self, x, codes, keep_activations=False):
        """x (T, D), H Codes -> y (T, D), activations of the last hidden layer (T, K, F) or None."""
        if len(codes) == 1 and self.mask == "post" and not keep_activations:
            arguments = (x, codes[0].z, self.w_in[0], self.w_out, self.w_z["0"], self.n_keep[0],
                         self.activation)
            if self.backend == "loop":
                return masked_ffn_loop(*arguments), None
            return kernels.masked_ffn(*arguments, backend=self.backend), None
        # the other forms: masks by `auto`, products in torch, whatever the backend
        h = x[:, None, :]  # (T, 1, D); W_1 x is shared by the samples
        for w, mask in zip(self.w_in, self.masks(codes)):
            h = gated(F.linear(h, w), mask, self.mask, self.activation)  # (T, K, F)
        return F.linear(h.mean(1), self.w_out), h if keep_activations else None


# --------------------------------------------------------------------------------------------------
# 4. Flavours: what each sets unless it is set by hand. Everything else is free to combine.

FLAVOURS = {
    "dense": {},
    "switch": dict(n_experts=8, top_k=1, router="softmax", norm_topk_prob=False, balance="layer"),
    "topk": dict(n_experts=8, top_k=2, router="softmax", norm_topk_prob=True, balance="layer"),
    "deepseek": dict(n_experts=8, top_k=2, n_shared_experts=1, router="sigmoid",
                     norm_topk_prob=True, balance="bias"),
    "hash": dict(n_experts=8, top_k=1, router="hash", norm_topk_prob=False, balance="none"),
    "unipool": dict(top_k=1, router="norm", norm_topk_prob=False, balance="pool", pool_groups=1),
    "lock": dict(top_k=1, router="lock", norm_topk_prob=False, balance="pool", pool_groups=1),
    "remoe": dict(n_experts=8, top_k=1, router="relu", norm_topk_prob=False, balance="layer",
                  balance_coef=1e-8),
    "peer": dict(n_experts=2**14, top_k=128, router="product", expert="neuron", d_expert=1,
                 norm_topk_prob=False, balance="none"),
    "infmoe": dict(infmoe_samples=2, infmoe_rate=0.25, infmoe_dz=64, infmoe_mask="post",
                   infmoe_depth=1, infmoe_mean=False, infmoe_z="independent",
                   infmoe_components=1, infmoe_share_mask=False, infmoe_hidden=0, balance="none"),
}
