"""
The expert FFNs, each as reference -> fast forward and backward -> torch.library op -> dispatcher. No routers, no losses.

    expert_ffn    y[t] = sum_k weights[t,k] * w_out[e] act(w_in[e] x[t]),  e = ids[t,k]          discrete experts
    masked_ffn    y[t] = w_out ( act(w_in x[t]) * 1/K sum_k topn(w_z z[t,k]) )                   continuous experts
    topn_mask     the n largest entries of a row keep their raw value, the others are 0

Letters: T tokens, D model width, F hidden width of an expert, E experts, K choices (or samples) a token, N = T*K rows;
W is the number of rows of w_in per expert: F for gelu, 2F = [gate; up] for swiglu.

Backends: `loop`, the oracle; `grouped`, torch only: grouped_mm, or one expert after the other (`at_once`); `triton`,
the kernels of triton_kernels.py. `auto` picks by device alone, and compares a kernel's first result at every shape with
torch's: one that disagrees is not used. `python kernels.py` compares every kernel with its float64 reference.
"""

import functools
import os
import warnings
from statistics import NormalDist

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op
from torch.utils.weak import WeakTensorKeyDictionary

import triton_kernels

# Large CPU tensors in huge pages, where the system lets programs ask for them: a fresh 200 MB gradient costs 800 page faults
# instead of 49,000 (results/log.md). torch reads this when it allocates its first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)  # decoding uses one product of it

BACKENDS = ("auto", "loop", "grouped", "triton")


def activate(h, activation):
    """h (..., F) for gelu (tanh form, GPT-2's) or (..., 2F) = [gate; up] for swiglu -> (..., F)."""
    if activation == "gelu":
        return F.gelu(h, approximate="tanh")
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def activate_backward(h, grad, activation):
    """activate(h) again, and the gradient of h from the gradient of activate(h)."""
    if activation == "gelu":
        return F.gelu(h, approximate="tanh"), torch.ops.aten.gelu_backward(grad, h, approximate="tanh")
    gate, up = h.chunk(2, dim=-1)
    s = F.silu(gate)
    return s * up, torch.cat([torch.ops.aten.silu_backward(grad * up, gate), grad * s], dim=-1)


def fused(f):
    """f through torch.compile for large CPU inputs; plain f, said once, where that fails (no C++ compiler)."""
    compiled = None

    @functools.wraps(f)
    def call(first, *others):
        nonlocal compiled
        if first.device.type != "cpu" or first.numel() < 2**20 or compiled is f:
            return f(first, *others)
        compiled = compiled or torch.compile(f, dynamic=True)
        try:
            return compiled(first, *others)
        except Exception as error:  # a missing or broken compiler: nothing has run yet
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            warnings.warn(f"torch.compile cannot build {f.__name__} ({type(error).__name__}): slower on this CPU", stacklevel=2)
            compiled = f
            return f(first, *others)
    return call


@functools.cache
def onednn_beats_mkl():
    """In fp32: on AMD by up to 2 (171 rows, two threads). On Intel MKL is ahead, by 1.05 to 1.7 (results/log.md)."""
    try:
        with open("/proc/cpuinfo") as f:
            return torch.backends.mkldnn.is_available() and "AuthenticAMD" in f.read()
    except OSError:
        return False


def linear(a, w, out=None):
    """a @ w.T without autograd, through the faster library; in `out`, where it takes one."""
    if a.device.type != "cpu" or a.dtype != torch.float32 or not onednn_beats_mkl():
        return torch.mm(a, w.T, out=out)
    return torch.ops.mkldnn._linear_pointwise(a, w, None, "none", [], "")


