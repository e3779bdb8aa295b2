"""The statistics of results/claims.md, without a library: tests, intervals and verdicts.

Welch (Biometrika 34, 1947), Holm (Scand. J. Statist. 6, 1979), two one-sided tests of equivalence
(Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987). tests/test_statistics.py compares with scipy and
statsmodels.
"""
import functools
import math
from statistics import mean, variance
from typing import NamedTuple

import numpy as np


class Difference(NamedTuple):
    """Of two means: left - right, its standard error, degrees of freedom, runs on each side."""
    mean: float
    error: float
    freedom: float
    n: int


def welch(left: list, right: list) -> Difference | None:
    """Unpaired, each side with its own variance; None for fewer than two values on a side."""
    if min(len(left), len(right)) < 2:
        return None
    a, b = variance(left) / len(left), variance(right) / len(right)
    freedom = (a + b) ** 2 / (a**2 / (len(left) - 1) + b**2 / (len(right) - 1) or math.inf)
    return Difference(mean(left) - mean(right), math.sqrt(a + b), freedom or 1,
                      min(len(left), len(right)))


def paired(left: list, right: list) -> Difference | None:
    """left[i] and right[i] belong together."""
    d = [x - y for x, y in zip(left, right, strict=True)]
    if len(d) < 2:
        return None
    return Difference(mean(d), math.sqrt(variance(d) / len(d)), len(d) - 1, len(d))


gauss = functools.cache(np.polynomial.legendre.leggauss)  # points and weights of the integral


def t_tail(t: float, freedom: float) -> float:
    """P(T > t) of Student's t. With t = sqrt(freedom) tan a its density is cos(a)^(freedom - 1)."""
    if t < 0:
        return 1 - t_tail(-t, freedom)
    x, w = gauss(200)
    start = math.atan(t / math.sqrt(freedom))
    mass = lambda a, b: (b - a) / 2 * float(
        w @ np.cos((b - a) / 2 * x + (a + b) / 2) ** (freedom - 1))
    return mass(start, math.pi / 2) / (2 * mass(0, math.pi / 2))


def t_quantile(p: float, freedom: float) -> float:
    """t with P(T > t) = p <= 0.5, by bisection."""
    low, high = 0.0, 1.0
    while t_tail(high, freedom) > p:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, freedom) > p else (low, middle)
    return high


def p_value(d: Difference) -> float:
    """Two-sided, of no difference."""
    if not d.error:
        return float(not d.mean)
    return 2 * t_tail(abs(d.mean) / d.error, d.freedom)


def interval(d: Difference, level: float = 0.95) -> tuple[float, float]:
    margin = t_quantile((1 - level) / 2, d.freedom) * d.error
    return d.mean - margin, d.mean + margin


def holm(p_values: list) -> list:
    """Adjusted for their number: the smallest times m, the next times m - 1, never falling."""
    m, adjusted, worst = len(p_values), [1.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(m), key=p_values.__getitem__)):
        worst = max(worst, min(1.0, (m - rank) * p_values[i]))
        adjusted[i] = worst
    return adjusted


def verdict(d: Difference | None, p_adjusted: float, margin: float) -> str:
    """What the claim "left is below right" comes to.

    p_adjusted below 0.05 decides by the sign. If that fails, a 90 % interval within the margin says
    that there is no difference beyond it (two one-sided tests at 5 %).
    """
    if d is None:
        return "not run yet"
    low, high = interval(d, 0.90)
    small = -margin < low and high < margin
    if p_adjusted < 0.05:
        words = "holds" if d.mean < 0 else "does not hold"
        return words + f", by less than {margin}" * small
    return f"no difference beyond {margin}" if small else "undecided"


def parabola_minimum(values: dict) -> float:
    """{x: y} at equal steps of x, the lowest y inside -> where the parabola through it and its two
    neighbours is lowest: within half a step of it."""
    x = min(values, key=values.get)
    below, lowest, above = values[x - 1], values[x], values[x + 1]
    curvature = below - 2 * lowest + above
    return x + 0.5 * (below - above) / curvature if curvature else float(x)
