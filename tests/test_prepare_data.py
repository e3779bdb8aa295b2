"""prepare_data.py: tokenizers, the shard format, the reader, sources, kills, the hub."""

import base64
import collections
import hashlib
import inspect
import io
import json
import os
import resource
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
import zstandard
from data_helpers import ROOT, HubServer, run_script
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public
from train_helpers import refused

import prepare_data
import support.tokenizer as tokenizer_module
from prepare_data import DataConfig, prepare
from support.folders import discard
from support.shards import ShardReader, load_meta, write_shard
from support.sources import is_validation, split_text, text_blocks
from support.tokenizer import get_tokenizer

TEXTS = ["one\r\ntwo", "naïve café", "日本語 🙂", "\tdef f():\n        return 1\n", "<|endoftext|>",
         "x" * 5000, " ", "\x00"]
BYTES, GPT2 = get_tokenizer("bytes"), get_tokenizer("gpt2")
FILES = ["meta.json", "prepare_data.lock", "train_000000.bin", "val_000000.bin"]
DOCUMENTS = [f"{i}: {text}" for i in range(40) for text in TEXTS]
SINGLE = {bytes([i]): i for i in range(256)}  # ranks of a tokenizer
RANKS = SINGLE | {b"he": 256}


def jsonl(documents, key="text"):
    """One JSON object a line, every other one with its characters escaped."""
    lines = [json.dumps({key: text, "n": 1}, ensure_ascii=i % 2 == 0)
             for i, text in enumerate(documents)]
    return "".join(line + "\n" for line in lines).encode()


def parquet(documents, key="text", **options):
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"id": list(range(len(documents))), key: documents}),
                                out, **options)
    return out.getvalue()


def header(magic=20240520, version=1, count=100):
    """Of a shard: the layout of llm.c, written out by hand."""
    return struct.pack("<256i", magic, version, count, *[0] * 253)


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def make(source, out_dir, **options):
    """prepare() in this process. -> meta"""
    return prepare([str(source)], DataConfig(out_dir=str(out_dir), **options))[1]


def tokens_of(folder, split):
    """All tokens of a split, read without any of prepare_data's code."""
    paths = sorted(Path(folder).glob(f"*{split}_*.bin"))
    return np.concatenate([np.frombuffer(path.read_bytes()[1024:], "<u2") for path in paths]
                          or [np.empty(0, "<u2")])


def documents_of(folder, split, tokenizer=BYTES):
    """The texts of a split: what lies between the end-of-text tokens, decoded."""
    tokens = tokens_of(folder, split)
    starts = [*np.flatnonzero(tokens == tokenizer.eot).tolist(), len(tokens)]
    return [tokenizer.decode(tokens[a + 1 : b].tolist()) for a, b in zip(starts, starts[1:])]


def all_documents(folder):
    return [text for split in ("train", "val") for text in documents_of(folder, split)]


def assert_same_tokens(left, right):
    for split in ("train", "val"):
        assert np.array_equal(tokens_of(left, split), tokens_of(right, split))


def snapshot(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@pytest.fixture
def out(tmp_path):
    """Where the shards go; not made yet."""
    return tmp_path / "out"


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "a.jsonl", jsonl(DOCUMENTS))


# ---- 1. tokenizers

@given(st.text())
@example("\ud800 half a pair")
@example("")
@example("a special token's text is text: <|endoftext|>")
def test_bytes_round_trip(text):
    valid = text.encode("utf-8", "replace")
    assert BYTES.encode(text) == list(valid)
    assert BYTES.decode_bytes(list(valid)) == valid


def test_bytes_tokenizer():
    assert (BYTES.name, BYTES.vocab_size, BYTES.eot) == ("bytes", 257, 256)
    assert BYTES.decode([0xC3]) == "\ufffd"  # half a character
    assert BYTES.decode([97, 256, 98]) == "a<|endoftext|>b"
    assert BYTES.decode([97, 300]) == "a\ufffd"  # a model's vocabulary may be padded


def test_gpt2(tmp_path, monkeypatch):
    """On a machine without a network and without tiktoken's cache: the ids of tiktoken's own."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    gpt2 = get_tokenizer("gpt2")
    assert (gpt2.name, gpt2.vocab_size, gpt2.eot) == ("gpt2", 50257, 50256)
    # tiktoken has a SHA-256 of the file of ranks that it would download
    ranks = gpt2.encoding._mergeable_ranks
    file = Path(rank_file(tmp_path / "r50k_base.tiktoken", ranks))
    assert hashlib.sha256(file.read_bytes()).hexdigest() in inspect.getsource(openai_public)
    reference = tiktoken.Encoding(
        "gpt2", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    for text in [*TEXTS, Path(__file__).read_text()]:
        assert gpt2.encode(text) == reference.encode_ordinary(text)
        assert gpt2.decode(gpt2.encode(text)) == text
    assert gpt2.decode([15496, 50300, 50256]) == "Hello\ufffd<|endoftext|>"
    assert not (tmp_path / "empty").exists()


RUNS = [" " * 10**6, " " * 999_987, " " * 10**6 + "x", "\n" * 10**6 + "x",
        "x" + " \t" * 10**6 + "x", "\u3000" * 10**6 + "x",
        *("a" + " " * n + "b" + "\n" * n + "c" for n in (10, 1000, 99_999, 199_000, 400_000))]


@pytest.mark.parametrize("text", RUNS, ids=range(len(RUNS)))
def test_long_runs_of_whitespace(tmp_path, text):
    """tiktoken gives up on a million; what stands beside them, and shorter ones, keep tokens."""
    text = "hello world." + text + " hello world"
    for tokenizer in (GPT2, get_tokenizer(rank_file(tmp_path / "small.tiktoken", RANKS))):
        ids = tokenizer.encode(text)
        before, after = tokenizer.encode("hello world."), tokenizer.encode(" hello world")
        assert tokenizer.decode(ids) == text
        assert ids[:len(before)] == before and ids[-len(after):] == after
        if len(text) < 201_000:  # no run of 100,000
            assert ids == tokenizer.encoding.encode_ordinary(text)


@pytest.mark.parametrize("name, content, where", [
    ("a.jsonl", jsonl(["good", "", "BAD one"]), "line 3"),
    ("a.parquet", parquet(["good", None, "BAD one"]), "row 3"),
    ("a.md", b"BAD one", "document 1")])
def test_text_that_the_tokenizer_refuses_is_named(tmp_path, out, monkeypatch, name, content, where):
    encode = tokenizer_module.Tokenizer.encode_array

    def refuse(self, text):
        if "BAD" in text:
            raise ValueError("stack overflow")
        return encode(self, text)

    monkeypatch.setattr(tokenizer_module.Tokenizer, "encode_array", refuse)
    with pytest.raises(ValueError, match=rf"{name}: {where}: stack overflow"):
        make(write(tmp_path / name, content), out)


def rank_file(path, ranks):
    return write(path, b"".join(base64.b64encode(token) + b" %d\n" % rank
                                for token, rank in ranks.items()))


def test_rank_file(tmp_path):
    ranks = RANKS | {b"ll": 257, b"hell": 258, b" w": 259}
    tokenizer = get_tokenizer(rank_file(tmp_path / "small.tiktoken", ranks))
    assert (tokenizer.vocab_size, tokenizer.eot) == (261, 260)
    assert tokenizer.encode("hello world") == [258, ord("o"), 259, *b"orld"]
    assert tokenizer.decode(tokenizer.encode("hello wörld")) == "hello wörld"


def test_rank_file_travels_with_the_data(tmp_path, monkeypatch):
    """Named by a relative path, found from another folder."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    rank_file(Path("my.tiktoken"), RANKS)
    make(write(Path("a.txt"), "hello"), Path("../out"), tokenizer="my.tiktoken")
    monkeypatch.chdir(tmp_path / "two")
    Path(tmp_path / "one" / "my.tiktoken").rename(tmp_path / "gone")
    meta = load_meta("../out")
    tokenizer = get_tokenizer(meta["tokenizer"])
    assert tokenizer.encode("hello") == [256, *b"llo"]
    assert Path(meta["tokenizer"]).is_absolute()


