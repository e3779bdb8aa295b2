"""Mixture-of-experts layers: every flavour of this repository, router by router and loss by loss.

    y = sum over e in TopK(scores(x)) of  gate_e(x) * expert_e(x)                    the discrete experts (section 0)
    y = (1/K) sum over k of  f(x, z_k),   z_k ~ p(z | x)                             the continuous ones (infinity-MoE)

Three kinds of parts, and nothing else:
  1. a *router* looks at a token and says who works: `Routing` (discrete) or `Codes` (continuous);
  2. a *bank* holds the experts' weights and does the work. One layer may own it, or many layers may share it (a pool);
  3. a *loss* or a *diagnostic* is a pure function of what the routers returned. Import them into any codebase.

Letters in shapes: T tokens (batch x sequence), D model width, F expert width, E experts to choose from, K chosen experts
(or samples), L layers, M size of a pool, dz width of a code z, C components of a mixture of Gaussians, H hidden layers.

Papers: UniPool (arXiv 2605.06665), infinity-MoE (arXiv 2601.17680), specialization and coupling losses (arXiv 2602.14159),
Switch (2101.03961), DeepSeekMoE / V3 (2401.06066, 2412.19437), ST-MoE (2202.08906), KERN's NormRouter. "[ours]" marks a
choice that no paper makes.
"""
import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import kernels
from kernels import activate


class Routing(NamedTuple):
    """What a discrete router decided for T tokens."""
    weights: torch.Tensor  # (T, K) gates of the chosen experts
    ids: torch.Tensor      # (T, K) int64, the chosen experts, best first, distinct within a token
    scores: torch.Tensor   # (T, E) scores of all experts, before the cut
    logits: torch.Tensor   # (T, E) raw outputs of the router's matrix


class Codes(NamedTuple):
    """What a Gaussian router drew for T tokens: points in the continuous space of experts."""
    z: torch.Tensor       # (T, K, dz) samples
    mu: torch.Tensor      # (T, 1 or K, dz) means
    logvar: torch.Tensor  # (T, 1 or K, dz) log of the diagonal of Sigma


