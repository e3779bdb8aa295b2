"""train.py and what it stands on. Most runs are in this process: a tiny one takes 0.2 s."""

import base64
import contextlib
import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from train_helpers import (
    FLAVOURS,
    PYTHON,
    ROOT,
    assert_refused,
    assert_same_run,
    assert_same_state,
    call,
    checkpoint,
    configs,
    environment,
    losses,
    make_data,
    read_rows,
    run,
    tiny_run,
    train_command,
)

import train
from model import GPT, ModelConfig, load_checkpoint
from support import auxiliary, budget, machine, report
from support.shards import ShardReader, write_shard
from support.tokenizer import get_tokenizer


@pytest.fixture(autouse=True)
def no_picture(request, monkeypatch):
    """It takes longer than a tiny run."""
    if "picture" not in request.node.name and "files_of" not in request.node.name:
        monkeypatch.setattr(train, "draw_loss", lambda *_: False)


SOAK = str(ROOT / "tests/soak.py")


class Crash(BaseException):
    """What a kill looks like from inside: nothing below main catches it."""


@contextlib.contextmanager
def after_row(step, act):
    """act() is called once the row of `step` is written, before a checkpoint of it."""
    real = train.log_row

    def log_row(path, row):
        real(path, row)
        if row["step"] == step:
            act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "log_row", log_row)
        yield


def crash(step, *run, **changes):
    """A tiny run whose process dies after the row of `step`."""
    def die():
        raise Crash

    with after_row(step, die), pytest.raises(Crash):
        tiny_run(*run, **changes)


# ---- 1. the arithmetic of a step

def test_learning_rate():
    config = train.TrainConfig(lr=1.0, min_lr=0.2, warmup_steps=4, max_steps=12)
    rates = [train.lr_at(config, step) for step in (0, 1, 2, 3, 4, 8, 12, 99)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]  # linear, and never 0
    assert rates[4:] == pytest.approx([1.0, 0.6, 0.2, 0.2])  # top, middle and end of the cosine
    plain = train.TrainConfig(lr=1.0, warmup_steps=0, max_steps=4)
    assert train.lr_at(plain, 0) == 1.0 and train.lr_at(plain, 4) == pytest.approx(0.1)  # a tenth
    assert train.lr_at(dataclasses.replace(plain, max_steps=1), 0) == 1.0


def test_accumulation_names_both_numbers_and_one_that_works():
    config = train.TrainConfig(batch_tokens=96, micro_batch=2)
    assert budget.accumulation_steps(config, 16, 1) == 3
    assert budget.accumulation_steps(config, 16, 3) == 1
    with pytest.raises(ValueError, match=r"batch_tokens=96 is not a multiple of 64 .*try 128"):
        budget.accumulation_steps(config, 16, 2)


def test_decay_on_what_multiplies(data, tmp_path):
    """Matrices and stacked experts decay; norms, biases, NormRouter's sigma do not."""
    for flavour in FLAVOURS:
        ranks = machine.Ranks(0, 1, torch.device("cpu"))
        holder = train.Trainer(*configs(data, tmp_path, flavour), None, ranks)
        decayed, plain = (set(map(id, group["params"])) for group in holder.optimizer.param_groups)
        for name, p in holder.model.named_parameters():
            leave_out = name.endswith(("bias", "sigma")) or "norm" in name.split(".")[-2]
            assert ((id(p) in plain), (id(p) in decayed)) == (leave_out, not leave_out), name
        assert holder.optimizer.param_groups[0]["fused"]


def test_flops():
    """By hand: 6 N + 12 L D S; a token of a mixture counts top_k experts, and of untied embeddings
    the head, not what is looked up."""
    dense = ModelConfig(n_layer=3, n_head=2, d_model=8, block_size=10)
    assert budget.flops_per_token(dense) == 6 * dense.n_params() + 12 * 3 * 8 * 10
    moe = dataclasses.replace(dense, flavour="switch", n_experts=4, bias=False)
    idle = 3 * 3 * (8 * 32 + 32 * 8)  # three layers, three idle experts
    assert budget.flops_per_token(moe) == 6 * (moe.n_params() - idle) + 12 * 3 * 8 * 10
    llama = dataclasses.replace(dense, arch="llama", tie_embeddings=False, bias=False)
    multiplied = llama.n_params() - llama.vocab_size * 8
    assert budget.flops_per_token(llama) == 6 * multiplied + 12 * 3 * 8 * 10


