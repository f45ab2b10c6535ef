"""What the scheduler does with offline work and with two pools: gate, preemption, pull, hand-over, retry."""

# ruff: noqa: SIM117 -- a line for each server that a test starts
from __future__ import annotations

import asyncio
import json
import math

import pytest

pytest.importorskip("uvicorn", reason="the bridge extra is not installed")
pytest.importorskip("aiohttp", reason="the bridge extra is not installed")
from fake_upstream import FakeUpstream, upstreams
from harness import config_for, gateway, text_of

from ooco_gym.bridge.gateway.load import Request
from ooco_gym.policy import ConstantPolicy

PROMPT = {"model": "tiny", "prompt": "once upon a time", "max_tokens": 8}
OFFLINE = {**PROMPT, "service_tier": "flex"}


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, 60))


def policy(rules=None, **knobs):
    return ConstantPolicy("test", rules or {}, knobs)


def send(client, payload, **more):
    return asyncio.create_task(client.text({**payload, **more}))


def test_gate_counts_offline_requests_in_units_of_saturation_batches():
    async def scenario():
        fake = FakeUpstream(hold_decode=True)
        async with upstreams(fake), gateway(config_for([fake]), policy(gate_batch=0.1)) as client:
            client.scheduler.instances[0].saturation_batch = 30  # 0.1 of it is 3
            tasks = [send(client, OFFLINE, stream=True, prompt=f"p{index}") for index in range(7)]
            await client.until(lambda: fake.running == 3)
            await client.rounds()
            assert fake.running == 3 and len(client.scheduler.backlog) == 4
            fake.hold_decode = False
            assert await asyncio.gather(*tasks) == ["".join(fake.words({"prompt": f"p{i}"}, 8)) for i in range(7)]

    run(scenario())


def test_online_goes_first_and_offline_waits_for_its_first_token():
    async def scenario():
        fake = FakeUpstream(hold_prefill=True)
        async with upstreams(fake), gateway(config_for([fake])) as client:
            online = send(client, PROMPT, stream=True)
            await client.until(lambda: len(fake.log) == 1)
            offline = send(client, OFFLINE)
            await client.until(lambda: len(client.scheduler.backlog) == 1)
            await client.rounds()
            assert len(fake.log) == 1  # the gate is open, but an online request waits there
            fake.hold_prefill = False
            await online
            await offline
            assert len(fake.log) == 2

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_preempted_prefill_is_restarted_and_answers_as_if_nothing_had_happened(stream):
    async def scenario():
        fake = FakeUpstream(hold_prefill=True)
        async with upstreams(fake), gateway(config_for([fake])) as client:
            offline = send(client, OFFLINE, stream=stream)
            await client.until(lambda: fake.running == 1)
            online = send(client, PROMPT, prompt="hi", stream=True)
            await client.until(lambda: fake.aborted == 1)
            fake.hold_prefill = False
            assert await online == "".join(fake.words({"prompt": "hi"}, 8))
            assert await offline == "".join(fake.words(PROMPT, 8))
            assert [entry["payload"]["prompt"] for entry in fake.log] == [PROMPT["prompt"], "hi", PROMPT["prompt"]]
            assert fake.log[0]["id"] != fake.log[2]["id"]
            assert client.totals.preemptions == 1
            assert 0 < client.totals.wasted_prompt_tokens <= 16 and client.totals.wasted_output_tokens == 0
            assert client.totals.offline_finished == 1 and client.totals.offline_taken == 1

    run(scenario())


def test_preempted_requests_return_to_the_head_of_the_backlog_in_order():
    async def scenario():
        fake = FakeUpstream(hold_prefill=True, max_num_seqs=2)
        async with upstreams(fake), gateway(config_for([fake])) as client:
            tasks = []
            for name in ("a", "b", "c", "d"):
                tasks.append(send(client, OFFLINE, prompt=name * 20))
                await client.until(lambda: len(client.scheduler.backlog) + fake.running == len(tasks))
            await client.until(lambda: len(fake.log) == 2)
            tasks.append(send(client, PROMPT, prompt="online", stream=True))
            await client.until(lambda: client.totals.preemptions == 2)
            assert [request.payload["prompt"][0] for request in client.scheduler.backlog] == ["a", "b", "c", "d"]
            await client.until(lambda: len(fake.log) == 3)
            fake.prefill_s_per_token, fake.hold_prefill = 0.002, False  # longer than two requests are apart
            await asyncio.gather(*tasks)
            order = "".join(entry["payload"]["prompt"][0] for entry in fake.log)
            assert order[:3] == "abo" and set(order[3:5]) == set("ab") and set(order[5:]) == set("cd")

    run(scenario())


