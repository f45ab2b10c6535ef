"""What the reference simulator moves around: requests, instances, the backlog. No decisions are taken here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Request:
    online: bool
    index: int  # row of its table; an endless backlog counts on when it wraps around
    arrival_s: float
    prompt: int
    output: int
    generated: int = 0
    computed: int = 0  # tokens whose KV was ever computed
    token_s: list[float] = field(default_factory=list)  # when each token was emitted
    rejected: bool = False

    @property
    def context(self) -> int:  # (3)
        return self.prompt + self.generated

    @property
    def first_s(self) -> float:
        return math.nan if self.rejected else self.token_s[0] if self.token_s else math.inf

    @property
    def finish_s(self) -> float:
        return self.token_s[-1] if self.generated == self.output else math.inf

    def __repr__(self) -> str:
        return f"{'online' if self.online else 'offline'} {self.index}"


@dataclass(eq=False)
class Instance:
    index: int
    strict: bool
    kv_blocks: int
    saturation_batch: float
    # KV blocks by request, reservations for transfers on their way included; a transfer is in two instances' kv.
    kv: dict[Request, int] = field(default_factory=dict)
    residents: list[Request] = field(default_factory=list)  # decodes, in order of arrival here
    waiting: list[Request] = field(default_factory=list)  # online requests before their prefill
    held: list[Request] = field(default_factory=list)  # prefilled here, waiting for room at their target
    inbound_online: list[tuple[Request, Instance]] = field(default_factory=list)  # (request, source) held for here
    inbound_offline: list[tuple[Request, Instance]] = field(default_factory=list)
    link: list[tuple[Request, Instance]] = field(default_factory=list)  # (request, target); the first is on the wire
    link_end_s: float = math.inf
    leaving: list[tuple[Request, Instance]] = field(default_factory=list)  # (request, puller), in order of grant

    activity: str = "idle"  # idle, deciding, decode, prefill
    due_s: float = 0.0  # next boundary or wake-up; at time 0 everyone decides (7)
    batch: list[Request] = field(default_factory=list)  # members of the running iteration
    start_s: float = 0.0  # of the running iteration
    duration_s: float = 0.0
    last_iteration_s: float = 0.0
    # run of unchanged decode iterations (24)
    anchor: tuple[float, float, float, int] = (0.0, 0.0, 0.0, 0)  # seconds, c0 + c1 C, c1, B
    k: int = 0  # iterations since the anchor; 0 asks for a new one
    # running prefill
    offline_prefill: bool = False
    predicted_end_s: float = 0.0
    layer_s: float = 0.0
    layers: float = 0.0
    interrupted: bool = False
    # pull
    pulled: Request | None = None
    next_pull_s: float = 0.0
    asked: int = 0

    @property
    def used(self) -> int:
        return sum(self.kv.values())

    @property
    def online_used(self) -> int:
        return sum(n for request, n in self.kv.items() if request.online)

    @property
    def free(self) -> int:
        return self.kv_blocks - self.used

    def share(self, everything: bool) -> float:
        """Share of the KV cache that is taken: by everything, or by online work alone."""
        return (self.used if everything else self.online_used) / self.kv_blocks


class Backlog:
    """Offline work that no instance holds (14): requeued requests first, then the job list."""

    def __init__(
        self, endless: bool, arrival_s: Sequence[float], prompt: Sequence[int], output: Sequence[int], most_tokens: int
    ) -> None:
        self.endless, self.arrival_s, self.prompt, self.output = endless, arrival_s, prompt, output
        self.most_tokens = most_tokens  # a longer job is rejected (4)
        self.requeued: list[Request] = []
        self.job: Request | None = None  # the job at the head of the list, once it was looked at
        self.arrived = 0
        self.passed = 0  # jobs taken or rejected
        self.rejected = 0
        self.last_taken_s = 0.0

    @property
    def next_arrival_s(self) -> float:
        return math.inf if self.endless or self.arrived == len(self.arrival_s) else self.arrival_s[self.arrived]

    def head(self) -> Request | None:
        if self.requeued:
            return self.requeued[0]
        while not self.job and (self.endless or self.passed < self.arrived):
            if self.rejected == self.passed >= len(self.prompt):
                break  # an endless table of which no row fits
            row = self.passed % len(self.prompt)
            if self.prompt[row] + self.output[row] <= self.most_tokens:
                arrival_s = self.last_taken_s if self.endless else self.arrival_s[row]
                self.job = Request(False, self.passed, arrival_s, self.prompt[row], self.output[row])
            else:
                self.rejected += 1
            self.passed += 1
        return self.job

    def take(self, now: float) -> Request:
        """Remove and return the head."""
        if self.requeued:
            return self.requeued.pop(0)
        job, self.job, self.last_taken_s = self.job, None, now
        assert job is not None
        return job
