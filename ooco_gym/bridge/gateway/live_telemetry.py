"""Telemetry of a live cluster: the simulator's record, filled from the request log, scrapes and the cluster file.

Where each field comes from:

=============================  ======================================================================================
time_s                         the ledger's clock, seconds since the gateway started
scrape_age_s                   now less the oldest last scrape among the instances that are up; 0 before any scrape
relaxed_, strict_instances     instances up, by the role in the cluster file (one pool alone counts as both)
unavailable_instances          instances whose health check or last connection failed
*_slo_s, decode_floor_s,       the scenario of the cluster file
mean_prefill_s,
saturation_batch
queued_prefill_*               ledger: predicted prefill of online requests sent without a first token yet, over the
                               instances that prefill online requests (relaxed ones; without a connector all)
oldest_wait_s                  ledger: oldest such request beyond the first max_batch_tokens prompt tokens on its
                               instance, which a first come, first served engine has begun
relaxed_decodes_*              ledger: offline requests sent to relaxed instances and not ended
relaxed_kv_*, strict_kv_*      scrape (kv_cache_usage_perc), shared out to the classes by the ledger's tokens in
                               context; without a scrape those tokens over the size of the cache
strict_online_s_*,             scheduler cost of the ledger's decoding requests (phase and contexts) on strict
strict_batch_s_*               instances, corrected by the engines' own gaps between tokens
strict_decodes_*               ledger: requests that decode on strict instances
strict_paused_mean             0: a stock engine pauses nothing
arriving_prefill_*,            ledger: online arrivals of whole past seconds, the running one left out
arrivals_60s,
prompt_mean_tokens
output_mean_tokens             ledger: online requests that ended in the last 300 s
violation_rate_*               ledger: violations booked over arrivals
offline_backlog                requests waiting here and in the job store
offline_prompt_mean_tokens     ledger: offline requests taken from the backlog
offline_output_mean_tokens     ledger: offline requests that finished
knob_*                         the policy's last decision (in a dry run too, although nothing is enforced then)
=============================  ======================================================================================
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ooco_gym.bridge.gateway.instances import Instance
from ooco_gym.bridge.gateway.ledger import Ledger
from ooco_gym.bridge.gateway.load import DECODE
from ooco_gym.bridge.gateway.scheduler import Scheduler
from ooco_gym.cluster.control import KNOB_NAMES
from ooco_gym.cluster.telemetry import BACKLOG_TOP, FIELD_NAMES, Telemetry


def read(
    scheduler: Scheduler,
    knobs: Mapping[str, float],
    stored: Callable[[], int] = lambda: 0,
    clock: Callable[[], float] = time.monotonic,
) -> Telemetry:
    """One record as of now. ``stored`` counts the requests of the job store that nobody has begun."""
    scenario = scheduler.config.scenario
    fields: dict[str, float] = {
        "time_s": scheduler.ledger.now_s(),
        "ttft_slo_s": scenario.slo.ttft_s,
        "tpot_slo_s": scenario.slo.tpot_s,
        "decode_floor_s": scenario.decode_floor_s,
        "mean_prefill_s": scenario.mean_prefill_s,
        "saturation_batch": scenario.saturation_batch,
        "unavailable_instances": sum(not instance.up for instance in scheduler.instances),
        "strict_paused_mean": 0.0,
        "offline_backlog": min(len(scheduler.backlog) + stored(), BACKLOG_TOP),
    }
    up = [instance for instance in scheduler.instances if instance.up]
    scraped = [instance.scrape.at_s for instance in up if instance.scrape is not None]
    fields["scrape_age_s"] = max(clock() - min(scraped), 0.0) if scraped else 0.0
    fields |= _queues(scheduler, [instance for instance in scheduler.placement.prefilling if instance.up])
    fields |= _relaxed(_pool(scheduler, up, "relaxed"))
    fields |= _strict(scheduler, _pool(scheduler, up, "strict"))
    fields |= _history(scheduler.ledger)
    fields |= {f"knob_{name}": float(knobs[name]) for name in KNOB_NAMES}
    return Telemetry(np.array([fields[name] for name in FIELD_NAMES], np.float64))


def _pool(scheduler: Scheduler, up: Sequence[Instance], role: str) -> list[Instance]:
    """Instances of a role that are up; a deployment of one role alone is both pools."""
    alone = not (scheduler.placement.relaxed and scheduler.placement.strict)
    return [instance for instance in up if alone or instance.role == role]


def _queues(scheduler: Scheduler, pool: Sequence[Instance]) -> dict[str, float]:
    now_s, oldest_s = scheduler.ledger.now_s(), 0.0
    for instance in pool:
        begun = 0
        for request in instance.load.requests:
            if not request.online or request.phase == DECODE:
                continue
            if begun and begun + request.prompt_tokens > scheduler.placement.max_batch_tokens:
                oldest_s = max(oldest_s, now_s - request.arrival_s)
                break
            begun += request.prompt_tokens
    pending = [max(instance.load.pending_s, 0.0) for instance in pool]
    return {
        "queued_prefill_mean_s": sum(pending) / max(len(pool), 1),
        "queued_prefill_max_s": max(pending, default=0.0),
        "oldest_wait_s": oldest_s,
    }


def _kv(pool: Sequence[Instance]) -> tuple[float, float, float]:
    """(online, offline, fullest) shares of a pool's KV."""
    total = sum(instance.kv_tokens for instance in pool)
    online = offline = fullest = 0.0
    for instance in pool:
        load = instance.load
        usage = instance.scrape.kv_usage if instance.scrape is not None else load.tokens / instance.kv_tokens
        usage = min(max(usage, 0.0), 1.0)
        share = load.online_tokens / load.tokens if load.tokens > 0 else 1.0  # traffic past the gateway is someone's
        online += usage * share * instance.kv_tokens
        offline += usage * (1.0 - share) * instance.kv_tokens
        fullest = max(fullest, usage)
    return online / max(total, 1), offline / max(total, 1), fullest


