"""Hostile trials by hand: what a stranger's files, a failing disk and impatient hands do to us.

    python tests/stranger.py                     # all, a few minutes
    python tests/stranger.py --only=kills --n=60

Every trial runs a real command line, forked from one process that has torch loaded. What may come
out: "ok" (exit code 0 where that is right), "refused" (one line and exit code 2), "stopped" (by the
signal sent). Tracebacks, other signals, several lines, and exit code 0 where something should have
been noticed are failures; so is anything lost. test_trials.py has the short forms.
"""
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
import zstandard  # noqa: E402
from train_helpers import make_data, train_command  # noqa: E402

import model  # noqa: E402
import prepare_data  # noqa: E402
import probe  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from configurator import parse  # noqa: E402
from support.folders import load_meta  # noqa: E402
from support.shards import ShardReader, file_sha256  # noqa: E402

MAINS = {"train": train.main, "prepare": prepare_data.main, "probe": probe.main,
         "sample": sample.main, "model": model.main}
COUNTS = Counter()
LIMIT = 4 * 2**30  # bytes of address space that a trial may add


@dataclass
class StrangerConfig:
    only: str = ""  # trials whose name holds this
    n: int = 30  # repetitions of what is random
    seed: int = 0


def start(script, *words, stdin=b""):
    """A command in a forked child -> its process id, the file that gets what it says."""
    output = tempfile.TemporaryFile()  # noqa: SIM115  (read when the child has ended)
    pid = os.fork()
    if pid:
        return pid, output
    code = 1
    try:
        with tempfile.TemporaryFile() as typed:
            typed.write(stdin)
            typed.seek(0)
            for number, source in enumerate((typed, output, output)):
                os.dup2(source.fileno(), number)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT, used + LIMIT))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = [f"{script}.py", *map(str, words)]
        MAINS[script]()
        code = 0
    except SystemExit as leave:
        code = leave.code or 0
    except BaseException as error:
        print(f"Traceback: {error!r}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        os._exit(code)


def ended(pid, output):
    _, status = os.waitpid(pid, 0)
    output.seek(0)
    text = output.read().decode(errors="replace")
    return os.waitstatus_to_exitcode(status), text


def trial(name, expected, script, *words, **more):
    """Run to the end; expected: the exit codes that are right here."""
    return judge(name, expected, *ended(*start(script, *words, **more)))


def judge(name, expected, code, text):
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    kind = {0: "ok", 2: "refused", 130: "stopped", 143: "stopped", -9: "stopped", -15: "stopped",
            -2: "stopped"}.get(code, f"exit code {code}")
    if "Traceback" in text:
        kind = "TRACEBACK"
    elif code not in expected:
        kind = "SILENT" if code == 0 else f"FAILED with {code}"
    elif code == 2 and len(errors) != 1:
        kind = "SEVERAL LINES"
    COUNTS[name, kind] += 1
    if kind.isupper() or kind.startswith("FAILED"):
        print(f"{name}: {kind}\n{text[-600:]}", flush=True)
    return code, text


def kill_after(seconds, number, name, script, *words):
    pid, output = start(script, *words)
    time.sleep(seconds)
    os.kill(pid, number)
    return judge(name, (0, -number, 128 + number), *ended(pid, output))


def check(name, good):
    COUNTS[name, "ok" if good else "LOST"] += 1


class Trials:
    """Methods are trials; each finds data, a finished run of top-k experts and a text."""

    def __init__(self, root, config):
        self.root, self.n, self.rng = root, config.n, random.Random(config.seed)
        self.data, self.out, self.text = make_data(root / "data"), root / "out", root / "t.jsonl"
        lines = [json.dumps({"text": f"{i} words and more " * 20}) for i in range(4000)]
        self.text.write_text("\n".join(lines))
        self.words = train_command(self.data, self.out, "topk", quiet=True)[2:]
        trial("a run", [0], "train", *self.words)
        self.whole = (self.out / "ckpt.pt").read_bytes()

    def again(self, **changes):
        return [*self.words, "--init_from=resume", *(f"--{k}={v}" for k, v in changes.items())]

    def saved(self, change=None):
        (self.out / "ckpt.pt").write_bytes(self.whole)
        if change:
            saved = torch.load(self.out / "ckpt.pt", weights_only=True)
            change(saved)
            torch.save(saved, self.out / "ckpt.pt")

    def checkpoints(self):
        wrong = [lambda s: s["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
                 lambda s: s["model_config"].update(n_layer=10**9),
                 lambda s: s["model_config"].update(n_experts=10**7),
                 lambda s: s["model"].popitem(), lambda s: s.update(step=-1),
                 lambda s: next(iter(s["model"].values())).fill_(float("nan"))]
        for change in wrong:
            self.saved(change)
            trial("a foreign checkpoint", [2], "train", *self.again(max_steps=8))
            trial("a foreign checkpoint", [2] if change is not wrong[0] else [0, 2], "sample",
                  f"--out_dir={self.out}", "--max_new_tokens=2")
        for _ in range(self.n):  # a bit somewhere in the tensors
            place, damaged = self.rng.randrange(2000, len(self.whole) - 5000), bytearray(self.whole)
            damaged[place] ^= 1 << self.rng.randrange(8)
            (self.out / "ckpt.pt").write_bytes(damaged)
            trial("a flipped bit in a checkpoint", [0, 2], "model", f"--out_dir={self.out}")
            with zipfile.ZipFile(self.out / "ckpt.pt") as archive:
                inside = archive.testzip() is not None
            code, _ = trial("a flipped bit in a checkpoint", [0, 2], "train", *self.again())
            check("a flipped bit in a checkpoint is seen", code == 2 or not inside)
        with zipfile.ZipFile(self.out / "ckpt.pt", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data/0", bytes(10**9))
        trial("a zip bomb", [2], "train", *self.again())
        self.saved()
        trial("float32 goes on as float16", [0, 2], "train", *self.again(dtype="float16",
                                                                       max_steps=8))
        self.saved()

    def shards(self):
        for _ in range(self.n):
            other = shutil.copytree(self.data, self.root / "other", dirs_exist_ok=True)
            path = self.rng.choice(sorted(other.glob("*.bin")))
            whole = bytearray(path.read_bytes())
            whole[self.rng.randrange(1024, len(whole))] ^= 1 << self.rng.randrange(8)
            path.write_bytes(whole)
            words = [*self.words, f"--dataset={other}", f"--out_dir={self.root / 'x'}",
                     "--overwrite", "--max_steps=40"]
            trial("a flipped bit in a shard", [2], "train", *words)
        shutil.rmtree(self.root / "other")
        for change in ({"tokenizer": "nope"}, {"train_tokens": -1}, {"vocab_size": 0},
                       {"shards": {"../x.bin": {"tokens": 1, "sha256": ""}}}):
            other = shutil.copytree(self.data, self.root / "other", dirs_exist_ok=True)
            meta = json.loads((self.data / "meta.json").read_text())
            (other / "meta.json").write_text(json.dumps(meta | change))
            trial("a damaged meta.json", [2], "train", *self.words, f"--dataset={other}",
                  f"--out_dir={self.root / 'x'}", "--overwrite")
        shutil.rmtree(self.root / "other")

    def preparations(self):
        target = self.root / "made"
        for i in range(self.n):  # two at once, with other settings
            shutil.rmtree(target, ignore_errors=True)
            two = [start("prepare", self.text, f"--out_dir={target}", f"--shard_tokens={size}")
                   for size in (50_000, 70_000 + i)]
            codes = [judge("two preparations at once", [0, 2], *ended(*one))[0] for one in two]
            meta = load_meta(target)
            whole = all(file_sha256(target / name) == shard["sha256"]
                        for name, shard in meta["shards"].items())
            check("two preparations leave one whole folder", whole and 0 in codes)
        for _ in range(self.n):
            words = [self.text, f"--out_dir={target}", "--overwrite", "--shard_tokens=90_000"]
            kill_after(self.rng.random() * 0.6, signal.SIGKILL, "killed while it overwrites",
                       "prepare", *words)
            trial("the same command afterwards", [0], "prepare", *words)
            ShardReader(target, "train", 8).batch(0, 50)
        lines = {"a million spaces": ([0], json.dumps({"text": "a" + " " * 10**6 + "b"}).encode()),
                 "a line that unpacks to gigabytes": ([2], None)}
        for name, (expected, line) in lines.items():
            path = self.root / ("x.jsonl" if line else "x.jsonl.zst")
            packed = zstandard.ZstdCompressor().compress(b'{"text": "' + b"a" * 10**9)
            path.write_bytes(line or packed)
            trial(name, expected, "prepare", path, f"--out_dir={self.root / 'y'}", "--overwrite")
            path.unlink()
        mine = self.root / "mine.unfinished"
        mine.mkdir()
        (mine / "thesis.txt").write_text("years of work")
        trial("somebody's D.unfinished", [2], "prepare", self.text,
              f"--out_dir={self.root / 'mine'}")
        check("somebody's D.unfinished stays", (mine / "thesis.txt").exists())

    def kills(self):
        for _ in range(self.n):
            words = [*self.again(max_steps=200, save_every=1)]
            self.saved()
            number = self.rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            kill_after(self.rng.random() * 1.5, number, "training is killed", "train", *words)
            trial("it goes on", [0], "train", *self.again(max_steps=3))
        self.saved()
        ask = [f"--out_dir={self.out}", "--routing", "--tokens=256", "--device=cpu"]
        trial("a probe", [0], "probe", *ask)
        for _ in range(self.n):
            kill_after(0.2 + self.rng.random(), signal.SIGKILL, "a probe is killed", "probe", *ask)
            for path in self.out.glob("routing*.json"):
                check("its numbers are whole", bool(json.loads(path.read_text())))
            two = [start("probe", *ask) for _ in range(2)]
            codes = [judge("two probes at once", [0, 2], *ended(*one))[0] for one in two]
            check("one of two probes answers", 0 in codes and (self.out / "routing.png").exists())
        for script, words in (("probe", ask), ("sample", [f"--out_dir={self.out}"]),
                              ("model", [f"--out_dir={self.out}"])):
            for _ in range(self.n // 3):
                kill_after(self.rng.random() / 2, signal.SIGINT, f"Ctrl-C in {script}", script,
                           *words)

    def folders(self):
        began = time.time_ns()
        pid, output = start("train", *self.again(max_steps=10**6))
        while (self.out / "log.csv").stat().st_mtime_ns < began + 10**8:  # until it is at work
            time.sleep(0.1)
        for _ in range(5):
            trial("a second trainer in a folder", [2], "train", *self.again(max_steps=10**6))
        os.kill(pid, signal.SIGTERM)
        judge("the first one", [143], *ended(pid, output))
        self.saved()
        bad = dict(lr=1e10, min_lr=0, save_every=1, max_steps=40)
        for _ in range(5):
            trial("it diverges", [2], "train", *self.again(**bad))
            trial("the last checkpoint goes on", [0], "train", *self.again(lr=1e-4, max_steps=7))
            self.saved()
        trial("exported onto itself", [2], "model", f"--out_dir={self.out}",
              f"--export={self.out}")
        for value in ("", "x" * 300, "/proc/nowhere/x"):
            trial("folders that cannot be", [2], "train", *self.words, f"--out_dir={value}")
        os.mkfifo(self.root / "pipe")
        trial("a pipe for data", [2], "train", *self.words, f"--dataset={self.root / 'pipe'}",
              f"--out_dir={self.root / 'x'}", "--overwrite")

    def models_of_others(self):
        from probe_helpers import hf_model
        from safetensors.torch import load_file, save_file
        folder = self.root / "theirs"
        hf_model("llama").save_pretrained(folder)
        path, words = folder / "model.safetensors", [
            f"--init_from=hf:{folder}", f"--dataset={self.data}", f"--out_dir={self.root / 'h'}",
            "--max_steps=1", "--batch_tokens=128", "--micro_batch=4", "--overwrite"]
        trial("a model of transformers", [0], "train", *words)
        weights = load_file(path)
        for name in list(weights)[::2]:
            save_file({k: v for k, v in weights.items() if k != name}, path, {"format": "pt"})
            trial("without one of its tensors", [2], "train", *words)
        save_file(weights, path, {"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        code = f"open({str(self.root / 'ran')!r}, 'w')"
        (folder / "code.py").write_text(f"{code}\nclass C: pass\nclass M: pass\n")
        config |= {"model_type": "odd", "auto_map": {"AutoConfig": "code.C",
                                                     "AutoModelForCausalLM": "code.M"}}
        (folder / "config.json").write_text(json.dumps(config))
        trial("it brings code", [2], "train", *words, stdin=b"y\n" * 9)
        check("its code never ran", not (self.root / "ran").exists())


def main():
    config = parse(StrangerConfig, doc=__doc__).make(StrangerConfig)
    root = Path(tempfile.mkdtemp(prefix="stranger_"))
    os.chdir(root)
    trials = Trials(root, config)
    for name in ("checkpoints", "shards", "preparations", "kills", "folders", "models_of_others"):
        if config.only in name:
            getattr(trials, name)()
    for (name, kind), n in sorted(COUNTS.items()):
        print(f"{n:5} {kind:10} {name}")
    bad = sum(n for (_, kind), n in COUNTS.items() if not kind.islower())
    print(f"{sum(COUNTS.values())} trials, {bad} failures")
    shutil.rmtree(root)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
