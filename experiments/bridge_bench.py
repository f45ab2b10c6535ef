"""What the bridge costs and what it is worth, measured: ``python experiments/bridge_bench.py [parts=[overhead]]``.

Each part is a function that takes the settings, prints its table and returns what goes into results.json:

    overhead   the gateway against a direct call, over a fake vLLM: three processes, the load generator in the third
    kills      SIGKILLs of the whole gateway while it works on batches; every delivered line is checked
    live       an online request behind long offline work on a real vLLM: abort-and-retry against stock priority
               (needs `python examples/live_cpu/setup_vllm.py` once; not among the parts that run by default)
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ooco_gym.bridge.arguments import nested as parse_settings
from ooco_gym.errors import OocoError

#: Name of a part -> module beside this file whose ``run(settings, console)`` returns its results; its ``DEFAULTS`` are
#: further settings.
PARTS: dict[str, str] = {"overhead": "bridge_bench", "kills": "bridge_jobs", "live": "bridge_live"}
DEFAULTS: dict[str, Any] = {
    "parts": ["overhead", "kills"],
    "out": "runs/bridge_bench",
    "streams": 50,  # concurrent streams for the first-token comparison
    "seconds": 6.0,  # of each measurement
    "rounds": 3,  # alternations of direct and gateway
    "tokens": 32,  # output tokens of a stream
    "token_ms": 20.0,
    "prefill_ms": 40.0,
    "concurrency": 64,  # for requests per second
}
FIRST_TOKEN_BAR_MS = 3.0
RATE_BAR = 500.0


def run(settings: dict[str, Any], console: Console) -> dict[str, Any]:
    """Gateway overhead against a direct call; see the module's docstring."""
    with contextlib.ExitStack() as stack:
        upstream = stack.enter_context(fake_upstream(settings))
        front = stack.enter_context(gateway_over([upstream], ["relaxed"]))
        return asyncio.run(_overhead(settings, upstream, front, console))


