"""The figures of results/claims.md: functions of plain numbers that return a matplotlib figure."""
from functools import partial

import numpy

from lab.statistics import parabola_minimum
from support.figures import COLOURS, pyplot
from support.files import write_atomically

BLUE = COLOURS[0]
MARKS = {  # a verdict by its shape; filled where it decides
    "holds": dict(marker="o", mfc=BLUE), "does not hold": dict(marker="s", mfc=BLUE),
    "no difference": dict(marker="D", mfc="white"), "undecided": dict(marker="o", mfc="white"),
    "not run yet": dict(marker="x", alpha=0.4)}


def available():
    if not pyplot():
        print('no figures: pip install -e ".[plot]"')
    return pyplot() is not None


def save(path, figure):
    """The same bytes for the same numbers."""
    write = partial(figure.savefig, format="png", dpi=110, metadata={"Software": None})
    write_atomically(path, write)
    pyplot().close(figure)


def finish(axes, **words):
    axes.set(**words)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.lines:
        axes.text(0.5, 0.5, "not run yet", ha="center", transform=axes.transAxes, color="grey")
    elif axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=7)


def forest(rows):
    """The primary claims: difference, 95 % interval, and the verdict by the mark's shape."""
    figure, axes = pyplot().subplots(figsize=(9, 0.36 * len(rows) + 1.5), layout="constrained")
    axes.axvspan(-0.01, 0.01, color="grey", alpha=0.15, linewidth=0)
    axes.axvline(0, color="black", linewidth=0.8)
    for y, (*_, d, _, decided) in enumerate(rows):
        kind = next(kind for kind in MARKS if decided.removeprefix("so far: ").startswith(kind))
        axes.plot(d.mean if d else 0, y, color=BLUE, ls="", **MARKS[kind])
        axes.plot(d.interval if d else (0, 0), (y, y), color=BLUE, zorder=1)
    labels = [f"{claim.text}  (n = {min(len(a), len(b))})" for claim, a, b, *_ in rows]
    finish(axes, xlabel="difference in loss, nats a byte, 95 %; left of 0: as claimed",
           yticks=range(len(rows)), yticklabels=labels, ylim=(len(rows) - 0.4, -0.6))
    marks = [pyplot().Line2D([], [], ls="", color=BLUE, label=kind, **mark)
             for kind, mark in MARKS.items()]
    so_far = any("so far" in decided for *_, decided in rows)
    title = "p < 0.05 after Holm's correction" + ", so far; seeds are missing" * so_far
    figure.legend(handles=marks, frameon=False, fontsize=8, ncols=5, loc="outside lower center",
                  title=title, title_fontsize=8)
    return figure


def gaps(curves):
    """{title: [(tokens, difference, margin)]}: a panel each, the difference against tokens."""
    figure, panels = pyplot().subplots(2, 4, figsize=(12, 5), layout="constrained", sharex=True)
    for axes, (title, rows) in zip(panels.flat, curves.items()):
        if rows:
            x, d, margin = ([row[i] for row in rows] for i in range(3))
            x = [tokens / 1e6 for tokens in x]
            axes.plot(x, d, "o-", color=BLUE, markersize=3)
            axes.plot(x, [0] * len(x), color="black", linewidth=0.8)
            axes.fill_between(x, [y - e for y, e in zip(d, margin)],
                              [y + e for y, e in zip(d, margin)], alpha=0.2, linewidth=0)
            low, high = axes.get_ylim()
            axes.set_ylim(max(-0.15, low), min(0.15, high))  # the first evaluations are far apart
        finish(axes, xlabel="tokens, millions", ylabel="nats a byte")
        axes.set_title(title, fontsize=9)
    return figure


