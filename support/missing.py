"""For train.py: data that is missing, and whose name is a source's, is made first."""
from pathlib import Path

from support import folders
from support.folders import load_meta
from support.sources import HUB, Unreachable, knock, list_files

FIRST = 100_000_000  # training tokens that train.py begins with: one ready-made shard of FineWeb
ENOUGH = 20_000_000  # training tokens for which packages is taken rather than stdlib


def make_missing(folder: str, allowed: bool = True, say=print) -> str:
    """`folder`, made first if it is missing and its name is a source's. -> the folder to train on

    data/fineweb begins with ready-made shards. Where the hub cannot be reached, Python sources of
    this machine take its place, in another folder, named after what it holds. FileNotFoundError
    for other names, and for all if not allowed.
    """
    path = Path(folder)
    source, _, tokenizer = path.name.partition("_")
    try:
        load_meta(path)
        return folder
    except FileNotFoundError as error:
        known = source in folders.SOURCES and tokenizer in ("", "gpt2")
        if not known or (path.is_dir() and any(path.iterdir())):
            raise
        if not allowed:
            raise FileNotFoundError(f"{error}; {routes(path)}") from None
    if source not in HUB:
        return make_first(source, tokenizer or "bytes", path, say)
    try:
        knock()
        return make_first("pretokenized" if source == "fineweb" else source, "gpt2", path, say)
    except Unreachable as error:
        reason = str(error).split(" (")[0]  # without the hub's own words
        say(f"{folder} cannot be had: {reason}. Going on with Python source of this machine, "
            "another text: its losses compare to nothing published")
    source = "packages" if tokens_at_hand("packages") >= ENOUGH else "stdlib"
    return make_missing(str(path.with_name(f"{source}_gpt2")), allowed, say)


def make_first(source, spec, path, say):
    """Up to FIRST training tokens of a source. -> the folder"""
    what = {
        "pretokenized": "FineWeb's first 100M GPT-2 tokens and its validation shard, 400 MB",
        "stdlib": "the source of Python's standard library",
        "packages": "the source of the installed packages",
    }
    # all of stdlib, as `prepare_data.py stdlib` makes it: the same settings are the same folder
    limit = FIRST if source in HUB else {"packages": ENOUGH}.get(source)
    most = f", at most {limit / 1e6:.0f}M tokens" if limit and source != "pretokenized" else ""
    say(f"preparing {path}: {what.get(source, f'{source}, from the hub')}{most} ({spec})")
    from prepare_data import DataConfig, prepare  # lazily: it stands above this file
    config = DataConfig(out_dir=str(path), tokenizer=spec, max_tokens=limit)
    _, meta = prepare([source], config)
    say(f"{path}: {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation tokens")
    option = "" if source in HUB else f" --tokenizer={spec}"
    if limit:
        say(f"all of it: python prepare_data.py {source}{option} --out_dir={path} --overwrite")
    return str(path)


def tokens_at_hand(source):
    """About how many tokens of GPT-2's the files of a local source hold."""
    try:
        return sum(file.size for file in list_files(source)) / 3
    except ValueError:  # none
        return 0


def routes(path):
    """Ways to data, for who wants train.py to make none by itself."""
    first = f"python prepare_data.py pretokenized --max_tokens={FIRST} --out_dir={path}"
    local = "python prepare_data.py packages --tokenizer=gpt2 and --dataset=data/packages_gpt2"
    quick = f"ready-made, 400 MB: {first}; " if path.name == "fineweb" else ""
    alone = "train.py makes a first part by itself in one process, without --download=never"
    return f"{quick}without a network: {local}; {alone}"
