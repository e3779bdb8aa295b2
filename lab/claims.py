"""results/claims.md, a pure function of results/runs.jsonl: which claims of the papers hold here.

Twelve claims are primary and share one correction; what stands beside them, or was explored with
one seed, gets numbers and no verdict. `python -m lab.reproduce --report` writes it.
"""
import itertools
from collections import Counter
from functools import partial
from math import nan, sqrt
from statistics import mean, stdev, variance
from typing import NamedTuple

from lab import plots, reproduce
from lab.reproduce import PRIMARY, SEEDS, SIZES, SWEPT, UNTUNED
from lab.statistics import difference, holm, verdict
from support.files import write_atomically


class Claim(NamedTuple):
    """The left side is claimed to be below the right one: NAME, its loss, or NAME:MEASURE."""
    text: str
    left: str
    right: str
    paired: bool = False  # the same weights at the start, or one model measured twice
    margin: float = 0.01


CLAIMS = [
    Claim("MoE below dense, equal active", "vanilla", "dense"),
    Claim("UniPool below vanilla, equal stored", "unipool", "vanilla"),
    Claim("NormRouter's share: below a softmax pool", "unipool", "softmax-pool"),
    Claim("The pool's share: below private NormRouter banks", "unipool", "private-norm"),
    Claim("Half a pool still below vanilla", "unipool-50%", "vanilla"),
    Claim("Finer experts keep the gain: 16, top 2", "unipool-16/2", "vanilla-16/2"),
    Claim("infinity-MoE below dense (GPT-2)", "gpt2-infmoe", "gpt2-dense"),
    Claim("infinity-MoE below top 2 of 4 (GPT-2)", "gpt2-infmoe", "gpt2-top2-of-4"),
    Claim("Its mask: below no mask, equal neurons", "gpt2-infmoe", "gpt2-no-mask"),
    Claim("Its noise: below z = mu, equal neurons", "gpt2-infmoe", "gpt2-no-noise"),
    Claim("K = 8 below 1 at inference", "gpt2-infmoe:loss at K=8", "gpt2-infmoe:loss at K=1", True),
    Claim("Specialization + coupling lower the loss", "top2-sp-cp", "top2", True, 0.005),
]
BESIDE = [
    Claim("MoE against dense of equal total", "vanilla", "dense-total"),
    Claim("infinity-MoE against dense (LLaMA)", "infmoe", "dense"),
    Claim("infinity-MoE against top 2 of 4 (LLaMA)", "infmoe", "top2-of-4"),
    Claim("infinity-MoE's mask, neurons as at the end", "gpt2-infmoe", "gpt2-no-mask-27%"),
    Claim("infinity-MoE's noise, neurons as at the end", "gpt2-infmoe", "gpt2-no-noise-27%"),
    Claim("The mask without noise, against no mask", "gpt2-no-noise", "gpt2-no-mask"),
    Claim("What random routing costs", "vanilla:random, all", "unipool:random, all"),
    Claim("the same among its 8 most used", "vanilla:random, all", "unipool:random, matched"),
]
GAPS = [("vanilla", "dense"), ("dense-total", "dense"), ("unipool", "vanilla"), ("infmoe", "dense"),
        ("gpt2-infmoe", "gpt2-dense"), ("gpt2-infmoe", "gpt2-top2-of-4"),
        ("gpt2-infmoe", "gpt2-no-mask"), ("gpt2-infmoe", "gpt2-no-noise")]
MEASURES = "union", "loss at K=1", "loss at K=8", "loss at z=mu", "random, all", "random, matched"


# ---- numbers

def runs_of(records, name, most=101):
    """The records of an experiment by seed, those of the sweep or beyond `most` left out."""
    return {s: r for (n, s), r in sorted(records.items()) if n == name and s <= most}


def judged(records, claims, size):
    """[(claim, values left, right, difference or None, corrected p, verdict)]

    A claim that was not run counts among those corrected for, as one without any effect.
    """
    rows, seeds = [], SEEDS[size]
    for claim in claims:
        sides = []
        for name, _, measure in (side.partition(":") for side in (claim.left, claim.right)):
            mine = runs_of(records, name, seeds)
            sides.append({s: r["measures"].get(measure) if measure else r["val_loss"]
                          for s, r in mine.items() if not measure or measure in r["measures"]})
        if claim.paired:
            both = sorted(sides[0].keys() & sides[1].keys())
            sides = [{seed: side[seed] for seed in both} for side in sides]
        left, right = (list(side.values()) for side in sides)
        rows.append((claim, left, right, difference(left, right, claim.paired)))
    adjusted = holm([d.p if d else 1.0 for *_, d in rows])
    so_far = lambda left, right: "so far: " * (0 < min(len(left), len(right)) < seeds)
    return [(c, left, right, d, p, so_far(left, right) + verdict(d, p, c.margin))
            for (c, left, right, d), p in zip(rows, adjusted)]


