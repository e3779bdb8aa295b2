"""Kill a training run again and again, resume it, and compare it with one that nobody disturbed.

    python tests/soak.py                              # 60 kills of one run per flavour: minutes
    python tests/soak.py --kills=3 --flavours=dense   # what the tests do
    python tests/soak.py --minutes=30                 # no kills: does the memory stay level?

Kills are SIGKILL and SIGTERM in equal parts, at three kinds of moments: while a checkpoint is being
written, a few rows into the run, and anywhere from the first line of train.py on. Log (times
aside), weights and optimizer must be equal, bit for bit. Runs are forked from one process that has
torch loaded, so that a restart takes no three seconds.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from train_helpers import (  # noqa: E402
    FLAVOURS,
    assert_same_run,
    make_data,
    read_rows,
    train_command,
)

import train  # noqa: E402
from configurator import fail, parse  # noqa: E402


@dataclass
class SoakConfig:
    kills: int = 60  # per flavour
    flavours: str = ",".join(FLAVOURS)
    steps_per_kill: int = 4  # length of the run
    seed: int = 0
    minutes: float = 0.0  # watch the memory of one undisturbed run for so long, instead


def start(arguments, output):
    """train.py in a forked child -> its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number in (1, 2):
            os.dup2(output.fileno(), number)
        sys.argv = arguments
        train.main()
    except SystemExit as leave:
        code = leave.code or 0
    finally:
        os._exit(code)


def ended(pid):
    """-> exit code (minus the number of the signal that killed it), None while it runs"""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def wait_for_moment(pid, out, kind, rng):
    """Sleep until it is time to kill -> False if the run ended before."""
    rows, delay, began = len_log(out) + rng.randint(1, 6), rng.random() ** 2 * 0.4, time.monotonic()
    due = {"saving": lambda: (out / "ckpt.pt.tmp").exists(), "rows": lambda: len_log(out) >= rows,
           "anywhere": lambda: time.monotonic() - began > delay}[kind]
    while not due():
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        time.sleep(2e-4)
    return True


def len_log(out):
    return len((out / "log.csv").read_bytes().splitlines()) if (out / "log.csv").exists() else 0


def disturb(data, out, flavour, kills, steps, rng):
    """Run to the end under `kills` kills -> Counter of what was hit."""
    hit = Counter()
    with open(out.with_suffix(".txt"), "w+") as output:
        while True:
            resume = "resume" if (out / "ckpt.pt").exists() else "scratch"
            settings = dict(init_from=resume, max_steps=steps, eval_every=7, save_every=2)
            pid = start(train_command(data, out, flavour, **settings)[1:], output)
            kind = rng.choice(["saving", "rows", "anywhere"])
            if hit["kills"] < kills and wait_for_moment(pid, out, kind, rng):
                number = rng.choice([signal.SIGKILL, signal.SIGTERM])
                os.kill(pid, number)
                hit.update(("kills", f"{number.name} {kind}"))
            while (code := ended(pid)) is None:
                time.sleep(1e-3)
            killed = kind == "saving" and code == -signal.SIGKILL
            hit["files left half-written"] += killed and (out / "ckpt.pt.tmp").exists()
            if code == 0:
                return hit
            # SIGTERM itself ends it before the handler stands.
            if code not in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM):
                output.seek(0)
                raise AssertionError(f"exit code {code}: {output.read()[-2000:]}")


def soak(folder, flavour, kills, steps_per_kill=4, seed=0):
    """-> Counter of kills by signal and moment; AssertionError where the end is another."""
    data, reference, out = folder / "data", folder / f"{flavour}_reference", folder / flavour
    if not data.exists():
        make_data(data)
    steps = max(12, steps_per_kill * kills)
    disturb(data, reference, flavour, 0, steps, random.Random(seed))
    hit = disturb(data, out, flavour, kills, steps, random.Random(seed))
    assert_same_run(out, reference)
    assert len(read_rows(out)) == steps
    return hit


def memory_of(pid):
    """Resident set size, bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def watch_memory(folder, minutes):
    """Train for `minutes` and report by how much the memory of the last two thirds varies."""
    data, out, sizes = make_data(folder / "data"), folder / "long", []
    with open(folder / "long.txt", "w+") as output:
        settings = dict(max_steps=10**7, eval_every=100, save_every=200, log_every=10)
        pid = start(train_command(data, out, "topk", **settings)[1:], output)
        end = time.monotonic() + 60 * minutes
        while time.monotonic() < end:
            time.sleep(min(5, 60 * minutes / 60))
            sizes.append(memory_of(pid))
        os.kill(pid, signal.SIGTERM)
        while ended(pid) is None:
            time.sleep(0.1)
    late = sizes[len(sizes) // 3:]
    low, high = min(late), max(late)
    steps = read_rows(out)[-1]["step"]
    print(f"{steps} steps in {minutes:g} minutes: {late[0] / 1e6:.1f} MB after "
          f"a third, {low / 1e6:.1f} to {high / 1e6:.1f} MB since ({(high - low) / low:.2%})")


def main():
    train.draw_loss = lambda *_: False  # half the time of a run this short
    config = parse(SoakConfig, doc=__doc__).make(SoakConfig)
    unknown = set(config.flavours.split(",")) - set(FLAVOURS)
    if unknown:
        fail(f"no flavour {', '.join(sorted(unknown))}: {', '.join(FLAVOURS)}")
    folder = Path(tempfile.mkdtemp(prefix="soak_"))
    if config.minutes:
        watch_memory(folder, config.minutes)
    else:
        for flavour in config.flavours.split(","):
            began = time.monotonic()
            hit = soak(folder, flavour, config.kills, config.steps_per_kill, config.seed)
            print(f"{flavour:9} equal after {time.monotonic() - began:.0f} s: "
                  + ", ".join(f"{n} {what}" for what, n in sorted(hit.items())), flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
