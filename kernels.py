"""
The expert FFNs, fast: the Triton kernels, and the dispatcher that picks them or plain torch.

    expert_ffn   y[t] = sum_k weights[t,k] * w_out[e] act(w_in[e] x[t]),  e = ids[t,k]
    masked_ffn   y[t] = w_out ( act(w_in x[t]) * 1/K sum_k topn(w_z z[t,k]) )
    topn_mask    the n largest entries of a row keep their raw value, the others are 0

New to Triton? Read `up_kernel`, line by line: one program of it computes one tile of the output.
The other kernels repeat its steps. STEPS lists, for each step, Triton's function and torch's.
Backends: `triton`; `grouped`, torch (support/cpu.py); `loop`, the oracle (moe.py); `auto` picks by
device. `python kernels.py` checks both layers on this machine; TRITON_INTERPRET=1 runs the kernels
in numpy, on CPU tensors.

Letters: T tokens, D model width, F hidden width of an expert, E experts, K choices (or samples) a
token, N = T*K rows; W rows of w_in per expert: F for gelu, 2F = [gate; up] for swiglu.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import namedtuple
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from support import cpu, ops
from support.ops import activate, kept, sort_by_expert, undo_order

BACKENDS = ("auto", "loop", "grouped", "triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

triton = None  # imported only where it is of use; TRITON_INTERPRET=0 imports it without a GPU
if torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        pass

jit = triton.jit if triton else lambda f: f  # without Triton the kernels below are never called


def tuned(hopper, ampere, single, key):
    """
    Autotune over (BLOCK_N, BLOCK_K, warps, stages): for 2-byte inputs on sm_90 to sm_110; on other
    GPUs, some of which have 100 KB of shared memory; for 4-byte inputs. The first is the favourite.
    None spills registers: tests/test_compile.py.
    """
    def for_this_machine(configs, arguments, **_):
        wanted = hopper if 90 <= gpu_architecture() < 120 else ampere
        if next(iter(arguments.values())).element_size() == 4:
            wanted = single
        return [configs[tiles.index(t)] for t in wanted]

    if not triton:
        return lambda f: f
    if INTERPRETED:
        hopper = ampere = single = [(32, 32, 4, 1)]
    tiles = sorted({*hopper, *ampere, *single})
    configs = [triton.Config({"BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}, num_warps=w, num_stages=s)
               for n, k, w, s in tiles]
    prune = {"early_config_prune": for_this_machine}
    return triton.autotune(configs, key, prune_configs_by=prune, cache_results=True)


def gpu_architecture():
    return 0 if INTERPRETED else triton.runtime.driver.active.get_current_target().arch


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
def tile_of_program(n_tiles, n_blocks, GROUP: tl.constexpr):
    """Program id -> (row tile, column block). GROUP row tiles go over the column blocks together:
    weights are met in L2."""
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
    """fp32 tiles: silu(h) * up, or the tanh form of gelu(h), by tanh(u) = 2 sigmoid(2u) - 1."""
    if SWIGLU:
        return h * tl.sigmoid(h) * up
    return h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))


@jit
def activate_backward_tile(h, up, grad, SWIGLU: tl.constexpr):
    """The activation again, and the gradients of h and up from the gradient of the activation."""
    if SWIGLU:
        s = tl.sigmoid(h)
        return h * s * up, grad * up * s * (1 + h * (1 - s)), grad * h * s
    s = tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    slope = s + h * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * h * h)
    return h * s, grad * slope, grad


@tuned([(128, 64, 8, 3), (64, 64, 8, 4)], [(64, 64, 8, 3), (64, 64, 8, 4)], [(64, 32, 8, 3)],
       key=["D", "F", "BLOCK_M"])
@jit
def up_kernel(
    x, w_in, h_out, act_out,                      # (T, D), (E, W, D), (N, W), (N, F)
    token, tile_expert, tile_row, ends, n_tiles,  # row -> token; tile -> expert, first row; (E,)
    D: tl.constexpr, F: tl.constexpr, SWIGLU: tl.constexpr, SAVE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One program: BLOCK_M rows of one expert x BLOCK_N of its neurons."""
    # 1. Which tile, whose rows? The table has room for the worst case; tiles beyond the last one
    #    carry expert -1.
    tile, block = tile_of_program(n_tiles, tl.cdiv(F, BLOCK_N), GROUP)
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
    act = activate_tile(h, up, SWIGLU).to(act_out.dtype.element_ty)
    tl.store(act_out + first * F + narrow, act, mask=ok)
    if SAVE:
        h_ptr = h_out + first * width + wide
        tl.store(h_ptr, h.to(h_out.dtype.element_ty), mask=ok)
        if SWIGLU:
            tl.store(h_ptr + F, up.to(h_out.dtype.element_ty), mask=ok)