def test_changed_rank_file_is_another_preparation(tmp_path, out):
    source, ranks = write(tmp_path / "a.txt", "hello"), tmp_path / "my.tiktoken"
    make(source, out, tokenizer=rank_file(ranks, RANKS))
    make(source, out, tokenizer=str(ranks))
    rank_file(ranks, SINGLE | {b"lo": 256})
    with pytest.raises(ValueError, match="other settings"):
        make(source, out, tokenizer=str(ranks))
    make(source, out, tokenizer=str(ranks), overwrite=True)
    assert load_meta(out)["tokenizer_sha256"] == hashlib.sha256(ranks.read_bytes()).hexdigest()
    shutil.copy(rank_file(tmp_path / "other.tiktoken", RANKS), out / "tokenizer.tiktoken")
    with pytest.raises(ValueError, match=r"tokenizer\.tiktoken is not the tokenizer that the data"):
        load_meta(out)


BAD_RANKS = [  # content, what the line says
    ({k: v for k, v in SINGLE.items() if v != 7}, "256 single bytes"),
    (SINGLE | {b"ab": 255}, "once each"),  # a rank twice
    (SINGLE | {b"ab": 300}, "once each"),  # a hole
    (b"no rank file\n", "not a .tiktoken rank file"),
    (b"!!! 3\n", "not a .tiktoken rank file"),
    (b"", "256 single bytes")]


@pytest.mark.parametrize("content, line", BAD_RANKS, ids=range(len(BAD_RANKS)))
def test_bad_rank_file(tmp_path, content, line):
    path = tmp_path / "bad.tiktoken"
    write(path, content) if isinstance(content, bytes) else rank_file(path, content)
    with pytest.raises(ValueError, match=line):
        get_tokenizer(str(path))


def test_unknown_tokenizer():
    for spec in ("gpt3", "nowhere.tiktoken", "", __file__):
        with pytest.raises(ValueError, match=r"no tokenizer .*bytes, gpt2"):
            get_tokenizer(spec)


# ---- 2. the shard format

def test_shard_layout(tmp_path):
    """And no temporary file stays."""
    write_shard(tmp_path / "train_000000.bin", np.array([1, 256, 65535]))
    tokens = struct.pack("<3H", 1, 256, 65535)
    assert (tmp_path / "train_000000.bin").read_bytes() == header(count=3) + tokens
    assert [path.name for path in tmp_path.iterdir()] == ["train_000000.bin"]


def shards(folder, *arrays, split="train", meta=True, prefix=""):
    folder.mkdir(exist_ok=True, parents=True)
    for i, tokens in enumerate(arrays):
        write_shard(folder / f"{prefix}{split}_{i:06d}.bin", np.asarray(tokens))
    if meta:
        write(folder / "meta.json", json.dumps({"tokenizer": "bytes", "vocab_size": 257}))
    return folder


BAD_SHARDS = [  # bytes, what the line says
    (b"", "truncated, its 0 bytes"),
    (header()[:1000], "truncated, its 1000 bytes"),
    (header(), "truncated, 100 tokens in its header, 0 in the file"),
    (header() + bytes(199), "truncated, 100 tokens in its header, 99.5 in the file"),
    (header() + bytes(202), "damaged, 100 tokens in its header, 101 in the file"),
    (header(magic=20240801, version=7) + bytes(200), "truncated, 100 tokens in its header, 50 in"),
    (header(magic=20240801) + bytes(400), "not a token shard"),
    (header(version=2) + bytes(200), "not a token shard"),
    (header(count=-1) + bytes(200), "damaged"),
    (header(count=2**31 - 1) + bytes(200), "truncated"),
    (b"PAR1" + bytes(2000), "not a token shard")]


@pytest.mark.parametrize("content, line", BAD_SHARDS, ids=[case[1] for case in BAD_SHARDS])
def test_bad_shard(tmp_path, content, line):
    folder = shards(tmp_path, np.arange(100))
    write(folder / "train_000001.bin", content)
    with pytest.raises(ValueError, match=line) as error:
        ShardReader(folder, "train", 8)
    assert "train_000001.bin" in str(error.value) and "\n" not in str(error.value)


@settings(max_examples=100, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=1100), st.tuples(st.integers(0, 1300), st.binary(max_size=8))))
def test_fuzz_shard(tmp_path, change):
    """Any bytes, or a good shard with some changed or cut: an error that names it, or windows."""
    good = header(count=100) + np.arange(100, dtype="<u2").tobytes()
    if isinstance(change, bytes):
        data = change
    else:
        start, put = change
        data = good[:start] + put + good[start + len(put):]
    write(shards(tmp_path) / "train_000000.bin", data)
    try:
        reader = ShardReader(tmp_path, "train", 9, vocab_size=257)
        assert reader.n_tokens == 100 and reader.batch(0, 11).shape == (11, 10)
    except ValueError as error:
        assert "train" in str(error)


# ---- 3. reading

@pytest.fixture
def reader(tmp_path):
    """Three shards of 41, 8 and 30 tokens, which name their place: 8 + 1 + 5 windows of 5."""
    folder = shards(tmp_path, np.arange(41), 1000 + np.arange(8), 2000 + np.arange(30))
    return ShardReader(folder, "train", 5, seed=7)


STARTS = [*range(0, 40, 5), 1000, *range(2000, 2025, 5)]
EXPECTED = [list(range(start, start + 6)) for start in STARTS]


def test_windows(reader):
    """Stride block_size, one token of overlap (the last target), none across a shard's end."""
    assert (reader.n_tokens, reader.n_windows) == (79, 14)
    assert reader.sequential(0, 14).tolist() == EXPECTED
    assert reader.sequential(7, 3).tolist() == EXPECTED[7:10]  # over two shard ends
    assert reader.sequential(3, 0).shape == (0, 6) and reader.batch(3, 0).shape == (0, 6)
    assert reader.batch(0, 4).dtype == np.int64 and reader.batch(10**15, 3).shape == (3, 6)
    with pytest.raises(ValueError, match="up to 15 asked for, 14 there"):
        reader.sequential(13, 2)


@pytest.mark.parametrize("count, windows", [(0, 0), (1, 0), (5, 0), (6, 1), (10, 1), (11, 2)])
def test_window_count_at_the_edges(tmp_path, count, windows):
    folder = shards(tmp_path, np.zeros(11), np.zeros(count))
    assert ShardReader(folder, "train", 5).n_windows == 2 + windows


def test_order_is_a_function_of_seed_and_position(reader):
    """Any cut of the stream into reads gives the same windows: resuming needs the position only."""
    stream = reader.batch(0, 50).tolist()
    for first in range(0, 50, 3):
        for n in (0, 1, 50 - first):
            assert reader.batch(first, n).tolist() == stream[first : first + n]
    again = ShardReader(reader.folder, "train", 5, seed=7)
    assert again.batch(17, 9).tolist() == stream[17:26]  # another process that resumes
    assert ShardReader(reader.folder, "train", 5, seed=8).batch(0, 14).tolist() != stream[:14]
    # any int is a seed
    assert ShardReader(reader.folder, "train", 5, seed=-1).batch(0, 14).shape == (14, 6)


EPOCHS = [  # first tokens of windows: each is a permutation, one shard after the other
    [2005, 2020, 2010, 2000, 2015, 1000, 20, 15, 30, 10, 5, 0, 25, 35],
    [1000, 2015, 2020, 2005, 2010, 2000, 35, 30, 5, 20, 15, 10, 25, 0],
    [0, 15, 25, 5, 20, 10, 30, 35, 1000, 2005, 2020, 2010, 2000, 2015]]


