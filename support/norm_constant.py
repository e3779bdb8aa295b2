"""The constant of UniPool's NormRouter (arXiv 2605.06665, after KERN), by Monte Carlo."""
import functools

import numpy as np


@functools.lru_cache
def norm_router_constant(n_experts: int, top_k: int, n_draws: int = 100_000) -> float:
    """c = E[ 1 / ||top-K of relu(g / ||g||)||_2 ], g ~ N(0, I_E): their norm starts near sigma.

    For few experts the mean does not exist (no positive entry: division by zero), so draws whose
    top-K norm is below 0.05 are left out [ours; the official code returns inf at E = 8]. Monte
    Carlo with a fixed seed on the CPU: every rank and every device gets the same float.
    """
    rng, norms = np.random.default_rng(seed=0), []
    for start in range(0, n_draws, 10_000):  # bounded memory: 10,000 x E floats at a time
        g = rng.standard_normal((min(10_000, n_draws - start), n_experts), dtype=np.float32)
        unit = np.maximum(g / np.linalg.norm(g, axis=1, keepdims=True), 0)
        top = np.partition(unit, n_experts - top_k, axis=1)[:, n_experts - top_k:]
        norms.append(np.linalg.norm(top.astype(np.float64), axis=1))
    norms = np.concatenate(norms)
    return float(np.mean(1 / norms[norms >= 0.05]))
