"""
The Triton kernels of infinity-MoE's masks, and what all kernels share: the import of Triton, how
they are tuned, and the activations. Read kernels.py first; the letters are its own.

A mask is two numbers a row, value and cut of support.ops.kept: never stored, always recomputed.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

triton = tl = None  # imported only where it is of use; TRITON_INTERPRET=0 imports it without a GPU
if torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        pass

jit = triton.jit if triton else lambda f: f  # without Triton the kernels below are never called


def tuned(hopper, others, single, key):
    """
    Autotune over (BLOCK_N, BLOCK_K, warps, stages): for 2-byte inputs on sm_90 to sm_110; on other
    GPUs, some of which have 100 KB of shared memory; for 4-byte inputs. The first is the favourite.
    None spills registers: tests/test_compile.py.
    """
    def for_this_machine(configs, arguments, **_):
        architecture = triton.runtime.driver.active.get_current_target().arch
        wanted = hopper if 90 <= architecture < 120 else others
        if next(iter(arguments.values())).element_size() == 4:
            wanted = single
        return [configs[tiles.index(t)] for t in wanted]

    if not triton:
        return lambda f: f
    tiles = [(32, 32, 4, 1)] if INTERPRETED else sorted({*hopper, *others, *single})
    configs = [triton.Config({"BLOCK_N": n, "BLOCK_K": k}, num_warps=w, num_stages=s)
               for n, k, w, s in tiles]
    prune = {"early_config_prune": for_this_machine}
    return triton.autotune(configs, key, prune_configs_by=prune, cache_results=True)


@jit
def act_tile(h, up, SWIGLU: tl.constexpr):
    """fp32 tiles: silu(h) * up, or the tanh form of gelu(h), by tanh(u) = 2 sigmoid(2u) - 1."""
    if SWIGLU:
        return h * tl.sigmoid(h) * up
    return h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))


@jit
def act_backward_tile(h, up, grad, SWIGLU: tl.constexpr):
    """The activation again, and the gradients of h and up from the gradient of the activation."""
    if SWIGLU:
        s = tl.sigmoid(h)
        return h * s * up, grad * up * s * (1 + h * (1 - s)), grad * h * s
    s = tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    slope = s + h * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * h * h)
    return h * s, grad * slope, grad


@jit
def load_hidden(h, t, column, F: tl.constexpr, SWIGLU: tl.constexpr):
    """Row t of h (T, W), in fp32: gate and up for swiglu, h twice for gelu."""
    row = h + t * (2 * F if SWIGLU else F) + column
    gate = tl.load(row, mask=column < F, other=0.0).to(tl.float32)
    up = tl.load(row + F, mask=column < F, other=0.0).to(tl.float32) if SWIGLU else gate
    return gate, up


@jit
def row_threshold(s, column, n_keep, F: tl.constexpr, LOW: tl.constexpr):
    """
    s: one row of scores in registers, fp32 -> value and cut of its n_keep largest entries.

    The bits of an fp32 number, read as an integer (negative ones mirrored), are ordered like the
    numbers. So the n-th largest is found by its digits, two bits at a time: the largest digit that
    as many entries reach. Counts of a row, three for a digit, share the bits of one sum, because a
    sum over the block is what takes the time. The last LOW bits, empty in 16-bit scores, are left
    out.
    """
    key = tl.where(s == 0, 0.0, s).to(tl.int32, bitcast=True)  # -0.0 is 0.0
    key = (key ^ ((key >> 31) & 0x7FFFFFFF)) >> LOW
    level = tl.full((), -(1 << (31 - LOW)), tl.int32)
    for i in range((32 - LOW) // 2):
        step = tl.full((), 1, tl.int32) << (30 - LOW - 2 * i)
        one, two, three = level + step, level + step + step, level + step + step + step
        counts = tl.sum(count(key >= one, 0) + count(key >= two, 1) + count(key >= three, 2))
        for place in tl.static_range(3):
            level += tl.where(counted(counts, place) >= n_keep, step, 0)
    tie = key == level
    counts = tl.sum(count(key > level, 0) + count(tie, 1))
    wanted = n_keep - counted(counts, 0)
    cut = tl.full((), F, tl.int32)
    if counted(counts, 1) > wanted:  # more share the value than may be kept: the first are
        cut = tl.max(tl.where(tie & (tl.cumsum(tie.to(tl.int32)) <= wanted), column, -1))
    bits = level << LOW
    value = bits ^ ((bits >> 31) & (0x7FFFFFFF >> LOW << LOW))
    return value.to(tl.float32, bitcast=True), cut


@jit
def count(condition, place: tl.constexpr):
    """1 where it holds, in one of three places of 21 bits."""
    return condition.to(tl.int64) << (21 * place)


@jit
def counted(counts, place: tl.constexpr):
    return (counts >> (21 * place)) & 0x1FFFFF


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
    for i in range(t * K, t * K + K):
        s = tl.load(scores + i * F + column, mask=inside, other=float("-inf")).to(tl.float32)
        value, cut = row_threshold(s, column, n_keep, F, LOW)
        mask += tl.where(inside & ((s > value) | ((s == value) & (column <= cut))), s, 0.0)
        tl.store(value_out + i, value)
        tl.store(cut_out + i, cut)
    mask /= K
    if ACTIVATION == "gelu" or ACTIVATION == "swiglu":
        gate, up = load_hidden(h, t, column, F, ACTIVATION == "swiglu")
        mask *= act_tile(gate, up, ACTIVATION == "swiglu")
    if ACTIVATION != "thresholds":
        tl.store(out + t * F + column, mask.to(out.dtype.element_ty), mask=inside)


@jit
def load_scores(scores, value, cut, i, column, F: tl.constexpr):
    """Row i of scores (T * K, F), in fp32, and which of its entries are kept."""
    s = tl.load(scores + i * F + column, mask=column < F, other=0.0).to(tl.float32)
    v = tl.load(value + i)
    return s, (s > v) | ((s == v) & (column <= tl.load(cut + i)))


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
    for i in range(t * K, t * K + K):
        s, keep = load_scores(scores, value, cut, i, column, F)
        mask += tl.where(keep, s, 0.0)
    mask /= K
    gate, up = load_hidden(h, t, column, F, SWIGLU)
    g = tl.load(du + t * F + column, mask=inside, other=0.0).to(tl.float32)
    act, d_gate, d_up = act_backward_tile(gate, up, g * mask, SWIGLU)
    tl.store(u + t * F + column, (act * mask).to(u.dtype.element_ty), mask=inside)
    place = dh + t * (2 * F if SWIGLU else F) + column
    tl.store(place, d_gate.to(dh.dtype.element_ty), mask=inside)
    if SWIGLU:
        tl.store(place + F, d_up.to(dh.dtype.element_ty), mask=inside)
    for i in range(t * K, t * K + K):
        s, keep = load_scores(scores, value, cut, i, column, F)
        d = tl.where(keep, g * act / K, 0.0)
        tl.store(scores + i * F + column, d.to(scores.dtype.element_ty), mask=inside)


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
    u = act_tile(h, tl.sum(w * x_row, 1), SWIGLU) * m
    out = tl.load(w_out_t + place, mask=inside, other=0.0).to(tl.float32)  # (BLOCK, BLOCK_D)
    y_ptr = partial + (t * tl.num_programs(1) + block) * D + d
    tl.store(y_ptr, tl.sum(out * u[:, None], 0), mask=d < D)


# ------------------------------------------------------------------------------------------------
# The steps: each has a twin of the same name in support/cpu.py.


def launch_masks(scores, h, out, n_keep, activation):
    """scores (T, K, F), h (T, W) or None, out (T, F) or None -> value (T, K) fp32, cut (T, K)
    int32; fills out."""
    t, k, f = scores.shape
    value = scores.new_empty(t, k, dtype=torch.float32)
    cut = scores.new_empty(t, k, dtype=torch.int32)
    low = {torch.bfloat16: 16, torch.float16: 12}.get(scores.dtype, 0)
    block = triton.next_power_of_2(f)
    mask_kernel[(t,)](
        scores, value if h is None else h, value if out is None else out, value, cut, n_keep, k,
        F=f, ACTIVATION=activation, LOW=low, BLOCK=block,
        num_warps=min(32, max(4, block // 512)))
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


def decode(x, scores, w_in, w_out_t, n_keep, activation):
    (t, _, f), d = scores.shape, x.shape[1]
    mask, blocks = x.new_empty(t, f, dtype=torch.float32), triton.cdiv(f, 8)
    launch_masks(scores, None, mask, n_keep, "none")
    partial = x.new_empty(t, blocks, d, dtype=torch.float32)
    decode_kernel[(t, blocks)](
        x, mask, w_in, w_out_t, partial, D=d, F=f, SWIGLU=activation == "swiglu", BLOCK=8,
        BLOCK_D=triton.next_power_of_2(d), num_warps=8)
    return (partial.sum(1).to(x.dtype),)
