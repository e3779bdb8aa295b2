"""
The expert FFNs, fast: the Triton kernels, and the dispatcher that picks them or plain torch.

    expert_ffn   y[t] = sum_k weights[t,k] * w_out[e] act(w_in[e] x[t]),  e = ids[t,k]
    masked_ffn   y[t] = w_out ( act(w_in x[t]) * 1/K sum_k topn(w_z z[t,k]) )
    topn_mask    the n largest entries of a row keep their raw value, the others are 0

New to Triton? Read `up_kernel`, line by line: one program of it computes one tile of the output.
The other kernels repeat its steps; those of the masks are in support/mask_kernels.py.
Backends: `triton`; `grouped`, torch (support/cpu.py); `loop`, the oracle (moe.py); `auto`, by
device. `python kernels.py` checks both layers here; TRITON_INTERPRET=1 runs the kernels in numpy.

Letters: T tokens, D model width, F hidden width of an expert, E experts, K choices (or samples) a
token, N = T*K rows; W rows of w_in per expert: F for gelu, 2F = [gate; up] for swiglu.
"""

from __future__ import annotations

import sys
from collections import namedtuple
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from support import cpu, mask_kernels, ops
from support.mask_kernels import INTERPRETED, act_backward_tile, act_tile, jit, tl, triton, tuned
from support.ops import kept, merge_layers, sort_by_expert, undo_order
from support.trust import first_of, trusted

BACKENDS = ("auto", "loop", "grouped", "triton")

# ------------------------------------------------------------------------------------------------
# 1. Grouped expert FFN
#
# Assignments are sorted by expert, so every expert owns a run of rows. A run is cut into tiles of
# BLOCK_M rows; a table, made on the device, says of each tile whose it is and where it starts. Four
# kernels, no atomics:
#   up             h = w_in[e] x[token], act(h)          gather and activation in the product
#   down           out[slot] = gate * (w_out[e] act)     gate and scatter; also dx, by w_in[e]^T
#   act_backward   g = w_out[e]^T dy[token] -> dh, gate * act, the gate's gradient
#   weight_grad    dw[e] = sum over e's rows of grad^T a  zeros for an expert without rows


@jit
def tile_of_program(n_tiles, n_blocks):
    """Program id -> (row tile, column block). 8 row tiles at a time find the weights in L2."""
    pid = tl.program_id(0)
    return tl.swizzle2d(pid // n_blocks, pid % n_blocks, n_tiles, n_blocks, 8)


@jit
def load_tile(pointers, rows_ok, cols_ok, EVEN: tl.constexpr):
    """A tile, zero where the shape ends. EVEN: it never ends inside a tile, so no mask."""
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=rows_ok & cols_ok, other=0.0)


@tuned([(128, 64, 8, 3), (64, 64, 8, 4)], [(64, 64, 8, 3), (64, 64, 8, 4)], [(64, 32, 8, 3)],
       key=["D", "F", "BLOCK_M"])
