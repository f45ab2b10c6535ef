"""One relaxed and one strict instance and three requests, worked by hand; kernel and reference must both give it.

The cost is set so that the arithmetic can be followed (L = 10 layers, times in ms, tokens n, contexts c):

    prefill of n tokens          10 + 0.010 n            one layer of it   1 + 0.001 n
    decode of contexts c1, c2..  10 + sum of (0.009 + 0.001 c)
    transfer of context c         1 + 0.010 (c - 1)
"""

from __future__ import annotations

import numpy as np
import pytest

from ooco_gym.cluster.simulator import Simulator
from ooco_gym.scenario import Scenario
from ooco_gym.specs import ClusterSpec, CostSpec, SloSpec
from ooco_gym.workload import OfflineJobs, Requests
from tests.reference import Reference
from tests.reference.cases import HARDWARE, MODEL, Given

MS = 1e-3
MICROSECOND = 1e-6


def toy() -> Simulator:
    """Offline job A at 0: 1000 prompt and 7 output tokens. Online X at 7.5 ms: 200 and 3; Y at 90 ms: 100 and 2."""
    online = Requests(np.array([7.5, 90.0]) * MS, np.array([200, 100]), np.array([3, 2]))
    jobs = OfflineJobs(False, np.array([0.0]), np.array([1000], np.int32), np.array([7], np.int32))
    scenario = Scenario(
        model=MODEL,
        hardware=HARDWARE,
        cluster=ClusterSpec(
            relaxed=1,
            strict=1,
            block_tokens=1,
            link_latency_s=1 * MS,
            link_bytes_per_s=MODEL.kv_bytes_per_token / (0.010 * MS),
            pull_interval_s=25 * MS,
        ),
        slo=SloSpec(ttft_s=12 * MS, tpot_s=20 * MS),
        cost=CostSpec(noise_sigma=0.0, bias_sigma=0.0),
        online=Given(online),
        offline=Given(jobs),
        episode_s=1.0,
        warmup_s=0.0,
    )
    simulator = Simulator(scenario)
    costs = simulator.cluster.costs  # of both instances and both clocks
    for name in costs.dtype.names:
        costs[name] = 0.0
    costs["layers"] = 10
    costs["layer_fixed_s"] = 1 * MS
    costs["token_s"] = 0.0009 * MS  # with the next line 0.001 ms per prompt token and layer
    costs["kv_s"] = 0.0001 * MS
    simulator.cluster.instances["kv_blocks"][:] = 2000
    simulator.cluster.instances["saturation_batch"][:] = 1.0
    return simulator


