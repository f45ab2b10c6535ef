"""The request log: what the gateway knows of every request and of every instance's load.

All that Telemetry, scheduling and the outcome metrics need from the gateway's side is kept here in sums that are
updated in O(1) per event, because an event can be one token. The outcome metrics have the definitions of
docs/specification.md (section Metrics); two things differ because output lengths are unknown until a request ends and
because an answer that is not streamed shows no first token:

- a TPOT violation is booked when the request ends, not at the first instant at which it was certain;
- a request that is not streamed violates only by being unfinished at its deadline.
"""

from __future__ import annotations

import heapq
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from itertools import count
from operator import attrgetter

from ooco_gym.bridge.gateway.load import DONE, Request

RING_SECONDS = 512
RECENT = 4096  # finished online requests whose latencies are kept for quantiles


@dataclass(slots=True)
class Sums:
    """Online sums over some time."""

    arrivals: int = 0
    prompt_tokens: int = 0
    prefill_s: float = 0.0
    violations: int = 0
    judged: int = 0  # requests of which it became known whether they violate
    finished: int = 0
    output_tokens: int = 0


_SUMS = {entry.name: attrgetter(entry.name) for entry in fields(Sums)}


@dataclass(slots=True)
class Second(Sums):
    """Sums of one whole second of the gateway's life."""

    second: int = -1


@dataclass(slots=True)
class Window(Sums):
    """Sums over the last whole seconds, the running one left out; windows that reach before the start are shorter."""

    seconds: int = 0


@dataclass
class Totals:
    """Counts since the start; none ever decreases."""

    online_requests: int = 0
    online_finished: int = 0
    online_failed: int = 0
    online_cancelled: int = 0
    online_refused: int = 0
    online_prompt_tokens: int = 0  # of finished requests
    online_output_tokens: int = 0
    judged: int = 0  # online requests of which it is known whether they violate
    ttft_violations: int = 0
    tpot_violations: int = 0
    deadline_violations: int = 0
    offline_requests: int = 0
    offline_taken: int = 0
    offline_taken_prompt_tokens: int = 0
    offline_finished: int = 0
    offline_failed: int = 0
    offline_cancelled: int = 0
    offline_refused: int = 0
    offline_prompt_tokens: int = 0  # of finished requests
    offline_output_tokens: int = 0
    preemptions: int = 0
    wasted_prompt_tokens: int = 0
    wasted_output_tokens: int = 0
    retries: int = 0
    handovers: int = 0
    recomputed_handovers: int = 0
    pulls: int = 0

    @property
    def violations(self) -> int:
        return self.ttft_violations + self.tpot_violations + self.deadline_violations


