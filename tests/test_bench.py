"""lab.bench and lab.gpu_check: a wrong result has no speed, a row says what it says, steps that die
or hang do not stop the others."""
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
from lab import bench, gpu_check
from model import ModelConfig
from support import budget

TINY = dict(n_layer=2, n_head=2, d_model=32, block_size=16, vocab_size=50)


def routed(family=None, t=40, d=16, f=8, e=5, k=2):
    """Inputs of the bench's MoE layers, and what a loop over tokens makes of them."""
    x, _, _, w_in, w_out = (
        a.detach() for a in expert_inputs(t, d, f, e, k, "swiglu", dtype=torch.float32))
    router = torch.randn(e, d)
    weights, ids = (x @ router.T).softmax(-1).topk(k)
    if family == "Mixtral":
        weights = weights / weights.sum(-1, keepdim=True)
    exact = literal_experts(
        x.double(), weights.double(), ids, w_in.double(), w_out.double(), "swiglu")[0]
    return (x, router, w_in, w_out), exact


@pytest.mark.parametrize("layer", [bench.moe_layer, gpu_check.by_grouped_mm])
def test_layers_are_the_loop(layer):
    inputs, exact = routed()
    assert max(distances([layer(*inputs, top_k=2)], [exact])) < 2e-6


@pytest.mark.parametrize("family", ["Mixtral", "Olmoe"])
def test_transformers_blocks_compute_with_our_weights(family):
    pytest.importorskip("transformers")
    inputs, exact = routed(family)
    leaves = [a.requires_grad_() for a in inputs]
    blocks = bench.transformers_blocks(family, *inputs, top_k=2)
    assert set(blocks) == {"eager", "grouped_mm"}
    for block in blocks.values():
        y = block(*leaves)
        assert max(distances([y.detach()], [exact])) < 2e-6
        assert all(g.any() for g in torch.autograd.grad(y.square().sum(), leaves))


@pytest.mark.parametrize("layer", [gpu_check.infmoe_inside, bench.infmoe_masked])
def test_continuous_references_are_the_formula(layer):
    inputs = [a.detach() for a in mask_inputs(9, 16, 40, 3, 4, 10, "gelu")]
    assert max(distances([layer(*inputs, 10)], [literal_masked(*inputs, 10, "gelu")])) < 1e-12


@pytest.fixture
def table(tmp_path):
    return bench.Table(bench.BenchConfig(quick=True, out=str(tmp_path), repeat=1))


def test_a_wrong_result_has_no_speed(table, tmp_path, monkeypatch, capsys):
    honest = kernels.masked_ffn
    monkeypatch.setattr(kernels, "masked_ffn", lambda *a, **k: honest(*a, **k) * 1.001)
    assert bench.run_benches(["infmoe"], table.config) == 1
    assert not list(tmp_path.glob("bench/*.jsonl"))
    assert "infmoe's FFN disagrees with its reference" in capsys.readouterr().err


def test_infmoe_has_all_its_rows(table):
    bench.bench_infmoe(table)
    rows = [json.loads(line) for line in table.path.read_text().splitlines()]
    passes = ("forward, ", "forward + backward, ")
    assert [[f"FFN, {p}" in row["what"] for row in rows] for p in passes] == [
        [True, True, False, False], [False, False, True, True]]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_nan_does_not_agree(wrong):
    with pytest.raises(ArithmeticError):
        bench.agree("x", torch.tensor([1.0, wrong]), torch.tensor([1.0, 2.0]), 1e-2)


def test_rows_are_written_as_they_are_measured_with_their_units(table, tmp_path, capsys):
    """Seconds and bytes in the record, milliseconds and megabytes on the screen and the page."""
    table.faster("a layer", "a loop", 0.2, 0.1, ">= 1.1")
    table.row("a step", "dense", 0.1, 0.13, "<= 1.25")
    table.row("memory", "another", 1e7, 1.3e7, unit="B")
    saved = [json.loads(line) for line in (tmp_path / "bench/cpu.jsonl").read_text().splitlines()]
    assert [(row["reached"], row["ratio"]) for row in saved] == [
        (True, 2.0), (False, 1.3), (None, 1.3)]
    assert [(row["theirs"], row["unit"]) for row in saved] == [(0.2, "s"), (0.1, "s"), (1e7, "B")]
    assert saved[0]["torch"] == torch.__version__ and saved[0]["machine"]
    printed = capsys.readouterr().out
    assert "200.00 ms, ours 100.00 ms" in printed and "ours 13.00 MB" in printed
    assert "<= 1.25 NOT REACHED" in printed
    bench.write_page(tmp_path)
    page = (tmp_path / "cpu.md").read_text()
    assert "| a layer | a loop | >= 1.1 | **2.00** (100 ms) |" in page
    assert "| memory | another |  | 1.30 (13 MB) |" in page


