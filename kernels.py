"""
The expert FFNs, each as reference -> fast path -> dispatcher. Nothing here knows about routers, losses or models.

    expert_ffn    y[t] = sum_k weights[t,k] * W_out[e] act(W_in[e] x[t]),  e = ids[t,k]          (discrete experts)
    masked_ffn    y[t] = W_out ( act(W_in x[t]) * 1/K sum_k topN(W_z z[t,k]) )                   (continuous experts)
    topn_mask     the n largest entries of a row keep their raw value, the rest are 0

Letters: T tokens, D model width, F hidden width of an expert, E experts, K choices (or samples) a token, N = T*K.
"""

import torch
import torch.nn.functional as F

BACKENDS = ("loop", "grouped", "triton")


def activate(h, activation):
    """h (..., F) for gelu (tanh form, GPT-2's) or (..., 2F) = [gate; up] for swiglu -> (..., F)."""
    if activation == "gelu":
        return F.gelu(h, approximate="tanh")
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


# ------------------------------------------------------------------------------------------------ grouped expert FFN


def expert_ffn_loop(x, weights, ids, w_in, w_out, activation, keep_activations=False):
    """The oracle: for every expert, the tokens that chose it. Obvious, differentiable, slow."""
    y = x.new_zeros(x.shape)
    acts = x.new_zeros(*ids.shape, w_out.shape[2]) if keep_activations else None
    for e, (w_in_e, w_out_e) in enumerate(zip(w_in.unbind(0), w_out.unbind(0))):
        token, slot = (ids == e).nonzero(as_tuple=True)
        act = activate(x[token] @ w_in_e.T, activation)
        y = y.index_add(0, token, (act @ w_out_e.T) * weights[token, slot, None].to(x.dtype))
        if keep_activations:
            acts = acts.index_put((token, slot), act)
    return y, acts


def sort_by_expert(ids, n_experts):
    """ids (T, K) -> order (T*K,) assignments sorted by expert, inverse (T*K,), ends (E,) int32 end of each group."""
    sorted_ids, order = ids.reshape(-1).sort(stable=True)  # (T*K,)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=ids.device))
    experts = torch.arange(n_experts, device=ids.device)
    return order, inverse, torch.searchsorted(sorted_ids, experts, right=True).to(torch.int32)


