"""The gateway's HTTP face: OpenAI-compatible endpoints over the scheduler, health, metrics and the status page.

The two endpoints that matter are plain ASGI: a request is parsed once, its bytes go on as they came, a stream's chunks
are passed on as they come. Everything else is ordinary Starlette.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import aiohttp
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Lifespan, Receive, Scope, Send

from ooco_gym.bridge import openai_form
from ooco_gym.bridge.gateway.config import BridgeConfig
from ooco_gym.bridge.gateway.control import Control
from ooco_gym.bridge.gateway.exchange import Answer, TooLongError
from ooco_gym.bridge.gateway.handover import is_single
from ooco_gym.bridge.gateway.http import ClientGoneError, KeyCheck, RefusedError, Reply, http_error
from ooco_gym.bridge.gateway.instances import PATHS, InstanceError
from ooco_gym.bridge.gateway.load import Request
from ooco_gym.bridge.gateway.scheduler import Scheduler, UnavailableError, most_tokens
from ooco_gym.bridge.openai_form import error_body

log = logging.getLogger("ooco_gym.bridge")
OFFLINE_TIERS = ("flex", "batch")
CLASS_HEADER = b"x-request-class"
_ID = re.compile(rb"[A-Za-z0-9._:\-]{1,128}\Z")


class Completions:
    """POST /v1/completions and /v1/chat/completions."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.config, self.scheduler = gateway.config, gateway.scheduler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode("latin-1") if _ID.match(given) else os.urandom(16).hex()
        reply = Reply(send, request_id)
        try:
            body = await self._body(headers, receive)
            request = self._parse(scope["path"], headers, body, request_id)
        except RefusedError as refused:
            self.gateway.refusals[refused.status] = self.gateway.refusals.get(refused.status, 0) + 1
            text = error_body(refused.status, str(refused), refused.param, refused.code)
            await reply.whole(refused.status, "application/json", text)
            return
        except ClientGoneError:
            return
        await self._run(request, reply, receive)

    async def _body(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        most = self.config.limits.max_body_bytes
        length = headers.get(b"content-length", b"")
        too_large = RefusedError(413, f"the body is larger than limits.max_body_bytes ({most})", code="body_too_large")
        if length.isdigit() and int(length) > most:
            raise too_large
        try:
            async with asyncio.timeout(self.config.timeouts.body_s):
                message = await receive()
                pieces = [message.get("body", b"")]
                size = len(pieces[0])
                while message["type"] == "http.request" and message.get("more_body", False) and size <= most:
                    message = await receive()
                    pieces.append(message.get("body", b""))
                    size += len(pieces[-1])
        except TimeoutError:
            limit_s = self.config.timeouts.body_s
            raise RefusedError(408, f"the body did not arrive within timeouts.body_s ({limit_s:g} s)") from None
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        if size > most:
            raise too_large
        return b"".join(pieces)

    def _parse(self, path: str, headers: Mapping[bytes, bytes], body: bytes, request_id: str) -> Request:
        try:
            payload = openai_form.parse(body)
        except ValueError as error:
            raise RefusedError(400, f"the body is not JSON: {error}", code="invalid_json") from None
        if not isinstance(payload, dict):
            raise RefusedError(400, "the body is not a JSON object", code="invalid_json")
        if fault := openai_form.fault(path, payload):
            raise RefusedError(400, fault[1], fault[0], "invalid_value")
        online = self._class(payload, headers)
        scheduler, limits = self.scheduler, self.config.limits
        if scheduler.closing:
            raise RefusedError(503, "the gateway is shutting down")
        if online and len(scheduler.ledger.live) >= limits.max_online:
            raise RefusedError(
                503, f"{limits.max_online} online requests are in flight (limits.max_online)", code="overloaded"
            )
        if not online and len(scheduler.backlog) >= limits.max_queue:
            raise RefusedError(
                429, f"{limits.max_queue} offline requests are waiting (limits.max_queue)", code="queue_full"
            )
        options = payload.get("stream_options")
        request = Request(
            request_id,
            path,
            body,
            online,
            bool(payload.get("stream")),
            scheduler.forwarder.lengths.estimate(path, payload),
            most_tokens(payload),
            isinstance(options, dict) and bool(options.get("include_usage")),
        )
        request.payload, request.single = payload, is_single(payload)
        return request

    def _class(self, payload: Mapping[str, Any], headers: Mapping[bytes, bytes]) -> bool:
        """Whether a request is online: the header decides, else the service tier, else it is."""
        header = headers.get(CLASS_HEADER)
        if header is not None:
            name = header.decode("latin-1").strip().lower()
            if name not in ("online", "offline"):
                raise RefusedError(400, f"the header X-Request-Class is '{name[:40]}', accepted are online and offline")
            return name == "online"
        return payload.get("service_tier") not in OFFLINE_TIERS

    async def _run(self, request: Request, reply: Reply, receive: Receive) -> None:
        request.task = asyncio.current_task()
        watch = asyncio.create_task(self._watch(request, receive))
        try:
            if request.online:
                answer = await self.scheduler.online(request, reply if request.stream else None)
            else:
                answer = await self.scheduler.offline(request)
            if answer is None:
                await reply.end()
            else:
                await reply.whole(answer.status, answer.content_type, answer.body)
        except asyncio.CancelledError:
            why, cancels = request.interrupt, request.cancels
            if why is None:
                await reply.fail(503, "the gateway is shutting down")
                raise
            if request.task is not None:
                for _ in range(cancels):
                    request.task.uncancel()
            if why == "shutdown":
                await reply.fail(503, "the gateway is shutting down")
        except UnavailableError as error:
            await self._unavailable(reply, error)
        except InstanceError as error:
            log.warning("stream broke off", extra={"request": request.id, "why": str(error)})
            await reply.fail(502, "the instance that served this request failed")
        except TooLongError:
            await reply.fail(502, "the answer exceeds limits.max_response_bytes")
        finally:
            watch.cancel()

    async def _unavailable(self, reply: Reply, error: UnavailableError) -> None:
        answer: Answer | None = error.answer
        if answer is not None:
            await reply.whole(answer.status, answer.content_type, answer.body)
        else:
            await reply.fail(503, f"no instance could serve this request: {error}")

    async def _watch(self, request: Request, receive: Receive) -> None:
        """Cancel the request when its client goes away."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.scheduler.forwarder.interrupt(request, "gone")


class Gateway:
    """What the endpoints share, and the small ones themselves."""

    def __init__(
        self,
        config: BridgeConfig,
        scheduler: Scheduler,
        control: Control,
        metrics: Callable[[], bytes],
        status: Callable[[], dict[str, Any]],
        page: str,
    ) -> None:
        self.config, self.scheduler, self.control = config, scheduler, control
        self.metrics, self.status, self.page = metrics, status, page
        self.refusals: dict[int, int] = {}
        self._models: tuple[float, bytes] | None = None

    def app(self, lifespan: Lifespan[Starlette], more: Sequence[BaseRoute] = ()) -> ASGIApp:
        """The ASGI application; ``more`` are the routes of the job API."""
        completions = Completions(self)
        routes: list[BaseRoute] = [Route(path, completions, methods=["POST"]) for path in PATHS]
        routes += [
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/metrics", self.metrics_page),
            Route("/status", self.status_page),
            Route("/status.json", self.status_json),
        ]
        if not more:
            every = ["GET", "POST", "DELETE"]
            routes += [
                Route(path + "{rest:path}", self.no_jobs, methods=every) for path in ("/v1/files", "/v1/batches")
            ]
        starlette = Starlette(routes=[*routes, *more], lifespan=lifespan)
        starlette.router.redirect_slashes = False  # to an address that only this host's clients may know
        for status in (404, 405, 500):
            starlette.add_exception_handler(status, http_error)
        return KeyCheck(starlette, self.config.api_key)

    async def models(self, http: HttpRequest) -> Response:
        """The model list of an instance that is up, kept for a few seconds."""
        if self._models is not None and time.monotonic() - self._models[0] < 5.0:
            return Response(self._models[1], media_type="application/json")
        limit = aiohttp.ClientTimeout(total=self.config.timeouts.probe_s)
        key = self.config.upstream_key
        headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
        assert self.scheduler.forwarder.session is not None
        for instance in self.scheduler.instances:
            if not instance.up:
                continue
            with suppress(aiohttp.ClientError, OSError, TimeoutError):
                url = instance.urls["/v1/models"]
                async with self.scheduler.forwarder.session.get(url, timeout=limit, headers=headers) as answer:
                    body = await answer.read()
                    if answer.status == 200:
                        self._models = (time.monotonic(), body)
                        return Response(body, media_type="application/json")
        return Response(error_body(503, "no instance is up"), 503, media_type="application/json")

    async def health(self, http: HttpRequest) -> Response:
        """200 while at least one instance is up and the gateway accepts requests."""
        up = sum(instance.up for instance in self.scheduler.instances)
        fine = up > 0 and not self.scheduler.closing
        state = "ok" if fine else "shutting down" if self.scheduler.closing else "no instance is up"
        return JSONResponse({"status": state, "instances_up": up, "instances": len(self.scheduler.instances)},
                            200 if fine else 503)  # fmt: skip

    async def no_jobs(self, http: HttpRequest) -> Response:
        body = error_body(404, "this gateway takes no jobs: the key jobs of its cluster file is not set")
        return Response(body, 404, media_type="application/json")

    async def metrics_page(self, http: HttpRequest) -> Response:
        return Response(self.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def status_json(self, http: HttpRequest) -> Response:
        return JSONResponse(self.status(), headers={"Cache-Control": "no-store"})

    async def status_page(self, http: HttpRequest) -> Response:
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        headers = {"Content-Security-Policy": policy, "Cache-Control": "no-store"}
        return Response(self.page, media_type="text/html; charset=utf-8", headers=headers)
