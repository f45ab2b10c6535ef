"""What the status page shows: pools, instances, queues, attainment, the knobs in words and the numbers behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ooco_gym.bridge.gateway.config import ROLES
from ooco_gym.bridge.gateway.control import Control
from ooco_gym.bridge.gateway.enforcement import ENFORCED_KNOBS, missing
from ooco_gym.bridge.gateway.instances import Instance
from ooco_gym.cluster.control import KNOBS, WHOLE_PROMPT
from ooco_gym.cluster.telemetry import FIELDS, Telemetry

#: The Telemetry entries that bear on a knob: what one would look at to judge its setting.
BEHIND: dict[str, tuple[str, ...]] = {
    "preempt_slack": ("queued_prefill_max_s", "ttft_slo_s", "violation_rate_60s"),
    "gate_batch": ("relaxed_decodes_mean", "saturation_batch", "offline_backlog"),
    "tpot_bound": ("strict_batch_s_max", "tpot_slo_s", "violation_rate_60s"),
    "pull_kv": ("strict_kv_max", "strict_kv_online", "strict_decodes_mean"),
    "pull_length": ("offline_prompt_mean_tokens", "strict_batch_s_mean", "strict_kv_max"),
    "kv_reserve": ("relaxed_kv_max", "relaxed_kv_offline", "arriving_prefill_10s"),
    "prefill_chunk": ("offline_prompt_mean_tokens", "arriving_prefill_1s"),
    "strict_prefill": ("strict_batch_s_mean", "tpot_slo_s"),
    "pushback": ("strict_kv_max", "relaxed_kv_max"),
    "strict_share": ("strict_instances", "relaxed_instances"),
}
_UNITS = {name: unit for name, unit, _ in FIELDS}


def page() -> str:
    """The status page, one file without external assets."""
    return (Path(__file__).with_name("status.html")).read_text(encoding="utf-8")


def status(control: Control, notes: Sequence[str], stored: Callable[[], int]) -> dict[str, Any]:
    """Everything that the page shows, as JSON; ``notes`` says what is not enforced, ``stored`` counts the job store."""
    config, scheduler = control.config, control.scheduler
    ledger, slo = scheduler.ledger, config.scenario.slo
    minute, five = ledger.window(60), ledger.window(300)
    totals = ledger.totals
    return {
        "uptime_s": ledger.now_s(),
        "state": "shutting down" if scheduler.closing else "serving",
        "policy": control.policy.name,
        "dry_run": config.dry_run,
        "connector": config.connector,
        "deployment": f"{config.scenario.model.name} on {config.scenario.hardware.name}",
        "notes": list(notes),
        "attainment": {
            "ttft_slo_s": slo.ttft_s,
            "tpot_slo_s": slo.tpot_s,
            "last_60s": _attainment(minute.judged, minute.violations),
            "last_300s": _attainment(five.judged, five.violations),
            "since_start": _attainment(totals.judged, totals.violations),
            **ledger.quantiles_s(),
        },
        "queues": {
            "online_in_flight": len(ledger.live),
            "online_before_first_token": sum(instance.load.pending for instance in scheduler.instances),
            "offline_waiting": len(scheduler.backlog),
            "offline_in_store": stored(),
            "offline_running": sum(instance.load.offline for instance in scheduler.instances),
        },
        "totals": {**vars(totals), "violations": totals.violations},
        "pools": {
            role: [_instance(instance) for instance in scheduler.instances if instance.role == role] for role in ROLES
        },
        "decision": _decision(control) if control.last is not None else None,
        "decisions": control.decisions,
        "fallbacks": control.fallbacks,
    }


def _attainment(judged: int, violations: int) -> dict[str, Any]:
    """Share within the objectives, of the online requests of which it is known; None before there was one."""
    share = max(1.0 - violations / judged, 0.0) if judged else None
    return {"requests": judged, "violations": violations, "share": share}


def _instance(instance: Instance) -> dict[str, Any]:
    scrape, load = instance.scrape, instance.load
    return {
        "name": instance.name,
        "url": instance.config.url,
        "up": instance.up,
        "problem": instance.scrape_error,
        "online": load.online,
        "online_before_first_token": load.pending,
        "offline": load.offline,
        "pending_prefill_s": max(load.pending_s, 0.0),
        "kv_usage": scrape.kv_usage if scrape is not None else None,
        "kv_tokens": instance.kv_tokens,
        "engine_running": scrape.running if scrape is not None else None,
        "engine_waiting": scrape.waiting if scrape is not None else None,
    }


def _decision(control: Control) -> dict[str, Any]:
    last = control.last
    assert last is not None
    knobs = [
        {
            "name": knob.name,
            "value": last.knobs[knob.name],
            "low": knob.low,
            "high": knob.high,
            "log": knob.log,
            "ooco": knob.ooco,
            "words": words(knob.name, last.knobs[knob.name], last.telemetry),
            "meaning": knob.meaning,
            "enforced": missing(control.config, knob.name) is None,
            "how": missing(control.config, knob.name) or ENFORCED_KNOBS[knob.name],
            "why": [
                {"field": field, "value": last.telemetry[field], "unit": _UNITS[field]} for field in BEHIND[knob.name]
            ],
        }
        for knob in KNOBS
    ]
    return {"by": last.policy, "fallback": last.fallback, "at_s": last.at_s, "took_ms": last.took_s * 1e3,
            "scrape_age_s": last.telemetry["scrape_age_s"], "knobs": knobs}  # fmt: skip


def words(name: str, value: float, telemetry: Telemetry) -> str:
    """A knob's setting as a sentence in the units of this deployment."""
    ttft_s, tpot_s, batch = telemetry["ttft_slo_s"], telemetry["tpot_slo_s"], telemetry["saturation_batch"]
    sentences = {
        "preempt_slack": "abort offline prefills at every online arrival"
        if value == 0
        else f"abort offline prefills when an online TTFT is predicted above {value * ttft_s * 1e3:,.0f} ms",
        "gate_batch": f"up to {max(value * batch, 1):,.0f} offline requests on each relaxed instance",
        "tpot_bound": f"strict iterations of up to {value * tpot_s * 1e3:,.1f} ms",
        "pull_kv": f"pull offline work while a strict instance's KV is below {value:.0%}",
        "pull_length": f"pull requests near {value:.2g} times the preferred length",
        "kv_reserve": f"keep {value:.0%} of relaxed KV free of offline prompts",
        "prefill_chunk": "offline prompts whole"
        if value >= WHOLE_PROMPT
        else f"offline prompts in pieces of {value:,.0f} tokens",
        "strict_prefill": "no offline prompts in strict iterations"
        if value < 1
        else f"up to {value:,.0f} offline prompt tokens in a strict iteration",
        "pushback": "never push offline decodes back"
        if value >= 1
        else f"push offline decodes back above {value:.0%} of strict KV",
        "strict_share": "strict instances as configured" if value == 0 else f"share of strict instances {value:+.0%}",
    }
    return sentences[name]
