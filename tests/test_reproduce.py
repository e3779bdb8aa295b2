"""lab.reproduce: budgets that match, runs that resume, a report that records alone determine."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from statistics import stdev

import pytest
import torch
from train_helpers import make_data, refused

from lab import reproduce
from losses import BALANCES

ROOT = Path(__file__).parent.parent
REPRODUCE = [sys.executable, "-m", "lab.reproduce"]


def model_config(name, size="cpu"):
    return reproduce.configs_of(reproduce.settings_of(size, name)[0])[0]


def n_router(config):
    """Parameters of a model that no dense model of the same widths has: its routers."""
    if config.flavour == "infmoe":
        per_layer = config.d_expert * config.infmoe_dz  # W_z
        densities = 1 if config.infmoe_mean else 2  # mu, and logvar where something is drawn
        per_layer += densities * (config.d_model + 1) * config.infmoe_dz
    elif config.flavour == "dense":
        per_layer = 0
    else:
        per_layer = config.n_experts * config.d_model + (config.router == "norm")
    return config.n_layer * per_layer


# ---- the table

@pytest.mark.parametrize("size", reproduce.SIZES)
@pytest.mark.parametrize("name", [*reproduce.EXPERIMENTS, *reproduce.sweep_names()])
def test_every_run_is_a_valid_configuration(name, size):
    special = reproduce.settings_of(size, name)[1]
    assert model_config(name, size).n_layer >= 8  # a pool needs depth
    assert special["tune"] is None or special["tune"] in reproduce.EXPERIMENTS


@pytest.mark.parametrize("count, names", [
    ("n_active_params", "dense vanilla unipool vanilla-norm shared-pool unipool-G4 top2 pool2"),
    ("n_active_params", "dense-12 vanilla-12 unipool-12"),
    ("n_active_params", "dense switch-2 top2-of-4"),
    ("n_active_params", "dense vanilla-16/2 unipool-16/2 vanilla-32/4 unipool-32/4"),
    ("n_params", "vanilla unipool shared-layer unipool-G2 unipool-G8"),
    ("n_params", "top2 pool2"), ("n_params", "vanilla-12 unipool-12"),
    ("n_params", "dense-wide switch-2 top2-of-4 infmoe infmoe-no-topn"),
    ("n_params", "vanilla vanilla-16/2 unipool-16/2 unipool-32/4")])
def test_equal_parameters(count, names):
    configs = [model_config(name) for name in names.split()]
    assert len({getattr(c, count)() - n_router(c) for c in configs}) == 1


@pytest.mark.parametrize("depth", ["", "-12"])
@pytest.mark.parametrize("share", [67, 50, 33])
def test_smaller_pools_have_the_share_they_say(depth, share):
    pool, private = model_config(f"unipool{depth}-{share}%"), model_config(f"vanilla{depth}")
    share_of_all = pool.n_experts / (private.n_layer * private.n_experts)
    assert share_of_all == pytest.approx(share / 100, abs=0.006)


def test_claims_name_runs():
    sides = [side.partition(":")[0] for _, _, *pair in reproduce.CLAIMS for side in pair]
    assert set(sides) <= set(reproduce.EXPERIMENTS)
    assert set("".join(claims for claims, _ in reproduce.EXPERIMENTS.values())) == set("abcdefgh23")


def test_every_run_is_in_a_figure():
    shown = {name for names in reproduce.FIGURES.values() for name in names.split()}
    assert shown == set(reproduce.EXPERIMENTS)


def test_a_claim_runs_what_it_compares():
    """--only=a,b,e,f leaves no claim of a, b (e and f: their main rows) without its two runs."""
    of = {name: reproduce.claims_of(claims) for name, (claims, _) in reproduce.EXPERIMENTS.items()}
    for claim, text, *pair in reproduce.CLAIMS:
        for side in pair:
            assert any(c[0] == claim for c in of[side.partition(":")[0]]), (claim, text, side)


@pytest.mark.parametrize("text, claims", [
    ("a", ["a"]), ("abe2", ["a", "b", "e2"]), ("f2h", ["f2", "h"]), ("", [])])
def test_claims_of(text, claims):
    assert reproduce.claims_of(text) == claims


# ---- one run

@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A working folder with a small corpus, and runs of 12 steps."""
    monkeypatch.chdir(tmp_path)
    make_data(tmp_path / "data" / "words", n_train=20_001, n_val=3_000)
    make_data(tmp_path / "data" / "prose", n_train=20_001, n_val=3_000)
    size = dict(dataset="data/words", n_layer=8, n_head=2, d_model=16, d_ff=32, block_size=16,
                batch_tokens=256, micro_batch=16, max_steps=12, warmup_steps=2, eval_every=4,
                eval_tokens=256, save_every=4, log_every=1)
    monkeypatch.setitem(reproduce.SIZES, "cpu", reproduce.SIZES["cpu"] | size)
    return tmp_path


