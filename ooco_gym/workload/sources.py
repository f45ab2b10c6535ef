"""Online sources: where an episode's online requests come from, a generator or a recorded trace."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol, Self, get_args

import numpy as np

from ooco_gym.errors import OocoError
from ooco_gym.workload.arrivals import Arrivals
from ooco_gym.workload.checks import positive
from ooco_gym.workload.lengths import Lengths
from ooco_gym.workload.randomness import Stream, generator
from ooco_gym.workload.requests import Requests

Role = Literal["train", "validation", "test"]
ROLES: tuple[str, ...] = get_args(Role)


class OnlineSource(Protocol):
    """Source of online requests.

    ``role`` says what it may be used for: learners train on "train", are chosen on "validation" and reported
    on "test". ``mean_rate_per_s`` is requests per second at the current ``rate_scale``. ``sample`` is
    deterministic in ``seed`` and gives requests in [0, duration_s).
    """

    @property
    def name(self) -> str: ...

    @property
    def role(self) -> Role: ...

    @property
    def rate_scale(self) -> float: ...

    @property
    def mean_rate_per_s(self) -> float: ...

    @property
    def mean_prompt_tokens(self) -> float: ...

    @property
    def mean_output_tokens(self) -> float: ...

    def with_rate_scale(self, rate_scale: float) -> Self: ...

    def sample(self, seed: int, duration_s: float) -> Requests: ...


@dataclass(frozen=True, eq=False)
class SyntheticSource:
    """Requests from an arrival process and a length law, drawn from separate streams of the seed.

    So request k has the same lengths at every rate and duration (common random numbers).
    """

    name: str
    arrivals: Arrivals
    lengths: Lengths
    rate_scale: float = 1.0
    role: Role = "train"

    def __post_init__(self) -> None:
        _check(self.name, self.role, self.rate_scale)

    @property
    def mean_rate_per_s(self) -> float:
        return self.arrivals.mean_rate_per_s * self.rate_scale

    @property
    def mean_prompt_tokens(self) -> float:
        return self.lengths.mean_prompt_tokens

    @property
    def mean_output_tokens(self) -> float:
        return self.lengths.mean_output_tokens

    def with_rate_scale(self, rate_scale: float) -> SyntheticSource:
        return replace(self, rate_scale=rate_scale)

    def sample(self, seed: int, duration_s: float) -> Requests:
        duration_s = positive(duration_s, "duration_s")
        arrival_s = self.arrivals.sample(generator(seed, Stream.ONLINE_ARRIVALS), duration_s, self.rate_scale)
        prompt, output = self.lengths.sample(generator(seed, Stream.ONLINE_LENGTHS), arrival_s.size)
        return Requests(arrival_s, prompt, output)


@dataclass(frozen=True, eq=False)
class TraceSource:
    """Windows of a recorded trace, stretched in time to the rate scale.

    A sample is ``duration_s * rate_scale`` seconds of trace from a uniform start, with arrival times divided
    by ``rate_scale``: order and shape of bursts stay. ``window`` (start_s, end_s) restricts the trace;
    without it the trace ends at its last arrival. Raises OocoError where a sample needs more seconds than the
    trace has.
    """

    name: str
    requests: Requests
    role: Role
    rate_scale: float = 1.0
    window: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        _check(self.name, self.role, self.rate_scale)
        start_s, end_s = self._bounds_s
        if not 0 <= start_s < end_s <= self.requests.duration_s:
            raise OocoError(
                f"workload '{self.name}': window [{start_s:g}, {end_s:g}] s is not a part of the trace, "
                f"which is {self.requests.duration_s:g} s long"
            )
        if not len(self._used):
            raise OocoError(f"workload '{self.name}': no requests in the window [{start_s:g}, {end_s:g}] s")

    @property
    def _bounds_s(self) -> tuple[float, float]:
        return self.window if self.window is not None else (0.0, self.requests.duration_s)

    @cached_property
    def _used(self) -> Requests:
        return self.requests if self.window is None else self.requests.window(*self.window)

    @property
    def trace_duration_s(self) -> float:
        """Seconds of recorded trace that samples come from, before the rate scale."""
        start_s, end_s = self._bounds_s
        return end_s - start_s

    @property
    def mean_rate_per_s(self) -> float:
        return len(self._used) / self.trace_duration_s * self.rate_scale

    @property
    def mean_prompt_tokens(self) -> float:
        return self._used.mean_prompt_tokens

    @property
    def mean_output_tokens(self) -> float:
        return self._used.mean_output_tokens

    def with_rate_scale(self, rate_scale: float) -> TraceSource:
        return replace(self, rate_scale=rate_scale)

    def sample(self, seed: int, duration_s: float) -> Requests:
        needed_s = positive(duration_s, "duration_s") * self.rate_scale
        spare_s = self.trace_duration_s - needed_s
        if spare_s < 0:
            raise OocoError(
                f"workload '{self.name}': {duration_s:g} s at rate_scale {self.rate_scale:g} need "
                f"{needed_s:g} s of trace, it has {self.trace_duration_s:g} s"
            )
        start_s = generator(seed, Stream.TRACE_WINDOW).random() * spare_s
        part = self._used.window(start_s, start_s + needed_s)
        # Rounding in the division must not push the last request onto the end of the half-open interval.
        arrival_s = np.minimum(part.arrival_s / self.rate_scale, np.nextafter(duration_s, 0.0))
        return Requests(arrival_s, part.prompt_tokens, part.output_tokens)


def _check(name: str, role: Any, rate_scale: Any) -> None:
    positive(rate_scale, f"workload '{name}': rate_scale")
    if role not in ROLES:
        raise OocoError(f"workload '{name}': role is {role!r}, it must be one of {', '.join(ROLES)}")
