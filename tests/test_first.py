"""The first hour on a fresh machine: commands as typed, without data and without a network."""
import fcntl
import itertools
import json
import os
import pty
import re
import resource
import signal
import struct
import subprocess
import termios
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from data_helpers import ROOT, HubServer
from probe_helpers import hf_model, saved
from train_helpers import PYTHON, configs, make_data, read_rows, run, train_command

import train
from configurator import parse
from model import GPT, ModelConfig
from support import budget, folder, hf, missing, report
from support.shards import write_shard
from support.tokenizer import get_tokenizer

# a hub that refuses at once
NO_HUB = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"}
SMALL = ["--n_layer=1", "--d_model=16", "--d_ff=16", "--n_head=2", "--block_size=32",
         "--micro_batch=2", "--batch_tokens=128", "--max_steps=2", "--eval_tokens=64",
         "--warmup_steps=1", "--device=cpu", "--compile=false", "--dtype=float32"]


def script(folder, name, *argv, **more):
    """Run one of our scripts in `folder` as typed there. -> CompletedProcess"""
    return run([PYTHON, str(ROOT / name), *argv], cwd=folder, **NO_HUB, **more)


# ---- 1. train.py makes the data that is missing


def test_without_a_hub_it_trains_on_what_is_here_and_says_so(tmp_path):
    """config/infmoe_small.py on data/fineweb that is not there: another text, under its own name,
    on screen, in config.json and in the checkpoint; a resumed run does not mix them."""
    words = ["train.py", str(ROOT / "config/infmoe_small.py"), *SMALL,
             "--d_expert=16", "--infmoe_dz=4"]
    done = script(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert "data/fineweb cannot be had" in done.stdout
    name = re.search(r"preparing (data/(packages|stdlib)_gpt2)", done.stdout)[1]
    assert f"data     {name}: " in done.stdout and "(gpt2)" in done.stdout
    out = tmp_path / "out/infmoe_small"
    saved = json.loads((out / "config.json").read_text())
    assert saved["train"]["dataset"] == name and saved["model"]["vocab_size"] == 50304
    assert not (tmp_path / "data/fineweb").exists()
    # the same line goes on with the same text; real data under the old name is refused
    again = script(tmp_path, *words, "--init_from=resume", "--max_steps=3")
    assert again.returncode == 0 and read_rows(out)[-1]["step"] == "3", again.stderr
    real = make_data(tmp_path / "data/fineweb")
    (real / "meta.json").write_text('{"tokenizer": "gpt2", "vocab_size": 50257}')
    mixed = script(tmp_path, *words, "--init_from=resume", "--max_steps=4")
    assert mixed.returncode == 2 and mixed.stderr.count("\n") == 1
    assert f"was trained on {name}, and dataset=data/fineweb" in mixed.stderr


def test_with_a_hub_it_takes_one_shard_of_each_split(tmp_path):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    files = {}
    for name in ("val_000000", "train_000001", "train_000002"):
        write_shard(tmp_path / "x.bin", [15496, 995] * 300)
        files[f"fineweb_{name}.bin"] = (tmp_path / "x.bin").read_bytes()
    program = ("from support import missing; missing.FIRST = 600; "
               "print(missing.make_missing('data/fineweb'))")
    with HubServer(files) as hub:
        done = run([PYTHON, "-c", program], cwd=tmp_path, **hub.env)
    assert done.returncode == 0, done.stderr
    assert "600 training and 600 validation tokens" in done.stdout
    meta = json.loads((tmp_path / "data/fineweb/meta.json").read_text())
    assert list(meta["shards"]) == ["fineweb_val_000000.bin", "fineweb_train_000001.bin"]


def test_never_lists_the_routes(tmp_path):
    for more, env in ((["--download=never"], {}), ([], {"WORLD_SIZE": "2", "RANK": "0"})):
        done = script(tmp_path, "train.py", str(ROOT / "config/infmoe_small.py"), *more, **env)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        for route in ("prepare_data.py fineweb", "prepare_data.py pretokenized --max_tokens=",
                      "prepare_data.py packages --tokenizer=gpt2"):
            assert route in done.stderr
    assert not list(tmp_path.iterdir())


def test_names_that_are_no_source_and_folders_with_something_in_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data/stdlib").mkdir(parents=True)
    Path("data/stdlib/notes.txt").write_text("mine")
    for name in ("data/mine", "data/stdlib", "data/stdlib_mine"):
        with pytest.raises(FileNotFoundError, match=r"python prepare_data\.py"):
            missing.make_missing(name)
    assert [p.name for p in Path("data").rglob("*")] == ["stdlib", "notes.txt"]


# ---- 2. what fits, how long it takes, and something that moves


def test_a_micro_batch_that_does_not_fit_is_lowered(monkeypatch):
    """On one rank, to a power of two, and said; several ranks are refused, with what would fit."""
    model = train.on_meta(ModelConfig(n_layer=2, n_head=2, d_model=32, flavour="infmoe"))
    size, cpu = model.config.block_size, torch.device("cpu")
    config = train.TrainConfig(micro_batch=4096, batch_tokens=4096 * size, dtype="float32")
    assert budget.choose_micro_batch(model, config, 1, cpu) == (4096, "")
    need = sum(budget.memory_per_rank(model, config, 1).values())
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (used + int(need / 5), 0))
    micro, why = budget.choose_micro_batch(model, config, 1, cpu)
    assert micro == 512 and "micro_batch 4096 would take" in why and "512 instead" in why
    with pytest.raises(ValueError, match=r"--micro_batch=512 would fit; config/tiny_infmoe\.py"):
        budget.choose_micro_batch(model, config, 2, cpu)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (used + int(need / 8192), 0))
    with pytest.raises(ValueError, match=r"config/tiny_infmoe\.py is a small twin"):
        budget.choose_micro_batch(model, config, 1, cpu)


