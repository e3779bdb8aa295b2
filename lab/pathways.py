"""probe.py --pathways: do tokens keep to paths through the layers, and where to keep the experts?

ids: (L, T, K) the experts that each layer chose, E for none; bank: for each layer the number of its
bank; traffic: {(bank, next bank): (E, E) how often a token goes from this expert to that one};
place: {bank: (E,) the device of each expert}.
"""
import itertools
from collections import defaultdict

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
    if n < config.devices:
        raise ValueError(f"devices={config.devices}: more than the {n} experts of a layer")
    pairs = list(zip(ids.long(), ids[1:].long()))
    titles = [f"layers {a.index} to {b.index}" for a, b in itertools.pairwise(subject.layers)]
    consistent = [losses.path_consistency(a, b, n + 1).item() for a, b in pairs]
    chance = [losses.max_share(counted(b[:, :1], n)).item() / (n + 1) for _, b in pairs]
    print("path consistency: share of tokens whose next first choice is the usual successor of\n"
          "this one; chance: were the layers independent")
    table = [*zip(titles, consistent, chance), ("mean", np.mean(consistent), np.mean(chance))]
    print_table(["", "consistency", "chance"], [[t, f"{c:.3f}", f"{r:.3f}"] for t, c, r in table])
    bank = bank_numbers(subject.layers)
    crossing = compare(ids.numpy(), bank, n, config.devices)
    print("hops to an expert of the next layer that change device, with experts on "
          f"{config.devices} devices;\nthe partition is made from one half of the text, all are "
          "judged on the other")
    print_table(["placement", "crossing"], [[name, f"{v:.1%}"] for name, v in crossing.items()])
    fetched = accesses(ids.numpy(), bank, n)
    hits = cache_hits(fetched, (max(bank) + 1) * n)
    sizes = sorted({max(1, round(len(hits) * share)) for share in (0.05, 0.1, 0.25, 0.5, 0.75, 1)})
    print("a cache of the experts used last, decoding one token after another")
    print_table(["experts held", "hit rate"],
                [[f"{size} of {len(hits)}", f"{hits[size - 1]:.1%}"] for size in sizes])
    results = {"pairs": titles, "path_consistency": consistent, "chance": chance,
               "crossing": crossing, "cache_hit_rate": hits.tolist()}
    counts = [hops(a.numpy(), b.numpy(), n) for a, b in pairs]
    save("pathways", results, lambda: figures.pathways(subject.name, titles, counts, hits))


def compare(ids: np.ndarray, bank: list, n: int, n_devices: int) -> dict:
    """Ways to place experts -> share of the hops that change device.

    The partition is made from the first half of the tokens, and all are judged on the second.
    """
    half = ids.shape[1] // 2
    seen, new = traffic(ids[:, :half], bank, n), traffic(ids[:, half:], bank, n)
    in_order = {number: np.arange(n) * n_devices // n for number in set(bank)}
    swapped = partition(seen, in_order, n_devices)
    return {"in order": crossings(new, in_order), "by graph partition": crossings(new, swapped),
            "at random": 1 - 1 / n_devices}


def traffic(ids, bank, n):
    total = defaultdict(float)
    for k, (here, there) in enumerate(zip(ids, ids[1:])):
        total[bank[k], bank[k + 1]] += hops(here, there, n)
    return total


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


def crossings(traffic: dict, place: dict) -> float:
    """Share of the hops between experts that change device."""
    away = sum(w[place[a][:, None] != place[b][None, :]].sum() for (a, b), w in traffic.items())
    return float(away / sum(w.sum() for w in traffic.values()))


def partition(traffic: dict, place: dict, n_devices: int, sweeps: int = 10) -> dict:
    """A placement with fewer crossings, every device keeping its number of experts of every bank.

    Within each bank two experts are swapped while that helps (Kernighan and Lin 1970).
    """
    place = {bank: devices.copy() for bank, devices in place.items()}
    for _ in range(sweeps):
        if not sum(improve(traffic, place, bank, n_devices) for bank in place):
            break
    return place


def improve(traffic, place, bank, n_devices):
    """The best swap within one bank, again and again until none helps; changes place[bank].
    -> how many"""
    devices, eye = place[bank], np.eye(n_devices)
    inside = np.zeros((len(devices), len(devices)))  # hops within the bank, both ways
    outside = np.zeros((len(devices), n_devices))  # hops to and from each device, by other banks
    for (a, b), w in traffic.items():
        if a == b == bank:
            inside += w + w.T
        elif a == bank:
            outside += w @ eye[place[b]]
        elif b == bank:
            outside += w.T @ eye[place[a]]
    np.fill_diagonal(inside, 0)  # staying on one expert never crosses
    for swaps in range(4 * len(devices)):
        pull = outside + inside @ eye[devices]  # (E, devices)
        # (E, E): what expert i would win on the device of j
        gain = pull[:, devices] - pull[np.arange(len(devices)), devices][:, None]
        gain = (gain + gain.T - 2 * inside) * (devices[:, None] != devices[None, :])
        i, j = np.unravel_index(gain.argmax(), gain.shape)
        if gain[i, j] <= 1e-9:
            return swaps
        devices[i], devices[j] = devices[j], devices[i]
    return 4 * len(devices)


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
