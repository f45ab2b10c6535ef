"""Why a policy sets the knobs that it sets: what it sees in one Telemetry record, and what each knob hangs on.

The drivers of a knob are a finite difference: one observation entry at a time is moved over its documented range while
the others stay as they are. That says what the network would do elsewhere, not what is likely to happen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ooco_gym.bridge.exports.deployed import DeployedNetwork
from ooco_gym.bridge.exports.words import KNOB_UNITS, knob_in_words
from ooco_gym.cluster.control import KNOBS, Knob, action_to_knobs
from ooco_gym.cluster.observation import ENTRIES, OBSERVATION_NAMES, observation_bounds, observe
from ooco_gym.cluster.telemetry import FIRST_KNOB, Telemetry
from ooco_gym.policy import NetworkPolicy, Policy

DRIVERS = 3
GRID = 11  # points over the range of an entry, the ends included
CHANGED = 0.005  # of a knob's range: the least that counts as another setting


@dataclass(frozen=True)
class Driver:
    """How far one knob moves while one observation entry goes over its range."""

    entry: str
    low: float
    high: float
    knob_at_low: float
    knob_at_high: float
    share_of_range: float  # largest minus smallest setting met on the way, over the knob's range (log where it is)


@dataclass(frozen=True)
class Decision:
    """One knob: what is chosen, what is in force, what OOCO has, and what a network's choice hangs on."""

    knob: Knob
    value: float
    in_force: float
    changed: bool
    drivers: tuple[Driver, ...]


@dataclass(frozen=True)
class Seen:
    """One observation entry; ``raw`` is what it was before it was clipped to its bounds."""

    name: str
    value: float
    raw: float
    low: float
    high: float

    @property
    def clipped(self) -> bool:
        return not self.low <= self.raw <= self.high


@dataclass(frozen=True)
class Explanation:
    """A decision of a policy and all that it rests on."""

    policy: str
    is_network: bool
    telemetry: Telemetry
    seen: tuple[Seen, ...]
    decisions: tuple[Decision, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain containers, for JSON and for the status page."""
        return {
            "policy": self.policy,
            "telemetry": self.telemetry.to_dict(),
            "observation": [
                {
                    "name": entry.name,
                    "value": entry.value,
                    "unclipped": entry.raw,
                    "low": entry.low,
                    "high": entry.high,
                    "clipped": entry.clipped,
                }
                for entry in self.seen
            ],
            "knobs": [
                {
                    "name": decision.knob.name,
                    "value": decision.value,
                    "unit": KNOB_UNITS[decision.knob.name][0],
                    "in_words": knob_in_words(decision.knob, decision.value, self.telemetry),
                    "in_force": decision.in_force,
                    "ooco": decision.knob.ooco,
                    "changed": decision.changed,
                    "meaning": decision.knob.meaning,
                    "drivers": [vars(driver) for driver in decision.drivers],
                }
                for decision in self.decisions
            ],
            "drivers_are": f"finite differences: one entry moved over its range in {GRID} points, the others held; "
            "share_of_range is the knob's swing on the way",
        }


def explain(policy: Policy, telemetry: Telemetry) -> Explanation:
    """What ``policy`` makes of one record. Knobs that differ from OOCO's or from those in force have drivers."""
    observation = observe(telemetry)
    knobs = policy.decide(telemetry)
    in_force = telemetry.values[FIRST_KNOB : FIRST_KNOB + len(KNOBS)]
    network = isinstance(policy, (DeployedNetwork, NetworkPolicy))
    swings = _swings(_actions_of(policy), observation) if network else None
    decisions = []
    for index, knob in enumerate(KNOBS):
        others = (knob.ooco, float(in_force[index]))
        changed = any(abs(_share(knob, knobs[index]) - _share(knob, other)) > CHANGED for other in others)
        drivers = _drivers(index, swings) if swings is not None and changed else ()
        decisions.append(Decision(knob, float(knobs[index]), others[1], changed, drivers))
    low, high = observation_bounds()
    raws = _unclipped(telemetry, observation)
    seen = tuple(
        Seen(name, float(value), raw, float(least), float(most))
        for name, value, raw, least, most in zip(OBSERVATION_NAMES, observation, raws, low, high, strict=True)
    )
    return Explanation(policy.name, network, telemetry, seen, tuple(decisions))


def _actions_of(policy: Policy) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]:
    if isinstance(policy, DeployedNetwork):
        return policy.actions
    assert isinstance(policy, NetworkPolicy)
    return lambda observations: np.stack([policy.action(row) for row in observations])


def _swings(
    actions: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]], observation: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """Knobs, float64 [entry, grid point, knob], with one entry moved at a time."""
    low, high = observation_bounds()
    rows = np.tile(observation, (len(observation), GRID, 1))
    for index in range(len(observation)):
        rows[index, :, index] = np.linspace(low[index], high[index], GRID)
    knobs = action_to_knobs(actions(rows.reshape(-1, len(observation))))
    return knobs.reshape(len(observation), GRID, len(KNOBS))


def _drivers(index: int, swings: npt.NDArray[np.float64]) -> tuple[Driver, ...]:
    """The entries that move one knob furthest, those left out that do not move it."""
    knob = KNOBS[index]
    low, high = observation_bounds()
    shares = np.array([[_share(knob, value) for value in row] for row in swings[:, :, index]])
    spans = shares.max(axis=1) - shares.min(axis=1)
    order = np.argsort(-spans, kind="stable")[:DRIVERS]
    return tuple(
        Driver(
            OBSERVATION_NAMES[entry],
            float(low[entry]),
            float(high[entry]),
            float(swings[entry, 0, index]),
            float(swings[entry, -1, index]),
            float(spans[entry]),
        )
        for entry in order
        if spans[entry] > 0
    )


def _share(knob: Knob, value: float) -> float:
    """Where in its range a setting lies, 0 to 1, on the knob's own scale."""
    if knob.log:
        return float(np.log(value / knob.low) / np.log(knob.high / knob.low))
    return float((value - knob.low) / (knob.high - knob.low))


def _unclipped(telemetry: Telemetry, observation: npt.NDArray[np.float32]) -> list[float]:
    """The entries before clipping; the previous action has nothing to clip."""
    raws: list[float] = [
        entry.scale * telemetry[entry.field] / (max(telemetry[entry.per], 1e-9) if entry.per else 1.0)
        for entry in ENTRIES
    ]
    return [*raws, *(float(value) for value in observation[len(ENTRIES) :])]
