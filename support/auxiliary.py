"""What routers said, turned into losses and statistics: between GPT.forward and losses.py.

Nothing here decides anything: losses.py has the formulas. Letters as in moe.py; layers is GPT's
list of (MoE layer, its bank), routings holds a Routing or a tuple of Codes for each of them.
"""
import torch
import torch.distributed as dist

import losses
from support import lock


def losses_and_statistics(config, layers, routings, activations, paths) -> tuple[dict, dict]:
    """-> weighted auxiliary losses, and statistics of this micro-step that add up.

    Balance losses and z-loss are summed over layers (or pools), as in Switch and Megatron;
    specialization and coupling are means over layers: their weight does not grow with depth.
    """
    if config.flavour == "infmoe":
        aux, stats = continuous_losses(config, layers, routings)
    else:
        aux, stats = discrete_losses(config, layers, routings, paths)
    if config.specialization_coef:
        per_layer = torch.stack([losses.specialization_loss(a) for a in activations])
        aux["specialization"] = config.specialization_coef * per_layer.mean()
    return aux, stats


def discrete_losses(config, layers, routings, paths):
    c, aux, n, router = config, {}, config.n_experts, layers[0][0].router
    among = [r.weights > 0 if router.zero_is_idle else None for r in routings]
    counts = [losses.expert_counts(r.ids, n, busy) for r, busy in zip(routings, among)]
    counts = torch.stack(counts)  # (L, E)
    step = stride(routings[0].ids.shape[0], 512)  # entropy is looked at only: of all, 6 % of a step
    entropy = [losses.routing_entropy(r.scores.detach()[::step]) for r in routings]
    entropy = torch.stack(entropy)  # (L,)
    tokens = counts.new_full((1,), routings[0].ids.shape[0])
    stats = {"counts": counts, "entropy": entropy * tokens, "tokens": tokens}
    if c.balance in losses.BALANCES and c.balance_coef:
        grown = 1.2 ** router.ups[0] if c.router == "relu" else 1.0
        aux["balance"] = c.balance_coef * grown * balance_loss(c, routings, counts)
    if c.lock_coef:
        aux["lock"] = c.lock_coef * lock_loss(c, layers, routings)
    if c.z_coef:
        aux["z"] = c.z_coef * sum(losses.z_loss(r.logits) for r in routings)
    if c.coupling_coef:
        pairs = list(zip(routings, routings[1:]))
        weights = [None] * len(pairs) if paths is None else paths
        terms = [losses.coupling_loss(a.scores, a.ids, b.scores, b.ids, w)
                 for (a, b), w in zip(pairs, weights)]
        aux["coupling"] = c.coupling_coef * torch.stack(terms).mean()
        if paths is not None:
            followed = [losses.path_counts(a.ids, b.ids, n) for a, b in pairs]
            stats["paths"] = torch.stack(followed)  # (L-1, E, E)
    return aux, stats


def balance_loss(config, routings, counts):
    """The sum over layers (balance=layer) or banks; counts (L, E) are summed over the ranks."""
    scores = [r.scores for r in routings]
    if config.balance_scores == "normalised":
        scores = [losses.normalise_scores(s) for s in scores]
    together = 1  # layers that are balanced together
    if config.balance != "layer" and config.pool_groups:
        together = len(routings) // config.pool_groups
    counts = sum_over_ranks(counts).unbind()
    total = 0
    for i in range(0, len(routings), together):
        group = slice(i, i + together)
        total = total + losses.BALANCES[config.balance](scores[group], counts[group])
    return total


def lock_loss(config, layers, routings):
    """UniPool-lock: the mean over layers of (H_l - log K)^2, K the experts that a layer will own.

    H is of the mean over all ranks, its gradient through this rank's part: means of gradients over
    ranks are then what one rank would have. It warms up until owners are found.
    """
    local = torch.stack([r.scores.mean(0) for r in routings])  # (L, M)
    total = sum_over_ranks(torch.cat((local.detach().flatten(), local.new_ones(1))))
    means = (total[:-1] / total[-1]).view_as(local) + local - local.detach()
    own = lock.owned_by_a_layer(config)
    loss = torch.stack([losses.cardinality_loss(mean, own) for mean in means]).mean()
    return loss * ((layers[0][0].router.steps[0] + 1) / max(1, config.lock_steps)).clamp_max(1)


