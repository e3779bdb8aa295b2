"""The shard format (llm.c's and modded-nanogpt's), and the reader that training batches come from.

A shard is 256 little-endian int32 (20240520, 1, token count, zeros), then uint16 tokens.
"""

import functools
import hashlib
import os
from pathlib import Path

import numpy as np

from support.files import write_atomically
from support.folders import is_shard, load_meta, making_of, shard_paths

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4


def write_shard(path, tokens):
    """tokens: fewer than 2**31 integers < 2**16. -> {"tokens": count, "sha256": of the file}"""
    header = np.zeros(256, "<i4")
    header[:3] = MAGIC, VERSION, len(tokens)
    data = header.tobytes(), np.ascontiguousarray(tokens, "<u2").data
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


def count_tokens(f):
    """The token count of an open shard; a ValueError names a file that is not a whole one."""
    header, size = f.read(HEADER_BYTES), os.fstat(f.fileno()).st_size
    if len(header) < HEADER_BYTES:
        raise ValueError(f"{f.name}: truncated, its {size} bytes are less than a shard's header")
    magic, version, count = np.frombuffer(header, "<i4")[:3].tolist()
    if (magic, version) != (MAGIC, VERSION):
        problem = f"starts with {magic}, {version}; expected {MAGIC}, {VERSION}"
        raise ValueError(f"{f.name}: not a token shard ({problem})")
    if size != HEADER_BYTES + 2 * count:
        found = (size - HEADER_BYTES) / 2
        state = "truncated" if found < count else "damaged"
        raise ValueError(
            f"{f.name}: {state}, {count} tokens in its header, {found:.15g} in the file"
        )
    return count


def shard_length(path):
    if Path(path).exists() and not Path(path).is_file():  # to open a pipe would wait
        raise ValueError(f"{path}: not a file, as a shard has to be")
    with open(path, "rb") as f:
        return count_tokens(f)


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
    name (a memory map would be a SIGBUS).
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
        for path, count in zip(self.paths, self.counts):
            expected = listed.get(path.name, {"tokens": count})["tokens"]
            if count != expected:
                raise ValueError(f"{path}: {count} tokens, and {expected} in meta.json")
        windows = [max(0, count - 1) // block_size for count in self.counts]
        self.windows = np.array(windows)  # (shards,)
        self.n_tokens, self.n_windows = sum(self.counts), int(self.windows.sum())
        if not self.n_windows:
            window = f"no window of block_size + 1 = {block_size + 1}"
            raise ValueError(f"{folder}: {self.n_tokens} {split} tokens hold {window}")

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
            with open(path, "rb") as f:
                if count_tokens(f) != self.counts[shard]:
                    raise ValueError(f"{path}: changed while it was in use")
                for row, window in zip(out, windows.tolist()):
                    start = HEADER_BYTES + 2 * window * self.block_size
                    data = os.pread(f.fileno(), 2 * width, start)
                    row[:] = np.frombuffer(data, "<u2", width)
        except FileNotFoundError:
            raise ValueError(f"{path}: vanished while it was in use") from None
        if self.vocab_size is not None and out.max() >= self.vocab_size:
            beyond = f"beyond the vocabulary of {self.vocab_size}"
            raise ValueError(f"{path}: token id {out.max()} is {beyond}")
