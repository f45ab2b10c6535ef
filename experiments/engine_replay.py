"""Replaying a measured run through the compiled cluster: open streams, closed loops, and the host time of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np
import numpy.typing as npt
from given import Given
from measured_streams import Floats, Run, Times
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
DRAIN_S = 36_000.0  # after the last arrival; nothing measured takes longer
MOST_HOST_S = 0.05


def scenario_of(run: Run, host_s: float) -> Scenario:
    """The run's deployment under its requests, deterministic: no error of the cost model."""
    deployment, requests = run.deployment, run.requests
    cost = {"host_s": float(host_s), "noise_sigma": 0.0, "bias_sigma": 0.0}
    cluster = {"relaxed": 0, "strict": 0, **deployment.cluster}
    online, jobs = requests, OfflineJobs(False, np.zeros(0), np.zeros(0, np.int32), np.zeros(0, np.int32))
    if served_as_jobs(run):
        online, lengths = requests.window(0.0, 0.0), (requests.prompt_tokens, requests.output_tokens)
        endless = run.concurrency is not None
        jobs = OfflineJobs(endless, np.zeros(0) if endless else requests.arrival_s, *lengths)
    if run.concurrency is not None:  # seats are clients: one is free when a request has completed
        cluster["max_seqs"] = min(run.concurrency, cluster.get("max_seqs", run.concurrency))
    scenario = build_scenario({"hardware": asdict(deployment.hardware), "cost": cost, "offline": "none"})
    return replace(
        scenario,
        model=replace(resolve_model(deployment.model), **deployment.model_changes),
        cluster=ClusterSpec(**cluster),
        online=Given(online),  # type: ignore[arg-type]
        offline=Given(jobs),  # type: ignore[arg-type]
        warmup_s=0.0,
        episode_s=requests.duration_s + DRAIN_S,
    )


def served_as_jobs(run: Run) -> bool:
    return run.concurrency is not None or run.deployment.serving == "prefill-first"


def replay(run: Run, host_s: float) -> tuple[Requests, Times]:
    """The run as simulated: its requests, with the arrivals that a closed loop has found, and their times.

    Raises OocoError if a request is never served.
    """
    scenario = scenario_of(run, host_s)
    jobs, count = served_as_jobs(run), len(run.requests)
    simulator = Simulator(scenario, SERVING[run.deployment.serving], log=jobs)
    simulator.set_knobs(knobs_from_mapping({"gate_batch": 8.0}))  # no gate: an engine admits while KV is free
    if run.concurrency is not None:
        first_s, finish_s = _run_endless(simulator, run, scenario.horizon_s)
    else:
        simulator.run(scenario.horizon_s)
        online = simulator.cluster.online
        first_s, finish_s = (online["first_s"].copy(), online["finish_s"].copy())
        if jobs:
            first_s, finish_s = _job_times(simulator.log(), count)
    lost = int((~np.isfinite(finish_s)).sum())
    if lost:
        raise OocoError(
            f"{run.name}: {lost} of {count} requests were never served: {scenario.kv_blocks} KV blocks and "
            f"{scenario.model.max_context_tokens} tokens of context must hold the longest"
        )
    requests = run.requests
    if run.concurrency is not None:
        requests = replace(requests, arrival_s=closed_loop_arrivals(finish_s, run.concurrency))
    return requests, times_of(requests, first_s, finish_s)


def _run_endless(simulator: Simulator, run: Run, longest_s: float) -> tuple[Floats, Floats]:
    """Until the first ``len(run.requests)`` jobs of the endless backlog have finished, more of them in flight."""
    count, until_s = len(run.requests), 1.0
    while True:
        simulator.run(min(until_s, longest_s))
        first_s, finish_s = _job_times(simulator.log(), count)
        if np.isfinite(finish_s).all() or until_s >= longest_s:
            return first_s, finish_s
        until_s *= 1.5


def closed_loop_arrivals(finish_s: Floats, clients: int) -> Floats:
    """When the requests of a closed loop arrive: ``clients`` at 0, then one at each completion.

    The simulator offers an endless backlog as many seats as there are clients, so a request starts at a completion at
    the earliest, in order: what it waits for KV after that is part of its TTFT.
    """
    return np.concatenate([np.zeros(clients), np.sort(finish_s)])[: len(finish_s)]


def _job_times(log: npt.NDArray[np.void], count: int) -> tuple[Floats, Floats]:
    """Of requests served as jobs the log tells the times; a recomputed prefill is not a first token."""
    times = []
    for kind in (events.PREFILLED, events.FINISHED):
        found = log[(log["kind"] == kind) & (log["offline"] == 1) & (log["request"] < count)][::-1]
        time_s = np.full(count, np.inf)
        time_s[found["request"]] = found["time_s"]  # the earliest is written last
        times.append(time_s)
    return times[0], times[1]


def times_of(requests: Requests, first_s: Floats, finish_s: Floats) -> Times:
    gaps = requests.output_tokens - 1
    tpot_s = np.where(gaps > 0, (finish_s - first_s) / np.maximum(gaps, 1), np.nan)
    return Times(first_s - requests.arrival_s, tpot_s, finish_s - requests.arrival_s)


def fit_host_s(run: Run) -> float:
    """Seconds per iteration of the engine itself, at which the run's mean TPOT comes out as measured."""
    wanted_s = float(np.nanmean(run.measured.tpot_s))

    def error(host_s: float) -> float:
        return float(abs(np.nanmean(replay(run, host_s)[1].tpot_s) / wanted_s - 1.0))

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
