"""Every field of live Telemetry against numbers counted by hand, on a clock that the test moves."""

from __future__ import annotations

import math
from dataclasses import fields

import pytest

pytest.importorskip("aiohttp", reason="the bridge extra is not installed")
from ooco_gym.bridge.gateway.config import parse_config
from ooco_gym.bridge.gateway.instances import Instance, Scrape, parse_scrape
from ooco_gym.bridge.gateway.ledger import Ledger, Sums
from ooco_gym.bridge.gateway.live_telemetry import read
from ooco_gym.bridge.gateway.load import DECODE, PREFILL, Request
from ooco_gym.bridge.gateway.prediction import Prediction, PromptLengths
from ooco_gym.bridge.gateway.scheduler import Scheduler
from ooco_gym.cluster.control import KNOB_NAMES, ooco_knobs
from ooco_gym.cluster.observation import observe
from ooco_gym.cluster.telemetry import FIELD_NAMES
from ooco_gym.errors import OocoError

KNOBS = dict(zip(KNOB_NAMES, ooco_knobs().tolist(), strict=True))


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class World:
    """Two relaxed and two strict instances of 1000 blocks of 16 tokens, and what a gateway would book."""

    def __init__(self, connector="nixl"):
        entries = [{"url": f"http://127.0.0.1:{9000 + index}", "role": "relaxed" if index < 2 else "strict",
                    "kv_blocks": 1000} for index in range(4)]  # fmt: skip
        scenario = {"slo": {"ttft_s": 0.5, "tpot_s": 0.05}}
        self.config = parse_config({"instances": entries, "scenario": scenario, "connector": connector}, {})
        self.clock = Clock()
        self.ledger = Ledger(0.5, 0.05, self.clock)
        self.scheduler = Scheduler(self.config, self.ledger, Prediction(self.config.scenario))
        self.scheduler.backlog.wake = self.scheduler.forwarder.released = self.ledger.on_first_token = lambda: None
        for instance in self.scheduler.instances:
            instance.up = True

    def arrive(self, prompt, online=True, stream=True):
        request = Request("r", "/v1/completions", b"", online, stream, prompt)
        self.ledger.arrived(request, self.scheduler.prediction.prefill_s(0, prompt))
        return request

    def send(self, request, index, phase=PREFILL):
        self.scheduler.forwarder.enter(self.scheduler.instances[index], request, phase)

    def end(self, request, output=None):
        request.load.leave(request)
        self.ledger.finished(request, output)

    def read(self, **more):
        return read(self.scheduler, KNOBS, clock=self.clock, **more).to_dict()


@pytest.fixture
def world():
    return World()


def test_empty_gateway_gives_a_finite_record(world):
    record = world.read()
    assert set(record) == set(FIELD_NAMES) and all(math.isfinite(value) for value in record.values())
    assert observe(read(world.scheduler, KNOBS, clock=world.clock)).shape[0] > 0
    assert record["relaxed_instances"] == record["strict_instances"] == 2
    assert (record["ttft_slo_s"], record["tpot_slo_s"]) == (0.5, 0.05)
    scenario = world.config.scenario
    assert record["decode_floor_s"] == scenario.decode_floor_s and record["mean_prefill_s"] == scenario.mean_prefill_s
    assert record["saturation_batch"] == scenario.saturation_batch
    assert {name: record[f"knob_{name}"] for name in KNOB_NAMES} == KNOBS


def test_queues_of_the_relaxed_pool(world):
    cost = world.scheduler.prediction.prefill_s
    for prompt, index in ((1000, 0), (2000, 0), (500, 1)):
        world.send(world.arrive(prompt), index)
    record = world.read()
    assert record["queued_prefill_max_s"] == pytest.approx(cost(0, 1000) + cost(0, 2000))
    assert record["queued_prefill_mean_s"] == pytest.approx((cost(0, 1000) + cost(0, 2000) + cost(0, 500)) / 2)
    assert record["oldest_wait_s"] == 0.0  # all fit into one batch of 8192 tokens
    world.clock.now += 2.0
    late = world.arrive(6000)
    world.send(late, 0)
    world.clock.now += 0.25
    assert world.read()["oldest_wait_s"] == pytest.approx(0.25)  # 1000 + 2000 are begun, 6000 more are not


