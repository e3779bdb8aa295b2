"""For the tests of train.py and sample.py: a tiny corpus, tiny models, and real processes."""

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import moe
import train
from model import ModelConfig
from support.shards import write_shard

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable

# every flavour at 2-4 layers, width 32: a step takes milliseconds
SIZE = dict(n_layer=2, n_head=2, d_model=32, d_ff=48, block_size=16)
FLAVOURS = {
    "dense": dict(flavour="dense"),
    "switch": dict(flavour="switch", n_experts=4),
    "topk": dict(flavour="topk", n_experts=4, arch="llama", z_coef=1e-3),
    "deepseek": dict(flavour="deepseek", n_experts=5, arch="llama"),
    "unipool": dict(flavour="unipool", n_experts=6, top_k=2, arch="llama"),
    "lock": dict(flavour="lock", n_experts=6, top_k=2, lock_steps=2, arch="llama"),
    "peer": dict(flavour="peer", n_experts=64, top_k=8),
    "infmoe": dict(flavour="infmoe", infmoe_dz=8),
}
for name in moe.FLAVOURS:  # whoever adds a flavour has it tested
    FLAVOURS.setdefault(name, dict(flavour=name))
TRAINING = dict(max_steps=6, batch_tokens=256, micro_batch=4, eval_every=3, eval_tokens=128,
                save_every=2, warmup_steps=2, device="cpu", dtype="float32", compile="false")


def make_data(folder, n_train=4001, n_val=600, shards=2):
    """A corpus of bytes with something to learn in it: short words, by a fixed seed."""
    folder.mkdir(parents=True)
    rng, made = np.random.default_rng(0), {}
    words = [b"one ", b"two ", b"three ", b"four\n"]
    for split, n, parts in (("train", n_train, shards), ("val", n_val, 1)):
        for i in range(parts):
            text = b"".join(words[j] for j in rng.integers(0, 4, n))[: n // parts]
            name = f"{split}_{i:06d}.bin"
            made[name] = write_shard(folder / name, np.frombuffer(text, np.uint8))
    meta = {"tokenizer": "bytes", "vocab_size": 257, "shards": made}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def train_command(data, out, flavour="dense", ranks=1, **changes):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    launcher = [PYTHON, *(torchrun if ranks > 1 else [])]
    chosen = {"dataset": data, "out_dir": out} | SIZE | FLAVOURS[flavour] | TRAINING | changes
    return [*launcher, str(ROOT / "train.py"), *(f"--{k}={v}" for k, v in chosen.items())]


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more


def run(command, cwd=None, timeout=300, **more):
    """-> CompletedProcess, output as text"""
    return subprocess.run(command, cwd=cwd, env=environment(**more), capture_output=True, text=True,
                          timeout=timeout)


def read_rows(out):
    with open(Path(out, "log.csv"), newline="") as f:
        return list(csv.DictReader(f))


def timeless(rows):
    """Rows without the columns that hold times."""
    times = ("seconds", "tokens_per_second")
    return [{name: text for name, text in row.items() if name not in times} for row in rows]


def losses(out):
    """Training loss, gradient norm and validation loss (0 where there was none) of each row."""
    names = ("train_loss", "grad_norm", "val_loss")
    return np.array([[float(row[name] or 0) for name in names] for row in read_rows(out)])


def assert_same_state(left, right, tolerance=0):
    """Two values of a checkpoint (dictionaries, lists, tensors, numbers) are equal."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same_state(left[key], right[key], tolerance)
    elif isinstance(left, torch.Tensor):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right)
        for a, b in zip(left, right):
            assert_same_state(a, b, tolerance)
    else:
        assert left == right


def checkpoint(out):
    return torch.load(Path(out, "ckpt.pt"), weights_only=True)


def assert_same_run(out, reference, first_row=0):
    """The same log (times aside) and the same weights and optimizer, bit for bit."""
    assert timeless(read_rows(out))[first_row:] == timeless(read_rows(reference))[first_row:]
    mine, theirs = checkpoint(out), checkpoint(reference)
    for key in ("model", "optimizer", "step"):
        assert_same_state(mine[key], theirs[key])


def configs(data, out, flavour="dense", **changes):
    """-> ModelConfig, TrainConfig of a tiny run"""
    chosen = SIZE | FLAVOURS[flavour] | TRAINING | dict(vocab_size=257, quiet=True)
    chosen |= dict(dataset=str(data), out_dir=str(out)) | changes
    names = {f.name for f in dataclasses.fields(ModelConfig)}
    model = {key: value for key, value in chosen.items() if key in names}
    training = {key: value for key, value in chosen.items() if key not in names}
    return ModelConfig(**model), train.TrainConfig(**training)


def tiny_run(data, out, flavour="dense", **changes):
    return train.train(*configs(data, out, flavour, **changes))


def call(main, words, monkeypatch, capsys):
    """main() with these words as its command line -> (exit code, stdout, stderr)"""
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
    code = 0
    try:
        main()
    except SystemExit as leave:
        code = leave.code or 0
    return code, *capsys.readouterr()


def refused(main, words, monkeypatch, capsys):
    """The same -> its one line on stderr; exit code 2"""
    code, _, error = call(main, words, monkeypatch, capsys)
    assert code == 2 and error.count("\n") == 1, error
    return error


def assert_refused(result, *parts):
    """One line on stderr that holds all `parts`, exit code 2, no traceback."""
    code, _, err = result
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: "), err
    assert "Traceback" not in err
    for part in parts:
        assert part in err, err
