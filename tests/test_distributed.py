"""Several ranks, by torchrun and gloo: the numbers of one rank, whatever is sharded; lost ranks.

torchrun takes seconds to start, so it starts this file once for many small runs:
`python test_distributed.py JOBS.json` is the worker, and runs its jobs one after another.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from train_helpers import (
    FLAVOURS,
    PYTHON,
    SIZE,
    TRAINING,
    assert_same_state,
    checkpoint,
    losses,
    make_data,
    read_rows,
    run,
    train_command,
)

import train
from model import GPT, ModelConfig
from support import machine

TORCHRUN = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
MODES = ("none", "zero1", "fsdp", "ep")
IDLE = dict(FLAVOURS["switch"], n_experts=64)  # as many experts as a rank's micro-step has tokens
SPECIAL = dict(FLAVOURS["topk"], specialization_coef=2e-3, coupling_coef=1e-3, coupling="path")
SHARED = dict(FLAVOURS["infmoe"], pool_groups=1, balance="layer", infmoe_mean=True)
EVEN = dict(FLAVOURS["deepseek"], n_experts=8)
POOLS = dict(FLAVOURS["unipool"], n_experts=4, pool_groups=2)
CASES = FLAVOURS | {"idle": IDLE, "even": EVEN, "pools": POOLS, "specialized": SPECIAL,
                    "shared code": SHARED,
                    "bank": dict(FLAVOURS["infmoe"], balance="layer", arch="llama")}
OF_TWO = {case: ModelConfig(**SIZE | settings) for case, settings in CASES.items()}
OVER_RANKS = [case for case, c in OF_TWO.items()  # whose experts two ranks can share
              if c.n_experts and c.n_experts % 2 == 0 and c.expert != "neuron"]
SHARDED = [("dense", "zero1"), ("unipool", "zero1"), *((case, "fsdp") for case in CASES),
           *((case, "ep") for case in OVER_RANKS)]


def worker(path):
    """Run the jobs of a file, each {"model", "train", and its end: "signal", "rank", "step"}."""
    torch.set_num_threads(1)
    train.draw_loss = lambda *_: False
    rank, real = int(os.environ["RANK"]), train.train_step
    for job in json.loads(Path(path).read_text()):
        def step(run, number, job=job):
            if job.get("rank") == rank and number == job["step"]:
                os.kill(os.getpid(), job["signal"])
            return real(run, number)

        train.train_step = step
        if job.get("main"):
            sys.argv = ["train.py", *job["main"]]
            train.main()
        else:
            train.train(ModelConfig(**job["model"]), train.TrainConfig(**job["train"]))
    print(f"rank {rank} is done", flush=True)


def job(data, out, case, ends=None, **changes):
    """A tiny run, and how it ends: (signal, rank, step) or not before its time"""
    settings = TRAINING | dict(dataset=str(data), out_dir=str(out), quiet=True) | changes
    fate = dict(zip(("signal", "rank", "step"), ends or ()))
    return {"model": SIZE | dict(vocab_size=257) | CASES[case], "train": settings} | fate


def on_ranks(folder, jobs, n=2):
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    return run([*TORCHRUN[:-1], f"--nproc_per_node={n}", __file__, str(path)])


def here(task):
    """The same job on this one rank."""
    return train.train(ModelConfig(**task["model"]), train.TrainConfig(**task["train"]))


def auxiliary(out):
    return np.array([float(r.get("aux_loss", 0)) for r in read_rows(out)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The runs of the first half: on one rank with twice the micro-batch, and by one torchrun."""
    folder = tmp_path_factory.mktemp("runs")
    data, patch = make_data(folder / "data"), pytest.MonkeyPatch()
    patch.setattr(train, "draw_loss", lambda *_: False)
    torch.set_num_threads(1)
    for case in CASES:
        here(job(data, folder / f"{case} one", case, micro_batch=8))
    jobs = [job(data, folder / f"{case} none", case) for case in CASES]
    for case, shard in SHARDED:
        changes = dict(shard=shard, recompute=case in ("unipool", "pools"))
        jobs.append(job(data, folder / f"{case} {shard}", case, **changes))
    for shard in MODES:  # SIGTERM to rank 1 alone: both stop after step 3, which is saved
        end = (signal.SIGTERM, 1, 2)
        jobs.append(job(data, folder / f"stopped {shard}", "unipool", end, shard=shard))
    done = on_ranks(folder, jobs)
    assert done.returncode == 0 and done.stdout.count("is done") == 2, done.stdout + done.stderr
    yield folder
    patch.undo()


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(runs, case):
    """Loss, gradient norm and validation to 1e-5, balance losses included, where one rank has
    twice the micro-batch; state in buffers is moved by the statistics of all ranks."""
    two, one = runs / f"{case} none", runs / f"{case} one"
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
    np.testing.assert_allclose(auxiliary(two), auxiliary(one), rtol=1e-5)
    assert_same_state(*(checkpoint(out)["model"] for out in (two, one)), tolerance=2e-4)


@pytest.mark.parametrize(("case", "shard"), SHARDED)
def test_sharded_ranks_equal_one(runs, case, shard):
    """zero1 and fsdp, pools and recomputation included; they save one rank's names and shapes."""
    two, one = runs / f"{case} {shard}", runs / f"{case} one"
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
    saved, plain = checkpoint(two), checkpoint(one)
    assert_same_state(saved["model"], plain["model"], tolerance=2e-4)
    assert_same_state(saved["optimizer"]["state"], plain["optimizer"]["state"], tolerance=2e-4)


