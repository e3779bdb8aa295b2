"""One atomic writer and one lock, for everything that is written."""

import contextlib
import fcntl
import os
from pathlib import Path


def write_atomically(path, write):
    """Call write(f) on a temporary file beside `path`, then rename it: whole, or as it was before.

    OSError names the path; nothing is left behind, and a link is replaced, never followed.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.unlink(missing_ok=True)  # left by a kill, or a link to somewhere else
        with open(temporary, "xb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        full = is_full(path.parent)
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError)):  # torch hides a full disk in the latter
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            if full and not isinstance(error, OSError):
                reason = "no space left on the disk"
            raise OSError(f"{path} cannot be written: {reason}") from error
        raise


def keep_previous(path, name):
    """Before `path` is replaced: what is there now stays as `name` beside it, at no time missing.
    Where a disk has no links, there is none to keep."""
    with contextlib.suppress(OSError):
        link = path.with_name(name + ".tmp")
        link.unlink(missing_ok=True)
        os.link(path, link)
        os.replace(link, path.with_name(name))


def is_full(folder):
    with contextlib.suppress(OSError):
        disk = os.statvfs(folder)
        return disk.f_bavail * disk.f_frsize < 2**20
    return False


def sync_folder(folder):
    """A rename has to reach the disk as well."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_locked(descriptor):
    """True if another process has it; else it is locked now. Some network disks have no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


@contextlib.contextmanager
def lock(folder, option="out_dir"):
    """One process at a time in `folder` (made if need be); BlockingIOError for the second names
    the option that takes another one.

    The lock is the folder's own, so it leaves no file, and ends with the process however that ends.
    """
    made = not os.path.isdir(folder)
    try:
        os.makedirs(folder, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise OSError(f"{folder} cannot be written: {error.strerror}") from error
    try:
        if not os.access(folder, os.W_OK):
            raise OSError(f"{folder} cannot be written: it is read-only, or another user's")
        if is_locked(descriptor):
            raise BlockingIOError(f"{folder} is in use by another process: wait for it, or name "
                                  f"another folder with --{option}")
        yield
    finally:
        os.close(descriptor)
        if made:
            with contextlib.suppress(OSError):  # not empty any more
                os.rmdir(folder)
