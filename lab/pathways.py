"""probe.py --pathways: do tokens keep to paths through the layers, and what would a cache hold?

ids: (L, T, K) the experts that each layer chose, E for none; bank: for each layer the number of its
bank.
"""
import itertools

import numpy as np

import losses
from probe import counted, record
from support import figures
from support.results import print_table
from support.routers import bank_numbers


def pathways(subject, config, save):
    if subject.continuous or len(subject.layers) < 2:
        raise ValueError("it follows tokens between layers of discrete experts, and "
                         f"{subject.name} has none or one")
    n, (ids, _) = subject.layers[0].n_experts, record(subject, config)
    pairs = list(zip(ids.long(), ids[1:].long()))
    titles = [f"layers {a.index} to {b.index}" for a, b in itertools.pairwise(subject.layers)]
    consistent = [losses.path_consistency(a, b, n + 1).item() for a, b in pairs]
    chance = [losses.max_share(counted(b[:, :1], n)).item() / (n + 1) for _, b in pairs]
    print("path consistency: share of tokens whose next first choice is the usual successor of\n"
          "this one; chance: were the layers independent")
    table = [*zip(titles, consistent, chance), ("mean", np.mean(consistent), np.mean(chance))]
    print_table(["", "consistency", "chance"], [[t, f"{c:.3f}", f"{r:.3f}"] for t, c, r in table])
    bank = bank_numbers(subject.layers)
    fetched = accesses(ids.numpy(), bank, n)
    hits = cache_hits(fetched, (max(bank) + 1) * n)
    sizes = sorted({max(1, round(len(hits) * share)) for share in (0.05, 0.1, 0.25, 0.5, 0.75, 1)})
    print("a cache of the experts used last, decoding one token after another")
    print_table(["experts held", "hit rate"],
                [[f"{size} of {len(hits)}", f"{hits[size - 1]:.1%}"] for size in sizes])
    results = {"pairs": titles, "path_consistency": consistent, "chance": chance,
               "cache_hit_rate": hits.tolist()}
    counts = [hops(a.numpy(), b.numpy(), n) for a, b in pairs]
    save("pathways", results, lambda: figures.pathways(subject.name, titles, counts, hits))


def hops(here, there, n):
    """(T, K), (T, K) -> (E, E): how often a token goes from this expert to that one."""
    counts = np.zeros((n + 1, n + 1))
    np.add.at(counts, (here[:, :, None], there[:, None, :]), 1)
    return counts[:n, :n]  # without those from or to no expert


def accesses(ids, bank, n, most=2**18):
    """The experts that decoding would fetch, token by token and layer by layer -> numbers (n,)."""
    numbers = np.where(ids < n, ids + n * np.array(bank)[:, None, None], -1)
    numbers = numbers.transpose(1, 0, 2).flatten()  # (T, L, K) -> (n,)
    return numbers[numbers >= 0][:most]


def cache_hits(sequence: np.ndarray, n_experts: int) -> np.ndarray:
    """Hit rates (n_experts,) of caches of 1, 2, ... experts that drop the one used least recently.

    All sizes at once: how deep in the stack of experts by last use was the one asked for
    (Mattson 1970)?
    """
    stack, hits = [], np.zeros(n_experts)
    for expert in sequence.tolist():
        if expert in stack:
            depth = stack.index(expert)
            hits[depth] += 1
            del stack[depth]
        stack.insert(0, expert)
    return hits.cumsum() / max(1, len(sequence))
