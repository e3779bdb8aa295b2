"""
The experts in plain torch: what kernels.py runs without a GPU, and compares its kernels with.

Correct on any device; what is done for speed is done for CPUs, each trick with what it gained.
Letters are those of support/ops.py: T, D, F, E, K, N = T*K rows, W rows of w_in per expert.
"""

import functools
import math
import os
import sys
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from support.ops import activate, activate_backward, kept, merge_layers, undo_order

# ------------------------------------------------------------------------------------------------
# 1. The process: memory pages, and what may be compiled


def prepare_process():
    """For scripts, before their first tensor: huge pages for large CPU tensors, where programs may
    ask for them. A fresh 200 MB gradient costs 800 page faults instead of 49,000."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


_compile = {"allowed": False, "announced": False}


def allow_compile(allowed: bool) -> None:
    """Whether `fused` functions may go through torch.compile: at first not (it takes seconds to a
    minute), and a trainer that compiles its model says yes."""
    _compile["allowed"] = allowed


def worth_compiling(x):
    return _compile["allowed"] and x.device.type == "cpu" and x.numel() >= 2**19


def fused(f):
    """f, and for large CPU inputs a compiled f, one pass over memory instead of one per operation:
    3 to 4 times as fast. If compiling fails (no C++ compiler), warn once and run eagerly."""
    compiled = None

    @functools.wraps(f)
    def call(first, *others):
        nonlocal compiled
        if not worth_compiling(first) or compiled is f:
            return f(first, *others)
        if not _compile["announced"]:
            _compile["announced"] = True
            print("compiling the experts' elementwise functions for this CPU: up to a minute, once;"
                  " --compile=false does without", file=sys.stderr, flush=True)
        compiled = compiled or torch.compile(f, dynamic=True)
        try:
            return compiled(first, *others)
        except Exception as error:  # a missing or broken compiler: nothing has run yet
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            problem = f"torch.compile cannot build {f.__name__} ({type(error).__name__})"
            warnings.warn(f"{problem}: slower on this CPU", stacklevel=2)
            compiled = f
            return f(first, *others)

    return call


# ------------------------------------------------------------------------------------------------
# 2. Grouped experts: all in one grouped_mm, or one expert after the other


def at_once(x, w_in, w_out, order):
    """
    Whether one grouped_mm per weight serves all experts: in bf16 on a GPU, and on a CPU while an
    expert has at most 2^16 pre-activations (256 KB in fp32). Larger experts go one after the other,
    so that rows and weights stay in the cache: 1.3 times as fast for F=1024, but 2 to 4 times as
    slow for F=128 and 32. grouped_mm's rules: no float64, rows of a multiple of 16 bytes.
    """
    if x.dtype == torch.float64 or any(n * x.element_size() % 16 for n in w_out.shape[1:]):
        return False
    if x.is_cuda:
        return x.dtype == torch.bfloat16
    return order.numel() * w_in.shape[1] <= 2**16 * w_in.shape[0]


def sum_choices(rows, order, top_k):
    """rows (N, D) in expert order -> (T, D), in a fixed order, unlike index_add_ on a GPU."""
    place = torch.empty_like(order)  # of an assignment among the rows
    place[order] = torch.arange(len(order), device=order.device)
    rows = rows.index_select(0, place)
    return rows if top_k == 1 else rows.view(-1, top_k, rows.shape[1]).sum(1)


def experts_forward(x, weights, w_in, w_out, order, ends, activation, save, keep):
    """The forward step of support.ops.make_experts."""
    if not at_once(x, w_in, w_out, order):
        return forward_one_by_one(x, weights, w_in, w_out, order, ends, activation, save, keep)
    token, gate = order // weights.shape[1], weights.reshape(-1)[order, None]
    h = F.grouped_mm(x.index_select(0, token), w_in.transpose(1, 2), offs=ends)  # (N, W)
    act = activate(h, activation)
    y = F.grouped_mm(act, w_out.transpose(1, 2), offs=ends) * gate.to(x.dtype)  # (N, D)
    acts = undo_order(act, order) if keep else act.new_empty(0, act.shape[1])
    return sum_choices(y, order, weights.shape[1]), h if save else h.new_empty(0, h.shape[1]), acts


def experts_backward(dy, d_acts, x, weights, w_in, w_out, order, ends, h, activation):
    """The backward step: of x and gates, and the factors of the weights' gradients."""
    if not at_once(x, w_in, w_out, order):
        return backward_one_by_one(
            dy, d_acts, x, weights, w_in, w_out, order, ends, h, activation)
    gate = weights.reshape(-1)[order, None].to(x.dtype)  # (N, 1)
    g = F.grouped_mm(dy.index_select(0, order // weights.shape[1]), w_out, offs=ends)  # (N, F)
    act, dh, d_gate = torch.empty_like(g), torch.empty_like(h), weights.new_empty(order.numel())
    d_acts = None if d_acts is None else d_acts.index_select(0, order)
    found = activate_backward_into(h, g, gate, d_acts, act, dh, activation)
    d_gate[order] = found.to(d_gate.dtype)
    dx = sum_choices(F.grouped_mm(dh, w_in, offs=ends), order, weights.shape[1])
    return dx, d_gate.view_as(weights), act, dh


def weight_grads(xs, dys, acts, dhs, tokens, all_ends, w_in, w_out):
    """
    dw_out[e] = sum of dy^T act, dw_in[e] = sum of dh^T x, over e's rows in all layers of the lists.
    A product over no rows writes zeros: idle experts need no care.
    """
    if len(xs) > 1 or not at_once(xs[0], w_in, w_out, tokens[0]):
        return weight_grads_one_by_one(xs, dys, acts, dhs, tokens, all_ends, w_in, w_out)
    token, ends = tokens[0], all_ends[0]
    dw_out = F.grouped_mm(dys[0].index_select(0, token).T, acts[0], offs=ends)
    dw_in = F.grouped_mm(dhs[0].T, xs[0].index_select(0, token), offs=ends)
    if w_in.is_cuda:  # some GPUs leave what no row reaches unwritten (pytorch issue 172439)
        idle = (ends.diff(prepend=ends.new_zeros(1)) == 0)[:, None, None]
        dw_in.masked_fill_(idle, 0)
        dw_out.masked_fill_(idle, 0)
    return dw_in.to(w_in.dtype), dw_out.to(w_out.dtype)


@functools.cache
def onednn_beats_mkl():
    """In fp32 on AMD, where MKL leaves AVX-512 alone: 1.6 to 2.3 times as fast from 128 rows of 256
    numbers on, little for smaller ones. On Intel MKL is ahead, by 1.05 to 1.7."""
    try:
        with open("/proc/cpuinfo") as f:
            return torch.backends.mkldnn.is_available() and "AuthenticAMD" in f.read()
    except OSError:
        return False


def through_onednn(a):
    """Whether a's products go there; it refuses those of no rows."""
    fp32_on_cpu = a.device.type == "cpu" and a.dtype == torch.float32
    return fp32_on_cpu and a.numel() > 0 and onednn_beats_mkl()


def linear(a, w, out=None):
    """a @ w.T without autograd, through the faster library; in `out`, where it takes one."""
    if not through_onednn(a):
        return torch.mm(a, w.T, out=out)
    return torch.ops.mkldnn._linear_pointwise(a, w, None, "none", [], "")


def padded(n):
    """n rounded up: oneDNN compiles a kernel for each shape (4 ms), so let there be few: a training
    step in bf16 takes 1.4 s instead of 3.3 s."""
    step = 16 if n <= 512 else 64
    return -(-n // step) * step


def buffers(like, longest, *widths):
    """Uninitialised (rows, width) scratch tensors, reused expert by expert; rows is a power of two
    that the longest run fits. Sizes that follow the routing fragment the heap: 2.6 s a step."""
    rows = max(64, 1 << (longest - 1).bit_length())
    return [like.new_empty(rows, width) for width in widths]


def rows_of(ends):
    """ends (E,) -> rows of each expert, a list."""
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


def expert_slices(order, ends, weights):
    """For every expert: its number, its slice of the sorted rows, their tokens, gates (n, 1)."""
    begin = 0
    for e, end in enumerate(ends.tolist()):
        slots = order[begin:end]
        yield e, slice(begin, end), slots // weights.shape[1], weights.reshape(-1)[slots, None]
        begin = end


@fused
def activate_into(h, out, activation):
    out.copy_(activate(h, activation))


@fused
def activate_backward_into(h, g, gate, d_act, gated_act, dh, activation):
    """g (n, F), the gradient before the gate -> gate * act and dh, in place; of the gate (n,)."""
    grad = g * gate if d_act is None else torch.addcmul(d_act, g, gate)
    activate_backward(h, grad, activation, gated_act, dh)
    d_gate = torch.linalg.vecdot(g, gated_act)
    gated_act.mul_(gate)
    return d_gate


def forward_one_by_one(x, weights, w_in, w_out, order, ends, activation, save, keep):
    n, (d, f), wide = order.numel(), w_out.shape[1:], w_in.shape[1]
    y = torch.zeros_like(x)
    h, acts = x.new_empty(n if save else 0, wide), x.new_empty(n if keep else 0, f)
    x_e, h_e, act, y_e = buffers(x, max(rows_of(ends)), d, wide, f, d)
    for e, rows, token, gate in expert_slices(order, ends, weights):
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


def backward_one_by_one(dy, d_acts, x, weights, w_in, w_out, order, ends, h, activation):
    d, f = w_out.shape[1:]
    dx, d_gate = torch.zeros_like(x), weights.new_empty(order.numel())
    act, dh = x.new_empty(order.numel(), f), torch.empty_like(h)
    dx_e, dy_e, g, dh_e = buffers(x, max(rows_of(ends)), d, d, f, h.shape[1])
    for e, rows, token, gate in expert_slices(order, ends, weights):
        m, r, slots = len(token), padded(len(token)), order[rows]
        torch.index_select(dy, 0, token, out=dy_e[:m])
        d_act = None if d_acts is None else d_acts.index_select(0, slots)
        before_gate, gate = linear(dy_e[:r], w_out[e].T, g[:r])[:m], gate.to(g.dtype)
        found = activate_backward_into(
            h[rows], before_gate, gate, d_act, act[rows], dh_e[:m], activation)
        d_gate[slots] = found.to(d_gate.dtype)
        dh[rows] = dh_e[:m]
        dx.index_add_(0, token, linear(dh_e[:r], w_in[e].T, dx_e[:r])[:m])
    return dx, d_gate.view_as(weights), act, dh


def weight_grads_one_by_one(xs, dys, acts, dhs, tokens, all_ends, w_in, w_out):
    """An expert's rows of all layers in one product, gathered to where they stay in the cache."""
    counts, (d, f) = [rows_of(ends) for ends in all_ends], w_out.shape[1:]
    totals = [sum(c) for c in zip(*counts)]
    token = merge_layers(tokens, all_ends, map(len, xs))[1][:sum(totals)].split(totals)
    act, dh = (zip(*(rows[:sum(c)].split(c) for rows, c in zip(layers, counts)))
               for layers in (acts, dhs))  # a layer that no gradient reached counts no rows
    x, dy, dw_in, dw_out = torch.cat(xs), torch.cat(dys), *map(torch.empty_like, (w_in, w_out))
    buffer = buffers(x, max(totals), d, f, w_in.shape[1], d)
    experts = zip(totals, token, act, dh, dw_out.unbind(0), dw_in.unbind(0))
    for m, token_e, act_e, dh_e, *dw_e in experts:
        rows = [b[:m] for b in buffer]
        torch.index_select(dy, 0, token_e, out=rows[0])
        torch.cat(act_e, out=rows[1])
        torch.cat(dh_e, out=rows[2])
        torch.index_select(x, 0, token_e, out=rows[3])
        if x.dtype == torch.bfloat16 or through_onednn(x):  # few shapes; it sums over zeros
            rows = [b[:padded(m)] for b in buffer]
            for b in rows:
                b[m:] = 0
        for a, b, dw in zip(rows[::2], rows[1::2], dw_e):
            product = linear(a.T, b.T, dw if dw.dtype == a.dtype else None)
            if product is not dw:
                dw.copy_(product)
    return dw_in, dw_out


# ------------------------------------------------------------------------------------------------
# 3. Masks: exactly the n largest entries of a row, and the masked FFN


def thresholds(scores, n_keep):
    """scores (R, F) -> value (R,), cut (R,) int32: what `kept` needs to keep the n_keep largest,
    ties to the lowest column.

    numpy's partition finds the value by vector instructions, 11 to 15 times as fast as kthvalue.
    """
    width, last = scores.shape[-1], scores.shape[-1] - n_keep
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        value = np.partition(scores.numpy(), last, axis=-1)[:, last, None].copy()  # (R, 1)
        any_tie = np.count_nonzero(scores.numpy() >= value) > n_keep * len(scores)
        value = torch.from_numpy(value)
    else:
        value, any_tie = scores.kthvalue(last + 1, dim=-1, keepdim=True).values, True  # unknown
    cut = torch.full(scores.shape[:-1], width, dtype=torch.int32, device=scores.device)
    if any_tie:
        tie = scores == value
        wanted = n_keep - (scores > value).sum(-1, keepdim=True)  # so many of them are kept
        last = tie & (tie.cumsum(-1, dtype=torch.int32) == wanted)
        last = last.to(torch.uint8).argmax(-1).to(torch.int32)
        cut = torch.where(tie.sum(-1) > wanted.squeeze(-1), last, cut)
    return value.squeeze(-1), cut


# The masked FFN, a chunk of tokens at a time


def any_ties(cut, width):
    """Not asked on a GPU, which would have to wait for the answer."""
    return cut.device.type != "cpu" or bool((cut < width).any())


def ones_where_kept(scores, value, cut, ties):
    """`kept` as 1.0 or 0.0: a product with them takes a fifth of a torch.where's time."""
    if ties:
        return kept(scores, value, cut).to(scores.dtype)
    return scores.clone().ge_(value.unsqueeze(-1))


@fused
def mask_and_activate(scores, h, value, cut, ties, out, activation):
    """scores (T, K, F), h (T, W) -> act(h) * mean_k mask (T, F), into out."""
    mask = scores * ones_where_kept(scores, value, cut, ties)
    out.copy_(activate(h, activation) * mask.mean(1))


@fused
def mask_backward(scores, h, value, cut, ties, du, dh, activation):
    """du (T, F) -> the forward's u, in its place; dh (T, W); returns d scores (T, K, F)."""
    ones = ones_where_kept(scores, value, cut, ties)
    mask, act = (scores * ones).mean(1), torch.empty_like(du)
    activate_backward(h, (du * mask).to(h.dtype), activation, act, dh)
    d_mask = (du * act).div_(scores.shape[1])
    du.copy_(act * mask)
    return ones.mul_(d_mask.unsqueeze(1))


def token_chunks(n_tokens, numbers_per_token):
    """Slices of about equal size. What runs operation by operation should stay in a core's own
    cache (512 KB; backward pass of 2048 x 2 x 256 scores: 11 ms instead of 28), what is compiled
    goes through memory once and wants long loops."""
    n_chunks = max(1, -(-n_tokens * numbers_per_token // 2 ** (21 if _compile["allowed"] else 17)))
    size = max(1, -(-n_tokens // n_chunks))
    return [slice(i, i + size) for i in range(0, n_tokens, size)]


def masks(h, z, w_z, n_keep, activation):
    """The forward step of support.ops.make_masked."""
    (t, k), f = z.shape[:2], w_z.shape[0]
    u, cut = h.new_empty(t, f), z.new_empty(t, k, dtype=torch.int32)
    value = z.new_empty(t, k, dtype=torch.promote_types(z.dtype, torch.float32))
    for rows in token_chunks(t, k * f):
        scores = linear(z[rows].flatten(0, 1), w_z)  # (chunk * K, F)
        chunk_value, chunk_cut = thresholds(scores, n_keep)
        value[rows], cut[rows] = chunk_value.view(-1, k), chunk_cut.view(-1, k)
        ties = any_ties(chunk_cut, f)
        scores = scores.view(-1, k, f)
        mask_and_activate(scores, h[rows], value[rows], cut[rows], ties, u[rows], activation)
    return u, value, cut


def masks_backward(du, h, z, w_z, value, cut, activation):
    """Its backward step; the scores are computed again."""
    (k, dz_width), f = z.shape[1:], w_z.shape[0]
    u, dh, dz = du.clone(), torch.empty_like(h), torch.empty_like(z)
    dw_z_t = w_z.new_zeros(dz_width, f)
    for rows in token_chunks(len(z), k * f):
        z_rows = z[rows].flatten(0, 1)  # (chunk * K, dz)
        scores = linear(z_rows, w_z).view(-1, k, f)
        ties = any_ties(cut[rows], f)
        d_scores = mask_backward(
            scores, h[rows], value[rows], cut[rows], ties, u[rows], dh[rows], activation)
        d_scores = d_scores.flatten(0, 1)  # (chunk * K, F)
        dz[rows] = linear(d_scores, w_z.T).view(-1, k, dz_width)
        dw_z_t += linear(z_rows.T, d_scores.T)  # the transposed one takes a third of the time
    return u, dh, dz, dw_z_t.T.contiguous()


# ------------------------------------------------------------------------------------------------
# 4. Decoding reads only the rows of w_in and columns of w_out that a mask keeps: 3.1 -> 0.74 ms

_transposed = WeakTensorKeyDictionary()


def transposed(w):
    """w (D, F) -> w.T contiguous, so that a column is one read. Kept while w lives unchanged."""
    if w.T.is_contiguous() or w.is_inference():
        return w.T.contiguous()
    state = (w._version, w.data_ptr())
    if w not in _transposed or _transposed[w][0] != state:
        _transposed[w] = state, w.T.contiguous()
    return _transposed[w][1]


@functools.cache
def hear_beta_warning():
    """torch says once that its sparse CSR tensors are in beta: here, where nobody listens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.eye(1).to_sparse_csr()


def decode(x, scores, w_in, w_out_t, n_keep, activation):
    """x (T, D), scores (T, K, F), w_in (W, D), w_out_t (F, D) -> y (T, D), in a tuple."""
    t, k, f = scores.shape
    value, cut = thresholds(scores.view(t * k, f), n_keep)
    mask = torch.where(kept(scores, value.view(t, k), cut.view(t, k)), scores, 0).mean(1)  # (T, F)
    if x.device.type != "cpu" or w_in.dtype not in (torch.float32, torch.float64):
        u = activate(x @ w_in.to(x.dtype).T, activation) * mask.to(x.dtype)  # no sampled products
        return (u @ w_out_t.to(x.dtype),)
    hear_beta_warning()
    active, rows = mask.to(w_in.dtype).to_sparse_csr(), x.to(w_in.dtype)
    column, m = active.col_indices(), active.values()  # (active,)
    if t == 1:  # a row is a thread's: deal the row's neurons out to as many rows as threads
        parts = torch.get_num_threads()
        begins = torch.arange(parts + 1) * len(m) // parts
        active = torch.sparse_csr_tensor(begins, column, m, (parts, f), check_invariants=False)
        rows = rows.expand(parts, -1).contiguous()
    h = [torch.sparse.sampled_addmm(active, rows, w.T, beta=0).values() for w in w_in.split(f)]
    u = activate(torch.cat(h), activation) * m  # (active,); h was gate and up, or h
    starts = active.crow_indices()[:-1]
    y = F.embedding_bag(column, w_out_t, starts, mode="sum", per_sample_weights=u)
    return ((y if t > 1 else y.sum(0, keepdim=True)).to(x.dtype),)


# ------------------------------------------------------------------------------------------------
# 5. Attention


def prefers_plain_attention(q):
    """In bf16 torch's fused attention takes twice as long backward, where scores (S, S) fit."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < q.shape[2] <= 512


def plain_attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v, each query seeing the keys up to its own: (B, H, S, d).

    Without autocast, which would have softmax keep its result in fp32: twice the memory traffic.
    """
    k, v = k.to(q.dtype), v.to(q.dtype)  # from a cache they come in its dtype
    with torch.autocast(q.device.type, enabled=False):
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-1, -2)  # (B, H, S, S)
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v