def test_order_never_changes(reader):
    """Frozen, so that an old checkpoint resumes on the same data."""
    for epoch, starts in enumerate(EPOCHS):
        assert sorted(starts) == STARTS
        windows = [list(range(start, start + 6)) for start in starts]
        assert reader.batch(14 * epoch, 14).tolist() == windows


def test_id_beyond_the_vocabulary(tmp_path):
    folder = shards(tmp_path, np.arange(250, 300))
    said = r"train_000000\.bin: token id 299 is beyond the vocabulary of 257"
    with pytest.raises(ValueError, match=said):
        ShardReader(folder, "train", 49, vocab_size=257).batch(0, 1)
    assert ShardReader(folder, "train", 49, vocab_size=300).batch(0, 1).max() == 299


def test_shard_that_vanishes_shrinks_or_grows(tmp_path):
    reader = ShardReader(shards(tmp_path, np.arange(400)), "train", 5)
    path, whole = tmp_path / "train_000000.bin", (tmp_path / "train_000000.bin").read_bytes()
    for content, line in ((whole[:-20], "truncated"), (whole + b"xx", "damaged"),
                          (b"", "truncated"), (None, "vanished")):
        reader.batch(0, 3)
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(ValueError, match=line) as error:
            reader.batch(3, 3)
        assert "train_000000.bin" in str(error.value)
        path.write_bytes(whole)
    write_shard(path, np.arange(300))  # whole, but another one
    with pytest.raises(ValueError, match="changed while it was in use"):
        reader.batch(6, 3)


def test_too_short_and_missing(tmp_path):
    folder = shards(tmp_path, np.arange(9))
    with pytest.raises(ValueError, match=r"9 train tokens hold no window of block_size \+ 1 = 11"):
        ShardReader(folder, "train", 10)
    with pytest.raises(FileNotFoundError, match="no val shards in"):
        ShardReader(folder, "val", 8)


@pytest.mark.parametrize("name, command", [
    ("stdlib", "run: python prepare_data.py stdlib --out_dir="),
    ("packages_gpt2", "run: python prepare_data.py packages --tokenizer=gpt2 --out_dir="),
    ("fineweb-edu", "run: python prepare_data.py fineweb-edu --out_dir="),
    ("mine", "run: python prepare_data.py stdlib --out_dir=")])
def test_missing_folder_prints_the_command(tmp_path, name, command):
    with pytest.raises(FileNotFoundError) as error:
        ShardReader(tmp_path / name, "train", 8)
    assert command + str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["own.txt", "own.corpus", "my own.txt"])
def test_text_as_dataset_prints_the_command_that_prepares_it(tmp_path, monkeypatch, name):
    """And the command, as printed, makes the folder it promises."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name / "a.txt" if name == "own.corpus" else tmp_path / name, "some text\n")
    with pytest.raises(FileNotFoundError) as error:
        load_meta(name)
    command = str(error.value).partition("run: python prepare_data.py ")[2]
    arguments, _, dataset = command.partition(" and use --dataset=")
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *shlex.split(arguments)])
    prepare_data.main()
    assert load_meta(*shlex.split(dataset))["documents"] == 1


def test_files_of_modded_nanogpt_as_they_are(tmp_path):
    shards(tmp_path, np.arange(99), np.arange(50), prefix="fineweb_", meta=False)
    shards(tmp_path, np.arange(30), prefix="fineweb_", split="val", meta=False)
    assert load_meta(tmp_path) == {"tokenizer": "gpt2", "vocab_size": 50257}
    assert ShardReader(tmp_path, "train", 7).n_tokens == 149
    assert ShardReader(tmp_path, "val", 7).n_tokens == 30


def test_nanogpts_two_files_as_they_are(tmp_path, capsys):
    """Raw uint16, GPT-2's ids; its characters are numbered by a pickle, which is not opened."""
    for name, n in ("train", 99), ("val", 50):
        np.arange(n, dtype="<u2").tofile(tmp_path / f"{name}.bin")
    assert load_meta(tmp_path) == {"tokenizer": "gpt2", "vocab_size": 50257}
    reader = ShardReader(tmp_path, "train", 7, 50257)
    assert reader.n_tokens == 99 and reader.sequential(1, 1).tolist() == [[*range(7, 15)]]
    assert ShardReader(tmp_path, "val", 7).n_tokens == 50
    write(tmp_path / "train.bin", b"odd")
    with pytest.raises(ValueError, match=r"train\.bin: truncated, 3 bytes"):
        ShardReader(tmp_path, "train", 7)
    write(tmp_path / "meta.pkl", b"anything")
    with pytest.raises(FileNotFoundError, match="no data in"):
        load_meta(tmp_path)


def hub_folder(folder, texts, n=600, padding=0, end="<|endoftext|>"):
    """A byte-level BPE of `tokenizers`' own making, in a folder as transformers saves it."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=n, show_progress=False, special_tokens=[end],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens([f"reserved {i}" for i in range(padding)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=end)
    fast.save_pretrained(folder)
    return fast


HUB_TEXTS = ["def naïve(x):\n    return x ** 2  # “Straße”, 東京 😀\n" * 40, "a <|endoftext|> b",
             "   "]


@pytest.mark.parametrize("padding, dtype", [(0, "<u2"), (2**16, "<u4")])
def test_a_tokenizer_of_a_hub_model(tmp_path, out, padding, dtype):
    """Its ids are transformers' own, 32 bits wide where 16 do not do; a copy travels along, and
    training and text come from that copy alone."""
    fast = hub_folder(tmp_path / "hub", HUB_TEXTS, padding=padding)
    source = write(tmp_path / "a.jsonl", jsonl(HUB_TEXTS))
    meta = make(source, out, tokenizer=f"hf:{tmp_path / 'hub'}")
    shutil.rmtree(tmp_path / "hub")
    tokenizer = get_tokenizer(load_meta(out)["tokenizer"])
    assert tokenizer.vocab_size == meta["vocab_size"] == len(fast) and tokenizer.eot == 0
    ids = fast(HUB_TEXTS, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert [tokenizer.encode(text) for text in HUB_TEXTS] == ids
    assert [tokenizer.decode(row) for row in ids] == HUB_TEXTS
    kind, found = (20240520, 1) if dtype == "<u2" else (20240801, 7), []  # llm.c's layouts
    for split in ("train", "val"):
        shard = (out / f"{split}_000000.bin").read_bytes()
        assert struct.unpack("<3i", shard[:12]) == (*kind, meta[f"{split}_tokens"])
        found.append(np.frombuffer(shard[1024:], dtype).tolist())
        window = ShardReader(out, split, 1, len(fast)).sequential(1, 1)
        assert window.tolist() == [found[-1][1:3]]
    starts = [np.flatnonzero(np.equal(tokens, 0)) for tokens in found]  # of the documents
    documents = [d.tolist() for a, b in zip(found, starts) for d in np.split(a, b)[1:]]
    assert sorted(documents) == sorted([0, *row] for row in ids)


def test_sentencepiece_spells_spaces_and_bytes(tmp_path):
    """LLaMA's kind: U+2581 for a space, <0x0A> for a byte; and what cannot be read is one line."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    vocabulary = {"</s>": 0, "\u2581def": 1, "<0xC3>": 2, "<0xA9>": 3, "x": 4}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    bpe.save(str(tmp_path / "tokenizer.json"))
    tokenizer = get_tokenizer(str(tmp_path / "tokenizer.json"))
    assert tokenizer.decode([1, 4, 2, 3, 9]) == " defxé\ufffd" and tokenizer.eot == 0
    for content in b"{}", b"\xff":
        write(tmp_path / "tokenizer.json", content)
        with pytest.raises(ValueError, match=r"not a tokenizer\.json"):
            get_tokenizer(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"hf:.*: no tokenizer that can be read"):
        get_tokenizer(f"hf:{tmp_path}")


