"""Policies on one scenario: paired episodes, and rows with intervals for the table, the figure and the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ooco_gym.cluster import Outcome
from ooco_gym.evaluation.bound import offline_bound
from ooco_gym.evaluation.episodes import run_episodes
from ooco_gym.evaluation.statistics import Estimate, class_violation_rates, is_feasible, paired_difference, summarise
from ooco_gym.policy import Policy
from ooco_gym.scenario import Scenario


@dataclass(frozen=True)
class Case:
    """A scenario as it appears in a row: its name, load (multiple of the admitted online rate) and data role."""

    scenario: Scenario
    workload: str
    load: float = 1.0
    rate_scale: float = 1.0
    role: str = "train"
    online_violation_rate: float | None = None  # of online work alone, where admission measured it


@dataclass
class Comparison:
    """Outcomes of several policies on the same episodes of one case."""

    case: Case
    seeds: Sequence[int]
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)

    def run(
        self, policies: Sequence[Policy], control_interval_s: float = 1.0, on_episode: Callable[[], None] | None = None
    ) -> Comparison:
        for policy in policies:
            self.outcomes[policy.name] = run_episodes(
                policy, self.case.scenario, self.seeds, control_interval_s, on_episode
            )
        return self

    def rows(self) -> list[dict[str, Any]]:
        """One flat row per policy: identification, estimates, ``<metric>_ci95`` intervals."""
        bound = offline_bound(self.case.scenario, self.seeds).useful
        return [self._row(name, outcomes, bound) for name, outcomes in self.outcomes.items()]

    def _row(self, name: str, outcomes: list[Outcome], bound: float) -> dict[str, Any]:
        summary = summarise(outcomes)
        case = self.case
        requests = sum(outcome.online_requests for outcome in outcomes)
        row: dict[str, Any] = {
            "policy": name,
            "workload": case.workload,
            "load": case.load,
            "rate_scale": case.rate_scale,
            "role": case.role,
            "seeds": len(outcomes),
            "feasible": requests > 0 and is_feasible(summary),
            "online_requests": requests,
            "rejected_online": sum(outcome.rejected_online for outcome in outcomes),
            "rejected_offline": sum(outcome.rejected_offline for outcome in outcomes),
            "online_alone_violation_rate": case.online_violation_rate,
            "class_violation_rates": class_violation_rates(outcomes),
        }
        for metric, estimate in summary.items():
            row[metric] = estimate.value
            row[f"{metric}_ci95"] = [estimate.low, estimate.high]
        useful = summary["offline_ideal_s_per_instance_s"]
        shares = [value / bound if bound > 0 else math.nan for value in (useful.value, useful.low, useful.high)]
        row |= {"useful_bound": bound, "share_of_bound": shares[0], "share_of_bound_ci95": shares[1:]}
        return row

    def difference(self, ours: str, theirs: str, metric: str = "offline_ideal_s_per_instance_s") -> Estimate:
        """Paired difference ours - theirs, with its interval."""
        return paired_difference(self.outcomes[ours], self.outcomes[theirs], metric)
