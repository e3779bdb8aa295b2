"""kernels.py and support/cpu.py against literal loops in float64: every output, every gradient.

  1. parity of both layers   4. masked FFN: promises   6. which backend, and trust in it
  2. expert FFN: promises    5. large rows on a CPU    7. on a GPU
  3. top-n masks
"""
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import (
    compare_all,
    compare_experts,
    compiled_and_not,
    distances,
    expert_inputs,
    fake_cuda_under_autocast,
    layers,
    literal_kept,
    literal_masked,
    literal_topn,
    mask_inputs,
    outputs_and_gradients,
    returns_what_it_announces,
)
from moe_helpers import FAMILIES, small
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from lab import bench, gpu_check
from model import GPT, ModelConfig
from support import cpu, trust

ROOT = Path(__file__).parent.parent
ACTIVATIONS = "gelu", "swiglu"


def on_gpu(*values):
    return pytest.param(*values, marks=pytest.mark.gpu)


def small_experts():
    return expert_inputs(14, 16, 24, 5, 2, "swiglu", dtype=torch.float32)


def one_token():
    return [a.detach() for a in mask_inputs(1, 12, 64, 1, 6, 16, "gelu")]


# ---- 1. Parity. The masked FFN: the sum over samples moved inside W_2 against K whole FFNs.

def assert_all_agree(rows):
    wrong = [row for row in rows if not row[1] <= row[2]]
    assert len(rows) > 20 and not wrong, wrong


@pytest.mark.parametrize("backend, device", [
    ("loop", "cpu"), ("auto", "cpu"), *(on_gpu(b, "cuda") for b in ("triton", "auto", "grouped"))])
def test_layers_are_the_loops(backend, device):
    assert_all_agree(list(compare_all(backend, device)))


def test_interpreted_kernels_are_the_loops():
    """In a process of their own, with TRITON_INTERPRET set from the start."""
    pytest.importorskip("triton")
    env = os.environ | dict(
        TRITON_INTERPRET="1", OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(sys.path))
    command = [sys.executable, ROOT / "tests" / "kernel_helpers.py"]
    out = subprocess.run(command, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr[-2000:]
    assert_all_agree(json.loads(out.stdout.splitlines()[-1]))


@pytest.mark.parametrize("backend", ["grouped", "auto"])
@pytest.mark.parametrize("layer", ["experts", "experts, kept", 1, 2, 13, "topn_mask"])
def test_layers_compile_without_graph_breaks(backend, layer):
    if layer == "topn_mask":
        f, arguments = kernels.topn_mask, (torch.randn(3, 20, requires_grad=True), 5)
    elif str(layer).startswith("experts"):
        f, arguments = kernels.expert_ffn, (*small_experts(), "swiglu")
    else:  # so many tokens; 1, 2: decoding
        inputs = mask_inputs(layer, 8, 24, 1, 6, 7, "swiglu", dtype=torch.float32)
        f, arguments = kernels.masked_ffn, (*inputs, 7, "swiglu")
    kept = [True] if layer == "experts, kept" else []
    eager, compiled = compiled_and_not(f, *arguments, backend, *kept)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled))


@pytest.mark.parametrize("layer", ["experts", 1, 2, 13])  # tokens of a masked FFN; 1, 2: decoding
def test_autocast_decides_the_dtype(layer):
    inputs = small_experts()
    call = lambda: kernels.expert_ffn(*inputs, "swiglu", "grouped", True)
    if layer != "experts":
        inputs = mask_inputs(layer, 16, 40, 1, 3, 11, "gelu", "integers", torch.float32)
        call = lambda: (kernels.masked_ffn(*inputs, 11, "gelu"),)
    exact = call()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = call()
        with torch.no_grad():
            outputs += call()
    assert {y.dtype for y in outputs} == {torch.bfloat16}
    assert max(distances(outputs, [y.double() for y in exact * 2])) < 2e-2
    outputs[0].float().sum().backward()
    assert all(a.grad.dtype == a.dtype for a in inputs if a.requires_grad)  # the leaves' own


