"""Text -> token shards, and the reader of those shards: the only file that knows the shard format.

    python prepare_data.py stdlib                        # this Python's own library: real text, no network
    python prepare_data.py packages --tokenizer=gpt2     # the source of every installed package
    python prepare_data.py notes.txt folder/             # .txt .md .py .jsonl .jsonl.zst .parquet, or folders of them
    python prepare_data.py pretokenized                  # FineWeb 10B as GPT-2 tokens, ready-made: 20 GB
    python prepare_data.py fineweb --max_tokens=1e9      # from Hugging Face; also fineweb-edu, pile (--subset, --repo)
    python prepare_data.py pile --dry_run                # sizes and times only

A document is a JSON line, a parquet row, a source file (a megabyte of it at most) or a few paragraphs of a .txt, and an
end-of-text token stands before each. A hash of its text decides which documents are held out, so no copy of a validation document is ever trained on.
The work goes on in OUT_DIR.unfinished, which becomes OUT_DIR once it is whole; the same command resumes a killed one.

A shard is what llm.c and modded-nanogpt read: 256 little-endian int32 (20240520, 1, token count, zeros), uint16 tokens.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import sysconfig
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from configurator import fail, parse
from support.shards import (
    HEADER_BYTES,
    KINDS,
    atomic_write,
    check_shard_entry,
    file_sha256,
    is_shard,
    load_meta,
    read_json,
    shard_length,
    unfinished,
    write_shard,
)
from support.tokenizer import get_tokenizer


@dataclass
class DataConfig:
    out_dir: str | None = None  # folder of shards to make; default data/SOURCE, or data/SOURCE_gpt2
    tokenizer: str | None = None  # bytes, gpt2 or FILE.tiktoken; default gpt2 for the hub's corpora, bytes for the rest
    text_key: str = "text"  # the field of a JSON line or parquet row that holds the document
    val_fraction: float | None = None  # share of the documents held out; default 0.005 for the hub's corpora, 0.05 else
    max_tokens: int | None = None  # stop after so many training tokens
    shard_tokens: int = 100_000_000  # tokens in a shard
    workers: int | None = None  # threads; default one per core
    repo: str | None = None  # another dataset on Hugging Face, in the format of the source
    subset: str | None = None  # folder in that dataset, such as sample/100BT or data/CC-MAIN-2024-10
    dry_run: bool = False  # print sizes and times, and make nothing
    overwrite: bool = False  # replace the shards that out_dir holds

    def __post_init__(self):
        if self.val_fraction is not None and not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction} must lie between 0 and 1")
        if not 0 < self.shard_tokens < 2**31:
            raise ValueError(f"shard_tokens={self.shard_tokens} must be at least 1, and fit the int32 of a shard's header")
        if any(value is not None and value < 1 for value in (self.max_tokens, self.workers)):
            raise ValueError("max_tokens and workers must be at least 1")


# ---- 4. sources: which files there are, and the documents in them

HUB = {  # source: (dataset on huggingface.co, folder in it)
    "fineweb": ("HuggingFaceFW/fineweb", "sample/10BT"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample/10BT"),
    "pile": ("monology/pile-uncopyrighted", "train"),
    "pretokenized": ("kjj0/fineweb10B-gpt2", ""),
}
PYTHON_SOURCES = {"stdlib": "stdlib", "packages": "purelib"}  # source: its name in sysconfig.get_paths()
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages"}  # folders of Python sources
FORMATS = (".txt", ".md", ".py", ".jsonl", ".jsonl.zst", ".parquet")
BATCH = 2**20  # bytes of text that a worker gets at a time
DOCUMENT = 4096  # characters of a .txt in a document, on average
PART = 2**28  # bytes of local files that are done or not done together


class File(NamedTuple):
    name: str  # path on disk, or in the dataset
    size: int  # bytes
    version: str  # modification time; on the hub its SHA-256
    repo: str = ""  # dataset on the hub; empty for a local file


def list_files(source, config):
    """The files of a source, in the order of their documents. -> [File]"""
    if source in HUB:
        return list_hub(config.repo or HUB[source][0], HUB[source][1] if config.subset is None else config.subset, source)
    root = Path(sysconfig.get_paths()[PYTHON_SOURCES[source]] if source in PYTHON_SOURCES else source)
    if not root.exists():
        raise ValueError(f"no source '{source}': {', '.join([*PYTHON_SOURCES, *HUB])}, or the path of a file or folder")
    paths = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
    hidden = lambda p: any(part.startswith(".") for part in p.relative_to(root).parts)  # .git, .venv
    paths = [p for p in paths if p.name.endswith(FORMATS) and not hidden(p)]
    if source in PYTHON_SOURCES:
        paths = [p for p in paths if p.suffix == ".py" and not LEFT_OUT & set(p.relative_to(root).parts)]
        random.Random(0).shuffle(paths)  # in alphabetical order the last shard would hold other subjects
    if not paths:
        raise ValueError(f"'{source}' holds no text; what can be read is {' '.join(FORMATS)}")
    return [File(str(p), p.stat().st_size, str(p.stat().st_mtime_ns)) for p in paths]


def list_hub(repo, folder, source):
    """The files in one folder of a dataset on the hub, validation shards first. -> [File]"""
    wanted = ".bin" if source == "pretokenized" else FORMATS[3:]
    with hub(repo) as huggingface_hub:
        tree = huggingface_hub.HfApi().list_repo_tree(repo, folder or None, recursive=True, repo_type="dataset")
        found = [entry for entry in tree if entry.path.endswith(wanted)]
    if not found:
        raise ValueError(f"{repo} has no {' '.join([wanted] if source == 'pretokenized' else wanted)} in '{folder}'")
    files = [File(entry.path, entry.size, entry.lfs.sha256 if entry.lfs else "", repo) for entry in found]
    return sorted(files, key=lambda file: ("_train_" in file.name, file.name))


@contextlib.contextmanager
def hub(repo):
    """The huggingface_hub module, and one line for whatever keeps it from working."""
    huggingface_hub = extra("huggingface_hub")
    try:
        yield huggingface_hub
    except Exception as error:  # no network, proxy, time-out, HTTP status: a class of its own each
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"cannot reach {repo} on {huggingface_hub.constants.ENDPOINT} ({reason}): run it again where there is a "
            "network, it goes on where it stopped; without one: python prepare_data.py stdlib, or name local files"
        ) from None


def extra(module):
    """Import an optional package."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise ValueError(f'{package} is not installed: pip install {package}, or pip install "nanoexperts[data]"') from None