def test_dtype_and_compile_by_device_and_size():
    config, cpu, cuda = train.TrainConfig(), torch.device("cpu"), torch.device("cuda")
    assert machine.pick_compile(config, cpu, 1e6)[0] is False  # tiny: overhead
    assert machine.pick_dtype(config, cpu, compiled=False)[0] == torch.float32
    assert machine.pick_compile(train.TrainConfig(compile="true"), cpu, 1e6) == (True, "as asked")
    assert machine.pick_dtype(train.TrainConfig(dtype="float16"), cpu, False)[0] == torch.float16
    for device in (cpu, cuda, torch.device("mps")):
        assert machine.pick_compile(config, device, 1e9)[1]  # with a reason


def literal_training(model_config, config, data):
    """The same training as plain as can be: unfused AdamW, no accumulation, losses as they come."""
    torch.manual_seed(config.seed)
    model = GPT(model_config).train()
    decay = [p for n, p in model.named_parameters() if p.ndim > 1]
    rest = [p for n, p in model.named_parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": config.weight_decay},
              {"params": rest, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2))
    reader = ShardReader(data, "train", model_config.block_size, seed=config.seed)
    per_step, losses = config.batch_tokens // model_config.block_size, []
    for step in range(config.max_steps):
        windows = torch.from_numpy(reader.batch(step * per_step, per_step))
        logits = model.eval()(windows[:, :-1]).logits  # evaluation: nothing but the logits
        loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum(p.grad.square().sum() for p in model.parameters()))
        for p in model.parameters():
            p.grad *= min(1.0, config.grad_clip / norm)
        done = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
        share = 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2
        if done < 0:
            share = (step + 1) / config.warmup_steps
        for group in optimizer.param_groups:
            group["lr"] = config.lr * share
        optimizer.step()
        losses.append((loss.item(), norm.item(), config.lr * share))
    return model, losses


