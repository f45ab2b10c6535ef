"""From a chosen instance to an answer: attempts booked in the instance's load, hand-over, interruption.

Every request is served by one task, its client's or the job runner's. It is interrupted by cancelling that task and
leaving the reason in ``request.interrupt``: ``gone`` (its client), ``stalled`` (its instance), ``preempted``,
``shutdown``.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable

import aiohttp

from ooco_gym.bridge.gateway.config import BridgeConfig
from ooco_gym.bridge.gateway.exchange import REFUSED, Answer, Out, exchange, usage
from ooco_gym.bridge.gateway.handover import decode_body, prefill_body
from ooco_gym.bridge.gateway.instances import Instance, InstanceError, RefusalError
from ooco_gym.bridge.gateway.ledger import Ledger
from ooco_gym.bridge.gateway.load import DECODE, PREFILL, Request
from ooco_gym.bridge.gateway.prediction import Prediction, PromptLengths

log = logging.getLogger("ooco_gym.bridge")
BACKOFF_S = 0.5  # after a refusal, or after a failed try of an offline request


class Forwarder:
    """Sends requests; ``released`` is called whenever one has left an instance."""

    def __init__(self, config: BridgeConfig, ledger: Ledger, prediction: Prediction) -> None:
        self.config, self.ledger, self.prediction = config, ledger, prediction
        self.released: Callable[[], None] = lambda: None
        self.lengths = PromptLengths(config.bytes_per_token)
        self.session: aiohttp.ClientSession | None = None

    def _headers(self, request: Request) -> dict[str, str]:
        # A restart has an id of its own: the engine may still be busy forgetting the first one.
        request_id = request.id if not request.restarts else f"{request.id}-{request.restarts + 1}"
        headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
        if self.config.upstream_key is not None:
            headers["Authorization"] = f"Bearer {self.config.upstream_key}"
        return headers

    def enter(self, instance: Instance, request: Request, phase: int) -> None:
        """Count a request where it is about to be sent."""
        request.dispatched_s = request.progress_s = self.ledger.now_s()
        request.predicted_prefill_s = self.prediction.prefill_s(instance.index, request.prompt_tokens)
        instance.load.enter(request, phase)
        if request.blind and phase == DECODE:
            instance.first_streamed += 1  # the engine will count a first token there that nobody waits for

    def leave(self, request: Request) -> None:
        """Take a request off wherever it is counted."""
        if request.load is not None:
            request.load.leave(request)
        decoder: Instance | None = request.reserved
        if decoder is not None:
            decoder.reserved -= 1
            decoder.reserved_tokens -= request.prompt_tokens
            request.reserved = None
        self.released()

    def interrupt(self, request: Request, why: str) -> None:
        """Cancel whatever the request's task waits for; it finds ``why`` in ``request.interrupt``."""
        if request.task is not None and request.interrupt is None:
            request.interrupt = why
            request.cancels += 1
            request.task.cancel()

    def met(self, request: Request) -> None:
        """The task has met its interruption: the cancellation is over."""
        request.interrupt = None
        if request.task is not None:
            for _ in range(request.cancels):
                request.task.uncancel()
        request.cancels = 0

    async def serve(
        self, request: Request, instance: Instance, decoder: Instance | None, out: Out | None
    ) -> Answer | None:
        """The whole request on one instance, or its prompt there and its decode on ``decoder``.

        Raises InstanceError and RefusalError, which say where it happened. None: the answer went to ``out``.
        """
        if decoder is None or decoder is instance:
            return await self._send(instance, request, request.body, PREFILL, out)
        body = prefill_body(request.payload, self.config.connector)
        stream, request.stream = request.stream, False  # its one token is not for the client
        try:
            answer = await self._send(instance, request, body, PREFILL, None)
        finally:
            request.stream = stream
        if answer is None or answer.status != 200:
            return answer
        self.ledger.totals.handovers += 1
        try:
            found = usage(answer.body)
            if found is not None:
                self.lengths.learn(request.path, request.payload, found[0])
            second = decode_body(request, request.payload, json.loads(answer.body), self.config.connector)
            return await self._send(decoder, request, second, DECODE, out)
        except (InstanceError, RefusalError, ValueError) as error:
            seen = out is not None and out.started
            lost = isinstance(error, InstanceError) and error.lost
            full = isinstance(error, RefusalError) and error.status in REFUSED  # KV that is lost is another status
            if not self.config.handover_fallback or seen or lost or full:
                raise
            why = {"request": request.id, "why": str(error)}
            log.warning("hand-over failed, the prompt is computed again", extra=why)
            self.ledger.totals.recomputed_handovers += 1
            return await self._send(decoder, request, request.body, PREFILL, out)

    async def _send(
        self, instance: Instance, request: Request, body: bytes, phase: int, out: Out | None
    ) -> Answer | None:
        """One attempt on one instance."""
        assert self.session is not None
        if request.load is not instance.load:
            self.enter(instance, request, phase)
        headers, most = self._headers(request), self.config.limits.max_response_bytes
        try:
            answer = await exchange(self.session, instance, request, body, headers, self.ledger, out, most)
            if not request.stream and request.phase == PREFILL:
                instance.blind_ended += 1  # its first token is among those that the next scrape counts
            return answer
        except (InstanceError, RefusalError) as error:
            error.instance = instance
            if isinstance(error, RefusalError):
                instance.refused_until_s = self.ledger.now_s() + BACKOFF_S
            elif error.lost:
                instance.fail(str(error))
            raise
        except asyncio.CancelledError:
            if request.interrupt != "stalled":
                raise
            self.met(request)
            failure = InstanceError(f"{instance.name}: no sign of life")
            failure.instance = instance
            raise failure from None
        finally:
            if request.load is instance.load:
                self.leave(request)

    def finish(self, request: Request, answer: Answer | None) -> None:
        """Book the end of a request that has its answer; None: it was streamed."""
        if answer is not None and answer.status != 200:
            self.ledger.ended(request, "refused" if answer.status < 500 else "failed")
            return
        found = request.usage if answer is None else usage(answer.body)
        if found is not None:
            request.prompt_tokens = found[0]
            self.lengths.learn(request.path, request.payload, found[0])
        self.ledger.finished(request, found[1] if found is not None else None)
