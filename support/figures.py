"""The pictures of probe.py: functions of plain numbers that return a matplotlib figure.

Every one takes the model's name for its title. matplotlib is needed only when one is drawn.
"""
import numpy as np

COLOURS = ["#0072B2", "#E69F00", "#56B4E9", "#CC79A7", "#000000"]  # Okabe and Ito: for every eye
SHADES = "Blues"


def pyplot():
    """matplotlib.pyplot without a display, or None where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def canvas(model, title, rows=1, columns=1, size=(7, 3), **options):
    """A figure with a title that says what is shown, and of which model -> figure, axes"""
    figure, axes = pyplot().subplots(rows, columns, figsize=size, layout="constrained", **options)
    figure.suptitle(f"{title}\n{model}", fontsize=9)
    return figure, axes


def random_router(model, rows, note):
    """Bars per layer and intervention. rows: dictionaries with router, layer, accuracy_change and
    accuracy_error; note: what the bars and whiskers are."""
    names, labels = (list(dict.fromkeys(row[key] for row in rows)) for key in ("router", "layer"))
    size = 3.6 + 0.6 * len(labels), 3.6
    figure, axes = canvas(model, "Accuracy with another router in a layer", size=size)
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        mine = [row for row in rows if row["router"] == name]
        x = np.arange(len(labels)) + (i - (len(names) - 1) / 2) * width
        axes.bar(x, [row["accuracy_change"] for row in mine], width, label=name, color=COLOURS[i],
                 yerr=[row["accuracy_error"] or 0 for row in mine], error_kw={"linewidth": 0.8})
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xticks=range(len(labels)), xticklabels=labels,
             ylabel="change in next-token accuracy, points")
    axes.set_xlabel(f"layer with another router\n{note}", fontsize=8)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def use(model, labels, use, banks, things, none):
    """Heat map with a row per layer; right of it the gates that went to no expert; below it the
    summed use of what the layers share, against the even line.

    use: a list of counts (n,) per row; banks: lists of rows that share their experts; things:
    "experts" or "neurons"; none: shares (rows,) of the gates that are zero, or None. Without
    sharing, the lower panel has all of them, the most used first; so do the rows of private
    neurons, whose numbers mean nothing across layers.
    """
    shared, one, plt = len(banks) < len(use), things[:-1], pyplot()
    grid = np.stack([c / max(1, c.sum()) * len(c) for c in use])  # (rows, n); 1 = even
    if not shared and things == "neurons":
        grid = -np.sort(-grid, axis=1)
    height, extra = 0.7 + 0.18 * len(use), 0.0 if none is None else 0.14
    figure, axes = canvas(model, f"Which layer uses which {one}", 2, 2, (8, height + 3.2),
                          height_ratios=[height, 1.4], width_ratios=[1, extra or 0.001])
    (top, right), (bottom, corner) = axes
    corner.axis("off")
    norm = plt.matplotlib.colors.PowerNorm(0.5, 0, max(2, np.quantile(grid, 0.998)))
    image = top.imshow(grid, aspect="auto", cmap=SHADES, norm=norm)
    figure.colorbar(image, ax=top, label="use (1 = even)", pad=0.01)
    step = -(-len(labels) // 12)
    ticks = dict(yticks=range(0, len(labels), step), yticklabels=labels[::step])
    where = f"{one} of the {'pool' if shared else 'layer'}"
    numbered = things == "experts" or shared
    top.set(ylabel="layer", xlabel=where if numbered else f"{things}, most used first", **ticks)
    right.axis("on" if extra else "off")
    if extra:
        right.barh(range(len(none)), 100 * none, color=COLOURS[1])
        right.set(xlabel="no expert,\n% of gates", ylim=top.get_ylim(), yticks=[], xlim=(0, None))
    totals = [sum(use[k] for k in bank) for bank in banks]
    if not shared:
        totals = [-np.sort(-np.concatenate([c / max(1, c.sum()) for c in use]))]
    for i, counts in enumerate(totals):
        values = counts / counts.sum() * len(counts)
        edges = np.arange(len(counts) + 1) - 0.5
        label = f"pool {i}" if len(totals) > 1 else None
        bottom.stairs(values, edges, fill=True, alpha=0.6, label=label, color=COLOURS[i % 5])
    bottom.axhline(1, color="black", linestyle="--", linewidth=0.8, label="even")
    bottom.set(xlabel=where if shared else f"all {things}, most used first", ylim=(0, None),
               ylabel="summed use (1 = even)" if shared else "use (1 = even)", xlim=edges[[0, -1]])
    bottom.legend(frameon=False, fontsize=8)
    return figure


def pathways(model, titles, counts, hits):
    """Transition matrices of up to three pairs of layers, experts grouped by where they lead, and
    the hit rate of a cache."""
    shown = np.unique(np.linspace(0, len(counts) - 1, min(3, len(counts))).astype(int))
    figure, axes = canvas(model, "Where tokens go from layer to layer, and what a cache would hold",
                          1, len(shown) + 1, (2.4 * len(shown) + 3.2, 3.2))
    chances = [counts[k] / np.maximum(counts[k].sum(-1, keepdims=True), 1) for k in shown]
    for axis, k, chance in zip(axes, shown, chances):
        rows, columns = grouped(counts[k])
        image = axis.imshow(chance[rows][:, columns], cmap=SHADES, vmin=0,
                            vmax=max(map(np.max, chances)))
        axis.set(xlabel="next expert", ylabel="expert" if k == shown[0] else "")
        step = -(-len(rows) // 16)  # of the numbers that are legible
        axis.set_xticks(range(0, len(columns), step), columns[::step], fontsize=5, rotation=90)
        axis.set_yticks(range(0, len(rows), step), rows[::step], fontsize=5)
        axis.set_title(titles[k], fontsize=8)
    figure.colorbar(image, ax=axes[:-1].tolist(), label="share of the row's tokens", pad=0.01)
    axis = axes[-1]
    axis.plot(np.arange(1, len(hits) + 1), 100 * hits, color=COLOURS[0], label="those used last")
    axis.plot([0, len(hits)], [0, 100], "k--", linewidth=0.8, label="any others")
    axis.set(xlabel="experts in the cache", ylabel="hit rate, %", ylim=(0, 100),
             xlim=(0, len(hits)))
    axis.legend(frameon=False, fontsize=8)
    return figure


def grouped(counts):
    """Orders of rows and columns that put next to each other what goes to the same experts:
    spectral co-clustering (Dhillon 2001)."""
    rows, columns = (counts.sum(i, keepdims=True).clip(1e-9) ** -0.5 for i in (1, 0))
    left, _, right = np.linalg.svd(rows * counts * columns)
    return (left[:, 1] * rows[:, 0]).argsort(), (right[1] * columns[0]).argsort()


def overlap(model, labels, values):
    """Bars: mean |cos| per layer, between 0 (nothing in common) and 1 (the same)."""
    figure, axes = canvas(model, "Do the experts of one token do the same?", size=(5, 3))
    axes.bar(labels, values, color=COLOURS[0])
    axes.set(xlabel="layer", ylabel="overlap, mean |cos| (0 to 1)")
    return figure


def samples(model, rows, unit):
    """Loss and speed against the number of samples; the last row is z = mu. unit: byte or token."""
    title = "Quality and speed by samples per token (whiskers: ± standard error of the change)"
    figure, axes = canvas(model, title, 1, 2, (8, 3.2))
    names = f"held-out loss, nats per {unit}", f"{unit}s scored per second"
    for axis, key, label in zip(axes, ("loss", "tokens_per_second"), names):
        error = [row["loss_error"] or 0 for row in rows[:-1]] if key == "loss" else None
        axis.errorbar([row["K"] for row in rows[:-1]], [row[key] for row in rows[:-1]], error,
                      fmt="o-", color=COLOURS[0], label="K samples")
        axis.axhline(rows[-1][key], color="black", linestyle="--", linewidth=0.8, label="z = mu")
        axis.set(xlabel="samples K", ylabel=label, xticks=[row["K"] for row in rows[:-1]])
    axes[1].set_ylim(0)
    axes[0].legend(frameon=False, fontsize=8)
    return figure
