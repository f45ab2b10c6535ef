"""Headless Chromium over its DevTools protocol: pages at a width, in a colour scheme, and what they complain about."""

from __future__ import annotations

import asyncio
import base64
import ctypes
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import count
from pathlib import Path

import aiohttp

BINARY = shutil.which("chromium")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-port=0",
)  # fmt: skip


class Page:
    """One tab. ``problems`` collects what its console, its log (CSP, network) and its scripts reported as errors."""

    def __init__(self, socket):
        self.problems = []
        self._socket, self._ids, self._waiting = socket, count(1), {}
        self._loaded = asyncio.Event()
        self.reader = asyncio.create_task(self._read())

    async def _read(self):
        async for message in self._socket:
            event = json.loads(message.data)
            if "id" in event:
                self._waiting.pop(event["id"]).set_result(event)
                continue
            name, params = event["method"], event["params"]
            if name == "Page.loadEventFired":
                self._loaded.set()
            elif name == "Runtime.exceptionThrown":
                self.problems.append(params["exceptionDetails"]["exception"].get("description", "an exception"))
            elif name == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                self.problems.append(str(params["args"]))
            elif name == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                self.problems.append(params["entry"]["text"])

    async def send(self, method, **params):
        number = next(self._ids)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        event = await asyncio.wait_for(answer, 10)
        assert "error" not in event, f"{method}: {event['error']}"
        return event["result"]

    async def open(self, url, scheme="light", width=1280):
        for domain in ("Page", "Runtime", "Log"):
            await self.send(f"{domain}.enable")
        await self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        await self.send("Emulation.setScrollbarsHidden", hidden=True)
        await self.resize(width)
        self._loaded.clear()
        await self.send("Page.navigate", url=url)
        await asyncio.wait_for(self._loaded.wait(), 10)

    async def resize(self, width, height=900):
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    async def evaluate(self, script):
        """The value of an expression in the page; an exception in it is an error here."""
        answer = await self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    async def until(self, script, seconds=5.0):
        """Wait until an expression is true in the page."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while not await self.evaluate(script):
            assert loop.time() < end, f"waited in vain for {script}; the page shows: {await self.text()}"
            await asyncio.sleep(0.02)

    async def text(self, selector="body"):
        """What a reader sees of an element: hidden text is left out."""
        return await self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")

    async def screenshot(self, path):
        """The whole page as PNG."""
        answer = await self.send("Page.captureScreenshot", captureBeyondViewport=True, optimizeForSpeed=False)
        Path(path).write_bytes(base64.b64decode(answer["data"]))


@contextmanager
def chromium():
    """A browser with an empty profile; yields the address of its DevTools."""
    profile = tempfile.mkdtemp(prefix="chromium-")
    command = [BINARY, *OPTIONS, f"--user-data-dir={profile}", "about:blank"]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, start_new_session=True, preexec_fn=_die_with_parent, **quiet)
    try:
        yield f"http://127.0.0.1:{_port(process, Path(profile, 'DevToolsActivePort'))}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(profile, ignore_errors=True)


def _die_with_parent():
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _port(process, file, seconds=30.0):
    end = time.monotonic() + seconds
    while not (file.is_file() and "\n" in file.read_text()):
        assert process.poll() is None, f"chromium ended with status {process.returncode}"
        assert time.monotonic() < end, f"chromium did not open its DevTools within {seconds:g} s"
        time.sleep(0.02)
    return int(file.read_text().split("\n")[0])


@asynccontextmanager
async def tab(browser):
    """An empty page of a browser."""
    async with aiohttp.ClientSession() as session:
        async with session.put(f"{browser}/json/new?about:blank") as answer:
            target = await answer.json()
        async with session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=2**26) as socket:
            page = Page(socket)
            yield page
            page.reader.cancel()
            await session.get(f"{browser}/json/close/{target['id']}")
