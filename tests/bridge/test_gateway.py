"""The gateway over fake instances on real sockets: what a client sees, whatever the instances do."""

# ruff: noqa: SIM117 -- a line for each server that a test starts
from __future__ import annotations

import asyncio
import json
import socket

import pytest

pytest.importorskip("uvicorn", reason="the bridge extra is not installed")
pytest.importorskip("aiohttp", reason="the bridge extra is not installed")
from fake_upstream import FakeUpstream, upstreams
from harness import config_for, gateway, text_of

PROMPT = {"model": "tiny", "prompt": "once upon a time", "max_tokens": 8}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, 60))


def test_answers_are_those_of_a_direct_call():
    async def scenario():
        async with upstreams(FakeUpstream(), FakeUpstream()) as (relaxed, strict):
            async with gateway(config_for([relaxed], [strict])) as client:
                for path, payload in (("/v1/completions", PROMPT), ("/v1/chat/completions", CHAT)):
                    for stream in (False, True):
                        headers = {"X-Request-Id": "abc-1", "Content-Type": "application/json"}
                        body = json.dumps({**payload, "stream": stream, "unknown": [1.0]}).encode()
                        mine = await client.post(body, path, headers)
                        direct = await client.post(body, path, headers, base=relaxed.url)
                        assert mine[:2] == direct[:2]  # byte for byte, events and all
                        assert mine[2]["Content-Type"] == direct[2]["Content-Type"]
                        assert mine[2]["X-Request-Id"] == "abc-1"
                        assert (relaxed.bodies + strict.bodies).count(body) >= 2  # forwarded unchanged
                assert client.totals.online_output_tokens == 4 * 8  # counted by events, or as the engine says

    run(scenario())


def test_models_health_and_metrics():
    async def scenario():
        async with upstreams(FakeUpstream()) as (only,), gateway(config_for([only])) as client:
            assert json.loads((await client.get("/v1/models"))[1])["data"][0]["id"] == "tiny"
            assert (await client.get("/health"))[0] == 200
            await client.text(PROMPT)
            page = (await client.get("/metrics"))[1].decode()
            assert 'ooco_requests_total{class="online",outcome="finished"} 1.0' in page
            assert 'ooco_output_tokens_total{class="online"} 8.0' in page
            assert 'ooco_prompt_tokens_total{class="online"} 16.0' in page  # as the engine counts them
            assert 'ooco_prompt_tokens_total{class="offline"} 0.0' in page
            await client.text({**PROMPT, "service_tier": "flex"})
            page = (await client.get("/metrics"))[1].decode()
            assert 'ooco_prompt_tokens_total{class="offline"} 16.0' in page
            assert f'ooco_instance_correction{{engine="0",of="iteration",role="relaxed",url="{only.url}"}} 1.0' in page
            assert f'ooco_instance_up{{engine="0",role="relaxed",url="{only.url}"}} 1.0' in page
            assert "instance=" not in page  # Prometheus puts that label on every series itself
            only.healthy = False
            await client.until(lambda: not client.scheduler.instances[0].up)
            status, body = await client.get("/health")
            assert status == 503 and json.loads(body)["status"] == "no instance is up"
            assert (await client.post(PROMPT))[0] == 503

    run(scenario())


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"[1]", 400, "invalid_json"),
        (b"", 400, "invalid_json"),
        (b'{"prompt": 3}', 400, "invalid_value"),
        (b'{"prompt": "x", "stream": "yes"}', 400, "invalid_value"),
        (b'{"prompt": "' + b"x" * 5000 + b'"}', 413, "body_too_large"),
    ],
)
def test_bad_bodies_are_refused_in_openai_form(body, status, code):
    async def scenario():
        async with upstreams(FakeUpstream()) as (only,):
            async with gateway(config_for([only], limits={"max_body_bytes": 4096})) as client:
                got, text, _ = await client.post(body)
                error = json.loads(text)["error"]
                assert (got, error["code"]) == (status, code)
                assert set(error) == {"message", "type", "param", "code"}
                assert not only.log

    run(scenario())