def gap(records, pair, size):
    """[(tokens, mean difference, its 95 % margin)] of two runs' losses while they train."""
    curves = [[r["curve"] for r in runs_of(records, name, SEEDS[size]).values()] for name in pair]
    if min(map(len, curves)) < 2:
        return []
    rows = []
    for a, b in zip(*(zip(*runs) for runs in curves)):
        d = difference([loss for _, loss in a], [loss for _, loss in b])
        rows.append((a[0][0], d.mean, d.interval[1] - d.mean))
    return rows


def between_seeds(records):
    """What the losses of two seeds of one primary run differ by at most, in 95 % of the cases."""
    losses = [[r["val_loss"] for r in runs_of(records, name).values()] for name in PRIMARY]
    spreads = [variance(found) for found in losses if len(found) > 1]
    return 1.96 * sqrt(2 * mean(spreads)) if spreads else nan


def cell_pairs(records, name, cell):
    """[(record of a run, of dense)] at (width, depth), seed by seed, three at most."""
    one, dense = (runs_of(records, reproduce.at(n, *cell), 3) for n in (name, "dense"))
    return [(one[s], dense[s]) for s in sorted(one.keys() & dense.keys())]


def grid_of(records):
    """{run: {(width, depth): (mean over up to three seeds or None, n)}}: of dense its loss, of the
    others the difference to it."""
    found = {name: {} for name in reproduce.GRID_RUNS}
    for name, cell in itertools.product(found, itertools.product(
            reproduce.WIDTHS, reproduce.DEPTHS)):
        losses = [one["val_loss"] - (name != "dense") * dense["val_loss"]
                  for one, dense in cell_pairs(records, name, cell)]
        found[name][cell] = (mean(losses) if losses else None, len(losses))
    return found


# ---- words

HEAD = """\
# What holds at {size} size

Written by `python -m lab.reproduce --report --size={size}` from results/runs.jsonl: {n} runs.
**{least} of {seeds} seeds of every primary run are there.**

1. Size: {n_layer} LLaMA blocks, width {d_model}, context {block_size}, and its twin with GPT-2
   blocks, the backbone of infinity-MoE's paper. A run: {tokens:.2f}M bytes of {dataset}; loss:
   nats a byte, on {eval_tokens:,} held-out bytes after the last step.
2. Rates, per family (flavour and blocks): {rates}.
3. Seeds: 1 to {seeds} for every primary run, fixed beforehand; the first of all runs before the
   second, so that machine and seed go together. While seeds are missing, a verdict says "so far".
4. Left is claimed to be below right. Between architectures Welch's t-test; the losses of
   specialization and coupling, and one model measured twice, paired by seed.
5. p: two-sided, by Holm's correction for {claims} primary claims, those not run yet included.
6. *holds*, *does not hold*: p < 0.05, by the sign. Else *no difference beyond 0.01* (0.005 for
   specialization and coupling): the 90 % interval lies within. Else *undecided*.
7. The intervals shown are 95 %, of each claim by itself.
8. "Equal neurons": two masks of 25 % overlap, so controls of mask and noise keep {union:.1%} of the
   neurons, the masks' union early in training; beside them, {at_end:.0%}, as at its end (*union*).
9. Machines: {machine}. Text: {data}. Code: {commit}.
10. Every model here is far below every published scale in the second table: what fails here may
    hold there.
"""
PUBLISHED = """
The smallest scales at which others measured:

| who | scale | found |
|---|---|---|
| 2605.13769, TinyStories | below 25M | dense 1.6545, top 2 of 4 1.5788, dense, equal total 1.5608 |
| hbfreed, WikiText | 13.8M active | losses 3.6034, 3.4203, 3.3352 |
| MoEUT, 2405.16039 | from 44M | |
| UniPool, 2605.06665, Pile | 182M, 30B tokens | loss: dense 2.042, vanilla 1.9317, UniPool 1.9029 |
| infinity-MoE, 2601.17680, FineWeb | 129M active, 10B tokens | zero-shot 39.8: MoE + 2.5 %, low K |
| specialization, coupling, 2602.14159 | 1.1B | perplexity 12.50 to 12.27 |
| here | 0.4M active, 0.4M to 3.4M stored, 2M tokens | above |
"""


def spread(values):
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def row_of(*cells):
    return f"| {' | '.join(map(str, cells))} |"


def head_of(*cells):
    return row_of(*cells) + "\n|" + "---|" * len(cells)


