"""Jobs, flex and online requests through one gateway; a gateway that stops and starts again finishes its jobs."""

# ruff: noqa: SIM117 -- a line for each server that a test starts
from __future__ import annotations

import asyncio
import json

import pytest

pytest.importorskip("uvicorn", reason="the bridge extra is not installed")
pytest.importorskip("aiohttp", reason="the bridge extra is not installed")
pytest.importorskip("ooco_gym.bridge.jobs", reason="the job API is not there")
pytest.importorskip("openai", reason="the dev extra is not installed")
import openai
from fake_upstream import FakeUpstream, upstreams
from harness import config_for, gateway


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, 60))


def lines(count, tokens=4):
    return "".join(
        json.dumps({"custom_id": f"c{i}", "method": "POST", "url": "/v1/completions",
                    "body": {"model": "tiny", "prompt": f"prompt {i}", "max_tokens": tokens}}) + "\n"
        for i in range(count)
    ).encode()  # fmt: skip


async def start(api, content):
    file = await api.files.create(file=("in.jsonl", content), purpose="batch")
    return await api.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")


async def finished(api, batch_id):
    while True:
        batch = await api.batches.retrieve(batch_id)
        if batch.status in ("completed", "failed", "cancelled", "expired"):
            return batch
        await asyncio.sleep(0.02)


def test_a_job_runs_beside_online_requests_and_survives_a_restart(tmp_path):
    async def scenario():
        fake = FakeUpstream(prefill_s_per_token=0.001, decode_s=0.01, max_num_seqs=4)
        async with upstreams(fake):
            settings = {"jobs": str(tmp_path / "jobs.sqlite"), "environment": {"KEY": "k"}, "api_key_env": "KEY"}
            async with gateway(config_for([fake], **settings)) as client:
                api = openai.AsyncOpenAI(base_url=client.base + "/v1", api_key="k", max_retries=0)
                batch = await start(api, lines(30))
                await client.until(lambda: fake.finished >= 6)
                fake.hold_decode = True
                for _ in range(3):  # each aborts a prefill or takes a seat
                    await api.completions.create(model="tiny", prompt="online", max_tokens=1)
                wrong = openai.AsyncOpenAI(base_url=client.base + "/v1", api_key="x", max_retries=0)
                with pytest.raises(openai.AuthenticationError):
                    await wrong.batches.retrieve(batch.id)
                assert client.totals.offline_finished < 30
                await api.close()
                await wrong.close()
            aborted, fake.hold_decode = fake.aborted, False
            async with gateway(config_for([fake], **settings)) as client:
                api = openai.AsyncOpenAI(base_url=client.base + "/v1", api_key="k", max_retries=0)
                done = await finished(api, batch.id)
                assert done.status == "completed" and done.request_counts.completed == 30
                text = (await api.files.content(done.output_file_id)).text
                answers = {}
                for line in text.splitlines():
                    entry = json.loads(line)
                    assert entry["custom_id"] not in answers
                    answers[entry["custom_id"]] = entry["response"]["body"]["choices"][0]["text"]
                assert answers == {f"c{i}": "".join(fake.words({"prompt": f"prompt {i}"}, 4)) for i in range(30)}
                await api.close()
            assert aborted >= 1  # what ran when the first gateway stopped

    run(scenario())


def test_backlog_counts_what_the_store_holds(tmp_path):
    async def scenario():
        fake = FakeUpstream(hold_decode=True, max_num_seqs=2)
        async with upstreams(fake):
            async with gateway(config_for([fake], jobs=str(tmp_path / "jobs.sqlite"))) as client:
                api = openai.AsyncOpenAI(base_url=client.base + "/v1", api_key="k", max_retries=0)
                batch = await start(api, lines(200, 50))
                await client.until(lambda: client.scheduler.instances[0].load.offline == 2)
                control = client.bridge.control
                await client.until(lambda: control.last.telemetry["offline_backlog"] == 198)
                assert client.bridge.runner.pending() > 0  # not all are given to the gateway at once
                await api.batches.cancel(batch.id)
                assert (await finished(api, batch.id)).status == "cancelled"
                await client.until(lambda: fake.running == 0 and not client.scheduler.backlog)
                await api.close()

    run(scenario())
