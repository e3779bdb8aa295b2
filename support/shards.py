"""Folders of tokens as files: llm.c's and modded-nanogpt's shards, nanoGPT's train.bin and val.bin,
and the reader that training batches come from.

A shard is 256 little-endian int32 (magic number, version, token count, zeros), then the tokens:
uint16, or uint32 where 65,536 ids do not do. nanoGPT's files are uint16 tokens and nothing else.
"""

import functools
import hashlib
import os
from pathlib import Path

import numpy as np

from support.files import write_atomically
from support.folders import NANOGPT, is_shard, load_meta, making_of, shard_paths

HEADER_BYTES = 256 * 4
FORMATS = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}  # magic, version: tokens


def write_shard(path, tokens):
    """tokens: fewer than 2**31 integers, uint32 or below 2**16.

    -> {"tokens": count, "sha256": of the file}
    """
    wide = getattr(tokens, "dtype", None) == np.uint32
    (kind, dtype), header = list(FORMATS.items())[wide], np.zeros(256, "<i4")
    header[:3] = *kind, len(tokens)
    data = header.tobytes(), np.ascontiguousarray(tokens, dtype).data
    write_atomically(path, lambda f: f.writelines(data))
    return {"tokens": len(tokens), "sha256": file_sha256(path)}


class ShardWriter:
    """Cuts one split's stream of tokens into shards; holds the tokens of two of them at most."""

    def __init__(self, folder, split, number, shard_tokens):
        self.folder, self.split, self.number = folder, split, number
        self.shard_tokens = shard_tokens
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
            self.pieces = [tokens[self.shard_tokens :]]
            self.waiting = len(self.pieces[0])

    def close(self):
        self.flush()
        return self.shards


def layout(f):
    """What an open file of tokens holds: its dtype, where they begin, and their count.

    A ValueError names a file that is not a whole one.
    """
    size = os.fstat(f.fileno()).st_size
    if Path(f.name).name in NANOGPT:
        if size % 2:
            raise ValueError(f"{f.name}: truncated, {size} bytes are no row of uint16 tokens")
        return FORMATS[20240520, 1], 0, size // 2
    header = f.read(HEADER_BYTES)
    if len(header) < HEADER_BYTES:
        raise ValueError(f"{f.name}: truncated, its {size} bytes are less than a shard's header")
    magic, version, count = np.frombuffer(header, "<i4")[:3].tolist()
    if (magic, version) not in FORMATS:
        expected = " or ".join(f"{magic}, {version}" for magic, version in FORMATS)
        problem = f"starts with {magic}, {version}; expected {expected}"
        raise ValueError(f"{f.name}: not a token shard ({problem})")
    dtype = FORMATS[magic, version]
    if size != HEADER_BYTES + dtype.itemsize * count:
        found = (size - HEADER_BYTES) / dtype.itemsize
        state = "truncated" if found < count else "damaged"
        raise ValueError(
            f"{f.name}: {state}, {count} tokens in its header, {found:.15g} in the file"
        )
    return dtype, HEADER_BYTES, count


def shard_length(path):
    """Its tokens, counted; ValueError for what is no whole shard."""
    path = Path(path)
    if path.exists() and not path.is_file():  # to open a pipe would wait
        raise ValueError(f"{path}: not a file, as a shard has to be")
    try:
        with open(path, "rb") as f:
            return layout(f)[2]
    except FileNotFoundError:
        raise ValueError(f"{path} is gone: {making_of(path.parent)} --overwrite") from None


def read_shard(path):
    """All tokens of a shard."""
    with open(path, "rb") as f:
        dtype, start, _ = layout(f)
        return np.fromfile(path, dtype, offset=start)


def file_sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(2**20):
            digest.update(block)
    return digest.hexdigest()


# ---- reading


@functools.lru_cache(maxsize=8)
def shuffled(n, *key):
    """A permutation of range(n) that depends on `key` only."""
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)  # alike in any numpy
    return raw.argsort(kind="stable")


