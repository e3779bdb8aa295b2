"""lab.bench: its references are right, a wrong result has no speed, a table says what it says."""
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from kernel_helpers import distances, expert_inputs, literal_experts, literal_masked, mask_inputs
from train_helpers import refused

import kernels
from lab import bench
from model import ModelConfig

ROOT = Path(__file__).parent.parent
TINY = ModelConfig(n_layer=2, n_head=2, d_model=32, block_size=16, vocab_size=50)


def routed(t=40, d=16, f=8, e=5, k=2):
    """Inputs of the bench's MoE layers, and what a loop over tokens makes of them."""
    inputs = expert_inputs(t, d, f, e, k, "swiglu", dtype=torch.float32)
    x, _, _, w_in, w_out = (a.detach() for a in inputs)
    router = torch.randn(e, d)
    weights, ids = (x @ router.T).softmax(-1).topk(k)
    exact = literal_experts(
        x.double(), weights.double(), ids, w_in.double(), w_out.double(), "swiglu")[0]
    return (x, router, w_in, w_out, k), exact


@pytest.mark.parametrize("layer", [bench.moe_by_masks, bench.moe_by_grouped_mm, bench.moe_ours])
def test_layers_are_the_loop(layer):
    inputs, exact = routed()
    assert max(distances([layer(*inputs)], [exact])) < 2e-6


@pytest.mark.parametrize("layer", [bench.infmoe_literal, bench.infmoe_inside, bench.infmoe_masked])
def test_continuous_references_are_the_formula(layer):
    inputs = [a.detach() for a in mask_inputs(9, 16, 40, 3, 4, 10, "gelu")]
    assert max(distances([layer(*inputs, 10)], [literal_masked(*inputs, 10, "gelu")])) < 1e-12


@pytest.fixture
def table(tmp_path):
    return bench.Table("moe", bench.BenchConfig(quick=True, out=str(tmp_path), repeat=1), "cpu")


def test_a_wrong_result_has_no_speed(table, monkeypatch, capsys):
    honest = kernels.expert_ffn
    wrong = lambda *a, **k: (honest(*a, **k)[0] * 1.001, None)
    monkeypatch.setattr(kernels, "expert_ffn", wrong)
    with pytest.raises(SystemExit):
        bench.bench_moe(table)
    assert not table.rows and "disagrees with its reference" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_nan_does_not_agree(wrong):
    with pytest.raises(SystemExit):
        bench.agree("x", torch.tensor([1.0, wrong]), torch.tensor([1.0, 2.0]), 1e-2)


def test_rows_say_whether_they_reach(table, tmp_path, capsys):
    table.faster("C2", "twice as fast", 2.0, 1.0, ">= 1.1")
    table.row("C7", "too slow", 1.0, 1.3, "<= 1.25")
    table.row("-", "only told", 1.0, 1.3)
    assert [row["reached"] for row in table.rows] == [True, False, None]
    table.save()
    table.save()
    first, second = map(json.loads, (tmp_path / "moe.jsonl").read_text().splitlines())  # appended
    assert first == second and first["rows"] == table.rows and first["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps({k: v for k, v in first.items() if k != "command"})
    assert "NOT REACHED" in capsys.readouterr().out


def test_records_name_the_unit_of_their_values(table, capsys):
    """Seconds and bytes in the record, milliseconds and megabytes on the screen."""
    table.faster("C2", "a tenth of a second", 0.1, 0.05, "")
    table.row("C10", "ten megabytes", 1e7, 1e7, unit="B")
    assert [(row["reference"], row["unit"]) for row in table.rows] == [(0.1, "s"), (1e7, "B")]
    printed = capsys.readouterr().out
    assert "100.00 ms" in printed and "10.00 MB" in printed
    for path in (ROOT / "results" / "bench").glob("*.jsonl"):
        rows = [row for line in path.read_text().splitlines() for row in json.loads(line)["rows"]]
        assert {row["unit"] for row in rows} <= {"s", "B", ""}


def test_rounds_are_interleaved_and_medians():
    called, sleeps = [], iter([0, 0, 0, 0, 0.05, 0, 0, 0, 0, 0])
    slow = lambda: (called.append("a"), time.sleep(next(sleeps)))
    times = bench.interleave({"a": slow, "b": lambda: called.append("b")}, "cpu", 3)
    assert "".join(called) == "aabb" + "ababab" and times["a"] < 0.02  # a slow round does not count


def test_a_broken_model_has_another_gradient(monkeypatch):
    plain, ours = bench.training_step(TINY, "cpu", 2, True), bench.training_step(TINY, "cpu", 2)
    right = plain.gradient()
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda *a, **k: 0.9 * attention(*a, **k))
    with pytest.raises(SystemExit):
        bench.agree("training step", ours.gradient(), right, 5e-2)


def test_saved_bytes_are_linear_in_tokens(table):
    x, *weights = bench.leaves(table, (32, 16), (4, 16), (4, 16, 16), (4, 16, 8))
    small = bench.saved_bytes(x, *weights)
    large = bench.saved_bytes(bench.leaves(table, (128, 16))[0], *weights)
    assert small > 32 * 16 * 4 and large == pytest.approx(4 * small, rel=0.05)


def test_reproduce_is_asked_to_pause(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RuntimeError), bench.timing_lock():
        assert Path("out/timing.lock").exists()
        raise RuntimeError
    assert not Path("out/timing.lock").exists()


def test_plain_and_fast_steps_train_alike():
    plain, ours = bench.training_step(TINY, "cpu", 2, True), bench.training_step(TINY, "cpu", 2)
    bench.agree("gradient", ours.gradient(), plain.gradient(), 1e-5)
    for _ in range(3):
        assert plain().item() == pytest.approx(ours().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["decode", pytest.param("pool", marks=pytest.mark.slow)])
def test_quick_tables_run(name, tmp_path, monkeypatch):
    table = bench.Table(name, bench.BenchConfig(quick=True, out=str(tmp_path), repeat=1), "cpu")
    bench.BENCHES[name](table)
    assert table.rows and all(row["ours"] > 0 for row in table.rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("words, message", [
    (["nonsense"], "unknown bench 'nonsense'"), ([""], "unknown bench ''"),
    (["gpu_check"], "needs a CUDA device"), (["moe", "--device=cuda"], "device=cuda"),
    (["moe", "--device=foo"], "--device: expected auto|cpu|cuda"), (["moe", "--quik"], "--quick"),
    (["moe", "--threads=100000"], "threads=100000"), (["moe", "--threads=-1"], "threads=-1"),
    (["moe", "--repeat=-1"], "repeat=-1"), (["moe", "--out=/dev/null/x"], "/dev/null/x")])
def test_mistakes_get_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(bench.main, words, monkeypatch, capsys)
    assert not Path("out/timing.lock").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_bench_says_nothing_and_leaves_no_lock(tmp_path, number):
    words = [sys.executable, "-m", "lab.bench", "moe", "--quick", "--repeat=10000", "--device=cpu"]
    process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    lock = tmp_path / "out" / "timing.lock"
    while not lock.exists():
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(3)  # beyond the pause, in the middle of a table
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 128 + number
    assert not lock.exists()
