"""The backlog: offline requests that wait until the gate or a pull sends them to an instance.

``placement`` says who may go where; here is when it is asked: whenever something may have made room (``wake``), and
from time to time while anything waits, because pulls are a time apart and refusals wear off.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from ooco_gym.bridge.gateway.config import BridgeConfig
from ooco_gym.bridge.gateway.forwarding import BACKOFF_S, Forwarder
from ooco_gym.bridge.gateway.instances import Instance
from ooco_gym.bridge.gateway.ledger import Ledger
from ooco_gym.bridge.gateway.load import PREFILL, Request
from ooco_gym.bridge.gateway.placement import Placement


@dataclass(frozen=True)
class Grant:
    """Where an offline request may run: wholly on ``instance``, or handed over to ``decoder`` after its prefill."""

    instance: Instance
    decoder: Instance | None = None


class Backlog:
    """Waiting offline requests, first come first served; one that was interrupted waits at the head."""

    def __init__(self, config: BridgeConfig, ledger: Ledger, placement: Placement, forwarder: Forwarder) -> None:
        self.config, self.ledger, self.placement, self.forwarder = config, ledger, placement, forwarder
        self.waiting: deque[Request] = deque()
        self._closed = self._due = False
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self.waiting)

    def __iter__(self) -> Iterator[Request]:
        return iter(self.waiting)

    def put(self, request: Request, head: bool = False) -> None:
        """Let a request wait; it awaits ``request.grant``."""
        request.grant = asyncio.get_running_loop().create_future()
        if head:
            self.waiting.appendleft(request)
        else:
            self.waiting.append(request)
        self.wake()

    def drop(self, request: Request) -> None:
        """A request is given up, whether it waits or not."""
        if request.grant.cancelled() or not request.grant.done():  # else it is not here
            with suppress(ValueError):
                self.waiting.remove(request)

    def close(self) -> None:
        """Send nothing any more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()

    def wake(self) -> None:
        """Look for places once the running callback is over."""
        if self.waiting and not self._due and not self._closed:
            self._due = True
            asyncio.get_running_loop().call_soon(self.send)

    def send(self) -> None:
        """Send requests wherever the gate and the pull allow, from the head."""
        self._due = False
        now_s = self.ledger.now_s()
        while self.waiting and not self._closed:
            if not (self._through_gate(now_s) or self._pull(now_s)):
                break
        if self.waiting and self._timer is None and not self._closed:
            wait_s = min(self.placement.pull_interval_s, BACKOFF_S)
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._later)

    def _later(self) -> None:
        self._timer = None
        self.wake()

    def _through_gate(self, now_s: float) -> bool:
        head = self.waiting[0]
        if self.config.dry_run:
            instance = self.placement.route(head, ())
            if instance is None or len(instance.load.requests) >= instance.max_seqs:
                return False
            self._grant(self.waiting.popleft(), instance)
            return True
        instance = self.placement.gate(head, now_s)
        if instance is None:
            return False
        self._grant(self.waiting.popleft(), instance, self._handover_target(head, now_s))
        return True

    def _handover_target(self, request: Request, now_s: float) -> Instance | None:
        """With a connector: the strict instance that pulls this request when its prefill ends."""
        placement = self.placement
        if self.config.connector == "none" or not request.single or request.max_tokens == 1:
            return None
        if placement.rules["offline_decode"] == "strict":
            return placement.decoder((), online=False)
        if self.config.pull_mode != "handover":
            return None
        asking = [
            strict for strict in placement.strict if placement.pulls(strict, now_s) and placement.fits(strict, request)
        ]
        return self._pulled(min(asking, key=lambda strict: (strict.kv_usage(), strict.index), default=None), now_s)

    def _pulled(self, strict: Instance | None, now_s: float) -> Instance | None:
        if strict is not None:
            strict.next_pull_s = now_s + self.placement.pull_interval_s
            self.ledger.totals.pulls += 1
        return strict

    def _pull(self, now_s: float) -> bool:
        """Without a connector: a strict instance computes the prompt of a waiting request itself."""
        if self.config.pull_mode != "recompute" or self.config.dry_run:
            return False
        for strict in self.placement.strict if self.placement.relaxed else ():
            if self.placement.pulls(strict, now_s):
                request = self.placement.preferred(strict, self.waiting)
                if request is not None:
                    self.waiting.remove(request)
                    self._grant(request, strict)
                    self._pulled(strict, now_s)
                    return True
        return False

    def _grant(self, request: Request, instance: Instance, decoder: Instance | None = None) -> None:
        if request.grant.done():
            return  # its task was cancelled and has not run since
        if not request.restarts:
            self.ledger.taken(request)
        if decoder is not None:
            decoder.reserved += 1
            decoder.reserved_tokens += request.prompt_tokens
            request.reserved = decoder
        self.forwarder.enter(instance, request, PREFILL)
        request.grant.set_result(Grant(instance, decoder))