def record_of(name, seed=1):
    reproduce.run_one("cpu", name, seed)
    return json.loads(reproduce.record_path("cpu", name, seed).read_text())


MEASURED = {"vanilla": {"routing entropy", "path consistency", "random, all", "random, matched"},
            "unipool": {"routing entropy", "path consistency", "unique experts", "random, all",
                        "random, matched"},
            "top2-sp-cp": {"routing entropy", "path consistency", "overlap"},
            "infmoe": {*(f"loss at K={k}" for k in (1, 2, 4, 8)), "loss at z=mu"},
            "infmoe-no-noise": set(), "dense": set()}


@pytest.mark.parametrize("name", MEASURED)
def test_a_run_leaves_a_record(tiny, name):
    record = record_of(name)
    assert set(record["measures"]) == MEASURED[name]
    assert [point[0] for point in record["curve"]] == [1024, 2048, 3072]
    assert record["tokens"] == 3072 and reproduce.check_record(record) == record
    assert record["curve"][-1][2] == pytest.approx(record["val_loss"], abs=1e-5)
    assert record["val_loss"] < record["curve"][0][2]  # it learns
    assert record["n_active_params"] == model_config(name).n_active_params()
    assert str(tiny) not in json.dumps(record)  # it says nothing of the machine's folders


def test_measures_that_claims_ask_for_exist(tiny):
    sides = [side for _, _, *pair in reproduce.CLAIMS for side in pair]
    asked = {tuple(side.split(":")) for side in sides if ":" in side}
    for name in {name for name, _ in asked} - {"vanilla", "unipool", "top2-sp-cp", "infmoe"}:
        assert {m for n, m in asked if n == name} <= set(record_of(name)["measures"])
    for name, measure in asked:
        assert measure in MEASURED.get(name, {measure})


def test_a_stopped_run_goes_on(tiny, monkeypatch):
    """Stopped after a checkpoint, it ends with the very record of a run that was not."""
    whole = record_of("top2", seed=1)
    (tiny / "results").rename(tiny / "first")
    (tiny / "out").rename(tiny / "first_out")
    import train
    honest, calls = train.train_step, []

    def fails_in_step_7(run, step):
        calls.append(step)
        if len(calls) == 7:
            raise OSError("pulled the plug")
        return honest(run, step)

    monkeypatch.setattr(train, "train_step", fails_in_step_7)
    with pytest.raises(OSError, match="plug"):
        record_of("top2", seed=1)
    again = record_of("top2", seed=1)
    assert calls[7:] == list(range(4, 12))  # from the checkpoint of step 4
    assert again["val_loss"] == whole["val_loss"] and again["measures"] == whole["measures"]


def test_a_checkpoint_of_other_settings_is_not_gone_on_with(tiny, monkeypatch):
    first = record_of("dense")
    assert reproduce.is_done("cpu", "dense", 1)
    monkeypatch.setitem(reproduce.SIZES, "cpu", reproduce.SIZES["cpu"] | dict(max_steps=16))
    assert not reproduce.is_done("cpu", "dense", 1)
    again = record_of("dense")
    assert again["settings"] == first["settings"] | {"max_steps": 16}
    assert again["curve"][0] != first["curve"][0]
    log = (tiny / "out/reproduce/cpu-dense-s1/log.csv").read_text()
    assert len(log.splitlines()) == 1 + 16  # none of the first 12 rows


@pytest.mark.parametrize("name", reproduce.EXPERIMENTS)
def test_a_checkpoint_is_known_by_its_settings(tmp_path, name):
    """config.json is compared with the table, fields that only the flavour sets included."""
    settings, _ = reproduce.settings_of("cpu", name)
    model, train = map(asdict, reproduce.configs_of(settings, seed=7))
    (tmp_path / "config.json").write_text(json.dumps({"model": model, "train": train}))
    assert not reproduce.holds(tmp_path, settings)  # no checkpoint
    (tmp_path / "ckpt.pt").touch()
    assert reproduce.holds(tmp_path, settings)
    for other in ({"lr": 1.0}, {"dropout": 0.5}, {"block_size": 64}):
        assert not reproduce.holds(tmp_path, settings | other)
    other = {"model": model | {"balance_coef": 0.5}, "train": train}
    (tmp_path / "config.json").write_text(json.dumps(other))
    assert not reproduce.holds(tmp_path, settings)


