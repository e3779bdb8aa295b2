"""The transformer: GPT-2 and LLaMA blocks around the experts of moe.py, KV cache, checkpoints.

Reads top to bottom: the configuration and what each flavour sets, attention, the block, GPT (forward, losses, generation).
`python model.py config/unipool_182m.py` prints the parameter counts of a configuration, `--out_dir=out/x` a checkpoint's;
`python model.py --out_dir=out/x --export=DIR` writes that checkpoint for transformers' AutoModelForCausalLM.

Letters in shapes: B sequences, S positions, T = B*S tokens, D width, H heads, G key/value heads, d head width, V vocabulary,
E experts, K chosen ones, L layers with experts.
"""
import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args, get_type_hints

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import moe

# What a flavour sets unless it is set by hand (papers.md has the sources). Everything else about experts is free to combine.
FLAVOURS = {
    "dense": {},
    "switch": dict(n_experts=8, top_k=1, router="softmax", norm_topk_prob=False, balance="layer"),
    "topk": dict(n_experts=8, top_k=2, router="softmax", norm_topk_prob=True, balance="layer"),
    "deepseek": dict(n_experts=8, top_k=2, n_shared_experts=1, router="sigmoid", norm_topk_prob=True, balance="bias"),
    "unipool": dict(top_k=1, router="norm", norm_topk_prob=False, balance="pool", pool_groups=1),
    "infmoe": dict(infmoe_samples=2, infmoe_rate=0.25, infmoe_dz=64, infmoe_mask="post", infmoe_depth=1, infmoe_mean=False,
                   infmoe_z="independent", infmoe_components=1, infmoe_share_mask=False, infmoe_hidden=0, balance="none"),
}
DISCRETE = ("n_experts", "top_k", "n_shared_experts", "router", "norm_topk_prob")  # fields that infmoe has no use for
COEFFICIENTS = {"none": 0.0, "layer": 1e-2, "pool": 1e-2, "bias": 1e-3}  # Switch; UniPool at 182M; DeepSeek-V3's rate


