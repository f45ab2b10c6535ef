"""Offline work: an endless backlog, a list of jobs that is there from the start, or Poisson arrivals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from ooco_gym.errors import OocoError
from ooco_gym.workload.arrivals import PoissonArrivals
from ooco_gym.workload.checks import not_negative, positive, whole
from ooco_gym.workload.lengths import Lengths
from ooco_gym.workload.randomness import FloatArray, IntArray, Stream, generator

OfflineKind = Literal["none", "endless", "jobs", "poisson"]
KINDS: tuple[str, ...] = get_args(OfflineKind)

ENDLESS_JOBS = 16_384  # lengths drawn for an endless backlog; the simulator wraps around them


@dataclass(frozen=True, eq=False)
class OfflineJobs:
    """Offline jobs of one episode.

    | field | type | meaning |
    |---|---|---|
    | endless | bool | the backlog never runs dry: job k is row k modulo n |
    | arrival_s | float64 (n,), or (0,) when endless | seconds from the start, non-decreasing |
    | prompt_tokens | int32 (n,) | tokens |
    | output_tokens | int32 (n,) | tokens; hidden from every scheduler |
    """

    endless: bool
    arrival_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray

    def __post_init__(self) -> None:
        # One dtype each: the compiled simulator would otherwise compile itself again for another.
        object.__setattr__(self, "arrival_s", np.ascontiguousarray(self.arrival_s, np.float64))
        for name in ("prompt_tokens", "output_tokens"):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), np.int32))

    def __len__(self) -> int:
        """Rows, that is jobs unless endless."""
        return int(self.prompt_tokens.size)


@dataclass(frozen=True, eq=False)
class OfflineWork:
    """Recipe for :class:`OfflineJobs`.

    | kind | jobs | needs |
    |---|---|---|
    | none | no offline work | |
    | endless | always one more | lengths |
    | jobs | ``jobs`` of them, all at time 0 | lengths, jobs |
    | poisson | ``rate_per_s`` on average; 0 is allowed and gives none | lengths, rate_per_s |

    Job k's lengths depend on (seed, k) alone; at another Poisson rate the same jobs arrive stretched in time.
    """

    kind: OfflineKind
    lengths: Lengths | None = None
    rate_per_s: float | None = None
    jobs: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OocoError(f"offline: kind is {self.kind!r}, it must be one of {', '.join(KINDS)}")
        if self.kind != "none" and self.lengths is None:
            raise OocoError(f"offline: kind {self.kind} needs lengths")
        if self.kind == "jobs":
            whole(self.jobs, "offline: jobs")
        if self.kind == "poisson":
            not_negative(self.rate_per_s, "offline: rate_per_s")

    @property
    def mean_prompt_tokens(self) -> float:
        """Expected prompt tokens of a job; 0 where there are no lengths."""
        return self.lengths.mean_prompt_tokens if self.lengths else 0.0

    @property
    def mean_output_tokens(self) -> float:
        """Expected output tokens of a job; 0 where there are no lengths."""
        return self.lengths.mean_output_tokens if self.lengths else 0.0

    def with_rate(self, rate_per_s: float) -> OfflineWork:
        """The same jobs arriving as a Poisson process of this rate: what a capacity search varies."""
        return replace(self, kind="poisson", rate_per_s=rate_per_s, jobs=None)

    def sample(self, seed: int, duration_s: float) -> OfflineJobs:
        """Jobs of an episode of ``duration_s`` seconds, deterministic in ``seed``."""
        duration_s = positive(duration_s, "duration_s")
        arrival_s = np.zeros(0)
        n = 0
        if self.kind == "endless":
            n = ENDLESS_JOBS
        elif self.kind == "jobs" and self.jobs is not None:
            n = int(self.jobs)
            arrival_s = np.zeros(n)
        elif self.kind == "poisson" and self.rate_per_s:
            process = PoissonArrivals(self.rate_per_s)
            arrival_s = process.sample(generator(seed, Stream.OFFLINE_ARRIVALS), duration_s)
            n = arrival_s.size
        if n == 0 or self.lengths is None:
            return OfflineJobs(False, arrival_s, np.zeros(0, np.int32), np.zeros(0, np.int32))
        prompt, output = self.lengths.sample(generator(seed, Stream.OFFLINE_LENGTHS), n)
        return OfflineJobs(self.kind == "endless", arrival_s, prompt, output)
