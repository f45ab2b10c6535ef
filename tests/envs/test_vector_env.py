"""The native vector environment: N scalar environments bit for bit, in every autoreset mode; copies and snapshots."""

import copy
import pickle

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from agents.vec_env import Sb3VecEnv
from ooco_gym.cluster.control import KNOB_COUNT
from ooco_gym.envs import ClusterEnv, ClusterVectorEnv
from ooco_gym.errors import OocoError
from ooco_gym.scenario import build_scenario

SHORT = {"episode_s": 5, "warmup_s": 2, "faults": "unreliable", "slo": "two-classes"}
OTHER = {**SHORT, "cluster": "unified4", "hardware": "h100"}


def actions(steps: int, count: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (steps, count, KNOB_COUNT)).astype(np.float32)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_a_vector_is_its_scalars_bit_for_bit(mode, threads):
    """Over two episodes, with another scenario in the middle one."""
    scenarios = [build_scenario(values) for values in (SHORT, OTHER, SHORT)]
    vector = ClusterVectorEnv(3, scenarios, autoreset_mode=mode, threads=threads)
    scalars = [ClusterEnv(scenario) for scenario in scenarios]
    observations, infos = vector.reset(seed=7)
    expected = [env.reset(seed=7 + index) for index, env in enumerate(scalars)]
    assert np.array_equal(observations, [observation for observation, _ in expected])
    assert infos["seed"].tolist() == [7, 8, 9]
    over = [False] * 3
    for step in actions(12, 3):
        observations, rewards, terminated, truncated, infos = vector.step(step)
        assert not terminated.any()
        for index, env in enumerate(scalars):
            if over[index] and mode == "NextStep":
                observation, reward, over[index] = env.reset()[0], 0.0, False
            else:
                observation, reward, _, over[index], info = env.step(step[index])
                assert infos["violations"][index] == info["interval"].violations
            if over[index] and mode == "SameStep":
                assert np.array_equal(infos["final_obs"][index], observation)
                assert infos["final_info"]["outcome"]["violations"][index] == info["outcome"]["violations"]
                observation = env.reset()[0]
            elif over[index]:
                assert infos["outcome"]["iterations"][index] == info["outcome"]["iterations"]
            assert np.array_equal(observations[index], observation)
            assert (rewards[index], truncated[index]) == (reward, over[index])


def test_gymnasium_makes_it():
    vector = gym.make_vec("OOCO/Cluster-v0", num_envs=2, vectorization_mode="vector_entry_point", scenario=SHORT)
    assert isinstance(vector.unwrapped, ClusterVectorEnv)
    assert vector.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    observations, _ = vector.reset(seed=1)
    assert vector.observation_space.contains(observations)
    vector.close()