@dataclass
class ModelConfig:
    arch: Literal["gpt2", "llama"] = "gpt2"  # gpt2: LayerNorm, GELU, learned positions; llama: RMSNorm, SwiGLU, RoPE
    flavour: Literal["dense", "switch", "topk", "deepseek", "unipool", "infmoe"] = "dense"  # sets the defaults below
    n_layer: int = 6
    n_head: int = 6
    n_kv_head: int | None = None  # key/value heads (grouped-query attention); None: n_head
    d_model: int = 384
    d_ff: int | None = None  # width of a dense FFN; None: 4 * d_model
    head_dim: int | None = None  # None: d_model / n_head
    block_size: int = 256  # context, tokens
    vocab_size: int = 257  # 257: bytes and end of text; GPT-2's BPE: 50257, padded to 50304 or 51200
    dropout: float = 0.0
    bias: bool | None = None  # biases in attention, dense FFN and LayerNorm; None: gpt2 yes, llama no
    qk_norm: Literal["none", "head", "full"] = "none"  # RMSNorm on queries and keys: per head (Qwen3), over all (OLMoE)
    norm_eps: float = 1e-5
    tie_embeddings: bool | None = None  # None: gpt2 yes, llama no
    rope_base: float = 10000.0
    init_std: float = 0.02  # layers that write into the residual stream get init_std / sqrt(2 * n_layer)

    n_experts: int | None = None  # per layer; for a pool: its size M; None: the flavour's (8; unipool 8 per layer)
    top_k: int | None = None  # experts per token
    n_shared_experts: int | None = None  # always-on experts beside the chosen ones
    d_expert: int | None = None  # width of one expert; None: d_ff (infmoe: 2 * d_ff, of which a sample uses a part)
    router: Literal["softmax", "sigmoid", "norm"] | None = None
    norm_topk_prob: bool | None = None  # divide the gates of the chosen experts by their sum
    balance: Literal["none", "layer", "pool", "bias"] | None = None  # auxiliary loss per layer, per pool, or selection bias
    balance_coef: float | None = None  # None: 1e-2 for the losses; 1e-3, a rate per step, for bias
    balance_scores: Literal["raw", "normalised"] | None = None  # None: raw, as in the papers; normalised for sigmoid
    z_coef: float = 0.0  # ST-MoE's z-loss on router logits
    pool_groups: int | None = None  # G pools over the depth, each shared by adjacent layers; 0: every layer has its own bank
    moe_every: int = 1  # experts in every n-th block, counted from the end; the others have a dense FFN
    specialization_coef: float = 0.0  # lambda_sp; the paper uses 2e-3
    coupling_coef: float = 0.0  # lambda_cp; the paper uses 1e-3
    coupling: Literal["mass", "path"] = "mass"  # as published, or weighted by the observed paths
    infmoe_samples: int | None = None  # K samples of z per token
    infmoe_rate: float | tuple | None = None  # N: share of the neurons that a sample keeps; a tuple: per hidden layer
    infmoe_dz: int | None = None  # width of the code z
    infmoe_mask: Literal["post", "pre"] | None = None  # m * act(W x), as published, or act(m * W x)
    infmoe_depth: int | None = None  # hidden layers of the FFN
    infmoe_z: Literal["independent", "shared", "hierarchical"] | None = None  # how the hidden layers' z relate
    infmoe_components: int | None = None  # Gaussians in the router's mixture
    infmoe_mean: bool | None = None  # z = mu everywhere: deterministic, one mask
    infmoe_mean_from: int | None = None  # hidden layers from this one on (0: first) use z = mu
    infmoe_share_mask: bool | None = None  # one mask for all hidden layers
    infmoe_hidden: int | None = None  # width of a hidden layer in the router; 0: linear maps
    backend: Literal["auto", "loop", "grouped", "triton"] = "auto"  # who multiplies the experts

    def __post_init__(self):
        given = {f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None}
        self._check_values()
        self._resolve()
        self._check_shape(given)
        {"dense": self._check_dense, "infmoe": self._check_infmoe}.get(self.flavour, self._check_discrete)(given)

    def _check_values(self):
        """Each field by itself: its type, as on the command line, and its range."""
        for name, hint in get_type_hints(ModelConfig).items():
            value, parts = getattr(self, name), get_args(hint) or (hint,)  # int | None -> int, NoneType
            allowed = [kind for part in parts for kind in get_args(part) or (part,)]  # Literal["a", "b"] -> "a", "b"
            if type(value) is int and float in allowed:
                value = float(value)
                setattr(self, name, value)
            expected = " | ".join(getattr(kind, "__name__", kind) for kind in allowed).replace("NoneType", "None")
            _require(type(value) in allowed or value in allowed, f"{name}={value!r}: expected {expected}")
            low = 0 if name in MAY_BE_ZERO else 1
            _require(type(value) is not int or value >= low, f"{name}={value} must be at least {low}")
            _require(type(value) is not float or 0 <= value < math.inf, f"{name}={value} must be finite and not negative")

    def _default(self, **values):
        for name, value in values.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def _resolve(self):
        """Fill every None that has a meaning here; what has none (experts of a dense model, say) stays None."""
        gpt2 = self.arch == "gpt2"
        self._default(n_kv_head=self.n_head, d_ff=4 * self.d_model, bias=gpt2, tie_embeddings=gpt2,
                      head_dim=self.d_model // max(1, self.n_head))
        if self.flavour == "dense":
            return
        preset = dict(FLAVOURS[self.flavour])
        if self.top_k == 1:
            preset["norm_topk_prob"] = False  # a gate divided by itself is 1: no gradient would reach the router
        self._default(**{"pool_groups": 0, **preset})
        self._default(balance_coef=COEFFICIENTS[self.balance])
        if self.flavour == "infmoe":
            self._default(d_expert=2 * self.d_ff)
            return
        self._default(n_shared_experts=0, d_expert=self.d_ff,
                      n_experts=8 * len(self.moe_layers()) // max(1, self.pool_groups or len(self.moe_layers())))
        if self.balance in ("layer", "pool"):
            self._default(balance_scores="normalised" if self.router == "sigmoid" else "raw")

    def moe_layers(self):
        """Indices of the blocks that have experts."""
        if self.flavour == "dense":
            return []
        return [i for i in range(self.n_layer) if (i + 1) % self.moe_every == 0]

    def rates(self):
        """infmoe: the rate of each hidden layer."""
        return self.infmoe_rate if isinstance(self.infmoe_rate, tuple) else (self.infmoe_rate,) * self.infmoe_depth

    def _check_shape(self, given):
        _require("head_dim" in given or self.d_model % self.n_head == 0,
                 f"n_head={self.n_head} must divide d_model={self.d_model}, or head_dim be set")
        _require(self.n_head % self.n_kv_head == 0, f"n_kv_head={self.n_kv_head} must divide n_head={self.n_head}")
        _require(self.head_dim * self.n_head == self.d_model or self.arch == "llama",
                 f"head_dim={self.head_dim} times n_head={self.n_head} must be d_model={self.d_model} for arch=gpt2")
        _require(self.arch == "gpt2" or self.head_dim % 2 == 0, f"head_dim={self.head_dim} must be even for rotary positions")
        _require(self.dropout < 1, f"dropout={self.dropout} must lie in [0, 1)")
        for name in ("norm_eps", "rope_base"):
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")

    def _check_dense(self, given):
        names = [n for n in FIELDS_OF_EXPERTS if n in given and getattr(self, n) != DEFAULTS[n]]
        _require(not names, f"{', '.join(names)} has no meaning with flavour=dense: choose another flavour or leave it out")

    def _check_discrete(self, given):
        names = [n for n in given if n.startswith("infmoe_")]
        _require(not names, f"{', '.join(names)} has no meaning with flavour={self.flavour}: set flavour=infmoe or leave it out")
        self._check_pools()
        _require(self.top_k <= self.n_experts, f"top_k={self.top_k} must lie between 1 and n_experts={self.n_experts}")
        _require(not (self.norm_topk_prob and self.top_k == 1), "norm_topk_prob=True with top_k=1 makes every gate 1 and "
                 "leaves the router without gradient: set norm_topk_prob=False or top_k >= 2")
        _require(not self.specialization_coef or self.top_k >= 2, f"specialization_coef={self.specialization_coef} compares "
                 "the experts of one token: it needs top_k >= 2, or specialization_coef=0")
        _require(not self.coupling_coef or len(self.moe_layers()) >= 2, f"coupling_coef={self.coupling_coef} couples adjacent "
                 f"expert layers, and n_layer={self.n_layer} with moe_every={self.moe_every} leaves one: set coupling_coef=0")
        _require(self.coupling == "mass" or self.coupling_coef, f"coupling={self.coupling} does nothing without coupling_coef: "
                 "set coupling_coef (the paper uses 1e-3) or leave coupling out")
        _require(self.balance in ("layer", "pool") or self.balance_scores is None, f"balance_scores={self.balance_scores} "
                 f"does nothing with balance={self.balance}: set balance=layer or pool, or leave balance_scores out")

    def _check_pools(self):
        layers, groups = len(self.moe_layers()), self.pool_groups
        _require(layers > 0, f"moe_every={self.moe_every} leaves no block of n_layer={self.n_layer} with experts")
        _require(groups == 0 or layers % groups == 0, f"pool_groups={groups} must divide the {layers} layers with experts")
        _require(not (self.balance == "pool" and groups == 0), "balance=pool needs a pool: set pool_groups >= 1, or "
                 "balance=layer for private experts (pool_groups=0)")
        _require(self.balance != "none" or not self.balance_coef, f"balance_coef={self.balance_coef} does nothing with "
                 "balance=none: set balance, or balance_coef=0")

    def _check_infmoe(self, given):
        names = [n for n in (*DISCRETE, "balance_scores") if n in given]
        names += [n for n in ("z_coef", "coupling_coef") if getattr(self, n)] + ["coupling=path"] * (self.coupling == "path")
        _require(not names, f"{', '.join(names)} belongs to discrete routers, not to flavour=infmoe: leave it out")
        _require(self.balance in ("none", "layer"),
                 f"balance={self.balance} has no meaning with flavour=infmoe: set balance=none or balance=layer")
        _require(self.backend != "grouped",
                 "backend=grouped multiplies discrete experts and flavour=infmoe has none: set backend=auto, loop or triton")
        _require(not self.specialization_coef or (self.infmoe_samples >= 2 and not self.infmoe_mean),
                 f"specialization_coef={self.specialization_coef} compares the samples of one token: it needs "
                 "infmoe_samples >= 2 and infmoe_mean=False, or specialization_coef=0")
        self._check_depth()
        if self.infmoe_share_mask:
            self._check_share_mask(given)
        self._check_pools()

    def _check_depth(self):
        rates, depth, start = self.rates(), self.infmoe_depth, self.infmoe_mean_from
        _require(len(rates) == depth, f"infmoe_rate={self.infmoe_rate} has {len(rates)} entries and infmoe_depth={depth}: "
                 "give one rate per hidden layer")
        _require(all(r is None or (isinstance(r, (int, float)) and 0 < r <= 1) for r in rates),
                 f"infmoe_rate={self.infmoe_rate} must lie in (0, 1], or be None for a hidden layer without mask")
        _require(any(r is not None for r in rates), "infmoe_rate=None everywhere masks nothing: use flavour=dense")
        _require(start is None or 0 <= start < depth,
                 f"infmoe_mean_from={start} must lie between 0 and infmoe_depth - 1 = {depth - 1}")
        _require(not (self.infmoe_mean and start), f"infmoe_mean=True makes every z = mu: leave infmoe_mean_from={start} out")
        sampled = [r for r in rates[:depth if start is None else start] if r is not None]  # hidden layers that draw a sample
        _require(not self.specialization_coef or sampled, f"specialization_coef={self.specialization_coef} compares samples "
                 f"and infmoe_mean_from={start} leaves none: set specialization_coef=0")

    def _check_share_mask(self, given):
        rates, start = self.rates(), self.infmoe_mean_from
        _require(len(rates) > 1, "infmoe_share_mask=True shares a mask between hidden layers: set infmoe_depth >= 2")
        _require(len(set(rates)) == 1,
                 f"infmoe_share_mask=True needs one rate for all hidden layers, not infmoe_rate={self.infmoe_rate}")
        _require(not start, f"infmoe_share_mask=True uses one z: infmoe_mean_from={start} must be 0 or left out")
        _require(self.infmoe_z == "shared" or "infmoe_z" not in given,
                 f"infmoe_share_mask=True uses one z: set infmoe_z=shared, not infmoe_z={self.infmoe_z}")
        self.infmoe_z = "shared"

    def n_params(self):
        """Stored parameters, embeddings included."""
        with torch.device("meta"):
            return sum(p.numel() for p in GPT(self).parameters())

    def n_active_params(self):
        """Parameters that one token uses: everything but the banks, plus top_k experts per layer, counted per use; infmoe
        uses the share min(1, K*N) of W_1 and W_2 (of the inner matrices of a deep one: the product of both sides' shares)."""
        with torch.device("meta"):
            model = GPT(self)
        banks = [m for m in model.modules() if isinstance(m, (moe.ExpertBank, moe.ContinuousBank))]
        active = sum(p.numel() for p in model.parameters()) - sum(p.numel() for b in banks for p in b.parameters())
        if not banks:
            return active
        return active + len(self.moe_layers()) * self._active_per_layer(banks[0])

    def _active_per_layer(self, bank):
        if self.flavour != "infmoe":
            return self.top_k * (bank.w_in[0].numel() + bank.w_out[0].numel())
        share = [1.0] + [1.0 if r is None else min(1.0, self._masks_of(i) * r) for i, r in enumerate(self.rates())]
        matrices = sum(round(w.numel() * below * above) for w, below, above in zip(bank.w_in, share, share[1:]))
        return matrices + round(bank.w_out.numel() * share[-1]) + sum(w.numel() for w in bank.w_z.values())

    def _masks_of(self, i):
        """How many masks a token has in hidden layer i: one per sample, or one where z = mu and nothing before it is drawn."""
        start = 0 if self.infmoe_mean else self.infmoe_depth if self.infmoe_mean_from is None else self.infmoe_mean_from
        if self.infmoe_z == "hierarchical":
            i = [rate is None for rate in self.rates()].index(False)  # the first z, on which all others depend
        return self.infmoe_samples if i < start else 1


def _require(condition, message):
    if not condition:
        raise ValueError(message)


DEFAULTS = {f.name: f.default for f in dataclasses.fields(ModelConfig)}
FIELDS_OF_EXPERTS = list(DEFAULTS)[list(DEFAULTS).index("n_experts"):-1]  # n_experts .. infmoe_hidden
MAY_BE_ZERO = ("n_shared_experts", "pool_groups", "infmoe_mean_from", "infmoe_hidden")  # all other whole numbers are >= 1


# ----------------------------------------------------------------------------------------------------------------------
# Attention and the block

def make_norm(config):
    if config.arch == "gpt2":
        return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)
    return nn.RMSNorm(config.d_model, eps=config.norm_eps)


def rotary(positions, head_dim, base):
    """cos and sin (S, d) of the rotary embedding (RoFormer), first and second half of a head forming the pairs."""
    inverse = base ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)  # (d/2,)
    angles = positions[:, None].float() * inverse[None, :]  # (S, d/2)
    angles = torch.cat((angles, angles), dim=-1)  # (S, d)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """x (B, H, S, d) turned by its position's angles."""
    a, b = x.chunk(2, dim=-1)  # (B, H, S, d/2) each
    return x * cos.to(x.dtype) + torch.cat((-b, a), dim=-1) * sin.to(x.dtype)