def test_the_page_has_a_column_a_machine_and_keeps_its_words(tmp_path):
    (tmp_path / "bench").mkdir()
    row = dict(what="x", reference="y", theirs=1, ours=2, unit="s", ratio=2.0, reach="<= 3",
               reached=True, date="2026-01-01", machine="old")
    newer = [row | dict(date="2026-02-01", machine="new", ratio=r) for r in (1.0, 1.5)]
    only = row | dict(what="z")
    lines = "\n".join(map(json.dumps, [row, only, *newer]))
    (tmp_path / "bench/cpu.jsonl").write_text(lines + "\n")
    (tmp_path / "cpu.md").write_text("# Head\n\n| a |\n|---|\n| b |\n\nTail\n")
    bench.write_page(tmp_path)
    assert (tmp_path / "cpu.md").read_text().splitlines() == [
        "# Head", "", "| what | reference | reach | old, 2026-01-01 | new, 2026-02-01 |",
        "|---|---|---|---|---|", "| x | y | <= 3 | **2.00** (2,000 ms) | **1.50** (2,000 ms) |",
        "| z | y | <= 3 | **2.00** (2,000 ms) | - |", "", "Tail"]


def test_rounds_are_interleaved_and_medians():
    called, sleeps = [], iter([0, 0, 0, 0, 0.05, 0, 0, 0, 0, 0])
    slow = lambda: (called.append("a"), time.sleep(next(sleeps)))
    times = bench.interleave({"a": slow, "b": lambda: called.append("b")}, "cpu", 3)
    assert "".join(called) == "aabb" + "ababab" and times["a"] < 0.02  # a slow round does not count


MODELS = {flavour: ModelConfig(**TINY, flavour=flavour) for flavour in ("switch", "infmoe")}


def test_steps_are_compared_with_the_oracle_before_they_are_timed(monkeypatch):
    """Gradients and losses of the literal loops; a step trains; a broken model is found."""
    steps = bench.checked_steps(MODELS, 2, 1e-4)
    for step in steps.values():
        losses = [step().item() for _ in range(4)]
        assert losses[-1] < losses[0] and step.without_optimizer() is None
    honest = kernels.expert_ffn
    monkeypatch.setattr(
        kernels, "expert_ffn", lambda *a: (honest(*a)[0] * 0.9, honest(*a)[1]))
    with pytest.raises(ArithmeticError, match="switch's step"):
        bench.checked_steps(MODELS, 2, 1e-4)


def test_nanogpt_is_named_by_its_folder(tmp_path):
    """Of a stand-in for its model.py: our weights arrive under its names."""
    (tmp_path / "model.py").write_text("""if True:
        import torch
        import model
        from support.hf import their_names
        GPTConfig = lambda *sizes: dict(zip(("block_size", "vocab_size", "n_layer", "n_head",
                                             "d_model", "dropout", "bias"), sizes))
        class GPT(torch.nn.Module):
            def __init__(self, sizes):
                super().__init__()
                self.inner = model.GPT(model.ModelConfig(**sizes))
            def load_state_dict(self, weights):
                names = {n: their_names(n, "gpt2")[0] for n in self.inner.state_dict()}
                self.inner.load_state_dict({n: weights[theirs] for n, theirs in names.items()})
            def configure_optimizers(self, decay, lr, betas, device):
                return torch.optim.AdamW(self.parameters(), lr=lr)
            def forward(self, tokens, targets):
                return None, self.inner(tokens, targets).loss
    """)
    config = ModelConfig(**TINY)
    theirs = bench.nanogpt_steps(tmp_path, config, 2)["eager"]
    ours = bench.training_step(config, "cpu", 2)
    assert theirs().item() == pytest.approx(ours().item(), rel=1e-6)


