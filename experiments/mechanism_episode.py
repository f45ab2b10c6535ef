"""A small episode whose every request is given: simulated without noise, its event log kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from given import Given

from ooco_gym.cluster import Simulator
from ooco_gym.cluster import log as events
from ooco_gym.cluster.control import knobs_from_mapping
from ooco_gym.evaluation.history import Log, token_times
from ooco_gym.scenario import Scenario, build_scenario
from ooco_gym.workload import OfflineJobs, Requests

Row = tuple[float, int, int]  # arrival in seconds, prompt and output tokens


@dataclass(frozen=True)
class Episode:
    """A simulated episode: its log, and the times at which ``watch`` was read, with what it said."""

    log: Log
    times_s: list[float]
    watched: list[dict[str, float]]

    def ttft_s(self, request: int) -> float:
        arrival = self.log[(self.log["kind"] == events.ARRIVAL) & (self.log["request"] == request)]
        return token_times(self.log)[False, request][0] - float(arrival["time_s"][0])

    def tpot_s(self, request: int) -> float:
        times = token_times(self.log)[False, request]
        return (times[-1] - times[0]) / (len(times) - 1)

    def count(self, kind: int) -> int:
        return int((self.log["kind"] == kind).sum())


def world(online: Sequence[Row], offline: Sequence[Row], endless: bool, until_s: float, **groups: Any) -> Scenario:
    """Qwen2.5-7B on A100 without noise; the workload is given row by row, the rest by ``groups``."""
    groups = {"cluster": {"relaxed": 1, "strict": 1}, "slo": {"ttft_s": 0.5, "tpot_s": 0.05}} | groups
    scenario = build_scenario(
        {**groups, "episode_s": until_s, "warmup_s": 0.0, "cost": {"noise_sigma": 0.0, "bias_sigma": 0.0}}
    )
    arrival, prompt, output = np.array(online or np.zeros((0, 3))).T
    jobs = np.array(offline or np.zeros((0, 3))).T
    given = OfflineJobs(endless, np.zeros(0) if endless else jobs[0], jobs[1], jobs[2])
    return replace(scenario, online=Given(Requests(arrival, prompt, output)), offline=Given(given))  # type: ignore[arg-type]


def simulate(
    until_s: float,
    online: Sequence[Row] = (),
    offline: Sequence[Row] = (),
    endless: bool = False,
    rules: Mapping[str, str] | None = None,
    knobs: Mapping[float, Mapping[str, float]] | None = None,
    watch_s: float = 0.0,
    **groups: Any,
) -> Episode:
    """Run an episode with ``knobs`` set at their times and the telemetry read every ``watch_s`` seconds."""
    simulator = Simulator(world(online, offline, endless, until_s, **groups), rules, seed=0, log=True)
    settings = dict(knobs or {})
    stops = {until_s, *settings, *(np.arange(1, until_s / watch_s) * watch_s if watch_s else ())}
    times_s, watched = [], []
    for stop_s in sorted(stops):
        if stop_s > 0.0:
            simulator.run(float(stop_s))
        if stop_s in settings:
            simulator.set_knobs(knobs_from_mapping(settings[stop_s]))
        times_s.append(float(stop_s))
        watched.append(simulator.telemetry().to_dict())
    return Episode(simulator.log(), times_s, watched)