def test_the_check_script_agrees(capsys):  # "grouped" on a CPU
    with pytest.raises(SystemExit) as stop:
        kernels.main()
    rows = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and len(rows) > 20
    assert all(row.endswith(" ok") for row in rows[1:]), rows


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("ids", ["random", "one"])  # "one": empty groups around a full one
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("together", [False, True])
def test_both_ways_of_grouped_are_the_loop(monkeypatch, together, activation, ids, keep):
    """grouped_mm for small experts, one after the other for large ones: made to take either."""
    monkeypatch.setattr(cpu, "at_once", lambda *_: together)
    case = (20, 16, 8, 5, 1 if ids == "one" else 2, activation, ids, keep)
    assert max(compare_experts(case, "grouped", torch.float32)) < 2e-6


@pytest.mark.parametrize("rows, d, f, dtype, together", [
    (4096, 16, 8, torch.float32, True),  # 512 rows of 16 pre-activations an expert
    (4096, 64, 64, torch.float32, True),  # 256 KB
    (4097, 64, 64, torch.float32, False),  # a row more
    (4096, 64, 64, torch.float64, False),  # grouped_mm has no float64
    (64, 18, 8, torch.float32, False),  # rows of 72 bytes
    (64, 16, 10, torch.float32, False),  # of 40 bytes
    (64, 16, 8, torch.bfloat16, True), (64, 16, 12, torch.bfloat16, False)])
def test_small_experts_go_at_once(rows, d, f, dtype, together):
    w_in, w_out = torch.zeros(8, 2 * f, d, dtype=dtype), torch.zeros(8, d, f, dtype=dtype)
    x, order = torch.zeros(1, d, dtype=dtype), torch.zeros(rows, dtype=torch.int64)
    assert cpu.at_once(x, w_in, w_out, order) == together


# ---- 2. Expert FFN: promises

@pytest.mark.parametrize("shape, backend, device", [
    ((50, 16, 24, 7, 3), "auto", "cpu"),
    on_gpu((4096, 768, 3072, 8, 1), "triton", "cuda"),  # many rows an expert
    on_gpu((4096, 1024, 512, 64, 8), "triton", "cuda"),  # many choices
    on_gpu((1000, 96, 200, 96, 1), "triton", "cuda")])  # F no multiple of a tile