@dataclass
class Ledger:
    """Events in, sums out. ``clock`` gives seconds; times are kept relative to the start."""

    ttft_slo_s: float
    tpot_slo_s: float
    clock: Callable[[], float] = time.monotonic
    totals: Totals = field(default_factory=Totals)

    def __post_init__(self) -> None:
        self.start_s = self.clock()
        self.ring = [Second() for _ in range(RING_SECONDS)]
        self.ttfts_s: deque[float] = deque(maxlen=RECENT)
        self.tpots_s: deque[float] = deque(maxlen=RECENT)
        self.live: dict[Request, None] = {}  # online requests that have not ended
        self._first_due: list[tuple[float, int, Request]] = []
        self._order = count()
        self.on_first_token: Callable[[], None] | None = None

    def now_s(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.start_s

    def _second(self, now_s: float) -> Second:
        second = int(now_s)
        entry = self.ring[second % RING_SECONDS]
        if entry.second == second:
            return entry
        fresh = Second(second=second)
        if entry.second < second:  # else so long ago that no window reaches it
            self.ring[second % RING_SECONDS] = fresh
        return fresh

    def arrived(self, request: Request, predicted_prefill_s: float) -> None:
        """A request was accepted."""
        request.arrival_s = request.progress_s = now_s = self.now_s()
        request.predicted_prefill_s = predicted_prefill_s
        if not request.online:
            self.totals.offline_requests += 1
            return
        self.totals.online_requests += 1
        self.live[request] = None
        entry = self._second(now_s)
        entry.arrivals += 1
        entry.prompt_tokens += request.prompt_tokens
        entry.prefill_s += predicted_prefill_s
        if request.stream:
            heapq.heappush(self._first_due, (now_s + self.ttft_slo_s, next(self._order), request))

    def taken(self, request: Request) -> None:
        """An offline request left the backlog for the first time."""
        self.totals.offline_taken += 1
        self.totals.offline_taken_prompt_tokens += request.prompt_tokens

    def token(self, request: Request, tokens: int) -> None:
        """``tokens`` output tokens were seen now."""
        request.last_s = request.progress_s = now_s = self.now_s()
        if request.output_tokens == 0 and request.first_s == 0.0:
            request.first_s = now_s
            if request.online and request.stream:
                self.ttfts_s.append(now_s - request.arrival_s)
            if request.load is not None:
                request.load.prefilled(request)
                if self.on_first_token is not None:
                    self.on_first_token()
        request.output_tokens += tokens
        if request.load is not None:
            request.load.grew(request, tokens)

    def restarted(self, request: Request, prompt_tokens: int, output_tokens: int) -> None:
        """What an instance did for this request is lost; it begins again from its prompt."""
        self.totals.wasted_prompt_tokens += prompt_tokens
        self.totals.wasted_output_tokens += output_tokens
        request.output_tokens = 0
        request.first_s = request.last_s = 0.0
        request.usage = None
        request.restarts += 1

    def finished(self, request: Request, output_tokens: int | None = None) -> None:
        """It ended well; ``output_tokens`` is the engine's own count where the answer had one."""
        now_s = self.now_s()
        if output_tokens is not None:
            request.output_tokens = output_tokens
        totals = self.totals
        request.phase = DONE
        if not request.online:
            totals.offline_finished += 1
            totals.offline_prompt_tokens += request.prompt_tokens
            totals.offline_output_tokens += request.output_tokens
            return
        self._book_late_firsts(now_s)
        self.live.pop(request, None)
        totals.online_finished += 1
        totals.online_prompt_tokens += request.prompt_tokens
        totals.online_output_tokens += request.output_tokens
        entry = self._second(now_s)
        entry.finished += 1
        entry.output_tokens += request.output_tokens
        more = max(request.output_tokens - 1, 0)
        tpot_s = (request.last_s - request.first_s) / more if more and request.stream else 0.0
        if more and request.stream:
            self.tpots_s.append(tpot_s)
        if request.late:
            return
        totals.judged += 1
        entry.judged += 1
        if request.stream:
            if tpot_s > self.tpot_slo_s:
                totals.tpot_violations += 1
                entry.violations += 1
        elif now_s > request.arrival_s + self.ttft_slo_s + more * self.tpot_slo_s:
            totals.deadline_violations += 1
            entry.violations += 1

    def ended(self, request: Request, how: str) -> None:
        """It ended without a complete answer: ``failed``, ``cancelled`` by its client, or ``refused`` as it is."""
        totals = self.totals
        request.phase = DONE
        kind = "online" if request.online else "offline"
        setattr(totals, f"{kind}_{how}", getattr(totals, f"{kind}_{how}") + 1)
        if not request.online:
            return
        now_s = self.now_s()
        self._book_late_firsts(now_s)
        self.live.pop(request, None)
        # One that went away or was refused is no evidence either way, unless its violation was certain before.
        if how == "failed" and not request.late:
            totals.judged += 1
            totals.deadline_violations += 1
            entry = self._second(now_s)
            entry.judged += 1
            entry.violations += 1

    def _book_late_firsts(self, now_s: float) -> None:
        """TTFT violations that have become certain, each booked in the second in which it did."""
        while self._first_due and self._first_due[0][0] < now_s:
            due_s, _, request = heapq.heappop(self._first_due)
            on_time = 0.0 < request.first_s <= due_s
            if on_time or (request.phase == DONE and request not in self.live):
                continue
            self.totals.ttft_violations += 1
            self.totals.judged += 1
            request.late = True
            entry = self._second(due_s)
            entry.judged += 1
            entry.violations += 1

    def window(self, seconds: int) -> Window:
        """Sums over the last ``seconds`` whole seconds."""
        now_s = self.now_s()
        self._book_late_firsts(now_s)
        last = math.floor(now_s) - 1
        seconds = min(seconds, last + 1)
        slots = ((second, self.ring[second % RING_SECONDS]) for second in range(last - seconds + 1, last + 1))
        entries = [entry for second, entry in slots if entry.second == second]
        return Window(seconds=seconds, **{name: sum(map(get, entries)) for name, get in _SUMS.items()})

    def quantiles_s(self) -> dict[str, float | None]:
        """Latencies of the last online streams that ended."""
        return {
            "ttft_p50_s": _quantile(self.ttfts_s, 0.5),
            "ttft_p99_s": _quantile(self.ttfts_s, 0.99),
            "tpot_p50_s": _quantile(self.tpots_s, 0.5),
            "tpot_p99_s": _quantile(self.tpots_s, 0.99),
        }


def _quantile(values: deque[float], q: float) -> float | None:
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]
