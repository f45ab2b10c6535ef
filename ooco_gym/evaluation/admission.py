"""The admission rule: a scenario is worth comparing schedulers on only if online work alone keeps its SLOs.

The online rate is scaled so that, without any offline work, at most 1 % of requests violate on that cluster.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ooco_gym.errors import OocoError
from ooco_gym.evaluation.episodes import run_episodes
from ooco_gym.evaluation.seeds import episode_seeds
from ooco_gym.policy import ConstantPolicy
from ooco_gym.scenario import Scenario

ADMITTED_VIOLATION_RATE = 0.01
EPISODES = 12
SMALLEST_SCALE = 0.02
_PRECISION = 1.02  # the scale is found to 2 %

ONLINE_ALONE = ConstantPolicy("online-alone", {"admission": "none", "migration": "none"})


@dataclass(frozen=True)
class Admission:
    """An admitted scenario, the online rate scale it runs at and the violation rate of online work alone."""

    scenario: Scenario
    rate_scale: float
    violation_rate: float


def online_violation_rate(scenario: Scenario, seed: int = 0, episodes: int = EPISODES) -> float:
    """Pooled violation rate of online work alone; raises OocoError where there is no request to count."""
    seeds = episode_seeds("admission", seed, episodes)
    outcomes = run_episodes(ONLINE_ALONE, scenario.without_offline(), seeds)
    counted = sum(outcome.online_requests for outcome in outcomes)
    if counted == 0:
        online = scenario.online
        raise OocoError(
            f"workload '{online.name}': no request to count in {episodes} episodes of {scenario.episode_s:g} s at "
            f"{online.mean_rate_per_s:.3g} requests/s; arrival_s must be seconds from the start of the trace, and a "
            "request counts if its deadline lies within the episode"
        )
    return sum(outcome.violations for outcome in outcomes) / counted


def admit(
    scenario: Scenario, rate_scale: float | str = "auto", on_probe: Callable[[float, float], None] | None = None
) -> Admission:
    """Scale the online rate by the rule, or check a given scale against it.

    ``auto`` takes the source's own rate if it passes, otherwise the largest smaller one that does (bisection to 2 %).
    Raises OocoError when a given scale fails, naming the largest that passes, or when even 2 % of the rate fails.
    """

    def probe(scale: float) -> float:
        rate = online_violation_rate(scenario.with_rate_scale(scale))
        if on_probe is not None:
            on_probe(scale, rate)
        return rate

    wanted = 1.0 if rate_scale == "auto" else float(rate_scale)
    rate = first_rate = probe(wanted)
    if rate <= ADMITTED_VIOLATION_RATE:
        return Admission(scenario.with_rate_scale(wanted), wanted, rate)
    low, high, low_rate = SMALLEST_SCALE, wanted, probe(SMALLEST_SCALE)
    if low_rate > ADMITTED_VIOLATION_RATE:
        raise OocoError(
            f"scenario '{scenario.online.name}' on {scenario.instances} x {scenario.hardware.name} fails the admission "
            f"rule: online work alone violates {low_rate:.1%} even at {low:g} of its rate, at most "
            f"{ADMITTED_VIOLATION_RATE:.0%} is accepted; loosen the SLO or enlarge the cluster"
        )
    while high / low > _PRECISION:
        middle = (low * high) ** 0.5
        rate = probe(middle)
        if rate <= ADMITTED_VIOLATION_RATE:
            low, low_rate = middle, rate
        else:
            high = middle
    if rate_scale != "auto":
        raise OocoError(
            f"workload.rate_scale={wanted:g} fails the admission rule: online work alone violates {first_rate:.1%} "
            f"of requests, at most {ADMITTED_VIOLATION_RATE:.0%} is accepted; "
            f"the largest scale that passes is {low:.3g}"
        )
    return Admission(scenario.with_rate_scale(low), low, low_rate)
