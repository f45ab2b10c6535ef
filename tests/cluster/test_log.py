"""The event log tells the whole episode: every outcome metric is counted again from it alone, in plain Python."""

from collections import Counter
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

import baselines
from ooco_gym import presets
from ooco_gym.cluster import Simulator
from ooco_gym.cluster.control import RULES, knobs_from_mapping
from ooco_gym.cluster.log import EVENT_NAMES, EVENTS
from ooco_gym.cluster.outcome import Outcome
from ooco_gym.cluster.state import TBT_FIRST_S, TBT_RATIO
from ooco_gym.scenario import build_scenario
from tests.cluster.recount import online_requests, read, recount
from tests.reference.cases import cases, examples

BASE_PD = baselines.load("base-pd").rules
BEYOND = {"strict_prefill": 512, "prefill_chunk": 512, "pushback": 0.6, "gate_batch": 2.0}
FAILING = presets.load("faults", "unreliable") | {"mean_time_between_failures_s": 40.0, "mean_repair_s": 4.0}
LITTLE_KV = {"kv_blocks": 1200, "host_kv_bytes": 2e9}

#: Scenario, rules, knobs from the end of warm-up on.
EPISODES = {
    "ooco": ({}, {}, {}),
    "base-pd": ({}, BASE_PD, {"gate_batch": 8.0}),
    "stock engines": ({"cluster": "unified4"}, {}, {}),
    "stock engines, first come first served": ({"cluster": "unified4"}, BASE_PD, {}),
    "beyond the paper": ({"cluster": LITTLE_KV}, {"preemption": "chunk"}, BEYOND),
    "all three roles": ({"cluster": {"relaxed": 2, "strict": 2, "unified": 1}}, {}, {"strict_share": -0.25}),
    "failures": ({"faults": FAILING}, {}, {}),
    "failures of stock engines": ({"faults": FAILING, "cluster": "unified4"}, {"evicted_kv": "host"}, {}),
    "two classes": ({"slo": "two-classes", "cluster": "1x3"}, {}, {}),
    "host memory": ({"cluster": LITTLE_KV, "offline": "decode-heavy"}, {"evicted_kv": "host"}, {}),
    "newest evicted": ({"cluster": LITTLE_KV}, BASE_PD, {"gate_batch": 8.0}),
}

#: Kinds of events that each episode is there for.
SHOWS = {
    "ooco": {"interrupted", "pulled", "piece", "enter", "exit", "finished"},
    "base-pd": {"transfer", "transferred"},
    "beyond the paper": {"pushed", "evicted", "interrupted", "held"},
    "all three roles": {"draining", "role"},
    "failures": {"failed", "recovered", "lost", "cancelled"},
    "failures of stock engines": {"failed", "lost", "cancelled"},
    "host memory": {"evicted", "checkpointed", "restored"},
    "newest evicted": {"evicted", "held"},
}


def episode(name: str, seed: int = 0) -> Simulator:
    config, rules, knobs = EPISODES[name]
    simulator = Simulator(build_scenario({"episode_s": 60, "warmup_s": 10} | config), rules, seed, log=True)
    simulator.run(simulator.scenario.warmup_s)
    simulator.set_knobs(knobs_from_mapping(knobs))
    simulator.run(simulator.scenario.horizon_s)
    return simulator


@pytest.fixture(scope="module", params=EPISODES)
def logged(request):
    return request.param, episode(request.param)


def differences(outcome: Outcome, again: dict) -> list[str]:
    """The metrics of an outcome that differ from their recount: counts at all, times and shares by more than 1e-9."""
    found = []
    for metric, value in again.items():
        given = getattr(outcome, metric)
        if metric == "tbt_p99_s":  # the upper edge of a bin of a histogram whose bins are 1 % wide
            same = max(given / TBT_RATIO, TBT_FIRST_S) * (1 - 1e-6) <= max(value, TBT_FIRST_S) <= given * (1 + 1e-6)
            same |= given == value == 0.0
        else:
            same = given == value if isinstance(value, int) else given == pytest.approx(value, rel=1e-9, nan_ok=True)
        if not same:
            found.append(f"{metric}: {given} in the outcome, {value} in the log")
    return found