def fetch(file, folder):
    """The path on disk of a File. One on the hub is downloaded into `folder` first, resumed if broken off, and checked."""
    if not file.repo:
        return Path(file.name)
    with hub(file.repo) as huggingface_hub:
        path = Path(huggingface_hub.hf_hub_download(file.repo, file.name, repo_type="dataset", local_dir=folder))
    if path.stat().st_size != file.size or (file.version and file_sha256(path) != file.version):
        path.unlink()
        raise ValueError(f"{file.name} of {file.repo} arrived damaged and was deleted: run the same command again")
    return path


def read_batches(path, text_key):
    """The documents of a file, about a megabyte at a time. -> ([str or None], bytes of the file they took), ..."""
    if path.suffix == ".parquet":
        batches = parquet_rows(path, text_key)
    else:
        batches = json_lines(path, text_key) if ".jsonl" in path.suffixes else text_blocks(path)
    try:
        yield from batches
    except (OSError, ValueError) as error:  # a file that is cut short, or of another format than its name says
        raise ValueError(f"{path}: {error}") from None


def parquet_rows(path, text_key):
    table = extra("pyarrow.parquet").ParquetFile(path)
    if text_key not in table.schema_arrow.names:
        raise ValueError(f"no column '{text_key}' (--text_key) among {', '.join(table.schema_arrow.names)}")
    if "string" not in (kind := str(table.schema_arrow.field(text_key).type)):
        raise ValueError(f"the column '{text_key}' holds {kind}, not text (--text_key)")
    for rows in table.iter_batches(batch_size=256, columns=[text_key]):
        yield rows.column(0).to_pylist(), path.stat().st_size * len(rows) // table.metadata.num_rows


def json_lines(path, text_key):
    with open(path, "rb") as f:
        lines, number, at = f, 0, 0
        if path.suffix == ".zst":  # pyarrow's stream, unlike zstandard's, complains of a file that is cut short
            lines = io.BufferedReader(extra("pyarrow").input_stream(f, compression="zstd"), BATCH)
        while block := lines.readlines(BATCH):
            yield [json_text(line, number, text_key) for number, line in enumerate(block, number + 1)], f.tell() - at
            number, at = number + len(block), f.tell()


