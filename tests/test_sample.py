"""sample.py: it prints what the model generates, byte for byte, and never half a character."""
import io
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from train_helpers import PYTHON, ROOT, call, environment, make_data, tiny_run

import sample
import train
from model import GPT
from support.checkpoint import newest_run
from support.tokenizer import get_tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of two tiny trained models."""
    folder = tmp_path_factory.mktemp("models")
    data = make_data(folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_loss", lambda *_: False)
        for flavour in ("dense", "infmoe"):
            tiny_run(data, folder / flavour, flavour, lr=3e-3, max_steps=20)
    return folder


@pytest.fixture
def command(monkeypatch, capsys, trained):
    """sample.py's main with a command line -> (exit code, stdout, stderr)"""
    return lambda *options, flavour="dense": call(
        sample.main, [f"--out_dir={trained / flavour}", *options], monkeypatch, capsys)


# ---- 1. text

@pytest.mark.parametrize(("prompt", "n", "settings"), [
    ("one two", 40, dict(temperature=0.9, top_k=20, top_p=0.95, seed=5)),  # past the context
    ("x" * 16, 2, dict(temperature=0.8, seed=3)),  # exactly the context
    (None, 10, dict(temperature=0.8, seed=1)),  # from the end-of-text token, which is not printed
])
def test_prints_what_the_model_generates(prompt, n, settings, trained, command):
    model, ids = GPT.from_checkpoint(trained / "dense"), list((prompt or "").encode())
    options = {key: value for key, value in settings.items() if key != "seed"}
    generator = torch.Generator().manual_seed(settings["seed"])
    new = model.generate(torch.tensor([ids or [256]]), n, generator=generator, **options)
    new = [int(token) for token in new]
    new = new[: new.index(256)] if 256 in new else new
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    prompted = [f"--prompt={prompt}"] if prompt else []
    code, out, err = command(*prompted, f"--max_new_tokens={n}", *arguments)
    assert code == 0 and out == get_tokenizer("bytes").decode(ids + new) + "\n"
    assert "tokens/s]" in err and err.startswith(f"[{len(new) + (len(new) < n)} tokens")


def test_seeds_and_temperature(command):
    options = ["--prompt=t", "--max_new_tokens=20"]
    one, again, other = (command(*options, f"--seed={seed}")[1] for seed in (1, 1, 2))
    assert one == again != other
    greedy = [command(*options, "--temperature=0", f"--seed={seed}")[1] for seed in (1, 2)]
    assert greedy[0] == greedy[1] == command(*options, "--top_k=1")[1]
    assert greedy[0] == command(*options, "--temperature=1e-6")[1]


def test_several_samples_differ(command):
    code, out, _ = command("--prompt=t", "--max_new_tokens=30", "--num_samples=3")
    parts = out.split("\n" + "-" * 80 + "\n")
    assert code == 0 and len(parts) == len(set(parts)) == 3
    assert all(part.startswith("t") for part in parts)


