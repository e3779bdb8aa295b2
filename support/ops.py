"""
What all implementations of the expert FFNs share: small functions, and the operators.

An operator (torch.library) is one node to autograd and torch.compile, whatever runs inside. This
file knows no implementation: it is given the steps to run, step(backend, *arguments) -> a tuple of
tensors. kernels.py passes its dispatcher.

Letters: T tokens, D model width, F hidden width of an expert, E experts, K choices (or samples) a
token, N = T*K rows; W is the number of rows of w_in per expert: F for gelu, 2F for swiglu.
"""

import itertools

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


def activate_backward(h, grad, activation, act, dh):
    """Into act: activate(h) again; into dh: the gradient of h from grad, that of activate(h).

    Eager code writes where the results belong: 1.1 ms instead of 1.9 at 2048 rows of 128.
    """
    aten, traced = torch.ops.aten, torch.compiler.is_compiling()
    if activation == "gelu":
        aten.gelu.out(h, approximate="tanh", out=act)
        return aten.gelu_backward.grad_input(grad, h, approximate="tanh", grad_input=dh)
    (gate, up), (d_gate, d_up) = h.chunk(2, dim=-1), dh.chunk(2, dim=-1)
    s = F.silu(gate)
    if traced:  # one loop without writes to parts of tensors is the faster one
        act.copy_(s * up)
        return dh.copy_(torch.cat([aten.silu_backward(grad * up, gate), grad * s], dim=-1))
    torch.mul(s, up, out=act)
    torch.mul(grad, s, out=d_up)
    return aten.silu_backward.grad_input(s.copy_(grad).mul_(up), gate, grad_input=d_gate)


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


def merge_layers(tokens, all_ends, sizes):
    """
    The rows of L layers, one after the other, sorted by expert: tokens and all_ends hold, of each
    layer, its rows' tokens (N,) and ends (E,), sizes its T -> place (L*N,) among the rows, their
    tokens (L*N,) among L*T, ends (E,), all int32. place is None for one layer, whose rows are
    sorted.
    """
    firsts = itertools.accumulate(sizes, initial=0)
    token = torch.cat([t + first for t, first in zip(tokens, firsts)]).int()
    if len(tokens) == 1:
        return None, token, all_ends[0]
    row = torch.arange(max(map(len, tokens)), device=token.device, dtype=torch.int32)
    experts = torch.cat([torch.searchsorted(ends, row[:len(t)], right=True)
                         for t, ends in zip(tokens, all_ends)])
    place, ends = sort_by_expert(experts, all_ends[0].numel())
    return place.int(), token[place], ends


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

LISTS = ("xs", "dys", "acts", "dhs", "tokens", "all_ends")
TYPES = dict(backend="str", activation="str", n_keep="int", save="bool", keep="bool",
             d_acts="Tensor?") | dict.fromkeys(LISTS, "Tensor[]")


def operator(name, step, arguments, n_results, fake):
    """
    step as an operator; `fake` tells torch.compile the shapes and dtypes of its results. Autocast
    is off inside: CUDA's would turn a sum into float32, another dtype than fake announces. Eager
    code calls the step itself: an operator's overhead is 0.1 ms, felt by tiny models.
    """
    def call(backend, x, *others):
        device = x[0].device if isinstance(x, (list, tuple)) else x.device
        with torch.autocast(device.type, enabled=False):
            return step(backend, x, *others)

    def call_or_trace(backend, x, *others):
        first = x[0] if isinstance(x, (list, tuple)) else x
        traced = torch.compiler.is_compiling() or type(first) not in (Tensor, torch.nn.Parameter)
        return (made if traced else call)(backend, x, *others)

    typed = ", ".join(f"{TYPES.get(a, 'Tensor')} {a}" for a in arguments.split())
    schema = f"({typed}) -> ({', '.join(['Tensor'] * n_results)})"
    made = custom_op(f"nanoexperts::{name}", call, mutates_args=(), schema=schema)
    made.register_fake(fake)
    return call_or_trace


