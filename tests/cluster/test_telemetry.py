"""Telemetry: a small episode worked by hand, recounts of the cluster's own state, and the recorded form."""

import contextlib
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ooco_gym.cluster import Simulator, Telemetry, ooco_knobs
from ooco_gym.cluster.control import KNOB_NAMES, knobs_from_mapping
from ooco_gym.cluster.state import (
    DOWN,
    HELD,
    PARTIAL,
    PREFILL,
    QUEUED,
    RELAXED,
    RESIDENT,
    RESTORE,
    SCHEDULER_COST,
    STRICT,
    TRANSFER,
    UNIFIED,
)
from ooco_gym.cluster.telemetry import FIELD_NAMES, FIELDS
from ooco_gym.errors import OocoError
from ooco_gym.roofline import decode_s, prefill_s
from ooco_gym.scenario import build_scenario
from ooco_gym.workload import OfflineJobs, Requests


class Given:
    """A workload source that gives the same rows at every seed."""

    def __init__(self, sample):
        self._sample = sample
        self.mean_prompt_tokens, self.mean_output_tokens = 200.0, 5.0

    def sample(self, seed, duration_s):
        return self._sample


def simulated(online, offline=None, **config):
    scenario = build_scenario({"episode_s": 60, "warmup_s": 0, "cost": "ooco-xllm", "offline": "none", **config})
    scenario = replace(scenario, online=Given(online))
    if offline is not None:
        scenario = replace(scenario, offline=Given(offline))
    return Simulator(scenario)


# By hand.


def test_three_requests_by_hand():
    simulator = simulated(Requests(np.array([0.2, 0.7, 1.5]), np.array([100, 200, 300]), np.array([4, 5, 6])))
    simulator.run(2.0)
    t = simulator.telemetry()
    one, two, three = (prefill_s(simulator.scenario.scheduler_cost[0], float(n)) for n in (100, 200, 300))
    assert (t["time_s"], t["scrape_age_s"]) == (2.0, 0.0)
    assert t["arrivals_60s"] == 1.5  # three in two seconds: windows that reach before time 0 are shortened
    assert t["prompt_mean_tokens"] == 200.0
    assert t["output_mean_tokens"] == 5.0  # all have finished
    assert t["arriving_prefill_1s"] == pytest.approx(three)
    assert t["arriving_prefill_10s"] == t["arriving_prefill_60s"] == pytest.approx((one + two + three) / 2)
    idle = (
        "queued_prefill_mean_s",
        "oldest_wait_s",
        "strict_kv_max",
        "strict_batch_s_max",
        "violation_rate_300s",
    )
    assert [t[name] for name in idle] == [0.0] * len(idle)


def test_history_forgets_after_its_window():
    simulator = simulated(Requests(np.array([0.5]), np.array([100]), np.array([4])), slo={"ttft_s": 1e-3, "tpot_s": 1})
    rates = {}
    for second in (1, 60, 61, 300, 301):
        simulator.run(float(second))
        t = simulator.telemetry()
        rates[second] = (t["arrivals_60s"], t["violation_rate_60s"], t["violation_rate_300s"])
    assert rates == {
        1: (1.0, 1.0, 1.0),
        60: (1 / 60, 1.0, 1.0),
        61: (0.0, 0.0, 1.0),
        300: (0.0, 0.0, 1.0),
        301: (0.0, 0.0, 0.0),
    }


