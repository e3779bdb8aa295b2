"""sample.py: what it prints is what the model generates, byte for byte, and never half a character."""

import io
import sys

import pytest
import torch
from train_helpers import FLAVOURS, PYTHON, ROOT, SIZE, TRAINING, make_data, run

import sample
import train
from model import GPT, ModelConfig
from support.checkpoint import newest_run
from support.tokenizer import get_tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of two tiny trained models."""
    folder = tmp_path_factory.mktemp("models")
    data, patch = make_data(folder / "data"), pytest.MonkeyPatch()
    patch.setattr(train, "draw_loss", lambda *_: False)
    for flavour in ("dense", "infmoe"):
        settings = TRAINING | dict(dataset=str(data), out_dir=str(folder / flavour), quiet=True, lr=3e-3, max_steps=20)
        train.train(ModelConfig(**SIZE, vocab_size=257, **FLAVOURS[flavour]), train.TrainConfig(**settings))
    patch.undo()
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """sample.py's main with a command line -> (exit code, stdout, stderr)"""
    def call(*options):
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, options)])
        code = 0
        try:
            sample.main()
        except SystemExit as leave:
            code = leave.code
        return code, *capsys.readouterr()

    return call


def words(ids):
    return get_tokenizer("bytes").decode(ids)


# ---- 1. text


def test_prints_what_the_model_generates(trained, command):
    """The prompt, then generate()'s tokens: with a seed, past the context of 16 tokens, up to end of text."""
    model, ids = GPT.from_checkpoint(trained / "dense"), list(b"one two")
    generator = torch.Generator().manual_seed(5)
    new = [int(t) for t in model.generate(torch.tensor([ids]), 40, temperature=0.9, top_k=20, top_p=0.95, generator=generator)]
    new = new[: new.index(256)] if 256 in new else new
    code, out, err = command(f"--out_dir={trained / 'dense'}", "--prompt=one two", "--max_new_tokens=40", "--temperature=0.9",
                             "--top_k=20", "--top_p=0.95", "--seed=5")
    assert code == 0 and out == words(ids + new) + "\n"
    assert "tokens/s]" in err and err.startswith(f"[{len(new) + (len(new) < 40)} tokens")


def test_seeds_and_temperature(trained, command):
    options = [f"--out_dir={trained / 'dense'}", "--prompt=t", "--max_new_tokens=20"]
    assert command(*options, "--seed=1")[1] == command(*options, "--seed=1")[1] != command(*options, "--seed=2")[1]
    greedy = [command(*options, "--temperature=0", f"--seed={seed}")[1] for seed in (1, 2)]
    assert greedy[0] == greedy[1] == command(*options, "--top_k=1")[1]


def test_several_samples_differ(trained, command):
    code, out, _ = command(f"--out_dir={trained / 'dense'}", "--prompt=t", "--max_new_tokens=30", "--num_samples=3")
    parts = out.split("\n" + "-" * 80 + "\n")
    assert code == 0 and len(parts) == 3 and len(set(parts)) == 3 and all(part.startswith("t") for part in parts)


def test_without_a_prompt_a_document_begins(trained, command):
    """From the end-of-text token, which is not printed."""
    model, generator = GPT.from_checkpoint(trained / "dense"), torch.Generator().manual_seed(1)
    new = [int(t) for t in model.generate(torch.tensor([[256]]), 10, temperature=0.8, generator=generator)]
    new = new[: new.index(256)] if 256 in new else new
    code, out, _ = command(f"--out_dir={trained / 'dense'}", "--max_new_tokens=10")
    assert code == 0 and out == words(new) + "\n"


def test_prompt_from_a_file(trained, command, tmp_path):
    (tmp_path / "prompt.txt").write_text("één\n", encoding="utf-8")
    code, out, _ = command(f"--out_dir={trained / 'dense'}", f"--prompt_file={tmp_path / 'prompt.txt'}", "--max_new_tokens=1")
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