GOOD = {"tokenizer": "bytes", "vocab_size": 257}
BAD_META = [  # content of meta.json, or what replaces a value of GOOD
    "", "[]", "{", "\xff", "3", "null", '{"tokenizer": "bytes"}', "[" * 100_000, '{"a":' * 100_000,
    {"vocab_size": "x"}, {"vocab_size": "257"}, {"vocab_size": 257.5}, {"vocab_size": True},
    {"tokenizer": "nope"}, {"tokenizer": "gone.json"}, {"train_tokens": -1}, {"documents": -1},
    {"vocab_size": 0}, {"vocab_size": -1}, {"vocab_size": 10**9}, {"vocab_size": None},
    {"tokenizer": 5}, {"tokenizer": ["gpt2"]}, {"tokenizer": None}, {"tokenizer": {}},
    {"train_tokens": "many"}, {"val_tokens": None}, {"documents": []}, {"settings": []},
    {"shards": []}, {"shards": {"train_000000.bin": 5}}, {"shards": {"train_000000.bin": {}}},
    {"shards": {"train_000000.bin": {"tokens": "9", "sha256": ""}}},
    {"shards": {"../train_000000.bin": {"tokens": 9, "sha256": ""}}}]


@pytest.mark.parametrize("content", BAD_META, ids=range(len(BAD_META)))
def test_damaged_meta(tmp_path, content):
    content = content if isinstance(content, str) else json.dumps(GOOD | content)
    write(shards(tmp_path, np.arange(99)) / "meta.json", content)
    with pytest.raises(ValueError, match=r"meta\.json: damaged .* run: python prepare") as error:
        ShardReader(tmp_path, "train", 8)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("key", ["train_tokens", "val_tokens", "documents", "shards", "source"])
def test_incomplete_meta_of_a_done_folder(out, key, source):
    meta = make(source, out)
    write(out / "meta.json", json.dumps({k: meta[k] for k in meta if k != key}))
    with pytest.raises(ValueError, match=r"meta\.json is incomplete: --overwrite"):
        make(source, out)


# ---- 4. sources

FORMATS = [  # file name, its content, options
    ("a.jsonl", jsonl(DOCUMENTS), {}),
    ("a.jsonl.zst", zstandard.compress(jsonl(DOCUMENTS)), {}),
    ("two_frames.jsonl.zst",
     zstandard.compress(jsonl(DOCUMENTS[:99])) + zstandard.compress(jsonl(DOCUMENTS[99:])), {}),
    ("no_last_newline.jsonl", jsonl(DOCUMENTS).rstrip(), {}),
    ("a.parquet", parquet(DOCUMENTS), {}),
    ("groups.parquet", parquet(DOCUMENTS, row_group_size=7, compression="zstd"), {}),
    ("key.jsonl", jsonl(DOCUMENTS, key="content"), {"text_key": "content"}),
    ("key.parquet", parquet(DOCUMENTS, key="content"), {"text_key": "content"})]


@pytest.mark.parametrize("name, content, options", FORMATS, ids=[case[0] for case in FORMATS])
def test_formats_hold_the_same_documents(tmp_path, out, name, content, options):
    """Every document once, byte for byte, in order, behind an end-of-text token."""
    meta = make(write(tmp_path / name, content), out, **options)
    train, val = (documents_of(out, split) for split in ("train", "val"))
    held_out = [text for text in DOCUMENTS if is_validation(text, 0.05)]
    assert val == held_out
    assert train == [text for text in DOCUMENTS if text not in held_out]
    assert 5 < len(val) < 40
    assert meta["documents"] == len(DOCUMENTS)
    assert (meta["tokenizer"], meta["vocab_size"]) == ("bytes", 257)
    for split in ("train", "val"):
        assert meta[f"{split}_tokens"] == len(tokens_of(out, split))
    assert_listed(meta, out)


