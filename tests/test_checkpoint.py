"""support/checkpoint.py: what is written is whole, what is loaded was checked; the lock."""
import copy
import math
import os
import pickle
import random
import shutil
import zipfile

import pytest
import torch
from train_helpers import assert_refused, configs, make_data, tiny_run

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


@pytest.mark.parametrize("part, content, compression, words", [
    # the sizes in the zip's directory tell, before anything is unpacked
    ("data/0", bytes(50_000_000), zipfile.ZIP_DEFLATED, "bytes packed into .* does not compress"),
    # bytearray(10**10), which weights_only allows
    ("data.pkl", b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\xe4\x0bT\x02\x85R.",
     zipfile.ZIP_STORED, "wants to call builtins bytearray")], ids=["bomb", "call"])
def test_zip_bombs_and_pickles_that_call(trained, tmp_path, part, content, compression, words):
    with (zipfile.ZipFile(trained / "out/ckpt.pt") as old,
          zipfile.ZipFile(tmp_path / "ckpt.pt", "w", compression) as new):
        for entry in old.infolist():
            ours = entry.filename.endswith(part)
            new.writestr(entry.filename, content if ours else old.read(entry))
    with pytest.raises(ValueError, match=f"ckpt.pt.*{words}"):
        load_checkpoint(tmp_path / "ckpt.pt")


class Hostile:
    def __reduce__(self):
        return (open, ("hostile_pickle_was_run", "w"))


SPOILT = {  # what the file is instead: bytes of it, or what torch saves
    "a byte short": lambda whole: whole[:-1], "half": lambda whole: whole[:len(whole) // 2],
    "empty": lambda whole: b"", "text": lambda whole: b"not a checkpoint",
    "hostile pickle": lambda whole: pickle.dumps(Hostile()),
    "hostile checkpoint": lambda whole: {"model": Hostile(), "model_config": {}},
    "another program's": lambda whole: {"state_dict": {}, "epoch": 3},
    "a tensor": lambda whole: torch.zeros(3),
    "unknown field": lambda whole: {"model": {}, "model_config": {"n_layers": 3}},
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", SPOILT)
def test_unreadable_checkpoints(kind, trained, tmp_path, monkeypatch):
    """One line that names the file and the way out; nothing in the file is executed."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "ckpt.pt"
    content = SPOILT[kind]((trained / "out/ckpt.pt").read_bytes())
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError) as caught:
        GPT.from_checkpoint(tmp_path)
    message = str(caught.value)
    assert "ckpt.pt" in message and "--overwrite" in message and "\n" not in message
    assert not (tmp_path / "hostile_pickle_was_run").exists()


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
            named = str(out) in str(error) or "init_from=resume" in str(error)
            assert named and "\n" not in str(error), error
    return refused


@pytest.mark.parametrize("trials, seed", [
    (60, 0), pytest.param(500, 1, marks=pytest.mark.slow)])
def test_fuzzed_checkpoints(trained, trials, seed):
    """Random values and random bytes: loaded, or refused in one line that says where."""
    assert fuzz(trained, trials, seed) > trials * 2 / 3


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
