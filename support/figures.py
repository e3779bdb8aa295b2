"""The pictures of probe.py: functions of plain numbers that return a matplotlib figure; matplotlib is only needed here."""
import numpy as np

WHITE_TO_BLUE = "Blues"


def pyplot():
    """matplotlib.pyplot without a display, or None where matplotlib is missing."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        return plt
    except ImportError:
        return None


def random_router(rows, column):
    """Bars per layer and intervention. rows: dictionaries with router, layer, COLUMN_change and COLUMN_error."""
    names, labels = (list(dict.fromkeys(row[key] for row in rows)) for key in ("router", "layer"))
    figure, axes = pyplot().subplots(figsize=(2.2 + 0.6 * len(labels), 3), layout="constrained")
    for i, name in enumerate(names):
        mine = [row for row in rows if row["router"] == name]
        x = np.arange(len(labels)) + (i - (len(names) - 1) / 2) * 0.8 / len(names)
        axes.bar(x, [row[f"{column}_change"] for row in mine], 0.8 / len(names), label=name, color=f"C{i}",
                 yerr=[row[f"{column}_error"] or 0 for row in mine], error_kw={"linewidth": 0.8})
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xticks=range(len(labels)), xticklabels=labels, xlabel="layer with another router",
             ylabel="accuracy, points" if column == "accuracy" else "loss, nats")
    axes.legend(frameon=False, fontsize=8)
    return figure


def use(labels, use, banks, things):
    """Heat map with a row per layer, below it the summed use of what the layers share against the even line.

    use: a list of counts (n,) per row; banks: lists of rows that share their experts; things: "experts" or "neurons".
    Without sharing, the lower panel has all of them, the most used first; so do the rows of private neurons, whose
    numbers mean nothing across layers.
    """
    shared = len(banks) < len(use)
    grid = np.stack([counts / counts.sum() * len(counts) for counts in use])  # (rows, n); 1 = even
    if not shared and things == "neurons":
        grid = -np.sort(-grid, axis=1)
    height = 0.7 + 0.18 * len(use)
    figure, (top, bottom) = pyplot().subplots(2, 1, figsize=(7, height + 2.6), layout="constrained", height_ratios=[height, 1.3])
    norm = pyplot().matplotlib.colors.PowerNorm(0.5, 0, max(2, np.quantile(grid, 0.998)))  # differences near 1 stay visible
    image = top.imshow(grid, aspect="auto", cmap=WHITE_TO_BLUE, norm=norm)
    figure.colorbar(image, ax=top, label="use (1 = even)", pad=0.01)
    step = -(-len(labels) // 12)
    numbered = things == "experts" or shared
    top.set(ylabel="layer", yticks=range(0, len(labels), step), yticklabels=labels[::step],
            xlabel=f"{things[:-1]} of the {'pool' if shared else 'layer'}" if numbered else f"{things}, most used first")
    totals = [sum(use[k] for k in bank) for bank in banks] if shared else [np.concatenate([c / c.sum() for c in use])]
    for i, counts in enumerate(totals):
        values = counts / counts.sum() * len(counts)
        values = values if shared else -np.sort(-values)
        label = f"pool {i}" if len(totals) > 1 else None
        bottom.stairs(values, np.arange(len(values) + 1) - 0.5, fill=True, alpha=0.6, label=label)
    bottom.axhline(1, color="black", linestyle="--", linewidth=0.8, label="even")
    bottom.set(xlabel=f"{things[:-1]} of the pool" if shared else f"all {things}, most used first",
               ylabel="summed use" if shared else "use", ylim=(0, None), xlim=(-0.5, len(values) - 0.5))
    bottom.legend(frameon=False, fontsize=8)
    return figure


def pathways(titles, counts, hits):
    """Transition matrices of up to three pairs of layers, and the hit rate of a cache against its size."""
    shown = np.unique(np.linspace(0, len(counts) - 1, min(3, len(counts))).astype(int))
    figure, axes = pyplot().subplots(1, len(shown) + 1, figsize=(2.4 * len(shown) + 3, 2.6), layout="constrained")
    chances = [counts[k] / np.maximum(counts[k].sum(-1, keepdims=True), 1) for k in shown]  # rows sum to 1
    for axis, k, chance in zip(axes, shown, chances):
        image = axis.imshow(chance, cmap=WHITE_TO_BLUE, vmin=0, vmax=max(map(np.max, chances)))
        axis.set(title=titles[k], xlabel="next expert", ylabel="expert" if k == shown[0] else "")
    figure.colorbar(image, ax=axes[:-1].tolist(), label="share of its tokens", pad=0.01)
    axes[-1].plot(np.arange(1, len(hits) + 1), 100 * hits, label="those used last")
    axes[-1].plot([0, len(hits)], [0, 100], "k--", linewidth=0.8, label="any others")
    axes[-1].set(xlabel="experts in the cache", ylabel="hit rate, %", ylim=(0, 100), xlim=(0, len(hits)))
    axes[-1].legend(frameon=False, fontsize=8)
    return figure


def overlap(labels, values):
    figure, axes = pyplot().subplots(figsize=(4, 2.6), layout="constrained")
    axes.bar(labels, values)
    axes.set(xlabel="layer", ylabel="overlap, mean |cos|")
    return figure


def samples(rows):
    """Loss (with the standard error of its change) and speed against the number of samples; the last row is z = mu."""
    figure, axes = pyplot().subplots(1, 2, figsize=(7, 2.6), layout="constrained")
    for axis, key, label in zip(axes, ("loss", "tokens_per_second"), ("held-out loss, nats", "tokens per second")):
        error = [row["loss_error"] or 0 for row in rows[:-1]] if key == "loss" else None
        axis.errorbar([row["K"] for row in rows[:-1]], [row[key] for row in rows[:-1]], error, fmt="o-", label="K samples")
        axis.axhline(rows[-1][key], color="black", linestyle="--", linewidth=0.8, label="z = mu")
        axis.set(xlabel="samples K", ylabel=label)
    axes[1].set_ylim(0)
    axes[0].legend(frameon=False, fontsize=8)
    return figure