def test_without_autoreset_the_caller_chooses_who_starts_again():
    vector = ClusterVectorEnv(2, SHORT, autoreset_mode="Disabled")
    vector.reset(seed=0)
    for step in actions(5, 2):
        _, _, _, truncated, _ = vector.step(step)
    assert truncated.all()
    with pytest.raises(gym.error.ResetNeeded, match="episode 0 is over"):
        vector.step(actions(1, 2)[0])
    vector.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(gym.error.ResetNeeded, match="episode 1 is over"):
        vector.step(actions(1, 2)[0])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda env: env.step(np.zeros((3, KNOB_COUNT))), "2 rows of 10 finite numbers"),
        (lambda env: env.step(np.full((2, KNOB_COUNT), np.nan)), "2 rows of 10 finite numbers"),
        (lambda env: env.reset(seed=1.5), "seed is 1.5, an integer"),
        (lambda env: env.reset(seed=[1, 2, 3]), "3 seeds for 2"),
        (lambda env: env.reset(options={"reset_mask": [0, 1]}), "2 booleans are needed"),
        (lambda env: ClusterVectorEnv(2, [SHORT]), "1 scenarios for num_envs=2"),
        (lambda env: ClusterVectorEnv(0), "num_envs is 0"),
        (lambda env: ClusterVectorEnv(1, SHORT, autoreset_mode="never"), "accepted are NextStep, SameStep, Disabled"),
        (lambda env: ClusterVectorEnv(1, SHORT, control_interval_s="x"), "control_interval_s is 'x'"),
        (lambda env: ClusterVectorEnv(1, SHORT, rules="layer"), "rules is 'layer'"),
        (lambda env: Sb3VecEnv(env), "needs SameStep"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(what, message):
    env = ClusterVectorEnv(2, SHORT)
    env.reset(seed=0)
    with pytest.raises(OocoError, match=message):
        what(env)


def test_the_sb3_adapter_hands_on_the_last_observation():
    native = ClusterVectorEnv(2, SHORT, autoreset_mode="SameStep")
    twin = ClusterVectorEnv(2, SHORT, autoreset_mode="SameStep")
    adapter = Sb3VecEnv(native)
    adapter.seed(3)
    assert np.array_equal(adapter.reset(), twin.reset(seed=3)[0])
    for step in actions(5, 2):
        observations, rewards, dones, infos = adapter.step(step)
        expected, their_rewards, _, truncated, given = twin.step(step)
        assert np.array_equal(observations, expected) and np.array_equal(dones, truncated)
        assert np.array_equal(rewards, their_rewards.astype(np.float32))
    assert dones.all() and infos[0]["TimeLimit.truncated"]
    assert np.array_equal(infos[1]["terminal_observation"], given["final_obs"][1])
    assert infos[1]["outcome"]["iterations"] == given["final_info"]["outcome"]["iterations"][1]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
@pytest.mark.parametrize("make", [ClusterEnv, lambda scenario: ClusterVectorEnv(1, scenario)])
def test_a_copy_goes_its_own_way(make, duplicate):
    env = make(SHORT)
    env.reset(seed=0)
    env.step(actions(1, 1)[0].reshape(env.action_space.shape))
    twin = duplicate(env)
    results = [[each.step(step.reshape(env.action_space.shape))[:2] for step in actions(3, 1)] for each in (twin, env)]
    for (their_observation, their_reward), (observation, reward) in zip(*results, strict=True):
        assert np.array_equal(their_observation, observation) and np.all(their_reward == reward)


def test_the_simulator_behind_an_environment_may_be_moved():
    env = ClusterEnv(SHORT)
    env.reset(seed=0)
    before = env.simulator.state()
    first = env.step(actions(1, 1)[0, 0])
    env.simulator.restore(before)
    again = env.step(actions(1, 1)[0, 0])
    assert np.array_equal(first[0], again[0]) and first[1] == again[1]


@pytest.mark.parametrize("other", [{"hardware": "h100"}, {"cluster": "1x3"}, {"episode_s": 4}, {"slo": "loose"}])
def test_a_state_of_another_episode_is_refused(other):
    env, another = ClusterEnv(SHORT), ClusterEnv({**SHORT, **other})
    env.reset(seed=0)
    another.reset(seed=0)
    with pytest.raises(OocoError, match="of another episode"):
        another.restore(env.state())
    with pytest.raises(OocoError, match="of another episode"):
        env.restore(None)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True, "a", float("nan")])
def test_threads_that_are_refused(threads):
    with pytest.raises(OocoError, match=r"threads is .*, an integer of at least 1 is needed"):
        ClusterVectorEnv(2, SHORT, threads=threads)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_closed_environment_says_so_however_many_threads_it_had(threads):
    env = ClusterVectorEnv(2, SHORT, threads=threads)
    env.reset(seed=0)
    env.close()
    env.close()
    with pytest.raises(gym.error.ClosedEnvironmentError, match="closed"):
        env.step(actions(1, 2)[0])
    with pytest.raises(gym.error.ClosedEnvironmentError, match="closed"):
        env.reset()


@pytest.mark.parametrize(
    ("reward", "said"),
    [(5, "reward is 5"), (lambda _: None, "gave None"), (lambda _: np.zeros(3), "2 numbers are needed")],
)
def test_rewards_that_are_refused(reward, said):
    with pytest.raises(OocoError, match=said):
        env = ClusterVectorEnv(2, SHORT, reward=reward)
        env.reset(seed=0)
        env.step(actions(1, 2)[0])


@pytest.mark.parametrize("seed", [2**63 - 2, 2**70, "7", -1, [1, 2**63]])
def test_seeds_that_are_refused(seed):
    with pytest.raises(OocoError, match="seed is"):
        ClusterVectorEnv(2, SHORT).reset(seed=seed)


def test_a_zero_dimensional_seed_is_a_number_and_options_are_a_mapping():
    env = ClusterVectorEnv(np.int64(2), SHORT)
    assert list(env.reset(seed=np.array(4)[()])[1]["seed"]) == [4, 5]
    with pytest.raises(OocoError, match="options is"):
        env.reset(options=[1])
