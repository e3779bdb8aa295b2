"""lab.reproduce: budgets that match, runs that resume, a report that records alone determine."""
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train_helpers import ROOT, environment, make_data, refused

import train
from lab import claims, reproduce

CONFIG = reproduce.ReproduceConfig()


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def model_config(name, size="cpu"):
    return reproduce.configs_of(reproduce.settings_of(size, name, 1e-3)[0])[0]


def n_router(config):
    """Parameters of a model that no dense model of the same widths has: its routers."""
    if config.flavour == "infmoe":
        per_layer = config.d_expert * config.infmoe_dz  # W_z
        densities = 1 if config.infmoe_mean else 2  # mu, and logvar where something is drawn
        per_layer += densities * (config.d_model + 1) * config.infmoe_dz
    elif config.flavour == "dense":  # GPT-2's FFN has biases, experts have none
        per_layer = (config.d_ff + config.d_model) * config.bias
    else:
        per_layer = config.n_experts * config.d_model + (config.router == "norm")
    return config.n_layer * per_layer


# ---- the table

@pytest.mark.parametrize("size", reproduce.SIZES)
def test_every_run_is_a_valid_configuration_of_a_swept_family(size):
    for name in [*reproduce.SHOWN[size], *(f"lr/{family}/-1" for family in reproduce.SWEPT)]:
        assert model_config(name, size).n_layer >= 4, name
        assert reproduce.family_of(name) in reproduce.SWEPT, name
    for family, name in reproduce.SWEPT.items():
        assert reproduce.family_of(name) == family


@pytest.mark.parametrize("count, names", [
    ("n_active_params", "dense vanilla unipool softmax-pool private-norm unipool-50% top2 "
                        "top2-sp-cp top2-of-4 vanilla-thin unipool-thin"),
    ("n_active_params", "vanilla-16/2 unipool-16/2"),
    ("n_active_params", "gpt2-dense gpt2-top2-of-4"),
    ("n_active_params", "dense@128x16 vanilla@128x16 unipool@128x16"),
    ("n_params", "vanilla unipool softmax-pool private-norm dense-total unipool-G2"),
    ("n_params", "vanilla-16/2 unipool-16/2"), ("n_params", "top2-of-4 infmoe"),
    ("n_params", "gpt2-top2-of-4 gpt2-infmoe gpt2-no-noise")])
def test_equal_parameters(count, names):
    configs = [model_config(name) for name in names.split()]
    assert len({getattr(c, count)() - n_router(c) for c in configs}) == 1


@pytest.mark.parametrize("share", ["", "-27%"])
def test_controls_of_infmoe_keep_the_neurons_that_two_masks_keep(share):
    masks, noise = model_config("gpt2-no-mask" + share), model_config("gpt2-no-noise" + share)
    assert masks.d_expert == int(noise.d_expert * noise.infmoe_rate)
    assert masks.infmoe_rate == 1 and noise.d_expert == model_config("gpt2-infmoe").d_expert


def test_claims_name_runs_and_there_are_a_dozen():
    sides = [side.partition(":")[0] for c in claims.CLAIMS + claims.BESIDE for side in c[1:3]]
    assert set(sides) <= set(reproduce.PRIMARY) and len(claims.CLAIMS) == 12
    assert {name for pair in claims.GAPS for name in pair} <= set(reproduce.PRIMARY)
    assert {beside for beside, _ in reproduce.EXPLORED.values()} <= set(reproduce.EXPERIMENTS)


# ---- one run

