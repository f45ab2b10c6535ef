"""Where a request goes: the choices of the Control contract as pure functions of instances, knobs and rules.

Numbers in brackets are sentences of docs/specification.md that a choice follows as far as it can be seen from outside.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ooco_gym.bridge.gateway.config import BridgeConfig
from ooco_gym.bridge.gateway.instances import Instance
from ooco_gym.bridge.gateway.load import DECODE, Request
from ooco_gym.bridge.gateway.prediction import Prediction
from ooco_gym.cluster.control import KNOB_NAMES, RULES, ooco_knobs

LOOKAHEAD = 64  # waiting offline requests among which a pull chooses


@dataclass
class Placement:
    """The rules and knobs in force, and what they choose."""

    config: BridgeConfig
    instances: Sequence[Instance]
    prediction: Prediction
    rules: dict[str, str] = field(default_factory=lambda: {name: choices[0] for name, choices in RULES.items()})
    knobs: dict[str, float] = field(default_factory=lambda: dict(zip(KNOB_NAMES, ooco_knobs().tolist(), strict=True)))
    _turn: int = -1

    def __post_init__(self) -> None:
        scenario = self.config.scenario
        self.ttft_s, self.tpot_s = scenario.slo.ttft_s, scenario.slo.tpot_s
        self.max_batch_tokens = scenario.cluster.max_batch_tokens
        self.pull_interval_s = scenario.cluster.pull_interval_s
        self.relaxed = [instance for instance in self.instances if instance.role == "relaxed"]
        self.strict = [instance for instance in self.instances if instance.role == "strict"]

    @property
    def disaggregated(self) -> bool:
        """Prompts and decodes of online requests run on different instances."""
        return self.config.connector != "none" and not self.config.dry_run

    @property
    def prefilling(self) -> Sequence[Instance]:
        """Instances that prefill online requests."""
        return self.relaxed if self.disaggregated else self.instances

    # Online requests

    def route(self, request: Request, tried: Iterable[Instance], whole: bool = False) -> Instance | None:
        """The instance for an online prefill (19): least predicted seconds of pending online prefill.

        Plain routing serves whole requests on every instance; among equals it prefers strict ones, where the least
        offline work is, and it passes over instances that have no room or would exceed the bound on TPOT.
        """
        pool = self.instances if whole or not self.disaggregated else self.relaxed
        up = [instance for instance in pool if instance.up and instance not in tried]
        if not up:
            return None
        if self.config.dry_run:
            return min(up, key=lambda instance: (len(instance.load.requests), instance.index))
        if self.rules["routing"] == "round_robin":
            chosen = min(up, key=lambda instance: (instance.index - self._turn - 1) % len(self.instances))
            self._turn = chosen.index
            return chosen
        if self.disaggregated and not whole:
            return min(up, key=lambda instance: (instance.load.pending_s, instance.index))
        return min(up, key=lambda instance: self._plain_order(instance, request))

    def _plain_order(self, instance: Instance, request: Request) -> tuple[bool, float, bool, int, int]:
        load = instance.load
        return (
            self._crowded(instance, request),
            load.pending_s,
            instance.role == "relaxed",
            load.online,
            instance.index,
        )

    def _crowded(self, instance: Instance, request: Request) -> bool:
        """Online work alone leaves this request no place, no KV, or no iteration within the bound."""
        load = instance.load
        if load.online >= instance.max_seqs:
            return True
        if load.online_tokens + request.prompt_tokens + 1 > instance.kv_tokens:
            return True
        context = load.online_tokens + request.prompt_tokens
        return self.prediction.decode_s(instance.index, load.online + 1, context) > self.bound_s

    @property
    def bound_s(self) -> float:
        """Longest strict iteration allowed."""
        return math.inf if self.rules["mix_selection"] == "all" else self.knobs["tpot_bound"] * self.tpot_s

    def decoder(self, tried: Iterable[Instance], online: bool) -> Instance | None:
        """The strict instance for a hand-over (17): the smallest share of KV taken."""
        up = [instance for instance in self.strict if instance.up and instance not in tried]
        if online and self.rules["placement"] == "least_online_kv":
            return min(
                up,
                key=lambda instance: (instance.load.online_tokens / instance.kv_tokens, instance.index),
                default=None,
            )
        return min(up, key=lambda instance: (instance.kv_usage(), instance.index), default=None)

    # What gives way to an online arrival

    def in_the_way(self, instance: Instance, request: Request, now_s: float) -> list[Request]:
        """Offline requests to abort for an online arrival that ``instance.load`` already counts (20, 37).

        Offline prefills go if the predicted TTFT without interruption exceeds preempt_slack * TTFT SLO. Then, while the
        engine has no place or no KV for the arrival, which would so wait for a decode to end, the newest decodes.
        """
        load = instance.load
        if not load.offline or self.rules["preemption"] == "iteration" or self.rules["prefill_order"] == "fcfs":
            return []
        newest_first = [other for other in reversed(load.requests) if not other.online]
        prefills = [other for other in newest_first if other.phase != DECODE]
        chosen: list[Request] = []
        if prefills and self.uninterrupted_s(instance, now_s) > self.knobs["preempt_slack"] * self.ttft_s:
            chosen = prefills
        freed = sum(other.context_tokens for other in chosen)
        seats = instance.max_seqs - len(load.requests) + len(chosen)
        over = (instance.kv_demand() - 1.0) * instance.kv_tokens + 1  # tokens, the arrival's prompt included
        for other in newest_first:
            if seats >= 0 and over <= freed:
                break
            if other not in chosen:
                chosen.append(other)
                freed += other.context_tokens
                seats += 1
        return chosen

    def uninterrupted_s(self, instance: Instance, now_s: float) -> float:
        """Predicted TTFT of the newest online arrival here without interruption: offline prefill left + pending."""
        prefills = [other for other in instance.load.requests if not other.online and other.phase != DECODE]
        left_s = 0.0
        if prefills:
            predicted_s = sum(other.predicted_prefill_s for other in prefills)
            left_s = max(predicted_s - (now_s - min(other.dispatched_s for other in prefills)), 0.0)
        return left_s + instance.load.pending_s

    # Offline requests

    def gate(self, request: Request, now_s: float) -> Instance | None:
        """A relaxed instance that takes this offline request now (12): the one with the fewest of them."""
        if self.rules["admission"] != "gate":
            return None
        open_ = [instance for instance in self.relaxed or self.instances if self._takes(instance, request, now_s)]
        return min(
            open_, key=lambda instance: (instance.load.offline, instance.kv_usage(), instance.index), default=None
        )

    def _takes(self, instance: Instance, request: Request, now_s: float) -> bool:
        load = instance.load
        if not self._ready(instance, now_s):
            return False
        if load.offline >= self.knobs["gate_batch"] * instance.saturation_batch:
            return False
        # One batch of prefills at a time, so that an online arrival never finds more than one in its way.
        if load.offline_prefills and load.offline_prefill_tokens + request.prompt_tokens > self.max_batch_tokens:
            return False
        if load.online and not self.disaggregated and not self._shares(instance, request):
            return False
        if not load.requests:
            return True  # into an empty cache in any case: only the engine can say that it is too small
        return instance.kv_usage() + (request.prompt_tokens + 1) / instance.kv_tokens <= 1.0 - self.knobs["kv_reserve"]

    def _ready(self, instance: Instance, now_s: float) -> bool:
        """Up, with a seat, and no online request there that still waits for its first token."""
        load = instance.load
        if not instance.up or now_s < instance.refused_until_s:
            return False
        if len(load.requests) + instance.reserved >= instance.max_seqs:
            return False
        return load.pending == 0 or self.rules["prefill_order"] == "fcfs"

    def held(self, instance: Instance) -> tuple[int, int]:
        """(sequences, tokens) that an instance decodes, on their way there included, with online work at its peak.

        A stock engine cannot pause what was sent to it (23), so the room that online work took a moment ago stays its.
        """
        load, (online, online_tokens) = instance.load, instance.load.peak()
        return (online + load.offline + instance.reserved,
                online_tokens + load.offline_tokens + instance.reserved_tokens)  # fmt: skip

    def pull_length(self, instance: Instance) -> float:
        """L*, the preferred context of a pulled request (27); at least 1, which prefers the shortest."""
        batch, context = self.held(instance)
        left = max(math.ceil(instance.saturation_batch) - batch, 1)
        free = max((1.0 - instance.kv_usage()) * instance.kv_tokens - instance.reserved_tokens, 0.0)
        length = free // left
        if math.isfinite(self.bound_s):
            c0, c1 = self.prediction.affine_s(instance.index, batch + left)
            length = min(length, (self.bound_s / 0.98 - c0 - c1 * context) / (c1 * left))
        return max(float(math.floor(length)), 1.0)

    def pulls(self, instance: Instance, now_s: float) -> bool:
        """A strict instance asks for offline work now (27)."""
        if self.rules["migration"] == "none" or self.rules["admission"] != "gate" or now_s < instance.next_pull_s:
            return False
        if not self._ready(instance, now_s):
            return False
        usage = instance.kv_usage() + instance.reserved_tokens / instance.kv_tokens
        if usage >= self.knobs["pull_kv"]:
            return False
        return self.prediction.decode_s(instance.index, *self.held(instance)) < 0.9 / 0.98 * self.bound_s

    def fits(self, instance: Instance, request: Request) -> bool:
        """One more sequence of this context keeps a strict instance within KV and the bound."""
        free = (1.0 - instance.kv_usage()) * instance.kv_tokens - instance.reserved_tokens
        if request.prompt_tokens + 1 > free:
            return False
        batch, tokens = self.held(instance)
        return self.prediction.decode_s(instance.index, batch + 1, tokens + request.prompt_tokens) <= self.bound_s

    def computes(self, instance: Instance, request: Request) -> bool:
        """A strict instance may compute this offline prompt itself (39): within strict_prefill and the bound.

        Where no online request is, nobody is slowed, and one that comes aborts what is in its way.
        """
        if not instance.load.online:
            return True
        return self._piece(instance, request) <= self.knobs["strict_prefill"] and self._shares(instance, request)

    def _piece(self, instance: Instance, request: Request) -> int:
        """Tokens of a prompt that the engine computes in one iteration beside its decodes."""
        load = instance.load
        return min(request.prompt_tokens, max(self.max_batch_tokens - load.online - load.offline, 1))

    def _shares(self, instance: Instance, request: Request) -> bool:
        """An iteration with a piece of this offline prompt stays within the bound (39, 40)."""
        load, piece = instance.load, self._piece(instance, request)
        return self.prediction.mixed_s(instance.index, piece, load.online + load.offline, load.tokens) <= self.bound_s

    def preferred(self, instance: Instance, waiting: Iterable[Request]) -> Request | None:
        """Whom a pull computes itself, among the first of the backlog: nearest to pull_length * L*, or the longest."""
        candidates = [
            request
            for _, request in zip(range(LOOKAHEAD), waiting, strict=False)
            if self.fits(instance, request) and self.computes(instance, request)
        ]
        if self.rules["migration"] == "longest":
            return max(candidates, key=lambda request: request.prompt_tokens, default=None)
        target = self.knobs["pull_length"] * self.pull_length(instance)
        return min(candidates, key=lambda request: abs(request.prompt_tokens - target), default=None)
