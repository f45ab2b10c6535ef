"""A relaxed instance: prefill of both classes, and decodes of offline work."""

from __future__ import annotations

import math

from ooco_gym.cluster.control import GATE_BATCH, KV_RESERVE, PREFILL_CHUNK, WHOLE_PROMPT
from tests.reference.model import Instance, Request

SHORTEST_PIECE = 128  # tokens; a prompt that has fewer left is taken whole


class Relaxed:
    def decide_relaxed(self, instance: Instance) -> None:
        """(10)"""
        instance.decodes = []
        if self.rules["prefill_order"] == "online_first":
            self.online_batch(instance)
            if not instance.pieces:
                self.offline_batch(instance)
        else:
            self.fcfs_batch(instance)
        if not instance.pieces:
            instance.decodes = list(instance.residents)
        self.start(instance)

    def has_place(self, instance: Instance, tokens: int) -> bool:
        """(11) In the prefill batch that is being put together."""
        members, total = len(instance.pieces), instance.piece_tokens + tokens
        return members == 0 or (members < self.max_seqs and total <= self.max_batch_tokens)

    def gate_open(self, instance: Instance) -> bool:
        """(12)"""
        members = sum(not request.online for request in instance.kv)
        if self.rules["prefill_order"] == "fcfs":  # (13)
            members += sum(piece.request.online for piece in instance.pieces)
        if members < self.knobs[GATE_BATCH] * instance.saturation_batch:
            return True
        self.log("gate closed", None, instance)
        return False

    # --- the backlog ----------------------------------------------------------------------------------------------

    def offered(self, instance: Instance) -> Request | None:
        """What the backlog offers to an instance (12, 13, 39, 40)."""
        admission = self.rules["admission"]
        if admission == "none" or (admission == "unified" and instance.role != "unified"):
            return None
        if instance.draining or instance.checkpoints:
            return None
        return self.backlog.head()

    def stop_at_head(self, instance: Instance, reason: str, request: Request) -> None:
        """(32) The next request at the head may fit."""
        self.log(reason, request, instance)
        instance.stopped_at_head = True

    def take(self) -> Request:
        """The head of the backlog; those that had stopped at it are woken (32)."""
        self.wake([instance for instance in self.instances if instance.stopped_at_head])
        return self.backlog.take(self.now)

    def take_from(self, partial: list[Request], request: Request) -> None:
        """A candidate of an offline batch: a partial prefill, or the head of the backlog."""
        if request in partial:
            partial.remove(request)
        else:
            self.take()

    # --- batches --------------------------------------------------------------------------------------------------

    def online_batch(self, instance: Instance) -> None:
        """(11)"""
        while instance.waiting and self.has_place(instance, instance.waiting[0].left):
            request = instance.waiting[0]
            need = self.blocks(request.context + 1)
            if self.rules["eviction"] == "offline_first":
                self.make_room(need, instance)
            if need > instance.free:
                self.log("no KV for online prefill", request, instance)
                break
            instance.waiting.pop(0)
            self.begin_piece(instance, request, request.left)

    def chunk(self) -> float:
        """(12) Q, the most offline tokens of one iteration."""
        return math.inf if self.knobs[PREFILL_CHUNK] >= WHOLE_PROMPT else math.floor(self.knobs[PREFILL_CHUNK])

    def offline_batch(self, instance: Instance) -> None:
        """(12)"""
        while True:
            fresh = not instance.partial_offline
            if fresh and instance.waiting:
                break
            request = self.offered(instance) if fresh else instance.partial_offline[0]
            if request is None:
                break
            tokens = int(min(request.left, self.chunk() - instance.piece_tokens))
            if tokens < min(SHORTEST_PIECE, request.left):
                if fresh:
                    self.stop_at_head(instance, "piece too short (relaxed)", request)
                break
            if not self.has_place(instance, tokens):
                break
            if fresh and not self.gate_open(instance):
                break
            if fresh and self.no_kv_for_offline(instance, request, 1 - self.knobs[KV_RESERVE]):
                break
            self.take_from(instance.partial_offline, request)
            self.begin_piece(instance, request, tokens)

    def no_kv_for_offline(self, instance: Instance, request: Request, most: float) -> bool:
        """(12, 39) A request of the backlog would take the KV in use above a share of the cache."""
        if instance.used + self.blocks(request.context + 1) <= most * instance.kv_blocks:
            return False
        self.stop_at_head(instance, "no KV for offline prefill", request)
        return True

    def fcfs_batch(self, instance: Instance) -> None:
        """(13)"""
        while (request := self.earlier_head(instance)) and self.has_place(instance, request.left):
            if not self.start_fcfs(instance, request, request.left):
                break

    def earlier_head(self, instance: Instance) -> Request | None:
        """(13) The one that arrived earlier of the heads of both classes, online first on a tie."""
        online = instance.waiting[0] if instance.waiting else None
        offline = self.offered(instance)
        if offline and not self.gate_open(instance):
            offline = None
        if offline and (online is None or offline.arrival_s < online.arrival_s):
            return offline
        return online

    def start_fcfs(self, instance: Instance, request: Request, tokens: int) -> bool:
        """(13) False if there is no free KV for a request at the head of its class."""
        if self.blocks(request.context + 1) > instance.free:
            self.stop_at_head(instance, "no KV for fcfs prefill", request)
            return False
        if request.online:
            instance.waiting.pop(0)
        else:
            self.take()
        self.begin_piece(instance, request, tokens)
        return True
