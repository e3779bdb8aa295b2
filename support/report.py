"""What a training run says: its first and last screen, log.csv, its picture, and other trackers."""

import contextlib
import csv
import importlib.util
import math
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from support.budget import amount, flops_per_token, long_run, span, step_sizes, table
from support.files import write_atomically
from support.usage import optional

NOT_KEPT = ("out_dir", "init_from", "overwrite", "plan", "quiet", "download")  # by a resumed run


def describe(trainer, start):
    """The first lines of a run: what trains, on what, how, and why so."""
    m, c, device = trainer.model_config, trainer.config, trainer.ranks.device
    experts = f", {m.n_experts} experts, {m.top_k} per token" if m.n_experts else ""
    epoch = trainer.train_data.n_windows * m.block_size / c.batch_tokens
    machine = f"{torch.get_num_threads()} threads"
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    rows = dict(
        model=f"{m.arch} {m.flavour}, {m.n_layer} layers, width {m.d_model}{experts}: "
              f"{amount(trainer.n_params)} parameters, {amount(trainer.n_active)} active",
        data=f"{c.dataset}: {amount(trainer.train_data.n_tokens)} tokens ({trainer.tokenizer}), "
             f"{epoch:,.1f} steps an epoch; {amount(trainer.val_data.n_tokens)} for validation",
        step=step_sizes(m, c, trainer.ranks.size),
        device=f"{device.type} ({machine}), shard={c.shard}",
        dtype=f"{str(trainer.dtype)[6:]} ({trainer.dtype_reason})",
        compile=f"no ({trainer.compile_reason})")
    if trainer.compiled:
        rows["compile"] = (f"yes ({trainer.compile_reason}): in the first step, and again in the "
                           "first validation; half a minute each, longer for deep models")
    if m.flavour != "dense":
        rows["experts"] = backend_of(trainer)
    if trainer.memory_note:
        rows["memory"] = trainer.memory_note
    done = start["step"] if c.init_from == "resume" else 0
    long = long_run(m, c, trainer.ranks.size, device, c.max_steps - done)
    if long:
        rows["time"] = long
    if c.init_from == "resume":
        changed = changes(start["train_config"], c)
        rows["start"] = "; ".join([f"after step {start['step']}", *changed])
    elif c.init_from != "scratch":
        rows["start"] = c.init_from
        if start["model_config"]["flavour"] == "dense" != m.flavour:
            rows["start"] += ", its FFNs copied into experts"
            if any(name.endswith("ffn.w_in.bias") for name in start["model"]):
                rows["start"] += ", their biases left out"
    return table(**rows)


def backend_of(trainer):
    """Which matmul implementation the experts get, in words."""
    m, device = trainer.model_config, trainer.ranks.device
    if m.backend != "auto":
        return f"{m.backend} (as asked)"
    from kernels import choose_backend  # lazily: it stands above this file
    name, reason = choose_backend(torch.empty(0, dtype=trainer.dtype, device=device))
    if m.flavour == "infmoe" and name == "grouped":
        name = "torch"  # one FFN, nothing to group
    return f"{name} ({reason})"


def changes(saved, config):
    """What a resumed run does otherwise than before."""
    before = {k: saved.get(k, v) for k, v in asdict(config).items() if k not in NOT_KEPT}
    now = {k: getattr(config, k) for k in before}
    return [f"{k} was {v}, is {now[k]}" for k, v in before.items() if v != now[k]]


def summary(trainer, result, picture):
    """The last screen of a finished run."""
    out, loss, device = trainer.config.out_dir, result["val_loss"], trainer.ranks.device
    unit = "nats per token"
    if trainer.tokenizer == "bytes":
        unit = f"nats per byte ({loss / math.log(2):.3f} bits)"
    speed = f"{amount(result['tokens'] / result['seconds'])} tokens/s, "
    speed += "validations and checkpoints included"
    if device.type == "cuda":
        speed += f"; {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB of GPU memory at most"
    return table(
        finished=f"{result['step']} steps, {amount(result['tokens'])} tokens in "
                 f"{span(result['seconds'])}",
        speed=speed,
        loss=f"validation {loss:.4f} {unit}, training {result['train_loss']:.4f}",
        files=f"{out}/: ckpt.pt, config.json, log.csv{', loss.png' if picture else ''}",
        next=f"python sample.py --out_dir={out}")


