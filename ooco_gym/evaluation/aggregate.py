"""Many scenarios in few numbers: interquartile means, performance profiles and paired differences with intervals.

The score of a policy on a scenario is its share of the upper bound on useful offline work (``bound.py``); 0 where it
violates more than the feasible share of online requests. Intervals are a stratified bootstrap (Agarwal et al., "Deep
reinforcement learning at the edge of the statistical precipice", NeurIPS 2021): episodes are resampled within every
scenario, the same ones for every policy, so that differences stay paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from ooco_gym.cluster import Outcome
from ooco_gym.cluster.outcome import FEASIBLE_VIOLATION_RATE
from ooco_gym.evaluation.statistics import Estimate

Array = npt.NDArray[np.float64]
_RESAMPLES = 2000


@dataclass(frozen=True)
class Results:
    """Episodes of every policy on every scenario, arrays float64 [policies, scenarios, episodes]."""

    policies: tuple[str, ...]
    scenarios: tuple[str, ...]
    useful: Array  # ideal seconds per instance-second
    violations: Array
    requests: Array
    bounds: Array  # [scenarios], most useful work of any scheduler

    @classmethod
    def of(
        cls,
        policies: Sequence[str],
        scenarios: Sequence[str],
        outcomes: Sequence[Sequence[Sequence[Outcome]]],
        bounds: Sequence[float],
    ) -> Results:
        """From ``outcomes[scenario][policy][episode]``."""

        def values(name: str) -> Array:
            return np.array(
                [[[getattr(one, name) for one in cell] for cell in scenario] for scenario in outcomes], float
            ).swapaxes(0, 1)

        return cls(
            tuple(policies),
            tuple(scenarios),
            values("offline_ideal_s_per_instance_s"),
            values("violations"),
            values("online_requests"),
            np.array(bounds, float),
        )

    def scores(self, episodes: npt.NDArray[np.int64] | None = None) -> Array:
        """Score of every policy on every scenario, [policies, scenarios]; of some episodes [scenarios, n] if given."""
        useful, violations, requests = self.useful, self.violations, self.requests
        if episodes is not None:
            useful, violations, requests = (
                np.take_along_axis(values, episodes[None], axis=2) for values in (useful, violations, requests)
            )
        late = _pooled(violations, requests)
        share: Array = useful.mean(2) / np.where(self.bounds > 0, self.bounds, np.inf)
        return np.where(late <= FEASIBLE_VIOLATION_RATE, share, 0.0)

    def draws(self, resamples: int = _RESAMPLES) -> Array:
        """Scores of resampled episodes, [resamples, policies, scenarios]."""
        random = np.random.default_rng(0)
        count = self.useful.shape[2]
        return np.array(
            [self.scores(random.integers(count, size=(len(self.scenarios), count))) for _ in range(resamples)]
        )

    def chosen(self, scenarios: Sequence[str]) -> Results:
        """The same for some of the scenarios."""
        kept = [self.scenarios.index(name) for name in scenarios]
        return Results(
            self.policies,
            tuple(scenarios),
            self.useful[:, kept],
            self.violations[:, kept],
            self.requests[:, kept],
            self.bounds[kept],
        )


def _pooled(violations: Array, requests: Array) -> Array:
    """Violation rates pooled over episodes, [policies, scenarios]."""
    rates: Array = violations.sum(2) / np.maximum(requests.sum(2), 1.0)
    return rates


def interquartile_mean(scores: Array) -> Array:
    """Mean over the last axis without its lowest and highest quarter."""
    mean: Array = stats.trim_mean(scores, 0.25, axis=-1)
    return mean


def _estimate(value: float, draws: Array) -> Estimate:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high))


@dataclass(frozen=True)
class Aggregate:
    """One policy over many scenarios."""

    feasible: int  # scenarios on which it keeps the online objectives
    interquartile_mean: Estimate
    mean: Estimate
    difference: Estimate  # of interquartile means, to the reference policy, paired


def aggregate(results: Results, reference: str) -> dict[str, Aggregate]:
    """Every policy over all scenarios of ``results``; differences are to ``reference``, one of its policies."""
    scores, draws = results.scores(), results.draws()
    middle, middles = interquartile_mean(scores), interquartile_mean(draws)
    base = results.policies.index(reference)
    late = _pooled(results.violations, results.requests)
    return {
        name: Aggregate(
            int((late[index] <= FEASIBLE_VIOLATION_RATE).sum()),
            _estimate(middle[index], middles[:, index]),
            _estimate(scores[index].mean(), draws[:, index].mean(-1)),
            _estimate(middle[index] - middle[base], middles[:, index] - middles[:, base]),
        )
        for index, name in enumerate(results.policies)
    }


def performance_profile(results: Results, thresholds: Array) -> tuple[Array, Array, Array]:
    """Share of scenarios on which a policy scores more than each threshold, [policies, thresholds], with the ends of
    its 95 % interval."""
    draws = results.draws()
    shares = (results.scores()[..., None] > thresholds).mean(1)
    resampled = (draws[..., None] > thresholds).mean(2)
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    return shares, low, high
