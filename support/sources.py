"""Where text comes from: the files of a source, on disk or on Hugging Face's hub, and the documents
in them, about a megabyte at a time."""

import contextlib
import errno
import hashlib
import io
import json
import math
import random
import re
import sysconfig
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from support.shards import file_sha256
from support.usage import optional

HUB = {  # source: (dataset on huggingface.co, folder in it)
    "fineweb": ("HuggingFaceFW/fineweb", "sample/10BT"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "sample/10BT"),
    "pile": ("monology/pile-uncopyrighted", "train"),
    "pretokenized": ("kjj0/fineweb10B-gpt2", ""),
}
PYTHON_SOURCES = {"stdlib": "stdlib", "packages": "purelib"}  # names in sysconfig.get_paths()
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages"}  # of these
FORMATS = (".txt", ".md", ".py", ".jsonl", ".jsonl.zst", ".parquet")
DOCUMENT = 4096  # characters of a .txt in a document, on average
BATCH = 2**20  # bytes of text that a thread gets at a time
LINE = 2**26  # bytes of the longest JSON line


class Unreachable(ValueError):
    """The hub cannot be had here: no network, or a package that is not installed."""


class File(NamedTuple):
    name: str  # path on disk, or in the dataset
    size: int  # bytes
    version: str  # modification time; on the hub its SHA-256
    repo: str = ""  # dataset on the hub; empty for a local file


def list_files(source, config=None) -> list[File]:
    """The files of a source, in the order of their documents."""
    if source in HUB:
        return list_hub(source, config)
    python = PYTHON_SOURCES.get(source)
    root = Path(sysconfig.get_paths()[python] if python else source)
    if not root.is_dir() and not root.is_file():
        names = ", ".join([*PYTHON_SOURCES, *HUB])
        raise ValueError(f"no source '{source}': {names}, or the path of a file or folder")
    paths = sorted(root.rglob("*")) if root.is_dir() else [root]
    parts = {path: path.relative_to(root).parts for path in paths}
    hidden = lambda path: any(part.startswith(".") for part in parts[path])  # .git, .venv
    paths = [p for p in paths if p.name.endswith(FORMATS) and p.is_file() and not hidden(p)]
    if python:
        paths = [p for p in paths if p.suffix == ".py" and not LEFT_OUT & set(parts[p])]
        random.Random(0).shuffle(paths)  # in the alphabet's order the last shard would differ
    if not paths:
        raise ValueError(f"'{source}' holds no text; what can be read is {' '.join(FORMATS)}")
    return [File(str(p), p.stat().st_size, str(p.stat().st_mtime_ns)) for p in paths]


# ---- the hub


def list_hub(source, config):
    """The files in one folder of a dataset on the hub, validation shards first. -> [File]"""
    repo = config.repo or HUB[source][0]
    folder = HUB[source][1] if config.subset is None else config.subset
    wanted = (".bin",) if source == "pretokenized" else FORMATS[3:]
    with hub(repo) as huggingface_hub:
        api = huggingface_hub.HfApi()
        tree = api.list_repo_tree(repo, folder or None, recursive=True, repo_type="dataset")
        found = [entry for entry in tree if entry.path.endswith(wanted)]
    if not found:
        raise ValueError(f"{repo} has no {' '.join(wanted)} in '{folder}'")
    versions = [entry.lfs.sha256 if entry.lfs else "" for entry in found]
    files = [File(entry.path, entry.size, v, repo) for entry, v in zip(found, versions)]
    return sorted(files, key=lambda file: ("_train_" in file.name, file.name))


@contextlib.contextmanager
def hub(repo):
    """The huggingface_hub module, and one line for whatever keeps it from working."""
    huggingface_hub = extra("huggingface_hub")
    try:
        yield huggingface_hub
    except Exception as error:  # no network, proxy, time-out, HTTP status: a class of its own each
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Unreachable(
            f"cannot reach {repo} on {huggingface_hub.constants.ENDPOINT} ({reason}): run it again "
            "where there is a network, it goes on where it stopped; without one: "
            "python prepare_data.py stdlib, or name local files"
        ) from None


def knock(seconds=5):
    """Unreachable where the hub does not answer: its own client would try for half a minute."""
    address = extra("huggingface_hub.constants").ENDPOINT
    try:
        urllib.request.urlopen(address, timeout=seconds).close()
    except urllib.error.HTTPError:  # an answer
        pass
    except OSError:  # no such name, refused, timed out
        raise Unreachable(f"{address} does not answer") from None


def extra(module):
    return optional(module, "data", Unreachable)


