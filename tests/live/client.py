"""What the live tests say to servers: requests as dictionaries, answers as texts, waiting with an end."""

import asyncio
import json
import time

import aiohttp

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LIMIT = aiohttp.ClientTimeout(total=180)


def completion(prompt, tokens, **more):
    """Greedy, and exactly ``tokens`` long."""
    return {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True, **more}


def chat(text, tokens, **more):
    messages = [{"role": "user", "content": text}]
    return {"model": "tiny", "messages": messages, "max_tokens": tokens, "temperature": 0.0, "ignore_eos": True, **more}


class Answer:
    """Status, text, the error if there was one, and when the first token came."""

    def __init__(self, status, body, first_s, took_s):
        self.status, self.body, self.first_s, self.took_s = status, body, first_s, took_s
        self.text, self.error, self.done = "", None, False
        for event in self._events():
            self.error = event.get("error", self.error)
            for choice in event.get("choices", []):
                part = choice.get("delta") or choice.get("message") or choice
                self.text += part.get("content") or part.get("text") or ""

    def _events(self):
        if not self.body.startswith(b"data:"):
            yield json.loads(self.body)
            return
        for line in self.body.decode().splitlines():
            if line == "data: [DONE]":
                self.done = True
            elif line.startswith("data: "):
                yield json.loads(line[6:])


async def send(session, base, body, path=COMPLETIONS):
    """One request to its end, however it ends; a connection that breaks off is an exception."""
    began, first_s, received = time.perf_counter(), None, b""
    async with session.post(base + path, json=body, timeout=LIMIT) as answer:
        async for chunk in answer.content.iter_any():
            first_s = first_s or time.perf_counter() - began
            received += chunk
        return Answer(answer.status, received, first_s, time.perf_counter() - began)


def ask(base, body, path=COMPLETIONS):
    async def alone():
        async with aiohttp.ClientSession() as session:
            return await send(session, base, body, path)

    return asyncio.run(alone())


async def until(observe, wanted, tasks=(), seconds=20.0):
    """Wait until ``observe()``, which may block, gives ``wanted``; a task that ends meanwhile is an error."""
    end = time.monotonic() + seconds
    while (seen := await asyncio.to_thread(observe)) != wanted:
        ended = [task.result() for task in tasks if task.done()]
        assert not ended, f"ended early: HTTP {ended[0].status} {ended[0].body[:300]}"
        assert time.monotonic() < end, f"saw {seen}, not {wanted}, for {seconds:g} s"
        await asyncio.sleep(0.02)
