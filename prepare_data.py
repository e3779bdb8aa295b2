"""Text -> token shards for train.py.

    python prepare_data.py stdlib                      # this Python's own library: no network
    python prepare_data.py packages --tokenizer=gpt2   # every installed package; or hf:NAME
    python prepare_data.py notes.txt folder/           # .txt .md .py .jsonl .jsonl.zst .parquet
    python prepare_data.py pretokenized                # FineWeb 10B as GPT-2 tokens: 20 GB
    python prepare_data.py fineweb --max_tokens=1e9    # from Hugging Face; also fineweb-edu, pile
    python prepare_data.py pile --dry_run              # sizes and times only

A document is a JSON line, a parquet row, a source file (at most a megabyte of it) or a few
paragraphs of a .txt, and an end-of-text token stands before each. A hash of its text decides
which documents are held out, so no copy of a validation document is ever trained on. The work
goes on in OUT_DIR.unfinished, which becomes OUT_DIR once whole; the same command resumes it.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while libraries load: no traceback

import contextlib
import json
import math
import os
import shutil
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import fail, parse
from support import folders, shards
from support.files import write_atomically
from support.shards import ShardWriter, file_sha256
from support.sources import (
    HUB,
    PYTHON_SOURCES,
    estimate,
    fetch,
    is_validation,
    list_files,
    read_batches,
)
from support.tokenizer import get_tokenizer
from support.usage import one_line

PART = 2**28  # bytes of local files that are done or not done together


@dataclass
class DataConfig:
    out_dir: str | None = None  # folder to make; default data/SOURCE, or data/SOURCE_gpt2
    tokenizer: str | None = None  # bytes | gpt2 | FILE.tiktoken | hf:NAME_OR_DIR; None: gpt2 for
    # hub corpora, bytes for the rest
    text_key: str = "text"  # the field of a JSON line or parquet row that holds the document
    val_fraction: float | None = None  # held out; default 0.005 of hub corpora, 0.05 of the rest
    max_tokens: int | None = None  # stop after so many training tokens
    shard_tokens: int = 100_000_000  # tokens in a shard
    workers: int | None = None  # threads; default one per core
    repo: str | None = None  # another dataset on Hugging Face, in the format of the source
    subset: str | None = None  # folder in it, such as sample/100BT or data/CC-MAIN-2024-10
    dry_run: bool = False  # print sizes and times, and make nothing
    overwrite: bool = False  # replace the shards that out_dir holds

    def __post_init__(self):
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction} must lie between 0 and 1")
        if not 0 < self.shard_tokens < 2**31:
            raise ValueError(f"shard_tokens={self.shard_tokens} must be at least 1, and fit int32")
        if any(value is not None and value < 1 for value in (self.max_tokens, self.workers)):
            raise ValueError("max_tokens and workers must be at least 1")
        if self.out_dir == "":
            raise ValueError("--out_dir is empty")


# ---- text -> tokens


def tokenize(batch, tokenizer, val_fraction):
    """-> ({split: array of ids}, number of documents, bytes of the file they took)"""
    eot = np.array([tokenizer.eot], tokenizer.dtype)
    pieces = {"train": [eot[:0]], "val": [eot[:0]]}
    for i, text in enumerate(batch.texts):
        if not text:
            continue
        split = "val" if is_validation(text, val_fraction) else "train"
        try:
            pieces[split] += [eot, tokenizer.encode_array(text)]
        except ValueError as error:
            raise ValueError(f"{batch.path}: {batch.unit} {batch.first + i}: {error}") from None
    tokens = {split: np.concatenate(arrays) for split, arrays in pieces.items()}
    return tokens, sum(map(bool, batch.texts)), batch.progress


def ordered_map(workers, function, jobs):
    """map() on threads, a few jobs in advance: executor.map would read all of the input first."""
    pending = deque()
    with ThreadPoolExecutor(workers) as pool:  # tiktoken works outside the GIL
        for job in jobs:
            pending.append(pool.submit(function, job))
            if len(pending) > 3 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


# ---- a folder in the making


class Preparation:
    """Parts of a few files each, done one after the other and written down in state.json.

    A part that is done is {"files", "shards": {name: {"tokens", "sha256"}}, "documents"}.
    """

    def __init__(self, work, settings, plan):
        """plan: [[File]], the files of each part. What a run with the same settings did counts."""
        self.work, self.settings, self.plan, self.parts = work, settings, plan, []
        # what a damaged state.json says counts up to the damage
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            self.take_up(folders.read_json(work / "state.json"))

    def take_up(self, state):
        """The parts that a run with the same settings has done, up to the first that changed."""
        if state["settings"] != self.settings:
            return
        for part, files in zip(state["parts"], self.plan):
            if part["files"] != [list(file) for file in files] or not self.holds(part):
                return  # another file by now, or a shard that is gone
            self.parts.append(part)

    def holds(self, part):
        for name, shard in part["shards"].items():
            folders.check_entry(name, shard)
            if shards.shard_length(self.work / name) != shard["tokens"]:
                return False
        return type(part["documents"]) is int

    def left(self):
        return self.plan[len(self.parts) :]

    def made(self, split):
        """-> {name: {"tokens", "sha256"}}, of "train", "val" or "train|val"."""
        every = [item for part in self.parts for item in part["shards"].items()]
        return {name: shard for name, shard in every if folders.is_shard(name, split)}

    def tokens(self, split):
        return sum(shard["tokens"] for shard in self.made(split).values())

    def room(self):
        """Training tokens that may still come."""
        return max(0, (self.settings["max_tokens"] or math.inf) - self.tokens("train"))

    def write(self, name, value):
        text = json.dumps(value, indent=1 if name == "meta.json" else None).encode()
        write_atomically(self.work / name, lambda f: f.write(text))

    def run(self, make):
        """Do the parts that are left. make: tokenize_part or take_part."""
        size = lambda parts: sum(file.size for files in parts for file in files)
        total, done = size(self.plan), size(self.plan) - size(self.left())
        with tqdm(total=total, initial=done, unit="B", unit_scale=True) as bar:
            for files in self.left():
                if not self.room():
                    return
                paths = (fetch(file, self.work / "raw") for file in files)
                made, documents = make(self, paths, bar.update)
                self.parts.append({"files": files, "shards": made, "documents": documents})
                self.write("state.json", {"settings": self.settings, "parts": self.parts})
                bar.set_postfix_str(f"{self.tokens('train') / 1e6:.1f}M tokens")
                shutil.rmtree(self.work / "raw", ignore_errors=True)

    def tokenize_part(self, paths, progress, tokenizer, workers):
        """Tokenize the files of a part. -> (shards, number of documents)"""
        settings, room, documents = self.settings, self.room(), 0
        writers = {
            split: ShardWriter(self.work, split, len(self.made(split)), settings["shard_tokens"])
            for split in ("train", "val")
        }
        work = lambda batch: tokenize(batch, tokenizer, settings["val_fraction"])
        batches = (b for path in paths for b in read_batches(path, settings["text_key"]))
        for tokens, n, size in ordered_map(workers, work, batches):
            keep = min(room, len(tokens["train"]))
            writers["train"].write(tokens["train"][:keep])
            writers["val"].write(tokens["val"])
            room, documents = room - keep, documents + n
            progress(size)
            if not room:
                break
        return writers["train"].close() | writers["val"].close(), documents

    def take_part(self, paths, progress):
        """Take files that are shards already, as they are. -> (shards, 0 documents: unknown)"""
        made = {}
        for path in paths:
            made[path.name] = {"tokens": shards.shard_length(path), "sha256": file_sha256(path)}
            progress(path.stat().st_size)
            os.replace(path, self.work / path.name)
        return made, 0

    def fill_empty_split(self):
        """A few documents may all hash into one split: the other gets the end of its last shard."""
        full, empty = ("train", "val") if self.tokens("train") else ("val", "train")
        if self.tokens(empty) or not self.tokens(full):
            return
        last, fraction = max(self.made(full)), self.settings["val_fraction"]
        made = next(part["shards"] for part in self.parts if last in part["shards"])
        tokens = shards.read_shard(self.work / last)
        cut = int(len(tokens) * (1 - fraction if empty == "val" else fraction))
        for name, piece in ((f"{empty}_000000.bin", tokens[cut:]), (last, tokens[:cut])):
            made[name] = shards.write_shard(self.work / name, piece)

    def finish(self, tokenizer):
        """Write meta.json, and leave nothing that it does not name."""
        self.fill_empty_split()
        meta = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size}
        if tokenizer.sha256:  # a copy travels with the data
            meta |= {"tokenizer": tokenizer.copy, "tokenizer_sha256": tokenizer.sha256}
            write_atomically(self.work / tokenizer.copy, lambda f: f.write(tokenizer.data))
        meta["source"] = " ".join(self.settings["sources"])
        meta |= {f"{split}_tokens": self.tokens(split) for split in ("train", "val")}
        meta["documents"] = sum(part["documents"] for part in self.parts)  # 0: unknown
        meta |= {"shards": self.made("train|val"), "settings": self.settings}
        if not meta["train_tokens"]:
            raise ValueError(f"{meta['source']}: no text in these files")
        for path in self.work.glob("*.bin*"):
            if path.name not in meta["shards"]:  # of an earlier run, with other settings
                path.unlink()
        shutil.rmtree(self.work / "raw", ignore_errors=True)
        self.write("meta.json", meta)


def group(files):
    """Parts: each file on the hub alone, local ones together up to about PART bytes."""
    parts, end = {}, 0
    for file in files:
        end += file.size
        part = file.name if file.repo else end // PART
        parts.setdefault(part, []).append(file)
    return list(parts.values())


def made_before(out_dir, settings, overwrite):
    """The meta of a folder that these settings have made, checksums verified; None: to be made."""
    folders.check_ours(out_dir, (folders.LOCK,) if overwrite else (folders.LOCK, "meta.json"))
    if overwrite or not out_dir.exists() or not list(out_dir.iterdir()):
        return None
    meta = folders.load_meta(out_dir)
    if not folders.KINDS.keys() - {"tokenizer_sha256"} <= meta.keys():
        raise ValueError(f"{out_dir / 'meta.json'} is incomplete: --overwrite")
    if meta["settings"] != settings:
        way_out = "--overwrite it, or name another --out_dir"
        raise ValueError(f"{out_dir} holds data made with other settings: {way_out}")
    for name, shard in meta["shards"].items():
        path = out_dir / name
        if not path.is_file() or file_sha256(path) != shard["sha256"]:
            raise ValueError(f"{path} is not what was written there (checksum): --overwrite")
    return meta


# ---- the command


def prepare(sources: list[str], config: DataConfig):
    """Make a whole folder of shards, or go on where a killed run stopped. -> (folder, its meta)"""
    from_hub, ready_made = bool(set(sources) & set(HUB)), "pretokenized" in sources
    spec = config.tokenizer or ("gpt2" if from_hub else "bytes")
    if ready_made and (len(sources) > 1 or spec != "gpt2"):
        raise ValueError("pretokenized is GPT-2's tokens: no other source or tokenizer beside it")
    if not from_hub and (config.repo or config.subset):
        raise ValueError(f"--repo and --subset choose a dataset on the hub: {', '.join(HUB)}")
    out_dir = Path(config.out_dir or default_folder(sources[0], spec))
    out_dir = out_dir.resolve() if out_dir.is_symlink() else out_dir

    # what decides about the bytes: the same settings are the same shards
    tokenizer = get_tokenizer(spec)
    fraction = config.val_fraction or (0.005 if from_hub else 0.05)
    settings = {"sources": sources, **asdict(config), "tokenizer": spec, "val_fraction": fraction}
    for name in ("out_dir", "workers", "dry_run", "overwrite"):
        del settings[name]
    if tokenizer.sha256:
        settings["tokenizer_sha256"] = tokenizer.sha256
    done = lambda: made_before(out_dir, settings, config.overwrite)
    if not config.dry_run and (meta := done()):
        return out_dir, meta

    files = [file for source in sources for file in list_files(source, config)]
    workers = config.workers or os.cpu_count()
    if config.dry_run:
        return out_dir, estimate(files, tokenizer, workers, config)
    work = folders.beside(out_dir, "unfinished")
    folders.check_ours(folders.beside(out_dir, "replaced"))
    with folders.locked(work):
        preparation = Preparation(work, settings, group(files))
        tokenize_part = lambda *args: Preparation.tokenize_part(*args, tokenizer, workers)
        # another process may be quicker, before this one begins or before it ends
        if not done():
            preparation.run(Preparation.take_part if ready_made else tokenize_part)
        if meta := done():
            folders.discard(work)
        else:
            preparation.finish(tokenizer)
            folders.put_in_place(work, out_dir)
        return out_dir, meta or folders.load_meta(out_dir)


def default_folder(source, spec):
    name = Path(spec[3:]).name if spec.startswith("hf:") else Path(spec).stem
    tag = "" if spec == "bytes" or source in HUB else f"_{name}"
    return f"data/{Path(source).resolve().name.partition('.')[0]}{tag}"


def main():
    parsed = parse(DataConfig, words=("sources*",), doc=__doc__)
    config, sources = parsed.make(DataConfig), parsed.words["sources"]
    if not sources:
        names = ", ".join([*PYTHON_SOURCES, *HUB])
        fail(f"name a source: {names}, or the path of a file or folder (--help)")
    with one_line("interrupted: the same command goes on from here"):
        out_dir, meta = prepare(sources, config)
        if meta:
            say(out_dir, meta)


def say(out_dir, meta):
    train, val, documents = meta["train_tokens"], meta["val_tokens"], meta["documents"]
    print(f"{out_dir}: {train:,} training and {val:,} validation tokens", end="")
    print(f" ({meta['tokenizer']}, {meta['vocab_size']} ids), {len(meta['shards'])} shards")
    asked, share = meta["settings"]["val_fraction"], val / (train + val)
    if documents and not 0.5 < share / asked < 2:
        print(f"note: {share:.1%} of the tokens are for validation, {asked:.1%} was asked", end="")
        print(f" for: {documents} documents are few, or long; another --val_fraction moves it")
    print(f"train on them: python train.py --dataset={out_dir}")


if __name__ == "__main__":
    main()