class KVCache:
    """Keys and values of the positions seen so far; one buffer per layer, block_size long."""

    def __init__(self, config, batch, device, dtype):
        shape = (config.n_layer, batch, config.n_kv_head, config.block_size, config.head_dim)  # (layers, B, G, S, d)
        self.k, self.v = torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # GPT.forward moves it once all layers have written

    def append(self, layer, k, v):
        """Writes k, v (B, G, s, d) behind what is there; returns all keys and values of the layer so far."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length:end], self.v[layer, :, :, self.length:end] = k, v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


def causal_attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v, each query seeing the keys up to its own: (B, H, S, d) three times -> (B, H, S, d).

    torch's fused attention takes twice as long for the backward pass in bf16 on a CPU, at lengths whose (S, S) scores fit.
    Without autocast, which would have softmax keep its result in fp32 for the backward pass: twice the memory traffic.
    """
    k, v = k.to(q.dtype), v.to(q.dtype)  # from a cache they come in its dtype
    with torch.autocast(q.device.type, enabled=False):
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)  # (B, H, S, S)
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim, self.dropout = layer, config.head_dim, config.dropout
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.qkv = nn.Linear(config.d_model, (config.n_head + 2 * config.n_kv_head) * config.head_dim, bias=config.bias)
        self.out = nn.Linear(config.n_head * config.head_dim, config.d_model, bias=config.bias)
        self.norm_heads = config.qk_norm == "head"
        widths = {"none": None, "head": (1, 1), "full": (config.n_head, config.n_kv_head)}[config.qk_norm]
        self.q_norm, self.k_norm = (None if widths is None else nn.RMSNorm(w * config.head_dim, eps=config.norm_eps)
                                    for w in widths or (0, 0))

    def heads(self, x, n, norm):
        """x (B, S, n*d) -> (B, n, S, d), normalised over all heads or each by itself (in the weights' float32 under autocast)."""
        dtype = x.dtype
        if norm is not None and not self.norm_heads:
            x = norm(x.to(norm.weight.dtype))
        x = x.unflatten(-1, (n, self.head_dim))  # (B, S, n, d)
        if norm is not None and self.norm_heads:
            x = norm(x.to(norm.weight.dtype))
        return x.to(dtype).transpose(1, 2)  # (B, n, S, d)

    def forward(self, x, rope, cache):
        q, k, v = self.qkv(x).split([n * self.head_dim for n in (self.n_head, self.n_kv_head, self.n_kv_head)], dim=-1)
        q, k = self.heads(q, self.n_head, self.q_norm), self.heads(k, self.n_kv_head, self.k_norm)
        v = self.heads(v, self.n_kv_head, None)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        new, seen = q.shape[2], k.shape[2]
        if self.n_kv_head != self.n_head:
            k, v = (t.repeat_interleave(self.n_head // self.n_kv_head, dim=1) for t in (k, v))  # (B, H, seen, d)
        dropout = self.dropout if self.training else 0.0
        if x.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < new == seen <= 512 and not dropout:
            return self.out(causal_attention(q, k, v).transpose(1, 2).flatten(2))  # (B, S, H*d) -> (B, S, D)
        mask = None
        if 1 < new < seen:  # a chunk behind a cache: query i sees keys up to seen - new + i
            mask = torch.ones(new, seen, dtype=torch.bool, device=x.device).tril(seen - new)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=new == seen and new > 1, dropout_p=dropout)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, S, H*d) -> (B, S, D)


