"""Telemetry: the one record through which any policy sees a cluster, simulated or live.

Raw quantities in their own units, per-pool aggregates instead of instances, so that a gateway in front of real
servers can fill the same record from its request log and their metrics. ``observation.py`` turns it into what a
network sees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ooco_gym._jit import entry_point, kernel
from ooco_gym.cluster import lists
from ooco_gym.cluster.control import KNOB_NAMES
from ooco_gym.cluster.rules import unavailability
from ooco_gym.cluster.state import (
    DOWN,
    NONE,
    OFFLINE_DECODES,
    ONLINE_DECODES,
    RELAXED,
    REQUEUED,
    RING_SECONDS,
    SCHEDULER_COST,
    STRICT,
    WAITING,
    Cluster,
)
from ooco_gym.errors import OocoError
from ooco_gym.roofline.cost import decode_s

#: Every field is a float64: (name, unit, meaning).
FIELDS: tuple[tuple[str, str, str], ...] = (
    ("time_s", "s", "time of this record since the start of the episode or of the gateway"),
    ("scrape_age_s", "s", "age of the oldest measurement in this record; 0 in simulation"),
    (
        "relaxed_instances",
        "instances",
        "latency-relaxed pool: instances up that prefill; unified ones count in both pools",
    ),
    ("strict_instances", "instances", "latency-strict pool: instances up that decode online requests"),
    ("unavailable_instances", "instances", "down, or draining before a change of role"),
    ("ttft_slo_s", "s", "TTFT objective, of the tightest class"),
    ("tpot_slo_s", "s", "TPOT objective, of the tightest class"),
    ("decode_floor_s", "s", "predicted decode iteration of one online request of mean length"),
    ("mean_prefill_s", "s", "predicted prefill of one online request of mean length"),
    ("saturation_batch", "sequences", "B_sat, the decode batch that saturates compute"),
    ("queued_prefill_mean_s", "s", "predicted online prefill waiting or running per relaxed instance, mean"),
    ("queued_prefill_max_s", "s", "the same, longest instance"),
    ("oldest_wait_s", "s", "wait of the oldest online request whose prefill has not started"),
    ("relaxed_decodes_mean", "sequences", "offline requests that hold KV per relaxed instance, mean"),
    ("relaxed_decodes_max", "sequences", "the same, largest instance"),
    ("relaxed_kv_online", "share", "KV taken by online work in the relaxed pool"),
    ("relaxed_kv_offline", "share", "KV taken by offline work in the relaxed pool"),
    ("relaxed_kv_max", "share", "KV taken on the fullest relaxed instance"),
    ("strict_online_s_mean", "s", "predicted iteration of the online part of the strict batches, mean"),
    ("strict_online_s_max", "s", "the same, slowest instance"),
    ("strict_batch_s_mean", "s", "predicted iteration of the whole strict batches, mean"),
    ("strict_batch_s_max", "s", "the same, slowest instance"),
    ("strict_decodes_mean", "sequences", "sequences decoding per strict instance, mean"),
    ("strict_decodes_max", "sequences", "the same, largest instance"),
    ("strict_paused_mean", "sequences", "resident sequences left out of the batch per strict instance, mean"),
    ("strict_kv_online", "share", "KV taken by online work in the strict pool"),
    ("strict_kv_offline", "share", "KV taken by offline work in the strict pool"),
    ("strict_kv_max", "share", "KV taken on the fullest strict instance"),
    ("arriving_prefill_1s", "s/s", "predicted prefill seconds of online arrivals per second, last second"),
    ("arriving_prefill_10s", "s/s", "the same, last 10 s"),
    ("arriving_prefill_60s", "s/s", "the same, last 60 s"),
    ("arrivals_60s", "requests/s", "online arrivals per second, last 60 s"),
    ("prompt_mean_tokens", "tokens", "mean prompt of online arrivals, last 60 s"),
    ("output_mean_tokens", "tokens", "mean output of online requests that finished, last 300 s"),
    ("violation_rate_60s", "share", "SLO violations that became certain over arrivals, last 60 s"),
    ("violation_rate_300s", "share", "the same, last 300 s"),
    ("offline_backlog", "requests", "offline requests waiting; at most 1e6, which also stands for an endless backlog"),
    ("offline_prompt_mean_tokens", "tokens", "mean prompt of offline requests taken from the backlog"),
    ("offline_output_mean_tokens", "tokens", "mean output of offline requests that finished"),
    *((f"knob_{name}", "knob", f"{name} in force") for name in KNOB_NAMES),
)
FIELD_NAMES = tuple(name for name, _, _ in FIELDS)
TELEMETRY = np.dtype([(name, np.float64) for name in FIELD_NAMES])
BACKLOG_TOP = 1e6


@dataclass(frozen=True)
class Telemetry:
    """One record. ``values`` is float64 [len(FIELDS)] in the order of :data:`FIELDS`."""

    values: npt.NDArray[np.float64]

    def __getitem__(self, name: str) -> float:
        return float(self.values[FIELD_NAMES.index(name)])

    def to_dict(self) -> dict[str, float]:
        return dict(zip(FIELD_NAMES, self.values.tolist(), strict=True))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Telemetry:
        """Read a recorded dictionary; raises OocoError naming missing, unknown or non-finite fields."""
        missing = [name for name in FIELD_NAMES if name not in record]
        unknown = sorted(set(record) - set(FIELD_NAMES))
        if missing or unknown:
            wrong = f"field '{missing[0]}' is missing" if missing else f"field '{unknown[0]}' is unknown"
            raise OocoError(f"telemetry: {wrong}, a record has exactly the {len(FIELDS)} documented fields")
        for name in FIELD_NAMES:
            if isinstance(record[name], bool) or not isinstance(record[name], (int, float)):
                raise OocoError(f"telemetry: field '{name}' is {record[name]!r}, it must be a finite number")
        values = np.array([float(record[name]) for name in FIELD_NAMES])
        if not np.isfinite(values).all():
            bad = FIELD_NAMES[int(np.argmin(np.isfinite(values)))]
            raise OocoError(f"telemetry: field '{bad}' is {record[bad]!r}, it must be a finite number")
        return cls(values)


@kernel
def _decode_or_zero_s(cost, batch, context):
    return decode_s(cost, float(batch), float(context)) if batch > 0 else 0.0


@kernel
def _fill_relaxed(c, out):
    world = c.world[0]
    pool = 0
    pending = 0.0
    decodes = 0
    online = 0
    used = 0
    blocks = 0
    for instance in range(world.instances):
        state = c.instances[instance]
        oldest = lists.first(c, instance, WAITING)
        if oldest != NONE:
            out.oldest_wait_s = max(out.oldest_wait_s, world.now_s - c.slots[oldest].arrival_s)
        out.unavailable_instances += 1.0 if unavailability(c, instance) > 0 else 0.0
        if state.role == STRICT or state.activity == DOWN:
            continue
        pool += 1
        pending += max(state.pending_s, 0.0)
        decodes += state.offline_here
        online += state.online_blocks
        used += state.used_blocks
        blocks += state.kv_blocks
        out.queued_prefill_max_s = max(out.queued_prefill_max_s, state.pending_s)
        out.relaxed_decodes_max = max(out.relaxed_decodes_max, float(state.offline_here))
        out.relaxed_kv_max = max(out.relaxed_kv_max, state.used_blocks / state.kv_blocks)
    out.relaxed_instances = pool
    out.queued_prefill_mean_s = pending / max(pool, 1)
    out.relaxed_decodes_mean = decodes / max(pool, 1)
    out.relaxed_kv_online = online / max(blocks, 1)
    out.relaxed_kv_offline = (used - online) / max(blocks, 1)


@kernel
def _fill_strict(c, out):
    world = c.world[0]
    pool = 0
    decodes = 0
    residents = 0
    online = 0
    used = 0
    blocks = 0
    online_s_sum = 0.0
    batch_s_sum = 0.0
    for instance in range(world.instances):
        state = c.instances[instance]
        if state.role == RELAXED or state.activity == DOWN:
            continue
        pool += 1
        batch = state.selected_online + state.selected_offline
        cost = c.costs[instance, SCHEDULER_COST]
        online_s = _decode_or_zero_s(cost, state.selected_online, state.context_online)
        batch_s = _decode_or_zero_s(cost, batch, state.context_online + state.context_offline)
        online_s_sum += online_s
        batch_s_sum += batch_s
        out.strict_online_s_max = max(out.strict_online_s_max, online_s)
        out.strict_batch_s_max = max(out.strict_batch_s_max, batch_s)
        out.strict_decodes_max = max(out.strict_decodes_max, float(batch))
        out.strict_kv_max = max(out.strict_kv_max, state.used_blocks / state.kv_blocks)
        decodes += batch
        residents += lists.length(c, instance, ONLINE_DECODES) + lists.length(c, instance, OFFLINE_DECODES)
        online += state.online_blocks
        used += state.used_blocks
        blocks += state.kv_blocks
    out.strict_instances = pool
    out.strict_online_s_mean = online_s_sum / max(pool, 1)
    out.strict_batch_s_mean = batch_s_sum / max(pool, 1)
    out.strict_decodes_mean = decodes / max(pool, 1)
    out.strict_paused_mean = (residents - decodes) / max(pool, 1)
    out.strict_kv_online = online / max(blocks, 1)
    out.strict_kv_offline = (used - online) / max(blocks, 1)


@kernel
def _fill_history(c, out):
    """Sums over whole past seconds, the running one left out; windows that reach before time 0 are shortened."""
    now = int(math.floor(c.world[0].now_s)) - 1
    out.arriving_prefill_1s = 0.0
    out.arriving_prefill_10s = 0.0
    out.arriving_prefill_60s = 0.0
    out.arrivals_60s = 0.0
    arrivals_300 = 0
    violations_300 = 0
    finished = 0
    outputs = 0
    arrivals_60 = 0
    violations_60 = 0
    prompts = 0
    load = 0.0
    for age in range(min(300, now + 1)):
        second = c.ring[(now - age) % RING_SECONDS]
        if second.second == now - age:
            arrivals_300 += second.arrivals
            violations_300 += second.violations
            finished += second.finished
            outputs += second.output_tokens
            if age < 60:
                load += second.prefill_s
                arrivals_60 += second.arrivals
                violations_60 += second.violations
                prompts += second.prompt_tokens
        if age == 0:
            out.arriving_prefill_1s = load
        if age <= 9:
            out.arriving_prefill_10s = load / (age + 1)
        if age <= 59:
            out.arriving_prefill_60s = load / (age + 1)
            out.arrivals_60s = arrivals_60 / (age + 1)
    out.prompt_mean_tokens = prompts / max(arrivals_60, 1)
    out.output_mean_tokens = outputs / max(finished, 1)
    out.violation_rate_60s = violations_60 / max(arrivals_60, 1)
    out.violation_rate_300s = violations_300 / max(arrivals_300, 1)


@kernel
def _fill_backlog(c, out):
    world = c.world[0]
    waiting = lists.length(c, world.instances, REQUEUED)
    if world.endless == 1:
        out.offline_backlog = BACKLOG_TOP
    else:
        out.offline_backlog = min(float(world.offline_arrived - world.offline_taken + waiting), BACKLOG_TOP)
    taken = world.offline_taken - world.rejected_offline
    out.offline_output_mean_tokens = world.offline_output_sum / max(world.offline_output_count, 1)
    out.offline_prompt_mean_tokens = world.offline_prompt_sum / max(taken, 1)


@entry_point
def fill(c, out):
    """Fill a TELEMETRY record, whose deployment constants the caller has set, from the cluster as of its clock."""
    out.time_s = c.world[0].now_s
    out.scrape_age_s = 0.0
    out.queued_prefill_max_s = 0.0
    out.oldest_wait_s = 0.0
    out.relaxed_decodes_max = 0.0
    out.relaxed_kv_max = 0.0
    out.unavailable_instances = 0.0
    out.strict_online_s_max = 0.0
    out.strict_batch_s_max = 0.0
    out.strict_decodes_max = 0.0
    out.strict_kv_max = 0.0
    _fill_relaxed(c, out)
    _fill_strict(c, out)
    _fill_history(c, out)
    _fill_backlog(c, out)


def read(cluster: Cluster, constants: npt.NDArray[np.void]) -> Telemetry:
    """Telemetry of a simulated cluster; ``constants`` is a length-1 TELEMETRY array with the deployment filled in."""
    record = constants.copy()
    fill(cluster, record[0])
    for index, name in enumerate(KNOB_NAMES):
        record[f"knob_{name}"] = cluster.world[0]["knobs"][index]
    return Telemetry(record.view(np.float64))