def assert_listed(meta, folder):
    """The shards that meta.json lists have the checksums that it lists."""
    for name, shard in meta["shards"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == shard["sha256"]


def test_folder_of_text_files(tmp_path, out):
    for i in range(50):
        write(tmp_path / "in" / f"{i % 3}" / f"{i:02d}.{'md' if i % 2 else 'txt'}",
              f"file {i}\r\nmit Umlaut: ü\n")
    write(tmp_path / "in" / "picture.png", b"\x89PNG")  # what is no text is passed over
    write(tmp_path / "in" / ".venv" / "hidden.py", "SECRET = 1\n")
    write(tmp_path / "in" / "empty.txt", b"")
    meta = make(tmp_path / "in", out, val_fraction=0.3)
    assert sorted(all_documents(out)) == sorted(f"file {i}\r\nmit Umlaut: ü\n" for i in range(50))
    assert meta["documents"] == 50


def test_long_file_is_cut_at_line_ends(tmp_path, out):
    lines = [f"line {i} ü\n" for i in range(150_000)]
    make(write(tmp_path / "long.md", "".join(lines)), out, val_fraction=0.5)
    texts = all_documents(out)
    assert len(texts) == 2 and all(text.endswith("\n") for text in texts)
    assert sorted("".join(texts).splitlines(keepends=True)) == sorted(lines)


def essay(seed, n=1500):
    """Paragraphs of different lengths, each of them once."""
    words = np.random.default_rng(seed).integers(0, 10**6, (n, 100)).tolist()
    return ["\n".join(map(str, row[: 20 + row[0] % 80])) + "\n\n" for row in words]


TXT = {  # what one .txt may hold
    "paragraphs": "".join(essay(0)),
    "windows": "".join(essay(0)).replace("\n", "\r\n"),
    "lines only": "".join(essay(0)).replace("\n\n", "\n"),
    "one line": "".join(essay(0)).replace("\n", " "),
    "blank lines": "\n" * 400_000 + "".join(essay(0)),
}


@pytest.mark.parametrize("text", TXT.values(), ids=TXT.keys())
def test_one_txt_is_many_documents(tmp_path, out, text):
    """Some kB each, about the share that was asked for, and nothing lost."""
    path = write(tmp_path / "a.txt", text)
    meta = make(path, out, val_fraction=0.2)
    share = meta["val_tokens"] / (meta["train_tokens"] + meta["val_tokens"])
    lengths = [len(document) for document in all_documents(out)]
    assert 0.1 < share < 0.3 and 1000 < np.mean(lengths) < 20_000 and max(lengths) < 2**17
    assert "".join(split_text(text)) == text
    blocks = text_blocks(Path(path))
    assert sorted(all_documents(out)) == sorted(text for block in blocks for text in block[0])


def test_txt_split_depends_on_the_text_alone(tmp_path):
    """Two essays in either order, and one of them twice: no paragraph changes its split."""
    one, other = essay(1), essay(2)
    kept = {}
    for name, parts in {"a": [one, other], "b": [other, one], "c": [other, one, other]}.items():
        path = write(tmp_path / f"{name}.txt", "".join(map("".join, parts)))
        make(path, tmp_path / name, val_fraction=0.2)
        held_out = "".join(documents_of(tmp_path / name, "val"))
        kept[name] = {paragraph for paragraph in one + other if paragraph in held_out}
    assert len(kept["a"]) > 300
    assert len(kept["a"] ^ kept["b"]) < 60 and len(kept["b"] ^ kept["c"]) < 60  # those at the seams
    train = "".join(documents_of(tmp_path / "c", "train"))
    assert sum(paragraph in train for paragraph in kept["c"]) < 60


def test_share_far_off_is_said(tmp_path):
    """An essay of one paragraph and 128 lines, a document each: most of it is held out."""
    write(tmp_path / "in" / "a.md", "word " * 50_000)
    write(tmp_path / "in" / "b.md", "".join(f"line {i}\n" for i in range(128)))
    printed, _ = run_script(tmp_path / "few", tmp_path / "in", "--val_fraction=0.3")
    assert "note: " in printed and "30.0% was asked for: 2 documents are few" in printed
    source = write(tmp_path / "a.txt", TXT["paragraphs"])
    assert "note: " not in run_script(tmp_path / "many", source, "--val_fraction=0.3")[0]


BAD_SOURCES = [  # file name, content, what the line says
    ("latin.txt", "naïve".encode("latin-1"), r"latin\.txt: not UTF-8"),
    ("latin.jsonl", '{"text": "naïve"}'.encode("latin-1"),
     r"latin\.jsonl: line 1: not JSON in UTF-8"),
    ("half.jsonl", jsonl(["a", "b"]) + b'{"text": "c', r"half\.jsonl: line 3: not JSON"),
    ("key.jsonl", jsonl(["a"]) + b"\n" + jsonl(["b"], key="content"),
     r"key\.jsonl: line 3: no text under 'text' \(--text_key\)"),
    ("list.jsonl", b'["text"]\n', r"list\.jsonl: line 1: no text under 'text'"),
    ("number.jsonl", b'{"text": 3}\n', r"number\.jsonl: line 1: no text under 'text'"),
    ("deep.jsonl", b"[" * 100_000 + b"\n", r"deep\.jsonl: line 1: not JSON"),
    ("key.parquet", parquet(["a"], key="content"),
     r"key\.parquet: no column 'text' \(--text_key\) among id, content"),
    ("number.parquet", parquet([1, 2]), r"number\.parquet: the column 'text' holds int64"),
    ("list.parquet", parquet([["a"], ["b"]]), r"list\.parquet: the column 'text' holds list<"),
    ("struct.parquet", parquet([{"a": "b"}]), r"struct\.parquet: the column 'text' holds struct<"),
    ("map.parquet", parquet(pyarrow.array([[("a", "b")]], pyarrow.map_("string", "string"))),
     r"map\.parquet: the column 'text' holds map<"),
    ("cut.parquet", parquet(DOCUMENTS)[:-100], r"cut\.parquet: "),
    ("cut.jsonl.zst", zstandard.compress(jsonl(DOCUMENTS))[:-100],
     r"cut\.jsonl\.zst: .*[Tt]runcated"),
    ("other.jsonl.zst", b"no zstd here", r"other\.jsonl\.zst: "),
    ("other.parquet", b"no parquet here", r"other\.parquet: "),
    ("empty.txt", b"", "no text"),
    ("empty.jsonl", b"", "no text"),
    ("blank.jsonl", jsonl(["", "", ""]) + b"\n\n", "no text"),
    ("empty.parquet", parquet(["", None]), "no text"),
    ("picture.png", b"\x89PNG", "holds no text; what can be read is")]


@pytest.mark.parametrize("name, content, line", BAD_SOURCES, ids=[case[0] for case in BAD_SOURCES])
def test_bad_source(tmp_path, out, name, content, line):
    with pytest.raises(ValueError, match=line) as error:
        make(write(tmp_path / name, content), out)
    assert "\n" not in str(error.value) and not out.exists()


def test_line_that_decompresses_to_gigabytes(tmp_path, out):
    """91 KB of zst, 3 GB of text on one line: refused by name, in little memory."""
    packer = zstandard.ZstdCompressor().compressobj()
    packed = [packer.compress(data) for data in [b'{"text": "'] + [b"a" * 10**7] * 300]
    source = write(tmp_path / "bomb.jsonl.zst", b"".join(packed) + packer.flush())
    limit = resource.RLIMIT_AS, 3 * 10**9
    _, err = run_script(out, source, check=2, limit=limit, OMP_NUM_THREADS="1")
    assert "bomb.jsonl.zst: line 1: longer than 64 MiB" in err.splitlines()[-1]


def python_tree(root):
    """A library like Python's own, with what must be left out."""
    for i in range(30):
        write(root / f"module{i:02d}.py", f"def f{i}():\n    return {i}\n")
    for folder in ("test", "tests", "idlelib/idle_test", "site-packages", "unittest/test"):
        write(root / folder / "left_out.py", "SECRET = 1\n")
    # passed over, not an error
    write(root / "old.py", "# -*- coding: latin-1 -*-\n# naïve\n".encode("latin-1"))
    write(root / "data.txt", "SECRET")


@pytest.mark.parametrize("source", ["stdlib", "packages"])
def test_python_sources(tmp_path, out, monkeypatch, source):
    python_tree(tmp_path / "lib")
    monkeypatch.setattr(sysconfig, "get_paths",
                        lambda: {prepare_data.PYTHON_SOURCES[source]: str(tmp_path / "lib")})
    before = {str(path): path.read_bytes() for path in (tmp_path / "lib").rglob("*.*")}
    meta = make(source, out, val_fraction=0.2)
    texts = all_documents(out)
    assert sorted(texts) == sorted(f"def f{i}():\n    return {i}\n" for i in range(30))
    assert meta["documents"] == 30
    assert texts != sorted(texts)  # shuffled
    make(source, tmp_path / "again", val_fraction=0.2)
    assert snapshot(out) == snapshot(tmp_path / "again")  # the same bytes, meta.json included
    # sources are only read
    assert before == {str(path): path.read_bytes() for path in (tmp_path / "lib").rglob("*.*")}


def test_stdlib_for_real(out):
    printed, _ = run_script(out, "stdlib", "--max_tokens=3e6")
    assert "train on them: python train.py --dataset=" in printed
    assert sorted(snapshot(out)) == FILES
    assert load_meta(out)["train_tokens"] == 3_000_000
    assert b"import" in BYTES.decode_bytes(tokens_of(out, "train")[:100_000].tolist())


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=40), st.floats(0.01, 0.99))
def test_validation_by_hash(text, fraction):
    """A document's split depends on its text alone, and a larger share only adds documents."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    assert is_validation(text, fraction) == (struct.unpack("<Q", digest)[0] / 2**64 < fraction)


# ---- 5. preparation

def test_workers_change_nothing(tmp_path):
    source = write(tmp_path / "a.jsonl", jsonl(DOCUMENTS * 20))
    for workers in (1, 2):
        options = dict(tokenizer="gpt2", workers=workers, shard_tokens=50_000)
        make(source, tmp_path / f"out{workers}", **options)
    assert snapshot(tmp_path / "out1") == snapshot(tmp_path / "out2")


def test_shards_are_cut_exactly(tmp_path, source):
    make(source, tmp_path / "one")
    meta = make(source, tmp_path / "many", shard_tokens=10_000)
    sizes = [shard["tokens"] for name, shard in meta["shards"].items() if name.startswith("train")]
    assert set(sizes[:-1]) == {10_000} and 0 < sizes[-1] <= 10_000 and len(sizes) > 10
    assert_same_tokens(tmp_path / "one", tmp_path / "many")


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A folder of four files, each a part of its own."""
    for i in range(4):
        write(tmp_path / "in" / f"{i}.jsonl", jsonl(DOCUMENTS[i::4]))
    monkeypatch.setattr(prepare_data, "PART", 1000)
    return tmp_path / "in"


def test_parts_are_numbered_on(tmp_path, monkeypatch, parts):
    """Several parts: shards with consecutive numbers, and the same tokens as in one part."""
    meta = make(parts, tmp_path / "four")
    monkeypatch.undo()
    make(parts, tmp_path / "one")
    trained = [name for name in meta["shards"] if "train" in name]
    assert trained == [f"train_{i:06d}.bin" for i in range(4)]
    assert_same_tokens(tmp_path / "one", tmp_path / "four")
    assert meta["documents"] == len(DOCUMENTS)


