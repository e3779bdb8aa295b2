"""Where to keep experts, for the pathways that probe.py records: on devices, and in a cache.

ids: (L, T, K) the experts that each layer chose, E for none; bank: for each layer the number of its
bank; traffic: {(bank, next bank): (E, E) how often a token goes from this expert to that one};
place: {bank: (E,) the device of each expert}.
"""
from collections import defaultdict

import numpy as np


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
