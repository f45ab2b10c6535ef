"""Arrival processes: exact small cases, invariants, and the burstiness of the traces they were fitted to."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ooco_gym import presets
from ooco_gym.errors import OocoError
from ooco_gym.workload import DiurnalArrivals, MarkovArrivals, PoissonArrivals, Ticks, online_source
from ooco_gym.workload.chain import RegimeChain

ALTERNATE = [[0.0, 1.0], [1.0, 0.0]]


def rng(seed=0):
    return np.random.default_rng(seed)


def fitted(name):
    return online_source(presets.load("workload", name)).arrivals


def iod(times_s, duration_s, window_s):
    """Index of dispersion: variance over mean of the counts in windows."""
    counts = np.histogram(times_s, np.arange(0, duration_s + 1e-9, window_s))[0]
    return counts.var() / counts.mean()


def test_a_chain_that_must_alternate():
    chain = RegimeChain(ALTERNATE, bin_s=2.0)
    assert chain.stationary == pytest.approx([0.5, 0.5])
    edges_s, states = chain.path(rng(), 7.0)
    assert edges_s.tolist() == [0, 2, 4, 6, 7]
    assert states.tolist() in ([0, 1, 0, 1], [1, 0, 1, 0])


def test_a_chain_that_never_moves():
    edges_s, states = RegimeChain([[1.0]], bin_s=1.0).path(rng(), 100.0)
    assert (edges_s.tolist(), states.tolist()) == ([0, 100], [0])


def test_dwells_and_visits_of_a_two_state_chain():
    # State 0 is left with 0.1 and state 1 with 0.4 per bin: mean dwells 10 and 2.5, stationary 0.8 and 0.2.
    chain = RegimeChain([[0.9, 0.1], [0.4, 0.6]], bin_s=1.0)
    assert chain.stationary == pytest.approx([0.8, 0.2])
    edges_s, states = chain.path(rng(3), 200_000.0)
    dwell_s = np.diff(edges_s)
    assert dwell_s[states == 0].mean() == pytest.approx(10, rel=0.03)
    assert dwell_s[states == 1].mean() == pytest.approx(2.5, rel=0.03)
    starts = [chain.path(rng(seed), 1.0)[1][0] for seed in range(1000)]
    assert np.mean(starts) == pytest.approx(0.2, abs=0.05)


def test_arrivals_fall_only_where_the_rate_is():
    times_s = MarkovArrivals([0.0, 5.0], ALTERNATE, bin_s=1.0).sample(rng(), 1000.0)
    parity = np.floor(times_s).astype(int) % 2
    assert parity.min() == parity.max()
    assert times_s.size == pytest.approx(2500, abs=5 * 50)


@pytest.mark.parametrize("gamma_shape", [1.0, 0.5])
def test_short_samples_have_the_full_rate(gamma_shape):
    # A process that started with a whole gap would be short of arrivals in its first second.
    flat = DiurnalArrivals(1.0, [[0.0, 0.0]], 0.0, 0.0, 600.0, [1.0], [[1.0]], 1.0, gamma_shape)
    counts = [flat.sample(rng(seed), 1.0).size for seed in range(3000)]
    assert np.mean(counts) == pytest.approx(1, abs=4 * np.std(counts) / 3000**0.5)


def test_regimes_modulate_the_day():
    day = DiurnalArrivals(2.0, [[0.0, 0.0]], 0.0, 0.0, 600.0, [0.0, 5.0], ALTERNATE, 2.0)
    times_s = day.sample(rng(), 2000.0)
    parity = np.floor(times_s / 2).astype(int) % 2
    assert parity.min() == parity.max()
    assert times_s.size == pytest.approx(4000, abs=5 * 64)  # multipliers are scaled to mean 1


def test_twice_the_rate_is_the_same_poisson_process_stretched():
    slow = PoissonArrivals(2.0).sample(rng(), 100.0)
    fast = PoissonArrivals(2.0).sample(rng(), 50.0, rate_scale=2.0)
    assert fast.tolist() == (slow / 2).tolist()


def test_ticks_release_on_a_grid():
    ticks = Ticks(period_s=0.1, probability=1.0, jitter_s=0.0, delay_s=0.0)
    before = np.sort(rng(1).random(500) * 100)
    after = ticks.snap(rng(), before)
    assert ((after - before >= 0) & (after - before <= 0.1)).all()
    offsets = (after - after[0]) / 0.1
    assert offsets == pytest.approx(np.rint(offsets), abs=1e-6)

    untouched = Ticks(0.1, 0.0, 0.003, 0.001).snap(rng(), before)
    assert untouched.tolist() == before.tolist()


def test_a_flat_day_with_one_regime_is_poisson():
    flat = DiurnalArrivals(3.0, [[0.0, 0.0]], 0.0, 0.0, 600.0, [1.0], [[1.0]], 1.0)
    times_s = flat.sample(rng(), 20_000.0)
    assert times_s.size / 20_000 == pytest.approx(3, rel=0.03)
    assert iod(times_s, 20_000, 1.0) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("compress", [1.0, 2.0])
def test_the_daily_shape_has_the_published_peak_to_trough(compress):
    harmonics = presets.load("workload", "deepseek-r1")["arrivals"]["harmonics"]
    day = DiurnalArrivals(30.0, harmonics, 0.0, 0.0, 600.0, [1.0], [[1.0]], 1.0, compress=compress)
    day_s = 86_400 / compress
    counts = np.histogram(day.sample(rng(2), day_s), 72)[0]
    # synthetic_fit.yaml: diurnal_peak_to_trough_of_fit 2.7776; a whole day has the mean rate.
    assert counts.max() / counts.min() == pytest.approx(2.7776, rel=0.06)
    assert counts.sum() / day_s == pytest.approx(30, rel=0.005)


def test_gamma_gaps_are_burstier_by_one_over_the_shape():
    renewal = DiurnalArrivals(5.0, [[0.0, 0.0]], 0.0, 0.0, 600.0, [1.0], [[1.0]], 1.0, gamma_shape=0.5)
    times_s = renewal.sample(rng(), 40_000.0)
    gaps_s = np.diff(times_s)
    assert gaps_s.var() / gaps_s.mean() ** 2 == pytest.approx(2.0, rel=0.05)  # 1 / shape
    assert times_s.size / 40_000 == pytest.approx(5, rel=0.02)


# name, seconds per sample, samples, then mean rate, iod_1s, iod_10s of the real trace (synthetic_fit.yaml).
# Tolerances: the fit's own misses plus the spread of the mean over samples; a Poisson process (iod 1) fails
# all but mooncake, which is one.
REAL = [
    ("azure-conv", 3500.0, 60, 5.5304, 1.3851, 3.857, 0.15),
    ("azure-code", 3500.0, 60, 2.5667, 13.186, 71.641, 0.12),
    ("mooncake", 3500.0, 60, 3.9069, 1.0889, 1.1778, 0.18),
    ("deepseek-r1", 86_400.0, 12, 16.015, 6.9301, 46.64, 0.2),
]


@pytest.mark.parametrize(("name", "duration_s", "n", "rate", "iod_1s", "iod_10s", "tolerance"), REAL)
def test_fitted_arrivals_are_as_bursty_as_the_real_ones(name, duration_s, n, rate, iod_1s, iod_10s, tolerance):
    arrivals = fitted(name)
    samples = [arrivals.sample(rng(seed), duration_s) for seed in range(n)]
    counts = np.array([times_s.size for times_s in samples])
    assert arrivals.mean_rate_per_s == pytest.approx(rate, rel=0.005)
    error = 4 * counts.std() / n**0.5
    assert counts.mean() == pytest.approx(arrivals.mean_rate_per_s * duration_s, abs=error)
    assert error < 0.2 * counts.mean()
    assert np.mean([iod(times_s, duration_s, 1) for times_s in samples]) == pytest.approx(iod_1s, rel=tolerance)
    assert np.mean([iod(times_s, duration_s, 10) for times_s in samples]) == pytest.approx(iod_10s, rel=tolerance)


@given(
    st.sampled_from(["azure-conv", "azure-code", "mooncake", "deepseek-r1"]),
    st.integers(0, 2**40),
    st.floats(1, 2000),
    st.floats(0.01, 5),
)
@settings(max_examples=60, deadline=None)
def test_samples_are_sorted_inside_the_duration_and_repeatable(name, seed, duration_s, scale):
    arrivals = PRESETS[name]
    times_s = arrivals.sample(rng(seed), duration_s, scale)
    assert (np.diff(times_s) >= 0).all()
    assert ((times_s >= 0) & (times_s < duration_s)).all()
    assert times_s.tolist() == arrivals.sample(rng(seed), duration_s, scale).tolist()


PRESETS = {name: fitted(name) for name in ("azure-conv", "azure-code", "mooncake", "deepseek-r1")}


@pytest.mark.parametrize("name", ["azure-conv", "mooncake", "deepseek-r1"])
def test_a_higher_rate_keeps_the_regimes_and_packs_the_same_process(name):
    slow = PRESETS[name].sample(rng(5), 2000.0)
    fast = PRESETS[name].sample(rng(5), 2000.0, rate_scale=2.0)
    assert fast.size > 1.5 * slow.size
    assert (fast[: slow.size] <= slow).all()  # arrival k comes earlier, never later
    longer = PRESETS[name].sample(rng(5), 2500.0)
    assert longer[: slow.size] == pytest.approx(slow)


def test_dwells_do_not_scale_with_the_rate():
    # On/off with mean dwells of 100 bins: at any rate about half the bins are silent.
    process = MarkovArrivals([0.0, 20.0], [[0.99, 0.01], [0.01, 0.99]], bin_s=1.0)
    silent = [
        np.mean(np.histogram(process.sample(rng(1), 50_000.0, scale), 50_000, (0, 50_000))[0] == 0)
        for scale in (1.0, 4.0)
    ]
    assert silent[0] == pytest.approx(silent[1], abs=0.001)
    assert silent[0] == pytest.approx(0.5, abs=0.1)


def test_an_episode_is_sampled_in_a_millisecond_or_so():
    for arrivals in PRESETS.values():
        arrivals.sample(rng(), 660.0)
        took_s = []
        for seed in range(9):
            start = time.perf_counter()
            arrivals.sample(rng(seed), 660.0)
            took_s.append(time.perf_counter() - start)
        assert np.median(took_s) < 0.005  # 0.03 to 0.5 ms measured; slack for a busy machine


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: PoissonArrivals(0), "rate_per_s is 0"),
        (lambda: MarkovArrivals([1, 2], [[1.0]], 1.0), "rate_per_s has shape (2,)"),
        (lambda: MarkovArrivals([-1], [[1.0]], 1.0), "rate_per_s must be numbers of at least 0"),
        (lambda: MarkovArrivals([0], [[1.0]], 1.0), "mean of rate_per_s is"),
        (lambda: MarkovArrivals([1], [[0.9]], 1.0), "probabilities that sum to 1"),
        (lambda: MarkovArrivals([1], [[0.5, 0.5]], 1.0), "it must be a square matrix"),
        (lambda: MarkovArrivals([1], [[1.0]], 0), "bin_s is 0"),
        (lambda: Ticks(0, 0.5, 0, 0), "period_s is 0"),
        (lambda: Ticks(0.1, 1.5, 0, 0), "probability is 1.5"),
        (lambda: DiurnalArrivals(1, [[0, 0]], 0, 1.0, 600, [1], [[1.0]], 1), "residual_ar1 is 1.0"),
        (lambda: DiurnalArrivals(1, [[0, 0]], 0, 0, 700, [1], [[1.0]], 1), "block_s is 700, it must divide"),
        (lambda: DiurnalArrivals(1, [[0, 0]], 0, 0, 600, [1], [[1.0]], 1, compress=0), "compress is 0"),
    ],
)
def test_bad_parameters_are_named(build, named):
    with pytest.raises(OocoError) as caught:
        build()
    assert named in str(caught.value)
