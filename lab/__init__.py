"""Bench, reproduction, zero-shot evaluation: run as `python -m lab.reproduce`."""
import os
import tempfile
from pathlib import Path


def write_atomically(path, write):
    """write(file) into a temporary file that then takes the place of `path`: never half a file."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            write(f)
            os.fchmod(f.fileno(), 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
