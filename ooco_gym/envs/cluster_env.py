"""``OOCO/Cluster-v0``: schedule a co-located LLM serving cluster, one control interval at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from ooco_gym.cluster import Simulator, action_to_knobs, observe
from ooco_gym.cluster.control import KNOB_COUNT, check_rules
from ooco_gym.cluster.observation import observation_bounds
from ooco_gym.cluster.simulator import SimulatorState
from ooco_gym.cluster.telemetry import Telemetry
from ooco_gym.envs.render import render_panel, render_text
from ooco_gym.envs.reward import IdealSeconds, Interval, Reward
from ooco_gym.errors import OocoError
from ooco_gym.scenario import Scenario, build_scenario

Observation = npt.NDArray[np.float32]


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
        if not 0 < control_interval_s <= self.scenario.episode_s:
            raise OocoError(
                f"control_interval_s is {control_interval_s!r}, accepted is above 0 and at most the episode's "
                f"{self.scenario.episode_s:g} s"
            )
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise OocoError(f"render_mode is '{render_mode}', accepted are {', '.join(self.metadata['render_modes'])}")
        self.rules = check_rules(rules or {})
        self.control_interval_s = float(control_interval_s)
        self.reward = reward or IdealSeconds()
        self.render_mode = render_mode
        low, high = observation_bounds()
        self.observation_space = gym.spaces.Box(low, high, dtype=np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (KNOB_COUNT,), np.float32)
        self.simulator: Simulator | None = None
        self._history: list[Telemetry] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start an episode. ``seed`` fixes the whole workload and noise; without one, each episode draws its own."""
        super().reset(seed=seed)
        episode_seed = seed if seed is not None else int(self.np_random.integers(2**62))
        self.simulator = Simulator(self.scenario, self.rules, episode_seed)
        self.simulator.run(self.scenario.warmup_s)
        self._history = []
        return self._observe(), {"seed": episode_seed}

    def step(self, action: npt.NDArray[np.float32]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Apply the knobs of ``action`` for one control interval."""
        simulator, scenario = self.simulator, self.scenario
        if simulator is None:
            raise gym.error.ResetNeeded("step() needs a reset() first")
        if simulator.now_s >= scenario.horizon_s:
            raise gym.error.ResetNeeded("the episode is over, reset() starts the next one")
        before = _counters(simulator)
        simulator.set_knobs(action_to_knobs(_checked(action)))
        until_s = min(simulator.now_s + self.control_interval_s, scenario.horizon_s)
        if scenario.horizon_s - until_s < 1e-6 * self.control_interval_s:
            until_s = scenario.horizon_s
        simulator.run(until_s)
        interval_s, prompt_tokens, output_tokens, violations = (
            new - old for new, old in zip(_counters(simulator), before, strict=True)
        )
        interval = Interval(
            interval_s=interval_s,
            instances=scenario.instances,
            offline_ideal_s=prompt_tokens * scenario.ideal_prompt_token_s
            + output_tokens * scenario.ideal_output_token_s,
            violations=int(violations),
            mean_arrivals=scenario.online.mean_rate_per_s * interval_s,
        )
        truncated = until_s >= scenario.horizon_s
        info: dict[str, Any] = {"interval": interval}
        if truncated:
            info["outcome"] = simulator.outcome().to_dict()
        return self._observe(), float(self.reward(interval)), False, truncated, info

    def state(self) -> SimulatorState:
        """A snapshot of the episode for lookahead and debugging; see :meth:`restore`."""
        if self.simulator is None:
            raise gym.error.ResetNeeded("state() needs a reset() first")
        return self.simulator.state()

    def restore(self, state: SimulatorState) -> Observation:
        """Return to a snapshot of the running episode, bit for bit and as often as wanted; gives its observation."""
        if self.simulator is None:
            raise gym.error.ResetNeeded("restore() needs a reset() first")
        self.simulator.restore(state)
        self._history = [record for record in self._history if record["time_s"] < self.simulator.now_s]
        return self._observe()

    def telemetry(self) -> Telemetry:
        """The record behind the last observation."""
        if self.simulator is None:
            raise gym.error.ResetNeeded("telemetry() needs a reset() first")
        return self.simulator.telemetry()

    def _observe(self) -> Observation:
        telemetry = self.telemetry()
        if self.render_mode is not None:
            self._history.append(telemetry)
        return observe(telemetry)

    def render(self) -> Any:
        """Text panel or picture of pools, knobs and the episode so far."""
        if self.render_mode is None:
            gym.logger.warn('render() needs render_mode="ansi" or "rgb_array" at construction')
            return None
        return render_text(self._history[-1]) if self.render_mode == "ansi" else render_panel(self._history)


def _checked(action: Any) -> npt.NDArray[np.float64]:
    """The action as an array; raises OocoError on another shape and on anything that is not a finite number."""
    try:
        array = np.asarray(action, np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.shape != (KNOB_COUNT,) or not np.isfinite(array).all():
        raise OocoError(f"action is {action!r}, {KNOB_COUNT} finite numbers in [-1, 1] are needed")
    return array


def _counters(simulator: Simulator) -> tuple[float, float, float, float]:
    """(time in seconds, credited offline prompt tokens, credited offline output tokens, certain violations)."""
    world = simulator.cluster.world
    return (
        float(world["now_s"][0]),
        float(world["credited_prompt_tokens"][0]),
        float(world["credited_output_tokens"][0]),
        float(world["violations"][0]),
    )
