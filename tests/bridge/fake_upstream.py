"""A fake vLLM: the endpoints, event forms and metric names that the bridge relies on, on real sockets.

Requests wait for one of ``max_num_seqs`` seats, first come first served, prefill, then emit a token per decode step.
The text depends on the prompt alone, as greedy decoding does. A client that disconnects frees its seat at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from aiohttp import web


@dataclass
class FakeUpstream:
    """One instance. Change any field while it runs."""

    prefill_s_per_token: float = 0.0
    decode_s: float = 0.0
    hold_prefill: bool = False  # no first token before it is False again
    hold_decode: bool = False  # nor any other
    max_num_seqs: int = 64
    kv_blocks: int = 4096
    block_tokens: int = 16
    refuse: str = ""  # "status": HTTP 503; "sse": HTTP 200 with an error event
    fail_before: bool = False  # break the connection before the first token
    fail_after: int = 0  # break the connection after that many tokens
    error_status: int = 0
    healthy: bool = True
    connector: bool = False
    loses_kv: bool = False  # KV of others cannot be fetched: 500, or HTTP 200 with an error event in a stream
    key: str = ""
    tokens: int = 8
    port: int = 0
    log: list[dict] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    running: int = 0
    waiting: int = 0
    kv_tokens: int = 0
    aborted: int = 0
    finished: int = 0
    first_tokens: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def words(self, payload: dict, count: int) -> list[str]:
        source = json.dumps(payload.get("prompt", payload.get("messages")), sort_keys=True)
        digest = hashlib.sha256(source.encode()).hexdigest()
        return [f" {digest[index % 60 : index % 60 + 4]}" for index in range(count)]

    def prompt_length(self, payload: dict) -> int:
        prompt = payload.get("prompt")
        if isinstance(prompt, list):
            return len(prompt)
        if prompt is None:
            return sum(len(message["content"]) for message in payload["messages"])
        return len(prompt)

    async def completions(self, http: web.Request) -> web.StreamResponse:
        raw = await http.read()
        self.bodies.append(raw)
        payload = json.loads(raw)
        self.log.append({"path": http.path, "payload": payload, "id": http.headers.get("X-Request-Id"),
                         "authorization": http.headers.get("Authorization")})  # fmt: skip
        if self.key and http.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "key", "code": 401}}, status=401)
        if self.error_status:
            return web.json_response(
                {"error": {"message": "broken", "code": self.error_status}}, status=self.error_status
            )
        stream = bool(payload.get("stream"))
        if self.refuse == "status" or (self.refuse == "sse" and not stream):
            return web.json_response({"error": {"message": "queue full", "type": "x", "code": 503}}, status=503)
        if self.loses_kv and not stream and "kv_transfer_params" in payload:
            return web.json_response({"error": {"message": "KV load failed", "type": "x", "code": 500}}, status=500)
        if self.fail_before:
            http.transport.close()
            return web.Response()
        count = int(payload.get("max_tokens", self.tokens))
        length = self.prompt_length(payload)
        done = first = False
        self.waiting += 1
        try:
            while self.running >= self.max_num_seqs:
                await asyncio.sleep(0.002)
        finally:
            self.waiting -= 1
        self.running += 1
        self.kv_tokens += length + count
        try:
            self.prompt_tokens += length
            if self.prefill_s_per_token:
                await asyncio.sleep(self.prefill_s_per_token * length)
            while self.hold_prefill:
                await asyncio.sleep(0.002)
            self.first_tokens += 1
            first = True
            answer = await (self._stream if stream else self._whole)(http, payload, length, count)
            done = True
            return answer
        finally:
            self.running -= 1
            self.kv_tokens -= length + count
            self.finished += done
            self.aborted += not done
            assert first or not done

    def _usage(self, length: int, count: int) -> dict:
        return {"prompt_tokens": length, "completion_tokens": count, "total_tokens": length + count}

    async def _whole(self, http: web.Request, payload: dict, length: int, count: int) -> web.Response:
        if self.decode_s:
            await asyncio.sleep(self.decode_s * (count - 1))
        while self.hold_decode and count > 1:
            await asyncio.sleep(0.002)
        self.generation_tokens += count
        text = "".join(self.words(payload, count))
        chat = http.path.endswith("chat/completions")
        choice = {"index": 0, "message": {"role": "assistant", "content": text}} if chat else {"index": 0, "text": text}
        answer = {"id": f"cmpl-{http.headers.get('X-Request-Id')}", "choices": [{**choice, "finish_reason": "length"}]}
        answer["usage"] = self._usage(length, count)
        if self.connector and (payload.get("kv_transfer_params") or {}).get("do_remote_decode"):
            answer["kv_transfer_params"] = {"do_remote_prefill": True, "remote_engine_id": self.port, "blocks": [1, 2]}
        return web.json_response(answer)

    async def _stream(self, http: web.Request, payload: dict, length: int, count: int) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(http)
        lost = self.loses_kv and "kv_transfer_params" in payload
        if self.refuse == "sse" or lost:
            what, code = ("KV load failed", 500) if lost else ("queue full", 503)
            error = {"error": {"message": what, "type": "ServiceUnavailable", "param": None, "code": code}}
            await response.write(b"data: " + json.dumps(error).encode() + b"\n\ndata: [DONE]\n\n")
            return response
        chat = http.path.endswith("chat/completions")
        name = f"cmpl-{http.headers.get('X-Request-Id')}"

        def event(content: dict) -> bytes:
            return b"data: " + json.dumps({"id": name, **content}, separators=(",", ":")).encode() + b"\n\n"

        if chat:
            await response.write(event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}))
        for index, word in enumerate(self.words(payload, count)):
            if index and self.decode_s:
                await asyncio.sleep(self.decode_s)
            while self.hold_decode and index:
                await asyncio.sleep(0.002)
            if self.fail_after and index >= self.fail_after:
                http.transport.close()
                return response
            choice = {"delta": {"content": word}} if chat else {"text": word}
            finish = "length" if index == count - 1 else None
            await response.write(event({"choices": [{"index": 0, **choice, "finish_reason": finish}]}))
            self.generation_tokens += 1
        if (payload.get("stream_options") or {}).get("include_usage"):
            await response.write(event({"choices": [], "usage": self._usage(length, count)}))
        await response.write(b"data: [DONE]\n\n")
        return response

    async def metrics(self, http: web.Request) -> web.Response:
        labels = '{engine="0",model_name="tiny"}'
        usage = self.kv_tokens / (self.kv_blocks * self.block_tokens)
        lines = [
            "# HELP vllm:num_requests_running Number of requests in model execution batches.",
            "# TYPE vllm:num_requests_running gauge",
            f"vllm:num_requests_running{labels} {float(self.running)}",
            f"vllm:num_requests_waiting{labels} {float(self.waiting)}",
            f"vllm:kv_cache_usage_perc{labels} {usage}",
            f"vllm:num_preemptions_total{labels} 0.0",
            f"vllm:prompt_tokens_total{labels} {float(self.prompt_tokens)}",
            f"vllm:generation_tokens_total{labels} {float(self.generation_tokens)}",
            f'vllm:time_to_first_token_seconds_bucket{{engine="0",le="0.1"}} {float(self.first_tokens)}',
            f"vllm:time_to_first_token_seconds_count{labels} {float(self.first_tokens)}",
            f'vllm:cache_config_info{{block_size="{self.block_tokens}",num_gpu_blocks="{self.kv_blocks}"}} 1.0',
        ]
        return web.Response(text="\n".join(lines) + "\n")

    async def health(self, http: web.Request) -> web.Response:
        return web.Response(status=200 if self.healthy else 503)

    async def models(self, http: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "tiny", "object": "model"}]})

    def app(self) -> web.Application:
        app = web.Application(client_max_size=2**28)
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_post("/v1/chat/completions", self.completions)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/health", self.health)
        app.router.add_get("/v1/models", self.models)
        return app

    async def start(self) -> None:
        self._runner = web.AppRunner(self.app(), handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port)
        await site.start()
        self.port = site._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        with suppress(Exception):
            await self._runner.cleanup()


@asynccontextmanager
async def upstreams(*fakes: FakeUpstream):
    """Serve some fakes."""
    for fake in fakes:
        await fake.start()
    try:
        yield fakes
    finally:
        for fake in fakes:
            await fake.stop()