def fetch(file, folder):
    """The path on disk of a File; one on the hub is downloaded, or resumed, and checked first."""
    if not file.repo:
        return Path(file.name)
    options = dict(repo_type="dataset", local_dir=folder)
    with hub(file.repo) as huggingface_hub:
        path = Path(huggingface_hub.hf_hub_download(file.repo, file.name, **options))
    if path.stat().st_size != file.size or (file.version and file_sha256(path) != file.version):
        path.unlink()
        problem = f"{file.name} of {file.repo} arrived damaged and was deleted"
        raise ValueError(f"{problem}: run the same command again")
    return path


# ---- documents


class Batch(NamedTuple):
    texts: list  # of documents; None and "" count for nothing
    progress: int  # bytes of the file that they took
    path: Path
    unit: str  # line, row or document
    first: int  # number of the first of them


def read_batches(path, text_key):
    """The documents of a file. -> Batch, ...; a ValueError names the file and the line."""
    if path.suffix == ".parquet":
        unit, batches = "row", parquet_rows(path, text_key)
    elif ".jsonl" in path.suffixes:
        unit, batches = "line", json_lines(path, text_key)
    else:
        unit, batches = "document", text_blocks(path)
    number = 1
    try:
        for texts, progress in batches:
            yield Batch(texts, progress, path, unit, number)
            number += len(texts)
    except (OSError, ValueError, NotImplementedError) as error:  # cut short, or another format
        raise ValueError(f"{path}: {error}") from None


def parquet_rows(path, text_key):
    table = extra("pyarrow.parquet").ParquetFile(path)
    schema = table.schema_arrow
    if text_key not in schema.names:
        raise ValueError(f"no column '{text_key}' (--text_key) among {', '.join(schema.names)}")
    kind = str(schema.field(text_key).type)
    if not kind.startswith(("string", "large_string", "dictionary<values=string")):
        raise ValueError(f"the column '{text_key}' holds {kind}, not text (--text_key)")
    size, n = path.stat().st_size, table.metadata.num_rows
    for rows in table.iter_batches(batch_size=256, columns=[text_key]):
        yield rows.column(0).to_pylist(), size * len(rows) // n


def json_lines(path, text_key):
    with open(path, "rb") as f:
        lines, texts, size, at, number = f, [], 0, 0, 0
        if path.suffix == ".zst":  # pyarrow's stream notices a file that is cut short
            stream = extra("pyarrow").input_stream(f, compression="zstd")
            lines = io.BufferedReader(stream, BATCH)
        while line := lines.readline(LINE):
            number, size = number + 1, size + len(line)
            texts.append(json_text(line, number, text_key))
            if size > BATCH:
                yield texts, f.tell() - at
                texts, size, at = [], 0, f.tell()
        yield texts, f.tell() - at


def json_text(line, number, text_key):
    if len(line) == LINE:  # compressed, a small file may hold gigabytes of it
        raise ValueError(f"line {number}: longer than {LINE >> 20} MiB")
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
            if path.suffix != ".py":  # some of a package's are in old encodings, on purpose
                problem = f"not UTF-8 ({error.reason})"
                raise ValueError(f"{problem}: convert it or leave it out") from None


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


def is_validation(text, fraction):
    """By a hash of the text: the same on every machine, in every order, for every copy of it."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


# ---- how much there is


def estimate(files, tokenizer, workers, config):
    """--dry_run: print what the work would read, write and take."""
    # bytes of text in one byte of FineWeb's and the Pile's files
    unpack = {".parquet": 1.7, ".zst": 1.9, ".bin": 2.2}
    size = sum(file.size for file in files)
    text = sum(file.size * unpack.get(Path(file.name).suffix, 1.0) for file in files)
    sample, begin = Path(__file__).read_text() * 20, time.perf_counter()
    tokens = text * len(tokenizer.encode_array(sample)) / len(sample)
    seconds = text * (time.perf_counter() - begin) / len(sample) / workers
    share = min(1.0, (config.max_tokens or math.inf) / tokens)
    human = lambda n: tqdm.format_sizeof(n, divisor=1000)
    clock = tqdm.format_interval
    print(f"{len(files)} files of {human(size)}B, about {human(tokens)} {tokenizer.name} tokens")
    if share < 1:
        print(f"--max_tokens={config.max_tokens} needs {share:.1%} of them")
    if files[0].repo:
        print(f"download  {human(size * share)}B, at 100 Mbit/s {clock(size * share / 12.5e6)}")
    if not files[0].name.endswith(".bin"):
        took = f"on {workers} cores {clock(seconds * share)}"
        print(f"tokenize  {human(text * share)}B of text, {took}")
    print(f"write     {human(2 * tokens * share)}B")
