"""The OpenAI Files and Batch APIs over the store, so that the stock `openai` client works unchanged."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Send

from ooco_gym.bridge import openai_form
from ooco_gym.bridge.jobs.records import ConflictError, UnknownError
from ooco_gym.bridge.jobs.runner import Runner
from ooco_gym.bridge.jobs.store import Store
from ooco_gym.bridge.jobs.upload import SilentError, TooLargeError, pieces, receive
from ooco_gym.bridge.jobs.validation import ENDPOINTS, Limits
from ooco_gym.errors import OocoError, shown

logger = logging.getLogger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]

COMPLETION_WINDOW = "24h"
MOST_JSON_BYTES = 256 * 1024
LIFETIME_S = (3600, 2_592_000)
STATUS = {UnknownError: 404, SilentError: 408, ConflictError: 409, TooLargeError: 413}


class _ParameterError(OocoError):
    """A parameter that is missing or wrong."""

    def __init__(self, param: str, sentence: str) -> None:
        super().__init__(sentence)
        self.param = param


def routes(store: Store, runner: Runner, limits: Limits | None = None) -> list[Route]:
    """/v1/files... and /v1/batches..., to be mounted in a Starlette application."""
    jobs = _Jobs(store, runner, limits or Limits())
    table: list[tuple[str, str, Endpoint]] = [
        ("POST", "/v1/files", jobs.create_file),
        ("GET", "/v1/files", jobs.list_files),
        ("GET", "/v1/files/{id}", jobs.get_file),
        ("DELETE", "/v1/files/{id}", jobs.delete_file),
        ("GET", "/v1/files/{id}/content", jobs.get_content),
        ("POST", "/v1/batches", jobs.create_batch),
        ("GET", "/v1/batches", jobs.list_batches),
        ("GET", "/v1/batches/{id}", jobs.get_batch),
        ("POST", "/v1/batches/{id}/cancel", jobs.cancel_batch),
    ]
    return [Route(path, _answering(endpoint), methods=[method]) for method, path, endpoint in table]


class _Jobs:
    def __init__(self, store: Store, runner: Runner, limits: Limits) -> None:
        self._store = store
        self._runner = runner
        self._limits = limits

    async def create_file(self, request: Request) -> Response:
        number, size, filename, fields = await receive(request, self._store, self._limits)
        try:
            purpose = fields.get("purpose", "")
            if purpose != "batch":
                raise _ParameterError("purpose", f"purpose is {shown(purpose)}; 'batch' is accepted")
            expiry = {key: fields[f"expires_after[{key}]"] for key in ("anchor", "seconds") if _given(fields, key)}
            lifetime_s = _lifetime_s(expiry or None, "expires_after")
            return JSONResponse(await self._store.complete_file(number, filename, purpose, size, lifetime_s))
        except BaseException:
            await self._store.discard_file(number)
            raise

    async def list_files(self, request: Request) -> Response:
        query = request.query_params
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise _ParameterError("order", f"order is {shown(order)}; 'asc' and 'desc' are accepted")
        limit = _limit(query.get("limit"), 10_000, 10_000)
        return _listed(*await self._store.files(query.get("after"), limit, query.get("purpose"), order == "desc"))

    async def get_file(self, request: Request) -> Response:
        return JSONResponse(await self._store.file(request.path_params["id"]))

    async def delete_file(self, request: Request) -> Response:
        file_id = request.path_params["id"]
        await self._store.delete_file(file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    async def get_content(self, request: Request) -> Response:
        file_id = request.path_params["id"]
        size = (await self._store.file(file_id))["bytes"]
        content: AsyncIterator[bytes] = self._store.content(file_id)
        return _Content(content, media_type="application/octet-stream", headers={"content-length": str(size)})

    async def create_batch(self, request: Request) -> Response:
        fields = await _json_body(request, self._limits.body_s)
        input_file_id, endpoint = _string(fields, "input_file_id"), _string(fields, "endpoint")
        window = _string(fields, "completion_window")
        if endpoint not in ENDPOINTS:
            known = " and ".join(f"'{known}'" for known in ENDPOINTS)
            raise _ParameterError("endpoint", f"endpoint is {shown(endpoint)}; {known} are accepted")
        if window != COMPLETION_WINDOW:
            message = f"completion_window is {shown(window)}; '{COMPLETION_WINDOW}' is accepted"
            raise _ParameterError("completion_window", message)
        metadata = _metadata(fields.get("metadata"))
        lifetime_s = _lifetime_s(fields.get("output_expires_after"), "output_expires_after")
        batch = await self._store.create_batch(
            input_file_id, endpoint, window, self._limits.completion_window_s, metadata, lifetime_s
        )
        self._runner.wake()
        return JSONResponse(batch)

    async def list_batches(self, request: Request) -> Response:
        query = request.query_params
        return _listed(*await self._store.batches(query.get("after"), _limit(query.get("limit"), 20, 100)))

    async def get_batch(self, request: Request) -> Response:
        return JSONResponse(await self._store.batch(request.path_params["id"]))

    async def cancel_batch(self, request: Request) -> Response:
        batch = await self._store.cancel_batch(request.path_params["id"])
        self._runner.wake()
        return JSONResponse(batch)


class _Content(StreamingResponse):
    """A download, which breaks off where its file is deleted in the middle: its client sees that bytes are missing."""

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        except UnknownError as error:
            logger.warning("a download broke off: %s", error)


def _answering(endpoint: Endpoint) -> Endpoint:
    """Give a user's mistake and a failing disk the form of an OpenAI error."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except _ParameterError as error:
            return _error(400, str(error), error.param)
        except OocoError as error:
            return _error(STATUS.get(type(error), 400), str(error))
        except sqlite3.Error as error:
            logger.exception("the job store failed")
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                return _error(507, "the job store's disk is full")
            return _error(500, "the job store failed; the gateway's log says why")

    return answer


