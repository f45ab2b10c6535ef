"""Numbers as people say them: quantities with their units, and knobs with what they come to on this deployment."""

from __future__ import annotations

from ooco_gym.cluster.control import Knob
from ooco_gym.cluster.telemetry import BACKLOG_TOP, Telemetry

#: What a knob counts, and the Telemetry field that turns it into an absolute figure, with that figure's unit.
KNOB_UNITS: dict[str, tuple[str, str | None, str]] = {
    "preempt_slack": ("of the TTFT SLO", "ttft_slo_s", "s"),
    "gate_batch": ("of B_sat", "saturation_batch", "sequences"),
    "tpot_bound": ("of the TPOT SLO", "tpot_slo_s", "s"),
    "pull_kv": ("of strict KV", None, ""),
    "pull_length": ("of the length L*", None, ""),
    "kv_reserve": ("of relaxed KV", None, ""),
    "prefill_chunk": ("tokens", None, ""),
    "strict_prefill": ("tokens per iteration", None, ""),
    "pushback": ("of strict KV", None, ""),
    "strict_share": ("of all instances", None, ""),
}
TOP_OF_RANGE = {"prefill_chunk": "the whole prompt", "pushback": "off"}


def in_words(value: float, unit: str) -> str:
    """A number with its unit, as people say it: 0.0021 s is 2.1 ms, a share is in per cent."""
    if unit == "share":
        return f"{100 * value:.3g} %"
    if unit == "s":
        return f"{1e3 * value:.3g} ms" if 0 < abs(value) < 1 else f"{value:,.4g} s"
    if unit == "requests" and value >= BACKLOG_TOP:
        return "endless"
    return f"{value:,.0f} {unit}" if abs(value) >= 1000 else f"{value:.3g} {unit}"


def knob_in_words(knob: Knob, value: float, telemetry: Telemetry) -> str:
    """A setting with its unit and, where the deployment gives a scale, what it comes to there."""
    unit, field, absolute = KNOB_UNITS[knob.name]
    plain = bare_setting(knob, value)
    if plain in TOP_OF_RANGE.values():
        return plain
    return f"{plain} {unit} = {in_words(value * telemetry[field], absolute)}" if field else f"{plain} {unit}"


def bare_setting(knob: Knob, value: float) -> str:
    """A setting as a number, or the word for the top of a range where that means something else than a number."""
    if knob.name in TOP_OF_RANGE and value >= knob.high:
        return TOP_OF_RANGE[knob.name]
    return f"{value:,.0f}" if KNOB_UNITS[knob.name][0].startswith("tokens") else f"{value:.3g}"
