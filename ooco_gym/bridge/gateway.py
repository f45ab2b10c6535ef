"""The gateway's HTTP face: OpenAI-compatible endpoints over the scheduler, health, metrics and the status page.

The two endpoints that matter are plain ASGI: a request is parsed once, its bytes go on as they came, a stream's chunks are
passed on as they come. Everything else is ordinary Starlette.
"""

from __future__ import annotations

import asyncio
import hmac
import json
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

from ooco_gym.bridge.config import BridgeConfig
from ooco_gym.bridge.control import Control
from ooco_gym.bridge.exchange import Answer, TooLong
from ooco_gym.bridge.instances import PATHS, InstanceFailure
from ooco_gym.bridge.ledger import Request
from ooco_gym.bridge.scheduler import Scheduler, Unavailable, is_single, most_tokens

log = logging.getLogger("ooco_gym.bridge")
OFFLINE_TIERS = ("flex", "batch")
CLASS_HEADER = b"x-request-class"
_ID = re.compile(rb"[A-Za-z0-9._:\-]{1,128}\Z")
_TYPES = {400: "invalid_request_error", 401: "invalid_request_error", 404: "invalid_request_error",
          408: "timeout_error", 413: "invalid_request_error", 429: "rate_limit_error"}  # fmt: skip


class Refused(Exception):
    """A request that the gateway itself refuses."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> bytes:
    """An error in OpenAI's form."""
    error = {"message": message, "type": _TYPES.get(status, "server_error"), "param": param, "code": code}
    return json.dumps({"error": error}).encode()


class ClientGone(Exception):
    """The client went away while it sent its request."""


class _Reply:
    """The client's side of one exchange; what the scheduler writes a stream to."""

    __slots__ = ("_id", "_send", "started", "told")

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._id = send, request_id.encode("latin-1")
        self.started = self.told = False

    async def begin(self, status: int, content_type: str) -> None:
        self.started = True
        headers = [(b"content-type", content_type.encode("latin-1")), (b"x-request-id", self._id),
                   (b"cache-control", b"no-cache")]  # fmt: skip
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, chunk: bytes) -> None:
        await self._send({"type": "http.response.body", "body": chunk, "more_body": True})

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def whole(self, status: int, content_type: str, body: bytes) -> None:
        self.started = True
        headers = [(b"content-type", content_type.encode("latin-1")), (b"content-length", b"%d" % len(body)),
                   (b"x-request-id", self._id)]  # fmt: skip
        if status in (429, 503):
            headers.append((b"retry-after", b"1"))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def fail(self, status: int, message: str) -> None:
        """A clean error: JSON while nothing was sent, an error event after that."""
        if not self.started:
            await self.whole(status, "application/json", error_body(status, message))
        elif not self.told:
            await self.write(b"data: " + error_body(status, message) + b"\n\n")
            await self.end()
        else:
            await self.end()