def test_first_token_moves_a_request_from_the_queue_to_the_batch(world):
    request = world.arrive(1000)
    world.send(request, 2)
    world.ledger.token(request, 1)
    world.ledger.token(request, 2)
    load = world.scheduler.instances[2].load
    assert (load.pending, load.pending_s, load.online_decodes, load.online_tokens) == (0, 0.0, 1, 1003)


def test_relaxed_pool(world):
    for index, prompt in ((0, 100), (0, 200), (0, 300), (1, 400)):
        world.send(world.arrive(prompt, online=False), index)
    online = world.arrive(600)
    world.send(online, 0)
    zero, one = world.scheduler.instances[:2]
    zero.scrape = Scrape(world.clock.now, 4, 0, 0.30)
    one.scrape = Scrape(world.clock.now, 1, 0, 0.10)
    record = world.read()
    assert (record["relaxed_decodes_mean"], record["relaxed_decodes_max"]) == (2.0, 3.0)
    assert record["relaxed_kv_max"] == pytest.approx(0.30)
    # instance 0 holds 600 online and 600 offline tokens: half of 0.30 each; instance 1 only offline
    assert record["relaxed_kv_online"] == pytest.approx(0.15 / 2)
    assert record["relaxed_kv_offline"] == pytest.approx((0.15 + 0.10) / 2)


def test_kv_without_a_scrape_is_what_the_log_knows(world):
    world.send(world.arrive(1600), 2)
    record = world.read()
    assert record["strict_kv_max"] == pytest.approx(0.1) and record["strict_kv_online"] == pytest.approx(0.05)


def test_strict_pool(world):
    decode = world.scheduler.prediction.decode_s
    for prompt, online, index in ((1000, True, 2), (500, True, 2), (300, False, 2), (700, True, 3)):
        world.send(world.arrive(prompt, online), index, DECODE)
    record = world.read()
    assert record["strict_online_s_mean"] == pytest.approx((decode(2, 2, 1500) + decode(3, 1, 700)) / 2)
    assert record["strict_online_s_max"] == pytest.approx(decode(2, 2, 1500))
    assert record["strict_batch_s_max"] == pytest.approx(decode(2, 3, 1800))
    assert record["strict_batch_s_mean"] == pytest.approx((decode(2, 3, 1800) + decode(3, 1, 700)) / 2)
    assert (record["strict_decodes_mean"], record["strict_decodes_max"], record["strict_paused_mean"]) == (
        2.0,
        3.0,
        0.0,
    )


def test_arrivals_are_sums_over_whole_past_seconds(world):
    cost = world.scheduler.prediction.prefill_s
    for second in range(4):
        world.clock.now = 100.0 + second
        for prompt in (1000, 3000)[: 1 + second % 2]:
            world.arrive(prompt)
    world.clock.now = 104.5
    world.arrive(9999)  # of the running second: not counted yet
    record = world.read()
    one, two = cost(0, 1000), cost(0, 1000) + cost(0, 3000)
    assert record["arriving_prefill_1s"] == pytest.approx(two)
    assert record["arriving_prefill_10s"] == pytest.approx((2 * one + 2 * two) / 4)
    assert record["arriving_prefill_60s"] == record["arriving_prefill_10s"]
    assert record["arrivals_60s"] == pytest.approx(6 / 4)
    assert record["prompt_mean_tokens"] == pytest.approx((4 * 1000 + 2 * 3000) / 6)
    world.clock.now = 164.2
    assert world.read()["arrivals_60s"] == pytest.approx(1 / 60)  # seconds 104..163: the 9999 alone


