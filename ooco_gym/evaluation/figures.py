"""Figures of comparisons and training runs, drawn from the rows and histories that the tables print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ooco_gym.cluster.control import KNOBS
from ooco_gym.cluster.outcome import FEASIBLE_VIOLATION_RATE
from ooco_gym.cluster.telemetry import Telemetry

#: One colour per policy wherever it appears (Okabe-Ito, safe for colour-blind readers).
_COLOURS = {
    "no-offline": "#999999",
    "base-pd": "#D55E00",
    "online-priority": "#E69F00",
    "ooco": "#0072B2",
    "ppo-untrained": "#56B4E9",
    "ppo": "#009E73",
}
_OTHERS = ("#CC79A7", "#F0E442", "#000000")


def colour(policy: str) -> str:
    return _COLOURS.get(policy, _OTHERS[sum(map(ord, policy)) % len(_OTHERS)])


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def plot_comparison(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Offline throughput against violation rate, one panel per workload and load, intervals as bars."""
    panels = sorted({(row["workload"], row["load"]) for row in rows})
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = _figure(5.0 * columns, 3.6 * lines)
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    for axis, (workload, load) in zip(axes.flat, panels, strict=False):
        _comparison_panel(axis, [row for row in rows if (row["workload"], row["load"]) == (workload, load)])
        axis.set_title(f"{workload}, load {load:g}", fontsize=10)
    return _save(figure, path)


def _comparison_panel(axis: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        x, y = 100 * row["violation_rate"], row["offline_output_tokens_per_s"]
        (x_low, x_high), (y_low, y_high) = row["violation_rate_ci95"], row["offline_output_tokens_per_s_ci95"]
        axis.errorbar(
            x,
            y,
            xerr=[[x - 100 * x_low], [100 * x_high - x]],
            yerr=[[y - y_low], [y_high - y]],
            fmt="o",
            color=colour(row["policy"]),
            label=row["policy"],
            capsize=2,
        )
    axis.axvline(100 * FEASIBLE_VIOLATION_RATE, color="#888888", linestyle="--", linewidth=1, label="3 % line")
    axis.set_xscale("symlog", linthresh=1.0)
    axis.set_xlim(left=0.0)
    axis.set_ylim(bottom=0.0)
    axis.set_xlabel("online SLO violations [%]")
    axis.set_ylabel("offline output [tokens/s]")
    axis.legend(fontsize=7)


def plot_learning(history: Sequence[Mapping[str, float]], path: Path) -> Path:
    """Reward, violations and knob means over training steps, with validation points."""
    training = [entry for entry in history if "train/reward" in entry]
    validation = [entry for entry in history if "validation/violation_rate" in entry]
    figure = _figure(10.0, 6.0)
    axes = figure.subplots(2, 4)
    steps = [entry["step"] for entry in training]
    top = axes.flat
    top[0].plot(steps, [entry["train/reward"] for entry in training], color=colour("ppo"))
    top[0].set_ylabel("reward per control interval")
    checked = [entry["step"] for entry in validation]
    useful = [entry["validation/offline_ideal_s_per_instance_s"] for entry in validation]
    top[1].plot(checked, [100 * value for value in useful], "o-", color=colour("ppo"), label="validation")
    top[1].set_ylabel("useful offline work [%]")
    rates = [100 * entry["validation/violation_rate"] for entry in validation]
    top[1].twinx().plot(checked, rates, "x:", color=colour("base-pd"))
    top[1].set_title("o useful, x violations [%]", fontsize=8)
    for axis, knob in zip(list(top)[2:], KNOBS, strict=True):
        axis.plot(steps, [entry[f"knobs/{knob.name}"] for entry in training], color=colour("ppo"))
        axis.axhline(knob.ooco, color=colour("ooco"), linestyle="--", linewidth=1, label="OOCO")
        axis.set_ylim(knob.low, knob.high)
        if knob.log:
            axis.set_yscale("log")
        axis.set_title(knob.name, fontsize=9)
    for axis in axes.flat:
        axis.tick_params(labelsize=7)
        axis.set_xlabel("environment steps", fontsize=7)
    return _save(figure, path)


def plot_knobs(history: Sequence[Telemetry], path: Path) -> Path:
    """Knob trajectories of one episode beside the online prefill load that they answer to."""
    figure = _figure(8.0, 8.0)
    axes = figure.subplots(len(KNOBS) + 1, 1, sharex=True)
    times = [record["time_s"] for record in history]
    load = [record["arriving_prefill_10s"] / record["relaxed_instances"] for record in history]
    axes[0].plot(times, load, color=colour("no-offline"))
    axes[0].set_ylabel("online load\n(10 s)", fontsize=7)
    for axis, knob in zip(axes[1:], KNOBS, strict=True):
        axis.plot(times, [record[f"knob_{knob.name}"] for record in history], color=colour("ppo"))
        axis.axhline(knob.ooco, color=colour("ooco"), linestyle="--", linewidth=1)
        axis.set_ylim(knob.low, knob.high)
        if knob.log:
            axis.set_yscale("log")
        axis.set_ylabel(knob.name, fontsize=7)
    axes[-1].set_xlabel("simulated time [s]")
    return _save(figure, path)