def test_paths_and_methods_that_are_not_there(tmp_path):
    async def scenario():
        async with upstreams(FakeUpstream()) as (only,):
            async with gateway(config_for([only], jobs=str(tmp_path / "jobs.sqlite"))) as client:
                for method, path, status, allow in (
                    ("GET", "/v1/completions", 405, "POST"),
                    ("HEAD", "/v1/chat/completions", 405, "POST"),
                    ("PUT", "/v1/files", 405, "GET, HEAD, POST"),  # two routes
                    ("POST", "/v1/files/none", 405, "DELETE, GET, HEAD"),
                    ("POST", "/health", 405, "GET, HEAD"),
                    ("GET", "/v1/embeddings", 404, None),
                    ("POST", "/nothing", 404, None),
                ):
                    async with client.session.request(method, client.base + path) as answer:
                        assert (answer.status, answer.headers.get("Allow")) == (status, allow)
                        if method != "HEAD":
                            error = (await answer.json())["error"]
                            assert error["type"] == "invalid_request_error" and path in error["message"]
                for path in ("/health", "/metrics", "/status", "/status.json", "/v1/models"):
                    async with client.session.head(client.base + path) as answer:
                        assert answer.status == 200 and not await answer.read()

    run(scenario())


def test_a_defect_is_told_in_openai_form(monkeypatch):
    async def scenario():
        async with upstreams(FakeUpstream()) as (only,), gateway(config_for([only])) as client:
            monkeypatch.setattr(client.bridge.gateway.scheduler, "online", lambda *_: 1 / 0)
            status, body, _ = await client.post(PROMPT)
            assert status == 500 and json.loads(body)["error"]["type"] == "server_error"

    run(scenario())


def test_chunked_oversize_body_is_refused():
    async def scenario():
        async def pieces():
            for _ in range(20):
                yield b"x" * 1000

        async with upstreams(FakeUpstream()) as (only,):
            async with gateway(config_for([only], limits={"max_body_bytes": 4096})) as client:
                async with client.session.post(client.base + "/v1/completions", data=pieces()) as answer:
                    assert answer.status == 413

    run(scenario())


def test_slow_body_times_out():
    async def scenario():
        async with upstreams(FakeUpstream()) as (only,):
            async with gateway(config_for([only], timeouts={"body_s": 0.1})) as client:
                port = int(client.base.rsplit(":", 1)[1])
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
                line = await asyncio.wait_for(reader.readline(), 15)
                assert b"408" in line
                writer.close()

    run(scenario())


def test_wrong_key_is_refused_and_upstream_key_is_sent():
    async def scenario():
        async with upstreams(FakeUpstream(key="inner")) as (only,):
            environment = {"FRONT": "secret", "BACK": "inner"}
            config = config_for([only], environment=environment, api_key_env="FRONT", upstream_key_env="BACK")
            async with gateway(config) as client:
                for given in (
                    None,
                    "Bearer wrong",
                    "secret",
                    "Bearer SECRET",
                    "Basic secret",
                    "Bearer",
                    "Bearer secret x",
                ):
                    headers = {"Authorization": given} if given else {}
                    status, body, _ = await client.post(PROMPT, headers=headers)
                    assert status == 401 and json.loads(body)["error"]["code"] == "invalid_api_key"
                assert (await client.get("/v1/models"))[0] == 401
                assert (await client.get("/v1/nothing"))[0] == 401  # what there is, is told with the key only
                assert (await client.get("/%76%31/models"))[0] == 401
                assert (await client.get("/health"))[0] == 200
                assert not only.log
                assert await client.text(PROMPT, headers={"Authorization": "Bearer secret"})
                assert only.log[0]["authorization"] == "Bearer inner"
                assert await client.text(PROMPT, headers={"Authorization": "bearer  secret"})  # the scheme has no case

    run(scenario())


def test_bad_class_header_is_refused_and_classes_are_told_apart():
    async def scenario():
        async with upstreams(FakeUpstream()) as (only,), gateway(config_for([only])) as client:
            for name in ("soon", "batch", "", "x" * 2000):
                status, body, _ = await client.post(PROMPT, headers={"X-Request-Class": name})
                message = json.loads(body)["error"]["message"]
                assert status == 400 and message.endswith("accepted are online and offline") and len(message) < 120
            for extra, headers in (({}, {"X-Request-Class": "offline"}), ({"service_tier": "flex"}, {}),
                                   ({"service_tier": "batch"}, {})):  # fmt: skip
                await client.text({**PROMPT, **extra}, headers=headers)
            assert client.totals.offline_finished == 3 and client.totals.online_requests == 0
            await client.text({**PROMPT, "service_tier": "auto"})
            await client.text({**PROMPT, "service_tier": "flex"}, headers={"X-Request-Class": "online"})
            assert client.totals.online_finished == 2

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", ["fail_before", "error_status", "refuse_status", "refuse_sse", "gone"])
def test_failure_before_the_first_token_is_retried_elsewhere(fault, stream):
    async def scenario():
        bad, good = FakeUpstream(), FakeUpstream()
        async with upstreams(bad, good):
            async with gateway(
                config_for([good], [bad], scrape_interval_s=5.0)
            ) as client:  # plain routing prefers strict
                if fault == "gone":
                    await bad.stop()
                elif fault.startswith("refuse"):
                    bad.refuse = fault.removeprefix("refuse_")
                else:
                    setattr(bad, fault, 500 if fault == "error_status" else True)
                text = await client.text({**PROMPT, "stream": stream})
                assert text == "".join(good.words(PROMPT, 8))
                assert client.totals.retries == 1 and client.totals.online_finished == 1

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_refusal_everywhere_reaches_the_client_as_503(stream):
    async def scenario():
        async with upstreams(FakeUpstream(refuse="sse"), FakeUpstream(refuse="status")) as (one, two):
            async with gateway(config_for([one], [two])) as client:
                status, body, headers = await client.post({**PROMPT, "stream": stream})
                assert status == 503 and json.loads(body)["error"]["message"] == "queue full"
                assert headers["Retry-After"]
                assert len(one.log) == len(two.log) == 1

    run(scenario())


