"""What README, the tour, the examples and the drawing promise, run as written."""
import ast
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from probe_helpers import hf_model

from lab import drawing

ROOT = Path(__file__).resolve().parent.parent
TOUR = (ROOT / "docs/tour.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs/tour.md",
         *sorted((ROOT / "results").glob("*.md"))]


def blocks(text, kind):
    """The fenced blocks of exactly this kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, flags=re.M | re.S)


def definitions(path):
    """Names that a file defines: functions, classes, assignments, and Class.method."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            names |= {f"{node.name}.{part.name}" for part in ast.walk(node)
                      if isinstance(node, ast.ClassDef) and isinstance(part, ast.FunctionDef)}
    return names


# ---- 1. Pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    local = [link.partition("#")[0] for link in links if "://" not in link]
    missing = [link for link in local if link and not (page.parent / link).exists()]
    assert not missing, f"{page.name} links to files that are not there: {missing}"


@pytest.mark.parametrize("page", PAGES[:3], ids=lambda page: page.name)
def test_pages_keep_to_their_width(page):
    """In an editor beside the code, too."""
    most = 120 if page.name == "README.md" else 100
    wide = [line for line in page.read_text(encoding="utf-8").splitlines() if len(line) > most]
    assert not wide


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda p: p.name)
def test_configs_are_one_assignment_a_line(path):
    for node in ast.parse(path.read_text(encoding="utf-8")).body[1:]:  # behind the docstring
        assert isinstance(node, (ast.ImportFrom, ast.Assign))
        assert isinstance(node, ast.ImportFrom) or isinstance(node.targets[0], ast.Name)


def test_the_tour_names_functions_that_are_there():
    links = re.findall(r"\[`([\w.]+)`\]\(([^)]+\.py)\)", TOUR)
    assert len(links) >= 30
    missing = [(name, path) for name, path in links
               if name not in definitions(ROOT / "docs" / path)]
    assert not missing


def test_the_tours_snippets_run_in_order():
    snippets = blocks(TOUR, "python")
    assert len(snippets) >= 10
    scope = {"__name__": "tour"}
    for i, snippet in enumerate(snippets):
        exec(compile(snippet, f"docs/tour.md, snippet {i + 1}", "exec"), scope)


def test_the_first_exercise_works_in_a_copy_of_the_code(tmp_path):
    """The solution goes into losses.py as a reader would put it, and a pool trains with it."""
    (solution,) = blocks(TOUR, "python exercise")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "support", tmp_path / "support")
    losses = (tmp_path / "losses.py").read_text(encoding="utf-8")
    registry = re.search(r"^BALANCES = .*\n", losses, flags=re.M).group()
    losses = losses.replace(registry, registry + "\n\n" + solution)
    (tmp_path / "losses.py").write_text(losses, encoding="utf-8")
    program = """
import torch
from model import GPT, ModelConfig
torch.manual_seed(1)
model = GPT(ModelConfig(flavour="unipool", balance="overload", n_layer=2, n_head=2, d_model=32))
tokens = torch.randint(257, (2, 17))
aux = model(tokens[:, :-1], tokens[:, 1:]).aux["balance"]
aux.backward()
assert aux > 0 and all(b.ffn.router.weight.grad.abs().sum() > 0 for b in model.blocks)
"""
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)


def test_readme_names_files_and_options_that_are_there():
    """Python files, and every --option that stands behind one of our scripts."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files = set(re.findall(r"(?<![\w/.])((?:\w+/)*\w+\.py)\b", readme))
    files |= {f"lab/{name}.py" for name in re.findall(r"python -m lab\.(\w+)", readme)}
    missing = [name for name in files if not (ROOT / name).exists()]
    assert len(files) >= 15 and not missing
    known = "".join(path.read_text(encoding="utf-8")
                    for folder in (".", "lab", "support") for path in (ROOT / folder).glob("*.py"))
    options = {o.replace("-", "_") for o in re.findall(r"--([a-z_][a-z_\-]*)", readme)}
    options -= {"standalone", "nproc_per_node", "help", "key"}
    unknown = [o for o in options if not re.search(rf"^    {o}: ", known, flags=re.M)]
    assert not unknown


# ---- 2. The drawing


def test_the_drawing_is_what_its_script_draws():
    assert drawing.drawing() == drawing.TARGET.read_text(encoding="utf-8")


def test_the_drawing_is_svg_in_colours_that_everybody_tells_apart():
    root = ElementTree.fromstring(drawing.drawing())
    assert root.tag.endswith("svg")
    okabe_ito = {"#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
    greys = {drawing.INK, drawing.GREY, drawing.PALE, drawing.PAPER, drawing.PANEL, "#fff4dc"}
    used = set(re.findall(r"#[0-9A-Fa-f]{6}", drawing.drawing()))
    assert used <= okabe_ito | greys


# ---- 3. examples/transformers_losses.py


@pytest.fixture
def example(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import transformers_losses
    return transformers_losses


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe"])
def test_the_hooks_see_what_transformers_computes(example, family):
    """The kept activations, times W_down and the gates, are the experts' own output; and the
    auxiliary loss alone sends a gradient to every router and every layer's experts."""
    model = hf_model(family, num_hidden_layers=3).train()
    routers, activations = example.watch(model)
    seen = []
    experts = [m for name, m in model.named_modules() if name.endswith(".experts")]
    for module in experts:
        module.register_forward_hook(lambda m, args, out: seen.append((args, out)))
    model(input_ids=torch.randint(64, (2, 9)))
    assert len(routers) == len(activations) == len(experts) == 3
    for module, (scores, ids), acts, ((_, ids_in, gates), out) in zip(
            experts, routers, activations, seen):
        assert torch.equal(ids, ids_in) and scores.shape == (18, 6)
        down = torch.einsum("tkf,tkdf->tkd", acts, module.down_proj[ids])
        torch.testing.assert_close((down * gates[..., None]).sum(1), out.view(18, 32))
    example.auxiliary_loss(routers, activations).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    for part in ("gate.weight", "gate_up_proj"):
        reached = [g.abs().sum() > 0 for name, g in grads.items() if name.endswith(part)]
        assert len(reached) == 3 and all(reached), part
    assert not routers and not activations


def test_the_example_runs_and_is_short(example, capsys):
    example.main(steps=8)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert float(rows[-1][3]) < float(rows[0][3])  # the loss falls
    source = Path(example.__file__).read_text(encoding="utf-8")
    lines = 0  # of the three functions, without their docstrings
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name != "main":
            docstring = node.body[0]
            lines += node.end_lineno - node.lineno + 1
            lines -= docstring.end_lineno - docstring.lineno + 1
    assert lines + 2 <= 25  # and two lines of the loop: watch(...), auxiliary_loss(...)
