"""Why a policy sets the knobs that it sets: one Telemetry record, in words and units, and what each knob hangs on.

The drivers of a knob are a finite difference: one observation entry at a time is moved over its documented range while
the others stay as they are. That says what the network would do elsewhere, not what is likely to happen.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ooco_gym.bridge.arguments import choice, command, parse
from ooco_gym.bridge.deployed import DeployedNetwork, load_deployed
from ooco_gym.bridge.manifest import read_object
from ooco_gym.cluster.control import KNOBS, Knob, action_to_knobs, check_knobs
from ooco_gym.cluster.observation import ENTRIES, OBSERVATION_NAMES, observation_bounds, observe
from ooco_gym.cluster.telemetry import BACKLOG_TOP, FIELDS, FIRST_KNOB, Telemetry
from ooco_gym.errors import OocoError
from ooco_gym.policy import NetworkPolicy, Policy

DRIVERS = 3
GRID = 11  # points over the range of an entry, the ends included
CHANGED = 0.005  # of a knob's range: the least that counts as another setting
USAGE = """
python -m ooco_gym.bridge explain policy/ telemetry.json                tables for people
python -m ooco_gym.bridge explain policy/ telemetry.json format=json    the same as JSON
python -m ooco_gym.bridge explain policy/ telemetry.json example=true   first writes an example telemetry.json

Shows a Telemetry record in words and units, the observation that the policy makes of it, and the knobs that it chooses
beside OOCO's; for a network also the three observation entries that each changed knob depends on most. telemetry.json
holds every field of the record, or is a line of the gateway's decision log; the example is a simulated cluster after
two minutes of the default scenario (compiling the simulator takes a minute or two, once).
"""

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


def example_record() -> Telemetry:
    """Telemetry of a simulated cluster after two minutes of the default scenario under OOCO."""
    from ooco_gym.cluster.simulator import Simulator
    from ooco_gym.scenario import build_scenario

    simulator = Simulator(build_scenario({}), {}, 0)
    simulator.run(120.0)
    return simulator.telemetry()


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


def print_explanation(explanation: Explanation, console: Console) -> None:
    """Three tables: the record, the observation, the knobs; then what the knobs of a network hang on."""
    console.print(_record_table(explanation))
    console.print(_observation_table(explanation))
    console.print(_knob_table(explanation))
    if not explanation.is_network:
        console.print("A constant policy: its knobs do not depend on the record.")
        return
    console.print(_driver_table(explanation))
    console.print(
        "Dependence is a finite difference: one entry at a time goes over its range, the others stay as they are. "
        "It says what the network would do there, not what caused the record."
    )


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


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    for column in columns:
        table.add_column(column, justify="right" if column in ("value", "bound") else "left", overflow="fold")
    return table


def _record_table(explanation: Explanation) -> Table:
    table = _table("Telemetry", "field", "value", "what it is")
    for name, unit, meaning in FIELDS[:FIRST_KNOB]:
        table.add_row(name, in_words(explanation.telemetry[name], unit), escape(meaning))
    return table


def _observation_table(explanation: Explanation) -> Table:
    table = _table(f"Observation of {len(explanation.seen)} entries", "entry", "value", "bound", "")
    for entry in explanation.seen:
        note = f"clipped from {entry.raw:.4g}" if entry.clipped else ""
        table.add_row(entry.name, f"{round(entry.value, 9):.4g}", f"{entry.low:g} .. {entry.high:g}", note)
    return table


def _knob_table(explanation: Explanation) -> Table:
    table = _table(f"Knobs chosen by {escape(explanation.policy)}", "knob", "chosen", "in force", "OOCO", "meaning")
    for decision in explanation.decisions:
        chosen = knob_in_words(decision.knob, decision.value, explanation.telemetry)
        others = [bare_setting(decision.knob, value) for value in (decision.in_force, decision.knob.ooco)]
        chosen = f"[bold]{chosen}[/bold]" if decision.changed else chosen
        table.add_row(decision.knob.name, chosen, *others, escape(decision.knob.meaning))
    return table


def _driver_table(explanation: Explanation) -> Table:
    table = _table(
        "What the changed knobs depend on most", "knob", "entry", "as the entry goes", "the knob goes", "swing"
    )
    for decision in explanation.decisions:
        for driver in decision.drivers:
            table.add_row(
                decision.knob.name,
                driver.entry,
                f"{driver.low:g} -> {driver.high:g}",
                f"{driver.knob_at_low:.4g} -> {driver.knob_at_high:.4g}",
                f"{100 * driver.share_of_range:.2g} % of its range",
            )
    return table


def read_record(path: Path) -> Telemetry:
    """A Telemetry record from a JSON file, alone or inside a decision; raises OocoError that names file and field."""
    content = read_object(path)
    if isinstance(content.get("telemetry"), dict):
        content = content["telemetry"]  # a line of the gateway's decision log
    try:
        telemetry = Telemetry.from_dict(content)
        check_knobs(telemetry.values[FIRST_KNOB : FIRST_KNOB + len(KNOBS)])
    except OverflowError:
        raise OocoError(f"{path}: a number is too large, finite float64 numbers are accepted") from None
    except OocoError as error:
        raise OocoError(f"{path}: {error}") from None
    return telemetry


def _write_example(path: Path) -> None:
    if path.exists():
        raise OocoError(f"{path} exists and is not overwritten; example=true writes a new file")
    path.write_text(json.dumps(example_record().to_dict(), indent=2) + "\n", encoding="utf-8")


@command(USAGE)
def explain_command(arguments: list[str]) -> int:
    """``python -m ooco_gym.bridge explain``; returns the exit status."""
    positional, settings = parse(arguments, ("format", "example"))
    if len(positional) != 2:
        raise OocoError(f"{len(positional)} paths are given, the policy's folder and telemetry.json are needed")
    form = choice(settings, "format", ("table", "json"))
    policy, path = load_deployed(positional[0]), Path(positional[1])
    if choice(settings, "example", ("false", "true")) == "true":
        _write_example(path)
    explanation = explain(policy, read_record(path))
    if form == "json":
        print(json.dumps(explanation.to_dict(), indent=2))
    else:
        print_explanation(explanation, Console(highlight=False) if sys.stdout.isatty() else Console(width=150))
    return 0