def test_patient_slack_does_not_interrupt():
    async def scenario():
        fake = FakeUpstream()
        async with upstreams(fake), gateway(config_for([fake]), policy(preempt_slack=0.5)) as client:

            async def meet():
                """An online request arrives in the prefill of an offline one."""
                fake.hold_prefill, before = True, len(fake.log)
                offline = send(client, OFFLINE)
                await client.until(lambda: fake.running == 1)
                online = send(client, PROMPT, prompt="hi", stream=True)
                await client.until(lambda: len(fake.log) == before + 2)
                fake.hold_prefill = False
                await asyncio.gather(offline, online)

            await meet()
            assert client.totals.preemptions == 0 and fake.aborted == 0
            client.bridge.control.policy = policy(preempt_slack=0.01)  # 5 ms: less than the arrival's own prefill
            await client.until(lambda: client.scheduler.placement.knobs["preempt_slack"] == 0.01)
            await meet()
            assert client.totals.preemptions == 1

    run(scenario())


def test_decodes_give_way_where_the_engine_has_no_seat():
    async def scenario():
        fake = FakeUpstream(hold_decode=True, max_num_seqs=4)
        async with upstreams(fake), gateway(config_for([fake])) as client:
            tasks = [send(client, OFFLINE, stream=True, prompt=f"p{index}", max_tokens=30) for index in range(4)]
            await client.until(lambda: client.scheduler.instances[0].load.offline_decodes == 4)
            await send(client, PROMPT, max_tokens=1, stream=True)  # behind them it would wait for ever
            assert client.totals.preemptions == 1  # the newest one
            assert client.totals.wasted_output_tokens >= 1
            fake.hold_decode = False
            assert await asyncio.gather(*tasks) == ["".join(fake.words({"prompt": f"p{i}"}, 30)) for i in range(4)]
            assert [entry["payload"]["prompt"] for entry in fake.log].count("p3") == 2

    run(scenario())


def test_decodes_give_way_where_the_engine_has_no_kv():
    async def scenario():
        fake = FakeUpstream(hold_decode=True, kv_blocks=8)  # 128 tokens
        async with upstreams(fake), gateway(config_for([fake])) as client:
            instance = client.scheduler.instances[0]
            await client.until(lambda: instance.kv_blocks == 8)  # read from the engine's metrics
            long = send(client, OFFLINE, stream=True, prompt=list(range(60)), max_tokens=50)
            await client.until(lambda: instance.load.offline_decodes == 1 and instance.kv_usage() > 0.5)
            assert client.totals.preemptions == 0
            await send(client, PROMPT, prompt=list(range(70)), max_tokens=1, stream=True)
            assert client.totals.preemptions == 1
            fake.hold_decode = False
            await long

    run(scenario())


def test_online_request_that_the_engine_keeps_waiting_makes_room():
    async def scenario():
        fake = FakeUpstream(hold_decode=True, max_num_seqs=2)
        async with upstreams(fake), gateway(config_for([fake])) as client:
            client.scheduler.instances[0].max_seqs = 64  # what the gateway believes is wrong
            tasks = [send(client, OFFLINE, stream=True, prompt=f"p{index}", max_tokens=60) for index in range(2)]
            await client.until(lambda: client.scheduler.instances[0].load.offline_decodes == 2)
            await send(client, PROMPT, max_tokens=1, stream=True)  # behind them it would wait for ever
            assert client.totals.preemptions >= 1
            fake.hold_decode = False
            await asyncio.gather(*tasks)

    run(scenario())


def test_kv_reserve_keeps_offline_prompts_out():
    async def scenario():
        fake = FakeUpstream(hold_decode=True, kv_blocks=8)  # 128 tokens
        async with upstreams(fake), gateway(config_for([fake]), policy(kv_reserve=0.5)) as client:
            instance = client.scheduler.instances[0]
            await client.until(lambda: instance.kv_blocks == 8)
            first = send(client, OFFLINE, prompt=list(range(40)))
            await client.until(lambda: instance.load.offline == 1)
            second = send(client, OFFLINE, prompt=list(range(30)))  # 40 + 31 > 64
            await client.until(lambda: len(client.scheduler.backlog) == 1)
            await client.rounds()
            assert instance.load.offline == 1
            fake.hold_decode = False
            await asyncio.gather(first, second)

    run(scenario())


