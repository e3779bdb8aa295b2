"""For generation: the KV cache, and the choice of the next token.

Letters: B sequences, S positions, G key/value heads, d head width, V vocabulary.
"""
import math

import torch
from torch import Tensor


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
