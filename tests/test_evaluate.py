"""lab.evaluate against log-likelihoods by hand (without a cache) and transformers' HFLM.

  1. scores      2. generation      3. the harness and the command line
"""
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from probe_helpers import CONTEXT, random_model, save_checkpoint
from train_helpers import ROOT, call, refused, run

from lab import evaluate
from support.tokenizer import get_tokenizer

TOY = ROOT / "tests" / "toy_task"
ITEMS = [json.loads(line) for line in (TOY / "toy.jsonl").read_text().splitlines()]
PAIRS = [(item["question"], choice) for item in ITEMS for choice in item["choices"]]  # 50 of 4
FLAVOURS = {
    "dense": dict(arch="gpt2"),
    "topk": dict(arch="llama", flavour="topk", n_experts=6, d_expert=24, n_kv_head=2),
    "unipool": dict(arch="llama", flavour="unipool", n_experts=8, top_k=2),
    "infmoe": dict(arch="llama", flavour="infmoe", infmoe_dz=8),  # noise belongs to positions
}


def scorer(flavour="topk", **options):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    model = random_model(**FLAVOURS[flavour])
    return evaluate.language_model(model, get_tokenizer("bytes"), **options)


def score(lm, pairs):
    """pairs of token lists"""
    return lm._loglikelihood_tokens([(("", ""), *pair) for pair in pairs], disable_tqdm=True)


def requests(pairs):
    return [SimpleNamespace(args=pair) for pair in pairs]


def likelihoods(lm, pairs):
    return lm.loglikelihood(requests(pairs), disable_tqdm=True)


def greedy_tokens(model, start, n):
    tokens = torch.tensor([start])
    return torch.cat(list(model.generate(tokens, n, temperature=0)))[:, 0].tolist()


@torch.no_grad()
def by_hand(model, context, continuation):
    """log p of each token of the continuation, one forward pass over the whole text."""
    ids = (context + continuation)[-(CONTEXT + 1):]
    logits = model(torch.tensor([ids[:-1]])).logits[0].double()
    total, greedy = 0.0, True
    for position in range(len(ids) - len(continuation), len(ids)):
        row = logits[position - 1]
        total += (row[ids[position]] - row.exp().sum().log()).item()
        greedy &= row.argmax().item() == ids[position]
    return total, greedy


# ---- 1. Scores

@pytest.mark.parametrize("flavour", FLAVOURS)
def test_loglikelihood_equals_by_hand(flavour):
    lm = scorer(flavour)
    assert any(len(q) > CONTEXT for q, _ in PAIRS)  # truncated on the left
    for (context, continuation), (value, greedy) in zip(PAIRS, likelihoods(lm, PAIRS)):
        n = len(context.rstrip().encode())
        ids = list((context + continuation).encode())
        expected = by_hand(lm.model.gpt, ids[:n], ids[n:])
        assert value == pytest.approx(expected[0], abs=1e-4) and greedy == expected[1]


def test_greedy_is_noticed():
    lm, start = scorer(), list(b"def ")
    best = greedy_tokens(lm.model.gpt, start, 4)
    other = [*best[:-1], (best[-1] + 1) % 257]
    scores = score(lm, [(start, best), (start, other), (start, best[:2])])
    assert [greedy for _, greedy in scores] == [True, False, True] and scores[0][0] > scores[1][0]


def test_a_continuation_longer_than_the_context_is_refused():
    lm = scorer()
    longest = list(range(CONTEXT))
    expected = by_hand(lm.model.gpt, [1], longest)[0]
    assert score(lm, [([1], longest)])[0][0] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(ValueError, match=f"{CONTEXT + 1} tokens .* block_size={CONTEXT}"):
        score(lm, [([1], [2] * (CONTEXT + 1))])


