"""A unified instance: mixed iterations, as a stock engine runs them (40)."""

from __future__ import annotations

import math

from ooco_gym.cluster.control import KV_RESERVE
from tests.reference.model import Instance
from tests.reference.relaxed import SHORTEST_PIECE


class Unified:
    def decide_unified(self, instance: Instance) -> None:
        """(40)"""
        bound_s = self.iteration_bound_s(instance) if instance.online_decodes else math.inf
        instance.decodes = self.select(instance, bound_s)
        self.partial_online_pieces(instance)
        if self.rules["prefill_order"] == "online_first":
            self.waiting_online_pieces(instance)
            self.offline_pieces(instance, bound_s)
        else:
            self.partial_offline_pieces(instance)
            self.fcfs_pieces(instance)
        self.start(instance)

    def tokens_left(self, instance: Instance) -> int:
        """Of the iteration that is being put together."""
        return max(self.chunk_tokens - len(instance.decodes) - instance.piece_tokens, 0)

    def may_start(self, instance: Instance) -> bool:
        partial = len(instance.partial_online) + len(instance.partial_offline)
        return len(instance.residents) + partial + len(instance.pieces) < self.max_seqs

    def partial_online_pieces(self, instance: Instance) -> None:
        while instance.partial_online and self.tokens_left(instance):
            request = instance.partial_online.pop(0)
            self.begin_piece(instance, request, min(request.left, self.tokens_left(instance)))

    def waiting_online_pieces(self, instance: Instance) -> None:
        while instance.waiting and self.tokens_left(instance) and self.may_start(instance):
            request = instance.waiting[0]
            need = self.blocks(request.context + 1)
            if self.rules["eviction"] == "offline_first":
                self.make_room(need, instance)
            if need > instance.free:
                self.log("no KV for online prefill", request, instance)
                break
            instance.waiting.pop(0)
            self.begin_piece(instance, request, min(request.left, self.tokens_left(instance)))

    def offline_pieces(self, instance: Instance, bound_s: float) -> None:
        """Partial prefills, then the backlog."""
        while True:
            fresh = not instance.partial_offline
            if fresh and instance.waiting:
                break
            request = self.offered(instance) if fresh else instance.partial_offline[0]
            if request is None or len(instance.pieces) == self.max_seqs or (fresh and not self.may_start(instance)):
                break
            offline = sum(piece.tokens for piece in instance.pieces if not piece.request.online)
            most = int(min(request.left, self.tokens_left(instance), self.chunk() - offline))
            tokens = self.largest_piece(instance, request, most, bound_s)
            if tokens < min(SHORTEST_PIECE, request.left):
                if fresh:
                    self.stop_at_head(instance, "piece too short (unified)", request)
                break
            if fresh and not self.gate_open(instance):
                break
            if fresh and self.no_kv_for_offline(instance, request, 1 - self.knobs[KV_RESERVE]):
                break
            self.take_from(instance.partial_offline, request)
            self.begin_piece(instance, request, tokens)

    def partial_offline_pieces(self, instance: Instance) -> None:
        while instance.partial_offline and self.tokens_left(instance):
            request = instance.partial_offline.pop(0)
            self.begin_piece(instance, request, min(request.left, self.tokens_left(instance)))

    def fcfs_pieces(self, instance: Instance) -> None:
        """(13) in pieces."""
        while self.tokens_left(instance) and self.may_start(instance) and (request := self.earlier_head(instance)):
            if not self.start_fcfs(instance, request, min(request.left, self.tokens_left(instance))):
                break
