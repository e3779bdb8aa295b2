"""Zero-shot benchmarks by lm-evaluation-harness, for our checkpoints and transformers' models.

    python -m lab.evaluate --out_dir=out/x --tasks=arc_easy,hellaswag
    python -m lab.evaluate --tasks=unipool              # newest checkpoint; also: probe, infmoe
    python -m lab.evaluate --tasks=mine --include_path=tasks  # a task of your own: tasks/mine.yaml
    python -m lab.evaluate --out_dir=out/x --samples=8  # infmoe with another K

The harness sees `Scorer`: contexts of one length run together, each only once, and its key-value
cache serves all of its continuations. A score is the log-likelihood that transformers' own HFLM
gives to the same weights.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Literal

import torch
from tqdm import tqdm

from configurator import nearest, parse
from model import GPT, KVCache, load_checkpoint
from support.checkpoint import newest_run
from support.files import write_atomically
from support.machine import pick_device
from support.tokenizer import get_tokenizer
from support.usage import one_line

FIVE = "arc_easy,arc_challenge,piqa,hellaswag,winogrande"
PRESETS = {  # what stands for tasks: their names, and the metric that is averaged
    # UniPool's table of seven tasks: raw accuracy
    "unipool": (f"{FIVE},lambada_openai,race", "acc"),
    # its routing probe: normalised by length where the harness does that
    "probe": (FIVE, "acc_norm"),
    # [ours]: of infinity-MoE's tasks only hellaswag is certain
    "infmoe": (f"{FIVE},openbookqa,lambada_openai", "acc_norm"),
}
PAPERS = {  # means over a preset's tasks, in percent, as published
    "probe": {"Qwen1.5-MoE": 67.92, "DeepSeek-V2-Lite": 54.19, "Qwen3-30B-A3B": 73.02},
    "infmoe": {"infmoe, GPT-2 Small": 39.8, "infmoe, GPT-2 Medium": 41.3},
}
KNOWN = ("acc", "acc_norm", "exact_match", "perplexity", "word_perplexity")  # metrics shown


@dataclass
class EvalConfig:
    out_dir: str | None = None  # folder of a checkpoint; None: the newest under out/
    hf: str | None = None  # instead of out_dir: a transformers model, its name or folder
    tasks: str = "unipool"  # names, separated by commas, or a preset: unipool, probe, infmoe
    include_path: str | None = None  # folder of task files (YAML) of your own
    num_fewshot: int | None = None  # solved examples before each; None: as the task says
    limit: int | None = None  # items per task
    samples: int | None = None  # infmoe: samples K; None: as trained
    batch_tokens: int = 8192  # tokens in a forward pass, fewer with a large vocabulary
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: as it was saved
    save_dir: str | None = None  # receives evaluate.json; None: out_dir, or out/hf_NAME

    def __post_init__(self):
        for name, least in (("num_fewshot", 0), ("limit", 1), ("samples", 1), ("batch_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: expected {least} or more")


class Scorer:
    """Our model as the harness wants it. Contexts of a batch are equally long: none is padded."""

    def __init__(self, model, tokenizer, batch_tokens=8192):
        super().__init__()
        self.model, self.tokenizer, self.size = model.eval(), tokenizer, model.config.block_size
        # the logits of a batch stay below a gigabyte
        self.batch_tokens = min(batch_tokens, 2**28 // model.config.vocab_size)

    @property
    def device(self):
        return self.model.wte.weight.device

    def loglikelihood(self, requests, disable_tqdm=False):
        """-> [(log p(continuation | context) in nats, whether greedy decoding would write it)]"""
        return self.score([self.encode_pair(*request.args) for request in requests], disable_tqdm)

    def encode_pair(self, context, continuation):
        """Tokens of both; spaces between them belong to the continuation."""
        prefix = self.tokenizer.encode(context.rstrip())
        whole = self.tokenizer.encode(context + continuation)
        return prefix or [self.tokenizer.eot], whole[len(prefix):]

    def score(self, pairs, disable_tqdm=False):
        """pairs of token lists (context, continuation). Too long a context loses its start."""
        groups, results = {}, [None] * len(pairs)
        for place, (context, continuation) in enumerate(pairs):
            n = len(continuation)
            if not 0 < n <= self.size:
                raise ValueError(f"a continuation of {n} tokens does not fit into "
                                 f"block_size={self.size}")
            context = tuple(context[-(self.size + 1 - n):])
            groups.setdefault(context, []).append((place, continuation))
        with tqdm(total=len(pairs), desc="scoring", leave=False, disable=disable_tqdm) as bar:
            for contexts in self.batches(groups):
                items = [item for context in contexts for item in groups[context]]
                rows = [row for row, context in enumerate(contexts) for _ in groups[context]]
                scores = self.score_batch(contexts, rows, [tokens for _, tokens in items])
                for (place, _), score in zip(items, scores):
                    results[place] = score
                bar.update(len(items))
        return results

    def batches(self, groups):
        """Lists of equally long contexts that, with continuations, fit into batch_tokens."""
        batch, used = [], 0
        for context in sorted(groups, key=len, reverse=True):
            longest = max(len(continuation) for _, continuation in groups[context])
            need = len(groups[context]) * (len(context) + longest)
            if batch and (len(context) != len(batch[0]) or used + need > self.batch_tokens):
                yield batch
                batch, used = [], 0
            batch.append(context)
            used += need
        if batch:
            yield batch

    @torch.no_grad()
    def score_batch(self, contexts, rows, continuations):
        """Continuation i follows contexts[rows[i]]. -> [(log-likelihood, greedy)]"""
        longest = max(map(len, continuations))
        padded = [c + [0] * (longest - len(c)) for c in continuations]
        padded, contexts, rows = (
            torch.tensor(x, device=self.device) for x in (padded, contexts, rows))  # (N, m) (C, s)
        cache, length = None, contexts.shape[1]
        # all of a context but its last token runs once; then its cache is copied per continuation
        if length > 1:
            config = dataclasses.replace(self.model.config, block_size=length - 1 + longest)
            cache = KVCache(config, len(contexts), self.device, self.model.wte.weight.dtype)
            self.model(contexts[:, :-1], cache=cache)
            cache.k, cache.v = cache.k[:, rows], cache.v[:, rows]  # (layers, N, G, s + m, d)
        tokens = torch.cat((contexts[rows, -1:], padded[:, :-1]), dim=1)  # (N, m)
        logits = self.model(tokens, cache=cache).logits.float()  # (N, m, V)
        gained = logits.log_softmax(-1).gather(-1, padded[..., None])[..., 0]  # (N, m)
        greedy = logits.argmax(-1) == padded
        return [(gained[i, :len(c)].sum().item(), bool(greedy[i, :len(c)].all()))
                for i, c in enumerate(continuations)]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """-> [log p(text)]: each token is scored once, with as much context as fits."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tokenizer.encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.tokenizer.eot, self.size, 1)
            pairs += map(make_disjoint_window, windows)
            owners += [owner] * (len(pairs) - len(owners))
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self.score(pairs, disable_tqdm)):
            totals[owner] += value
        return totals

    def generate_until(self, requests, disable_tqdm=False):
        """-> [text]: up to the first of the strings `until`, or max_gen_toks tokens."""
        requests = tqdm(requests, "generating", leave=False, disable=disable_tqdm)
        return [self.generate(request.args[0], **request.args[1]) for request in requests]

    def generate(self, context, max_gen_toks=256, until=(), do_sample=False, temperature=0.0,
                 top_k=None, top_p=None, **other):
        """The text that follows a context."""
        until, ids, text = [until] if isinstance(until, str) else until, [], ""
        new = min(max_gen_toks, self.size - 1)
        tokens = (self.tokenizer.encode(context) or [self.tokenizer.eot])[-(self.size - new):]
        tokens = torch.tensor([tokens], device=self.device)  # (1, S)
        for token in self.model.generate(tokens, new, temperature * do_sample, top_k, top_p):
            if token.item() == self.tokenizer.eot:
                break
            ids.append(token.item())
            text = self.tokenizer.decode(ids)
            stops = [text.index(stop) for stop in until if stop and stop in text]
            if stops:
                return text[:min(stops)]
        return text