@pytest.mark.parametrize("length", [1, CONTEXT, CONTEXT + 1, 3 * CONTEXT + 5])
def test_rolling_scores_every_token_once(length):
    lm, text = scorer(), "".join(ITEMS[i]["question"] for i in range(40))[:length]
    ids = [256, *text.encode()]
    total, done = 0.0, 1
    while done < len(ids):  # windows of CONTEXT predictions; the last looks back as far as it can
        new = min(CONTEXT, len(ids) - done)
        first = max(0, done + new - CONTEXT - 1)
        total += by_hand(lm.model.gpt, ids[first:done], ids[done:done + new])[0]
        done += new
    rolling = lm.loglikelihood_rolling(requests([(text,)]), disable_tqdm=True)
    assert rolling == [pytest.approx(total, abs=1e-3)]


def test_scores_do_not_depend_on_the_batch():
    few, many = scorer(batch_tokens=1), scorer(batch_tokens=10_000)
    a, b = likelihoods(few, PAIRS), likelihoods(many, PAIRS)
    assert [x for x, _ in a] == pytest.approx([x for x, _ in b], abs=1e-4)


# ---- 2. Generation

def test_generation_stops_and_is_cut():
    lm = scorer("dense")
    whole = lm.generate_until(requests([("def f", {"max_gen_toks": 12})]))[0]
    alone = greedy_tokens(lm.model.gpt, list(b"def f"), 12)
    assert whole == lm.tokenizer.decode(alone[:alone.index(256)] if 256 in alone else alone)
    until = whole[2]
    contexts = [("def f", {"max_gen_toks": 12, "until": [until]}),
                ("def g", {"max_gen_toks": 12, "until": until}),
                ("x" * 100, {"max_gen_toks": 3}), ("def f", {"max_gen_toks": 12})]
    results = lm.generate_until(requests(contexts), disable_tqdm=True)
    assert results[0] == whole[:whole.index(until)] and until not in results[1]
    assert results[3] == whole


# ---- 3. The harness and the command line

@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.chdir(ROOT)  # the task names its file from there
        yield lm_eval


def test_toy_task_equals_by_hand(harness, tmp_path, capsys, monkeypatch):
    model = random_model(**FLAVOURS["infmoe"])
    folder = save_checkpoint(model, tmp_path / "x", "data/stdlib")
    words = [f"--out_dir={folder}", "--tasks=toy", f"--include_path={TOY}", "--device=cpu"]
    printed = call(evaluate.main, words, monkeypatch, capsys)[1]
    right = right_norm = 0
    for item in ITEMS:
        n = len(item["question"].rstrip())
        texts = [(item["question"] + choice).encode() for choice in item["choices"]]
        scores = [by_hand(model, list(text[:n]), list(text[n:]))[0] for text in texts]
        per_letter = [s / len(choice) for s, choice in zip(scores, item["choices"])]
        right += scores.index(max(scores)) == item["answer"]
        right_norm += per_letter.index(max(per_letter)) == item["answer"]
    saved = json.loads((tmp_path / "x" / "evaluate.json").read_text())["results"]["toy"]
    assert saved["acc"] == pytest.approx(right / 50)
    assert saved["acc_norm"] == pytest.approx(right_norm / 50)
    share = right / 50
    assert saved["acc_stderr"] == pytest.approx((share * (1 - share) / 49) ** 0.5)
    assert "evaluate.json" in printed
    assert f"{2 * right:.2f} ±{100 * saved['acc_stderr']:.2f}" in printed


