"""Small HTTP parts of the gateway: errors in OpenAI's form, the client's side of an exchange, the key check."""

from __future__ import annotations

import hmac

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ooco_gym.bridge.openai_form import error_body


class RefusedError(Exception):
    """A request that the gateway itself refuses."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


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
    """What the router, or a defect, has to say, in OpenAI's form."""
    status = int(getattr(error, "status_code", 500))
    message = {404: "no such path", 405: "this path does not accept that method"}.get(status, "the gateway failed")
    body = error_body(status, f"{message}: {http.method} {http.url.path[:200]}")
    headers = {"Allow": ", ".join(sorted(_methods(http)))} if status == 405 else None
    return Response(body, status, headers, media_type="application/json")


def _methods(http: HttpRequest) -> set[str]:
    """Every method of this path: the router itself knows only those of the first route that has the path."""
    routes = [route for route in http.app.routes if isinstance(route, Route)]
    return {method for route in routes if route.matches(http.scope)[0] != Match.NONE for method in route.methods or ()}


class KeyCheck:
    """``Authorization: Bearer KEY`` on everything under /v1/, compared in constant time, where a key is configured."""

    def __init__(self, app: ASGIApp, key: str | None) -> None:
        self.app = app
        self._expected = key.encode() if key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._expected is not None and scope["type"] == "http" and scope["path"].startswith("/v1/"):
            given = b""
            for name, value in scope["headers"]:
                if name == b"authorization":
                    scheme, _, rest = value.partition(b" ")
                    given = rest.strip() if scheme.lower() == b"bearer" else b""
            if not hmac.compare_digest(given, self._expected):
                body = error_body(401, "incorrect API key: Authorization: Bearer KEY is needed", code="invalid_api_key")
                response = Response(body, 401, {"WWW-Authenticate": "Bearer"}, media_type="application/json")
                await response(scope, receive, send)
                return
        await self.app(scope, receive, send)