def linear_fp32(x, weight, bias=None):
    """x @ weight.T + bias in float32 at least: routing decisions must not hang on bfloat16's eight bits."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


# ----------------------------------------------------------------------------------------------------------------------
# 1. Discrete routers. They share everything but the map from logits to scores.

class Router(nn.Module):
    """Scores all experts, picks the top K. Subclasses define `scores`.

    norm_topk_prob: divide the gates by their sum. selection_bias: choose on score + bias, gate without it (DeepSeek-V3's
    balancing; the buffer is read here and written only by `update_bias`, once per optimizer step).
    """

    def __init__(self, d_model, n_experts, top_k, norm_topk_prob=False, selection_bias=False):
        super().__init__()
        if not 1 <= top_k <= n_experts:
            raise ValueError(f"top_k={top_k} must lie between 1 and n_experts={n_experts}")
        self.top_k, self.norm_topk_prob = top_k, norm_topk_prob
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))  # (E, D)
        self.register_buffer("bias", torch.zeros(n_experts) if selection_bias else None)

    def init_weights(self, std):
        nn.init.normal_(self.weight, std=std)
        if self.bias is not None:
            self.bias.zero_()

    def scores(self, logits):
        raise NotImplementedError

    def forward(self, x, token_keys=None):
        """x (T, D) -> Routing. token_keys are for routers that draw noise; this one draws none."""
        logits = linear_fp32(x, self.weight)  # (T, E)
        scores = self.scores(logits)
        choice = scores if self.bias is None else scores + self.bias
        ids = choice.detach().topk(self.top_k, dim=-1).indices  # (T, K)
        weights = scores.gather(-1, ids)  # (T, K)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
        return Routing(weights, ids, scores, logits)

    @torch.no_grad()
    def update_bias(self, load, rate):
        """b_e += rate * sign(mean load - load_e), load (E,) over the global batch (DeepSeek-V3, eq. 16 ff.)."""
        self.bias += rate * torch.sign(load.mean() - load)


class SoftmaxRouter(Router):
    """Switch, GShard, Mixtral, OLMoE: s = softmax(W_r x)."""

    def scores(self, logits):
        return logits.softmax(-1)


class SigmoidRouter(Router):
    """DeepSeek-V3: s = sigmoid(W_r x), experts do not compete for mass."""

    def scores(self, logits):
        return logits.sigmoid()


class NormRouter(Router):
    """UniPool / KERN: s = sigma * c * relu(z / ||z||), z = W_r x. The scale of x and of W_r cancels, so routers at
    different depths speak to the shared pool at one volume. Tokens with fewer than K positive logits choose zero-score
    experts too: their gate is 0."""

    def __init__(self, d_model, n_experts, top_k, norm_topk_prob=False, selection_bias=False):
        super().__init__(d_model, n_experts, top_k, norm_topk_prob, selection_bias)
        self.sigma = nn.Parameter(torch.ones(1))  # learnable, one per router; shape (1,) because FSDP shards no scalars
        self.c = norm_router_constant(n_experts, top_k)

    def init_weights(self, std):
        super().init_weights(std)
        nn.init.ones_(self.sigma)

    def scores(self, logits):
        unit = logits / (torch.linalg.vector_norm(logits, dim=-1, keepdim=True) + 1e-8)
        return self.sigma.to(logits.dtype) * self.c * unit.relu()


@functools.lru_cache
def norm_router_constant(n_experts, top_k, n_draws=100_000, seed=0):
    """c = E[ 1 / ||top-K of relu(g / ||g||)||_2 ], g ~ N(0, I_E): makes the chosen scores' norm about sigma at the start.

    For few experts the mean does not exist (no positive entry: division by zero), so draws whose top-K norm is below 0.05
    are left out [ours; the official code returns inf at E = 8]. Monte Carlo with a fixed seed, on the CPU, whatever the
    model's device, so every rank gets the same float.
    """
    rng, norms = np.random.default_rng(seed), []
    for start in range(0, n_draws, 10_000):  # bounded memory: 10,000 x E floats at a time
        g = rng.standard_normal((min(10_000, n_draws - start), n_experts), dtype=np.float32)
        unit = np.maximum(g / np.linalg.norm(g, axis=1, keepdims=True), 0)
        top = np.partition(unit, n_experts - top_k, axis=1)[:, n_experts - top_k:]
        norms.append(np.linalg.norm(top.astype(np.float64), axis=1))
    norms = np.concatenate(norms)
    return float(np.mean(1 / norms[norms >= 0.05]))


ROUTERS = {"softmax": SoftmaxRouter, "sigmoid": SigmoidRouter, "norm": NormRouter}


# ----------------------------------------------------------------------------------------------------------------------
# 2. Experts.

class FFN(nn.Module):
    """The dense feed-forward of a GPT-2 (gelu) or LLaMA (swiglu) block; also the always-on "shared" experts of
    DeepSeekMoE, n of them being one FFN of n times the width."""

    def __init__(self, d_model, d_ff, activation, bias=False):
        super().__init__()
        self.activation = activation
        self.w_in = nn.Linear(d_model, d_ff * (2 if activation == "swiglu" else 1), bias=bias)  # swiglu: [gate; up] rows
        self.w_out = nn.Linear(d_ff, d_model, bias=bias)

    def init_weights(self, std, out_std):
        for layer, s in ((self.w_in, std), (self.w_out, out_std)):
            nn.init.normal_(layer.weight, std=s)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x):
        return self.w_out(activate(self.w_in(x), self.activation))


class ExpertBank(nn.Module):
    """E expert FFNs with stacked weights: a layer's own experts, or a pool that several layers share.

    Stacked, so that an idle expert has a zero gradient rather than none (DDP would wait for it for ever) and one grouped
    matmul serves all of them. No biases, as in every MoE of the table in papers.
    """

    def __init__(self, d_model, d_expert, n_experts, activation, backend="auto"):
        super().__init__()
        self.activation, self.backend = activation, backend
        d_in = d_expert * (2 if activation == "swiglu" else 1)  # swiglu: [gate; up] rows
        self.w_in = nn.Parameter(torch.empty(n_experts, d_in, d_model))  # (E, F or 2F, D)
        self.w_out = nn.Parameter(torch.empty(n_experts, d_model, d_expert))  # (E, D, F)

    def init_weights(self, std, out_std):
        nn.init.normal_(self.w_in, std=std)
        nn.init.normal_(self.w_out, std=out_std)

    def forward(self, x, routing, keep_activations=False):
        """x (T, D) -> y (T, D), activations (T, K, F) or None. y = sum_k weights_k * expert_ids_k(x)."""
        return kernels.expert_ffn(x, routing.weights, routing.ids, self.w_in, self.w_out, self.activation,
                                  backend=self.backend, keep_activations=keep_activations)


class MoE(nn.Module):
    """Router, experts, always-on experts: the layer that takes the FFN's place in a block.

    bank None: the experts come as an argument (a pool), so that every weight has one name in a checkpoint.
    """

    def __init__(self, router, bank=None, shared=None):
        super().__init__()
        self.router, self.bank, self.shared = router, bank, shared

    def forward(self, x, pool=None, token_keys=None, keep_activations=False):
        """x (T, D) -> y (T, D), Routing or tuple of Codes, activations (T, K, F) or None."""
        routing = self.router(x, token_keys)
        bank = pool if self.bank is None else self.bank
        y, activations = bank(x, routing, keep_activations)
        if self.shared is not None:
            y = y + self.shared(x)
        return y, routing, activations


# ----------------------------------------------------------------------------------------------------------------------
# 3. Infinity-MoE: experts indexed by a continuous code.

MASK32 = 0xFFFFFFFF


def hash32(x):
    """Mixes the low 32 bits of an int64 tensor or int (two rounds of xor-shift-multiply; the constant keeps products < 2^63)."""
    for _ in range(2):
        x = (((x >> 16) ^ x) * 0x45D9F3B) & MASK32
    return (x >> 16) ^ x


def token_keys(sequence_keys, positions):
    """One 32-bit key per token from the key of its sequence (B,) int64 and its position (S,) -> (B*S,) int64."""
    low, high = sequence_keys & MASK32, (sequence_keys >> 32) & MASK32
    keys = hash32(hash32((low + 0x9E3779B9) & MASK32) ^ high)  # (B,)
    return hash32(keys[:, None] ^ hash32(positions + 0x7F4A7C15)[None, :]).flatten()  # (B, S) -> (T,)


def uniform_noise(keys, stream, n):
    """n numbers in (0, 1) per token, a pure function of (key, stream, index): no generator state, so ranks, accumulation,
    recomputation, resuming, the KV cache and torch.compile all see the same noise [ours]. keys (T,) -> (T, n) float32."""
    salt = hash32((torch.arange(n, device=keys.device) + hash32(stream + 1)) & MASK32)  # (n,)
    bits = hash32((hash32(keys)[:, None] + salt[None, :]) & MASK32)  # (T, n)
    return ((bits >> 8).float() + 0.5).mul(2.0**-24).clamp_max(1 - 2.0**-24)  # with all bits set + 0.5 rounds up, to 1


def normal_noise(keys, stream, n):
    """Standard normal numbers by Box-Muller from `uniform_noise`: keys (T,) -> (T, n). Number i does not depend on n, so K
    samples are the first K of more."""
    u, v = uniform_noise(keys, stream, n + n % 2).unflatten(-1, (-1, 2)).unbind(-1)  # (T, n/2) each
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)[:, :n]


class GaussianRouter(nn.Module):
    """p(z | x) = N(mu(x), diag Sigma(x)), section 3.2; C > 1 makes it a mixture, the component drawn by straight-through
    Gumbel-softmax [ours; the paper's section 6.2 asks for it]. mu and logvar are linear, or share one hidden layer.

    stream numbers this router's noise (its layer and place in it). mean: z = mu always, and no logvar is learned (an unused
    parameter would stall DDP). n_samples may be changed after training, and a trained Sigma be ignored by `mean`.
    """

    def __init__(self, d_in, dz, n_samples, n_components=1, d_hidden=0, mean=False, stream=0):
        super().__init__()
        self.dz, self.n_samples, self.n_components, self.mean, self.stream = dz, n_samples, n_components, mean, stream
        d = d_hidden or d_in
        self.hidden = nn.Linear(d_in, d_hidden) if d_hidden else None
        self.mu = nn.Linear(d, n_components * dz)
        self.logvar = None if mean else nn.Linear(d, n_components * dz)
        self.mixture = nn.Linear(d, n_components) if n_components > 1 else None

    def init_weights(self, std):
        for layer in (self.hidden, self.mu, self.mixture):
            if layer is not None:
                nn.init.normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)
        if self.logvar is not None:
            nn.init.zeros_(self.logvar.weight)  # Sigma starts at the identity, for every token
            nn.init.zeros_(self.logvar.bias)

    def of_component(self, layer, x, pick):
        """mu or logvar (T, 1 or K, dz) of the picked component: x (T, 1 or K, d_in), pick (T, 1 or K, C) or None."""
        y = linear_fp32(x, layer.weight, layer.bias).unflatten(-1, (self.n_components, self.dz))  # (T, 1 or K, C, dz)
        return y[..., 0, :] if pick is None else (pick[..., None] * y).sum(-2)

    def forward(self, x, keys):
        """x (T, 1 or K, d_in), keys (T,) -> Codes with z (T, K, dz); (T, 1, dz) and Sigma = 0 where z = mu."""
        if self.hidden is not None:
            x = F.silu(linear_fp32(x, self.hidden.weight, self.hidden.bias))
        pick = self.component(x, keys)
        mu = self.of_component(self.mu, x, pick)
        if self.mean:
            return Codes(mu, mu, torch.full_like(mu, -math.inf))
        logvar = self.of_component(self.logvar, x, pick).clamp(-10, 4)
        noise = normal_noise(keys, 2 * self.stream, self.n_samples * self.dz)
        noise = noise.unflatten(-1, (self.n_samples, self.dz))  # (T, K, dz)
        return Codes(mu + (logvar / 2).exp() * noise.to(mu.dtype), mu, logvar)  # reparameterised

    def component(self, x, keys):
        """One-hot choice (T, 1 or K, C) with the soft choice's gradient; the likeliest component for z = mu."""
        if self.mixture is None:
            return None
        logits = linear_fp32(x, self.mixture.weight, self.mixture.bias)  # (T, 1 or K, C)
        if not self.mean:
            u = uniform_noise(keys, 2 * self.stream + 1, self.n_samples * self.n_components)
            u = u.unflatten(-1, (self.n_samples, self.n_components))  # (T, K, C)
            logits = logits - (-u.log()).log().to(logits.dtype)  # + Gumbel noise
        soft = logits.softmax(-1)
        hard = torch.zeros_like(soft).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)  # F.one_hot would wait for the host
        return hard - soft.detach() + soft