def test_fine_tuning_starts_from_the_run_it_names(tiny):
    assert not reproduce.is_ready("cpu", "tune-top2", 1)
    trained = record_of("top2")
    assert reproduce.is_ready("cpu", "tune-top2", 1)
    tuned = record_of("tune-top2")
    assert tuned["settings"]["dataset"] == "data/prose" and tuned["settings"]["max_steps"] == 6
    assert tuned["curve"][0][2] < trained["curve"][0][2] - 0.1  # it does not start from scratch
    assert tuned["settings"]["lr"] == trained["settings"]["lr"] / 4


def test_stale_pool_loss_uses_the_counts_of_the_call_before():
    scores = [torch.rand(6, 4)]
    counts = torch.tensor([[3.0, 1, 1, 1]]), torch.tensor([[0.0, 0, 0, 6]])
    exact = BALANCES["pool"]
    with reproduce.stale_pool_loss():
        first, second = (BALANCES["pool"](scores, [c]) for c in counts)
    assert BALANCES["pool"] is exact
    assert first == second == exact(scores, [counts[0]]) != exact(scores, [counts[1]])


def test_prose_is_docstrings(tmp_path):
    file = tmp_path / "a.py"
    file.write_text('"""One."""\nx = "not this"\n' 'def f():\n    """Two.\n\n    Three."""\n'
                    'class C:\n    def g(self):\n        "Four"\n')
    assert reproduce.docstrings(file) == "One.\n\nTwo.\n\nThree.\n\nFour"
    file.write_text("def broken(:")
    assert reproduce.docstrings(file) == ""
    file.write_bytes(b'"""\xff"""')
    assert reproduce.docstrings(file) == ""


# ---- the report

@pytest.mark.parametrize("freedom, t", reproduce.T_975.items())
def test_students_t(freedom, t):
    """2.5 % of Student's density lie beyond t: the density integrated from 0 to t."""
    x = torch.linspace(0, t, 100_001, dtype=torch.float64)
    density = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    density /= math.sqrt(freedom * math.pi)
    inside = torch.trapezoid(density * (1 + x**2 / freedom) ** (-(freedom + 1) / 2), x)
    assert 0.5 - inside.item() == pytest.approx(0.025, abs=2e-5)


UNDECIDED = "undecided at this scale"


@pytest.mark.parametrize("differences, common, verdict", [
    ([-0.02, -0.03, -0.025], (0.0, 0), "holds"),
    ([0.02, 0.03, 0.025], (0.0, 0), "does not hold here"),
    ([-0.01, 0.02, 0.0], (0.0, 0), UNDECIDED), ([-0.5], (0.0, 0), UNDECIDED),
    ([-0.1, -0.9, -0.2], (0.0, 0), UNDECIDED),  # all below zero, but t(2) = 4.3 is wide
    ([-0.01] * 12, (0.0, 0), "holds"),
    ([-0.01, -0.03, -0.02], (0.0, 0), UNDECIDED),  # t(2) s / sqrt(3) = 0.025
    ([-0.01, -0.03, -0.02], (0.01, 60), "holds"),  # t(60) s / sqrt(3) = 0.012
    ([-0.02, -0.0201, -0.0199], (0.05, 60), UNDECIDED),  # agreement by luck
    ([-0.06, 0.04, -0.01], (0.001, 60), UNDECIDED),  # a pair that varies more
    ([-0.5], (0.01, 60), UNDECIDED)])
def test_verdicts(differences, common, verdict):
    assert reproduce.verdict(differences, common) == verdict


def losses(**of_runs):
    return {(name, seed): {"val_loss": loss}
            for name, row in of_runs.items() for seed, loss in enumerate(row, 1)}


def test_common_spread():
    additive = losses(dense=(1.0, 2.0, 4.0), vanilla=(1.5, 2.5, 4.5), unipool=(0.0, 1.0, 3.0))
    assert reproduce.common_spread(additive) == (pytest.approx(0, abs=1e-12), 4)
    # of two runs it is the deviation of their differences
    two = losses(dense=(1.0, 2.0, 4.0), vanilla=(1.1, 2.5, 4.3))
    assert reproduce.common_spread(two) == (pytest.approx(stdev([0.1, 0.5, 0.3])), 2)
    two["unipool", 1] = {"val_loss": 9.0}  # one seed does not count
    assert reproduce.common_spread(two)[1] == 2
    for few in (losses(dense=(1.0, 2.0, 4.0)), {}):
        assert reproduce.common_spread(few) == (0.0, 0)


