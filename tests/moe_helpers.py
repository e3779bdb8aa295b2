"""What the tests of moe.py and model.py share: small configurations, real text, training steps,
literal layers, and the table of what composes with what.

New routers, balances, experts and flavours enter FAMILIES and CELLS by moe.py's registries.
"""
import argparse
import difflib
import functools
import itertools
import json
import textwrap
from pathlib import Path

import torch
from kernel_helpers import literal_activation, literal_experts, literal_topn

import losses
import moe
from model import GPT, ModelConfig
from support.deep import CodeRouter

# widths that grouped_mm accepts
SMALL = dict(n_layer=2, n_head=2, d_model=16, d_ff=32, block_size=16, vocab_size=257)

# A configuration per family, with the options that a reader would meet first. What every flavour
# must survive is tested on all of them; CELLS below is the full table.
FAMILIES = {
    "dense_gpt2": dict(),
    "dense_llama": dict(arch="llama", n_kv_head=1, qk_norm="head"),
    "switch": dict(flavour="switch", n_experts=4, z_coef=1e-3),
    "topk": dict(flavour="topk", arch="llama", n_layer=3, n_experts=4, specialization_coef=2e-3,
                 coupling_coef=1e-3, coupling="path"),
    "deepseek": dict(flavour="deepseek", arch="llama", n_experts=4, d_expert=16),
    "hash": dict(flavour="hash", arch="llama", n_experts=4, top_k=2),
    "unipool": dict(flavour="unipool", arch="llama", n_experts=8),
    "lock": dict(flavour="lock", arch="llama", n_layer=3, n_experts=9, top_k=2, lock_steps=2,
                 balance_coef=1e-2),
    "remoe": dict(flavour="remoe", n_experts=4, balance_coef=1e-2, depth_embedding=True),
    "peer": dict(flavour="peer", n_experts=16, top_k=4),
    "infmoe": dict(flavour="infmoe", infmoe_dz=8, balance="layer", specialization_coef=2e-3),
    "infmoe_deep": dict(flavour="infmoe", arch="llama", n_kv_head=1, infmoe_dz=8, infmoe_depth=3,
                        infmoe_rate=(0.75, None, 0.5), infmoe_z="hierarchical",
                        infmoe_mean_from=2, infmoe_components=2, infmoe_hidden=8, pool_groups=1),
}


def small(**overrides):
    return ModelConfig(**{**SMALL, **overrides})


def cover_the_registries():
    """A family for every flavour, router, balance and kind of expert that has none above."""
    configs = [small(**overrides) for overrides in FAMILIES.values()]
    parts = {"flavour": moe.FLAVOURS, "router": moe.ROUTERS, "balance": losses.BALANCES,
             "expert": moe.BANKS}
    for field, registry in parts.items():
        for name in registry.keys() - {getattr(c, field) for c in configs}:
            more = dict(flavour="topk", n_experts=4, pool_groups=1) if field != "flavour" else {}
            if field == "router":
                more["top_k"] = min(2, registry[name].max_top_k or 2)
                if "layer" not in registry[name].supports:
                    more["balance"] = "none"
            FAMILIES[f"{field}={name}"] = {**more, field: name}


cover_the_registries()


def build(seed=0, std=0.2, **overrides):
    """A small model whose weights are large enough that tokens route differently."""
    torch.manual_seed(seed)
    return GPT(small(**{"init_std": std, **overrides}))


def initialise(module, *stds):
    """Draw the weights of a part by itself, as GPT.init_weights does."""
    for part in module.modules():
        if hasattr(part, "init_weights"):
            part.init_weights(*stds)
    return module


def code_router(d_model, dz, n_samples, rates, z="independent", mean_from=None, mean=False,
                layer=0, **options):
    """A CodeRouter over Gaussian densities, as model.py makes it."""
    density = functools.partial(moe.GaussianRouter, dz=dz, n_samples=n_samples, **options)
    return CodeRouter(density, d_model, rates, z, 0 if mean else mean_from, layer)


def random_tokens(batch, length, vocab_size=257, seed=0):
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


MODULES = (argparse, textwrap, difflib, json)
TEXT = torch.tensor(list(b"\n".join(Path(m.__file__).read_bytes() for m in MODULES)))


def real_text(batch, length, seed=0):
    """tokens, targets (B, S): windows of the interpreter's own library, as bytes."""
    starts = torch.randint(len(TEXT) - length, (batch, 1),
                           generator=torch.Generator().manual_seed(seed))
    windows = TEXT[starts + torch.arange(length + 1)]  # (B, S+1)
    return windows[:, :-1], windows[:, 1:]


def training_loss(output):
    return output.loss + sum(output.aux.values())


def gradients(model, tokens, targets, **inputs):
    """Training loss and its gradients by name (None where there is none)."""
    model.zero_grad(set_to_none=True)
    loss = training_loss(model.train()(tokens, targets, **inputs))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def train(model, steps, batch=8, lr=1e-2, first=0):
    """Adam on real text; returns the cross-entropy of every step."""
    optimizer, fell = torch.optim.Adam(model.parameters(), lr=lr), []
    for step in range(first, first + steps):
        tokens, targets = real_text(batch, model.config.block_size, seed=step)
        output = model.train()(tokens, targets, noise_key=torch.arange(batch) + step * batch)
        optimizer.zero_grad()
        training_loss(output).backward()
        optimizer.step()
        model.update_balance(output.stats, step + 1)
        fell.append(output.loss.item())
    return fell


