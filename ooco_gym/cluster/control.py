"""The Control contract: the knobs a policy may set every control interval, and the rules it fixes per episode.

Everything that a scheduler decides passes through here; simulator and live gateway read the same two tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ooco_gym.errors import OocoError


@dataclass(frozen=True)
class Knob:
    """One number of the contract: its closed range, its scale, OOCO's own setting, and what it does."""

    name: str
    low: float
    high: float
    log: bool
    ooco: float
    meaning: str


KNOBS: tuple[Knob, ...] = (
    Knob(
        "preempt_slack",
        0.0,
        1.5,
        False,
        0.0,
        "interrupt an offline prefill if the online request's predicted TTFT without interruption exceeds this "
        "fraction of its SLO; judged at each arrival; 0 always interrupts",
    ),
    Knob(
        "gate_batch",
        0.1,
        8.0,
        True,
        1.0,
        "offline requests resident per relaxed instance up to which the gate admits more, in units of B_sat",
    ),
    Knob(
        "tpot_bound",
        0.3,
        1.2,
        False,
        0.98,
        "strict iteration time allowed, as a fraction of the TPOT SLO; scales mix selection and pull alike",
    ),
    Knob(
        "pull_kv",
        0.0,
        1.0,
        False,
        0.9,
        "pull offline decodes to a strict instance while its KV utilisation is below this",
    ),
    Knob("pull_length", 0.1, 10.0, True, 1.0, "scale on the preferred length L* of a pulled request"),
    Knob(
        "kv_reserve",
        0.0,
        0.8,
        False,
        0.0,
        "share of a relaxed instance's KV kept free of offline work for the next online burst",
    ),
    Knob(
        "prefill_chunk",
        128.0,
        8192.0,
        True,
        8192.0,
        "most offline prompt tokens in one uninterruptible piece; the top of the range is the whole prompt",
    ),
    Knob(
        "strict_prefill",
        0.0,
        4096.0,
        False,
        0.0,
        "offline prompt tokens that ride on a strict iteration, as far as tpot_bound allows (beyond the paper)",
    ),
    Knob(
        "pushback",
        0.5,
        1.0,
        False,
        1.0,
        "move offline decodes back to the relaxed pool while strict KV utilisation is above this; 1 is off",
    ),
    Knob(
        "strict_share",
        -0.5,
        0.5,
        False,
        0.0,
        "offset on the configured share of strict instances; one instance changes its role per 10 s",
    ),
)
KNOB_NAMES = tuple(knob.name for knob in KNOBS)
KNOB_COUNT = len(KNOBS)
(
    PREEMPT_SLACK,
    GATE_BATCH,
    TPOT_BOUND,
    PULL_KV,
    PULL_LENGTH,
    KV_RESERVE,
    PREFILL_CHUNK,
    STRICT_PREFILL,
    PUSHBACK,
    STRICT_SHARE,
) = range(KNOB_COUNT)
WHOLE_PROMPT = KNOBS[PREFILL_CHUNK].high  # at this setting nothing is cut into pieces

_LOW = np.array([knob.low for knob in KNOBS])
_HIGH = np.array([knob.high for knob in KNOBS])
_OOCO = np.array([knob.ooco for knob in KNOBS])
_LOG = np.array([knob.log for knob in KNOBS])
_LOG_LOW = np.array([math.log(knob.low) if knob.log else 0.0 for knob in KNOBS])
_LOG_SPAN = np.array([math.log(knob.high / knob.low) if knob.log else 0.0 for knob in KNOBS])

#: Rules are chosen once per episode; the first of each row is OOCO's.
RULES: dict[str, tuple[str, ...]] = {
    "admission": ("gate", "none", "unified"),
    "prefill_order": ("online_first", "fcfs"),
    "preemption": ("layer", "chunk", "iteration"),
    "routing": ("least_pending", "round_robin"),
    "offline_decode": ("relaxed", "strict"),
    "placement": ("least_online_kv", "least_kv"),
    "mix_selection": ("every_third", "exact", "all"),
    "migration": ("preferred_length", "longest", "none"),
    "eviction": ("offline_first", "newest"),
    "evicted_kv": ("recompute", "host"),
}
RULE_NAMES = tuple(RULES)