def test_training_equals_a_literal_loop(data, tmp_path):
    model_config, config = configs(data, tmp_path / "out", micro_batch=16)
    train.train(model_config, config)
    model, losses = literal_training(model_config, config, data)
    rows = read_rows(tmp_path / "out")
    got = [(float(r["train_loss"]), float(r["grad_norm"]), float(r["lr"])) for r in rows]
    np.testing.assert_allclose(got, losses, rtol=2e-5)
    weights = checkpoint(tmp_path / "out")["model"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_accumulation_equals_one_big_batch(data, tmp_path, flavour):
    """n micro-steps give the loss and gradient of one batch, where no loss is a product of batch
    means (balance=none, or bias, whose statistics are added up); for one that is, see below."""
    model = configs(data, tmp_path, flavour)[0]
    off = {"balance": "none"} if model.balance in ("layer", "pool") else {}
    off |= {"lock_coef": 0.0} if model.lock_coef else {}
    rows = []
    for micro in (2, 16):
        out = tmp_path / f"{micro}"
        tiny_run(data, out, flavour, micro_batch=micro, max_steps=3, **off)
        rows.append(losses(out))
    np.testing.assert_allclose(*rows, rtol=1e-5)


def test_each_step_sees_its_windows_and_keys(data, tmp_path, monkeypatch):
    """Positions step * W + a * B on one rank, in order, each sequence with a seed of its own."""
    seen, keys = [], []
    batch, forward = ShardReader.batch, GPT.forward

    def noting(self, tokens, targets, noise_key=None):
        keys.extend([] if noise_key is None else noise_key.tolist())
        return forward(self, tokens, targets, noise_key=noise_key)

    def reading(self, first, n):
        seen.append((first, n))
        return batch(self, first, n)

    monkeypatch.setattr(ShardReader, "batch", reading)
    monkeypatch.setattr(GPT, "forward", noting)
    tiny_run(data, tmp_path / "out", max_steps=2, micro_batch=8)
    assert seen == [(0, 8), (8, 8), (16, 8), (24, 8)]
    assert len(set(keys)) == 32 and min(keys) >= 0
    first, keys[:] = list(keys), []
    tiny_run(data, tmp_path / "other", max_steps=2, micro_batch=4)
    assert keys == first  # whatever the micro-batch


def test_low_precision_trains(data, tmp_path, command):
    """Near float32; float16 has a scaler, whose state is saved; each goes on from any other."""
    exact = tiny_run(data, tmp_path / "float32", "topk")
    for dtype in ("bfloat16", "float16"):
        result = tiny_run(data, tmp_path / dtype, "topk", dtype=dtype)
        assert result["val_loss"] == pytest.approx(exact["val_loss"], rel=2e-3)
        assert bool(checkpoint(tmp_path / dtype)["scaler"]) == (dtype == "float16")
    for steps, dtype in ((8, "float16"), (10, "float32"), (12, "float16"), (14, "bfloat16")):
        changes = dict(max_steps=steps, dtype=dtype, init_from="resume")
        code, out, err = command(data, tmp_path / "float16", "topk", **changes)
        assert code == 0 and (steps == 8 or f", is {dtype}" in out), err


# ---- 2. what a run leaves behind

def test_log_contract(data, tmp_path):
    columns = None
    for n_experts in (4, 9):  # the number of columns does not grow with the experts
        out = tmp_path / f"{n_experts}"
        tiny_run(data, out, "switch", n_experts=n_experts, max_steps=7, log_every=4)
        rows = read_rows(out)
        columns = columns or list(rows[0])
        assert list(rows[0]) == columns
    assert columns[:8] == ["step", "tokens", "seconds", "lr", "train_loss", "val_loss", "grad_norm",
                           "tokens_per_second"]
    model, tokens = GPT.from_checkpoint(out).train(), torch.zeros(1, 16, dtype=torch.int64)
    routing = auxiliary.log_columns(model.config, model(tokens, tokens).stats)
    assert columns[8:] == ["aux_loss", *routing] and {"entropy", "dead_share"} < routing.keys()
    assert [r["step"] for r in rows] == ["3", "4", "6", "7"]  # every 4th, each validation, the last
    assert [bool(r["val_loss"]) for r in rows] == [True, False, True, True]
    assert checkpoint(out)["step"] == 7 and rows[-1]["tokens"] == str(7 * 256)
    times = [float(r["seconds"]) for r in rows]
    assert times == sorted(times) and times[0] > 0


def test_validation_is_cross_entropy_of_a_fixed_slice(data, tmp_path):
    """A loop over the first windows of the file, also where the batch size does not divide them."""
    for flavour in ("topk", "infmoe"):
        out = tmp_path / flavour
        result = tiny_run(data, out, flavour, micro_batch=4, eval_tokens=16 * 10)
        model = GPT.from_checkpoint(out)
        assert not model.training
        windows = torch.from_numpy(ShardReader(data, "val", 16).sequential(0, 10))
        with torch.no_grad():
            losses = [F.cross_entropy(model(w[None, :-1]).logits[0], w[1:]).item() for w in windows]
        assert result["val_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
    assert tiny_run(data, tmp_path / "few", eval_tokens=10**9)["finished"]  # all that there is


def test_files_of_a_finished_run(data, tmp_path, command):
    code, out, err = command(data, tmp_path / "out", max_steps=4, tensorboard=False)
    assert (code, err) == (0, "")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["ckpt.prev.pt", "ckpt.pt", "config.json", "log.csv", "loss.png"]
    settings = json.loads((tmp_path / "out/config.json").read_text())
    assert settings["model"]["d_model"] == 32 and settings["train"]["max_steps"] == 4
    assert (tmp_path / "out/loss.png").read_bytes()[:4] == b"\x89PNG"
    saved = checkpoint(tmp_path / "out")
    assert saved["tokenizer"] == "bytes" and saved["model_config"] == settings["model"]
    for part in ("4 micro-steps x 1 rank x 4 sequences x 16", "float32 (as asked)",
                 "no (as asked)", "finished 4 steps", "nats per byte",
                 f"python sample.py --out_dir={tmp_path / 'out'}"):
        assert part in out
    code, out, err = command(data, tmp_path / "out", max_steps=4, init_from="resume")
    assert code == 0 and "is finished: 4 of 4 steps" in out and err == ""


def test_no_picture_without_matplotlib(data, tmp_path, monkeypatch):
    find = report.importlib.util.find_spec
    hidden = lambda name: None if name == "matplotlib" else find(name)
    monkeypatch.setattr(report.importlib.util, "find_spec", hidden)
    assert tiny_run(data, tmp_path / "out", quiet=False)["finished"]
    assert not (tmp_path / "out/loss.png").exists()


def test_no_global_state_is_left(data, tmp_path):
    handlers = lambda: [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    before, state = handlers(), torch.get_rng_state()
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    tiny_run(data, tmp_path / "out", "infmoe", dropout=0.1)
    assert handlers() == before and torch.equal(torch.get_rng_state(), state)
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
    assert not torch.distributed.is_initialized()


def test_trackers_get_the_rows(data, tmp_path, monkeypatch):
    rows = []

    class Board:
        def __init__(self, folder):
            rows.append(folder)

        def add_scalar(self, name, value, step):
            rows.append((name, step))

        def close(self):
            rows.append("closed")

    fake = type(sys)("tensorboard")
    fake.SummaryWriter = Board
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    tiny_run(data, tmp_path / "out", max_steps=2, tensorboard=True)
    assert (rows[0], rows[-1]) == (str(tmp_path / "out"), "closed")
    assert ("train_loss", 1) in rows and ("val_loss", 2) in rows
    assert ("val_loss", 1) not in rows
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r'wandb is not installed: pip install -e ".\[log\]"'):
        tiny_run(data, tmp_path / "w", wandb="project")


# ---- 3. resuming

# running path estimates and selection biases are state, too; they sit in buffers
BUFFERS = dict(coupling_coef=1e-3, coupling="path", specialization_coef=2e-3, balance="bias",
               z_coef=0.0)


@pytest.mark.parametrize("flavour, more", [
    *((flavour, {}) for flavour in FLAVOURS), ("topk", BUFFERS),
    ("infmoe", dict(grad_clip=0.0, log_every=2, micro_batch=16, save_every=3, seed=5))])
def test_resume_is_bit_for_bit(data, tmp_path, flavour, more):
    """Crashed after step 5 was logged and step 4 saved; an epoch (250 windows) ends within."""
    settings = dict(max_steps=18, save_every=4, dropout=0.1) | more
    tiny_run(data, tmp_path / "whole", flavour, **settings)
    crash(6 if "log_every" in more else 5, data, tmp_path / "broken", flavour, **settings)
    tiny_run(data, tmp_path / "broken", flavour, init_from="resume", **settings)
    assert_same_run(tmp_path / "broken", tmp_path / "whole")
    assert "coupling" not in more or checkpoint(tmp_path / "whole")["model"]["paths"].std() > 0


def test_torn_and_later_rows_are_dropped(data, tmp_path):
    tiny_run(data, tmp_path / "whole")
    out = tmp_path / "broken"
    crash(5, data, out)
    with open(out / "log.csv", "a") as f:
        f.write("\n6,15")  # an empty line, and one cut in the middle
    (out / "ckpt.pt.tmp").write_bytes(b"half a checkpoint")
    tiny_run(data, out, init_from="resume")
    assert_same_run(out, tmp_path / "whole")
    assert not (out / "ckpt.pt.tmp").exists()


@pytest.mark.parametrize("keep", [b"", b"step,to"])  # a crash before, and within, the header
def test_trim_of_an_empty_log(tmp_path, keep):
    (tmp_path / "log.csv").write_bytes(keep)
    report.trim_log(tmp_path / "log.csv", 3)
    assert (tmp_path / "log.csv").read_bytes() == b""
    report.trim_log(tmp_path / "none.csv", 3)
    assert not (tmp_path / "none.csv").exists()


def test_resume_keeps_settings_and_says_what_changed(data, tmp_path, command, monkeypatch, capsys):
    command(data, tmp_path / "out", max_steps=2, lr=5e-4)
    words = [f"--out_dir={tmp_path / 'out'}", "--init_from=resume", "--max_steps=4"]
    assert call(train.main, words, monkeypatch, capsys)[0] == 0
    saved = checkpoint(tmp_path / "out")
    kept = saved["train_config"]
    assert (saved["step"], kept["lr"], kept["batch_tokens"]) == (4, 5e-4, 256)
    changes = dict(init_from="resume", max_steps=6, weight_decay=0.3)
    code, out, _ = command(data, tmp_path / "out", **changes)
    assert code == 0 and "after step 4; max_steps was 4, is 6" in out
    assert "weight_decay was 0.1, is 0.3" in out


def test_overwrite_and_refusal(data, tmp_path, command):
    out = tmp_path / "out"
    tiny_run(data, out, max_steps=2)
    before = (out / "ckpt.pt").read_bytes(), (out / "log.csv").read_bytes()
    assert_refused(command(data, out), "--init_from=resume goes on, --overwrite starts anew")
    assert ((out / "ckpt.pt").read_bytes(), (out / "log.csv").read_bytes()) == before
    assert tiny_run(data, out, max_steps=3, overwrite=True)["finished"]
    assert [r["step"] for r in read_rows(out)] == ["1", "2", "3"]


def test_start_from_another_run(data, tmp_path):
    """Weights and shape come along, optimizer and step do not; the losses may be other ones."""
    tiny_run(data, tmp_path / "a", "topk")
    start = checkpoint(tmp_path / "a")
    changes = dict(coupling_coef=1e-3, coupling="path", max_steps=1, lr=0.0)
    tiny_run(data, tmp_path / "b", "topk", init_from=str(tmp_path / "a"), **changes)
    assert checkpoint(tmp_path / "b")["step"] == 1
    weights = checkpoint(tmp_path / "b")["model"]
    weights.pop("paths")
    assert_same_state(weights, start["model"])  # lr 0: not a bit moved


# ---- 4. faults: a defined outcome, one line, nothing harmed

MISTAKES = [
    (dict(max_step=3), ["--max_step", "did you mean --max_steps"]),
    (dict(batch_tokens=100), ["batch_tokens=100", "64"]), (dict(lr=-1), ["lr=-1"]),
    (dict(max_steps=0), ["max_steps=0"]), (dict(min_lr=1), ["min_lr=1", "lr="]),
    (dict(lr="inf"), ["lr=inf"]), (dict(weight_decay="inf"), ["weight_decay=inf"]),
    (dict(beta1=1), ["beta1=1"]), (dict(timeout=1e17), ["timeout="]),
    (dict(device="gpu"), ["device=gpu"]), (dict(device="cuda:x"), ["device="]),
    (dict(shard="fsdp"), ["shard=fsdp", "torchrun"]),
    (dict(shard="fsdp", dtype="float16"), ["shard=fsdp", "dtype"]),
    (dict(flavour="topk", top_k=5), ["top_k=5", "n_experts=4"]),
    (dict(vocab_size=100), ["vocab_size=100", "257"]),
    (dict(dataset="none"), ["python prepare_data.py"]),
    (dict(dataset=__file__), ["prepare_data.py", "test_train.py is a file"]),
    (dict(init_from="resume"), ["no checkpoint at"]),
    (dict(init_from="none"), ["no checkpoint at"]),
    (dict(block_size=700, batch_tokens=700, micro_batch=1), ["hold no window"]),
    (dict(out_dir=""), ["out_dir is empty"]), (dict(out_dir="x" * 300), ["too long"]),
    # absurd sizes: nothing is built, and nothing allocated
    (dict(n_layer=100_000), ["n_layer=100000"]), (dict(n_layer=10**9), ["n_layer=1000000000"]),
    (dict(n_layer=100_000, plan=True), ["n_layer=100000"]), (dict(max_steps=1e300), ["max_steps="]),
    (dict(d_model=100_000), ["GB are"]), (dict(d_model=10**14), ["beyond any machine"]),
    (dict(batch_tokens=10**13 * 16), ["GB are"]),
    (dict(batch_tokens=1e20), ["batch_tokens=1000"]),
    *[(dict(device="cuda"), ["device=cuda", "no GPU"])] * (not torch.cuda.is_available()),
    *[(dict(device="mps"), ["device=mps"])] * (not torch.backends.mps.is_available())]


def test_mistakes_in_settings(data, tmp_path, command):
    for changes, parts in MISTAKES:
        began = time.monotonic()
        assert_refused(command(data, tmp_path / "out", **changes), *parts)
        assert time.monotonic() - began < 20, changes
    assert not (tmp_path / "out").exists()


def test_ids_beyond_the_vocabulary(tmp_path, command):
    folder = make_data(tmp_path / "data")
    shard = folder / "train_000001.bin"
    write_shard(shard, np.full(2000, 300, np.uint16))
    (folder / "meta.json").write_text('{"tokenizer": "bytes", "vocab_size": 257}')
    assert_refused(command(folder, tmp_path / "out", max_steps=20), str(shard), "300", "257")


@pytest.mark.parametrize("damage", ["deleted", "truncated"])
def test_shard_lost_in_training(data, tmp_path, command, damage):
    """It stops with the shard's name; with the shard back it ends as if nothing had been."""
    folder, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data, folder)
    shard = folder / "train_000001.bin"

    def lose():
        whole = shard.read_bytes()
        shard.unlink() if damage == "deleted" else shard.write_bytes(whole[: len(whole) // 2])

    with after_row(3, lose):
        assert_refused(command(folder, out, max_steps=12), str(shard))
    assert checkpoint(out)["step"] >= 2
    shutil.copy(data / shard.name, shard)
    tiny_run(folder, out, init_from="resume", max_steps=12)
    tiny_run(data, tmp_path / "whole", max_steps=12)
    assert_same_run(out, tmp_path / "whole")


def test_checkpoints_of_another_model_or_tokenizer(data, tmp_path, command):
    out, resume = tmp_path / "out", dict(init_from="resume", max_steps=4)
    tiny_run(data, out, max_steps=2)
    for flavour, changes, says in (("dense", dict(n_layer=1), "n_layer is 2 there, 1 here"),
                                   ("switch", {}, "flavour is dense there, switch here")):
        assert_refused(command(data, out, flavour, **changes, **resume), "another model", says)
    other = make_data(tmp_path / "other")
    (other / "meta.json").write_text(json.dumps({"tokenizer": "gpt2", "vocab_size": 257}))
    assert_refused(command(other, out, **resume), "bytes", "gpt2", str(other))
    assert command(data, out, **resume)[0] == 0


def test_nan_stops_with_the_last_checkpoint(data, tmp_path, command):
    out = tmp_path / "out"
    tiny_run(data, out, max_steps=2)
    before = (out / "ckpt.pt").read_bytes()
    result = command(data, out, init_from="resume", max_steps=9, lr=1e14, warmup_steps=0)
    assert_refused(result, "step 4", "nan", str(out / "ckpt.pt"), "(step 2)")
    assert (out / "ckpt.pt").read_bytes() == before
    result = command(data, tmp_path / "new", lr=1e14, warmup_steps=0, save_every=0)
    assert_refused(result, "nan", "no checkpoint had been saved")


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("fault", ["wandb", "step", "disk"])
def test_overwrite_loses_nothing_that_was_good(data, tmp_path, command, monkeypatch, fault):
    """What fails before a first step has worked leaves the old run as it was."""
    out = tmp_path / "out"
    tiny_run(data, out, max_steps=2)
    before = files_of(out)

    def broken(*args, **kwargs):
        raise RuntimeError("can't allocate memory")

    if fault == "wandb":
        monkeypatch.setitem(sys.modules, "wandb", None)
    elif fault == "step":
        monkeypatch.setattr(GPT, "forward", broken)
    else:
        monkeypatch.setattr(os, "fsync", lambda _: Path("/dev/full").write_text("full"))
    assert_refused(command(data, out, overwrite=True, wandb="x" if fault == "wandb" else ""))
    assert files_of(out) == before


def test_the_last_good_checkpoint_is_good(data, tmp_path, command):
    """A rate that ruins the weights: what it names goes on with a sane one, from the step named."""
    for seed, flavour in enumerate(FLAVOURS):
        out = tmp_path / flavour
        options = dict(seed=seed, warmup_steps=3 * (seed % 2), eval_every=0, max_steps=40)
        tiny_run(data, out, flavour, **options | dict(max_steps=2))
        bad = options | dict(lr=1e10, save_every=1, init_from="resume")
        code, _, err = command(data, out, flavour, **bad)
        if code:
            assert f"ckpt.pt (step {checkpoint(out)['step']})" in err, err
        sane = dict(lr=1e-4, grad_clip=0.1, init_from="resume")
        sane["max_steps"] = checkpoint(out)["step"] + 3
        assert command(data, out, flavour, **options | sane)[0] == 0, flavour


def test_memory_at_hand_decides(monkeypatch):
    """By the machine or by the address space; and what it proposes fits."""
    model = train.on_meta(ModelConfig(n_layer=2, n_head=2, d_model=32))
    config, cpu = train.TrainConfig(micro_batch=4096, dtype="float32"), torch.device("cpu")
    need = sum(budget.memory_per_rank(model, config, 1).values())
    assert budget.choose_micro_batch(model, config, 2, cpu) == (4096, "")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (used + int(need / 5), 0))
    with pytest.raises(ValueError, match=r"ulimit -v\): --micro_batch=(\d+) would fit") as caught:
        budget.choose_micro_batch(model, config, 2, cpu)
    fitting = int(str(caught.value).split("--micro_batch=")[1].split()[0])
    smaller = dataclasses.replace(config, micro_batch=fitting)
    assert budget.choose_micro_batch(model, smaller, 2, cpu) == (fitting, "")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (used, 0))
    with pytest.raises(ValueError, match="fewer or smaller layers"):
        budget.choose_micro_batch(model, config, 2, cpu)


def test_a_model_of_another_tokenizer(data, tmp_path, monkeypatch, capsys):
    """Both are named; without transformers it is one line, too."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(n_embd=32, n_layer=1, n_head=2, n_positions=16)
    for n_ids in (50257, 257):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=n_ids, **sizes))
        model.save_pretrained(tmp_path / f"{n_ids}")
    words = [f"--dataset={data}", f"--out_dir={tmp_path}/out", "--device=cpu", "--max_steps=1",
             "--batch_tokens=64", "--micro_batch=4"]
    start = lambda n: call(train.main, [*words, f"--init_from=hf:{tmp_path / str(n)}"], monkeypatch,
                           capsys)
    capsys.readouterr()  # transformers' progress bar
    assert_refused(start(50257), "(50257 ids)", "bytes (257 ids)", f"hf:{tmp_path}")
    assert start(257)[0] == 0
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert_refused(start(257), "transformers is not installed", "pip install")


def test_the_tokenizer_stays_with_the_checkpoint(tmp_path, command):
    """A copy beside it: the file may move or change; another copy is refused."""
    folder, out = make_data(tmp_path / "data"), tmp_path / "out"
    ranks = tmp_path / "own.tiktoken"
    ranks.write_bytes(b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256)))
    (folder / "meta.json").write_text(json.dumps({"tokenizer": str(ranks), "vocab_size": 257}))
    tiny_run(folder, out, max_steps=2)
    assert command(folder, out, max_steps=3, init_from="resume")[0] == 0
    ranks.unlink()
    spec = load_checkpoint(out / "ckpt.pt")["tokenizer"]
    assert get_tokenizer(spec).encode("ab") == [97, 98] and spec.startswith(str(out))
    (out / "tokenizer.tiktoken").write_text("YQ== 0")
    with pytest.raises(ValueError, match=r"tokenizer.tiktoken is not the tokenizer that"):
        load_checkpoint(out / "ckpt.pt")


def test_ctrl_c_while_starting(data, tmp_path):
    """From the first import to the first step: it leaves, with a word at most."""
    for delay in (0.2, 1, 3, 6):
        arguments = train_command(data, tmp_path / "out", max_steps=10**6, overwrite=True)
        process = subprocess.Popen(
            arguments, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
            text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        if "init_import_site" not in err:  # Python itself had not started yet
            assert process.returncode in (-signal.SIGINT, 130), delay
            assert err.strip() in ("", "stopped by Ctrl-C"), delay


def test_sigterm_in_a_first_step(data, tmp_path, command, monkeypatch):
    """It may take an hour, and there is nothing to save."""
    monkeypatch.setattr(GPT, "forward", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    assert command(data, tmp_path / "out")[0] == 143 and not (tmp_path / "out/ckpt.pt").exists()


@pytest.mark.parametrize("swallowed", [False, True])
def test_ctrl_c_in_a_first_step(data, tmp_path, command, monkeypatch, swallowed):
    """A compiler at work: it leaves at once; where the compiler swallows that, after the step."""
    real = GPT.forward

    def compiling(self, *args, **kwargs):
        if not any(tmp_path.glob("out/log.csv")) and swallowed is not None:
            with contextlib.suppress(KeyboardInterrupt) if swallowed else contextlib.nullcontext():
                signal.raise_signal(signal.SIGINT)
            monkeypatch.setattr(GPT, "forward", real)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(GPT, "forward", compiling)
    code, _, err = command(data, tmp_path / "out")
    assert (code, err.strip()) == (130, "" if swallowed else "stopped by Ctrl-C")
    assert (tmp_path / "out/ckpt.pt").exists() == swallowed


class Callback:
    """What Python calls where an exception goes nowhere."""
    def __del__(self):
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_that_a_callback_loses(data, tmp_path, command, monkeypatch):
    """In a first step of an hour: it is raised again, and nothing is printed of the first."""
    def hour(*_, **__):
        Callback()
        time.sleep(30)

    monkeypatch.setattr(GPT, "forward", hour)
    began = time.time()
    code, _, err = command(data, tmp_path / "out")
    assert (code, err.strip()) == (130, "stopped by Ctrl-C") and time.time() - began < 20


def test_folder_that_cannot_be_written(data, tmp_path, command):
    (tmp_path / "file").write_text("")
    assert_refused(command(data, tmp_path / "file/out"), "cannot be written", "Not a directory")
    if os.geteuid():  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        assert_refused(command(data, tmp_path / "closed/out"), "cannot be written")


def test_disk_full_while_saving(data, tmp_path):
    """The checkpoint does not fit any more (a limit on file size): the old one survives."""
    out = tmp_path / "out"
    crash(3, data, out)
    before = (out / "ckpt.pt").read_bytes()
    limit = len(before) // 2
    done = subprocess.run(
        train_command(data, out, init_from="resume"), env=environment(), capture_output=True,
        text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "could not save step 4" in done.stderr and f"{out / 'ckpt.pt'} (step 2)" in done.stderr
    assert (out / "ckpt.pt").read_bytes() == before and not (out / "ckpt.pt.tmp").exists()
    tiny_run(data, out, init_from="resume")  # with room again
    tiny_run(data, tmp_path / "whole")
    assert_same_run(out, tmp_path / "whole")


def test_disk_full_while_logging():
    with pytest.raises(OSError, match="step 7 cannot be written to /dev/full: No space left"):
        train.log_row("/dev/full", {"step": 7, "loss": 0.5})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_save_and_leave(data, tmp_path, command, number):
    tiny_run(data, tmp_path / "whole")
    with after_row(3, lambda: signal.raise_signal(number)):
        code, out, err = command(data, tmp_path / "out", save_every=0)
    assert code == 128 + number and err == ""
    assert f"stopped by {number.name} after step 3" in out
    assert f"--init_from=resume --out_dir={tmp_path / 'out'}" in out
    assert checkpoint(tmp_path / "out")["step"] == 3
    assert not tiny_run(data, tmp_path / "out", init_from="resume", save_every=0)["signal"]
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def test_compile_that_fails_is_one_line(data, tmp_path, command, monkeypatch):
    def broken(*args, **kwargs):
        reason = RuntimeError("no compiler\nlong story")
        raise torch._dynamo.exc.BackendCompilerFailed("inductor", reason, None)

    monkeypatch.setattr(GPT, "forward", broken)
    assert_refused(command(data, tmp_path / "out"), "torch.compile failed", "--compile=false")


@pytest.mark.parametrize("options, n_runs", [
    (["--kills=4", "--flavours=dense,infmoe", "--seed=3"], 2),
    pytest.param(["--kills=12"], len(FLAVOURS), marks=pytest.mark.slow)])
def test_kills(tmp_path, options, n_runs):
    """soak.py: SIGKILL and SIGTERM, also while a checkpoint is being written."""
    done = run([PYTHON, SOAK, *options], cwd=tmp_path, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal") == n_runs and "SIGKILL" in done.stdout


@pytest.mark.slow
def test_memory_stays_level(tmp_path):
    """One minute here; thirty by hand: python tests/soak.py --minutes=30"""
    done = run([PYTHON, SOAK, "--minutes=1"], cwd=tmp_path)
    assert float(done.stdout.split("(")[-1].split("%")[0]) < 5, done.stdout + done.stderr


# ---- 5. the plan, and compiled runs

def test_plan(data, tmp_path, command):
    changes = dict(plan=2, max_steps=100, batch_tokens=512)
    code, out, err = command(data, tmp_path / "out", "unipool", **changes)
    model_config, _ = configs(data, tmp_path, "unipool")
    assert code == 0 and err == "" and not (tmp_path / "out").exists()
    for part in (budget.amount(model_config.n_params()), "100 steps, 51.2k tokens", "GB are",
                 budget.amount(model_config.n_active_params()), "4 micro-steps x 2 ranks",
                 "7.8 steps, all of", "40 %"):
        assert part in out
    code, out, _ = command(tmp_path / "no data", tmp_path / "out", plan=True)
    assert code == 0 and "unknown: no data in" in out
    assert "on 1 x this CPU" in out and "H100" not in out  # the machine at hand


@pytest.mark.gpu
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_on_a_gpu(data, tmp_path, flavour):
    """With what `auto` picks there: the CPU's losses up to bfloat16; checkpoints move both ways."""
    changes = dict(d_ff=64, max_steps=6, device="cuda", dtype="auto")
    tiny_run(data, tmp_path / "gpu", flavour, **changes, compile="auto")
    tiny_run(data, tmp_path / "cpu", flavour, **changes | dict(device="cpu", dtype="float32"))
    rows = [losses(tmp_path / kind)[:, 0] for kind in ("gpu", "cpu")]
    np.testing.assert_allclose(*rows, rtol=1e-2)
    changes |= dict(max_steps=8, init_from="resume")
    assert tiny_run(data, tmp_path / "cpu", flavour, **changes)["finished"]
    assert tiny_run(data, tmp_path / "gpu", flavour, **changes | dict(device="cpu"))["finished"]


@pytest.mark.slow
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_compiled_run(data, tmp_path, flavour):
    """Inductor's own code gives the eager curve; evaluation and a resumed run compile as well."""
    changes = dict(n_layer=1, micro_batch=8)
    tiny_run(data, tmp_path / "eager", flavour, **changes)
    tiny_run(data, tmp_path / "compiled", flavour, compile="true", **changes)
    for a, b in zip(read_rows(tmp_path / "eager"), read_rows(tmp_path / "compiled")):
        assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=1e-4)
        assert float(a["val_loss"] or 0) == pytest.approx(float(b["val_loss"] or 0), rel=1e-4)