def padded(n):
    """n rounded up: oneDNN compiles a kernel for each shape (4 ms), in bf16 on every CPU, so let there be few."""
    step = 16 if n <= 512 else 64
    return -(-n // step) * step


def buffers(like, ends, *widths):
    """
    Uninitialised (rows, width) tensors in which the experts take turns; rows is a power of two that the longest run fits.
    Sizes that change with every step's routing would fragment the heap, and each new piece of it has to be zeroed by
    the system: a training step of eight such layers took 2.6 s instead of 1.4 s (results/log.md).
    """
    longest = int(ends.diff(prepend=ends.new_zeros(1)).max())
    return [like.new_empty(max(64, 1 << (longest - 1).bit_length()), width) for width in widths]


# ----------------------------------------------------------------------------------------------------------------------
# 1. Grouped expert FFN in torch: the oracle, grouped_mm, and one expert after the other


def expert_ffn_loop(x, weights, ids, w_in, w_out, activation, keep_activations=False):
    """The oracle: for every expert, the tokens that chose it. Obvious, differentiable, slow."""
    y = x.new_zeros(x.shape)
    acts = x.new_zeros(*ids.shape, w_out.shape[2]) if keep_activations else None
    for e, (w_in_e, w_out_e) in enumerate(zip(w_in.unbind(0), w_out.unbind(0))):
        token, choice = (ids == e).nonzero(as_tuple=True)
        act = activate(x[token] @ w_in_e.T, activation)
        y = y.index_add(0, token, (act @ w_out_e.T) * weights[token, choice, None].to(x.dtype))
        if keep_activations:
            acts = acts.index_put((token, choice), act)
    return y, acts


def sort_by_expert(ids, n_experts):
    """ids (T, K) -> order (N,): the assignments t*K + k, sorted by expert; ends (E,) int32: where each expert's run ends."""
    small = ids.reshape(-1).to(torch.int16 if n_experts < 2**15 else torch.int32)  # fewer bits, fewer radix passes
    sorted_ids, order = small.sort(stable=True)
    experts = torch.arange(n_experts, device=ids.device, dtype=small.dtype)
    return order, torch.searchsorted(sorted_ids, experts, right=True).to(torch.int32)


def undo_order(rows, order):
    """rows (N, ...) in expert order -> (N, ...) in token order, row t*K + k."""
    return torch.empty_like(rows).index_copy_(0, order, rows)


def runs(order, ends, weights):
    """For every expert: its number, its slice of the sorted rows, their tokens (n,) and gates (n, 1). n may be 0."""
    begin = 0
    for e, end in enumerate(ends.tolist()):
        slots = order[begin:end]
        yield e, slice(begin, end), slots // weights.shape[1], weights.reshape(-1)[slots, None]
        begin = end


def at_once(x, w_in, w_out, order):
    """
    Whether one grouped_mm per weight serves all experts: in bf16 on a GPU, and on a CPU while an expert has at most 2^16
    pre-activations (256 KB in fp32). Larger experts go one after the other, so that rows and weights stay in the cache:
    1.3 times as fast for F=1024, but 2 to 4 times as slow for F=128 and 32 (results/log.md). grouped_mm's rules: no
    float64, rows of a multiple of 16 bytes.
    """
    if x.dtype == torch.float64 or any(width * x.element_size() % 16 for width in w_out.shape[1:]):
        return False
    return x.dtype == torch.bfloat16 if x.is_cuda else order.numel() * w_in.shape[1] <= 2**16 * w_in.shape[0]


@fused
def activate_into(h, out, activation):
    out.copy_(activate(h, activation))


@fused
def activate_backward_into(h, g, gate, d_act, gated_act, dh, activation):
    """g (n, F), the gradient before the gate -> gate * act and dh, in place; the gradient of the gate (n,)."""
    act, d_h = activate_backward(h, g * gate if d_act is None else d_act + g * gate, activation)
    gated_act.copy_(act * gate)
    dh.copy_(d_h)
    return (g * act).sum(-1)


def experts_forward(x, weights, order, ends, w_in, w_out, activation, save, keep):
    """-> y (T, D); pre-activations h (N, W) in expert order, or (0, W); activations (N, F) in token order, or (0, F)."""
    if at_once(x, w_in, w_out, order):
        token, gate = order // weights.shape[1], weights.reshape(-1)[order, None]
        h = F.grouped_mm(x.index_select(0, token), w_in.transpose(1, 2), offs=ends)  # (N, W)
        act = activate(h, activation)
        y = F.grouped_mm(act, w_out.transpose(1, 2), offs=ends) * gate.to(x.dtype)  # (N, D)
        y = undo_order(y, order).view(*weights.shape, x.shape[1]).sum(1)  # in a fixed order, unlike index_add_ on a GPU
        return y, h if save else h.new_empty(0, h.shape[1]), undo_order(act, order) if keep else act.new_empty(0, act.shape[1])
    n, y, (d, f), wide = order.numel(), torch.zeros_like(x), w_out.shape[1:], w_in.shape[1]
    h, acts = x.new_empty(n if save else 0, wide), x.new_empty(n if keep else 0, f)
    x_e, h_e, act, y_e = buffers(x, ends, d, wide, f, d)
    for e, rows, token, gate in runs(order, ends, weights):
        m, r = len(token), padded(len(token))
        torch.index_select(x, 0, token, out=x_e[:m])
        before = linear(x_e[:r], w_in[e], h_e[:r])[:m]
        activate_into(before, act[:m], activation)
        y.index_add_(0, token, linear(act[:r], w_out[e], y_e[:r])[:m].mul_(gate))
        if save:
            h[rows] = before
        if keep:
            acts[order[rows]] = act[:m]
    return y, h, acts


def experts_backward(dy, d_acts, x, weights, order, ends, w_in, w_out, h, activation):
    """-> gradients of x, weights, w_in, w_out. A product over no rows writes zeros: idle experts need no care."""
    dx, d_gate = torch.zeros_like(x), weights.new_empty(order.numel())
    if at_once(x, w_in, w_out, order):
        token, gate = order // weights.shape[1], weights.reshape(-1)[order, None].to(x.dtype)
        x_e, dy_e = x.index_select(0, token), dy.index_select(0, token)  # (N, D)
        g = F.grouped_mm(dy_e, w_out, offs=ends)  # (N, F), before the gate
        d_act = g * gate if d_acts is None else g * gate + d_acts.index_select(0, order)
        act, dh = activate_backward(h, d_act, activation)
        d_gate[order] = torch.linalg.vecdot(g, act).to(d_gate.dtype)
        dw_out = F.grouped_mm(dy_e.mul_(gate).T, act, offs=ends)
        dw_in = F.grouped_mm(dh.T, x_e, offs=ends)
        if x.is_cuda:  # some GPUs leave the result of an empty group unwritten (pytorch issue 172439)
            idle = (ends.diff(prepend=ends.new_zeros(1)) == 0)[:, None, None]
            dw_in.masked_fill_(idle, 0), dw_out.masked_fill_(idle, 0)
        dx = undo_order(F.grouped_mm(dh, w_in, offs=ends), order).view(*weights.shape, x.shape[1]).sum(1)
        return dx, d_gate.view_as(weights), dw_in, dw_out
    dw_in, dw_out, (d, f), wide = torch.empty_like(w_in), torch.empty_like(w_out), w_out.shape[1:], w_in.shape[1]
    x_e, dx_e, dy_e, g, d_act, act, dh = buffers(x, ends, d, d, d, f, 0 if d_acts is None else f, f, wide)
    for e, rows, token, gate in runs(order, ends, weights):
        m, r, slots = len(token), padded(len(token)), order[rows]
        torch.index_select(x, 0, token, out=x_e[:m])
        torch.index_select(dy, 0, token, out=dy_e[:m])
        if d_acts is not None:
            torch.index_select(d_acts, 0, slots, out=d_act[:m])
        before_gate = linear(dy_e[:r], w_out[e].T, g[:r])[:m]
        gate_grad = activate_backward_into(h[rows], before_gate, gate.to(g.dtype), None if d_acts is None else d_act[:m],
                                           act[:m], dh[:m], activation)
        d_gate[slots] = gate_grad.to(d_gate.dtype)
        for rows_of in (x_e, dy_e, act, dh):
            rows_of[m:r] = 0  # the padding is summed over
        torch.mm(dy_e[:r].T, act[:r], out=dw_out[e])
        torch.mm(dh[:r].T, x_e[:r], out=dw_in[e])
        dx.index_add_(0, token, linear(dh[:r], w_in[e].T, dx_e[:r])[:m])
    return dx, d_gate.view_as(weights), dw_in, dw_out


# ----------------------------------------------------------------------------------------------------------------------
# 2. Choosing a backend, and the op: autograd and torch.compile see one node


def choose_backend(x):
    """What `auto` means for x, by device and dtype alone, never by timing: (backend, reason)."""
    if not x.is_cuda:
        return "grouped", "no GPU: the matrix products are torch's"
    if not triton_kernels.triton or torch.cuda.get_device_capability(x.device) < (8, 0):
        return "grouped", "no Triton, or a GPU older than sm_80"
    return ("grouped", "the kernels do not speak float64") if x.dtype == torch.float64 else ("triton", "fused kernels")


_agrees = {}  # (step, device, dtype, shapes) -> whether the kernel's first result was torch's


def run(step, backend, *arguments):
    """
    A step by name: the kernel's version for "triton", else torch's. "auto" takes the kernel where there is a GPU and
    its first result at this shape agrees with torch's; a later call costs a dictionary look-up.
    """
    kernel, reference = getattr(triton_kernels, step), globals()[step]
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    x = tensors[0]
    if backend == "triton":
        return kernel(*arguments)
    if backend != "auto" or choose_backend(x)[0] != "triton":
        return reference(*arguments)
    key = (step, x.device, x.dtype, *(tuple(a.shape[1:]) for a in tensors))
    if key not in _agrees:
        error = max(map(distance, kernel(*arguments), reference(*arguments)))
        _agrees[key] = error < (0.03 if x.element_size() == 2 else 3e-3)
        if not _agrees[key]:
            warnings.warn(f"the kernel for {step} is off by {error:.1e} in {x.dtype} on {x.device}: not used", stacklevel=2)
    return (kernel if _agrees[key] else reference)(*arguments)


def distance(a, b):
    """|a - b| / |b|, summed in float64 (without copies in it: a pool's gradient fills gigabytes); a NaN is infinitely far."""
    a, b = (v if v.is_floating_point() else v.double() for v in (a, b))
    norm = lambda v: torch.linalg.vector_norm(v, dtype=torch.float64)
    return (norm(a - b) / norm(b).clamp_min(1e-30)).nan_to_num(float("inf")).item()


@custom_op("nanoexperts::experts", mutates_args=())
def experts_op(x: Tensor, weights: Tensor, order: Tensor, ends: Tensor, w_in: Tensor, w_out: Tensor, activation: str,
               backend: str, save: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-> y (T, D); pre-activations (N, W) if save, else (0, W); activations (N, F) if keep, else (0, F)."""
    return run("experts_forward", backend, x, weights, order, ends, w_in, w_out, activation, save, keep)


@custom_op("nanoexperts::experts_backward", mutates_args=())
def experts_backward_op(dy: Tensor, d_acts: Tensor | None, x: Tensor, weights: Tensor, order: Tensor, ends: Tensor, w_in: Tensor,
                        w_out: Tensor, h: Tensor, activation: str, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return run("experts_backward", backend, dy, d_acts, x, weights, order, ends, w_in, w_out, h, activation)


@experts_op.register_fake
def _(x, weights, order, ends, w_in, w_out, activation, backend, save, keep):
    n = order.numel()
    return torch.empty_like(x), x.new_empty(n if save else 0, w_in.shape[1]), x.new_empty(n if keep else 0, w_out.shape[2])


@experts_backward_op.register_fake
def _(dy, d_acts, x, weights, order, ends, w_in, w_out, h, activation, backend):
    return tuple(torch.empty_like(a) for a in (x, weights, w_in, w_out))


def _experts_setup(ctx, inputs, output):
    *tensors, ctx.activation, ctx.backend, _, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _experts_autograd(ctx, dy, _, d_acts):
    dy = torch.zeros_like(ctx.saved_tensors[0]) if dy is None else dy.contiguous()
    d_acts = None if d_acts is None else d_acts.contiguous()
    dx, d_weights, dw_in, dw_out = experts_backward_op(dy, d_acts, *ctx.saved_tensors, ctx.activation, ctx.backend)
    return dx, d_weights, None, None, dw_in, dw_out, None, None, None, None


experts_op.register_autograd(_experts_autograd, setup_context=_experts_setup)


def expert_ffn(x, weights, ids, w_in, w_out, activation, backend="auto", keep_activations=False):
    """
    The mixture of experts after routing: y[t] = sum_k weights[t,k] * w_out[e] @ act(w_in[e] @ x[t]), e = ids[t,k].

    x (T, D); weights (T, K) gates; ids (T, K) int64, an expert at most once per token; w_in (E, F, D) for "gelu",
    (E, 2F, D) = [gate; up] rows for "swiglu"; w_out (E, D, F). Returns y (T, D) and, if keep_activations, the hidden
    activations before gate and w_out (T, K, F), else None. Differentiable in x, weights, w_in, w_out; an expert that no
    token chose gets gradients of exact zeros. Under autocast it computes in autocast's dtype. Raises ValueError where
    shapes, dtypes, strides or the backend do not fit.
    """
    t, (e, d, f), wide = x.shape[0], w_out.shape, 2 if activation == "swiglu" else 1
    check(activation, backend, x, (t, d), w_out=(w_out, (e, d, f)), w_in=(w_in, (e, wide * f, d)))
    if ids.dim() != 2 or ids.shape != weights.shape or ids.shape[0] != t:
        raise ValueError(f"ids {tuple(ids.shape)}, weights {tuple(weights.shape)}: expected ({t}, K) both, T = {t} as in x")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w_in, w_out = x.to(dtype), w_in.to(dtype), w_out.to(dtype)
    if backend == "loop":
        return expert_ffn_loop(x, weights, ids, w_in, w_out, activation, keep_activations)
    order, ends = sort_by_expert(ids, e)
    save = torch.is_grad_enabled() and any(a.requires_grad for a in (x, weights, w_in, w_out))
    y, _, acts = experts_op(x.contiguous(), weights.contiguous(), order, ends, w_in, w_out, activation, backend, save,
                            keep_activations)
    return y, acts.view(*ids.shape, f) if keep_activations else None


def check(activation, backend, x, shape, **parameters):
    """ValueError unless x and every (tensor, shape) of parameters fit together, and the backend can work on them."""
    if activation not in ("gelu", "swiglu"):
        raise ValueError(f"activation {activation!r}: expected gelu or swiglu")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    if tuple(x.shape) != shape:
        raise ValueError(f"x {tuple(x.shape)}: expected {shape}, by w_out")
    for name, (w, expected) in parameters.items():
        if tuple(w.shape) != expected:
            raise ValueError(f"{name} {tuple(w.shape)}: expected {expected} for {activation}, by the other weights")
        if w.device != x.device or (w.dtype != x.dtype and name != "w_z" and not torch.is_autocast_enabled(x.device.type)):
            raise ValueError(f"{name} is {w.dtype} on {w.device}, x {x.dtype} on {x.device}: expected the same (or autocast)")
        if w.dim() == 3 and not w.is_contiguous():
            raise ValueError(f"{name} has strides {w.stride()}: expected contiguous stacked weights")
    if backend == "triton" and not triton_kernels.triton:
        raise ValueError('backend "triton": Triton is not installed (pip install triton); backend "grouped" needs none')
    if backend == "triton" and not (x.is_cuda or triton_kernels.INTERPRETED):
        raise ValueError(f'backend "triton": x is on {x.device}, not on a GPU; use backend "auto"')
    if backend == "triton" and x.dtype == torch.float64:
        raise ValueError('backend "triton": the kernels do not speak float64; use backend "loop"')


# ----------------------------------------------------------------------------------------------------------------------
# 3. Masks: exactly the n largest of a row. A row's choice fits in two numbers: a value and, among entries equal to it, the
# last column kept. The backward pass recomputes scores from z and needs no more than these: no mask is ever stored.


def kept(scores, value, cut):
    """scores (..., F), value (...), cut (...) -> bool (..., F): above the value, or equal to it and not beyond the cut."""
    value, column = value.unsqueeze(-1), torch.arange(scores.shape[-1], device=scores.device)
    return (scores > value) | ((scores == value) & (column <= cut.unsqueeze(-1)))


def thresholds_reference(scores, n_keep):
    """scores (R, F) -> value (R,), cut (R,) int32: what `kept` needs to keep the n_keep largest, ties to the lowest column."""
    value = scores.kthvalue(scores.shape[-1] - n_keep + 1, dim=-1, keepdim=True).values
    cut = torch.full(scores.shape[:-1], scores.shape[-1], dtype=torch.int32, device=scores.device)
    if scores.device.type != "cpu" or (scores >= value).sum() > n_keep * len(scores):  # on a CPU: are there ties at all?
        tie = scores == value
        wanted = n_keep - (scores > value).sum(-1, keepdim=True)  # so many of them are kept
        last = (tie & (tie.cumsum(-1, dtype=torch.int32) == wanted)).to(torch.uint8).argmax(-1).to(torch.int32)
        cut = torch.where(tie.sum(-1) > wanted.squeeze(-1), last, cut)
    return value.squeeze(-1), cut


@fused
def close_in(scores, n_keep, quantile, steps=12):
    """
    scores (R, F) fp32 -> the highest level tried that n_keep entries or more reach (R,), and how many reach it (R,).

    n_low >= n_keep entries are at least `low`, n_high < n_keep at least `high`. The first level is a Gaussian's quantile;
    then regula falsi on the counts, by the Illinois rule: an end that stays twice counts half, so that neither end stalls.
    """
    low, high, mean = scores.amin(-1), scores.amax(-1), scores.mean(-1)
    level = mean + (scores.square().mean(-1) - mean.square()).clamp_min(0).sqrt() * quantile
    n_low, n_high = torch.full_like(low, scores.shape[-1]), torch.zeros_like(low)
    above, below, last = torch.ones_like(low), torch.ones_like(low), torch.zeros_like(low)  # weights of the ends; +-1: who moved
    for _ in range(steps):
        level = torch.minimum(torch.maximum(level, low), high)
        n = torch.where(scores >= level.unsqueeze(-1), 1.0, 0.0).sum(-1)
        enough, settled = n >= n_keep, n_low == n_keep
        above = torch.where(enough, torch.where(last > 0, above / 2, above), 1.0)
        below = torch.where(enough, 1.0, torch.where(last < 0, below / 2, below))
        last = torch.where(enough, 1.0, -1.0)
        low, n_low = torch.where(enough & ~settled, level, low), torch.where(enough & ~settled, n, n_low)
        high, n_high = torch.where(enough | settled, high, level), torch.where(enough | settled, n_high, n)
        a, b = (n_keep - n_high - 0.5) * above, (n_low - n_keep + 0.5) * below
        level = high - (high - low) * (a / (a + b)).clamp(0.001, 0.999)
    return low, n_low


def thresholds(scores, n_keep):
    """thresholds_reference in fewer looks at the scores (R, F); the few rows that stay open (ties among them) go to it."""
    width = scores.shape[-1]
    if scores.device.type != "cpu" or scores.dtype != torch.float32 or scores.numel() < 2**20:
        return thresholds_reference(scores, n_keep)
    if n_keep == width:  # no quantile: all are kept
        return scores.amin(-1), torch.full(scores.shape[:1], width, dtype=torch.int32)
    value, n = close_in(scores, n_keep, NormalDist().inv_cdf(1 - n_keep / width))
    cut = torch.full_like(value, width, dtype=torch.int32)
    still_open = (n != n_keep).nonzero().squeeze(-1)
    value[still_open], cut[still_open] = thresholds_reference(scores[still_open], n_keep)
    return value, cut


@custom_op("nanoexperts::thresholds", mutates_args=())
def thresholds_op(scores: Tensor, n_keep: int, backend: str) -> tuple[Tensor, Tensor]:
    """scores (R, F) -> value (R,) in their dtype, cut (R,) int32."""
    return run("thresholds", backend, scores, n_keep)


@thresholds_op.register_fake
def _(scores, n_keep, backend):
    return scores.new_empty(scores.shape[0]), scores.new_empty(scores.shape[0], dtype=torch.int32)


def topn_mask(scores, n_keep, backend="auto"):
    """
    Keep the n_keep largest entries of the last dim at their raw value, 0 elsewhere: exactly n_keep, ties to the lowest
    index. scores (..., F) -> the same shape. The gradient passes through the kept entries; the choice itself has none.
    """
    if not 1 <= n_keep <= scores.shape[-1]:
        raise ValueError(f"n_keep {n_keep}: expected 1 to {scores.shape[-1]}, the last dimension of scores")
    rows = scores.reshape(-1, scores.shape[-1])
    value, cut = thresholds_op(rows.detach().contiguous(), n_keep, backend)
    return torch.where(kept(rows, value, cut), rows, 0).view(scores.shape)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Masked FFN: the oracle, the masked activation and its backward, the op


def masked_ffn_loop(x, z, w_in, w_out, w_z, n_keep, activation):
    """The oracle: K whole FFNs with masks from a stable sort, as the paper writes it."""
    y = 0
    for scores in F.linear(z, w_z).unbind(1):  # (T, F) each
        best = scores.argsort(dim=-1, descending=True, stable=True)[:, :n_keep]
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)
        y = y + F.linear(activate(F.linear(x, w_in), activation) * torch.where(mask, scores, 0), w_out)
    return y / z.shape[1]


@fused
def mask_and_activate(scores, h, value, cut, out, activation):
    """scores (T, K, F), h (T, W) -> act(h) * mean_k mask (T, F), into out."""
    out.copy_(activate(h, activation) * torch.where(kept(scores, value, cut), scores, 0).mean(1))


@fused
def mask_backward(scores, h, value, cut, du, dh, activation):
    """du (T, F) -> the forward's u, in its place; dh (T, W); and d scores (T, K, F), in the place of scores."""
    keep = kept(scores, value, cut)
    mask = torch.where(keep, scores, 0).mean(1)
    act, d_h = activate_backward(h, (du * mask).to(h.dtype), activation)
    dh.copy_(d_h)
    scores.copy_(torch.where(keep, (du * act / scores.shape[1]).unsqueeze(1), 0))
    du.copy_(act * mask)


def token_chunks(n_tokens, numbers_per_token):
    """Slices of about equal size, some two million numbers each: they fit a CPU's cache."""
    size = max(1, -(-n_tokens // max(1, -(-n_tokens * numbers_per_token // 2**21))))
    return [slice(i, i + size) for i in range(0, n_tokens, size)]


def masks(h, z, w_z, n_keep, activation):
    """u = act(h) * mean_k topn(w_z z_k) (T, F), and the masks' value (T, K), fp32 at least, and cut (T, K) int32."""
    (t, k), f = z.shape[:2], w_z.shape[0]
    u, cut = h.new_empty(t, f), z.new_empty(t, k, dtype=torch.int32)
    value = z.new_empty(t, k, dtype=torch.promote_types(z.dtype, torch.float32))
    for rows in token_chunks(t, k * f):
        scores = F.linear(z[rows], w_z)  # (chunk, K, F)
        chunk_value, chunk_cut = thresholds(scores.view(-1, f), n_keep)
        value[rows], cut[rows] = chunk_value.view(-1, k), chunk_cut.view(-1, k)
        mask_and_activate(scores, h[rows], value[rows], cut[rows], u[rows], activation)
    return u, value, cut


def masks_backward(du, h, z, w_z, value, cut, activation):
    """du (T, F) -> u again (T, F), dh (T, W), dz (T, K, dz), dw_z (F, dz)."""
    u, dh, dz, dw_z = du.clone(), torch.empty_like(h), torch.empty_like(z), torch.zeros_like(w_z)
    for rows in token_chunks(z.shape[0], z.shape[1] * w_z.shape[0]):
        scores = F.linear(z[rows], w_z)  # (chunk, K, F)
        mask_backward(scores, h[rows], value[rows], cut[rows], u[rows], dh[rows], activation)
        dz[rows] = scores @ w_z
        dw_z.addmm_(scores.flatten(0, 1).T, z[rows].flatten(0, 1))
    return u, dh, dz, dw_z


@custom_op("nanoexperts::masked", mutates_args=())
def masked_op(x: Tensor, z: Tensor, w_in: Tensor, w_out: Tensor, w_z: Tensor, n_keep: int, activation: str, backend: str,
              save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> y (T, D), pre-activations h (T, W) if save, else (0, W), value (T, K), cut (T, K)."""
    with torch.autocast(x.device.type, enabled=False):
        h = linear(x, w_in)
        u, value, cut = run("masks", backend, h, z, w_z, n_keep, activation)
        return linear(u, w_out), h if save else h.new_empty(0, h.shape[1]), value, cut


@custom_op("nanoexperts::masked_backward", mutates_args=())
def masked_backward_op(dy: Tensor, x: Tensor, z: Tensor, w_in: Tensor, w_out: Tensor, w_z: Tensor, h: Tensor, value: Tensor,
                       cut: Tensor, activation: str, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        u, dh, dz, dw_z = run("masks_backward", backend, linear(dy, w_out.T), h, z, w_z, value, cut, activation)
        return linear(dh, w_in.T), dz, dh.T @ x, dy.T @ u, dw_z


@masked_op.register_fake
def _(x, z, w_in, w_out, w_z, n_keep, activation, backend, save):
    value = z.new_empty(z.shape[:2], dtype=torch.promote_types(z.dtype, torch.float32))
    return torch.empty_like(x), x.new_empty(x.shape[0] if save else 0, w_in.shape[0]), value, value.to(torch.int32)


@masked_backward_op.register_fake
def _(dy, x, z, w_in, w_out, w_z, h, value, cut, activation, backend):
    return tuple(torch.empty_like(a) for a in (x, z, w_in, w_out, w_z))


def _masked_setup(ctx, inputs, output):
    *tensors, _, ctx.activation, ctx.backend, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _masked_autograd(ctx, dy, *_):
    return *masked_backward_op(dy.contiguous(), *ctx.saved_tensors, ctx.activation, ctx.backend), None, None, None, None


masked_op.register_autograd(_masked_autograd, setup_context=_masked_setup)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Decoding: few tokens, so time is reading weights. Only the rows of w_in and columns of w_out that a mask keeps are read.

_transposed = WeakTensorKeyDictionary()


def transposed(w):
    """w (D, F) -> w.T contiguous, so that a column is one read. Kept while w lives and nobody writes to it."""
    if w.T.is_contiguous() or w.is_inference():
        return w.T.contiguous()
    state = (w._version, w.data_ptr())
    if w not in _transposed or _transposed[w][0] != state:
        _transposed[w] = state, w.T.contiguous()
    return _transposed[w][1]


def decode(x, scores, w_in, w_out_t, n_keep, activation):
    """x (T, D), scores (T, K, F), w_in (W, D), w_out_t (F, D) -> y (T, D), in a tuple like every step's results."""
    t, k, f = scores.shape
    value, cut = thresholds(scores.view(t * k, f), n_keep)
    mask = torch.where(kept(scores, value.view(t, k), cut.view(t, k)), scores, 0).mean(1)  # (T, F)
    if x.device.type != "cpu" or w_in.dtype not in (torch.float32, torch.float64):  # no sampled products there
        return (activate(x @ w_in.to(x.dtype).T, activation) * mask.to(x.dtype) @ w_out_t.to(x.dtype),)
    active, rows = mask.to(w_in.dtype).to_sparse_csr(), x.to(w_in.dtype)
    column, m = active.col_indices(), active.values()  # (active,)
    if t == 1:  # the products give a row to a thread: deal the one row's neurons out to as many rows as there are threads
        parts = torch.get_num_threads()
        active = torch.sparse_csr_tensor(torch.arange(parts + 1) * len(m) // parts, column, m, (parts, f), check_invariants=False)
        rows = rows.expand(parts, -1).contiguous()
    h = [torch.sparse.sampled_addmm(active, rows, w.T, beta=0).values() for w in w_in.split(f)]  # gate, up or h: (active,)
    u = activate(torch.cat(h), activation) * m
    y = F.embedding_bag(column, w_out_t, active.crow_indices()[:-1], mode="sum", per_sample_weights=u)
    return ((y if t > 1 else y.sum(0, keepdim=True)).to(x.dtype),)


def decode_few(x: Tensor, z: Tensor, w_in: Tensor, w_out: Tensor, w_z: Tensor, n_keep: int, activation: str,
               backend: str) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return run("decode", backend, x, F.linear(z, w_z), w_in, transposed(w_out), n_keep, activation)[0]


decode_op = custom_op("nanoexperts::decode", decode_few, mutates_args=())  # for torch.compile; eager code skips its overhead


@decode_op.register_fake
def _(x, z, w_in, w_out, w_z, n_keep, activation, backend):
    return torch.empty_like(x)


def masked_ffn(x, z, w_in, w_out, w_z, n_keep, activation, backend="auto"):
    """
    Infinity-MoE's layer with the sum over samples moved inside W_2, exact because the masks act after the activation:
    y = w_out @ ( act(w_in x) * (1/K) sum_k topn_mask(w_z z_k, n_keep) )          (arXiv 2601.17680; papers.md section 2)

    x (T, D); z (T, K, dz); w_in (F, D) for "gelu", (2F, D) = [gate; up] rows for "swiglu"; w_out (D, F); w_z (F, dz);
    n_keep: so many entries of each mask keep their raw value; None keeps all. Returns y (T, D). Differentiable in all
    five tensors. Without gradients, a few tokens (T <= 8) read only the active rows and columns of the weights. Under
    autocast it computes in autocast's dtype (scores stay fp32 on a CPU). Raises ValueError where arguments do not fit.
    """
    (t, k, dz), (f, _), d, wide = z.shape, w_z.shape, w_out.shape[0], 2 if activation == "swiglu" else 1
    check(activation, backend, x, (t, d), w_in=(w_in, (wide * f, d)), w_out=(w_out, (d, f)), w_z=(w_z, (f, dz)))
    if n_keep is not None and not 1 <= n_keep <= f:
        raise ValueError(f"n_keep {n_keep}: expected 1 to {f} (rows of w_z), or None for no selection")
    x, dtype = x.contiguous(), torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    score_dtype = dtype if x.is_cuda or n_keep is None else torch.promote_types(dtype, torch.float32)
    x, z, w_z = x.to(dtype), z.to(score_dtype).contiguous(), w_z.to(score_dtype)
    save = torch.is_grad_enabled() and any(a.requires_grad for a in (x, z, w_in, w_out, w_z))
    if n_keep and not save and backend != "loop" and 1 <= t <= 8 and (1 - n_keep / f) ** (k if x.is_cuda else t * k) > 0.4:
        few = decode_op if torch.compiler.is_compiling() else decode_few
        return few(x, z, w_in, w_out, w_z, n_keep, activation, backend)
    w_in, w_out = w_in.to(dtype), w_out.to(dtype)
    if n_keep is None:  # then the mask is linear in z
        return F.linear(activate(F.linear(x, w_in), activation) * F.linear(z.mean(1), w_z), w_out)
    if backend == "loop":
        return masked_ffn_loop(x, z, w_in, w_out, w_z, n_keep, activation)
    return masked_op(x, z, w_in, w_out, w_z, n_keep, activation, backend, save)[0]


# ----------------------------------------------------------------------------------------------------------------------
# 6. python kernels.py: every step against its oracle in float64, outputs and gradients, on this machine


def check_cases(dtype, device):
    """(name, shape, function of inputs and backend, inputs), inputs rounded to dtype."""
    g = torch.Generator().manual_seed(0)
    normal = lambda *shape: (torch.randn(*shape, generator=g) / shape[-1] ** 0.5).to(device, dtype)
    eighths = lambda *shape: (torch.randint(-8, 9, shape, generator=g) / 8).to(device, dtype)  # scores exact in 8 bits; ties
    for t, d, f, e, k, activation in ((257, 96, 160, 5, 2, "swiglu"), (70, 64, 72, 3, 3, "gelu"), (1, 64, 64, 8, 1, "swiglu")):
        ids = torch.rand(t, e, generator=g).argsort(1)[:, :k].to(device)
        inputs = normal(t, d), normal(t, k), normal(e, f * (1 + (activation == "swiglu")), d), normal(e, d, f)
        yield ("expert_ffn " + activation, f"T={t} D={d} F={f} E={e} K={k}", lambda x, w, i, o, b, ids=ids, a=activation:
               expert_ffn(x, w, ids, i, o, a, b)[0], inputs)
    masked_shapes = (65, 64, 200, 2, 50, "gelu"), (9, 96, 1000, 1, 999, "swiglu"), (3, 64, 512, 1, 128, "swiglu")
    for t, d, f, k, n, activation in masked_shapes:
        inputs = normal(t, d), eighths(t, k, 4), normal(f * (1 + (activation == "swiglu")), d), normal(d, f), eighths(f, 4)
        f_masked = lambda *a, n=n, activation=activation: masked_ffn(*a[:5], n, activation, a[5])
        yield "masked_ffn " + activation, f"T={t} D={d} F={f} K={k} n={n}", f_masked, inputs
        if t <= 8:
            yield "decode " + activation, f"T={t} D={d} F={f} K={k} n={n}", torch.no_grad()(f_masked), inputs


def worst_distance(function, inputs, dtype, backend):
    """The largest distance of outputs and gradients from the oracle's."""
    results = []
    for kind, b in ((dtype, backend), (torch.float64, "loop")):
        leaves = [a.to(kind).requires_grad_() for a in inputs]
        y = function(*leaves, b)
        results.append([y])
        if y.requires_grad:
            dy = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=kind).view_as(y)
            results[-1] += torch.autograd.grad(y, leaves, dy)
    return max(map(distance, *results))


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "triton" if triton_kernels.INTERPRETED else choose_backend(torch.empty(0, device=device))[0]
    print(f"backend {backend} on {torch.cuda.get_device_name() if device == 'cuda' else 'CPU'}, against the float64 oracle")
    print(f"{'what':20} {'shape':32} {'dtype':9} {'max error':>9} {'tolerance':>9}")
    failed = 0
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)):
        if triton_kernels.INTERPRETED and dtype == torch.bfloat16:
            continue  # the interpreter's bfloat16 arithmetic is wrong
        for name, shape, function, inputs in check_cases(dtype, device):
            error = worst_distance(function, inputs, dtype, backend)
            failed += not error <= tolerance
            verdict = "ok" if error <= tolerance else "DISAGREES"
            print(f"{name:20} {shape:32} {str(dtype)[6:]:9} {error:9.1e} {tolerance:9.0e}  {verdict}", flush=True)
    raise SystemExit(f"{failed} disagree" if failed else 0)


if __name__ == "__main__":
    main()
