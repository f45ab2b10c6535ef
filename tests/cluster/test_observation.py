"""The observation: one recorded Telemetry worked by hand, bounds under random knobs, its documentation."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ooco_gym.cluster import Simulator, Telemetry, observe
from ooco_gym.cluster.control import KNOB_COUNT, KNOB_NAMES, KNOBS, action_to_knobs
from ooco_gym.cluster.observation import (
    ENTRIES,
    OBSERVATION_NAMES,
    OBSERVATION_SIZE,
    observation_bounds,
    observation_table,
)
from ooco_gym.cluster.telemetry import FIELD_NAMES
from ooco_gym.envs import ClusterEnv
from ooco_gym.errors import OocoError
from ooco_gym.scenario import build_scenario

FAILING = {"outages": [{"instance": 0, "at_s": 10, "for_s": 15}, {"instance": 3, "at_s": 20, "for_s": 5}]}
DOCUMENT = Path(__file__).parents[2] / "docs" / "observation.md"

#: A record as a gateway would log it, and what a network must see of it, without any simulator.
RECORDED = """{
  "time_s": 120.0, "scrape_age_s": 0.5, "relaxed_instances": 2, "strict_instances": 4,
  "unavailable_instances": 1,
  "ttft_slo_s": 0.5, "tpot_slo_s": 0.05, "decode_floor_s": 0.0125, "mean_prefill_s": 0.1,
  "saturation_batch": 160,
  "queued_prefill_mean_s": 0.25, "queued_prefill_max_s": 0.4, "oldest_wait_s": 4.0,
  "relaxed_decodes_mean": 80, "relaxed_decodes_max": 120,
  "relaxed_kv_online": 0.125, "relaxed_kv_offline": 0.5, "relaxed_kv_max": 0.75,
  "strict_online_s_mean": 0.02, "strict_online_s_max": 0.025,
  "strict_batch_s_mean": 0.04, "strict_batch_s_max": 0.2,
  "strict_decodes_mean": 200, "strict_decodes_max": 240, "strict_paused_mean": 16,
  "strict_kv_online": 0.25, "strict_kv_offline": 0.375, "strict_kv_max": 0.875,
  "arriving_prefill_1s": 3.0, "arriving_prefill_10s": 1.0, "arriving_prefill_60s": 0.5, "arrivals_60s": 6.5,
  "prompt_mean_tokens": 1024, "output_mean_tokens": 256, "violation_rate_60s": 1.25,
  "violation_rate_300s": 0.03125,
  "offline_backlog": 1e6, "offline_prompt_mean_tokens": 4096, "offline_output_mean_tokens": 384,
  "knob_preempt_slack": 0.0, "knob_gate_batch": 8.0, "knob_tpot_bound": 0.75, "knob_pull_kv": 0.75,
  "knob_pull_length": 1.0, "knob_kv_reserve": 0.2,
  "knob_prefill_chunk": 1024.0, "knob_strict_prefill": 1024.0, "knob_pushback": 1.0, "knob_strict_share": 0.25
}"""
SEEN = [
    *(0.5, 0.8, 5.0),  # queue and wait over the TTFT SLO; 4 s over 0.5 s is clipped at 5
    *(0.5, 0.75, 0.125, 0.5, 0.75),  # relaxed decodes over B_sat, relaxed KV
    *(0.4, 0.5, 0.8, 3.0),  # strict iterations over the TPOT SLO; 0.2 s over 0.05 s is clipped at 3
    *(1.25, 1.5, 0.1, 0.25, 0.375, 0.875),  # strict decodes over B_sat, strict KV
    *(1.5, 0.5, 0.25),  # prefill load per relaxed instance
    *(0.5, 0.5, 1.0, 0.03125),  # lengths, violations
    *(10.0, 2.0, 0.75),  # offline: an endless backlog is clipped at 10
    *(0.25, 0.5, 0.125, 2.0, 1.0, 0.5),  # deployment, one instance of it down
    *(-0.95, 0.95, 0.0, 0.45, 0.0, -0.45),  # the action that gives the knobs in force
    *(0.0, -0.45, 0.95, 0.45),
]


def test_a_recorded_telemetry_by_hand():
    seen = observe(Telemetry.from_dict(json.loads(RECORDED)))
    assert seen.dtype == np.float32
    named = dict(zip(OBSERVATION_NAMES, seen.tolist(), strict=True))
    assert named == pytest.approx(dict(zip(OBSERVATION_NAMES, SEEN, strict=True)), abs=1e-7)
    assert np.array_equal(seen, observe(Telemetry.from_dict(json.loads(RECORDED))))


def test_a_record_of_the_simulator_gives_the_same_bits_without_it():
    simulator = Simulator(build_scenario({"episode_s": 30, "warmup_s": 0}), {}, 2)
    for second in range(1, 31):
        simulator.run(float(second))
        telemetry = simulator.telemetry()
        recorded = Telemetry.from_dict(json.loads(json.dumps(telemetry.to_dict())))
        assert np.array_equal(observe(recorded), observe(telemetry))


def test_entries_stay_in_their_bounds_under_random_actions():
    low, high = observation_bounds()
    rng = np.random.default_rng(0)
    seen = []
    for config, rate_scale in (
        ({"workload": "azure-conv", "slo": "tight"}, 6.0),
        ({"workload": "deepseek-r1", "slo": "two-classes"}, 1.0),
        ({"cluster": {"relaxed": 1, "strict": 1, "unified": 2}, "faults": FAILING}, 1.0),
        ({"cluster": "unified4"}, 1.0),
    ):
        scenario = build_scenario({"episode_s": 60, "warmup_s": 0} | config)
        simulator = Simulator(scenario.with_rate_scale(rate_scale), {}, 4)
        for second in range(60):
            simulator.set_knobs(action_to_knobs(rng.uniform(-1, 1, KNOB_COUNT)))
            simulator.run(second + 1.0)
            seen.append(observe(simulator.telemetry()))
    seen = np.array(seen)
    assert ((seen >= low) & (seen <= high)).all()
    constant = {name for name, column in zip(OBSERVATION_NAMES, seen.T, strict=True) if np.ptp(column) == 0}
    assert constant <= {"offline_backlog"}


def test_a_cluster_without_any_relaxed_instance_up_has_an_observation():
    """Loads per relaxed instance are at their tops while there is load; nothing divides by zero."""
    low, high = observation_bounds()
    faults = {"outages": [{"instance": 0, "at_s": 10, "for_s": 60}]}
    scenario = build_scenario({"cluster": "1x3", "episode_s": 40, "warmup_s": 0, "faults": faults})
    simulator = Simulator(scenario, {}, 1)
    simulator.run(30.0)
    seen = observe(simulator.telemetry())
    named = dict(zip(OBSERVATION_NAMES, seen.tolist(), strict=True))
    assert ((seen >= low) & (seen <= high)).all()
    assert (named["relaxed_instances"], named["strict_instances"], named["unavailable_instances"]) == (0, 0.375, 0.125)
    assert named["prefill_load_10s"] == 5.0 and named["strict_per_relaxed"] == 8.0
    assert named["oldest_wait"] == 5.0  # routed to the instance that is down, where it waits (35, 48)


KNOB_VECTORS = st.tuples(*(st.floats(knob.low, knob.high) for knob in KNOBS)).map(list)
OTHERS = st.lists(
    st.floats(-1e12, 1e12) | st.just(0.0),
    min_size=len(FIELD_NAMES) - KNOB_COUNT,
    max_size=len(FIELD_NAMES) - KNOB_COUNT,
)


@settings(deadline=None)
@given(OTHERS, KNOB_VECTORS)
def test_any_finite_record_is_inside_the_bounds(values, knobs):
    """A gateway's first records divide zero by zero and may hold nonsense."""
    low, high = observation_bounds()
    seen = observe(Telemetry(np.array(values + knobs)))
    assert ((seen >= low) & (seen <= high)).all()


