"""Iterations: what they cost, how they start, what is booked at their end, and how a prefill is interrupted."""

from __future__ import annotations

import math

from ooco_gym.cluster.control import PREEMPT_SLACK
from ooco_gym.roofline.cost import causal_pairs, decode_affine, iteration_s, layers_s
from tests.reference.model import Instance, Piece, Request


class Iterations:
    # --- cost -----------------------------------------------------------------------------------------------------

    def prefill_shape(self, pieces: list[Piece]) -> tuple[float, float, float, float]:
        """Tokens, causal pairs, full pairs and KV tokens, as the table of ooco_gym/roofline/cost.py defines them."""
        parts = [(float(piece.tokens), float(piece.request.done)) for piece in pieces]
        tokens = sum((n for n, _ in parts), 0.0)
        causal = sum((causal_pairs(n, past) for n, past in parts), 0.0)
        full = sum((n * (past + n) for n, past in parts), 0.0)
        kv = sum((past + n for n, past in parts), 0.0)
        return tokens, causal, full, kv

    def seconds_of(self, cost, pieces: list[Piece], decodes: list[Request]) -> float:
        """(38) One iteration of prefill pieces and decodes."""
        contexts = [float(request.context) for request in decodes]
        batch = (float(len(pieces)), float(len(decodes)), sum(contexts, 0.0), max(contexts, default=0.0))
        return iteration_s(cost, *self.prefill_shape(pieces), *batch)

    def decode_s(self, cost, decodes: list[Request]) -> float:
        """(24) c0(B) + c1 C; no decodes take no time."""
        if not decodes:
            return 0.0
        c0, c1 = decode_affine(cost, float(len(decodes)))
        return c0 + c1 * sum(request.context for request in decodes)

    def largest_piece(self, instance: Instance, request: Request, most: int, bound_s: float) -> int:
        """(39, 40) Most tokens of a request, up to ``most``, that the predicted time of the iteration has room for."""
        cost = self.scheduler_cost[instance.index]

        def fits(tokens: int) -> bool:
            pieces = [*instance.pieces, Piece(request, tokens)]
            return bound_s == math.inf or self.seconds_of(cost, pieces, instance.decodes) <= bound_s

        if most <= 0 or fits(most):
            return max(most, 0)
        low, high = 0, most  # low fits or is nothing, high does not fit
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    # --- start ----------------------------------------------------------------------------------------------------

    def begin_piece(self, instance: Instance, request: Request, tokens: int) -> None:
        """(36) A piece in the batch that is being put together; the first one reserves KV."""
        if request not in instance.kv:
            instance.kv[request] = self.blocks(request.context + 1)
        instance.pieces.append(Piece(request, tokens))
        self.log("prefill start" if request.done == 0 else "next piece", request, instance)

    def start(self, instance: Instance) -> None:
        """An iteration of the pieces and decodes that were chosen; idle without any."""
        if instance.pieces:
            self.start_pieces(instance)
        elif instance.decodes:
            self.start_decode(instance)
        if instance.pieces or instance.decodes:
            instance.activity, instance.start_s = "running", self.now

    def start_decode(self, instance: Instance) -> None:
        """(24)"""
        if instance.k == 0 or instance.decodes != instance.anchor_batch:
            c0, c1 = decode_affine(self.true_cost[instance.index], float(len(instance.decodes)))
            context = sum(request.context for request in instance.decodes)
            instance.anchor, instance.k = (self.now, c0 + c1 * context, c1), 0
            instance.anchor_batch = list(instance.decodes)
            self.log("decode batch", None, instance)
        instance.k += 1
        anchor_s, first_s, c1 = instance.anchor
        k, size = instance.k, len(instance.decodes)
        instance.due_s = anchor_s + (k * first_s + c1 * size * (0.5 * k * (k - 1)))
        instance.taking_s = first_s + c1 * size * (k - 1)

    def start_pieces(self, instance: Instance) -> None:
        """A prefill batch of a relaxed instance, or a mixed iteration (38)."""
        instance.k = 0
        true, scheduler = self.true_cost[instance.index], self.scheduler_cost[instance.index]
        duration_s = self.seconds_of(true, instance.pieces, instance.decodes)
        instance.due_s = self.now + duration_s
        if instance.role == "relaxed":
            instance.taking_s = duration_s
            instance.predicted_end_s = self.now + self.seconds_of(scheduler, instance.pieces, [])
            layers = layers_s(true, *self.prefill_shape(instance.pieces), 0.0, 0.0, 0.0)
            instance.layer_s = layers / float(true["layers"])
        else:
            instance.taking_s = self.decode_s(scheduler, instance.decodes)  # (27)
            kind = "mixed iteration" if instance.decodes else "iteration of pieces alone"
            self.log(f"{kind} ({instance.role})", None, instance)

    # --- end ------------------------------------------------------------------------------------------------------

    def after_iteration(self, instance: Instance) -> None:
        """(9a-c)"""
        self.count["iterations"] += 1
        self.count["mixed_iterations"] += bool(instance.pieces) and instance.role != "relaxed"
        self.seconds["busy_s"] += self.now - instance.start_s
        instance.last_iteration_s = instance.taking_s
        pieces, instance.pieces = instance.pieces, []
        self.count_pieces(pieces, self.now - instance.start_s, len(instance.decodes))
        for request in list(instance.decodes):  # (9a)
            self.emit(request, instance)
        self.cancelled_leave(instance)
        self.book(pieces, instance)  # (9b)
        self.grow(instance)  # (9c)

    def count_pieces(self, pieces: list[Piece], seconds: float, decodes: int) -> None:
        """Tokens prefilled, those of them that had been computed before, and the time these took."""
        tokens = sum(piece.tokens for piece in pieces)
        again = 0
        for piece in pieces:
            request, end = piece.request, piece.request.done + piece.tokens
            again += max(min(request.computed, end) - request.done, 0)
            request.computed = max(request.computed, end)
            if not request.online and min(end, request.prompt) > request.credited:
                self.count["credited_prompt_tokens"] += min(end, request.prompt) - request.credited
                request.credited = min(end, request.prompt)
        self.count["prefilled_tokens"] += tokens
        self.count["recomputed_tokens"] += again
        if pieces:
            self.seconds["recompute_s"] += seconds * again / (tokens + decodes)

    def book(self, pieces: list[Piece], instance: Instance) -> None:
        """(15, 16, 36, 50)"""
        unfinished = []
        for piece in pieces:
            request = piece.request
            request.done += piece.tokens
            if request.cancelled:
                self.log("cancelled request leaves (prefill)", request, instance)
                del instance.kv[request]
            elif request.left:
                self.log("piece", request, instance)
                unfinished.append(request)
            else:
                self.prefilled(request, instance)
        instance.partial_online[:0] = [request for request in unfinished if request.online]
        instance.partial_offline[:0] = [request for request in unfinished if not request.online]

    def prefilled(self, request: Request, instance: Instance) -> None:
        """(15, 16, 18)"""
        self.log("prefill end", request, instance)
        request.done = 0
        self.emit(request, instance)
        if request.finish_s < math.inf:
            return
        if instance.role == "relaxed" and (request.online or self.rules["offline_decode"] == "strict"):
            self.hand_over(request, instance)
        else:
            self.join(request, instance)

    def emit(self, request: Request, instance: Instance) -> None:
        """One more token; if it was the last, the request finishes and frees its KV."""
        request.computed = max(request.computed, request.context)
        request.generated += 1
        request.token_s.append(self.now)
        if not request.online:
            self.count["credited_output_tokens"] += 1
        elif request.generated == 1:
            self.log("first token" if instance.role == "relaxed" else "first token (unified)", request, instance)
        if request.generated == request.output and not request.cancelled:  # (50) a cancelled one never finishes
            self.finish(request, instance)

    def finish(self, request: Request, instance: Instance) -> None:
        self.log("finish", request, instance)
        request.finish_s = self.now
        del instance.kv[request]
        if request in instance.residents:
            self.depart(request, instance)
        if request.online:
            self.count["online_finished"] += 1
            return
        self.offline_finish.append((self.now, request))
        if self.measure_from_s < self.now <= self.measure_to_s:
            self.count["offline_finished"] += 1
            self.count["offline_finished_prompt_tokens"] += request.prompt
            self.count["offline_finished_output_tokens"] += request.output

    # --- preemption -----------------------------------------------------------------------------------------------

    def preempt(self, arrived: Request, instance: Instance) -> None:
        """(20)"""
        if self.rules["preemption"] == "iteration" or self.rules["prefill_order"] == "fcfs":
            return
        if instance.role != "relaxed" or not instance.pieces or instance.interrupted:
            return
        if instance.pieces[0].request.online:
            return
        left_s = max(instance.predicted_end_s - self.now, 0.0)
        if left_s + self.pending_s(instance) <= self.knobs[PREEMPT_SLACK] * arrived.ttft_slo_s:
            return
        layer = math.ceil((self.now - instance.start_s) / instance.layer_s)
        if layer < float(self.true_cost[instance.index]["layers"]):
            instance.interrupted = True
            instance.due_s = instance.start_s + layer * instance.layer_s
            self.log("preemption", None, instance)

    def after_interruption(self, instance: Instance) -> None:
        """(21)"""
        instance.interrupted = False
        self.count["preemptions"] += 1
        self.seconds["busy_s"] += self.now - instance.start_s
        self.seconds["interrupted_s"] += self.now - instance.start_s
        batch, instance.pieces = [piece.request for piece in instance.pieces], []
        kept = [request for request in batch if self.rules["preemption"] == "chunk" and request.done > 0]
        for request in reversed(batch):
            if request in kept:
                self.log("chunk kept", request, instance)
            else:
                self.log("interrupted" if request.done == 0 else "chunk lost", request, instance)
                del instance.kv[request]
                self.backlog.give_back(request)
        instance.partial_offline[:0] = kept
        self.wake_takers()
        self.cancelled_leave(instance)