def test_violations_are_booked_when_they_are_certain(world):
    ledger = world.ledger
    good, slow, late, never, whole = (world.arrive(10, stream=index < 4) for index in range(5))
    for request in (good, slow, late, never, whole):
        world.send(request, 2)
    world.clock.now = 100.1
    for request in (good, slow):
        ledger.token(request, 1)
    world.clock.now = 100.6
    ledger.token(late, 1)  # 0.6 s after its arrival
    world.clock.now = 100.7
    ledger.token(good, 19)
    ledger.token(slow, 9)
    world.end(good)  # 0.6 s for 19 more tokens: 32 ms
    world.end(slow)  # 0.6 s for 9 more tokens: 67 ms
    world.end(late, 1)
    world.clock.now = 101.5
    world.end(whole, 10)  # due at 0.5 + 9 * 0.05 = 0.95 s
    world.clock.now = 102.5
    assert world.read()["violation_rate_60s"] == pytest.approx(4 / 5)
    totals = ledger.totals
    assert (totals.ttft_violations, totals.tpot_violations, totals.deadline_violations) == (2, 1, 1)
    assert totals.judged == 5
    world.end(never, 3)
    assert totals.judged == 5 and totals.violations == 4  # it is not booked twice
    assert world.read()["output_mean_tokens"] == pytest.approx((20 + 10 + 1 + 10) / 4)
    world.clock.now = 400.5
    assert world.read()["violation_rate_60s"] == 0.0


def test_a_violation_of_long_ago_leaves_the_seconds_of_now_alone(world):
    world.arrive(10)
    world.clock.now += 512.0  # the same place in the ring
    world.ledger.token(world.arrive(20), 1)
    world.clock.now += 1.0
    window = world.ledger.window(300)  # books the first one's violation, which nobody has looked for since
    assert (window.seconds, window.arrivals, window.prompt_tokens, window.violations) == (300, 1, 20, 0)
    assert world.ledger.totals.ttft_violations == 1


def test_a_window_has_every_sum_of_its_seconds(world):
    for age in range(3):
        entry = world.ledger._second(float(age))
        for index, entry_field in enumerate(fields(Sums)):
            setattr(entry, entry_field.name, 10**age * (index + 1))
    world.clock.now += 3.0
    found = world.ledger.window(2)
    assert [getattr(found, entry_field.name) for entry_field in fields(Sums)] == [110 * (i + 1) for i in range(7)]


def test_cancelled_requests_are_no_evidence_unless_they_were_late(world):
    early, late = world.arrive(10), world.arrive(10)
    world.clock.now += 0.2
    world.ledger.ended(early, "cancelled")
    world.clock.now += 0.4
    world.ledger.ended(late, "cancelled")
    assert (world.ledger.totals.violations, world.ledger.totals.judged) == (1, 1)


def test_offline_fields(world):
    for prompt in (100, 300):
        request = world.arrive(prompt, online=False)
        world.ledger.taken(request)
        world.send(request, 0)
        world.end(request, 50 + prompt)
    world.scheduler.backlog.waiting.append(world.arrive(10, online=False))
    record = world.read(stored=lambda: 41)
    assert record["offline_backlog"] == 42
    assert (record["offline_prompt_mean_tokens"], record["offline_output_mean_tokens"]) == (200, 250)
    assert world.read(stored=lambda: 10**9)["offline_backlog"] == 1e6
    assert record["arrivals_60s"] == 0.0


def test_scrape_age_and_instances_that_are_down(world):
    for index, age_s in enumerate((0.2, 0.7, 0.1, 30.0)):
        world.scheduler.instances[index].scrape = Scrape(world.clock.now - age_s, 0, 0, 0.0)
    world.scheduler.instances[3].up = False
    record = world.read()
    assert record["scrape_age_s"] == pytest.approx(0.7)
    assert (record["strict_instances"], record["unavailable_instances"]) == (1, 1)