@pytest.mark.parametrize("limit", [1, 1000, 12_345, 10**9])
def test_max_tokens(tmp_path, limit, source):
    make(source, tmp_path / "all")
    meta = make(source, tmp_path / "some", max_tokens=limit)
    everything = tokens_of(tmp_path / "all", "train")
    assert np.array_equal(tokens_of(tmp_path / "some", "train"), everything[:limit])
    assert meta["train_tokens"] == min(limit, len(everything))


@pytest.mark.parametrize("text", ["hello world, one document only", "0123456789" * 100, "trap"])
def test_single_document_fills_both_splits(tmp_path, text):
    """Whichever split its hash chooses, the other one gets a piece; no token is lost."""
    for fraction in (0.1, 0.9):
        out = tmp_path / f"out{fraction}"
        meta = make(write(tmp_path / "a.txt", text), out, val_fraction=fraction)
        splits = [tokens_of(out, split) for split in ("train", "val")]
        assert sum(map(len, splits)) == len(text) + 1 and min(map(len, splits)) >= 1
        assert meta["train_tokens"] == len(splits[0])
        assert abs(len(splits[1]) - fraction * len(text)) < 2


def test_done_is_verified_not_repeated(tmp_path, source):
    first, before = make(source, tmp_path / "out"), snapshot(tmp_path / "out")
    inode = (tmp_path / "out" / "train_000000.bin").stat().st_ino
    assert make(source, tmp_path / "out") == first
    assert (tmp_path / "out" / "train_000000.bin").stat().st_ino == inode
    with pytest.raises(ValueError, match="other settings: --overwrite"):
        make(source, tmp_path / "out", shard_tokens=99)
    assert snapshot(tmp_path / "out") == before
    # a bit that has flipped
    write(tmp_path / "out" / "val_000000.bin", before["val_000000.bin"][:-1] + b"x")
    with pytest.raises(ValueError, match="checksum"):
        make(source, tmp_path / "out")
    make(source, tmp_path / "out", overwrite=True)
    assert snapshot(tmp_path / "out") == before
    write(tmp_path / "out" / "meta.json", "{")
    make(source, tmp_path / "out", overwrite=True)  # and out of any damage
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("files", [["a.txt"], ["meta.json", "a.txt"], ["meta.json", "model.bin"],
                                   ["train_000000.bin"]])
@pytest.mark.parametrize("name, overwrite", [
    ("out", False), ("out", True), ("out.unfinished", False), ("out.replaced", True)])
def test_foreign_folder_is_left_alone(tmp_path, out, files, name, overwrite):
    for file in files:
        write(tmp_path / name / file, "precious")
    with pytest.raises(ValueError, match=rf"{name} is there and is not ours"):
        make(write(tmp_path / "a.txt", "hello"), out, overwrite=overwrite)
    assert set(snapshot(tmp_path / name).values()) == {b"precious"}
    assert len(snapshot(tmp_path / name)) == len(files)


@pytest.mark.parametrize("name", ["notes.txt", "my_train_1.bin", "train_000007.bin", "link"])
@pytest.mark.parametrize("where", ["out", "out.unfinished"])
def test_foreign_file_in_our_folder_is_left_alone(tmp_path, out, name, where, source):
    """Whatever its name, and whatever it links to."""
    make(source, out)
    out.rename(tmp_path / where)
    if name == "link":
        (tmp_path / where / "train_000000.bin").rename(tmp_path / "elsewhere")
        (tmp_path / where / "train_000000.bin").symlink_to(tmp_path / "elsewhere")
    else:
        write(tmp_path / where / name, "precious")
    before = snapshot(tmp_path / where)
    with pytest.raises(ValueError, match="is there and is not ours"):
        make(source, out, overwrite=where == "out")
    assert snapshot(tmp_path / where) == before


def test_overwrite_killed_at_any_step_of_the_swap(tmp_path, out, source):
    """At each file operation of it in turn: the same command then ends as an undisturbed one."""
    make(source, tmp_path / "calm")
    code = """if True:
        import os, sys, prepare_data
        left = int(sys.argv.pop(1))
        def count(event, arguments):
            global left
            if event in ("os.rename", "os.remove", "os.rmdir") and "/out" in str(arguments[0]):
                left -= 1
                left or os._exit(9)
        sys.addaudithook(count)
        prepare_data.main()"""
    kills = 0
    for step in range(1, 40):
        make(source, out, shard_tokens=60_000, overwrite=out.exists())
        command = [sys.executable, "-c", code, str(step), source, f"--out_dir={out}", "--overwrite"]
        code_of_exit = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).returncode
        if code_of_exit == 0:
            break
        kills += code_of_exit == 9
        make(source, out, overwrite=True)
        assert snapshot(out) == snapshot(tmp_path / "calm")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "calm", "out"]
    assert kills > 8 and step < 39


def test_two_at_once(tmp_path, out):
    """Different settings, one folder: the second is one line, and the folder is whole."""
    source = write(tmp_path / "a.jsonl", jsonl(DOCUMENTS * 40))
    for _ in range(3):
        both = [run_script(out, source, f"--shard_tokens={n}", wait=False) for n in (50000, 70000)]
        errors = [process.communicate(timeout=60)[1] for process in both]
        assert sorted(process.returncode for process in both) == [0, 2]
        loser = errors[0] if both[0].returncode else errors[1]
        assert "Traceback" not in "".join(errors)
        assert "at work there" in loser or "other settings" in loser
        meta = load_meta(out)
        assert {path.name for path in out.glob("*.bin")} == meta["shards"].keys()
        assert_listed(meta, out)
        assert [path.name for path in tmp_path.iterdir() if "." in path.name] == ["a.jsonl"]
        discard(out)


@pytest.mark.parametrize("settings", [{}, {"shard_tokens": 9000}])
def test_finished_by_another_meanwhile(tmp_path, monkeypatch, settings, out, source):
    """Another preparation finishes while this one is at work: its folder is never replaced."""
    make(source, tmp_path / "other", **settings)
    before = snapshot(tmp_path / "other")
    run = prepare_data.Preparation.run
    monkeypatch.setattr(prepare_data.Preparation, "run",
                        lambda *args: (run(*args), (tmp_path / "other").rename(out)))
    if settings:
        with pytest.raises(ValueError, match="other settings"):
            make(source, out)
    else:
        assert make(source, out) == load_meta(out) and not (tmp_path / "out.unfinished").exists()
    assert snapshot(out) == before


def test_default_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "notes.jsonl.zst", zstandard.compress(jsonl(DOCUMENTS)))
    assert str(prepare([source], DataConfig())[0]) == "data/notes"
    assert str(prepare([source], DataConfig(tokenizer="gpt2"))[0]) == "data/notes_gpt2"
    assert sorted(path.name for path in Path("data").iterdir()) == ["notes", "notes_gpt2"]


def stopped(number, arguments, when, **env):
    """Start the script, send a signal as soon as when() holds. -> exit code, stderr"""
    process = run_script(*arguments, wait=False, **env)
    deadline = time.monotonic() + 60
    while not when() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    err = process.communicate(timeout=60)[1]
    return process.returncode, err


@pytest.mark.parametrize("number, code, says", [
    (signal.SIGKILL, -9, ""),
    (signal.SIGINT, 130, "interrupted: the same command goes on from here")])
