"""One attempt to have one instance answer one request: bytes there, bytes back, tokens counted on the way.

A stream is relayed as it comes. Events are counted by their blank lines, which JSON cannot contain, so no event is
parsed but the first (an engine that refuses a stream says so in one, under HTTP 200) and one that carries ``usage``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp

from ooco_gym.bridge.gateway.instances import Instance, InstanceError, RefusalError, reason
from ooco_gym.bridge.gateway.ledger import Ledger
from ooco_gym.bridge.gateway.load import Request

EVENT_END = b"\n\n"
DONE = b"data: [DONE]"
SSE_ERROR = b'data: {"error"'
REFUSED = (429, 503)
_PROMPT_TOKENS = re.compile(rb'"prompt_tokens"\s*:\s*(\d+)')
_COMPLETION_TOKENS = re.compile(rb'"completion_tokens"\s*:\s*(\d+)')


@dataclass(frozen=True)
class Answer:
    """A complete answer of an instance."""

    status: int
    content_type: str
    body: bytes


class Out(Protocol):
    """Where a stream goes: the client's connection."""

    started: bool  # it has seen something of the answer
    told: bool  # it has been told that the answer broke off

    async def begin(self, status: int, content_type: str) -> None: ...

    async def write(self, chunk: bytes) -> None: ...


class TooLongError(Exception):
    """An answer that has to be kept exceeds limits.max_response_bytes."""


async def exchange(
    session: aiohttp.ClientSession,
    instance: Instance,
    request: Request,
    body: bytes,
    headers: Mapping[str, str],
    ledger: Ledger,
    out: Out | None,
    most_bytes: int,
) -> Answer | None:
    """Send ``body``; a stream goes to ``out`` and None is returned, anything else is returned whole.

    Raises InstanceError where the instance broke down and RefusalError where it declined; ``out.started`` tells whether
    the client has seen anything of it. A stream without ``out`` is kept and returned.
    """
    try:
        async with session.post(instance.urls[request.path], data=body, headers=headers) as response:
            status, content_type = response.status, response.headers.get("Content-Type", "application/json")
            if status == 200 and request.stream and content_type.startswith("text/event-stream"):
                kept = await _relay(response, instance, request, ledger, out, most_bytes)
                return None if kept is None else Answer(status, content_type, kept)
            answer = Answer(status, content_type, await _whole(response, most_bytes))
    except RefusalError as refusal:
        if refusal.status in REFUSED or refusal.status >= 500:
            raise
        return Answer(refusal.status, refusal.content_type, refusal.body)
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        lost = isinstance(error, aiohttp.ClientConnectorError)
        raise InstanceError(f"{instance.name}: {reason(error)}", lost) from error
    if status in REFUSED:
        raise RefusalError(status, answer.body, content_type)
    if status >= 500:
        raise InstanceError(f"{instance.name}: HTTP {status}", False, answer)
    return answer


async def _whole(response: aiohttp.ClientResponse, most_bytes: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    while chunk := await response.content.readany():
        size += len(chunk)
        if size > most_bytes:
            raise TooLongError
        chunks.append(chunk)
    return b"".join(chunks)


async def _relay(
    response: aiohttp.ClientResponse,
    instance: Instance,
    request: Request,
    ledger: Ledger,
    out: Out | None,
    most_bytes: int,
) -> bytes | None:
    content = response.content
    # vLLM opens a chat with an event that holds no token: nothing is shown before the first that does.
    opening = 1 if request.path.endswith("chat/completions") else 0
    chunk = await content.readany()
    while chunk.count(EVENT_END) <= opening and DONE not in chunk and SSE_ERROR not in chunk:
        more = await content.readany()
        if not more:
            break
        chunk += more
    if SSE_ERROR in chunk:
        raise _refusal(chunk)
    if chunk.count(EVENT_END) <= opening and DONE not in chunk:
        raise InstanceError(f"{instance.name}: the stream ended before its first token")
    instance.first_streamed += 1
    kept: list[bytes] | None = None if out is not None else []
    if out is not None:
        await out.begin(response.status, response.headers.get("Content-Type", "text/event-stream"))
    size, half, skipped, done, broken = 0, False, opening, False, False
    while chunk:
        events = chunk.count(EVENT_END) + (half and chunk[0] == 10 and not chunk.startswith(EVENT_END))
        half = chunk[-1] == 10 and not chunk.endswith(EVENT_END)
        tokens = events - skipped
        skipped = 0
        if DONE in chunk:
            done = True
            tokens -= 1
        if request.usage_asked and b'"usage"' in chunk and b'"choices":[]' in chunk:
            tokens -= 1
            _learn_usage(request, chunk)
        if tokens > 0:
            ledger.token(request, tokens)
        else:
            request.progress_s = ledger.now_s()
        broken = broken or SSE_ERROR in chunk
        if out is not None:
            request.blocked_s = ledger.now_s()
            await out.write(chunk)
            request.blocked_s = 0.0
        elif kept is not None:
            size += len(chunk)
            if size > most_bytes:
                raise TooLongError
            kept.append(chunk)
        chunk = await content.readany()
    if broken:
        if out is not None:
            out.told = True
        raise InstanceError(f"{instance.name}: an error event in the stream")
    if not done:
        raise InstanceError(f"{instance.name}: the stream ended without [DONE]")
    return None if kept is None else b"".join(kept)


def _learn_usage(request: Request, chunk: bytes) -> None:
    found = usage(chunk)
    if found is not None:
        request.usage = found


def usage(body: bytes) -> tuple[int, int] | None:
    """(prompt, output) tokens of the last ``usage`` in an answer."""
    at = body.rfind(b'"usage"')
    if at < 0:
        return None
    prompt, output = _PROMPT_TOKENS.search(body, at), _COMPLETION_TOKENS.search(body, at)
    return (int(prompt[1]), int(output[1]) if output else 0) if prompt else None


def _refusal(chunk: bytes) -> RefusalError:
    """The error event of a stream that never began, as an answer of its own."""
    at = chunk.index(SSE_ERROR) + len(b"data: ")
    text = chunk[at:].split(b"\n", 1)[0]
    try:
        error: Any = json.loads(text)["error"]
        code = error.get("code") if isinstance(error, Mapping) else None
    except (ValueError, KeyError, TypeError):
        code = None
    return RefusalError(code if isinstance(code, int) and 400 <= code <= 599 else 503, text)
