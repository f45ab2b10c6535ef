"""Outcome metrics of an episode, exactly as docs/specification.md defines them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from ooco_gym._jit import entry_point
from ooco_gym.cluster.state import DECODING, TBT_FIRST_S, TBT_RATIO, Cluster, cluster_at
from ooco_gym.scenario import Scenario

FEASIBLE_VIOLATION_RATE = 0.03  # the paper's line
_SINCE_WARMUP = (
    "interrupted_s",
    "recompute_s",
    "busy_s",
    "preemptions",
    "evictions",
    "migrations",
    "pushbacks",
    "role_changes",
    "checkpoints",
    "restores",
    "failures",
    "lost",
    "cancelled",
    "mixed_iterations",
    "iterations",
    "events",
)


@entry_point
def counters_many(addresses, counters):
    """Write what a reward is made of, of each cluster, to ``counters`` float64 [N, 4]: time (s), offline prompt and
    output tokens credited, violations. None of them ever decreases."""
    for index in range(addresses.shape[0]):
        world = cluster_at(addresses[index]).world[0]
        counters[index, 0] = world.now_s
        counters[index, 1] = world.credited_prompt_tokens
        counters[index, 2] = world.credited_output_tokens
        counters[index, 3] = world.violations


@dataclass(frozen=True)
class Outcome:
    """One episode after its warm-up. Times in seconds; rates per second of the measured part.

    Quantiles of an episode that counted no request, or no second token, are nan.
    """

    online_requests: int  # counted: arrived after warm-up, deadline before the end
    violations: int
    violation_rate: float
    class_requests: dict[str, int]  # counted, by SLO class
    class_violation_rates: dict[str, float]
    ttft_violations: int
    rejected_online: int
    rejected_offline: int
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float
    tbt_p99_s: float
    offline_output_tokens_per_s: float
    offline_prompt_tokens_per_s: float
    offline_requests_per_s: float
    offline_ideal_s_per_instance_s: float
    wasted_fraction: float
    preemptions: int
    evictions: int
    migrations: int
    pushbacks: int
    role_changes: int
    checkpoints: int
    restores: int
    failures: int
    lost: int
    cancelled: int
    mixed_iterations: int
    iterations: int
    events: int

    @property
    def feasible(self) -> bool:
        return self.online_requests > 0 and self.violation_rate <= FEASIBLE_VIOLATION_RATE

    def to_dict(self) -> dict[str, float | int | bool]:
        return {**asdict(self), "feasible": self.feasible}


def _quantile(values: npt.NDArray[np.float64], q: float) -> float:
    return float(np.quantile(values, q)) if len(values) else math.nan


def tbt_quantile_s(histogram: npt.NDArray[np.int64], q: float) -> float:
    """Upper edge of the 1 % wide bin that holds the quantile; 0 when no gap was seen."""
    total = int(histogram.sum())
    if total == 0:
        return 0.0
    index = int(np.searchsorted(np.cumsum(histogram), q * total))
    return float(TBT_FIRST_S * TBT_RATIO ** (index + 1))


def online_violations(
    cluster: Cluster, scenario: Scenario
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """(counted, ttft_violated, violated), bool [N] each: the definition, request by request."""
    online = cluster.online
    output, arrival, first, finish = (online[name] for name in ("output", "arrival_s", "first_s", "finish_s"))
    ttft_s, tpot_s = cluster.world[0]["slo_s"][online["slo_class"]].T
    allowance = (output - 1) * tpot_s
    first_by, finish_by = arrival + ttft_s, first + allowance
    late_first = ~(first <= first_by)
    late_finish = ~late_first & (output > 1) & ~(finish <= finish_by)
    # A client that went away before its violation was certain is no evidence either way.
    certain = np.where(late_first, first_by, finish_by)
    left_in_time = np.isfinite(online["gone_s"]) & ~((late_first | late_finish) & (certain <= online["gone_s"]))
    counted = ~np.isnan(first) & ~left_in_time
    counted &= (arrival >= scenario.warmup_s) & (first_by + allowance <= scenario.horizon_s)
    return counted, counted & late_first, counted & (late_first | late_finish)


def totals(cluster: Cluster) -> npt.NDArray[np.void]:
    """The counters as of now, [1] WORLD, with the ended iterations of runs whose books are still open."""
    world = cluster.world.copy()
    for state in cluster.instances[cluster.instances["activity"] == DECODING]:
        k, batch = int(state["done"]), int(state["anchor_batch"])
        first_s = state["c0_s"] + state["c1_s"] * state["anchor_context"]
        world["busy_s"] += k * first_s + state["c1_s"] * batch * 0.5 * k * (k - 1)
    return world


def measure(cluster: Cluster, scenario: Scenario, at_warmup: npt.NDArray[np.void]) -> Outcome:
    """Outcome of a cluster run to the scenario's horizon; ``at_warmup`` is what :func:`totals` gave back then.

    A counted request without a first token enters the TTFT quantiles with its wait so far, a lower bound, and is left
    out of TPOT; one without its last token enters TPOT with its pace so far.
    """
    world, before = totals(cluster)[0], at_warmup[0]
    since = {name: world[name] - before[name] for name in _SINCE_WARMUP}
    counted, ttft_late, late = online_violations(cluster, scenario)
    online = cluster.online[counted]
    arrival, gaps = online["arrival_s"], online["output"] - 1
    end = np.minimum(online["gone_s"], world["now_s"])
    first, finish = np.minimum(online["first_s"], end), np.minimum(online["finish_s"], end)
    paced = (gaps > 0) & (online["first_s"] <= end)
    tpot = (finish - first)[paced] / gaps[paced]
    span_s = scenario.episode_s
    useful_s = (
        world["offline_finished_prompt_tokens"] * scenario.ideal_prompt_token_s
        + world["offline_finished_output_tokens"] * scenario.ideal_output_token_s
    )
    requests, violations = int(counted.sum()), int(late.sum())
    names = [entry.name for entry in scenario.slo.all_classes]
    of_class, late_of_class = (
        np.bincount(cluster.online["slo_class"][which], minlength=len(names)) for which in (counted, late)
    )
    return Outcome(
        online_requests=requests,
        violations=violations,
        violation_rate=violations / max(requests, 1),
        class_requests=dict(zip(names, of_class.tolist(), strict=True)),
        class_violation_rates=dict(zip(names, (late_of_class / np.maximum(of_class, 1)).tolist(), strict=True)),
        ttft_violations=int(ttft_late.sum()),
        rejected_online=int(world["rejected_online"]),
        rejected_offline=int(world["rejected_offline"]),
        ttft_p50_s=_quantile(first - arrival, 0.5),
        ttft_p99_s=_quantile(first - arrival, 0.99),
        tpot_p50_s=_quantile(tpot, 0.5),
        tpot_p99_s=_quantile(tpot, 0.99),
        tbt_p99_s=tbt_quantile_s(world["tbt"], 0.99),
        offline_output_tokens_per_s=float(world["offline_finished_output_tokens"]) / span_s,
        offline_prompt_tokens_per_s=float(world["offline_finished_prompt_tokens"]) / span_s,
        offline_requests_per_s=float(world["offline_finished"]) / span_s,
        offline_ideal_s_per_instance_s=float(useful_s) / (span_s * scenario.instances),
        wasted_fraction=float((since["interrupted_s"] + since["recompute_s"]) / max(since["busy_s"], 1e-9)),
        preemptions=int(since["preemptions"]),
        evictions=int(since["evictions"]),
        migrations=int(since["migrations"]),
        pushbacks=int(since["pushbacks"]),
        role_changes=int(since["role_changes"]),
        checkpoints=int(since["checkpoints"]),
        restores=int(since["restores"]),
        failures=int(since["failures"]),
        lost=int(since["lost"]),
        cancelled=int(since["cancelled"]),
        mixed_iterations=int(since["mixed_iterations"]),
        iterations=int(since["iterations"]),
        events=int(since["events"]),
    )