def factor_shapes(n_tokens, top_k, w_in, w_out):
    """Of what a layer of a pool hands over: x, dy, gate * activation, dh, tokens of rows, ends."""
    n, (e, d, f) = n_tokens * top_k, w_out.shape
    return (n_tokens, d), (n_tokens, d), (n, f), (n, w_in.shape[1]), (n,), (e,)


def of_no_memory(like, shapes, dtype):
    """Tickets: a ticket has its factor's shape; token and ends are whole numbers in float32."""
    return tuple(like.new_zeros((), dtype=dtype if i < 4 else torch.float32).expand(shape)
                 for i, shape in enumerate(shapes))


def make_experts(forward, backward, weight_grads):
    """
    forward(backend, x, weights, w_in, w_out, order, ends, activation, save, keep) -> y (T, D);
    pre-activations h (N, W) in expert order if save, else (0, W); activations (N, F) in token order
    if keep, else (0, F). backward(backend, dy, d_acts or None, x, weights, w_in, w_out, order,
    ends, h, activation) -> gradients of x and weights, and in expert order gate * activation (N, F)
    and dh (N, W). weight_grads(backend, xs, dys, acts, dhs, tokens, all_ends, w_in, w_out): lists
    over layers of what backward was given and gave -> gradients of w_in and w_out.

    Returns experts(backend, x, .., keep, *tickets) -> y, activations; and two makers of tickets:
    for all layers, and a layer's where its number of rows comes late.
    """
    def fake(backend, x, weights, w_in, w_out, order, ends, activation, save, keep):
        n = order.numel()
        h = x.new_empty(n if save else 0, w_in.shape[1])
        return torch.empty_like(x), h, x.new_empty(n if keep else 0, w_out.shape[2])

    def fake_backward(backend, dy, d_acts, x, weights, w_in, w_out, order, ends, h, activation):
        act = x.new_empty(order.numel(), w_out.shape[2])
        return torch.empty_like(x), torch.empty_like(weights), act, torch.empty_like(h)

    inputs = "x weights w_in w_out order ends"
    run = operator("experts", forward, f"backend {inputs} activation save keep", 3, fake)
    run_backward = operator("experts_backward", backward,
                            f"backend dy d_acts {inputs} h activation", 4, fake_backward)
    of_weights = operator(
        "weight_grads", weight_grads, "backend xs dys acts dhs tokens all_ends w_in w_out", 2,
        lambda *arguments: tuple(map(torch.empty_like, arguments[-2:])))

    class Experts(torch.autograd.Function):
        @staticmethod
        def forward(ctx, backend, x, weights, w_in, w_out, order, ends, activation, save, keep,
                    *tickets):
            tensors = x, weights, w_in, w_out, order, ends
            y, h, acts = run(backend, *tensors, activation, save, keep)
            ctx.save_for_backward(*tensors, h)
            ctx.backend, ctx.activation, ctx.keep, ctx.n = backend, activation, keep, len(tickets)
            return y, acts

        @staticmethod
        def backward(ctx, dy, d_acts):
            x, weights, w_in, w_out, order, ends, h = ctx.saved_tensors
            dy = dy.contiguous()
            dx, d_weights, act, dh = run_backward(
                ctx.backend, dy, d_acts.contiguous() if ctx.keep else None, x, weights, w_in, w_out,
                order, ends, h, ctx.activation)
            token = order // weights.shape[1]
            factors, dw = (x, dy, act, dh, token, ends), (None, None)
            if ctx.n:  # a pool: the tickets take the factors to its entrance, whole numbers too
                factors = *factors[:4], token.float(), ends.float()
            else:
                dw = of_weights(ctx.backend, *([f] for f in factors), w_in, w_out)
                factors = ()
            return None, dx, d_weights, *dw, *[None] * 5, *factors

    return Experts.apply, *make_tickets(of_weights)


