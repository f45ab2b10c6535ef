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

from ooco_gym.bridge.gateway.status import BEHIND, page, words
from ooco_gym.cluster.control import KNOB_NAMES, KNOBS
from ooco_gym.cluster.telemetry import FIELD_NAMES
from ooco_gym.policy import ConstantPolicy


def test_status_tells_pools_queues_attainment_and_knobs():
    async def scenario():
        async with upstreams(FakeUpstream(), FakeUpstream()) as (relaxed, strict):
            policy = ConstantPolicy("patient", knobs={"preempt_slack": 0.5, "gate_batch": 0.1})
            async with gateway(config_for([relaxed], [strict]), policy) as client:
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
                assert [entry["field"] for entry in knobs["gate_batch"]["why"]] == list(BEHIND["gate_batch"])
                code, html = await client.get("/status")
                assert code == 200 and b"<!doctype html>" in html

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_page_needs_nothing_from_elsewhere():
    text = page()
    assert not re.search(r"(src|href)=|https?://|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text and "innerHTML" not in text


def test_behind_names_known_fields_for_every_knob():
    assert set(BEHIND) == set(KNOB_NAMES)
    assert all(field in FIELD_NAMES for fields in BEHIND.values() for field in fields)


@pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: knob.name)
def test_words_over_the_whole_range(knob):
    telemetry = {"ttft_slo_s": 0.5, "tpot_slo_s": 0.05, "saturation_batch": 100.0}
    sentences = {words(knob.name, value, telemetry) for value in (knob.low, knob.ooco, knob.high)}
    assert len(sentences) >= 2 and all(sentences)