def test_a_burst_waits_behind_the_request_in_prefill():
    """Three arrivals at 1 s on one instance: one is prefilled, two wait that do not fit its batch."""
    arrivals = Requests(np.array([1.0, 1.0, 1.0]), np.array([8000, 8000, 8000]), np.array([2, 2, 2]))
    simulator = simulated(arrivals, cluster={"relaxed": 1, "strict": 1})
    simulator.run(1.125)
    t = simulator.telemetry()
    each = prefill_s(simulator.scenario.scheduler_cost[0], 8000.0)
    assert each > 0.125
    assert t["oldest_wait_s"] == pytest.approx(0.125)
    assert t["queued_prefill_mean_s"] == t["queued_prefill_max_s"] == pytest.approx(3 * each)
    assert t["relaxed_kv_online"] == pytest.approx(-(-8001 // 16) / simulator.scenario.kv_blocks)


def test_the_mean_offline_prompt_is_of_the_requests_taken():
    jobs = OfflineJobs(False, np.zeros(4), np.full(4, 500, np.int32), np.full(4, 50, np.int32))
    simulator = simulated(Requests(np.zeros(0), np.zeros(0), np.zeros(0)), jobs)
    simulator.run(20.0)
    t = simulator.telemetry()
    assert (t["offline_backlog"], t["offline_prompt_mean_tokens"], t["offline_output_mean_tokens"]) == (
        0,
        500,
        50,
    )


def test_rejected_jobs_do_not_dilute_the_mean_offline_prompt():
    """Half of the jobs fit no instance: they are counted as taken, their prompts are not."""
    prompts = np.array([500, 2_000_000, 500, 2_000_000], np.int32)
    simulator = simulated(
        Requests(np.zeros(0), np.zeros(0), np.zeros(0)),
        OfflineJobs(False, np.zeros(4), prompts, np.full(4, 50, np.int32)),
    )
    simulator.run(20.0)
    assert simulator.outcome().rejected_offline == 2
    assert simulator.telemetry()["offline_prompt_mean_tokens"] == 500


def test_the_last_second_is_a_whole_second():
    """Ten arrivals a second; the window holds the running quarter of a second, divided by a whole one."""
    every = np.arange(0.05, 20, 0.1)
    simulator = simulated(Requests(every, np.full(every.size, 100), np.full(every.size, 2)))
    simulator.run(10.25)
    t, each = simulator.telemetry(), prefill_s(simulator.scenario.scheduler_cost[0], 100.0)
    assert t["arriving_prefill_1s"] == pytest.approx(10 * each, rel=0.15)


# Against the cluster's own state.


DEPLOYMENTS = {
    "2x2": {},
    "mixed": {"relaxed": 2, "strict": 2, "unified": 1, "strict_hardware": ["h100", "a100"]},
    "unified4": "unified4",
}
FAILING = {"outages": [{"instance": 1, "at_s": 29.0, "for_s": 20.0}]}
KNOBS = knobs_from_mapping({"prefill_chunk": 512, "strict_prefill": 512, "pushback": 0.6, "strict_share": -0.25})


@pytest.mark.parametrize("name", DEPLOYMENTS)
@pytest.mark.parametrize("faults", ["none", FAILING], ids=["all up", "one down"])
@pytest.mark.parametrize("seed", range(2))
def test_pool_fields_are_recounts_of_the_requests_in_flight(name, faults, seed):
    """A unified instance belongs to both pools, one that is down to none; beside OOCO's knobs, all that move work."""
    config = {"cluster": DEPLOYMENTS[name], "offline": "decode-heavy", "faults": faults}
    simulator = Simulator(build_scenario({"episode_s": 60, "warmup_s": 0} | config), {"evicted_kv": "host"}, seed)
    if seed:
        simulator.set_knobs(KNOBS)
    simulator.run(30.0)
    t, cluster = simulator.telemetry(), simulator.cluster
    instances = cluster.instances
    up = instances["activity"] != DOWN
    relaxed, strict = (np.flatnonzero(up & (instances["role"] != other)) for other in (STRICT, RELAXED))
    assert (t["relaxed_instances"], t["strict_instances"]) == (len(relaxed), len(strict))
    assert t["unavailable_instances"] == (~up | (instances["role"] != instances["becoming"])).sum()

    def of_each(pool, value):
        return [value(instance) for instance in pool]

    for which, pool in (("relaxed", relaxed), ("strict", strict)):
        used, online, blocks = (instances[field][pool] for field in ("used_blocks", "online_blocks", "kv_blocks"))
        assert t[f"{which}_kv_online"] == pytest.approx(online.sum() / blocks.sum())
        assert t[f"{which}_kv_offline"] == pytest.approx((used - online).sum() / blocks.sum())
        assert t[f"{which}_kv_max"] == (used / blocks).max()
    held = of_each(relaxed, lambda instance: offline_with_kv(cluster, instance))
    assert (t["relaxed_decodes_mean"], t["relaxed_decodes_max"]) == (pytest.approx(np.mean(held)), max(held))
    assert sum(held) > 10  # or this test would say little
    pending = of_each(relaxed, lambda instance: pending_prefill_s(cluster, instance))
    assert (t["queued_prefill_mean_s"], t["queued_prefill_max_s"]) == pytest.approx((np.mean(pending), max(pending)))
    decodes, paused, batch_s, online_s = zip(
        *of_each(strict, lambda instance: decodes_of(cluster, instance)), strict=True
    )
    assert (t["strict_decodes_mean"], t["strict_decodes_max"]) == (pytest.approx(np.mean(decodes)), max(decodes))
    assert t["strict_paused_mean"] == pytest.approx(np.mean(paused)) and sum(decodes) > 10
    for field, seconds in (("strict_batch_s", batch_s), ("strict_online_s", online_s)):
        assert (t[f"{field}_mean"], t[f"{field}_max"]) == pytest.approx((np.mean(seconds), max(seconds)))
    waiting = cluster.slots[(cluster.slots["phase"] == QUEUED) & (cluster.slots["online"] >= 0)]
    assert t["oldest_wait_s"] == pytest.approx(30.0 - min(waiting["arrival_s"], default=30.0))
    assert t["arrivals_60s"] == np.searchsorted(cluster.online["arrival_s"], 30.0) / 30


def offline_with_kv(cluster, instance) -> int:
    """Offline requests with KV on an instance; one on its way between two has it on both."""
    slots = cluster.slots[cluster.slots["online"] < 0]
    here = np.isin(slots["phase"], (PREFILL, PARTIAL, HELD, TRANSFER, RESIDENT, RESTORE)) & (
        slots["instance"] == instance
    )
    return int((here | ((slots["phase"] == TRANSFER) & (slots["target"] == instance))).sum())


def pending_prefill_s(cluster, instance) -> float:
    """Predicted prefill of each online request that waits or is in prefill on an instance, alone."""
    slots = cluster.slots[(cluster.slots["online"] >= 0) & (cluster.slots["instance"] == instance)]
    slots = slots[np.isin(slots["phase"], (QUEUED, PREFILL, PARTIAL))]
    return sum(prefill_s(cluster.costs[instance, SCHEDULER_COST], float(tokens)) for tokens in slots["context"])


def decodes_of(cluster, instance) -> tuple[int, int, float, float]:
    """(decodes in the batch, residents left out, predicted seconds of the batch, of its online part)."""
    slots = cluster.slots[(cluster.slots["phase"] == RESIDENT) & (cluster.slots["instance"] == instance)]
    batch = slots[slots["selected"] == 1]
    seconds = []
    for part in (batch, batch[batch["online"] >= 0]):
        tokens = float((part["context"] + cluster.instances[instance]["steps"]).sum())
        cost = cluster.costs[instance, SCHEDULER_COST]
        seconds.append(decode_s(cost, float(len(part)), tokens) if len(part) else 0.0)
    return len(batch), len(slots) - len(batch), *seconds


def test_pools_by_hand_while_one_instance_is_down_and_another_drains():
    """Relaxed 0 and 1, strict 2 and 3, unified 4. From 5 to 40 s 1 is down; from 10 s on 2 is to be relaxed."""
    faults = {"outages": [{"instance": 1, "at_s": 5.0, "for_s": 35.0}]}
    cluster = {"relaxed": 2, "strict": 2, "unified": 1}
    simulator = Simulator(build_scenario({"cluster": cluster, "faults": faults, "warmup_s": 0, "episode_s": 60}))

    def pools_at(seconds):
        simulator.run(seconds)
        t = simulator.telemetry()
        return tuple(t[f"{name}_instances"] for name in ("relaxed", "strict", "unavailable"))

    assert pools_at(4.9) == (3, 3, 0)
    assert pools_at(10.0) == (2, 3, 1)
    simulator.set_knobs(knobs_from_mapping({"strict_share": -0.25}))  # one of four: floor(2 - 0.25 * 4 + 0.5) = 1
    assert pools_at(10.01) == (2, 3, 2)  # its online decodes go on until they are finished
    assert pools_at(39.9) == (3, 2, 1)  # 0, 2 and 4; 3 and 4
    assert simulator.cluster.instances["role"].tolist() == [RELAXED, RELAXED, RELAXED, STRICT, UNIFIED]
    assert pools_at(40.0) == (4, 2, 0)


def test_the_deployment_and_the_knobs_in_force_are_in_the_record():
    simulator = Simulator(build_scenario({"cluster": "3x1", "slo": {"ttft_s": 0.35, "tpot_s": 0.03}}))
    simulator.set_knobs(knobs := ooco_knobs() * 0.5 + 0.25)
    t, scenario = simulator.telemetry(), simulator.scenario
    assert (t["relaxed_instances"], t["strict_instances"]) == (3, 1)
    assert (t["ttft_slo_s"], t["tpot_slo_s"]) == (0.35, 0.03)
    for name in ("saturation_batch", "decode_floor_s", "mean_prefill_s"):
        assert t[name] == getattr(scenario, name) > 0
    assert [t[f"knob_{name}"] for name in KNOB_NAMES] == knobs.tolist()
    assert t["offline_backlog"] == 1e6  # stands for endless


def test_reading_changes_nothing():
    runs = [Simulator(build_scenario({"episode_s": 20, "warmup_s": 0}), {}, 5) for _ in range(2)]
    for second in range(1, 21):
        for simulator in runs:
            simulator.run(float(second))
        first, again = runs[0].telemetry(), runs[0].telemetry()
        assert first.values.tolist() == again.values.tolist()
    assert runs[0].outcome() == runs[1].outcome()


def test_time_does_not_run_backwards():
    simulator = Simulator(build_scenario({"episode_s": 20, "warmup_s": 0}), {}, 1)
    simulator.run(10.0)
    with contextlib.suppress(OocoError):  # refusing is as good as doing nothing
        simulator.run(4.0)
    assert simulator.telemetry()["time_s"] == 10.0


# The record.


def test_every_field_has_a_unit_and_a_meaning():
    assert len(set(FIELD_NAMES)) == len(FIELDS)
    assert all(unit and meaning for _, unit, meaning in FIELDS)


@settings(deadline=None)
@given(st.lists(st.floats(-1e9, 1e9), min_size=len(FIELDS), max_size=len(FIELDS)))
def test_a_record_survives_json_to_the_last_bit(values):
    telemetry = Telemetry(np.array(values))
    text = json.dumps(telemetry.to_dict())
    assert Telemetry.from_dict(json.loads(text)).values.tolist() == values


def test_a_simulated_record_survives_json():
    simulator = Simulator(build_scenario({"episode_s": 20, "warmup_s": 0}), {}, 1)
    simulator.run(17.3)
    telemetry = simulator.telemetry()
    again = Telemetry.from_dict(json.loads(json.dumps(telemetry.to_dict())))
    assert again.values.tolist() == telemetry.values.tolist()


RECORD = dict.fromkeys(FIELD_NAMES, 1.0)


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({k: v for k, v in RECORD.items() if k != "oldest_wait_s"}, "field 'oldest_wait_s' is missing"),
        (RECORD | {"wait": 1.0}, "field 'wait' is unknown"),
        (RECORD | {"oldest_wait_s": float("nan")}, "field 'oldest_wait_s' is nan"),
        (RECORD | {"knob_pull_kv": float("-inf")}, "field 'knob_pull_kv' is -inf"),
    ],
)
def test_a_record_that_cannot_be_read(record, named):
    with pytest.raises(OocoError, match="telemetry: ") as caught:
        Telemetry.from_dict(record)
    assert named in str(caught.value)


@pytest.mark.parametrize("value", ["soon", None, {}])
def test_a_record_with_a_value_that_is_no_number(value):
    with pytest.raises(OocoError, match="oldest_wait_s"):
        Telemetry.from_dict(RECORD | {"oldest_wait_s": value})
