"""Inference: the KV cache, the choice of the next token, and two methods of GPT's.

Letters: B sequences, S positions, G key/value heads, d head width, V vocabulary.
"""
import math

import torch
from torch import Tensor

from support import rules


class KVCache:
    """Keys and values of the positions seen so far; one buffer per layer, block_size long."""

    def __init__(self, config, batch: int, device, dtype):
        shape = (config.n_layer, batch, config.n_kv_head, config.block_size, config.head_dim)
        self.k = torch.empty(shape, device=device, dtype=dtype)  # (layers, B, G, S, d)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # GPT.forward moves it once all layers have written

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, G, s, d) behind what is there; all keys and values of the layer so far."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


def sample_token(logits, temperature, top_k, top_p, generator):
    """One token per row of logits (B, V) -> (B, 1); temperature 0 takes the likeliest."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None:  # the fewest tokens whose probabilities reach top_p, at least one
        ordered, order = logits.softmax(-1).sort(descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p  # (B, V), in the order of probability
        outside[:, 0] = False  # a top_p below float32's smallest number leaves one, too
        outside = torch.zeros_like(outside).scatter(1, order, outside)  # in the order of ids
        logits = logits.masked_fill(outside, -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)


@torch.no_grad()
def generate(model, tokens, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
             generator=None, use_cache=True):
    """tokens (B, S) -> yields max_new_tokens tensors (B, 1).

    Past block_size the context slides: its oldest half is dropped and the rest runs again.
    """
    size, weight, cache = model.config.block_size, model.wte.weight, None
    for _ in range(max_new_tokens):
        if tokens.shape[1] > size:
            tokens, cache = tokens[:, -max(1, size // 2):], None
        new = tokens if cache is None else tokens[:, -1:]
        if use_cache and cache is None:
            cache = KVCache(model.config, len(tokens), weight.device, weight.dtype)
        logits = model(new, cache=cache).logits[:, -1]  # (B, V)
        token = sample_token(logits, temperature, top_k, top_p, generator)
        yield token
        tokens = torch.cat((tokens, token), dim=1)


def set_samples(model, n_samples: int | None = None, mean: bool | None = None) -> None:
    """infmoe: another K than in training, or z = mu (mean=False: as trained again)."""
    flavour, n = model.config.flavour, 1 if n_samples is None else n_samples
    rules.check([
        (flavour == "infmoe", f"flavour={flavour} draws no samples: set_samples is for infmoe"),
        (n >= 1, f"n_samples={n} must be at least 1")])
    most = 2**30 // (model.config.block_size * model.config.d_expert)
    rules.check([(n <= most, f"infmoe_samples={n}: at most {most} of their masks over the whole "
                             "context fit into 4 GB")])
    for layer, _ in model.expert_layers():
        for router in layer.router.densities.values():
            router.n_samples = n_samples or router.n_samples
            if mean is not None:  # a router trained without Sigma has only its mean
                router.mean = mean or router.logvar is None
