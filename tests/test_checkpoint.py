"""support/checkpoint.py: what is written is whole, what is loaded was checked; the lock.

    python tests/test_checkpoint.py --trials=500      # the fuzzer, longer than the tests have it
"""

import contextlib
import copy
import math
import os
import random
import shutil
import sys
import zipfile
from dataclasses import dataclass

import pytest
import torch
from train_helpers import assert_refused, command_line, configs, make_data, tiny_run  # noqa: F401

import train
from model import GPT, ModelConfig, load_checkpoint
from support import checkpoint, files


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with data/ and out/, the run of one tiny model with experts."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_run(make_data(folder / "data"), folder / "out", "topk", max_steps=2, n_layer=1)
    return folder


def mutate(saved, path, value):
    """A copy of the checkpoint with `value` at a path of keys; "delete" removes what is there."""
    changed = copy.deepcopy(saved)
    *way, last = path
    place = changed
    for key in way:
        place = place[key]
    if value == "delete":
        del place[last]
    else:
        place[last] = value
    return changed


BANK = ("model", "blocks.0.ffn.bank.w_in")
STATE = ("optimizer", "state", 0)
MUTATIONS = {  # what is wrong: (where, what stands there, what the error says)
    "no model": (("model",), "delete", "model is missing"),
    "no step": (("step",), "delete", "step is missing"),
    "no optimizer": (("optimizer",), "delete", "optimizer is missing"),
    "unknown key": (("extra",), 1, "unknown key 'extra'"),
    "step is text": (("step",), "two", "step is a str"),
    "step is negative": (("step",), -1, "step is -1"),
    "seconds is nan": (("seconds",), math.nan, "seconds is nan"),
    "tokenizer is a number": (("tokenizer",), 3, "tokenizer is a int"),
    "scaler is text": (("scaler",), {"scale": "x"}, "scaler.scale"),
    "a weight is gone": (BANK, "delete", "lacks 1 tensors"),
    "a weight too many": (("model", "more"), torch.zeros(3), "of no use"),
    "a weight of text": (BANK, "x", "is a str"),
    "a weight of another shape": (BANK, torch.zeros(4, 2), "has shape (4, 2)"),
    "a weight of another type": (BANK, torch.zeros(4, 48, 32, dtype=torch.int64), "shape"),
    "a weight is nan": (("model", "norm.weight"), torch.full((32,), math.nan), "NaN"),
    "a weight is infinite": (("model", "norm.weight"), torch.full((32,), math.inf), "infinite"),
    "a sparse weight": (("model", "norm.weight"), torch.ones(32).to_sparse(), "checkpoint ("),
    "an expanded weight": (("model", "norm.weight"), torch.ones(1).expand(32), "no dense tensor"),
    "a billion layers": (("model_config", "n_layer"), 10**9, "n_layer=1000000000"),
    "a huge width": (("model_config", "d_model"), 10**9, "checkpoint ("),
    "an unknown setting": (("model_config", "n_layers"), 3, "n_layers"),
    "a setting of another type": (("model_config", "n_head"), "2", "n_head='2'"),
    "exp_avg of a wrong shape": ((*STATE, "exp_avg"), torch.zeros(3), "has shape (3,)"),
    "exp_avg is gone": ((*STATE, "exp_avg"), "delete", "lacks 1 tensors"),
    "exp_avg expanded": ((*STATE, "exp_avg"), torch.zeros(1).expand(257, 32), "no dense tensor"),
    "exp_avg_sq is negative": ((*STATE, "exp_avg_sq"), -torch.ones(257, 32), "negative"),
    "step of an optimizer": ((*STATE, "step"), 3, "is a int"),
    "a state too many": (("optimizer", "state", 99), {}, "states of other parameters"),
    "other groups": (("optimizer", "param_groups"), [], "other parameters"),
    "unknown training setting": (("train_config", "rate"), 3, "rate"),
    "training setting of another type": (("train_config", "lr"), "fast", "lr"),
    "training setting out of range": (("train_config", "grad_clip"), -4, "grad_clip=-4"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_whole_bytes_and_wrong_values(trained, tmp_path, command, name):
    """One line that names the file, and what is wrong in it; the file stays as it was."""
    path, value, says = MUTATIONS[name]
    saved = torch.load(trained / "out/ckpt.pt", weights_only=True)
    torch.save(mutate(saved, path, value), tmp_path / "ckpt.pt")
    before = (tmp_path / "ckpt.pt").read_bytes()
    result = command(trained / "data", tmp_path, "topk", n_layer=1, init_from="resume", max_steps=4)
    assert_refused(result, str(tmp_path / "ckpt.pt"), says)
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def repack(source, target, compression=zipfile.ZIP_STORED, change=lambda name, content: content):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))


def test_zip_bombs(trained, tmp_path):
    """Refused by the sizes in the zip's directory, before anything is unpacked."""
    bomb = lambda name, content: bytes(50_000_000) if name.endswith("data/0") else content
    repack(trained / "out/ckpt.pt", tmp_path / "ckpt.pt", zipfile.ZIP_DEFLATED, bomb)
    with pytest.raises(ValueError, match=r"ckpt.pt .*bytes packed into .* does not compress"):
        load_checkpoint(tmp_path / "ckpt.pt")


def test_a_pickle_calls_nothing_of_its_own(trained, tmp_path):
    """Not even bytearray(10**10), which weights_only allows."""
    huge = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\xe4\x0bT\x02\x85R."
    pickled = lambda name, content: huge if name.endswith("data.pkl") else content
    repack(trained / "out/ckpt.pt", tmp_path / "ckpt.pt", change=pickled)
    with pytest.raises(ValueError, match="wants to call builtins bytearray"):
        load_checkpoint(tmp_path / "ckpt.pt")


