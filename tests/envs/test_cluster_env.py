"""OOCO/Cluster-v0: the reward by hand, two environment checkers, determinism, an episode's bookkeeping."""

import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as gymnasium_check
from stable_baselines3.common.env_checker import check_env as sb3_check

import ooco_gym  # noqa: F401  registers the environment
from baselines import load
from ooco_gym.cluster import Simulator, observe, ooco_action
from ooco_gym.cluster.control import KNOB_COUNT, RULES
from ooco_gym.cluster.observation import OBSERVATION_SIZE
from ooco_gym.envs import ClusterEnv, IdealSeconds, Interval
from ooco_gym.errors import OocoError
from ooco_gym.scenario import build_scenario

ROOT = Path(__file__).parents[2]
SHORT = {"episode_s": 6, "warmup_s": 2}
STRAINED = {
    "episode_s": 60,
    "warmup_s": 20,
    "slo": {"ttft_s": 0.2, "tpot_s": 0.014},
    "offline": "decode-heavy",
}


def played(env, seed=None, action_seed=0):
    """One episode of random actions: (observations, rewards, infos)."""
    rng = np.random.default_rng(action_seed)
    observation, info = env.reset(seed=seed)
    observations, rewards, infos, truncated = [observation], [], [info], False
    while not truncated:
        action = rng.uniform(-1, 1, KNOB_COUNT).astype(np.float32)
        observation, reward, terminated, truncated, info = env.step(action)
        assert not terminated
        observations.append(observation)
        rewards.append(reward)
        infos.append(info)
    return np.array(observations), rewards, infos


# By hand.


def test_the_reward_by_hand():
    """Half of 4 instances' 2 s was useful; 3 violations where 10 arrivals are expected cost 5 * 0.3."""
    interval = Interval(interval_s=2.0, instances=4, offline_ideal_s=4.0, violations=3, mean_arrivals=10.0)
    assert IdealSeconds()(interval) == pytest.approx(0.5 - 1.5)
    assert IdealSeconds(price=0.0)(interval) == 0.5
    with pytest.raises(OocoError, match=r"reward\.price is -1, a number of at least 0"):
        IdealSeconds(price=-1)


def test_an_interval_is_what_the_clusters_counters_say():
    env = ClusterEnv(STRAINED, control_interval_s=5.0, reward=lambda interval: float(interval.violations))
    env.reset(seed=1)
    scenario, world = env.scenario, env.simulator.cluster.world[0]
    before = world.copy()
    _, reward, _, _, info = env.step(ooco_action())
    interval, after = info["interval"], env.simulator.cluster.world[0]
    assert (interval.interval_s, interval.instances) == (5.0, 4)
    prompts, outputs = (
        after[f"credited_{kind}_tokens"] - before[f"credited_{kind}_tokens"] for kind in ("prompt", "output")
    )
    useful_s = prompts * scenario.ideal_prompt_token_s + outputs * scenario.ideal_output_token_s
    assert interval.offline_ideal_s == pytest.approx(useful_s) and outputs > 0
    assert reward == interval.violations == after["violations"] - before["violations"]
    assert interval.mean_arrivals == pytest.approx(5 * scenario.online.mean_rate_per_s)


# Registration and checkers.


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("render_mode", [None, "ansi", "rgb_array"])
def test_both_checkers_have_nothing_to_say(render_mode):
    env = gym.make("OOCO/Cluster-v0", scenario=SHORT, render_mode=render_mode).unwrapped
    gymnasium_check(env, skip_render_check=render_mode is None)
    sb3_check(env, warn=True, skip_render_check=render_mode is None)


@pytest.mark.filterwarnings("error")
def test_importing_the_package_registers_the_environment():
    env = gym.make("OOCO/Cluster-v0", scenario=SHORT, control_interval_s=3.0)
    assert isinstance(env.unwrapped, ClusterEnv)
    _, _, infos = played(env)
    assert len(infos) == 3 and "outcome" in infos[-1]


