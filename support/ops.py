"""
What all implementations of the expert FFNs share: small functions, and the operators.

An operator (torch.library) is one node to autograd and torch.compile, whatever runs inside. This
file knows no implementation: it is given the steps to run, step(backend, *arguments) -> a tuple of
tensors. kernels.py passes its dispatcher.

Letters: T tokens, D model width, F hidden width of an expert, E experts, K choices (or samples) a
token, N = T*K rows; W is the number of rows of w_in per expert: F for gelu, 2F for swiglu.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op

# ------------------------------------------------------------------------------------------------
# 1. Activations, the order of rows, and masks as two numbers


def activate(h: Tensor, activation: str) -> Tensor:
    """h (..., F) for gelu (tanh form, GPT-2's) or (..., 2F) = [gate; up] for swiglu -> (..., F)."""
    if activation == "gelu":
        return F.gelu(h, approximate="tanh")
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def activate_backward(h, grad, activation):
    """activate(h) again, and the gradient of h from the gradient of activate(h)."""
    aten = torch.ops.aten
    if activation == "gelu":
        return F.gelu(h, approximate="tanh"), aten.gelu_backward(grad, h, approximate="tanh")
    gate, up = h.chunk(2, dim=-1)
    s = F.silu(gate)
    return s * up, torch.cat([aten.silu_backward(grad * up, gate), grad * s], dim=-1)


def sort_by_expert(ids: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """ids (T, K) -> order (N,): the assignments t*K + k, sorted by expert; ends (E,) int32: where
    each expert's rows end."""
    dtype = torch.int16 if n_experts < 2**15 else torch.int32  # fewer bits, fewer radix passes
    sorted_ids, order = ids.reshape(-1).to(dtype).sort(stable=True)
    experts = torch.arange(n_experts, device=ids.device, dtype=dtype)
    return order, torch.searchsorted(sorted_ids, experts, right=True).to(torch.int32)


def undo_order(rows: Tensor, order: Tensor) -> Tensor:
    """rows (N, ...) in expert order -> (N, ...) in token order, row t*K + k."""
    return torch.empty_like(rows).index_copy_(0, order, rows)


def kept(scores: Tensor, value: Tensor, cut: Tensor) -> Tensor:
    """
    scores (..., F), value (...), cut (...) -> bool (..., F): above the value, or equal to it and
    not beyond the cut. So a mask is two numbers a row; the backward pass recomputes it from scores.
    """
    value, cut = value.unsqueeze(-1), cut.unsqueeze(-1)
    column = torch.arange(scores.shape[-1], device=scores.device)
    return (scores > value) | ((scores == value) & (column <= cut))


# ------------------------------------------------------------------------------------------------
# 2. The operators. An argument whose name is not in TYPES is a tensor.

TYPES = dict(backend="str", activation="str", n_keep="int", save="bool", keep="bool",
             d_acts="Tensor?")


def operator(name, step, arguments, n_results, fake):
    """
    step as an operator; `fake` tells torch.compile the shapes and dtypes of its results. Autocast
    is off inside: CUDA's would turn a sum into float32, another dtype than fake announces.
    """
    def call(backend, x, *others):
        with torch.autocast(x.device.type, enabled=False):
            return step(backend, x, *others)

    typed = ", ".join(f"{TYPES.get(a, 'Tensor')} {a}" for a in arguments.split())
    schema = f"({typed}) -> ({', '.join(['Tensor'] * n_results)})"
    made = custom_op(f"nanoexperts::{name}", call, mutates_args=(), schema=schema)
    made.register_fake(fake)
    return made


def make_experts(forward, backward):
    """
    forward(backend, x, weights, w_in, w_out, order, ends, activation, save, keep) -> y (T, D);
    pre-activations h (N, W) in expert order if save, else (0, W); activations (N, F) in token order
    if keep, else (0, F). backward(backend, dy, d_acts or None, x, weights, w_in, w_out, order,
    ends, h, activation) -> gradients of x, weights, w_in, w_out.
    """
    def fake(backend, x, weights, w_in, w_out, order, ends, activation, save, keep):
        n = order.numel()
        h = x.new_empty(n if save else 0, w_in.shape[1])
        return torch.empty_like(x), h, x.new_empty(n if keep else 0, w_out.shape[2])

    def setup(ctx, inputs, output):
        ctx.backend, *tensors, ctx.activation, _, _ = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.set_materialize_grads(False)

    def gradients(ctx, dy, _, d_acts):
        tensors = ctx.saved_tensors
        dy = torch.zeros_like(tensors[0]) if dy is None else dy.contiguous()
        d_acts = None if d_acts is None else d_acts.contiguous()
        found = experts_backward(ctx.backend, dy, d_acts, *tensors, ctx.activation)
        return None, *found, *[None] * 5

    tensors = "x weights w_in w_out order ends"
    experts = operator("experts", forward, f"backend {tensors} activation save keep", 3, fake)
    experts_backward = operator(
        "experts_backward", backward, f"backend dy d_acts {tensors} h activation", 4,
        lambda backend, dy, d_acts, *inputs: tuple(map(torch.empty_like, inputs[:4])))
    experts.register_autograd(gradients, setup_context=setup)
    return experts


def make_masked(masks, masks_backward, linear):
    """
    The masked FFN between its two matrix products, which `linear` computes.

    masks(backend, h, z, w_z, n_keep, activation) -> u = act(h) * mean_k topn(w_z z_k) (T, F), and
    what `kept` needs: value (T, K), cut (T, K). masks_backward(backend, du, h, z, w_z, value, cut,
    activation) -> u again, dh, dz, dw_z. The operator gives y (T, D), h (T, W) if save, else
    (0, W), value, cut.
    """
    def forward(backend, x, z, w_in, w_out, w_z, n_keep, activation, save):
        h = linear(x, w_in)
        u, value, cut = masks(backend, h, z, w_z, n_keep, activation)
        return linear(u, w_out), h if save else h.new_empty(0, h.shape[1]), value, cut

    def backward(backend, dy, x, z, w_in, w_out, w_z, h, value, cut, activation):
        du = linear(dy, w_out.T)
        u, dh, dz, dw_z = masks_backward(backend, du, h, z, w_z, value, cut, activation)
        return linear(dh, w_in.T), dz, dh.T @ x, dy.T @ u, dw_z

    def fake(backend, x, z, w_in, w_out, w_z, n_keep, activation, save):
        h = x.new_empty(x.shape[0] if save else 0, w_in.shape[0])
        value = z.new_empty(z.shape[:2], dtype=torch.promote_types(z.dtype, torch.float32))
        return torch.empty_like(x), h, value, value.to(torch.int32)

    def setup(ctx, inputs, output):
        ctx.backend, *tensors, _, ctx.activation, _ = inputs
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.set_materialize_grads(False)

    def gradients(ctx, dy, *_):
        found = masked_backward(ctx.backend, dy.contiguous(), *ctx.saved_tensors, ctx.activation)
        return None, *found, None, None, None

    tensors = "x z w_in w_out w_z"
    masked = operator("masked", forward, f"backend {tensors} n_keep activation save", 4, fake)
    masked_backward = operator(
        "masked_backward", backward, f"backend dy {tensors} h value cut activation", 5,
        lambda backend, dy, *inputs: tuple(map(torch.empty_like, inputs[:5])))
    masked.register_autograd(gradients, setup_context=setup)
    return masked


def make_thresholds(step):
    """step(backend, scores, n_keep): scores (R, F) -> value (R,) in their dtype, cut (R,) int32."""
    def fake(backend, scores, n_keep):
        rows = scores.shape[0]
        return scores.new_empty(rows), scores.new_empty(rows, dtype=torch.int32)

    return operator("thresholds", step, "backend scores n_keep", 2, fake)


def make_decode(step, transposed):
    """
    The masked FFN of a few tokens, without gradients. step(backend, x, scores (T, K, F), w_in,
    w_out^T (F, D), n_keep, activation) -> a tuple of y (T, D). The operator is for torch.compile
    alone: eager code calls the function, because at one token an operator's overhead is felt.
    """
    def decode(backend, x, z, w_in, w_out, w_z, n_keep, activation):
        with torch.autocast(x.device.type, enabled=False):
            inputs = x, F.linear(z, w_z), w_in, transposed(w_out)
            return step(backend, *inputs, n_keep, activation)[0]

    made = operator("decode", decode, "backend x z w_in w_out w_z n_keep activation", 1,
                    lambda backend, x, *_: torch.empty_like(x))
    return lambda *arguments: (made if torch.compiler.is_compiling() else decode)(*arguments)