def test_a_broken_connection_is_tried_once_more_where_there_is_nowhere_else():
    async def scenario():
        async with upstreams(FakeUpstream(fail_before=True)) as (only,), gateway(config_for([only])) as client:
            status, body, _ = await client.post({**PROMPT, "stream": True})
            assert status == 503 and "no instance could serve" in json.loads(body)["error"]["message"]
            assert len(only.log) == 2
            assert client.totals.online_failed == 1

    run(scenario())


def test_client_errors_are_passed_on_and_not_retried():
    async def scenario():
        async with upstreams(FakeUpstream(error_status=404), FakeUpstream(error_status=404)) as fakes:
            async with gateway(config_for(fakes[:1], fakes[1:])) as client:
                status, body, _ = await client.post(PROMPT)
                assert status == 404 and json.loads(body)["error"]["message"] == "broken"
                assert sum(len(fake.log) for fake in fakes) == 1
                assert client.totals.online_refused == 1 and client.totals.judged == 0

    run(scenario())


def test_failure_after_the_first_token_is_a_clean_error_event():
    async def scenario():
        async with upstreams(FakeUpstream(fail_after=3, decode_s=0.01), FakeUpstream()) as (bad, good):
            async with gateway(config_for([good], [bad])) as client:
                status, body, _ = await client.post({**PROMPT, "stream": True})
                events = body.decode().strip().split("\n\n")
                assert status == 200
                assert text_of(body) == "".join(bad.words(PROMPT, 3))
                assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] == "server_error"
                assert not good.log  # what the client has seen cannot be tried again
                assert client.totals.online_failed == 1

    run(scenario())


def test_vanishing_client_cancels_upstream():
    async def scenario():
        async with upstreams(FakeUpstream(decode_s=0.05)) as (only,), gateway(config_for([only])) as client:
            for stream, tier in ((True, "auto"), (False, "auto"), (True, "flex")):
                before = only.aborted
                payload = {**PROMPT, "max_tokens": 100, "stream": stream, "service_tier": tier}
                task = asyncio.create_task(client.post(payload))
                await client.until(lambda: only.running == 1)
                task.cancel()
                await client.until(lambda before=before: only.aborted == before + 1 and only.running == 0)
            assert client.totals.online_cancelled == 2 and client.totals.offline_cancelled == 1
            assert not client.bridge.ledger.live
            assert not client.scheduler.instances[0].load.requests

    run(scenario())


def test_client_that_does_not_read_is_dropped():
    async def scenario():
        async with upstreams(FakeUpstream()) as (only,):
            async with gateway(config_for([only], timeouts={"client_s": 0.2})) as client:
                port = int(client.base.rsplit(":", 1)[1])
                body = json.dumps({**PROMPT, "max_tokens": 100_000, "stream": True}).encode()
                narrow = socket.create_connection(("127.0.0.1", port))
                narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # or the kernel would read megabytes
                _, writer = await asyncio.open_connection(sock=narrow, limit=1024)
                writer.write(
                    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
                )
                await client.until(lambda: client.totals.online_cancelled == 1)
                await client.until(lambda: only.running == 0)
                writer.close()

    run(scenario())