def json_text(line, number, text_key):
    try:
        text = json.loads(line)[text_key] if line.strip() else None
        if isinstance(text, (str, type(None))):
            return text
    except (KeyError, TypeError):
        pass
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: not JSON in UTF-8 ({error})") from None
    raise ValueError(f"line {number}: no text under '{text_key}' (--text_key)")


def text_blocks(path):
    """A file as one document, or a .txt as many; a megabyte of it at a time."""
    with open(path, encoding="utf-8", newline="") as f:
        try:
            while text := f.read(BATCH) + f.readline(BATCH):
                documents = split_text(text) if path.suffix == ".txt" else [text]
                yield documents, len(text.encode())
        except UnicodeDecodeError as error:
            if path.suffix != ".py":  # Python packages keep some sources in old encodings on purpose
                raise ValueError(f"not UTF-8 ({error.reason}): convert it or leave it out") from None


def split_text(text):
    """Whole paragraphs, some DOCUMENT characters of them together. -> [str], which join to the text

    A document ends where a hash of its last paragraph says so, with a chance that grows with the
    paragraph: whatever stands before, copies of a text are cut alike, and so get the same split.
    """
    documents, document = [], ""
    for piece in paragraphs(text):
        document += piece
        # salted, since the bare hash decides about validation
        ends = is_validation("end of document:" + piece, len(piece) / DOCUMENT)
        if ends or len(document) > 16 * DOCUMENT:
            documents.append(document)
            document = ""
    return [*documents, document] if document else documents


def paragraphs(text):
    """What ends with blank lines; the lines of a long one, and pieces of a long line."""
    start = 0
    for gap in re.finditer(r"\n\s*\n|\Z", text):
        paragraph, start = text[start : gap.end()], gap.end()
        if len(paragraph) <= DOCUMENT:
            yield paragraph
        else:
            yield from re.findall(rf".{{1,{DOCUMENT}}}\n?|\n", paragraph)


# ---- 5. preparation: batches -> workers -> shards


def is_validation(text, fraction):
    """By a hash of the text: the same on every machine, in every order, for every copy of a document."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def tokenize(batch, tokenizer, val_fraction):
    """-> ({split: uint16 array}, number of documents, bytes of the file they took)"""
    texts, progress = batch
    eot = np.array([tokenizer.eot], np.uint16)
    pieces = {"train": [eot[:0]], "val": [eot[:0]]}
    texts = [text for text in texts if text]
    for text in texts:
        split = "val" if is_validation(text, val_fraction) else "train"
        pieces[split] += [eot, tokenizer.encode_array(text)]
    return {split: np.concatenate(p) for split, p in pieces.items()}, len(texts), progress


def ordered_map(pool, function, jobs, *, ahead):
    """map() on an executor, at most `ahead` jobs in advance: pool.map would read all input first."""
    pending = deque()
    for job in jobs:
        pending.append(pool.submit(function, job))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


class ShardWriter:
    """Cuts one split's stream of tokens into shards; holds the tokens of two of them at most."""

    def __init__(self, folder, split, number, shard_tokens):
        self.folder, self.split, self.number, self.shard_tokens = folder, split, number, shard_tokens
        self.pieces, self.waiting = [], 0
        self.shards = {}  # file name -> {"tokens": count, "sha256": of the file}

    def write(self, tokens):
        self.pieces.append(tokens)
        self.waiting += len(tokens)
        while self.waiting >= self.shard_tokens:
            self.flush()

    def flush(self):
        """Write what waits, as far as it fits one shard."""
        if self.waiting:
            tokens = np.concatenate(self.pieces)
            path = self.folder / f"{self.split}_{self.number + len(self.shards):06d}.bin"
            self.shards[path.name] = write_shard(path, tokens[: self.shard_tokens])
            self.pieces, self.waiting = [tokens[self.shard_tokens :]], max(0, self.waiting - self.shard_tokens)


