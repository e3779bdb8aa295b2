"""Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055): experts that start as a dense FFN.

    python train.py config/x.py --init_from=out/dense --flavour=topk   # or hf:NAME of a LLaMA

Every expert is a copy of its block's FFN (in a pool, of one of the blocks that share it), routers
start as always. Where a token's gates sum to 1, as with norm_topk_prob, step 0 is the dense model:
any mean of copies is what was copied. n always-on experts are copies too, and all parts then give
1 / (n + 1) of it. Other gates scale the FFN, and infinity-MoE masks it. Experts have no biases:
those of a dense FFN are left out.
"""
import re

import torch

from support.rules import OF_THE_BACKBONE

EXPERTS = r"(?:blocks\.(\d+)\.ffn\.(?:bank|shared)|pools\.(\d+))\.(w_in|w_out)(?:\.0|\.weight)?"


def backbone(model_config: dict) -> dict:
    """The settings of a dense model that one with experts keeps."""
    kept = set(OF_THE_BACKBONE) - {"flavour", "backend"}
    return {name: value for name, value in model_config.items() if name in kept}


def to_experts(dense: dict, model, noise: float = 0.0) -> dict:
    """Weights of a dense model -> those of `model`, which has experts and the same backbone.

    noise: on each copy, in standard deviations of the copied matrix. ValueError where an expert is
    not as wide as the FFN (or n times: it then holds n copies, side by side, that give 1 / n each).
    """
    c, weights, layers = model.config, model.state_dict(), model.config.moe_layers()
    if c.expert == "neuron":
        raise ValueError("expert=neuron holds no copy of an FFN: start from scratch")
    if c.d_expert % c.d_ff:
        raise ValueError(f"d_expert={c.d_expert} must be a multiple of the dense d_ff={c.d_ff}, "
                         "whose FFN the experts copy")
    n = len(layers) // max(1, c.pool_groups)  # that share a pool
    parts = (1 + (c.n_shared_experts or 0)) * c.d_expert // c.d_ff
    for name, own in weights.items():
        match = re.fullmatch(EXPERTS, name)
        if match is None:
            weights[name] = dense.get(name, own)
            continue
        block, pool, kind = match.groups()
        blocks = [int(block)] if block else layers[int(pool) * n:][:n]
        stacked = own.view(-1, *own.shape[-2:])  # (E, rows, columns)
        for e, expert in enumerate(stacked):
            ffn = dense[f"blocks.{blocks[e * len(blocks) // len(stacked)]}.ffn.{kind}.weight"]
            copy = widened(ffn, expert.shape, kind, c) / (parts if kind == "w_out" else 1)
            expert.copy_(copy + noise * copy.std() * torch.randn_like(copy))
    return weights


def widened(ffn, shape, kind, config):
    """A matrix of the FFN, repeated along its hidden dimension until it has this shape."""
    if kind == "w_out":  # (D, F)
        return ffn.repeat(1, shape[1] // ffn.shape[1])
    halves = ffn.unflatten(0, (2 if config.activation == "swiglu" else 1, -1))  # (1 or 2, F, D)
    return halves.repeat(1, shape[0] // ffn.shape[0], 1).flatten(0, 1)