def test_two_hundred_clients():
    async def scenario():
        async with upstreams(
            FakeUpstream(prefill_s_per_token=1e-3, decode_s=2e-3), FakeUpstream(decode_s=2e-3)
        ) as fakes:
            async with gateway(config_for(fakes[:1], fakes[1:])) as client:

                async def one(index):
                    tier = "flex" if index % 4 == 0 else "auto"
                    payload = {**PROMPT, "prompt": f"number {index}", "stream": index % 2 == 0, "service_tier": tier}
                    assert await client.text(payload) == "".join(fakes[0].words(payload, 8))

                await asyncio.gather(*(one(index) for index in range(200)))
                assert client.totals.online_finished == 150 and client.totals.offline_finished == 50
                for instance in client.scheduler.instances:
                    load = instance.load
                    assert not load.requests and load.tokens == 0 and load.pending == 0 and load.pending_s == 0.0
                    assert load.online_decodes == load.offline_decodes == load.offline_prefill_tokens == 0

    run(scenario())


def test_limits_on_counts():
    async def scenario():
        async with upstreams(FakeUpstream(decode_s=0.05, max_num_seqs=1)) as (only,):
            async with gateway(config_for([only], limits={"max_online": 2, "max_queue": 1})) as client:
                slow = {**PROMPT, "max_tokens": 200, "stream": True}
                tasks = [asyncio.create_task(client.post(slow)) for _ in range(2)]
                await client.until(lambda: len(client.bridge.ledger.live) == 2)
                status, body, headers = await client.post(PROMPT)
                assert status == 503 and json.loads(body)["error"]["code"] == "overloaded" and headers["Retry-After"]
                tasks.append(asyncio.create_task(client.post({**slow, "service_tier": "flex"})))
                await client.until(lambda: len(client.scheduler.backlog) == 1)
                status, body, _ = await client.post({**PROMPT, "service_tier": "flex"})
                assert status == 429 and json.loads(body)["error"]["code"] == "queue_full"
                for task in tasks:
                    task.cancel()
                await client.until(lambda: not client.scheduler.backlog and not client.bridge.ledger.live)

    run(scenario())


def test_stock_openai_client():
    openai = pytest.importorskip("openai")

    async def scenario():
        async with upstreams(FakeUpstream()) as (only,), gateway(config_for([only])) as client:
            api = openai.AsyncOpenAI(base_url=client.base + "/v1", api_key="EMPTY", max_retries=0)
            whole = await api.completions.create(model="tiny", prompt="p", max_tokens=4)
            stream = await api.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "p"}],
                max_tokens=4,
                stream=True,
                service_tier="flex",
            )
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert whole.choices[0].text == "".join(only.words({"prompt": "p"}, 4)) and len(text) == 20
            await api.close()

    run(scenario())


def test_graceful_shutdown_drains_online_and_gives_offline_up():
    async def scenario():
        fake = FakeUpstream(decode_s=0.02)
        async with upstreams(fake):
            config = config_for([fake], timeouts={"drain_s": 20.0})
            async with gateway(config, signals=True) as client:
                online = asyncio.create_task(client.post({**PROMPT, "max_tokens": 20, "stream": True}))
                await client.until(lambda: fake.first_tokens == 1)
                offline = asyncio.create_task(client.post({**PROMPT, "max_tokens": 400, "service_tier": "flex"}))
                await client.until(lambda: fake.first_tokens == 2)
                client.server.handle_exit(15, None)
                status, body, _ = await offline
                assert status == 503 and "shutting down" in json.loads(body)["error"]["message"]
                status, body, _ = await online
                assert status == 200 and body.endswith(b"[DONE]\n\n") and len(text_of(body)) == 100
        assert fake.aborted == 1 and fake.finished == 1

    run(scenario())


def test_shutdown_ends_what_does_not_drain_with_an_error():
    async def scenario():
        fake = FakeUpstream(decode_s=0.02)
        async with upstreams(fake):
            async with gateway(config_for([fake], timeouts={"drain_s": 0.2}), signals=True) as client:
                online = asyncio.create_task(client.post({**PROMPT, "max_tokens": 4000, "stream": True}))
                await client.until(lambda: fake.first_tokens == 1)
                client.server.handle_exit(15, None)
                status, body, _ = await online
                assert status == 200 and b'"the gateway is shutting down"' in body.split(b"\n\n")[-2]

    run(scenario())


def test_jobs_without_a_store_are_told_so():
    async def scenario():
        async with upstreams(FakeUpstream()) as (only,), gateway(config_for([only])) as client:
            for path in ("/v1/files", "/v1/batches", "/v1/batches/batch_1"):
                status, body = await client.get(path)
                assert (
                    status == 404
                    and "the key jobs of its cluster file is not set" in json.loads(body)["error"]["message"]
                )

    run(scenario())
