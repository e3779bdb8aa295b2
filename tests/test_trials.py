"""Trials of a stranger or a failing disk: one line, exit code 2, nothing lost (130 for Ctrl-C)."""
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
import train_helpers
from train_helpers import ROOT, assert_same_state, make_data

import model
import prepare_data
import probe
import sample
import train
from support import files, report, weigh

SMALL = ["--n_layer=2", "--n_head=2", "--d_model=32", "--block_size=32", "--micro_batch=4",
         "--batch_tokens=128", "--max_steps=3", "--eval_tokens=128", "--warmup_steps=0", "--quiet"]
MAINS = {"train": train.main, "probe": probe.main, "sample": sample.main,
         "prepare_data": prepare_data.main, "model": partial(weigh.main, model.__doc__)}


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a script's main() -> (exit code, stderr)."""
    return lambda script, *words: train_helpers.call(
        MAINS[script], words, monkeypatch, capsys)[::2]


@pytest.fixture
def run_of(tmp_path, call):
    data, out = make_data(tmp_path / "data"), tmp_path / "out"
    words = [f"--dataset={data}", f"--out_dir={out}", *SMALL]
    assert call("train", *words)[0] == 0
    return data, out, words


def test_a_run_that_diverges_never_replaces_a_checkpoint_that_can_go_on(run_of, call):
    """Finite weights are not enough: a loss far beyond that of knowing nothing is not saved."""
    _, out, words = run_of
    good = (out / "ckpt.pt").read_bytes()
    more = [*words, "--init_from=resume", "--max_steps=9", "--save_every=1"]
    code, err = call("train", *more, "--lr=1000", "--min_lr=1000")
    assert code == 2 and "last good checkpoint" in err and "step 3" in err
    assert (out / "ckpt.pt").read_bytes() == good
    assert call("train", *more, "--lr=1e-3", "--min_lr=1e-4") == (0, "")


def test_the_checkpoint_before_the_last_stays_and_can_be_gone_back_to(run_of, call):
    """A kill between the two files leaves both; the way back gives the same last checkpoint."""
    _, out, words = run_of
    assert call("train", *words, "--overwrite", "--save_every=1")[0] == 0
    last, before = out / "ckpt.pt", out / "ckpt.prev.pt"
    step = lambda path: torch.load(path, weights_only=True)["step"]
    assert (step(before), step(last)) == (2, 3)
    weights = torch.load(last, weights_only=True)["model"]
    before.replace(last)
    assert call("train", *words, "--init_from=resume", "--save_every=1") == (0, "")
    assert (step(before), step(last)) == (2, 3) and before.stat().st_nlink == 1
    assert_same_state(torch.load(last, weights_only=True)["model"], weights)
    files.keep_previous(last, before.name)  # and killed here
    assert last.stat().st_nlink == 2 and step(before) == 3


def test_a_picture_that_a_kill_cut_short_is_drawn_when_the_finished_run_is_resumed(run_of, call):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    _, out, words = run_of
    (out / "loss.png").rename(out / "loss.png.tmp")
    assert call("train", *words, "--init_from=resume") == (0, "")
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG" and not (out / "loss.png.tmp").exists()


def test_a_second_probe_into_a_folder_waits_its_turn(run_of, call):
    """Both would rename the other's files: one lock, which names the option."""
    _, out, _ = run_of
    with files.lock(out):
        code, err = call("probe", f"--out_dir={out}", "--routing")
    assert code == 2 and err.count("\n") == 1 and "--save_dir" in err and "is in use" in err


@pytest.mark.parametrize("name", ["train_000000.bin", "val_000000.bin"])
def test_a_flipped_bit_in_a_shard(run_of, call, name, tmp_path):
    """Sizes stay, only the checksum tells; where meta.json has none, nobody can know."""
    data, _, words = run_of
    other = shutil.copytree(data, tmp_path / "other")
    damaged = other / name
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])
    words = [*words, f"--dataset={other}", f"--out_dir={tmp_path / 'x'}", "--overwrite"]
    code, err = call("train", *words)
    assert code == 2 and err.count("\n") == 1 and f"{name} is not what was written" in err
    (other / "meta.json").write_text('{"tokenizer": "bytes", "vocab_size": 257}')
    assert call("train", *words) == (0, "")