def _relaxed(pool: Sequence[Instance]) -> dict[str, float]:
    online, offline, fullest = _kv(pool)
    decodes = [instance.load.offline for instance in pool]
    return {
        "relaxed_instances": len(pool),
        "relaxed_decodes_mean": sum(decodes) / max(len(pool), 1),
        "relaxed_decodes_max": max(decodes, default=0),
        "relaxed_kv_online": online,
        "relaxed_kv_offline": offline,
        "relaxed_kv_max": fullest,
    }


def _strict(scheduler: Scheduler, pool: Sequence[Instance]) -> dict[str, float]:
    online_s, batch_s, decodes = [], [], []
    for instance in pool:
        load, context = instance.load, {True: 0, False: 0}
        for request in load.requests:
            if request.phase == DECODE:
                context[request.online] += request.context_tokens
        batch = load.online_decodes + load.offline_decodes
        online_s.append(scheduler.prediction.decode_s(instance.index, load.online_decodes, context[True]))
        batch_s.append(scheduler.prediction.decode_s(instance.index, batch, context[True] + context[False]))
        decodes.append(batch)
    online, offline, fullest = _kv(pool)
    count = max(len(pool), 1)
    return {
        "strict_instances": len(pool),
        "strict_online_s_mean": sum(online_s) / count,
        "strict_online_s_max": max(online_s, default=0.0),
        "strict_batch_s_mean": sum(batch_s) / count,
        "strict_batch_s_max": max(batch_s, default=0.0),
        "strict_decodes_mean": sum(decodes) / count,
        "strict_decodes_max": max(decodes, default=0),
        "strict_kv_online": online,
        "strict_kv_offline": offline,
        "strict_kv_max": fullest,
    }


def _history(ledger: Ledger) -> dict[str, float]:
    windows = {seconds: ledger.window(seconds) for seconds in (1, 10, 60, 300)}
    minute, five, totals = windows[60], windows[300], ledger.totals
    fields = {
        f"arriving_prefill_{seconds}s": windows[seconds].prefill_s / max(windows[seconds].seconds, 1)
        for seconds in (1, 10, 60)
    }
    return fields | {
        "arrivals_60s": minute.arrivals / max(minute.seconds, 1),
        "prompt_mean_tokens": minute.prompt_tokens / max(minute.arrivals, 1),
        "output_mean_tokens": five.output_tokens / max(five.finished, 1),
        "violation_rate_60s": minute.violations / max(minute.arrivals, 1),
        "violation_rate_300s": five.violations / max(five.arrivals, 1),
        "offline_prompt_mean_tokens": totals.offline_taken_prompt_tokens / max(totals.offline_taken, 1),
        "offline_output_mean_tokens": totals.offline_output_tokens / max(totals.offline_finished, 1),
    }