class Preparation:
    """A folder in the making: parts of a few files each, written down in state.json once done.

    A part that is done is {"files", "shards": {name: {"tokens", "sha256"}}, "documents"}.
    """

    def __init__(self, work, settings, plan):
        """plan: [[File]], the files of each part. What a run with the same settings did counts."""
        self.work, self.settings, self.plan, self.parts = work, settings, plan, []
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            state = read_json(work / "state.json")
            for part, files in zip(state["parts"] if state["settings"] == settings else [], plan):
                if part["files"] != [list(file) for file in files] or not self.holds(part["shards"]):
                    break  # another file by now, or a shard that is gone
                self.parts.append(part | {"documents": 0 + part["documents"]})

    def holds(self, shards):
        for name, shard in shards.items():
            check_shard_entry(name, shard)
            if (self.work / name).stat().st_size != HEADER_BYTES + 2 * shard["tokens"]:
                return False
        return True

    def left(self):
        return self.plan[len(self.parts) :]

    def shards(self, split):
        return {name: s for part in self.parts for name, s in part["shards"].items() if is_shard(name, split)}

    def tokens(self, split):
        return sum(shard["tokens"] for shard in self.shards(split).values())

    def room(self):
        """Training tokens that may still come."""
        return max(0, (self.settings["max_tokens"] or math.inf) - self.tokens("train"))

    def run(self, make, bar):
        """Do the parts that are left. make: tokenize_part or take_part."""
        for files in self.left():
            if not self.room():
                return
            paths = (fetch(file, self.work / "raw") for file in files)
            shards, documents = make(self, paths, bar)
            self.parts.append({"files": files, "shards": shards, "documents": documents})
            state = {"settings": self.settings, "parts": self.parts}
            atomic_write(self.work / "state.json", json.dumps(state).encode())
            bar.set_postfix_str(f"{self.tokens('train') / 1e6:.1f}M tokens")
            shutil.rmtree(self.work / "raw", ignore_errors=True)

    def fill_empty_split(self):
        """One or two documents may all hash into one split: the other gets the end of its last shard."""
        full, empty = ("train", "val") if self.tokens("train") else ("val", "train")
        if self.tokens(empty) or not self.tokens(full):
            return
        name, fraction = max(self.shards(full)), self.settings["val_fraction"]
        shards = next(part["shards"] for part in self.parts if name in part["shards"])
        tokens = np.fromfile(self.work / name, "<u2", offset=HEADER_BYTES)
        cut = int(len(tokens) * (1 - fraction if empty == "val" else fraction))
        shards[f"{empty}_000000.bin"] = write_shard(self.work / f"{empty}_000000.bin", tokens[cut:])
        shards[name] = write_shard(self.work / name, tokens[:cut])

    def finish(self, out_dir, tokenizer):
        """Write meta.json and give the folder its name. -> meta"""
        self.fill_empty_split()
        meta = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size, "source": " ".join(self.settings["sources"])}
        meta |= {f"{split}_tokens": self.tokens(split) for split in ("train", "val")}
        meta["documents"] = sum(part["documents"] for part in self.parts)  # 0: unknown, ready-made shards
        meta |= {"shards": self.shards("train|val"), "settings": self.settings}
        if not meta["train_tokens"]:
            raise ValueError(f"{meta['source']}: no text in these files")
        for path in self.work.glob("*.bin"):
            if path.name not in meta["shards"]:  # of an earlier run, with other settings
                path.unlink()
        shutil.rmtree(self.work / "raw", ignore_errors=True)
        atomic_write(self.work / "meta.json", json.dumps(meta, indent=1).encode())
        put_in_place(self.work, out_dir)
        return meta


def tokenize_part(preparation, paths, bar, run):
    """Tokenize the files of a part; `run` maps tokenize() over batches. -> (shards, number of documents)"""
    settings, room, documents = preparation.settings, preparation.room(), 0
    train, val = (
        ShardWriter(preparation.work, split, len(preparation.shards(split)), settings["shard_tokens"])
        for split in ("train", "val")
    )
    for tokens, n, progress in run(batch for path in paths for batch in read_batches(path, settings["text_key"])):
        keep = min(room, len(tokens["train"]))
        train.write(tokens["train"][:keep])
        val.write(tokens["val"])
        room, documents = room - keep, documents + n
        bar.update(progress)
        if not room:
            break
    train.flush()
    val.flush()
    return train.shards | val.shards, documents


def take_part(preparation, paths, bar):
    """Take files that are shards already, as they are. -> (shards, number of documents: 0, unknown)"""
    shards = {}
    for path in paths:
        shards[path.name] = {"tokens": shard_length(path), "sha256": file_sha256(path)}
        bar.update(path.stat().st_size)
        os.replace(path, preparation.work / path.name)
    return shards, 0


