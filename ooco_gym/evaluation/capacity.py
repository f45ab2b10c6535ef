"""Capacity: the largest offline request rate that a policy sustains while online work keeps its objectives.

A rate is sustained if violations / counted online requests, pooled over episodes, stay within the limit and offline
completions reach 97 % of offline arrivals. It is found by bisection; every rate is tried on the same seeds, and a job
is the same job at every rate, so that neighbouring rates and competing policies differ by nothing but themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ooco_gym.cluster.outcome import FEASIBLE_VIOLATION_RATE
from ooco_gym.errors import OocoError
from ooco_gym.evaluation.episodes import run_episodes
from ooco_gym.evaluation.statistics import Estimate
from ooco_gym.policy import Policy
from ooco_gym.scenario import Scenario

COMPLETED_SHARE = 0.97
SMALLEST_RATE_PER_S = 0.01
_GROWTH = 1.5  # between rates while the bracket is looked for
_RESAMPLES = 1000


@dataclass(frozen=True)
class Probe:
    """What happened at one rate, per episode: counts, so that episodes can be resampled."""

    rate_per_s: float
    violations: tuple[int, ...]
    online_requests: tuple[int, ...]
    offline_arrivals: tuple[int, ...]
    offline_finished: tuple[int, ...]

    def violation_rate(self, episodes: npt.NDArray[np.int64] | slice = slice(None)) -> float:
        """Pooled over the chosen episodes."""
        counted = np.asarray(self.online_requests)[episodes].sum()
        return float(np.asarray(self.violations)[episodes].sum() / max(counted, 1))

    def completed_share(self, episodes: npt.NDArray[np.int64] | slice = slice(None)) -> float:
        """Offline requests finished over those that arrived, in the measured part."""
        arrived = np.asarray(self.offline_arrivals)[episodes].sum()
        return float(np.asarray(self.offline_finished)[episodes].sum() / max(arrived, 1))

    def is_sustained(self, limit: float) -> bool:
        return self.violation_rate() <= limit and self.completed_share() >= COMPLETED_SHARE


@dataclass(frozen=True)
class Capacity:
    """The capacity at one violation limit, requests/s, its bootstrap interval over episodes, and what was tried."""

    limit: float
    rate_per_s: Estimate
    bounded_by: str  # "violations", "completions", or "search" where the largest rate was still sustained
    probes: tuple[Probe, ...]
    draws: tuple[float, ...]  # resampled capacities; draw i of two policies on the same seeds is of the same episodes


def capacity_ratio(ours: Capacity, theirs: Capacity) -> Estimate | None:
    """Ours over theirs with a paired 95 % interval; None where theirs is 0."""
    if theirs.rate_per_s.value == 0.0:
        return None
    value = ours.rate_per_s.value / theirs.rate_per_s.value
    if not (ours.draws and len(ours.draws) == len(theirs.draws)):
        return Estimate(value, value, value)
    low, high = np.quantile(np.array(ours.draws) / np.maximum(theirs.draws, 1e-9), [0.025, 0.975])
    return Estimate(value, min(float(low), value), max(float(high), value))


class Prober:
    """Tries rates for one policy on one scenario; remembers what it tried, in a file if given, to resume from.

    ``seeds`` are the episodes, ``key`` what tells this policy and scenario from others in the same file.
    """

    def __init__(
        self,
        policy: Policy,
        scenario: Scenario,
        seeds: Sequence[int],
        control_interval_s: float = 1.0,
        memory: Path | None = None,
        key: str = "",
        on_probe: Callable[[Probe], None] | None = None,
    ) -> None:
        if scenario.offline.lengths is None:
            raise OocoError("capacity needs an offline mix: offline is 'none'")
        self.policy, self.scenario, self.seeds = policy, scenario, list(seeds)
        self.control_interval_s, self.memory, self.key, self.on_probe = control_interval_s, memory, key, on_probe
        self.known = {probe.rate_per_s: probe for probe in self._remembered()}
        self.asked: dict[float, Probe] = {}  # not all that is remembered: a resumed search gives the same interval

    def __call__(self, rate_per_s: float) -> Probe:
        if rate_per_s not in self.known:
            self.known[rate_per_s] = self._try(rate_per_s)
            if self.memory is not None:
                entry = {"key": self.key, "seeds": self.seeds, **asdict(self.known[rate_per_s])}
                with self.memory.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(entry) + "\n")
        probe = self.asked[rate_per_s] = self.known[rate_per_s]
        if self.on_probe is not None:
            self.on_probe(probe)
        return probe

    def largest_sustained(self, limit: float) -> float:
        """The largest rate asked for so far that is sustained at the limit; 0 without one."""
        return max((rate for rate, probe in self.asked.items() if probe.is_sustained(limit)), default=0.0)

    def _try(self, rate_per_s: float) -> Probe:
        scenario = self.scenario.with_offline_rate(rate_per_s)
        outcomes = run_episodes(self.policy, scenario, self.seeds, self.control_interval_s)
        jobs = [scenario.offline.sample(seed, scenario.horizon_s).arrival_s for seed in self.seeds]
        return Probe(
            rate_per_s,
            tuple(outcome.violations for outcome in outcomes),
            tuple(outcome.online_requests for outcome in outcomes),
            tuple(int((arrival_s > scenario.warmup_s).sum()) for arrival_s in jobs),
            tuple(round(outcome.offline_requests_per_s * scenario.episode_s) for outcome in outcomes),
        )

    def _remembered(self) -> Iterator[Probe]:
        if self.memory is None or not self.memory.is_file():
            return
        for line in self.memory.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                if entry.pop("key") == self.key and entry.pop("seeds") == self.seeds:
                    rate_per_s = float(entry.pop("rate_per_s"))
                    counts = {name: tuple(int(value) for value in values) for name, values in entry.items()}
                    if all(len(values) == len(self.seeds) for values in counts.values()):
                        yield Probe(rate_per_s, **counts)
            except (ValueError, TypeError, KeyError, AttributeError):
                continue  # the line that an interrupted run left unfinished


def find_capacity(
    prober: Prober,
    limit: float = FEASIBLE_VIOLATION_RATE,
    guess_per_s: float = 1.0,
    precision: float = 0.02,
    largest_per_s: float = 1000.0,
) -> Capacity:
    """Bracket the capacity by factors of 1.5 from ``guess_per_s``, then bisect until the bracket is ``precision`` wide.

    Where not even SMALLEST_RATE_PER_S is sustained the capacity is 0. Raises OocoError on settings out of range.
    """
    if not (0.0 <= limit < 1.0 and 0.0 < precision < 1.0 and SMALLEST_RATE_PER_S <= guess_per_s <= largest_per_s):
        raise OocoError(
            f"capacity: limit {limit!r}, precision {precision!r}, guess {guess_per_s!r} per s; accepted are a limit of "
            f"0 to 1, a precision between 0 and 1, a guess of {SMALLEST_RATE_PER_S:g} to {largest_per_s:g} per s"
        )
    low, high = 0.0, 0.0
    rate = guess_per_s
    while low == 0.0 or high == 0.0:
        if prober(rate).is_sustained(limit):
            low, rate = rate, min(rate * _GROWTH, largest_per_s)
            if low == largest_per_s:
                break
        else:
            high, rate = rate, max(rate / _GROWTH, SMALLEST_RATE_PER_S)
            if high == SMALLEST_RATE_PER_S:
                break
    while low > 0.0 and high > low * (1.0 + precision):
        middle = (low * high) ** 0.5
        if prober(middle).is_sustained(limit):
            low = middle
        else:
            high = middle
    probes = tuple(sorted(prober.asked.values(), key=lambda probe: probe.rate_per_s))
    draws = _resample(probes, limit, len(prober.seeds))
    return Capacity(limit, _interval(draws, low), _bound(prober, limit, high), probes, draws)


def _bound(prober: Prober, limit: float, high: float) -> str:
    if high == 0.0:
        return "search"
    return "violations" if prober(high).violation_rate() > limit else "completions"


def _crossing(probes: Sequence[Probe], limit: float, episodes: npt.NDArray[np.int64]) -> float:
    """The rate at which one resample stops being sustained: interpolated between the last probe that was and the next.

    Either condition is read as a share of what is allowed, above 1 when it fails.
    """
    loads = [_load(probe, limit, episodes) for probe in probes]
    sustained = [index for index, load in enumerate(loads) if load <= 1.0]
    last = sustained[-1] if sustained else -1
    rate, load = (probes[last].rate_per_s, loads[last]) if sustained else (0.0, 0.0)
    if last + 1 == len(probes):
        return rate
    return rate + (1.0 - load) / (loads[last + 1] - load) * (probes[last + 1].rate_per_s - rate)


def _load(probe: Probe, limit: float, episodes: npt.NDArray[np.int64]) -> float:
    rate = probe.violation_rate(episodes)
    violations = rate / limit if limit > 0 else 2.0 * (rate > 0)
    return max(violations, (1.0 - probe.completed_share(episodes)) / (1.0 - COMPLETED_SHARE), 0.0)


def _resample(probes: Sequence[Probe], limit: float, episodes: int) -> tuple[float, ...]:
    """Interpolated crossings of resampled episodes; none for a single episode."""
    if episodes < 2 or not probes:
        return ()
    random = np.random.default_rng(0)
    return tuple(_crossing(probes, limit, random.integers(episodes, size=episodes)) for _ in range(_RESAMPLES))


def _interval(draws: Sequence[float], found: float) -> Estimate:
    """95 % percentile interval of the resampled crossings, around the rate that was found."""
    if not draws:
        return Estimate(found, found, found)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(found, min(float(low), found), max(float(high), found))