@pytest.mark.parametrize(("text", "end"), [("aé€😀b", []), ("€" * 3, []), ("ok", [0xF0, 0x9F]), ("x", [0xFF, 0x61])])
def test_streams_whole_characters(monkeypatch, text, end):
    """Characters of 1 to 4 bytes, token by token: none is shown before its last byte, none is broken; a text that ends in
    the middle of one, or has a byte that is none, shows U+FFFD there."""
    tokens, spy = [*text.encode(), *end], Spy()
    monkeypatch.setattr(sys, "stdout", spy)
    config = sample.SampleConfig(max_new_tokens=100)
    count = sample.stream(Scripted(tokens), get_tokenizer("bytes"), list("é".encode()), config, None)
    assert count == len(tokens) and spy.getvalue() == "é" + bytes(tokens).decode(errors="replace") + "\n"
    shown = [s for s in spy.shown if s and s != "\n"]
    assert shown[: 1 + len(text)] == ["é", *text]


def test_end_of_text_ends(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Spy())
    count = sample.stream(Scripted([97, 256, 98]), get_tokenizer("bytes"), [99], sample.SampleConfig(), None)
    assert count == 2 and sys.stdout.getvalue() == "ca\n"


def test_padded_vocabulary(monkeypatch):
    """A model may be wider than its tokenizer: an id that means nothing is shown as U+FFFD."""
    monkeypatch.setattr(sys, "stdout", Spy())
    sample.stream(Scripted([300, 97]), get_tokenizer("bytes"), [99], sample.SampleConfig(), None)
    assert sys.stdout.getvalue() == "c\ufffda\n"


# ---- 2. infmoe, folders, mistakes


def test_infmoe_samples_and_mean(trained, command):
    options = [f"--out_dir={trained / 'infmoe'}", "--prompt=one ", "--max_new_tokens=12", "--temperature=0"]
    texts = [command(*options, *more) for more in ([], ["--infmoe_samples=8"], ["--infmoe_mean"])]
    assert all(code == 0 for code, _, _ in texts)
    config = sample.SampleConfig(out_dir=str(trained / "infmoe"), device="cpu", infmoe_samples=8)
    model, _ = sample.load(config)
    assert {m.n_samples for m in model.modules() if hasattr(m, "n_samples")} == {8}
    code, _, err = command(f"--out_dir={trained / 'dense'}", "--infmoe_samples=8")
    assert code == 2 and "infmoe" in err


def test_newest_checkpoint(trained, command, monkeypatch):
    monkeypatch.chdir(trained)
    code, _, err = command()
    assert code == 2 and "no checkpoint under out/" in err
    (trained / "out").symlink_to(trained)
    assert newest_run().name == "infmoe"
    assert command("--max_new_tokens=2")[0] == 0
    (trained / "out").unlink()


@pytest.mark.parametrize(("option", "part"), [
    ("--prompt=", "the prompt is empty"), ("--prompt=" + "x" * 17, "17 tokens and the model's context 16"),
    ("--prompt_file=/nowhere/x", "/nowhere/x"), ("--promt=x", "did you mean --prompt?"), ("--temperature=-1", "temperature=-1"),
    ("--top_p=0", "top_p=0"), ("--top_k=0", "top_k=0"), ("--num_samples=0", "num_samples=0"),
    ("--max_new_tokens=0", "max_new_tokens=0"), ("--device=gpu", "device=gpu")])
def test_mistakes_are_one_line(trained, command, option, part):
    code, out, err = command(f"--out_dir={trained / 'dense'}", option)
    assert code == 2 and out == "" and err.count("\n") == 1 and part in err


def test_prompt_of_exactly_the_context(trained, command):
    code, out, _ = command(f"--out_dir={trained / 'dense'}", "--prompt=" + "x" * 16, "--max_new_tokens=2")
    assert code == 0 and out.startswith("x" * 16)


def test_two_prompts_and_no_checkpoint(trained, command, tmp_path):
    code, _, err = command("--prompt=a", "--prompt_file=b")
    assert code == 2 and "prompt and prompt_file" in err
    code, _, err = command(f"--out_dir={tmp_path}")
    assert code == 2 and f"no checkpoint at {tmp_path}" in err


def test_as_a_command(trained):
    """Text to stdout, speed to stderr."""
    done = run([PYTHON, str(ROOT / "sample.py"), f"--out_dir={trained / 'dense'}", "--prompt=two", "--max_new_tokens=5"])
    assert done.returncode == 0 and done.stdout.startswith("two") and "tokens/s" in done.stderr
