"""Folders of shards: one process at a time makes one, and nobody else's files are touched."""

import contextlib
import fcntl
import os
import re
import shutil

from support.shards import RANKS, load_meta

LOCK = "prepare_data.lock"  # locked while at work; where it is missing, nothing is deleted


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
    foreign = names - listed - {LOCK, "meta.json", "state.json", RANKS, "raw"}
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
