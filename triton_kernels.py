"""
The Triton kernels behind kernels.py. Every public function here has a twin of the same name and arguments there, in
torch: that one says what is computed, this one how to compute it fast on a GPU (sm_80 and newer).

New to Triton? Read `up_kernel` first, line by line: one program of it computes one tile of the output. The other kernels
repeat its steps. Letters are those of kernels.py: T tokens, D model width, F hidden width, E experts, K choices a token,
N = T*K rows, W rows of w_in per expert (F for gelu, 2F = [gate; up] for swiglu).

TRITON_INTERPRET=1 runs the kernels as numpy on CPU tensors: how tests check them without a GPU (in fp32 and fp16).
"""

import os
from collections import namedtuple

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton, no kernels: kernels.py does without
    triton, tl = None, type("tl", (), {"constexpr": None})

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def jit(f):
    return triton.jit(f) if triton else f


def tuned(hopper, ampere, single, key):
    """
    Autotune over (BLOCK_N, BLOCK_K, warps, stages): 2-byte inputs on sm_90 and newer, or on sm_80; 4-byte inputs. The
    first of a list is the favourite. None spills registers; tests/test_compile.py holds that for every one.
    """
    def for_this_machine(configs, arguments, **_):
        if INTERPRETED:
            return configs
        if next(iter(arguments.values())).element_size() == 4:
            return [configs[tiles.index(t)] for t in single]
        return [configs[tiles.index(t)] for t in (hopper if gpu_architecture() >= 90 else ampere)]

    if not triton:
        return lambda f: f
    tiles = [(32, 32, 4, 1)] if INTERPRETED else sorted({*hopper, *ampere, *single})
    configs = [triton.Config({"BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}, num_warps=w, num_stages=s) for n, k, w, s in tiles]
    return triton.autotune(configs, key, prune_configs_by={"early_config_prune": for_this_machine}, cache_results=True)


def gpu_architecture():
    return triton.runtime.driver.active.get_current_target().arch


# ----------------------------------------------------------------------------------------------------------------------
# 1. Grouped expert FFN
#
# Assignments are sorted by expert, so every expert owns a run of rows. A run is cut into tiles of BLOCK_M rows; a table,
# made on the device, says of each tile whose it is and where it starts. Four kernels, no atomics:
#   up             h = w_in[e] x[token], act(h)                    gather and activation fused into the GEMM
#   down           out[slot] = gate * (w_out[e] act)               gate and scatter fused; also dx[slot] = w_in[e]^T dh
#   act_backward   g = w_out[e]^T dy[token] -> dh, gate * act      activation recomputed from h; the gate's gradient
#   weight_grad    dw[e] = sum over e's rows of grad^T a           zeros for an expert without rows


@jit
def tile_of_program(n_tiles, n_blocks, GROUP: tl.constexpr):
    """Program id -> (row tile, column block). GROUP row tiles go over the column blocks together: weights are met in L2."""
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


@tuned([(128, 64, 8, 3), (64, 64, 8, 4)], [(64, 64, 8, 3), (64, 64, 8, 4)], [(64, 32, 8, 3)], key=["D", "F", "BLOCK_M"])
@jit
def up_kernel(
    x, w_in, h_out, act_out,                                  # (T, D), (E, W, D), (N, W), (N, F)
    token, tile_expert, tile_row, ends, n_tiles,              # row -> token (N,); tile -> expert, first row; (E,)
    D: tl.constexpr, F: tl.constexpr, SWIGLU: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):
    """One program: BLOCK_M rows of one expert x BLOCK_N of its neurons."""
    # 1. Which tile, whose rows? The table has room for the worst case; tiles beyond the last one carry expert -1.
    tile, block = tile_of_program(n_tiles, tl.cdiv(F, BLOCK_N), GROUP)
    expert = tl.load(tile_expert + tile).to(tl.int64)
    if expert < 0:
        return
    first = tl.load(tile_row + tile).to(tl.int64)
    line = tl.arange(0, BLOCK_M)
    row_ok = first + line < tl.load(ends + expert)
    source = tl.load(token + first + line, mask=row_ok, other=0).to(tl.int64)  # the gather: these rows of x
    # 2. Pointers to the first (BLOCK_M, BLOCK_K) tile of x[source] and the first (BLOCK_K, BLOCK_N) tile of w_in[e]^T.
    k = tl.arange(0, BLOCK_K)
    col = block * BLOCK_N + tl.arange(0, BLOCK_N)
    width: tl.constexpr = 2 * F if SWIGLU else F
    even: tl.constexpr = D % BLOCK_K == 0 and F % BLOCK_N == 0
    a_ptr = x + (source[:, None] * D + k[None, :])
    b_ptr = w_in + expert * width * D + (col[None, :] * D + k[:, None])
    # 3. Walk along D, accumulate in fp32. swiglu takes two products of the same x: gate rows, and up rows F further on.
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
    tl.store(act_out + first * F + narrow, activate_tile(h, up, SWIGLU).to(act_out.dtype.element_ty), mask=ok)
    if SAVE:
        tl.store(h_out + first * width + wide, h.to(h_out.dtype.element_ty), mask=ok)
        if SWIGLU:
            tl.store(h_out + first * width + F + wide, up.to(h_out.dtype.element_ty), mask=ok)


@tuned([(256, 64, 8, 3), (128, 64, 8, 3)], [(128, 64, 8, 3), (128, 64, 4, 3)], [(64, 32, 8, 3)], key=["IN", "OUT", "BLOCK_M"])
@jit
def down_kernel(
    a, w, out, gate,                                          # (N, IN), a matrix per expert, (N, OUT), (N,)
    slot, tile_expert, tile_row, ends, n_tiles,               # row -> place in (T, K) order; the tile table
    IN: tl.constexpr, OUT: tl.constexpr, STRIDE_IN: tl.constexpr, STRIDE_OUT: tl.constexpr, GATED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):
    """out[slot[n]] = gate[slot[n]] * sum_i a[n, i] w[e, i, :]. Strides of w are given, so it works either way round."""
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
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, IN, BLOCK_K):
        k_ok = k < IN - start
        a_tile = load_tile(a_ptr, row_ok[:, None], k_ok[None, :], IN % BLOCK_K == 0)
        b_tile = load_tile(b_ptr, k_ok[:, None], col[None, :] < OUT, IN % BLOCK_K == 0 and OUT % BLOCK_N == 0)
        acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
        a_ptr += BLOCK_K
        b_ptr += BLOCK_K * STRIDE_IN
    target = tl.load(slot + first + line, mask=row_ok, other=0).to(tl.int64)  # the scatter: every slot is written once
    if GATED:
        acc *= tl.load(gate + target, mask=row_ok, other=0.0).to(tl.float32)[:, None]
    ok = row_ok[:, None] & (col[None, :] < OUT)
    tl.store(out + (target[:, None] * OUT + col[None, :]), acc.to(out.dtype.element_ty), mask=ok)


@jit
def halves(tile, M: tl.constexpr, N: tl.constexpr):
    """A tile (M, N) -> its left and right halves."""
    return tl.split(tl.permute(tl.reshape(tile, (M, 2, N // 2)), (0, 2, 1)))


@tuned([(128, 64, 8, 3), (64, 64, 4, 3)], [(128, 64, 8, 3), (64, 64, 4, 3)], [(64, 32, 8, 3)], key=["D", "F", "BLOCK_M"])
@jit
def act_backward_kernel(
    dy, w_out, h_in, dh, gated_act, dgate, gate, dact,        # (T, D), (E, D, F), (N, W), (N, W), (N, F), (., N), (N,), (N, F)
    token, slot, tile_expert, tile_row, ends, n_tiles, n_rows,
    D: tl.constexpr, F: tl.constexpr, SWIGLU: tl.constexpr, HAS_DACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):
    """With g = w_out[e]^T dy[token]: dgate = <g, act>, dh = act'(h) (gate * g + dact), and gate * act for w_out's gradient."""
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
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        k_ok = k < D - start
        a = load_tile(a_ptr, row_ok[:, None], k_ok[None, :], D % BLOCK_K == 0)
        b = load_tile(b_ptr, k_ok[:, None], col[None, :] < F, D % BLOCK_K == 0 and F % BLOCK_N == 0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_ptr += BLOCK_K
        b_ptr += BLOCK_K * F
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
    tl.store(dgate + block * n_rows + first + line, dot, mask=row_ok)  # blocks are summed afterwards, in order


@tuned([(256, 64, 8, 3), (128, 64, 8, 3)], [(128, 64, 8, 3), (64, 64, 4, 3)], [(64, 32, 8, 3)], key=["OUT", "IN"])
@jit
def weight_grad_kernel(
    grad, a, dw, token, ends,                                 # (., OUT), (., IN), (E, OUT, IN), row -> token (N,), (E,)
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
        source = tl.load(token + row, mask=row_ok, other=0).to(tl.int64)
        g_row = source if GATHER_GRAD else row.to(tl.int64)
        a_row = source if GATHER_A else row.to(tl.int64)
        g = tl.load(grad + (g_row[None, :] * OUT + o[:, None]), mask=row_ok[None, :] & (o[:, None] < OUT), other=0.0)
        b = tl.load(a + (a_row[:, None] * IN + i[None, :]), mask=row_ok[:, None] & (i[None, :] < IN), other=0.0)
        acc = tl.dot(g, b, acc, input_precision=PRECISION)
    target = dw + expert.to(tl.int64) * OUT * IN + (o[:, None] * IN + i[None, :])
    tl.store(target, acc.to(dw.dtype.element_ty), mask=(o[:, None] < OUT) & (i[None, :] < IN))


Tiles = namedtuple("Tiles", "block_m expert row ends n_tiles token slot")


def cut_into_tiles(order, ends, top_k, itemsize):
    """The tile table and index arrays of one layer, int32, on the device; nothing here waits for the GPU."""
    n_experts, n_rows = ends.numel(), order.numel()
    usual = triton.next_power_of_2(max(1, n_rows // n_experts))  # rows of an expert, if they were balanced
    block_m = 32 if INTERPRETED else min(128 if itemsize == 2 else 64, max(16, usual))
    n_tiles = triton.cdiv(n_rows, block_m) + min(n_experts, n_rows)  # every run may leave one tile unfilled
    counts = ends.diff(prepend=ends.new_zeros(1))
    tiles = (counts + block_m - 1) // block_m  # (E,)
    tile_ends = tiles.cumsum(0)
    tile = torch.arange(n_tiles, device=ends.device)
    expert = torch.searchsorted(tile_ends, tile, right=True)
    e = expert.clamp(max=n_experts - 1)
    row = (ends - counts)[e] + (tile - (tile_ends - tiles)[e]) * block_m
    expert = torch.where(expert < n_experts, expert, -1)
    return Tiles(block_m, expert.int(), row.int(), ends, n_tiles, (order // top_k).int(), order.int())


def precision():
    """fp32 products in full, unless the user asked torch for less."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def launch_down(a, w, gate, tiles, transposed):
    """a (N, IN), w (E, OUT, IN) or, transposed, (E, IN, OUT) -> (N, OUT) in (T, K) order, times gate if there is one."""
    (n, width), d = a.shape, w.shape[2] if transposed else w.shape[1]
    out = a.new_empty(n, d)
    grid = lambda meta: (tiles.n_tiles * triton.cdiv(d, meta["BLOCK_N"]),)
    down_kernel[grid](a, w, out, out if gate is None else gate, tiles.slot, *tiles[1:5], IN=width, OUT=d,
                      STRIDE_IN=d if transposed else 1, STRIDE_OUT=1 if transposed else width, GATED=gate is not None,
                      PRECISION=precision(), BLOCK_M=tiles.block_m)
    return out


def launch_weight_grad(grad, a, w, tiles, gather_grad):
    dw, (n_experts, rows, columns) = torch.empty_like(w), w.shape
    block_m = 32 if INTERPRETED else 128 if w.element_size() == 2 else 64
    grid = lambda meta: (triton.cdiv(rows, block_m) * triton.cdiv(columns, meta["BLOCK_N"]), n_experts)
    weight_grad_kernel[grid](grad, a, dw, tiles.token, tiles.ends, OUT=rows, IN=columns, GATHER_GRAD=gather_grad,
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
        x, w_in, h, act, tiles.token, *tiles[1:5], D=d, F=f, SWIGLU=activation == "swiglu", SAVE=save, PRECISION=precision(),
        BLOCK_M=tiles.block_m)
    y = sum_choices(launch_down(act, w_out, weights, tiles, transposed=False), k)
    return y, h, torch.empty_like(act).index_copy_(0, order, act) if keep else act.new_empty(0, f)


def experts_backward(dy, d_acts, x, weights, order, ends, w_in, w_out, h, activation):
    n, k, d, f = order.numel(), weights.shape[1], x.shape[1], w_out.shape[2]
    tiles = cut_into_tiles(order, ends, k, x.element_size())
    dh, gated_act = torch.empty_like(h), x.new_empty(n, f)
    d_acts = None if d_acts is None else d_acts.index_select(0, order)  # from token order, as it was given, to expert order
    d_gate = x.new_zeros(triton.cdiv(f, 32), n, dtype=torch.float32)  # a partial sum per column block; none is narrower
    act_backward_kernel[lambda meta: (tiles.n_tiles * triton.cdiv(f, meta["BLOCK_N"]),)](
        dy, w_out, h, dh, gated_act, d_gate, weights, h if d_acts is None else d_acts, tiles.token, tiles.slot, *tiles[1:5], n,
        D=d, F=f, SWIGLU=activation == "swiglu", HAS_DACT=d_acts is not None, PRECISION=precision(), BLOCK_M=tiles.block_m)
    dw_out = launch_weight_grad(dy, gated_act, w_out, tiles, gather_grad=True)
    del gated_act
    dw_in = launch_weight_grad(dh, x, w_in, tiles, gather_grad=False)
    dx = sum_choices(launch_down(dh, w_in, None, tiles, transposed=True), k)
    d_weights = torch.empty_like(weights).view(-1).scatter_(0, order, d_gate.sum(0).to(weights.dtype)).view_as(weights)
    return dx, d_weights, dw_in, dw_out


# ----------------------------------------------------------------------------------------------------------------------
# 2. Masked FFN. A mask is two numbers a row, the value and the cut of kernels.py's `kept`: it is recomputed, not stored.


@jit
def row_threshold(s, column, n_keep, F: tl.constexpr, LOW: tl.constexpr):
    """
    s: one row of scores in registers, fp32 -> value and cut of its n_keep largest entries.

    The bits of an fp32 number, read as an integer (negative ones mirrored), are ordered like the numbers. So the n-th
    largest is found by bisection over bits: set a bit, count the row, keep the bit if enough entries are as large.
    The last LOW bits are empty in scores that were 16-bit numbers, and are skipped.
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
    if tl.sum(tie.to(tl.int32)) > wanted:  # more entries share the value than may be kept: the first ones are
        cut = tl.max(tl.where(tie & (tl.cumsum(tie.to(tl.int32)) <= wanted), column, -1))
    return tl.max(tl.where(tie, s, float("-inf"))), cut


@jit
def mask_kernel(
    scores, h, out, value_out, cut_out, n_keep, K,            # (T, K, F), (T, W), (T, F), (T, K), (T, K)
    F: tl.constexpr, ACTIVATION: tl.constexpr, LOW: tl.constexpr, BLOCK: tl.constexpr,
):
    """
    out[t] = act(h[t]) * 1/K sum_k topn(scores[t, k]): selection, sum, activation and product in one pass over a row.
    ACTIVATION "none" leaves out act(h), "thresholds" leaves out the output.
    """
    t = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < F
    mask = tl.zeros((BLOCK,), tl.float32)
    for k in range(K):
        s = tl.load(scores + (t * K + k) * F + column, mask=inside, other=float("-inf")).to(tl.float32)
        value, cut = row_threshold(s, column, n_keep, F, LOW)
        mask += tl.where(inside & ((s > value) | ((s == value) & (column <= cut))), s, 0.0)
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
    du, h, scores, value, cut, u, dh, K,                      # (T, F), (T, W), (T, K, F), (T, K) twice; u (T, F), dh (T, W)
    F: tl.constexpr, SWIGLU: tl.constexpr, BLOCK: tl.constexpr,
):
    """The forward's u again, dh and, written over the scores, their gradient: du * act(h) / K where an entry was kept."""
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    mask = tl.zeros((BLOCK,), tl.float32)
    for k in range(K):
        s = tl.load(scores + (t * K + k) * F + column, mask=inside, other=0.0).to(tl.float32)
        v, c = tl.load(value + t * K + k), tl.load(cut + t * K + k)
        mask += tl.where((s > v) | ((s == v) & (column <= c)), s, 0.0)
    mask /= K
    width: tl.constexpr = 2 * F if SWIGLU else F
    gate = tl.load(h + t * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(h + t * width + F + column, mask=inside, other=0.0).to(tl.float32) if SWIGLU else gate
    g = tl.load(du + t * F + column, mask=inside, other=0.0).to(tl.float32)
    act, d_gate, d_up = activate_backward_tile(gate, up, g * mask, SWIGLU)
    tl.store(u + t * F + column, (act * mask).to(u.dtype.element_ty), mask=inside)
    tl.store(dh + t * width + column, d_gate.to(dh.dtype.element_ty), mask=inside)
    if SWIGLU:
        tl.store(dh + t * width + F + column, d_up.to(dh.dtype.element_ty), mask=inside)
    for k in range(K):
        place = scores + (t * K + k) * F + column
        s = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        v, c = tl.load(value + t * K + k), tl.load(cut + t * K + k)
        d = tl.where((s > v) | ((s == v) & (column <= c)), g * act / K, 0.0)
        tl.store(place, d.to(scores.dtype.element_ty), mask=inside)


def launch_masks(scores, h, out, n_keep, activation):
    """scores (T, K, F), h (T, W) or None, out (T, F) or None -> value (T, K) fp32, cut (T, K) int32; fills out."""
    t, k, f = scores.shape
    value, cut = scores.new_empty(t, k, dtype=torch.float32), scores.new_empty(t, k, dtype=torch.int32)
    low = {torch.bfloat16: 16, torch.float16: 13}.get(scores.dtype, 0)
    block = triton.next_power_of_2(f)
    mask_kernel[(t,)](scores, value if h is None else h, value if out is None else out, value, cut, n_keep, k, F=f,
                      ACTIVATION=activation, LOW=low, BLOCK=block, num_warps=min(32, max(4, block // 1024)))
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
    x, mask, w_in, w_out_t, partial,                          # (T, D), (T, F), (W, D), (F, D), (T, blocks, D)
    D: tl.constexpr, F: tl.constexpr, SWIGLU: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """One token, BLOCK neurons: what they add to y. Rows of neurons that the mask leaves out are never read."""
    t, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    neuron = block * BLOCK + tl.arange(0, BLOCK)
    m = tl.load(mask + t * F + neuron, mask=neuron < F, other=0.0)
    d = tl.arange(0, BLOCK_D)
    inside = (m != 0)[:, None] & (d < D)[None, :]
    place = neuron[:, None] * D + d[None, :]
    x_row = tl.load(x + t * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    h = tl.sum(tl.load(w_in + place, mask=inside, other=0.0).to(tl.float32) * x_row, 1)  # (BLOCK,)
    up = tl.sum(tl.load(w_in + F * D + place, mask=inside, other=0.0).to(tl.float32) * x_row, 1) if SWIGLU else h
    u = activate_tile(h, up, SWIGLU) * m
    y = tl.sum(tl.load(w_out_t + place, mask=inside, other=0.0).to(tl.float32) * u[:, None], 0)  # (BLOCK_D,)
    tl.store(partial + (t * tl.num_programs(1) + block) * D + d, y, mask=d < D)


def decode(x, scores, w_in, w_out_t, n_keep, activation):
    (t, _, f), d = scores.shape, x.shape[1]
    mask, blocks = x.new_empty(t, f, dtype=torch.float32), triton.cdiv(f, 8)
    launch_masks(scores, None, mask, n_keep, "none")
    partial = x.new_empty(t, blocks, d, dtype=torch.float32)
    decode_kernel[(t, blocks)](x, mask, w_in, w_out_t, partial, D=d, F=f, SWIGLU=activation == "swiglu", BLOCK=8,
                               BLOCK_D=triton.next_power_of_2(d), num_warps=8)
    return (partial.sum(1).to(x.dtype),)
