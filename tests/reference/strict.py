"""A strict instance: hand-overs, pulls, pushback, mix decoding selection, strict prefill."""

from __future__ import annotations

import math

from ooco_gym.cluster.control import KV_RESERVE, PULL_KV, PULL_LENGTH, PUSHBACK, STRICT_PREFILL, TPOT_BOUND
from ooco_gym.roofline.cost import decode_affine
from tests.reference.model import Instance, Request
from tests.reference.relaxed import SHORTEST_PIECE


class Strict:
    def decide_strict(self, instance: Instance) -> None:
        """(22)"""
        self.start_waiting(instance)
        self.pull(instance)
        self.start_restores(instance)
        self.push_back(instance)
        bound_s = self.iteration_bound_s(instance)
        instance.decodes = self.select(instance, bound_s)
        self.strict_prefill(instance, bound_s)
        self.start(instance)
        if instance.activity != "running" and self.rules["migration"] != "none":
            instance.due_s = max(instance.next_pull_s, self.now + self.pull_interval_s)

    def tpot_bound_s(self, instance: Instance) -> float:
        """tpot_bound * TPOT SLO of the instance (34)."""
        slo_s = min((request.tpot_slo_s for request in instance.online_decodes), default=self.tightest_tpot_s)
        return self.knobs[TPOT_BOUND] * slo_s

    def iteration_bound_s(self, instance: Instance) -> float:
        """What an iteration is predicted to take at most (23, 39)."""
        return math.inf if self.rules["mix_selection"] == "all" else self.tpot_bound_s(instance)

    def start_waiting(self, instance: Instance) -> None:
        """(25)"""
        for queue in (instance.inbound_online, instance.inbound_offline):
            while queue:
                request, source = queue[0]
                need = self.blocks(request.context)
                if request.online and self.rules["eviction"] == "offline_first":
                    self.make_room(need, instance)
                if need > instance.free:
                    break
                queue.pop(0)
                source.held.remove(request)
                self.start_transfer(request, source, instance)

    # --- pull -----------------------------------------------------------------------------------------------------

    def pull(self, instance: Instance) -> None:
        """(27)"""
        if (
            self.rules["migration"] == "none"
            or instance.draining
            or instance.pulled is not None
            or self.now < instance.next_pull_s
            or instance.used >= self.knobs[PULL_KV] * instance.kv_blocks
            or instance.last_iteration_s >= 0.9 / 0.98 * self.tpot_bound_s(instance)
        ):
            return
        relaxed = [source for source in self.instances if source.role == "relaxed" and source.up]
        if not relaxed:
            self.log("no relaxed instance to pull from", None, instance)
            return
        source = next((later for later in relaxed if later.index > instance.asked), relaxed[0])
        instance.asked = source.index
        instance.next_pull_s = self.now + self.pull_interval_s
        granted = self.candidate(instance, source)
        if granted:
            self.log("pull granted", granted, instance)
            instance.pulled = granted
            source.leaving.append((granted, instance))
            self.wake([source])  # (28)

    def candidate(self, instance: Instance, source: Instance) -> Request | None:
        """(27) The offline decode that is granted."""
        batch = instance.decodes  # selected before this decision and still resident
        context = sum(request.context for request in batch)
        left = max(math.ceil(instance.saturation_batch) - len(batch), 1)
        free = instance.free * self.block_tokens
        c0, c1 = decode_affine(self.scheduler_cost[instance.index], float(len(batch) + left))
        bound_s = self.tpot_bound_s(instance) / 0.98
        length = math.floor(min(free // left, (bound_s - c0 - c1 * context) / (c1 * left)))
        leaving = [request for request, _ in source.leaving]
        fitting = [request for request in source.offline_decodes if request not in leaving and request.context <= free]
        if length < 1 or not fitting:
            return None
        if self.rules["migration"] == "longest":
            return max(fitting, key=lambda request: request.context)  # the first of equals
        wanted = self.knobs[PULL_LENGTH] * length
        return min(fitting, key=lambda request: abs(request.context - wanted))

    # --- pushback -------------------------------------------------------------------------------------------------

    def push_back(self, instance: Instance) -> None:
        """(42)"""
        if (
            self.knobs[PUSHBACK] >= 1
            or instance.used <= self.knobs[PUSHBACK] * instance.kv_blocks
            or instance.pushed is not None
            or self.now < instance.next_push_s
            or not instance.offline_decodes
        ):
            return
        instance.next_push_s = self.now + self.pull_interval_s
        request = instance.offline_decodes[-1]
        targets = [target for target in self.instances if target.role == "relaxed" and target.available]
        if not targets:
            self.log("no relaxed instance to push to", request, instance)
            return
        target = min(targets, key=lambda candidate: (candidate.share(everything=True), candidate.index))
        if target.used + self.blocks(request.context) > (1 - self.knobs[KV_RESERVE]) * target.kv_blocks:
            self.log("no KV for pushback", request, target)
            return
        self.log("pushback", request, instance)
        self.count["pushbacks"] += 1
        instance.pushed = request
        self.depart(request, instance)
        self.start_transfer(request, instance, target)

    # --- the iteration --------------------------------------------------------------------------------------------

    def select(self, instance: Instance, bound_s: float) -> list[Request]:
        """(23)"""
        selected: list[Request] = []
        context = 0
        for request in instance.online_decodes + instance.offline_decodes:
            context += request.context
            if self.rules["mix_selection"] == "exact" or (len(selected) + 1) % 3 == 0:
                c0, c1 = decode_affine(self.scheduler_cost[instance.index], float(len(selected) + 1))
                if c0 + c1 * context > bound_s:
                    self.log("paused", request, instance)
                    break
            selected.append(request)
        return selected

    def strict_prefill(self, instance: Instance, bound_s: float) -> None:
        """(39)"""
        while len(instance.pieces) < self.max_seqs:
            fresh = not instance.partial_offline
            budget = math.floor(self.knobs[STRICT_PREFILL])
            if fresh and budget < 1:
                break
            budget = budget if fresh else max(budget, SHORTEST_PIECE)
            request = self.offered(instance) if fresh else instance.partial_offline[0]
            if request is None:
                break
            most = min(request.left, budget - instance.piece_tokens)
            tokens = self.largest_piece(instance, request, most, bound_s)
            if tokens < min(SHORTEST_PIECE, request.left):
                if fresh:
                    self.stop_at_head(instance, "piece too short (strict)", request)
                break
            if fresh and self.no_kv_for_offline(instance, request, self.knobs[PULL_KV]):
                break
            self.take_from(instance.partial_offline, request)
            self.begin_piece(instance, request, tokens)