def test_unstreamed_requests_are_seen_to_decode_in_the_metrics():
    async def scenario():
        fake = FakeUpstream(hold_prefill=True, hold_decode=True)
        async with upstreams(fake), gateway(config_for([fake])) as client:
            load = client.scheduler.instances[0].load
            task = send(client, OFFLINE, max_tokens=30)
            await client.until(lambda: fake.running == 1)
            await client.rounds()
            assert load.offline_prefills == 1
            fake.hold_prefill = False
            await client.until(lambda: load.offline_decodes == 1 and load.offline_prefills == 0)
            assert fake.running == 1
            fake.hold_decode = False
            await task

    run(scenario())


def test_strict_instances_pull_by_length_within_kv_and_bound():
    async def scenario():
        relaxed, strict = FakeUpstream(hold_decode=True), FakeUpstream(hold_decode=True)
        async with upstreams(relaxed, strict):
            async with gateway(config_for([relaxed], [strict]), policy(gate_batch=0.1)) as client:
                one, two = client.scheduler.instances
                one.saturation_batch = 10  # the gate is full with one
                two.next_pull_s = math.inf  # until all have come
                prompts = [list(range(count)) for count in (40, 30, 800, 20)]
                client.scheduler.placement.pull_length = lambda instance: 800.0
                tasks = []
                for waiting, prompt in enumerate(prompts):
                    tasks.append(send(client, OFFLINE, prompt=prompt))
                    await client.until(lambda waiting=waiting: relaxed.log and len(client.scheduler.backlog) == waiting)
                two.next_pull_s = 0.0
                await client.until(lambda: strict.log)
                assert strict.log[0]["payload"]["prompt"] == prompts[2]
                assert relaxed.log[0]["payload"]["prompt"] == prompts[0]
                relaxed.hold_decode = strict.hold_decode = False
                await asyncio.gather(*tasks)
                assert client.totals.pulls >= 1
                pulled = client.totals.pulls
                client.bridge.control.policy = policy(gate_batch=0.1, pull_kv=0.0)
                await client.until(lambda: client.scheduler.placement.knobs["pull_kv"] == 0.0)
                await asyncio.gather(*(send(client, OFFLINE, prompt=prompt) for prompt in prompts))
                assert client.totals.pulls == pulled

    run(scenario())


def test_pull_respects_the_bound_on_tpot():
    async def scenario():
        relaxed, strict = FakeUpstream(), FakeUpstream()
        async with upstreams(relaxed, strict):
            async with gateway(config_for([relaxed], [strict])) as client:
                placement, instance = client.scheduler.placement, client.scheduler.instances[1]
                waiting = Request("r", "/v1/completions", b"", False, False, 100)
                assert placement.pulls(instance, 0.0) and placement.fits(instance, waiting)
                assert placement.pull_length(instance) > 1
                placement.knobs["tpot_bound"] = 0.3
                placement.tpot_s = 0.01  # 3 ms: less than an iteration of this model
                assert placement.pull_length(instance) == 1 and not placement.fits(instance, waiting)
                placement.rules["mix_selection"] = "all"
                assert placement.pulls(instance, 0.0) and placement.fits(instance, waiting)
                placement.rules["migration"] = "none"
                assert not placement.pulls(instance, 0.0)

    run(scenario())


