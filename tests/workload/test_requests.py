"""The request record: a hand-worked example, then invariants of window and scaled."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ooco_gym.errors import OocoError
from ooco_gym.workload import Requests


def test_a_small_record_by_hand():
    requests = Requests(np.array([0.0, 1.0, 1.0, 4.0]), np.array([10, 20, 30, 40]), np.array([1, 2, 3, 6]))
    assert (len(requests), requests.duration_s, requests.mean_rate_per_s) == (4, 4.0, 1.0)
    assert (requests.mean_prompt_tokens, requests.mean_output_tokens) == (25.0, 3.0)
    assert requests.prompt_tokens.dtype == requests.output_tokens.dtype == np.int32

    part = requests.window(1.0, 4.0)  # half open: the request at 4 s is out
    assert part.arrival_s.tolist() == [0.0, 0.0]
    assert part.prompt_tokens.tolist() == [20, 30]

    faster = requests.scaled(2.0)
    assert faster.arrival_s.tolist() == [0.0, 0.5, 0.5, 2.0]
    assert faster.output_tokens.tolist() == [1, 2, 3, 6]


def test_no_requests_have_zero_means():
    nothing = Requests(np.zeros(0), np.zeros(0), np.zeros(0))
    assert (len(nothing), nothing.duration_s, nothing.mean_rate_per_s, nothing.mean_prompt_tokens) == (
        0,
        0,
        0,
        0,
    )
    assert len(nothing.window(0, 10)) == 0


@pytest.mark.parametrize(
    ("arrival_s", "prompt", "output", "named"),
    [
        ([1.0, 0.5], [1, 1], [1, 1], "arrival_s must be sorted"),
        ([-0.1, 0.5], [1, 1], [1, 1], "arrival_s must be finite and at least 0"),
        ([0.0, np.nan], [1, 1], [1, 1], "arrival_s must be finite"),
        ([[0.0]], [1], [1], "arrival_s has shape (1, 1)"),
        ([0.0, 0.5], [1], [1, 1], "prompt_tokens has shape (1,), it must have shape (2,)"),
        ([0.0], [0], [1], "prompt_tokens must lie between 1 and"),
        ([0.0], [1], [2**31], "output_tokens must lie between 1 and"),
        ([0.0], [1], [1.5], "output_tokens must be whole numbers"),
    ],
)
def test_bad_fields_are_named(arrival_s, prompt, output, named):
    with pytest.raises(OocoError) as caught:
        Requests(np.array(arrival_s), np.array(prompt), np.array(output))
    assert named in str(caught.value)


@pytest.mark.parametrize("scale", [0, -1, np.nan, np.inf, "fast", True])
def test_rate_scale_must_be_positive(scale):
    with pytest.raises(OocoError, match=r"rate_scale is .* must be a positive number"):
        Requests(np.zeros(1), np.ones(1), np.ones(1)).scaled(scale)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=30), st.floats(0, 100), st.floats(0, 100))
def test_windows_that_tile_the_time_hold_every_request_once(times, first_cut, second_cut):
    low, high = sorted((first_cut, second_cut))
    arrival_s = np.sort(np.array(times))
    numbers = np.arange(1, len(times) + 1)
    requests = Requests(arrival_s, numbers, numbers)
    edges = [0.0, low, high, 101.0]
    parts = [requests.window(a, b) for a, b in pairwise(edges)]
    assert np.concatenate([part.prompt_tokens for part in parts]).tolist() == numbers.tolist()
    for (start, end), part in zip(pairwise(edges), parts, strict=True):
        assert ((part.arrival_s >= 0) & (part.arrival_s <= end - start)).all()
