"""UniPool-lock: who owns which expert of a pool (arXiv 2605.06665, as its authors' code has it).

    steps 0 .. n          every layer sees the whole pool; n = lock_steps, 1/60 of the training
    step n                every expert gets one owner, every layer K = M / L experts
    steps n .. 2n         other layers' scores for it fade by a cosine
    from step 2n on       a layer chooses among its own

What is decided lives in the routers' buffers (moe.LockRouter), alike on all ranks, because the
counts are. The authors count on validations and ask for 95 % of each layer's routes, by a MILP; the
sum of the routes kept, over a running mean of the training's counts, is ours.
"""
import math

import numpy as np
import torch


def owned_by_a_layer(config) -> int:
    """K = M / L."""
    return config.n_experts * config.pool_groups // len(config.moe_layers())


@torch.no_grad()
def update(config, routers, counts, step: int | None) -> None:
    """After a step: counts (L, M) of all its tokens; step: how many are done.

    At step n it waits for the device, once.
    """
    n = config.lock_steps
    for router, count in zip(routers, counts):
        router.steps += 1
        router.seen.lerp_(count / count.sum(), 0.1)
    if step is None or n == 0 or not n <= step < 2 * n:
        return
    if step == n:
        seen = torch.stack([router.seen for router in routers]).double().cpu().numpy()
        groups = np.split(seen, config.pool_groups)
        masks = np.concatenate([assign(group)[None] != np.arange(len(group))[:, None]
                                for group in groups])  # (L, M): others' experts
    fade = 0.5 - 0.5 * math.cos(math.pi * (step + 1 - n) / n)  # of the next step
    for i, router in enumerate(routers):
        away = torch.from_numpy(masks[i]).to(router.lost.device) if step == n else router.lost > 0
        take_away(router, away, fade)


def take_away(router, away, fade: float) -> None:
    """Off the scores of the experts away (M,) bool; with 1 they cannot be chosen at all."""
    router.lost.copy_(away * fade)
    router.bias.copy_(torch.where(away & (fade == 1), -1e9, 0.0))  # a checkpoint takes no -inf


def is_locked(state: dict) -> bool:
    """Whether the experts of a model have owners and are alone with them."""
    return any((value == 1).any() for name, value in state.items() if name.endswith(".lost"))


def deal_out(config, routers) -> None:
    """The control: an allocation at random, from the start."""
    per_pool, own = len(routers) // config.pool_groups, owned_by_a_layer(config)
    order = np.random.default_rng(0).permutation(config.n_experts)
    for i, router in enumerate(routers):
        away = torch.ones(config.n_experts, dtype=torch.bool)
        away[order[i % per_pool * own:][:own]] = False
        take_away(router, away.to(router.lost.device), 1.0)


def assign(shares: np.ndarray) -> np.ndarray:
    """Owners (M,) that keep the most routes: shares (L, M) of each layer's, M / L experts a layer.

    Exact: while a ring of layers gains by each handing one expert to the next, they do. Without
    such a ring no allocation is better (a flow of minimal cost has no negative cycle).
    """
    n_layers, n_experts = shares.shape
    counts = np.rint(shares * 1e9).astype(np.int64)  # integers: a gain is a gain
    owner = np.arange(n_experts) % n_layers
    while ring := best_ring(counts, owner):
        for expert, layer in ring:
            owner[expert] = layer
    return owner


def best_ring(counts, owner) -> list[tuple[int, int]]:
    """[(expert, its new layer), ...] of a ring that gains, by Bellman and Ford; [] if none does."""
    n_layers = len(counts)
    gain, moved = np.empty((2, n_layers, n_layers), np.int64)  # from layer, to layer
    for a in range(n_layers):
        mine = np.flatnonzero(owner == a)
        gains = counts[:, mine] - counts[a, mine]  # (L, K)
        moved[a], gain[a] = mine[gains.argmax(1)], gains.max(1)
    best, parent = np.zeros(n_layers, np.int64), np.full(n_layers, -1)
    for _ in range(n_layers + 1):
        through = best[:, None] + gain  # (L, L)
        better = through.max(0) > best
        if not better.any():
            return []
        parent[better] = through.argmax(0)[better]
        best = np.maximum(best, through.max(0))
    layer = int(np.flatnonzero(better)[0])
    for _ in range(n_layers):  # far enough back to be inside the ring
        layer = int(parent[layer])
    ring, start = [], layer
    while not ring or layer != start:
        before = int(parent[layer])
        ring.append((int(moved[before, layer]), layer))
        layer = before
    return ring
