"""probe.py --routing and --samples on infinity-MoE: neurons in use, quality and speed against K."""
from collections import defaultdict

import numpy as np
import torch
from tqdm import tqdm

from probe import held_out, thinned, use_columns, watch
from support import figures
from support.results import changed, print_table, summary


def neuron_use(subject, config):
    """infmoe: how often each hidden neuron is selected, widths and spread of the densities.

    Returns the same as expert_use, with a row for every mask.
    """
    use, sums = defaultdict(float), defaultdict(float)

    def see(k, x, output):
        bank, codes = subject.layers[k].experts, thinned(output, len(x))
        for i, (_, counts) in zip(bank.w_z, bank.usage(codes)):
            mu = codes[int(i)].mu.float().mean(1)  # (T, dz)
            sigma = (codes[int(i)].logvar.float() / 2).exp().mean(1)  # (T, dz)
            use[k, i] = use[k, i] + counts.cpu().numpy()
            sums[k, i] += torch.stack((mu, mu.square(), sigma, torch.ones_like(mu))).sum(1).cpu()

    watch(subject, config, "routing", see)
    rows, deep = [], len(use) > len(subject.layers)
    for (k, i), counts in use.items():
        mu, square, sigma, _ = sums[k, i] / sums[k, i][-1]  # (dz,) each
        spread = (square - mu**2).clamp_min(0).sqrt().mean().item()
        label = f"{subject.layers[k].index}" + (f".{i}" if deep else "")
        rows.append({"layer": label} | use_columns(counts) | {
            "sigma": round(sigma.mean().item(), 4), "spread of mu": round(spread, 4)})
    places = {key: row for row, key in enumerate(use)}
    masks = dict.fromkeys(i for _, i in use)
    banks = [[places[k, i] for k in bank] for bank in subject.banks for i in masks]
    return rows, list(use.values()), banks, {}


def samples(subject, config, save):
    model, size = subject.model, subject.windows.shape[1] - 1
    if not subject.continuous or model.config.infmoe_mean:
        raise ValueError(f"it counts the draws of infmoe's routers, and {subject.name} draws none")
    most = 2**30 // (min(config.batch_size, len(subject.windows)) * size * model.config.d_expert)
    if max(config.samples) > max(1, most):
        raise ValueError(f"K={max(config.samples)} masks for each token of a batch do not fit into "
                         f"4 GB: at most {most}, or more with a smaller --batch_size")
    trained, base, rows = model.config.infmoe_samples, held_out(subject, config), []
    try:
        for k in tqdm([*config.samples, "z = mu"], desc="samples", leave=False, disable=None):
            mean, seconds = k == "z = mu", []
            model.set_samples(trained if mean else k, mean)
            change = held_out(subject, config, seconds) - base
            row = {"K": k, **summary(base, change[None, None], False)}
            rows.append(row | {"tokens_per_second": 1 / np.median(seconds)})
    finally:
        model.set_samples(trained, False)
    print(f"samples K at inference, trained with {trained}: change of the loss ± standard error "
          "over windows; speed of scoring")
    print_table(["K", f"nats per {subject.unit}", "change", "accuracy, %", f"{subject.unit}s/s"], [
        [row["K"], f"{row['loss']:.4f}", changed(row, "loss", 4), f"{row['accuracy']:.2f}",
         f"{row['tokens_per_second']:.0f}"] for row in rows])
    save("samples", {"rows": rows}, lambda: figures.samples(subject.name, rows, subject.unit))