def claim_row(claim, left, right, d, *last):
    sides = [f"`{side}` {spread(found)}" if found else f"`{side}`"
             for side, found in ((claim.left, left), (claim.right, right))]
    shown = f"{d.mean:+.4f} [{d.interval[0]:+.4f}, {d.interval[1]:+.4f}]" if d else ""
    return row_of(claim.text, *sides, shown, min(len(left), len(right)), *last)


def report(size):
    """Write results/claims.md (claims-gpu.md) and the figures."""
    records = reproduce.load_records(size)
    if not records:
        raise ValueError(f"no records of size {size} in results/runs.jsonl: run some first: "
                         "python -m lab.reproduce --minutes=60")
    name = "results/claims" if size == "cpu" else f"results/claims-{size}"
    text = "\n".join(report_lines(size, records)) + "\n"
    write_atomically(f"{name}.md", lambda f: f.write(text.encode()))
    print(f"wrote {name}.md from {len(records)} runs")
    if plots.available():
        for kind, draw in pictures(size, records).items():
            plots.save(f"{name}-{kind}.png", draw())


def pictures(size, records):
    """{name: a function that draws it}: those for which there is anything to show."""
    main, grid = judged(records, CLAIMS, size), grid_of(records)
    gaps = {f"{a} - {b}": gap(records, (a, b), size) for a, b in GAPS}
    sweeps = {} if size in UNTUNED else {f: reproduce.sweep(records, f)[1] for f in SWEPT}
    found = {
        "forest": any(d for *_, d, _, _ in main) and partial(plots.forest, main),
        "gaps": any(gaps.values()) and partial(plots.gaps, gaps),
        "grid": any(n for cells in grid.values() for _, n in cells.values())
                and partial(plots.grid, grid, reproduce.WIDTHS, reproduce.DEPTHS),
        "curves": any(sweeps.values()) and partial(plots.curves, sweeps, records)}
    return {kind: draw for kind, draw in found.items() if draw}


def report_lines(size, records):
    settings, main, tuned = SIZES[size], judged(records, CLAIMS, size), size not in UNTUNED
    counted = {key: ", ".join(f"{value} ({n} runs)" for value, n in sorted(Counter(
        r.get(key, "unknown") for r in records.values()).items()))
        for key in ("machine", "data", "commit")}
    drawn, name = pictures(size, records), "claims" if size == "cpu" else f"claims-{size}"
    picture = lambda kind, text: f"![{text}]({name}-{kind}.png)\n" * (kind in drawn)
    yield HEAD.format(
        **settings, **counted, size=size, n=len(records), claims=len(CLAIMS), seeds=SEEDS[size],
        tokens=settings["max_steps"] * settings["batch_tokens"] / 1e6, union=reproduce.UNION,
        at_end=reproduce.UNION_AT_END,
        least=min(min(len(left), len(right)) for _, left, right, *_ in main),
        rates="steps of sqrt 2 on seeds 101 to 103 with half of the tokens, a parabola's minimum "
              "(last table)" if tuned else f"{UNTUNED[size]:g} for all, untuned")
    yield picture("forest", "Differences of the primary claims")
    columns = "claim", "left", "right", "difference, 95 %", "n", "p (Holm)", "verdict"
    yield head_of(*columns)
    for *row, d, p, decided in main:
        yield claim_row(*row, d, f"{p:.2g}" if d else "", decided)
    yield "\nBeside them (p by itself):\n\n" + head_of(*columns[:-2], "p")
    for *row, d, _, _ in judged(records, BESIDE, size):
        yield claim_row(*row, d, f"{d.p:.2g}" if d else "not run yet")
    if again := list(repeated(records, main, size)):
        yield f"\nAgain, with fresh seeds (beyond {SEEDS[size]}; they count nowhere else):\n"
        yield head_of("claim", "difference, 95 %", "n", "within the interval above")
        yield from again
    yield PUBLISHED + "\n## From how many tokens on, at which width and depth?\n"
    yield picture("gaps", "Differences against tokens")
    yield head_of("difference", "first", "last", "below zero (95 %) from")
    yield from (gap_row(pair, gap(records, pair, size)) for pair in GAPS)
    yield "\n" + picture("grid", "Loss and differences by width and depth")
    yield ("Rates are those of width 64 and 8 layers, times 64 / width; two seeds of one run may "
           f"differ by {between_seeds(records):.2f} (95 %).\n")
    yield from grid_lines(records)
    yield ""
    yield from width_lines(records)
    yield ""
    yield picture("curves", "The sweep, samples at inference, dz, the router in training")
    yield from run_lines(records, size)
    yield "\n## Explorations, one seed, no verdict\n"
    yield f"Two seeds of one run may differ by {between_seeds(records):.2f} (95 %).\n"
    yield head_of("run", "beside", "difference")
    for name, (other, _) in reproduce.EXPLORED.items():
        pair = [records.get((n, 1)) for n in (name, other)]
        shown = f"{pair[0]['val_loss'] - pair[1]['val_loss']:+.4f}" if all(pair) else "not run yet"
        yield row_of(f"`{name}`", f"`{other}`", shown)
    if tuned:
        yield "\n## Rates\n\n" + head_of("family", "mean losses of three seeds", "used")
        yield from (sweep_row(records, size, family) for family in SWEPT)