def test_stopped_among_shards(tmp_path, number, code, says):
    """No folder, an error that says so, nothing that looks whole; then the same bytes."""
    source = write(tmp_path / "a.jsonl", jsonl(DOCUMENTS * 60))
    make(source, tmp_path / "calm", shard_tokens=100_000)
    out, work = tmp_path / "out", tmp_path / "out.unfinished"
    arguments = [out, source, "--shard_tokens=1e5"]
    two = lambda: len(list(work.glob("train_*.bin"))) > 1
    end, err = stopped(number, [*arguments, "--workers=2"], two)
    assert end == code and says in err and "Traceback" not in err
    assert not out.exists() and work.is_dir()
    with pytest.raises(FileNotFoundError, match=r"has not finished, run: python prepare_data\.py"):
        ShardReader(out, "train", 8)
    run_script(*arguments)
    assert snapshot(out) == snapshot(tmp_path / "calm") and not work.exists()


def test_finished_parts_are_kept(tmp_path, out, parts):
    """A failure in the third file: the first two are not done again."""
    make(parts, tmp_path / "calm")
    good = (parts / "2.jsonl").read_bytes()
    write(parts / "2.jsonl", good + b"{broken\n")
    with pytest.raises(ValueError, match="line 81: not JSON"):
        make(parts, out)
    times = lambda folder: [(folder / f"train_00000{i}.bin").stat().st_mtime_ns for i in (0, 1)]
    kept = times(tmp_path / "out.unfinished")
    write(parts / "2.jsonl", good)
    make(parts, out)
    assert times(out) == kept and snapshot(out) == snapshot(tmp_path / "calm")


