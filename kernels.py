"""
The expert FFNs, each as reference -> Triton kernel -> torch.library op -> dispatcher. No routers, losses or models here.

    expert_ffn    y[t] = sum_k weights[t,k] * w_out[e] act(w_in[e] x[t]),  e = ids[t,k]          discrete experts
    masked_ffn    y[t] = w_out ( act(w_in x[t]) * 1/K sum_k topn(w_z z[t,k]) )                   continuous experts
    topn_mask     the n largest entries of a row keep their raw value, the others are 0

Letters: T tokens, D model width, F hidden width of an expert, E experts, K choices (or samples) a token, N = T*K rows;
W is the number of rows of w_in per expert: F for gelu, 2F = [gate; up] for swiglu.

Backends: `loop`, the oracle; `grouped`, torch only: grouped_mm on a GPU, one expert after the other elsewhere; `triton`,
the kernels below. `auto` picks by device alone, and compares a kernel's first result at every shape with torch's: one
that disagrees is not used. `python kernels.py` compares every kernel with its float64 reference on this machine.

New to Triton? `up_kernel` is written to be read first, line by line: one program computes one tile of the output.
"""

import functools
import os
import warnings
from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import custom_op
from torch.utils.weak import WeakTensorKeyDictionary

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton, no kernels; everything else works
    triton, tl = None, type("tl", (), {"constexpr": None})