def test_same_bits_twice(shape, backend, device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    inputs = expert_inputs(*shape, "swiglu", dtype=dtype, device=device)
    leaves = [a for a in inputs if a.requires_grad]
    first, second, loop = (
        outputs_and_gradients(lambda b=b: layers(b)[0](*inputs, "swiglu")[0], leaves)
        for b in (backend, backend, "loop"))
    assert all(torch.equal(a, b) for a, b in zip(first, second))  # no atomics
    assert max(distances(first, [a.double() for a in loop])) < 2e-2


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("k", [1, 2])
def test_operators_under_cuda_autocast_return_what_they_announce(k, activation):
    """CUDA's autocast turns sums into float32. Every operator's code, on fake tensors of a GPU,
    returns the dtypes and shapes that its fake version tells autograd and torch.compile."""
    wide = 2 * 48 if activation == "swiglu" else 48
    with fake_cuda_under_autocast() as tensor:
        x, weights = tensor(32, 64), tensor(32, k).float()
        w_in, w_out = tensor(8, wide, 64), tensor(8, 64, 48)
        order, ends, h = tensor(32 * k).long(), tensor(8).int(), tensor(32 * k, wide)
        given = x, weights, w_in, w_out, order, ends
        returns_what_it_announces("experts", *given, activation, True, True)
        for d_acts in (None, tensor(32 * k, 48)):
            returns_what_it_announces("experts_backward", x, d_acts, *given, h, activation)
        given = x, tensor(32, k, 16), tensor(wide, 64), tensor(64, 48), tensor(48, 16)
        _, *saved = returns_what_it_announces("masked", *given, 12, activation, True)
        returns_what_it_announces("masked_backward", x, *given, *saved, activation)
        returns_what_it_announces("thresholds", tensor(32, 48), 12)


def test_a_pool_s_gradient_on_a_gpu_without_kernels(monkeypatch):
    """bf16, several layers: every tensor that is made is on the GPU, too."""
    monkeypatch.setattr(cpu, "rows_of", lambda ends: [5] * len(ends))
    with fake_cuda_under_autocast() as tensor:
        layers = [[tensor(32, 64)] * 3, [tensor(32, 64)] * 3, [tensor(40, 48)] * 3,
                  [tensor(40, 96)] * 3, [tensor(40).long()] * 3, [tensor(8).int()] * 3]
        returns_what_it_announces("weight_grads", *layers, tensor(8, 96, 64), tensor(8, 64, 48))


@pytest.mark.parametrize("name", FAMILIES)
def test_models_under_cuda_autocast(name):
    """The forward pass of each flavour on fake tensors: losses are float32, no dtype disagrees."""
    with fake_cuda_under_autocast(), torch.device("cuda"):
        model, tokens = GPT(small(**FAMILIES[name])), torch.zeros(2, 16, dtype=torch.int64)
        output = model(tokens, tokens)
        dtypes = {a.dtype for a in (output.loss, *output.aux.values())}
    assert dtypes == {torch.float32}


def test_nothing_is_saved_without_gradients():
    x, weights, ids, w_in, w_out = small_experts()
    order, ends = kernels.sort_by_expert(ids, 5)
    given = x, weights, w_in, w_out, order, ends
    y, acts = kernels.experts_op("auto", *given, "swiglu", False, False)
    assert acts.shape == (0, 24)
    with torch.no_grad():
        assert torch.equal(kernels.expert_ffn(x, weights, ids, w_in, w_out, "swiglu")[0], y)


@pytest.mark.parametrize("n_experts", [1, 4, 300])
def test_sort_by_expert(n_experts):
    ids = torch.randint(n_experts, (40, 2))
    order, ends = kernels.sort_by_expert(ids, n_experts)
    by_hand = sorted(range(80), key=lambda i: ids.view(-1)[i].item())  # Python's sort is stable
    assert order.tolist() == by_hand
    assert ends.tolist() == [sum(i <= e for i in ids.view(-1).tolist()) for e in range(n_experts)]
    assert torch.equal(kernels.undo_order(ids.view(-1)[order], order), ids.view(-1))


# ---- A pool: one gradient for all layers

POOL = dict(flavour="unipool", arch="llama", n_layer=6, n_experts=23, top_k=2, n_head=2, d_model=16,
            d_ff=24, block_size=16, init_std=0.2, vocab_size=64)
SIZES = 23 * 48 * 16, 23 * 16 * 24  # of the pool's two weights, and of nothing else


class PoolSized(TorchDispatchMode):
    """The operations that make a tensor as large as one of the pool's weights, in sizes' order."""
    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        in_place = function._schema.is_mutable
        if isinstance(out, torch.Tensor) and out.numel() in SIZES and not function.is_view:
            self.made += [] if in_place else [(SIZES.index(out.numel()), str(function), out.dtype)]
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_pool_gets_one_gradient(recompute, dtype):
    """Six layers, two micro-steps: per weight one new tensor each, and one cast to bf16."""
    model, tokens = GPT(ModelConfig(**POOL)).train(), torch.randint(64, (2, 16))
    model.recompute = recompute
    for _ in range(2):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), PoolSized() as forward:
            loss = model(tokens, tokens).loss
        with PoolSized() as backward:
            loss.backward()
        casts = [] if dtype == torch.float32 else [(0, "aten._to_copy.default", dtype),
                                                   (1, "aten._to_copy.default", dtype)]
        assert forward.made == casts
        new = sorted(i for i, name, made in backward.made if made == torch.float32)
        assert new == [0, 1] and len(backward.made) == 2, backward.made


def test_a_compiled_pool_gets_one_gradient():
    """Counted in the graphs that torch.compile makes of the forward and the backward pass."""
    counts = []

    def count(graph, _):
        made = {n: n.meta.get("val") for n in graph.graph.nodes if n.op == "call_function"}
        counts.append(sum(isinstance(a, torch.Tensor) and a.numel() in SIZES
                          for n, a in made.items() if n.target != torch.ops.aten.detach.default))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    model, tokens = GPT(ModelConfig(**POOL)).train(), torch.randint(64, (2, 16))
    backend = aot_autograd(fw_compiler=count, bw_compiler=count)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    compiled(tokens, tokens).loss.backward()
    assert counts == [0, 2]


@pytest.mark.parametrize("options, wanted", [
    (dict(), "all"), (dict(top_k=1, pool_groups=2), "all"), (dict(specialization_coef=0.1), "all"),
    (dict(pool_groups=6), "all"), (dict(), "balance")])  # which the last layer's experts don't see