class CodeRouter(nn.Module):
    """The codes of all H hidden layers of a continuous FFN (H = 1 in the paper).

    z independent: a router per hidden layer. shared: one z, read by each layer's own W_z. hierarchical: the next layer's
    density sees the previous z, z_{i+1} ~ N(mu_i(x, z_i), Sigma_i(x, z_i)): coarse to fine. Hidden layers from `mean_from`
    on use z = mu; hidden layers of rate None have no mask and need no code.
    """

    def __init__(self, d_model, dz, n_samples, rates, z="independent", mean_from=None, mean=False, layer=0, **density):
        super().__init__()
        self.rates, self.z = rates, z
        self.mean_from = 0 if mean else len(rates) if mean_from is None else mean_from
        masked = [i for i, rate in enumerate(rates) if rate is not None]
        owners = masked[:1] if z == "shared" else masked
        self.densities = nn.ModuleDict({
            str(i): GaussianRouter(d_model + (dz if z == "hierarchical" and i != masked[0] else 0), dz, n_samples,
                                   mean=i >= self.mean_from, stream=layer * len(rates) + i, **density) for i in owners})

    def init_weights(self, std):
        for density in self.densities.values():
            density.init_weights(std)

    def forward(self, x, keys):
        """x (T, D), keys (T,) -> a tuple of H Codes (None where the hidden layer is dense)."""
        codes, last = [], None
        x = x[:, None, :]  # (T, 1, D)
        for i, rate in enumerate(self.rates):
            if rate is None:
                codes.append(None)
                continue
            if last is None or self.z == "independent":
                code = self.densities[str(i)](x, keys)
            elif self.z == "shared":
                code = Codes(last.mu, last.mu, last.logvar) if i >= self.mean_from else last
            else:
                given = torch.cat((x.expand(-1, last.z.shape[1], -1).to(last.z.dtype), last.z), dim=-1)  # (T, K, D + dz)
                code = self.densities[str(i)](given, keys)
            codes.append(code)
            last = code
        return tuple(codes)