def grid(found, widths, depths):
    """{run: {(width, depth): (value or None, n)}}: a heat map each, of the first run its loss, of
    the others the difference to it."""
    figure, panels = pyplot().subplots(1, len(found), figsize=(12, 3.2), layout="constrained")
    first = next(iter(found))
    for axes, (name, cells) in zip(panels, found.items()):
        shown = numpy.array([[cells[w, d][0] for w in widths] for d in depths], float)  # None: nan
        colours = dict(cmap="Blues") if name == first else dict(cmap="PuOr", vmin=-0.06, vmax=0.06)
        image = axes.imshow(shown, aspect="auto", **colours)
        axes.set(title=f"{name}: loss" if name == first else f"{name} - {first}", xlabel="width",
                 xticks=range(len(widths)), xticklabels=widths, ylabel="layers",
                 yticks=range(len(depths)), yticklabels=depths)
        for (w, d), (one, n) in cells.items():
            digits = "not run" if one is None else f"{one:.3f}" if name == first else f"{one:+.3f}"
            place = image.norm(one) if one is not None else 0.5
            dark = place > 0.7 or (place < 0.2 and name != first)  # the ends of the scales
            axes.text(widths.index(w), depths.index(d), f"{digits}\nn = {n}" if n else digits,
                      ha="center", va="center", fontsize=8, color="white" if dark else "black")
    return figure


def mean_line(axes, runs, series, label):
    """Mean over the runs of series(run), a list of (x, y)."""
    points = [list(zip(*same)) for same in zip(*map(series, runs))]
    if points:
        axes.plot([x[0] for x, _ in points], [sum(y) / len(y) for _, y in points], "o-",
                  markersize=4, label=label)


def curves(sweeps, records):
    """The sweep; the loss by K or top k at inference; by dz; and what infmoe's router does."""
    figure, ((rates, inference), (by_dz, router)) = pyplot().subplots(
        2, 2, figsize=(10, 7), layout="constrained")
    # colours come round again with another marker
    for i, (family, found) in enumerate(sweeps.items()):
        if found:
            x, lowest = [8 * 2 ** (k / 2) for k in sorted(found)], min(found.values())
            colour, marker = COLOURS[i % len(COLOURS)], "os"[i // len(COLOURS)]
            rates.semilogx(x, [found[k] - lowest for k in sorted(found)], marker + "-", base=2,
                           color=colour, label=family)
            rates.axvline(8 * 2 ** (parabola_minimum(found) / 2), color=colour, ls=":")
    rates.xaxis.set_major_formatter("{x:g}")
    finish(rates, title="sweep: loss above its lowest; dotted: the rate used",
           xlabel="learning rate, 1e-3", ylabel="nats a byte")
    runs = lambda name: [r for (n, _), r in sorted(records.items()) if n == name]
    for name, word in (("gpt2-infmoe", "loss at K="), ("gpt2-top2-of-4", "loss at top ")):
        series = lambda r, word=word: [(int(key.removeprefix(word)), y - r["measures"][word + "2"])
                                       for key, y in r["measures"].items()
                                       if key.removeprefix(word).isdigit()]
        mean_line(inference, runs(name), series, name)
    finish(inference, title="other K or top k at inference (trained with 2)", xlabel="K, or top k",
           ylabel="loss above that at 2")
    names = {8: "infmoe-dz8", 32: "gpt2-infmoe", 64: "infmoe-dz64", 128: "infmoe-dz128"}
    first = [(dz, records[name, 1]["val_loss"]) for dz, name in names.items()
             if (name, 1) in records]
    mean_line(by_dz, [first], list, None)
    finish(by_dz, title="width of the code z, seed 1", xlabel="dz", ylabel="validation loss")
    for i, label in enumerate(("entropy of the neurons' use", "sigma", "spread of mu"), 1):
        series = lambda r, i=i: [(row[0] / 1e6, row[i]) for row in r["routing"]]
        mean_line(router, runs("gpt2-infmoe"), series, label)
    finish(router, title="infinity-MoE's router while it trains", xlabel="tokens, millions")
    return figure