@pytest.mark.parametrize("recompute", [False, True])
def test_pools_of_a_model_are_the_loop(options, wanted, recompute):
    """Every gradient in float64 after two micro-steps of different length."""
    model = {}
    for backend in ("loop", "auto"):
        torch.manual_seed(0)
        model[backend] = GPT(ModelConfig(**POOL | options, backend=backend)).double().train()
        model[backend].recompute = recompute and backend == "auto"
        for length in (16, 9):
            tokens = torch.arange(2 * length).view(2, length) * 7 % 64
            output = model[backend](tokens, tokens)
            losses = output.aux if wanted == "balance" else {"loss": output.loss, **output.aux}
            sum(losses.values()).backward()
    ours, loop = ([p.grad for p in model[name].parameters() if p.grad is not None]
                  for name in ("auto", "loop"))
    assert max(distances(ours, loop)) < 1e-11


def zeros(**shapes):
    return {name: torch.zeros(shape) for name, shape in shapes.items()}


EXPERT_ARGUMENTS = dict(
    zeros(x=(7, 8), weights=(7, 2), w_in=(3, 24, 8), w_out=(3, 8, 12)),
    ids=torch.zeros(7, 2, dtype=torch.int64), activation="swiglu")
MASKED_ARGUMENTS = dict(
    zeros(x=(7, 8), z=(7, 2, 4), w_in=(24, 8), w_out=(8, 24), w_z=(24, 4)),
    n_keep=6, activation="gelu")


@pytest.mark.parametrize("layer, change, words", [
    *(("expert_ffn", *row) for row in [
        (dict(activation="relu"), ["relu", "gelu or swiglu"]),
        (dict(backend="cuda"), ["cuda", "auto, loop, grouped, triton"]),
        (dict(backend="loop"), ["loop", "moe.expert_ffn_loop"]),
        (dict(x=torch.zeros(7, 9)), ["x (7, 9)", "(7, 8)"]),
        (zeros(w_in=(3, 12, 8)), ["w_in (3, 12, 8)", "(3, 24, 8)", "swiglu"]),
        (zeros(weights=(7, 1)), ["ids (7, 2)", "weights (7, 1)"]),
        (dict(x=torch.zeros(7, 8).double()), ["w_out is torch.float32", "x torch.float64"]),
        (dict(w_out=torch.zeros(3, 12, 8).mT), ["w_out has strides", "contiguous"]),
        (dict(backend="triton"), ["triton", "cpu", "no GPU", "auto"])]),
    *(("masked_ffn", *row) for row in [
        (dict(n_keep=0), ["n_keep 0", "1 to 24"]),
        (dict(n_keep=25), ["n_keep 25", "1 to 24"]),
        (zeros(w_out=(8, 20)), ["w_out (8, 20)", "(8, 24)"]),
        (zeros(w_z=(24, 5)), ["w_z (24, 5)", "(24, 4)"]),
        (zeros(x=(6, 8)), ["x (6, 8)", "(7, 8)"]),
        (dict(activation="tanh"), ["tanh", "gelu or swiglu"])]),
    *(("topn_mask", dict(n_keep=n), [f"n_keep {n}: expected 1 to 20"]) for n in (0, 21))])
def test_errors_name_what_and_where(layer, change, words):
    usual = dict(expert_ffn=EXPERT_ARGUMENTS, masked_ffn=MASKED_ARGUMENTS,
                 topn_mask=zeros(scores=(3, 20)))
    with pytest.raises(ValueError) as error:
        getattr(kernels, layer)(**usual[layer] | change)
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


# ---- 3. Top-n masks

NUMBERS = st.integers(-3, 3) | st.sampled_from([-0.0, float("inf"), -float("inf"), 0.5, 1e-3])


@settings(max_examples=100, deadline=None)
@given(st.lists(NUMBERS, min_size=1, max_size=24), st.data())
def test_topn_mask_of_any_row(row, data):
    n = data.draw(st.integers(1, len(row)))
    rows = torch.tensor([row]).to(data.draw(st.sampled_from([torch.float32, torch.bfloat16])))
    assert torch.equal(kernels.topn_mask(rows, n), literal_topn(rows, n))
    keep = kernels.kept(rows, *cpu.thresholds(rows, n))
    assert keep.sum() == n  # also where one is zero


# ---- 4. Masked FFN: promises

