"""When an online arrival interrupts an offline prefill: what it would wait for, against its share of the TTFT SLO."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from ooco_gym.cluster.control import knobs_from_mapping
from ooco_gym.cluster.simulator import Simulator
from ooco_gym.cluster.state import PREFILLING_OFFLINE, SCHEDULER_COST
from ooco_gym.roofline import prefill_s
from ooco_gym.specs import SloSpec
from ooco_gym.workload import OfflineJobs, Requests
from tests.reference.cases import Case, Given

# One offline prompt of 240 tokens is in prefill when two online prompts of 60 tokens arrive.
ARRIVALS_S = np.array([0.004, 0.005])
ONLINE = Requests(ARRIVALS_S, np.array([60, 60], np.int32), np.array([2, 2], np.int32))
OFFLINE = OfflineJobs(True, np.zeros(0), np.array([240], np.int32), np.array([4], np.int32))


def simulator(ttft_s: float) -> Simulator:
    scenario = Case(kv_blocks=(400, 400), max_batch_tokens=256, max_seqs=1).scenario()
    scenario = replace(scenario, online=Given(ONLINE), offline=Given(OFFLINE), slo=SloSpec(ttft_s, 0.1))
    return Simulator(scenario, {})


def preemptions(ttft_s: float, slack: float) -> tuple[int, int]:
    """Batches that are, or will be, interrupted after the first and after the second arrival."""
    running = simulator(ttft_s)
    running.set_knobs(knobs_from_mapping({"preempt_slack": slack}))
    counts = []
    for seconds in (0.0045, 0.0055):
        running.run(seconds)
        state = running.cluster.instances[0]
        counts.append(int(state["activity"] == PREFILLING_OFFLINE and state["interrupted"]))
    return counts[0], counts[1]


def waits_s() -> tuple[float, float]:
    """What each arrival is predicted to wait for without interruption: the running batch, those before it, itself."""
    before = simulator(1.0)
    before.set_knobs(knobs_from_mapping({"preempt_slack": 1.5}))
    before.run(0.001)
    end_s = float(before.cluster.instances[0]["predicted_end_s"])
    each_s = float(prefill_s(before.cluster.costs[0, SCHEDULER_COST], 60.0))
    return end_s - ARRIVALS_S[0] + each_s, end_s - ARRIVALS_S[1] + 2 * each_s


def test_the_queue_before_an_arrival_counts_against_its_slack():
    first_s, second_s = waits_s()
    assert first_s < second_s  # one more prompt is a longer wait than a millisecond of the batch
    between_s = 0.5 * (first_s + second_s)
    assert preemptions(ttft_s=between_s, slack=1.0) == (0, 1)
    assert preemptions(ttft_s=0.99 * first_s, slack=1.0) == (1, 1)
    assert preemptions(ttft_s=1.01 * second_s, slack=1.0) == (0, 0)


@pytest.mark.parametrize(("rule", "kept"), [("layer", 0), ("chunk", 128)])
def test_what_an_interruption_leaves_of_earlier_pieces(rule, kept):
    """A prompt of 240 tokens in pieces of 128 and 112: the arrival falls into the second."""

    def simulator(arrivals_s: list[float]) -> Simulator:
        scenario = Case(kv_blocks=(400, 400), max_batch_tokens=256, max_seqs=1).scenario()
        lengths = (np.full(len(arrivals_s), length, np.int32) for length in (60, 2))
        online = Given(Requests(np.array(arrivals_s), *lengths))
        chunked = Simulator(
            replace(scenario, online=online, offline=Given(OFFLINE), slo=SloSpec(0.001, 0.1)), {"preemption": rule}
        )
        chunked.set_knobs(knobs_from_mapping({"prefill_chunk": 128}))
        return chunked

    alone = simulator([])
    while alone.cluster.slots["done"].max() < 128:
        alone.run(alone.now_s + 1e-3)
    disturbed = simulator([alone.now_s + 1e-3])
    disturbed.run(alone.now_s + 0.01)  # a layer takes about 4 ms
    assert disturbed.cluster.world[0]["preemptions"] == 1
    assert disturbed.cluster.slots["done"][disturbed.cluster.slots["prompt"] == 240].max() == kept


@pytest.mark.parametrize("slack", [0.5, 1.25])
def test_the_slack_is_a_fraction_of_the_slo(slack):
    _, second_s = waits_s()
    assert preemptions(ttft_s=1.01 * second_s / slack, slack=slack) == (0, 0)
    assert preemptions(ttft_s=0.99 * second_s / slack, slack=slack)[1] == 1
