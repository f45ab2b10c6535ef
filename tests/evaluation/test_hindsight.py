"""Windowed hindsight: never below its first candidate, equal to it alone, and repeatable."""

import numpy as np
import pytest

from ooco_gym.cluster.control import knobs_from_mapping, ooco_action, ooco_knobs
from ooco_gym.envs import ClusterVectorEnv
from ooco_gym.evaluation.hindsight import windowed_hindsight
from ooco_gym.scenario import build_scenario

SCENARIO = build_scenario({"episode_s": 120.0, "warmup_s": 20.0})
PATIENT = knobs_from_mapping({"preempt_slack": 0.8})


def test_one_candidate_is_that_candidate_held_throughout():
    gain = windowed_hindsight(SCENARIO, 3, [PATIENT], window_s=30.0)
    assert gain.hindsight == pytest.approx(gain.first) and gain.switches == 0


def test_choosing_per_window_beats_the_first_candidate_and_is_repeatable():
    gain = windowed_hindsight(SCENARIO, 3, [ooco_knobs(), PATIENT], window_s=30.0)
    assert gain.hindsight > gain.first and gain.switches >= 1
    assert gain == windowed_hindsight(SCENARIO, 3, [ooco_knobs(), PATIENT], window_s=30.0)


@pytest.mark.parametrize("seed", range(4))
def test_it_is_never_worse_than_the_first_candidate(seed):
    others = [
        knobs_from_mapping(each) for each in ({}, {"strict_share": -0.25}, {"gate_batch": 4.0, "tpot_bound": 0.5})
    ]
    gain = windowed_hindsight(SCENARIO, seed, [PATIENT, *others], window_s=20.0)
    assert gain.hindsight >= gain.first - 1e-12


def test_the_reward_is_the_environments():
    env = ClusterVectorEnv(1, SCENARIO, autoreset_mode="Disabled")
    env.reset(seed=5)
    rewards = [env.step(ooco_action()[None])[1][0] for _ in range(120)]
    assert np.mean(rewards) == pytest.approx(windowed_hindsight(SCENARIO, 5, [ooco_knobs()]).first)
