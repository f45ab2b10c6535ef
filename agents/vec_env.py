"""The native vector environment as stable-baselines3 wants it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecEnv

from ooco_gym.envs import ClusterVectorEnv
from ooco_gym.errors import OocoError


class Sb3VecEnv(VecEnv):  # type: ignore[misc]
    """A thin adapter: episodes end by truncation, so the last observation is handed on for bootstrapping.

    ``interval`` holds what the last step brought, arrays [N]: ``violations``, ``mean_arrivals``, ``offline_ideal_s``.
    """

    def __init__(self, environment: ClusterVectorEnv) -> None:
        if environment.autoreset_mode is not AutoresetMode.SAME_STEP:
            raise OocoError(f"autoreset_mode is {environment.autoreset_mode.value}, stable-baselines3 needs SameStep")
        self.environment, self.num_envs = environment, environment.num_envs  # its constructor asks for attributes
        super().__init__(environment.num_envs, environment.single_observation_space, environment.single_action_space)
        self.interval: dict[str, npt.NDArray[np.float64]] = {}
        self._actions = np.zeros((environment.num_envs, 0), np.float32)

    def reset(self) -> npt.NDArray[np.float32]:
        observations, _ = self.environment.reset(seed=self._seeds[0])
        self._reset_seeds()
        return observations

    def seed(self, seed: int | None = None) -> Sequence[int | None]:
        """Seeds for the next reset: ``seed + i`` for environment i."""
        seed = int(np.random.default_rng().integers(2**31)) if seed is None else seed
        self._seeds = [seed + index for index in range(self.num_envs)]
        return self._seeds

    def step_async(self, actions: npt.NDArray[np.float32]) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.bool_], list[Any]]:
        observations, rewards, _, truncations, given = self.environment.step(self._actions)
        self.interval = {name: given[name] for name in ("violations", "mean_arrivals", "offline_ideal_s")}
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        for index in np.flatnonzero(truncations).tolist():
            infos[index] = {
                "terminal_observation": given["final_obs"][index],
                "TimeLimit.truncated": True,
                "outcome": _row(given["final_info"]["outcome"], index),
            }
        return observations, rewards.astype(np.float32), truncations, infos

    def close(self) -> None:
        self.environment.close()

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.environment, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise OocoError(f"'{attr_name}' cannot be set on one of the environments: they share one scenario")

    def env_method(self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any) -> list[Any]:
        raise OocoError(f"'{method_name}' cannot be called on one of the environments: they advance together")

    def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
        return [False] * len(list(self._get_indices(indices)))


def _row(given: dict[str, Any], index: int) -> dict[str, Any]:
    """One environment's part of a dictionary of arrays, as Gymnasium stacks the infos of a vector environment."""
    return {
        name: _row(values, index) if isinstance(values, dict) else values[index].item()
        for name, values in given.items()
        if not name.startswith("_")
    }