def killed(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "damage", ["shard gone", "shard cut", "input changed", "settings changed"])
def test_resume_distrusts(tmp_path, out, monkeypatch, parts, damage):
    """Whatever happened to the unfinished folder, the result is that of an undisturbed run."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_data.Preparation, "finish", killed)  # when all parts are done
        make(parts, out)
    work = tmp_path / "out.unfinished"
    shard = work / "train_000001.bin"
    if damage == "shard gone":
        shard.unlink()
    elif damage == "shard cut":
        write(shard, shard.read_bytes()[:-2])
    elif damage == "input changed":
        write(parts / "1.jsonl", jsonl([*DOCUMENTS[1::4], "one more"]))
    size = 5000 if damage == "settings changed" else 10**8  # then other shards stand in the way
    for folder in ("out", "calm"):
        make(parts, tmp_path / folder, shard_tokens=size)
    assert snapshot(out) == snapshot(tmp_path / "calm") and not work.exists()


def test_full_disk_is_one_line(tmp_path, out):
    """A limit on the size of files stands in: it is named, nothing stays, a later run succeeds."""
    source = write(tmp_path / "a.jsonl", jsonl(DOCUMENTS * 10))
    _, err = run_script(out, source, check=2, limit=(resource.RLIMIT_FSIZE, 10**6))
    path = tmp_path / "out.unfinished" / "train_000000.bin"
    assert f"error: {path} cannot be written: File too" in err and "Traceback" not in err
    assert not list(tmp_path.rglob("*.tmp")) + list(tmp_path.rglob("*.bin"))
    assert not out.exists()
    make(source, out)


def test_missing_extra_is_one_line(tmp_path, out):
    write(tmp_path / "fake" / "pyarrow.py", "raise ImportError")
    source = write(tmp_path / "a.parquet", parquet(["a"]))
    _, err = run_script(out, source, check=2, PYTHONPATH=str(tmp_path / "fake"))
    assert 'pyarrow is not installed: pip install -e ".[data]"' in err and "Traceback" not in err


@pytest.mark.parametrize("arguments, line", [
    ([], "name a source: stdlib, packages, fineweb"),
    (["stdlbi"], "no source 'stdlbi': stdlib, packages, fineweb"),
    (["stdlib", "--max_tokns=3"], "did you mean --max_tokens?"),
    (["stdlib", "--val_fraction=1"], "must lie between 0 and 1"),
    (["stdlib", "--max_tokens=0"], "at least 1"),
    (["stdlib", "--shard_tokens=3e9"], "int32"),
    (["stdlib", "--tokenizer=gpt5"], "no tokenizer 'gpt5'"),
    (["pretokenized", "--tokenizer=bytes"], "pretokenized is GPT-2's tokens"),
    (["stdlib", "--subset=sample/10BT"], "--repo and --subset choose a dataset on the hub"),
    (["stdlib", f"--out_dir={__file__}"], "is there and is not ours"),
    (["stdlib", "--out_dir="], "--out_dir is empty"),
    (["stdlib", f"--out_dir={'a' * 300}"], "File name too long"),
    (["stdlib", f"--out_dir={'a' * 250}"], "File name too long"),
    (["stdlib", f"--tokenizer={'a' * 300}.tiktoken"], "File name too long"),
    (["a" * 300], "a" * 300)])
def test_mistakes(monkeypatch, capsys, tmp_path, arguments, line):
    monkeypatch.chdir(tmp_path)
    assert line in refused(prepare_data.main, arguments, monkeypatch, capsys)
    assert not list(tmp_path.iterdir())


def test_fifo_is_refused(tmp_path, out):
    os.mkfifo(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "a.tiktoken")
    source = write(tmp_path / "b.txt", "hello")
    for arguments in ([tmp_path / "a.txt"], [source, f"--tokenizer={tmp_path / 'a.tiktoken'}"]):
        _, err = run_script(out, *arguments, check=2)
        assert err.count("\n") == 1 and "a.t" in err


@pytest.mark.parametrize("state", [
    *({"shards": {name: {"tokens": 0, "sha256": ""}}}
      for name in ("../../precious_train_1.bin", "../train_000000.bin", "/etc/passwd")),
    "{", "[]", "null", "[" * 100_000, '{"settings": 1, "parts": 2}', {"parts": 3}, {"parts": [4]},
    {"parts": [{"files": 5}]},
    {"shards": 6}, {"shards": {"train_000000.bin": 7}}, {"documents": "8"}, {"documents": None}])
def test_state_that_is_not_believed(tmp_path, out, state, source):
    """Made by hand: it starts again, and what its names point at elsewhere is not touched."""
    work = tmp_path / "out.unfinished"
    calm = make(source, tmp_path / "calm")
    outside = [Path(write(tmp_path / file, header(count=0)))
               for file in ("precious_train_1.bin", "train_000000.bin")]
    files = [[str(source), Path(source).stat().st_size, str(Path(source).stat().st_mtime_ns), ""]]
    if isinstance(state, dict):
        part = {"files": files, "shards": {}, "documents": 1} | state
        state = json.dumps({"settings": calm["settings"], "parts": [part]}
                           | {k: state[k] for k in state if k == "parts"})
    write(work / "state.json", state)
    write(work / "prepare_data.lock", "")
    assert make(source, out) == calm
    assert all(path.read_bytes() == header(count=0) for path in outside)


def test_full_disk_during_a_download_is_named_as_such(out):
    with HubServer(fineweb()) as hub:
        limit = resource.RLIMIT_FSIZE, 10**4
        _, err = run_script(out, "fineweb", "--tokenizer=bytes", check=2, limit=limit, **hub.env)
    last = err.splitlines()[-1]
    assert "File too large" in last and "cannot reach" not in last


def test_shards_that_meta_does_not_list(out, source):
    """A folder that two preparations have mixed: the reader names the shard."""
    make(source, out, shard_tokens=50_000)
    path = out / "train_000001.bin"
    whole = path.read_bytes()
    write_shard(path, np.arange(20))
    with pytest.raises(ValueError, match=r"train_000001\.bin: 20 tokens, and 50000 in meta\.json"):
        ShardReader(out, "train", 8)
    path.unlink()
    with pytest.raises(ValueError, match=r"train_000001\.bin is gone: run: .*a\.jsonl.*--over"):
        ShardReader(out, "train", 8)
    write(path, whole)
    write_shard(out / "train_000009.bin", np.arange(20))  # not of this preparation
    assert ShardReader(out, "train", 8).n_tokens == load_meta(out)["train_tokens"]


def test_dry_run_writes_nothing(tmp_path, capsys, source):
    assert make(source, tmp_path / "out", dry_run=True, max_tokens=1000) is None
    out = capsys.readouterr().out
    for part in ("1 files of", "--max_tokens=1000 needs", "tokenize", "write     2.00kB"):
        assert part in out
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


# ---- 6. the hub: the real huggingface_hub against a server on this machine

def fineweb(n=3):
    return {f"sample/10BT/{i:03d}_00000.parquet": parquet(DOCUMENTS[i::n], row_group_size=50)
            for i in range(n)}


def downloads(hub):
    """Files of which anything was sent."""
    return [path.rpartition("/")[2] for method, path, _ in hub.requests
            if method == "GET" and "/resolve/" in path]


def test_fineweb(tmp_path, out):
    files = fineweb() | {"sample/100BT/000_00000.parquet": b"not asked for", "README.md": b"#"}
    with HubServer(files) as hub:
        printed, _ = run_script(out, "fineweb", "--workers=1", "--val_fraction=0.05", **hub.env)
        assert sorted(downloads(hub)) == [f"{i:03d}_00000.parquet" for i in range(3)]
    order = [text for i in range(3) for text in DOCUMENTS[i::3]]
    held_out = [text for text in order if is_validation(text, 0.05)]
    assert documents_of(out, "val", GPT2) == held_out
    assert documents_of(out, "train", GPT2) == [text for text in order if text not in held_out]
    meta = load_meta(out)
    assert (meta["tokenizer"], meta["source"], meta["documents"]) == ("gpt2", "fineweb", 320)
    # no raw file stays
    assert all(path.suffix in (".bin", ".json", ".lock") for path in out.iterdir())
    assert "train on them" in printed and not (tmp_path / "out.unfinished").exists()


def test_pile_and_max_tokens(tmp_path, out):
    files = {f"train/{i:02d}.jsonl.zst": zstandard.compress(jsonl(DOCUMENTS[i::4]))
             for i in range(4)}
    files |= {"val.jsonl.zst": b"not asked for", "test.jsonl.zst": b"nor this"}
    with HubServer(files) as hub:
        options = "--tokenizer=bytes", "--val_fraction=0.05", "--max_tokens=60000"
        run_script(out, "pile", *options, **hub.env)
        assert "03.jsonl.zst" not in downloads(hub)
    local = write(tmp_path / "a.jsonl", jsonl([t for i in range(4) for t in DOCUMENTS[i::4]]))
    make(local, tmp_path / "local")
    assert np.array_equal(tokens_of(out, "train"), tokens_of(tmp_path / "local", "train")[:60_000])


def pretokenized():
    rng = np.random.default_rng(0)
    shard = lambda n: header(count=n) + rng.integers(0, 50257, n).astype("<u2").tobytes()
    return {f"fineweb_{split}_{i:06d}.bin": shard(5000)
            for split, i in [("train", 1), ("train", 2), ("train", 3), ("val", 0)]}


def test_pretokenized(tmp_path):
    files = pretokenized()
    with HubServer(files | {"README.md": b"#"}) as hub:
        run_script(tmp_path / "all", "pretokenized", **hub.env)
        run_script(tmp_path / "some", "pretokenized", "--max_tokens=10000", **hub.env)
    got, some = snapshot(tmp_path / "all"), snapshot(tmp_path / "some").keys()
    assert {name: data for name, data in got.items() if name.endswith(".bin")} == files
    assert some == files.keys() - {"fineweb_train_000003.bin"} | {"meta.json", "prepare_data.lock"}
    reader = ShardReader(tmp_path / "all", "train", 64, load_meta(tmp_path / "all")["vocab_size"])
    assert reader.n_tokens == 15000 and load_meta(tmp_path / "all")["val_tokens"] == 5000
    assert reader.batch(0, 5).shape == (5, 65)


def test_pretokenized_of_another_format_is_refused(out):
    with HubServer(pretokenized() | {"fineweb_train_000002.bin": b"x" * 5000}) as hub:
        _, err = run_script(out, "pretokenized", check=2, **hub.env)
    assert "fineweb_train_000002.bin: not a token shard" in err and not out.exists()


def test_kill_during_a_download(tmp_path, out):
    """Killed while the third file arrives: those that are done are not asked for again."""
    files = fineweb()
    arguments = ["fineweb", "--tokenizer=bytes", "--val_fraction=0.05"]
    with HubServer(files) as hub:
        run_script(tmp_path / "calm", *arguments, **hub.env)
    with HubServer(files, stall="002_00000.parquet") as hub:
        state = tmp_path / "out.unfinished" / "state.json"
        two_done = lambda: state.is_file() and len(json.loads(state.read_bytes())["parts"]) == 2
        assert stopped(signal.SIGKILL, [out, *arguments], two_done, **hub.env)[0] == -9
    with HubServer(files) as hub:
        run_script(out, *arguments, **hub.env)
        assert downloads(hub) == ["002_00000.parquet"]
    assert snapshot(out) == snapshot(tmp_path / "calm")


def test_damaged_download_is_refused(out):
    files = fineweb()
    with HubServer(files, damage="001_00000.parquet") as hub:
        _, err = run_script(out, "fineweb", "--tokenizer=bytes", check=2, **hub.env)
        assert "001_00000.parquet" in err and "run the same command again" in err
        hub.damage = ""
        run_script(out, "fineweb", "--tokenizer=bytes", **hub.env)
        assert downloads(hub).count("000_00000.parquet") == 1
    assert load_meta(out)["documents"] == len(DOCUMENTS)


def test_offline_is_one_line(tmp_path, out):
    _, err = run_script(out, "fineweb", "--tokenizer=bytes", check=2, HF_HUB_OFFLINE="1")
    assert err.count("\n") == 1 and not list(tmp_path.iterdir())
    assert "cannot reach HuggingFaceFW/fineweb on" in err
    assert "python prepare_data.py stdlib" in err


def test_hub_dry_run(tmp_path, out):
    with HubServer(fineweb()) as hub:
        printed, _ = run_script(out, "fineweb", "--tokenizer=bytes", "--dry_run", **hub.env)
        assert not downloads(hub)
    assert printed.startswith("3 files of") and "download" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_throughput(tmp_path, out, capsys):
    """CPU seconds of a preparation against bare tiktoken on the same text, in turn.

    At least 90 % on an idle machine; the assertion leaves room for a busy one.
    """
    seconds = lambda: sum(sum(resource.getrusage(who)[:2])
                          for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    text = "".join(Path(file.name).read_text()
                   for file in prepare_data.list_files("stdlib", DataConfig()))
    documents = [text[i : i + 3000] for i in range(0, len(text), 3000)] * 2
    write(tmp_path / "all.parquet", parquet(documents))
    write(tmp_path / "all.jsonl.zst", zstandard.compress(jsonl(documents)))
    write(tmp_path / "nothing.jsonl", jsonl(["two", "documents"]))
    spent = collections.defaultdict(list)
    for name in ("nothing.jsonl", "all.parquet", "all.jsonl.zst") * 2:
        begin = seconds()
        make(tmp_path / name, out, tokenizer="gpt2", workers=2, overwrite=True)
        spent[name].append(seconds() - begin)
        begin = seconds()
        GPT2.encoding.encode_ordinary_batch(documents, num_threads=2)
        spent["bare"].append(seconds() - begin)
    for name in ("all.parquet", "all.jsonl.zst"):
        ours = np.median(spent[name]) - np.median(spent["nothing.jsonl"])
        ratio = np.median(spent["bare"]) / ours
        with capsys.disabled():
            print(f"\n{name}: {ratio:.0%} of bare tiktoken", end="")
        assert ratio > 0.8