@pytest.mark.parametrize("connector", ["example", "nixl"])
@pytest.mark.parametrize("stream", [False, True])
def test_hand_over_prefills_on_relaxed_and_decodes_on_strict(connector, stream):
    async def scenario():
        relaxed, strict = FakeUpstream(connector=True), FakeUpstream(connector=True)
        async with upstreams(relaxed, strict):
            async with gateway(config_for([relaxed], [strict], connector=connector)) as client:
                payload = {**PROMPT, "stream": stream, "stream_options": {"include_usage": True}} if stream else PROMPT
                body = json.dumps(payload).encode()
                status, answer, _ = await client.post(body, headers={"X-Request-Id": "h1"})
                assert status == 200 and text_of(answer) == "".join(strict.words(PROMPT, 8))
                first, second = relaxed.log[0], strict.log[0]
                assert first["payload"]["max_tokens"] == 1 and first["payload"]["stream"] is False
                assert "stream_options" not in first["payload"]
                assert first["id"] == second["id"] == "h1"
                if connector == "nixl":
                    assert first["payload"]["kv_transfer_params"] == {
                        "do_remote_decode": True,
                        "do_remote_prefill": False,
                    }
                    expected = {"do_remote_prefill": True, "remote_engine_id": relaxed.port, "blocks": [1, 2]}
                    assert second["payload"] == {**payload, "kv_transfer_params": expected}
                else:
                    assert strict.bodies[0] == body
                assert client.totals.handovers == 1 and client.totals.recomputed_handovers == 0
                assert client.totals.online_output_tokens == 8

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_lost_kv_is_computed_again_on_the_instance_that_misses_it(stream):
    async def scenario():
        relaxed, strict = FakeUpstream(connector=True), FakeUpstream(loses_kv=True)
        async with upstreams(relaxed, strict):
            async with gateway(config_for([relaxed], [strict], connector="nixl")) as client:
                assert await client.text({**PROMPT, "stream": stream}) == "".join(strict.words(PROMPT, 8))
                assert len(relaxed.log) == 1 and len(strict.log) == 2
                assert "kv_transfer_params" not in strict.log[1]["payload"]
                assert client.totals.recomputed_handovers == 1 and client.totals.online_failed == 0

    run(scenario())


def test_failed_hand_over_is_computed_again():
    async def scenario():
        relaxed, strict = FakeUpstream(connector=False), FakeUpstream(connector=True)  # no kv_transfer_params
        async with upstreams(relaxed, strict):
            async with gateway(config_for([relaxed], [strict], connector="nixl")) as client:
                assert await client.text(PROMPT) == "".join(strict.words(PROMPT, 8))
                assert client.totals.recomputed_handovers == 1
                assert "kv_transfer_params" not in strict.log[0]["payload"]
                await relaxed.stop()  # the other pool serves whole requests
                assert await client.text({**PROMPT, "stream": True}) == "".join(strict.words(PROMPT, 8))

    run(scenario())


@pytest.mark.parametrize(
    "extra", [{"n": 2}, {"prompt": ["a", "b"]}, {"tool_choice": "required"}, {"max_tokens": 1}, {"best_of": 2}]
)
def test_what_cannot_be_handed_over_is_served_whole(extra):
    async def scenario():
        relaxed, strict = FakeUpstream(connector=True), FakeUpstream(connector=True)
        async with upstreams(relaxed, strict):
            async with gateway(config_for([relaxed], [strict], connector="nixl")) as client:
                assert await client.text({**PROMPT, **extra})
                assert client.totals.handovers == 0 and len(relaxed.log) + len(strict.log) == 1

    run(scenario())


def test_offline_requests_are_handed_over_where_a_strict_instance_pulls():
    async def scenario():
        relaxed, strict = FakeUpstream(connector=True), FakeUpstream(connector=True)
        async with upstreams(relaxed, strict):
            async with gateway(config_for([relaxed], [strict], connector="nixl")) as client:
                assert await client.text(OFFLINE) == "".join(strict.words(PROMPT, 8))
                assert client.totals.pulls == 1 and len(strict.log) == 1
                assert client.scheduler.instances[1].reserved == client.scheduler.instances[1].reserved_tokens == 0

    run(scenario())


def test_offline_work_survives_an_instance():
    async def scenario():
        one, two = FakeUpstream(hold_decode=True), FakeUpstream(hold_decode=True)
        async with upstreams(one, two), gateway(config_for([one, two])) as client:
            tasks = [send(client, OFFLINE, prompt=f"p{index}", max_tokens=20) for index in range(6)]
            await client.until(lambda: one.running + two.running == 6)
            await one.stop()
            two.hold_decode = False
            assert await asyncio.gather(*tasks) == ["".join(two.words({"prompt": f"p{i}"}, 20)) for i in range(6)]
            assert client.totals.offline_finished == 6 and client.totals.retries >= 1

    run(scenario())