def test_prompt_from_a_file(command, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("één\n", encoding="utf-8")
    code, out, _ = command(f"--prompt_file={path}", "--max_new_tokens=1")
    assert code == 0 and out.startswith("één\n")


class Scripted:
    """A model that writes given tokens."""

    def __init__(self, tokens):
        self.tokens, self.wte = tokens, torch.nn.Embedding(257, 1)

    def generate(self, prompt, max_new_tokens, *options):
        yield from (torch.tensor([[t]]) for t in self.tokens[:max_new_tokens])


class Spy(io.StringIO):
    """A stdout that keeps what each write showed."""

    def __init__(self):
        super().__init__()
        self.shown = []

    def write(self, text):
        self.shown.append(text)
        return super().write(text)


def streamed(monkeypatch, tokens, prompt):
    """What sample.stream prints for a model that writes `tokens` -> (count, Spy)"""
    spy, config = Spy(), sample.SampleConfig(max_new_tokens=100)
    monkeypatch.setattr(sys, "stdout", spy)
    ids, tokenizer = list(prompt.encode()), get_tokenizer("bytes")
    count = sample.stream(Scripted(tokens), tokenizer, ids, config, None)
    return count, spy


@pytest.mark.parametrize(("text", "end"), [
    ("aé€😀b", []), ("ok", [0xF0, 0x9F]), ("x", [0xFF, 0x61])])
def test_streams_whole_characters(monkeypatch, text, end):
    """Characters of 1 to 4 bytes: none is shown before its last byte, none is broken; a text
    that ends in the middle of one, or has a byte that is none, shows U+FFFD there."""
    tokens = [*text.encode(), *end]
    count, spy = streamed(monkeypatch, tokens, "é")
    assert count == len(tokens)
    assert spy.getvalue() == "é" + bytes(tokens).decode(errors="replace") + "\n"
    shown = [s for s in spy.shown if s and s != "\n"]
    assert shown[: 1 + len(text)] == ["é", *text]


def test_end_of_text_and_a_padded_vocabulary(monkeypatch):
    """A model may be wider than its tokenizer: an id that means nothing is shown as U+FFFD."""
    count, spy = streamed(monkeypatch, [97, 256, 98], "c")
    assert count == 2 and spy.getvalue() == "ca\n"
    assert streamed(monkeypatch, [300, 97], "c")[1].getvalue() == "c\ufffda\n"


# ---- 2. infmoe, folders, mistakes

def test_infmoe_samples_and_mean(trained, command):
    options = ["--prompt=one ", "--max_new_tokens=12", "--temperature=0"]
    for more in ([], ["--infmoe_samples=8"], ["--infmoe_mean"]):
        assert command(*options, *more, flavour="infmoe")[0] == 0
    folder = str(trained / "infmoe")
    model, _ = sample.load(sample.SampleConfig(out_dir=folder, device="cpu", infmoe_samples=8))
    assert {m.n_samples for m in model.modules() if hasattr(m, "n_samples")} == {8}


def test_newest_checkpoint(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    run_it = lambda: call(sample.main, ["--max_new_tokens=2"], monkeypatch, capsys)
    code, _, err = run_it()
    assert code == 2 and "no checkpoint under out/" in err
    (trained / "out").symlink_to(trained)
    assert newest_run().name == "infmoe" and run_it()[0] == 0
    (trained / "out").unlink()


@pytest.mark.parametrize(("option", "part"), [
    ("--prompt=", "the prompt is empty"), ("--prompt_file=/nowhere/x", "/nowhere/x"),
    ("--prompt_file=", "irectory"),
    ("--prompt=" + "x" * 17, "17 tokens and the model's context 16"),
    ("--prompt=a --prompt_file=b", "prompt and prompt_file"), ("--out_dir=/", "no checkpoint at /"),
    ("--promt=x", "did you mean --prompt?"), ("--temperature=-1", "temperature=-1"),
    ("--temperature=1e-300", "temperature=1e-300"), ("--top_p=0", "top_p=0"),
    ("--top_k=0", "top_k=0"), ("--num_samples=0", "num_samples=0"),
    ("--max_new_tokens=0", "max_new_tokens=0"),
    ("--device=gpu", "device=gpu"), ("--device=mps", "device=mps"), ("--device=cuda:99", "cuda:99"),
    ("--infmoe_samples=8", "infmoe")])
def test_mistakes_are_one_line(command, option, part):
    code, out, err = command(*option.split(" "))
    assert code == 2 and out == "" and err.count("\n") == 1 and part in err


def test_too_many_samples_and_a_prompt_of_other_bytes(command, tmp_path):
    code, _, err = command("--infmoe_samples=10_000_000", flavour="infmoe")
    assert code == 2 and err.count("\n") == 1 and "infmoe_samples=10000000: at most" in err
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    code, _, err = command(f"--prompt_file={tmp_path / 'latin.txt'}")
    assert code == 2 and "latin.txt is not UTF-8 text" in err and "0xef in position 2" in err


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers(value, trained, command, tmp_path):
    shutil.copytree(trained / "dense", tmp_path / "x")
    saved = torch.load(tmp_path / "x" / "ckpt.pt")
    saved["model"]["norm.weight"][0] = value
    torch.save(saved, tmp_path / "x" / "ckpt.pt")
    code, out, err = command(f"--out_dir={tmp_path / 'x'}")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "NaN or infinite" in err and "norm.weight" in err and str(tmp_path / "x") in err


def test_ctrl_c_is_one_line(trained):
    line = [PYTHON, str(ROOT / "sample.py"), f"--out_dir={trained / 'dense'}", "--prompt=two",
            "--num_samples=100000"]
    going = subprocess.Popen(line, env=environment(), text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
    assert going.stdout.read(3) == "two"
    os.kill(going.pid, signal.SIGINT)
    err = going.communicate(timeout=60)[1]
    assert going.returncode == 130 and err.strip() == "stopped by Ctrl-C"