def test_flipped_bits(trained, tmp_path):
    """One bit, anywhere in a tensor: the zip's checksums know."""
    whole, rng = (trained / "out/ckpt.pt").read_bytes(), random.Random(0)
    with zipfile.ZipFile(trained / "out/ckpt.pt") as archive:
        tensors = [e for e in archive.infolist() if "/data/" in e.filename and e.file_size > 99]
    for entry in rng.sample(tensors, 20):
        damaged = bytearray(whole)
        start = entry.header_offset + 30 + int.from_bytes(whole[entry.header_offset + 26:][:2],
                                                          "little")
        start += int.from_bytes(whole[entry.header_offset + 28:][:2], "little")
        damaged[start + rng.randrange(entry.file_size)] ^= 1 << rng.randrange(8)
        (tmp_path / "ckpt.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"the checksum of .* is wrong"):
            load_checkpoint(tmp_path / "ckpt.pt")


# ---- the fuzzer

def places(value, path=()):
    """Every path of keys in a nested checkpoint."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else ()
    for key, part in inner:
        yield from places(part, (*path, key))


WRONG = ("delete", None, True, -1, 10**12, 2.5, math.nan, "x", b"x", [], {}, (1, "a"),
         torch.zeros(3), torch.zeros(2, 2, dtype=torch.bfloat16), torch.full((32,), math.inf),
         torch.ones(1).expand(9))


def fuzz(folder, trials, seed):
    """Resume from `trials` spoilt checkpoints -> how many were refused; no other end is right."""
    rng, out, refused = random.Random(seed), folder / "fuzzed", 0
    shutil.copytree(folder / "out", out, dirs_exist_ok=True)
    model_config, config = configs(folder / "data", out, "topk", n_layer=1, max_steps=3)
    config.init_from = "resume"
    whole = (folder / "out/ckpt.pt").read_bytes()
    saved = torch.load(folder / "out/ckpt.pt", weights_only=True)
    ways = list(places(saved))
    for trial in range(trials):
        if trial % 2:
            damaged = bytearray(whole)
            near = len(whole) if trial % 4 == 1 else 4000  # the pickle, or the zip's directory
            for _ in range(rng.randint(1, 20)):
                damaged[rng.choice([1, -1]) * rng.randrange(1, near)] = rng.randrange(256)
            (out / "ckpt.pt").write_bytes(damaged)
        else:
            torch.save(mutate(saved, rng.choice(ways), rng.choice(WRONG)), out / "ckpt.pt")
        try:
            kept = train.folder.load_start(config, ModelConfig, GPT)["train_config"]
            train.folder.resumed({"train_config": kept}, {}, config)
            train.train(model_config, config)
        except ValueError as error:
            refused += 1
            assert str(out) in str(error) and "\n" not in str(error), error
    return refused


def test_fuzzed_checkpoints(trained):
    """Random values and random bytes: loaded, or refused in one line that names the file."""
    assert fuzz(trained, 60, seed=0) > 40


# ---- writing, and the lock

def test_written_whole_or_not_at_all(tmp_path):
    path, elsewhere = tmp_path / "x", tmp_path / "elsewhere"
    elsewhere.write_text("precious")
    path.with_name("x.tmp").symlink_to(elsewhere)  # what a stranger may leave: not followed
    files.write_atomically(path, lambda f: f.write(b"good"))

    def broken(f, error=KeyboardInterrupt):
        f.write(b"half")
        raise error("boom")

    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, broken)
    with pytest.raises(OSError, match="boom"):  # torch says so when a disk is full
        files.write_atomically(path, lambda f: broken(f, RuntimeError))
    with pytest.raises(OSError, match=rf"{tmp_path / 'none'}.* cannot be written: No such file"):
        files.write_atomically(tmp_path / "none/x", broken)
    assert path.read_bytes() == b"good" and elsewhere.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "x"]


def test_one_process_a_folder(trained, tmp_path, command):
    with files.lock(tmp_path / "out"):
        assert_refused(command(trained / "data", tmp_path / "out"), "out is in use", "--out_dir")
        assert os.listdir(tmp_path / "out") == []
    assert command(trained / "data", tmp_path / "out", max_steps=1)[0] == 0
    with pytest.raises(RuntimeError), files.lock(tmp_path):  # freed whatever happens
        raise RuntimeError
    with files.lock(tmp_path):
        pass


def test_newest_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"python train.py"):
        checkpoint.newest_run(tmp_path)
    for i, name in enumerate(("b", "a/deep", "c")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "ckpt.pt").write_text("")
        os.utime(tmp_path / name / "ckpt.pt", (i % 2, i % 2))
    assert checkpoint.newest_run(tmp_path) == tmp_path / "a/deep"


@dataclass
class FuzzConfig:
    trials: int = 500
    seed: int = 1


def main():
    import tempfile
    from pathlib import Path

    from configurator import parse
    config = parse(FuzzConfig, doc=__doc__).make(FuzzConfig)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        tiny_run(make_data(folder / "data"), folder / "out", "topk", max_steps=2, n_layer=1)
        with contextlib.redirect_stdout(sys.stderr):
            refused = fuzz(folder, config.trials, config.seed)
    print(f"{config.trials} trials: {refused} refused in one line, the rest trained on")


if __name__ == "__main__":
    main()
