"""configurator.py: values, precedence, config files, one line and exit code 2 for a mistake."""
import contextlib
import dataclasses
import io
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configurator import parse
from model import ModelConfig
from moe import FLAVOURS
from support.usage import field_comments
from train import TrainConfig

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Model:
    n_layer: int = 2  # blocks
    lr: float = 1e-3  # learning rate # with a second hash
    name: str = "a#b"  # the default holds a hash
    # and its comment goes on
    # for three lines

    # a heading is no comment of a field
    arch: Literal["gpt2", "llama"] = "gpt2"  # größer ≥ 1
    bias: bool = True
    rate: float | tuple | None = None  # one for all, or one a layer


@dataclass
class Train:
    top_k: int | None = 4  # None: all
    betas: tuple = (0.9, 0.95)  # Adam
    compile: Literal["auto", "true", "false"] = "auto"
    plan: bool | int = False  # bare, or a number of ranks
    overwrite: bool = False
    sizes: tuple[str, ...] = ()
    tags: list = field(default_factory=list)

    def __post_init__(self):
        if self.top_k == 13:
            raise ValueError("top_k=13 is unlucky\nin two lines")


def run(*argv, words=("config",)):
    return parse(Model, Train, argv=list(argv), words=words)


def mistake(capsys, *argv, words=("config",), make=Model):
    """The one line that a mistake prints; exit code 2 and no traceback."""
    with pytest.raises(SystemExit) as stop:
        run(*argv, words=words).make(make)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err.count("\n") == 1, err
    assert err.startswith("error: "), err
    return err


