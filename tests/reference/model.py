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
    ttft_slo_s: float = math.inf  # of its class (34); offline requests have none
    tpot_slo_s: float = math.inf
    generated: int = 0
    done: int = 0  # tokens of the prefill that has begun whose KV is there (36)
    computed: int = 0  # tokens whose KV was ever computed
    credited: int = 0  # prompt tokens credited to the reward
    token_s: list[float] = field(default_factory=list)  # when each token was emitted
    finish_s: float = math.inf
    gone_s: float = math.inf
    rejected: bool = False

    @property
    def context(self) -> int:  # (3)
        return self.prompt + self.generated

    @property
    def left(self) -> int:
        """Tokens that its prefill has to compute still (18, 36)."""
        return self.context - self.done

    @property
    def cancelled(self) -> bool:
        return self.gone_s < math.inf

    @property
    def first_s(self) -> float:
        return math.nan if self.rejected else self.token_s[0] if self.token_s else math.inf

    def __repr__(self) -> str:
        return f"{'online' if self.online else 'offline'} {self.index}"


@dataclass(eq=False)
class Piece:
    """``tokens`` of a prompt in one iteration, from the ``done`` of its request on (36)."""

    request: Request
    tokens: int


@dataclass(eq=False)
class Instance:
    index: int
    role: str  # relaxed, strict, unified
    kv_blocks: int
    host_blocks: int
    saturation_batch: float
    becoming: str = ""  # the role it drains for; its role when it does not (46)
    # KV blocks by request, reservations for transfers and restores included; a transfer is in two instances' kv.
    kv: dict[Request, int] = field(default_factory=dict)
    host: dict[Request, int] = field(default_factory=dict)  # blocks in host memory (43)
    waiting: list[Request] = field(default_factory=list)  # online requests before their prefill
    partial_online: list[Request] = field(default_factory=list)  # (36)
    partial_offline: list[Request] = field(default_factory=list)
    residents: list[Request] = field(default_factory=list)  # decodes, in order of arrival here
    held: list[Request] = field(default_factory=list)  # prefilled here, waiting for room at their target
    inbound_online: list[tuple[Request, Instance]] = field(default_factory=list)  # (request, source) held for here
    inbound_offline: list[tuple[Request, Instance]] = field(default_factory=list)
    link: list[tuple[Request, Instance]] = field(default_factory=list)  # (request, target); the first is on the wire
    link_end_s: float = math.inf
    checkpoints: list[Request] = field(default_factory=list)  # in host memory, waiting to be restored (43)
    restores: list[Request] = field(default_factory=list)  # the first is on the host link (44)
    restore_end_s: float = math.inf
    leaving: list[tuple[Request, Instance]] = field(default_factory=list)  # (request, puller), in order of grant

    activity: str = "idle"  # idle, deciding, running, down
    due_s: float = 0.0  # next boundary or wake-up; at time 0 everyone decides (7)
    stopped_at_head: bool = False  # its last decision stopped at the backlog's head, as (32) has it
    # the running iteration; of one that ended, the decodes that are still resident
    pieces: list[Piece] = field(default_factory=list)
    decodes: list[Request] = field(default_factory=list)
    start_s: float = 0.0
    taking_s: float = 0.0  # what (27) will know of it
    last_iteration_s: float = 0.0
    # run of unchanged decode iterations (24)
    anchor: tuple[float, float, float] = (0.0, 0.0, 0.0)  # seconds, c0 + c1 C, c1
    anchor_batch: list[Request] = field(default_factory=list)
    k: int = 0  # iterations since the anchor; 0 asks for a new one
    # what preemption knows of a running prefill (20)
    predicted_end_s: float = 0.0
    layer_s: float = 0.0
    interrupted: bool = False
    # pull and pushback
    pulled: Request | None = None
    next_pull_s: float = 0.0
    asked: int = -1  # index of the relaxed instance asked last
    pushed: Request | None = None
    next_push_s: float = 0.0

    @property
    def up(self) -> bool:
        return self.activity != "down"

    @property
    def draining(self) -> bool:
        return self.becoming != self.role

    @property
    def available(self) -> bool:  # (35)
        return self.up and not self.draining

    @property
    def used(self) -> int:
        return sum(self.kv.values())

    @property
    def online_used(self) -> int:
        return sum(n for request, n in self.kv.items() if request.online)

    @property
    def free(self) -> int:
        return self.kv_blocks - self.used

    @property
    def online_decodes(self) -> list[Request]:
        return [request for request in self.residents if request.online]

    @property
    def offline_decodes(self) -> list[Request]:
        return [request for request in self.residents if not request.online]

    @property
    def piece_tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)

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

    def give_back(self, request: Request) -> None:
        """A request that lost its KV returns to the head."""
        request.done = 0
        self.requeued.insert(0, request)

    def take(self, now: float) -> Request:
        """Remove and return the head."""
        if self.requeued:
            return self.requeued.pop(0)
        job, self.job, self.last_taken_s = self.job, None, now
        assert job is not None
        return job
