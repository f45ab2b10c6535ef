"""The gateway in front of real vLLM: the same answers as a direct call, offline work that gives way and comes back."""

import asyncio
import time

import aiohttp
import pytest

from examples.live_cpu import servers
from examples.live_cpu.servers import Engine

from .client import CHAT, COMPLETIONS, ask, chat, completion, send, until

PROMPTS = ["The quick brown fox", "A much longer prompt, " * 20, [1, 2, 3, 250]]


def both(pair):
    return [(pair["relaxed"], "relaxed"), (pair["strict"], "strict")]


@pytest.mark.parametrize("stream", [False, True])
def test_smoke_answers_are_those_of_a_direct_call(pair, front, stream):
    base = front(both(pair)).url
    cases = [(completion(prompt, 48, stream=stream), COMPLETIONS) for prompt in PROMPTS]
    cases += [(chat(prompt, 48, stream=stream), CHAT) for prompt in PROMPTS[:2]]
    seen = set()
    for body, path in cases:
        direct, through = ask(pair["strict"].url, body, path), ask(base, body, path)
        assert direct.status == through.status == 200
        assert len(direct.text) >= 40
        assert through.text == direct.text
        assert through.done == stream
        seen.add(through.text)
    assert len(seen) == len(cases)  # the model answers every prompt differently, so equal texts mean something


def test_smoke_offline_answers_too(pair, front):
    base = front(both(pair)).url
    for stream in (False, True):
        body = completion("offline work", 64, stream=stream)
        assert ask(base, {**body, "service_tier": "flex"}).text == ask(pair["strict"].url, body).text


def test_smoke_preemption_frees_the_engine_and_the_answer_stays_the_same(pair, front):
    """All seats of the only instance decode offline; an online arrival gets one, and no offline answer is cut."""
    engine = pair["relaxed"]
    gateway = front([(engine, "relaxed")])
    seats = 8
    offline = [completion(f"offline {index}", 800) for index in range(seats)]
    expected = ask(engine.url, offline[-1]).text

    async def scene():
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            running = [
                asyncio.create_task(send(session, gateway.url, {**body, "service_tier": "flex"})) for body in offline
            ]
            await until(engine.load, (seats, 0), running)
            await asyncio.sleep(0.3)
            online = await send(session, gateway.url, completion("online", 8, stream=True))
            answers = await asyncio.gather(*running)
            return online, answers

    online, answers = asyncio.run(scene())
    assert online.status == 200 and online.done
    assert [answer.status for answer in answers] == [200] * seats
    assert gateway.metrics("ooco_preemptions_total") >= [1.0]
    assert min(answer.took_s for answer in answers) > online.first_s  # it waited for none of them to end
    assert answers[-1].text == expected


def test_smoke_a_client_that_leaves_frees_the_engine_within_a_second(pair, front):
    engine = pair["strict"]
    gateway = front([(engine, "strict")])

    async def scene():
        async with aiohttp.ClientSession() as session:
            task = asyncio.create_task(send(session, gateway.url, completion("leaves", 2500, service_tier="flex")))
            await until(engine.load, (1, 0), [task])
            task.cancel()
            began = time.perf_counter()
            await until(engine.load, (0, 0), seconds=5.0)
            return time.perf_counter() - began

    assert asyncio.run(scene()) < 1.0


def test_a_refusal_in_a_stream_becomes_an_http_error(python, model, front, tmp_path):
    """However vLLM refuses a stream, a client of the gateway sees the status that is meant; offline work waits."""
    engine = Engine(max_seqs=1, more=("--max-num-queued-reqs", "2"))
    with servers.vllm_servers(python, model, {"small": engine}, tmp_path) as found:
        small = found["small"]
        gateway = front([(small, "relaxed")])

        async def scene():
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
                busy = []
                for load in ((1, 0), (1, 1)):  # one by one: both at once would be one too many
                    busy.append(asyncio.create_task(send(session, small.url, completion(f"busy {load}", 1500))))
                    await until(small.load, load, busy)
                direct = await send(session, small.url, completion("refused", 8, stream=True))
                refused = await send(session, gateway.url, completion("refused", 8, stream=True))
                flex = asyncio.create_task(send(session, gateway.url, completion("patient", 8, service_tier="flex")))
                await asyncio.gather(*busy)
                return direct, refused, await flex

        direct, refused, flex = asyncio.run(scene())
    # vLLM 0.32 says it by the status or, HTTP 200, by an error event, depending on where it notices.
    assert direct.error and direct.status in (200, 503)
    assert refused.status == 503 and refused.error
    assert not refused.body.startswith(b"data:")
    assert flex.status == 200 and flex.error is None  # offline work waits instead