class Block(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x)) (or a dense FFN)."""

    def __init__(self, config, layer):
        super().__init__()
        self.norm1, self.norm2 = make_norm(config), make_norm(config)
        self.attention = Attention(config, layer)
        self.ffn = make_ffn(config, layer)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, pool, rope, keys, cache, keep_activations):
        """x (B, S, D), keys (T,) of the noise -> x, routing (None for a dense FFN), activations (T, K, F) or None."""
        x = x + self.dropout(self.attention(self.norm1(x), rope, cache))
        h = self.norm2(x)
        if isinstance(self.ffn, moe.FFN):
            return x + self.dropout(self.ffn(h)), None, None
        y, routing, activations = self.ffn(h.flatten(0, 1), pool, keys, keep_activations)  # (T, D)
        return x + self.dropout(y.view_as(x)), routing, activations


def make_ffn(config, layer):
    """The block's FFN: dense, or a router with its own experts, or a router to a pool that GPT owns."""
    activation = "gelu" if config.arch == "gpt2" else "swiglu"
    if layer not in config.moe_layers():
        return moe.FFN(config.d_model, config.d_ff, activation, config.bias)
    bank = None if config.pool_groups else make_bank(config)
    if config.flavour == "infmoe":
        router = moe.CodeRouter(
            config.d_model, config.infmoe_dz, config.infmoe_samples, config.rates(), config.infmoe_z, config.infmoe_mean_from,
            config.infmoe_mean, layer, n_components=config.infmoe_components, d_hidden=config.infmoe_hidden)
        return moe.MoE(router, bank)
    router = moe.ROUTERS[config.router](config.d_model, config.n_experts, config.top_k, config.norm_topk_prob,
                                        selection_bias=config.balance == "bias")
    n_shared = config.n_shared_experts
    return moe.MoE(router, bank, moe.FFN(config.d_model, n_shared * config.d_expert, activation) if n_shared else None)