class ContinuousBank(nn.Module):
    """One wide FFN whose hidden neurons a code z switches on: every z is an expert (section 3.2).

        m_k = TopN%( W_z z_k )      f(x, z_k) = W_2 ( m_k * act(W_1 x) )      y = (1/K) sum_k f(x, z_k)

    The N% largest entries keep their raw value, which carries the gradient to W_z and the router; the choice itself has
    none. With H > 1 (the deep extension) h_i = m_i * act(W_i h_{i-1}). mask "pre" puts it inside: act(m * W x).
    rates: one per hidden layer, None for a layer without mask. share_mask: one mask for all hidden layers.
    """

    def __init__(self, d_model, d_ff, dz, rates, activation, mask="post", share_mask=False, backend="auto"):
        super().__init__()
        self.activation, self.mask, self.share_mask, self.backend = activation, mask, share_mask, backend
        self.n_keep = [None if r is None else max(1, math.floor(r * d_ff + 0.5)) for r in rates]
        widths = [d_model] + [d_ff] * (len(rates) - 1)
        d_in = d_ff * (2 if activation == "swiglu" else 1)
        self.w_in = nn.ParameterList([torch.empty(d_in, w) for w in widths])  # W_1 .. W_H
        self.w_out = nn.Parameter(torch.empty(d_model, d_ff))  # the paper's W_2
        masked = [str(i) for i, n in enumerate(self.n_keep) if n is not None]
        self.w_z = nn.ParameterDict({i: torch.empty(d_ff, dz) for i in (masked[:1] if share_mask else masked)})

    def init_weights(self, std, out_std):
        for w in self.w_in:
            nn.init.normal_(w, std=std)
        nn.init.normal_(self.w_out, std=out_std)
        for w in self.w_z.values():
            nn.init.normal_(w, std=w.shape[1] ** -0.5)  # entries of W_z z start at unit variance [ours]

    def mask_scores(self, codes):
        """W_z z of every masked hidden layer that has its own mask: list of (T, K, F)."""
        return [linear_fp32(codes[int(i)].z, w) for i, w in self.w_z.items()]

    def usage(self, codes):
        """Per own mask: its scores (T, K, F), and how often each neuron was selected (F,) float32, without gradient."""
        return [(s, (kernels.topn_mask(s.detach(), self.n_keep[int(i)]) != 0).float().sum((0, 1)))
                for i, s in zip(self.w_z, self.mask_scores(codes))]

    def masks(self, codes):
        """The H masks (T, K, F), None where the hidden layer is dense."""
        kept = {i: kernels.topn_mask(s, self.n_keep[int(i)]) for i, s in zip(self.w_z, self.mask_scores(codes))}
        if self.share_mask:
            return [next(iter(kept.values()))] * len(codes)
        return [kept.get(str(i)) for i in range(len(codes))]

    def hidden(self, x, w, mask):
        """One hidden layer: x (T, 1 or K, D or F), mask (T, K, F) or None -> (T, 1 or K, F)."""
        h = F.linear(x, w)
        if mask is None:
            return activate(h, self.activation)
        mask = mask.to(h.dtype)
        if self.mask == "post":
            return mask * activate(h, self.activation)
        if self.activation == "gelu":
            return activate(mask * h, "gelu")
        gate, up = h.chunk(2, dim=-1)  # (T, ., F) each
        return F.silu(mask * gate) * up

    def forward(self, x, codes, keep_activations=False):
        """x (T, D), H Codes -> y (T, D), activations of the last hidden layer (T, K, F) or None."""
        if len(codes) == 1 and codes[0] is not None and self.mask == "post" and not keep_activations:
            # The sum over samples moves inside W_2 (it is linear): K samples cost one FFN and K thin mask products.
            return kernels.masked_ffn(x, codes[0].z, self.w_in[0], self.w_out, self.w_z["0"], self.n_keep[0],
                                      self.activation, backend=self.backend), None
        h = x[:, None, :]  # (T, 1, D); W_1 x is shared by the samples
        for w, mask in zip(self.w_in, self.masks(codes)):
            h = self.hidden(h, w, mask)  # (T, K, F)
        return F.linear(h.mean(1), self.w_out), h if keep_activations else None


