"""Instances that fail in every way while three kinds of clients send: no answer is wrong, nothing stays booked."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import urllib.request
from contextlib import ExitStack

import pytest

pytest.importorskip("uvicorn", reason="the bridge extra is not installed")
pytest.importorskip("aiohttp", reason="the bridge extra is not installed")
from fake_upstream import FakeUpstream, upstreams
from harness import config_for, gateway, text_of


@pytest.mark.parametrize("connector", ["none", "nixl"])
@pytest.mark.parametrize("seed", range(2))
def test_nothing_is_wrong_or_left_over(seed, connector):
    rng = random.Random(seed)

    async def misbehave(fakes):
        while True:
            fake = rng.choice(fakes)
            fault, value = rng.choice(
                [("fail_before", True), ("refuse", "sse"), ("refuse", "status"), ("error_status", 500),
                 ("fail_after", 3), ("healthy", False), ("connector", False)]
            )  # fmt: skip
            before = getattr(fake, fault)
            setattr(fake, fault, value)
            await asyncio.sleep(rng.uniform(0.01, 0.1))
            setattr(fake, fault, before)

    async def scenario():
        fakes = [
            FakeUpstream(prefill_s_per_token=5e-4, decode_s=2e-3, max_num_seqs=6, connector=True) for _ in range(4)
        ]
        async with upstreams(*fakes):
            config = config_for(fakes[:2], fakes[2:], connector=connector)
            async with gateway(config) as client:
                client.scheduler.placement.pull_interval_s = 0.01
                outcomes = {"right": 0, "error": 0, "gone": 0}

                async def one(index):
                    await asyncio.sleep(rng.uniform(0, 1.5))
                    offline = index % 3 == 0
                    payload = {"prompt": f"prompt {index}", "max_tokens": rng.randint(1, 12), "stream": index % 2 == 0,
                               "service_tier": "flex" if offline else "auto"}  # fmt: skip
                    right = "".join(fakes[0].words(payload, payload["max_tokens"]))
                    if index % 15 == 0:
                        status, body = await client.scheduler.complete("/v1/completions", payload, f"job-{index}")
                        assert status == 200 and body["choices"][0]["text"] == right
                        return "right"
                    task = asyncio.create_task(client.post(payload))
                    if index % 10 == 7:
                        await asyncio.sleep(rng.uniform(0, 0.05))
                        task.cancel()
                        return "gone"
                    status, body, _ = await task
                    if status != 200 or b'data: {"error"' in body:
                        assert not offline, body
                        events = body.strip().split(b"\n\n")
                        assert "error" in json.loads(events[-1].removeprefix(b"data: "))
                        assert status != 200 or right.startswith(text_of(body))
                        return "error"
                    assert text_of(body) == right
                    return "right"

                chaos = asyncio.create_task(misbehave(fakes))
                for outcome in await asyncio.gather(*(one(index) for index in range(150))):
                    outcomes[outcome] += 1
                chaos.cancel()
                await client.until(lambda: not client.scheduler.backlog and not client.bridge.ledger.live)
                await client.until(lambda: not any(i.load.requests for i in client.scheduler.instances))
                for instance in client.scheduler.instances:
                    load = instance.load
                    sums = (load.tokens, load.pending, load.online_decodes, load.offline_decodes, load.offline_prefills,
                            load.offline_prefill_tokens, load.online, load.offline, instance.reserved)  # fmt: skip
                    assert not any(sums) and load.pending_s == 0.0 and instance.reserved_tokens == 0
                assert outcomes["right"] > 80
                totals = client.totals
                ended = totals.online_finished + totals.online_failed + totals.online_cancelled + totals.online_refused
                assert ended == totals.online_requests
                assert totals.offline_finished + totals.offline_cancelled == totals.offline_requests
                await client.until(lambda: not any(fake.running for fake in fakes))

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_the_command_serves_says_what_it_does_not_enforce_and_ends_in_order(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text("instances: [{url: 'http://127.0.0.1:9', role: relaxed}]\nlisten: {port: 0}\n")
    command = [sys.executable, "-m", "ooco_gym.bridge", "serve", f"config={path}", "policy=ooco"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process, ExitStack() as stack:
        stack.callback(process.kill)  # or a failing test would wait for it
        seen = []
        for line in process.stderr:
            seen.append(line)
            if line.startswith("listening on "):
                break
        url = line.split()[-1]
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(url + "/health", timeout=20)
        assert caught.value.code == 503 and json.load(caught.value)["status"] == "no instance is up"
        process.send_signal(signal.SIGTERM)
        seen += process.stderr.readlines()
        assert process.wait(20) == 0
    logged = [json.loads(line) for line in seen if not line.startswith("listening on ")]
    assert any(entry.get("note", "").startswith("knob prefill_chunk is not enforced: ") for entry in logged)
    assert "instance is down" in {entry["event"] for entry in logged}
    assert {"serving", "shutting down", "stopped"} <= {entry["event"] for entry in logged}
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT.*Z", entry["time"]) for entry in logged)
