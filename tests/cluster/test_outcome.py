"""Outcome metrics: requests worked by hand, then whole episodes recomputed request by request."""

import math
from dataclasses import replace

import numpy as np
import pytest

from ooco_gym.cluster import Simulator
from ooco_gym.cluster.outcome import online_violations, tbt_quantile_s
from ooco_gym.cluster.state import TBT_BINS
from ooco_gym.scenario import Scenario, build_scenario
from ooco_gym.workload import Requests

BASE_PD = {
    "prefill_order": "fcfs",
    "preemption": "iteration",
    "offline_decode": "strict",
    "mix_selection": "all",
    "migration": "none",
    "eviction": "newest",
}


class Given:
    """An online source that gives the same rows at every seed."""

    mean_prompt_tokens, mean_output_tokens, mean_rate_per_s = 500.0, 50.0, 1.0

    def __init__(self, requests):
        self._requests = requests

    def sample(self, seed, duration_s):
        return self._requests


# By hand: TTFT SLO 1 s, TPOT SLO 0.1 s, 10 s of warm-up, the end at 30 s.
#            arrival, output, first, finish: why
REQUESTS = (
    (9.0, 11, 9.5, 10.0),  # before the end of warm-up: not counted
    (10.0, 11, 10.5, 11.5),  # TTFT 0.5, TPOT 0.1 exactly: met
    (11.0, 11, 12.5, 13.0),  # TTFT 1.5: violated
    (12.0, 11, 12.25, 15.25),  # TPOT 0.3: violated
    (13.0, 1, 13.75, 13.75),  # one token: TTFT only
    (14.0, 11, math.inf, math.inf),  # never started: violated, has waited 16 s
    (15.0, 11, math.nan, math.inf),  # rejected: counted apart
    (28.5, 11, math.inf, math.inf),  # its deadline 30.5 s lies after the end: not counted
)
BY_HAND = [False, True, True, True, True, True, False, False]


@pytest.fixture(scope="module")
def by_hand():
    arrival, output, first, finish = (np.array(column) for column in zip(*REQUESTS, strict=True))
    scenario = build_scenario(
        {"slo": {"ttft_s": 1.0, "tpot_s": 0.1}, "warmup_s": 10, "episode_s": 20, "offline": "none"}
    )
    scenario = replace(scenario, online=Given(Requests(arrival, np.full(8, 100), output)))
    simulator = Simulator(scenario)
    simulator.run(scenario.horizon_s)
    simulator.cluster.online["first_s"], simulator.cluster.online["finish_s"] = first, finish
    return simulator


def test_which_requests_count_by_hand(by_hand):
    counted, ttft_late, late = online_violations(by_hand.cluster, by_hand.scenario)
    assert counted.tolist() == BY_HAND
    assert np.flatnonzero(ttft_late).tolist() == [2, 5]
    assert np.flatnonzero(late).tolist() == [2, 3, 5]


def test_the_rates_and_quantiles_by_hand(by_hand):
    outcome = by_hand.outcome()
    assert (outcome.online_requests, outcome.violations, outcome.ttft_violations) == (5, 3, 2)
    assert outcome.violation_rate == 0.6 and not outcome.feasible
    assert outcome.ttft_p50_s == 0.75  # of 0.25, 0.5, 0.75, 1.5 and 16
    assert outcome.ttft_p99_s == pytest.approx(0.96 * 16 + 0.04 * 1.5)
    assert outcome.tpot_p50_s == pytest.approx(0.1)  # of 0.05, 0.1 and 0.3; the one that never started is left out


# By hand: class "fast" with TTFT 1 s and TPOT 0.1 s, class "slow" with 4 s and 0.4 s; the end at 30 s.
FAST, SLOW = 0, 1
INF = math.inf
#   class, arrival, output, first, finish, gone: why
CLASSES = (
    (FAST, 10.0, 11, 10.5, 11.5, INF),  # met
    (SLOW, 11.0, 11, 12.5, 15.0, INF),  # TTFT 1.5 and TPOT 0.25: met in its class
    (FAST, 12.0, 11, 13.5, 14.5, INF),  # TTFT 1.5: violated
    (SLOW, 13.0, 11, 14.0, 19.0, INF),  # TPOT 0.5: violated
    (SLOW, 14.0, 11, INF, INF, 15.0),  # left while it waited, 3 s before its violation: not counted
    (FAST, 14.5, 11, INF, INF, 16.0),  # left half a second after its violation, having waited 1.5 s
    (FAST, 15.0, 11, 15.5, INF, 16.0),  # left in the middle of its tokens, before its violation at 16.5: not counted
    (FAST, 15.5, 11, 16.0, INF, 18.0),  # left after its violation at 17.0: its pace so far is 0.2
    (FAST, 17.0, 11, INF, INF, 18.0),  # left at the instant of its violation: that was certain by then
    (FAST, 27.5, 11, 28.0, 28.5, INF),  # met; its deadline 29.5 s lies before the end
    (SLOW, 27.5, 11, 28.0, 28.5, INF),  # the deadline of its class, 35.5 s, does not: not counted
)
COUNTED = [True, True, True, True, False, True, False, True, True, True, False]