@jit
def product(
    a_ptr, b_ptr, row_ok, col_ok, IN: tl.constexpr, STRIDE: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):
    """Step 3 of up_kernel, for one product: the (BLOCK_M, BLOCK_N) tile of a @ b, in fp32, from the
    pointers of the first tiles; b's rows lie STRIDE apart."""
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((a_ptr.shape[0], b_ptr.shape[1]), tl.float32)
    for start in range(0, IN, BLOCK_K):
        k_ok = k < IN - start
        a = load_tile(a_ptr, row_ok[:, None], k_ok[None, :], IN % BLOCK_K == 0)
        b = load_tile(b_ptr, k_ok[:, None], col_ok[None, :], EVEN)
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
    GATED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):
    """out[slot[n]] = gate[slot[n]] * sum_i a[n, i] w[e, i, :]; strides say which way round w is."""
    tile, block = tile_of_program(n_tiles, tl.cdiv(OUT, BLOCK_N), GROUP)
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
    even: tl.constexpr = IN % BLOCK_K == 0 and OUT % BLOCK_N == 0
    acc = product(a_ptr, b_ptr, row_ok, col < OUT, IN, STRIDE_IN, even, PRECISION, BLOCK_K)
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
    GROUP: tl.constexpr,
):
    """With g = w_out[e]^T dy[token]: dgate = <g, act>, dh = act'(h) (gate * g + dact), and
    gate * act for w_out's gradient."""
    tile, block = tile_of_program(n_tiles, tl.cdiv(F, BLOCK_N), GROUP)
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
    even: tl.constexpr = D % BLOCK_K == 0 and F % BLOCK_N == 0
    acc = product(a_ptr, b_ptr, row_ok, col < F, D, F, even, PRECISION, BLOCK_K)
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
        act, d_h, d_up = activate_backward_tile(h, up, grad, SWIGLU)
        dot += tl.sum(g * act, 1)
        tl.store(gated_act + narrow, (act * gate_row).to(gated_act.dtype.element_ty), mask=ok)
        tl.store(dh + wide, d_h.to(dh.dtype.element_ty), mask=ok)
        if SWIGLU:
            tl.store(dh + wide + F, d_up.to(dh.dtype.element_ty), mask=ok)
    # The blocks' partial sums are added up afterwards, in order.
    tl.store(dgate + block * n_rows + first + line, dot, mask=row_ok)


@tuned([(256, 64, 8, 3), (128, 64, 8, 3)], [(128, 64, 8, 3), (64, 64, 4, 3)], [(64, 32, 8, 3)],
       key=["OUT", "IN"])