def test_experts_over_four_ranks(runs):
    """The numbers of one; `pools` under recomputation."""
    cases = "topk", "even", "pools"
    jobs = [job(runs / "data", runs / f"{case} four", case, shard="ep", micro_batch=2,
                recompute=case == "pools") for case in cases]
    done = on_ranks(runs, jobs, 4)
    assert done.returncode == 0, done.stdout + done.stderr
    for case in cases:
        np.testing.assert_allclose(losses(runs / f"{case} four"), losses(runs / f"{case} one"),
                                   rtol=1e-5)


@pytest.mark.parametrize(("case", "words"), [
    ("deepseek", "5 cannot be shared by 2 ranks"), ("infmoe", "infmoe has none")])
def test_experts_that_ranks_cannot_share(case, words):
    model, two = GPT(ModelConfig(**SIZE, **CASES[case])), machine.Ranks(0, 2, torch.device("cpu"))
    with pytest.raises(ValueError, match=f"shard=ep deals out experts, and {words}: use shard=fs"):
        machine.shard_model(model, two, torch.float32, "ep")


@pytest.fixture(scope="module")
def second(runs):
    """What was stopped on two ranks goes on for two steps on one, then, by another torchrun, on
    two. After that a run that speaks, and one whose rank 1 is killed. -> CompletedProcess"""
    data, jobs, real = runs / "data", [], train.train_step

    def stopping(holder, step):
        if step == 4:  # the second here: before its first there is nothing to save
            os.kill(os.getpid(), signal.SIGTERM)
        return real(holder, step)

    for shard in MODES:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "train_step", stopping)
            out, resume = runs / f"stopped {shard}", dict(init_from="resume", micro_batch=8)
            assert checkpoint(out)["step"] == 3
            result = here(job(data, out, "unipool", **resume))
        assert result["signal"] == signal.SIGTERM and result["step"] == 5
        jobs.append(job(data, out, "unipool", init_from="resume", shard=shard))
    jobs.append(job(data, runs / "fine", "dense", quiet=False))
    command = train_command(data, runs / "lost", save_every=1, max_steps=20)[2:]
    killed = {"main": command, "signal": signal.SIGKILL, "rank": 1, "step": 3}
    return on_ranks(runs, [*jobs, killed])


def test_checkpoints_move_between_numbers_of_ranks(runs, second):
    """2 ranks -> 1 -> 2, for every way to shard: the losses of one undisturbed run, to 1e-5."""
    for shard in MODES:
        moved, one = losses(runs / f"stopped {shard}"), losses(runs / "unipool one")
        np.testing.assert_allclose(moved, one, rtol=1e-5)


def test_one_voice(second):
    """All ranks work, rank 0 speaks."""
    assert second.stdout.count("finished 6 steps") == 1
    assert second.stdout.count("model    gpt2 dense") == 2
    assert "2 micro-steps x 2 ranks x 4 sequences" in second.stdout


def test_a_lost_rank_is_named(runs, second):
    """Rank 1 dies; rank 0 says so in a line and leaves; one rank goes on from what was saved."""
    assert second.returncode != 0
    assert "error: rank 0: rank 1 of 2 has vanished or hangs; --init_from=resume" in second.stderr
    assert checkpoint(runs / "lost")["step"] == 3
    resume = dict(init_from="resume", max_steps=20)
    assert here(job(runs / "data", runs / "lost", "dense", **resume))["finished"]
    assert [int(r["step"]) for r in read_rows(runs / "lost")] == list(range(1, 21))


@pytest.mark.slow
def test_command_line(tmp_path):
    """torchrun train.py as a user types it: nothing on stderr; a mistake is one line per rank."""
    data = make_data(tmp_path / "data")
    done = run(train_command(data, tmp_path / "out", "topk", ranks=2))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    done = run(train_command(data, tmp_path / "out", "topk", ranks=2))
    assert done.returncode != 0
    assert "rank 0: " in done.stderr and "--overwrite starts anew" in done.stderr
    assert "Traceback" not in done.stderr.split("torch/distributed")[0]


@pytest.mark.slow
def test_a_rank_that_hangs(tmp_path):
    """Stopped, not dead: the others wait for --timeout seconds, then name it."""
    data = make_data(tmp_path / "data")
    command = train_command(data, tmp_path / "out", max_steps=50, timeout=4)[2:]
    path = tmp_path / "jobs.json"
    path.write_text(json.dumps([{"main": command, "signal": signal.SIGSTOP, "rank": 0, "step": 3}]))
    done = run([*TORCHRUN, __file__, str(path)])
    assert done.returncode != 0
    assert "rank 1: rank 0 of 2 has vanished or hangs" in done.stderr, done.stderr


@pytest.mark.slow
def test_compiled_ranks(tmp_path):
    """The compiled model inside DDP, balance counts all-reduced within the graph; block by block
    where experts or all weights are sharded."""
    data, jobs = make_data(tmp_path / "data"), []
    cases = [("topk", "none"), ("topk", "ep"), ("pools", "none"), ("pools", "fsdp"),
             ("pools", "ep")]
    for case, shard in cases:
        if shard == "none":
            here(job(data, tmp_path / f"{case} one", case, micro_batch=8))
        jobs.append(job(data, tmp_path / f"{case} {shard}", case, compile="true", shard=shard))
    assert on_ranks(tmp_path, jobs).returncode == 0
    for case, shard in cases:
        one, two = (losses(tmp_path / f"{case} {kind}") for kind in ("one", shard))
        np.testing.assert_allclose(two, one, rtol=1e-4)


if __name__ == "__main__":
    worker(sys.argv[1])