@pytest.fixture(scope="module")
def classes_by_hand():
    which, arrival, output, first, finish, gone = (np.array(column) for column in zip(*CLASSES, strict=True))
    objectives = {"fast": {"ttft_s": 1.0, "tpot_s": 0.1}, "slow": {"ttft_s": 4.0, "tpot_s": 0.4}}
    scenario = build_scenario({"slo": {"classes": objectives}, "warmup_s": 10, "episode_s": 20, "offline": "none"})
    requests = Requests(arrival, np.full(len(arrival), 100), output)
    simulator = Simulator(replace(scenario, online=Given(requests)))
    simulator.run(scenario.horizon_s)
    for name, column in (("slo_class", which), ("first_s", first), ("finish_s", finish), ("gone_s", gone)):
        simulator.cluster.online[name] = column
    return simulator


def test_each_class_has_its_own_objectives_and_a_client_may_leave(classes_by_hand):
    counted, ttft_late, late = online_violations(classes_by_hand.cluster, classes_by_hand.scenario)
    assert counted.tolist() == COUNTED
    assert np.flatnonzero(ttft_late).tolist() == [2, 5, 8]
    assert np.flatnonzero(late).tolist() == [2, 3, 5, 7, 8]


def test_the_outcome_of_classes_by_hand(classes_by_hand):
    outcome = classes_by_hand.outcome()
    assert (outcome.online_requests, outcome.violations, outcome.ttft_violations) == (8, 5, 3)
    assert outcome.class_violation_rates == {"fast": 4 / 6, "slow": 1 / 2}
    # 0.5 0.5 0.5 1 1 1.5 1.5 1.5: a wait counts until its client left
    assert (outcome.ttft_p50_s, outcome.ttft_p99_s) == (1.0, 1.5)
    # 0.05 0.1 0.1 0.2 0.25 0.5
    assert outcome.tpot_p50_s == pytest.approx(0.15)
    assert outcome.tpot_p99_s == pytest.approx(0.95 * 0.5 + 0.05 * 0.25)


def test_one_class_is_called_online(by_hand):
    assert by_hand.outcome().class_violation_rates == {"online": 0.6}


@pytest.mark.parametrize(("violations", "feasible"), [(3, True), (4, False)])
def test_the_papers_line_is_three_percent(by_hand, violations, feasible):
    outcome = replace(by_hand.outcome(), violation_rate=violations / 100)
    assert outcome.feasible is feasible
    assert outcome.to_dict()["feasible"] is feasible


def test_the_time_between_tokens_by_hand():
    histogram = np.zeros(TBT_BINS, np.int64)
    assert tbt_quantile_s(histogram, 0.99) == 0.0
    histogram[0], histogram[100] = 99, 1
    assert tbt_quantile_s(histogram, 0.99) == pytest.approx(1.01e-4)  # the upper edge of the first bin
    assert tbt_quantile_s(histogram, 0.995) == pytest.approx(1e-4 * 1.01**101)


# Whole episodes against a plain loop.


def quantile(values, q):
    """Linear interpolation between the order statistics."""
    values = sorted(values)
    if not values:
        return 0.0
    place = q * (len(values) - 1)
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])


def plainly(simulator):
    """The online part of the outcome and the violations booked by the end, one request after another."""
    scenario = simulator.scenario
    classes = scenario.slo.all_classes
    ttfts, tpots = [], []
    counted = late = late_first = rejected = booked = 0
    of_class = [[0, 0] for _ in classes]
    for request in simulator.cluster.online:
        slo = classes[request["slo_class"]]
        arrival, first, finish, gone = (float(request[f"{name}_s"]) for name in ("arrival", "first", "finish", "gone"))
        gaps, end = int(request["output"]) - 1, min(gone, scenario.horizon_s)
        if math.isnan(first):
            rejected += 1
            continue
        first_late = first > arrival + slo.ttft_s
        tpot_late = gaps > 0 and not first_late and finish > first + gaps * slo.tpot_s
        certain = arrival + slo.ttft_s if first_late else first + gaps * slo.tpot_s
        booked += (first_late or tpot_late) and certain <= end
        if gone < INF and not ((first_late or tpot_late) and certain <= gone):
            continue
        if arrival < scenario.warmup_s or arrival + slo.ttft_s + gaps * slo.tpot_s > scenario.horizon_s:
            continue
        counted += 1
        late += first_late or tpot_late
        late_first += first_late
        of_class[request["slo_class"]][0] += 1
        of_class[request["slo_class"]][1] += first_late or tpot_late
        ttfts.append(min(first, end) - arrival)
        if gaps and first <= end:
            tpots.append((min(finish, end) - first) / gaps)
    rates = {slo.name: n_late / max(n, 1) for slo, (n, n_late) in zip(classes, of_class, strict=True)}
    return (
        booked,
        rates,
        {
            "online_requests": counted,
            "violations": late,
            "violation_rate": late / max(counted, 1),
            "ttft_violations": late_first,
            "rejected_online": rejected,
            "ttft_p50_s": quantile(ttfts, 0.5),
            "ttft_p99_s": quantile(ttfts, 0.99),
            "tpot_p50_s": quantile(tpots, 0.5),
            "tpot_p99_s": quantile(tpots, 0.99),
        },
    )


