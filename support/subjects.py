"""What probe.py probes, and on what: a checkpoint of ours or a model of transformers'.

config is probe.py's ProbeConfig throughout.
"""
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from model import GPT, load_checkpoint
from support import hf
from support.checkpoint import same_tokenizer
from support.machine import pick_device
from support.results import newest_finished
from support.routers import bank_numbers, find_layers
from support.shards import ShardReader, load_meta
from support.tokenizer import get_tokenizer


@dataclass
class Subject:
    name: str
    model: nn.Module
    layers: list  # of Layer
    depth: int  # blocks, with experts or without
    vocab_size: int
    windows: np.ndarray  # (n, S + 1) held-out tokens
    tokenizer: Any  # ours, or the name of the model whose tokenizer it is
    options: dict  # further arguments of the forward pass

    @property
    def continuous(self) -> bool:
        return getattr(self.model.config, "flavour", None) == "infmoe"

    @property
    def unit(self) -> str:
        """What losses are per."""
        return "byte" if getattr(self.tokenizer, "name", None) == "bytes" else "token"

    @property
    def banks(self) -> list[list[int]]:
        """Places in `layers`, those that share their experts together: one list per bank."""
        numbers = bank_numbers(self.layers)
        return [[k for k, n in enumerate(numbers) if n == bank] for bank in dict.fromkeys(numbers)]


def load_checkpoint_on(folder: str, device: str) -> tuple[GPT, dict]:
    """-> the model of a checkpoint, in evaluation mode on a device, and what else is in it"""
    try:
        model = GPT.from_checkpoint(folder, pick_device(device))
    except RuntimeError as error:  # no such device, or no room on it
        raise ValueError(f"{folder}, device={device}: {error}") from None
    return model, load_checkpoint(Path(folder, "ckpt.pt"))


def load_ours(config) -> Subject:
    """A checkpoint, and the held-out text of its training or of config.dataset."""
    model, saved = load_checkpoint_on(config.out_dir, config.device)
    if config.dtype != "auto":
        model.to(getattr(torch, config.dtype))
    c, tokenizer = model.config, get_tokenizer(saved["tokenizer"])
    if c.flavour == "dense":
        raise ValueError(f"{config.out_dir} is dense: there is no router to ask")
    dataset = config.dataset or saved["train_config"]["dataset"]
    theirs = load_meta(dataset)["tokenizer"] if Path(dataset).is_dir() else tokenizer.name
    if not same_tokenizer(theirs, tokenizer.name):
        raise ValueError(f"{config.out_dir} was trained on {tokenizer.name} tokens, and {dataset} "
                         f"holds {theirs}")
    size = min(config.block_size or c.block_size, c.block_size)
    windows = read_windows(config, dataset, size, c.vocab_size, tokenizer.encode)
    kind = f", {c.n_experts} experts, top {c.top_k}" if c.n_experts else ""
    name = f"{config.out_dir} ({c.flavour}, {c.n_layer} layers{kind}, step {saved['step']})"
    layers = find_layers(model)
    return Subject(name, model, layers, c.n_layer, c.vocab_size, windows, tokenizer, {})


def load_hf(config) -> Subject:
    """Any model of transformers' whose routers are *TopKRouter modules."""
    transformers = hf.need_transformers()
    if config.dataset is None:
        raise ValueError("--hf needs --dataset: a text file, or a folder of shards made with that "
                         "model's tokenizer")
    options = {"dtype": config.dtype}
    if config.device_map:
        options["device_map"] = config.device_map
    if config.load_in_4bit:
        options["quantization_config"] = transformers.BitsAndBytesConfig(load_in_4bit=True)
    model = hf.load_theirs(config.hf, **options)
    if not (config.device_map or config.load_in_4bit):
        model.to(pick_device(config.device))
    c, layers = model.config.get_text_config(), find_layers(model)

    def encode(text):
        read = transformers.AutoTokenizer.from_pretrained(config.hf, trust_remote_code=False)
        return read(text, verbose=False).input_ids

    size = min(config.block_size or 1024, getattr(c, "max_position_embeddings", None) or 1024)
    windows = read_windows(config, config.dataset, size, c.vocab_size, encode)
    depth, kind = c.num_hidden_layers, type(model).__name__
    experts = f"{layers[0].n_experts} experts, top {layers[0].top_k}"
    return Subject(f"{config.hf} ({kind}, {depth} layers, {experts})", model, layers, depth,
                   c.vocab_size, windows, config.hf, {"use_cache": False})


def read_windows(config, dataset, size, vocab_size, encode):
    """The first held-out tokens as (n, size + 1): from a folder of shards, or a text file."""
    if not Path(dataset).is_file():
        reader = ShardReader(dataset, "val", size, vocab_size)
        return reader.sequential(0, min(max(1, config.tokens // size), reader.n_windows))
    ids = np.array(encode(Path(dataset).read_text(errors="replace")), dtype=np.int64)
    ids = ids[:config.tokens + 1]
    if len(ids) <= size:
        raise ValueError(f"{dataset}: {len(ids)} tokens do not fill a window of {size + 1}: "
                         "lower --block_size")
    return np.lib.stride_tricks.sliding_window_view(ids, size + 1)[::size]


def find_model(config):
    """The folder to probe where none is named: the newest finished run; else the demo's, trained
    first."""
    try:
        folder, note = newest_finished()
        print(f"{note}: {folder}")
        return str(folder)
    except FileNotFoundError as error:
        if config.train == "never":
            raise
        print(f"{str(error).partition(':')[0]}: training the demo's model first, about 4 minutes "
              "on two quiet cores (--train=never refuses)", flush=True)
    root, out = Path(__file__).resolve().parent.parent, "out/demo"
    command = [sys.executable, str(root / "train.py"), str(root / "config/tiny_unipool.py")]
    if subprocess.run([*command, f"--out_dir={out}"]).returncode:
        raise ValueError(f"the demo's model is not there, since train.py ended early: "
                         f"python train.py --init_from=resume --out_dir={out} goes on")
    return out
