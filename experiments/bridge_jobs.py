"""SIGKILLs of the whole gateway while it works on batches: part ``kills`` of bridge_bench.py.

The same account as in ``bridge_kill.py``, with the gateway itself under test: store, Batch API, scheduler and control
loop, over two fake vLLM instances whose answer is a function of the request, so that every delivered line can be
checked.
"""

from __future__ import annotations

import contextlib
import random
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import uvicorn
from bridge_bench import gateway_file, process, say_where, served_at
from bridge_kill import run as kill_and_account
from bridge_kill import show
from bridge_stub import answer
from rich.console import Console
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

DEFAULTS: dict[str, Any] = {"kills": 20, "seed": 1, "mean_ms": 20.0}  # mean_ms: of a request on a fake instance
METRICS = "".join(
    f'vllm:{name}{{engine="0"}} 0.0\n'
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
)


def run(settings: dict[str, Any], console: Console) -> dict[str, Any]:
    """Kill the gateway ``kills`` times and account for every request."""
    folder = Path(settings["out"]) / "kills"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with contextlib.ExitStack() as stack:
        fake = [str(Path(__file__).resolve()), str(settings["mean_ms"])]
        urls = [stack.enter_context(process(fake, served_at)) for _ in range(2)]
        config = gateway_file(folder, urls, ["relaxed", "strict"])
        words = [sys.executable, "-m", "ooco_gym.bridge", "serve", f"config={config}", "policy=ooco"]
        command = f"{shlex.join(words)} jobs={{store}} listen.port={{port}}"
        results = kill_and_account(settings["kills"], settings["seed"], command, "stub", folder, console)
    show(results, console)
    return {**results, "command": "python -m ooco_gym.bridge serve", "passed": results["faults"] == 0}


def serve_fake_vllm(mean_s: float) -> None:
    """A vLLM on a free port that takes a random while and answers with a function of path and body."""
    import asyncio

    async def complete(request: Request) -> Response:
        body = await request.json()
        await asyncio.sleep(random.expovariate(1.0 / mean_s))
        status, content = answer(request.url.path, body)
        return JSONResponse(content, status)

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(METRICS)

    app = Starlette(
        routes=[
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/health", metrics),
            Route("/metrics", metrics),
        ]
    )
    say_where(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", access_log=False))


if __name__ == "__main__":
    serve_fake_vllm(float(sys.argv[1]) / 1e3)