class ShardReader:
    """Windows of block_size + 1 tokens from the shards of one split of a folder.

    Windows lie at a stride of block_size (the last token of one is the first of the next), and
    none crosses a shard. Nothing is kept open or in memory: each read is checked against the file
    as it is then, so a shard that is deleted or cut short during training is a ValueError with its
    name (a memory map would be a SIGBUS). Before a shard's first window is used, its checksum is
    compared with that in meta.json, if there is one: a tenth of a second for 200 MB.
    """

    def __init__(self, folder, split, block_size, vocab_size=None, seed=0):
        self.folder, self.block_size, self.vocab_size = folder, block_size, vocab_size
        self.seed = seed % 2**64
        listed = load_meta(folder).get("shards", {})
        self.paths = [Path(folder) / name for name in sorted(listed) if is_shard(name, split)]
        self.paths = self.paths or shard_paths(folder, split)
        if not self.paths:
            way_out = f"{making_of(Path(folder))} --overwrite"
            raise FileNotFoundError(f"no {split} shards in {folder}: {way_out}")
        self.counts = [shard_length(path) for path in self.paths]
        self.sha256 = {}  # of the shards that are still to be verified
        for path, count in zip(self.paths, self.counts):
            expected = listed.get(path.name, {"tokens": count, "sha256": None})
            if count != expected["tokens"]:
                raise ValueError(f"{path}: {count} tokens, and {expected['tokens']} in meta.json")
            self.sha256[path] = expected["sha256"]
        windows = [max(0, count - 1) // block_size for count in self.counts]
        self.windows = np.array(windows)  # (shards,)
        self.n_tokens, self.n_windows = sum(self.counts), int(self.windows.sum())
        if not self.n_windows:
            window = f"no window of block_size + 1 = {block_size + 1}"
            raise ValueError(f"{folder}: {self.n_tokens} {split} tokens hold {window}: lower "
                             "--block_size, or prepare more text")

    def batch(self, first, n):
        """Windows first .. first + n - 1 of the shuffled stream. -> (n, block_size + 1) int64

        Position p is in epoch p // n_windows. An epoch is a permutation of all windows (shards
        shuffled, then the windows of each) and a pure function of (seed, epoch): resuming needs
        only the position, and ranks that take disjoint positions share no window of an epoch.
        """
        return self.gather(first, n, shuffled)

    def sequential(self, first, n):
        """Windows first .. first + n - 1 in file order. -> (n, block_size + 1) int64"""
        if first + n > self.n_windows:
            problem = f"windows up to {first + n} asked for, {self.n_windows} there"
            raise ValueError(f"{self.folder}: {problem}")
        return self.gather(first, n, lambda n, *key: np.arange(n))

    def gather(self, first, n, permutation):
        out, done = np.empty((n, self.block_size + 1), np.int64), 0
        while done < n:  # one run of windows from one shard at a time
            epoch, position = divmod(first + done, self.n_windows)
            order = permutation(len(self.paths), self.seed, epoch)
            ends = np.cumsum(self.windows[order])
            turn = int(np.searchsorted(ends, position, side="right"))
            shard, begin = int(order[turn]), position - int(ends[turn - 1] if turn else 0)
            windows = permutation(int(self.windows[shard]), self.seed, epoch, shard)
            windows = windows[begin : begin + n - done]
            self.read(shard, windows, out[done : done + len(windows)])
            done += len(windows)
        return out

    def read(self, shard, windows, out):
        """Fill out (len(windows), block_size + 1) from one shard."""
        path, width = self.paths[shard], self.block_size + 1
        try:
            self.verify(path)
            with open(path, "rb") as f:
                dtype, begin, count = layout(f)
                if count != self.counts[shard]:
                    raise ValueError(f"{path}: changed while it was in use")
                size = dtype.itemsize
                for row, window in zip(out, windows.tolist()):
                    start = begin + size * window * self.block_size
                    row[:] = np.frombuffer(os.pread(f.fileno(), size * width, start), dtype, width)
        except FileNotFoundError:
            raise ValueError(f"{path}: vanished while it was in use") from None
        if self.vocab_size is not None and out.max() >= self.vocab_size:
            beyond = f"beyond the vocabulary of {self.vocab_size}"
            raise ValueError(f"{path}: token id {out.max()} is {beyond}")

    def verify(self, path):
        """Once: is this the file that was written? Folders made by other means do not say."""
        expected = self.sha256.pop(path, None)
        if expected is not None and file_sha256(path) != expected:
            raise ValueError(f"{path} is not what was written there (checksum): "
                             f"{making_of(path.parent)} --overwrite")