class LateTickets(torch.autograd.Function):
    """Tickets of one layer, made when its number of rows is known; not for torch.compile."""
    @staticmethod
    def forward(ctx, entrance, layers, shapes, dtype):
        ctx.layers, ctx.dtype = layers, entrance.dtype
        return of_no_memory(entrance, shapes, dtype)

    @staticmethod
    def backward(ctx, *factors):
        ctx.layers.append(factors)
        return factors[0].new_zeros((), dtype=ctx.dtype), None, None, None


def make_tickets(of_weights):
    """
    of_weights: make_experts' operator weight_grads. -> two makers of tickets, through which a pool
    gets one gradient: each layer's backward pass hands its factors over as "gradients" of its
    tickets, and when the last have come, one product over all layers' rows is computed.
    """
    def of_layers(backend, layers, w_in, w_out):
        xs, dys, acts, dhs, tokens, all_ends = map(list, zip(*layers))
        tokens, all_ends = [t.long() for t in tokens], [e.int() for e in all_ends]
        return of_weights(backend, xs, dys, acts, dhs, tokens, all_ends, w_in, w_out)

    class Tickets(torch.autograd.Function):
        """w_in, w_out -> tickets of all layers."""
        @staticmethod
        def forward(ctx, backend, w_in, w_out, shapes, n_layers, dtype):
            ctx.save_for_backward(w_in, w_out)
            ctx.backend, ctx.n = backend, len(shapes)
            return tuple(t for _ in range(n_layers) for t in of_no_memory(w_in, shapes, dtype))

        @staticmethod
        def backward(ctx, *factors):
            layers = [factors[i:i + ctx.n] for i in range(0, len(factors), ctx.n)]
            return None, *of_layers(ctx.backend, layers, *ctx.saved_tensors), None, None, None

    class Entrance(torch.autograd.Function):
        """w_in, w_out -> a number on which LateTickets depend. Its gradient comes when all layers
        have left their factors in a list."""
        @staticmethod
        def forward(ctx, backend, w_in, w_out, layers):
            ctx.save_for_backward(w_in, w_out)
            ctx.backend, ctx.layers = backend, layers
            return w_in.new_zeros(())

        @staticmethod
        def backward(ctx, _):
            layers = ctx.layers.copy()
            ctx.layers.clear()
            return None, *of_layers(ctx.backend, layers, *ctx.saved_tensors), None

    def tickets(backend, w_in, w_out, n_layers, n_tokens, top_k, dtype):
        """-> six tickets for each layer"""
        shapes = factor_shapes(n_tokens, top_k, w_in, w_out)
        all_of_them = Tickets.apply(backend, w_in, w_out, shapes, n_layers, dtype)
        return [all_of_them[i:i + 6] for i in range(0, len(all_of_them), 6)]

    def late_tickets(backend, w_in, w_out):
        """-> tickets(shapes, dtype), to be called by each layer"""
        layers = []
        entrance = Entrance.apply(backend, w_in, w_out, layers)
        return lambda shapes, dtype: LateTickets.apply(entrance, layers, shapes, dtype)

    return tickets, late_tickets


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
        return linear(dh, w_in.T), dz, linear(dh.T, x.T), linear(dy.T, u.T), dw_z

    def fake(backend, x, z, w_in, w_out, w_z, n_keep, activation, save):
        h = x.new_empty(x.shape[0] if save else 0, w_in.shape[0])
        value = z.new_empty(z.shape[:2], dtype=torch.promote_types(z.dtype, torch.float32))
        return torch.empty_like(x), h, value, value.to(torch.int32)

    tensors = "x z w_in w_out w_z"
    run = operator("masked", forward, f"backend {tensors} n_keep activation save", 4, fake)
    run_backward = operator(
        "masked_backward", backward, f"backend dy {tensors} h value cut activation", 5,
        lambda backend, dy, *inputs: tuple(map(torch.empty_like, inputs[:5])))

    class Masked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, backend, x, z, w_in, w_out, w_z, n_keep, activation, save):
            tensors = x, z, w_in, w_out, w_z
            y, *saved = run(backend, *tensors, n_keep, activation, save)
            ctx.save_for_backward(*tensors, *saved)
            ctx.backend, ctx.activation = backend, activation
            return y

        @staticmethod
        def backward(ctx, dy):
            found = run_backward(ctx.backend, dy.contiguous(), *ctx.saved_tensors, ctx.activation)
            return None, *found, None, None, None

    return Masked.apply