def test_without_a_connector_every_instance_prefills():
    world = World(connector="none")
    world.send(world.arrive(1000), 2)
    cost = world.scheduler.prediction.prefill_s(2, 1000)
    record = world.read()
    assert record["queued_prefill_max_s"] == pytest.approx(cost)
    assert record["queued_prefill_mean_s"] == pytest.approx(cost / 4)


def test_usage_between_scrapes_follows_the_log():
    world = World()
    instance: Instance = world.scheduler.instances[0]
    request = world.arrive(1600, online=False)
    world.send(request, 0)
    instance.take_scrape(Scrape(world.clock.now, 1, 0, 0.5))
    assert instance.kv_usage() == pytest.approx(0.5)
    world.ledger.token(request, 160)
    assert instance.kv_usage() == pytest.approx(0.51)
    request.load.leave(request)
    assert instance.kv_usage() == pytest.approx(0.4)


def test_first_tokens_in_the_metrics_are_those_of_streams_of_ended_requests_and_then_of_the_oldest():
    world = World()
    instance: Instance = world.scheduler.instances[0]

    def scrape(first_tokens):
        instance.take_scrape(Scrape(world.clock.now, 0, 0, 0.0, first_tokens))

    older, newer = world.arrive(10, online=False, stream=False), world.arrive(20, online=False, stream=False)
    stream = world.arrive(30)
    scrape(5.0)
    for request in (older, newer, stream):
        world.send(request, 0)
    world.ledger.token(stream, 1)
    instance.first_streamed += 1  # as a relayed stream does
    scrape(6.0)
    assert (older.phase, newer.phase) == (PREFILL, PREFILL)  # the one new first token was the stream's
    instance.blind_ended += 1  # as an unstreamed answer does
    scrape(8.0)
    assert (older.phase, newer.phase) == (DECODE, PREFILL)
    scrape(2.0)  # the engine was started again
    assert newer.phase == PREFILL
    scrape(3.0)
    assert newer.phase == DECODE


def test_parse_scrape_reads_vllm_and_says_what_is_missing():
    page = """# HELP vllm:num_requests_running x
vllm:num_requests_running{engine="0",model_name="a"} 2.0
vllm:num_requests_running{engine="1",model_name="a"} 3.0
vllm:num_requests_waiting{engine="0",model_name="a"} 1.0
vllm:kv_cache_usage_perc{engine="0",model_name="a"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="a"} 0.75
vllm:time_to_first_token_seconds_bucket{engine="0",le="0.001",model_name="a"} 7.0
vllm:time_to_first_token_seconds_count{engine="0",model_name="a"} 9.0
vllm:cache_config_info{block_size="16",cache_dtype="auto",num_gpu_blocks="128"} 1.0
"""
    scrape = parse_scrape(page, 5.0)
    assert (scrape.running, scrape.waiting, scrape.kv_usage, scrape.first_tokens) == (5.0, 1.0, 0.5, 9.0)
    assert (scrape.kv_blocks, scrape.block_tokens) == (128, 16)
    with pytest.raises(OocoError, match="num_requests_waiting"):
        parse_scrape("vllm:num_requests_running 1.0\n", 0.0)
    with pytest.raises(OocoError):
        parse_scrape("vllm:num_requests_running{ 1.0\n", 0.0)


def test_prompt_lengths_are_counted_or_learned():
    lengths = PromptLengths(4.0)
    path = "/v1/completions"
    assert lengths.estimate(path, {"prompt": "x" * 400}) == 100
    assert lengths.estimate(path, {"prompt": [1, 2, 3]}) == 3
    assert lengths.estimate(path, {"prompt": [[1, 2], [3]]}) == 3
    assert lengths.estimate(path, {"prompt": []}) == 1
    chat = {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 40}, {"type": "image_url"}]}, 3]}
    assert lengths.estimate("/v1/chat/completions", chat) == 10
    for _ in range(3):
        lengths.learn(path, {"prompt": "x" * 400}, 400)
    assert lengths.estimate(path, {"prompt": "x" * 400}) == 400
    assert lengths.estimate("/v1/chat/completions", chat) == 10  # learned for each path
