"""The scheduler: serves online requests at once, offline ones from the backlog as the policy's knobs allow.

``placement`` chooses, ``backlog`` and ``preemption`` decide when, ``forwarding`` sends; here is a request's whole way
through them, retries elsewhere included.

An offline answer is kept until it is complete, streams too. So an offline request can be aborted and restarted from its
prompt at any time, and its client sees one answer, whole; what was thrown away is counted as wasted.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from typing import Any

from ooco_gym.bridge.gateway.backlog import Backlog, Grant
from ooco_gym.bridge.gateway.config import BridgeConfig
from ooco_gym.bridge.gateway.exchange import Answer, Out, TooLongError
from ooco_gym.bridge.gateway.forwarding import BACKOFF_S, Forwarder
from ooco_gym.bridge.gateway.handover import is_single
from ooco_gym.bridge.gateway.instances import Instance, InstanceError, RefusalError
from ooco_gym.bridge.gateway.ledger import Ledger
from ooco_gym.bridge.gateway.load import DECODE, PREFILL, Request
from ooco_gym.bridge.gateway.placement import Placement
from ooco_gym.bridge.gateway.prediction import Prediction
from ooco_gym.bridge.gateway.preemption import Preemption

log = logging.getLogger("ooco_gym.bridge")
PEAK_PERIOD_S = 15.0  # the peak of online work on an instance is remembered for one to two of these
OFFLINE_TRIES = 5  # answers of 5xx before an offline request is given up; unreachable instances do not count


class UnavailableError(Exception):
    """No instance could serve a request; ``answer`` is the last one's own, where it had one."""

    def __init__(self, reason: str, answer: Answer | None = None) -> None:
        super().__init__(reason)
        self.answer = answer


