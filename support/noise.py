"""Noise as a pure function of seeds [ours]: a counter-based generator in tensor operations.

Ranks, gradient accumulation, recomputation, resuming, the KV cache and torch.compile all see the
same numbers, and no generator's state has to be kept. Letters: B sequences, S positions, T = B*S.
"""
import math
from functools import wraps

import torch
from torch import Tensor
from torch.library import custom_op

MASK32 = 0xFFFFFFFF


def hash32(x):
    """Mix the low 32 bits of an int64 tensor or an int: two rounds of xor-shift-multiply."""
    for _ in range(2):
        x = (((x >> 16) ^ x) * 0x45D9F3B) & MASK32  # the product stays below 2^63
    return (x >> 16) ^ x


def hash32_of_int32(x):
    """The same bits of an int32 tensor, whose products wrap around: a fifth of int64's time."""
    for _ in range(2):
        x = (((x >> 16) & 0xFFFF) ^ x) * 0x45D9F3B
    return ((x >> 16) & 0xFFFF) ^ x


def one_operator(schema, fake):
    """A function as one node of torch.compile's graph: each round of the hash uses its x twice, and
    the compiler, which writes x out in full each time, would not come to an end."""
    def decorate(f):
        made = custom_op(f"nanoexperts::{f.__name__}", f, mutates_args=(), schema=schema)
        made.register_fake(fake)

        @wraps(f)
        def call(*given):
            return made(*given) if torch.compiler.is_compiling() else f(*given)

        return call
    return decorate


@one_operator("(Tensor sequence_keys, Tensor positions) -> Tensor",
              lambda keys, positions: keys.new_empty(len(keys) * len(positions)))
def noise_seeds(sequence_keys: Tensor, positions: Tensor) -> Tensor:
    """A 32-bit seed per token: keys of the sequences (B,) int64, positions (S,) -> (B*S,) int64."""
    low, high = sequence_keys & MASK32, (sequence_keys >> 32) & MASK32
    keys = hash32(hash32((low + 0x9E3779B9) & MASK32) ^ high)  # (B,)
    seeds = keys[:, None] ^ hash32(positions + 0x7F4A7C15)[None, :]  # (B, S)
    return hash32(seeds).flatten()  # (T,)


@one_operator("(Tensor seeds, int stream, int n) -> Tensor",
              lambda seeds, stream, n: seeds.new_empty(len(seeds), n, dtype=torch.float32))
def uniform_noise(seeds: Tensor, stream: int, n: int) -> Tensor:
    """n numbers in (0, 1) for every token and stream: seeds (T,) -> (T, n) float32."""
    salt = hash32((torch.arange(n, device=seeds.device) + hash32(stream + 1)) & MASK32)  # (n,)
    bits = hash32_of_int32(hash32(seeds).int()[:, None] + salt.int()[None, :])  # (T, n)
    u = ((bits >> 8 & 0xFFFFFF).float() + 0.5).mul(2.0**-24)
    return u.clamp_max(1 - 2.0**-24)  # with all 24 bits set float32 would round up, to 1


def gumbel_noise(seeds: Tensor, stream: int, n: int) -> Tensor:
    """-log(-log u): seeds (T,) -> (T, n)."""
    return -(-uniform_noise(seeds, stream, n).log()).log()


def normal_noise(seeds: Tensor, stream: int, n: int) -> Tensor:
    """Standard normal numbers by Box-Muller: seeds (T,) -> (T, n).

    Number i does not depend on n, so K samples are the first K of more.
    """
    uniform = uniform_noise(seeds, stream, n + n % 2)
    u, v = uniform.unflatten(-1, (-1, 2)).unbind(-1)  # (T, n/2) each
    radius, angle = (-2 * u.log()).sqrt(), 2 * math.pi * v
    pairs = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)  # (T, n/2, 2)
    return pairs.flatten(1)[:, :n]