def continuous_losses(config, layers, routings):
    """Without a balance loss the statistics look at 256 tokens at most: masks cost time."""
    c, aux = config, {}
    if c.balance == "none":
        tokens = next(code for code in routings[0] if code is not None).z.shape[0]
        routings = [every_nth(codes, stride(tokens, 256)) for codes in routings]
    usage = [bank.usage(codes) for (_, bank), codes in zip(layers, routings)]
    scores, counts = zip(*(pair for pairs in usage for pair in pairs))  # (T, K, F), (F,) per mask
    counts = torch.stack(counts)  # (L * masks, F)
    if c.balance == "layer" and c.balance_coef:
        pairs = zip(scores, sum_over_ranks(counts))
        aux["balance"] = c.balance_coef * sum(losses.neuron_balance_loss(s, n) for s, n in pairs)
    codes = [code for codes in routings for code in codes if code is not None]
    with torch.no_grad():
        mu = torch.stack([code.mu.float().mean(1) for code in codes])  # (codes, T, dz)
        sigma = torch.stack([(code.logvar.float() / 2).exp().mean() for code in codes])  # (codes,)
        stats = {"counts": counts, "tokens": counts.new_full((1,), mu.shape[1]),
                 "sigma": sigma * mu.shape[1], "mu": mu.sum(1), "mu_squared": mu.square().sum(1)}
    return aux, stats


def stride(tokens, most):
    """A step through a micro-step's tokens that meets at most so many. Odd: an even one would meet
    the same positions of every sequence."""
    return -(-tokens // most) | 1


def every_nth(codes, step):
    """Codes of every step-th token, for the hidden layers that have codes."""
    return [code if code is None else type(code)(*(part[::step] for part in code))
            for code in codes]


@torch.no_grad()
def update_balance(config, layers, paths, stats, step):
    """Selection biases, path estimates and the like after `step` steps; stats of all ranks."""
    if config.router == "relu":  # ReMoE, eq. 8: one coefficient for all layers
        pairs = stats["tokens"] * stats["counts"].numel()
        for layer, _ in layers:
            share = stats["counts"].sum() / pairs  # of the T * L * E pairs above zero
            layer.router.ups += torch.sign(share - layer.router.wanted)
    if config.router == "lock":
        lock.update(config, [layer.router for layer, _ in layers], stats["counts"], step)
    if config.balance == "bias":  # layers that share a pool are balanced together [ours]
        load = per_bank(stats["counts"], config.pool_groups)  # (banks, E)
        for i, (layer, _) in enumerate(layers):
            layer.router.update_bias(load[i * len(load) // len(layers)], config.balance_coef)
    if paths is not None:
        n = stats["paths"]
        seen = n.sum(-1, keepdim=True)  # (L-1, E, 1); rows of idle experts stay as they are
        moved = paths.lerp(n / seen.clamp_min(1), 0.1)
        paths.copy_(torch.where(seen > 0, moved, paths))


@torch.no_grad()
def log_columns(config, stats) -> dict[str, float]:
    """A few numbers, whatever the number of experts: means over banks; {} for a dense model."""
    if not stats:
        return {}
    groups = 0 if config.flavour == "infmoe" else config.pool_groups
    return losses.log_columns(stats, per_bank(stats["counts"], groups))


def per_bank(counts, groups):
    """Counts per layer (L, E) -> per bank (G, E): layers that share a pool are added."""
    return counts.view(groups, -1, counts.shape[-1]).sum(1) if groups else counts


def sum_over_ranks(x):
    """x added up over all ranks of a distributed run (inside torch.compile, too)."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    from torch.distributed import _functional_collectives as collectives  # not in every build
    return collectives.wait_tensor(collectives.all_reduce(x, "sum", dist.group.WORLD))
