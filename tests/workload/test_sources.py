"""Online sources: a trace window by hand, common random numbers, determinism, and what is refused."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ooco_gym.errors import OocoError
from ooco_gym.workload import (
    FixedLengths,
    PoissonArrivals,
    Requests,
    SyntheticSource,
    TableLengths,
    TraceSource,
)


def ten_seconds(role="test", **kwargs):
    """One request per second at 0, 1, ... 10 s; request k has k + 1 prompt tokens."""
    numbers = np.arange(1, 12)
    return TraceSource("ten", Requests(np.arange(11.0), numbers, numbers), role, **kwargs)


def synthetic(**kwargs):
    lengths = TableLengths(np.arange(1, 1001), np.arange(1, 1001))
    return SyntheticSource("made", PoissonArrivals(3.0), lengths, **kwargs)


def test_the_whole_trace_at_twice_the_rate_by_hand():
    requests = ten_seconds(rate_scale=2.0).sample(0, 5.0)  # needs all 10 s, so the start is 0
    assert requests.arrival_s.tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5]
    assert requests.prompt_tokens.tolist() == list(range(1, 11))


def test_a_window_starts_anywhere_and_keeps_the_order():
    source = ten_seconds()
    first = Counter(int(source.sample(seed, 2.0).prompt_tokens[0]) for seed in range(400))
    assert set(first) == set(range(2, 10))  # starts are uniform in [0, 8]: the next whole second is 1..8
    assert min(first.values()) > 20
    requests = source.sample(3, 4.0)
    assert (np.diff(requests.prompt_tokens) == 1).all()
    assert np.diff(requests.arrival_s) == pytest.approx(1.0)


def test_a_restricted_trace_and_its_means():
    source = ten_seconds(window=(2.0, 6.0), rate_scale=2.0)
    assert (source.trace_duration_s, source.mean_rate_per_s) == (4.0, 2.0)
    assert (source.mean_prompt_tokens, source.mean_output_tokens) == (4.5, 4.5)  # requests 3, 4, 5, 6
    assert source.sample(0, 2.0).prompt_tokens.tolist() == [3, 4, 5, 6]


@given(st.integers(0, 2**40), st.floats(0.5, 4), st.floats(0.1, 2.4))
def test_trace_samples_are_stretched_pieces(seed, scale, duration_s):
    source = ten_seconds(rate_scale=scale)
    requests = source.sample(seed, duration_s)
    assert ((requests.arrival_s >= 0) & (requests.arrival_s < duration_s)).all()
    assert np.diff(requests.arrival_s) == pytest.approx(1 / scale, rel=1e-6)
    assert np.floor(duration_s * scale - 1e-9) <= len(requests) <= np.ceil(duration_s * scale + 1e-9)
    assert requests.arrival_s.tolist() == source.sample(seed, duration_s).arrival_s.tolist()


def test_a_trace_that_is_too_short_names_both_durations():
    with pytest.raises(OocoError) as caught:
        ten_seconds(rate_scale=3.0).sample(0, 4.0)
    for named in ("'ten'", "4 s at rate_scale 3", "12 s of trace", "10 s"):
        assert named in str(caught.value)


def test_lengths_depend_on_the_seed_and_the_number_but_not_on_the_rate():
    slow, fast = synthetic().sample(5, 100.0), synthetic().with_rate_scale(2.0).sample(5, 100.0)
    assert len(fast) > 1.5 * len(slow)
    assert fast.prompt_tokens[: len(slow)].tolist() == slow.prompt_tokens.tolist()
    assert fast.arrival_s[: len(slow)] == pytest.approx(slow.arrival_s / 2)
    longer = synthetic().sample(5, 200.0)
    assert longer.output_tokens[: len(slow)].tolist() == slow.output_tokens.tolist()


def test_seeds_repeat_and_differ():
    assert synthetic().sample(1, 50.0).arrival_s.tolist() == synthetic().sample(1, 50.0).arrival_s.tolist()
    assert synthetic().sample(1, 50.0).arrival_s.tolist() != synthetic().sample(2, 50.0).arrival_s.tolist()


def test_rates_and_means_follow_the_scale():
    source = synthetic().with_rate_scale(0.5)
    assert (source.rate_scale, source.mean_rate_per_s, source.mean_prompt_tokens) == (0.5, 1.5, 500.5)
    assert (source.name, source.role) == ("made", "train")
    counts = [len(source.sample(seed, 400.0)) for seed in range(30)]
    assert np.mean(counts) == pytest.approx(600, abs=4 * (600 / 30) ** 0.5)
    scaled = ten_seconds(window=(1.0, 9.0)).with_rate_scale(4.0)
    assert (scaled.mean_rate_per_s, scaled.window, scaled.role) == (4.0, (1.0, 9.0), "test")


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: synthetic(rate_scale=0), "workload 'made': rate_scale is 0"),
        (lambda: synthetic(role="exam"), "role is 'exam', it must be one of train, validation, test"),
        (lambda: synthetic().sample(-1, 10.0), "seed is -1"),
        (lambda: synthetic().sample(0.5, 10.0), "seed is 0.5"),
        (lambda: synthetic().sample(0, 0.0), "duration_s is 0.0"),
        (
            lambda: ten_seconds(window=(5.0, 12.0)),
            "window [5, 12] s is not a part of the trace, which is 10 s",
        ),
        (lambda: ten_seconds(window=(5.0, 5.0)), "window [5, 5] s"),
        (lambda: ten_seconds(window=(5.1, 5.9)), "no requests in the window [5.1, 5.9] s"),
        (
            lambda: SyntheticSource("x", PoissonArrivals(1), FixedLengths(1, 1), rate_scale="auto"),
            "is 'auto'",
        ),
    ],
)
def test_bad_values_are_named(build, named):
    with pytest.raises(OocoError) as caught:
        build()
    assert named in str(caught.value)
