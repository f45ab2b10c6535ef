"""Episodes: what a policy is asked, and that asking changes nothing by itself."""

from dataclasses import asdict

import pytest

import baselines
from ooco_gym.cluster.control import ooco_knobs
from ooco_gym.evaluation import episode_seeds, run_episode
from ooco_gym.evaluation.seeds import _PURPOSES
from ooco_gym.policy import ConstantPolicy
from ooco_gym.scenario import build_scenario

SCENARIO = build_scenario({"episode_s": 40.0, "warmup_s": 10.0})


@pytest.mark.parametrize("name", ["ooco", "base-pd", "no-offline"])
def test_a_constant_policy_gives_the_same_bits_in_one_piece_and_in_steps(name):
    times = []
    stepped = run_episode(baselines.load(name), SCENARIO, 3, 0.9, lambda simulator: times.append(simulator.now_s))
    assert asdict(run_episode(baselines.load(name), SCENARIO, 3)) == asdict(stepped)
    assert len(times) == 44 and times[0] == pytest.approx(10.9) and times[-1] == 50.0


def test_every_policy_warms_up_under_ooco_and_decides_from_then_on():
    seen = []
    policy = ConstantPolicy("patient", knobs={"preempt_slack": 0.8})

    class Spy:
        name, rules = policy.name, policy.rules

        def reset(self):
            seen.append("reset")

        def decide(self, telemetry):
            seen.append((telemetry["time_s"], telemetry["knob_preempt_slack"]))
            return policy.vector

    assert asdict(run_episode(Spy(), SCENARIO, 4)) == asdict(run_episode(policy, SCENARIO, 4))
    assert seen[:3] == ["reset", (10.0, ooco_knobs()[0]), (11.0, 0.8)] and len(seen) == 41


def test_seeds_of_different_purposes_share_no_episode():
    streams = [set(episode_seeds(purpose, base, 500)) for purpose in _PURPOSES for base in (0, 1)]
    assert sum(map(len, streams)) == len(set().union(*streams)) == 500 * len(streams)
    assert episode_seeds("train", 0, 3) == episode_seeds("train", 0, 9)[:3]
