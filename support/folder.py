"""What a training run starts from, and what it leaves in its folder."""

import contextlib
import functools
import json
import math
import os
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

from support import budget, checkpoint, lock, machine, upcycle
from support.files import keep_previous, write_atomically
from support.report import NOT_KEPT, trim_log
from support.shards import load_meta
from support.tokenizer import alike, get_tokenizer

PREVIOUS = "ckpt.prev.pt"  # the checkpoint before the last one


def settings(parsed, ModelConfig, TrainConfig, GPT):
    """The command line -> ModelConfig, TrainConfig, and what load_start found.

    A resumed run keeps the settings it was saved with, a run from other weights their model; what
    is given comes first.
    """
    config, given = parsed.make(TrainConfig), parsed.given
    if "lock" in (given.get("flavour"), given.get("router")) and config.init_from != "resume":
        given.setdefault("lock_steps", max(1, round(config.max_steps / 60)))
    mine = {k: v for k, v in given.items() if k in {f.name for f in fields(ModelConfig)}}
    if Path(config.dataset).is_file():
        raise ValueError(f"dataset={config.dataset} is a file: python prepare_data.py "
                         f"{config.dataset} makes a folder of shards from it, to name here")
    budget.check_size(given)
    start = load_start(config, ModelConfig, GPT)
    if config.init_from == "resume":
        others = {name: value for name, value in given.items() if name not in mine}
        config = resumed(start, others, config)
    if start is None:
        parsed.make(ModelConfig)  # a mistake is told before any data is fetched
    if not config.plan:
        config = with_data(config)
    if start is None:
        with contextlib.suppress(FileNotFoundError) if config.plan else contextlib.nullcontext():
            given.setdefault("vocab_size", load_meta(config.dataset)["vocab_size"])
        model_config = parsed.make(ModelConfig)
    else:
        theirs = start["model_config"]
        if theirs["flavour"] == "dense" != mine.get("flavour", "dense"):
            theirs = upcycle.backbone(theirs)
        locked = (theirs | mine).get("router") == "lock" and lock.is_locked(start["model"])
        if locked and config.init_from != "resume":
            mine["lock_steps"] = 0  # experts keep their owners
        model_config = ModelConfig(**(theirs | mine))
    budget.check_size(asdict(model_config))
    return model_config, config, start


def with_data(config):
    """The configuration, with its dataset made first where it is missing. Several ranks would all
    make it at once: they are told the command instead."""
    from support.missing import make_missing  # a run that has its data needs nothing of it
    allowed = config.download == "auto" and os.environ.get("WORLD_SIZE", "1") == "1"
    say = functools.partial(say_line, not config.quiet)
    return replace(config, dataset=make_missing(config.dataset, allowed, say))


def say_line(aloud, text):
    if aloud:
        tqdm.write(text)  # above the progress bar
        sys.stdout.flush()


def load_start(config, config_class, model_class):
    """None, or a dictionary like a checkpoint's."""
    if config.init_from == "scratch":
        return None
    if config.init_from == "hf:":
        raise ValueError("init_from=hf: names no model: --init_from=hf:NAME_OR_DIR")
    if config.init_from == "gpt2" or config.init_from.startswith("hf:"):
        model = model_class.from_hf(config.init_from.removeprefix("hf:"))
        return {"model": model.state_dict(), "model_config": asdict(model.config)}
    resume = config.init_from == "resume"
    folder = config.out_dir if resume else config.init_from
    return checkpoint.load(Path(folder, "ckpt.pt"), config_class, model_class, resume)


def resumed(start, given, config):
    """The settings that a run was saved with, and what is given now."""
    kept = {name: value for name, value in start["train_config"].items() if name not in NOT_KEPT}
    try:
        return type(config)(**(kept | given))
    except (ValueError, TypeError) as error:
        words = " ".join(str(error).split())  # a tensor there would take several lines
        raise ValueError(f"{config.out_dir}/ckpt.pt, train_config: {words}") from None


def load_weights(model, start, config):
    """Those of a dense model become experts' where the model has some. Buffers may be missing (a
    new run may turn on a loss that keeps one), parameters may not."""
    weights, source = start["model"], config.init_from
    if start["model_config"]["flavour"] == "dense" != model.config.flavour:
        weights = upcycle.to_experts(weights, model, config.upcycle_noise)
    try:
        missing, unknown = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # a shape: the line after the title names it
        raise ValueError(f"init_from={source}: {str(error).splitlines()[1].strip()}") from None
    missing = set(missing) & {name for name, _ in model.named_parameters()}
    if missing or unknown:
        raise ValueError(f"init_from={source} holds another model: {len(missing)} of the weights "
                         f"here are missing there and {len(unknown)} of those there are unknown "
                         f"here, among them {sorted([*missing, *unknown])[0]}")


