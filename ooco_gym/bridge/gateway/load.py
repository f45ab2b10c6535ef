"""A request as the gateway knows it, and the load of one instance: requests in order, and sums kept in O(1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WAITING, PREFILL, DECODE, DONE = range(4)
PHASES = ("waiting", "prefill", "decode", "done")


class Request:
    """One request of a client: what is known of it, and where it is. Times are the ledger's clock, seconds."""

    __slots__ = (
        "arrival_s",
        "blind",
        "blocked_s",
        "body",
        "cancels",
        "context_tokens",
        "dispatched_s",
        "first_s",
        "grant",
        "id",
        "interrupt",
        "last_s",
        "late",
        "load",
        "max_tokens",
        "online",
        "output_tokens",
        "path",
        "payload",
        "phase",
        "predicted_prefill_s",
        "progress_s",
        "prompt_tokens",
        "reserved",
        "restarts",
        "single",
        "stream",
        "task",
        "usage",
        "usage_asked",
    )

    def __init__(
        self,
        request_id: str,
        path: str,
        body: bytes,
        online: bool,
        stream: bool,
        prompt_tokens: int,
        max_tokens: int | None = None,
        usage_asked: bool = False,
    ) -> None:
        self.id = request_id
        self.path = path
        self.body = body
        self.online = online
        self.stream = stream
        self.blind = not stream  # its tokens cannot be seen before its end
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.usage_asked = usage_asked
        self.payload: Mapping[str, Any] = {}  # the body, parsed
        self.single = True  # one prompt and one answer, whose KV can be handed over
        self.usage: tuple[int, int] | None = None  # (prompt, output) tokens as the engine counted them
        self.cancels = 0  # how often the scheduler has cancelled its task and that has not been seen
        self.arrival_s = 0.0
        self.dispatched_s = 0.0
        self.first_s = 0.0  # 0: no token yet
        self.last_s = 0.0
        self.progress_s = 0.0  # last sign of life of the instance
        self.blocked_s = 0.0  # since when the client does not read; 0: it does
        self.output_tokens = 0
        self.context_tokens = 0  # KV it is thought to hold where it is
        self.predicted_prefill_s = 0.0
        self.phase = WAITING
        self.load: Load | None = None
        self.restarts = 0
        self.task: Any = None  # the asyncio task that serves it
        self.grant: Any = None  # the future that an offline request waits on in the backlog
        self.interrupt: str | None = None  # why its task was cancelled by the scheduler
        self.late = False  # its TTFT violation has been booked
        self.reserved: Any = None  # the strict instance that keeps room for its decode


class Load:
    """What the gateway has sent to one instance: requests in the order in which they came, and sums over them."""

    def __init__(self) -> None:
        self.requests: dict[Request, None] = {}
        self.pending_s = 0.0  # predicted prefill of online requests without a first token here
        self.pending = 0
        self.offline_prefills = 0
        self.offline_prefill_tokens = 0
        self.online_decodes = 0
        self.offline_decodes = 0
        self.online_tokens = 0  # KV held, in tokens, prompts in prefill included
        self.offline_tokens = 0
        self.online = 0
        self.offline = 0
        self._peaks = [
            (0, 0),
            (0, 0),
        ]  # most online requests and their tokens: in the running period, in the one before

    @property
    def tokens(self) -> int:
        return self.online_tokens + self.offline_tokens

    def peak(self) -> tuple[int, int]:
        """(requests, tokens) of online work here at its most, in the running period and the one before."""
        (count, tokens), (before, tokens_before) = self._peaks
        return max(count, before), max(tokens, tokens_before)

    def next_period(self) -> None:
        """Begin a period of ``peak``."""
        self._peaks = [(self.online, self.online_tokens), self._peaks[0]]

    def enter(self, request: Request, phase: int) -> None:
        """A request is sent here, to be prefilled or, with its KV, to decode."""
        self.requests[request] = None
        request.load = self
        request.phase = phase
        request.context_tokens = request.prompt_tokens + request.output_tokens
        if request.online:
            self.online += 1
            self.online_tokens += request.context_tokens
            self._peaks[0] = (max(self._peaks[0][0], self.online), max(self._peaks[0][1], self.online_tokens))
        else:
            self.offline += 1
            self.offline_tokens += request.context_tokens
        self._count(request, phase, 1)

    def _count(self, request: Request, phase: int, sign: int) -> None:
        if phase == DECODE:
            if request.online:
                self.online_decodes += sign
            else:
                self.offline_decodes += sign
        elif request.online:
            self.pending += sign
            self.pending_s = self.pending_s + sign * request.predicted_prefill_s if self.pending else 0.0
        else:
            self.offline_prefills += sign
            self.offline_prefill_tokens += sign * request.prompt_tokens

    def prefilled(self, request: Request) -> None:
        """Its first token came from here."""
        if request.phase == PREFILL:
            self._count(request, PREFILL, -1)
            request.phase = DECODE
            self._count(request, DECODE, 1)

    def grew(self, request: Request, tokens: int) -> None:
        request.context_tokens += tokens
        if request.online:
            self.online_tokens += tokens
        else:
            self.offline_tokens += tokens

    def leave(self, request: Request) -> None:
        """It ended here, for whatever reason."""
        if request.load is not self:
            return
        del self.requests[request]
        self._count(request, request.phase, -1)
        if request.online:
            self.online -= 1
            self.online_tokens -= request.context_tokens
        else:
            self.offline -= 1
            self.offline_tokens -= request.context_tokens
        request.load = None
        request.phase = WAITING