# ----------------------------------------------------------------------------------------------------------------------
# 4. Losses: pure functions of plain tensors, without coefficients.

def expert_counts(ids, n_experts):
    """How many of the assignments went to each expert: ids (...) int64 -> (E,) float32, no gradient, no host sync."""
    ones = torch.ones(ids.numel(), device=ids.device)
    return torch.zeros(n_experts, device=ids.device).index_add_(0, ids.flatten(), ones)


def normalise_scores(scores, eps=1e-20):
    """Scores (T, E) divided by their sum, for routers whose scores are no distribution."""
    return scores / scores.sum(-1, keepdim=True).clamp_min(eps)


def load_balance_loss(scores, counts):
    """E * sum_e f_e P_e (Switch, eq. 4-6): scores (T, E), counts (E,) assignments over the global batch -> scalar.

    f is a constant; the gradient flows through P, the mean score. Balanced: sum_e P_e, which is 1 where scores sum to 1.
    """
    return pool_loss([scores], [counts])


def pool_loss(scores, counts):
    """M * sum_i fbar_i Pbar_i over the L layers that share one pool (UniPool): lists of L (T, M) and L (M,) -> scalar.

    fbar, Pbar are means over layers of f^(l), P^(l): a layer may be as peaked as it likes while the pool as a whole is
    evenly used. The paper's code takes fbar from the previous micro-batch; here both are of this one [ours].
    """
    f = torch.stack([c / c.sum() for c in counts]).mean(0).detach()  # (M,)
    p = torch.stack([s.mean(0) for s in scores]).mean(0)  # (M,)
    return f.numel() * (f.to(p.dtype) * p).sum()


