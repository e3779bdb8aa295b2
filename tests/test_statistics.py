"""lab.statistics against scipy and statsmodels, and the verdicts in words."""
import math

import numpy as np
import pytest

from lab import statistics as ours

stats = pytest.importorskip("scipy.stats")
weightstats = pytest.importorskip("statsmodels.stats.weightstats")
multitest = pytest.importorskip("statsmodels.stats.multitest")


@pytest.fixture(params=range(6))
def sides(request):
    """Two lists with a difference, unlike in length and spread."""
    rng = np.random.default_rng(request.param)
    a = rng.normal(1.40, 0.02, rng.integers(2, 25))
    return a.tolist(), rng.normal(1.40 + 0.01 * request.param, 0.005, len(a) + 3).tolist()


@pytest.mark.parametrize("freedom", [1, 1.5, 2.7, 11, 22.4, 100, 500])
def test_students_t(freedom):
    for t in (0.0, 0.5, 2.0, 5.0, 20.0, 100.0):
        assert ours.t_tail(t, freedom) == pytest.approx(stats.t.sf(t, freedom), rel=1e-6, abs=1e-12)
        assert ours.t_tail(-t, freedom) == pytest.approx(1 - ours.t_tail(t, freedom))
    for p in (0.5, 0.25, 0.05, 0.025, 1e-3, 1e-5):
        assert ours.t_quantile(p, freedom) == pytest.approx(stats.t.isf(p, freedom), rel=1e-6,
                                                            abs=1e-9)


def test_welch(sides):
    theirs, d = stats.ttest_ind(*sides, equal_var=False), ours.welch(*sides)
    assert ours.p_value(d) == pytest.approx(theirs.pvalue, rel=1e-6)
    assert d.freedom == pytest.approx(theirs.df) and d.n == len(sides[0])
    for level in (0.9, 0.95):
        assert ours.interval(d, level) == pytest.approx(tuple(theirs.confidence_interval(level)))


def test_paired(sides):
    left, right = sides[0], sides[1][:len(sides[0])]
    theirs, d = stats.ttest_rel(left, right), ours.paired(left, right)
    assert ours.p_value(d) == pytest.approx(theirs.pvalue, rel=1e-6)
    assert ours.interval(d) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    with pytest.raises(ValueError):
        ours.paired(left, right[1:])


@pytest.mark.parametrize("margin", [0.005, 0.01, 0.05])
def test_equivalence_is_two_one_sided_tests(sides, margin):
    """The 90 % interval lies within the margin where both tests are below 5 %."""
    left, right = sides[0], sides[1][:len(sides[0])]
    unpaired = weightstats.ttost_ind(*sides, -margin, margin, usevar="unequal")[0]
    pairs = weightstats.ttost_paired(np.array(left), np.array(right), -margin, margin)[0]
    for p, d in ((unpaired, ours.welch(*sides)), (pairs, ours.paired(left, right))):
        assert ("no difference" in ours.verdict(d, 1.0, margin)) == (p < 0.05)


@pytest.mark.parametrize("seed", range(4))
def test_holm(seed):
    p = (np.random.default_rng(seed).uniform(0, 1, 12) ** 4).tolist()
    assert ours.holm(p) == pytest.approx(multitest.multipletests(p, method="holm")[1].tolist())
    assert ours.holm([0.01, *[1.0] * 11]) == pytest.approx([0.12, *[1.0] * 11])


def of(middle, error, freedom=22):
    return ours.Difference(middle, error, freedom, 12)


@pytest.mark.parametrize("d, p, margin, words", [
    (of(-0.03, 0.005), 1e-5, 0.01, "holds"), (of(0.03, 0.005), 1e-5, 0.01, "does not hold"),
    (of(-0.03, 0.005), 0.06, 0.01, "undecided"),  # clear by itself, not among twelve
    (of(-0.001, 0.003), 0.9, 0.01, "no difference beyond 0.01"),
    (of(-0.001, 0.003), 0.9, 0.005, "undecided"),  # 90 %: -0.0062 to 0.0042
    (of(0.006, 0.001), 1e-4, 0.01, "does not hold, by less than 0.01"),
    (of(-0.009, 0.003), 0.2, 0.01, "undecided"), (None, 1.0, 0.01, "not run yet")])
def test_verdicts(d, p, margin, words):
    assert ours.verdict(d, p, margin) == words


def test_without_spread_or_enough_values():
    assert ours.welch([1.0], [1.0, 2.0]) is None and ours.paired([1.0], [2.0]) is None
    same, apart = ours.welch([1.0, 1.0], [1.0, 1.0]), ours.welch([1.0, 1.0], [2.0, 2.0])
    assert ours.p_value(same) == 1 and ours.p_value(apart) == 0
    assert ours.interval(apart) == (-1.0, -1.0)


@pytest.mark.parametrize("lowest", [-1.4, -1.0, -0.7])
def test_the_minimum_of_a_parabola(lowest):
    values = {k: 1.5 + 0.02 * (k - lowest) ** 2 for k in (-3, -2, -1, 0, 1)}
    assert ours.parabola_minimum(values) == pytest.approx(lowest)
    assert math.isclose(ours.parabola_minimum({0: 1.0, 1: 1.0, 2: 1.0, -1: 1.0}), 0)
