"""Aggregates over scenarios, against values worked out by hand and cases whose answer is known."""

import numpy as np
import pytest

from ooco_gym.evaluation.aggregate import Results, aggregate, interquartile_mean, performance_profile


def results(useful, violations=None, bounds=None):
    """Policies a, b, ... on scenarios 0, 1, ...; ``useful`` is [policies, scenarios, episodes], 100 requests each."""
    useful = np.array(useful, float)
    violations = np.zeros(useful.shape) if violations is None else np.array(violations, float)
    names = tuple("abcdefgh"[: useful.shape[0]]), tuple(map(str, range(useful.shape[1])))
    return Results(
        *names, useful, violations, np.full(useful.shape, 100.0), np.array(bounds or [1.0] * useful.shape[1])
    )


def test_a_score_is_the_share_of_the_bound_and_nothing_where_objectives_are_missed():
    found = results([[[0.2, 0.4], [0.5, 0.5]]], violations=[[[0, 6], [4, 3]]], bounds=[0.6, 1.0]).scores()
    assert found.tolist() == [[pytest.approx(0.5), 0.0]]  # 3 % pooled is within the line, 3.5 % is not
    assert results([[[0.2]]], bounds=[0.0]).scores().tolist() == [[0.0]]


def test_the_interquartile_mean_leaves_the_outer_quarters_out():
    assert interquartile_mean(np.array([9.0, 1.0, 2.0, 3.0, -50.0, 4.0, 1.0, 100.0])) == pytest.approx(2.5)


def test_resampling_is_paired_and_stratified():
    """b = a + 0.1 in every episode: whatever is drawn, the difference is 0.1; scenarios never mix."""
    random = np.random.default_rng(1)
    a = random.uniform(0.2, 0.8, (5, 6))
    found = aggregate(results([a, a + 0.1]), "a")
    assert found["b"].difference.low == pytest.approx(0.1) == found["b"].difference.high
    assert found["a"].difference.value == 0.0 and found["a"].feasible == 5
    assert found["a"].interquartile_mean.low < found["a"].interquartile_mean.value < found["a"].interquartile_mean.high
    constant = results([np.tile([[0.1], [0.9]], (1, 4))]).draws(50)
    assert (constant == [[0.1, 0.9]]).all()


def test_the_profile_falls_from_one_to_nothing():
    shares, low, high = performance_profile(results([[[0.2, 0.2], [0.6, 0.6]]]), np.array([0.0, 0.1, 0.5, 0.7]))
    assert shares.tolist() == [[1.0, 1.0, 0.5, 0.0]] == low.tolist() == high.tolist()


def test_some_of_the_scenarios():
    whole = results([[[0.2], [0.6], [0.4]]], bounds=[1.0, 2.0, 4.0])
    assert whole.chosen(["2", "0"]).scores().tolist() == [[pytest.approx(0.1), pytest.approx(0.2)]]
