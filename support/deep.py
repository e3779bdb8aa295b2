"""Codes for continuous FFNs of several hidden layers: an extension of infinity-MoE [ours].

The paper has one hidden layer and one code. Extensions of section 7.3 of a published reading of
the paper ask how codes of a deep FFN relate; with H = 1 everything here is the paper's.
"""
import functools

import torch
import torch.nn.functional as F
from torch import nn

from support.ops import activate


class CodeRouter(nn.Module):
    """The codes of all H hidden layers of a continuous FFN.

    density(d_in, mean=, stream=): makes the router of one hidden layer (a GaussianRouter).
    rates: N per hidden layer; a layer of rate None has no mask and needs no code.
    block: this FFN's number in the model, for noise of its own.
    z "independent": a router per hidden layer. "shared": one z, read by each layer's own W_z.
    "hierarchical": the next density sees the previous z, coarse to fine:
    z_{i+1} ~ N(mu_i(x, z_i), Sigma_i(x, z_i)). Hidden layers from mean_from on use z = mu.
    """

    def __init__(self, density, d_model, rates, z="independent", mean_from=None, block=0):
        super().__init__()
        self.rates, self.z = rates, z
        self.mean_from = len(rates) if mean_from is None else mean_from
        self.masked = [i for i, rate in enumerate(rates) if rate is not None]
        self.densities = nn.ModuleDict()
        d_in = d_model
        for i in self.masked[:1] if z == "shared" else self.masked:
            router = density(d_in, mean=i >= self.mean_from, stream=block * len(rates) + i)
            self.densities[str(i)] = router
            d_in = d_model + (router.dz if z == "hierarchical" else 0)

    @property
    def n_choices(self) -> list[int]:
        """Masks that a token has in each hidden layer: one per sample, or one where z = mu."""
        n_samples = self.densities[str(self.masked[0])].n_samples
        if self.z == "hierarchical":  # all codes depend on the first
            return [n_samples if self.masked[0] < self.mean_from else 1] * len(self.rates)
        return [n_samples if i < self.mean_from else 1 for i in range(len(self.rates))]

    def forward(self, x, noise_seeds, token_ids=None):
        """x (T, D), noise_seeds (T,) -> a tuple of H Codes, None where the layer is dense."""
        codes, last = [None] * len(self.rates), None
        x = x[:, None, :]  # (T, 1, D)
        for i in self.masked:
            if last is None or self.z == "independent":
                last = self.densities[str(i)](x, noise_seeds)
            elif self.z == "hierarchical":
                wide = x.expand(-1, last.z.shape[1], -1).to(last.z.dtype)  # (T, K, D)
                last = self.densities[str(i)](torch.cat((wide, last.z), dim=-1), noise_seeds)
            elif i >= self.mean_from:
                last = last._replace(z=last.mu)
            codes[i] = last
        return tuple(codes)


def gated(h, mask, where: str, activation: str) -> torch.Tensor:
    """A hidden layer after its matrix: h (T, 1 or K, F or 2F), mask (T, K, F) or None -> (T, 1 or
    K, F). where the mask multiplies: "post", as in the paper, or "pre" the activation."""
    if mask is None:
        return activate(h, activation)
    mask = mask.to(h.dtype)
    if where == "post":
        return mask * activate(h, activation)
    if activation == "gelu":
        return activate(mask * h, "gelu")
    gate, up = h.chunk(2, dim=-1)  # (T, ., F) each
    return F.silu(mask * gate) * up


def inner_scale(bank, i: int, std: float) -> torch.Tensor:
    """A factor for W_i, i > 1: W_i h_{i-1} starts with the variance of W_1 x, x normed [ours].

    With W_1's std alone a deep SwiGLU FFN starts at 1 % of the stream's rms (one layer: 43 %).
    """
    randn = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    d_ff, wanted = bank.w_out.shape[1], std * bank.w_in[0].shape[1] ** 0.5
    h = wanted * randn(64, 1, len(bank.w_in[0]))  # W_1 x of 64 tokens (64, 1, F or 2F)
    n, scores = bank.n_keep[i - 1], randn(64, 1, d_ff)
    kept = None if n is None else scores * (scores >= scores.topk(n).values[..., -1:])
    act = gated(h, kept, bank.mask, bank.activation)
    return wanted / (std * (d_ff * act.square().mean()).sqrt())  # a tensor: it may be a fake one