class Scheduler:
    """Owns the instances' loads, the backlog and the knobs in force; see the module's docstring."""

    def __init__(self, config: BridgeConfig, ledger: Ledger, prediction: Prediction) -> None:
        scenario = config.scenario
        self.config = config
        self.ledger = ledger
        self.prediction = prediction
        self.instances = [
            Instance(row, entry, scenario.instance_kv_blocks[row], scenario.cluster.block_tokens,
                     scenario.cluster.max_seqs, scenario.instance_saturation_batch[row])
            for row, entry in enumerate(config.instances)
        ]  # fmt: skip
        self.placement = Placement(config, self.instances, prediction)
        self.forwarder = Forwarder(config, ledger, prediction)
        self.backlog = Backlog(config, ledger, self.placement, self.forwarder)
        self.preemption = Preemption(config, ledger, prediction, self.placement, self.forwarder, self.backlog)
        # A request that leaves an instance, and a first token, may open the gate.
        self.forwarder.released = ledger.on_first_token = self.backlog.wake
        self.closing = False
        self._period_end_s = PEAK_PERIOD_S
        self._interactive: dict[Request, None] = {}  # offline requests whose client waits

    def apply(self, knobs: Mapping[str, float], rules: Mapping[str, str] | None = None) -> None:
        """Put knobs in force; they act from the next decision on."""
        self.placement.knobs.update(knobs)
        if rules is not None:
            self.placement.rules.update(rules)
        self.backlog.wake()

    # Online requests

    async def online(self, request: Request, out: Out | None) -> Answer | None:
        """Serve an online request; what the client has not seen is tried elsewhere.

        Returns None where the answer went to ``out``. Raises UnavailableError, or InstanceError after the first token.
        """
        request.task = asyncio.current_task()
        self.ledger.arrived(request, self._mean_prefill_s(request))
        how = "failed"
        try:
            answer = await self._online(request, out)
            self.forwarder.finish(request, answer)
            how = ""
            return answer
        except asyncio.CancelledError:
            how = "failed" if request.interrupt == "shutdown" else "cancelled"
            raise
        except UnavailableError as error:
            how = "refused" if error.answer is not None and error.answer.status < 500 else "failed"
            raise
        finally:
            if how:
                self.ledger.ended(request, how)

    def _mean_prefill_s(self, request: Request) -> float:
        return self.prediction.prefill_s(self.placement.prefilling[0].index, request.prompt_tokens)

    async def _online(self, request: Request, out: Out | None) -> Answer | None:
        tried: list[Instance] = []
        last: Answer | None = None
        reason = "no instance is up"
        again = True  # a connection that broke without a word may be tried once more where there is nowhere else
        while True:
            instance, decoder = self._choose(request, tried)
            if instance is None:
                if not (again and last is None and tried):
                    raise UnavailableError(reason, last)
                again = False
                tried.clear()
                continue
            try:
                self.preemption.make_way(instance, request, PREFILL)
                if decoder is not None:
                    self.preemption.make_way(decoder, request, DECODE)
                return await self.forwarder.serve(request, instance, decoder, out)
            except (InstanceError, RefusalError) as error:
                if out is not None and out.started:
                    raise
                if isinstance(error, RefusalError):
                    last = Answer(error.status, error.content_type, error.body)
                elif error.answer is not None:
                    last = error.answer
                reason = str(error)
                tried.append(error.instance or instance)
                self.ledger.totals.retries += 1
                log.warning("tried elsewhere", extra={"request": request.id, "why": reason})

    def _choose(self, request: Request, tried: list[Instance]) -> tuple[Instance | None, Instance | None]:
        """(prefill instance, decode instance or None for the whole request)."""
        placement = self.placement
        if not placement.disaggregated or not request.single or request.max_tokens == 1:
            return placement.route(request, tried, whole=True), None
        decoder = placement.decoder(tried, online=True)
        instance = placement.route(request, tried)
        if instance is not None and decoder is not None:
            return instance, decoder
        # One pool is gone: the other one serves whole requests, where that is allowed.
        return (placement.route(request, tried, whole=True) if self.config.handover_fallback else None), None

    # Offline requests

    async def complete(self, path: str, body: Mapping[str, Any], request_id: str) -> tuple[int, dict[str, Any]]:
        """Run one offline request of a job to its end: HTTP status and JSON body of its answer."""
        payload = {key: value for key, value in body.items() if key not in ("stream", "stream_options")}
        raw = json.dumps(payload, separators=(",", ":")).encode()
        request = Request(
            request_id, path, raw, False, False, self.forwarder.lengths.estimate(path, payload), most_tokens(payload)
        )
        request.payload, request.single = payload, is_single(payload)
        answer = await self.offline(request, job=True)
        try:
            content = json.loads(answer.body)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            text = answer.body[:200].decode("utf-8", "replace")
            content = {"error": {"message": f"the answer is not a JSON object: {text}", "type": "server_error",
                                 "param": None, "code": answer.status}}  # fmt: skip
            return (answer.status if answer.status != 200 else 502), content
        return answer.status, content

    async def offline(self, request: Request, job: bool = False) -> Answer:
        """Serve an offline request through the backlog, restarted as often as it takes; its whole answer.

        Raises UnavailableError at shutdown, CancelledError when its client or the runner gives it up.
        """
        request.task = asyncio.current_task()
        self.ledger.arrived(request, self._mean_prefill_s(request))
        if not job:
            self._interactive[request] = None
        self.backlog.put(request)
        failures = 0
        how = "cancelled"
        try:
            while True:
                if self.closing and not job:
                    raise UnavailableError("the gateway is shutting down")
                try:
                    grant: Grant = await request.grant
                    answer = await self.forwarder.serve(request, grant.instance, grant.decoder, None)
                    assert answer is not None
                    self.forwarder.finish(request, answer)
                    how = ""
                    return answer
                except asyncio.CancelledError:
                    if request.interrupt == "shutdown":
                        self.forwarder.met(request)
                        raise UnavailableError("the gateway is shutting down") from None
                    if request.interrupt != "preempted":
                        raise
                    self.forwarder.met(request)
                except TooLongError:
                    how = "failed"
                    limit = self.config.limits.max_response_bytes
                    return _error_answer(502, f"the answer exceeds limits.max_response_bytes ({limit})")
                except (InstanceError, RefusalError) as error:
                    own: Answer | None = error.answer if isinstance(error, InstanceError) else None
                    failures += own is not None
                    if failures >= OFFLINE_TRIES and own is not None:
                        how = "failed"
                        return own
                    log.warning("offline request requeued", extra={"request": request.id, "why": str(error)})
                    self.ledger.totals.retries += 1
                    lost_prompt = request.prompt_tokens if request.output_tokens else 0
                    self.ledger.restarted(request, lost_prompt, request.output_tokens)
                    await asyncio.sleep(0 if isinstance(error, RefusalError) else BACKOFF_S)
                    self.backlog.put(request, head=True)
        finally:
            self.forwarder.leave(request)
            self._interactive.pop(request, None)
            self.backlog.drop(request)
            if how:
                self.ledger.ended(request, how)
            self.backlog.wake()

    # Watching

    def after_scrape(self, instance: Instance) -> None:
        """What a new scrape of an instance, or a missing one, means for the requests there."""
        if instance.scrape is None or instance.scrape.first_tokens is None:
            self._assume_prefilled(instance)
        self._learn(instance)
        self.preemption.relieve(instance)
        self.backlog.wake()

    def _learn(self, instance: Instance) -> None:
        """Correct predicted iterations by the engine's gaps between tokens, at the mean load between two scrapes."""
        load = instance.load
        decodes, tokens = load.online_decodes + load.offline_decodes, load.tokens
        if instance.gaps is not None and self.config.cost_correction:
            batch = (decodes + instance.decodes_at_scrape[0]) / 2.0
            context = (tokens + instance.decodes_at_scrape[1]) / 2.0
            self.prediction.observed(instance.index, *instance.gaps, batch, context)
        instance.gaps, instance.decodes_at_scrape = None, (decodes, tokens)

    def _assume_prefilled(self, instance: Instance) -> None:
        """Without the engine's count of first tokens the prediction says which unstreamed requests decode."""
        now_s = self.ledger.now_s()
        for request in list(instance.load.requests):
            late = now_s - request.dispatched_s > request.predicted_prefill_s
            if late and request.blind and request.phase != DECODE:
                instance.load.prefilled(request)

    def sweep(self) -> None:
        """Give up on instances that went silent and on clients that do not read."""
        now_s, timeouts = self.ledger.now_s(), self.config.timeouts
        next_period = now_s >= self._period_end_s
        if next_period:
            self._period_end_s = now_s + PEAK_PERIOD_S
        for instance in self.instances:
            if next_period:
                instance.load.next_period()
            for request in list(instance.load.requests):
                silent_s = now_s - request.progress_s
                dead = not instance.up and silent_s > 2.0 * timeouts.probe_s
                idle = request.phase == DECODE and not request.blind and silent_s > timeouts.idle_s
                if request.blocked_s > 0.0:
                    if now_s - request.blocked_s > timeouts.client_s:
                        self.forwarder.interrupt(request, "gone")
                elif dead or idle:
                    self.forwarder.interrupt(request, "stalled")

    def begin_shutdown(self) -> None:
        """No more offline work: interactive requests are aborted. Jobs end with their runner, which owns them."""
        self.closing = True
        self.backlog.close()
        for request in list(self._interactive):
            self.forwarder.interrupt(request, "shutdown")

    def end_online(self) -> None:
        """The time to drain is over: what still runs gets an error."""
        for request in list(self.ledger.live):
            self.forwarder.interrupt(request, "shutdown")


def most_tokens(payload: Mapping[str, Any]) -> int | None:
    """The most output tokens that a body asks for, if it says so."""
    value = payload.get("max_completion_tokens", payload.get("max_tokens"))
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _error_answer(status: int, message: str) -> Answer:
    error = {"message": message, "type": "server_error", "param": None, "code": status}
    return Answer(status, "application/json", json.dumps({"error": error}).encode())
