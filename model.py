"""The transformer: configuration, attention, block and GPT around the experts of moe.py.

    python model.py config/unipool_182m.py         # parameter counts of a configuration
    python model.py --out_dir=out/x                # of a checkpoint
    python model.py --out_dir=out/x --export=DIR   # that checkpoint, for transformers

Letters in shapes: B sequences, S positions, T = B*S tokens, D width, H heads, G key/value heads,
d head width, V vocabulary, E experts, K chosen ones, L layers with experts.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import dataclasses
import functools
import math
import os
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

import losses
import moe
from support import auxiliary, checkpoint, cpu, decoding, lock, rules
from support.deep import CodeRouter
from support.noise import noise_seeds


@dataclasses.dataclass
class ModelConfig:
    """All settings of a model; None: the flavour's (moe.FLAVOURS) or the architecture's default."""

    # the backbone
    arch: Literal["gpt2", "llama"] = "gpt2"  # LayerNorm, GELU, positions | RMSNorm, SwiGLU, RoPE
    activation: Literal["gelu", "swiglu"] | None = None  # of FFNs and experts; None: arch's
    n_layer: int = 6
    n_head: int = 6
    n_kv_head: int | None = None  # key/value heads (grouped-query attention); None: n_head
    d_model: int = 384
    d_ff: int | None = None  # width of a dense FFN; None: 4 * d_model
    head_dim: int | None = None  # None: d_model / n_head
    block_size: int = 256  # context, tokens
    vocab_size: int = 257  # bytes and end of text; GPT-2's BPE: 50257, padded to 50304 or 51200
    dropout: float = 0.0
    bias: bool | None = None  # in attention, dense FFN and LayerNorm; None: gpt2 yes, llama no
    qk_norm: Literal["none", "head", "full"] = "none"  # on q and k: per head (Qwen3), all (OLMoE)
    norm_eps: float = 1e-5
    tie_embeddings: bool | None = None  # None: gpt2 yes, llama no
    rope_base: float = 10000.0
    init_std: float = 0.02  # what writes into the residual stream: init_std / sqrt(2 * n_layer)

    # experts
    flavour: Literal[tuple(moe.FLAVOURS)] = "dense"  # sets the fields below
    expert: Literal[tuple(moe.BANKS)] | None = None  # kind of discrete expert; None: ffn
    n_experts: int | None = None  # per layer, or in a pool; None: 8, a pool 8 per layer it serves
    top_k: int | None = None  # experts per token
    n_shared_experts: int | None = None  # always-on experts beside the chosen ones
    d_expert: int | None = None  # width of one expert; None: d_ff (infmoe: 2 * d_ff)
    moe_every: int = 1  # experts in the last of every n blocks; the others have a dense FFN
    pool_groups: int | None = None  # G pools, each of adjacent layers; 0: private experts
    router: Literal[tuple(moe.ROUTERS)] | None = None
    norm_topk_prob: bool | None = None  # divide the gates of the chosen experts by their sum
    depth_embedding: bool | None = None  # add a learned vector per layer to its input; None: no
    lock_steps: int | None = None  # router=lock: steps until owners are chosen, then as many while
    # others' scores fade; None: 1/60 of training (1000 without one); 0: drawn at random, at once
    lock_coef: float | None = None  # router=lock: of (H_l - log K)^2; None: 5e-3

    # what experts are trained by, beside the cross-entropy
    balance: Literal[("none", *losses.BALANCES, "bias")] | None = None  # a loss, or selection bias
    balance_coef: float | None = None  # None: 1e-2 (remoe 1e-8); for bias 1e-3, a rate per step
    balance_scores: Literal["raw", "normalised"] | None = None  # None: raw (sigmoid: normalised)
    z_coef: float = 0.0  # ST-MoE's z-loss on router logits
    specialization_coef: float = 0.0  # lambda_sp; the paper uses 2e-3
    coupling_coef: float = 0.0  # lambda_cp; the paper uses 1e-3
    coupling: Literal["mass", "path"] = "mass"  # as published, or weighted by the observed paths

    # infinity-MoE
    infmoe_samples: int | None = None  # K samples of z per token
    infmoe_rate: float | tuple | None = None  # N: share of the neurons kept; or one per layer
    infmoe_dz: int | None = None  # width of the code z
    infmoe_mask: Literal["post", "pre"] | None = None  # m * act(W x), as published, or act(m * W x)
    infmoe_depth: int | None = None  # hidden layers of the FFN
    infmoe_z: Literal["independent", "shared", "hierarchical"] | None = None  # codes of the layers
    infmoe_components: int | None = None  # Gaussians in the router's mixture
    infmoe_mean: bool | None = None  # z = mu everywhere: deterministic, one mask
    infmoe_mean_from: int | None = None  # hidden layers from this one on use z = mu; None: none
    infmoe_share_mask: bool | None = None  # one mask for all hidden layers
    infmoe_hidden: int | None = None  # width of a hidden layer in the router; 0: linear maps

    backend: Literal["auto", "loop", "grouped", "triton"] = "auto"  # matmul implementation

    def __post_init__(self):
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None]
        rules.check(rules.value_rules(self))
        rules.resolve(self, moe.FLAVOURS, moe.ROUTERS)  # fills every None that means something
        rules.check(rules.rules(self, given, moe.ROUTERS.get(self.router)))

    def moe_layers(self) -> list[int]:
        """Indices of the blocks that have experts."""
        every = range(self.moe_every - 1, self.n_layer, self.moe_every)
        return [] if self.flavour == "dense" else list(every)

    def rates(self) -> tuple:
        """infmoe: the rate N of each hidden layer."""
        one_for_all = not isinstance(self.infmoe_rate, tuple)
        return (self.infmoe_rate,) * self.infmoe_depth if one_for_all else self.infmoe_rate

    def n_params(self) -> int:
        """Stored parameters, embeddings included."""
        with torch.device("meta"):
            return sum(p.numel() for p in GPT(self).parameters())

    def n_active_params(self) -> int:
        """Parameters that one token uses: all but the banks, and of these what each layer uses, so
        that a pool counts once for every layer."""
        with torch.device("meta"):
            model = GPT(self)
        layers = model.expert_layers()
        in_banks = {p for _, bank in layers for p in bank.parameters()}
        outside = sum(p.numel() for p in model.parameters() if p not in in_banks)
        return outside + sum(bank.n_active(layer.router.n_choices) for layer, bank in layers)


# --------------------------------------------------------------------------------------------------
# Attention and the block


def make_norm(config: ModelConfig) -> nn.Module:
    if config.arch == "gpt2":
        return nn.LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)
    return nn.RMSNorm(config.d_model, eps=config.norm_eps)


def rotary(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin (S, d): RoFormer (arXiv 2104.09864); the halves of a head form the pairs."""
    even = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[:, None].float() * base ** (-even / head_dim)[None, :]  # (S, d/2)
    angles = torch.cat((angles, angles), dim=-1)  # (S, d)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, H, S, d) turned by its position's angles."""
    a, b = x.chunk(2, dim=-1)  # (B, H, S, d/2) each
    return x * cos.to(x.dtype) + torch.cat((-b, a), dim=-1) * sin.to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        c, d = config, config.head_dim
        self.layer, self.head_dim, self.dropout = layer, d, c.dropout
        self.n_head, self.n_kv_head = c.n_head, c.n_kv_head
        self.qkv = nn.Linear(c.d_model, (c.n_head + 2 * c.n_kv_head) * d, bias=c.bias)
        self.out = nn.Linear(c.n_head * d, c.d_model, bias=c.bias)
        self.q_norm = self.k_norm = None
        if c.qk_norm != "none":  # of one head, or of all heads together
            n_q, n_k = (c.n_head, c.n_kv_head) if c.qk_norm == "full" else (1, 1)
            self.q_norm = nn.RMSNorm(n_q * d, eps=c.norm_eps)
            self.k_norm = nn.RMSNorm(n_k * d, eps=c.norm_eps)

    def init_weights(self, std, out_std):
        moe.init_linear(self.qkv, std)
        moe.init_linear(self.out, out_std)

    def heads(self, x, n, norm):
        """x (B, S, n*d) -> (B, n, S, d), normalised in float32 over all heads or each by itself."""
        h = x.unflatten(-1, (n, self.head_dim))  # (B, S, n, d)
        if norm is not None:
            together = norm.weight.numel() == x.shape[-1]
            y = norm((x if together else h).to(norm.weight.dtype))
            h = y.view(h.shape).to(x.dtype)
        return h.transpose(1, 2)  # (B, n, S, d)

    def forward(self, x: Tensor, rope: tuple | None, cache: decoding.KVCache | None) -> Tensor:
        """x (B, S, D) -> (B, S, D)."""
        # queries, keys and values in one product; then a head each
        widths = [n * self.head_dim for n in (self.n_head, self.n_kv_head, self.n_kv_head)]
        q, k, v = self.qkv(x).split(widths, dim=-1)
        q = self.heads(q, self.n_head, self.q_norm)  # (B, H, S, d)
        k = self.heads(k, self.n_kv_head, self.k_norm)  # (B, G, S, d)
        v = self.heads(v, self.n_kv_head, None)
        # rotary positions turn queries and keys (LLaMA)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        # in generation the keys and values of earlier positions come from the cache
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        # every key/value head serves H / G query heads
        if self.n_kv_head != self.n_head:
            k = k.repeat_interleave(self.n_head // self.n_kv_head, dim=1)  # (B, H, seen, d)
            v = v.repeat_interleave(self.n_head // self.n_kv_head, dim=1)
        # softmax(q k^T / sqrt(d)) v, a query seeing the keys up to its own
        y = attention(q, k, v, self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, S, H*d) -> (B, S, D)


def attention(q, k, v, dropout):
    """Causal attention of queries (B, H, new, d) over keys (B, H, seen, d) -> (B, H, new, d)."""
    new, seen = q.shape[2], k.shape[2]
    if new == seen and not dropout and cpu.prefers_plain_attention(q):
        return cpu.plain_attention(q, k, v)
    mask = None
    if 1 < new < seen:  # a chunk behind a cache: query i sees the keys up to seen - new + i
        mask = torch.ones(new, seen, dtype=torch.bool, device=q.device).tril(seen - new)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout,
                                          is_causal=new == seen and new > 1)


class Block(nn.Module):
    """x + attention(norm(x)), then x + experts(norm(x)) (or a dense FFN)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.norm1, self.norm2 = make_norm(config), make_norm(config)
        self.attention = Attention(config, layer)
        self.ffn = make_ffn(config, layer)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, pool, rope, seeds, token_ids, cache, keep_activations):
        """x (B, S, D), seeds, token_ids (T,) -> x, routing, activations (T, K, F) or None."""
        x = x + self.dropout(self.attention(self.norm1(x), rope, cache))
        h = self.norm2(x)
        if isinstance(self.ffn, moe.FFN):
            return x + self.dropout(self.ffn(h)), None, None
        h = h.flatten(0, 1)  # (T, D)
        y, routing, activations = self.ffn(h, pool, seeds, token_ids, keep_activations)
        return x + self.dropout(y.view_as(x)), routing, activations


def make_ffn(config: ModelConfig, layer: int) -> nn.Module:
    """A block's FFN: dense, a router with its own experts, or a router to a pool of GPT's."""
    c = config
    if layer not in c.moe_layers():
        return moe.FFN(c.d_model, c.d_ff, c.activation, c.bias)
    bank = None if c.pool_groups else make_bank(c)
    if c.flavour == "infmoe":
        density = functools.partial(
            moe.GaussianRouter, dz=c.infmoe_dz, n_samples=c.infmoe_samples,
            n_components=c.infmoe_components, d_hidden=c.infmoe_hidden)
        mean_from = 0 if c.infmoe_mean else c.infmoe_mean_from
        router = CodeRouter(density, c.d_model, c.rates(), c.infmoe_z, mean_from, layer)
        return moe.MoE(router, bank)
    router = moe.ROUTERS[c.router](c.d_model, c.n_experts, c.top_k, c.norm_topk_prob,
                                   selection_bias=c.balance == "bias")
    shared = None
    if c.n_shared_experts:
        shared = moe.FFN(c.d_model, c.n_shared_experts * c.d_expert, c.activation)
    return moe.MoE(router, bank, shared, c.d_model if c.depth_embedding else 0)


def make_bank(config: ModelConfig) -> nn.Module:
    """One bank of experts: private to a layer, or a pool."""
    c = config
    if c.flavour == "infmoe":
        return moe.ContinuousBank(c.d_model, c.d_expert, c.infmoe_dz, c.rates(), c.activation,
                                  c.infmoe_mask, c.infmoe_share_mask, c.backend)
    return moe.BANKS[c.expert](c.d_model, c.d_expert, c.n_experts, c.activation, c.backend)


# --------------------------------------------------------------------------------------------------
# GPT


class Output(NamedTuple):
    logits: Tensor | None  # (B, S, V); None in training, where only the loss is wanted
    loss: Tensor | None    # mean cross-entropy in nats over the targets, and nothing else
    aux: dict              # weighted auxiliary losses, to be added to loss; empty in evaluation
    stats: dict            # additive statistics of this micro-step on this rank; empty likewise
    routings: list         # one Routing or tuple of Codes per layer with experts, if asked for


class GPT(nn.Module):
    """A decoder-only language model. Pools belong to it, and a block gets its pool passed in."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.recompute = False  # run blocks again in the backward pass: less memory, more time
        self.wte = nn.Embedding(config.vocab_size, config.d_model)
        gpt2 = config.arch == "gpt2"
        self.wpe = nn.Embedding(config.block_size, config.d_model) if gpt2 else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.pools = nn.ModuleList(make_bank(config) for _ in range(config.pool_groups or 0))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.wte.weight
        paths = None  # running P(expert v in the next layer | e in this one)
        if config.coupling_coef and config.coupling == "path":
            n, e = len(config.moe_layers()), config.n_experts
            paths = torch.full((n - 1, e, e), 1 / e)
        self.register_buffer("paths", paths)
        if self.wte.weight.device.type != "meta":
            self.init_weights()

    def init_weights(self) -> None:
        """Draw every parameter and reset every buffer (after `to_empty`, too)."""
        std = self.config.init_std
        out_std = std / math.sqrt(2 * self.config.n_layer)
        for module in self.modules():
            if module is not self and hasattr(module, "init_weights"):
                module.init_weights(std, out_std)
            elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
            elif isinstance(module, nn.Embedding) or module is self.head:
                nn.init.normal_(module.weight, std=std)
        if self.paths is not None:
            self.paths.fill_(1 / self.config.n_experts)
        if self.config.lock_steps == 0:
            lock.deal_out(self.config, [layer.router for layer, _ in self.expert_layers()])

    def pool_of(self, i: int) -> nn.Module | None:
        """The pool of the i-th layer with experts: groups are of adjacent layers."""
        groups = self.config.pool_groups
        return self.pools[i * groups // len(self.config.moe_layers())] if groups else None

    def open_pools(self, x):
        """The pool that each layer with experts calls in this forward pass, or None; x (T, D)."""
        layers = self.expert_layers()
        if not self.pools or self.config.flavour == "infmoe":
            return [self.pool_of(i) for i in range(len(layers))]
        n_choices, opened = layers[0][0].router.n_choices, []
        for pool in self.pools:
            opened += pool.open(len(layers) // len(self.pools), x, n_choices)
        return opened

    def expert_layers(self) -> list[tuple[moe.MoE, nn.Module]]:
        """The layers with experts, each with the bank that does its work."""
        layers = [block.ffn for block in self.blocks if isinstance(block.ffn, moe.MoE)]
        return [(layer, layer.bank or self.pool_of(i)) for i, layer in enumerate(layers)]

    def forward(self, tokens, targets=None, *, noise_key=None, cache=None, return_routings=False):
        """tokens, targets (B, S) int64 (targets < 0 are left out) -> Output.

        noise_key (B,) int64 fixes infmoe's noise per sequence; None is one fixed key. cache: a
        decoding.KVCache that this call extends.
        """
        c, (b, s) = self.config, tokens.shape
        start = cache.length if cache is not None else 0
        if start + s > c.block_size:
            raise ValueError(f"{start + s} positions do not fit into block_size={c.block_size}")
        # embed tokens and, in GPT-2, positions; LLaMA turns queries and keys by theirs instead
        positions = torch.arange(start, start + s, device=tokens.device)  # (S,)
        x = self.wte(tokens)  # (B, S, D)
        if self.wpe is not None:
            x = x + self.wpe(positions)
        x = self.dropout(x)
        rope = rotary(positions, c.head_dim, c.rope_base) if c.arch == "llama" else None
        # continuous experts draw noise: one seed per token, whatever rank or step it is met in
        seeds = None
        if c.flavour == "infmoe":
            keys = tokens.new_zeros(b) if noise_key is None else noise_key
            seeds = noise_seeds(keys, positions)  # (T,)
        # the blocks; what their routers said comes back up the call stack
        learn = self.training and targets is not None
        keep = learn and c.specialization_coef > 0
        x, routings, activations = self._blocks(x, rope, seeds, tokens.flatten(), cache, keep)
        if cache is not None:
            cache.length += s
        # cross-entropy, and what the routers are trained by
        logits, loss = self._loss(self.norm(x), targets, learn)
        aux, stats = {}, {}
        if learn and routings:
            aux, stats = auxiliary.losses_and_statistics(
                c, self.expert_layers(), routings, activations, self.paths)
        return Output(logits, loss, aux, stats, routings if return_routings else [])

    def _blocks(self, x, rope, seeds, token_ids, cache, keep_activations):
        """x (B, S, D) -> x, and routings and activations, one each per layer with experts."""
        routings, activations, pools = [], [], self.open_pools(x.flatten(0, 1))
        for block in self.blocks:
            pool = pools[len(routings)] if isinstance(block.ffn, moe.MoE) else None
            args = x, pool, rope, seeds, token_ids, cache, keep_activations
            if self.recompute and torch.is_grad_enabled():
                x, routing, kept = recomputed(block, *args, use_reentrant=False)
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

    def update_balance(self, stats: dict, step: int | None = None) -> None:
        """Move selection biases and the like: once a step, by stats of all its tokens. step: how
        many are done; UniPool-lock's schedule stands still without."""
        auxiliary.update_balance(self.config, self.expert_layers(), self.paths, stats, step)

    set_samples, generate = decoding.set_samples, decoding.generate  # for inference

    @classmethod
    def from_checkpoint(cls, folder, device="cpu") -> "GPT":
        """The model that train.py saved in `folder`, in evaluation mode; runs no code of it."""
        saved = load_checkpoint(os.path.join(folder, "ckpt.pt"))
        model = cls(ModelConfig(**saved["model_config"]))
        model.load_state_dict(saved["model"])
        return model.to(device).eval()

    @classmethod
    def from_hf(cls, name_or_dir: str) -> "GPT":
        """A gpt2, llama, mixtral, olmoe or qwen3_moe of transformers', in float32."""
        from support import hf  # lazily: it imports this file
        return hf.load(name_or_dir)


# path -> the dictionary in a checkpoint file, checked
load_checkpoint = functools.partial(checkpoint.load, config_class=ModelConfig, model_class=GPT)


if __name__ == "__main__":
    from support.weigh import main  # it imports this file
    main(__doc__)
