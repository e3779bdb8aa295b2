"""The shape of the repository: imports point one way and change nothing; signposts lead somewhere.

(ruff checks the width of lines.)
"""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("lab/*.py")]

# A room may import those before it in this order; support.hf, budget and subjects take a model.
ORDER = ["support", "kernels", "losses", "moe", "model", "train", "prepare_data", "sample", "probe",
         "lab"]


def imported(path):
    """(room, is it at the top of the file) of every import of a room of ours."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            if name.partition(".")[0] in ORDER:
                yield name.partition(".")[0], node.col_offset == 0


@pytest.mark.parametrize("path", CODE, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for other, at_the_top in imported(path):
        if room in ORDER and other != room and at_the_top:
            leaf = other == "losses" and room == "support"  # losses.py imports torch alone
            takes_a_model = path.name in ("hf.py", "budget.py", "subjects.py")
            assert leaf or takes_a_model or ORDER.index(other) < ORDER.index(room), other


ROOMS = ["losses", "moe", "model", "kernels", "train", "probe", "sample", "prepare_data",
         "configurator", "lab.bench", "lab.gpu_check", "lab.reproduce", "lab.evaluate"]


def test_importing_a_room_changes_nothing():
    """No environment variable, no warning filter, no Triton without a GPU, no optional package.
    Each room in a fork of its own, as torch takes seconds to load."""
    code = f"""if True:
        import os, sys, warnings, torch, numpy, tqdm
        import torch.distributed.tensor  # it brings a warning filter of sympy's
        state = lambda: (dict(os.environ), list(warnings.filters), torch.get_num_threads())
        heavy = {{"matplotlib", "transformers", "pyarrow", "huggingface_hub", "wandb", "lm_eval"}}
        heavy |= set() if torch.cuda.is_available() else {{"triton"}}
        before = state()
        for room in {ROOMS}:
            if os.fork():
                os.wait()
                continue
            __import__(room)
            assert state() == before, room
            print(room, *heavy & set(sys.modules))
            break"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stderr, done.stdout.split("\n")[:-1]) == ("", ROOMS)


def test_every_file_that_is_named_is_there():
    """Signposts lead somewhere: files in backticks or comments, as other files name them."""
    pages = [*CODE, *(ROOT / "config").glob("*.py"), ROOT / "README.md", *ROOT.glob("docs/*.md")]
    ours = {p.name for p in ROOT.rglob("*") if ".git" not in p.parts}
    missing = []
    for page in pages:
        for name in re.findall(r"(?<![\w/.*-])([a-z_]+\.(?:py|md))\b", page.read_text()):
            if name not in ours:
                missing.append(f"{page.name}: {name}")
    assert not missing


SIZES = dict(moe=560, losses=240, model=430, train=430, prepare_data=340, sample=120, probe=520,
             kernels=540, configurator=140)  # lines; all of it is read as one tutorial


def test_rooms_stay_small():
    lines = {room: len((ROOT / f"{room}.py").read_text().splitlines()) for room in SIZES}
    assert not {room: n for room, n in lines.items() if n > SIZES[room]}
    assert sum(lines.values()) <= 3300
