"""The Control contract: the action map worked by hand, its invariants, and the sentences of its errors."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ooco_gym.cluster.control import (
    KNOB_COUNT,
    KNOB_NAMES,
    KNOBS,
    RULES,
    WHOLE_PROMPT,
    action_to_knobs,
    check_knobs,
    check_rules,
    knobs_from_mapping,
    knobs_to_action,
    ooco_action,
    ooco_knobs,
)
from ooco_gym.errors import OocoError

LOW, HIGH = (np.array([getattr(knob, side) for knob in KNOBS]) for side in ("low", "high"))
ACTIONS = st.lists(st.floats(-1, 1), min_size=KNOB_COUNT, max_size=KNOB_COUNT).map(np.array)
# A knob within a rounding error of OOCO's own setting snaps to it: a millionth of it, or of 1.
SNAP = 2e-6 * np.maximum([knob.ooco for knob in KNOBS], 1.0)
INSIDE = st.lists(st.floats(0, 1), min_size=KNOB_COUNT, max_size=KNOB_COUNT).map(np.array)


def test_the_map_by_hand():
    """The middle action is the middle of a linear range and the geometric mean of a logarithmic one."""
    middle = action_to_knobs(np.zeros(KNOB_COUNT))
    pools = [0.75, np.sqrt(0.1 * 8), 0.75, 0.5, 1.0, 0.4]
    assert middle == pytest.approx([*pools, np.sqrt(128 * 8192), 2048, 0.75, 0.0])
    quarter = action_to_knobs(np.full(KNOB_COUNT, -0.45))
    pools = [0.375, 0.1 * 80**0.25, 0.525, 0.25, 0.1 * 100**0.25, 0.2]
    assert quarter == pytest.approx([*pools, 128 * 64**0.25, 1024, 0.625, -0.25])


def test_oocos_setting_is_the_papers():
    paper = {"preempt_slack": 0.0, "gate_batch": 1.0, "tpot_bound": 0.98, "pull_kv": 0.9, "pull_length": 1.0}
    off = {"kv_reserve": 0.0, "prefill_chunk": 8192.0, "strict_prefill": 0.0, "pushback": 1.0, "strict_share": 0.0}
    assert dict(zip(KNOB_NAMES, ooco_knobs(), strict=True)) == paper | off
    assert check_rules({})["mix_selection"] == "every_third"


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_oocos_action_is_oocos_knobs_to_the_last_bit(dtype):
    """gate_batch comes out above 1: the gate ``count < gate_batch * B_sat`` then admits B_sat + 1."""
    assert action_to_knobs(ooco_action().astype(dtype)).tolist() == ooco_knobs().tolist()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_oocos_action_is_oocos_knobs(dtype):
    knobs = action_to_knobs(ooco_action().astype(dtype))
    assert knobs == pytest.approx(ooco_knobs(), rel=1e-6)
    on_a_bound = dict(zip(KNOB_NAMES, knobs, strict=True))
    assert on_a_bound["preempt_slack"] == on_a_bound["kv_reserve"] == on_a_bound["strict_prefill"] == 0.0
    assert (on_a_bound["prefill_chunk"], on_a_bound["pushback"]) == (WHOLE_PROMPT, 1.0)


SATURATED = [i for i, knob in enumerate(KNOBS) if knob.ooco in (knob.low, knob.high)]


@given(st.lists(st.floats(-0.049, 0.049), min_size=len(SATURATED), max_size=len(SATURATED)))
def test_noise_on_a_saturated_knob_of_ooco_changes_nothing(noise):
    """A Gaussian policy that starts at OOCO stays in the margins: always preempt, and nothing beyond the paper."""
    names = [KNOB_NAMES[index] for index in SATURATED]
    assert names == ["preempt_slack", "kv_reserve", "prefill_chunk", "strict_prefill", "pushback"]
    action = ooco_action()
    action[SATURATED] += noise
    assert action_to_knobs(action).tolist() == action_to_knobs(ooco_action()).tolist()


@given(ACTIONS)
def test_an_action_gives_knobs_in_range_and_back(action):
    knobs = action_to_knobs(action)
    assert check_knobs(knobs).tolist() == knobs.tolist()
    assert (np.abs(action_to_knobs(knobs_to_action(knobs)) - knobs) <= SNAP).all()
    inside = np.abs(action) < 0.8999
    assert knobs_to_action(knobs)[inside] == pytest.approx(action[inside], abs=1e-5)


@given(INSIDE)
def test_knobs_give_an_action_and_back(share):
    knobs = LOW + share * (HIGH - LOW)
    action = knobs_to_action(knobs)
    assert (np.abs(action) <= 0.95 + 1e-12).all()
    assert (np.abs(action_to_knobs(action) - knobs) <= SNAP).all()


@given(ACTIONS, st.integers(0, KNOB_COUNT - 1), st.floats(-1, 1))
def test_each_action_entry_moves_its_own_knob_monotonically(action, index, other):
    changed = action.copy()
    changed[index] = other
    before, after = action_to_knobs(action), action_to_knobs(changed)
    assert np.delete(before, index).tolist() == np.delete(after, index).tolist()
    assert (after[index] - before[index]) * (other - action[index]) >= 0
    if abs(other - action[index]) > 1e-5 and max(abs(other), abs(action[index])) <= 0.9:
        assert after[index] != before[index]


@given(st.floats(0.9, 1.0))
def test_the_outer_margins_saturate(edge):
    assert action_to_knobs(np.full(KNOB_COUNT, edge)) == pytest.approx(HIGH, rel=1e-12)
    assert action_to_knobs(np.full(KNOB_COUNT, -edge)) == pytest.approx(LOW, rel=1e-12)


def test_actions_beyond_the_box_are_clipped():
    assert action_to_knobs([-7.0, 7.0] * 5).tolist() == action_to_knobs([-1.0, 1.0] * 5).tolist()


def test_a_batch_of_actions_is_mapped_row_by_row():
    batch = np.random.default_rng(0).uniform(-1, 1, (5, KNOB_COUNT))
    assert action_to_knobs(batch).tolist() == [action_to_knobs(row).tolist() for row in batch]


def test_a_mapping_sets_what_it_names():
    knobs = knobs_from_mapping({"gate_batch": 2, "kv_reserve": 0.25, "strict_share": -0.25, "prefill_chunk": 512})
    assert dict(zip(KNOB_NAMES, knobs, strict=True)) == {
        "preempt_slack": 0.0,
        "gate_batch": 2.0,
        "tpot_bound": 0.98,
        "pull_kv": 0.9,
        "pull_length": 1.0,
        "kv_reserve": 0.25,
        "prefill_chunk": 512.0,
        "strict_prefill": 0.0,
        "pushback": 1.0,
        "strict_share": -0.25,
    }


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"gate": 1.0}, f"unknown knob 'gate': known are {', '.join(KNOB_NAMES)}"),
        ({"gate_batch": 0.0}, "knob 'gate_batch' is 0, accepted is 0.1 to 8"),
        ({"tpot_bound": 1.3}, "knob 'tpot_bound' is 1.3, accepted is 0.3 to 1.2"),
        ({"pull_kv": float("nan")}, "knob 'pull_kv' is nan, accepted is 0 to 1"),
        ({"pull_length": float("inf")}, "knob 'pull_length' is inf, accepted is 0.1 to 10"),
        ({"kv_reserve": 1.0}, "knob 'kv_reserve' is 1, accepted is 0 to 0.8"),
        ({"prefill_chunk": 64}, "knob 'prefill_chunk' is 64, accepted is 128 to 8192"),
        ({"strict_prefill": 5000}, "knob 'strict_prefill' is 5000, accepted is 0 to 4096"),
        ({"pushback": 0.25}, "knob 'pushback' is 0.25, accepted is 0.5 to 1"),
        ({"strict_share": -0.75}, "knob 'strict_share' is -0.75, accepted is -0.5 to 0.5"),
        ({"preempt_slack": 2, "strict_share": 1}, "knob 'preempt_slack' is 2, accepted is 0 to 1.5"),  # the first
    ],
)
def test_a_knob_that_cannot_be_set(values, sentence):
    with pytest.raises(OocoError) as caught:
        knobs_from_mapping(values)
    assert str(caught.value) == sentence


@pytest.mark.parametrize("value", ["high", None, [1.0], True])
@pytest.mark.parametrize("name", ["gate_batch", "pushback"])
def test_a_knob_that_is_no_number(name, value):
    with pytest.raises(OocoError, match=name):
        knobs_from_mapping({name: value})


@pytest.mark.parametrize("shape", [(6,), (9,), (1, 10), ()])
def test_a_vector_of_another_shape(shape):
    with pytest.raises(OocoError, match=r"a knob vector has shape \(10,\), got .*preempt_slack.*strict_share"):
        check_knobs(np.zeros(shape))


def test_rules_are_completed_with_oocos():
    rules = check_rules({"migration": "none"})
    assert list(rules) == list(RULES)
    assert rules == {name: choices[0] for name, choices in RULES.items()} | {"migration": "none"}


def test_an_unknown_rule_or_choice_lists_the_known():
    with pytest.raises(OocoError) as caught:
        check_rules({"mixing": "all"})
    assert str(caught.value) == f"unknown rule 'mixing': known are {', '.join(RULES)}"
    with pytest.raises(OocoError) as caught:
        check_rules({"mix_selection": "some"})
    assert str(caught.value) == "rule 'mix_selection' is 'some', accepted are every_third, exact, all"
    with pytest.raises(OocoError) as caught:
        check_rules({"evicted_kv": "disk"})
    assert str(caught.value) == "rule 'evicted_kv' is 'disk', accepted are recompute, host"