def make_bank(config):
    """One bank of experts: private to a layer, or a pool."""
    activation = "gelu" if config.arch == "gpt2" else "swiglu"
    if config.flavour == "infmoe":
        return moe.ContinuousBank(config.d_model, config.d_expert, config.infmoe_dz, config.rates(), activation,
                                  config.infmoe_mask, config.infmoe_share_mask, config.backend)
    return moe.ExpertBank(config.d_model, config.d_expert, config.n_experts, activation, config.backend)


# ----------------------------------------------------------------------------------------------------------------------
# GPT

class Output(NamedTuple):
    logits: torch.Tensor | None  # (B, S, V); None in training, where only the loss is wanted
    loss: torch.Tensor | None    # mean cross-entropy in nats over the targets, and nothing else
    aux: dict                    # weighted auxiliary losses; the training loss is loss + their sum; empty in evaluation
    stats: dict                  # additive statistics of this micro-step's routing on this rank; empty in evaluation
    routings: list               # one Routing or tuple of Codes per layer with experts, if asked for


class GPT(nn.Module):
    """A decoder-only language model. Pools belong to it, and each block gets its pool as an argument."""

    def __init__(self, config):
        super().__init__()
        self.config, self.recompute = config, False  # recompute: run blocks again in the backward pass to save memory
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        self.wpe = nn.Embedding(config.block_size, config.d_model) if config.arch == "gpt2" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.pools = nn.ModuleList(make_bank(config) for _ in range(config.pool_groups or 0))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.wte.weight
        layers = len(config.moe_layers())
        self.register_buffer("paths", torch.full((layers - 1, config.n_experts, config.n_experts), 1 / config.n_experts)
                             if config.coupling_coef and config.coupling == "path" else None)  # running P(next | this)
        if self.wte.weight.device.type != "meta":
            self.init_weights()

    def init_weights(self):
        """Draws every parameter and resets every buffer (also after `to_empty`, for models built on the meta device)."""
        std, out_std = self.config.init_std, self.config.init_std / math.sqrt(2 * self.config.n_layer)
        for module in self.modules():
            if isinstance(module, (moe.ExpertBank, moe.ContinuousBank, moe.FFN)):
                module.init_weights(std, out_std)
            elif isinstance(module, (moe.Router, moe.CodeRouter)):
                module.init_weights(std)
            elif isinstance(module, Attention):
                nn.init.normal_(module.qkv.weight, std=std)
                nn.init.normal_(module.out.weight, std=out_std)
                for bias in (module.qkv.bias, module.out.bias):
                    if bias is not None:
                        nn.init.zeros_(bias)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
            elif isinstance(module, nn.Embedding) or module is self.head:
                nn.init.normal_(module.weight, std=std)
        if self.paths is not None:
            self.paths.fill_(1 / self.config.n_experts)

    def pool_of(self, i):
        """The pool of the i-th layer with experts: groups are of adjacent layers. None where experts are private."""
        groups = self.config.pool_groups
        return self.pools[i * groups // len(self.config.moe_layers())] if groups else None

    def forward(self, tokens, targets=None, *, noise_key=None, cache=None, return_routings=False):
        """tokens, targets (B, S) int64 (targets < 0 are left out); noise_key (B,) int64 fixes infmoe's noise per sequence,
        None is one fixed key; cache: a KVCache that this call extends. Returns Output."""
        c, (b, s) = self.config, tokens.shape
        start = cache.length if cache is not None else 0
        if start + s > c.block_size:
            raise ValueError(f"{start + s} positions do not fit into block_size={c.block_size}")
        positions = torch.arange(start, start + s, device=tokens.device)  # (S,)
        x = self.wte(tokens)  # (B, S, D)
        if self.wpe is not None:
            x = x + self.wpe(positions)
        x = self.dropout(x)
        rope = rotary(positions, c.head_dim, c.rope_base) if c.arch == "llama" else None
        keys = self._noise_keys(noise_key, b, positions)
        learn = self.training and targets is not None
        x, routings, activations = self._blocks(x, rope, keys, cache, learn and c.specialization_coef > 0)
        if cache is not None:
            cache.length += s
        logits, loss = self._loss(self.norm(x), targets, learn)
        aux, stats = self._routing_losses(routings, activations) if learn and routings else ({}, {})
        return Output(logits, loss, aux, stats, routings if return_routings else [])

    def _noise_keys(self, noise_key, batch, positions):
        if self.config.flavour != "infmoe":
            return None
        if noise_key is None:
            noise_key = torch.zeros(batch, dtype=torch.int64, device=positions.device)
        return moe.token_keys(noise_key, positions)  # (T,)

    def _blocks(self, x, rope, keys, cache, keep_activations):
        """Runs the blocks: x (B, S, D) -> x, and a list each of routings and activations, one entry per layer with experts."""
        routings, activations = [], []
        for block in self.blocks:
            pool = self.pool_of(len(routings)) if isinstance(block.ffn, moe.MoE) else None
            args = x, pool, rope, keys, cache, keep_activations
            if self.recompute and torch.is_grad_enabled():
                x, routing, kept = checkpoint(block, *args, use_reentrant=False)
            else:
                x, routing, kept = block(*args)
            if routing is not None:
                routings.append(routing)
                activations.append(kept)
        return x, routings, activations

    def _loss(self, x, targets, learn):
        """x (B, S, D) -> logits (B, S, V) or None, mean cross-entropy in nats or None."""
        logits = self.head(x)
        if targets is None:
            return logits, None
        targets = targets.masked_fill(targets < 0, -100).flatten()  # (T,)
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets, ignore_index=-100)
        return (None if learn else logits), loss

    # ---- what routers said, turned into losses and statistics

    def _routing_losses(self, routings, activations):
        """Weighted auxiliary losses, and additive statistics. Balance losses and z-loss are summed over layers (or pools), as
        in Switch and Megatron; specialization and coupling are means over layers, so that lambda does not grow with depth."""
        c = self.config
        aux, stats = (self._continuous_losses if c.flavour == "infmoe" else self._discrete_losses)(routings)
        if c.specialization_coef:
            losses = [moe.specialization_loss(a) for a in activations]
            aux["specialization"] = c.specialization_coef * torch.stack(losses).mean()
        return aux, stats

    def _discrete_losses(self, routings):
        c, aux = self.config, {}
        counts = torch.stack([moe.expert_counts(r.ids, c.n_experts) for r in routings])  # (L, E), this rank's
        entropy = torch.stack([moe.routing_entropy(r.scores.detach()) for r in routings])  # (L,)
        tokens = counts.new_full((1,), routings[0].ids.shape[0])
        stats = {"counts": counts, "entropy": entropy * tokens, "tokens": tokens}
        if c.balance in ("layer", "pool") and c.balance_coef:
            scores = [moe.normalise_scores(r.scores) if c.balance_scores == "normalised" else r.scores for r in routings]
            share = len(routings) // c.pool_groups if c.balance == "pool" else 1  # layers that are balanced together
            groups = zip(chunks(scores, share), chunks(sum_over_ranks(counts).unbind(), share))
            aux["balance"] = c.balance_coef * sum(moe.pool_loss(s, n) for s, n in groups)
        if c.z_coef:
            aux["z"] = c.z_coef * sum(moe.z_loss(r.logits) for r in routings)
        if c.coupling_coef:
            pairs = list(zip(routings, routings[1:]))
            paths = [None] * len(pairs) if self.paths is None else self.paths
            losses = [moe.coupling_loss(a.scores, a.ids, b.scores, b.ids, p) for (a, b), p in zip(pairs, paths)]
            aux["coupling"] = c.coupling_coef * torch.stack(losses).mean()
            if self.paths is not None:
                stats["paths"] = torch.stack([moe.path_counts(a.ids, b.ids, c.n_experts) for a, b in pairs])  # (L-1, E, E)
        return aux, stats

    def _continuous_losses(self, routings):
        """Without a balance loss the statistics of at most 256 tokens do: masks are recomputed for them."""
        c, aux, layers = self.config, {}, [b.ffn for b in self.blocks if isinstance(b.ffn, moe.MoE)]
        step = 1 if c.balance == "layer" else -(-next(filter(None, routings[0])).z.shape[0] // 256)
        routings = [[code and moe.Codes(*(t[::step] for t in code)) for code in codes] for codes in routings]
        banks = [self.pool_of(i) or layer.bank for i, layer in enumerate(layers)]
        usage = [u for bank, codes in zip(banks, routings) for u in bank.usage(codes)]  # scores (T, K, F), counts (F,)
        counts = torch.stack([n for _, n in usage])  # (L * masks, F)
        if c.balance == "layer" and c.balance_coef:
            pairs = zip((s for s, _ in usage), sum_over_ranks(counts))
            aux["balance"] = c.balance_coef * sum(moe.neuron_balance_loss(s, n) for s, n in pairs)
        codes = [code for codes in routings for code in codes if code]
        with torch.no_grad():
            mu = torch.stack([code.mu.float().mean(1) for code in codes])  # (codes, T, dz)
            sigma = torch.stack([(code.logvar.float() / 2).exp().mean() for code in codes]) * mu.shape[1]
            stats = {"counts": counts, "tokens": counts.new_full((1,), mu.shape[1]), "sigma": sigma,
                     "mu": mu.sum(1), "mu_squared": mu.square().sum(1)}
        return aux, stats

    @torch.no_grad()
    def update_balance(self, stats):
        """Moves the state that outlives a step (selection biases, path estimates), once per optimizer step, from the
        statistics of the global batch (summed over micro-steps and ranks)."""
        c = self.config
        if c.balance == "bias":  # layers that share a pool are balanced together [ours]; private experts each alone
            load = per_bank(stats["counts"], c.pool_groups)  # (banks, E)
            routers = [b.ffn.router for b in self.blocks if isinstance(b.ffn, moe.MoE)]
            for i, router in enumerate(routers):
                router.update_bias(load[i * len(load) // len(routers)], c.balance_coef)
        if self.paths is not None:
            n = stats["paths"]
            seen = n.sum(-1, keepdim=True)  # (L-1, E, 1); rows of idle experts stay as they are
            self.paths.copy_(torch.where(seen > 0, self.paths.lerp(n / seen.clamp_min(1), 0.1), self.paths))

    @torch.no_grad()
    def routing_columns(self, stats):
        """A bounded summary of a step's statistics for the log: means over banks (and layers); a few numbers, whatever E.
        balance: E * sum f^2, 1 is even. entropy: of the router's scores, or of the neurons' use for infmoe. max_share:
        the largest share times E. dead_share. For infmoe also the mean of Sigma^(1/2) and the spread of mu over tokens."""
        if not stats:
            return {}
        continuous = self.config.flavour == "infmoe"
        counts = per_bank(stats["counts"], 0 if continuous else self.config.pool_groups)
        entropy = moe.usage_entropy(counts) if continuous else stats["entropy"] / stats["tokens"]
        columns = {"balance": moe.imbalance(counts), "entropy": entropy, "max_share": moe.max_share(counts),
                   "dead_share": moe.dead_share(counts)}
        if continuous:
            n = stats["tokens"]
            columns["sigma"] = stats["sigma"] / n
            columns["mu_spread"] = (stats["mu_squared"] / n - (stats["mu"] / n).square()).clamp_min(0).sqrt()
        return {name: value.mean().item() for name, value in columns.items()}

    # ---- inference

    def set_samples(self, n_samples=None, mean=None):
        """infmoe: another number of samples K, or z = mu (mean=False: as trained again), for inference."""
        _require(self.config.flavour == "infmoe", f"flavour={self.config.flavour} draws no samples: set_samples is for infmoe")
        _require(n_samples is None or n_samples >= 1, f"n_samples={n_samples} must be at least 1")
        for module in self.modules():
            if isinstance(module, moe.GaussianRouter):
                module.n_samples = n_samples or module.n_samples
                if mean is not None:
                    module.mean = mean or module.logvar is None  # a router trained without Sigma has only its mean

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None, use_cache=True):
        """Yields max_new_tokens tensors (B, 1). Past block_size the context slides: its oldest half is dropped and the rest run
        again, with a cache and without."""
        size, cache = self.config.block_size, None
        for _ in range(max_new_tokens):
            if tokens.shape[1] > size:
                tokens, cache = tokens[:, -max(1, size // 2):], None
            new = tokens
            if use_cache and cache is not None:
                new = tokens[:, -1:]
            elif use_cache:
                cache = KVCache(self.config, len(tokens), tokens.device, self.wte.weight.dtype)
            logits = self(new, cache=cache).logits[:, -1]  # (B, V)
            token = sample_token(logits, temperature, top_k, top_p, generator)
            yield token
            tokens = torch.cat((tokens, token), dim=1)

    @classmethod
    def from_checkpoint(cls, folder, device="cpu"):
        """The model that train.py saved in `folder`, in evaluation mode. Loading never executes code from the file."""
        path = os.path.join(folder, "ckpt.pt")
        saved = load_checkpoint(path)
        model = cls(ModelConfig(**saved["model_config"]))
        model.load_state_dict(saved["model"])
        return model.to(device).eval()

    @classmethod
    def from_hf(cls, name_or_dir):
        """A gpt2, llama, mixtral, olmoe or qwen3_moe of transformers' (a name on its hub, or a folder), in float32."""
        from support import hf  # lazily: it imports this file
        return hf.load(name_or_dir)


def load_checkpoint(path):
    """The dictionary in a checkpoint file: tensors and plain values only (weights_only), on the CPU."""
    if not os.path.exists(path):
        folder = os.path.dirname(path) or "."
        raise FileNotFoundError(f"no checkpoint at {path}: train one with  python train.py --out_dir={folder}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        dict(saved)["model"], ModelConfig(**saved["model_config"])
        return saved
    except Exception as error:  # a truncated zip, a hostile pickle, another program's file: torch has a type for each
        raise ValueError(f"{path} is no readable checkpoint ({type(error).__name__}: truncated, or not one of ours): "
                         "train again with --overwrite, or name another folder") from error


def chunks(items, size):
    """A sequence cut into lists of `size`."""
    return [items[i:i + size] for i in range(0, len(items), size)]


def per_bank(counts, groups):
    """Counts per layer (L, E) -> per bank (G, E): layers that share a pool are added."""
    return counts.view(groups, -1, counts.shape[-1]).sum(1) if groups else counts


def sum_over_ranks(x):
    """x added up over all ranks of a distributed run (also inside torch.compile); x itself without one."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    from torch.distributed import _functional_collectives as collectives  # absent where torch was built without distributed
    return collectives.wait_tensor(collectives.all_reduce(x, "sum", dist.group.WORLD))


def sample_token(logits, temperature, top_k, top_p, generator):
    """One token per row of logits (B, V) -> (B, 1); temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None:  # the smallest set of tokens whose probabilities reach top_p; always at least one
        ordered, order = logits.softmax(-1).sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # (B, V), in the order of probability
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


# ----------------------------------------------------------------------------------------------------------------------
# python model.py: what a configuration weighs, and the way to transformers

@dataclass
class ExportConfig:
    export: str | None = None  # with --out_dir: write that checkpoint as a folder for transformers (safetensors, config.json)


def part_of(name):
    """Which part of the model the parameter `name` belongs to."""
    if name.split(".")[0] in ("wte", "wpe", "head"):
        return "embeddings"
    parts = {".attention.": "attention", ".router.": "routers", "bank.": "experts", "pools.": "experts", ".ffn.": "dense FFN"}
    return next((part for key, part in parts.items() if key in name), "norms")


def print_parameters(config):
    """Stored parameters, and those that one token uses, by part."""
    with torch.device("meta"):
        model = GPT(config)
    stored = {}
    for name, p in model.named_parameters():
        stored[part_of(name)] = stored.get(part_of(name), 0) + p.numel()
    total, active = sum(stored.values()), config.n_active_params()
    rows = [(part, n, n if part != "experts" else active - total + n) for part, n in stored.items()]
    print(f"{config.arch} {config.flavour}, {config.n_layer} layers\n{'parameters':12}{'stored':>16}{'active':>16}")
    for part, n, used in [*rows, ("total", total, active)]:
        print(f"{part:12}{n:16,}{used:16,}")


def main():
    from configurator import fail, parse
    from train import TrainConfig  # config files have its keys, too
    parsed = parse(ModelConfig, TrainConfig, ExportConfig, words=("config",), doc=__doc__)
    folder, target = parsed.given.get("out_dir"), parsed.make(ExportConfig).export
    if parsed.words["config"] or not folder:
        if target:
            fail("--export writes a trained model: name its folder with --out_dir, and no config file")
        return print_parameters(parsed.make(ModelConfig))
    from support import hf
    from support.tokenizer import get_tokenizer
    try:
        saved = load_checkpoint(os.path.join(folder, "ckpt.pt"))
        print_parameters(ModelConfig(**saved["model_config"]))
        if target:
            hf.export(GPT.from_checkpoint(folder), target, get_tokenizer(saved["tokenizer"]))
            print(f'wrote {target}: AutoModelForCausalLM.from_pretrained("{target}")')
    except (OSError, ValueError, ImportError) as error:
        fail(error)


if __name__ == "__main__":
    main()