async def _overhead(settings: dict[str, Any], upstream: str, front: str, console: Console) -> dict[str, Any]:
    first: dict[str, list[float]] = {"direct": [], "gateway": []}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        for base in (upstream, front):  # connections and compiled code are warm before anything is timed
            await _closed_loop(session, base, 8, 1.0, _stream_body(settings, settings["tokens"]), [])
        for _ in range(settings["rounds"]):
            for name, base in (("direct", upstream), ("gateway", front)):
                body = _stream_body(settings, settings["tokens"])
                await _closed_loop(session, base, settings["streams"], settings["seconds"], body, first[name])
        rates: dict[str, dict[str, float]] = {}
        for kind, body in (("stream of 8 tokens", _stream_body(settings, 8, 0.0)), ("not streamed", _whole_body(8))):
            rates[kind] = {}
            for name, base in (("direct", upstream), ("gateway", front)):
                started = time.perf_counter()
                done = await _closed_loop(session, base, settings["concurrency"], settings["seconds"], body, [])
                rates[kind][name] = done / (time.perf_counter() - started)
    medians = {name: statistics.median(values) * 1e3 for name, values in first.items()}
    p99 = {name: statistics.quantiles(values, n=100)[98] * 1e3 for name, values in first.items()}
    added = medians["gateway"] - medians["direct"]
    table = Table(title=f"gateway overhead, fake upstream, {os.cpu_count()} cores")
    for column in ("measure", "direct", "gateway", "difference", "bar"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    table.add_row(f"first token, {settings['streams']} streams, median ms", f"{medians['direct']:.2f}",
                  f"{medians['gateway']:.2f}", f"{added:+.2f}", f"<= {FIRST_TOKEN_BAR_MS:g}")  # fmt: skip
    table.add_row("first token, p99 ms", f"{p99['direct']:.2f}", f"{p99['gateway']:.2f}",
                  f"{p99['gateway'] - p99['direct']:+.2f}", "")  # fmt: skip
    for kind, rate in rates.items():
        table.add_row(f"requests/s, {kind}, {settings['concurrency']} at a time", f"{rate['direct']:,.0f}",
                      f"{rate['gateway']:,.0f}", "", f">= {RATE_BAR:g}")  # fmt: skip
    console.print(table)
    return {
        "first_token_ms": {"median": medians, "p99": p99, "added_median": added,
                           "samples": {name: len(values) for name, values in first.items()}},
        "requests_per_s": rates,
        "bars": {"added_median_ms": FIRST_TOKEN_BAR_MS, "requests_per_s": RATE_BAR},
        "passed": added <= FIRST_TOKEN_BAR_MS and all(rate["gateway"] >= RATE_BAR for rate in rates.values()),
    }  # fmt: skip


def _stream_body(settings: dict[str, Any], tokens: int, scale: float = 1.0) -> bytes:
    body = {"model": "fake", "prompt": "x" * 400, "stream": True, "max_tokens": tokens,
            "prefill_ms": settings["prefill_ms"] * scale, "token_ms": settings["token_ms"] * scale}  # fmt: skip
    return json.dumps(body).encode()


def _whole_body(tokens: int) -> bytes:
    return json.dumps({"model": "fake", "prompt": "x" * 400, "max_tokens": tokens}).encode()


async def _closed_loop(
    session: aiohttp.ClientSession, base: str, clients: int, seconds: float, body: bytes, first_s: list[float]
) -> int:
    """``clients`` that each send the next request when the last has ended; answers received within ``seconds``."""
    end = time.perf_counter() + seconds
    headers = {"Content-Type": "application/json"}
    done = 0

    async def client(delay_s: float) -> None:
        nonlocal done
        await asyncio.sleep(delay_s)
        while time.perf_counter() < end:
            sent = time.perf_counter()
            async with session.post(f"{base}/v1/completions", data=body, headers=headers) as answer:
                assert answer.status == 200, await answer.text()
                chunk = await answer.content.readany()
                first_s.append(time.perf_counter() - sent)
                last = chunk
                while chunk:
                    last, chunk = chunk, await answer.content.readany()
                assert last.endswith((b"[DONE]\n\n", b"}")), last[-40:]
            done += 1

    await asyncio.gather(*(client(index * 0.005) for index in range(clients)))
    return done


# Processes


@contextlib.contextmanager
def process(arguments: list[str], ready: Callable[[str], str | None]) -> Iterator[str]:
    """A child process; yields what ``ready`` finds in a line of its stderr."""
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    child = subprocess.Popen([sys.executable, *arguments], stderr=subprocess.PIPE, text=True, env=environment, cwd=root)
    assert child.stderr is not None
    lines = []
    found: str | None = None
    try:
        for line in child.stderr:
            lines.append(line)
            found = ready(line)
            if found is not None:
                break
        if found is None:
            raise OocoError(f"{arguments[0]} ended before it served: {''.join(lines).strip()[-300:]}")
        yield found
    finally:
        child.terminate()
        try:
            child.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()


def served_at(line: str) -> str | None:
    return line.split("listening on ", 1)[1].strip() if line.startswith("listening on ") else None


@contextlib.contextmanager
def fake_upstream(settings: dict[str, Any]) -> Iterator[str]:
    """URL of a fake vLLM in a process of its own."""
    with process([str(Path(__file__).resolve()), "--fake-upstream"], served_at) as url:
        yield url


@contextlib.contextmanager
def gateway_over(urls: list[str], roles: list[str], **more: Any) -> Iterator[str]:
    """URL of a gateway in a process of its own, over the given instances; ``more`` are keys of the cluster file."""
    with tempfile.TemporaryDirectory() as folder:
        path = gateway_file(Path(folder), urls, roles, **more)
        with process(["-m", "ooco_gym.bridge", "serve", f"config={path}", "policy=ooco"], served_at) as url:
            yield url


def gateway_file(folder: Path, urls: list[str], roles: list[str], **more: Any) -> Path:
    """The cluster file of a gateway over the given instances, on any free port unless it is told another."""
    path = folder / "cluster.yaml"
    instances = [{"url": url, "role": role} for url, role in zip(urls, roles, strict=True)]
    path.write_text(OmegaConf.to_yaml(OmegaConf.create({"instances": instances, "listen": {"port": 0}, **more})))
    return path


def serve_fake_upstream() -> None:
    """A minimal vLLM on a free port: paced streams, /health, /metrics; lean, so that it is not what is measured."""
    import uvicorn

    metrics = "".join(f'vllm:{name}{{engine="0"}} 0.0\n' for name in
                      ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")).encode()  # fmt: skip
    event = b'data: {"id":"cmpl-fake","object":"text_completion","choices":[{"index":0,"text":" word",' \
            b'"logprobs":null,"finish_reason":null}]}\n\n'  # fmt: skip

    async def body_of(receive: Callable[[], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                return dict(json.loads(body)) if body else {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        payload = await body_of(receive)
        stream = bool(payload.get("stream"))
        kind = b"text/event-stream; charset=utf-8" if stream else b"application/json"
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]}
        if not stream:
            tokens = int(payload.get("max_tokens", 1))
            usage = {"prompt_tokens": 100, "completion_tokens": tokens, "total_tokens": tokens + 100}
            answer = {
                "id": "x",
                "usage": usage,
                "choices": [{"index": 0, "text": " word" * tokens, "finish_reason": "length"}],
            }
            body = metrics if scope["path"] == "/metrics" else json.dumps(answer).encode()
            start["headers"].append((b"content-length", str(len(body)).encode()))  # type: ignore[attr-defined]
            await send(start)
            await send({"type": "http.response.body", "body": body})
            return
        await send(start)
        await asyncio.sleep(payload["prefill_ms"] / 1e3)
        for index in range(payload["max_tokens"]):
            if index and payload["token_ms"]:
                await asyncio.sleep(payload["token_ms"] / 1e3)
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    say_where(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off", access_log=False))


def say_where(config: Any) -> None:
    """Serve, and print the address once it is known."""
    import uvicorn

    class Announcing(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            port = self.servers[0].sockets[0].getsockname()[1]
            print(f"listening on http://127.0.0.1:{port}", file=sys.stderr, flush=True)

    Announcing(config).run()


def _module(part: str) -> Any:
    name = PARTS[part]
    return sys.modules[__name__] if name == "bridge_bench" else importlib.import_module(name)


def main(arguments: list[str]) -> int:
    if arguments == ["--fake-upstream"]:
        serve_fake_upstream()
        return 0
    if "--help" in arguments or "-h" in arguments:
        print(__doc__)
        print("settings:", " ".join(f"{key}={value}" for key, value in DEFAULTS.items()))
        return 0
    try:
        given = parse_settings(arguments)
        parts = given.get("parts", DEFAULTS["parts"])
        wrong = [part for part in parts if part not in PARTS]
        if wrong:
            raise OocoError(f"unknown part '{wrong[0]}': known are {', '.join(PARTS)}")
        modules = {part: _module(part) for part in parts}
        settings = dict(DEFAULTS)
        for module in modules.values():
            settings |= module.DEFAULTS
        unknown = sorted(set(given) - set(settings))
        if unknown:
            raise OocoError(f"unknown setting '{unknown[0]}': known are {', '.join(settings)}")
        settings |= given
        console = Console() if sys.stdout.isatty() else Console(width=120)
        folder = Path(settings["out"])
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "results.json"
        results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        for part, module in modules.items():
            outcome = module.run(settings, console)
            machine = {"cores": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()}
            results[part] = {"settings": settings, "machine": machine, "results": outcome}
            path.write_text(json.dumps(results, indent=2) + "\n")
        console.print(f"results in {path}")
    except OocoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