def test_a_run_of_days_says_so():
    small, c = ModelConfig(n_layer=2, n_head=2, d_model=32), train.TrainConfig()
    cpu = torch.device("cpu")
    assert budget.long_run(small, c, 1, cpu, 300) == ""
    large = ModelConfig(flavour="infmoe", n_layer=12, n_head=12, d_model=768)
    assert re.match(r"about [\d,]+ days here.*config/tiny_infmoe.py",
                    budget.long_run(large, c, 1, cpu, 10**7))


def test_the_bar_counts_micro_steps_and_hears_ctrl_c(tmp_path):
    """On a terminal, a pseudo one; and a Ctrl-C is acknowledged before the step is done."""
    data = make_data(tmp_path / "data")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    command = train_command(data, tmp_path / "out", batch_tokens=512, micro_batch=1, max_steps=9999)
    running = subprocess.Popen(command, stdout=theirs, stderr=theirs, cwd=tmp_path)
    os.close(theirs)
    shown, sent = b"", False
    try:
        while piece := os.read(ours, 4096):
            shown += piece
            if b"2/9999" in shown and not sent:
                running.send_signal(signal.SIGINT)
                sent = True
    except OSError:  # the other end is closed
        pass
    assert running.wait() == 130 and b"micro-step 1 of 32" in shown
    assert re.search(rb"stopping once this step .*stopped by SIGINT after step", shown, flags=re.S)


def test_the_lowered_micro_batch_is_what_the_run_keeps(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "free_memory", lambda _: (0, "free"))
    monkeypatch.setattr(budget, "fitting", lambda *_: 2)
    data = make_data(tmp_path / "data")
    assert train.train(*configs(data, tmp_path / "out", max_steps=1))["finished"]
    saved = json.loads((tmp_path / "out/config.json").read_text())["train"]
    assert (saved["micro_batch"], saved["batch_tokens"]) == (2, 256)


