"""KV: who holds it, who loses it when it runs short, and the checkpoints in host memory."""

from __future__ import annotations

import math

from ooco_gym.cluster.control import KV_RESERVE, PULL_KV, STRICT_PREFILL
from tests.reference.model import Instance, Request


class Memory:
    def blocks(self, tokens: int) -> int:
        return math.ceil(tokens / self.block_tokens)  # (1)

    def join(self, request: Request, instance: Instance) -> None:
        instance.residents.append(request)
        instance.k = 0  # (24) the residents change

    def depart(self, request: Request, instance: Instance) -> None:
        instance.residents.remove(request)
        if request in instance.decodes:
            instance.decodes.remove(request)
        instance.k = 0

    def cancelled_leave(self, instance: Instance) -> None:
        """(50) Residents that were cancelled."""
        for request in [request for request in instance.residents if request.cancelled]:
            self.log("cancelled request leaves (resident)", request, instance)
            self.depart(request, instance)
            del instance.kv[request]

    # --- eviction -------------------------------------------------------------------------------------------------

    def evict(self, request: Request, instance: Instance) -> None:
        """(31)"""
        prefilled = True
        if request in instance.residents:
            what = "online" if request.online else "offline"
            self.depart(request, instance)
        elif request in instance.held:
            what = "held"
            self.leave_held(request, instance)
        else:
            what, prefilled = "online partial" if request.online else "offline partial", False
            (instance.partial_online if request.online else instance.partial_offline).remove(request)
        self.log(f"eviction of {what} ({instance.role})", request, instance)
        self.count["evictions"] += 1
        del instance.kv[request]
        request.done = 0
        if request.online:
            self.route(request, at_head=True)
        elif prefilled and self.host_has_room(request, instance):
            self.checkpoint(request, instance)
        else:
            self.backlog.give_back(request)
            self.wake_takers()

    def wake_takers(self) -> None:
        """(32)"""
        strict_takes = self.knobs[STRICT_PREFILL] >= 1
        self.wake([instance for instance in self.instances if instance.role != "strict" or strict_takes])

    def make_room(self, need: int, instance: Instance) -> bool:
        """(37) Offline work gives way until ``need`` blocks are free or none of it is left; True if they are free."""
        while need > instance.free:
            giving_way = instance.partial_offline or instance.offline_decodes
            giving_way = giving_way or [request for request in instance.held if not request.online]
            if not giving_way:
                return False
            self.evict(giving_way[-1], instance)
        return True

    def grow(self, instance: Instance) -> None:
        """(26)"""
        while True:
            needed = sum(self.blocks(request.context) - instance.kv[request] for request in instance.decodes)
            if needed <= instance.free:
                break
            if self.rules["eviction"] == "offline_first":
                order = (
                    instance.partial_offline,
                    instance.offline_decodes,
                    instance.partial_online,
                    instance.residents,
                )
            else:
                order = (instance.partial_offline, instance.partial_online, instance.residents)
            first = next(requests for requests in order if requests)
            self.evict(first[-1], instance)
        for request in instance.decodes:
            instance.kv[request] = self.blocks(request.context)

    # --- host memory ----------------------------------------------------------------------------------------------

    def host_has_room(self, request: Request, instance: Instance) -> bool:
        """(43)"""
        if self.rules["evicted_kv"] != "host":
            return False
        if sum(instance.host.values()) + self.blocks(request.context) <= instance.host_blocks:
            return True
        self.log("host memory full", request, instance)
        return False

    def checkpoint(self, request: Request, instance: Instance) -> None:
        """(43)"""
        self.log("checkpoint", request, instance)
        self.count["checkpoints"] += 1
        instance.host[request] = self.blocks(request.context)
        instance.checkpoints.insert(0, request)
        self.wake([instance])

    def start_restores(self, instance: Instance) -> None:
        """(44)"""
        strict = instance.role == "strict"
        most = self.knobs[PULL_KV] if strict else 1 - self.knobs[KV_RESERVE]
        if instance.waiting or instance.inbound_online or instance.inbound_offline:
            return
        while instance.checkpoints and (strict or self.gate_open(instance)):
            request = instance.checkpoints[0]
            need = self.blocks(request.context)
            if instance.used and instance.used + need > most * instance.kv_blocks:
                self.log("no KV for restore", request, instance)
                break
            instance.checkpoints.pop(0)
            instance.kv[request] = need
            instance.restores.append(request)
            self.log("restore start", request, instance)
            if len(instance.restores) == 1:
                self.next_restore(instance)

    def next_restore(self, instance: Instance) -> None:
        instance.restore_end_s = math.inf
        if instance.restores:
            size = (instance.restores[0].context - 1) * self.kv_bytes_per_token
            instance.restore_end_s = self.now + size / self.host_bytes_per_s

    def restore_end(self, instance: Instance) -> None:
        """(44)"""
        request = instance.restores.pop(0)
        self.next_restore(instance)
        self.log("restore", request, instance)
        self.count["restores"] += 1
        del instance.host[request]
        self.join(request, instance)
        self.wake([instance])
