"""Zero-shot benchmarks through lm-evaluation-harness, for our checkpoints and for transformers' models.

    python -m lab.evaluate --out_dir=out/x --tasks=arc_easy,hellaswag
    python -m lab.evaluate --tasks=unipool     # a paper's tasks (also: probe, infmoe); newest checkpoint under out/
    python -m lab.evaluate --tasks=mine --include_path=tasks     # a YAML task of your own in folder tasks, no network needed
    python -m lab.evaluate --out_dir=out/x --samples=8           # infmoe with another K

The harness sees `Scorer`: contexts of one length run together, each only once, and its key-value cache serves all of its
continuations. A score is the log-likelihood that transformers' own HFLM gives to the same weights.
"""
import dataclasses
import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from configurator import fail, nearest, parse
from lab import write_atomically
from model import GPT, KVCache, ModelConfig, load_checkpoint
from support.machine import newest_run, pick_device
from support.tokenizer import get_tokenizer

FIVE = "arc_easy,arc_challenge,piqa,hellaswag,winogrande"
PRESETS = {  # what stands for tasks: their names, and the metric that is averaged
    "unipool": (f"{FIVE},lambada_openai,race", "acc"),  # that paper's table of seven tasks is raw accuracy
    "probe": (FIVE, "acc_norm"),  # its routing probe: normalised by length where the harness does that
    "infmoe": (f"{FIVE},openbookqa,lambada_openai", "acc_norm"),  # [ours]: only hellaswag is certain
}
PAPERS = {  # means over a preset's tasks, in percent, as published
    "probe": {"Qwen1.5-MoE": 67.92, "DeepSeek-V2-Lite": 54.19, "Qwen3-30B-A3B": 73.02},
    "infmoe": {"infmoe, GPT-2 Small": 39.8, "infmoe, GPT-2 Medium": 41.3},
}


