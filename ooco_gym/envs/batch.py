"""A batch of episodes advanced together: what the scalar and the vector environment are both made of."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium.error import ClosedEnvironmentError

from ooco_gym.cluster import Simulator, action_to_knobs
from ooco_gym.cluster.control import KNOB_COUNT
from ooco_gym.cluster.loop import REACHED, run_many, set_knobs_many
from ooco_gym.cluster.observation import OBSERVATION_SIZE, observe_many
from ooco_gym.cluster.outcome import counters_many
from ooco_gym.cluster.telemetry import deployment, fill_many
from ooco_gym.envs.reward import IdealSeconds, Interval, Reward
from ooco_gym.errors import OocoError
from ooco_gym.scenario import Scenario


class Batch:
    """N episodes, each of its own scenario, in the same compiled calls and, where cores allow, in as many threads."""

    def __init__(
        self,
        scenarios: Sequence[Scenario],
        rules: dict[str, str],
        control_interval_s: float,
        threads: int | None = None,
    ) -> None:
        count = len(scenarios)
        self.scenarios, self.rules, self.control_interval_s = tuple(scenarios), rules, control_interval_s
        self.simulators: list[Simulator | None] = [None] * count
        self.records = np.concatenate([deployment(scenario) for scenario in scenarios])
        self.observations = np.zeros((count, OBSERVATION_SIZE), np.float32)
        self._horizon_s = np.array([scenario.horizon_s for scenario in scenarios])
        self._ideal_s = np.array([(s.ideal_prompt_token_s, s.ideal_output_token_s) for s in scenarios])
        self._instances = np.array([scenario.instances for scenario in scenarios])
        self._arrivals_per_s = np.array([scenario.online.mean_rate_per_s for scenario in scenarios])
        if threads is not None and (
            isinstance(threads, bool) or not isinstance(threads, (int, np.integer)) or threads < 1
        ):
            raise OocoError(f"threads is {threads!r}, an integer of at least 1 is needed, or None for one per core")
        self._threads = min(int(threads or os.cpu_count() or 1), count)
        self._closed = False
        self._pool: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave the threads behind and start their own."""
        return {**self.__dict__, "_pool": None}

    def start(self, seeds: Mapping[int, int]) -> None:
        """Begin the episode of each index from its seed: a warm-up under OOCO's knobs."""
        self._check_open()
        parallel = self._threads > 1 and len(seeds) > 1
        each: Callable[..., Iterator[Simulator]] = self._workers().map if parallel else map
        for index, simulator in zip(seeds, each(self._warmed_up, seeds, seeds.values()), strict=True):
            self.adopt(index, simulator)

    def _warmed_up(self, index: int, seed: int) -> Simulator:
        scenario = self.scenarios[index]
        simulator = Simulator(scenario, self.rules, seed)
        simulator.run(scenario.warmup_s)
        return simulator

    def adopt(self, index: int, simulator: Simulator) -> None:
        """Take a simulator as it stands, and observe it."""
        self.simulators[index] = simulator
        self._observe(np.array([index]))

    def over(self, active: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether each of the episodes ``active`` [M] has reached its end."""
        return self._counters(active)[:, 0] >= self._horizon_s[active]

    def step(self, actions: npt.NDArray[np.float64], active: npt.NDArray[np.int64]) -> Interval:
        """Apply ``actions`` float64 [M, KNOB_COUNT] to the episodes ``active`` [M] for one control interval.

        Updates ``observations`` in place; returns what the interval brought, fields [M].
        """
        self._check_open()
        knobs = action_to_knobs(actions)
        before = self._counters(active)
        until_s = before[:, 0] + self.control_interval_s
        horizon_s = self._horizon_s[active]
        until_s = np.where(until_s > horizon_s - 1e-6 * self.control_interval_s, horizon_s, until_s)
        if self._threads == 1:
            self._advance(active, knobs, until_s)
        else:
            parts = [part for part in np.array_split(np.arange(len(active)), self._threads) if len(part)]
            jobs = [self._workers().submit(self._advance, active[part], knobs[part], until_s[part]) for part in parts]
            for job in jobs:
                job.result()
        interval_s, prompt_tokens, output_tokens, violations = (self._counters(active) - before).T
        return Interval(
            interval_s=interval_s,
            instances=self._instances[active],
            offline_ideal_s=prompt_tokens * self._ideal_s[active, 0] + output_tokens * self._ideal_s[active, 1],
            violations=violations,
            mean_arrivals=self._arrivals_per_s[active] * interval_s,
        )

    def _workers(self) -> ThreadPoolExecutor:
        self._pool = self._pool or ThreadPoolExecutor(self._threads)
        return self._pool

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedEnvironmentError("the environment is closed: make a new one")

    def close(self) -> None:
        self._closed = True
        if self._pool is not None:
            self._pool.shutdown()

    def _simulator(self, index: int) -> Simulator:
        simulator = self.simulators[index]
        assert simulator is not None
        return simulator

    def _advance(
        self, active: npt.NDArray[np.int64], knobs: npt.NDArray[np.float64], until_s: npt.NDArray[np.float64]
    ) -> None:
        addresses, status = self._addresses(active), np.zeros(len(active), np.int64)
        set_knobs_many(addresses, knobs)
        run_many(addresses, until_s, status)
        for position in np.flatnonzero(status != REACHED).tolist():  # it needs more room first, which moves its arrays
            self._simulator(int(active[position])).run(float(until_s[position]))
        self._observe(active)

    def _addresses(self, active: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Looked up at every step: a simulator that grows, is restored or copied has its arrays elsewhere."""
        return np.array([self._simulator(index).cluster.address for index in active.tolist()], np.int64)

    def _observe(self, active: npt.NDArray[np.int64]) -> None:
        records, observations = self.records[active], np.empty((len(active), OBSERVATION_SIZE), np.float32)
        observe_many(fill_many(self._addresses(active), records), observations)
        self.records[active], self.observations[active] = records, observations

    def _counters(self, active: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Read anew each time: whoever holds a simulator may advance or restore it."""
        counters = np.empty((len(active), 4))
        counters_many(self._addresses(active), counters)
        return counters


def checked_reward(reward: Any) -> Reward:
    """The default reward for None; raises OocoError for what cannot be called."""
    if reward is not None and not callable(reward):
        raise OocoError(f"reward is {reward!r}, a callable from an Interval to a number is needed")
    return IdealSeconds() if reward is None else reward


def checked_rewards(values: Any, count: int) -> npt.NDArray[np.float64]:
    """What a reward gave for ``count`` episodes, [count]; raises OocoError unless it is one number for each."""
    try:
        array = np.asarray(values, np.float64).reshape(count)
    except (TypeError, ValueError):
        array = np.full(1, np.nan)
    if np.isnan(array).any():
        raise OocoError(f"the reward gave {values!r}, {count} number{'s are' if count > 1 else ' is'} needed")
    return array


def checked_actions(actions: object, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    """Actions as an array of ``shape``; raises OocoError on another shape and on anything that is not finite."""
    try:
        array = np.asarray(actions, np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.shape != shape or not np.isfinite(array).all():
        many = f"{shape[0]} rows of " if len(shape) > 1 else ""
        given = f"an array {array.shape}" if array.size > KNOB_COUNT or array.shape != shape else repr(actions)
        raise OocoError(
            f"action is {given}, {many}{KNOB_COUNT} finite numbers are needed; beyond [-1, 1] they saturate"
        )
    return array
