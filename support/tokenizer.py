"""Tokenizers: bytes, GPT-2's BPE, or any .tiktoken rank file."""

import base64
import functools
import os
from pathlib import Path

import numpy as np
import tiktoken

VOCABULARY = Path(__file__).resolve().parent.parent / ".cache" / "tiktoken"  # GPT-2's, for machines without a network

class Tokenizer:
    """A tiktoken.Encoding whose ids are 0..vocab_size - 1, the end of text (`eot`) among them."""

    def __init__(self, name, encoding):
        self.name, self.encoding = name, encoding
        self.vocab_size, self.eot = encoding.n_vocab, encoding.eot_token

    def encode_array(self, text):
        """text -> uint16 array. The text of a special token is ordinary text; half a surrogate pair becomes "?"."""
        data = text.encode("utf-8", "replace")
        if self.name == "bytes":
            return np.frombuffer(data, np.uint8).astype(np.uint16)
        return self.encoding.encode_to_numpy(data.decode(), disallowed_special=()).astype(np.uint16)

    def encode(self, text):
        return self.encode_array(text).tolist()

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]

    def decode_bytes(self, tokens):
        """An id beyond the vocabulary (a model's may be padded) becomes U+FFFD."""
        one = self.encoding.decode_single_token_bytes
        return b"".join(one(token) if token < self.vocab_size else "\ufffd".encode() for token in tokens)

    def decode(self, tokens):
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")


@functools.lru_cache
def get_tokenizer(spec):
    """spec: "bytes" (257 ids), "gpt2" (50257), or the path of a .tiktoken rank file. -> Tokenizer; ValueError."""
    if spec == "gpt2":
        if VOCABULARY.is_dir():
            os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(VOCABULARY))
        try:
            return Tokenizer(spec, tiktoken.get_encoding("gpt2"))
        except Exception as error:  # tiktoken downloads the vocabulary on first use: whatever the network throws
            raise ValueError(
                f"GPT-2's vocabulary is not here and cannot be downloaded ({type(error).__name__}): run once where "
                f"there is a network with TIKTOKEN_CACHE_DIR={VOCABULARY} and copy that folder, or use --tokenizer=bytes"
            ) from None
    ranks = {bytes([i]): i for i in range(256)} if spec == "bytes" else read_ranks(Path(spec))
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # how GPT-2 splits text
    special = {"<|endoftext|>": len(ranks)}
    return Tokenizer(spec, tiktoken.Encoding(spec, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special))


def read_ranks(path):
    """The ranks of a .tiktoken file: one line a token, in base64, and its rank. -> {bytes: int}"""
    if path.suffix != ".tiktoken" or not path.is_file():
        raise ValueError(f"no tokenizer '{path}': bytes, gpt2, or the path of a .tiktoken rank file")
    try:
        rows = [line.split() for line in path.read_bytes().splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
    except ValueError as error:
        raise ValueError(f"{path}: not a .tiktoken rank file ({error})") from None
    if any(bytes([i]) not in ranks for i in range(256)) or sorted(ranks.values()) != list(range(len(rows))):
        raise ValueError(f"{path}: needs all 256 single bytes among its tokens, and ranks 0 to n - 1, once each")
    if len(ranks) >= 2**16:
        raise ValueError(f"{path}: {len(ranks) + 1} ids are too many, shards hold uint16")
    return ranks