def test_equals_hflm_on_the_exported_model(harness, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from support import hf
    lm = scorer()
    hf.export(lm.model.gpt, tmp_path, get_tokenizer("bytes"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    theirs = evaluate.language_model(model, str(tmp_path))
    pairs = [pair for pair in PAIRS if len(pair[0]) < CONTEXT - 8]
    mine, expected = likelihoods(lm, pairs), likelihoods(theirs, pairs)
    assert [value for value, _ in mine] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in expected]
    text = "import os\nimport sys\n\n\ndef f(x):\n    return x or [] if x is None else x\n"
    text = requests([(text,)])
    rolling = theirs.loglikelihood_rolling(text, disable_tqdm=True)
    assert lm.loglikelihood_rolling(text, disable_tqdm=True) == pytest.approx(rolling, abs=1e-3)
    assert evaluate.run(lm, "toy", str(TOY)) == evaluate.run(theirs, "toy", str(TOY))


@pytest.mark.parametrize("argv, words", [
    (["--tasks=toi", f"--include_path={TOY}", "--out_dir={x}"], "no task toi: did you mean"),
    (["--out_dir={x}/nowhere"], "no checkpoint at"),
    (["--device=foo", "--out_dir={x}"], "device=foo"), (["--taks=toy"], "did you mean --tasks"),
    (["--limit=0"], "limit=0"), (["--num_fewshot=-1"], "num_fewshot=-1"),
    (["--samples=0"], "samples=0"), (["--batch_tokens=0"], "batch_tokens=0"),
])
def test_mistakes_are_one_line(harness, argv, words, tmp_path, capsys, monkeypatch):
    from lm_eval.tasks import TaskManager
    ours = lambda include_path=None, include_defaults=True: TaskManager(
        include_path=include_path, include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", ours)  # listing all tasks takes seconds
    save_checkpoint(random_model(), tmp_path, "data/stdlib")
    argv = [word.replace("{x}", str(tmp_path)) for word in argv]
    code, _, error = call(evaluate.main, argv, monkeypatch, capsys)
    error = error.splitlines()[-1]
    assert code == 2 and error.startswith("error: ") and words in error


def test_our_modules_shadow_nobodys():
    """Here `import evaluate` is Hugging Face's, which tasks of the harness import, or nothing."""
    ours = {f"{name}.py" for name in ("evaluate", "bench", "reproduce")}
    assert not ours & {path.name for path in ROOT.glob("*.py")}


def test_runs_as_a_module():
    told = run([sys.executable, "-m", "lab.evaluate", "--help"], cwd=ROOT)
    assert told.returncode == 0 and "--tasks=str" in told.stdout


def test_without_the_harness(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    assert 'pip install -e ".[eval]"' in refused(evaluate.main, [], monkeypatch, capsys)


def preset_results(preset):
    both = {"acc": 0.5, "acc_stderr": 0.01, "acc_norm": 0.25, "acc_norm_stderr": 0.02}
    raw = {"acc": 0.5, "acc_stderr": 0.01}
    names = evaluate.task_names(preset).split(",")
    return {task: both if task == "hellaswag" else raw for task in names}


@pytest.mark.parametrize("preset, n, total, variance, paper", [
    ("unipool", 7, 7 * 0.5, 7 * 0.01**2, []),  # raw accuracy; the paper's means are not known
    ("probe", 5, 4 * 0.5 + 0.25, 4 * 0.01**2 + 0.02**2, ["67.92", "54.19", "73.02"]),
    ("infmoe", 7, 6 * 0.5 + 0.25, 6 * 0.01**2 + 0.02**2, ["39.80", "41.30"])])
def test_presets_average_what_their_paper_does(capsys, preset, n, total, variance, paper):
    results = preset_results(preset)
    evaluate.print_results(results, preset, limit=20)
    printed = capsys.readouterr().out
    mean, error = 100 * total / n, 100 * variance**0.5 / n
    assert len(results) == n and f"{mean:.2f} ±{error:.2f}" in printed
    assert "50.00 ±1.00" in printed and "25.00 ±2.00" in printed and "--limit=20" in printed
    assert [line.split()[-4] for line in printed.splitlines() if "paper" in line] == paper
    evaluate.print_results(results, preset)
    assert "limit" not in capsys.readouterr().out


@pytest.mark.slow
def test_preset_tasks_exist(harness):
    from lm_eval.tasks import TaskManager
    manager = TaskManager()
    names = {name for tasks, _ in evaluate.PRESETS.values() for name in tasks.split(",")}
    assert names <= set(manager.all_tasks)