BACKENDS = ("auto", "loop", "grouped", "triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run as numpy, on CPU tensors: tests without a GPU


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
    """rows (N, ...) in expert order -> (N, ...) in token order."""
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return rows.index_select(0, inverse)


def expert_ffn_grouped_mm(x, weights, ids, w_in, w_out, activation, keep_activations=False):
    """One grouped matrix product per weight. grouped_mm's rule: every row is a multiple of 16 bytes."""
    order, ends = sort_by_expert(ids, w_in.shape[0])
    h = F.grouped_mm(x.index_select(0, order // ids.shape[1]), w_in.transpose(1, 2), offs=ends)  # (N, W)
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


def experts_forward(x, weights, order, ends, w_in, w_out, activation, save, keep):
    """One expert after the other, so that on a CPU its rows and weights stay in the cache. -> y, h (N, W), acts (N, F)."""
    n, y = order.numel(), torch.zeros_like(x)
    h, acts = x.new_empty(n if save else 0, w_in.shape[1]), x.new_empty(n if keep else 0, w_out.shape[2])
    for e, rows, token, gate in runs(order, ends, weights):
        h_e = torch.mm(x[token], w_in[e].T, out=h[rows]) if save else x[token] @ w_in[e].T
        act = activate(h_e, activation)
        y.index_add_(0, token, torch.mm(act, w_out[e].T).mul_(gate))
        if keep:
            acts[rows] = act
    return y, h, acts


def experts_backward(dy, d_acts, x, weights, order, ends, w_in, w_out, h, activation):
    """-> gradients of x, weights, w_in, w_out. A product over no rows writes zeros: idle experts need no care."""
    dx, d_gate = torch.zeros_like(x), weights.new_empty(order.numel())
    dw_in, dw_out = torch.empty_like(w_in), torch.empty_like(w_out)
    for e, rows, token, gate in runs(order, ends, weights):
        dy_e = dy[token]
        g = dy_e @ w_out[e]  # (n, F), before the gate
        grad = g * gate.to(g.dtype) if d_acts is None else torch.addcmul(d_acts[rows], g, gate.to(g.dtype))
        act, dh = activate_backward(h[rows], grad, activation)
        d_gate[order[rows]] = torch.linalg.vecdot(g, act).to(d_gate.dtype)
        torch.mm(dy_e.mul_(gate).T, act, out=dw_out[e])
        torch.mm(dh.T, x[token], out=dw_in[e])
        dx.index_add_(0, token, dh @ w_in[e])
    return dx, d_gate.view_as(weights), dw_in, dw_out


# ----------------------------------------------------------------------------------------------------------------------
# 2. Grouped expert FFN in Triton
#
# Assignments are sorted by expert, so every expert owns a run of rows. A run is cut into tiles of BLOCK_M rows; a table,
# made on the device, says of each tile whose it is and where it starts. Four kernels, no atomics:
#   up             h = w_in[e] x[token], act(h)                    gather and activation fused into the GEMM
#   down           out[slot] = gate * (w_out[e] act)               gate and scatter fused; also dx[slot] = w_in[e]^T dh
#   act_backward   g = w_out[e]^T dy[token] -> dh, gate * act      activation recomputed from h; the gate's gradient
#   weight_grad    dw[e] = sum over e's rows of grad^T a           zeros for an expert without rows


def jit(f):
    return triton.jit(f) if triton else f


def tuned(hopper, ampere, single, key):
    """
    Autotune over (BLOCK_N, BLOCK_K, warps, stages): 2-byte inputs on sm_90 and newer, or on sm_80; 4-byte inputs. The
    first of a list is the favourite. None spills registers; tests/test_compile.py holds that for every one.
    """
    def for_this_machine(configs, arguments, **_):
        single_precision = next(iter(arguments.values())).element_size() == 4
        wanted = single if single_precision else hopper if gpu_architecture() >= 90 else ampere
        return configs if INTERPRETED else [configs[tiles.index(w)] for w in wanted]

    if not triton:
        return lambda f: f
    tiles = [(32, 32, 4, 1)] if INTERPRETED else sorted({*hopper, *ampere, *single})
    configs = [triton.Config({"BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}, num_warps=w, num_stages=s) for n, k, w, s in tiles]
    return triton.autotune(configs, key, prune_configs_by={"early_config_prune": for_this_machine}, cache_results=True)


def gpu_architecture():
    return triton.runtime.driver.active.get_current_target().arch


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


@tuned([(128, 64, 8, 3), (64, 64, 8, 4)], [(64, 64, 8, 3), (64, 64, 4, 3)], [(64, 32, 8, 3)], key=["D", "F", "BLOCK_M"])
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
    dy, w_out, h_in, dh, gated_act, dgate, gate, dact,        # (T, D), (E, D, F), (N, W) twice, (N, F), (blocks, N), (N,), (N, F)
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


@tuned([(256, 64, 8, 3), (128, 64, 8, 3)], [(128, 64, 8, 3), (128, 64, 4, 3)], [(64, 32, 8, 3)], key=["OUT", "IN"])
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


def experts_forward_triton(x, weights, order, ends, w_in, w_out, activation, save, keep):
    n, k, d, f = order.numel(), weights.shape[1], x.shape[1], w_out.shape[2]
    tiles = cut_into_tiles(order, ends, k, x.element_size())
    act, h = x.new_empty(n, f), x.new_empty(n if save else 0, w_in.shape[1])
    up_kernel[lambda meta: (tiles.n_tiles * triton.cdiv(f, meta["BLOCK_N"]),)](
        x, w_in, h, act, tiles.token, *tiles[1:5], D=d, F=f, SWIGLU=activation == "swiglu", SAVE=save, PRECISION=precision(),
        BLOCK_M=tiles.block_m)
    return sum_choices(launch_down(act, w_out, weights, tiles, transposed=False), k), h, act if keep else act.new_empty(0, f)


def experts_backward_triton(dy, d_acts, x, weights, order, ends, w_in, w_out, h, activation):
    n, k, d, f = order.numel(), weights.shape[1], x.shape[1], w_out.shape[2]
    tiles = cut_into_tiles(order, ends, k, x.element_size())
    dh, gated_act = torch.empty_like(h), x.new_empty(n, f)
    d_gate = x.new_zeros(triton.cdiv(f, 32), n, dtype=torch.float32)  # a partial sum per column block; none is narrower
    act_backward_kernel[lambda meta: (tiles.n_tiles * triton.cdiv(f, meta["BLOCK_N"]),)](
        dy, w_out, h, dh, gated_act, d_gate, weights, h if d_acts is None else d_acts, tiles.token, tiles.slot, *tiles[1:5], n,
        D=d, F=f, SWIGLU=activation == "swiglu", HAS_DACT=d_acts is not None, PRECISION=precision(), BLOCK_M=tiles.block_m)
    dw_out = launch_weight_grad(dy, gated_act, w_out, tiles, gather_grad=True)
    del gated_act
    dw_in = launch_weight_grad(dh, x, w_in, tiles, gather_grad=False)
    dx = sum_choices(launch_down(dh, w_in, None, tiles, transposed=True), k)
    return dx, torch.empty_like(weights).view(-1).scatter_(0, order, d_gate.sum(0).to(weights.dtype)).view_as(weights), dw_in, dw_out


# ----------------------------------------------------------------------------------------------------------------------
# 3. Choosing a backend, and the op: autograd and torch.compile see one node


def choose_backend(x):
    """What `auto` means for x, by device and dtype alone, never by timing: (backend, reason)."""
    if not x.is_cuda:
        return "grouped", "no GPU: one expert after the other, each in the cache"
    if not triton or torch.cuda.get_device_capability(x.device) < (8, 0):
        return "grouped", "no Triton, or a GPU older than sm_80"
    return ("grouped", "the kernels do not speak float64") if x.dtype == torch.float64 else ("triton", "fused kernels")


_agrees = {}  # (kernel, device, dtype, shape) -> whether the kernel's first result was torch's


def run(kernel, reference, backend, *arguments):
    """kernel(*arguments) for "triton", and for "auto" where its first result at this shape agrees with the reference's."""
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    x = tensors[0]
    if backend == "triton":
        return kernel(*arguments)
    if backend != "auto" or choose_backend(x)[0] != "triton":
        return reference(*arguments)
    key = (kernel.__name__, x.device, x.dtype, *(tuple(a.shape[1:]) for a in tensors))
    if key not in _agrees:
        error = max(map(distance, kernel(*arguments), reference(*arguments)))
        _agrees[key] = error < (0.03 if x.element_size() == 2 else 3e-3)
        if not _agrees[key]:
            warnings.warn(f"{kernel.__name__} is off by {error:.1e} in {x.dtype} on {x.device}: not used", stacklevel=2)
    return (kernel if _agrees[key] else reference)(*arguments)


def distance(a, b):
    """|a - b| / |b| in float64; a NaN counts as infinitely far."""
    error = (a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)
    return error.nan_to_num(float("inf")).item()


@custom_op("nanoexperts::experts", mutates_args=())
def experts_op(x: Tensor, weights: Tensor, order: Tensor, ends: Tensor, w_in: Tensor, w_out: Tensor, activation: str,
               backend: str, save: bool, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-> y (T, D); pre-activations (N, W) if save, else (0, W); activations (N, F) if keep, else (0, F); in expert order."""
    return run(experts_forward_triton, experts_forward, backend, x, weights, order, ends, w_in, w_out, activation, save, keep)


@custom_op("nanoexperts::experts_backward", mutates_args=())
def experts_backward_op(dy: Tensor, d_acts: Tensor | None, x: Tensor, weights: Tensor, order: Tensor, ends: Tensor, w_in: Tensor,
                        w_out: Tensor, h: Tensor, activation: str, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return run(experts_backward_triton, experts_backward, backend, dy, d_acts, x, weights, order, ends, w_in, w_out, h, activation)


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
    if backend == "grouped" and x.is_cuda and x.dtype == torch.bfloat16 and d % 8 == 0 and f % 8 == 0:
        return expert_ffn_grouped_mm(x, weights, ids, w_in, w_out, activation, keep_activations)
    order, ends = sort_by_expert(ids, e)
    save = torch.is_grad_enabled() and any(a.requires_grad for a in (x, weights, w_in, w_out))
    y, _, acts = experts_op(x.contiguous(), weights.contiguous(), order, ends, w_in, w_out, activation, backend, save,
                            keep_activations)
    return y, undo_order(acts, order).view(*ids.shape, -1) if keep_activations else None


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
    if backend == "triton" and not triton:
        raise ValueError('backend "triton": Triton is not installed (pip install triton); backend "grouped" needs none')
    if backend == "triton" and not (x.is_cuda or INTERPRETED):
        raise ValueError(f'backend "triton": x is on {x.device}, not on a GPU; use backend "auto"')
    if backend == "triton" and x.dtype == torch.float64:
        raise ValueError('backend "triton": the kernels do not speak float64; use backend "loop"')


# ----------------------------------------------------------------------------------------------------------------------
# 4. Masks: exactly the n largest of a row. A row's choice fits in two numbers: a value and, among entries equal to it, the
# last column kept. The backward pass recomputes scores from z and needs no more than these: no mask is ever stored.


def kept(scores, value, cut):
    """scores (..., F), value (...), cut (...) -> bool (..., F): above the value, or equal to it and not beyond the cut."""
    value, column = value.unsqueeze(-1), torch.arange(scores.shape[-1], device=scores.device)
    return (scores > value) | ((scores == value) & (column <= cut.unsqueeze(-1)))


def thresholds_reference(scores, n_keep):
    """scores (R, F) -> value (R,), cut (R,) int32: what `kept` needs to keep the n_keep largest, ties to the lowest column."""
    value = scores.kthvalue(scores.shape[-1] - n_keep + 1, dim=-1, keepdim=True).values
    tie = scores == value
    wanted = n_keep - (scores > value).sum(-1, keepdim=True)  # so many of the ties are kept
    last = (tie & (tie.cumsum(-1, dtype=torch.int32) == wanted)).to(torch.uint8).argmax(-1)
    cut = torch.where(tie.sum(-1) > wanted.squeeze(-1), last, scores.shape[-1])
    return value.squeeze(-1), cut.to(torch.int32)


def fused(f):
    """f through torch.compile for large CPU inputs; plain f, said once, where that fails (no C++ compiler)."""
    compiled = None

    @functools.wraps(f)
    def call(first, *others):
        nonlocal compiled
        if first.is_cuda or first.numel() < 2**20 or compiled is f:
            return f(first, *others)
        compiled = compiled or torch.compile(f, dynamic=True)
        try:
            return compiled(first, *others)
        except Exception as error:  # whatever a missing or broken compiler raises; all outputs are written again
            warnings.warn(f"torch.compile cannot build {f.__name__} ({type(error).__name__}): slower masks on this CPU", stacklevel=2)
            compiled = f
            return f(first, *others)
    return call


@fused
def count_at_least(scores, level):
    return (scores >= level.unsqueeze(-1)).sum(-1, dtype=torch.int32)


def thresholds(scores, n_keep, steps=14):
    """
    thresholds_reference in fewer looks at the scores (R, F). n_low >= n_keep entries are at least `low`, n_high < n_keep
    at least `high`; interpolating the counts, or every third time halving, closes in on the level that n_keep reach.
    The few rows still open after `steps` (ties among them) go to the reference.
    """
    if scores.is_cuda or scores.numel() < 2**20:
        return thresholds_reference(scores, n_keep)
    low, high = scores.amin(-1), scores.amax(-1)  # (R,)
    n_low, n_high = torch.full_like(low, scores.shape[-1]), torch.zeros_like(low)
    for step in range(steps):
        share = 0.5 if step % 3 == 2 else ((n_keep - n_high) / (n_low - n_high)).clamp(0.02, 0.98)
        level = high - (high - low) * share
        n = count_at_least(scores, level).to(level.dtype)
        enough = n >= n_keep
        low, n_low = torch.where(enough, level, low), torch.where(enough, n, n_low)
        high, n_high = torch.where(enough, high, level), torch.where(enough, n_high, n)
    cut = torch.full_like(low, scores.shape[-1], dtype=torch.int32)
    still_open = (n_low != n_keep).nonzero().squeeze(-1)
    low[still_open], cut[still_open] = thresholds_reference(scores[still_open], n_keep)
    return low, cut


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


@custom_op("nanoexperts::thresholds", mutates_args=())
def thresholds_op(scores: Tensor, n_keep: int, backend: str) -> tuple[Tensor, Tensor]:
    """scores (R, F) -> value (R,) in their dtype, cut (R,) int32."""
    def kernel(scores):
        value, cut = launch_masks(scores.unsqueeze(1), None, None, n_keep, "thresholds")
        return value.squeeze(1).to(scores.dtype), cut.squeeze(1)
    return run(kernel, lambda scores: thresholds(scores, n_keep), backend, scores)


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
# 5. Masked FFN: the oracle; forward and backward in torch and around the kernels; decoding; the op


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
    size = -(-n_tokens // max(1, -(-n_tokens * numbers_per_token // 2**21)))
    return [slice(i, i + size) for i in range(0, n_tokens, size)]


def masked_forward(x, z, w_in, w_out, w_z, n_keep, activation, save):
    """-> y (T, D); pre-activations h (T, W) if save, else (0, W); value, cut (T, K)."""
    h, (t, k), f = x @ w_in.T, z.shape[:2], w_z.shape[0]
    u, value, cut = h.new_empty(t, f), z.new_empty(t, k), z.new_empty(t, k, dtype=torch.int32)
    for rows in token_chunks(t, k * f):
        scores = F.linear(z[rows], w_z)  # (chunk, K, F)
        chunk_value, chunk_cut = thresholds(scores.view(-1, f), n_keep)
        value[rows], cut[rows] = chunk_value.view(-1, k), chunk_cut.view(-1, k)
        mask_and_activate(scores, h[rows], value[rows], cut[rows], u[rows], activation)
    return u @ w_out.T, h if save else h.new_empty(0, h.shape[1]), at_least_fp32(value), cut


def masked_backward(dy, x, z, w_in, w_out, w_z, h, value, cut, activation):
    du, dh, dz, dw_z = dy @ w_out, torch.empty_like(h), torch.empty_like(z), torch.zeros_like(w_z)
    for rows in token_chunks(x.shape[0], z.shape[1] * w_z.shape[0]):
        scores = F.linear(z[rows], w_z)  # (chunk, K, F)
        mask_backward(scores, h[rows], value[rows].to(z.dtype), cut[rows], du[rows], dh[rows], activation)
        dz[rows] = scores @ w_z
        dw_z.addmm_(scores.flatten(0, 1).T, z[rows].flatten(0, 1))
    return dh @ w_in, dz, dh.T @ x, dy.T @ du, dw_z


def masked_forward_triton(x, z, w_in, w_out, w_z, n_keep, activation, save):
    h, u = x @ w_in.T, x.new_empty(x.shape[0], w_z.shape[0])
    value, cut = launch_masks(F.linear(z, w_z), h, u, n_keep, activation)
    return u @ w_out.T, h if save else h.new_empty(0, h.shape[1]), value, cut


def masked_backward_triton(dy, x, z, w_in, w_out, w_z, h, value, cut, activation):
    du, scores, dh, (t, k), f = dy @ w_out, F.linear(z, w_z), torch.empty_like(h), z.shape[:2], w_z.shape[0]
    u, block = torch.empty_like(du), min(1024, triton.next_power_of_2(f))
    mask_backward_kernel[(t, triton.cdiv(f, block))](du, h, scores, value, cut, u, dh, k, F=f, SWIGLU=activation == "swiglu",
                                                     BLOCK=block)
    scores = scores.view(t * k, f)  # now their gradient
    return dh @ w_in, (scores @ w_z).view_as(z), dh.T @ x, dy.T @ u, scores.T @ z.view(t * k, -1)


def at_least_fp32(a):
    return a.to(torch.promote_types(a.dtype, torch.float32))


@custom_op("nanoexperts::masked", mutates_args=())
def masked_op(x: Tensor, z: Tensor, w_in: Tensor, w_out: Tensor, w_z: Tensor, n_keep: int, activation: str, backend: str,
              save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return run(masked_forward_triton, masked_forward, backend, x, z, w_in, w_out, w_z, n_keep, activation, save)


@custom_op("nanoexperts::masked_backward", mutates_args=())
def masked_backward_op(dy: Tensor, x: Tensor, z: Tensor, w_in: Tensor, w_out: Tensor, w_z: Tensor, h: Tensor, value: Tensor,
                       cut: Tensor, activation: str, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return run(masked_backward_triton, masked_backward, backend, dy, x, z, w_in, w_out, w_z, h, value, cut, activation)


@masked_op.register_fake
def _(x, z, w_in, w_out, w_z, n_keep, activation, backend, save):
    h, value = x.new_empty(x.shape[0] if save else 0, w_in.shape[0]), at_least_fp32(z.new_empty(z.shape[:2]))
    return torch.empty_like(x), h, value, value.to(torch.int32)


@masked_backward_op.register_fake
def _(dy, x, z, w_in, w_out, w_z, h, value, cut, activation, backend):
    return tuple(torch.empty_like(a) for a in (x, z, w_in, w_out, w_z))


def _masked_setup(ctx, inputs, output):
    *tensors, _, ctx.activation, ctx.backend, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])


def _masked_autograd(ctx, dy, *_):
    return *masked_backward_op(dy.contiguous(), *ctx.saved_tensors, ctx.activation, ctx.backend), None, None, None, None


masked_op.register_autograd(_masked_autograd, setup_context=_masked_setup)


# Decoding: few tokens, so time is reading weights. Only the rows of w_in and columns of w_out that a mask keeps are read.

_transposed = WeakTensorKeyDictionary()


def transposed(w):
    """w (D, F) -> w.T contiguous, so that a column is one read. Kept while w lives and nobody writes to it."""
    if w.T.is_contiguous() or w.is_inference():
        return w.T.contiguous()
    state = (w._version, w.data_ptr())
    if w not in _transposed or _transposed[w][0] != state:
        _transposed[w] = state, w.T.contiguous()
    return _transposed[w][1]


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


def decode_triton(x, scores, w_in, w_out, n_keep, activation):
    (t, _, f), d = scores.shape, x.shape[1]
    mask, blocks = x.new_empty(t, f, dtype=torch.float32), triton.cdiv(f, 8)
    launch_masks(scores, None, mask, n_keep, "none")
    partial = x.new_empty(t, blocks, d, dtype=torch.float32)
    decode_kernel[(t, blocks)](x, mask, w_in, transposed(w_out), partial, D=d, F=f, SWIGLU=activation == "swiglu", BLOCK=8,
                               BLOCK_D=triton.next_power_of_2(d))
    return (partial.sum(1).to(x.dtype),)


def decode(x, scores, w_in, w_out, n_keep, activation):
    t, k, f = scores.shape
    value, cut = thresholds(scores.view(t * k, f), n_keep)
    mask = torch.where(kept(scores, value.view(t, k), cut.view(t, k)), scores, 0).mean(1).to(x.dtype)  # (T, F)
    active = mask.any(0).nonzero().squeeze(1)
    rows = w_in.view(-1, f, x.shape[1]).index_select(1, active).flatten(0, 1).to(x.dtype)  # gate rows, then up rows
    u = activate(x @ rows.T, activation) * mask.index_select(1, active)
    return (u @ transposed(w_out).index_select(0, active).to(x.dtype),)


@custom_op("nanoexperts::decode", mutates_args=())
def decode_op(x: Tensor, z: Tensor, w_in: Tensor, w_out: Tensor, w_z: Tensor, n_keep: int, activation: str, backend: str) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return run(decode_triton, decode, backend, x, F.linear(z.to(w_z.dtype), w_z), w_in, w_out, n_keep, activation)[0]


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
    if n_keep and not save and backend != "loop" and t <= 8 and (1 - n_keep / f) ** (k if x.is_cuda else t * k) > 0.4:
        return decode_op(x, z, w_in, w_out, w_z, n_keep, activation, backend)
    w_in, w_out = w_in.to(dtype), w_out.to(dtype)
    if n_keep is None:  # then the mask is linear in z
        return F.linear(activate(F.linear(x, w_in), activation) * F.linear(z.mean(1), w_z), w_out)
    if backend == "loop":
        return masked_ffn_loop(x, z, w_in, w_out, w_z, n_keep, activation)
    return masked_op(x, z, w_in, w_out, w_z, n_keep, activation, backend, save)[0]