def repeated(records, main, size):
    """Rows of the claims whose sides were both run with further seeds."""
    for claim, _, _, d, *_ in main:
        sides = [[r["val_loss"] for s, r in runs_of(records, side).items() if s > SEEDS[size]]
                 for side in (claim.left, claim.right)]
        if d and min(map(len, sides)) > 1:
            again, (low, high) = difference(*sides, claim.paired), d.interval
            shown = f"{again.mean:+.4f} [{again.interval[0]:+.4f}, {again.interval[1]:+.4f}]"
            inside = "yes" if low <= again.mean <= high else "no"
            yield row_of(claim.text, shown, min(map(len, sides)), inside)


def gap_row(pair, found):
    name = "`{}` - `{}`".format(*pair)
    if not found:
        return row_of(name, "not run yet", "", "")
    above = [i for i, (_, d, margin) in enumerate(found) if d + margin >= 0]
    later = found[above[-1] + 1 if above else 0:]
    ends = [f"{d:+.4f} ± {m:.4f} ({t / 1e6:.2f}M)" for t, d, m in (found[0], found[-1])]
    return row_of(name, *ends, f"{later[0][0] / 1e6:.2f}M" if later else "not yet")


def grid_lines(records):
    found = grid_of(records)
    dense, *others = found
    yield head_of("width", "layers", f"`{dense}`", *(f"`{n}` - `{dense}`" for n in others), "n")
    for cell in found[dense]:
        values, counts = zip(*(cells[cell] for cells in found.values()))
        yield row_of(*cell, *("" if v is None else f"{v:{sign}.4f}"
                              for v, sign in zip(values, ("", *"+++"))), min(counts))


def width_lines(records):
    """Means over the depths of the same differences, while the runs were going on."""
    moments = []
    for width, name in itertools.product(reproduce.WIDTHS, reproduce.GRID_RUNS):
        cells = [cell_pairs(records, name, (width, depth)) for depth in reproduce.DEPTHS]
        if name == "dense" or not all(cells):
            continue
        # seed 1 alone: as many runs of one depth as of another
        curves = [[record["curve"][1::2] for record in cell[0]] for cell in cells]
        if not moments:
            moments = [f"{tokens / 1e6:.2f}M" for tokens, _ in curves[0][0]]
            yield head_of("width", "difference, mean over the depths, seed 1", *moments)
        gaps = [[a[1] - b[1] for a, b in zip(*pair)] for pair in curves]
        yield row_of(width, f"`{name}` - `dense`", *(f"{mean(g):+.3f}" for g in zip(*gaps)))


def sweep_row(records, size, family):
    missing, means = reproduce.sweep(records, family)
    shown = ", ".join(f"{reproduce.rate_number(k):g}: {means[k]:.4f}" for k in sorted(means))
    rate = reproduce.learning_rate(records, size, family)
    return row_of(family, shown or f"{len(missing)} runs to go", f"{rate:g}" if rate else "")


def run_lines(records, size):
    yield ("\n## Runs\n\nFLOPs a byte of training, in millions: 6 N_active + 12 L D S; and what is "
           "executed (infinity-MoE computes its whole wide FFN in training).\n")
    yield head_of("run", "loss", "n", "rate", "stored", "active", "FLOPs", "executed", *MEASURES)
    for name in PRIMARY | reproduce.EXPLORED:
        if not (mine := list(runs_of(records, name, SEEDS[size]).values())):
            continue
        r, measured = mine[0], [m["measures"] for m in mine]
        idle = (r["n_params"] - r["n_active_params"]) * (r["settings"]["flavour"] == "infmoe")
        yield row_of(
            f"`{name}`", spread([m["val_loss"] for m in mine]), len(mine),
            f"{r['settings']['lr']:g}", *(f"{r[k] / 1e6:.2f}M" for k in (
                "n_params", "n_active_params")),
            *(f"{(r['flops_per_token'] + more) / 1e6:.2f}" for more in (0, 6 * idle)),
            *(f"{mean(m[key] for m in measured):.3f}" if all(key in m for m in measured) else ""
              for key in MEASURES))