@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A working folder with a small corpus, and runs of 12 steps."""
    make_data(tmp_path / "data" / "words", n_train=20_001, n_val=3_000)
    size = dict(dataset="data/words", n_layer=4, n_head=2, d_model=16, d_ff=32, block_size=16,
                batch_tokens=256, micro_batch=16, max_steps=12, warmup_steps=2, eval_every=4,
                eval_tokens=256, save_every=4, log_every=1)
    monkeypatch.setitem(reproduce.SIZES, "cpu", reproduce.SIZES["cpu"] | size)
    return tmp_path


def record_of(name, seed=1, config=CONFIG):
    assert reproduce.run_one(config, name, seed, 4e-3)
    return reproduce.load_records("cpu")[name, seed]


BY_K, BY_TOP = {f"loss at K={k}" for k in (1, 2, 4, 8)}, {f"loss at top {k}" for k in (1, 2, 3, 4)}


@pytest.mark.parametrize("name, measured", [
    ("dense", set()), ("unipool-50%", {"random, all", "random, matched"}),
    ("gpt2-top2-of-4", BY_TOP), ("gpt2-infmoe", {*BY_K, "loss at z=mu", "union"}),
    ("gpt2-no-noise", {"union"}), ("infmoe-anneal", {*BY_K, "loss at z=mu", "union"}),
    ("no-ffn", set()), ("lr/switch/-3", {"random, all", "random, matched"})])
def test_a_run_leaves_a_record_and_nothing_else(tiny, name, measured):
    record = record_of(name, seed=101 if "lr" in name else 1)
    steps = 6 if "lr" in name else 12
    assert set(record["measures"]) == measured
    assert [tokens for tokens, _ in record["curve"]] == [*range(1024, 256 * steps, 1024),
                                                         256 * steps]
    assert record["curve"][-1][1] == pytest.approx(record["val_loss"], abs=1e-5)
    assert record["val_loss"] < 5.5 and record["n_params"] == model_config(name).n_params()
    assert record["cpu_seconds"] > 0 and len(record["data"]) == 12 and record["machine"]
    assert bool(record["routing"]) == (record["settings"]["flavour"] == "infmoe")
    assert str(tiny) not in json.dumps(record)  # it says nothing of the machine's folders
    assert not list((tiny / "out/reproduce").iterdir())
    if name == "gpt2-no-noise":
        assert record["measures"]["union"] == reproduce.UNION


def test_claims_ask_for_what_runs_measure(tiny):
    asked = {tuple(side.split(":")) for c in claims.CLAIMS + claims.BESIDE for side in c[1:3]
             if ":" in side}
    for name in {name for name, _ in asked}:
        assert {m for n, m in asked if n == name} <= set(record_of(name)["measures"])


def test_a_stopped_run_goes_on(tiny, monkeypatch):
    """Stopped after a checkpoint, it ends with the losses of a run that was not."""
    whole = record_of("top2", config=reproduce.ReproduceConfig(keep=True))
    reproduce.RECORDS.unlink()
    (tiny / "out").rename(tiny / "first")
    honest, calls = train.train_step, []

    def fails_in_step_7(run, step):
        calls.append(step)
        if len(calls) == 7:
            raise OSError("pulled the plug")
        return honest(run, step)

    monkeypatch.setattr(train, "train_step", fails_in_step_7)
    with pytest.raises(OSError, match="plug"):
        record_of("top2")
    assert train.train_step is fails_in_step_7 and not reproduce.load_records("cpu")
    again = record_of("top2")
    assert calls[7:] == list(range(4, 12))  # from the checkpoint of step 4
    same = ("val_loss", "curve", "measures", "settings")
    assert {k: again[k] for k in same} == {k: whole[k] for k in same}
    assert again["cpu_seconds"] is None  # a part of it was spent elsewhere


def test_told_to_stop_in_its_last_step_a_run_is_recorded_and_none_follows(tiny, monkeypatch):
    honest = train.train_step

    def told_in_the_last_step(run, step):
        if step == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(run, step)

    monkeypatch.setattr(train, "train_step", told_in_the_last_step)
    assert not reproduce.run_one(CONFIG, "dense", 1, 4e-3)
    assert ("dense", 1) in reproduce.load_records("cpu")


def test_a_checkpoint_of_other_settings_is_not_gone_on_with(tiny, monkeypatch):
    first = record_of("dense", config=reproduce.ReproduceConfig(keep=True))
    monkeypatch.setitem(reproduce.SIZES, "cpu", reproduce.SIZES["cpu"] | dict(max_steps=16))
    assert not reproduce.load_records("cpu")
    again = record_of("dense")
    assert again["settings"] == first["settings"] | {"max_steps": 16}
    assert len(again["curve"]) == 4 and again["curve"][0] != first["curve"][0]


def test_a_run_that_diverges_has_learnt_nothing(tiny, monkeypatch):
    monkeypatch.setattr(train, "train_step", lambda run, step: (math.nan, 0.0, 1.0, {}))
    record = record_of("lr/dense/3", seed=101)
    assert record["val_loss"] == pytest.approx(math.log(257)) and "step 1" in record["diverged"]


def test_the_share_of_kept_neurons_falls_over_the_first_half(tiny, monkeypatch):
    seen, honest = [], train.train_step

    def looks(trainer, step):
        seen.append(trainer.model.expert_layers()[0][1].n_keep[0])
        return honest(trainer, step)

    monkeypatch.setattr(train, "train_step", looks)
    record_of("infmoe-anneal")
    assert seen == [128, 112, 96, 80, 64, 48, *[32] * 6]


# ---- rates, and which run is next

def swept(records, family, lowest, rates, seeds=reproduce.SWEEP_SEEDS):
    return records | {(f"lr/{family}/{k}", seed): dict(val_loss=1.5 + 0.01 * (k - lowest) ** 2)
                      for k in rates for seed in seeds}


def test_a_sweep_goes_on_until_its_minimum_lies_inside():
    runs = lambda records: {(name.split("/")[2], s) for name, s in
                            reproduce.sweep(records, "dense")[0]}
    assert runs({}) == {(k, s) for k in ("-2", "-1", "0") for s in (101, 102, 103)}
    records = swept({}, "dense", -2.3, (-2, -1, 0))
    assert runs(records) == {("-3", s) for s in (101, 102, 103)}
    assert runs(swept({}, "dense", 0.4, (-2, -1, 0))) == {("1", s) for s in (101, 102, 103)}
    assert reproduce.learning_rate(records, "cpu", "dense") is None
    records = swept(records, "dense", -2.3, (-3,))
    assert runs(records) == set()
    assert reproduce.learning_rate(records, "cpu", "dense") == pytest.approx(
        8e-3 * 2 ** (-2.3 / 2), rel=1e-2)
    assert reproduce.learning_rate({}, "gpu", "dense") == 1e-3


def test_the_first_seed_of_all_runs_comes_before_the_second():
    first = reproduce.todo(CONFIG, {})
    assert {run[0].split("/")[0] for run in first} == {"lr"}
    assert [seed for _, seed, _ in first] == sorted(seed for _, seed, _ in first)
    assert "lr/gpt2-infmoe-deep/-1" not in {name for name, *_ in first}  # explored later
    records = {}
    for family in reproduce.SWEPT:
        records = swept(records, family, -1, (-2, -1, 0))
    then = reproduce.todo(CONFIG, records)
    n = len(reproduce.PRIMARY)
    assert [name for name, *_ in then[:n]] == list(reproduce.PRIMARY) and len(then) == n * 12
    assert {(seed, lr) for _, seed, lr in then[:n]} == {(1, 5.66e-3)}
    for name, seed, _ in then:
        records[name, seed] = {}
    assert {name for name, *_ in reproduce.todo(CONFIG, records)} == set(reproduce.EXPLORED)
    wide = reproduce.todo(reproduce.ReproduceConfig(only="dense@128x4", seeds=(1,)), records)
    assert wide == [("dense@128x4", 1, 2.83e-3)]  # half of the rate at width 64


# ---- records and the report

def write_record(name, seed, loss, measures=None, **changed):
    settings = reproduce.in_json(reproduce.settings_of("cpu", name, 4e-3)[0])
    record = dict(
        run=name, seed=seed, size="cpu", val_loss=loss, curve=[[1024, loss + 0.1], [2048, loss]],
        measures=measures or {}, routing=[[1024, 0.9, 1.0, 0.1], [2048, 0.9, 0.5, 0.2]],
        settings=settings, n_params=1000, n_active_params=500, flops_per_token=3000, data="abc",
        machine="a CPU", commit="def")
    reproduce.append_record(record | changed)


def test_the_report_is_the_same_byte_for_byte():
    at_k = {f"loss at K={k}": 2.0 - k / 10 for k in (1, 2, 4, 8)}
    for seed in range(1, 13):
        write_record("dense", seed, 2.0 + seed % 3 / 100)
        write_record("vanilla", seed, 1.9 + seed % 5 / 100)
        write_record("top2", seed, 1.5 + seed / 100)
        write_record("top2-sp-cp", seed, 1.5 + seed / 100 + seed % 2 / 1000)
        write_record("gpt2-infmoe", seed, 1.5 + seed / 100, at_k)
    for seed in (1, 2):
        write_record("unipool", seed, 1.8 + seed / 1000)
        write_record("unipool-normalised", seed, 1.9)
        write_record("vanilla@96x4", seed, 1.8)
        write_record("dense@96x4", seed, 1.85)
    for k, seed in itertools.product((-2, -1, 0), reproduce.SWEEP_SEEDS):
        write_record(f"lr/dense/{k}", seed, 1.5 + 0.01 * (k + 1) ** 2)
    claims.report("cpu")
    files = {p.name: p.read_bytes() for p in Path("results").glob("claims*")}
    claims.report("cpu")
    assert files == {p.name: p.read_bytes() for p in Path("results").glob("claims*")}
    assert len(files) == 5
    text = files["claims.md"].decode()
    rows = {row.split(" | ")[0].strip("| "): row for row in text.splitlines() if row[:2] == "| "}
    assert rows["MoE below dense, equal active"].endswith("| holds |")
    assert "so far: holds" in rows["UniPool below vanilla, equal stored"]
    last = rows["Specialization + coupling lower the loss"]
    assert last.endswith("| no difference beyond 0.005 |") and "+0.0005 [" in last
    assert rows["infinity-MoE below dense (GPT-2)"].endswith("| 0 |  | not run yet |")
    assert "**0 of 12 seeds" in text and "+0.0990" in rows["`unipool-normalised`"]  # seed 1 alone
    assert "0.004: 1.5100, 0.00566: 1.5000, 0.008: 1.5100 | 0.00566" in rows["dense"]
    assert "0.00M" in rows["`vanilla` - `dense`"]  # below zero from the first evaluation on


def test_only_pairs_and_fixed_seeds_count():
    for seed in (1, 2, 3, 13):
        write_record("top2", seed, 1.5 + seed)
    for seed in (2, 3, 4, 13):
        write_record("top2-sp-cp", seed, 1.0 + seed)
    *_, (_, left, right, d, *_) = claims.judged(reproduce.load_records("cpu"), claims.CLAIMS, "cpu")
    assert (left, right) == ([3.0, 4.0], [3.5, 4.5]) and d.mean == -0.5


@pytest.mark.parametrize("again, inside", [(1.91, "yes"), (1.5, "no")])
def test_fresh_seeds_repeat_a_claim_and_count_nowhere_else(again, inside):
    for seed in range(1, 13):
        write_record("dense", seed, 2.0 + seed % 3 / 100)
        write_record("vanilla", seed, 1.9 + seed % 5 / 100)
    before = claims.judged(reproduce.load_records("cpu"), claims.CLAIMS, "cpu")
    assert not list(claims.repeated(reproduce.load_records("cpu"), before, "cpu"))
    for seed in (21, 22):
        write_record("dense", seed, 2.0 + seed % 2 / 100)
        write_record("vanilla", seed, again + seed % 2 / 100)
    records = reproduce.load_records("cpu")
    assert claims.judged(records, claims.CLAIMS, "cpu") == before
    row, = claims.repeated(records, before, "cpu")
    assert row.startswith(f"| MoE below dense, equal active | {again - 2:+.4f} [")
    assert row.endswith(f"] | 2 | {inside} |")


def test_records_of_other_settings_are_left_out_and_doubles_count_once():
    write_record("dense", 1, 2.0)
    write_record("dense", 1, 3.0)
    write_record("dense", 2, 2.0, run="no such run")
    write_record("dense", 3, 2.0, settings={"lr": 1.0})
    write_record("dense", 4, 2.0, size="gpu")
    assert {k: r["val_loss"] for k, r in reproduce.load_records("cpu").items()} == {
        ("dense", 1): 2.0}


@pytest.mark.parametrize("damage", [
    b'{"run": "dense", "seed": 2', b"[]", b"1e999", bytes(range(11, 256)), b"[" * 100_000,
    {"settings": None}, {"val_loss": "2.0"}, {"val_loss": math.nan}, {"curve": ["abc"]}],
    ids=lambda d: str(d)[:20])
def test_a_damaged_line_is_named_and_the_others_go_on(capsys, damage):
    """A write that a kill cut short, too: the next record begins a line of its own."""
    write_record("dense", 1, 2.0)
    if isinstance(damage, dict):
        write_record("dense", 2, 2.0, **damage)
    else:
        with open(reproduce.RECORDS, "ab") as f:
            f.write(damage)
    write_record("dense", 3, 2.0)
    assert set(reproduce.load_records("cpu")) == {("dense", 1), ("dense", 3)}
    assert "line 2 is damaged and left out" in capsys.readouterr().err


def test_committed_records_are_whole_and_the_report_is_theirs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    records = reproduce.load_records("cpu")
    text = "\n".join(claims.report_lines("cpu", records)) + "\n"
    assert not capsys.readouterr().err and text == Path("results/claims.md").read_text()


def test_widths_are_means_over_the_depths_of_the_first_seed():
    record = lambda *losses: {"curve": [[1000 * i, loss] for i, loss in enumerate(losses)]}
    records = {(reproduce.at(name, width, depth), 1): record(9, loss * depth, 9, 3 * loss * depth)
               for name, loss in (("dense", 1.0), ("vanilla", 1.03), ("infmoe", 0.9))
               for width in (64, 96) for depth in reproduce.DEPTHS}
    records["vanilla", 2] = record(9, 9, 9, 9)
    del records["infmoe@96x16", 1]  # a width without all of its depths is not shown
    head, *rows = claims.width_lines(records)
    assert head.splitlines()[0].endswith("| 0.00M | 0.00M |")
    assert rows == ["| 64 | `vanilla` - `dense` | +0.280 | +0.840 |",  # 0.03 (4 + 8 + 16) / 3
                    "| 64 | `infmoe` - `dense` | -0.933 | -2.800 |",
                    "| 96 | `vanilla` - `dense` | +0.280 | +0.840 |"]


# ---- many runs

@pytest.mark.parametrize("words, message", [
    (["--only=nonsense"], "only=nonsense"), (["--only=,"], "only=,"),
    (["--sedes=1"], "did you mean --seeds"), (["--report"], "no records of size cpu"),
    (["--size=tpu"], "size=tpu"), (["--minutes=-1"], "minutes=-1"),
    (["--seeds=-1"], "seeds=(-1,)"), (["--seeds=101"], "seeds=(101,)"),
    (["--seeds=1.5"], "seeds=(1.5,)"), (["--seeds=a"], "seeds")])
def test_mistakes_get_one_line(monkeypatch, capsys, words, message):
    assert message in refused(reproduce.main, words, monkeypatch, capsys)


def test_list_shows_what_was_asked_for(capsys):
    write_record("unipool", 2, 1.0)
    reproduce.show_list(reproduce.ReproduceConfig(only="unipool,grid", seeds=(1, 2)))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["unipool", "1", "of", "2", "seeds"] and len(lines) == 1 + 32


def rows_of(folder):
    log = next(folder.glob("out/reproduce/*/log.csv"), None)
    return log.read_text().splitlines()[1:] if log else []


@pytest.mark.skipif(sys.platform != "linux", reason="signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_or_stopped_runner_leaves_nothing_wrong(tmp_path, number):
    """Real processes on the real size; a second one keeps off the run of the first."""
    make_data(tmp_path / "data" / "stdlib", n_train=200_001, n_val=70_000)
    start = lambda: subprocess.Popen(
        [sys.executable, "-m", "lab.reproduce", "--only=dense", "--seeds=1"], cwd=tmp_path,
        env=environment(), stderr=subprocess.PIPE, text=True)
    first, second = start(), start()
    while len(rows_of(tmp_path)) < 1:
        assert first.poll() is None and second.poll() is None
        time.sleep(0.2)
    folders = [p for p in (tmp_path / "out/reproduce").iterdir() if p.suffix != ".lock"]
    assert len(folders) == 2
    if number == signal.SIGTERM:
        for child in (first, second):
            child.send_signal(signal.SIGSTOP)
        stopped = len(rows_of(tmp_path))
        time.sleep(2)
        assert len(rows_of(tmp_path)) == stopped
        for child in (first, second):
            child.send_signal(signal.SIGCONT)
    for child in (first, second):
        child.send_signal(number)
        error = child.communicate(timeout=120)[1]
        assert "Traceback" not in error
        assert child.returncode in (-number, 128 + number)
    if number == signal.SIGTERM:
        assert (folders[0] / "ckpt.pt").exists()  # it saved first
    assert not (tmp_path / "results/runs.jsonl").exists()
