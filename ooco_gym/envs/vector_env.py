"""The native vector environment: N clusters advanced by one compiled call per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode

from ooco_gym.cluster.control import KNOB_COUNT, check_rules
from ooco_gym.cluster.observation import observation_bounds
from ooco_gym.envs.batch import Batch, checked_actions, checked_reward, checked_rewards
from ooco_gym.envs.reward import Interval, Reward
from ooco_gym.errors import OocoError
from ooco_gym.scenario import Scenario, build_scenario
from ooco_gym.specs import is_number

Array = npt.NDArray[Any]
_SEEDS_END = 2**63  # seeds are reported in an integer array
Source = Scenario | Mapping[str, Any] | None


class ClusterVectorEnv(gym.vector.VectorEnv[Array, Array, Array]):
    """N times :class:`ClusterEnv`, bit for bit: ``gymnasium.make_vec("OOCO/Cluster-v0", num_envs=64)``.

    **Arguments** beside those of the scalar environment: ``scenario`` may be a sequence with one scenario per
    sub-environment (domain randomisation); ``reward`` is called once per step on an Interval whose fields are arrays
    [N]; ``autoreset_mode`` is ``"NextStep"`` (Gymnasium's default: the step after the end resets and ignores its
    action), ``"SameStep"`` (the end's observation and info are in ``infos["final_obs"]``, ``infos["final_info"]``) or
    ``"Disabled"`` (``reset(options={"reset_mask": ...})``); ``threads`` defaults to the number of cores.

    ``reset(seed=s)`` seeds sub-environment i with s + i; every episode of a sub-environment draws its own seed from
    there, as the scalar environment does. Episodes are truncated, never terminated. With ``"SameStep"`` the last
    interval's entries stay at the top level of ``infos``, beside the seed of the next episode. It does not render.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 (declared so by gymnasium)

    def __init__(
        self,
        num_envs: int = 1,
        scenario: Source | Sequence[Source] = None,
        rules: Mapping[str, str] | None = None,
        control_interval_s: float = 1.0,
        reward: Reward | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        threads: int | None = None,
    ) -> None:
        if isinstance(num_envs, bool) or not isinstance(num_envs, (int, np.integer)) or num_envs < 1:
            raise OocoError(f"num_envs is {num_envs!r}, an integer of at least 1 is needed")
        num_envs = int(num_envs)
        scenarios = _scenarios(scenario, num_envs)
        shortest_s = min(entry.episode_s for entry in scenarios)
        if not (is_number(control_interval_s) and 0 < control_interval_s <= shortest_s):
            raise OocoError(
                f"control_interval_s is {control_interval_s!r}, accepted is above 0 and at most the shortest episode, "
                f"{shortest_s:g} s"
            )
        try:
            self.autoreset_mode = AutoresetMode(autoreset_mode)
        except ValueError:
            accepted = ", ".join(str(mode.value) for mode in AutoresetMode)
            raise OocoError(f"autoreset_mode is {autoreset_mode!r}, accepted are {accepted}") from None
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.num_envs = num_envs
        self.render_mode = None
        self.reward = checked_reward(reward)
        low, high = observation_bounds()
        self.single_observation_space = gym.spaces.Box(low, high, dtype=np.float32)
        self.single_action_space = gym.spaces.Box(-1.0, 1.0, (KNOB_COUNT,), np.float32)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self._batch = Batch(scenarios, check_rules(rules or {}), float(control_interval_s), threads)
        self._randoms = [seeding.np_random(None)[0] for _ in range(num_envs)]
        self._over = np.ones(num_envs, np.bool_)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Array, dict[str, Any]]:
        """Start every episode, or those of ``options["reset_mask"]``; ``infos["seed"]`` are the episodes' seeds."""
        chosen = np.arange(self.num_envs)
        if options is not None and not isinstance(options, Mapping):
            raise OocoError(f"options is {options!r}, a mapping is needed; the one known key is 'reset_mask'")
        if options is not None and options.get("reset_mask") is not None:
            mask = np.asarray(options["reset_mask"])
            if mask.shape != (self.num_envs,) or mask.dtype != np.bool_:
                raise OocoError(f"reset_mask is {mask!r}, {self.num_envs} booleans are needed")
            chosen = np.flatnonzero(mask)
        seeds = _seeds(seed, self.num_envs)
        for index, given in enumerate(seeds):
            if given is not None and index in chosen:
                self._randoms[index] = seeding.np_random(given)[0]
        infos = self._start({index: seeds[index] for index in chosen.tolist()}, {})
        return self._batch.observations.copy(), infos

    def _start(self, seeds: Mapping[int, int | None], infos: dict[str, Any]) -> dict[str, Any]:
        """Begin episodes; those without a seed draw their own."""
        chosen = {
            index: seed if seed is not None else int(self._randoms[index].integers(2**62))
            for index, seed in seeds.items()
        }
        self._batch.start(chosen)
        self._over[list(chosen)] = False
        for index, seed in chosen.items():
            infos = self._add_info(infos, {"seed": seed}, index)
        return infos

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Apply one action per sub-environment, [N, KNOB_COUNT], for one control interval each."""
        checked = checked_actions(actions, (self.num_envs, KNOB_COUNT))
        if self._over.any() and self.autoreset_mode is not AutoresetMode.NEXT_STEP:
            raise gym.error.ResetNeeded(f"episode {int(np.argmax(self._over))} is over or has not begun: reset() it")
        if None in self._batch.simulators:
            index = self._batch.simulators.index(None)
            raise gym.error.ResetNeeded(f"step() needs a reset() first: environment {index} has not begun")
        active = np.flatnonzero(~self._over)
        rewards = np.zeros(self.num_envs)
        truncations = np.zeros(self.num_envs, np.bool_)
        infos: dict[str, Any] = {}
        if self._over.any():
            infos = self._start(dict.fromkeys(np.flatnonzero(self._over).tolist()), infos)
        if len(active):
            interval = self._batch.step(checked[active], active)
            rewards[active] = checked_rewards(self.reward(interval), len(active))
            infos |= self._interval_infos(interval, active)
            truncations[active] = self._batch.over(active)
        self._over = truncations.copy()
        ended = np.flatnonzero(truncations).tolist()
        for index in ended:
            infos = self._add_info(infos, self._last(index), index)
        if ended and self.autoreset_mode is AutoresetMode.SAME_STEP:
            infos = self._start(dict.fromkeys(ended), infos)
        return self._batch.observations.copy(), rewards, np.zeros(self.num_envs, np.bool_), truncations, infos

    def _interval_infos(self, interval: Interval, active: npt.NDArray[np.int64]) -> dict[str, Any]:
        """What the interval brought, by field, for those that took part."""
        mask = np.zeros(self.num_envs, np.bool_)
        mask[active] = True
        infos: dict[str, Any] = {}
        for name in ("violations", "mean_arrivals", "offline_ideal_s"):
            values = np.zeros(self.num_envs)
            values[active] = getattr(interval, name)
            infos |= {name: values, f"_{name}": mask}
        return infos

    def _last(self, index: int) -> dict[str, Any]:
        """What is said of an episode that ended with this step."""
        simulator = self._batch.simulators[index]
        assert simulator is not None
        last = {"outcome": simulator.outcome().to_dict()}
        if self.autoreset_mode is not AutoresetMode.SAME_STEP:
            return last
        return {"final_obs": self._batch.observations[index].copy(), "final_info": last}

    def close_extras(self, **kwargs: Any) -> None:
        self._batch.close()


def _seeds(seed: Any, count: int) -> list[int | None]:
    """One seed per sub-environment: counted up from a single one, or as given."""
    single = isinstance(seed, str) or not isinstance(seed, (Sequence, np.ndarray)) or np.ndim(seed) == 0
    given = [seed] * count if single else list(seed)
    if len(given) != count:
        raise OocoError(f"{len(given)} seeds for {count} environments")
    for entry in given:
        if entry is None:
            continue
        if isinstance(entry, bool) or not isinstance(entry, (int, np.integer)) or not 0 <= entry < _SEEDS_END - count:
            raise OocoError(f"seed is {entry!r}, an integer of at least 0 and below 2**63 - {count} is needed")
    return [None if entry is None else int(entry) + single * index for index, entry in enumerate(given)]


def _scenarios(source: Source | Sequence[Source], count: int) -> list[Scenario]:
    if not isinstance(source, Sequence) or isinstance(source, str):
        source = [source] * count if isinstance(source, Scenario) else [build_scenario(source)] * count
    if len(source) != count:
        raise OocoError(f"{len(source)} scenarios for num_envs={count}: one for all, or one each, is accepted")
    return [entry if isinstance(entry, Scenario) else build_scenario(entry) for entry in source]