def test_decoding_reads_active_rows_only():
    """Weights of neurons that the mask leaves out may be anything, even NaN."""
    x, z, w_in, w_out, w_z = one_token()
    expected = literal_masked(x, z, w_in, w_out, w_z, 16, "gelu")
    idle = torch.ones(64, dtype=torch.bool)
    idle[literal_kept((w_z @ z[0, 0]).tolist(), 16)] = False
    w_in[idle], w_out[:, idle] = float("nan"), float("nan")
    y = kernels.masked_ffn(x, z, w_in, w_out, w_z, 16, "gelu")
    assert max(distances([y], [expected])) < 1e-12


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("t, k, f, n, activation, weights", [
    (1, 1, 64, 16, "gelu", "normal"),
    (1, 2, 64, 16, "swiglu", "normal"),  # two masks, summed
    (2, 1, 50, 13, "swiglu", "normal"),  # a width that threads do not divide
    (8, 1, 320, 30, "gelu", "normal"),  # more rows than threads
    (1, 2, 40, 9, "gelu", "integers"),  # ties, and scores of zero
    (8, 1, 64, 3, "swiglu", "normal"), (3, 2, 64, 8, "swiglu", "normal"),  # unions below 60 %
    (1, 1, 7, 1, "swiglu", "normal")])  # fewer neurons kept than threads
def test_decoding_is_k_whole_ffns(monkeypatch, t, k, f, n, activation, weights, dtype, threads):
    inputs = [a.detach() for a in mask_inputs(t, 12, f, k, 6, n, activation, weights, dtype)]
    called = []
    step = None, lambda *a: called.append(1) or cpu.decode(*a)
    monkeypatch.setitem(kernels.STEPS, "decode", step)
    torch.set_num_threads(threads)
    y = kernels.masked_ffn(*inputs, n, activation)
    expected = literal_masked(*(a.double() for a in inputs), n, activation)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    assert called and max(distances([y], [expected])) < tolerance


def test_decoding_sees_a_weight_update():
    """Decoding keeps a transposed copy of w_out: a step in place must not leave it stale."""
    x, z, w_in, w_out, w_z = one_token()
    before = kernels.masked_ffn(x, z, w_in, w_out, w_z, 16, "gelu")
    assert cpu.transposed(w_out) is cpu.transposed(w_out)
    w_out *= 2
    assert torch.allclose(kernels.masked_ffn(x, z, w_in, w_out, w_z, 16, "gelu"), 2 * before)
    assert cpu.transposed(w_out.T.contiguous().T).data_ptr() != cpu.transposed(w_out).data_ptr()
    with torch.inference_mode():
        again = kernels.masked_ffn(x, z, w_in.clone(), w_out.clone(), w_z, 16, "gelu")
        assert torch.allclose(again, 2 * before)


def test_no_tokens():
    leaves = mask_inputs(0, 12, 64, 1, 6, 16, "gelu")
    assert kernels.masked_ffn(*leaves, 16, "gelu").shape == (0, 12)
    with torch.no_grad():
        assert kernels.masked_ffn(*leaves, 16, "gelu").shape == (0, 12)
    inputs = expert_inputs(0, 16, 8, 5, 2, "swiglu", dtype=torch.float32)
    for backend in ("loop", "grouped"):
        y, acts = layers(backend)[0](*inputs, "swiglu", keep_activations=True)
        assert y.shape == (0, 16) and acts.shape == (0, 2, 8)
        y.sum().backward()


def test_no_mask_is_stored():
    """The backward pass needs inputs, h, and two numbers per token and sample, never T x K x F."""
    leaves, saved = mask_inputs(16, 8, 40, 3, 4, 10, "gelu"), []
    pack = lambda a: saved.append(a.numel()) or a
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda a: a):
        kernels.masked_ffn(*leaves, 10, "gelu")
    assert max(saved) == 16 * 40  # h
    assert sum(saved) == sum(a.numel() for a in leaves) + 16 * 40 + 2 * 16 * 3


# ---- 5. Large rows on a CPU: thresholds by interpolation, loops through torch.compile

LARGE_ROWS = {
    "normal": lambda normal: normal,
    "uniform": torch.rand_like,
    "heavy tails": lambda normal: normal / torch.randn_like(normal),
    "two peaks": lambda normal: normal + 50 * (torch.rand_like(normal) < 0.3),
    "integers": lambda normal: (4 * normal).round(),
    "constant": torch.ones_like,
    "infinities": lambda normal: normal.masked_fill(normal > 1.3, float("inf")),
    "bf16, which counts to 256": lambda normal: normal.bfloat16(),
}