def check_start(model_config, config, start):
    """Refuse to overwrite a checkpoint, and to go on from another model or tokenizer."""
    path, meta = Path(config.out_dir, "ckpt.pt"), load_meta(config.dataset)
    resume, here = config.init_from == "resume", asdict(model_config)
    if not resume and not config.overwrite and path.exists():
        raise ValueError(f"{path} exists: --init_from=resume goes on, --overwrite starts anew, "
                         "--out_dir=... goes elsewhere")
    there = asdict(type(model_config)(**start["model_config"])) if resume else here
    other = [f"{k} is {there.get(k)} there, {v} here" for k, v in here.items() if there.get(k) != v]
    if other:
        raise ValueError(f"{path} holds another model: {'; '.join(other)}")
    if start is not None:
        check_tokenizer(config, meta, start)
    if resume:
        check_dataset(config, start["train_config"].get("dataset", config.dataset))
    if model_config.vocab_size < meta["vocab_size"]:
        raise ValueError(f"vocab_size={model_config.vocab_size} is less than the "
                         f"{meta['vocab_size']} of {config.dataset}")


def check_dataset(config, saved):
    """ValueError where a run would go on with another text. Folders may move, names count."""
    if Path(saved).name != Path(config.dataset).name:
        raise ValueError(f"{config.out_dir} was trained on {saved}, and dataset={config.dataset}: "
                         f"--dataset={saved} goes on; --init_from={config.out_dir} --out_dir=... "
                         "begins a new run from its weights")


def check_tokenizer(config, meta, start):
    """ValueError, naming both, where the weights were trained on other tokens than the shards'."""
    ours, saved = meta["tokenizer"], start.get("tokenizer")
    if saved is None:
        n_ids = start["model_config"]["vocab_size"]
        if not same_as_hugging_face(config.init_from.removeprefix("hf:"), meta, n_ids):
            raise ValueError(f"init_from={config.init_from} reads another tokenizer ({n_ids} ids) "
                             f"than that of {config.dataset}: {ours} ({meta['vocab_size']} ids)")
        return
    if not checkpoint.same_tokenizer(ours, saved):
        raise ValueError(f"init_from={config.init_from} reads {saved} tokens, and {config.dataset} "
                         f"holds {ours}")


def same_as_hugging_face(name, meta, n_ids):
    """Whether both tokenizers read a text alike; for a model that came without one, whether its
    number of ids is the shards', which may be padded to a multiple of 128."""
    with contextlib.suppress(ValueError):  # no tokenizer there
        theirs = get_tokenizer(f"hf:{name}")
        if theirs.vocab_size > 255:  # else an empty one, made for a folder that holds none
            return alike(theirs, get_tokenizer(meta["tokenizer"]))
    return n_ids <= max(math.ceil(meta["vocab_size"] / 128) * 128, 1.02 * meta["vocab_size"])


# ---- what a run leaves on disk

def open_folder(trainer, settings, step):
    """Once a first step has worked: nothing of an older run may be taken for this one's."""
    c, folder = trainer.config, Path(trainer.config.out_dir)
    text = json.dumps(settings, indent=1).encode()
    write_atomically(folder / "config.json", lambda f: f.write(text))
    if checkpoint.sha256_of(trainer.tokenizer):
        data = Path(trainer.tokenizer).read_bytes()
        copy = checkpoint.copy_beside(trainer.tokenizer, folder)
        write_atomically(copy, lambda f: f.write(data))
    if c.init_from == "resume":
        trim_log(folder / "log.csv", step)
    else:
        for name in ("ckpt.pt", PREVIOUS, "log.csv", "loss.png"):
            (folder / name).unlink(missing_ok=True)


def save(trainer, step, seconds, val_loss):
    """out_dir/ckpt.pt, the same on any number of ranks: all gather, rank 0 writes, all hear."""
    c, problem = trainer.config, None
    model, optimizer = machine.gather_state(trainer.model, trainer.optimizer, trainer.ranks)
    if trainer.ranks.rank == 0:
        state = {"step": step, "seconds": seconds, "val_loss": val_loss, "model": model,
                 "optimizer": optimizer, "scaler": trainer.scaler.state_dict(),
                 "tokenizer": trainer.tokenizer,
                 "tokenizer_sha256": checkpoint.sha256_of(trainer.tokenizer),
                 "model_config": asdict(trainer.model_config), "train_config": asdict(c)}
        try:
            path = Path(c.out_dir, "ckpt.pt")
            keep_previous(path, PREVIOUS)
            write_atomically(path, lambda f: torch.save(state, f))
        except OSError as error:
            problem = error
    if trainer.ranks.sum(problem is not None)[0]:
        raise OSError(f"could not save step {step}: {problem or 'see rank 0'}; "
                      f"{trainer.last_checkpoint()}")
    trainer.saved = step


def check_good(trainer, step, loss):
    """Before saving: a checkpoint that cannot go on must not replace one that can.

    Every weight is finite, and the loss on windows of the validation split is not far beyond that
    of knowing nothing, ln V. For a run that has only begun to diverge there is the one before it.
    """
    mine = (p.to_local() if hasattr(p, "to_local") else p for p in trainer.model.parameters())
    broken = sum(not p.isfinite().all() for p in mine)
    nothing = math.log(trainer.model_config.vocab_size)
    if trainer.ranks.sum(broken)[0] or not loss < 3 * nothing + 3:
        raise FloatingPointError(f"step {step} left weights that give a loss of {loss:.4g}, and is "
                                 f"not saved; {trainer.last_checkpoint()}; a lower --lr may help")