def config(tmp_path, text, name="config.py"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def python(code, folder):
    """What a program prints, on stdout and stderr."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    return done.stdout, done.stderr


# ---- 1. values

GOOD = [  # option, value, the edge
    ("--lr=1", 1.0), ("--lr=1e-5", 1e-5), ("--lr=-.5", -0.5),  # an int is a float
    ("--lr=inf", float("inf")),  # grad_clip=inf means something; nan never does
    ("--n_layer=12", 12), ("--n_layer=1e9", 10**9), ("--n_layer=1_000", 1000),
    ("--n-layer=3", 3),  # hyphens and underscores are the same
    ("--top_k=None", None), ("--top_k=2", 2),
    ("--name=None", "None"), ("--name=12", "12"), ("--name=", ""),  # a str stays what was typed
    ("--name=a=b==c", "a=b==c"), ("--name=--x", "--x"),  # values may contain =
    ("--arch=llama", "llama"), ("--arch=LLAMA", "llama"),
    ("--bias=false", False), ("--bias=0", False), ("--bias", True),
    ("--compile", "true"), ("--compile=False", "false"),  # bare, as true is among the choices
    ("--plan", True), ("--plan=1", 1), ("--plan=false", False),  # a number before a truth value
    ("--rate=None", None), ("--rate=0.25", 0.25), ("--rate=0.25,1", (0.25, 1)),
    ("--rate=(0.5, None, 0.25)", (0.5, None, 0.25)), ("--rate=0.5,", (0.5,)),
    ("--betas=0.9,0.999", (0.9, 0.999)), ("--betas=()", ()), ("--betas=4", (4,)),
    ("--sizes=a,b", ("a", "b")),
]


@pytest.mark.parametrize("option, value", GOOD, ids=[case[0] for case in GOOD])
def test_value(option, value):
    key, got = option[2:].split("=")[0].replace("-", "_"), run(option).given
    assert got == {key: value} and type(got[key]) is type(value)


BAD = [  # option, what the line says
    ("--n_layer=2.5", "expected int, got '2.5'"), ("--n_layer=True", "expected int"),
    ("--n_layer=nan", "expected int"), ("--n_layer=1e999", "expected int"),
    ("--n_layer=", "expected int, got ''"),
    ("--lr=nan", "expected float"), ("--lr=fast", "expected float, got 'fast'"),
    ("--arch=lama", "expected gpt2|llama, got 'lama'"), ("--bias=maybe", "expected bool"),
    ("--rate=a", "expected float|tuple|None"), ("--betas=0.9,x", "expected tuple"),
    ("--top_k=none at all", "expected int|None"),
    ("--n_layre=2", "unknown option --n_layre: did you mean --n_layer?"),
    ("--n-layre=2", "did you mean --n_layer?"), ("--zzzzzz=2", "--help"),
    ("-n_layer=2", "two hyphens: --n_layer=2"), ("n_layer=2", "two hyphens: --n_layer=2"),
    ("--lr", "--lr needs a value: float"), ("--name", "--name needs a value: str"),
    ("--", "unknown option --"),
]


@pytest.mark.parametrize("option, line", BAD, ids=[case[0] for case in BAD])
def test_bad_value(option, line, capsys):
    assert line in mistake(capsys, option)
    assert line in mistake(capsys, option, "--sizes=a")  # the next option is no value


@pytest.mark.parametrize("argv, given", [
    ("--lr 1 --bias --n-layer 3", {"lr": 1.0, "bias": True, "n_layer": 3}),
    ("--lr -1", {"lr": -1.0}),  # a negative number is no option
    ("--bias false", {"bias": False}),
    ("--bias --lr=2", {"bias": True, "lr": 2.0}),  # an option leaves a bare flag
    ("--lr=1 --lr=2", {"lr": 2.0}),  # the last one counts
])
def test_value_as_the_next_word(argv, given):
    assert run(*argv.split()).given == given


# ---- 2. positional words


def test_words():
    assert parse(Model, argv=[], words=("bench",)).words == {"bench": None}
    assert parse(Model, argv=["moe", "--lr=1"], words=("bench",)).words == {"bench": "moe"}
    parsed = parse(Model, argv=["a", "b", "--lr=1", "c"], words=("first", "rest*"))
    assert parsed.words == {"first": "a", "rest": ["b", "c"]}
    assert parse(Model, argv=[], words=("sources*",)).words == {"sources": []}


def test_word_too_many(tmp_path, capsys):
    assert "unexpected word 'more'" in mistake(capsys, config(tmp_path, ""), "more")
    assert "unexpected word 'x'" in mistake(capsys, "x", words=())


# ---- 3. config files


def test_precedence(tmp_path):
    parsed = run(config(tmp_path, "lr = 1\nn_layer = 7\n"), "--n_layer=9")
    assert parsed.given == {"lr": 1.0, "n_layer": 9}  # file over defaults, command line over file
    model = parsed.make(Model)
    assert (model.lr, model.n_layer, model.name) == (1.0, 9, "a#b")
    assert parsed.make(Train) == Train()


def test_config_is_python(tmp_path):
    text = ("import math\nfrom pathlib import Path\n_half = 3\ndef f():\n    return 1\n"
            "n_layer = 2 * _half\nrate = [0.5, None]\n")
    assert run(config(tmp_path, text)).given == {"n_layer": 6, "rate": (0.5, None)}


def test_config_builds_on_another(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    config(tmp_path, "lr = 2.0\nn_layer = 4\n", "base_of_a_test.py")
    path = config(tmp_path, "from base_of_a_test import *\nlr = 3\n")
    assert run(path).given == {"lr": 3.0, "n_layer": 4}


def test_project_root_is_importable_from_anywhere(tmp_path):
    path = config(tmp_path, "from support import rules as _rules\nlr = 2\n")
    code = f"""import dataclasses, sys
sys.path.insert(0, {str(ROOT)!r})
from configurator import parse
sys.path[:] = [folder for folder in sys.path if folder != {str(ROOT)!r}]
schema = dataclasses.make_dataclass("Schema", [("lr", float, 1.0)])
print(parse(schema, argv=[{path!r}], words=("config",)).given)"""
    assert python(code, tmp_path) == ("{'lr': 2.0}\n", "")


BAD_CONFIGS = [  # text, what the line says
    ("lr = = 1\n", "config.py:1: syntax error"),
    ("n_layer = 1\nimport no_such_module\n", "config.py:2: ModuleNotFoundError"),
    ("from config.no_such_config import *\n", "config.py:1: ModuleNotFoundError"),
    ("lr = 1 / 0\n", "config.py:1: ZeroDivisionError"),
    ("raise SystemExit(0)\n", "config.py:1: SystemExit"),
    ("n_layre = 1\n", "unknown key n_layre: did you mean n_layer?"),
    ("n_layer = 2.5\n", "n_layer: expected int, got 2.5"),
    ("n_layer = True\n", "n_layer: expected int, got True"),
    ("lr = abs\n", "lr: expected float"),
    ("name = 3\n", "name: expected str, got 3"),
    ("betas = {1: 2}\n", "betas: expected tuple"),
    ("bias = 'maybe'\n", "bias: expected bool"),
    (b"name = '\xff'\n", "syntax error"),
    (b"lr = 1\0\n", "null bytes"),
    ("lr = " + "(" * 500 + ")" * 500, "config.py"),  # too deep for the parser
]


@pytest.mark.parametrize("text, line", BAD_CONFIGS,
                         ids=[repr(case[0])[:30] for case in BAD_CONFIGS])
def test_bad_config(text, line, tmp_path, capsys):
    assert line in mistake(capsys, config(tmp_path, text))


def test_missing_config_names_the_nearest(tmp_path, capsys):
    config(tmp_path, "", "tiny_moe.py")
    assert f"did you mean {tmp_path}/tiny_moe.py?" in mistake(capsys, str(tmp_path / "tiny_mo.py"))
    assert "no config file" in mistake(capsys, str(tmp_path))  # a folder


def fuzz(examples):
    return settings(max_examples=examples, deadline=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture])


def parses_or_fails_in_one_line(capsys, *argv, words):
    try:
        run(*argv, words=words)
    except SystemExit as stop:
        assert stop.code == 2 and capsys.readouterr().err.splitlines()[-1].startswith("error: ")


@fuzz(60)
@given(st.one_of(st.binary(max_size=60),
                 st.text(max_size=60).map(lambda s: ("lr = " + s).encode("utf-8", "replace"))))
def test_fuzz_config_text(tmp_path, capsys, text):
    parses_or_fails_in_one_line(capsys, config(tmp_path, text), words=("config",))


@fuzz(150)
@given(st.lists(st.one_of(st.text(max_size=12),
                          st.sampled_from(["--lr", "--bias=", "--rate=", "--top_k"])), max_size=4))
def test_fuzz_command_line(capsys, argv):
    if "--help" not in argv and "-h" not in argv:
        parses_or_fails_in_one_line(capsys, *argv, words=("rest*",))


# ---- 4. schemas and help


def test_post_init_becomes_one_line(capsys):
    assert "top_k=13 is unlucky in two lines" in mistake(capsys, "--top_k=13", make=Train)


def test_required_field(capsys):
    Needs = dataclasses.make_dataclass("Needs", [("path", str)])
    assert "--path is required" in mistake(capsys, make=Needs)
    assert parse(Needs, argv=["--path=x"]).make(Needs).path == "x"


def test_one_namespace():
    Again = dataclasses.make_dataclass("Again", [("lr", float, 0.0)])
    with pytest.raises(TypeError, match=r"Again\.lr"):
        parse(Model, Again, argv=[])


def help_of(*schemas, argv=("-h",), **options):
    """What --help prints, with exit code 0."""
    out = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stdout(out):
        parse(*schemas, argv=list(argv), **options)
    assert stop.value.code == 0
    return out.getvalue()


def test_help(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    out = help_of(Model, Train, argv=["--n_layer=oops", "--help"], words=("config", "rest*"),
                  doc="What it does.\nMore.")
    assert "[config] [rest ...] [--key=value ...]" in out and "What it does.\nMore." in out
    lines = {line.split("=")[0].strip(): " ".join(line.split()) for line in out.splitlines()
             if line.startswith("  --")}
    assert list(lines) == [f"--{f.name}" for s in (Model, Train) for f in dataclasses.fields(s)]
    assert lines["--lr"] == "--lr=float 0.001 learning rate # with a second hash"
    assert lines["--name"].endswith("a hash and its comment goes on for three lines")
    assert "'a#b'" in lines["--name"]
    assert lines["--arch"] == "--arch=gpt2|llama 'gpt2' größer ≥ 1"
    assert lines["--top_k"] == "--top_k=int|None 4 None: all"
    assert lines["--tags"] == "--tags=list []"


@pytest.mark.parametrize("columns", [60, 100])
def test_help_is_as_wide_as_the_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = help_of(Model, Train, words=("config",), doc="What it does.")
    assert columns - 20 < max(map(len, out.splitlines())) < columns
    assert "holds a hash and its comment goes on for three lines" in " ".join(out.split())


@pytest.mark.parametrize("script, usage", [("train.py", "train.py"),
                                           ("lab/bench.py", "-m lab.bench")])
def test_help_says_how_the_program_is_started(script, usage, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / script)])
    assert help_of(Model).startswith(f"usage: python {usage} [--key=value ...]")


@pytest.mark.parametrize("schema", [ModelConfig, TrainConfig])
def test_help_says_what_none_means(schema):
    """A field whose default is None: its comment says what that stands for, or its flavour does."""
    comments = field_comments(schema)
    by_flavour = {key for preset in FLAVOURS.values() for key in preset}
    for f in dataclasses.fields(schema):
        assert f.default is not None or f.name in by_flavour or "None" in comments[f.name], f.name


def test_help_without_source():
    Typed = dataclasses.make_dataclass("Typed", [("lr", float, 1.0)])  # no file holds it
    assert "--lr=float" in help_of(Typed)


def test_nothing_runs_on_import():
    code = ("import configurator, prepare_data, sys; "
            "print(sorted({'torch', 'pyarrow', 'huggingface_hub'} & set(sys.modules)))")
    assert python(code, ROOT) == ("[]\n", "")


def test_help_into_a_pipe_that_nobody_reads():
    """`--help | head`: no traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "sample.py", "--help"], cwd=ROOT, text=True,
                          stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.returncode == 0 and done.stderr == ""


def test_a_control_character_breaks_no_line(capsys):
    assert r"unknown option -\x1e" in mistake(capsys, "-\x1e")