@pytest.mark.parametrize("scores", LARGE_ROWS)
def test_thresholds_of_large_rows(scores):
    rows = LARGE_ROWS[scores](torch.randn(400, 3000))
    for n in (1, 750, 2999, 3000):
        keep = kernels.kept(rows, *cpu.thresholds(rows, n))
        best = rows.argsort(dim=-1, descending=True, stable=True)[:, :n]
        assert torch.equal(keep, torch.zeros_like(keep).scatter(1, best, True)), n


@pytest.mark.slow
def test_large_masked_ffn_through_the_compiler(monkeypatch):
    """The CPU's fast path as it runs in training, against the oracle in fp32."""
    monkeypatch.setitem(cpu._compile, "allowed", True)
    leaves = mask_inputs(512, 32, 2048, 2, 16, 512, "swiglu", dtype=torch.float32)
    ours, loop = (
        outputs_and_gradients(lambda b=b: layers(b)[1](*leaves, 512, "swiglu"), leaves)
        for b in ("auto", "loop"))
    assert max(distances(ours, [a.double() for a in loop])) < 1e-5


def test_nothing_compiles_unless_allowed_and_then_says_so_once(monkeypatch, capsys):
    compiled, large = [], torch.randn(2**20)
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: compiled.append(f) or f)
    functions = [cpu.fused(f) for f in (torch.relu, torch.sigmoid)]
    assert all(torch.equal(f(large), f.__wrapped__(large)) for f in functions)
    assert not compiled and not capsys.readouterr().err
    monkeypatch.setattr(cpu, "_compile", dict(cpu._compile, announced=False))
    cpu.allow_compile(True)
    for f in functions * 2:
        f(large[:2**19 - 1])  # small: not worth it
    assert not compiled
    for f in functions * 2:
        f(large)
    assert len(compiled) == 2
    assert capsys.readouterr().err.count("compiling the experts' elementwise functions") == 1


@pytest.mark.parametrize("before, expected", [(dict(THP_MEM_ALLOC_ENABLE="0"), "0"), ({}, "1")])
def test_prepare_process_asks_for_huge_pages_unless_told_otherwise(monkeypatch, before, expected):
    monkeypatch.setattr(os, "environ", before)
    cpu.prepare_process()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == expected


def test_without_a_compiler_it_is_slower_and_says_so_once(monkeypatch):
    error = type("InvalidCxxCompiler", (RuntimeError,), {"__module__": "torch._inductor.exc"})

    def broken(f, dynamic):
        def call(*_):
            raise error("no C++ compiler")
        return call
    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setitem(cpu._compile, "allowed", True)
    count = cpu.fused(lambda a, b: (a > b).sum())
    large = torch.randn(2**20)
    with pytest.warns(UserWarning, match="torch.compile cannot build") as caught:
        assert count(large, 0.5) == count(large, 0.5) == (large > 0.5).sum()
    assert len(caught) == 1
    error = ValueError  # a mistake of ours is no missing compiler
    with pytest.raises(ValueError):
        cpu.fused(lambda a, b: (a > b).sum())(large, 0.5)


def test_token_chunks_cover_every_token_once():
    for t, width in ((1, 1), (1024, 2 * 6144), (1000, 12345), (5, 2**22)):
        rows = [i for chunk in cpu.token_chunks(t, width) for i in range(t)[chunk]]
        assert rows == list(range(t))


# ---- 6. Which backend, and trust in it: `auto` compares a kernel's first result with torch's

@pytest.fixture
def use_kernel(monkeypatch):
    """`auto` believes in a GPU; gives a function that makes another the thresholds' kernel."""
    monkeypatch.setattr(kernels, "choose_backend", lambda x: ("triton", "pretend"))
    monkeypatch.setattr(trust, "_trusted", {})
    return lambda f: monkeypatch.setitem(kernels.STEPS, "thresholds", (f, cpu.thresholds))


def test_auto_uses_a_kernel_that_agrees(use_kernel):
    rows, calls = torch.randn(4, 20), []
    use_kernel(lambda *a: calls.append(1) or cpu.thresholds(*a))
    for _ in range(3):
        assert torch.equal(kernels.topn_mask(rows, 5), literal_topn(rows, 5))
    assert len(calls) == 4  # three results, and one comparison


