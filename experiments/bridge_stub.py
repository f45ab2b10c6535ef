"""The offline jobs of the bridge behind HTTP, with no model: an answer is a function of its request.

bridge_kill.py starts and kills it:

    python experiments/bridge_stub.py --store jobs.sqlite --port 8000
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import random
import sys
from collections.abc import Mapping
from typing import Any

import uvicorn
from starlette.applications import Starlette

from ooco_gym.bridge.jobs import Runner, Store, routes
from ooco_gym.errors import OocoError


def answer(path: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """The one right answer to a request; about one in eight is a refusal."""
    text = f"{path} {json.dumps(body, sort_keys=True)}"
    digest = hashlib.sha256(text.encode()).hexdigest()
    if digest[0] in "01":
        return 400, {"error": {"message": digest, "type": "invalid_request_error", "param": None, "code": None}}
    return 200, {"object": "text_completion", "choices": [{"index": 0, "text": digest, "finish_reason": "length"}]}


class Stub:
    """Takes a random while of ``mean_s`` seconds for each request."""

    def __init__(self, mean_s: float) -> None:
        self._mean_s = mean_s

    async def complete(self, path: str, body: Mapping[str, Any], request_id: str) -> tuple[int, dict[str, Any]]:
        await asyncio.sleep(random.expovariate(1.0 / self._mean_s))
        return answer(path, body)


async def serve(store: Store, port: int, mean_s: float, window: int) -> None:
    runner = Runner(store, Stub(mean_s), window=window)
    app = Starlette(routes=routes(store, runner))
    working = asyncio.create_task(runner.run())
    await uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", access_log=False)).serve()
    working.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await working


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="SQLite file, made where it is missing")
    parser.add_argument("--port", type=int, required=True, help="on 127.0.0.1")
    parser.add_argument("--mean-ms", type=float, default=20.0, help="mean time of a request (exponential)")
    parser.add_argument("--window", type=int, default=32, help="most requests at once")
    options = parser.parse_args()
    try:
        store = Store(options.store)
    except OocoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        asyncio.run(serve(store, options.port, options.mean_ms / 1e3, options.window))
    finally:
        store.close()


if __name__ == "__main__":
    main()