def test_speaks_of_amounts_and_times():
    amounts = {0: "0", 12: "12", 1234: "1.23k", 1.5e6: "1.5M", 5.741e9: "5.74B", 3.2e13: "32T"}
    assert {n: budget.amount(n) for n in amounts} == amounts
    spans = {0: "0 s", 90: "90 s", 600: "10 min", 7300: "2.0 h", 360000: "100.0 h"}
    assert {seconds: budget.span(seconds) for seconds in spans} == spans


def test_gpu_peaks(monkeypatch):
    """The first name that fits; the order of the table decides between an H100 PCIe and an H100."""
    cuda = torch.device("cuda")
    for name, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
                       ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H200", 989e12),
                       ("NVIDIA L40S", 362e12), ("NVIDIA A10G", 125e12), ("Quadro 4000", None)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert budget.peak_flops(cuda) == peak, name


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own")
def test_freed_memory_is_kept():
    """Allocated again, 200 MB cost next to no page faults; without, at least one a huge page."""
    code = """if True:
        import resource, sys, torch
        from support import machine
        faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        if sys.argv[1] == "keep":
            machine.keep_memory()
        counts = []
        for _ in range(8):
            before = faults()
            torch.ones(50_000_000)
            counts.append(faults() - before)
        print(min(counts[1:]))  # the least: the system may take pages back by itself"""
    kept, given_back = (int(run([PYTHON, "-c", code, word]).stdout) for word in ("keep", "give"))
    assert kept < 20 < given_back
