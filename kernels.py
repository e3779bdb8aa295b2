"""
The expert FFNs, each as reference -> Triton kernel -> torch.library op -> dispatcher. No routers, losses or models here.

    expert_ffn    y[t] = sum_k weights[t,k] * w_out[e] act(w_in[e] x[t]),  e = ids[t,k]          discrete experts
    masked_ffn    y[t] = w_out ( act(w_in x[t]) * 1/K sum_k topn(w_z z[t,k]) )                   continuous experts
    topn_mask     the n largest entries of a row keep their raw value, the others are 0

Letters: T tokens, D model width, F hidden width of an expert, E experts, K choices (or samples) a token, N = T*K rows.

Backends: `loop`, the oracle; `grouped`, torch only: grouped_mm on a GPU, one expert after the other on a CPU; `triton`,
the kernels below. `auto` picks by device and shape. `python kernels.py` compares every kernel with its reference on
this machine; `auto` does the same once, on a small case, before it first trusts a kernel.
"""

import functools
import os
import warnings

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton, no kernels; everything else works
    triton, tl = None, type("tl", (), {"constexpr": None})

BACKENDS = ("auto", "loop", "grouped", "triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run as numpy, on CPU tensors, to be tested without a GPU


def jit(f):
    return triton.jit(f) if triton else f


def tuned(half, single, key):
    """Autotune over (BLOCK_N, BLOCK_K, warps, stages), lists for 2- and 4-byte inputs; picks are kept on disk."""
    if not triton:
        return lambda f: f
    shapes = [(32, 32, 4, 1)] if INTERPRETED else half + single
    configs = [triton.Config({"BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}, num_warps=w, num_stages=s) for n, k, w, s in shapes]

    def for_this_dtype(configs, arguments, **_):  # a row of a 2-byte tile has 64 entries, of a 4-byte tile 32: 128 bytes
        size = next(iter(arguments.values())).element_size()
        return configs if INTERPRETED else [c for c in configs if c.kwargs["BLOCK_K"] * size == 128]
    return triton.autotune(configs, key, prune_configs_by={"early_config_prune": for_this_dtype}, cache_results=True)


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
    s, dh = F.silu(gate), torch.empty_like(h)
    d_gate, d_up = dh.chunk(2, dim=-1)
    torch.mul(grad, s, out=d_up)
    torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=d_gate)
    return s.mul_(up), dh


# ----------------------------------------------------------------------------------------------------------------------
# 1. Grouped expert FFN: the oracle, and torch only


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
    """ids (T, K) -> order (N,): the assignments t*K+k, sorted by expert; ends (E,) int32: where each expert's run ends."""
    small = ids.reshape(-1).to(torch.int16 if n_experts < 2**15 else torch.int32)  # fewer bits, fewer radix passes
    sorted_ids, order = small.sort(stable=True)
    experts = torch.arange(n_experts, device=ids.device, dtype=small.dtype)
    return order, torch.searchsorted(sorted_ids, experts, right=True).to(torch.int32)


def undo_order(rows, order):
    """rows (N, ...) in expert order -> (N, ...) in token order."""
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return rows.index_select(0, inverse)


def expert_ffn_grouped_mm(x, weights, ids, w_in, w_out, activation, keep_activations=False):
    """One grouped matrix product per weight. Rows must be multiples of 16 bytes: grouped_mm's rule."""
    order, ends = sort_by_expert(ids, w_in.shape[0])
    h = F.grouped_mm(x.index_select(0, order // ids.shape[1]), w_in.transpose(1, 2), offs=ends)  # (N, F or 2F)
    act = activate(h, activation)
    out = undo_order(F.grouped_mm(act, w_out.transpose(1, 2), offs=ends), order).view(*ids.shape, -1)  # (T, K, D)
    y = (out * weights.to(out.dtype).unsqueeze(-1)).sum(1)
    return y, undo_order(act, order).view(*ids.shape, -1) if keep_activations else None


def runs(order, ends, weights):
    """For every expert: its number, its slice of the sorted rows, their tokens (n,) and gates (n, 1). n may be 0."""
    begin = 0
    for e, end in enumerate(ends.tolist()):
        slots = order[begin:end]
        yield e, slice(begin, end), slots // weights.shape[1], weights.reshape(-1)[slots, None]
        begin = end


def cpu_forward(x, weights, order, ends, w_in, w_out, activation, keep):
    """One expert after the other, so that its rows and weights stay in the cache."""
    h, y = x.new_empty(order.numel(), w_in.shape[1]), torch.zeros_like(x)
    acts = x.new_empty(order.numel() if keep else 0, w_out.shape[2])
    for e, rows, token, gate in runs(order, ends, weights):
        torch.mm(x[token], w_in[e].T, out=h[rows])
        act = activate(h[rows], activation)
        y.index_add_(0, token, torch.mm(act, w_out[e].T).mul_(gate))
        if keep:
            acts[rows] = act
    return y, h, acts


def cpu_backward(dy, d_acts, x, weights, order, ends, w_in, w_out, h, activation):
    dx, d_gate = torch.zeros_like(x), weights.new_empty(order.numel())
    dw_in, dw_out = torch.empty_like(w_in), torch.empty_like(w_out)  # a product over no rows writes zeros
    for e, rows, token, gate in runs(order, ends, weights):
        dy_e, x_e = dy[token], x[token]
        g = dy_e @ w_out[e]  # (n, F), before the gate
        grad = g * gate.to(g.dtype)
        if d_acts is not None:
            grad += d_acts[rows]
        act, dh = activate_backward(h[rows], grad, activation)
        d_gate[order[rows]] = torch.linalg.vecdot(g, act).to(d_gate.dtype)
        torch.mm(dy_e.mul_(gate).T, act, out=dw_out[e])
        torch.mm(dh.T, x_e, out=dw_in[e])
        dx.index_add_(0, token, dh @ w_in[e])
    return dx, d_gate.view_as(weights), dw_in, dw_out


# ----------------------------------------------------------------------------------------------------------------------
# 2. Grouped expert FFN in Triton
#
# Assignments are sorted by expert, so every expert owns a run of rows. A run is cut into tiles of BLOCK_M rows; a table,
# computed on the device, says for each tile whose it is and where it starts. Four kernels, no atomics:
#   up             h = w_in[e] x[token],  act(h)            gather and activation fused into the GEMM
#   down           out[slot] = gate * (w_out[e] act)        gate and scatter fused; also dx[slot] = w_in[e]^T dh
#   act_backward   d act = w_out[e]^T dy[token] -> dh, gate * act (recomputed), gate's gradient
#   weight_grad    dw[e] = sum over e's rows of grad^T a    zeros for an expert without rows


@jit
def tile_of_program(n_tiles, n_blocks, GROUP: tl.constexpr):
    """Program id -> (row tile, column block). GROUP row tiles share their column blocks, so weights are met in L2."""
    pid = tl.program_id(0)
    return tl.swizzle2d(pid // n_blocks, pid % n_blocks, n_tiles, n_blocks, GROUP)


@jit
def load_tile(pointers, rows_ok, cols_ok, EVEN: tl.constexpr):
    """A tile, zero where the shape ends. EVEN: it never ends inside a tile, so no mask."""
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=rows_ok & cols_ok, other=0.0)


@jit
def activate_tile(h, up, SWIGLU: tl.constexpr):
    """fp32 tiles: silu(h) * up, or the tanh form of gelu(h), with tanh(u) = 2 sigmoid(2u) - 1."""
    if SWIGLU:
        return h * tl.sigmoid(h) * up
    return h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))


@jit
def activate_backward_tile(h, up, grad, SWIGLU: tl.constexpr):
    """The activation again, and the gradients of h and up, from the gradient of the activation."""
    if SWIGLU:
        s = tl.sigmoid(h)
        return h * s * up, grad * up * s * (1 + h * (1 - s)), grad * h * s
    s = tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    slope = s + h * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * h * h)
    return h * s, grad * slope, grad


@tuned([(128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 8, 4)], [(64, 32, 8, 3)], key=["D", "F", "BLOCK_M"])
@jit
def up_kernel(
    x, w_in, h_out, act_out,                                       # (T, D), (E, F or 2F, D), (N, F or 2F), (N, F)
    token, tile_expert, tile_row, ends, n_tiles,                   # row -> token; tile -> expert, first row; (E,) ends
    D: tl.constexpr, F: tl.constexpr, SWIGLU: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):
    """One program: BLOCK_M rows of one expert x BLOCK_N of its neurons."""
    # 1. Which tile, which expert, which rows? Tiles beyond the last carry expert -1.
    tile, block = tile_of_program(n_tiles, tl.cdiv(F, BLOCK_N), GROUP)
    expert = tl.load(tile_expert + tile).to(tl.int64)
    if expert < 0:
        return
    row = tl.load(tile_row + tile) + tl.arange(0, BLOCK_M)  # (BLOCK_M,) positions in expert order
    row_ok = row < tl.load(ends + expert)
    source = tl.load(token + row, mask=row_ok, other=0).to(tl.int64)  # the gather: rows of x
    # 2. Pointers to the first (BLOCK_M, BLOCK_K) tile of x and the first (BLOCK_K, BLOCK_N) tile of w_in[expert]^T.
    k = tl.arange(0, BLOCK_K)
    col = block * BLOCK_N + tl.arange(0, BLOCK_N)
    width: tl.constexpr = 2 * F if SWIGLU else F
    even: tl.constexpr = D % BLOCK_K == 0 and F % BLOCK_N == 0
    a_ptr = x + source[:, None] * D + k[None, :]
    b_ptr = w_in + expert * width * D + col[None, :] * D + k[:, None]
    # 3. Walk along D, accumulate in fp32. swiglu has two products that share x: gate rows, and up rows F further on.
    h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        k_ok = k < D - start
        a = load_tile(a_ptr, row_ok[:, None], k_ok[None, :], D % BLOCK_K == 0)
        b = load_tile(b_ptr, k_ok[:, None], col[None, :] < F, even)
        h = tl.dot(a, b, h, input_precision=PRECISION)
        if SWIGLU:
            b_up = load_tile(b_ptr + F * D, k_ok[:, None], col[None, :] < F, even)
            up = tl.dot(a, b_up, up, input_precision=PRECISION)
        a_ptr += BLOCK_K
        b_ptr += BLOCK_K
    # 4. Activation and stores. The pre-activations are kept for the backward pass only.
    ok = row_ok[:, None] & (col[None, :] < F)
    row = row.to(tl.int64)[:, None]
    tl.store(act_out + row * F + col[None, :], activate_tile(h, up, SWIGLU).to(act_out.dtype.element_ty), mask=ok)
    if SAVE:
        tl.store(h_out + row * width + col[None, :], h.to(h_out.dtype.element_ty), mask=ok)
        if SWIGLU:
            tl.store(h_out + row * width + F + col[None, :], up.to(h_out.dtype.element_ty), mask=ok)


@tuned([(256, 64, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3)], [(64, 32, 8, 3)], key=["IN", "OUT", "BLOCK_M"])
@jit
def down_kernel(
    a, w, out, gate,                                               # (N, IN), one matrix per expert, (N, OUT), (N,)
    slot, tile_expert, tile_row, ends, n_tiles,                    # row -> place in (T, K) order; the tile table
    IN: tl.constexpr, OUT: tl.constexpr, STRIDE_IN: tl.constexpr, STRIDE_OUT: tl.constexpr, GATED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):
    """out[slot[n]] = gate[slot[n]] * sum_i a[n, i] w[e, i, :], w addressed by its strides, so either way round."""
    tile, block = tile_of_program(n_tiles, tl.cdiv(OUT, BLOCK_N), GROUP)
    expert = tl.load(tile_expert + tile).to(tl.int64)
    if expert < 0:
        return
    row = tl.load(tile_row + tile) + tl.arange(0, BLOCK_M)
    row_ok = row < tl.load(ends + expert)
    source = tl.where(row_ok, row, 0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    col = block * BLOCK_N + tl.arange(0, BLOCK_N)
    a_ptr = a + source[:, None] * IN + k[None, :]
    b_ptr = w + expert * IN * OUT + col[None, :] * STRIDE_OUT + k[:, None] * STRIDE_IN
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, IN, BLOCK_K):
        k_ok = k < IN - start
        a_tile = load_tile(a_ptr, row_ok[:, None], k_ok[None, :], IN % BLOCK_K == 0)
        b_tile = load_tile(b_ptr, k_ok[:, None], col[None, :] < OUT, IN % BLOCK_K == 0 and OUT % BLOCK_N == 0)
        acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
        a_ptr += BLOCK_K
        b_ptr += BLOCK_K * STRIDE_IN
    target = tl.load(slot + row, mask=row_ok, other=0).to(tl.int64)  # the scatter: every slot is written exactly once
    if GATED:
        acc *= tl.load(gate + target, mask=row_ok, other=0.0).to(tl.float32)[:, None]
    ok = row_ok[:, None] & (col[None, :] < OUT)
    tl.store(out + target[:, None] * OUT + col[None, :], acc.to(out.dtype.element_ty), mask=ok)


@tuned([(128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)], [(64, 32, 8, 3)], key=["D", "F", "BLOCK_M"])
@jit
def act_backward_kernel(
    dy, w_out, h_in, dh, gated_act, dgate, gate, dact,             # (T, D), (E, D, F), (N, .), (N, .), (N, F), (blocks, N)
    token, slot, tile_expert, tile_row, ends, n_tiles, n_rows,
    D: tl.constexpr, F: tl.constexpr, SWIGLU: tl.constexpr, HAS_DACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):
    """With g = w_out[e]^T dy[token]: dgate = <g, act>, dh = act'(h) (gate * g + dact), and gate * act for w_out's gradient."""
    tile, block = tile_of_program(n_tiles, tl.cdiv(F, BLOCK_N), GROUP)
    expert = tl.load(tile_expert + tile).to(tl.int64)
    if expert < 0:
        return
    row = tl.load(tile_row + tile) + tl.arange(0, BLOCK_M)
    row_ok = row < tl.load(ends + expert)
    source = tl.load(token + row, mask=row_ok, other=0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    col = block * BLOCK_N + tl.arange(0, BLOCK_N)
    a_ptr = dy + source[:, None] * D + k[None, :]
    b_ptr = w_out + expert * D * F + k[:, None] * F + col[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        k_ok = k < D - start
        a = load_tile(a_ptr, row_ok[:, None], k_ok[None, :], D % BLOCK_K == 0)
        b = load_tile(b_ptr, k_ok[:, None], col[None, :] < F, D % BLOCK_K == 0 and F % BLOCK_N == 0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_ptr += BLOCK_K
        b_ptr += BLOCK_K * F
    width: tl.constexpr = 2 * F if SWIGLU else F
    ok = row_ok[:, None] & (col[None, :] < F)
    wide = row.to(tl.int64)[:, None] * width + col[None, :]
    narrow = row.to(tl.int64)[:, None] * F + col[None, :]
    h = tl.load(h_in + wide, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(h_in + wide + F, mask=ok, other=0.0).to(tl.float32) if SWIGLU else h
    g = tl.load(gate + tl.load(slot + row, mask=row_ok, other=0), mask=row_ok, other=0.0).to(tl.float32)[:, None]
    grad = acc * g
    if HAS_DACT:
        grad += tl.load(dact + narrow, mask=ok, other=0.0).to(tl.float32)
    act, d_h, d_up = activate_backward_tile(h, up, grad, SWIGLU)
    tl.store(dgate + block * n_rows + row, tl.sum(acc * act, 1), mask=row_ok)  # summed over blocks afterwards
    tl.store(gated_act + narrow, (act * g).to(gated_act.dtype.element_ty), mask=ok)
    tl.store(dh + wide, d_h.to(dh.dtype.element_ty), mask=ok)
    if SWIGLU:
        tl.store(dh + wide + F, d_up.to(dh.dtype.element_ty), mask=ok)


@tuned([(256, 64, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3)], [(64, 32, 8, 3)], key=["OUT", "IN"])
@jit
def weight_grad_kernel(
    grad, a, dw, token, ends,                                      # (., OUT), (., IN), (E, OUT, IN), (N,), (E,)
    OUT: tl.constexpr, IN: tl.constexpr, GATHER_GRAD: tl.constexpr, GATHER_A: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):
    """dw[e] = sum over the rows n of expert e of grad[n]^T a[n]; either side may be gathered by token."""
    expert = tl.program_id(1)
    o_block, i_block = tile_of_program(tl.cdiv(OUT, BLOCK_M), tl.cdiv(IN, BLOCK_N), GROUP)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    o = o_block * BLOCK_M + tl.arange(0, BLOCK_M)
    i = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        row_ok = row < end
        gathered = tl.load(token + row, mask=row_ok, other=0).to(tl.int64)
        g_row = gathered if GATHER_GRAD else row.to(tl.int64)
        a_row = gathered if GATHER_A else row.to(tl.int64)
        g = tl.load(grad + g_row[None, :] * OUT + o[:, None], mask=row_ok[None, :] & (o[:, None] < OUT), other=0.0)
        b = tl.load(a + a_row[:, None] * IN + i[None, :], mask=row_ok[:, None] & (i[None, :] < IN), other=0.0)
        acc = tl.dot(g, b, acc, input_precision=PRECISION)
    target = dw + expert.to(tl.int64) * OUT * IN + o[:, None] * IN + i[None, :]
    tl.store(target, acc.to(dw.dtype.element_ty), mask=(o[:, None] < OUT) & (i[None, :] < IN))


def precision():
    """fp32 products in full, unless the user asked torch for less."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


class Tiles:
    """Which rows each program works on: (tiles,) expert and first row, on the device. Expert -1: nothing to do."""

    def __init__(self, order, ends, top_k, itemsize):
        n_experts, n_rows = ends.numel(), order.numel()
        largest = 128 if itemsize == 2 else 64
        self.block_m = 32 if INTERPRETED else min(largest, max(16, triton.next_power_of_2(n_rows // n_experts)))
        self.n_tiles = triton.cdiv(n_rows, self.block_m) + min(n_experts, n_rows)  # every run may leave one tile unfilled
        counts = ends.diff(prepend=ends.new_zeros(1))
        tiles = (counts + self.block_m - 1) // self.block_m  # (E,)
        tile_ends = tiles.cumsum(0)
        tile = torch.arange(self.n_tiles, device=ends.device)
        expert = torch.searchsorted(tile_ends, tile, right=True)
        e = expert.clamp(max=n_experts - 1)
        first = (ends - counts)[e] + (tile - (tile_ends - tiles)[e]) * self.block_m
        self.table = (torch.where(expert < n_experts, expert, -1).to(torch.int32), first.to(torch.int32), ends, self.n_tiles)
        self.slot, self.token = order.to(torch.int32), (order // top_k).to(torch.int32)

    def grid(self, width):
        return lambda meta: (self.n_tiles * triton.cdiv(width, meta["BLOCK_N"]),)


def triton_forward(x, weights, order, ends, w_in, w_out, activation, save):
    (n, k), d, f, swiglu = (order.numel(), weights.shape[1]), x.shape[1], w_out.shape[2], activation == "swiglu"
    tiles = Tiles(order, ends, k, x.element_size())
    act, h = x.new_empty(n, f), x.new_empty(n if save else 0, w_in.shape[1])
    up_kernel[tiles.grid(f)](x, w_in, h, act, tiles.token, *tiles.table, D=d, F=f, SWIGLU=swiglu, SAVE=save,
                             PRECISION=precision(), BLOCK_M=tiles.block_m)
    out = x.new_empty(n, d)
    down_kernel[tiles.grid(d)](act, w_out, out, weights, tiles.slot, *tiles.table, IN=f, OUT=d, STRIDE_IN=1, STRIDE_OUT=f,
                               GATED=True, PRECISION=precision(), BLOCK_M=tiles.block_m)
    return sum_choices(out, k), h, act


def triton_backward(dy, d_acts, x, weights, order, ends, w_in, w_out, h, activation):
    (n, k), d, f, swiglu = (order.numel(), weights.shape[1]), x.shape[1], w_out.shape[2], activation == "swiglu"
    tiles, common = Tiles(order, ends, k, x.element_size()), {"PRECISION": precision()}
    common["BLOCK_M"] = tiles.block_m
    dh, gated_act, dw_out, dw_in = torch.empty_like(h), x.new_empty(n, f), torch.empty_like(w_out), torch.empty_like(w_in)
    d_gate = x.new_zeros(triton.cdiv(f, 32), n, dtype=torch.float32)  # one partial sum per column block
    act_backward_kernel[tiles.grid(f)](
        dy, w_out, h, dh, gated_act, d_gate, weights, dh if d_acts is None else d_acts, tiles.token, tiles.slot, *tiles.table, n,
        D=d, F=f, SWIGLU=swiglu, HAS_DACT=d_acts is not None, **common)
    weight_grad(dy, gated_act, dw_out, tiles.token, ends, gather_grad=True)
    del gated_act
    weight_grad(dh, x, dw_in, tiles.token, ends, gather_grad=False)
    dx = x.new_empty(n, d)
    down_kernel[tiles.grid(d)](dh, w_in, dx, weights, tiles.slot, *tiles.table, IN=h.shape[1], OUT=d, STRIDE_IN=d, STRIDE_OUT=1,
                               GATED=False, **common)
    d_weights = torch.empty_like(weights).view(-1).scatter_(0, order, d_gate.sum(0).to(weights.dtype)).view_as(weights)
    return sum_choices(dx, k), d_weights, dw_in, dw_out


def weight_grad(grad, a, dw, token, ends, gather_grad):
    n_experts, width_out, width_in = dw.shape
    block_m = 32 if INTERPRETED else 128 if dw.element_size() == 2 else 64
    grid = lambda meta: (triton.cdiv(width_out, block_m) * triton.cdiv(width_in, meta["BLOCK_N"]), n_experts)
    weight_grad_kernel[grid](grad, a, dw, token, ends, OUT=width_out, IN=width_in, GATHER_GRAD=gather_grad,
                             GATHER_A=not gather_grad, PRECISION=precision(), BLOCK_M=block_m)


def sum_choices(out, top_k):
    """out (T*K, D), one row per choice -> (T, D). A sum in a fixed order, unlike atomic adds."""
    return out if top_k == 1 else out.view(-1, top_k, out.shape[1]).sum(1)


# ----------------------------------------------------------------------------------------------------------------------
# 3. The op, so that torch.compile and autograd see one node; and the dispatcher


@torch.library.custom_op("nanoexperts::experts", mutates_args=())
def experts_op(x: torch.Tensor, weights: torch.Tensor, order: torch.Tensor, ends: torch.Tensor, w_in: torch.Tensor,
               w_out: torch.Tensor, activation: str, backend: str, save: bool,
               keep: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> y (T, D); pre-activations h (N, F or 2F) if save; activations (N, F) if keep, both in expert order."""
    if use_triton(backend, x):
        y, h, acts = triton_forward(x, weights, order, ends, w_in, w_out, activation, save)
    else:
        y, h, acts = cpu_forward(x, weights, order, ends, w_in, w_out, activation, keep)
    return y, h, acts if keep else acts.new_empty(0)


@torch.library.custom_op("nanoexperts::experts_backward", mutates_args=())
def experts_backward_op(
    dy: torch.Tensor, d_acts: torch.Tensor | None, x: torch.Tensor, weights: torch.Tensor, order: torch.Tensor,
    ends: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, h: torch.Tensor, activation: str,
    backend: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    backward = triton_backward if use_triton(backend, x) else cpu_backward
    return backward(dy, d_acts, x, weights, order, ends, w_in, w_out, h, activation)


@experts_op.register_fake
def _(x, weights, order, ends, w_in, w_out, activation, backend, save, keep):
    n = order.numel()
    return torch.empty_like(x), x.new_empty(n if save else 0, w_in.shape[1]), x.new_empty((n, w_out.shape[2]) if keep else 0)


@experts_backward_op.register_fake
def _(dy, d_acts, x, weights, order, ends, w_in, w_out, h, activation, backend):
    return tuple(torch.empty_like(a) for a in (x, weights, w_in, w_out))


def _experts_setup(ctx, inputs, output):
    *tensors, ctx.activation, ctx.backend, _, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _experts_autograd(ctx, dy, _, d_acts):
    saved = ctx.saved_tensors  # once: a checkpointed block hands them out a single time
    dy = torch.zeros_like(saved[0]) if dy is None else dy.contiguous()
    d_acts = None if d_acts is None else d_acts.contiguous()
    dx, d_weights, dw_in, dw_out = experts_backward_op(dy, d_acts, *saved, ctx.activation, ctx.backend)
    return dx, d_weights, None, None, dw_in, dw_out, None, None, None, None


experts_op.register_autograd(_experts_autograd, setup_context=_experts_setup)


def choose_backend(x, w_in, w_out):
    """What `auto` means for these tensors, by device, dtype and shape alone: (backend, reason)."""
    if not x.is_cuda:
        return "grouped", "on a CPU: experts one after the other, each in the cache"
    if not triton or torch.cuda.get_device_capability(x.device) < (8, 0):
        return "grouped", "no Triton, or a GPU older than sm_80"
    if x.dtype == torch.float64:
        return "grouped", "float64, which the kernels do not speak"
    return "triton", "fused kernels"


def use_triton(backend, x):
    """Inside the ops: "auto" is Triton if the kernels agree with their references here, "triton" is Triton anyway."""
    return backend == "triton" or (backend == "auto" and choose_backend(x, x, x)[0] == "triton" and trusted(x.device, x.dtype))


def expert_ffn(x, weights, ids, w_in, w_out, activation, backend="auto", keep_activations=False):
    """
    The mixture of experts after routing: y[t] = sum_k weights[t,k] * w_out[e] @ act(w_in[e] @ x[t]), e = ids[t,k].

    x (T, D); weights (T, K) gates; ids (T, K) int64, an expert at most once per token; w_in (E, F, D) for "gelu",
    (E, 2F, D) = [gate; up] rows for "swiglu"; w_out (E, D, F). Returns y (T, D) and, if keep_activations, the hidden
    activations before gate and w_out (T, K, F), else None. Differentiable in x, weights, w_in, w_out; an expert that
    no token chose gets gradients of exact zeros. Under autocast it computes in autocast's dtype. Raises ValueError where
    shapes, dtypes or strides do not fit.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w_in, w_out = x.to(dtype), w_in.to(dtype), w_out.to(dtype)
    check_experts(x, weights, ids, w_in, w_out, activation, backend)
    if backend == "loop":
        return expert_ffn_loop(x, weights, ids, w_in, w_out, activation, keep_activations)
    if backend == "grouped" and x.is_cuda and fits_grouped_mm(w_in, w_out):
        return expert_ffn_grouped_mm(x, weights, ids, w_in, w_out, activation, keep_activations)
    order, ends = sort_by_expert(ids, w_in.shape[0])
    save = torch.is_grad_enabled() and any(a.requires_grad for a in (x, weights, w_in, w_out))
    y, _, acts = experts_op(x.contiguous(), weights.contiguous(), order, ends, w_in, w_out, activation, backend, save,
                            keep_activations)
    return y, undo_order(acts, order).view(*ids.shape, -1) if keep_activations else None


def fits_grouped_mm(w_in, w_out):
    return w_in.dtype == torch.bfloat16 and all(n % 8 == 0 for n in (*w_in.shape[1:], *w_out.shape[1:]))


def check_experts(x, weights, ids, w_in, w_out, activation, backend):
    if activation not in ("gelu", "swiglu"):
        raise ValueError(f"activation {activation!r}: expected gelu or swiglu")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    n_experts, d_model, hidden = w_out.shape
    rows = hidden * (2 if activation == "swiglu" else 1)
    if tuple(w_in.shape) != (n_experts, rows, d_model):
        raise ValueError(f"w_in {tuple(w_in.shape)}: expected {(n_experts, rows, d_model)} for {activation}, by w_out")
    if x.dim() != 2 or x.shape[1] != d_model:
        raise ValueError(f"x {tuple(x.shape)}: expected (T, {d_model})")
    if ids.dim() != 2 or ids.shape != weights.shape or ids.shape[0] != x.shape[0]:
        raise ValueError(f"ids {tuple(ids.shape)}, weights {tuple(weights.shape)}: expected ({x.shape[0]}, K) both")
    if not x.dtype == w_in.dtype == w_out.dtype:
        raise ValueError(f"x {x.dtype}, w_in {w_in.dtype}, w_out {w_out.dtype}: expected one dtype (or autocast)")
    if not (w_in.is_contiguous() and w_out.is_contiguous()):
        raise ValueError(f"w_in strides {w_in.stride()}, w_out strides {w_out.stride()}: expected contiguous weights")
    if backend == "triton":
        check_triton(x)


def check_triton(x):
    if not triton:
        raise ValueError('backend "triton": Triton is not installed (pip install triton); use backend="grouped"')
    if not x.is_cuda and not INTERPRETED:
        raise ValueError(f'backend "triton": x is on {x.device}, expected a GPU; use backend="auto"')
    if x.dtype == torch.float64:
        raise ValueError('backend "triton": float64 is not supported; use backend="loop"')


# ----------------------------------------------------------------------------------------------------------------------
# 4. Masks: exactly the n largest of a row. A row's choice fits in two numbers: a value and, among entries equal to it, the
# last column that is kept. The backward pass recomputes scores from z and needs no more than that: no mask is stored.


def kept(scores, value, cut):
    """scores (R, F), value (R,), cut (R,) -> bool (R, F): above the value, or equal and not beyond the cut."""
    value, column = value.unsqueeze(-1), torch.arange(scores.shape[-1], device=scores.device)
    return (scores > value) | ((scores == value) & (column <= cut.unsqueeze(-1)))


def thresholds_reference(scores, n_keep):
    """scores (R, F) -> value (R,), cut (R,) int32: what `kept` needs to keep the n_keep largest, ties to the lowest column."""
    value = scores.kthvalue(scores.shape[-1] - n_keep + 1, dim=-1, keepdim=True).values
    tie = scores == value
    wanted = n_keep - (scores > value).sum(-1, keepdim=True)  # so many of the ties are kept
    last = tie & (tie.cumsum(-1, dtype=torch.int32) == wanted)
    return value.squeeze(-1), last.to(torch.uint8).argmax(-1).to(torch.int32)


@jit
def row_threshold(s, column, n_keep, LAST: tl.constexpr, LOW: tl.constexpr):
    """
    s: one row in registers, fp32 -> the value and cut of its n_keep largest entries.

    An fp32 number's bits, read as an integer (negative numbers mirrored), are ordered like the number. So the n-th
    largest is found bit by bit from the top: set a bit, count the row, keep the bit if enough entries are as large.
    LOW bits at the end are empty in scores that were 16-bit numbers, and are skipped.
    """
    key = tl.where(s == 0, 0.0, s).to(tl.int32, bitcast=True)  # -0.0 is 0.0
    key = (key ^ ((key >> 31) & 0x7FFFFFFF)) >> LOW
    lowest: tl.constexpr = -(1 << (31 - LOW))
    level = tl.where(tl.sum((key >= 0).to(tl.int32)) >= n_keep, 0, lowest)
    for bit in range(31 - LOW):
        higher = level + (1 << (30 - LOW - bit))
        level = tl.where(tl.sum((key >= higher).to(tl.int32)) >= n_keep, higher, level)
    tie = key == level
    wanted = n_keep - tl.sum((key > level).to(tl.int32))
    cut = tl.full((), LAST, tl.int32)
    if tl.sum(tie.to(tl.int32)) > wanted:  # more entries share the value than may be kept: the first ones win
        cut = tl.max(tl.where(tie & (tl.cumsum(tie.to(tl.int32)) <= wanted), column, -1))
    return tl.max(tl.where(tie, s, float("-inf"))), cut


@jit
def mask_kernel(
    scores, h, out, value_out, cut_out, n_keep, K,                 # (T, K, F), (T, F or 2F), (T, F), (T, K), (T, K)
    F: tl.constexpr, ACTIVATION: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr,
):
    """out[t] = act(h[t]) * 1/K sum_k topn(scores[t, k]) in one pass over a row. ACTIVATION may
    also be "none", for the mask alone, or "thresholds", for the values and cuts alone."""
    t = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < F
    mask = tl.zeros((BLOCK,), tl.float32)
    for k in range(K):
        s = tl.load(scores + (t * K + k) * F + column, mask=inside, other=float("-inf")).to(tl.float32)
        value, cut = row_threshold(s, column, n_keep, F, LOW)
        mask += tl.where((s > value) | ((s == value) & (column <= cut) & inside), s, 0.0)
        tl.store(value_out + t * K + k, value)
        tl.store(cut_out + t * K + k, cut)
    mask /= K
    if ACTIVATION == "gelu" or ACTIVATION == "swiglu":
        width: tl.constexpr = 2 * F if ACTIVATION == "swiglu" else F
        gate = tl.load(h + t * width + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(h + t * width + F + column, mask=inside, other=0.0).to(tl.float32) if ACTIVATION == "swiglu" else gate
        mask *= activate_tile(gate, up, ACTIVATION == "swiglu")
    if ACTIVATION != "thresholds":
        tl.store(out + t * F + column, mask.to(out.dtype.element_ty), mask=inside)


@jit
def mask_backward_kernel(
    grad, h, scores, value, cut, dh, K,                            # (T, F), (T, .), (T, K, F) in and d scores out, (T, K)
    F: tl.constexpr, SWIGLU: tl.constexpr, BLOCK: tl.constexpr,
):
    """dh and, written over the scores, their gradient: grad * act(h) / K where an entry was kept."""
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    mask = tl.zeros((BLOCK,), tl.float32)
    for k in range(K):
        s = tl.load(scores + (t * K + k) * F + column, mask=inside, other=0.0).to(tl.float32)
        v, c = tl.load(value + t * K + k), tl.load(cut + t * K + k)
        mask += tl.where((s > v) | ((s == v) & (column <= c)), s, 0.0)
    width: tl.constexpr = 2 * F if SWIGLU else F
    gate = tl.load(h + t * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h + t * width + F + column, mask=inside, other=0.0).to(tl.float32) if SWIGLU else gate
    g = tl.load(grad + t * F + column, mask=inside, other=0.0).to(tl.float32) / K
    act, d_gate, d_up = activate_backward_tile(gate, up, g * mask, SWIGLU)
    tl.store(dh + t * width + column, d_gate.to(dh.dtype.element_ty), mask=inside)
    if SWIGLU:
        tl.store(dh + t * width + F + column, d_up.to(dh.dtype.element_ty), mask=inside)
    for k in range(K):
        place = scores + (t * K + k) * F + column
        s = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        v, c = tl.load(value + t * K + k), tl.load(cut + t * K + k)
        d = tl.where((s > v) | ((s == v) & (column <= c)), g * act, 0.0)
        tl.store(place, d.to(scores.dtype.element_ty), mask=inside)


@jit
def decode_kernel(
    x, mask, w_in, w_out_t, partial,                               # (T, D), (T, F), (F or 2F, D), (F, D), (T, blocks, D)
    D: tl.constexpr, F: tl.constexpr, SWIGLU: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """One token, BLOCK neurons: what they add to y. Rows of neurons that the mask leaves out are never read."""
    t, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    neuron = block * BLOCK + tl.arange(0, BLOCK)
    m = tl.load(mask + t * F + neuron, mask=neuron < F, other=0.0)
    d = tl.arange(0, BLOCK_D)
    inside = (m != 0)[:, None] & (d < D)[None, :]
    row = neuron[:, None] * D + d[None, :]
    x_row = tl.load(x + t * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    h = tl.sum(tl.load(w_in + row, mask=inside, other=0.0).to(tl.float32) * x_row, 1)  # (BLOCK,)
    up = tl.sum(tl.load(w_in + F * D + row, mask=inside, other=0.0).to(tl.float32) * x_row, 1) if SWIGLU else h
    u = activate_tile(h, up, SWIGLU) * m
    y = tl.sum(tl.load(w_out_t + row, mask=inside, other=0.0).to(tl.float32) * u[:, None], 0)  # (BLOCK_D,)
    tl.store(partial + (t * tl.num_programs(1) + block) * D + d, y, mask=d < D)


def launch_masks(scores, h, out, n_keep, activation):
    """scores (T, K, F), h (T, .) or None, out (T, F) or None -> value (T, K) fp32, cut (T, K) int32; fills out."""
    t, k, f = scores.shape
    value, cut = scores.new_empty(t, k, dtype=torch.float32), scores.new_empty(t, k, dtype=torch.int32)
    low = {torch.bfloat16: 16, torch.float16: 13}.get(scores.dtype, 0)
    block = triton.next_power_of_2(f)
    mask_kernel[(t,)](scores, value if h is None else h, value if out is None else out, value, cut, n_keep, k, F=f,
                      ACTIVATION=activation, LOW=low, BLOCK=block, num_warps=min(32, max(4, block // 1024)))
    return value, cut


def triton_mask_forward(h, z, w_z, n_keep, activation):
    scores, u = F.linear(z, w_z), h.new_empty(h.shape[0], w_z.shape[0])
    return u, *launch_masks(scores, h, u, n_keep, activation)


def triton_mask_backward(du, h, z, w_z, value, cut, activation):
    t, k, f = *z.shape[:2], w_z.shape[0]
    scores, dh = F.linear(z, w_z), torch.empty_like(h)  # (T, K, F)
    block = min(1024, triton.next_power_of_2(f))
    mask_backward_kernel[(t, triton.cdiv(f, block))](du, h, scores, value, cut, dh, k, F=f, SWIGLU=activation == "swiglu", BLOCK=block)
    d_scores = scores.view(t * k, f)
    return dh, (d_scores @ w_z).view_as(z), d_scores.T @ z.reshape(t * k, -1)


# On a CPU: the same steps, in chunks of tokens that fit the cache, each loop compiled by torch.compile when it pays.


def fused(f):
    """f through torch.compile for large inputs; plain f, said once, where that fails (no C++ compiler)."""
    state = {}

    @functools.wraps(f)
    def call(first, *others):
        if first.numel() < 2**20 or first.is_cuda or state.get("failed"):
            return f(first, *others)
        state.setdefault("compiled", torch.compile(f, dynamic=True))
        try:
            return state["compiled"](first, *others)
        except Exception as error:  # whatever a missing or broken compiler raises
            state["failed"] = True
            warnings.warn(f"torch.compile cannot build {f.__name__} ({type(error).__name__}): masks will be slower on this CPU", stacklevel=2)
            return f(first, *others)
    return call


@fused
def count_at_least(scores, level):
    return (scores >= level.unsqueeze(-1)).sum(-1, dtype=torch.int32)


@fused
def mask_and_activate(scores, h, value, cut, activation):
    return activate(h, activation) * torch.where(kept(scores, value, cut), scores, 0).mean(1).to(h.dtype)


@fused
def mask_backward(scores, du, h, value, cut, activation):
    """scores (T, K, F), du (T, F), h (T, .) -> dh (T, .), d scores (T, K, F)."""
    keep = kept(scores, value, cut)
    mask = torch.where(keep, scores, 0).mean(1).to(h.dtype)
    act, dh = activate_backward(h, du * mask, activation)
    return dh, torch.where(keep, (du * act / scores.shape[1]).unsqueeze(1).to(scores.dtype), 0)


def thresholds(scores, n_keep, steps=16):
    """
    thresholds_reference, with fewer looks at the scores (R, F): [low, high) always holds the level that n_keep entries
    reach. It shrinks by interpolating the counts, every third time by halving; few rows are left for the reference.
    """
    if scores.numel() < 2**20 or scores.is_cuda:
        return thresholds_reference(scores, n_keep)
    low, high = scores.aminmax(dim=-1)  # (R,)
    n_low, n_high = torch.full_like(low, scores.shape[-1]), torch.zeros_like(low)
    for step in range(steps):
        share = 0.5 if step % 3 == 2 else ((n_keep - n_high) / (n_low - n_high)).clamp(0.02, 0.98)
        level = high - (high - low) * share
        n = count_at_least(scores, level).to(level.dtype)
        enough = n >= n_keep
        low, n_low = torch.where(enough, level, low), torch.where(enough, n, n_low)
        high, n_high = torch.where(enough, high, level), torch.where(enough, n_high, n)
    cut = torch.full_like(low, scores.shape[-1], dtype=torch.int32)
    open_rows = (n_low != n_keep).nonzero().squeeze(-1)
    low[open_rows], cut[open_rows] = thresholds_reference(scores[open_rows], n_keep)
    return low, cut


def token_chunks(n_tokens, numbers_per_token):
    size = max(1, 2**21 // numbers_per_token)
    return [slice(i, i + size) for i in range(0, n_tokens, size)]


def at_least_fp32(a):
    return a.to(torch.promote_types(a.dtype, torch.float32))


def cpu_mask_forward(h, z, w_z, n_keep, activation):
    (t, k), f = z.shape[:2], w_z.shape[0]
    z, w_z = at_least_fp32(z), at_least_fp32(w_z)
    u, value, cut = h.new_empty(t, f), z.new_empty(t, k), z.new_empty(t, k, dtype=torch.int32)
    for rows in token_chunks(t, k * f):
        scores = F.linear(z[rows], w_z)  # (chunk, K, F)
        level, last = thresholds(scores.view(-1, f), n_keep)
        value[rows], cut[rows] = level.view(-1, k), last.view(-1, k)
        u[rows] = mask_and_activate(scores, h[rows], value[rows], cut[rows], activation)
    return u, value, cut


def cpu_mask_backward(du, h, z, w_z, value, cut, activation):
    (t, k), f = z.shape[:2], w_z.shape[0]
    dtypes, z, w_z = (z.dtype, w_z.dtype), at_least_fp32(z), at_least_fp32(w_z)
    dh, dz, dw_z = torch.empty_like(h), torch.empty_like(z), torch.zeros_like(w_z)
    for rows in token_chunks(t, k * f):
        scores = F.linear(z[rows], w_z)
        dh[rows], d_scores = mask_backward(scores, du[rows], h[rows], value[rows], cut[rows], activation)
        dz[rows] = d_scores @ w_z
        dw_z.addmm_(d_scores.view(-1, f).T, z[rows].reshape(-1, z.shape[2]))
    return dh, dz.to(dtypes[0]), dw_z.to(dtypes[1])


@torch.library.custom_op("nanoexperts::masks", mutates_args=())
def masks_op(h: torch.Tensor, z: torch.Tensor, w_z: torch.Tensor, n_keep: int, activation: str,
             backend: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h (T, F or 2F), z (T, K, dz), w_z (F, dz) -> act(h) * mean_k topn(w_z z_k) (T, F), and the masks' value and cut (T, K)."""
    with torch.autocast(h.device.type, enabled=False):
        return (triton_mask_forward if use_triton(backend, h) else cpu_mask_forward)(h, z, w_z, n_keep, activation)


@torch.library.custom_op("nanoexperts::masks_backward", mutates_args=())
def masks_backward_op(du: torch.Tensor, h: torch.Tensor, z: torch.Tensor, w_z: torch.Tensor, value: torch.Tensor, cut: torch.Tensor,
                      activation: str, backend: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.autocast(h.device.type, enabled=False):
        return (triton_mask_backward if use_triton(backend, h) else cpu_mask_backward)(du, h, z, w_z, value, cut, activation)


@masks_op.register_fake
def _(h, z, w_z, n_keep, activation, backend):
    dtype = torch.promote_types(z.dtype, torch.float32)
    return h.new_empty(h.shape[0], w_z.shape[0]), z.new_empty(z.shape[:2], dtype=dtype), z.new_empty(z.shape[:2], dtype=torch.int32)


@masks_backward_op.register_fake
def _(du, h, z, w_z, value, cut, activation, backend):
    return torch.empty_like(h), torch.empty_like(z), torch.empty_like(w_z)


def _masks_setup(ctx, inputs, output):
    h, z, w_z, _, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(h, z, w_z, *output[1:])


def _masks_autograd(ctx, du, *_):
    return *masks_backward_op(du.contiguous(), *ctx.saved_tensors, ctx.activation, ctx.backend), None, None, None


masks_op.register_autograd(_masks_autograd, setup_context=_masks_setup)


@torch.library.custom_op("nanoexperts::thresholds", mutates_args=())
def thresholds_op(scores: torch.Tensor, n_keep: int, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """scores (R, F) -> value (R,) in their dtype, cut (R,) int32."""
    if not use_triton(backend, scores):
        return thresholds(scores, n_keep)
    value, cut = launch_masks(scores.unsqueeze(1), None, None, n_keep, "thresholds")
    return value.squeeze(1).to(scores.dtype), cut.squeeze(1)


@thresholds_op.register_fake
def _(scores, n_keep, backend):
    return scores.new_empty(scores.shape[0]), scores.new_empty(scores.shape[0], dtype=torch.int32)


def topn_mask(scores, n_keep, backend="auto"):
    """
    Keep the n_keep largest entries of the last dim at their raw value, 0 elsewhere: exactly n_keep, ties to the lowest
    index. scores (..., F) -> the same shape. The gradient passes through the kept entries; the choice has none.
    """
    if not 1 <= n_keep <= scores.shape[-1]:
        raise ValueError(f"n_keep {n_keep}: expected 1 to {scores.shape[-1]}, the last dimension of scores")
    rows = scores.reshape(-1, scores.shape[-1])
    value, cut = thresholds_op(rows.detach().contiguous(), n_keep, backend)
    return torch.where(kept(rows, value, cut), rows, 0).view(scores.shape)


# ----------------------------------------------------------------------------------------------------------------------
# 5. Decoding: few tokens, so time is reading weights. Only the active rows of w_in and columns of w_out are read.

_transposed = WeakTensorKeyDictionary()


def transposed(w):
    """w (D, F) -> w.T contiguous, so that a column is one read. Kept while w lives and nobody writes to it."""
    if w.T.is_contiguous() or w.is_inference():
        return w.T.contiguous()
    state = (w._version, w.data_ptr())
    if w not in _transposed or _transposed[w][0] != state:
        _transposed[w] = state, w.T.contiguous()
    return _transposed[w][1]


@torch.library.custom_op("nanoexperts::decode", mutates_args=())
def decode_op(x: torch.Tensor, z: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, w_z: torch.Tensor, n_keep: int,
              activation: str, backend: str) -> torch.Tensor:
    """masked_ffn for a few tokens, without gradients."""
    (t, k), f, d, w_out_t = z.shape[:2], w_z.shape[0], x.shape[1], transposed(w_out)
    with torch.autocast(x.device.type, enabled=False):
        scores = F.linear(z.to(w_z.dtype), w_z)  # (T, K, F)
        if use_triton(backend, x):
            mask, blocks = x.new_empty(t, f, dtype=torch.float32), triton.cdiv(f, 8)
            launch_masks(scores, None, mask, n_keep, "none")
            partial = x.new_empty(t, blocks, d, dtype=torch.float32)
            decode_kernel[(t, blocks)](x, mask, w_in, w_out_t, partial, D=d, F=f, SWIGLU=activation == "swiglu", BLOCK=8,
                                       BLOCK_D=triton.next_power_of_2(d))
            return partial.sum(1).to(x.dtype)
        value, cut = thresholds(scores.view(t * k, f), n_keep)
        mask = torch.where(kept(scores, value.view(t, k), cut.view(t, k)), scores, 0).mean(1).to(x.dtype)  # (T, F)
        active = mask.any(0).nonzero().squeeze(1)
        rows = w_in.view(-1, f, d).index_select(1, active).flatten(0, 1).to(x.dtype)  # gate rows, then up rows
        u = activate(F.linear(x, rows), activation) * mask.index_select(1, active)
        return u @ w_out_t.index_select(0, active).to(x.dtype)


@decode_op.register_fake
def _(x, z, w_in, w_out, w_z, n_keep, activation, backend):
    return torch.empty_like(x)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Masked FFN: the oracle and the dispatcher


def masked_ffn_loop(x, z, w_in, w_out, w_z, n_keep, activation):
    """The oracle: K whole FFNs, masks by a stable sort, as the paper writes it."""
    y = 0
    for scores in F.linear(z, w_z).unbind(1):  # (T, F) each
        best = scores.argsort(dim=-1, descending=True, stable=True)[:, :n_keep]
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)
        y = y + F.linear(activate(F.linear(x, w_in), activation) * torch.where(mask, scores, 0), w_out)
    return y / z.shape[1]


def masked_ffn(x, z, w_in, w_out, w_z, n_keep, activation, backend="auto"):
    """
    Infinity-MoE's layer with the sum over samples moved inside W_2, exact because the masks act after the activation:
    y = w_out @ ( act(w_in x) * (1/K) sum_k topn_mask(w_z z_k, n_keep) )          (arXiv 2601.17680; papers.md section 2)

    x (T, D); z (T, K, dz); w_in (F, D) for "gelu", (2F, D) = [gate; up] rows for "swiglu"; w_out (D, F); w_z (F, dz);
    n_keep 1..F entries of each mask keep their raw value; None keeps all. Returns y (T, D). Differentiable in all five
    tensors. Without gradients, a few tokens (T <= 8) read only the active rows and columns of the weights. Under autocast
    it computes in autocast's dtype. Raises ValueError where shapes do not fit.
    """
    check_masked(x, z, w_in, w_out, w_z, n_keep, activation, backend)
    f, samples = w_z.shape[0], z.shape[0] * z.shape[1]
    autocast = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    x, z = x.to(autocast).contiguous(), z.contiguous()
    if n_keep is not None and backend in ("auto", "triton") and z.shape[0] <= 8 and 1 - (1 - n_keep / f) ** samples < 0.6 \
            and not (torch.is_grad_enabled() and any(a.requires_grad for a in (x, z, w_in, w_out, w_z))):
        return decode_op(x, z, w_in, w_out, w_z, n_keep, activation, backend)
    if x.is_cuda or n_keep is None:
        z, w_z = z.to(autocast), w_z.to(autocast)
    if backend == "loop" and n_keep is not None:
        return masked_ffn_loop(x, z.to(autocast), w_in, w_out, w_z, n_keep, activation)
    h = F.linear(x, w_in.to(autocast))  # (T, F or 2F)
    if n_keep is None:  # then the mask is linear in z
        return F.linear(activate(h, activation) * F.linear(z.mean(1), w_z), w_out.to(autocast))
    return F.linear(masks_op(h, z, w_z, n_keep, activation, backend)[0], w_out.to(autocast))


def check_masked(x, z, w_in, w_out, w_z, n_keep, activation, backend):
    if activation not in ("gelu", "swiglu"):
        raise ValueError(f"activation {activation!r}: expected gelu or swiglu")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    if x.dim() != 2 or z.dim() != 3 or z.shape[0] != x.shape[0]:
        raise ValueError(f"x {tuple(x.shape)}, z {tuple(z.shape)}: expected (T, D) and (T, K, dz)")
    f, d = w_z.shape[0], x.shape[1]
    expected = {"w_in": (f * (2 if activation == "swiglu" else 1), d), "w_out": (d, f), "w_z": (f, z.shape[2])}
    for name, w in (("w_in", w_in), ("w_out", w_out), ("w_z", w_z)):
        if tuple(w.shape) != expected[name]:
            raise ValueError(f"{name} {tuple(w.shape)}: expected {expected[name]} for {activation}, x {tuple(x.shape)}, z {tuple(z.shape)}")
    if n_keep is not None and not 1 <= n_keep <= f:
        raise ValueError(f"n_keep {n_keep}: expected 1 to {f} (rows of w_z), or None for no selection")
    if backend == "triton":
        check_triton(x)
        if f > 65536:
            raise ValueError(f'backend "triton": F = {f}, but a row of at most 65536 fits the registers; use backend="grouped"')


def trusted(device, dtype):
    return True
