"""The scheduler: serves online requests at once, offline ones from a backlog as the policy's knobs allow.

Placement chooses, ``exchange`` moves bytes; here is what happens in between: hand-over, retry elsewhere, preemption by
abort and restart, the backlog. Every request is served by one task, its client's or the job runner's; the scheduler
interrupts it by cancelling that task and leaving the reason in ``request.interrupt``.

An offline answer is kept until it is complete, streams too. So an offline request can be aborted and restarted from its
prompt at any time, and its client sees one answer, whole; what was thrown away is counted as wasted.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import aiohttp

from ooco_gym.bridge.config import BridgeConfig
from ooco_gym.bridge.exchange import Answer, Out, TooLong, exchange, usage
from ooco_gym.bridge.instances import Instance, InstanceFailure, Refusal, decode_body, prefill_body
from ooco_gym.bridge.ledger import DECODE, PREFILL, Ledger, Request
from ooco_gym.bridge.placement import Placement
from ooco_gym.bridge.prediction import Prediction, PromptLengths

log = logging.getLogger("ooco_gym.bridge")
OFFLINE_TRIES = 5  # answers of 5xx before an offline request is given up; unreachable instances do not count
BACKOFF_S = 0.5  # after a refusal, or after a failed try of an offline request


class Unavailable(Exception):
    """No instance could serve a request; ``answer`` is the last one's own, where it had one."""

    def __init__(self, reason: str, answer: Answer | None = None) -> None:
        super().__init__(reason)
        self.answer = answer


@dataclass(frozen=True)
class Grant:
    """Where an offline request may run: wholly on ``instance``, or handed over to ``decoder`` after its prefill."""

    instance: Instance
    decoder: Instance | None = None