def group(files):
    """Cut the list of files into parts: one on the hub alone, local ones together up to about PART bytes. -> [[File]]"""
    ends = itertools.accumulate(file.size for file in files)
    parts = itertools.groupby(zip(files, ends), lambda pair: pair[0].name if pair[0].repo else pair[1] // PART)
    return [[file for file, _ in part] for _, part in parts]


# ---- 6. the folder: one process at a time, and nobody else's files

LOCK = "prepare_data.lock"  # locked while at work; nothing is deleted where it is missing


@contextlib.contextmanager
def locked(work):
    """A folder in the making, for one process at a time."""
    work.mkdir(parents=True, exist_ok=True)
    check_ours(work)
    with open(work / LOCK, "a") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the folder may have got its name since: then this lock is no longer the one of `work`
            alone = os.path.samestat(os.fstat(f.fileno()), os.stat(work / LOCK))
        except (BlockingIOError, FileNotFoundError):
            alone = False
        if not alone:
            raise ValueError(f"{work}: another preparation is at work there")
        (work / "meta.json").unlink(missing_ok=True)  # of a run that was killed at its very end
        yield


def check_ours(folder, markers=(LOCK,)):
    """A ValueError if there is such a folder, and anything in it that prepare_data has not written."""
    if not os.path.lexists(folder):
        return
    paths = list(folder.iterdir()) if folder.is_dir() else [folder]
    names = {path.name.removesuffix(".tmp") for path in paths}
    links = any(path.is_symlink() for path in paths)
    try:
        shards = set(load_meta(folder)["shards"])
    except (OSError, ValueError, KeyError):  # in the making, or damaged
        shards = {name for name in names if re.fullmatch(r"(\w+_)?(train|val)_\d{6}\.bin", name)}
    foreign = names - shards - {LOCK, "meta.json", "state.json", "raw"}
    if foreign or links or (names and names.isdisjoint(markers)):
        raise ValueError(f"{folder} is there and is not ours: name another --out_dir")


def discard(folder):
    """Delete a folder of ours, if there is one; what marks it goes last."""
    check_ours(folder)
    paths = folder.iterdir() if folder.exists() else ()
    for path in sorted(paths, key=lambda path: path.name == LOCK):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if folder.exists():
        folder.rmdir()


def put_in_place(work, out_dir):
    """Give the folder its name. What had it before is whole until then, and deleted after."""
    aside = replaced(out_dir)
    if out_dir.exists():
        discard(aside)
        os.rename(out_dir, aside)
    os.rename(work, out_dir)
    (out_dir / "state.json").unlink()
    discard(aside)


def replaced(out_dir):
    return out_dir.with_name(out_dir.name + ".replaced")


def made_before(out_dir, settings, overwrite):
    """The meta of a folder that these settings have made, checksums verified; None: to be made."""
    check_ours(out_dir, (LOCK,) if overwrite else (LOCK, "meta.json"))
    if overwrite or not out_dir.exists() or not list(out_dir.iterdir()):
        return None
    meta = load_meta(out_dir)
    if not KINDS.keys() <= meta.keys():
        raise ValueError(f"{out_dir / 'meta.json'} is incomplete: --overwrite")
    if meta["settings"] != settings:
        raise ValueError(
            f"{out_dir} holds data made with other settings: --overwrite it, or name another --out_dir"
        )
    for name, shard in meta["shards"].items():
        path = out_dir / name
        if not path.is_file() or file_sha256(path) != shard["sha256"]:
            raise ValueError(f"{path} is not what was written there (checksum): --overwrite")
    return meta


def prepare(sources, config):
    """From the sources to a whole folder of shards, or on from where an earlier run stopped. -> (folder, its meta)"""
    from_hub = bool(set(sources) & set(HUB))
    spec, fraction = config.tokenizer or ("gpt2" if from_hub else "bytes"), config.val_fraction or (0.005 if from_hub else 0.05)
    tag = "" if spec == "bytes" or sources[0] in HUB else f"_{Path(spec).stem}"
    out_dir = Path(config.out_dir or f"data/{Path(sources[0]).resolve().name.partition('.')[0]}{tag}")
    settings = {"sources": sources, **asdict(config), "tokenizer": spec, "val_fraction": fraction}
    settings = {k: v for k, v in settings.items() if k not in ("out_dir", "workers", "dry_run", "overwrite")}
    if out_dir.is_symlink():
        out_dir = out_dir.resolve()
    if not config.dry_run and (meta := made_before(out_dir, settings, config.overwrite)):
        return out_dir, meta
    ready_made = "pretokenized" in sources
    if ready_made and (len(sources) > 1 or spec != "gpt2"):
        raise ValueError("pretokenized is GPT-2's tokens, ready-made: no other source or tokenizer goes with it")
    if not from_hub and (config.repo or config.subset):
        raise ValueError(f"--repo and --subset choose a dataset on the hub: {', '.join(HUB)}")
    tokenizer, workers = get_tokenizer(spec), config.workers or (1 if spec == "bytes" else cores())
    files = [file for source in sources for file in list_files(source, config)]
    if config.dry_run:
        return out_dir, estimate(files, tokenizer, workers, config)

    check_ours(replaced(out_dir))
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(unfinished(out_dir)))
        preparation = Preparation(unfinished(out_dir), settings, group(files))
        sizes = [sum(file.size for file in part) for part in (files, itertools.chain(*preparation.left()))]
        bar = stack.enter_context(tqdm(total=sizes[0], initial=sizes[0] - sizes[1], unit="B", unit_scale=True))
        work = functools.partial(tokenize, tokenizer=tokenizer, val_fraction=fraction)
        pool = stack.enter_context(ThreadPoolExecutor(workers))  # tiktoken works outside the GIL
        run = functools.partial(ordered_map, pool, work, ahead=3 * workers)
        # another one may have been quicker, before this one began or before it ended
        if not made_before(out_dir, settings, config.overwrite):
            preparation.run(take_part if ready_made else functools.partial(tokenize_part, run=run), bar)
        if meta := made_before(out_dir, settings, config.overwrite):
            discard(unfinished(out_dir))
            return out_dir, meta
        return out_dir, preparation.finish(out_dir, tokenizer)


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def estimate(files, tokenizer, workers, config):
    """--dry_run: print what the work would read, write and take."""
    unpack = {".parquet": 1.7, ".zst": 1.9, ".bin": 2.2}  # bytes of text in one byte of FineWeb's and the Pile's files
    size = sum(file.size for file in files)
    text = sum(file.size * unpack.get(Path(file.name).suffix, 1.0) for file in files)
    sample = Path(__file__).read_text() * 20
    begin = time.perf_counter()
    bytes_per_token = len(sample) / len(tokenizer.encode_array(sample))
    speed = len(sample) / (time.perf_counter() - begin) * workers  # bytes of text per second
    tokens = text / bytes_per_token
    share = min(1.0, (config.max_tokens or math.inf) / tokens)
    human = lambda n: tqdm.format_sizeof(n, divisor=1000)
    print(f"{len(files)} files of {human(size)}B, about {human(tokens)} {tokenizer.name} tokens")
    if share < 1:
        print(f"--max_tokens={config.max_tokens} needs {share:.1%} of them")
    if files[0].repo:
        print(f"download  {human(size * share)}B, at 100 Mbit/s {tqdm.format_interval(size * share / 12.5e6)}")
    if not files[0].name.endswith(".bin"):
        print(f"tokenize  {human(text * share)}B of text, on {workers} cores {tqdm.format_interval(text * share / speed)}")
    print(f"write     {human(2 * tokens * share)}B")


def main():
    parsed = parse(DataConfig, words=("sources*",), doc=__doc__)
    config, sources = parsed.make(DataConfig), parsed.words["sources"]
    if not sources:
        fail(f"name a source: {', '.join([*PYTHON_SOURCES, *HUB])}, or the path of a file or folder (--help)")
    try:
        out_dir, meta = prepare(sources, config)
    except (OSError, ValueError) as error:
        fail(error)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    if meta:
        print(f"{out_dir}: {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens", end="")
        print(f" ({meta['tokenizer']}, {meta['vocab_size']} ids), {len(meta['shards'])} shards")
        say_share(meta)
        print(f"train on them: python train.py --dataset={out_dir}")


def say_share(meta):
    """A few documents may hash far from the share that was asked for: the user should know."""
    asked = meta["settings"]["val_fraction"]
    share = meta["val_tokens"] / (meta["train_tokens"] + meta["val_tokens"])
    if meta["documents"] and not 0.5 < share / asked < 2:
        print(f"note: {share:.1%} of the tokens are for validation where {asked:.1%} was asked for:", end="")
        print(f" {meta['documents']} documents are few, or long ones; another --val_fraction moves it")


if __name__ == "__main__":
    main()