def test_a_checkpoint_of_parameters_loads_without_a_warning(run_of):
    _, out, _ = run_of
    saved = torch.load(out / "ckpt.pt", weights_only=True)
    saved["model"] = {name: value.requires_grad_() for name, value in saved["model"].items()}
    torch.save(saved, out / "ckpt.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_checkpoint(out / "ckpt.pt")


@pytest.mark.parametrize("name", ["train_000000.bin", "meta.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_shards_that_are_no_files(run_of, call, name, make, tmp_path):
    data, _, words = run_of
    other = shutil.copytree(data, tmp_path / "other")
    (other / name).unlink(missing_ok=True)
    make(other / name)
    code, err = call("train", *words, f"--dataset={other}", f"--out_dir={tmp_path / 'x'}")
    assert code == 2 and err.count("\n") == 1 and name in err and "not a file" in err


@pytest.mark.parametrize("script, words, expected", [
    ("train", ["--flavour=infmoe", "--infmoe_samples=10000000"], "GB"),
    ("train", ["--block_size=1000000000"], "block_size=1000000000 is more than"),
    ("train", ["--block_size=4096", "--batch_tokens=16384"], "lower --block_size, or prepare more"),
    ("train", ["--init_from=hf:"], "names no model: --init_from=hf:NAME_OR_DIR"),
    ("model", ["--export="], "--export is empty"),
    ("sample", ["--seed=1e30"], "seed="),
    ("train", ["--dataset={pipe}"], "no data in"),
    ("train", ["{file}"], "d_ff: expected int"),
    ("model", ["--export={file}"], "is a file"),
])
def test_mistakes_are_one_line(run_of, call, script, words, expected, tmp_path):
    _, out, options = run_of
    places = {"file": tmp_path / "file", "pipe": tmp_path / "pipe"}
    places["file"].write_text("d_ff = 10**5000\n")  # a number of too many digits
    os.mkfifo(places["pipe"])
    first = [*options, f"--out_dir={tmp_path / 'x'}"] if script == "train" else [f"--out_dir={out}"]
    code, err = call(script, *first, *[word.format(**places) for word in words])
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and expected in err
    assert places["file"].read_text() == "d_ff = 10**5000\n"


def test_a_log_that_is_not_ours(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(b"a,b\n\xff\xfe,1\n")
    with pytest.raises(ValueError, match=r"log\.csv is not a log of ours"):
        report.trim_log(path, 1)
    assert path.read_bytes() == b"a,b\n\xff\xfe,1\n"


def test_a_checkpoint_from_before_a_field_existed_resumes(run_of, call):
    _, out, words = run_of
    saved = torch.load(out / "ckpt.pt", weights_only=True)
    del saved["model_config"]["expert"]
    torch.save(saved, out / "ckpt.pt")
    assert call("train", *words, "--init_from=resume", "--max_steps=4") == (0, "")


@pytest.mark.parametrize("words", [["sample.py"], ["probe.py"], ["model.py"], ["-m", "lab.bench"],
                                   ["-m", "lab.evaluate"], ["prepare_data.py", "stdlib"]])
def test_ctrl_c_while_libraries_load_prints_nothing(words, tmp_path):
    """At once, or where Python itself had not yet come to our first line, with its traceback."""
    words = [str(ROOT / word) if word.endswith(".py") else word for word in words]
    begin = signal.default_int_handler  # not the ignored one that a shell's background job has
    process = subprocess.Popen([sys.executable, *words], stderr=subprocess.PIPE, text=True,
                               cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, begin))
    deadline = time.monotonic() + 60
    libraries = Path(f"/proc/{process.pid}/maps")  # numpy's or torch's: our first line is behind us
    while "numpy" not in libraries.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT) and "Traceback" not in err
