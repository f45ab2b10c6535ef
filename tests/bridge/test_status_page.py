"""The status page: complete JSON, a page without external assets that names what the JSON has."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

pytest.importorskip("uvicorn", reason="the bridge extra is not installed")
pytest.importorskip("aiohttp", reason="the bridge extra is not installed")
from fake_upstream import FakeUpstream, upstreams
from harness import config_for, gateway

from ooco_gym.bridge.gateway.alerts import alerts
from ooco_gym.bridge.gateway.config import parse_config
from ooco_gym.bridge.gateway.enforcement import ENFORCED_KNOBS, idle
from ooco_gym.bridge.gateway.status import BEHIND, LABELS, page, words
from ooco_gym.cluster.control import KNOB_NAMES, KNOBS, check_rules
from ooco_gym.cluster.telemetry import FIELD_NAMES
from ooco_gym.policy import ConstantPolicy


def test_status_tells_pools_queues_attainment_and_knobs():
    async def scenario():
        async with upstreams(FakeUpstream(), FakeUpstream()) as (relaxed, strict):
            policy = ConstantPolicy("patient", knobs={"preempt_slack": 0.5, "gate_batch": 0.1})
            async with gateway(config_for([relaxed], [strict]), policy) as client:
                client.bridge.ledger.ttft_slo_s = client.bridge.ledger.tpot_slo_s = 60.0  # on a busy machine, too
                await client.text({"prompt": "p", "stream": True, "max_tokens": 3})
                await client.text({"prompt": "p", "service_tier": "flex", "max_tokens": 3})
                await client.until(lambda: client.bridge.control.decisions > 2)
                status = json.loads((await client.get("/status.json"))[1])
                assert status["policy"] == "patient" and status["state"] == "serving"
                assert status["attainment"]["since_start"] == {"requests": 1, "violations": 0, "share": 1.0}
                assert status["totals"]["offline_finished"] == 1
                (entry,) = status["pools"]["strict"]
                assert entry["up"] and entry["url"] == strict.url and entry["kv_tokens"] == 4096 * 16
                assert set(status["queues"].values()) == {0}
                knobs = {knob["name"]: knob for knob in status["decision"]["knobs"]}
                assert tuple(knobs) == KNOB_NAMES
                assert knobs["preempt_slack"]["words"] == (
                    "abort offline prefills when an online TTFT is predicted above 250 ms"
                )
                assert knobs["preempt_slack"]["enforced"] and not knobs["pushback"]["enforced"]
                assert status["alerts"] == []
                assert [entry["field"] for entry in knobs["gate_batch"]["why"]] == list(BEHIND["gate_batch"])
                code, html = await client.get("/status")
                assert code == 200 and b"<!doctype html>" in html

    asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.parametrize(
    ("rules", "settings", "still"),
    [
        ({}, {}, set(ENFORCED_KNOBS)),
        ({}, {"pull": "off"}, {"preempt_slack", "gate_batch", "tpot_bound", "kv_reserve"}),
        ({}, {"connector": "nixl"}, {"preempt_slack", "gate_batch", "tpot_bound", "pull_kv", "kv_reserve"}),
        (
            {"offline_decode": "strict"},
            {"connector": "nixl"},
            {"preempt_slack", "gate_batch", "tpot_bound", "kv_reserve"},
        ),
        ({"migration": "longest"}, {}, set(ENFORCED_KNOBS) - {"pull_length"}),
        ({"admission": "none"}, {}, {"preempt_slack", "tpot_bound"}),
        ({"preemption": "iteration", "mix_selection": "all", "migration": "none"}, {}, {"gate_batch", "kv_reserve"}),
    ],
)
def test_a_knob_acts_where_rules_and_cluster_leave_it_something_to_decide(rules, settings, still):
    instances = [{"url": "http://127.0.0.1:1", "role": "relaxed"}, {"url": "http://127.0.0.1:2", "role": "strict"}]
    config = parse_config({"instances": instances, **settings}, {})
    assert set(KNOB_NAMES) - set(idle(config, check_rules(rules))) == still
    alone = parse_config({"instances": instances[:1]}, {})
    assert {"pull_kv", "pull_length"} <= set(idle(alone, check_rules(rules)))


def test_alerts_say_what_is_late_or_down():
    async def scenario():
        async with upstreams(FakeUpstream(), FakeUpstream()) as (relaxed, strict):
            config = config_for([relaxed], [strict], scrape_interval_s=60, control_interval_s=60)
            async with gateway(config) as client:
                bridge = client.bridge
                await client.until(lambda: bridge.control.last is not None)
                assert alerts(bridge.control) == []
                first, second = client.scheduler.instances
                first.scrape.at_s -= 200
                first.scrape_error = "metrics page has no vllm:kv_cache_usage_perc"
                second.fail("refused")
                bridge.ledger.start_s -= 200
                client.scheduler.closing = True
                assert [(entry["level"], entry["text"]) for entry in alerts(bridge.control)] == [
                    ("bad", "shutting down: new requests get 503, online ones may still end within 30 s"),
                    ("bad", "the whole strict pool is down"),
                    (
                        "bad",
                        "relaxed0 answers, its metrics are 200 s old: metrics page has no vllm:kv_cache_usage_perc",
                    ),
                    ("bad", "strict1 is down: refused"),
                    ("bad", "no decision for 200 s, one is due every 60 s: the gateway's log says why"),
                ]

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_page_needs_nothing_from_elsewhere():
    text = page().replace('"http://www.w3.org/2000/svg"', "")  # the name of a language, not an address
    assert not re.search(r"(src|href)=|https?://|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text and "innerHTML" not in text


def test_behind_names_known_fields_for_every_knob_that_can_act():
    assert set(BEHIND) == set(ENFORCED_KNOBS)
    assert {field for fields in BEHIND.values() for field in fields} == set(LABELS) <= set(FIELD_NAMES)


@pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: knob.name)
def test_words_over_the_whole_range(knob):
    telemetry = {"ttft_slo_s": 0.5, "tpot_slo_s": 0.05, "saturation_batch": 100.0}
    sentences = {words(knob.name, value, telemetry) for value in (knob.low, knob.ooco, knob.high)}
    assert len(sentences) >= 2 and all(sentences)
