"""Role changes, read from the event log: one per ten seconds, and none before what is on its way has arrived."""

from collections import Counter
from itertools import pairwise

import pytest

from ooco_gym.cluster import Simulator
from ooco_gym.cluster.control import knobs_from_mapping
from ooco_gym.cluster.state import RELAXED
from ooco_gym.scenario import build_scenario
from tests.cluster.recount import read


def swinging(config, seed, period_s, rate_scale=1.0):
    """An episode whose strict share swings between two instances and one, every ``period_s`` seconds; its log."""
    scenario = build_scenario({"episode_s": 220.0, "warmup_s": 5.0} | config).with_rate_scale(rate_scale)
    simulator = Simulator(scenario, {}, seed, log=True)
    simulator.run(scenario.warmup_s)
    for step in range(int(scenario.episode_s / period_s)):
        simulator.set_knobs(knobs_from_mapping({"strict_share": -0.25 * (step % 2)}))
        simulator.run(scenario.warmup_s + (step + 1) * period_s)
    return read(simulator.log())


def test_role_changes_begin_ten_seconds_apart_and_no_later():
    begun = [event.time_s for event in swinging({}, 0, 0.5) if event.kind == "draining"]
    gaps = [later - earlier for earlier, later in pairwise(begun)]
    assert len(begun) > 8 and min(gaps) == pytest.approx(10.0) and min(gaps) >= 10.0


@pytest.mark.parametrize("seed", range(4))
def test_a_strict_instance_keeps_its_role_until_its_inbound_transfers_have_arrived(seed):
    slow_link = {"cluster": {"relaxed": 2, "strict": 2, "link_bytes_per_s": 1e8}, "offline": "none"}
    events = swinging(slow_link, seed, 11.0, rate_scale=0.08)
    on_the_way, changes = Counter(), 0
    for event in events:
        if event.kind == "transfer":
            on_the_way[event.a] += 1
        elif event.kind == "transferred":
            on_the_way[event.instance] -= 1
        elif event.kind == "role" and event.a == RELAXED:
            changes += 1
            assert on_the_way[event.instance] == 0
    assert changes >= 8