TWO_CLASSES = {"classes": {"fast": {"ttft_s": 0.3, "tpot_s": 0.02}, "slow": {"ttft_s": 0.8, "tpot_s": 0.03}}}
STRAINED = {
    "ooco": ({}, {}),
    "base-pd": (BASE_PD, {}),
    "classes": ({}, {"slo": TWO_CLASSES}),
    "cancellations": ({}, {"slo": TWO_CLASSES, "faults": {"cancel_share": 0.3, "cancel_after_s": 1.0}}),
    "failures": ({"evicted_kv": "host"}, {"faults": {"mean_time_between_failures_s": 20.0, "mean_repair_s": 3.0}}),
    "unified": ({}, {"cluster": "unified4", "slo": TWO_CLASSES}),
}


def strained(seed, config) -> Scenario:
    """Bursts, one-token answers, and some requests that fit no instance."""
    rng = np.random.default_rng(seed)
    arrival = np.sort(rng.choice(rng.uniform(0, 60, 40), 700) + rng.exponential(0.3, 700))
    prompt = rng.integers(1, 3000, 700)
    prompt[rng.random(700) < 0.02] = 2_000_000
    output = np.where(rng.random(700) < 0.1, 1, rng.integers(2, 400, 700))
    scenario = build_scenario({"episode_s": 50, "warmup_s": 10, "slo": {"ttft_s": 0.5, "tpot_s": 0.025}} | config)
    return replace(scenario, online=Given(Requests(arrival, prompt, output)))


@pytest.mark.parametrize("which", STRAINED)
@pytest.mark.parametrize("seed", range(3))
def test_an_episode_is_what_a_plain_loop_over_its_requests_says(which, seed):
    rules, config = STRAINED[which]
    simulator = Simulator(strained(seed, config), rules, seed)
    simulator.run(simulator.scenario.horizon_s)
    booked, rates, plain = plainly(simulator)
    outcome = simulator.outcome().to_dict()
    assert {key: outcome[key] for key in plain} == pytest.approx(plain, rel=1e-9)
    assert outcome["class_violation_rates"] == pytest.approx(rates, rel=1e-9)
    assert simulator.cluster.world[0]["violations"] == booked
    assert plain["violations"] > 10 and plain["rejected_online"] > 3  # or this test would say little


def test_offline_rates_are_of_whole_requests_finished_after_warm_up():
    """Jobs of one length, 700 prompt and 200 output tokens; the finished are read at both ends."""
    offline = {"kind": "endless", "lengths": {"model": "fixed", "prompt_tokens": 700, "output_tokens": 200}}
    scenario = build_scenario({"episode_s": 40, "warmup_s": 20, "offline": offline})
    simulator = Simulator(scenario, {}, 1)
    finished = []
    for until_s in (20.0, 60.0):
        simulator.run(until_s)
        finished.append(int(simulator.cluster.world[0]["offline_output_count"]))
    outcome, jobs = simulator.outcome(), finished[1] - finished[0]
    assert jobs > 50 and finished[0] > 10
    assert outcome.offline_requests_per_s == jobs / 40
    assert outcome.offline_prompt_tokens_per_s == 700 * jobs / 40
    assert outcome.offline_output_tokens_per_s == 200 * jobs / 40
    ideal = jobs * (700 * scenario.ideal_prompt_token_s + 200 * scenario.ideal_output_token_s)
    assert outcome.offline_ideal_s_per_instance_s == pytest.approx(ideal / (40 * 4))
    assert 0 < outcome.wasted_fraction < 1 and 0 < outcome.offline_ideal_s_per_instance_s < 1


def test_gaps_between_tokens_are_near_the_time_per_token():
    simulator = Simulator(build_scenario({"episode_s": 60, "warmup_s": 10}), {}, 0)
    simulator.run(simulator.scenario.horizon_s)
    outcome = simulator.outcome()
    assert outcome.tpot_p50_s < outcome.tbt_p99_s < 3 * outcome.tpot_p50_s