def z_loss(logits):
    """mean_x logsumexp(logits)^2 (ST-MoE, eq. 5): keeps router logits small. logits (T, E) -> scalar."""
    return logits.logsumexp(-1).square().mean()


def pair_cosines(activations, eps=1e-12):
    """Cosines between the activations of the experts that one token chose: (T, K, F) -> (T, K*(K-1)/2).

    By the K x K products of a token's activations: the large tensor is read once, and in fp32 never copied. torch.compile
    makes one pass of sums of products, which beats as many tiny matrix products as there are tokens while K is small.
    """
    k = activations.shape[1]
    i, j = torch.triu_indices(k, k, 1, device=activations.device)
    with torch.autocast(activations.device.type, enabled=False):
        a = activations.to(torch.promote_types(activations.dtype, torch.float32))
        if k <= 4 and torch.compiler.is_compiling():
            rows = a.unbind(1)  # K times (T, F)
            squares = torch.stack([r.square().sum(-1) for r in rows], 1)  # (T, K)
            products = torch.stack([(rows[m] * rows[n]).sum(-1) for m in range(k) for n in range(m + 1, k)], 1)
        else:
            gram = a @ a.transpose(1, 2)  # (T, K, K)
            squares, products = gram.diagonal(dim1=1, dim2=2), gram[:, i, j]
    norms = squares.clamp_min(eps**2).sqrt()
    return products / (norms[:, i] * norms[:, j])


def specialization_loss(activations, form="square"):
    """mean over tokens and pairs e != v in TopK(x) of cos(a_e(x), a_v(x))^2: (T, K, F), K >= 2 -> scalar (2602.14159).

    a_e is expert e's hidden activation before its down projection. form: square (sign-free), abs, or plain.
    """
    if activations.shape[1] < 2:
        raise ValueError("specialization_loss compares the experts of one token: it needs K >= 2 activations, got 1")
    cos = pair_cosines(activations)
    return {"square": cos.square, "abs": cos.abs, "plain": lambda: cos}[form]().mean()