@jit
def weight_grad_kernel(
    grad, a, dw, token, ends,             # (., OUT), (., IN), (E, OUT, IN), row -> token (N,), (E,)
    OUT: tl.constexpr, IN: tl.constexpr, GATHER_GRAD: tl.constexpr, GATHER_A: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dw[e] = sum over the rows n of expert e of grad[n]^T a[n]; one is gathered by token."""
    expert = tl.program_id(1)
    o_block, i_block = tile_of_program(tl.cdiv(OUT, BLOCK_M), tl.cdiv(IN, BLOCK_N), GROUP)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    o = o_block * BLOCK_M + tl.arange(0, BLOCK_M)
    i = i_block * BLOCK_N + tl.arange(0, BLOCK_N)
    o_ok, i_ok = o[:, None] < OUT, i[None, :] < IN
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(begin, end, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        row_ok = row < end
        source = tl.load(token + row, mask=row_ok, other=0).to(tl.int64)
        g_row = source if GATHER_GRAD else row.to(tl.int64)
        a_row = source if GATHER_A else row.to(tl.int64)
        g_ptr = grad + (g_row[None, :] * OUT + o[:, None])
        b_ptr = a + (a_row[:, None] * IN + i[None, :])
        g = tl.load(g_ptr, mask=row_ok[None, :] & o_ok, other=0.0)
        b = tl.load(b_ptr, mask=row_ok[:, None] & i_ok, other=0.0)
        acc = tl.dot(g, b, acc, input_precision=PRECISION)
    target = dw + expert.to(tl.int64) * OUT * IN + (o[:, None] * IN + i[None, :])
    tl.store(target, acc.to(dw.dtype.element_ty), mask=o_ok & i_ok)


Tiles = namedtuple("Tiles", "block_m expert row ends n_tiles token slot")


def cut_into_tiles(order, ends, top_k, itemsize):
    """The tile table and index arrays of one layer, int32, on the device; nothing waits for it."""
    n_experts, n_rows = ends.numel(), order.numel()
    usual = triton.next_power_of_2(max(1, n_rows // n_experts))  # rows of an expert, if balanced
    block_m = 32 if INTERPRETED else min(128 if itemsize == 2 else 64, max(16, usual))
    n_tiles = triton.cdiv(n_rows, block_m) + min(n_experts, n_rows)  # a run may leave one unfilled
    counts = ends.diff(prepend=ends.new_zeros(1))
    tiles = (counts + block_m - 1) // block_m  # (E,)
    tile_ends = tiles.cumsum(0)
    tile = torch.arange(n_tiles, device=ends.device)
    expert = torch.searchsorted(tile_ends, tile, right=True)
    e = expert.clamp(max=n_experts - 1)
    row = (ends - counts)[e] + (tile - (tile_ends - tiles)[e]) * block_m
    expert = torch.where(expert < n_experts, expert, -1)
    token, slot = (order // top_k).int(), order.int()
    return Tiles(block_m, expert.int(), row.int(), ends, n_tiles, token, slot)


def precision():
    """fp32 products in full, unless the user asked torch for less."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def launch_down(a, w, gate, tiles, transposed):
    """a (N, IN), w (E, OUT, IN) or, transposed, (E, IN, OUT) -> (N, OUT) in (T, K) order, times
    gate if there is one."""
    (n, width), d = a.shape, w.shape[2] if transposed else w.shape[1]
    out = a.new_empty(n, d)
    down_kernel[lambda meta: (tiles.n_tiles * triton.cdiv(d, meta["BLOCK_N"]),)](
        a, w, out, out if gate is None else gate, tiles.slot, *tiles[1:5],
        IN=width, OUT=d, STRIDE_IN=d if transposed else 1, STRIDE_OUT=1 if transposed else width,
        GATED=gate is not None, PRECISION=precision(), BLOCK_M=tiles.block_m)
    return out


def launch_weight_grad(grad, a, w, tiles, gather_grad):
    dw, (n_experts, rows, columns) = torch.empty_like(w), w.shape
    block_m = 32 if INTERPRETED else 128 if w.element_size() == 2 else 64
    n_blocks = triton.cdiv(rows, block_m)
    weight_grad_kernel[lambda meta: (n_blocks * triton.cdiv(columns, meta["BLOCK_N"]), n_experts)](
        grad, a, dw, tiles.token, tiles.ends, OUT=rows, IN=columns, GATHER_GRAD=gather_grad,
        GATHER_A=not gather_grad, PRECISION=precision(), BLOCK_M=block_m)
    return dw


def sum_choices(out, top_k):
    """out (N, D), one row per choice -> (T, D). A sum in a fixed order, unlike atomic adds."""
    return out if top_k == 1 else out.view(-1, top_k, out.shape[1]).sum(1)


def experts_forward(x, weights, order, ends, w_in, w_out, activation, save, keep):
    n, k, d, f = order.numel(), weights.shape[1], x.shape[1], w_out.shape[2]
    tiles = cut_into_tiles(order, ends, k, x.element_size())
    act, h = x.new_empty(n, f), x.new_empty(n if save else 0, w_in.shape[1])
    up_kernel[lambda meta: (tiles.n_tiles * triton.cdiv(f, meta["BLOCK_N"]),)](
        x, w_in, h, act, tiles.token, *tiles[1:5], D=d, F=f, SWIGLU=activation == "swiglu",
        SAVE=save, PRECISION=precision(), BLOCK_M=tiles.block_m)
    y = sum_choices(launch_down(act, w_out, weights, tiles, transposed=False), k)
    return y, h, undo_order(act, order) if keep else act.new_empty(0, f)


def experts_backward(dy, d_acts, x, weights, order, ends, w_in, w_out, h, activation):
    n, k, d, f = order.numel(), weights.shape[1], x.shape[1], w_out.shape[2]
    tiles = cut_into_tiles(order, ends, k, x.element_size())
    dh, gated_act = torch.empty_like(h), x.new_empty(n, f)
    d_acts = None if d_acts is None else d_acts.index_select(0, order)  # now in expert order
    d_gate = x.new_zeros(triton.cdiv(f, 32), n, dtype=torch.float32)  # no column block is narrower
    act_backward_kernel[lambda meta: (tiles.n_tiles * triton.cdiv(f, meta["BLOCK_N"]),)](
        dy, w_out, h, dh, gated_act, d_gate, weights, h if d_acts is None else d_acts,
        tiles.token, tiles.slot, *tiles[1:5], n, D=d, F=f, SWIGLU=activation == "swiglu",
        HAS_DACT=d_acts is not None, PRECISION=precision(), BLOCK_M=tiles.block_m)
    dw_out = launch_weight_grad(dy, gated_act, w_out, tiles, gather_grad=True)
    del gated_act
    dw_in = launch_weight_grad(dh, x, w_in, tiles, gather_grad=False)
    dx = sum_choices(launch_down(dh, w_in, None, tiles, transposed=True), k)
    d_weights = undo_order(d_gate.sum(0).to(weights.dtype), order).view_as(weights)
    return dx, d_weights, dw_in, dw_out


# ------------------------------------------------------------------------------------------------
# 2. Masked FFN. A mask is two numbers a row, value and cut of support.ops.kept: it is recomputed.


@jit
def row_threshold(s, column, n_keep, F: tl.constexpr, LOW: tl.constexpr):
    """
    s: one row of scores in registers, fp32 -> value and cut of its n_keep largest entries.

    The bits of an fp32 number, read as an integer (negative ones mirrored), are ordered like the
    numbers. So the n-th largest is found by bisection over bits: set a bit, count the row, keep the
    bit if enough entries are as large. The last LOW bits, empty in 16-bit scores, are skipped.
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
    cut = tl.full((), F, tl.int32)
    if tl.sum(tie.to(tl.int32)) > wanted:  # more share the value than may be kept: the first are
        cut = tl.max(tl.where(tie & (tl.cumsum(tie.to(tl.int32)) <= wanted), column, -1))
    return tl.max(tl.where(tie, s, float("-inf"))), cut


@jit
def load_hidden(h, t, column, F: tl.constexpr, SWIGLU: tl.constexpr):
    """Row t of h (T, W), in fp32: gate and up for swiglu, h twice for gelu."""
    row = h + t * (2 * F if SWIGLU else F) + column
    gate = tl.load(row, mask=column < F, other=0.0).to(tl.float32)
    up = tl.load(row + F, mask=column < F, other=0.0).to(tl.float32) if SWIGLU else gate
    return gate, up


@jit
def mask_kernel(
    scores, h, out, value_out, cut_out, n_keep, K,   # (T, K, F), (T, W), (T, F), (T, K), (T, K)
    F: tl.constexpr, ACTIVATION: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr,
):
    """
    out[t] = act(h[t]) * 1/K sum_k topn(scores[t, k]): all in one pass over a row. ACTIVATION "none"
    leaves out act(h), "thresholds" leaves out the output.
    """
    t = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < F
    mask = tl.zeros((BLOCK,), tl.float32)
    for k in range(K):
        row = scores + (t * K + k) * F + column
        s = tl.load(row, mask=inside, other=float("-inf")).to(tl.float32)
        value, cut = row_threshold(s, column, n_keep, F, LOW)
        mask += tl.where(inside & ((s > value) | ((s == value) & (column <= cut))), s, 0.0)
        tl.store(value_out + t * K + k, value)
        tl.store(cut_out + t * K + k, cut)
    mask /= K
    if ACTIVATION == "gelu" or ACTIVATION == "swiglu":
        gate, up = load_hidden(h, t, column, F, ACTIVATION == "swiglu")
        mask *= activate_tile(gate, up, ACTIVATION == "swiglu")
    if ACTIVATION != "thresholds":
        tl.store(out + t * F + column, mask.to(out.dtype.element_ty), mask=inside)


@jit
def mask_backward_kernel(
    du, h, scores, value, cut, u, dh, K,  # (T, F), (T, W), (T, K, F), (T, K) twice; (T, F), (T, W)
    F: tl.constexpr, SWIGLU: tl.constexpr, BLOCK: tl.constexpr,
):
    """The forward's u again, dh and, written over the scores, their gradient: du * act(h) / K where
    an entry was kept."""
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    mask = tl.zeros((BLOCK,), tl.float32)
    for k in range(K):
        place = scores + (t * K + k) * F + column
        s = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        v, c = tl.load(value + t * K + k), tl.load(cut + t * K + k)
        mask += tl.where((s > v) | ((s == v) & (column <= c)), s, 0.0)
    mask /= K
    gate, up = load_hidden(h, t, column, F, SWIGLU)
    g = tl.load(du + t * F + column, mask=inside, other=0.0).to(tl.float32)
    act, d_gate, d_up = activate_backward_tile(gate, up, g * mask, SWIGLU)
    tl.store(u + t * F + column, (act * mask).to(u.dtype.element_ty), mask=inside)
    place = dh + t * (2 * F if SWIGLU else F) + column
    tl.store(place, d_gate.to(dh.dtype.element_ty), mask=inside)
    if SWIGLU:
        tl.store(place + F, d_up.to(dh.dtype.element_ty), mask=inside)
    for k in range(K):
        place = scores + (t * K + k) * F + column
        s = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        v, c = tl.load(value + t * K + k), tl.load(cut + t * K + k)
        d = tl.where((s > v) | ((s == v) & (column <= c)), g * act / K, 0.0)
        tl.store(place, d.to(scores.dtype.element_ty), mask=inside)


def launch_masks(scores, h, out, n_keep, activation):
    """scores (T, K, F), h (T, W) or None, out (T, F) or None -> value (T, K) fp32, cut (T, K)
    int32; fills out."""
    t, k, f = scores.shape
    value = scores.new_empty(t, k, dtype=torch.float32)
    cut = scores.new_empty(t, k, dtype=torch.int32)
    low = {torch.bfloat16: 16, torch.float16: 13}.get(scores.dtype, 0)
    block = triton.next_power_of_2(f)
    h, out = value if h is None else h, value if out is None else out
    mask_kernel[(t,)](
        scores, h, out, value, cut, n_keep, k, F=f, ACTIVATION=activation, LOW=low, BLOCK=block,
        num_warps=min(32, max(4, block // 1024)))
    return value, cut


def thresholds(scores, n_keep):
    value, cut = launch_masks(scores.unsqueeze(1), None, None, n_keep, "thresholds")
    return value.squeeze(1).to(scores.dtype), cut.squeeze(1)


def masks(h, z, w_z, n_keep, activation):
    u = h.new_empty(h.shape[0], w_z.shape[0])
    return u, *launch_masks(F.linear(z, w_z), h, u, n_keep, activation)


def masks_backward(du, h, z, w_z, value, cut, activation):
    (t, k, dz), f = z.shape, w_z.shape[0]
    scores, u, dh = F.linear(z, w_z), torch.empty_like(du), torch.empty_like(h)
    block = min(1024, triton.next_power_of_2(f))
    mask_backward_kernel[(t, triton.cdiv(f, block))](
        du, h, scores, value, cut, u, dh, k, F=f, SWIGLU=activation == "swiglu", BLOCK=block)
    d_scores = scores.view(t * k, f)  # the kernel wrote it there
    return u, dh, (d_scores @ w_z).view_as(z), d_scores.T @ z.view(t * k, dz)


@jit
def decode_kernel(
    x, mask, w_in, w_out_t, partial,      # (T, D), (T, F), (W, D), (F, D), (T, blocks, D)
    D: tl.constexpr, F: tl.constexpr, SWIGLU: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """One token, BLOCK neurons: what they add to y. Rows of neurons that the mask leaves out are
    never read."""
    t, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    neuron = block * BLOCK + tl.arange(0, BLOCK)
    m = tl.load(mask + t * F + neuron, mask=neuron < F, other=0.0)
    d = tl.arange(0, BLOCK_D)
    inside = (m != 0)[:, None] & (d < D)[None, :]
    place = neuron[:, None] * D + d[None, :]
    x_row = tl.load(x + t * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    w = tl.load(w_in + place, mask=inside, other=0.0).to(tl.float32)  # (BLOCK, BLOCK_D)
    h = tl.sum(w * x_row, 1)  # (BLOCK,)
    if SWIGLU:
        w = tl.load(w_in + F * D + place, mask=inside, other=0.0).to(tl.float32)
    u = activate_tile(h, tl.sum(w * x_row, 1), SWIGLU) * m
    out = tl.load(w_out_t + place, mask=inside, other=0.0).to(tl.float32)  # (BLOCK, BLOCK_D)
    y_ptr = partial + (t * tl.num_programs(1) + block) * D + d
    tl.store(y_ptr, tl.sum(out * u[:, None], 0), mask=d < D)


def decode(x, scores, w_in, w_out_t, n_keep, activation):
    (t, _, f), d = scores.shape, x.shape[1]
    mask, blocks = x.new_empty(t, f, dtype=torch.float32), triton.cdiv(f, 8)
    launch_masks(scores, None, mask, n_keep, "none")
    partial = x.new_empty(t, blocks, d, dtype=torch.float32)
    decode_kernel[(t, blocks)](
        x, mask, w_in, w_out_t, partial, D=d, F=f, SWIGLU=activation == "swiglu", BLOCK=8,
        BLOCK_D=triton.next_power_of_2(d), num_warps=8)
    return (partial.sum(1).to(x.dtype),)


# ------------------------------------------------------------------------------------------------
# 3. The dispatcher

STEPS = {  # step: (Triton's function, torch's), with the same arguments and results
    "experts_forward": (experts_forward, cpu.experts_forward),
    "experts_backward": (experts_backward, cpu.experts_backward),
    "masks": (masks, cpu.masks),
    "masks_backward": (masks_backward, cpu.masks_backward),
    "thresholds": (thresholds, cpu.thresholds),
    "decode": (decode, cpu.decode),
}


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
    """A step of STEPS: Triton's for "triton", torch's for "grouped"; "auto" takes Triton's where
    there is a GPU and its first result at this shape is torch's."""
    in_triton, in_torch = STEPS[step]
    if backend == "auto":
        backend = choose_backend(arguments[0])[0]
        if backend == "triton" and not trusted(step, arguments):
            backend = "grouped"
    return in_triton(*arguments) if backend == "triton" else in_torch(*arguments)


_trusted = {}  # (step, device, dtype, shapes) -> whether the kernel's first result was torch's


def trusted(step, arguments):
    """Whether the kernel agreed with torch when it met this shape first; a later call costs one
    look-up. If it did not, or failed, say so once."""
    x, tensors = arguments[0], [a for a in arguments if isinstance(a, Tensor)]
    key = (step, x.device, x.dtype, *(tuple(a.shape[1:]) for a in tensors))
    if key not in _trusted:
        in_triton, in_torch = STEPS[step]
        expected, problem = in_torch(*arguments), None
        try:
            error = max(map(distance, in_triton(*arguments), expected))
            if not error < (0.03 if x.element_size() == 2 else 3e-3):
                problem = f"is off by {error:.1e}"
        except torch.OutOfMemoryError:
            raise
        except Exception as failure:  # of the compiler or the launch: torch can do without
            reason = str(failure).strip().partition("\n")[0]
            problem = f"fails ({type(failure).__name__}: {reason})"
        _trusted[key] = problem is None
        if problem:
            where = f"in {x.dtype} on {x.device}"
            warnings.warn(f"the kernel for {step} {problem} {where}: not used", stacklevel=2)
    return _trusted[key]


def distance(a, b):
    """|a - b| / |b|, summed in float64 without copies (a pool's gradient fills gigabytes); a NaN is
    infinitely far."""
    a, b = (v if v.is_floating_point() else v.double() for v in (a, b))
    norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
    return (norm(a - b) / norm(b).clamp_min(1e-30)).nan_to_num(float("inf")).item()


experts_op = ops.make_experts(
    partial(dispatch, "experts_forward"), partial(dispatch, "experts_backward"))
masked_op = ops.make_masked(
    partial(dispatch, "masks"), partial(dispatch, "masks_backward"), cpu.linear)
thresholds_op = ops.make_thresholds(partial(dispatch, "thresholds"))
decode_op = ops.make_decode(partial(dispatch, "decode"), cpu.transposed)


# ------------------------------------------------------------------------------------------------
# 4. The functions that layers call


def expert_ffn(
    x: Tensor, weights: Tensor, ids: Tensor, w_in: Tensor, w_out: Tensor, activation: str,
    backend: str = "auto", keep_activations: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """
    The experts after routing: y[t] = sum_k weights[t,k] * w_out[e] act(w_in[e] x[t]), e = ids[t,k].

    x (T, D); weights (T, K) gates; ids (T, K) int64, an expert at most once per token; w_in
    (E, F, D) for "gelu", (E, 2F, D) = [gate; up] rows for "swiglu"; w_out (E, D, F). Returns y
    (T, D) and, if keep_activations, activations before gate and w_out (T, K, F), else None.
    Differentiable in x, weights, w_in, w_out; an expert that no token chose gets exact zeros. Under
    autocast it computes in autocast's dtype. Raises ValueError where arguments do not fit.
    """
    t, (e, d, f), wide = x.shape[0], w_out.shape, 2 if activation == "swiglu" else 1
    check(activation, backend, x, (t, d), w_out=(w_out, (e, d, f)), w_in=(w_in, (e, wide * f, d)))
    if ids.dim() != 2 or ids.shape != weights.shape or ids.shape[0] != t:
        shapes = f"ids {tuple(ids.shape)}, weights {tuple(weights.shape)}"
        raise ValueError(f"{shapes}: expected ({t}, K) both, T = {t} as in x")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w_in, w_out = x.to(dtype), w_in.to(dtype), w_out.to(dtype)
    order, ends = sort_by_expert(ids, e)
    save = needs_gradient(x, weights, w_in, w_out)
    x, weights = x.contiguous(), weights.contiguous()
    y, _, acts = experts_op(
        x, weights, order, ends, w_in, w_out, activation, backend, save, keep_activations)
    return y, acts.view(*ids.shape, f) if keep_activations else None


def masked_ffn(
    x: Tensor, z: Tensor, w_in: Tensor, w_out: Tensor, w_z: Tensor, n_keep: int | None,
    activation: str, backend: str = "auto",
) -> Tensor:
    """
    Infinity-MoE's layer (arXiv 2601.17680) with the sum over samples moved inside W_2, exact since
    the masks act after the activation: y = w_out ( act(w_in x) * (1/K) sum_k topn_mask(w_z z_k) ).

    x (T, D); z (T, K, dz); w_in (F, D) for "gelu", (2F, D) = [gate; up] rows for "swiglu"; w_out
    (D, F); w_z (F, dz); n_keep: so many entries of each mask keep their raw value; None keeps all.
    Returns y (T, D). Differentiable in all five tensors. Without gradients, a few tokens (T <= 8)
    read only the active rows and columns of the weights. Under autocast it computes in autocast's
    dtype (scores stay fp32 on a CPU). Raises ValueError where arguments do not fit.
    """
    (t, k, dz), (f, _), d = z.shape, w_z.shape, w_out.shape[0]
    w_in_shape = (2 * f if activation == "swiglu" else f, d)
    check(activation, backend, x, (t, d),
          w_in=(w_in, w_in_shape), w_out=(w_out, (d, f)), w_z=(w_z, (f, dz)))
    if n_keep is not None and not 1 <= n_keep <= f:
        raise ValueError(f"n_keep {n_keep}: expected 1 to {f} (rows of w_z), or None to keep all")
    device, x = x.device.type, x.contiguous()
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    score_dtype = dtype
    if n_keep and not x.is_cuda:
        score_dtype = torch.promote_types(dtype, torch.float32)
    x, z, w_z = x.to(dtype), z.to(score_dtype).contiguous(), w_z.to(score_dtype)
    save = needs_gradient(x, z, w_in, w_out, w_z)
    if n_keep and not save and 1 <= t <= 8:
        idle = (1 - n_keep / f) ** (k if x.is_cuda else t * k)  # the share of weights not read
        if idle > 0.4:
            return decode_op(x, z, w_in, w_out, w_z, n_keep, activation, backend)
    w_in, w_out = w_in.to(dtype), w_out.to(dtype)
    if n_keep is None:  # then the mask is linear in z
        return F.linear(activate(F.linear(x, w_in), activation) * F.linear(z.mean(1), w_z), w_out)
    return masked_op(x, z, w_in, w_out, w_z, n_keep, activation, backend, save)[0]


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
    value, cut = thresholds_op(rows.detach().contiguous(), n_keep, backend)
    return torch.where(kept(rows, value, cut), rows, 0).view(scores.shape)


def needs_gradient(*tensors):
    return torch.is_grad_enabled() and any(a.requires_grad for a in tensors)


def check(activation, backend, x, shape, **parameters):
    """ValueError unless x and every (tensor, shape) of parameters fit together, and the backend can
    work on them."""
    if activation not in ("gelu", "swiglu"):
        raise ValueError(f"activation {activation!r}: expected gelu or swiglu")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: expected one of {', '.join(BACKENDS)}")
    if backend == "loop":
        raise ValueError('backend "loop": call moe.expert_ffn_loop or moe.masked_ffn_loop')
    if tuple(x.shape) != shape:
        raise ValueError(f"x {tuple(x.shape)}: expected {shape}, by w_out")
    any_dtype = torch.is_autocast_enabled(x.device.type)
    for name, (w, expected) in parameters.items():
        if tuple(w.shape) != expected:
            found = f"{name} {tuple(w.shape)}"
            raise ValueError(f"{found}: expected {expected} for {activation}, by the other weights")
        same_dtype = any_dtype or w.dtype == x.dtype or name == "w_z"
        if w.device != x.device or not same_dtype:
            found = f"{name} is {w.dtype} on {w.device}, x {x.dtype} on {x.device}"
            raise ValueError(f"{found}: expected the same (or autocast)")
        if w.dim() == 3 and not w.is_contiguous():
            raise ValueError(f"{name} has strides {w.stride()}: expected contiguous weights")
    if backend == "triton" and not (x.is_cuda or INTERPRETED):
        raise ValueError(f'backend "triton": x is on {x.device}, not on a GPU; use backend "auto"')
    if backend == "triton" and not triton:
        raise ValueError('backend "triton": pip install triton, or use backend "grouped"')
    if backend == "triton" and x.dtype == torch.float64:
        raise ValueError('backend "triton": no float64 in the kernels; use backend "grouped"')


# ------------------------------------------------------------------------------------------------
# 5. python kernels.py: both layers against the tests' loops in float64, on this machine


def main():
    sys.path.insert(0, str(Path(__file__).parent / "tests"))
    sys.modules.setdefault("kernels", sys.modules[__name__])  # what the tests import is this file
    from kernel_helpers import EXPERT_CASES, MASK_CASES, compare_experts, compare_masked
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = "triton" if INTERPRETED else choose_backend(torch.empty(0, device=device))[0]
    machine = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"backend {backend} on {machine}, the largest error of outputs and gradients")
    cases = [("expert_ffn", compare_experts, *case) for case in list(EXPERT_CASES.items())[::2]]
    cases += [("masked_ffn", compare_masked, *case) for case in MASK_CASES.items()]
    failed = 0
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)):
        if INTERPRETED and dtype == torch.bfloat16:
            continue  # the interpreter's bfloat16 arithmetic is wrong
        for function, compare, name, case in cases:
            if compare is compare_masked and dtype != torch.float32 and case[-1] == "normal":
                continue  # rounding would decide which entries are kept
            error = max(compare(case, backend, dtype, device))
            failed += not error <= tolerance
            row = f"{function} {str(dtype)[6:]:8} {error:.1e} <= {tolerance:5}  {name[:48]:48}"
            print(row, "ok" if error <= tolerance else "DISAGREES", flush=True)
    raise SystemExit(f"{failed} disagree" if failed else 0)


if __name__ == "__main__":
    main()
