"""Tokenizers: bytes, GPT-2's BPE, or any .tiktoken rank file."""

import base64
import functools
import hashlib
import lzma
from pathlib import Path

import numpy as np
import tiktoken

GPT2 = Path(__file__).with_name("gpt2_vocabulary.xz")  # its tokens by rank, a base64 line each
# how GPT-2 splits text
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
RUN = 100_000  # characters of whitespace; tiktoken gives up on some 500,000 of them in a row


class Tokenizer:
    """A tiktoken.Encoding whose ids are 0..vocab_size - 1, the end of text (`eot`) among them."""

    def __init__(self, name, encoding, sha256=None):
        self.name, self.encoding = name, encoding
        self.sha256 = sha256  # of its rank file; None for bytes and gpt2, which never change
        self.vocab_size, self.eot = encoding.n_vocab, encoding.eot_token

    def encode_array(self, text: str) -> np.ndarray:
        """-> uint16. A special token's text is ordinary text; half a surrogate pair becomes "?"."""
        data = text.encode("utf-8", "replace")
        if self.name == "bytes":
            return np.frombuffer(data, np.uint8).astype(np.uint16)
        encode = functools.partial(self.encoding.encode_to_numpy, disallowed_special=())
        return np.concatenate([*map(encode, cut_whitespace(data.decode()))]).astype(np.uint16)

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def decode_bytes(self, tokens):
        """An id beyond the vocabulary (a model's may be padded) becomes U+FFFD."""
        one, unknown = self.encoding.decode_single_token_bytes, "\ufffd".encode()
        return b"".join(one(token) if token < self.vocab_size else unknown for token in tokens)

    def decode(self, tokens) -> str:
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")


def cut_whitespace(text):
    """Pieces of a text, cut in the midst of each long run of whitespace and nowhere else."""
    start = 0
    for end in range(RUN, len(text), RUN):
        if text[end - RUN : end].isspace():
            yield text[start : end - RUN // 2]
            start = end - RUN // 2
    yield text[start:]


def get_tokenizer(spec: str, sha256: str | None = None) -> Tokenizer:
    """spec: "bytes" (257 ids), "gpt2" (50257), or the path of a .tiktoken rank file.

    sha256: what that file must have, as meta.json keeps it. ValueError for all that is wrong.
    """
    ranks, digest = {bytes([i]): i for i in range(256)}, None
    if spec not in ("bytes", "gpt2"):
        ranks, digest = read_ranks(Path(spec))
    if sha256 not in (None, digest):
        raise ValueError(f"{spec}: not the tokenizer that the data was made with (SHA-256)")
    if spec == "gpt2":
        return Tokenizer(spec, gpt2_encoding())
    eot = {"<|endoftext|>": len(ranks)}
    encoding = tiktoken.Encoding(spec, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=eot)
    return Tokenizer(spec, encoding, digest)


@functools.cache
def gpt2_encoding():
    """GPT-2's own ids, without a download."""
    lines = lzma.decompress(GPT2.read_bytes()).split()
    ranks = {base64.b64decode(line): rank for rank, line in enumerate(lines)}
    eot = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=eot)


def read_ranks(path):
    """A .tiktoken file: a line for each token, in base64, and its rank. -> {bytes: int}, SHA-256"""
    if path.suffix != ".tiktoken" or not path.is_file():
        raise ValueError(f"no tokenizer '{path}': bytes, gpt2, or the path of a .tiktoken file")
    data = path.read_bytes()
    try:
        rows = [line.split() for line in data.splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
    except ValueError as error:
        raise ValueError(f"{path}: not a .tiktoken rank file ({error})") from None
    whole = sorted(ranks.values()) == list(range(len(rows)))
    if not whole or any(bytes([i]) not in ranks for i in range(256)):
        raise ValueError(f"{path}: needs all 256 single bytes, and ranks 0 to n - 1, once each")
    if len(ranks) >= 2**16:
        raise ValueError(f"{path}: {len(ranks) + 1} ids are too many, shards hold uint16")
    return ranks, hashlib.sha256(data).hexdigest()