# ---- the harness

def need_harness():
    try:
        import lm_eval.api.model
        import lm_eval.models.huggingface  # needs accelerate, too
        import lm_eval.tasks
        return lm_eval
    except ImportError as error:
        raise ImportError(f"benchmarks need lm-evaluation-harness ({error}): "
                          'pip install -e ".[eval]"') from None


def language_model(model, tokenizer, batch_tokens=8192):
    """Our GPT, or a transformers model with the name of its tokenizer -> the harness's LM."""
    harness = need_harness()
    if isinstance(model, GPT):
        ours = type("OurLM", (Scorer, harness.api.model.LM), {})
        return ours(model, tokenizer, batch_tokens)
    return harness.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)


def run(lm, tasks, include_path=None, num_fewshot=None, limit=None):
    """-> {task: {metric: value}}. tasks: names, separated by commas, or a preset."""
    harness = need_harness()
    names = [name.strip() for name in task_names(tasks).split(",")]
    manager, TaskManager = None, harness.tasks.TaskManager
    if include_path:
        manager = TaskManager(include_path=include_path, include_defaults=False)
    if not manager or not set(names) <= set(manager.all_tasks):  # listing all 14,000 takes seconds
        manager = TaskManager(include_path=include_path)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ValueError(f"no task {', '.join(unknown)}{nearest(unknown[0], manager.all_tasks)} "
                         f"(presets: {', '.join(PRESETS)}; your own: --include_path=FOLDER)")
    found = harness.simple_evaluate(
        model=lm, tasks=names, task_manager=manager, num_fewshot=num_fewshot, limit=limit,
        log_samples=False, bootstrap_iters=1000)
    return {task: {name.removesuffix(",none"): value for name, value in values.items()
                   if isinstance(value, (int, float))}
            for task, values in found["results"].items()}


