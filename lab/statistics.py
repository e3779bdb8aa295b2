"""The statistics of results/claims.md, by scipy: tests, intervals and verdicts.

Welch (Biometrika 34, 1947), Holm (Scand. J. Statist. 6, 1979), two one-sided tests of equivalence
(Schuirmann, J. Pharmacokinet. Biopharm. 15, 1987).
"""
import math
from statistics import mean
from typing import NamedTuple

from support.usage import optional


class Difference(NamedTuple):
    """Of two means: left - right; p, two-sided, of no difference; and intervals."""
    mean: float
    p: float
    interval: tuple[float, float]  # 95 %
    inner: tuple[float, float]  # 90 %


def difference(left: list, right: list, paired: bool = False) -> Difference | None:
    """By Welch's t-test, or paired: left[i] and right[i] belong together. None for fewer than two
    values on a side."""
    if min(len(left), len(right)) < 2:
        return None
    stats = optional("scipy.stats", "report")
    if paired:
        test = stats.ttest_rel(left, right)
    else:
        test = stats.ttest_ind(left, right, equal_var=False)
    p = 1.0 if math.isnan(test.pvalue) else float(test.pvalue)  # nan: all values are the same
    inner, outer = (tuple(map(float, test.confidence_interval(level))) for level in (0.90, 0.95))
    return Difference(mean(left) - mean(right), p, outer, inner)


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
    low, high = d.inner
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