def ooco_knobs() -> npt.NDArray[np.float64]:
    """OOCO's setting of every knob, float64 [KNOB_COUNT], in the order of :data:`KNOBS`."""
    return _OOCO.copy()


def knobs_from_mapping(values: Mapping[str, float]) -> npt.NDArray[np.float64]:
    """Knob vector with OOCO's setting where ``values`` is silent; raises OocoError on unknown or out of bounds."""
    knobs = ooco_knobs()
    for name, value in values.items():
        if name not in KNOB_NAMES:
            raise OocoError(f"unknown knob '{name}': known are {', '.join(KNOB_NAMES)}")
        if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
            raise OocoError(f"knob '{name}' is {value!r}, a number is needed")
        knobs[KNOB_NAMES.index(name)] = float(value)
    return check_knobs(knobs)


def check_knobs(knobs: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The vector itself, float64 [KNOB_COUNT]; raises OocoError that names the first knob out of its range."""
    vector = np.asarray(knobs, dtype=np.float64)
    if vector.shape != (KNOB_COUNT,):
        raise OocoError(f"a knob vector has shape ({KNOB_COUNT},), got {vector.shape}: {', '.join(KNOB_NAMES)}")
    bad = ~((vector >= _LOW) & (vector <= _HIGH))
    if bad.any():
        index = int(np.argmax(bad))
        knob = KNOBS[index]
        raise OocoError(f"knob '{knob.name}' is {vector[index]:g}, accepted is {knob.low:g} to {knob.high:g}")
    return vector


def action_to_knobs(action: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Map an action in [-1, 1]^KNOB_COUNT to knobs: u = clip((a + 0.9)/1.8, 0, 1) over the range, log where said.

    The outer 5 % at either side of the action range saturate, so that a Gaussian policy can sit on a bound.
    """
    u = np.clip((np.asarray(action, dtype=np.float64) + 0.9) / 1.8, 0.0, 1.0)
    # np.exp over the log rows only: the linear rows would be exp(0), harmless but wasted.
    knobs = _LOW + u * (_HIGH - _LOW)
    knobs[..., _LOG] = np.exp(_LOG_LOW[_LOG] + u[..., _LOG] * _LOG_SPAN[_LOG])
    # The action that means OOCO must give OOCO's knobs to the last bit, through exp and float32: a gate a rounding
    # error above B_sat admits one more request.
    knobs = np.where(np.abs(knobs - _OOCO) < 1e-6 * np.maximum(_OOCO, 1.0), _OOCO, knobs)
    return np.clip(knobs, _LOW, _HIGH)


def knobs_to_action(knobs: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Inverse of :func:`action_to_knobs`; a knob on its bound maps to the middle of the saturated margin."""
    return knob_rows_to_actions(check_knobs(knobs))


def knob_rows_to_actions(knobs: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The same for any number of knob vectors, float64 [..., KNOB_COUNT], that are known to lie in their ranges."""
    u = (knobs - _LOW) / (_HIGH - _LOW)
    u[..., _LOG] = (np.log(knobs[..., _LOG]) - _LOG_LOW[_LOG]) / _LOG_SPAN[_LOG]
    action = 1.8 * u - 0.9
    action[u <= 0.0] = -0.95
    action[u >= 1.0] = 0.95
    return action


def ooco_action() -> npt.NDArray[np.float64]:
    """The action that is the paper's scheduler; learned agents start here."""
    return knobs_to_action(ooco_knobs())


def check_rules(rules: Mapping[str, Any]) -> dict[str, str]:
    """Complete rules with OOCO's where silent; raises OocoError on an unknown rule or choice."""
    if not isinstance(rules, Mapping):
        raise OocoError(f"rules is {rules!r}, a mapping such as {{'preemption': 'chunk'}} is needed")
    for name, choice in rules.items():
        if name not in RULES:
            raise OocoError(f"unknown rule '{name}': known are {', '.join(RULES)}")
        if choice not in RULES[name]:
            raise OocoError(f"rule '{name}' is '{choice}', accepted are {', '.join(RULES[name])}")
    return {name: str(rules.get(name, choices[0])) for name, choices in RULES.items()}