class Completions:
    """POST /v1/completions and /v1/chat/completions."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.config, self.scheduler = gateway.config, gateway.scheduler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode("latin-1") if _ID.match(given) else os.urandom(16).hex()
        reply = _Reply(send, request_id)
        try:
            body = await self._body(headers, receive)
            request = self._parse(scope["path"], headers, body, request_id)
        except Refused as refused:
            self.gateway.refusals[refused.status] = self.gateway.refusals.get(refused.status, 0) + 1
            text = error_body(refused.status, str(refused), refused.param, refused.code)
            await reply.whole(refused.status, "application/json", text)
            return
        except ClientGone:
            return
        await self._run(request, reply, receive)

    async def _body(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        most = self.config.limits.max_body_bytes
        length = headers.get(b"content-length", b"")
        too_large = Refused(413, f"the body is larger than limits.max_body_bytes ({most})", code="body_too_large")
        if length.isdigit() and int(length) > most:
            raise too_large
        try:
            async with asyncio.timeout(self.config.timeouts.body_s):
                message = await receive()
                body: bytes = message.get("body", b"")
                while message["type"] == "http.request" and message.get("more_body", False):
                    if len(body) > most:
                        raise too_large
                    message = await receive()
                    body += message.get("body", b"")
        except TimeoutError:
            limit_s = self.config.timeouts.body_s
            raise Refused(408, f"the body did not arrive within timeouts.body_s ({limit_s:g} s)") from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        if len(body) > most:
            raise too_large
        return body

    def _parse(self, path: str, headers: Mapping[bytes, bytes], body: bytes, request_id: str) -> Request:
        try:
            payload = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not JSON ({error})", code="invalid_json") from None
        if not isinstance(payload, dict):
            raise Refused(400, f"the body is a JSON {type(payload).__name__}, an object is needed", code="invalid_json")
        needed, kinds = ("messages", (list,)) if path.endswith("chat/completions") else ("prompt", (str, list))
        if not isinstance(payload.get(needed), kinds):
            what = "a list" if len(kinds) == 1 else "a text or a list"
            raise Refused(400, f"'{needed}' must be {what}", needed, "invalid_value")
        for name in ("stream",):
            if not isinstance(payload.get(name, False), (bool, type(None))):
                raise Refused(400, f"'{name}' must be true or false", name, "invalid_value")
        online = self._class(payload, headers)
        scheduler, limits = self.scheduler, self.config.limits
        if scheduler.closing:
            raise Refused(503, "the gateway is shutting down")
        if online and len(scheduler.ledger.live) >= limits.max_online:
            raise Refused(503, f"{limits.max_online} online requests are in flight (limits.max_online)", code="overloaded")
        if not online and len(scheduler.backlog) >= limits.max_queue:
            raise Refused(429, f"{limits.max_queue} offline requests are waiting (limits.max_queue)", code="queue_full")
        options = payload.get("stream_options")
        request = Request(
            request_id,
            path,
            body,
            online,
            bool(payload.get("stream")),
            scheduler.lengths.estimate(path, payload),
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
                raise Refused(400, f"the header X-Request-Class is '{name}', accepted are online and offline")
            return name == "online"
        return payload.get("service_tier") not in OFFLINE_TIERS

    async def _run(self, request: Request, reply: _Reply, receive: Receive) -> None:
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
        except Unavailable as error:
            await self._unavailable(reply, error)
        except InstanceFailure as error:
            log.warning("stream broke off", extra={"request": request.id, "why": str(error)})
            await reply.fail(502, "the instance that served this request failed")
        except TooLong:
            await reply.fail(502, "the answer exceeds limits.max_response_bytes")
        finally:
            watch.cancel()

    async def _unavailable(self, reply: _Reply, error: Unavailable) -> None:
        answer: Answer | None = error.answer
        if answer is not None:
            await reply.whole(answer.status, answer.content_type, answer.body)
        else:
            await reply.fail(503, f"no instance could serve this request: {error}")

    async def _watch(self, request: Request, receive: Receive) -> None:
        """Cancel the request when its client goes away."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.scheduler.interrupt(request, "gone")


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
        starlette = Starlette(routes=[*routes, *more], lifespan=lifespan)
        starlette.add_exception_handler(404, _http_error)
        starlette.add_exception_handler(405, _http_error)
        return KeyCheck(starlette, self.config.api_key)

    async def models(self, http: HttpRequest) -> Response:
        """The model list of an instance that is up, kept for a few seconds."""
        if self._models is not None and time.monotonic() - self._models[0] < 5.0:
            return Response(self._models[1], media_type="application/json")
        limit = aiohttp.ClientTimeout(total=self.config.timeouts.probe_s)
        key = self.config.upstream_key
        headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
        assert self.scheduler.session is not None
        for instance in self.scheduler.instances:
            if not instance.up:
                continue
            with suppress(aiohttp.ClientError, OSError, TimeoutError):
                url = instance.urls["/v1/models"]
                async with self.scheduler.session.get(url, timeout=limit, headers=headers) as answer:
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

    async def metrics_page(self, http: HttpRequest) -> Response:
        return Response(self.metrics(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def status_json(self, http: HttpRequest) -> Response:
        return JSONResponse(self.status(), headers={"Cache-Control": "no-store"})

    async def status_page(self, http: HttpRequest) -> Response:
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        headers = {"Content-Security-Policy": policy, "Cache-Control": "no-store"}
        return Response(self.page, media_type="text/html; charset=utf-8", headers=headers)


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    status = int(getattr(error, "status_code", 500))
    message = "no such path" if status == 404 else "this path does not accept that method"
    return Response(error_body(status, f"{message}: {http.method} {http.url.path}"), status, media_type="application/json")


class KeyCheck:
    """``Authorization: Bearer KEY`` on everything under /v1/, compared in constant time; no key configured, no check."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self.app = app
        self._expected = f"Bearer {key}".encode() if key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._expected is not None and scope["type"] == "http" and scope["path"].startswith("/v1/"):
            given = b""
            for name, value in scope["headers"]:
                if name == b"authorization":
                    given = value
            if not hmac.compare_digest(given, self._expected):
                body = error_body(401, "incorrect API key: Authorization: Bearer KEY is needed", code="invalid_api_key")
                response = Response(body, 401, {"WWW-Authenticate": "Bearer"}, media_type="application/json")
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)