@contextlib.contextmanager
def progress(trainer, first, say):
    """The bar of the steps, which also counts the micro-steps of a long one and keeps time; where
    there is no terminal, a line once the first micro-step shows how long a step takes."""
    c, count = trainer.config, trainer.accumulation
    hidden = trainer.ranks.rank > 0 or c.quiet or not sys.stderr.isatty()
    compiling = f"compiling, about {30 + 5 * trainer.model_config.n_layer} s"
    began, ended, said = time.monotonic(), threading.Event(), False
    if trainer.compiled:
        say(compiling)
    bar = tqdm(total=c.max_steps, initial=first, disable=hidden, unit="step", dynamic_ncols=True)

    def moved(done):
        if count > 1:
            bar.set_postfix_str(f"micro-step {done} of {count}")
        nonlocal said
        seconds = time.monotonic() - began
        if hidden and not said and done == 1 < count and seconds > 10:
            said = True
            say(f"the first of {count} micro-steps took {span(seconds)}; a line for each "
                f"validation, every {c.eval_every} steps")

    def keep_time():
        while not ended.wait(1):
            bar.refresh()

    if trainer.compiled or count > 1:
        first_of = f"micro-step 1 of {count}" if count > 1 else "the first step"
        bar.set_postfix_str(f"{compiling}, then {first_of}" if trainer.compiled else first_of)
    trainer.moved = moved
    clock = threading.Thread(target=keep_time, daemon=True)
    try:
        if not hidden:
            clock.start()
        yield bar
    finally:
        ended.set()
        if not hidden:
            clock.join()
        bar.close()


def tell(trainer, row, bar, say, peak):
    """The progress bar, and a line for each validation. peak: FLOP/s of the GPU, or None."""
    steps, speed = trainer.config.max_steps, f"{amount(row['tokens_per_second'])} tokens/s"
    if peak:
        used = row["tokens_per_second"] * flops_per_token(trainer.model_config)
        speed += f", MFU {used / peak / trainer.ranks.size:.1%}"
    bar.update()
    bar.set_postfix_str(f"loss {row['train_loss']:.3f}, {speed}")
    if row["val_loss"] is not None:
        say(f"step {row['step']:{len(str(steps))}}/{steps}  train {row['train_loss']:.4f}  "
            f"val {row['val_loss']:.4f}  gradient {row['grad_norm']:.2f}  {speed}  "
            f"{span(row['seconds'])}")


# ---- a collapse, while it can still be mended


class CollapseWatch:
    """Says once of each layer (or pool) that its routing has collapsed, after 100 rows of the log.

    That is: in every one of them an expert took more than half of the tokens, or three quarters of
    the experts got none in all of them. Layers that share a pool are added up: each by itself may
    be as peaked as it likes. Where even routing gives an expert more than a quarter of the tokens
    (K / E), half is no sign; neither is a busy neuron (infmoe), nor an expert of ReMoE, where half
    of all begin above zero.
    """

    def __init__(self, model, say, rows=100):
        self.config, self.say, self.rows = model.config, say, rows
        self.router = next((layer.router for layer, _ in model.expert_layers()), None)
        self.sums, self.crowded, self.seen, self.said = 0, 0, 0, set()

    def __call__(self, stats):
        """stats: of one logged step, over all ranks."""
        if not stats:
            return
        c, counts = self.config, stats["counts"].cpu()  # (L, E), or a row for each infmoe mask
        tokens = stats["tokens"].item()
        if c.pool_groups and c.n_experts:
            counts = counts.view(c.pool_groups, -1, counts.shape[-1])  # (G, layers of one, E)
            tokens, counts = tokens * counts.shape[1], counts.sum(1)  # (G, E)
        half = counts.amax(-1) > tokens / 2  # (banks,)
        if not c.n_experts or 4 * c.top_k > c.n_experts or self.router.zero_is_idle:
            half &= False
        self.seen += 1
        self.crowded = (self.crowded + 1) * half
        self.sums = self.sums + counts
        unused = (self.sums == 0).float().mean(-1)  # (banks,)
        for i in range(len(counts)):
            if self.crowded[i] >= self.rows:
                self.warn(i, f"expert {counts[i].argmax()} has taken more than half of the tokens")
            elif self.seen >= self.rows and unused[i] >= 0.75:
                self.warn(i, f"{unused[i]:.0%} of the experts have had no token")
        if self.seen >= self.rows:
            self.sums, self.seen = 0, 0

    def warn(self, i, what):
        c, name = self.config, "pool" if self.config.pool_groups else "expert layer"
        if i in self.said:
            return
        self.said.add(i)
        now = f"balance={c.balance}" + f", balance_coef={c.balance_coef:g}" * bool(c.balance_coef)
        balance = f"a larger --balance_coef, or another --balance (now {now}), or "
        if not getattr(self.router, "supports", True):  # no loss acts on its scores
            balance = ""
        self.say(f"warning: {name} {i}: {what} in {self.rows} logged steps; what usually helps: "
                 f"{balance}a lower --lr")


