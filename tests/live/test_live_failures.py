"""Failures with real vLLM: an instance that dies mid-stream, a gateway that dies mid-batch."""

import asyncio
import json
import time

import aiohttp
import openai

from examples.live_cpu import servers

from .client import ask, completion, send, until
from .conftest import ENGINE

BATCH = 20


def test_kill_of_an_instance_mid_stream(python, model, pair, front, tmp_path):
    """What the client has seen nothing of is served elsewhere; a stream that had begun ends with one clean error."""
    survivor = pair["relaxed"]
    bodies = [completion(f"request {index}", 500, stream=index % 2 == 0) for index in range(6)]
    bodies += [completion(f"offline {index}", 300, service_tier="flex") for index in range(4)]
    expected = [ask(survivor.url, completion(body["prompt"], body["max_tokens"])).text for body in bodies]
    with servers.vllm_servers(python, model, {"victim": ENGINE}, tmp_path) as found:
        victim = found["victim"]
        gateway = front([(survivor, "relaxed"), (victim, "strict")])

        async def scene():
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                tasks = [asyncio.create_task(send(session, gateway.url, body)) for body in bodies]
                await until(lambda: survivor.load()[0] > 0 and victim.load()[0] > 1, True, tasks)
                await asyncio.sleep(0.5)
                victim.kill()
                return await asyncio.gather(*tasks)

        answers = asyncio.run(scene())
        later = ask(gateway.url, completion("afterwards", 8))
    broken = [answer for answer in answers if answer.error]
    whole = [(answer.text, text) for answer, text in zip(answers, expected, strict=True) if not answer.error]
    assert broken, "no stream ran on the instance that died"
    assert all(text == wanted for text, wanted in whole)
    for answer, body in zip(answers, bodies, strict=True):
        assert answer.status == 200
        if answer.error:
            assert body.get("stream") and not answer.done  # only what had begun may break off
            assert answer.body.count(b'"error"') == 1
    assert later.status == 200


def test_smoke_a_batch_survives_sigkill_of_the_gateway(pair, scenario, tmp_path):
    """Stock openai client; the gateway is killed mid-batch and started again over the same store."""
    instances = [(pair["relaxed"], "relaxed"), (pair["strict"], "strict")]
    keys = {"jobs": str(tmp_path / "jobs.db"), "scrape_interval_s": 0.1, "timeouts": servers.PATIENT}
    config = servers.write_cluster(tmp_path / "cluster.yaml", instances, scenario, **keys)
    lines = [{"custom_id": f"r{index}", "method": "POST", "url": "/v1/completions",
              "body": completion(f"batch request {index}", 150)} for index in range(BATCH)]  # fmt: skip
    expected = {line["custom_id"]: ask(pair["relaxed"].url, line["body"]).text for line in lines}
    with servers.gateway(config, "ooco", tmp_path / "gateway.log") as first:
        client = openai.OpenAI(base_url=first.url + "/v1", api_key="none", max_retries=0)
        content = "".join(json.dumps(line) + "\n" for line in lines).encode()
        file = client.files.create(file=("batch.jsonl", content), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        _until(lambda: client.batches.retrieve(batch.id).request_counts.completed >= 2)
        done = client.batches.retrieve(batch.id).request_counts.completed
        first.kill()
        assert done < BATCH, "the batch ended before the gateway was killed"
    with servers.gateway(config, "ooco", tmp_path / "gateway.log") as second:
        client = openai.OpenAI(base_url=second.url + "/v1", api_key="none", max_retries=0)
        _until(lambda: client.batches.retrieve(batch.id).status in ("completed", "failed", "expired"))
        ended = client.batches.retrieve(batch.id)
        assert ended.status == "completed" and ended.request_counts.completed == BATCH
        results = [json.loads(line) for line in client.files.content(ended.output_file_id).text.splitlines()]
    assert sorted(result["custom_id"] for result in results) == sorted(expected)  # none lost, none twice
    for result in results:
        assert result["response"]["body"]["choices"][0]["text"] == expected[result["custom_id"]]


def _until(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:g} s in vain"
        time.sleep(0.05)