# ---- the layers of moe.py as loops over tokens, choices and samples

def literal_moe(x, layer, bank, token_ids=None):
    """sum_k gate_k W_out act(W_in x) + always-on experts: token by token, choice by choice."""
    gates, ids, *_ = layer.router(x, None, token_ids)
    y, acts = literal_experts(x, gates, ids, bank.w_in, bank.w_out, bank.activation)
    if layer.shared is not None:
        always = [literal_activation(layer.shared.w_in.weight @ token, bank.activation)
                  for token in x]
        y = y + torch.stack(always) @ layer.shared.w_out.weight.T
    return y, acts


def literal_hidden(pre, mask, bank):
    """One hidden layer from W h: act(W h), m * act(W h), or act(m * W h)."""
    if mask is None:
        return literal_activation(pre, bank.activation)
    if bank.mask == "post":
        return mask * literal_activation(pre, bank.activation)
    if bank.activation == "swiglu":  # act(m * W_g x) * (W_u x)
        mask = torch.cat((mask, torch.ones_like(mask)))
    return literal_activation(mask * pre, bank.activation)


def literal_continuous(x, codes, bank):
    """y = (1/K) sum_k f(x, z_k), every f a whole FFN of H hidden layers, token by token."""
    samples = max((c.z.shape[1] for c in codes if c is not None), default=1)
    rows = [0] * len(x)
    for t, k in itertools.product(range(len(x)), range(samples)):
        h, mask = x[t], None
        for i, (w, code) in enumerate(zip(bank.w_in, codes)):
            if code is not None and (not bank.share_mask or mask is None):
                z = code.z[t, k if code.z.shape[1] > 1 else 0]
                mask, = literal_topn((bank.w_z[str(i)] @ z)[None], bank.n_keep[i])
            h = literal_hidden(w @ h, None if code is None else mask, bank)
        rows[t] = rows[t] + bank.w_out @ h / samples
    return torch.stack(rows)


# ---- the table of what composes with what

OWNERSHIPS = {"private": 0, "pool": 1, "pools": 2}


def discrete_cells():
    """Router x ownership x balance, each plain (K = 1) and with every loss (K = 2), and every other
    kind of expert by ownership; architectures, always-on experts and coupling's form alternate."""
    cells = {}
    for (owner, groups), (router, kind) in itertools.product(OWNERSHIPS.items(),
                                                             moe.ROUTERS.items()):
        for balance in ("none", *losses.BALANCES, "bias"):
            if balance not in {"none", *kind.supports} or (
                    not groups and (balance == "pool" or kind.pooled)):
                continue
            n, name = len(cells), f"{owner}-{router}-{balance}"
            base = dict(flavour="topk", n_layer=4, n_experts=8, router=router, pool_groups=groups,
                        balance=balance, arch=("gpt2", "llama")[n // 2 % 2],
                        n_shared_experts=n // 4 % 2)
            every = dict(specialization_coef=2e-3)
            if "z" in kind.supports:
                every["z_coef"] = 1e-3
            if "coupling" in kind.supports:
                every |= dict(coupling_coef=1e-3, coupling=("mass", "path")[n // 2 % 2])
            cells[f"{name}-plain"] = dict(base, top_k=1)
            if kind.max_top_k != 1:
                cells[f"{name}-losses"] = dict(base, top_k=2, **every)
    for (owner, groups), expert in itertools.product(OWNERSHIPS.items(),
                                                     moe.BANKS.keys() - {"ffn"}):
        arch = ("gpt2", "llama")[len(cells) % 2]
        cells[f"{owner}-{expert}"] = dict(flavour="topk", n_layer=4, n_experts=6, expert=expert,
                                          pool_groups=groups, arch=arch, specialization_coef=2e-3)
    return cells


EXTENSIONS = {  # of infinity-MoE
    "plain": dict(),
    "deep": dict(infmoe_depth=2),
    "deep-pre": dict(infmoe_depth=2, infmoe_mask="pre"),
    "shared": dict(infmoe_depth=2, infmoe_z="shared"),
    "hierarchical": dict(infmoe_depth=2, infmoe_z="hierarchical"),
    "pre": dict(infmoe_mask="pre"),
    "rates": dict(infmoe_depth=3, infmoe_rate=(0.75, None, 0.25)),
    "mean-from": dict(infmoe_depth=2, infmoe_mean_from=1),
    "share-mask": dict(infmoe_depth=2, infmoe_share_mask=True),
    "mixture": dict(infmoe_components=3, infmoe_hidden=8),
    "mean": dict(infmoe_mean=True),
    "balance": dict(balance="layer"),
    "specialization": dict(specialization_coef=2e-3),
}


def continuous_cells():
    cells = {}
    for (name, more), (owner, groups) in itertools.product(EXTENSIONS.items(), OWNERSHIPS.items()):
        arch = ("gpt2", "llama")[(len(cells) + groups) % 2]
        cells[f"infmoe-{owner}-{name}"] = dict(flavour="infmoe", n_layer=4, infmoe_dz=8,
                                               pool_groups=groups, arch=arch, **more)
    return cells


CELLS = {
    "dense-gpt2": dict(n_layer=4), "dense-llama": dict(n_layer=4, arch="llama"),
    **discrete_cells(), **continuous_cells(),
    "switch-every-second": dict(flavour="switch", n_layer=4, moe_every=2),
    "infmoe-every-second": dict(flavour="infmoe", n_layer=4, moe_every=2, infmoe_dz=8),
}
