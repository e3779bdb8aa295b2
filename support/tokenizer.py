"""Tokenizers: bytes, GPT-2's BPE, any .tiktoken rank file, or the tokenizer.json of a Hub model."""

import base64
import functools
import hashlib
import lzma
import re
from pathlib import Path

import numpy as np
import tiktoken

from support.usage import optional

GPT2 = Path(__file__).with_name("gpt2_vocabulary.xz")  # its tokens by rank, a base64 line each
# how GPT-2 splits text
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")  # names of the end of text
SPECIMEN = ("def naïve(x):\n    return x ** 2  # 1,234.5\n\n"
            "\tIt's “Straße”, 東京; we'll see… 😀\n")
RUN = 100_000  # characters of whitespace; tiktoken gives up on some 500,000 of them in a row


class Tokenizer:
    """A tiktoken.Encoding whose ids are 0..vocab_size - 1, the end of text (`eot`) among them."""

    copy = "tokenizer.tiktoken"  # name of the copy that travels with the data

    def __init__(self, name, encoding, data=None):
        self.name, self.encoding, self.data = name, encoding, data
        # of its file; None for bytes and gpt2, which never change
        self.sha256 = data and hashlib.sha256(data).hexdigest()
        self.vocab_size, self.eot = encoding.n_vocab, encoding.eot_token

    @property
    def dtype(self):
        """Of the ids in a shard."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode_array(self, text: str) -> np.ndarray:
        """-> ids. A special token's text is ordinary text; half a surrogate pair becomes "?"."""
        data = text.encode("utf-8", "replace")
        if self.name == "bytes":
            return np.frombuffer(data, np.uint8).astype(self.dtype)
        encode = functools.partial(self.encoding.encode_to_numpy, disallowed_special=())
        pieces = map(encode, cut_whitespace(data.decode()))
        return np.concatenate([*pieces]).astype(self.dtype)

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def one(self, token):
        return self.encoding.decode_single_token_bytes(token)

    def decode_bytes(self, tokens):
        """An id beyond the vocabulary (a model's may be padded) becomes U+FFFD."""
        unknown = "\ufffd".encode()
        return b"".join(self.one(t) if t < self.vocab_size else unknown for t in tokens)

    def decode(self, tokens) -> str:
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")


class HubTokenizer(Tokenizer):
    """A tokenizer.json, as models of Hugging Face have it, read by their library `tokenizers`."""

    copy = "tokenizer.json"

    def __init__(self, name, data):
        tokenizers = optional("tokenizers", "hf", ValueError)
        try:
            self.encoding = encoding = tokenizers.Tokenizer.from_buffer(data)
        except Exception as error:  # it raises nothing narrower
            raise ValueError(f"{name}: not a tokenizer.json ({error})") from None
        encoding.no_padding()
        encoding.no_truncation()
        encoding.encode_special_tokens = True  # as ordinary text
        ids = encoding.get_vocab(with_added_tokens=True)
        ends = [ids[word] for word in ENDS if word in ids]
        if not ends:
            raise ValueError(f"{name}: no end of text among its tokens ({', '.join(ENDS)})")
        self.name, self.data, self.sha256 = name, data, hashlib.sha256(data).hexdigest()
        self.vocab_size, self.eot = max(ids.values()) + 1, ends[0]
        self.letters = printable_bytes() if "ByteLevel" in str(encoding.decoder) else None

    def encode_array(self, text):
        text = text.encode("utf-8", "replace").decode()
        ids = self.encoding.encode(text, add_special_tokens=False).ids
        return np.array(ids, self.dtype)

    def one(self, token):
        """Byte-level BPE spells bytes by letters; SentencePiece has a sign for the space."""
        piece = self.encoding.id_to_token(token) or ""
        if self.letters and all(letter in self.letters for letter in piece):
            return bytes(self.letters[letter] for letter in piece)
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", piece)
        return bytes.fromhex(byte[1]) if byte else piece.replace("\u2581", " ").encode()


def printable_bytes():
    """GPT-2's spelling: printable bytes stand for themselves, the others for letters from 256 on.
    -> {letter: byte}"""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def alike(one, other):
    """Whether two tokenizers read a text, with something for all of their rules, alike."""
    return one.encode(SPECIMEN) == other.encode(SPECIMEN)


def cut_whitespace(text):
    """Pieces of a text, cut in the midst of each long run of whitespace and nowhere else."""
    start = 0
    for end in range(RUN, len(text), RUN):
        if text[end - RUN : end].isspace():
            yield text[start : end - RUN // 2]
            start = end - RUN // 2
    yield text[start:]


def get_tokenizer(spec: str) -> Tokenizer:
    """spec: bytes (257 ids), gpt2 (50257), the path of a .tiktoken or tokenizer.json, or hf:NAME.
    ValueError for all that is wrong."""
    if spec == "gpt2":
        return Tokenizer(spec, gpt2_encoding())
    ranks, data, path = {bytes([i]): i for i in range(256)}, None, Path(spec)
    if spec.startswith("hf:"):
        return HubTokenizer(spec, tokenizer_json(spec[3:]))
    if spec != "bytes":
        if path.suffix not in (".tiktoken", ".json") or not path.is_file():
            raise ValueError(f"no tokenizer '{spec}': bytes, gpt2, hf:NAME_OR_DIR, or the path of "
                             "a .tiktoken or tokenizer.json file")
        data = path.read_bytes()
    if path.suffix == ".json":
        return HubTokenizer(spec, data)
    ranks = ranks if data is None else read_ranks(path, data)
    eot = {"<|endoftext|>": len(ranks)}
    encoding = tiktoken.Encoding(spec, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=eot)
    return Tokenizer(spec, encoding, data)


def tokenizer_json(name):
    """The tokenizer.json of a model, by its name on the hub or its folder -> bytes."""
    transformers = optional("transformers", "hf", ValueError)
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        return theirs.backend_tokenizer.to_str().encode()
    except Exception as error:  # no network, no such name, no fast tokenizer: a type for each
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"hf:{name}: no tokenizer that can be read ({reason})") from None


@functools.cache
def gpt2_encoding():
    """GPT-2's own ids, without a download."""
    lines = lzma.decompress(GPT2.read_bytes()).split()
    ranks = {base64.b64decode(line): rank for rank, line in enumerate(lines)}
    eot = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=eot)


def read_ranks(path, data):
    """A .tiktoken file: a line for each token, in base64, and its rank. -> {bytes: int}"""
    try:
        rows = [line.split() for line in data.splitlines() if line.strip()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in rows}
    except ValueError as error:
        raise ValueError(f"{path}: not a .tiktoken rank file ({error})") from None
    whole = sorted(ranks.values()) == list(range(len(rows)))
    if not whole or any(bytes([i]) not in ranks for i in range(256)):
        raise ValueError(f"{path}: needs all 256 single bytes, and ranks 0 to n - 1, once each")
    return ranks
