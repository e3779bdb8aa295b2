"""Losses and diagnostics of mixtures of experts: pure functions of plain tensors.

They need torch and nothing else of this repository: take the file into any code base. Losses come
without coefficients. Letters in shapes: T tokens, E experts to choose from (M where they form a
pool), K chosen ones, F width of an expert, L layers.

Switch (arXiv 2101.03961), ST-MoE (2202.08906), UniPool (2605.06665), infinity-MoE (2601.17680),
specialization and coupling (2602.14159). "[ours]" marks a choice that no paper makes.
"""
import math

import torch

# --------------------------------------------------------------------------------------------------
# 1. Balance: every expert should get work


def expert_counts(ids: torch.Tensor, n_experts: int, among=None) -> torch.Tensor:
    """How many assignments went to each expert: ids (...) int64 -> (E,) float32, no gradient.

    among (...) bool: those that count.
    """
    ones = torch.ones_like(ids, dtype=torch.float32) if among is None else among.float()
    return torch.zeros(n_experts, device=ids.device).index_add_(0, ids.flatten(), ones.flatten())


def normalise_scores(scores: torch.Tensor, eps: float = 1e-20) -> torch.Tensor:
    """Scores (T, E) divided by their sum, for routers whose scores are no distribution."""
    return scores / scores.sum(-1, keepdim=True).clamp_min(eps)


