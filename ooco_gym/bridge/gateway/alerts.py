"""What is wrong with the gateway or its instances right now, in sentences for the status page."""

from __future__ import annotations

import time
from collections.abc import Iterator

from ooco_gym.bridge.gateway.control import Control
from ooco_gym.bridge.gateway.instances import Instance

LATE_INTERVALS = 3  # without a decision or a scrape before it is said


def alerts(control: Control) -> list[dict[str, str]]:
    """``[{"level": "bad" | "note", "text": sentence}]``, the worst first; empty where all is as it should be."""
    found = [*_gateway(control), *_pools(control), *_policy(control)]
    return [{"level": level, "text": text} for level, text in sorted(found, key=lambda entry: entry[0] != "bad")]


def _gateway(control: Control) -> Iterator[tuple[str, str]]:
    if control.scheduler.closing:
        limit_s = control.config.timeouts.drain_s
        yield "bad", f"shutting down: new requests get 503, online ones may still end within {limit_s:g} s"
    if control.config.dry_run:
        yield "note", "dry run: decisions are logged, nothing is enforced"


def _pools(control: Control) -> Iterator[tuple[str, str]]:
    instances = control.scheduler.instances
    alive = {instance.role for instance in instances if instance.up}
    if alive:  # where none is left, the instances below say it all
        lost = {instance.role for instance in instances} - alive
        yield from (("bad", f"the whole {role} pool is down") for role in lost)
    for instance in instances:
        age_s = scrape_age_s(instance)
        if not instance.up:
            yield "bad", f"{instance.name} is down: {instance.scrape_error or 'it has not been reached yet'}"
        elif age_s is None or age_s > LATE_INTERVALS * control.config.scrape_interval_s:
            age = "never came" if age_s is None else f"are {age_s:,.0f} s old"
            yield "bad", f"{instance.name} answers, its metrics {age}: {instance.scrape_error or 'a scrape is late'}"


def _policy(control: Control) -> Iterator[tuple[str, str]]:
    last, interval_s = control.last, control.config.control_interval_s
    now_s = control.scheduler.ledger.now_s()
    age_s = now_s - last.at_s if last is not None else now_s
    if age_s > LATE_INTERVALS * interval_s + control.config.policy_time_s:
        yield "bad", f"no decision for {age_s:,.0f} s, one is due every {interval_s:g} s: the gateway's log says why"
    if last is not None and last.fallback is not None:
        yield "bad", f"{control.policy.name} failed, ooco decides: {last.fallback}"


def scrape_age_s(instance: Instance) -> float | None:
    """Seconds since the last metrics of an instance that could be read; None before any."""
    return time.monotonic() - instance.scrape.at_s if instance.scrape is not None else None
