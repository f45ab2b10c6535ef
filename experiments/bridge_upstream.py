"""The fake vLLM of the benchmark: in a process of its own, and lean, so that it is not what is measured.

    python experiments/bridge_upstream.py PORT [MEAN_MS]

A stream comes at the pace that its request asks for (``prefill_ms``, ``token_ms``). Any other answer comes at once and
is a success, or, where MEAN_MS is given, comes after a random while of that mean and is ``bridge_stub.answer``, a
function of the request, so that every answer can be checked: a hash, and for about one request in eight a refusal.
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bridge_stub import answer

from examples.live_cpu import servers

METRICS = "".join(
    f'vllm:{name}{{engine="0"}} 0.0\n'
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
).encode()
WORD = " word"
EVENT = (
    'data: {"id":"cmpl-fake","object":"text_completion","choices":[{"index":0,"text":"' + WORD + '",'
    '"logprobs":null,"finish_reason":null}]}\n\n'
).encode()
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


@contextmanager
def fake_vllm(name: str, folder: Path, mean_ms: float = 0.0) -> Iterator[servers.Server]:
    """A running fake, ended with the block; its log is ``folder/NAME.log``."""
    port = servers.free_port()
    command = [sys.executable, str(Path(__file__).resolve()), str(port), str(mean_ms)]
    server = servers.spawn(name, command, port, folder / f"{name}.log", {}, folder)
    try:
        server.wait_ready(60.0)
        yield server
    finally:
        server.stop()


class Fake:
    """The ASGI application; ``mean_s`` as MEAN_MS in the module's docstring."""

    def __init__(self, mean_s: float) -> None:
        self.mean_s = mean_s

    async def __call__(self, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        path = scope["path"]
        payload = await _payload(receive)
        if path in ("/health", "/metrics"):
            await _whole(send, 200, METRICS)
        elif payload.get("stream"):
            await self._stream(payload, send)
        elif self.mean_s:
            await asyncio.sleep(random.expovariate(1.0 / self.mean_s))
            status, content = answer(path, payload)
            await _whole(send, status, json.dumps(content).encode())
        else:
            await _whole(send, 200, json.dumps(_success(payload["max_tokens"])).encode())

    async def _stream(self, payload: Mapping[str, Any], send: Send) -> None:
        await send(_head(200, b"text/event-stream; charset=utf-8"))
        if payload.get("prefill_ms", 0.0):
            await asyncio.sleep(payload.get("prefill_ms", 0.0) / 1e3)
        for index in range(payload["max_tokens"]):
            if index and payload.get("token_ms", 0.0):
                await asyncio.sleep(payload.get("token_ms", 0.0) / 1e3)
            await send({"type": "http.response.body", "body": EVENT, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def _payload(receive: Receive) -> dict[str, Any]:
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return dict(json.loads(body)) if body else {}


def _success(tokens: int) -> dict[str, Any]:
    usage = {"prompt_tokens": 100, "completion_tokens": tokens, "total_tokens": tokens + 100}
    return {"id": "cmpl-fake", "usage": usage, "choices": [{"index": 0, "text": WORD * tokens}]}


def _head(status: int, kind: bytes, *more: tuple[bytes, bytes]) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", kind), *more]}


async def _whole(send: Send, status: int, body: bytes) -> None:
    await send(_head(status, b"application/json", (b"content-length", b"%d" % len(body))))
    await send({"type": "http.response.body", "body": body})


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3 or not all(argument.replace(".", "", 1).isdigit() for argument in sys.argv[1:]):
        print(__doc__)
        sys.exit(0 if {"-h", "--help"} & set(sys.argv) else 2)
    mean_s = float(sys.argv[2]) / 1e3 if len(sys.argv) == 3 else 0.0
    gc.collect()
    gc.freeze()  # what start-up made need not be walked again in the middle of a stream
    uvicorn.run(Fake(mean_s), port=int(sys.argv[1]), log_level="warning", lifespan="off", access_log=False)
