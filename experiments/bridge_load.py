"""The load generator of the benchmark: a process that keeps connections busy and says what it saw.

It reads slots as JSON lines on stdin and answers each with one line. A client library would cost more than the gateway
does, and be what is measured; so a connection here is a protocol of a few lines, which still checks that every answer
is complete. CPU seconds are those of this process and of any others that the slot names.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ooco_gym.errors import OocoError

PATIENCE_S = 30.0  # beyond its time a slot may take that long to let its last answers end
_FRAME = re.compile(rb"\r\n[0-9a-fA-F]+\r\n")  # of a chunk
_LENGTH = re.compile(rb"content-length: *(\d+)", re.I)


@dataclass(frozen=True)
class Slot:
    """``clients`` connections that each send the next request when the last has its answer.

    They start over ``ramp_s``; then everything is counted for ``seconds``. An answer is complete with ``times``
    occurrences of ``text``. ``pids``: name -> process whose CPU seconds are wanted.
    """

    url: str
    body: Mapping[str, Any]
    clients: int
    ramp_s: float
    seconds: float
    text: str
    times: int
    pids: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Seen:
    """What a slot saw while it counted; times in seconds."""

    first_s: list[float] = field(default_factory=list)  # from request to first byte of the body, of requests sent then
    answers: int = 0
    texts: int = 0  # occurrences of the slot's text: tokens
    seconds: float = 0.0
    cpu_s: dict[str, float] = field(
        default_factory=dict
    )  # `load` is the generator; empty where the system has no /proc


class Connection(asyncio.Protocol):
    """One connection of a slot, from its first request to its end."""

    def __init__(self, slot: Slot, seen: Seen, window: tuple[float, float], ended: asyncio.Future[None]) -> None:
        self.slot, self.seen, self.ended = slot, seen, ended
        self.begins, self.ends = window
        body, url = json.dumps(slot.body).encode(), urlsplit(slot.url)
        head = f"POST {url.path} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
        self.request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        self.text = slot.text.encode()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._send()

    def _send(self) -> None:
        self.sent = time.perf_counter()
        if self.sent >= self.ends:
            self.transport.close()
            self.ended.set_result(None)
            return
        self.answer = bytearray()
        self.body_at, self.length = 0, -1
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        answer = self.answer
        answer += data
        if not self.body_at:
            head_ends = answer.find(b"\r\n\r\n") + 4
            if head_ends < 4 or len(answer) == head_ends:
                return
            self.body_at = head_ends
            if not answer.startswith(b"HTTP/1.1 200"):
                self._fail(f"answered {answer[:400]!r}")
                return
            length = _LENGTH.search(answer, 0, head_ends)
            self.length = int(length[1]) if length else -1
            if self.begins <= self.sent:
                self.seen.first_s.append(now - self.sent)
        if self.begins <= now < self.ends:
            self.seen.texts += data.count(self.text)
        at_end = answer.endswith(b"0\r\n\r\n") if self.length < 0 else len(answer) - self.body_at >= self.length
        if at_end:
            self._check(now)

    def _check(self, now: float) -> None:
        body = bytes(self.answer[self.body_at - 2 :])
        found = (_FRAME.sub(b"", body) if self.length < 0 else body).count(self.text)
        if found != self.slot.times:
            self._fail(f"gave an answer with {found} of {self.slot.times} tokens")
            return
        self.seen.answers += self.begins <= now < self.ends
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(f"closed a connection{f' ({error})' if error else ''}")

    def _fail(self, what: str) -> None:
        if not self.ended.done():
            self.ended.set_exception(OocoError(f"{self.slot.url} {what}"))


def cpu_s(pids: Mapping[str, int]) -> dict[str, float]:
    """CPU seconds that this process, as ``load``, and the named ones have used; empty where there is no /proc."""
    used = {}
    with contextlib.suppress(FileNotFoundError):
        for name, pid in pids.items():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            used[name] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return {**used, "load": time.process_time()}
    return {}


async def run(slot: Slot) -> Seen:
    """Run one slot; raises OocoError where an answer is not complete."""
    loop, seen = asyncio.get_running_loop(), Seen()
    url = urlsplit(slot.url)
    host, port = url.hostname or "", url.port or 80
    begins = time.perf_counter() + slot.ramp_s
    window = (begins, begins + slot.seconds)

    async def client(index: int) -> None:
        await asyncio.sleep(slot.ramp_s * index / slot.clients)
        ended: asyncio.Future[None] = loop.create_future()
        await loop.create_connection(lambda: Connection(slot, seen, window, ended), host, port)
        await ended

    async def watch() -> None:
        await asyncio.sleep(begins - time.perf_counter())
        before, began = cpu_s(slot.pids), time.perf_counter()
        await asyncio.sleep(window[1] - began)
        seen.seconds = time.perf_counter() - began
        seen.cpu_s = {name: after - before[name] for name, after in cpu_s(slot.pids).items() if name in before}

    try:
        async with asyncio.timeout(slot.ramp_s + slot.seconds + PATIENCE_S):
            await asyncio.gather(watch(), *(client(index) for index in range(slot.clients)))
    except TimeoutError:
        raise OocoError(f"{slot.url} left requests without an end for {PATIENCE_S:g} s") from None
    except OSError as error:
        raise OocoError(f"{slot.url} cannot be reached ({error})") from None
    return seen


@contextmanager
def generator() -> Iterator[subprocess.Popen[str]]:
    """A running load generator, ended with the block."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve())],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def ask(process: subprocess.Popen[str], slot: Slot) -> Seen:
    """Have a generator run one slot; raises OocoError where that fails."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(dataclasses.asdict(slot)) + "\n")
    process.stdin.flush()
    line = process.stdout.readline()
    answer = json.loads(line) if line else {"error": "the load generator ended"}
    if "error" in answer:
        raise OocoError(answer["error"])
    return Seen(**answer)


def main() -> None:
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        try:
            answer = dataclasses.asdict(asyncio.run(run(Slot(**json.loads(line)))))
        except OocoError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