def coupling_loss(scores, ids, next_scores, next_ids, paths=None):
    """- mean_x sum_{e in TopK_l} sum_{v in TopK_l+1} w_ev s_l,e s_l+1,v for two adjacent layers (2602.14159) -> scalar.

    scores (T, E) are normalised over all experts here; ids (T, K). paths None: w = 1, the loss as published, which
    factorises into the product of the two top-K masses ("mass"). paths (E, E): w_ev, a detached estimate of how often v
    follows e with rows summing to 1, so that coherent pathways are what is rewarded ("path") [ours].
    """
    s = normalise_scores(scores).gather(-1, ids)  # (T, K)
    n = normalise_scores(next_scores).gather(-1, next_ids)  # (T, K)
    if paths is None:
        return -(s.sum(-1) * n.sum(-1)).mean()
    w = paths.detach()[ids[:, :, None], next_ids[:, None, :]].to(s.dtype)  # (T, K, K)
    return -torch.einsum("te,tev,tv->t", s, w, n).mean()


def neuron_balance_loss(scores, counts):
    """F * sum_j q_j mean softmax(W_z z)_j: the layer loss for infinity-MoE's neurons [ours]. scores (T, K, F), counts (F,)."""
    return load_balance_loss(scores.softmax(-1).flatten(0, 1), counts)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Diagnostics: pure functions too, for the training log and for probe.py.

def shares(counts):
    """counts (..., E) -> shares that sum to 1 (all zero where nothing was counted)."""
    return counts / counts.sum(-1, keepdim=True).clamp_min(1)


def max_share(counts):
    """Largest share of the assignments that one expert gets, times E: 1 is even, E is collapse. (..., E) -> (...)."""
    return shares(counts).amax(-1) * counts.shape[-1]


def dead_share(counts):
    """Share of the experts that got nothing. (..., E) -> (...)."""
    return (counts == 0).float().mean(-1)


def imbalance(counts):
    """E * sum_e f_e^2: 1 is even, E is collapse. (..., E) -> (...)."""
    return shares(counts).square().sum(-1) * counts.shape[-1]


def usage_entropy(counts):
    """H(q) / log E of the shares q: infinity-MoE's normalised routing entropy (section 5.4), and a pool's. (..., E) -> (...)."""
    q = shares(counts)
    return -torch.special.xlogy(q, q).sum(-1) / math.log(max(2, counts.shape[-1]))  # a single expert: 0, not 0/0


def routing_entropy(scores):
    """mean_x H(s(x)) / log E of the normalised scores (T, E): 1 is undecided, 0 is certain."""
    s = normalise_scores(scores)
    return -torch.special.xlogy(s, s).sum(-1).mean() / math.log(max(2, scores.shape[-1]))


def path_counts(ids, next_ids, n_experts):
    """How often expert v of the next layer follows e for the same token: (T, K), (T, K) -> (E, E) float32."""
    pairs = ids[:, :, None] * n_experts + next_ids[:, None, :]  # (T, K, K)
    return expert_counts(pairs, n_experts * n_experts).view(n_experts, n_experts)


def path_consistency(ids, next_ids, n_experts):
    """Share of tokens whose next layer's first choice is the most frequent successor of this layer's first choice."""
    counts = path_counts(ids[:, :1], next_ids[:, :1], n_experts)
    return counts.amax(-1).sum() / counts.sum()


def unique_experts(ids):
    """Distinct experts a token meets over the depth of a pool, over the L*K it could meet: ids (L, T, K) -> scalar mean."""
    path = ids.transpose(0, 1).flatten(1).sort(-1).values  # (T, L*K)
    return (1 + (path[:, 1:] != path[:, :-1]).sum(-1)).float().mean() / path.shape[1]


def overlap(activations):
    """mean |cos| of co-activated experts' activations (T, K, F): what the specialization loss should lower."""
    return pair_cosines(activations).abs().mean()