def load_balance_loss(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """E * sum_e f_e P_e of one layer (Switch, eq. 4-6): scores (T, E), counts (E,) -> scalar.

    f, the shares of the assignments, is a constant; the gradient flows through P, the mean score.
    Even use gives sum_e P_e: 1 for a softmax; NormRouter's raw scores sum to more (15.7 for 96
    experts at the start), and are pushed down.
    """
    return pool_loss([scores], [counts])


def pool_loss(scores: list[torch.Tensor], counts: list[torch.Tensor]) -> torch.Tensor:
    """M * sum_i fbar_i Pbar_i over the L layers of one pool (UniPool): L (T, M), L (M,) -> scalar.

    fbar and Pbar are means over the layers of their f and P. The average comes first: a layer may
    be as peaked as it likes while the pool as a whole is evenly used. The paper's code takes fbar
    from the previous micro-batch; here both are of this one [ours].
    """
    f = shares(torch.stack(counts)).mean(0).detach()  # (M,)
    p = torch.stack([s.mean(0) for s in scores]).mean(0)  # (M,)
    return f.numel() * (f.to(p.dtype) * p).sum()


# f(scores, counts): "layer" is called once for each layer, any other name once for each bank with
# all layers that use it. With one layer both are Switch's loss, hence one function for two names.
# It must be linear in the mean scores, whose gradients ranks and micro-steps average; counts are of
# one micro-step, summed over the ranks.
BALANCES = {"layer": pool_loss, "pool": pool_loss}


def cardinality_loss(scores: torch.Tensor, n_experts: float) -> torch.Tensor:
    """(H - log n)^2, H the entropy of mean scores (E,): pulls a layer's use towards n experts.

    UniPool-lock. Not linear in the mean: give it the mean over all ranks.
    """
    q = scores / scores.sum().clamp_min(1e-12)
    return ((q * (q + 1e-12).log()).sum() + math.log(n_experts)).square()


def neuron_balance_loss(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """F * sum_j q_j mean softmax(W_z z)_j: the layer loss of infinity-MoE's neurons [ours].

    scores (T, K, F) = W_z z, counts (F,): how often each neuron was selected -> scalar.
    """
    return load_balance_loss(scores.softmax(-1).flatten(0, 1), counts)


def z_loss(logits: torch.Tensor) -> torch.Tensor:
    """mean_x logsumexp(logits)^2 (ST-MoE, eq. 5): keeps logits small. logits (T, E) -> scalar."""
    return logits.logsumexp(-1).square().mean()


# --------------------------------------------------------------------------------------------------
# 2. Specialization and coupling (arXiv 2602.14159)


def pair_cosines(activations: torch.Tensor, eps: float = 1e-12) -> torch.Tensor:
    """Cosines between the activations of one token's experts: (T, K, F) -> (T, K*(K-1)/2).

    Eager: one K x K matrix product a token. Compiled, with K <= 4: sums of products, which fuse.
    """
    k = activations.shape[1]
    i, j = torch.triu_indices(k, k, 1, device=activations.device)
    with torch.autocast(activations.device.type, enabled=False):
        a = activations.to(torch.promote_types(activations.dtype, torch.float32))
        if k <= 4 and torch.compiler.is_compiling():
            rows = a.unbind(1)  # K times (T, F)
            squares = torch.stack([r.square().sum(-1) for r in rows], 1)  # (T, K)
            pairs = [(m, n) for m in range(k) for n in range(m + 1, k)]
            products = torch.stack([(rows[m] * rows[n]).sum(-1) for m, n in pairs], 1)
        else:
            gram = a @ a.transpose(1, 2)  # (T, K, K)
            squares, products = gram.diagonal(dim1=1, dim2=2), gram[:, i, j]
    norms = squares.clamp_min(eps**2).sqrt()
    return products / (norms[:, i] * norms[:, j])


def specialization_loss(activations: torch.Tensor, form: str = "square") -> torch.Tensor:
    """mean over tokens and pairs e != v in TopK(x) of cos(a_e(x), a_v(x))^2 -> scalar.

    activations (T, K, F), K >= 2: expert e's hidden activation a_e before its down projection.
    form: square (sign-free, the paper's), abs, or plain. ValueError for K = 1.
    """
    if activations.shape[1] < 2:
        raise ValueError("specialization_loss compares the experts of one token: it needs K >= 2 "
                         "activations, got 1")
    cos = pair_cosines(activations)
    return {"square": cos.square, "abs": cos.abs, "plain": lambda: cos}[form]().mean()


def coupling_loss(scores: torch.Tensor, ids: torch.Tensor, next_scores: torch.Tensor,
                  next_ids: torch.Tensor, paths: torch.Tensor | None = None) -> torch.Tensor:
    """- mean_x sum_{e in TopK_l} sum_{v in TopK_l+1} w_ev s_l,e s_l+1,v of two adjacent layers.

    scores (T, E) are normalised over all experts here; ids (T, K). paths None: w = 1, the loss as
    published, which factorises into the product of the two top-K masses: it sharpens both routers
    and rewards no particular path ("mass"). paths (E, E): w_ev, a running estimate of how often v
    follows e with rows summing to 1, so that coherent pathways are rewarded ("path") [ours].
    """
    s = normalise_scores(scores).gather(-1, ids)  # (T, K)
    n = normalise_scores(next_scores).gather(-1, next_ids)  # (T, K)
    if paths is None:
        return -(s.sum(-1) * n.sum(-1)).mean()
    w = paths.detach()[ids[:, :, None], next_ids[:, None, :]].to(s.dtype)  # (T, K, K)
    # products and sums, as autocast would run an einsum in bfloat16
    return -(s[:, :, None] * w * n[:, None, :]).sum((1, 2)).mean()


# --------------------------------------------------------------------------------------------------
# 3. Diagnostics, for the training log and for probe.py


def shares(counts: torch.Tensor) -> torch.Tensor:
    """counts (..., E) -> shares that sum to 1 (all zero where nothing was counted)."""
    return counts / counts.sum(-1, keepdim=True).clamp_min(1)


def max_share(counts: torch.Tensor) -> torch.Tensor:
    """Largest share that one expert gets, times E: 1 is even, E is collapse. (..., E) -> (...)."""
    return shares(counts).amax(-1) * counts.shape[-1]


def dead_share(counts: torch.Tensor) -> torch.Tensor:
    """Share of the experts that got nothing. (..., E) -> (...)."""
    return (counts == 0).float().mean(-1)


def imbalance(counts: torch.Tensor) -> torch.Tensor:
    """E * sum_e f_e^2: 1 is even, E is collapse. (..., E) -> (...)."""
    return shares(counts).square().sum(-1) * counts.shape[-1]


def usage_entropy(counts: torch.Tensor) -> torch.Tensor:
    """H(q) / log E of the shares q (infinity-MoE, section 5.4). (..., E) -> (...); 0 for E = 1."""
    q = shares(counts)
    return -torch.special.xlogy(q, q).sum(-1) / math.log(max(2, counts.shape[-1]))


def routing_entropy(scores: torch.Tensor) -> torch.Tensor:
    """mean_x H(s(x)) / log E of the normalised scores (T, E): 1 is undecided, 0 is certain."""
    s = normalise_scores(scores)
    # 0 log 0 = 0; torch.special.xlogy takes five times as long
    information = -s.clamp_min(torch.finfo(s.dtype).tiny).log()
    return (s * information).sum(-1).mean() / math.log(max(2, scores.shape[-1]))


def path_counts(ids: torch.Tensor, next_ids: torch.Tensor, n_experts: int) -> torch.Tensor:
    """How often expert v of the next layer follows e for a token: (T, K) twice -> (E, E)."""
    pairs = ids[:, :, None] * n_experts + next_ids[:, None, :]  # (T, K, K)
    return expert_counts(pairs, n_experts * n_experts).view(n_experts, n_experts)


def path_consistency(ids: torch.Tensor, next_ids: torch.Tensor, n_experts: int) -> torch.Tensor:
    """Share of tokens whose next first choice is the most frequent successor of this one."""
    counts = path_counts(ids[:, :1], next_ids[:, :1], n_experts)
    return counts.amax(-1).sum() / counts.sum()


def unique_experts(ids: torch.Tensor) -> torch.Tensor:
    """Distinct experts a token meets over a pool's depth, as a share of the L*K it could meet.

    ids (L, T, K) -> scalar, the mean over tokens.
    """
    path = ids.transpose(0, 1).flatten(1).sort(-1).values  # (T, L*K)
    return (1 + (path[:, 1:] != path[:, :-1]).sum(-1)).float().mean() / path.shape[1]


def overlap(activations: torch.Tensor) -> torch.Tensor:
    """mean |cos| of one token's activations (T, K, F): what specialization should lower."""
    return pair_cosines(activations).abs().mean()


def log_columns(stats: dict[str, torch.Tensor], counts: torch.Tensor) -> dict[str, float]:
    """A bounded summary of one step's routing for the log: a few numbers, however many experts.

    stats: what GPT returns, summed over micro-steps and ranks. counts (banks, E or F): its counts
    by bank. imbalance, max_share, dead_share are means over the banks. entropy: of the router's
    scores, or of the neurons' use for infinity-MoE, which adds the mean of sigma and the spread of
    mu over the tokens.
    """
    columns = {"imbalance": imbalance(counts)}
    if "sigma" not in stats:
        columns["entropy"] = stats["entropy"] / stats["tokens"]
    else:
        columns["entropy"] = usage_entropy(counts)
    columns |= {"max_share": max_share(counts), "dead_share": dead_share(counts)}
    if "sigma" in stats:
        mu, mu_squared = stats["mu"] / stats["tokens"], stats["mu_squared"] / stats["tokens"]
        columns["sigma"] = stats["sigma"] / stats["tokens"]
        columns["mu_spread"] = (mu_squared - mu.square()).clamp_min(0).sqrt()
    return {name: value.mean().item() for name, value in columns.items()}