def _error(status: int, message: str, param: str | None = None) -> Response:
    return Response(openai_form.error_body(status, message, param), status, media_type="application/json")


async def _json_body(request: Request, silent_s: float) -> dict[str, Any]:
    body = bytearray()
    async for piece in pieces(request, silent_s):
        body += piece
        if len(body) > MOST_JSON_BYTES:
            raise TooLargeError(f"the body has more than {MOST_JSON_BYTES:,} bytes, the most that is accepted")
    try:
        fields = openai_form.parse(bytes(body))
    except ValueError as error:
        raise OocoError(f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise OocoError("the body is not a JSON object")
    return fields


def _string(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is None:
        raise _ParameterError(name, f"Missing required parameter: '{name}'.")
    if not isinstance(value, str) or not _is_text(value):
        raise _ParameterError(name, f"{name} is not a string")
    return value


def _is_text(value: str) -> bool:
    """Whether the string can be written as UTF-8: JSON can spell half a surrogate pair."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if (
        not isinstance(value, dict)
        or len(value) > 16
        or not all(isinstance(item, str) and len(key) <= 64 and len(item) <= 512 for key, item in value.items())
        or not all(_is_text(key + item) for key, item in value.items())
    ):
        raise _ParameterError(
            "metadata", "metadata is not an object of at most 16 strings of 512 characters under keys of 64 characters"
        )
    return value


def _given(fields: Mapping[str, str], key: str) -> bool:
    return f"expires_after[{key}]" in fields


def _lifetime_s(value: Any, name: str) -> int | None:
    """The seconds of an expiry policy, which a form spells as text."""
    if value is None:
        return None
    if not isinstance(value, dict) or value.get("anchor") != "created_at":
        raise _ParameterError(name, f"{name} is not an object with anchor 'created_at' and seconds")
    try:
        seconds = int(str(value.get("seconds")))
    except ValueError:
        seconds = -1
    low, high = LIFETIME_S
    if not low <= seconds <= high:
        raise _ParameterError(name, f"{name}[seconds] is {shown(value.get('seconds'))}; {low} to {high} is accepted")
    return seconds


def _limit(value: str | None, default: int, most: int) -> int:
    if value is None:
        return default
    if not value.isascii() or not value.isdigit() or not 1 <= int(value[:9]) <= most:
        raise _ParameterError("limit", f"limit is {shown(value)}; 1 to {most} is accepted")
    return int(value)


def _listed(objects: list[dict[str, Any]], has_more: bool) -> Response:
    ids = [entry["id"] for entry in objects]
    first, last = (ids[0], ids[-1]) if ids else (None, None)
    return JSONResponse({"object": "list", "data": objects, "first_id": first, "last_id": last, "has_more": has_more})
