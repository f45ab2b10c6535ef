"""The control loop: decisions in force, fallback to ooco and back, the decision log."""

# ruff: noqa: SIM117 -- a line for each server that a test starts
from __future__ import annotations

import asyncio
import json
import threading

import numpy as np
import pytest

pytest.importorskip("uvicorn", reason="the bridge extra is not installed")
pytest.importorskip("aiohttp", reason="the bridge extra is not installed")
from fake_upstream import FakeUpstream, upstreams
from harness import config_for, gateway

from ooco_gym.bridge.gateway.config import parse_config
from ooco_gym.bridge.gateway.serve import Bridge
from ooco_gym.cluster.control import KNOB_NAMES, check_rules, ooco_knobs
from ooco_gym.cluster.observation import observe
from ooco_gym.cluster.telemetry import Telemetry
from ooco_gym.errors import OocoError
from ooco_gym.policy import ConstantPolicy

GATE = KNOB_NAMES.index("gate_batch")


class Moody:
    """A policy that the test makes fail."""

    name = "moody"
    rules = check_rules({"migration": "longest"})

    def __init__(self):
        self.mood = lambda: None
        self.release = threading.Event()

    def reset(self):
        pass

    def decide(self, telemetry):
        observe(telemetry)
        knobs = ooco_knobs()
        knobs[GATE] = 3.0
        answer = self.mood()
        return knobs if answer is None else answer


def run(scenario):
    asyncio.run(asyncio.wait_for(scenario, 60))


def raises():
    raise RuntimeError("out of ideas")


def with_nan():
    knobs = ooco_knobs()
    knobs[0] = np.nan
    return knobs


@pytest.mark.parametrize(
    ("mood", "reason"),
    [
        (raises, "raised RuntimeError: out of ideas"),
        (with_nan, "preempt_slack"),
        (lambda: ooco_knobs() * 100.0, "accepted is"),
        (lambda: np.zeros(3), "shape"),
        (lambda: "knobs", "raised ValueError"),
        (lambda: np.full(10, np.inf), "accepted is"),
    ],
)
def test_a_policy_that_errs_is_replaced_by_ooco_and_comes_back(mood, reason):
    async def scenario():
        policy = Moody()
        async with upstreams(FakeUpstream()) as (fake,), gateway(config_for([fake]), policy) as client:
            placement, control = client.scheduler.placement, client.bridge.control
            await client.until(lambda: placement.knobs["gate_batch"] == 3.0)
            assert placement.rules["migration"] == "longest"
            policy.mood = mood
            await client.until(lambda: placement.knobs["gate_batch"] == 1.0)
            assert reason in control.last.fallback and control.last.policy == "ooco"
            policy.mood = lambda: None
            await client.until(lambda: placement.knobs["gate_batch"] == 3.0)
            assert control.last.fallback is None and control.fallbacks >= 1

    run(scenario())


def test_a_policy_that_hangs_is_not_asked_again_before_it_answers():
    async def scenario():
        policy = Moody()
        async with upstreams(FakeUpstream()) as (fake,):
            config = config_for([fake], policy_time_s=0.02)
            async with gateway(config, policy) as client:
                control = client.bridge.control
                policy.mood = lambda: policy.release.wait(10) and None
                await client.until(lambda: control.last and "policy_time_s" in (control.last.fallback or ""))
                await client.until(lambda: "still computes" in (control.last.fallback or ""))
                before = threading.active_count()
                await client.until(lambda: control.fallbacks > 5)
                assert threading.active_count() == before
                assert await client.text({"prompt": "p", "max_tokens": 2})  # the gateway serves meanwhile
                policy.mood = lambda: None
                policy.release.set()
                await client.until(lambda: control.last.fallback is None)

    run(scenario())


def test_a_constant_policy_waits_for_no_thread_and_cannot_be_late(monkeypatch):
    async def scenario():
        monkeypatch.setattr("ooco_gym.bridge.gateway.control._Thread.call", lambda *_: asyncio.Future())  # starved
        async with upstreams(FakeUpstream()) as (fake,):
            policy = ConstantPolicy("patient", knobs={"gate_batch": 3.0})
            async with gateway(config_for([fake], policy_time_s=0.001), policy) as client:
                control = client.bridge.control
                await client.until(lambda: control.decisions > 3)
                assert control.fallbacks == 0 and control.last.policy == "patient"
                assert client.scheduler.placement.knobs["gate_batch"] == 3.0

    run(scenario())


def test_decision_log_can_be_read_again(tmp_path):
    async def scenario():
        path = tmp_path / "decisions.jsonl"
        async with upstreams(FakeUpstream()) as (fake,):
            async with gateway(config_for([fake], decision_log=str(path), dry_run=True), Moody()) as client:
                await client.until(lambda: client.bridge.control.decisions > 3)
                assert client.scheduler.placement.knobs["gate_batch"] == 1.0
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(lines) > 3
        assert lines[-1]["enforced"] is False and lines[-1]["policy"] == "moody" and lines[-1]["fallback"] is None
        assert lines[-1]["knobs"]["gate_batch"] == 3.0
        assert Telemetry.from_dict(lines[-1]["telemetry"])["knob_gate_batch"] == 3.0  # its last decision
        assert Telemetry.from_dict(lines[0]["telemetry"])["knob_gate_batch"] == 1.0

    run(scenario())


def test_log_that_cannot_be_written_is_told_at_start(tmp_path):
    config = parse_config(
        {
            "instances": [{"url": "http://127.0.0.1:1", "role": "relaxed"}],
            "decision_log": str(tmp_path / ("x" * 300)),
        }
    )
    with pytest.raises(OocoError, match=r"^decision_log .* cannot be written"):
        Bridge(config, Moody())


def test_a_defect_in_a_step_does_not_end_the_loop(monkeypatch):
    async def scenario():
        async with upstreams(FakeUpstream()) as (fake,), gateway(config_for([fake]), Moody()) as client:
            placement = client.scheduler.placement
            await client.until(lambda: placement.knobs["gate_batch"] == 3.0)
            with monkeypatch.context() as patch:
                patch.setattr("ooco_gym.bridge.gateway.control.read", lambda *_: 1 / 0)
                await client.until(lambda: placement.knobs["gate_batch"] == 1.0)
            await client.until(lambda: placement.knobs["gate_batch"] == 3.0)

    run(scenario())