def is_wrong(scores, n):
    value, cut = cpu.thresholds(scores, n)
    return value + float("nan"), cut


def fails(scores, n):
    raise RuntimeError("ptxas is missing\nand more lines")


@pytest.mark.parametrize("kernel, words", [
    (is_wrong, r"for thresholds is off by inf in torch.float32 on cpu: not used"),
    (fails, r"for thresholds fails \(RuntimeError: ptxas is missing\) in torch.float32 on cpu")])
def test_auto_drops_a_kernel_that_is_wrong_or_fails_and_says_so_once(use_kernel, kernel, words):
    use_kernel(kernel)
    rows = torch.randn(4, 20)
    with pytest.warns(UserWarning, match=words) as caught:
        for _ in range(2):
            assert torch.equal(kernels.topn_mask(rows, 5), literal_topn(rows, 5))
    assert len(caught) == 1
    if kernel is fails:
        with pytest.raises(RuntimeError, match="ptxas is missing"):  # asked for by name
            kernels.dispatch("thresholds", "triton", rows, 5)


def test_without_triton_nothing_warns():
    """Nor does decoding, of torch's sparse tensors: -W error would stop it. (That importing changes
    nothing, and imports no Triton without a GPU, is in test_house.py.)"""
    script = """if True:
        import sys, torch
        sys.modules["triton"] = None  # not installed
        import kernels
        x, z, w, w_z = torch.ones(1, 4), torch.ones(1, 1, 2), torch.ones(4, 4), torch.ones(4, 2)
        print(kernels.topn_mask(torch.arange(4.), 1))
        print(kernels.masked_ffn(x, z, w, w, w_z, 1, "gelu").shape)
    """
    command = [sys.executable, "-W", "error", "-c", script]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.stdout == "tensor([0., 0., 0., 3.])\ntorch.Size([1, 4])\n", out.stderr


# ---- 7. On a GPU

@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "grouped"])
def test_gpu_never_waits(backend):
    """Once compiled, a step of either layer never makes the host wait for the device."""
    inputs = expert_inputs(512, 64, 128, 8, 2, "swiglu", dtype=torch.bfloat16, device="cuda")
    masked = mask_inputs(64, 64, 256, 2, 16, 64, "gelu", dtype=torch.bfloat16, device="cuda")

    def step():
        y, _ = kernels.expert_ffn(*inputs, "swiglu", backend)
        (y.sum() + kernels.masked_ffn(*masked, 64, "gelu", "triton").sum()).backward()
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_compiles_in_one_graph():
    inputs = expert_inputs(256, 64, 128, 8, 2, "swiglu", dtype=torch.bfloat16, device="cuda")
    arguments = *inputs, "swiglu", "triton"
    eager, compiled = compiled_and_not(kernels.expert_ffn, *arguments, compiler="inductor")
    assert max(distances(compiled, [a.double() for a in eager])) < 1e-2


@pytest.mark.gpu
def test_gpu_memory_of_a_layer():
    """Gather fused, activations recomputed: at most 0.6 of what the layer over grouped_mm needs."""
    table = SimpleNamespace(device="cuda", dtype=torch.bfloat16)
    inputs = bench.leaves(table, (8192, 512), (8, 512), (8, 4096, 512), (8, 512, 2048))
    triton = partial(bench.moe_layer, experts=partial(kernels.expert_ffn, backend="triton"))
    ours, theirs = (
        gpu_check.peak_bytes(bench.forward_backward(partial(layer, top_k=1), *inputs), inputs)
        for layer in (triton, gpu_check.by_grouped_mm))
    assert ours <= 0.6 * theirs


def test_nothing_is_no_evidence_for_a_kernel():
    """An empty batch, as a rank may get one, is torch's, and asks nobody; a private bank's result
    says nothing of a pool's."""
    ask = lambda calls: lambda *arguments: calls.append(1) or (torch.ones(2),)
    calls, layer = [], [torch.ones(2, 3)]
    assert not trust.trusted("a step", ask(calls), ask(calls), (torch.ones(0, 3),)) and not calls
    for several in (layer, layer * 3):
        assert trust.trusted("a step", ask(calls), ask(calls), (several,))
    assert len(calls) == 4