def test_gym_make_imports_the_package_in_a_fresh_process():
    program = "import gymnasium; print(gymnasium.make('ooco_gym:OOCO/Cluster-v0').observation_space.shape[0])"
    command = [sys.executable, "-W", "error::UserWarning", "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, str(OBSERVATION_SIZE)), done.stderr


# Determinism.


def test_the_same_seed_gives_the_same_bits():
    first, again = ClusterEnv(SHORT), ClusterEnv(SHORT)
    observations, rewards, infos = played(first, seed=7)
    for env in (again, first):  # another environment, and the same one again
        other = played(env, seed=7)
        assert np.array_equal(observations, other[0])
        assert rewards == other[1]
        assert infos == other[2]


def test_different_seeds_differ():
    env = ClusterEnv(SHORT)
    runs = [played(env, seed=seed)[0].tobytes() for seed in range(5)]
    assert len(set(runs)) == 5


def test_every_unseeded_episode_draws_its_own_workload_reproducibly():
    seeds = []
    for _ in range(2):
        env = ClusterEnv(SHORT)
        seeds.append([env.reset(seed=3)[1]["seed"]] + [env.reset()[1]["seed"] for _ in range(4)])
    assert seeds[0] == seeds[1] and len(set(seeds[0])) == 5


def test_the_seed_in_info_replays_the_episode():
    env = ClusterEnv(SHORT)
    env.reset(seed=3)
    observations, rewards, infos = played(env)
    again = played(ClusterEnv(SHORT), seed=infos[0]["seed"])
    assert np.array_equal(observations, again[0]) and rewards == again[1]


# The course of an episode.


@pytest.mark.parametrize(
    ("interval_s", "steps"), [(1.0, 6), (6.0, 1), (2.5, 3), (0.7, 9), (0.1, 60), (0.05, 120), (5.999, 2)]
)
def test_an_episode_ends_at_its_horizon(interval_s, steps):
    env = ClusterEnv(SHORT, control_interval_s=interval_s)
    _, rewards, infos = played(env, seed=0)
    assert len(rewards) == steps
    assert env.simulator.now_s == 8.0
    assert sum(info["interval"].interval_s for info in infos[1:]) == pytest.approx(6.0)
    assert [("outcome" in info) for info in infos[1:]] == [False] * (steps - 1) + [True]
    assert infos[-1]["outcome"] == env.simulator.outcome().to_dict()
    assert np.isfinite(rewards).all()


def test_a_step_outside_an_episode_needs_a_reset():
    env = ClusterEnv(SHORT, control_interval_s=6.0)
    for call in (lambda: env.step(ooco_action()), env.telemetry):
        with pytest.raises(gym.error.ResetNeeded):
            call()
    played(env)
    with pytest.raises(gym.error.ResetNeeded, match="the episode is over"):
        env.step(ooco_action())
    env.reset()
    env.step(ooco_action())


def test_the_intervals_add_up_to_the_episode():
    env = ClusterEnv(STRAINED)
    env.reset(seed=2)
    booked_in_warm_up = int(env.simulator.cluster.world[0]["violations"])
    _, rewards, infos = played(env, seed=2)
    world, intervals = env.simulator.cluster.world[0], [info["interval"] for info in infos[1:]]
    assert sum(interval.violations for interval in intervals) == world["violations"] - booked_in_warm_up > 5
    assert rewards == [IdealSeconds()(interval) for interval in intervals]
    useful_s = sum(interval.offline_ideal_s for interval in intervals)
    assert 0.02 < useful_s / (60 * 4) < 1.0


def test_the_observation_is_of_the_telemetry_behind_it():
    env = ClusterEnv(SHORT)
    env.reset(seed=0)
    for _ in range(3):
        observation = env.step(env.action_space.sample())[0]
        assert np.array_equal(observation, observe(env.telemetry()))
        assert env.observation_space.contains(observation)


def test_the_action_is_seen_as_the_previous_action():
    env = ClusterEnv(SHORT)
    start, _ = env.reset(seed=0)
    assert start[-KNOB_COUNT:] == pytest.approx(ooco_action(), abs=1e-6)  # warm-up runs under OOCO
    action = np.array([0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, -0.8, 0.2, -0.3], np.float32)
    assert env.step(action)[0][-KNOB_COUNT:] == pytest.approx(action, abs=1e-6)


def test_scripted_ooco_is_the_ooco_baseline():
    """The environment under ``ooco_action`` and the baseline straight through the simulator: one episode."""
    policy, scenario = load("ooco"), build_scenario({"episode_s": 60, "warmup_s": 10})
    env = ClusterEnv(scenario, rules=policy.rules)
    env.reset(seed=11)
    truncated = False
    while not truncated:
        *_, truncated, info = env.step(ooco_action().astype(np.float32))
    simulator = Simulator(scenario, policy.rules, 11)
    simulator.run(scenario.warmup_s)
    simulator.set_knobs(policy.decide(simulator.telemetry()))
    simulator.run(scenario.horizon_s)
    outcome = simulator.outcome().to_dict()
    # Knobs that differ in the last bits wake the instances: more events, the same decisions.
    assert {k: v for k, v in info["outcome"].items() if k != "events"} == {
        k: v for k, v in outcome.items() if k != "events"
    }
    for name in ("first_s", "finish_s"):
        there, here = (s.cluster.online[name] for s in (env.simulator, simulator))
        assert there == pytest.approx(here, rel=1e-12)


def test_rules_reach_the_cluster():
    rules = {name: choices[-1] for name, choices in RULES.items()}
    env = ClusterEnv(SHORT, rules=rules)
    env.reset()
    assert env.rules == env.simulator.rules == rules


@pytest.mark.parametrize(
    "config",
    [
        {"cluster": "unified4"},
        {"cluster": {"relaxed": 1, "strict": 1, "unified": 1}, "slo": "two-classes"},
        {"faults": {"outages": [{"instance": 0, "at_s": 3.5, "for_s": 3.0}], "cancel_share": 0.5}},
    ],
    ids=["unified", "all three roles", "failing"],
)
def test_every_kind_of_cluster_can_be_played(config):
    env = ClusterEnv(SHORT | config)
    observations, rewards, infos = played(env, seed=3)
    assert all(env.observation_space.contains(observation) for observation in observations)
    assert np.isfinite(rewards).all() and infos[-1]["outcome"]["online_requests"] > 0
    assert infos[-1]["outcome"]["failures"] == ("faults" in config)


def test_an_action_beyond_the_bounds_saturates():
    env, bounded = ClusterEnv(SHORT), ClusterEnv(SHORT)
    env.reset(seed=0), bounded.reset(seed=0)
    wild, one = np.full(KNOB_COUNT, 1e30, np.float32), np.ones(KNOB_COUNT, np.float32)
    assert env.step(wild)[1] == bounded.step(one)[1]


@pytest.mark.parametrize("action", [np.full(KNOB_COUNT, np.nan), np.full(KNOB_COUNT, np.inf), np.zeros(3), None, {}])
def test_an_action_that_says_nothing_is_refused(action):
    env = ClusterEnv(SHORT)
    env.reset(seed=0)
    with pytest.raises(OocoError, match=f"{KNOB_COUNT} finite numbers"):
        env.step(action)


# Snapshots.


def test_a_restored_state_replays_the_same_bits():
    env = ClusterEnv(SHORT, control_interval_s=0.3)
    env.reset(seed=5)
    actions = np.random.default_rng(0).uniform(-1, 1, (12, KNOB_COUNT))
    for action in actions[:4]:
        seen = env.step(action)[0]
    state = env.state()
    first = [env.step(action)[:2] for action in actions[4:8]]
    for action in actions[8:]:  # wander off another way, then come back twice
        env.step(action)
    for _ in range(2):
        assert np.array_equal(env.restore(state), seen)
        again = [env.step(action)[:2] for action in actions[4:8]]
        assert all(np.array_equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(first, again, strict=True))


def test_a_restored_state_replays_failures_and_cancellations():
    """Taken while one instance is down, two requests classes are about and clients go away."""
    faults = {"outages": [{"instance": 1, "at_s": 2.5, "for_s": 2.0}], "cancel_share": 0.3, "cancel_after_s": 1.0}
    env = ClusterEnv(SHORT | {"faults": faults, "slo": "two-classes"}, control_interval_s=0.5)
    env.reset(seed=5)
    actions = np.random.default_rng(0).uniform(-1, 1, (12, KNOB_COUNT))
    for action in actions[:2]:
        env.step(action)
    state = env.state()
    assert env.telemetry()["unavailable_instances"] >= 1
    first = [env.step(action) for action in actions[2:]]
    env.restore(state)
    again = [env.step(action) for action in actions[2:]]
    assert all(np.array_equal(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(first, again, strict=True))
    assert first[-1][4]["outcome"]["cancelled"] > 0


def test_a_state_of_another_episode_is_refused():
    env = ClusterEnv(SHORT)
    env.reset(seed=5)
    state = env.state()
    env.reset(seed=6)
    with pytest.raises(OocoError, match="of another episode"):
        env.restore(state)


# Rendering.


def test_rendering_as_text_and_as_a_picture():
    for mode in ("ansi", "rgb_array"):
        env = ClusterEnv(SHORT, render_mode=mode)
        env.reset(seed=0)
        first = env.render()
        env.step(ooco_action())
        second = env.render()
        if mode == "ansi":
            assert "relaxed x2" in first and "tpot_bound 0.98" in first and first != second
            assert len(first.splitlines()) <= 10 and max(map(len, first.splitlines())) < 120
        else:
            assert first.dtype == np.uint8 and first.shape == second.shape == (384, 512, 3)
            assert not np.array_equal(first, second)


def test_rendering_without_a_mode_warns():
    env = ClusterEnv(SHORT)
    env.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert env.render() is None
    assert "render_mode" in str(caught[0].message)


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"control_interval_s": 0}, ["control_interval_s is 0", "at most the episode's 6 s"]),
        ({"control_interval_s": 6.1}, ["control_interval_s is 6.1"]),
        ({"control_interval_s": float("nan")}, ["control_interval_s is nan"]),
        ({"render_mode": "human"}, ["render_mode is 'human'", "ansi, rgb_array"]),
        ({"rules": {"routes": "x"}}, ["unknown rule 'routes'", "admission"]),
        ({"rules": {"routing": "random"}}, ["rule 'routing' is 'random'", "least_pending, round_robin"]),
        ({"scenario": {"modle": "x"}}, ["unknown scenario key 'modle'", "model"]),
    ],
)
def test_an_argument_that_cannot_be_used(arguments, named):
    with pytest.raises(OocoError) as caught:
        ClusterEnv(**({"scenario": SHORT} | arguments))
    assert all(part in str(caught.value) for part in named)
