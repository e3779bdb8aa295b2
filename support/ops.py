"""
The expert FFNs as operators of torch, and the small functions that all their implementations share.

An operator (torch.library) is one node to autograd and torch.compile, whatever runs inside. Each is
made by a function that takes the steps to run, so this file knows no implementation: kernels.py
passes its dispatcher. A step is a function step(backend, *arguments) -> tuple of tensors.

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
# 2. The operators. Autocast is off inside: CUDA's would turn a sum into float32, another dtype than
# the fake results announce to torch.compile.


def run(step, backend, arguments, dtypes):
    """A step without autocast; the dtypes of its results are asserted."""
    with torch.autocast(arguments[0].device.type, enabled=False):
        results = step(backend, *arguments)
    found = [a.dtype for a in results]
    assert found == dtypes, f"results are {found}, expected {dtypes}"
    return results


def make_experts(forward, backward):
    """
    forward(backend, x, weights, order, ends, w_in, w_out, activation, save, keep) -> y (T, D);
    pre-activations h (N, W) in expert order if save, else (0, W); activations (N, F) in token order
    if keep, else (0, F). backward(backend, dy, d_acts or None, x, weights, order, ends, w_in,
    w_out, h, activation) -> gradients of x, weights, w_in, w_out.
    """

    @custom_op("nanoexperts::experts", mutates_args=())
    def experts(
        x: Tensor, weights: Tensor, order: Tensor, ends: Tensor, w_in: Tensor, w_out: Tensor,
        activation: str, backend: str, save: bool, keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        arguments = x, weights, order, ends, w_in, w_out, activation, save, keep
        return run(forward, backend, arguments, [x.dtype] * 3)

    @custom_op("nanoexperts::experts_backward", mutates_args=())
    def experts_backward(
        dy: Tensor, d_acts: Tensor | None, x: Tensor, weights: Tensor, order: Tensor, ends: Tensor,
        w_in: Tensor, w_out: Tensor, h: Tensor, activation: str, backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        arguments = dy, d_acts, x, weights, order, ends, w_in, w_out, h, activation
        dtypes = [a.dtype for a in (x, weights, w_in, w_out)]
        return run(backward, backend, arguments, dtypes)

    @experts.register_fake
    def _(x, weights, order, ends, w_in, w_out, activation, backend, save, keep):
        n = order.numel()
        h = x.new_empty(n if save else 0, w_in.shape[1])
        return torch.empty_like(x), h, x.new_empty(n if keep else 0, w_out.shape[2])

    @experts_backward.register_fake
    def _(dy, d_acts, x, weights, order, ends, w_in, w_out, h, activation, backend):
        return tuple(torch.empty_like(a) for a in (x, weights, w_in, w_out))

    def setup(ctx, inputs, output):
        *tensors, ctx.activation, ctx.backend, _, _ = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.set_materialize_grads(False)

    def gradients(ctx, dy, _, d_acts):
        tensors = ctx.saved_tensors
        dy = torch.zeros_like(tensors[0]) if dy is None else dy.contiguous()
        d_acts = None if d_acts is None else d_acts.contiguous()
        found = experts_backward(dy, d_acts, *tensors, ctx.activation, ctx.backend)
        dx, d_weights, dw_in, dw_out = found
        return dx, d_weights, None, None, dw_in, dw_out, None, None, None, None

    experts.register_autograd(gradients, setup_context=setup)
    return experts


def make_masked(masks, masks_backward, linear):
    """
    The masked FFN between its two matrix products, which `linear` computes.

    masks(backend, h, z, w_z, n_keep, activation) -> u = act(h) * mean_k topn(w_z z_k) (T, F), and
    what `kept` needs: value (T, K), cut (T, K). masks_backward(backend, du, h, z, w_z, value, cut,
    activation) -> u again, dh, dz, dw_z.
    """

    def forward(backend, x, z, w_in, w_out, w_z, n_keep, activation, save):
        h = linear(x, w_in)
        u, value, cut = masks(backend, h, z, w_z, n_keep, activation)
        return linear(u, w_out), h if save else h.new_empty(0, h.shape[1]), value, cut

    def backward(backend, dy, x, z, w_in, w_out, w_z, h, value, cut, activation):
        du = linear(dy, w_out.T)
        u, dh, dz, dw_z = masks_backward(backend, du, h, z, w_z, value, cut, activation)
        return linear(dh, w_in.T), dz, dh.T @ x, dy.T @ u, dw_z

    @custom_op("nanoexperts::masked", mutates_args=())
    def masked(
        x: Tensor, z: Tensor, w_in: Tensor, w_out: Tensor, w_z: Tensor,
        n_keep: int, activation: str, backend: str, save: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> y (T, D), pre-activations h (T, W) if save, else (0, W), value (T, K), cut (T, K)."""
        arguments = x, z, w_in, w_out, w_z, n_keep, activation, save
        value_dtype = torch.promote_types(z.dtype, torch.float32)
        return run(forward, backend, arguments, [x.dtype, x.dtype, value_dtype, torch.int32])

    @custom_op("nanoexperts::masked_backward", mutates_args=())
    def masked_backward(
        dy: Tensor, x: Tensor, z: Tensor, w_in: Tensor, w_out: Tensor, w_z: Tensor, h: Tensor,
        value: Tensor, cut: Tensor, activation: str, backend: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        arguments = dy, x, z, w_in, w_out, w_z, h, value, cut, activation
        return run(backward, backend, arguments, [a.dtype for a in (x, z, w_in, w_out, w_z)])

    @masked.register_fake
    def _(x, z, w_in, w_out, w_z, n_keep, activation, backend, save):
        h = x.new_empty(x.shape[0] if save else 0, w_in.shape[0])
        value = z.new_empty(z.shape[:2], dtype=torch.promote_types(z.dtype, torch.float32))
        return torch.empty_like(x), h, value, value.to(torch.int32)

    @masked_backward.register_fake
    def _(dy, x, z, w_in, w_out, w_z, h, value, cut, activation, backend):
        return tuple(torch.empty_like(a) for a in (x, z, w_in, w_out, w_z))

    def setup(ctx, inputs, output):
        *tensors, _, ctx.activation, ctx.backend, _ = inputs
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.set_materialize_grads(False)

    def gradients(ctx, dy, *_):
        found = masked_backward(dy.contiguous(), *ctx.saved_tensors, ctx.activation, ctx.backend)
        return *found, None, None, None, None

    masked.register_autograd(gradients, setup_context=setup)
    return masked


def make_thresholds(step):
    """step(backend, scores, n_keep): scores (R, F) -> value (R,) in their dtype, cut (R,) int32."""

    @custom_op("nanoexperts::thresholds", mutates_args=())
    def thresholds(scores: Tensor, n_keep: int, backend: str) -> tuple[Tensor, Tensor]:
        return run(step, backend, (scores, n_keep), [scores.dtype, torch.int32])

    @thresholds.register_fake
    def _(scores, n_keep, backend):
        rows = scores.shape[0]
        return scores.new_empty(rows), scores.new_empty(rows, dtype=torch.int32)

    return thresholds


def make_decode(step, transposed):
    """
    The masked FFN of a few tokens, without gradients. step(backend, x, scores (T, K, F), w_in,
    w_out^T (F, D), n_keep, activation) -> a tuple of y (T, D). The operator is for torch.compile
    alone: eager code calls the function, because at one token an operator's overhead is felt.
    """

    def decode(
        x: Tensor, z: Tensor, w_in: Tensor, w_out: Tensor, w_z: Tensor,
        n_keep: int, activation: str, backend: str,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(z, w_z)
            return step(backend, x, scores, w_in, transposed(w_out), n_keep, activation)[0]

    operator = custom_op("nanoexperts::decode", decode, mutates_args=())

    @operator.register_fake
    def _(x, z, w_in, w_out, w_z, n_keep, activation, backend):
        return torch.empty_like(x)

    def call(*arguments):
        return (operator if torch.compiler.is_compiling() else decode)(*arguments)

    return call