# ---- 3. probe.py answers


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Two finished runs and a newer one that was stopped half-way."""
    monkeypatch.chdir(tmp_path)
    data = make_data(tmp_path / "data")
    for place, (name, flavour) in enumerate({"pool": "unipool", "bank": "topk"}.items()):
        train.train(*configs(data, f"out/{name}", flavour, n_layer=3, max_steps=2))
        os.utime(f"out/{name}/ckpt.pt", (100 + place, 100 + place))
    train.train(*configs(data, "out/half", "topk", max_steps=2))
    saved = torch.load("out/half/ckpt.pt", weights_only=True)
    torch.save(saved | {"step": 1}, "out/half/ckpt.pt")
    return tmp_path


PROBE = ["--device=cpu", "--tokens=64", "--seeds=1"]


def test_probe_takes_the_newest_finished_run_and_beyond_its_depth_the_deep_half(runs):
    done = script(runs, "probe.py", "--random-router-from", "12", *PROBE)
    assert done.returncode == 0, done.stderr
    assert "the newest finished run: out/bank" in done.stdout
    assert "layer 12 is beyond the 3 layers" in done.stdout and "from layer 1 on" in done.stdout
    found = json.loads(Path("out/bank/random_router.json").read_text())
    assert {row["layer"] for row in found["rows"]} == {"1", "2", "mean"}


def test_the_page_of_one_model_and_of_two(runs):
    for more, n in ([], 1), (["--compare=out/bank"], 2):
        done = script(runs, "probe.py", "--out_dir=out/pool", "--page", *more, *PROBE)
        assert done.returncode == 0, done.stderr
        html = Path("out/pool/page.html").read_text()
        assert html.count('"banks":') == n and "out/pool (unipool" in html
    assert Path("out/pool/page-1.html").exists() and "out/bank (topk" in html
    # the text of a model of transformers, by its own tokenizer; another one's cannot be compared
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = hf.export_tokenizer(transformers, get_tokenizer("bytes"), 32)
    saved(hf_model("mixtral"), "theirs")
    Path("notes.txt").write_text("<b>def f(x)\n" * 20)
    words = ["probe.py", "--hf=theirs", "--page", "--dataset=notes.txt", "--block_size=16", *PROBE]
    assert script(runs, *words).returncode == 2  # no tokenizer
    tokenizer.save_pretrained("theirs")
    assert script(runs, *words).returncode == 0
    html = Path("out/hf_theirs/page.html").read_text()
    assert '"d","e","f"," "' in html and "\\u003c" in html
    assert script(runs, *words, "--compare=out/bank").returncode == 0  # both read bytes
    path = Path("theirs/tokenizer.json")
    swapped = path.read_text().replace('"d": 100', '"d": 101').replace('"e": 101', '"e": 100')
    path.write_text(swapped)
    other = script(runs, *words, "--compare=out/bank")
    assert other.returncode == 2 and "compares token by token" in other.stderr
    done = script(runs, "probe.py", "--out_dir=out/pool", "--compare=out/bank", *PROBE)
    assert done.returncode == 2 and "add --page" in done.stderr


def test_without_a_checkpoint_it_trains_the_demos_model(tmp_path):
    """The real config, cut short by a config of this test: the command is the demo's."""
    done = script(tmp_path, "probe.py", "--train=never", *PROBE)
    assert done.returncode == 2 and "no checkpoint under out/" in done.stderr
    make_data(tmp_path / "data/stdlib")
    program = f"""import sys, subprocess, probe
real = subprocess.run
subprocess.run = lambda command: real([*command, *{SMALL[:3]}, "--n_experts=4", "--block_size=32",
    "--n_head=2", "--micro_batch=2", "--batch_tokens=128", "--max_steps=2", "--eval_tokens=64"])
sys.argv = ["probe.py", "--random-router-from", "12", *{PROBE}]
probe.main()"""
    done = run([PYTHON, "-c", program], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "training the demo's model first, about 4 minutes" in done.stdout
    assert (tmp_path / "out/demo/random_router.json").exists()


def test_the_demos_model_has_layers_behind_layer_12():
    source = (ROOT / "config/tiny_unipool.py").read_text()
    assert "n_layer = 16" in source and "n_experts = 64" in source


def test_a_mistake_is_told_before_data_is_fetched(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("support.missing.make_missing", lambda *_: pytest.fail("fetched"))
    argv = ["--flavour=topk", "--top_k=9", "--dataset=data/fineweb"]
    parsed = parse(ModelConfig, train.TrainConfig, words=("config",), argv=argv)
    with pytest.raises(SystemExit):
        folder.settings(parsed, ModelConfig, train.TrainConfig, GPT)
    assert "top_k=9 must lie between 1 and n_experts=8" in capsys.readouterr().err


def test_the_first_micro_step_is_told_once(monkeypatch):
    """Where there is no terminal: not in every step, as a run of weeks would fill its log."""
    said, seconds = [], itertools.count(0, 20)
    monkeypatch.setattr(report.time, "monotonic", lambda: next(seconds))
    trainer = SimpleNamespace(config=train.TrainConfig(), accumulation=4, compiled=False,
                              ranks=SimpleNamespace(rank=0), model_config=ModelConfig())
    with report.progress(trainer, 0, said.append):
        for _ in range(3):
            trainer.moved(1)
    assert len(said) == 1 and "the first of 4 micro-steps took" in said[0]
