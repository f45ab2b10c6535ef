"""Replaying a measured run through the compiled cluster: open streams, closed loops, and the host time of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from measured_streams import Deployment, Floats, Run, Times
from scipy.optimize import minimize_scalar

from ooco_gym.cluster import Simulator
from ooco_gym.cluster import log as events
from ooco_gym.cluster.control import knobs_from_mapping
from ooco_gym.errors import OocoError
from ooco_gym.roofline import resolve_model
from ooco_gym.scenario import Scenario, build_scenario
from ooco_gym.specs import ClusterSpec
from ooco_gym.workload import OfflineJobs, Requests

#: Rules of the simulator that make it each kind of engine. An engine has no notion of an SLO: every resident decodes.
SERVING: dict[str, dict[str, str]] = {
    # vLLM v1: running requests first, prompts in pieces beside them, first come first served; the newest gives way.
    "chunked": {"prefill_order": "fcfs", "mix_selection": "all", "eviction": "newest", "routing": "round_robin"},
    # vLLM before chunked prefill: whole prompts while any fits, else decodes, on the one instance that does both in
    # turn: the relaxed one, for which requests are jobs of a backlog with arrival times. The strict one stays idle.
    "prefill-first": {"offline_decode": "relaxed", "eviction": "newest", "migration": "none", "mix_selection": "all"},
    # Prefill on one instance, decode on another.
    "disaggregated": {"prefill_order": "fcfs", "mix_selection": "all", "eviction": "newest", "migration": "none"},
}
DRAIN_S = 3600.0  # after the last arrival; nothing measured takes longer
MOST_HOST_S = 0.05
MOST_ROUNDS = 200


class Given:
    """A workload that gives the same rows at every seed."""

    def __init__(self, sample: Requests | OfflineJobs) -> None:
        self._sample = sample
        self.mean_prompt_tokens = float(np.mean(sample.prompt_tokens)) if len(sample) else 0.0
        self.mean_output_tokens = float(np.mean(sample.output_tokens)) if len(sample) else 0.0

    def sample(self, seed: int, duration_s: float) -> Any:
        return self._sample


def scenario_of(deployment: Deployment, requests: Requests, host_s: float) -> Scenario:
    """The deployment under these requests, deterministic: no error of the cost model."""
    cost = {"host_s": float(host_s), "noise_sigma": 0.0, "bias_sigma": 0.0}
    cluster = {"relaxed": 0, "strict": 0, **deployment.cluster}
    scenario = build_scenario({"hardware": asdict(deployment.hardware), "cost": cost, "offline": "none"})
    model = replace(resolve_model(deployment.model), **deployment.model_changes)
    horizon_s = requests.duration_s + DRAIN_S
    none = OfflineJobs(False, np.zeros(0), np.zeros(0, np.int32), np.zeros(0, np.int32))
    if deployment.serving == "prefill-first":
        jobs = OfflineJobs(False, requests.arrival_s, requests.prompt_tokens, requests.output_tokens)
        online, offline = Given(requests.window(0.0, 0.0)), Given(jobs)
    else:
        online, offline = Given(requests), Given(none)
    return replace(
        scenario, model=model, cluster=ClusterSpec(**cluster), online=online, offline=offline,  # type: ignore[arg-type]
        warmup_s=0.0, episode_s=horizon_s,
    )  # fmt: skip


def simulate(deployment: Deployment, requests: Requests, host_s: float) -> tuple[Floats, Floats]:
    """(first token, last token) of each request in seconds from the start; raises OocoError if one is never served."""
    scenario = scenario_of(deployment, requests, host_s)
    prefill_first = deployment.serving == "prefill-first"
    simulator = Simulator(scenario, SERVING[deployment.serving], log=prefill_first)
    simulator.set_knobs(knobs_from_mapping({"gate_batch": 8.0}))  # no gate: an engine admits while KV is free
    simulator.run(scenario.horizon_s)
    if prefill_first:
        first_s, finish_s = _job_times(simulator.log(), len(requests))
    else:
        online = simulator.cluster.online
        first_s, finish_s = online["first_s"].copy(), online["finish_s"].copy()
    lost = int((~np.isfinite(finish_s)).sum())
    if lost:
        raise OocoError(
            f"{lost} of {len(requests)} requests were never served: {scenario.kv_blocks} KV blocks and "
            f"{scenario.model.max_context_tokens} tokens of context must hold the longest"
        )
    return first_s, finish_s


def _job_times(log: npt.NDArray[np.void], count: int) -> tuple[Floats, Floats]:
    """Of requests served as jobs the log tells the times; a recomputed prefill is not a first token."""
    times = []
    for kind in (events.PREFILLED, events.FINISHED):
        found = log[(log["kind"] == kind) & (log["offline"] == 1)][::-1]
        time_s = np.full(count, np.inf)
        time_s[found["request"]] = found["time_s"]  # the earliest is written last
        times.append(time_s)
    return times[0], times[1]


def times_of(requests: Requests, first_s: Floats, finish_s: Floats) -> Times:
    gaps = requests.output_tokens - 1
    tpot_s = np.where(gaps > 0, (finish_s - first_s) / np.maximum(gaps, 1), np.nan)
    return Times(first_s - requests.arrival_s, tpot_s, finish_s - requests.arrival_s)


def replay(run: Run, host_s: float) -> tuple[Requests, Times]:
    """The run as simulated: its requests (with the arrivals that a closed loop has found) and their times."""
    requests = run.requests
    if run.concurrency is not None:
        requests = closed_loop(run.deployment, requests, run.concurrency, host_s)
    return requests, times_of(requests, *simulate(run.deployment, requests, host_s))


def closed_loop(deployment: Deployment, requests: Requests, clients: int, host_s: float) -> Requests:
    """The requests with the arrivals of a closed loop: ``clients`` at 0, then each at a completion.

    A fixed point: simulate, let request k + clients arrive at the k-th completion, again. What happens until the first
    wrong arrival is right, so every round is right for longer than the one before, and the end is exact.
    """
    arrival_s = np.zeros(min(clients, len(requests)))
    for _ in range(MOST_ROUNDS):
        count = len(arrival_s)
        known = Requests(arrival_s, requests.prompt_tokens[:count], requests.output_tokens[:count])
        _, finish_s = simulate(deployment, known, host_s)
        following = np.concatenate([np.zeros(clients), np.sort(finish_s)])[: len(requests)]
        if len(following) == count and np.abs(following - arrival_s).max() < 1e-6:
            return known
        arrival_s = following
    raise OocoError(f"the closed loop of {clients} clients has no fixed point after {MOST_ROUNDS} rounds")


def fit_host_s(run: Run) -> float:
    """Seconds per iteration of the engine itself, at which the run's mean TPOT comes out as measured."""
    wanted_s = float(np.nanmean(run.measured.tpot_s))

    def error(host_s: float) -> float:
        return float((np.nanmean(replay(run, host_s)[1].tpot_s) / wanted_s - 1.0) ** 2)

    found = minimize_scalar(error, bounds=(0.0, MOST_HOST_S), method="bounded", options={"xatol": 1e-5})
    return float(found.x)


def fitting_runs(runs: Sequence[Run]) -> dict[str, Run]:
    """The one run on which each engine's host time is fitted; raises OocoError unless there is exactly one."""
    chosen: dict[str, Run] = {}
    for engine in dict.fromkeys(run.engine for run in runs):
        fits = [run for run in runs if run.engine == engine and run.fits]
        if len(fits) != 1:
            raise OocoError(f"{engine}: {len(fits)} runs are marked for fitting its host time, one is needed")
        chosen[engine] = fits[0]
    return chosen
