"""lab.statistics: values worked out by hand, statsmodels', and the verdicts in words."""
import math
import random

import pytest

from lab import statistics
from lab.statistics import Difference, difference

pytest.importorskip("scipy")
pytestmark = pytest.mark.filterwarnings("ignore:Precision loss")  # of sides without spread


def test_welch():
    """With spread on one side alone there is one degree of freedom: T is Cauchy's."""
    d = difference([0.0, 2.0], [5.0, 5.0])  # -4, standard error 1
    assert d.mean == -4 and d.p == pytest.approx(1 - 2 / math.pi * math.atan(4))
    assert d.interval == pytest.approx((-4 - 12.7062, -4 + 12.7062), abs=1e-4)
    assert d.inner == pytest.approx((-4 - 6.3138, -4 + 6.3138), abs=1e-4)


def test_paired():
    """Two degrees of freedom: P(|T| > t) = 1 - t / sqrt(2 + t^2)."""
    d = difference([11.0, 22.0, 33.0], [10.0, 20.0, 30.0], paired=True)
    assert d.mean == 2 and d.p == pytest.approx(1 - (12 / 14) ** 0.5)  # t^2 = 12
    assert d.interval == pytest.approx((2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5), abs=1e-5)
    with pytest.raises(ValueError):
        difference([1.0, 2.0], [1.0, 2.0, 3.0], paired=True)


@pytest.mark.parametrize("sizes", [(12, 12), (12, 3), (2, 5)])
@pytest.mark.parametrize("shift", [0.0, 0.006, 0.02])
def test_as_statsmodels_has_it(shift, sizes):
    """Welch's test, its interval, and two one-sided tests: both reject, at 5 %, where the 90 %
    interval lies within the margin."""
    oracle = pytest.importorskip("statsmodels.stats.weightstats")
    draw = random.Random(1).gauss
    left, right = ([draw(1.3 + s, 0.01) for _ in range(n)] for s, n in zip((shift, 0), sizes))
    d, means = difference(left, right), oracle.CompareMeans.from_data(left, right)
    assert d.p == pytest.approx(means.ttest_ind(usevar="unequal")[1])
    assert d.interval == pytest.approx(means.tconfint_diff(usevar="unequal"))
    for margin in (0.005, 0.01, 0.03, 0.1):
        p = means.ttost_ind(-margin, margin, usevar="unequal")[0]
        assert (statistics.verdict(d, 1.0, margin) != "undecided") == (p < 0.05)


def test_holm():
    assert statistics.holm([0.03, 0.01, 0.04, 1.0]) == pytest.approx([0.09, 0.04, 0.09, 1.0])
    assert statistics.holm([0.01, *[1.0] * 11]) == pytest.approx([0.12, *[1.0] * 11])
    oracle = pytest.importorskip("statsmodels.stats.multitest")
    for seed in range(20):
        p_values = [random.Random(seed).random() ** 4 for _ in range(12)]
        adjusted = oracle.multipletests(p_values, method="holm")[1]
        assert statistics.holm(p_values) == pytest.approx(adjusted)


@pytest.mark.parametrize("middle, margin_90, p, margin, words", [
    (-0.03, 0.0086, 1e-5, 0.01, "holds"), (0.03, 0.0086, 1e-5, 0.01, "does not hold"),
    (-0.03, 0.0086, 0.06, 0.01, "undecided"),  # clear by itself, not among twelve
    (-0.001, 0.0052, 0.9, 0.01, "no difference beyond 0.01"),
    (-0.001, 0.0052, 0.9, 0.005, "undecided"),
    (0.006, 0.0017, 1e-4, 0.01, "does not hold, by less than 0.01"),
    (-0.009, 0.0052, 0.2, 0.01, "undecided")])
def test_verdicts(middle, margin_90, p, margin, words):
    d = Difference(middle, p, (), (middle - margin_90, middle + margin_90))
    assert statistics.verdict(d, p, margin) == words


def test_without_spread_or_enough_values():
    assert difference([1.0], [1.0, 2.0]) is None
    assert statistics.verdict(None, 1.0, 0.01) == "not run yet"
    same, apart = difference([1.0, 1.0], [1.0, 1.0]), difference([1.0, 1.0], [2.0, 2.0])
    assert same.p == 1 and apart.p == 0 and apart.interval == (-1.0, -1.0)


@pytest.mark.parametrize("lowest", [-1.4, -1.0, -0.7])
def test_the_minimum_of_a_parabola(lowest):
    values = {k: 1.5 + 0.02 * (k - lowest) ** 2 for k in (-3, -2, -1, 0, 1)}
    assert statistics.parabola_minimum(values) == pytest.approx(lowest)
    assert statistics.parabola_minimum({0: 1.0, 1: 1.0, 2: 1.0, -1: 1.0}) == 0
