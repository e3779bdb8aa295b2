"""
What test_kernels.py compares with: the formulas as loops over tokens in float64, with nothing of
kernels.py in them.

As a script, with TRITON_INTERPRET=1, it prints how far Triton's kernels are from them, as JSON.
"""
import ctypes
import json
import math
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode

# T, D, F, E, K, activation, which ids, keep the activations. The interpreter works in tiles of 32.
EXPERT_CASES = {
    "one token, K = E": (1, 32, 32, 3, 3, "gelu", "random", False),
    "one token, one expert": (1, 16, 16, 1, 1, "swiglu", "random", False),
    "5 experts, K = 2, nothing a multiple of a tile": (13, 40, 24, 5, 2, "swiglu", "random", False),
    "F of two tiles and a bit": (20, 17, 70, 3, 2, "gelu", "random", True),
    "all on one expert: four idle, several tiles": (70, 32, 32, 5, 1, "swiglu", "one", False),
    "an idle expert at each end and in the middle": (24, 24, 40, 7, 2, "swiglu", "middle", True),
    "more experts than tokens": (2, 20, 33, 11, 2, "gelu", "random", False),
    "a run that ends exactly on a tile": (64, 32, 32, 2, 1, "swiglu", "halves", True),
}
# T, D, F, K, dz, n, activation, scores
MASK_CASES = {
    "one token, one sample, everything kept": (1, 24, 64, 1, 16, 64, "gelu", "normal"),
    "a single entry kept": (4, 17, 33, 3, 8, 1, "gelu", "normal"),
    "F no power of two, two samples": (9, 16, 50, 2, 8, 13, "swiglu", "normal"),
    "many ties": (6, 16, 40, 2, 3, 11, "gelu", "integers"),
    "all scores equal": (2, 16, 40, 2, 3, 7, "swiglu", "constant"),
}


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def ids_of(kind, t, e, k):
    if kind == "one":
        return torch.full((t, k), e // 2)
    if kind == "halves":
        return torch.arange(t)[:, None] // (t // e)
    low, high = (0, e) if kind == "random" else (1, e - 1)
    choices = torch.rand(t, high - low).argsort(1)
    if kind == "middle":
        choices = choices[choices != (e - 2) // 2].view(t, -1)
    return (choices + low)[:, :k].contiguous()


def expert_inputs(t, d, f, e, k, activation, ids="random", dtype=torch.float64, device="cpu"):
    """x, weights, ids, w_in, w_out; the leaves need gradients. Outputs are about 1."""
    wide = 2 if activation == "swiglu" else 1
    leaf = lambda *shape, scale=1: (torch.randn(shape) * scale).to(device, dtype).requires_grad_()
    x, weights = leaf(t, d), leaf(t, k)
    w_in, w_out = leaf(e, wide * f, d, scale=d**-0.5), leaf(e, d, f, scale=f**-0.5)
    return x, weights, ids_of(ids, t, e, k).to(device), w_in, w_out


def mask_inputs(t, d, f, k, dz, n, activation, scores="normal", dtype=torch.float64, device="cpu"):
    """x, z, w_in, w_out, w_z, all leaves. scores "integers": w_z z is a small integer, equal in
    every dtype; "constant": 1."""
    wide = 2 if activation == "swiglu" else 1
    x, w_in = torch.randn(t, d), torch.randn(wide * f, d) / d**0.5
    w_out = torch.randn(d, f) / f**0.5
    if scores == "normal":
        z, w_z = torch.randn(t, k, dz), torch.randn(f, dz) / dz ** 0.5
    elif scores == "integers":
        z, w_z = torch.randint(-2, 3, (t, k, dz)), torch.randint(-2, 3, (f, dz))
    else:
        z, w_z = torch.ones(t, k, dz), torch.full((f, dz), 1 / dz)
    return tuple(a.to(device, dtype).requires_grad_() for a in (x, z, w_in, w_out, w_z))


def literal_activation(h, activation):
    if activation == "gelu":  # the tanh form, written out
        return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h ** 3)))
    gate, up = h[: len(h) // 2], h[len(h) // 2:]
    return gate / (1 + torch.exp(-gate)) * up


def literal_experts(x, weights, ids, w_in, w_out, activation):
    """y (T, D), acts (T, K, F): a loop over tokens and their choices."""
    ys, acts = [], []
    for t in range(len(x)):
        act = [literal_activation(w_in[e] @ x[t], activation) for e in ids[t].tolist()]
        acts.append(torch.stack(act))
        ys.append(sum(weights[t, k] * (w_out[e] @ act[k]) for k, e in enumerate(ids[t].tolist())))
    return torch.stack(ys), torch.stack(acts)


def literal_kept(row, n):
    """Positions of the n largest entries of a row, the lowest index first among equals."""
    return sorted(range(len(row)), key=lambda j: (-row[j], j))[:n]


def literal_topn(rows, n):
    """The n largest entries of each row (F,), the rest zeros."""
    keep = torch.zeros(rows.shape, dtype=torch.bool)
    for kept, row in zip(keep, rows.tolist()):
        kept[literal_kept(row, n)] = True
    return torch.where(keep.to(rows.device), rows, torch.zeros_like(rows))


def literal_masked(x, z, w_in, w_out, w_z, n, activation):
    """K whole FFNs for every token, averaged."""
    ys = []
    for t in range(len(x)):
        y = 0
        for mask in literal_topn(z[t] @ w_z.T, n):
            y = y + w_out @ (mask * literal_activation(w_in @ x[t], activation))
        ys.append(y / z.shape[1])
    return torch.stack(ys)


def outputs_and_gradients(function, leaves):
    """function() -> a tensor or several; a fixed, uneven gradient into each; -> outputs, then
    gradients of the leaves."""
    outputs = function()
    outputs = [y for y in (outputs if isinstance(outputs, tuple) else (outputs,)) if y is not None]
    uneven = lambda y: torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    losses = [(y * uneven(y).cos()).sum() for y in outputs]
    return outputs + list(torch.autograd.grad(sum(losses), leaves))


def compiled_and_not(layer, *arguments, compiler="aot_eager"):
    """Outputs and gradients of a layer, and an output without gradients: eager, and compiled to
    one graph."""
    torch.compiler.reset()  # other shapes and modes would count against the limit of recompilations
    leaves = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    found = []
    for f in (layer, torch.compile(layer, fullgraph=True, backend=compiler)):
        found.append(outputs_and_gradients(lambda f=f: f(*arguments), leaves))
        with torch.no_grad():
            output = f(*arguments)
        found[-1].append(output[0] if isinstance(output, tuple) else output)
    return found


def distances(ours, expected):
    """|a - b| / |b| for each pair; expected is float64. A NaN is infinitely far: max() skips it."""
    assert len(ours) == len(expected)
    relative = lambda a, b: (a.double() - b).norm() / b.norm().clamp_min(1e-30)
    return [relative(a, b).nan_to_num(math.inf).item() for a, b in zip(ours, expected)]


def poison(device="cpu"):
    """Freed memory full of NaN: whoever forgets to write an output will show it."""
    sizes = (64, 512, 4096, 32768, 2**18) * 8
    blocks = [torch.full((n,), float("nan"), dtype=torch.float64, device=device) for n in sizes]
    del blocks


def layers(backend):
    """expert_ffn and masked_ffn with this backend; for "loop" the oracles of moe.py."""
    import kernels
    import moe
    if backend == "loop":
        return moe.expert_ffn_loop, moe.masked_ffn_loop
    return (partial(kernels.expert_ffn, backend=backend),
            partial(kernels.masked_ffn, backend=backend))


def compare_experts(case, backend, dtype, device="cpu"):
    """Distances of y, (acts), and the gradients of x, weights, w_in, w_out from the loop's. Those
    of experts that no token chose are exact zeros."""
    *shape, activation, ids, keep = case
    inputs = expert_inputs(*shape, activation, ids, dtype, device)
    exact = [a.detach().double().requires_grad_() if a.requires_grad else a for a in inputs]
    leaves, exact_leaves = ([a for a in i if a.requires_grad] for i in (inputs, exact))
    poison(device)
    layer = partial(layers(backend)[0], *inputs, activation, keep_activations=keep)
    loop = lambda: literal_experts(*exact, activation)[: 1 + keep]
    ours = outputs_and_gradients(layer, leaves)
    idle = sorted(set(range(shape[3])) - set(inputs[2].flatten().tolist()))
    assert not any(of_experts[idle].any() for of_experts in ours[-2:])
    return distances(ours, outputs_and_gradients(loop, exact_leaves))


def through_a_pool(layer, opened, x, weights, ids, activation):
    """Three layers in a row that share opened weights, each with choices of its own."""
    for i, (w_in, w_out, *more) in enumerate(opened):
        x = x + layer(x, weights * (i + 1), (ids + i) % (len(w_in) - 1), w_in, w_out, activation,
                      *more)[0]
    return x


def compare_pool(backend, dtype, device="cpu"):
    """Distances of three layers that share a pool, one expert of it idle, from the loop's."""
    import kernels
    shape = 30, 24, 40, 7, 2, "swiglu"
    x, weights, ids, w_in, w_out = expert_inputs(*shape, dtype=dtype, device=device)
    leaves = x, weights, w_in, w_out
    exact = [a.detach().double().requires_grad_() for a in leaves]
    expected = outputs_and_gradients(
        lambda: through_a_pool(literal_experts, [exact[2:]] * 3, *exact[:2], ids, "swiglu"), exact)
    layer = lambda *a: kernels.expert_ffn(*a[:6], backend, tickets=a[6])
    poison(device)
    opened = kernels.open_pool(w_in, w_out, 3, x, 2, backend)
    ours = outputs_and_gradients(
        lambda: through_a_pool(layer, opened, x, weights, ids, "swiglu"), leaves)
    assert not ours[3][-1].any() and not ours[4][-1].any()  # the idle expert's: exact zeros
    return distances(ours, expected)


def compare_masked(case, backend, dtype, device="cpu"):
    """Distances of y, the gradients of x, z, w_in, w_out, w_z, and of y without gradients."""
    *_, n, activation, _ = case
    leaves = mask_inputs(*case, dtype, device)
    exact = [a.detach().double().requires_grad_() for a in leaves]
    expected = outputs_and_gradients(lambda: literal_masked(*exact, n, activation), exact)
    poison(device)
    layer = partial(layers(backend)[1], *leaves, n, activation)
    ours = outputs_and_gradients(layer, leaves)
    with torch.no_grad():
        ours.append(layer())
    return distances(ours, [*expected, expected[0]])


def compare_all(backend, device="cpu"):
    """(what, the largest error, tolerance) of both layers, in every dtype the backend can."""
    for dtype, tolerance in TOLERANCE.items():
        half, name = dtype.itemsize == 2, str(dtype)[6:]
        interpreted = backend == "triton" and device == "cpu"
        if dtype == torch.float64 and backend == "triton":
            continue
        if dtype == torch.bfloat16 and interpreted:
            continue  # the interpreter's arithmetic is wrong
        if device == "cuda" and dtype == torch.float32:
            tolerance = 1e-5
        for label, case in EXPERT_CASES.items():
            torch.manual_seed(0)
            if not (interpreted and half) or case[-1]:  # it is slow: where most is returned
                error = max(compare_experts(case, backend, dtype, device))
                yield f"experts, {name}, {label}", error, tolerance
        if not (interpreted and half) and backend != "loop":
            error = max(compare_pool(backend, dtype, device))
            yield f"experts, {name}, three layers of a pool, an idle expert", error, 2 * tolerance
        for label, case in MASK_CASES.items():
            torch.manual_seed(0)
            if not half or case[-1] != "normal":  # else rounding decides who is kept
                error = max(compare_masked(case, backend, dtype, device))
                yield f"masks, {name}, {label}", error, tolerance
        yield f"thresholds, {name}", compare_thresholds(dtype, backend, device), 0


def compare_thresholds(dtype, backend, device):
    """topn_mask on rows with -0.0, infinities, negative numbers and ties -> how many n differ."""
    from kernels import topn_mask
    inf, backend = math.inf, backend.replace("loop", "grouped")
    rows = [[0.0, -0.0, 0.0, -0.0, 1.0, -1.0], [inf, -inf, -inf, 2.0, inf, -inf],
            [-1.0, -3.0, -1.0, -2.0, -1.0, -1.0], [3.0] * 6, [1e-8, -1e-8, 0.0, 1.0, -1.0, 60000.0]]
    rows = torch.tensor(rows).to(device, dtype)
    masked = [topn_mask(rows, n, backend) for n in range(1, 7)]
    return sum(not torch.equal(masked[n - 1], literal_topn(rows, n)) for n in range(1, 7))


def lend_cuda_a_device_guard():
    """A CPU build of torch has none, and indexing asks for it: lend the meta device's, a no-op."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = 1, 14  # c10::DeviceType
    guards[cuda] = guards[cuda] or guards[meta]


@contextmanager
def fake_cuda_under_autocast():
    """In it, tensors have shapes and dtypes but no numbers, and CUDA's autocast to bf16 is on.
    Gives a function of a shape that makes such a tensor of a GPU."""
    if not torch.backends.cuda.is_built():
        lend_cuda_a_device_guard()
    with FakeTensorMode():
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)
        try:
            yield lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="cuda")
        finally:
            torch.set_autocast_enabled("cuda", False)
            torch.set_autocast_dtype("cuda", torch.float16)


def returns_what_it_announces(name, *arguments):
    """The results of an operator's code on fake tensors, after comparing with its fake version."""
    operator = OPDEFS[f"nanoexperts::{name}"]
    describe = lambda results: [(a.dtype, a.shape, a.device) for a in results]
    results = operator._init_fn("grouped", *arguments)
    assert describe(results) == describe(operator("grouped", *arguments)), name
    return results


if __name__ == "__main__":
    print(json.dumps(list(compare_all("triton"))))
