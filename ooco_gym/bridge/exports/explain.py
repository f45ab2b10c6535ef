"""``python -m ooco_gym.bridge explain``: one decision of a policy as tables for people or JSON for programs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ooco_gym.bridge.arguments import choice, command, parse
from ooco_gym.bridge.exports.deployed import load_deployed
from ooco_gym.bridge.exports.explanation import Explanation, explain
from ooco_gym.bridge.exports.manifest import read_object
from ooco_gym.bridge.exports.words import bare_setting, in_words, knob_in_words
from ooco_gym.cluster.control import KNOBS, check_knobs
from ooco_gym.cluster.telemetry import FIELDS, FIRST_KNOB, Telemetry
from ooco_gym.errors import OocoError

USAGE = """
python -m ooco_gym.bridge explain policy/ telemetry.json                tables for people
python -m ooco_gym.bridge explain policy/ telemetry.json format=json    the same as JSON
python -m ooco_gym.bridge explain policy/ telemetry.json example=true   first writes an example telemetry.json

Shows a Telemetry record in words and units, the observation that the policy makes of it, and the knobs that it chooses
beside OOCO's; for a network also the three observation entries that each changed knob depends on most. telemetry.json
holds every field of the record, or is a line of the gateway's decision log; the example is a simulated cluster after
two minutes of the default scenario (compiling the simulator takes a minute or two, once).
"""


def example_record() -> Telemetry:
    """Telemetry of a simulated cluster after two minutes of the default scenario under OOCO."""
    from ooco_gym.cluster.simulator import Simulator
    from ooco_gym.scenario import build_scenario

    simulator = Simulator(build_scenario({}), {}, 0)
    simulator.run(120.0)
    return simulator.telemetry()


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
