"""Length laws: hand-worked cases, the closed-form means, common random numbers, and the fitted presets."""

from math import e, exp, log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ooco_gym import presets
from ooco_gym.errors import OocoError
from ooco_gym.workload import FixedLengths, MixtureLengths, TableLengths, offline_work, online_source
from ooco_gym.workload.lengths import Component

WIDE = (1, 2**31 - 1)


def rng(seed=0):
    return np.random.default_rng(seed)


def test_fixed_lengths():
    prompt, output = FixedLengths(100, 7).sample(rng(), 3)
    assert (prompt.tolist(), output.tolist(), prompt.dtype) == ([100] * 3, [7] * 3, np.int32)
    with pytest.raises(OocoError, match="output_tokens is 0"):
        FixedLengths(100, 0)


def test_components_without_spread_are_exact():
    parts = [Component(0.25, log(10), log(3), 0, 0, 0), Component(0.75, log(1000.4), log(5000), 0, 0, 0)]
    lengths = MixtureLengths(parts, (1, 4000), (1, 4000))
    prompt, output = lengths.sample(rng(), 4000)
    assert set(zip(prompt.tolist(), output.tolist(), strict=True)) == {(10, 3), (1000, 4000)}
    assert np.mean(prompt == 10) == pytest.approx(0.25, abs=4 * (0.25 * 0.75 / 4000) ** 0.5)
    assert lengths.mean_output_tokens == pytest.approx(0.25 * 3 + 0.75 * 4000)


def test_the_mean_of_one_lognormal_by_hand():
    lengths = MixtureLengths([Component(1, log(1000), log(1000), 1.0, 1.0, 0)], WIDE, (1, 1000))
    assert lengths.mean_prompt_tokens == pytest.approx(1000 * exp(0.5), rel=1e-3)
    # Clipped at its median m: m/2 above it, and m sqrt(e) Phi(-1) below it.
    assert lengths.mean_output_tokens == pytest.approx(500 + 1000 * e**0.5 * 0.158655, rel=1e-3)


@pytest.mark.parametrize("rho", [-1.0, 0.0, 0.6])
def test_rho_is_the_correlation_of_the_logs(rho):
    lengths = MixtureLengths([Component(1, 10, 12, 0.5, 1.0, rho)], WIDE, WIDE)
    prompt, output = lengths.sample(rng(1), 40_000)
    logs = np.log(prompt), np.log(output)
    assert np.corrcoef(*logs)[0, 1] == pytest.approx(rho, abs=0.02)
    assert (logs[0].mean(), logs[0].std()) == pytest.approx((10, 0.5), abs=0.015)
    assert (logs[1].mean(), logs[1].std()) == pytest.approx((12, 1.0), abs=0.03)


def test_table_lengths_keep_rows_together_and_use_all():
    lengths = TableLengths([10, 20, 60], [1, 2, 6])
    prompt, output = lengths.sample(rng(), 3000)
    assert (prompt == 10 * output).all()
    counts = np.bincount(output, minlength=7)[[1, 2, 6]]
    assert (np.abs(counts - 1000) < 5 * 26).all()
    assert (lengths.mean_prompt_tokens, lengths.mean_output_tokens) == (30, 3)
    with pytest.raises(OocoError, match="at least one row"):
        TableLengths([], [])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weight": 0}, "weight is 0"),
        ({"weight": 0.9}, "sum to 0.9, they must sum to 1"),
        ({"sigma_prompt": -1}, "sigma_prompt is -1"),
        ({"rho": 1.5}, "rho is 1.5"),
    ],
)
def test_bad_mixtures_are_named(change, named):
    part = {"weight": 1, "mu_prompt": 5, "mu_output": 5, "sigma_prompt": 1, "sigma_output": 1, "rho": 0}
    with pytest.raises(OocoError) as caught:
        MixtureLengths([Component(**part | change)], WIDE, WIDE)
    assert named in str(caught.value)


@pytest.mark.parametrize("bounds", [(0, 5), (5, 4), (1.5, 4), (1, 2, 3)])
def test_bad_supports_are_named(bounds):
    with pytest.raises(OocoError, match="support of output_tokens"):
        MixtureLengths([Component(1, 5, 5, 1, 1, 0)], WIDE, bounds)


LAWS = {
    "fixed": FixedLengths(5, 6),
    "table": TableLengths(np.arange(1, 1000), np.arange(1, 1000)),
    "mixture": online_source(presets.load("workload", "azure-conv")).lengths,
}


@given(st.sampled_from(sorted(LAWS)), st.integers(0, 2**32), st.integers(0, 50), st.integers(0, 50))
@settings(max_examples=60)
def test_row_k_does_not_depend_on_how_many_are_drawn(law, seed, n, more):
    few, many = LAWS[law].sample(rng(seed), n), LAWS[law].sample(rng(seed), n + more)
    assert (few[0] == many[0][:n]).all()
    assert (few[1] == many[1][:n]).all()


# Means of the real traces: synthetic_fit.yaml, fit.real. The fits miss them by up to 6 % (deepseek prompts).
REAL_MEANS = [
    ("workload", "azure-conv", 1154.7, 211.13, 0.02),
    ("workload", "azure-code", 2047.8, 27.883, 0.03),
    ("workload", "mooncake", 15325.0, 149.12, 0.02),
    ("workload", "deepseek-r1", 1268.1, 1527.1, 0.07),
    ("offline", "arxiv-summarization", 2588.1, 291.43, 0.02),
    ("offline", "sharegpt-8k", 2340.0, 438.71, 0.02),
    ("offline", "arxiv-long", 29567.0, 363.18, 0.02),
]


@pytest.mark.parametrize(("group", "name", "prompt_mean", "output_mean", "tolerance"), REAL_MEANS)
def test_fitted_means_match_the_real_ones(group, name, prompt_mean, output_mean, tolerance):
    build = online_source if group == "workload" else offline_work
    lengths = build(presets.load(group, name)).lengths
    assert lengths.mean_prompt_tokens == pytest.approx(prompt_mean, rel=tolerance)
    assert lengths.mean_output_tokens == pytest.approx(output_mean, rel=tolerance)
    for drawn, mean, support in zip(
        lengths.sample(rng(7), 200_000),
        (lengths.mean_prompt_tokens, lengths.mean_output_tokens),
        (lengths.support_prompt_tokens, lengths.support_output_tokens),
        strict=True,
    ):
        # The closed form agrees with a sample within four standard errors and half a per mille for rounding.
        assert drawn.mean() == pytest.approx(mean, abs=4 * drawn.std() / 200_000**0.5 + 5e-4 * mean)
        assert support[0] <= drawn.min() <= drawn.max() <= support[1]