@torch.library.custom_op("nanoexperts::grouped_linear", mutates_args=())
def grouped_linear(a: torch.Tensor, w: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """a (N, I) sorted by group, w (E, O, I), ends (E,) int32 -> (N, O). An op: torch traces grouped_mm in bf16 only."""
    if fits_grouped_mm(a.dtype, *w.shape[1:]):
        return F.grouped_mm(a, w.transpose(1, 2), offs=ends)
    return torch.cat([F.linear(part, w_e) for part, w_e in zip(a.split(group_sizes(ends)), w.unbind(0))])


@torch.library.custom_op("nanoexperts::grouped_weight_grad", mutates_args=())
def grouped_weight_grad(grad: torch.Tensor, a: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """grad (N, O), a (N, I) sorted by group -> (E, O, I); a group without rows gets zeros."""
    if fits_grouped_mm(a.dtype, a.shape[1], grad.shape[1]):
        return F.grouped_mm(grad.T, a, offs=ends)
    sizes = group_sizes(ends)
    return torch.stack([g.T @ part for g, part in zip(grad.split(sizes), a.split(sizes))])


def fits_grouped_mm(dtype, *widths):
    """grouped_mm wants rows of a multiple of 16 bytes, in a dtype it knows."""
    return dtype != torch.float64 and all(width * dtype.itemsize % 16 == 0 for width in widths)


def group_sizes(ends):
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


def _grouped_linear_backward(ctx, grad):
    a, w, ends = ctx.saved_tensors
    grad = grad.contiguous()
    return grouped_linear(grad, w.transpose(1, 2), ends), grouped_weight_grad(grad, a, ends), None


grouped_linear.register_fake(lambda a, w, ends: a.new_empty(a.shape[0], w.shape[1]))
grouped_weight_grad.register_fake(lambda grad, a, ends: a.new_empty(ends.shape[0], grad.shape[1], a.shape[1]))
grouped_linear.register_autograd(
    _grouped_linear_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


def expert_ffn_grouped(x, weights, ids, w_in, w_out, activation, keep_activations=False):
    """Assignments sorted once, one grouped matrix product per weight, no host sync."""
    order, inverse, ends = sort_by_expert(ids, w_in.shape[0])
    h = grouped_linear(x.index_select(0, order // ids.shape[1]), w_in, ends)  # (N, F or 2F)
    act = activate(h, activation)
    out = grouped_linear(act, w_out, ends).index_select(0, inverse).view(*ids.shape, -1)  # (T, K, D)
    y = (out * weights.to(out.dtype).unsqueeze(-1)).sum(1)
    return y, act.index_select(0, inverse).view(*ids.shape, -1) if keep_activations else None


def choose_backend(x, w_in, w_out):
    """The backend of `auto` for these tensors and why, by device and shape only: (name, reason)."""
    return "grouped", "one grouped matmul over all experts"


def expert_ffn(x, weights, ids, w_in, w_out, activation, backend="auto", keep_activations=False):
    """
    The mixture of experts after routing: y[t] = sum_k weights[t,k] * w_out[e] @ act(w_in[e] @ x[t]), e = ids[t,k].

    x (T, D); weights (T, K) gates; ids (T, K) int64, an expert at most once per token; w_in (E, F, D) for "gelu",
    (E, 2F, D) = [gate; up] rows for "swiglu"; w_out (E, D, F). Returns y (T, D) and, if keep_activations, the hidden
    activations before gate and w_out (T, K, F), else None. Differentiable in x, weights, w_in, w_out; an expert that
    no token chose gets gradients of exact zeros. Raises ValueError where shapes disagree.
    """
    check_expert_arguments(x, weights, ids, w_in, w_out, activation, backend)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w_in, w_out = x.to(dtype), w_in.to(dtype), w_out.to(dtype)
    if backend == "auto":
        backend = choose_backend(x, w_in, w_out)[0]
    if backend == "loop":
        return expert_ffn_loop(x, weights, ids, w_in, w_out, activation, keep_activations)
    return expert_ffn_grouped(x, weights, ids, w_in, w_out, activation, keep_activations)


def check_expert_arguments(x, weights, ids, w_in, w_out, activation, backend):
    if activation not in ("gelu", "swiglu"):
        raise ValueError(f"activation {activation!r}: expected gelu or swiglu")
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"backend {backend!r}: expected auto, {', '.join(BACKENDS)}")
    n_experts, d_model, hidden = w_out.shape
    rows = hidden * (2 if activation == "swiglu" else 1)
    if tuple(w_in.shape) != (n_experts, rows, d_model):
        raise ValueError(f"w_in {tuple(w_in.shape)}: expected {(n_experts, rows, d_model)} for {activation}")
    if x.dim() != 2 or x.shape[1] != d_model:
        raise ValueError(f"x {tuple(x.shape)}: expected (T, {d_model})")
    if ids.shape != weights.shape or ids.shape[0] != x.shape[0]:
        raise ValueError(f"ids {tuple(ids.shape)}, weights {tuple(weights.shape)}: expected ({x.shape[0]}, K) both")


# ---------------------------------------------------------------------------------------------------- masked FFN


def topn_mask(scores, n_keep):
    """Keep the n_keep largest entries of the last dim (raw value), 0 elsewhere; exactly n_keep, ties to the lowest index."""
    chosen = scores.argsort(dim=-1, descending=True, stable=True)[..., :n_keep]
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)
    return torch.where(keep, scores, 0)


def masked_ffn(x, z, w_in, w_out, w_z, n_keep, activation, backend="auto"):
    """
    Infinity-MoE's layer with the sum over samples moved inside W_2 (exact for masks that act after the activation):
    y = w_out @ ( act(w_in x) * (1/K) sum_k topn_mask(w_z z_k, n_keep) )          (arXiv 2601.17680)

    x (T, D); z (T, K, dz); w_in (F, D) for "gelu", (2F, D) for "swiglu"; w_out (D, F); w_z (F, dz); n_keep None keeps
    every raw value. Returns y (T, D).
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, z, w_in, w_out, w_z = (a.to(dtype) for a in (x, z, w_in, w_out, w_z))
    scores = F.linear(z, w_z)  # (T, K, F)
    mask = (scores if n_keep is None else topn_mask(scores, n_keep)).mean(1)  # (T, F)
    return F.linear(activate(F.linear(x, w_in), activation) * mask, w_out)
