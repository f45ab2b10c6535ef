"""What a policy network sees: Telemetry divided by the deployment's own scales, so that it transfers between them.

One table is the documentation, the bounds and the computation: each entry is ``clip(scale * a / b, low, high)`` of
two Telemetry fields. The previous action follows. Simulator, saved policies and the live bridge call the same function.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ooco_gym._jit import entry_point
from ooco_gym.cluster.control import KNOB_NAMES, check_knobs, knob_rows_to_actions
from ooco_gym.cluster.telemetry import FIELD_NAMES, FIRST_KNOB, Telemetry


@dataclass(frozen=True)
class Entry:
    """One observation entry: ``clip(scale * field / per, 0, high)``; ``live`` says where a gateway gets it."""

    name: str
    field: str
    per: str | None
    high: float
    live: str
    scale: float = 1.0


_LOG = "gateway request log"
_METRICS = "vLLM /metrics: kv_cache_usage_perc, split by class from the gateway's log"
_RUNNING = "gateway log of running requests and their tokens; checked against num_requests_running"

ENTRIES: tuple[Entry, ...] = (
    Entry("queued_prefill_mean", "queued_prefill_mean_s", "ttft_slo_s", 5.0, _LOG),
    Entry("queued_prefill_max", "queued_prefill_max_s", "ttft_slo_s", 5.0, _LOG),
    Entry("oldest_wait", "oldest_wait_s", "ttft_slo_s", 5.0, _LOG),
    Entry("relaxed_decodes_mean", "relaxed_decodes_mean", "saturation_batch", 8.0, _RUNNING),
    Entry("relaxed_decodes_max", "relaxed_decodes_max", "saturation_batch", 8.0, _RUNNING),
    Entry("relaxed_kv_online", "relaxed_kv_online", None, 1.0, _METRICS),
    Entry("relaxed_kv_offline", "relaxed_kv_offline", None, 1.0, _METRICS),
    Entry("relaxed_kv_max", "relaxed_kv_max", None, 1.0, _METRICS),
    Entry("strict_online_time_mean", "strict_online_s_mean", "tpot_slo_s", 3.0, _RUNNING),
    Entry("strict_online_time_max", "strict_online_s_max", "tpot_slo_s", 3.0, _RUNNING),
    Entry("strict_batch_time_mean", "strict_batch_s_mean", "tpot_slo_s", 3.0, _RUNNING),
    Entry("strict_batch_time_max", "strict_batch_s_max", "tpot_slo_s", 3.0, _RUNNING),
    Entry("strict_decodes_mean", "strict_decodes_mean", "saturation_batch", 8.0, _RUNNING),
    Entry("strict_decodes_max", "strict_decodes_max", "saturation_batch", 8.0, _RUNNING),
    Entry("strict_paused_mean", "strict_paused_mean", "saturation_batch", 8.0, _RUNNING),
    Entry("strict_kv_online", "strict_kv_online", None, 1.0, _METRICS),
    Entry("strict_kv_offline", "strict_kv_offline", None, 1.0, _METRICS),
    Entry("strict_kv_max", "strict_kv_max", None, 1.0, _METRICS),
    Entry("prefill_load_1s", "arriving_prefill_1s", "relaxed_instances", 5.0, _LOG),
    Entry("prefill_load_10s", "arriving_prefill_10s", "relaxed_instances", 5.0, _LOG),
    Entry("prefill_load_60s", "arriving_prefill_60s", "relaxed_instances", 5.0, _LOG),
    Entry("prompt_mean", "prompt_mean_tokens", None, 8.0, _LOG, scale=1 / 2048),
    Entry("output_mean", "output_mean_tokens", None, 8.0, _LOG, scale=1 / 512),
    Entry("violation_rate_60s", "violation_rate_60s", None, 1.0, _LOG),
    Entry("violation_rate_300s", "violation_rate_300s", None, 1.0, _LOG),
    Entry("offline_backlog", "offline_backlog", "saturation_batch", 10.0, "offline job store"),
    Entry("offline_prompt_mean", "offline_prompt_mean_tokens", None, 8.0, "offline job store", scale=1 / 2048),
    Entry("offline_output_mean", "offline_output_mean_tokens", None, 8.0, "offline job store", scale=1 / 512),
    Entry("relaxed_instances", "relaxed_instances", None, 8.0, "deployment", scale=1 / 8),
    Entry("strict_instances", "strict_instances", None, 8.0, "deployment", scale=1 / 8),
    Entry("unavailable_instances", "unavailable_instances", None, 8.0, "health checks", scale=1 / 8),
    Entry("strict_per_relaxed", "strict_instances", "relaxed_instances", 8.0, "deployment"),
    Entry("tpot_slo_per_floor", "tpot_slo_s", "decode_floor_s", 5.0, "deployment", scale=1 / 4),
    Entry("ttft_slo_per_prefill", "ttft_slo_s", "mean_prefill_s", 5.0, "deployment", scale=1 / 10),
)
OBSERVATION_NAMES = (*(entry.name for entry in ENTRIES), *(f"previous_{name}" for name in KNOB_NAMES))
OBSERVATION_SIZE = len(OBSERVATION_NAMES)

_FIELD = np.array([FIELD_NAMES.index(entry.field) for entry in ENTRIES])
_PER = np.array([FIELD_NAMES.index(entry.per) if entry.per else -1 for entry in ENTRIES])
_SCALE = np.array([entry.scale for entry in ENTRIES])
_HIGH = np.array([entry.high for entry in ENTRIES])


def observation_bounds() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """(low, high), float32 [OBSERVATION_SIZE] each."""
    low = np.concatenate([np.zeros(len(ENTRIES)), -np.ones(len(KNOB_NAMES))])
    high = np.concatenate([_HIGH, np.ones(len(KNOB_NAMES))])
    return low.astype(np.float32), high.astype(np.float32)


@entry_point
def _map_entries(values, field, per, scale, high, out):
    for row in range(values.shape[0]):
        for index in range(field.shape[0]):
            value = scale[index] * values[row, field[index]]
            if per[index] >= 0:
                value /= max(values[row, per[index]], 1e-9)
            out[row, index] = min(max(value, 0.0), high[index])


def observe_many(values: npt.NDArray[np.float64], out: npt.NDArray[np.float32]) -> None:
    """Observations ``out`` float32 [N, OBSERVATION_SIZE] of Telemetry values float64 [N, fields]."""
    _map_entries(values, _FIELD, _PER, _SCALE, _HIGH, out)
    out[:, len(ENTRIES) :] = knob_rows_to_actions(values[:, FIRST_KNOB : FIRST_KNOB + len(KNOB_NAMES)])


def observe(telemetry: Telemetry) -> npt.NDArray[np.float32]:
    """Observation, float32 [OBSERVATION_SIZE], of one Telemetry record; pure, and the same for simulated and live."""
    out = np.empty((1, OBSERVATION_SIZE), np.float32)
    check_knobs(telemetry.values[FIRST_KNOB : FIRST_KNOB + len(KNOB_NAMES)])
    observe_many(telemetry.values[None], out)
    return out[0]


def observation_table() -> str:
    """The documentation of the observation as a Markdown table."""
    rows = ["| entry | range | unit | source in a live system |", "|---|---|---|---|"]
    for entry in ENTRIES:
        ratio = f"{entry.field} / {entry.per}" if entry.per else entry.field
        unit = ratio if entry.scale == 1.0 else f"{ratio} x {entry.scale:.4g}"
        rows.append(f"| {entry.name} | 0 .. {entry.high:g} | {unit} | {entry.live} |")
    for name in KNOB_NAMES:
        rows.append(f"| previous_{name} | -1 .. 1 | action that gives the knob in force | the policy's last decision |")
    return "\n".join(rows)