def test_the_outcome_is_counted_again_from_the_log(logged):
    _, simulator = logged
    again = recount(simulator.log(), simulator.scenario)
    assert set(asdict(simulator.outcome())) - set(again) == {"events"}
    assert differences(simulator.outcome(), again) == []
    assert again["online_requests"] > 100 and again["iterations"] > 1000  # or this would say little


@given(case=cases())
@settings(deadline=None, suppress_health_check=list(HealthCheck), print_blob=True, max_examples=examples(100, 40))
def test_small_clusters_under_every_rule_are_counted_again(case):
    simulator = Simulator(case.scenario(), dict(zip(RULES, case.rules, strict=True)), log=True)
    for seconds, knobs in case.ticks():
        simulator.run(seconds)
        if knobs is not None:
            simulator.set_knobs(knobs)
    again = recount(simulator.log(), simulator.scenario)
    assert differences(simulator.outcome(), again) == []


def test_every_token_of_an_online_request_is_in_the_log(logged):
    _, simulator = logged
    online = simulator.cluster.online
    requests = online_requests(read(simulator.log()), simulator.scenario.instances)
    assert sorted(requests) == list(range(len(requests)))  # none was rejected
    for i, request in requests.items():
        assert (request.arrival_s, request.output) == (online["arrival_s"][i], online["output"][i])
        assert (request.first_s, request.finish_s) == (online["first_s"][i], online["finish_s"][i])
        assert request.gone_s == online["gone_s"][i] and request.slo_class == online["slo_class"][i]
        assert request.token_s == sorted(request.token_s)
        if request.finish_s < np.inf:
            assert len(request.token_s) == request.output and request.token_s[-1] == request.finish_s


def test_an_episode_shows_what_it_is_there_for(logged):
    name, simulator = logged
    kinds = Counter(EVENT_NAMES[kind] for kind in simulator.log()["kind"])
    assert SHOWS.get(name, set()) <= set(kinds), kinds


def test_the_log_is_in_order_and_says_where_and_who(logged):
    _, simulator = logged
    log, instances = simulator.log(), simulator.scenario.instances
    assert (np.diff(log["time_s"]) >= 0).all() and log["time_s"][-1] <= simulator.scenario.horizon_s
    nowhere = np.isin(log["kind"], [EVENT_NAMES.index(name) for name in ("arrival", "rejected")])
    assert (log["instance"][nowhere] == -1).all()
    assert ((log["instance"][~nowhere] >= 0) & (log["instance"][~nowhere] < instances)).all()
    of_instance = ("iteration", "interrupted", "draining", "role", "failed", "recovered", "rejected")
    impersonal = np.isin(log["kind"], [EVENT_NAMES.index(name) for name in of_instance])
    assert (log["request"][impersonal] == -1).all() and (log["request"][~impersonal] >= 0).all()


def test_every_kind_of_event_is_explained():
    assert len(set(EVENT_NAMES)) == len(EVENTS) and all(meaning for _, meaning in EVENTS)


def test_the_log_is_a_copy_and_empty_unless_asked_for():
    scenario = build_scenario({"episode_s": 5, "warmup_s": 0})
    silent, logged = Simulator(scenario), Simulator(scenario, log=True)
    for simulator in (silent, logged):
        simulator.run(5.0)
    assert len(silent.log()) == 0 and len(logged.log()) > 100
    logged.log()["time_s"][:] = -1.0
    assert (logged.log()["time_s"] >= 0).all()


def test_a_request_that_fits_nowhere_is_in_the_log():
    scenario = build_scenario({"cluster": {"kv_blocks": 60}, "episode_s": 30, "warmup_s": 0, "offline": "none"})
    simulator = Simulator(scenario, log=True)
    simulator.run(30.0)
    rejected = [event for event in read(simulator.log()) if event.kind == "rejected"]
    assert [event.a for event in rejected] == np.flatnonzero(np.isnan(simulator.cluster.online["first_s"])).tolist()
    assert simulator.outcome().rejected_online == len(rejected) > 0
