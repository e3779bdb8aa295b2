"""What probes leave: a table on the screen, numbers and a picture in files."""
import itertools
import json
import os

import torch

from support import figures
from support.checkpoint import checkpoints
from support.files import write_atomically


def print_table(names, rows):
    """Columns as wide as they need be; the first to the left, the others to the right."""
    cells = [["" if cell is None else str(cell) for cell in row] for row in [names, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for first, *others in cells:
        line = [cell.rjust(width) for cell, width in zip(others, widths[1:])]
        print("  " + "  ".join([first.ljust(widths[0]), *line]).rstrip())


def keep_earlier(folder, name):
    """Rename an earlier probe's files, name.json and others, to name-N. -> what to say of it"""
    ends = (".json", ".png", ".html")
    earlier = [path for end in ends if os.path.lexists(path := folder / (name + end))]
    if not earlier:
        return ""
    number = next(n for n in itertools.count(1) if not list(folder.glob(f"{name}-{n}.*")))
    for path in earlier:
        path.rename(folder / f"{name}-{number}{path.suffix}")
    return f"; the one before is now {name}-{number}"


def newest_finished(folder="out"):
    """The newest run with all of its steps, or the newest if none has. -> its folder, what it is"""
    paths = checkpoints(folder)
    done = next((path for path in paths if is_finished(path)), None)
    return (done or paths[0]).parent, "the newest finished run" if done else "the newest run"


def is_finished(path):
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return saved["step"] >= saved["train_config"].get("max_steps", 0)
    except Exception:  # damaged: of many types; whoever loads it says how
        return False


def save_results(folder, name, results, draw):
    """Write name.json, and as name.png the figure that draw() returns, if matplotlib is there.

    ValueError for numbers that are not finite; then all files are as before.
    """
    text = json.dumps(results, indent=1, allow_nan=False)
    plt, kept = figures.pyplot(), keep_earlier(folder, name)
    write_atomically(folder / f"{name}.json", lambda f: f.write(text.encode()))
    if plt is None:
        print(f"wrote {folder / name}.json{kept}; its figure needs matplotlib: "
              'pip install -e ".[plot]"\n')
        return
    figure = draw()
    write_atomically(folder / f"{name}.png", lambda f: figure.savefig(f, dpi=200, format="png"))
    plt.close(figure)
    print(f"wrote {folder / name}.json and {folder / name}.png{kept}\n")


# ---- changes of a metric, and their errors

def columns_of(values):
    """What the last dimension holds: benchmarks have no loss."""
    return ["loss", "accuracy"][-values.shape[-1]:]


def summary(base, change, over_seeds):
    """Mean of change (layers, seeds, units, columns) and its standard error.

    The error comes from the scatter over held-out windows (that of the seeds is part of it), for
    benchmarks from that over seeds; None where there is one.
    """
    row = {}
    for j, column in enumerate(columns_of(change)):
        seeds, units = change[..., j].mean((0, 2)), change[..., j].mean((0, 1))
        row |= {column: base[:, j].mean() + units.mean(), f"{column}_change": units.mean(),
                f"{column}_error": standard_error(seeds if over_seeds else units),
                f"{column}_error_over_seeds": standard_error(seeds)}
    return row


def standard_error(values):
    return values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else None


def changed(row, column, digits):
    """A change and its error, as text."""
    change, error = row[f"{column}_change"], row[f"{column}_error"]
    return f"{change:+.{digits}f}" + ("" if error is None else f" ±{error:.{digits}f}")
