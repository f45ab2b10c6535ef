"""Estimates with intervals: percentile bootstrap over episodes, paired wherever two policies saw the same seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from ooco_gym.cluster import Outcome
from ooco_gym.cluster.outcome import FEASIBLE_VIOLATION_RATE

#: Metrics averaged over episodes; the violation rate is pooled over requests instead.
AVERAGED = (
    "ttft_p50_s",
    "ttft_p99_s",
    "tpot_p50_s",
    "tpot_p99_s",
    "tbt_p99_s",
    "offline_output_tokens_per_s",
    "offline_prompt_tokens_per_s",
    "offline_requests_per_s",
    "offline_ideal_s_per_instance_s",
    "wasted_fraction",
)
_RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A point estimate and its 95 % interval."""

    value: float
    low: float
    high: float

    def shown(self, form: str, factor: float = 1.0) -> str:
        """``value [low, high]``, each times ``factor`` and formatted as ``form`` says."""
        value, low, high = (format(factor * number, form) for number in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"


def mean_interval(values: npt.ArrayLike) -> Estimate:
    """Mean over episodes with a bootstrap interval; a single episode has no interval (low = high = value).

    Episodes without a value (nan: a quantile of no requests) are left out; nan where none has one.
    """
    known = np.asarray(values, float)
    known = known[~np.isnan(known)]
    return ratio_interval(known, np.ones(known.shape)) if len(known) else Estimate(math.nan, math.nan, math.nan)


def ratio_interval(numerators: npt.ArrayLike, denominators: npt.ArrayLike) -> Estimate:
    """sum / sum over episodes, resampling whole episodes."""
    top, bottom = np.asarray(numerators, float), np.asarray(denominators, float)
    value = float(top.sum() / max(bottom.sum(), 1e-12))
    if len(top) < 2 or np.ptp(top) + np.ptp(bottom) == 0:
        return Estimate(value, value, value)
    interval = stats.bootstrap(
        (top, bottom),
        lambda a, b, axis: a.sum(axis) / np.maximum(b.sum(axis), 1e-12),
        paired=True,
        vectorized=True,
        n_resamples=_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))


def summarise(outcomes: Sequence[Outcome]) -> dict[str, Estimate]:
    """Every averaged metric and the pooled ``violation_rate``, with intervals over episodes."""
    rows = {name: mean_interval([getattr(outcome, name) for outcome in outcomes]) for name in AVERAGED}
    rows["violation_rate"] = ratio_interval(
        [outcome.violations for outcome in outcomes], [outcome.online_requests for outcome in outcomes]
    )
    return rows


def class_violation_rates(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """Violations over requests by SLO class, pooled over episodes."""
    rates = {}
    for name in outcomes[0].class_requests if outcomes else ():
        requests = np.array([outcome.class_requests[name] for outcome in outcomes], float)
        late = requests * [outcome.class_violation_rates[name] for outcome in outcomes]
        rates[name] = float(late.sum() / max(requests.sum(), 1.0))
    return rates


def is_feasible(summary: dict[str, Estimate]) -> bool:
    """Whether the pooled violation rate lies within the paper's 3 %."""
    return summary["violation_rate"].value <= FEASIBLE_VIOLATION_RATE


def paired_difference(ours: Sequence[Outcome], theirs: Sequence[Outcome], metric: str) -> Estimate:
    """Mean of ours - theirs on the same seeds, with an interval."""
    return mean_interval([getattr(a, metric) - getattr(b, metric) for a, b in zip(ours, theirs, strict=True)])
