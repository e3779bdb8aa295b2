"""Read what a trained model writes: text streams out as it is generated.

    python sample.py                               # newest checkpoint under out/ begins a document
    python sample.py --out_dir=out/x --prompt="def " --max_new_tokens=200 --seed=1
    python sample.py --prompt_file=notes.txt --num_samples=3 --temperature=0.7 --top_p=0.9
    python sample.py --infmoe_samples=8            # infmoe: another number than in training

Text goes to stdout, all else to stderr. When the text outgrows the model's context (block_size
tokens), the older half of the context is dropped and generation goes on.
"""
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

import codecs
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from configurator import parse
from support.checkpoint import newest_run
from support.subjects import load_checkpoint_on
from support.tokenizer import get_tokenizer
from support.usage import one_line


@dataclass
class SampleConfig:
    out_dir: str | None = None  # folder of a checkpoint; None: the newest under out/
    prompt: str | None = None  # text to continue; None: the model begins a document of its own
    prompt_file: str | None = None  # file that holds the prompt
    num_samples: int = 1  # texts, one after another
    max_new_tokens: int = 300  # per text; end of text ends it before
    temperature: float = 0.8  # 0: always the likeliest token
    top_k: int | None = None  # choose among the k likeliest tokens
    top_p: float | None = None  # choose among the likeliest that together reach this probability
    seed: int = 1
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | mps
    infmoe_samples: int | None = None  # infmoe: samples per token, instead of those of training
    infmoe_mean: bool | None = None  # infmoe: no noise, z = mu

    def __post_init__(self):
        for name in ("num_samples", "max_new_tokens", "top_k", "infmoe_samples"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.temperature != 0 and self.temperature < 1e-6:  # logits are divided by it
            raise ValueError(f"temperature={self.temperature} must be 0 or at least 1e-6")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must fit 64 bits")
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("prompt and prompt_file are both given: leave one out")


def load(config: SampleConfig):
    """-> model in evaluation mode, its tokenizer. ValueError or FileNotFoundError, in one line."""
    model, saved = load_checkpoint_on(config.out_dir or newest_run(), config.device)
    tokenizer = get_tokenizer(saved["tokenizer"])
    if config.infmoe_samples is not None or config.infmoe_mean is not None:
        model.set_samples(config.infmoe_samples, config.infmoe_mean)
    if model.wte.weight.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False):
        model = model.to(torch.bfloat16)  # half the bytes to read per token
    return model, tokenizer


def read_prompt(config: SampleConfig, tokenizer, block_size: int) -> list[int]:
    """The prompt's token ids, at least one and at most block_size."""
    path, text = config.prompt_file, config.prompt
    if path is None and text is None:
        return [tokenizer.eot]  # stands before each document
    try:
        ids = tokenizer.encode(Path(path).read_text(encoding="utf-8") if text is None else text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    if not ids:
        raise ValueError("the prompt is empty: without one, the model begins a document of its own")
    if len(ids) > block_size:
        raise ValueError(f"the prompt has {len(ids)} tokens and the model's context {block_size}: "
                         "shorten the prompt")
    return ids


def stream(model, tokenizer, ids, config, generator) -> int:
    """Print the prompt and its continuation, a character once its bytes are there. -> new tokens"""
    decoder, count = codecs.getincrementaldecoder("utf-8")(errors="replace"), 0
    show = lambda ids: print(decoder.decode(tokenizer.decode_bytes(ids)), end="", flush=True)
    prompt = torch.tensor([ids], device=model.wte.weight.device)  # (1, S)
    show([] if ids == [tokenizer.eot] else ids)
    for token in model.generate(prompt, config.max_new_tokens, config.temperature, config.top_k,
                                config.top_p, generator):
        count += 1
        if token.item() == tokenizer.eot:
            break
        show([token.item()])
    print(decoder.decode(b"", final=True))
    return count


def main():
    config = parse(SampleConfig, doc=__doc__).make(SampleConfig)
    with one_line():
        model, tokenizer = load(config)
        ids = read_prompt(config, tokenizer, model.config.block_size)
        generator = torch.Generator(model.wte.weight.device).manual_seed(config.seed)
        count, began = 0, time.perf_counter()
        for i in range(config.num_samples):
            if i:
                print("-" * 80)
            count += stream(model, tokenizer, ids, config, generator)
    speed = count / (time.perf_counter() - began)
    print(f"[{count} tokens, {speed:.0f} tokens/s]", file=sys.stderr)


if __name__ == "__main__":
    main()