def make_thresholds(step):
    """step(backend, scores, n_keep): scores (R, F) -> value (R,) in their dtype, cut (R,) int32."""
    def fake(backend, scores, n_keep):
        rows = scores.shape[0]
        return scores.new_empty(rows), scores.new_empty(rows, dtype=torch.int32)

    return operator("thresholds", step, "backend scores n_keep", 2, fake)


def make_decode(step, transposed):
    """
    The masked FFN of a few tokens, without gradients. step(backend, x, scores (T, K, F), w_in,
    w_out^T (F, D), n_keep, activation) -> a tuple of y (T, D).
    """
    def decode(backend, x, z, w_in, w_out, w_z, n_keep, activation):
        inputs = x, F.linear(z, w_z), w_in, transposed(w_out)
        return step(backend, *inputs, n_keep, activation)[0]

    return operator("decode", decode, "backend x z w_in w_out w_z n_keep activation", 1,
                    lambda backend, x, *_: torch.empty_like(x))


# ---- PEER: experts of a few rows, which every token gathers


def best_pairs(first: Tensor, second: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest sums first_i + second_j: (..., a), (..., b) -> sums (..., k), i * b + j.

    They are among the k largest of each side: k * k candidates instead of a * b.
    """
    (s1, i), (s2, j) = (s.topk(min(k, s.shape[-1]), dim=-1) for s in (first, second))
    best, at = (s1[..., None] + s2[..., None, :]).flatten(-2).topk(k, dim=-1)  # (..., k)
    n = s2.shape[-1]
    return best, i.gather(-1, at // n) * second.shape[-1] + j.gather(-1, at % n)


def rows_of(ids: Tensor, n: int) -> Tensor:
    """ids (T, K) of experts with n rows each -> numbers of their rows (T, K * n)."""
    return (ids[..., None] * n + torch.arange(n, device=ids.device)).flatten(1)


def sum_of_rows(weights: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """sum over k, n of weights[t,k,n] w[ids[t,k],n]: (T, K, n), (T, K), (E, n, D) -> (T, D)."""
    rows, weights = rows_of(ids, w.shape[1]), weights.flatten(1).to(w.dtype)
    return F.embedding_bag(rows, w.flatten(0, 1), per_sample_weights=weights, mode="sum")


class RowProducts(torch.autograd.Function):
    """x[t] . w[rows[t,k]]: x (T, D), w (R, D), rows (T, K) -> (T, K), by embedding_bag's backward:
    products of bags and their rows without a copy of the rows, ten times as fast on a CPU."""

    @staticmethod
    def forward(ctx, x, w, rows):
        ctx.save_for_backward(x, w, rows)
        t, k = rows.shape
        first = torch.arange(0, t * k, k, device=x.device)
        token = torch.arange(t, device=x.device).repeat_interleave(k, output_size=t * k)
        products = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            x, w, rows.flatten(), first, token, 0)
        return products.view(t, k)

    @staticmethod
    def backward(ctx, grad):
        x, w, rows = ctx.saved_tensors
        dx = F.embedding_bag(rows, w, per_sample_weights=grad.contiguous(), mode="sum")
        order, ends = sort_by_expert(rows, len(w))  # a bag for each row of w: the tokens it met
        firsts = torch.cat((ends.new_zeros(1), ends[:-1])).long()
        dw = F.embedding_bag(order // rows.shape[1], x, firsts, mode="sum",
                             per_sample_weights=grad.flatten()[order])
        return dx, dw, None


def row_products(x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """x[t] . w[ids[t,k],n], in w's dtype: x (T, D), ids (T, K), w (E, n, D) -> (T, K, n)."""
    products = RowProducts.apply(x.to(w.dtype), w.flatten(0, 1), rows_of(ids, w.shape[1]))
    return products.unflatten(1, (ids.shape[1], w.shape[1]))
