"""Student's t against tables, the bootstrap against its linear approximation, Holm by hand."""

import math

import numpy as np
import pytest

from nsa_train.compare.statistics import Difference, Pair, differences, holm, t_quantile, t_within


@pytest.mark.parametrize(
    ("within", "freedom", "t"),
    [
        (0.95, 1, 12.7062),
        (0.95, 2, 4.30265),
        (0.95, 3, 3.18245),
        (0.95, 4, 2.77645),
        (0.9, 2, 2.91999),
        (0.95, 9, 2.26216),
        (0.9, 30, 1.69726),
        (0.99, 5, 4.03214),
    ],
)
def test_quantiles_are_those_of_the_tables(within, freedom, t):
    assert t_quantile(within, freedom) == pytest.approx(t, rel=1e-5)


@pytest.mark.parametrize("freedom", [1, 2, 3, 7, 10])
def test_the_distribution_is_the_integral_of_its_density(freedom):
    x = np.linspace(0, 2, 20001)
    density = math.gamma((freedom + 1) / 2) / math.gamma(freedom / 2) / math.sqrt(freedom * math.pi)
    values = density * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
    assert t_within(2.0, freedom) == pytest.approx(2 * np.trapezoid(values, x), rel=1e-7)


def test_a_difference_of_three_seeds_by_hand():
    d = Difference.of("nsa", "full", "all", {0: -0.02, 1: -0.03, 2: -0.04}, se_data=0.001)
    se = math.sqrt(0.01**2 / 3 + 0.001**2)
    assert (d.mean, d.se) == (pytest.approx(-0.03), pytest.approx(se))
    assert (d.low, d.high) == (pytest.approx(-0.03 - 4.302653 * se), pytest.approx(-0.03 + 4.302653 * se))
    assert d.upper == pytest.approx(-0.03 + 2.919986 * se)
    assert d.p == pytest.approx(1 - t_within(0.03 / se, 2))


def test_one_seed_has_no_interval():
    d = Difference.of("nsa", "full", "all", {0: -0.02}, se_data=0.001)
    assert (d.mean, d.se_data, d.se, d.low, d.high, d.upper, d.p) == (-0.02, 0.001, None, None, None, None, None)


def pair_of(gaps, labels, seeds=(0,)):
    base = {seed: np.full(labels.shape, 5.0) * labels for seed in seeds}
    return Pair("nsa", "full", {s: (base[s] + gaps, base[s]) for s in seeds}, dict.fromkeys(seeds, labels))


def test_the_bootstrap_gives_the_error_of_a_ratio_over_documents():
    draw = np.random.default_rng(0)
    labels = draw.integers(10, 500, (300, 2)).astype(float)
    gaps = labels * draw.normal(-0.03, 0.02, (300, 2))
    found = differences([pair_of(gaps, labels)], ["all", "rest"], 300)
    for k, d in enumerate(found):
        mean = gaps[:, k].sum() / labels[:, k].sum()
        linear = math.sqrt(((gaps[:, k] - mean * labels[:, k]) ** 2).sum()) / labels[:, k].sum()
        assert d.mean == pytest.approx(mean)
        assert d.se_data == pytest.approx(linear, rel=0.05)


def test_documents_that_all_seeds_share_do_not_average_out():
    """Two seeds that read the same documents with the same differences know no more than one."""
    labels = np.full((50, 1), 100.0)
    gaps = labels * np.random.default_rng(0).normal(0, 0.1, (50, 1))
    one, two = (differences([pair_of(gaps, labels, seeds)], ["all"], 50)[0] for seeds in ((0,), (0, 1)))
    assert two.se_data == pytest.approx(one.se_data)


def test_a_cut_without_labels_is_left_out_and_one_of_a_single_document_has_no_error():
    labels = np.array([[10.0, 0, 5], [20, 0, 0]])
    found = differences([pair_of(-0.1 * labels, labels)], ["all", "none", "single"], 2)
    assert [d.cut for d in found] == ["all", "single"]
    assert found[0].se_data is not None
    assert found[1].se_data is None
    assert found[1].mean == pytest.approx(-0.1)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([]) == []