def test_knobs_out_of_range_in_a_record_are_named():
    record = json.loads(RECORDED) | {"knob_gate_batch": 9.0}
    with pytest.raises(OocoError, match=r"knob 'gate_batch' is 9, accepted is 0\.1 to 8"):
        observe(Telemetry.from_dict(record))


def test_every_entry_reads_a_telemetry_field_and_says_where_it_lives():
    fields = [name for entry in ENTRIES for name in (entry.field, entry.per) if name]
    assert set(fields) <= set(FIELD_NAMES)
    assert all(entry.live and entry.high > 0 for entry in ENTRIES)
    assert len(set(OBSERVATION_NAMES)) == OBSERVATION_SIZE == len(ENTRIES) + KNOB_COUNT
    unused = set(FIELD_NAMES) - set(fields) - {f"knob_{name}" for name in KNOB_NAMES}
    assert unused == {"time_s", "scrape_age_s", "arrivals_60s"}  # for logs and pictures only


def test_the_document_is_the_current_table():
    """Regenerate with the command that docs/observation.md gives when this fails."""
    introduction, table = DOCUMENT.read_text(encoding="utf-8").split("\n\n| entry |")
    assert f"| entry |{table}" == observation_table() + "\n"
    assert introduction.startswith("# Observation") and str(OBSERVATION_SIZE) in introduction


def test_the_table_has_one_row_per_entry_in_order():
    rows = observation_table().splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == list(OBSERVATION_NAMES)
    assert all(row.count("|") == 5 for row in rows)


def test_the_environments_docstring_counts_the_entries():
    assert int(re.search(r"(\d+) entries of Telemetry", ClusterEnv.__doc__)[1]) == len(ENTRIES)
    for index, knob in enumerate(KNOBS):
        assert re.search(rf"{index} +{knob.name} +{knob.low:g} \.\. {knob.high:g} ", ClusterEnv.__doc__)
    assert f"Box(-1, 1, ({KNOB_COUNT},), float32)" in ClusterEnv.__doc__