class Kernel:
    """The results of the kernel under the names of the reference."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator
        self.run = simulator.run

    def first_ms(self, index: int) -> float:
        return self.simulator.cluster.online["first_s"][index] / MS

    def finish_ms(self, index: int) -> float:
        return self.simulator.cluster.online["finish_s"][index] / MS

    def counters(self) -> dict[str, float]:
        world = self.simulator.cluster.world[0]
        return {name: world[name].item() for name in world.dtype.names if world[name].ndim == 0}


class Plain(Reference):
    def first_ms(self, index: int) -> float:
        return self.online[index].first_s / MS

    def finish_ms(self, index: int) -> float:
        return self.online[index].finish_s / MS

    def counters(self) -> dict[str, float]:
        return {**super().counters(), **self.seconds}


@pytest.fixture(params=[Kernel, Plain], ids=["kernel", "reference"])
def world(request):
    return request.param(toy())


def exactly(ms: float):
    return pytest.approx(ms, abs=0.5 * MICROSECOND / MS, rel=0)


def test_layer_preemption_and_hand_over(world):
    # 0       A's prefill starts on the relaxed instance: 10 + 10 = 20 ms, ten layers of 2 ms.
    # 7.5     X arrives. Slack 0 always interrupts: ceil(7.5 / 2) = 4 layers, so at 4 * 2 = 8 ms.
    world.run(7.9 * MS)
    assert world.counters()["preemptions"] == 0
    world.run(8.1 * MS)
    assert world.counters()["preemptions"] == 1
    assert world.counters()["interrupted_s"] / MS == exactly(8.0)
    # 8       X's prefill: 10 + 2 = 12 ms, first token at 20. TTFT = 20 - 7.5 = 12.5 ms.
    # 20      Transfer of context 201: 1 + 2 = 3 ms, at the strict instance at 23. It is idle: X decodes at once.
    # 23      10 + 0.009 + 0.201 = 10.210 -> 33.210;  10 + 0.009 + 0.202 = 10.211 -> 43.421, the third and last token.
    world.run(1.0)
    assert world.first_ms(0) == exactly(20.0)
    assert world.finish_ms(0) == exactly(43.421)
    assert (world.finish_ms(0) - world.first_ms(0)) / 2 == exactly(11.7105)  # TPOT


def test_pull_of_the_offline_decode(world):
    # 20      X's prefill is over, A's starts again from nothing: 20 ms, first token at 40 (context 1001).
    # 40      A decodes on the relaxed instance: 11.010 -> 51.010, 11.011 -> 62.021, 11.012 -> 73.033 (context 1004).
    # The strict instance asks at 0 (nobody there); at 33.210, its first boundary after 0 + 25 (A is in prefill); it may
    # ask from 58.210 on, but idles from 43.421 and steps again at max(58.210, 43.421 + 25) = 68.421. KV is free, the
    # preferred length is floor((20 - 10.009) / 0.001) > 1, A is the only candidate: granted.
    world.run(68.4 * MS)
    assert world.counters()["credited_output_tokens"] == 3  # at 40, 51.010 and 62.021
    world.run(73.0 * MS)
    assert world.counters()["migrations"] == 0
    # 73.033  A's next boundary: it leaves, 1 + 0.010 * 1003 = 11.030 -> 84.063.
    world.run(73.1 * MS)
    assert world.counters()["migrations"] == 1
    assert world.counters()["credited_output_tokens"] == 4
    # 84.063  11.013 -> 95.076 (5th token), 11.014 -> 106.090 (6th, context 1006).
    world.run(95.0 * MS)
    assert world.counters()["credited_output_tokens"] == 4
    world.run(95.1 * MS)
    assert world.counters()["credited_output_tokens"] == 5
    # 106.090 Y has come in meanwhile (below): 10 + (0.009 + 1.006) + (0.009 + 0.101) = 11.125 -> 117.215, the 7th.
    world.run(117.214 * MS)
    assert world.counters()["offline_finished"] == 0
    world.run(117.216 * MS)
    assert world.counters()["offline_finished"] == 1


def test_arrival_during_an_iteration_waits_for_its_end(world):
    # 90      Y arrives at the idle relaxed instance: 10 + 1 = 11 ms, first token at 101 (TTFT 11 ms).
    # 101     Transfer of context 101: 1 + 1 = 2 ms, at 103 in the middle of A's iteration, which ends at 106.090.
    # 106.090 Y and A together until 117.215. TPOT = 117.215 - 101 = 16.215 ms.
    world.run(1.0)
    assert world.first_ms(1) == exactly(101.0)
    assert world.finish_ms(1) == exactly(117.215)


def test_counters_at_the_end(world):
    world.run(1.0)
    found = world.counters()
    expected = {
        "online_finished": 2,
        "offline_finished": 1,
        "offline_finished_prompt_tokens": 1000,
        "offline_finished_output_tokens": 7,
        "credited_prompt_tokens": 1000,
        "credited_output_tokens": 7,
        "prefilled_tokens": 200 + 1000 + 100,
        "recomputed_tokens": 0,  # the interrupted prefill had computed nothing that was kept
        "preemptions": 1,
        "evictions": 0,
        "migrations": 1,
        "violations": 1,  # X: TTFT 12.5 ms against 12 ms
        "iterations": 3 + 3 + 5,  # prefills; decodes of A on the relaxed instance; decodes on the strict one
    }
    assert {name: found[name] for name in expected} == expected
    # prefills 8 (interrupted), 12, 20, 11; A 40 -> 73.033; X 23 -> 43.421; A and Y 84.063 -> 117.215
    assert found["busy_s"] / MS == exactly(51 + 33.033 + 20.421 + 33.152)


def test_violation_is_booked_when_it_is_certain(world):
    # X arrives at 7.5 ms and has no first token at 7.5 + 12 = 19.5 ms, half a millisecond before it comes.
    world.run(19.4 * MS)
    assert world.counters()["violations"] == 0
    world.run(19.6 * MS)
    assert world.counters()["violations"] == 1
