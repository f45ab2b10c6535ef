"""Requests on their way: routing of arrivals, hand-over after prefill, pulls that leave, transfers."""

from __future__ import annotations

import math

from ooco_gym.roofline.cost import prefill_s
from tests.reference.model import Instance, Request


class Moves:
    def choice(self, role: str) -> list[Instance]:
        """(35) The instances of a role among which is chosen."""
        members = [instance for instance in self.instances if instance.role == role]
        up = [instance for instance in members if instance.up]
        return [instance for instance in up if instance.available] or up or members

    # --- routing --------------------------------------------------------------------------------------------------

    def online_arrival(self, request: Request) -> None:
        self.next_online += 1
        if request.prompt + request.output > self.most_tokens:  # (4)
            request.rejected = True
            self.count["rejected_online"] += 1
            self.events.append((self.now, "rejected", request, -1))
            return
        self.preempt(request, self.route(request, at_head=False))

    def pending_s(self, instance: Instance) -> float:
        """(19)"""
        running = [piece.request for piece in instance.pieces if piece.request.online]
        cost = self.scheduler_cost[instance.index]
        pending = instance.waiting + instance.partial_online + running
        units = [math.floor(prefill_s(cost, float(request.context)) * 2**40) for request in pending]
        return sum(units) / 2**40  # whole units of 2^-40 s, so that equal loads are ties

    def route(self, request: Request, at_head: bool) -> Instance:
        """(19)"""
        choice = self.choice("relaxed" if self.built_relaxed else "unified")
        if self.rules["routing"] == "round_robin":
            instance = next((later for later in choice if later.index > self.routed_last), choice[0])
        else:
            instance = min(choice, key=lambda candidate: (self.pending_s(candidate), candidate.index))
        self.routed_last = instance.index
        instance.waiting.insert(0 if at_head else len(instance.waiting), request)
        if not instance.up:
            self.log("routed to an instance that is down", request, instance)
        self.wake([instance])
        return instance

    # --- hand-over ------------------------------------------------------------------------------------------------

    def hand_over(self, request: Request, source: Instance) -> None:
        """(17)"""
        everything = not request.online or self.rules["placement"] == "least_kv"
        target = min(self.choice("strict"), key=lambda instance: (instance.share(everything), instance.index))
        online_queue = request.online or self.rules["prefill_order"] == "fcfs"
        before = target.inbound_online if online_queue else target.inbound_online + target.inbound_offline
        if target is source:
            self.log("hand-over to itself", request, source)
            self.join(request, source)
        elif target.up and not before and self.blocks(request.context) <= target.free:
            self.start_transfer(request, source, target)
        else:
            self.log("held", request, source)
            source.held.append(request)
            (target.inbound_online if online_queue else target.inbound_offline).append((request, source))
            self.wake([target])

    def leave_held(self, request: Request, source: Instance) -> None:
        """A held request waits no more; its target is woken (31), as the next of the queue may fit."""
        source.held.remove(request)
        for target in self.instances:
            for queue in (target.inbound_online, target.inbound_offline):
                if (request, source) in queue:
                    queue.remove((request, source))
                    self.wake([target])

    # --- transfers ------------------------------------------------------------------------------------------------

    def pulls_leave(self, instance: Instance) -> None:
        """(29)"""
        leaving, instance.leaving = instance.leaving, []
        for request, puller in sorted(leaving, key=lambda pull: pull[1].index):
            if request in instance.residents and self.blocks(request.context) <= puller.free:
                self.depart(request, instance)
                self.count["migrations"] += 1
                self.start_transfer(request, instance, puller)
            else:
                self.log("pull off", request, instance)
                puller.pulled = None

    def start_transfer(self, request: Request, source: Instance, target: Instance) -> None:
        """(30)"""
        self.log("transfer start", request, source)
        target.kv[request] = self.blocks(request.context)
        source.link.append((request, target))
        if len(source.link) == 1:
            self.next_on_link(source)

    def next_on_link(self, source: Instance) -> None:
        source.link_end_s = math.inf
        if source.link:
            size = (source.link[0][0].context - 1) * self.kv_bytes_per_token
            source.link_end_s = self.now + (self.link_latency_s + size / self.link_bytes_per_s)

    def transfer_end(self, source: Instance) -> None:
        """(30, 50)"""
        request, target = source.link.pop(0)
        self.next_on_link(source)
        self.log("transfer end", request, target)
        del source.kv[request]
        if request.cancelled:
            self.log("cancelled request leaves (transfer)", request, target)
            del target.kv[request]
        else:
            self.join(request, target)
        self.off_the_link(request, source, target)
        self.wake([source, target])

    def off_the_link(self, request: Request, source: Instance, target: Instance) -> None:
        """A pull or a push that has ended, or was lost (47)."""
        if target.pulled is request:
            target.pulled = None
        if source.pushed is request:
            source.pushed = None
