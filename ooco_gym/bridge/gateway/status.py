"""What the status page shows: alerts, objectives, load, instances, the knobs in words and the numbers behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ooco_gym.bridge.exports.words import in_words
from ooco_gym.bridge.gateway.alerts import alerts, scrape_age_s
from ooco_gym.bridge.gateway.config import ROLES
from ooco_gym.bridge.gateway.control import Control
from ooco_gym.bridge.gateway.enforcement import ENFORCED_KNOBS, idle
from ooco_gym.bridge.gateway.instances import Instance
from ooco_gym.cluster.control import KNOBS, WHOLE_PROMPT
from ooco_gym.cluster.outcome import FEASIBLE_VIOLATION_RATE
from ooco_gym.cluster.telemetry import FIELDS, Telemetry

#: The Telemetry entries that bear on a knob that can act: what one would look at to judge its setting.
BEHIND: dict[str, tuple[str, ...]] = {
    "preempt_slack": ("queued_prefill_max_s", "ttft_slo_s", "violation_rate_60s"),
    "gate_batch": ("relaxed_decodes_mean", "saturation_batch", "offline_backlog"),
    "tpot_bound": ("strict_batch_s_max", "tpot_slo_s", "violation_rate_60s"),
    "pull_kv": ("strict_kv_max", "strict_kv_online", "strict_decodes_mean"),
    "pull_length": ("offline_prompt_mean_tokens", "strict_batch_s_mean", "strict_kv_max"),
    "strict_prefill": ("strict_batch_s_mean", "tpot_slo_s", "offline_prompt_mean_tokens"),
    "kv_reserve": ("relaxed_kv_max", "relaxed_kv_offline", "arriving_prefill_10s"),
}
#: Those entries as a reader who does not know their names would call them.
LABELS: dict[str, str] = {
    "queued_prefill_max_s": "longest queue of online prompts",
    "ttft_slo_s": "TTFT objective",
    "tpot_slo_s": "TPOT objective",
    "violation_rate_60s": "violations per arrival, 60 s",
    "relaxed_decodes_mean": "offline on a relaxed instance",
    "saturation_batch": "batch that saturates one",
    "offline_backlog": "offline waiting",
    "strict_batch_s_max": "slowest strict iteration",
    "strict_batch_s_mean": "strict iteration",
    "strict_kv_max": "KV, fullest strict instance",
    "strict_kv_online": "KV of online work, strict",
    "strict_decodes_mean": "decoding on a strict instance",
    "offline_prompt_mean_tokens": "mean offline prompt",
    "relaxed_kv_max": "KV, fullest relaxed instance",
    "relaxed_kv_offline": "KV of offline work, relaxed",
    "arriving_prefill_10s": "online prompts arriving, 10 s",
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
        "alerts": alerts(control),
        "policy": control.policy.name,
        "dry_run": config.dry_run,
        "connector": config.connector,
        "deployment": f"{config.scenario.model.name} on {config.scenario.hardware.name}",
        "notes": list(notes),
        "attainment": {
            "ttft_slo_s": slo.ttft_s,
            "tpot_slo_s": slo.tpot_s,
            "wanted": 1.0 - FEASIBLE_VIOLATION_RATE,
            "last_60s": _attainment(minute.judged, minute.violations),
            "last_300s": _attainment(five.judged, five.violations),
            "since_start": _attainment(totals.judged, totals.violations),
            "streams": len(ledger.ttfts_s),
            **ledger.quantiles_s(),
        },
        "queues": {
            "online_in_flight": len(ledger.live),
            "online_before_first_token": sum(instance.load.pending for instance in scheduler.instances),
            "offline_waiting": len(scheduler.backlog),
            "offline_in_store": stored(),
            "offline_running": sum(instance.load.offline for instance in scheduler.instances),
        },
        "online_arrivals_per_s": minute.arrivals / max(minute.seconds, 1),
        "totals": {**vars(totals), "violations": totals.violations},
        "pools": {
            role: [_instance(instance) for instance in scheduler.instances if instance.role == role] for role in ROLES
        },
        "decision": _decision(control) if control.last is not None else None,
        "control_interval_s": config.control_interval_s,
        "decisions": control.decisions,
        "fallbacks": control.fallbacks,
    }


def _attainment(judged: int, violations: int) -> dict[str, Any]:
    """Share within the objectives, of the online requests of which it is known; None before there was one."""
    share = max(1.0 - violations / judged, 0.0) if judged else None
    return {"requests": judged, "violations": violations, "share": share}


def _instance(instance: Instance) -> dict[str, Any]:
    load, scrape = instance.load, instance.scrape if instance.up else None  # what a dead one said last is no news
    usage = min(max(scrape.kv_usage, 0.0), 1.0) if scrape is not None else None
    online = load.online_tokens / load.tokens if load.tokens > 0 else 1.0  # as in Telemetry
    return {
        "name": instance.name,
        "url": instance.config.url,
        "up": instance.up,
        "problem": instance.scrape_error,
        "seats": instance.max_seqs,
        "online": load.online,
        "online_before_first_token": load.pending,
        "offline": load.offline,
        "pending_prefill_s": max(load.pending_s, 0.0),
        "scrape_age_s": scrape_age_s(instance),
        "kv_usage": usage,
        "kv_usage_online": usage * online if usage is not None else None,
        "kv_tokens": instance.kv_tokens if instance.scrape is not None else None,
        "engine_running": scrape.running if scrape is not None else None,
        "engine_waiting": scrape.waiting if scrape is not None else None,
    }


def _decision(control: Control) -> dict[str, Any]:
    last = control.last
    assert last is not None
    without = idle(control.config, control.scheduler.placement.rules)
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
            "acts": knob.name not in without,  # were it enforced
            "enforced": knob.name not in without and not control.config.dry_run,
            "how": without.get(knob.name) or ENFORCED_KNOBS[knob.name],
            "why": [
                {
                    "field": field,
                    "label": LABELS[field],
                    "value": last.telemetry[field],
                    "words": in_words(last.telemetry[field], _UNITS[field]),
                }
                for field in BEHIND.get(knob.name, ())
            ],
        }
        for knob in KNOBS
    ]
    return {
        "by": last.policy,
        "fallback": last.fallback,
        "at_s": last.at_s,
        "age_s": control.scheduler.ledger.now_s() - last.at_s,
        "took_ms": last.took_s * 1e3,
        "scrape_age_s": last.telemetry["scrape_age_s"],
        "knobs": knobs,
    }


def words(name: str, value: float, telemetry: Telemetry) -> str:
    """A knob's setting as a sentence in the units of this deployment."""
    ttft_s, tpot_s, batch = telemetry["ttft_slo_s"], telemetry["tpot_slo_s"], telemetry["saturation_batch"]
    sentences = {
        "preempt_slack": "abort offline prefills at every online arrival"
        if value == 0
        else f"abort offline prefills when an online TTFT is predicted above {value * ttft_s * 1e3:,.0f} ms",
        "gate_batch": f"up to {max(value * batch, 1):,.0f} offline requests on each relaxed instance",
        "tpot_bound": f"strict iterations of up to {value * tpot_s * 1e3:,.1f} ms",
        "pull_kv": f"pull offline work while a strict instance's KV is below {100 * value:.0f} %",
        "pull_length": f"pull requests near {value:.2g} times the preferred length",
        "kv_reserve": f"keep {100 * value:.0f} % of relaxed KV free of offline prompts",
        "prefill_chunk": "offline prompts whole"
        if value >= WHOLE_PROMPT
        else f"offline prompts in pieces of {value:,.0f} tokens",
        "strict_prefill": "no offline prompts beside online decodes on strict instances"
        if value < 1
        else f"up to {value:,.0f} offline prompt tokens in a strict iteration with online decodes",
        "pushback": "never push offline decodes back"
        if value >= 1
        else f"push offline decodes back above {100 * value:.0f} % of strict KV",
        "strict_share": "strict instances as configured"
        if value == 0
        else f"share of strict instances {100 * value:+.0f} %",
    }
    return sentences[name]