def test_dispatcher_returns_status_and_body_and_can_be_cancelled():
    async def scenario():
        fake = FakeUpstream()
        async with upstreams(fake), gateway(config_for([fake])) as client:
            status, body = await client.scheduler.complete("/v1/completions", {**PROMPT, "stream": True}, "j1")
            assert status == 200 and body["choices"][0]["text"] == "".join(fake.words(PROMPT, 8))
            fake.error_status = 400
            status, body = await client.scheduler.complete("/v1/completions", PROMPT, "j2")
            assert status == 400 and body["error"]["message"] == "broken"
            fake.error_status, fake.hold_decode = 0, True
            job = asyncio.create_task(client.scheduler.complete("/v1/completions", {**PROMPT, "max_tokens": 500}, "j3"))
            await client.until(lambda: fake.running == 1)
            job.cancel()
            with pytest.raises(asyncio.CancelledError):
                await job
            await client.until(lambda: fake.running == 0)
            assert not client.scheduler.backlog and not client.scheduler.instances[0].load.requests

    run(scenario())


def test_job_that_was_preempted_can_still_be_cancelled():
    async def scenario():
        fake = FakeUpstream(hold_prefill=True)
        async with upstreams(fake), gateway(config_for([fake])) as client:
            job = asyncio.create_task(client.scheduler.complete("/v1/completions", PROMPT, "j"))
            await client.until(lambda: fake.running == 1)
            online = send(client, PROMPT, prompt="hello there", stream=True)
            await client.until(lambda: client.totals.preemptions == 1)
            await asyncio.sleep(0)
            assert job.cancelling() == 0 and len(client.scheduler.backlog) == 1
            job.cancel()
            with pytest.raises(asyncio.CancelledError):
                await job
            assert not client.scheduler.backlog
            fake.hold_prefill = False
            await online

    run(scenario())


def test_many_waiting_jobs_cancelled_at_once_leave_nothing_behind():
    async def scenario():
        fake = FakeUpstream(hold_decode=True, max_num_seqs=2)
        async with upstreams(fake), gateway(config_for([fake])) as client:
            scheduler, load = client.scheduler, client.scheduler.instances[0].load
            payload = {**PROMPT, "max_tokens": 100}
            jobs = [asyncio.create_task(scheduler.complete("/v1/completions", payload, f"j{i}")) for i in range(20)]
            await client.until(lambda: load.offline == 2 and len(scheduler.backlog) == 18)
            scheduler.instances[0].max_seqs = 10  # there is room just when they go
            for job in jobs:
                job.cancel()
            scheduler.backlog.send()
            await asyncio.gather(*jobs, return_exceptions=True)
            assert not scheduler.backlog and not load.requests and client.totals.offline_cancelled == 20
            fake.hold_decode = False
            assert await client.text(OFFLINE) == "".join(fake.words(PROMPT, 8))

    run(scenario())


def test_no_offline_rule_keeps_the_gate_shut():
    async def scenario():
        fake = FakeUpstream()
        async with upstreams(fake), gateway(config_for([fake]), policy({"admission": "none"})) as client:
            task = send(client, OFFLINE)
            await client.until(lambda: client.scheduler.backlog)
            await client.rounds()
            assert not fake.log and len(client.scheduler.backlog) == 1
            task.cancel()
            await client.until(lambda: not client.scheduler.backlog)

    run(scenario())


def test_dry_run_is_plain_routing():
    async def scenario():
        one, two = FakeUpstream(hold_prefill=True), FakeUpstream(hold_prefill=True)
        async with upstreams(one, two):
            config = config_for([one], [two], dry_run=True)
            async with gateway(config, policy({"admission": "none"}, gate_batch=0.1)) as client:
                for instance in client.scheduler.instances:
                    instance.saturation_batch = 1
                tasks = [send(client, OFFLINE, prompt=f"p{index}") for index in range(6)]
                await client.until(lambda: one.running == two.running == 3)  # no gate, balanced
                tasks.append(send(client, PROMPT, stream=True))
                await client.until(lambda: one.running + two.running == 7)
                one.hold_prefill = two.hold_prefill = False
                await asyncio.gather(*tasks)
                assert client.totals.preemptions == 0 and one.aborted == two.aborted == 0
                assert client.scheduler.placement.knobs["gate_batch"] == 1.0  # nothing was applied
                assert client.bridge.control.last.knobs["gate_batch"] == 0.1  # it was decided, though

    run(scenario())