@dataclass
class EvalConfig:
    out_dir: str | None = None  # folder of a checkpoint; None: the newest under out/
    hf: str | None = None  # instead of out_dir: a model of transformers', by its name on the hub or its folder
    tasks: str = "unipool"  # names with commas between them, or a preset: unipool, probe, infmoe
    include_path: str | None = None  # folder of task files (YAML) of your own
    num_fewshot: int | None = None  # solved examples before each question; None: as the task says
    limit: int | None = None  # items per task
    samples: int | None = None  # infmoe: samples K; None: as trained
    batch_tokens: int = 8192  # tokens in a forward pass, fewer where the vocabulary is large
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the weights; auto: as they are saved
    save_dir: str | None = None  # receives evaluate.json; None: out_dir, or out/hf_NAME

    def __post_init__(self):
        for name, least in (("num_fewshot", 0), ("limit", 1), ("samples", 1), ("batch_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: expected {least} or more")


class Scorer:
    """Our model as the harness wants it. Batches hold contexts of equal length, so nothing is padded but the continuations."""

    def __init__(self, model, tokenizer, batch_tokens=8192):
        super().__init__()
        self.model, self.tokenizer, self.size = model.eval(), tokenizer, model.config.block_size
        self.batch_tokens = min(batch_tokens, 2**28 // model.config.vocab_size)  # logits below a gigabyte

    @property
    def device(self):
        return self.model.wte.weight.device

    def loglikelihood(self, requests, disable_tqdm=False):
        """-> [(log p(continuation | context) in nats, whether greedy decoding would write it)]"""
        return self.score([self.encode_pair(*request.args) for request in requests], disable_tqdm)

    def encode_pair(self, context, continuation):
        """Tokens of both, cut where the context's own tokens end; spaces at that place belong to the continuation."""
        text = context.rstrip()
        prefix, whole = self.tokenizer.encode(text), self.tokenizer.encode(context + continuation)
        return prefix or [self.tokenizer.eot], whole[len(prefix):]

    def score(self, pairs, disable_tqdm=False):
        """pairs of token lists (context, continuation), in any order and of any length. Too long a context loses its start."""
        groups, results = {}, [None] * len(pairs)
        for place, (context, continuation) in enumerate(pairs):
            if not 0 < len(continuation) <= self.size:
                raise ValueError(f"a continuation of {len(continuation)} tokens does not fit into block_size={self.size}")
            context = tuple(context[-(self.size + 1 - len(continuation)):])
            groups.setdefault(context, []).append((place, continuation))
        with tqdm(total=len(pairs), desc="scoring", unit="item", leave=False, disable=disable_tqdm) as bar:
            for contexts in self.batches(groups):
                items = [item for context in contexts for item in groups[context]]
                rows = [row for row, context in enumerate(contexts) for _ in groups[context]]
                for (place, _), score in zip(items, self.score_batch(contexts, rows, [c for _, c in items])):
                    results[place] = score
                bar.update(len(items))
        return results

    def batches(self, groups):
        """Contexts of equal length, longest first, in lists whose tokens (continuations included) fit into batch_tokens."""
        batch, used = [], 0
        for context in sorted(groups, key=len, reverse=True):
            need = len(groups[context]) * (len(context) + max(len(c) for _, c in groups[context]))
            if batch and (len(context) != len(batch[0]) or used + need > self.batch_tokens):
                yield batch
                batch, used = [], 0
            batch.append(context)
            used += need
        if batch:
            yield batch

    @torch.no_grad()
    def score_batch(self, contexts, rows, continuations):
        """contexts: lists of one length; continuation i follows contexts[rows[i]]. -> [(log-likelihood, greedy)]"""
        contexts, longest = torch.tensor(contexts, device=self.device), max(map(len, continuations))  # (C, s)
        padded = torch.tensor([c + [0] * (longest - len(c)) for c in continuations], device=self.device)  # (N, m)
        cache, rows = None, torch.tensor(rows, device=self.device)
        if contexts.shape[1] > 1:
            config = dataclasses.replace(self.model.config, block_size=contexts.shape[1] - 1 + longest)
            cache = KVCache(config, len(contexts), self.device, self.model.wte.weight.dtype)
            self.model(contexts[:, :-1], cache=cache)
            cache.k, cache.v = cache.k[:, rows], cache.v[:, rows]  # (layers, N, G, s + m, d): a copy for each continuation
        tokens = torch.cat((contexts[rows, -1:], padded[:, :-1]), dim=1)  # (N, m)
        logits = self.model(tokens, cache=cache).logits.float()  # (N, m, V)
        gained = logits.log_softmax(-1).gather(-1, padded[..., None])[..., 0]  # (N, m)
        greedy = logits.argmax(-1) == padded
        return [(gained[i, :len(c)].sum().item(), bool(greedy[i, :len(c)].all())) for i, c in enumerate(continuations)]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """-> [log p(text)]: the text in windows, each token scored once with as much context as fits."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
        pairs, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tokenizer.encode(request.args[0])
            windows = [make_disjoint_window(w) for w in get_rolling_token_windows(tokens, self.tokenizer.eot, self.size, 1)]
            pairs += windows
            owners += [owner] * len(windows)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self.score(pairs, disable_tqdm)):
            totals[owner] += value
        return totals

    def generate_until(self, requests, disable_tqdm=False):
        """-> [text]: what follows the context, up to the first of the strings `until` or max_gen_toks tokens."""
        groups, results = {}, [""] * len(requests)
        for place, request in enumerate(requests):
            context, options = request.args
            new = min(options.get("max_gen_toks", 256), self.size - 1)
            tokens = (self.tokenizer.encode(context) or [self.tokenizer.eot])[-(self.size - new):]
            groups.setdefault((len(tokens), new, json.dumps(options, sort_keys=True)), []).append((place, tokens))
        for (_, new, options), items in tqdm(groups.items(), desc="generating", leave=False, disable=disable_tqdm):
            for i in range(0, len(items), 64):
                texts = self.generate_batch([tokens for _, tokens in items[i:i + 64]], new, **json.loads(options))
                for (place, _), text in zip(items[i:i + 64], texts):
                    results[place] = text
        return results

    def generate_batch(self, contexts, new, until=(), do_sample=False, temperature=0.0, top_k=None, top_p=None, **other):
        """Contexts of one length -> their continuations as text."""
        until, rows = [until] if isinstance(until, str) else list(until), [[] for _ in contexts]
        tokens = torch.tensor(contexts, device=self.device)  # (B, S)
        for token in self.model.generate(tokens, new, temperature if do_sample else 0, top_k, top_p):
            for row, one in zip(rows, token[:, 0].tolist()):
                row.append(one)
            if all(self.ended(row, until) is not None for row in rows):
                break
        texts = [self.tokenizer.decode(row) for row in rows]
        return [text if (end := self.ended(row, until)) is None else text[:end] for row, text in zip(rows, texts)]

    def ended(self, row, until):
        """Where the text of a row ends (in characters), None where it does not."""
        end = row.index(self.tokenizer.eot) if self.tokenizer.eot in row else None
        text = self.tokenizer.decode(row[:end])
        stops = [at for at in (text.find(stop) for stop in until if stop) if at >= 0]
        return min(stops) if stops else None if end is None else len(text)


# ---- the harness

def need_harness():
    try:
        import lm_eval.api.model
        import lm_eval.models.huggingface  # needs accelerate, too
        import lm_eval.tasks
        return lm_eval
    except ImportError as error:
        raise ImportError(f'benchmarks need lm-evaluation-harness ({error}): pip install -e ".[eval]"') from None


def language_model(model, tokenizer, batch_tokens=8192):
    """A GPT with our tokenizer, or a model of transformers' with the name of its tokenizer -> the harness's LM."""
    harness = need_harness()
    if isinstance(model, GPT):
        return type("OurLM", (Scorer, harness.api.model.LM), {})(model, tokenizer, batch_tokens)
    return harness.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)


def run(lm, tasks, include_path=None, num_fewshot=None, limit=None):
    """-> {task: {metric: value}}. tasks: names with commas between them, or a preset."""
    harness = need_harness()
    names = [name.strip() for name in task_names(tasks).split(",")]
    manager = harness.tasks.TaskManager(include_path=include_path, include_defaults=False) if include_path else None
    if manager is None or not set(names) <= set(manager.all_tasks):  # the harness's own 14,000 tasks take seconds to list
        manager = harness.tasks.TaskManager(include_path=include_path)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ValueError(f"no task {', '.join(unknown)}{nearest(unknown[0], manager.all_tasks)} (presets: {', '.join(PRESETS)}; "
                         "your own: --include_path=FOLDER of YAML files)")
    found = harness.simple_evaluate(model=lm, tasks=names, task_manager=manager, num_fewshot=num_fewshot, limit=limit,
                                    log_samples=False, bootstrap_iters=1000)["results"]
    clean = lambda values: {name.removesuffix(",none"): v for name, v in values.items() if isinstance(v, (int, float))}
    return {task: clean(values) for task, values in found.items()}


def task_names(tasks):
    return PRESETS[tasks][0] if tasks in PRESETS else tasks


def averaged(results, metric="acc_norm"):
    """{task: (score, its standard error)} by the metric where the task has it, else by the next that it has."""
    metrics = {task: next((m for m in (metric, "acc", "exact_match") if m in values), "") for task, values in results.items()}
    return {task: (values.get(metrics[task], float("nan")), values.get(f"{metrics[task]}_stderr", 0.0))
            for task, values in results.items()}


def print_results(results, preset, limit=None):
    metrics = ("acc", "acc_norm", "exact_match", "perplexity", "word_perplexity")
    names = [m for m in metrics if any(m in values for values in results.values())]
    print(f"{'task':24}" + "".join(f"{name:>16}" for name in names))
    for task, values in results.items():
        shown = [(values.get(m), values.get(f"{m}_stderr"), 1 if "perplexity" in m else 100) for m in names]
        print(f"{task:24}" + "".join(f"{'' if v is None else f'{v * by:.2f}' + (f' ±{e * by:.2f}' if e else ''):>16}"
                                     for v, e, by in shown))
    metric = PRESETS[preset][1] if preset in PRESETS else "acc_norm"
    scores = averaged(results, metric).values()
    mean, error = sum(s for s, _ in scores) / len(scores), sum(e * e for _, e in scores) ** 0.5 / len(scores)
    note = "acc" if metric == "acc" else "acc_norm where there is one"
    print(f"{'mean':24}{f'{100 * mean:.2f} ±{100 * error:.2f}':>16}   ({note})")
    for name, value in PAPERS.get(preset, {}).items():
        print(f"{name:24}{value:16.2f}   (the paper's mean)")
    if limit:
        print(f"at most {limit} items a task (--limit={limit}): an estimate, not to be compared with whole tasks")


def load(folder, device="auto", dtype="auto"):
    """A checkpoint of ours -> model, tokenizer, and the dictionary that was saved (without its weights)."""
    saved = load_checkpoint(Path(folder, "ckpt.pt"))
    model = GPT(ModelConfig(**saved["model_config"]))
    model.load_state_dict(saved.pop("model"))
    model.to(pick_device(device), None if dtype == "auto" else getattr(torch, dtype)).eval()
    return model, get_tokenizer(saved["tokenizer"]), saved


def main():
    config = parse(EvalConfig, doc=__doc__).make(EvalConfig)
    try:
        harness = need_harness()
        if config.hf:
            device = str(pick_device(config.device))
            lm = harness.models.huggingface.HFLM(pretrained=config.hf, dtype=config.dtype, device=device, batch_size=8)
        else:
            config.out_dir = config.out_dir or str(newest_run())
            model, tokenizer, _ = load(config.out_dir, config.device, config.dtype)
            if config.samples:
                model.set_samples(config.samples)
            lm = language_model(model, tokenizer, config.batch_tokens)
        results = run(lm, config.tasks, config.include_path, config.num_fewshot, config.limit)
        folder = Path(config.save_dir or (f"out/hf_{Path(config.hf).name}" if config.hf else config.out_dir))
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"settings": dataclasses.asdict(config), "results": results}, indent=1)
        write_atomically(folder / "evaluate.json", lambda f: f.write(text.encode()))
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    print_results(results, config.tasks, config.limit)
    print(f"wrote {folder / 'evaluate.json'}")


if __name__ == "__main__":
    main()