def task_names(tasks):
    return PRESETS[tasks][0] if tasks in PRESETS else tasks


def print_results(results, preset, limit=None):
    """All metrics in percent with standard errors, the preset's mean, and the papers' means."""
    def show(task, metric, value, error):
        scale = 1 if "perplexity" in metric else 100
        print(f"{task:24}{metric:16}{value * scale:8.2f} ±{error * scale:.2f}")

    for task, values in results.items():
        for metric in [m for m in KNOWN if m in values]:
            show(task, metric, values[metric], values.get(f"{metric}_stderr", 0.0))
    metric = PRESETS[preset][1] if preset in PRESETS else "acc_norm"
    scores, errors = zip(*(score_of(values, metric) for values in results.values()))
    label = "acc" if metric == "acc" else "acc_norm or acc"
    show("mean", label, mean(scores), math.hypot(*errors) / len(errors))
    for name, value in PAPERS.get(preset, {}).items():
        print(f"{name:40}{value:8.2f}   (the paper's mean)")
    if limit:
        print(f"at most {limit} items a task (--limit={limit}): only an estimate of these scores")


def score_of(values, metric):
    """The preferred metric where the task has it, else the next -> (value, standard error)"""
    for name in (metric, "acc", "exact_match"):
        if name in values:
            return values[name], values.get(f"{name}_stderr", 0.0)
    return math.nan, 0.0


# ---- the command line

def open_model(config):
    """-> (the harness's LM, the folder that receives evaluate.json)"""
    harness, device = need_harness(), pick_device(config.device)
    if config.hf:
        lm = harness.models.huggingface.HFLM(
            pretrained=config.hf, dtype=config.dtype, device=str(device), batch_size=8)
        return lm, f"out/hf_{Path(config.hf).name}"
    folder = config.out_dir = config.out_dir or str(newest_run())
    tokenizer = get_tokenizer(load_checkpoint(Path(folder, "ckpt.pt"))["tokenizer"])
    model = GPT.from_checkpoint(folder, device)
    if config.dtype != "auto":
        model.to(getattr(torch, config.dtype))
    if config.samples:
        model.set_samples(config.samples)
    return language_model(model, tokenizer, config.batch_tokens), folder


def main():
    config = parse(EvalConfig, doc=__doc__).make(EvalConfig)
    with one_line():
        lm, folder = open_model(config)
        folder = Path(config.save_dir or folder)
        folder.mkdir(parents=True, exist_ok=True)
        results = run(lm, config.tasks, config.include_path, config.num_fewshot, config.limit)
        record = {"settings": dataclasses.asdict(config), "results": results}
        text = json.dumps(record, indent=1)
        write_atomically(folder / "evaluate.json", lambda f: f.write(text.encode()))
    print_results(results, config.tasks, config.limit)
    print(f"wrote {folder / 'evaluate.json'}")


if __name__ == "__main__":
    main()