@jit
def up_kernel(
    x, w_in, h_out, act_out,                      # (T, D), (E, W, D), (N, W), (N, F)
    token, tile_expert, tile_row, ends, n_tiles,  # row -> token; tile -> expert, first row; (E,)
    D: tl.constexpr, F: tl.constexpr, SWIGLU: tl.constexpr, SAVE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """One program: BLOCK_M rows of one expert x BLOCK_N of its neurons."""
    # 1. Which tile, whose rows? The table has room for the worst case; tiles beyond the last one
    #    carry expert -1.
    tile, block = tile_of_program(n_tiles, tl.cdiv(F, BLOCK_N))
    expert = tl.load(tile_expert + tile).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(tile_row + tile).to(tl.int64)
    line = tl.arange(0, BLOCK_M)
    row_ok = first + line < tl.load(ends + expert)
    # The gather: these rows of x.
    source = tl.load(token + first + line, mask=row_ok, other=0).to(tl.int64)
    # 2. Pointers to the first (BLOCK_M, BLOCK_K) tile of x[source] and the first (BLOCK_K, BLOCK_N)
    #    tile of w_in[e]^T.
    k = tl.arange(0, BLOCK_K)
    col = block * BLOCK_N + tl.arange(0, BLOCK_N)
    width: tl.constexpr = 2 * F if SWIGLU else F
    even: tl.constexpr = D % BLOCK_K == 0 and F % BLOCK_N == 0
    a_ptr = x + (source[:, None] * D + k[None, :])
    b_ptr = w_in + expert * width * D + (col[None, :] * D + k[:, None])
    # 3. Walk along D, accumulate in fp32. swiglu takes two products of the same x: gate rows, and
    #    up rows F further on.
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
    # 4. Activate and store. The pre-activations are kept for the backward pass only.
    ok = row_ok[:, None] & (col[None, :] < F)
    narrow, wide = line[:, None] * F + col[None, :], line[:, None] * width + col[None, :]
    act = act_tile(h, up, SWIGLU).to(act_out.dtype.element_ty)
    tl.store(act_out + first * F + narrow, act, mask=ok)
    if SAVE:
        h_ptr = h_out + first * width + wide
        tl.store(h_ptr, h.to(h_out.dtype.element_ty), mask=ok)
        if SWIGLU:
            tl.store(h_ptr + F, up.to(h_out.dtype.element_ty), mask=ok)


@jit
def product(
    a_ptr, b_ptr, row_ok, col, IN: tl.constexpr, OUT: tl.constexpr, STRIDE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Step 3 of up_kernel, for one product: the (BLOCK_M, BLOCK_N) tile of a @ b, in fp32, from the
    pointers of the first tiles; b's rows lie STRIDE apart."""
    k = tl.arange(0, BLOCK_K)
    even: tl.constexpr = IN % BLOCK_K == 0 and OUT % BLOCK_N == 0
    acc = tl.zeros((a_ptr.shape[0], BLOCK_N), tl.float32)
    for start in range(0, IN, BLOCK_K):
        k_ok = k < IN - start
        a = load_tile(a_ptr, row_ok[:, None], k_ok[None, :], IN % BLOCK_K == 0)
        b = load_tile(b_ptr, k_ok[:, None], col[None, :] < OUT, even)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_ptr += BLOCK_K
        b_ptr += BLOCK_K * STRIDE
    return acc


@tuned([(256, 64, 8, 3), (128, 64, 8, 3)], [(128, 64, 8, 3), (128, 64, 4, 3)], [(64, 32, 8, 3)],
       key=["IN", "OUT", "BLOCK_M"])
@jit
def down_kernel(
    a, w, out, gate,                              # (N, IN), a matrix per expert, (N, OUT), (N,)
    slot, tile_expert, tile_row, ends, n_tiles,   # row -> place in (T, K) order; the tile table
    IN: tl.constexpr, OUT: tl.constexpr, STRIDE_IN: tl.constexpr, STRIDE_OUT: tl.constexpr,
    GATED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[slot[n]] = gate[slot[n]] * sum_i a[n, i] w[e, i, :]; strides say which way round w is."""
    tile, block = tile_of_program(n_tiles, tl.cdiv(OUT, BLOCK_N))
    expert = tl.load(tile_expert + tile).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(tile_row + tile).to(tl.int64)
    line = tl.arange(0, BLOCK_M)
    row_ok = first + line < tl.load(ends + expert)
    k = tl.arange(0, BLOCK_K)
    col = block * BLOCK_N + tl.arange(0, BLOCK_N)
    a_ptr = a + first * IN + (tl.where(row_ok, line, 0)[:, None] * IN + k[None, :])
    b_ptr = w + expert * IN * OUT + (col[None, :] * STRIDE_OUT + k[:, None] * STRIDE_IN)
    acc = product(a_ptr, b_ptr, row_ok, col, IN, OUT, STRIDE_IN, PRECISION, BLOCK_N, BLOCK_K)
    # The scatter: every slot is written once.
    target = tl.load(slot + first + line, mask=row_ok, other=0).to(tl.int64)
    if GATED:
        acc *= tl.load(gate + target, mask=row_ok, other=0.0).to(tl.float32)[:, None]
    ok = row_ok[:, None] & (col[None, :] < OUT)
    place = out + (target[:, None] * OUT + col[None, :])
    tl.store(place, acc.to(out.dtype.element_ty), mask=ok)


@jit
def halves(tile, M: tl.constexpr, N: tl.constexpr):
    """A tile (M, N) -> its left and right halves."""
    return tl.split(tl.permute(tl.reshape(tile, (M, 2, N // 2)), (0, 2, 1)))


@tuned([(128, 64, 8, 3), (64, 64, 4, 3)], [(128, 64, 8, 3), (64, 64, 4, 3)], [(64, 32, 8, 3)],
       key=["D", "F", "BLOCK_M"])
@jit
def act_backward_kernel(
    dy, w_out, h_in, dh,                          # (T, D), (E, D, F), (N, W), (N, W)
    gated_act, dgate, gate, dact,                 # (N, F), (blocks, N), (N,), (N, F)
    token, slot, tile_expert, tile_row, ends, n_tiles, n_rows,
    D: tl.constexpr, F: tl.constexpr, SWIGLU: tl.constexpr, HAS_DACT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """With g = w_out[e]^T dy[token]: dgate = <g, act>, dh = act'(h) (gate * g + dact), and
    gate * act for w_out's gradient."""
    tile, block = tile_of_program(n_tiles, tl.cdiv(F, BLOCK_N))
    expert = tl.load(tile_expert + tile).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(tile_row + tile).to(tl.int64)
    line = tl.arange(0, BLOCK_M)
    row_ok = first + line < tl.load(ends + expert)
    source = tl.load(token + first + line, mask=row_ok, other=0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    col = block * BLOCK_N + tl.arange(0, BLOCK_N)
    a_ptr = dy + (source[:, None] * D + k[None, :])
    b_ptr = w_out + expert * D * F + (k[:, None] * F + col[None, :])
    acc = product(a_ptr, b_ptr, row_ok, col, D, F, F, PRECISION, BLOCK_N, BLOCK_K)
    # The rest goes a quarter of the columns at a time: all at once would spill registers.
    width: tl.constexpr = 2 * F if SWIGLU else F
    QUARTER: tl.constexpr = BLOCK_N // 4
    left, right = halves(acc, BLOCK_M, BLOCK_N)
    quarters = halves(left, BLOCK_M, BLOCK_N // 2) + halves(right, BLOCK_M, BLOCK_N // 2)
    slots = tl.load(slot + first + line, mask=row_ok, other=0)
    gate_row = tl.load(gate + slots, mask=row_ok, other=0.0).to(tl.float32)[:, None]
    dot = tl.zeros((BLOCK_M,), tl.float32)
    for i in tl.static_range(4):
        g = quarters[i]
        col = block * BLOCK_N + i * QUARTER + tl.arange(0, QUARTER)
        ok = row_ok[:, None] & (col[None, :] < F)
        wide = first * width + (line[:, None] * width + col[None, :])
        narrow = first * F + (line[:, None] * F + col[None, :])
        h = tl.load(h_in + wide, mask=ok, other=0.0).to(tl.float32)
        up = tl.load(h_in + wide + F, mask=ok, other=0.0).to(tl.float32) if SWIGLU else h
        grad = g * gate_row
        if HAS_DACT:
            grad += tl.load(dact + narrow, mask=ok, other=0.0).to(tl.float32)
        act, d_h, d_up = act_backward_tile(h, up, grad, SWIGLU)
        dot += tl.sum(g * act, 1)
        tl.store(gated_act + narrow, (act * gate_row).to(gated_act.dtype.element_ty), mask=ok)
        tl.store(dh + wide, d_h.to(dh.dtype.element_ty), mask=ok)
        if SWIGLU:
            tl.store(dh + wide + F, d_up.to(dh.dtype.element_ty), mask=ok)
    # The blocks' partial sums are added up afterwards, in order.
    tl.store(dgate + block * n_rows + first + line, dot, mask=row_ok)


@tuned([(256, 64, 8, 5), (128, 64, 8, 5)], [(128, 64, 8, 5), (64, 64, 4, 5)], [(64, 32, 8, 3)],
       key=["OUT", "IN"])  # of 5 stages two are the row numbers': 3 buffers, where 3 stages give 2
@jit
def weight_grad_kernel(
    grad, a, dw,                          # (., OUT), (., IN), (E, OUT, IN)
    grad_row, a_row, ends,                # row -> row of grad, of a (N,) where gathered; (E,)
    OUT: tl.constexpr, IN: tl.constexpr, GATHER_GRAD: tl.constexpr, GATHER_A: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """dw[e] = sum over the rows n of expert e of grad[n]^T a[n]; gathered by token, or
    from the layers of a pool."""
    expert = tl.program_id(1)
    o_block, i_block = tile_of_program(tl.cdiv(OUT, BLOCK_M), tl.cdiv(IN, BLOCK_N))
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    o = o_block * BLOCK_M + tl.arange(0, BLOCK_M)
    i = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
    o_ok, i_ok = o[:, None] < OUT, i[None, :] < IN
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        row_ok = row < end
        g_source = tl.load(grad_row + row, mask=row_ok, other=0) if GATHER_GRAD else row
        a_source = tl.load(a_row + row, mask=row_ok, other=0) if GATHER_A else row
        g_ptr = grad + (g_source[None, :].to(tl.int64) * OUT + o[:, None])
        b_ptr = a + (a_source[:, None].to(tl.int64) * IN + i[None, :])
        g = tl.load(g_ptr, mask=row_ok[None, :] & o_ok, other=0.0)
        b = tl.load(b_ptr, mask=row_ok[:, None] & i_ok, other=0.0)
        acc = tl.dot(g, b, acc, input_precision=PRECISION)
    target = dw + expert.to(tl.int64) * OUT * IN + (o[:, None] * IN + i[None, :])
    tl.store(target, acc.to(dw.dtype.element_ty), mask=o_ok & i_ok)


TILE_ROWS = {2: 128, 4: 64}  # at most, by the bytes of a number
Tiles = namedtuple("Tiles", "block_m expert row ends n_tiles token slot")


def cut_into_tiles(order, ends, top_k, itemsize):
    """The tile table and index arrays of one layer, int32, on the device; nothing waits for it."""
    n_experts, n_rows = ends.numel(), order.numel()
    usual = triton.next_power_of_2(max(1, n_rows // n_experts))  # rows of an expert, if balanced
    block_m = 32 if INTERPRETED else min(TILE_ROWS[itemsize], max(16, usual))
    n_tiles = triton.cdiv(n_rows, block_m) + min(n_experts, n_rows)  # a run may leave one unfilled
    counts = ends.diff(prepend=ends.new_zeros(1))
    tiles = (counts + block_m - 1) // block_m  # (E,)
    tile_ends = tiles.cumsum(0)
    tile = torch.arange(n_tiles, device=ends.device)
    expert = torch.searchsorted(tile_ends, tile, right=True)
    e = expert.clamp(max=n_experts - 1)
    row = (ends - counts)[e] + (tile - (tile_ends - tiles)[e]) * block_m
    expert = torch.where(expert < n_experts, expert, -1)
    token = order // top_k
    return Tiles(block_m, expert.int(), row.int(), ends, n_tiles, token.int(), order.int())


def grid(tiles, columns):
    return lambda meta: (tiles.n_tiles * triton.cdiv(columns, meta["BLOCK_N"]),)


def precision():
    """fp32 products in full, unless the user asked torch for less."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def launch_down(a, w, gate, tiles, top_k, transposed):
    """a (N, IN), w (E, OUT, IN) or, transposed, (E, IN, OUT) -> (T, OUT): the products, times gate
    if there is one, summed over a token's choices in a fixed order, unlike atomic adds."""
    (n, width), d = a.shape, w.shape[2] if transposed else w.shape[1]
    out = a.new_empty(n, d)
    down_kernel[grid(tiles, d)](
        a, w, out, out if gate is None else gate, tiles.slot, *tiles[1:5],
        IN=width, OUT=d, STRIDE_IN=d if transposed else 1, STRIDE_OUT=1 if transposed else width,
        GATED=gate is not None, PRECISION=precision(), BLOCK_M=tiles.block_m)
    return out if top_k == 1 else out.view(-1, top_k, d).sum(1)


def launch_weight_grad(grad, a, w, grad_row, a_row, ends):
    dw, (n_experts, rows, columns) = torch.empty_like(w), w.shape
    block_m = 32 if INTERPRETED else TILE_ROWS[grad.element_size()]
    n_blocks = triton.cdiv(rows, block_m)
    weight_grad_kernel[lambda meta: (n_blocks * triton.cdiv(columns, meta["BLOCK_N"]), n_experts)](
        grad, a, dw, ends if grad_row is None else grad_row, ends if a_row is None else a_row, ends,
        OUT=rows, IN=columns, GATHER_GRAD=grad_row is not None, GATHER_A=a_row is not None,
        PRECISION=precision(), BLOCK_M=block_m)
    return dw


def experts_forward(x, weights, w_in, w_out, order, ends, activation, save, keep):
    n, k, (_, d, f) = order.numel(), weights.shape[1], w_out.shape
    tiles = cut_into_tiles(order, ends, k, x.element_size())
    act, h = x.new_empty(n, f), x.new_empty(n if save else 0, w_in.shape[1])
    up_kernel[grid(tiles, f)](
        x, w_in, h, act, tiles.token, *tiles[1:5], D=d, F=f, SWIGLU=activation == "swiglu",
        SAVE=save, PRECISION=precision(), BLOCK_M=tiles.block_m)
    y = launch_down(act, w_out, weights, tiles, k, transposed=False)
    return y, h, undo_order(act, order) if keep else act.new_empty(0, f)


def experts_backward(dy, d_acts, x, weights, w_in, w_out, order, ends, h, activation):
    n, k, d, f = order.numel(), weights.shape[1], x.shape[1], w_out.shape[2]
    tiles = cut_into_tiles(order, ends, k, x.element_size())
    dh, gated_act = torch.empty_like(h), x.new_empty(n, f)
    d_acts = None if d_acts is None else d_acts.index_select(0, order)  # now in expert order
    d_gate = x.new_zeros(triton.cdiv(f, 32), n, dtype=torch.float32)  # no column block is narrower
    act_backward_kernel[grid(tiles, f)](
        dy, w_out, h, dh, gated_act, d_gate, weights, h if d_acts is None else d_acts,
        tiles.token, tiles.slot, *tiles[1:5], n, D=d, F=f, SWIGLU=activation == "swiglu",
        HAS_DACT=d_acts is not None, PRECISION=precision(), BLOCK_M=tiles.block_m)
    dx = launch_down(dh, w_in, None, tiles, k, transposed=True)
    d_weights = undo_order(d_gate.sum(0).to(weights.dtype), order).view_as(weights)
    return dx, d_weights, gated_act, dh


def weight_grads(xs, dys, acts, dhs, tokens, all_ends, w_in, w_out):
    """Of one layer, or of all layers of a pool: the longer the product, the fewer weights a row."""
    place, token, ends = merge_layers(tokens, all_ends, map(len, xs))
    x, dy, act, dh = (of[0] if place is None else torch.cat(of) for of in (xs, dys, acts, dhs))
    dw_in = launch_weight_grad(dh, x, w_in, place, token, ends)
    return dw_in, launch_weight_grad(dy, act, w_out, token, place, ends)


# ------------------------------------------------------------------------------------------------
# 2. The dispatcher

STEPS = {  # step: (Triton's function, torch's), with the same arguments and results
    "experts_forward": (experts_forward, cpu.experts_forward),
    "experts_backward": (experts_backward, cpu.experts_backward),
    "weight_grads": (weight_grads, cpu.weight_grads),
} | {name: (getattr(mask_kernels, name), getattr(cpu, name))
     for name in ("masks", "masks_backward", "thresholds", "decode")}


def choose_backend(x: Tensor) -> tuple[str, str]:
    """What `auto` means for x, by device and dtype alone, never by timing: (backend, reason)."""
    if not x.is_cuda:
        return "grouped", "no GPU: the matrix products are torch's"
    if not triton or torch.cuda.get_device_capability(x.device) < (8, 0):
        return "grouped", "no Triton, or a GPU older than sm_80"
    if x.dtype == torch.float64:
        return "grouped", "the kernels do not support float64"
    return "triton", "fused kernels"


def dispatch(step, backend, *arguments):
    """A step: Triton's for "triton", torch's for "grouped", what can be trusted for "auto"."""
    if backend == "auto":
        backend = choose_backend(first_of(arguments))[0]
        if backend == "triton" and not trusted(step, *STEPS[step], arguments):
            backend = "grouped"
    return STEPS[step][backend != "triton"](*arguments)


step = {name: partial(dispatch, name) for name in STEPS}
experts_op, tickets_op, late_tickets = ops.make_experts(
    step["experts_forward"], step["experts_backward"], step["weight_grads"])
masked_op = ops.make_masked(step["masks"], step["masks_backward"], cpu.linear)
thresholds_op = ops.make_thresholds(step["thresholds"])
decode_op = ops.make_decode(step["decode"], cpu.transposed)


# ------------------------------------------------------------------------------------------------
# 3. The functions that layers call


def expert_ffn(
    x: Tensor, weights: Tensor, ids: Tensor, w_in: Tensor, w_out: Tensor, activation: str,
    backend: str = "auto", keep_activations: bool = False, tickets: tuple = (),
) -> tuple[Tensor, Tensor | None]:
    """
    The experts after routing: y[t] = sum_k weights[t,k] * w_out[e] act(w_in[e] x[t]), e = ids[t,k].

    x (T, D); weights (T, K) gates; ids (T, K) int64, an expert at most once per token; w_in
    (E, F, D) for "gelu", (E, 2F, D) = [gate; up] rows for "swiglu"; w_out (E, D, F). Returns y
    (T, D) and, if keep_activations, activations before gate and w_out (T, K, F), else None.
    Differentiable in x, weights, w_in, w_out; an expert that no token chose gets exact zeros. Under
    autocast it computes in autocast's dtype. tickets: see open_pool. ValueError: shapes do not fit.
    """
    t, (e, d, f), wide = x.shape[0], w_out.shape, 2 if activation == "swiglu" else 1
    check(activation, backend, x, (t, d), w_out=(w_out, (e, d, f)), w_in=(w_in, (e, wide * f, d)))
    if ids.dim() != 2 or ids.shape != weights.shape or ids.shape[0] != t:
        shapes = f"ids {tuple(ids.shape)}, weights {tuple(weights.shape)}"
        raise ValueError(f"{shapes}: expected ({t}, K) both, T = {t} as in x")
    x, w_in, w_out = (a.to(working_dtype(x)) for a in (x, w_in, w_out))
    if callable(tickets):
        tickets = tickets(ops.factor_shapes(t, ids.shape[1], w_in, w_out), x.dtype)
    y, acts = experts_op(
        backend, x.contiguous(), weights.contiguous(), w_in, w_out, *sort_by_expert(ids, e),
        activation, needs_gradient(x, weights, w_in, w_out), keep_activations, *tickets)
    return y, acts.view(*ids.shape, f) if keep_activations else None


def open_pool(
    w_in: Tensor, w_out: Tensor, n_layers: int, x: Tensor, top_k: int | None, backend: str = "auto",
) -> list[tuple]:
    """
    For each of n_layers that will share a pool in this forward pass: w_in, w_out and tickets, which
    expert_ffn takes in their place. x (T, D): shape and dtype of the layers' inputs; top_k None: a
    layer's rows are not known before they arrive (experts over ranks).

    Were the weights passed plainly, each layer's backward pass would write a gradient as large as
    the pool, and autograd would add them: a pool grows with the depth, so this traffic grows with
    its square. Instead layers keep the two factors of every product dw = grad^T input, and hand
    them over as the "gradients" of their tickets; when the last has come, one product over all
    layers' rows gives the pool's gradient, summed in float32, once.
    """
    if not needs_gradient(w_in, w_out):
        return [(w_in, w_out, ())] * n_layers
    dtype = working_dtype(x)
    if top_k is None:
        tickets = [late_tickets(backend, w_in, w_out)] * n_layers
    else:
        tickets = tickets_op(backend, w_in, w_out, n_layers, len(x), top_k, dtype)
    w_in, w_out = (w.detach().to(dtype) for w in (w_in, w_out))  # one cast for all layers
    return [(w_in, w_out, of_layer) for of_layer in tickets]


def masked_ffn(
    x: Tensor, z: Tensor, w_in: Tensor, w_out: Tensor, w_z: Tensor, n_keep: int,
    activation: str, backend: str = "auto",
) -> Tensor:
    """
    Infinity-MoE's layer (arXiv 2601.17680) with the sum over samples moved inside W_2, exact since
    the masks act after the activation: y = w_out ( act(w_in x) * (1/K) sum_k topn_mask(w_z z_k) ).

    x (T, D); z (T, K, dz); w_in (F, D) for "gelu", (2F, D) = [gate; up] rows for "swiglu"; w_out
    (D, F); w_z (F, dz); n_keep: so many entries of each mask keep their raw value.
    Returns y (T, D). Differentiable in all five tensors. Without gradients, a few tokens (T <= 8)
    read only the active rows and columns of the weights. Under autocast it computes in autocast's
    dtype (scores stay fp32 on a CPU). Raises ValueError where arguments do not fit.
    """
    (t, k, dz), (f, _), (d, _) = z.shape, w_z.shape, w_out.shape
    check(activation, backend, x, (t, d), w_out=(w_out, (d, f)), w_z=(w_z, (f, dz)),
          w_in=(w_in, (2 * f if activation == "swiglu" else f, d)))
    if not 1 <= n_keep <= f:
        raise ValueError(f"n_keep {n_keep}: expected 1 to {f}, the rows of w_z")
    dtype = working_dtype(x)
    score_dtype = dtype if x.is_cuda else torch.promote_types(dtype, torch.float32)
    x, z, w_z = x.contiguous().to(dtype), z.to(score_dtype).contiguous(), w_z.to(score_dtype)
    save = needs_gradient(x, z, w_in, w_out, w_z)
    idle = (1 - n_keep / f) ** (k if x.is_cuda else t * k)  # of the weights, in decoding
    if not save and 1 <= t <= 8 and idle > 0.4:
        return decode_op(backend, x, z, w_in, w_out, w_z, n_keep, activation)
    w_in, w_out = w_in.to(dtype), w_out.to(dtype)
    return masked_op(backend, x, z, w_in, w_out, w_z, n_keep, activation, save)


def topn_mask(scores: Tensor, n_keep: int, backend: str = "auto") -> Tensor:
    """
    Keep the n_keep largest entries of the last dim at their raw value, 0 elsewhere: exactly n_keep,
    ties to the lowest index. scores (..., F) -> the same shape. The gradient passes through the
    kept entries; the choice itself has none.
    """
    width = scores.shape[-1]
    if not 1 <= n_keep <= width:
        raise ValueError(f"n_keep {n_keep}: expected 1 to {width}, the last dimension of scores")
    rows = scores.reshape(-1, width)
    value, cut = thresholds_op(backend, rows.detach().contiguous(), n_keep)
    return torch.where(kept(rows, value, cut), rows, 0).view(scores.shape)


def needs_gradient(*tensors):
    return torch.is_grad_enabled() and any(a.requires_grad for a in tensors)


def working_dtype(x):
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def check(activation, backend, x, shape, **parameters):
    """ValueError unless x and every (tensor, shape) fit together, and the backend can use them."""
    if activation not in ("gelu", "swiglu"):
        raise ValueError(f"activation {activation!r}: expected gelu or swiglu")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    if backend == "loop":
        raise ValueError('backend "loop": call moe.expert_ffn_loop or moe.masked_ffn_loop')
    if backend == "triton" and not INTERPRETED and choose_backend(x)[0] != "triton":
        raise ValueError(f'backend "triton" on {x.device}: {choose_backend(x)[1]}; use "auto"')
    if tuple(x.shape) != shape:
        raise ValueError(f"x {tuple(x.shape)}: expected {shape}, by w_out")
    any_dtype = torch.is_autocast_enabled(x.device.type)
    for name, (w, expected) in parameters.items():
        if tuple(w.shape) != expected:
            raise ValueError(f"{name} {tuple(w.shape)}: expected {expected} for {activation}")
        if w.device != x.device or not (any_dtype or w.dtype == x.dtype or name == "w_z"):
            both = f"{name} is {w.dtype} on {w.device}, x {x.dtype} on {x.device}"
            raise ValueError(f"{both}: expected the same (or autocast)")
        if w.dim() == 3 and not w.is_contiguous():
            raise ValueError(f"{name} has strides {w.stride()}: expected contiguous weights")


# ------------------------------------------------------------------------------------------------
# 4. python kernels.py: both layers against the tests' loops in float64, on this machine


def main():
    sys.path.insert(0, str(Path(__file__).parent / "tests"))
    sys.modules.setdefault("kernels", sys.modules[__name__])  # what the tests import is this file
    from kernel_helpers import compare_all
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "triton" if INTERPRETED else choose_backend(torch.empty(0, device=device))[0]
    print(f"backend {backend} on {device}: the largest error of outputs and gradients")
    wrong = 0
    for name, error, tolerance in compare_all(backend, device):
        wrong += not error <= tolerance
        verdict = "ok" if error <= tolerance else "DISAGREES"
        print(f"{error:.1e} <= {tolerance:.0e}  {name:70} {verdict}", flush=True)
    raise SystemExit(f"{wrong} disagree" if wrong else 0)


if __name__ == "__main__":
    main()
