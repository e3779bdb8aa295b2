"""probe.py --pathways: do tokens keep to paths through the layers?"""
import itertools

import numpy as np

import losses
from probe import counted, record
from support import figures
from support.results import print_table


def pathways(subject, config, save):
    if subject.continuous or len(subject.layers) < 2:
        raise ValueError("it follows tokens between layers of discrete experts, and "
                         f"{subject.name} has none or one")
    n, (ids, _) = subject.layers[0].n_experts, record(subject, config)  # (L, T, K)
    pairs = list(zip(ids.long(), ids[1:].long()))
    titles = [f"layers {a.index} to {b.index}" for a, b in itertools.pairwise(subject.layers)]
    consistent = [losses.path_consistency(a, b, n + 1).item() for a, b in pairs]
    chance = [losses.max_share(counted(b[:, :1], n)).item() / (n + 1) for _, b in pairs]
    print("path consistency: share of tokens whose next first choice is the usual successor of\n"
          "this one; chance: were the layers independent")
    table = [*zip(titles, consistent, chance), ("mean", np.mean(consistent), np.mean(chance))]
    print_table(["", "consistency", "chance"], [[t, f"{c:.3f}", f"{r:.3f}"] for t, c, r in table])
    results = {"pairs": titles, "path_consistency": consistent, "chance": chance}
    counts = [hops(a.numpy(), b.numpy(), n) for a, b in pairs]
    save("pathways", results, lambda: figures.pathways(subject.name, titles, counts))


def hops(here, there, n):
    """(T, K), (T, K) -> (E, E): how often a token goes from this expert to that one."""
    counts = np.zeros((n + 1, n + 1))
    np.add.at(counts, (here[:, :, None], there[:, None, :]), 1)
    return counts[:n, :n]  # without those from or to no expert
