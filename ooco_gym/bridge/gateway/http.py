"""Small HTTP parts of the gateway: errors in OpenAI's form, the client's side of an exchange, the key check."""

from __future__ import annotations

import hmac
import json

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

_TYPES = {400: "invalid_request_error", 401: "invalid_request_error", 404: "invalid_request_error",
          408: "timeout_error", 413: "invalid_request_error", 429: "rate_limit_error"}  # fmt: skip


class RefusedError(Exception):
    """A request that the gateway itself refuses."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> bytes:
    """An error in OpenAI's form."""
    error = {"message": message, "type": _TYPES.get(status, "server_error"), "param": param, "code": code}
    return json.dumps({"error": error}).encode()


class ClientGoneError(Exception):
    """The client went away while it sent its request."""


class Reply:
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


async def http_error(http: HttpRequest, error: Exception) -> Response:
    status = int(getattr(error, "status_code", 500))
    message = "no such path" if status == 404 else "this path does not accept that method"
    return Response(
        error_body(status, f"{message}: {http.method} {http.url.path}"), status, media_type="application/json"
    )


class KeyCheck:
    """``Authorization: Bearer KEY`` on everything under /v1/, compared in constant time, where a key is configured."""

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
