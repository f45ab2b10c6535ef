"""Prefill on one real vLLM, decode on another: KV handed over through NixlConnector, and a prefill server that dies."""

import asyncio
import json
import threading
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from examples.live_cpu import servers
from examples.live_cpu.setup_vllm import has_nixl

from .client import ask, completion, until
from .conftest import ENGINE

FROM_ELSEWHERE = 'source="external_kv_transfer"'


@contextmanager
def in_between(server):
    """A relay in front of a vLLM server; with ``kill`` set the server dies before its answer is passed on."""

    class Relay(BaseHTTPRequestHandler):
        def pass_on(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
            request = urllib.request.Request(server.url + self.path, body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60.0) as answer:
                content = answer.read()
            if body is not None and relay.kill:
                server.kill()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = pass_on  # noqa: N815

        def log_message(self, *arguments):
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *arguments):
            """The connection breaks off, as the one to a dead server does."""

    with Quiet(("127.0.0.1", 0), Relay) as listener:
        relay = SimpleNamespace(url=f"http://127.0.0.1:{listener.server_port}", kill=False)
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield relay
        listener.shutdown()


def test_hand_over_through_nixl_and_its_loss(python, model, pair, front, tmp_path):
    if not has_nixl(python):
        pytest.skip("vLLM's environment has no NIXL: python examples/live_cpu/setup_vllm.py --nixl adds it")
    engines = {name: servers.with_nixl(ENGINE) for name in ("relaxed", "strict")}
    prompts = [f"Prompt {name}, computed on the relaxed instance, " * 8 for name in ("one", "two", "three")]
    with servers.vllm_servers(python, model, engines, tmp_path) as found, in_between(found["relaxed"]) as relaxed:
        strict = found["strict"]
        gateway = front([(relaxed, "relaxed"), (strict, "strict")], connector="nixl")

        def answer(prompt, **more):
            """Through the gateway; the same as of a server without a connector."""
            expected = ask(pair["strict"].url, completion(prompt, 40, **more))
            through = ask(gateway.url, completion(prompt, 40, **more))
            assert through.status == 200 and through.error is None
            assert through.text == expected.text and through.done == expected.done
            return through

        def counts():
            return gateway.metrics("ooco_handovers_total", "ooco_recomputed_handovers_total", "ooco_retries_total")

        def moved():
            """(prompt tokens whose KV came from the other server, transfers that failed) as vLLM counts them."""
            tokens = strict.counter("vllm:prompt_tokens_by_source_total", FROM_ELSEWHERE)
            return tokens, strict.counter("vllm:nixl_num_failed_transfers_total")

        tokens = json.loads(answer(prompts[0]).body)["usage"]["prompt_tokens"]
        assert counts() == [1, 0, 0]
        asyncio.run(until(moved, (tokens, 0)))  # vLLM books them a moment after the answer
        asyncio.run(until(lambda: strict.counter("vllm:nixl_bytes_transferred_sum") > 0, True))
        assert strict.counter("vllm:prompt_tokens_by_source_total", 'source="local_compute"') == 0

        # The prompt is computed and its KV is lost: the strict server finds that out and the gateway makes it compute.
        relaxed.kill = True
        answer(prompts[1], stream=True)
        assert counts() == [2, 1, 0]
        asyncio.run(until(lambda: moved()[1] > 0, True))
        assert moved()[0] == tokens
        assert not found["relaxed"].alive()

        # There is nobody left to compute prompts: the strict server gets whole requests.
        answer(prompts[2], stream=True)
        handovers, recomputed, _ = counts()
        assert (handovers, recomputed) == (2, 1)