# ---- log.csv


def log_row(path, row):
    """Append to log.csv, opened and closed each time: a row is there whatever comes next."""
    try:
        with open(path, "a", newline="") as f:
            writer = csv.DictWriter(f, row)
            if f.tell() == 0:
                writer.writeheader()
            numbers = {k: f"{v:.9g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(numbers)
    except OSError as error:
        problem = f"step {row['step']} cannot be written to {path}: {error.strerror}"
        raise OSError(problem) from error


def trim_log(path, step):
    """Drop the rows after `step`, empty ones, and a last line that a crash cut short."""
    if not path.exists():
        return
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.strip()]
    if lines and not lines[0].startswith(b"step,"):
        raise ValueError(f"{path} is not a log of ours, its first column is not step: move it away")
    kept = [line for line in lines[:1] if line.endswith(b"\n")]
    for line in lines[1:]:
        number = line.split(b",")[0]
        if line.endswith(b"\n") and number.isdigit() and int(number) <= step:
            kept.append(line)
    write_atomically(path, lambda f: f.writelines(kept))


def open_trackers(config, settings, stack):
    """tensorboard and wandb, if asked for: functions that take a row; `stack` closes them."""
    trackers = []
    if config.tensorboard:
        board = optional("torch.utils.tensorboard", "log", ValueError).SummaryWriter(config.out_dir)
        stack.callback(board.close)
        trackers.append(lambda row: [board.add_scalar(k, v, row["step"])
                                     for k, v in row.items() if v is not None])
    if config.wandb:
        wandb, name = optional("wandb", "log", ValueError), Path(config.out_dir).name
        try:
            online = wandb.init(project=config.wandb, name=name, dir=config.out_dir,
                                config=settings)
        except Exception as error:  # no login, no network: its own types
            raise ValueError(f"wandb={config.wandb}: {str(error).splitlines()[0]}") from error
        stack.callback(online.finish)
        trackers.append(lambda row: online.log({k: v for k, v in row.items() if v is not None},
                                               step=row["step"]))
    return trackers


# ---- loss.png


def draw_loss(model_config, out_dir):
    """out_dir/loss.png from log.csv; False without a log, or where matplotlib is not installed."""
    out_dir = Path(out_dir)
    if not importlib.util.find_spec("matplotlib") or not (out_dir / "log.csv").exists():
        return False
    from matplotlib.figure import Figure
    with open(out_dir / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    names = ("tokens", "train_loss", "val_loss")
    tokens, train, val = (np.array([float(row[k] or "nan") for row in rows]) for k in names)
    seen, window = ~np.isnan(val), np.ones(1 + len(train) // 50)
    weights = np.convolve(np.ones(len(train)), window, "same")
    smooth = np.convolve(train, window, "same") / weights
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(tokens, train, color="#9ecae1", linewidth=0.8, label="training, each step")
    axes.plot(tokens, smooth, color="#2171b5", linewidth=1.8, label="training, smoothed")
    axes.plot(tokens[seen], val[seen], "o-", color="#d94801", markersize=3.5,
              label=f"validation, {val[seen][-1]:.3f}")
    shown = np.concatenate((smooth[len(smooth) // 30:], val[seen]))  # not the very first steps
    margin = 0.05 * np.ptp(shown) + 1e-3
    axes.set(xlim=(0, tokens[-1] * 1.01), ylim=(shown.min() - margin, shown.max() + 2 * margin),
             xlabel="tokens", ylabel="cross-entropy, nats per token",
             title=f"{out_dir.name}: {model_config.flavour}, {amount(model_config.n_params())} "
                   f"parameters, {amount(model_config.n_active_params())} active")
    axes.xaxis.set_major_formatter(lambda x, _: amount(x))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    write_atomically(out_dir / "loss.png", lambda f: figure.savefig(f, format="png"))
    return True
