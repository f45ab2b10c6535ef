"""``OOCO/Cluster-v0``: schedule a co-located LLM serving cluster, one control interval at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from ooco_gym.cluster import Simulator
from ooco_gym.cluster.control import KNOB_COUNT, check_rules
from ooco_gym.cluster.observation import observation_bounds
from ooco_gym.cluster.simulator import SimulatorState
from ooco_gym.cluster.telemetry import Telemetry
from ooco_gym.envs.batch import Batch, checked_actions, checked_reward, checked_rewards
from ooco_gym.envs.render import render_panel, render_text
from ooco_gym.envs.reward import Interval, Reward
from ooco_gym.errors import OocoError
from ooco_gym.scenario import Scenario, build_scenario
from ooco_gym.specs import is_number

Observation = npt.NDArray[np.float32]
_ONLY = np.zeros(1, np.int64)  # a batch of one


class ClusterEnv(gym.Env[Observation, npt.NDArray[np.float32]]):
    """A latency-strict and a latency-relaxed pool serve online requests under SLOs and offline requests at best effort.

    **Action** ``Box(-1, 1, (10,), float32)``: the knobs of the Control contract in the order of
    ``ooco_gym.cluster.KNOBS``, each mapped monotonically over its range (logarithmically where the range spans decades)
    with saturated margins. ``ooco_action()`` is the paper's scheduler.

    ====  ================  ===========  ======================================================================
    Num   Knob              Range        Meaning
    ====  ================  ===========  ======================================================================
    0     preempt_slack     0 .. 1.5     interrupt an offline prefill when predicted TTFT exceeds this x SLO
    1     gate_batch        0.1 .. 8     offline requests resident per relaxed instance, in units of B_sat
    2     tpot_bound        0.3 .. 1.2   strict iteration time allowed, as a fraction of the TPOT SLO
    3     pull_kv           0 .. 1       pull offline decodes to a strict instance below this KV share
    4     pull_length       0.1 .. 10    scale on the preferred length of a pulled request
    5     kv_reserve        0 .. 0.8     share of relaxed KV kept free of offline work
    6     prefill_chunk     128 .. 8192  most offline prompt tokens in one piece; the top is the whole prompt
    7     strict_prefill    0 .. 4096    offline prompt tokens that ride on a strict iteration within tpot_bound
    8     pushback          0.5 .. 1     move offline decodes back above this KV share of a strict instance
    9     strict_share      -0.5 .. 0.5  offset on the configured share of strict instances
    ====  ================  ===========  ======================================================================

    **Observation** ``Box(float32)``: 34 entries of Telemetry in units of the deployment (share of SLO, of B_sat, of
    capacity) and the previous action; docs/observation.md lists name, range, unit and live source of each.

    **Reward**: useful offline work of the interval in ideal seconds per instance-second, minus a price times the
    violations that became certain over the scenario's mean arrivals per interval.

    **Start**: ``warmup_s`` under OOCO's knobs. **End**: truncated ``episode_s`` later, never terminated;
    ``info["outcome"]`` of the last step holds the episode's outcome metrics.

    **Arguments**: ``scenario`` (a Scenario, or a mapping for ``build_scenario``), ``rules`` (a mapping over
    ``RULES``; OOCO's by default), ``control_interval_s`` (1.0), ``reward`` (a callable on Interval), ``render_mode``
    ("ansi" or "rgb_array").

    **Version history**: v0, first release.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012 (declared so by gymnasium.Env)
        "render_modes": ["ansi", "rgb_array"],
        "render_fps": 10,
    }

    def __init__(
        self,
        scenario: Scenario | Mapping[str, Any] | None = None,
        rules: Mapping[str, str] | None = None,
        control_interval_s: float = 1.0,
        reward: Reward | Callable[[Interval], float] | None = None,
        render_mode: str | None = None,
    ) -> None:
        self.scenario = scenario if isinstance(scenario, Scenario) else build_scenario(scenario)
        if not (is_number(control_interval_s) and 0 < control_interval_s <= self.scenario.episode_s):
            raise OocoError(
                f"control_interval_s is {control_interval_s!r}, accepted is above 0 and at most the episode's "
                f"{self.scenario.episode_s:g} s"
            )
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise OocoError(f"render_mode is '{render_mode}', accepted are {', '.join(self.metadata['render_modes'])}")
        self.rules = check_rules(rules or {})
        self.control_interval_s = float(control_interval_s)
        self.reward = checked_reward(reward)
        self.render_mode = render_mode
        low, high = observation_bounds()
        self.observation_space = gym.spaces.Box(low, high, dtype=np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (KNOB_COUNT,), np.float32)
        self._batch = Batch([self.scenario], self.rules, self.control_interval_s)
        self._history: list[Telemetry] = []

    @property
    def simulator(self) -> Simulator | None:
        """The running episode; None before the first reset."""
        return self._batch.simulators[0]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode. ``seed`` fixes the whole workload and noise; without one, each episode draws its own."""
        super().reset(seed=seed)
        episode_seed = seed if seed is not None else int(self.np_random.integers(2**62))
        self._batch.start({0: episode_seed})
        self._history = []
        return self._observe(), {"seed": episode_seed}

    def step(self, action: npt.NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Apply the knobs of ``action`` for one control interval."""
        simulator = self._running("step")
        if self._batch.over(_ONLY)[0]:
            raise gym.error.ResetNeeded("the episode is over, reset() starts the next one")
        interval = self._batch.step(checked_actions(action, (KNOB_COUNT,))[None], _ONLY).row(0)
        truncated = bool(self._batch.over(_ONLY)[0])
        info: dict[str, Any] = {"interval": interval}
        if truncated:
            info["outcome"] = simulator.outcome().to_dict()
        return self._observe(), checked_rewards(self.reward(interval), 1)[0].item(), False, truncated, info

    def state(self) -> SimulatorState:
        """A snapshot of the episode for lookahead and debugging; see :meth:`restore`."""
        return self._running("state").state()

    def restore(self, state: SimulatorState) -> Observation:
        """Return to a snapshot of the running episode, bit for bit and as often as wanted; gives its observation."""
        simulator = self._running("restore")
        simulator.restore(state)
        self._batch.adopt(0, simulator)
        self._history = [record for record in self._history if record["time_s"] < simulator.now_s]
        return self._observe()

    def telemetry(self) -> Telemetry:
        """The record behind the last observation."""
        return self._running("telemetry").telemetry()

    def _running(self, what: str) -> Simulator:
        if self.simulator is None:
            raise gym.error.ResetNeeded(f"{what}() needs a reset() first")
        return self.simulator

    def _observe(self) -> Observation:
        if self.render_mode is not None:
            self._history.append(self.telemetry())
        observation: Observation = self._batch.observations[0].copy()
        return observation

    def render(self) -> Any:
        """Text panel or picture of pools, knobs and the episode so far."""
        if self.render_mode is None:
            gym.logger.warn('render() needs render_mode="ansi" or "rgb_array" at construction')
            return None
        return render_text(self._history[-1]) if self.render_mode == "ansi" else render_panel(self._history)
