"""Role changes, failures and recoveries, cancellations."""

from __future__ import annotations

import math

from ooco_gym.cluster.control import STRICT_SHARE
from ooco_gym.cluster.state import CANCEL, FAIL
from tests.reference.model import Instance, Request

ROLE_CHANGE_INTERVAL_S = 10.0


class Disruptions:
    # --- role changes ---------------------------------------------------------------------------------------------

    def roles_differ(self) -> int:
        """(45) Strict instances wanted beyond those that are strict or will be."""
        if not (self.built_relaxed and self.built_strict):
            return 0
        pools = self.built_relaxed + self.built_strict
        wanted = math.floor(self.built_strict + self.knobs[STRICT_SHARE] * pools + 0.5)
        strict = sum(instance.becoming == "strict" for instance in self.instances)
        return min(max(wanted, 1), pools - 1) - strict

    def plan_role_change(self, last_s: float) -> None:
        """(45) At this instant, or 10 s after the last beginning."""
        self.role_change_s = max(self.now, last_s + ROLE_CHANGE_INTERVAL_S) if self.roles_differ() else math.inf

    def begin_role_change(self) -> None:
        """(45)"""
        if self.roles_differ() > 0:
            instance = [instance for instance in self.instances if instance.becoming == "relaxed"][-1]
            instance.becoming = "strict"
        else:
            instance = next(instance for instance in self.instances if instance.becoming == "strict")
            instance.becoming = "relaxed"
        self.log("drain" if instance.draining else "drain ends", None, instance)
        self.last_role_change_s = self.now
        self.plan_role_change(self.now)
        self.wake([instance])

    def drained(self, instance: Instance) -> bool:
        """(46)"""
        if instance.role == "relaxed":
            return not instance.waiting
        on_their_way = any(target is instance for source in self.instances for _, target in source.link)
        waiting = instance.inbound_online or instance.inbound_offline
        return not (instance.online_decodes or on_their_way or waiting or instance.pulled)

    def change_role(self, instance: Instance) -> None:
        """(46)"""
        instance.role = instance.becoming
        self.log(f"role change to {instance.role}", None, instance)
        self.count["role_changes"] += 1
        while instance.partial_offline:
            self.evict(instance.partial_offline[-1], instance)

    def disruption(self, kind: int, index: int) -> None:
        """(47, 48, 50)"""
        if kind == CANCEL:
            self.cancel(self.online[index])
        elif kind == FAIL:
            self.fail(self.instances[index])
        else:
            self.recover(self.instances[index])

    # --- failures -------------------------------------------------------------------------------------------------

    def fail(self, instance: Instance) -> None:
        """(47)"""
        if not instance.up:  # (49)
            return
        self.log("failure", None, instance)
        self.count["failures"] += 1
        waiting = list(reversed(instance.waiting))
        lost = self.with_kv_or_on_their_way(instance)
        self.pulls_are_off(instance)
        self.clear(instance)
        for request in waiting + lost:
            self.start_again(request, instance, had_kv=request not in waiting)
        queue = instance.inbound_online + instance.inbound_offline
        instance.inbound_online, instance.inbound_offline = [], []
        for request, source in queue:
            self.log("handed over anew", request, source)
            source.held.remove(request)
            self.hand_over(request, source)
        self.wake(self.instances)

    def with_kv_or_on_their_way(self, instance: Instance) -> list[Request]:
        """(47) In its order, waiting ones apart."""
        lists = [
            [piece.request for piece in instance.pieces],
            instance.partial_online,
            instance.partial_offline,
            instance.online_decodes,
            instance.offline_decodes,
            instance.held,
            instance.checkpoints,
            instance.restores,
            [request for request, _ in instance.link],
        ]
        for source in self.instances:
            lists.append([request for request, target in source.link if target is instance])
        return [request for requests in lists for request in reversed(requests)]

    def pulls_are_off(self, instance: Instance) -> None:
        """(47) Those granted by it, and to it."""
        for _, puller in instance.leaving:
            puller.pulled = None
        for source in self.instances:
            source.leaving = [(request, puller) for request, puller in source.leaving if puller is not instance]
        instance.leaving, instance.pulled = [], None

    def clear(self, instance: Instance) -> None:
        """Everything that is here, or on its way to or from here, leaves without a trace elsewhere."""
        for request in list(instance.held):
            self.leave_held(request, instance)
        for request, target in instance.link:
            del target.kv[request]
            self.off_the_link(request, instance, target)
        for source in self.instances:
            on_the_wire = source.link[:1]
            for request, target in [entry for entry in source.link if entry[1] is instance]:
                source.link.remove((request, target))
                del source.kv[request]
                self.off_the_link(request, source, target)
            if source.link[:1] != on_the_wire:
                self.next_on_link(source)
        for requests in (instance.kv, instance.host, instance.waiting, instance.partial_online, instance.link,
                         instance.partial_offline, instance.residents, instance.checkpoints, instance.restores,
                         instance.pieces, instance.decodes):  # fmt: skip
            requests.clear()
        instance.activity, instance.interrupted, instance.k = "down", False, 0
        instance.due_s = instance.link_end_s = instance.restore_end_s = math.inf

    def start_again(self, request: Request, failed: Instance, had_kv: bool) -> None:
        """(47)"""
        request.done = 0
        if request.cancelled:
            self.log("cancelled request leaves (failure)", request, failed)
            return
        self.count["lost"] += had_kv
        self.log("lost" if had_kv else "routed anew", request, failed)
        if request.online:
            self.route(request, at_head=True)
        else:
            self.backlog.give_back(request)

    def recover(self, instance: Instance) -> None:
        """(48)"""
        if instance.up:  # (49)
            return
        self.log("recovery", None, instance)
        instance.activity = "idle"
        self.wake([instance])

    # --- cancellations --------------------------------------------------------------------------------------------

    def cancel(self, request: Request) -> None:
        """(50)"""
        if request.rejected or request.finish_s < math.inf:
            return
        self.count["cancelled"] += 1
        request.gone_s = self.now
        here = next(instance for instance in self.instances if request in instance.waiting or request in instance.kv)
        if request in here.waiting:
            where = "waiting"
            here.waiting.remove(request)
        elif request in here.partial_online:
            where = "partial"
            here.partial_online.remove(request)
            del here.kv[request]
        elif request in here.held:
            where = "held"
            self.leave_held(request, here)
            del here.kv[request]
        elif request in here.residents:
            where = "resident"
        else:
            where = "running" if any(piece.request is request for piece in here.pieces) else "in transfer"
        self.log(f"cancelled {where}", request, here)
        if where not in ("running", "in transfer"):
            self.wake([here])