class Scheduler:
    """Owns the instances' loads, the backlog and the knobs in force; see the module's docstring."""

    def __init__(self, config: BridgeConfig, ledger: Ledger, prediction: Prediction) -> None:
        scenario = config.scenario
        self.config = config
        self.ledger = ledger
        self.prediction = prediction
        self.lengths = PromptLengths(config.bytes_per_token)
        self.instances = [
            Instance(row, entry, scenario.instance_kv_blocks[row], scenario.cluster.block_tokens,
                     scenario.cluster.max_seqs, scenario.instance_saturation_batch[row])
            for row, entry in enumerate(config.instances)
        ]  # fmt: skip
        self.placement = Placement(config, self.instances, prediction)
        self.backlog: deque[Request] = deque()
        self.session: aiohttp.ClientSession | None = None
        ledger.on_first_token = self.wake  # it may open the gate
        self.closing = False
        self._interactive: dict[Request, None] = {}  # offline requests whose client waits
        self._due = False
        self._timer: asyncio.TimerHandle | None = None

    def apply(self, knobs: Mapping[str, float], rules: Mapping[str, str] | None = None) -> None:
        """Put knobs in force; they act from the next decision on."""
        self.placement.knobs.update(knobs)
        if rules is not None:
            self.placement.rules.update(rules)
        self.wake()

    # Forwarding

    def _headers(self, request: Request) -> dict[str, str]:
        # A restart has an id of its own: the engine may still be busy forgetting the first one.
        request_id = request.id if not request.restarts else f"{request.id}-{request.restarts + 1}"
        headers = {"Content-Type": "application/json", "X-Request-Id": request_id}
        if self.config.upstream_key is not None:
            headers["Authorization"] = f"Bearer {self.config.upstream_key}"
        return headers

    async def _send(
        self, instance: Instance, request: Request, body: bytes, phase: int, out: Out | None
    ) -> Answer | None:
        """One attempt on one instance, booked in its load. An exception says which instance it came from."""
        assert self.session is not None
        if request.load is not instance.load:
            self._enter(instance, request, phase)
        most = self.config.limits.max_response_bytes
        try:
            headers = self._headers(request)
            answer = await exchange(self.session, instance, request, body, headers, self.ledger, out, most)
            if not request.stream and request.phase == PREFILL:
                instance.blind_ended += 1  # its first token is among those that the next scrape counts
            return answer
        except (InstanceFailure, Refusal) as error:
            error.instance = instance
            if isinstance(error, Refusal):
                instance.refused_until_s = self.ledger.now_s() + BACKOFF_S
            elif error.lost:
                instance.fail(str(error))
            raise
        except asyncio.CancelledError:
            if request.interrupt != "stalled":
                raise
            self._seen(request)
            failure = InstanceFailure(f"{instance.name}: no sign of life")
            failure.instance = instance
            raise failure from None
        finally:
            self._leave(instance, request)

    def _enter(self, instance: Instance, request: Request, phase: int) -> None:
        request.dispatched_s = request.progress_s = self.ledger.now_s()
        request.predicted_prefill_s = self.prediction.prefill_s(instance.index, request.prompt_tokens)
        instance.load.enter(request, phase)
        if request.blind and phase == DECODE:
            instance.first_streamed += 1  # the engine will count a first token there that nobody waits for

    def _leave(self, instance: Instance, request: Request) -> None:
        if request.load is instance.load:
            instance.load.leave(request)
        self._unreserve(request)
        self.wake()

    def _unreserve(self, request: Request) -> None:
        decoder: Instance | None = request.reserved
        if decoder is not None:
            decoder.reserved -= 1
            decoder.reserved_tokens -= request.prompt_tokens
            request.reserved = None

    def _seen(self, request: Request) -> None:
        """The task has met its interruption: the cancellation is over."""
        request.interrupt = None
        if request.task is not None:
            for _ in range(request.cancels):
                request.task.uncancel()
        request.cancels = 0

    def interrupt(self, request: Request, why: str) -> None:
        """Cancel whatever the request's task waits for; it finds ``why`` in ``request.interrupt``."""
        if request.task is not None and request.interrupt is None:
            request.interrupt = why
            request.cancels += 1
            request.task.cancel()

    async def _serve(self, request: Request, instance: Instance, decoder: Instance | None, out: Out | None) -> Answer | None:
        """The whole request on one instance, or its prompt there and its decode on ``decoder``."""
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
                self._learn(request, found[0])
            second = decode_body(request, request.payload, json.loads(answer.body), self.config.connector)
            return await self._send(decoder, request, second, DECODE, out)
        except (InstanceFailure, ValueError) as error:
            fresh = out is None or not out.started
            lost = isinstance(error, InstanceFailure) and error.lost
            if not self.config.handover_fallback or not fresh or lost:
                raise
            log.warning("hand-over failed, the prompt is computed again", extra={"request": request.id, "why": str(error)})
            self.ledger.totals.recomputed_handovers += 1
            return await self._send(decoder, request, request.body, PREFILL, out)

    def _learn(self, request: Request, prompt_tokens: int) -> None:
        self.lengths.learn(request.path, request.payload, prompt_tokens)

    def _finish(self, request: Request, answer: Answer | None) -> None:
        """Book the end of a request that has its answer."""
        if answer is not None and answer.status != 200:
            self.ledger.ended(request, "refused" if answer.status < 500 else "failed")
            return
        found = request.usage if answer is None else usage(answer.body)
        if found is not None:
            request.prompt_tokens = found[0]
            self._learn(request, found[0])
        self.ledger.finished(request, found[1] if found is not None else None)

    # Online requests

    async def online(self, request: Request, out: Out | None) -> Answer | None:
        """Serve an online request; what the client has not seen is tried elsewhere.

        Returns None where the answer went to ``out``. Raises Unavailable, or InstanceFailure after the first token.
        """
        request.task = asyncio.current_task()
        self.ledger.arrived(request, self._mean_prefill_s(request))
        how = "failed"
        try:
            answer = await self._online(request, out)
            self._finish(request, answer)
            how = ""
            return answer
        except asyncio.CancelledError:
            how = "failed" if request.interrupt == "shutdown" else "cancelled"
            raise
        except Unavailable as error:
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
                    raise Unavailable(reason, last)
                again = False
                tried.clear()
                continue
            try:
                self._make_way(instance, request, PREFILL)
                if decoder is not None:
                    self._make_way(decoder, request, DECODE)
                return await self._serve(request, instance, decoder, out)
            except (InstanceFailure, Refusal) as error:
                if out is not None and out.started:
                    raise
                if isinstance(error, Refusal):
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

    def _make_way(self, instance: Instance, request: Request, phase: int) -> None:
        """Count the arrival where it goes, and abort the offline requests in its way there."""
        if self.config.dry_run or not instance.load.offline:
            return
        entered = request.load is None
        if entered:
            self._enter(instance, request, phase)
            victims = self.placement.in_the_way(instance, request, self.ledger.now_s())
            instance.load.leave(request)
            if request.blind and phase == DECODE:
                instance.first_streamed -= 1
        else:
            victims = []
        for victim in victims:
            self._preempt(victim, instance)

    def _preempt(self, request: Request, instance: Instance) -> None:
        """Abort an offline request and put it back at the head of the backlog."""
        if request.interrupt is not None:
            return  # it is leaving already
        prompt, output = self._done(request, instance)
        self.interrupt(request, "preempted")
        instance.load.leave(request)
        self._unreserve(request)
        self.ledger.restarted(request, prompt, output)
        self.ledger.totals.preemptions += 1
        self._queue(request, head=True)

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

    # Offline requests

    async def complete(self, path: str, body: Mapping[str, Any], request_id: str) -> tuple[int, dict[str, Any]]:
        """Run one offline request of a job to its end: HTTP status and JSON body of its answer."""
        payload = {key: value for key, value in body.items() if key not in ("stream", "stream_options")}
        raw = json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode()
        request = Request(request_id, path, raw, False, False, self.lengths.estimate(path, payload), most_tokens(payload))
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

        Raises Unavailable at shutdown, CancelledError when its client or the runner gives it up.
        """
        request.task = asyncio.current_task()
        self.ledger.arrived(request, self._mean_prefill_s(request))
        if not job:
            self._interactive[request] = None
        self._queue(request, head=False)
        failures = 0
        how = "cancelled"
        try:
            while True:
                if self.closing and not job:
                    raise Unavailable("the gateway is shutting down")
                try:
                    grant: Grant = await request.grant
                    answer = await self._serve(request, grant.instance, grant.decoder, None)
                    assert answer is not None
                    self._finish(request, answer)
                    how = ""
                    return answer
                except asyncio.CancelledError:
                    if request.interrupt == "shutdown":
                        self._seen(request)
                        raise Unavailable("the gateway is shutting down") from None
                    if request.interrupt != "preempted":
                        raise
                    self._seen(request)
                except TooLong:
                    how = "failed"
                    limit = self.config.limits.max_response_bytes
                    return _error_answer(502, f"the answer exceeds limits.max_response_bytes ({limit})")
                except (InstanceFailure, Refusal) as error:
                    own = error.answer if isinstance(error, InstanceFailure) else None
                    failures += own is not None
                    if failures >= OFFLINE_TRIES and own is not None:
                        how = "failed"
                        return own
                    log.warning("offline request requeued", extra={"request": request.id, "why": str(error)})
                    self.ledger.totals.retries += 1
                    lost_prompt = request.prompt_tokens if request.output_tokens else 0
                    self.ledger.restarted(request, lost_prompt, request.output_tokens)
                    await asyncio.sleep(0 if isinstance(error, Refusal) else BACKOFF_S)
                    self._queue(request, head=True)
        finally:
            if request.load is not None:
                request.load.leave(request)
            self._unreserve(request)
            self._interactive.pop(request, None)
            with suppress(ValueError):
                self.backlog.remove(request)
            if how:
                self.ledger.ended(request, how)
            self.wake()

    def _queue(self, request: Request, head: bool) -> None:
        request.grant = asyncio.get_running_loop().create_future()
        if head:
            self.backlog.appendleft(request)
        else:
            self.backlog.append(request)
        self.wake()

    def wake(self) -> None:
        """Look at the backlog once the running callback is over."""
        if self.backlog and not self._due and not self.closing:
            self._due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        """Send offline requests wherever the gate and the pull allow, from the head of the backlog."""
        self._due = False
        now_s = self.ledger.now_s()
        while self.backlog and not self.closing:
            if not (self._through_gate(now_s) or self._pull(now_s)):
                break
        if self.backlog and self._timer is None:  # pulls are a time apart, refusals wear off
            wait_s = min(self.placement.pull_interval_s, BACKOFF_S)
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._later)

    def _later(self) -> None:
        self._timer = None
        self.wake()

    def _through_gate(self, now_s: float) -> bool:
        head = self.backlog[0]
        if self.config.dry_run:
            instance = self.placement.route(head, ())
            if instance is None or len(instance.load.requests) >= instance.max_seqs:
                return False
            self._grant(self.backlog.popleft(), instance)
            return True
        instance = self.placement.gate(head, now_s)
        if instance is None:
            return False
        self._grant(self.backlog.popleft(), instance, self._handover_target(head, now_s))
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
        asking = [strict for strict in placement.strict if placement.pulls(strict, now_s) and placement.fits(strict, request)]
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
                request = self.placement.preferred(strict, self.backlog)
                if request is not None:
                    self.backlog.remove(request)
                    self._grant(request, strict)
                    self._pulled(strict, now_s)
                    return True
        return False

    def _grant(self, request: Request, instance: Instance, decoder: Instance | None = None) -> None:
        if not request.restarts:
            self.ledger.taken(request)
        if decoder is not None:
            decoder.reserved += 1
            decoder.reserved_tokens += request.prompt_tokens
            request.reserved = decoder
        self._enter(instance, request, PREFILL)
        request.grant.set_result(Grant(instance, decoder))

    # Watching

    def after_scrape(self, instance: Instance) -> None:
        """An online request that the engine keeps waiting for room shows that an estimate was wrong: make room now."""
        scrape, load = instance.scrape, instance.load
        if scrape is None or self.config.dry_run or self.placement.rules["preemption"] == "iteration":
            return
        stuck = [other for other in load.requests if other.online and other.phase != DECODE
                 and other.dispatched_s < self.ledger.now_s() - self.config.scrape_interval_s]  # fmt: skip
        if scrape.waiting > 0 and stuck and load.offline:
            newest_first = [other for other in reversed(load.requests) if not other.online]
            for victim in newest_first[: len(stuck)]:
                self._preempt(victim, instance)
        self.wake()

    def sweep(self) -> None:
        """Give up on instances that went silent and on clients that do not read."""
        now_s, timeouts = self.ledger.now_s(), self.config.timeouts
        for instance in self.instances:
            for request in list(instance.load.requests):
                silent_s = now_s - request.progress_s
                if request.blocked_s > 0.0:
                    if now_s - request.blocked_s > timeouts.client_s:
                        self.interrupt(request, "gone")
                elif not instance.up and silent_s > 2.0 * timeouts.probe_s:
                    self.interrupt(request, "stalled")
                elif request.phase == DECODE and not request.blind and silent_s > timeouts.idle_s:
                    self.interrupt(request, "stalled")

    def begin_shutdown(self) -> None:
        """No more offline work: interactive requests are aborted. Jobs end with their runner, which owns them."""
        self.closing = True
        if self._timer is not None:
            self._timer.cancel()
        for request in list(self._interactive):
            self.interrupt(request, "shutdown")

    def end_online(self) -> None:
        """The time to drain is over: what still runs gets an error."""
        for request in list(self.ledger.live):
            self.interrupt(request, "shutdown")


def most_tokens(payload: Mapping[str, Any]) -> int | None:
    """The most output tokens that a body asks for, if it says so."""
    value = payload.get("max_completion_tokens", payload.get("max_tokens"))
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def is_single(payload: Mapping[str, Any]) -> bool:
    """One prompt and one answer."""
    prompt = payload.get("prompt")
    several = isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
    return not several and payload.get("n", 1) in (1, None) and payload.get("best_of", 1) in (1, None)


def _error_answer(status: int, message: str) -> Answer:
    error = {"message": message, "type": "server_error", "param": None, "code": status}
    return Answer(status, "application/json", json.dumps({"error": error}).encode())