def test_a_quick_table_runs(table):
    bench.bench_decode(table)
    assert len(table.rows) == 4 and all(row["ours"] > 0 for row in table.rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module, words, message", [
    (bench, ["nonsense"], "unknown bench 'nonsense'"), (bench, [""], "unknown bench ''"),
    (bench, ["moe", "--quik"], "--quick"), (bench, ["moe", "--nanogpt=."], "nanogpt=. has no"),
    (bench, ["moe", "--repeat=-1"], "repeat=-1"),
    (bench, ["moe", "--out=/dev/null/x"], "/dev/null/x"),
    (gpu_check, [], "needs a CUDA device"), (gpu_check, ["nonsense"], "unknown bench 'nonsense'"),
    (gpu_check, ["--part=4"], "part=4")])
def test_mistakes_get_one_line(tmp_path, monkeypatch, capsys, module, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(module.main, words, monkeypatch, capsys)


def test_a_stopped_bench_says_nothing(tmp_path):
    words = [sys.executable, "-m", "lab.bench", "moe", "--quick", "--repeat=10000"]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True)
    assert process.stdout.readline() == "\n" and "moe on" in process.stdout.readline()
    time.sleep(2)  # in the middle of a table
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert "Traceback" not in err and process.returncode == 130


# ---- the GPU check, as far as it goes without one

def test_a_step_that_dies_or_hangs_lets_the_next_one_run(tmp_path):
    row = f"open({str(tmp_path / 'rows')!r}, 'a').write('row ')"
    todo = [("dies", 20, ["-c", f"{row}; raise SystemExit('why')"]),
            ("hangs", 1, ["-c", f"{row}; import time; time.sleep(60)"]),
            ("crashes", 20, ["-c", "import os; os.abort()"]), ("works", 20, ["-c", row])]
    assert gpu_check.run_steps(todo, tmp_path) == 3
    reasons = (tmp_path / "gpu_check.txt").read_text().splitlines()
    assert [line.rpartition(" after ")[0] for line in reasons] == [
        "dies: exit code 1, why", "hangs: stopped at its limit of 1 s; rows measured before stay",
        "crashes: exit code -6, without a word", "works: ok"]
    assert (tmp_path / "rows").read_text() == "row row row "


def test_parts_are_under_eight_minutes_and_in_order():
    parts = gpu_check.steps(gpu_check.CheckConfig(out="there"))
    assert all(sum(limit for _, limit, _ in part) < 480 for part in parts.values())
    names = [name for part in parts.values() for name, _, _ in part]
    first = [next(i for i, name in enumerate(names) if name.startswith(word))
             for word in ("kernels", "tests", "layer", "infmoe", "decode", "train")]
    assert first == sorted(first)
    words = [words for part in parts.values() for _, _, words in part]
    assert all("--out=there" in w for w in words if "lab.gpu_check" in w)
    assert all(Path(__file__).parent.parent.joinpath(w).exists()
               for command in words for w in command if w.endswith(".py"))


def test_speed_and_loss_are_read_off_the_logs_of_the_runs(table, tmp_path, monkeypatch, capsys):
    """As far as they came: a run that was stopped counts, one that never began has no row."""
    monkeypatch.chdir(tmp_path)
    for name, speed in (("llama_182m", 100), ("moe_182m", 90), ("gpt2_small", 80)):
        folder = tmp_path / f"out/gpu-{name}"
        folder.mkdir(parents=True)
        rows = [f"{step},{speed if step > 20 else 1},{9 - step / 10}" for step in (10, 20, 30, 40)]
        (folder / "log.csv").write_text("\n".join(["step,tokens_per_second,train_loss", *rows]))
    monkeypatch.setattr(budget, "peak_flops", lambda device: None)
    gpu_check.check_train(table, 0)
    assert [(row["ratio"], row["reached"]) for row in table.rows] == [(0.9, True)]
    assert "moe_182m: 90 tokens a second, loss 5.0 after step 40" in capsys.readouterr().out
