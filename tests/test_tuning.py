"""CMA-ES over constants: what it may touch, what it refuses, and that it beats where it started."""

import json

import numpy as np
import pytest
from rich.console import Console

import agents
from agents.cmaes import configure, train
from agents.tracking import Tracker
from agents.training import Training
from ooco_gym.cluster.control import KNOB_NAMES, ooco_knobs
from ooco_gym.envs import IdealSeconds
from ooco_gym.errors import OocoError
from ooco_gym.evaluation import episode_seeds, run_episodes
from ooco_gym.policy import ConstantPolicy
from ooco_gym.scenario import build_scenario

SCENARIO = build_scenario({"episode_s": 60.0, "warmup_s": 20.0})
SMALL = {"generations": 6, "population": 6, "episodes": 2, "validate_every": 3, "validation_episodes": 4}


def training(folder, **config):
    tracker = Tracker("disabled", "ooco-gym", folder, "t", {})
    config = {"name": "cmaes", **SMALL, **config}
    return Training(SCENARIO, config, IdealSeconds(), 1.0, 0, folder, tracker, Console(quiet=True))


def test_tuned_constants_beat_the_start_and_leave_the_other_knobs_alone(tmp_path):
    run = training(tmp_path, knobs=["preempt_slack", "gate_batch", "strict_prefill"], policy="mine")
    policy = train(run)
    assert isinstance(policy, ConstantPolicy) and policy.name == "mine"
    kept = [index for index, name in enumerate(KNOB_NAMES) if name not in run.config["knobs"]]
    assert np.array_equal(policy.vector[kept], ooco_knobs()[kept])
    seeds = episode_seeds("evaluation", 0, 4)
    ours, start = (
        np.mean([outcome.offline_ideal_s_per_instance_s for outcome in run_episodes(each, SCENARIO, seeds)])
        for each in (policy, run.untrained_policy())
    )
    assert ours > start
    assert json.loads((tmp_path / "policy" / "policy.json").read_text())["kind"] == "constant"


def test_the_same_seed_tunes_the_same_knobs(tmp_path):
    first, second = (train(training(tmp_path / name, generations=2)).vector for name in "ab")
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"knobs": ["speed"]}, "unknown knob 'speed', accepted are some of preempt_slack"),
        ({"knobs": []}, "no knob to tune"),
        ({"population": 1}, "agent.population is 1, at least 2"),
        ({"sigma": 0.0}, "sigma above 0"),
        ({"pace": 1}, "agent.pace"),
    ],
)
def test_settings_that_are_refused(values, said):
    with pytest.raises(OocoError, match=said):
        configure(values)


def test_helpers_are_no_agents():
    assert agents.known() == ["cmaes", "ppo"]
