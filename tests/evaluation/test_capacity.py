"""Capacity search: on a stand-in whose answer is known, and on the simulator."""

import json

import numpy as np
import pytest

import baselines
from ooco_gym.errors import OocoError
from ooco_gym.evaluation.capacity import Probe, Prober, find_capacity
from ooco_gym.scenario import build_scenario

SCENARIO = build_scenario({"episode_s": 60.0, "warmup_s": 20.0})


class Known:
    """Violations grow with the rate and cross 3 % at ``edge``; completions stop at ``most``."""

    def __init__(self, edge, most=1e9, episodes=8):
        self.edge, self.most, self.seeds, self.asked = edge, most, list(range(episodes)), {}

    def __call__(self, rate):
        n = len(self.seeds)
        spread = np.linspace(0.9, 1.1, n)
        violations = tuple(int(v) for v in 3000 * spread * (rate / self.edge) ** 2)
        finished = int(10_000 * min(1.0, self.most / rate))
        self.asked[rate] = Probe(rate, violations, (100_000,) * n, (10_000,) * n, (finished,) * n)
        return self.asked[rate]


@pytest.mark.parametrize("edge", [0.05, 0.8, 1.0, 37.0])
@pytest.mark.parametrize("precision", [0.02, 0.005])
def test_it_finds_the_edge_to_the_precision_and_the_interval_holds_it(edge, precision):
    found = find_capacity(Known(edge), precision=precision)
    assert edge / (1 + precision) <= found.rate_per_s.value <= edge
    assert found.rate_per_s.low < edge < found.rate_per_s.high < 1.1 * edge
    assert found.bounded_by == "violations"


def test_completions_bound_it_as_well():
    found = find_capacity(Known(10.0, most=2.0))
    assert found.rate_per_s.value == pytest.approx(2.0 / 0.97, rel=0.02) and found.bounded_by == "completions"


def test_no_capacity_and_no_end():
    assert find_capacity(Known(1e-6)).rate_per_s.value == 0.0
    endless = find_capacity(Known(1e9), largest_per_s=5.0)
    assert (endless.rate_per_s.value, endless.bounded_by) == (5.0, "search")


@pytest.mark.parametrize("settings", [{"limit": 1.0}, {"precision": 0.0}, {"guess_per_s": 0.0}])
def test_settings_out_of_range(settings):
    with pytest.raises(OocoError, match="accepted are"):
        find_capacity(Known(1.0), **settings)


def test_an_offline_mix_is_needed():
    with pytest.raises(OocoError, match="offline mix"):
        Prober(baselines.load("ooco"), build_scenario({"offline": "none"}), [1])


def test_probes_on_the_simulator_are_remembered_and_reused(tmp_path, monkeypatch):
    memory = tmp_path / "probes.jsonl"
    first = find_capacity(Prober(baselines.load("ooco"), SCENARIO, [1, 2], memory=memory, key="a"), precision=0.2)
    assert 0.1 < first.rate_per_s.value < 50.0
    memory.write_text(memory.read_text() + '{"key": "a", "seeds": [1, 2], "rate_')  # as an interrupted run leaves it
    monkeypatch.setattr(Prober, "_try", lambda self, rate: pytest.fail("tried again"))
    again = find_capacity(Prober(baselines.load("ooco"), SCENARIO, [1, 2], memory=memory, key="a"), precision=0.2)
    assert again == first
    assert len({json.loads(line)["rate_per_s"] for line in memory.read_text().splitlines()[:-1]}) == len(first.probes)


def test_another_policy_in_the_same_file_is_not_confused(tmp_path):
    memory = tmp_path / "probes.jsonl"
    Prober(baselines.load("ooco"), SCENARIO, [1], memory=memory, key="a")(0.5)
    assert Prober(baselines.load("ooco"), SCENARIO, [1], memory=memory, key="b").known == {}
    assert Prober(baselines.load("ooco"), SCENARIO, [2], memory=memory, key="a").known == {}
    assert list(Prober(baselines.load("ooco"), SCENARIO, [1], memory=memory, key="a").known) == [0.5]
