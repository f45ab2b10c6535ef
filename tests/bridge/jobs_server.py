"""The jobs behind a real server on loopback, with a dispatcher that does what a request's prompt says."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import uvicorn
from starlette.applications import Starlette

from ooco_gym.bridge.jobs import Limits, Runner, Store, routes

URL = "/v1/completions"


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Scripted:
    """Answers with the prompt in capitals; 'bad' is refused, 'raise' raises, 'hang' waits to be cancelled."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.cancelled: list[str] = []
        self.most_at_once = 0
        self._now = 0

    async def complete(self, path: str, body: Mapping[str, Any], request_id: str) -> tuple[int, dict[str, Any]]:
        prompt = body["prompt"]
        self.calls.append(prompt)
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            await asyncio.sleep(0.001)
            if prompt == "raise":
                raise RuntimeError("no instance")
            if prompt == "hang":
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.append(prompt)
            raise
        finally:
            self._now -= 1
        if prompt == "bad":
            return 400, {"error": {"message": "no", "type": "invalid_request_error", "param": None, "code": None}}
        return 200, {"id": request_id, "choices": [{"text": prompt.upper()}]}


def line(custom_id: str, prompt: str = "hello", /, **changes: Any) -> str:
    body = {"model": "tiny", "prompt": prompt}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": URL, "body": body, **changes})


def jsonl(*prompts: str) -> bytes:
    return "".join(line(f"id-{number}", prompt) + "\n" for number, prompt in enumerate(prompts)).encode()


class Served:
    """A running server, its client and its parts."""

    def __init__(self, port: int, store: Store, dispatcher: Scripted, runner: Runner, clock: Clock) -> None:
        self.port, self.store, self.dispatcher, self.runner, self.clock = port, store, dispatcher, runner, clock
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

    def upload(self, content: bytes) -> str:
        return self.client.files.create(file=("batch.jsonl", content), purpose="batch").id

    def start(self, content: bytes, **fields: Any) -> Any:
        return self.client.batches.create(
            input_file_id=self.upload(content), endpoint=URL, completion_window="24h", **fields
        )

    def wait(self, batch_id: str, until: Callable[[Any], bool]) -> Any:
        for _ in range(1000):
            batch = self.client.batches.retrieve(batch_id)
            if until(batch):
                return batch
            time.sleep(0.005)
        raise AssertionError(f"{batch} did not get there in time")

    def finished(self, content: bytes, **fields: Any) -> Any:
        return self.wait(self.start(content, **fields).id, has_ended)

    def lines(self, file_id: str | None) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.client.files.content(file_id).text.splitlines()] if file_id else []


def has_ended(batch: Any) -> bool:
    return batch.status in ("failed", "completed", "expired", "cancelled")


@contextmanager
def served(path: Path, limits: Limits | None = None, **settings: Any) -> Iterator[Served]:
    """Serve the store at ``path`` until the block ends."""
    clock, dispatcher = Clock(), Scripted()
    store = Store(path, clock)
    settings = {"tick_s": 0.02, "backoff_s": 0.001, **settings}
    ready = threading.Event()
    parts: dict[str, Any] = {}

    async def serve() -> None:
        runner = Runner(store, dispatcher, limits, **settings)
        app = Starlette(routes=routes(store, runner, limits))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off"))
        server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        task, working = asyncio.create_task(server.serve()), asyncio.create_task(runner.run())
        while not server.started:
            await asyncio.sleep(0.005)
        parts.update(server=server, runner=runner, port=server.servers[0].sockets[0].getsockname()[1])
        ready.set()
        await task
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(10)
        handle = Served(parts["port"], store, dispatcher, parts["runner"], clock)
        yield handle
        handle.client.close()
    finally:
        parts["server"].should_exit = True
        thread.join(15)
        store.close()