def test_common_spread_finds_the_deviation_that_was_put_in():
    torch.manual_seed(0)
    of_seed = torch.tensor([0.3, 0.0, -0.2])
    runs = {name: (torch.randn(1) + of_seed + 0.01 * torch.randn(3)).tolist()
            for name in reproduce.EXPERIMENTS}
    deviation, freedom = reproduce.common_spread(losses(**runs))
    assert freedom == 2 * (len(runs) - 1)
    assert deviation == pytest.approx(0.01 * math.sqrt(2), rel=0.2)


def write_record(name, seed, loss, **measures):
    path = reproduce.record_path("cpu", name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = reproduce.in_json(reproduce.settings_of("cpu", name)[0])
    column = "balance" if seed % 2 else "imbalance"  # its name in older logs, and now
    record = dict(
        run=name, size="cpu", seed=seed, settings=settings, val_loss=loss, n_params=1000,
        n_active_params=500, tokens=2048, flops_per_token=3000, seconds=2.0, hardware="a CPU",
        torch="2.13.0", commit="abc", curve=[[1024, 1.0, loss + 0.1], [2048, 2.0, loss]],
        measures=measures, routing={column: 1.25})
    path.write_text(json.dumps(record))


def test_the_report_is_the_same_byte_for_byte(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2, 3):
        write_record("dense", seed, 2.0 + seed / 100)
        write_record("vanilla", seed, 1.9 + seed / 100 + seed / 1000)
    write_record("unipool", 1, 1.8, **{"random, all": 0.5})
    write_record("lr/dense/0.002", 1, 2.2)
    reproduce.report("cpu")
    files = {p.name: p.read_bytes() for p in Path("results").glob("claims*")}
    reproduce.report("cpu")
    assert files == {p.name: p.read_bytes() for p in Path("results").glob("claims*")}
    text = files["claims.md"].decode()
    sides = "`vanilla` 1.9220 ± 0.0110 | `dense` 2.0200 ± 0.0100"
    assert f"{sides} | -0.0980 ± 0.0010 | 3 | holds" in text
    assert "`unipool` 1.8000 | `vanilla` 1.9110 | -0.1110 | 1 | undecided at this scale" in text
    assert "| `vanilla` |  |  |  |  | 1.250 |" in text  # what its routers do
    assert "not run yet" in text and "**2.2000**" in text
    assert set(files) >= {"claims.md"}


def test_only_seeds_that_both_sides_have_are_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (1, 3):
        write_record("dense", seed, 2.0)
    for seed in (1, 2):
        write_record("vanilla", seed, 1.0)
    assert reproduce.compare(reproduce.load_records("cpu"), "vanilla", "dense") == [(1.0, 2.0)]


def test_records_of_other_settings_are_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_record("dense", 1, 2.0)
    write_record("lr/dense/0.002", 1, 2.0)
    path = reproduce.record_path("cpu", "dense", 1)
    record = json.loads(path.read_text())
    for key, other in (("run", "no such run"), ("settings", record["settings"] | {"lr": 1.0})):
        changed = record | {key: other, "seed": 2}
        path.with_name("cpu-other-s2.json").write_text(json.dumps(changed))
        assert set(reproduce.load_records("cpu")) == {("dense", 1), ("lr/dense/0.002", 1)}


DAMAGED = {"empty": b"", "cut": b'{"run": "dense", "seed": 2', "list": b"[]", "number": b"1e999",
           "binary": bytes(range(256)), "deep": b"[" * 100_000, "no settings": {"settings": None},
           "loss is text": {"val_loss": "2.0"}, "loss is NaN": {"val_loss": math.nan},
           "curve of text": {"curve": ["abc"]}}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_record_is_named_and_the_others_go_on(tmp_path, monkeypatch, capsys, how):
    monkeypatch.chdir(tmp_path)
    write_record("dense", 1, 2.0)
    write_record("dense", 2, 2.0)
    path = reproduce.record_path("cpu", "dense", 2)
    damage = DAMAGED[how]
    if isinstance(damage, dict):
        damage = json.dumps(json.loads(path.read_text()) | damage).encode()
    path.write_bytes(damage)
    assert set(reproduce.load_records("cpu")) == {("dense", 1)}
    assert reproduce.is_done("cpu", "dense", 1) and not reproduce.is_done("cpu", "dense", 2)
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 2 and all(line.startswith(f"{path} is damaged") for line in error)


def test_committed_records_are_whole(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert len(reproduce.load_records("cpu")) == 139 and not capsys.readouterr().err


def test_a_lock_counts_while_its_process_lives(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not reproduce.timing()
    (tmp_path / "out").mkdir()
    lock = tmp_path / "out" / "timing.lock"
    lock.write_text(str(os.getpid()))
    assert reproduce.timing()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for text in (str(gone.pid), ""):
        lock.write_text(text)
        assert not reproduce.timing()


@pytest.mark.parametrize("words, message", [
    (["--only=tune-top2", "--seeds=1"], "tune-top2 seed 1 tunes the model of top2"),
    (["--only=nonsense"], "nonsense is no claim"), (["--only=,"], "only=,"),
    (["--sedes=1"], "did you mean --seeds"), (["--child=nonsense"], "no experiment nonsense"),
    (["--report"], "no records of size cpu"), (["--size=tpu"], "size=tpu"),
    (["--jobs=0"], "jobs=0"), (["--minutes=-1"], "minutes=-1"),
    (["--threads=0"], "threads=0"), (["--threads=9999"], "threads=9999"),
    (["--seeds="], "seeds=()"), (["--seeds=-1"], "seeds=(-1,)"),
    (["--seeds=1.5"], "seeds=(1.5,)"), (["--seeds=a"], "seeds")])
def test_mistakes_get_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(reproduce.main, words, monkeypatch, capsys)


@pytest.mark.parametrize("word, first, n", [
    ("--only=a", "dense ", 7), ("--sweep", "lr/dense/0.001 ", 20)])
def test_list_shows_what_was_asked_for(tmp_path, word, first, n):
    command = [*REPRODUCE, "--list", word]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout.startswith(first) and len(run.stdout.splitlines()) == n
    assert run.returncode == 0


@pytest.mark.slow
def test_a_deadline_stops_and_the_next_call_resumes(tmp_path):
    """Time ends in the middle of a run, SIGTERM saves it, and a later call goes on from there."""
    words = [*REPRODUCE, "--only=dense", "--seeds=1", "--minutes=0.35"]
    first, second = (subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
                     for _ in range(2))
    assert "dense seed 1: stopped, resumes next time" in first.stdout and first.returncode == 0
    rows = (tmp_path / "out/reproduce/cpu-dense-s1/log.csv").read_text().splitlines()[1:]
    steps = [int(row.split(",")[0]) for row in rows]
    assert "stopped, resumes next time" in second.stdout
    assert steps == sorted(set(steps)) and len(steps) > 5


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("number, paused", [
    (signal.SIGINT, False), (signal.SIGKILL, True),
    pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow),
    pytest.param(signal.SIGKILL, False, marks=pytest.mark.slow)])
def test_no_run_outlives_its_runner(tmp_path, number, paused):
    """Two runs, stopped by Ctrl-C (as a terminal sends it: to the group), TERM or kill -9."""
    make_data(tmp_path / "data" / "stdlib", n_train=200_001, n_val=70_000)
    folders = [tmp_path / f"out/reproduce/cpu-dense-s{seed}" for seed in (1, 2)]
    words = [*REPRODUCE, "--only=dense", "--seeds=1,2", "--jobs=2"]
    runner = subprocess.Popen(
        words, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not all(len(lines(folder / "log.csv")) > 1 for folder in folders):
        assert runner.poll() is None
        time.sleep(0.2)
    children = Path(f"/proc/{runner.pid}/task/{runner.pid}/children").read_text().split()
    assert len(children) == 2
    if paused:
        (tmp_path / "out" / "timing.lock").write_text(str(os.getpid()))
        while not all(" (stopped)" in Path(f"/proc/{pid}/status").read_text() for pid in children):
            time.sleep(0.1)
    (os.killpg if number == signal.SIGINT else os.kill)(runner.pid, number)
    error = runner.communicate(timeout=60)[1]
    assert runner.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in error
    time.sleep(0.5)
    assert not any(is_running(pid) for pid in children)
    if number != signal.SIGKILL:
        assert all((folder / "ckpt.pt").exists() for folder in folders)  # they saved first


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def is_running(pid):
    try:
        return " (zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_an_interrupt_before_the_runs_begin_is_quiet(tmp_path):
    process = subprocess.Popen([*REPRODUCE, "--only=dense"], cwd=tmp_path, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert "preparing" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in error
