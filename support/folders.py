"""A folder of shards: its meta.json, its names, and the lock under which it is made."""

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
from pathlib import Path

from support.files import is_locked

# what prepare_data.py knows by name
SOURCES = ("stdlib", "packages", "fineweb", "fineweb-edu", "pile", "pretokenized")
COPIES = ("tokenizer.tiktoken", "tokenizer.json")  # of a tokenizer, in the folder of its tokens
NANOGPT = ("train.bin", "val.bin")  # its two files: uint16 tokens, without a header
LOCK = "prepare_data.lock"  # locked while at work; where it is missing, nothing is deleted
KINDS = {  # of the values in meta.json; a folder made by other means needs the first two only
    "tokenizer": str,
    "vocab_size": int,
    "tokenizer_sha256": str,
    "source": str,
    "train_tokens": int,
    "val_tokens": int,
    "documents": int,
    "shards": dict,  # file name -> {"tokens": count, "sha256": of the file}
    "settings": dict,
}


def load_meta(folder):
    """meta.json of a prepared folder. -> dict; FileNotFoundError and ValueError name the way out.

    A folder without one that holds llm.c's fineweb_train_*.bin or nanoGPT's two files is taken for
    GPT-2's tokens.
    """
    folder = Path(folder)
    try:
        meta = check_meta(read_json(folder / "meta.json"))
        if "tokenizer_sha256" in meta:  # found from any working folder
            meta["tokenizer"] = str(folder.resolve() / meta["tokenizer"])
        name = Path(meta["tokenizer"])
        known = name.suffix in (".tiktoken", ".json") and name.is_file()
        expected = meta.get("tokenizer_sha256")
        if known and expected and hashlib.sha256(name.read_bytes()).hexdigest() != expected:
            raise ValueError(f"{name} is not the tokenizer that the data was made with: SHA-256")
        if not known and str(name) not in ("bytes", "gpt2"):
            raise ValueError(f"tokenizer {str(name)!r:.80} is neither bytes nor gpt2, nor a file")
        return meta
    except (FileNotFoundError, NotADirectoryError):
        others = any(not path.name.startswith("train_") for path in shard_paths(folder, "train"))
        if others and not (folder / "meta.pkl").exists():  # nanoGPT's characters, by a pickle
            return {"tokenizer": "gpt2", "vocab_size": 50257}
        raise FileNotFoundError(f"no data in '{folder}': {making_of(folder)}") from None
    except ValueError as error:
        path = folder / "meta.json"
        raise ValueError(f"{path}: damaged ({error}); {making_of(folder)} --overwrite") from None


def read_json(path):
    """-> dict; a ValueError if the file holds anything else."""
    if path.exists() and not path.is_file():  # to open a pipe would wait for ever
        raise ValueError("not a file")
    try:
        value = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"holds a {type(value).__name__}, not an object")
    return value


def check_meta(meta):
    for key, kind in KINDS.items():
        if (key in meta or key in ("tokenizer", "vocab_size")) and type(meta.get(key)) is not kind:
            raise ValueError(f"{key} is {meta.get(key)!r:.40}, not {kind.__name__}")
    for key in ("train_tokens", "val_tokens", "documents"):
        if meta.get(key, 0) < 0:
            raise ValueError(f"{key} is {meta[key]}")
    if not 0 < meta["vocab_size"] <= 2**24:
        raise ValueError(f"vocab_size is {meta['vocab_size']}")
    for name, shard in meta.get("shards", {}).items():
        check_entry(name, shard)
    return meta


def check_entry(name, shard):
    """An entry of meta.json or state.json: the name of a file beside it, its tokens and SHA-256."""
    good = is_shard(name, "train|val") and isinstance(shard, dict)
    if not good or (type(shard.get("tokens")), type(shard.get("sha256"))) != (int, str):
        raise ValueError(f"no shard: {name!r:.40}: {shard!r:.40}")


def making_of(folder):
    """The command that makes `folder`, as far as its name tells."""
    texts = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if texts and not (folder / "meta.json").exists() and not list(folder.glob("*.bin")):
        name = shlex.quote(f"data/{folder.resolve().name.partition('.')[0]}")
        command = f"python prepare_data.py {shlex.quote(str(folder))} --out_dir={name}"
        return f"it holds no token shards, run: {command} and use --dataset={name}"
    source, _, tokenizer = folder.name.partition("_")
    source, tokenizer = source if source in SOURCES else "stdlib", "gpt2" * (tokenizer == "gpt2")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # what it was made from
        settings = read_json(folder / "meta.json")["settings"]
        source, tokenizer = shlex.join(settings["sources"]), settings["tokenizer"]
    options = f" --tokenizer={tokenizer}" if tokenizer not in ("", "bytes") else ""
    state = "its preparation has not finished, " if beside(folder, "unfinished").is_dir() else ""
    options += f" --out_dir={shlex.quote(str(folder))}"
    return f"{state}run: python prepare_data.py {source}{options}"


def shard_paths(folder, split):
    """train_000000.bin, ..., or as others name them: fineweb_train_000001.bin, ..."""
    return sorted(path for path in Path(folder).glob("*.bin") if is_shard(path.name, split))


def is_shard(name, split):
    return re.fullmatch(rf"([\w.-]+_)?({split})_\d+\.bin|({split})\.bin", name) is not None


# ---- one process at a time, and nobody else's files


@contextlib.contextmanager
def locked(work):
    """A folder in the making, for one process at a time."""
    work.mkdir(parents=True, exist_ok=True)
    check_ours(work)
    with open(work / LOCK, "a") as f:
        alone = not is_locked(f.fileno())
        with contextlib.suppress(FileNotFoundError):
            # the folder may have got its name since: then this lock is no longer the one of `work`
            alone = alone and os.path.samestat(os.fstat(f.fileno()), os.stat(work / LOCK))
        if not alone:
            raise ValueError(f"{work}: another preparation is at work there")
        (work / "meta.json").unlink(missing_ok=True)  # of a run that was killed at its very end
        yield


def check_ours(folder, markers=(LOCK,)):
    """A ValueError if there is such a folder, and something in it that is not our work."""
    if not os.path.lexists(folder):
        return
    paths = list(folder.iterdir()) if folder.is_dir() else [folder]
    names = {path.name.removesuffix(".tmp") for path in paths}
    links = any(path.is_symlink() for path in paths)
    try:
        listed = set(load_meta(folder)["shards"])
    except (OSError, ValueError, KeyError):  # in the making, or damaged
        listed = {name for name in names if re.fullmatch(r"(\w+_)?(train|val)_\d{6}\.bin", name)}
    known = {LOCK, "meta.json", "state.json", *COPIES}
    foreign = names - listed - (known | {"raw"} if "meta.json" not in names else known)
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
    aside = beside(out_dir, "replaced")
    if out_dir.exists():
        discard(aside)
        os.rename(out_dir, aside)
    os.rename(work, out_dir)
    (out_dir / "state.json").unlink()
    discard(aside)


def beside(folder, state):
    return folder.with_name(f"{folder.name}.{state}")
