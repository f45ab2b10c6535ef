"""Preemption by abort and restart: offline requests in the way of an online one go back to the head of the backlog.

Closing the connection cancels a request in vLLM at its next iteration. Its prompt is computed again later, and what was
thrown away is counted as wasted.
"""

from __future__ import annotations

from ooco_gym.bridge.gateway.backlog import Backlog
from ooco_gym.bridge.gateway.config import BridgeConfig
from ooco_gym.bridge.gateway.forwarding import Forwarder
from ooco_gym.bridge.gateway.instances import Instance
from ooco_gym.bridge.gateway.ledger import Ledger
from ooco_gym.bridge.gateway.load import DECODE, Request
from ooco_gym.bridge.gateway.placement import Placement
from ooco_gym.bridge.gateway.prediction import Prediction


class Preemption:
    """Makes way for online requests on the instances that they are sent to."""

    def __init__(
        self, config: BridgeConfig, ledger: Ledger, prediction: Prediction, placement: Placement,
        forwarder: Forwarder, backlog: Backlog,
    ) -> None:  # fmt: skip
        self.config, self.ledger, self.prediction = config, ledger, prediction
        self.placement, self.forwarder, self.backlog = placement, forwarder, backlog

    def make_way(self, instance: Instance, request: Request, phase: int) -> None:
        """Count an arrival where it goes, and abort the offline requests in its way there."""
        if self.config.dry_run or not instance.load.offline or request.load is not None:
            return
        self.forwarder.enter(instance, request, phase)
        victims = self.placement.in_the_way(instance, request, self.ledger.now_s())
        instance.load.leave(request)
        if request.blind and phase == DECODE:
            instance.first_streamed -= 1
        for victim in victims:
            self.preempt(victim, instance)

    def relieve(self, instance: Instance) -> None:
        """An online request that the engine keeps waiting for room shows that an estimate was wrong: make room now."""
        scrape, load = instance.scrape, instance.load
        if scrape is None or self.config.dry_run or self.placement.rules["preemption"] == "iteration":
            return
        stuck = [other for other in load.requests if other.online and other.phase != DECODE
                 and other.dispatched_s < self.ledger.now_s() - self.config.scrape_interval_s]  # fmt: skip
        if scrape.waiting > 0 and stuck and load.offline:
            newest_first = [other for other in reversed(load.requests) if not other.online]
            for victim in newest_first[: len(stuck)]:
                self.preempt(victim, instance)

    def preempt(self, request: Request, instance: Instance) -> None:
        """Abort an offline request and put it back at the head of the backlog."""
        if request.interrupt is not None:
            return  # it is leaving already
        prompt, output = self._done(request, instance)
        self.forwarder.interrupt(request, "preempted")
        self.forwarder.leave(request)
        self.ledger.restarted(request, prompt, output)
        self.ledger.totals.preemptions += 1
        self.backlog.put(request, head=True)

    def _done(self, request: Request, instance: Instance) -> tuple[int, int]:
        """(prompt, output) tokens that an abort throws away; estimated by the prediction where nothing was seen."""
        elapsed_s = self.ledger.now_s() - request.dispatched_s
        if request.phase != DECODE:
            return int(request.prompt_tokens * min(elapsed_s / max(request.predicted_prefill_s, 1e-9), 1.0)), 0
        if not request.blind:
            return request.prompt_tokens, request.output_tokens
        load = instance.load
        step_s = self.prediction.decode_s(instance.index, load.online_decodes + load.offline_decodes, load.tokens)
        output = int(max(elapsed_s - request.predicted_prefill_s, 0.0) / max(step_s, 1e-9))
        return request.prompt_tokens, min(output, request.max_tokens or output)
