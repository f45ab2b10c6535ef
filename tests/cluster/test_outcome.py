"""Outcome metrics: seven requests worked by hand, then whole episodes recomputed request by request."""

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
    simulator.cluster.online_first_s[:], simulator.cluster.online_finish_s[:] = first, finish
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
    cluster, scenario = simulator.cluster, simulator.scenario
    ttft_slo, tpot_slo, end = scenario.slo.ttft_s, scenario.slo.tpot_s, scenario.horizon_s
    ttfts, tpots = [], []
    counted = late = late_first = rejected = booked = 0
    for index in range(len(cluster.online_arrival_s)):
        arrival, first = float(cluster.online_arrival_s[index]), float(cluster.online_first_s[index])
        finish, gaps = float(cluster.online_finish_s[index]), int(cluster.online_output[index]) - 1
        if math.isnan(first):
            rejected += 1
            continue
        first_late = first > arrival + ttft_slo
        tpot_late = gaps > 0 and not first_late and finish > first + gaps * tpot_slo
        if first_late and arrival + ttft_slo <= end:
            booked += 1
        if tpot_late and first + gaps * tpot_slo <= end:
            booked += 1
        if arrival < scenario.warmup_s or arrival + ttft_slo + gaps * tpot_slo > end:
            continue
        counted += 1
        late += first_late or tpot_late
        late_first += first_late
        ttfts.append(min(first, end) - arrival)
        if gaps:
            tpots.append((min(finish, end) - min(first, end)) / gaps)
    return booked, {
        "online_requests": counted,
        "violations": late,
        "violation_rate": late / max(counted, 1),
        "ttft_violations": late_first,
        "rejected_online": rejected,
        "ttft_p50_s": quantile(ttfts, 0.5),
        "ttft_p99_s": quantile(ttfts, 0.99),
        "tpot_p50_s": quantile(tpots, 0.5),
        "tpot_p99_s": quantile(tpots, 0.99),
    }


def strained(seed) -> Scenario:
    """Bursts, one-token answers, and some requests that fit no instance."""
    rng = np.random.default_rng(seed)
    arrival = np.sort(rng.choice(rng.uniform(0, 60, 40), 700) + rng.exponential(0.3, 700))
    prompt = rng.integers(1, 3000, 700)
    prompt[rng.random(700) < 0.02] = 2_000_000
    output = np.where(rng.random(700) < 0.1, 1, rng.integers(2, 400, 700))
    scenario = build_scenario({"episode_s": 50, "warmup_s": 10, "slo": {"ttft_s": 0.5, "tpot_s": 0.025}})
    return replace(scenario, online=Given(Requests(arrival, prompt, output)))


@pytest.mark.parametrize("rules", [{}, BASE_PD], ids=["ooco", "base-pd"])
@pytest.mark.parametrize("seed", range(3))
def test_an_episode_is_what_a_plain_loop_over_its_requests_says(rules, seed):
    simulator = Simulator(strained(seed), rules, seed)
    simulator.run(simulator.scenario.horizon_s)
    booked, plain = plainly(simulator)
    outcome = simulator.outcome().to_dict()
    assert {key: outcome[key] for key in plain} == pytest.approx(plain, rel=1e-9)
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
