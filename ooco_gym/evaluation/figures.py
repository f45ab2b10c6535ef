"""Figures of comparisons and training runs, drawn from the rows and histories that the tables print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from ooco_gym.cluster.control import KNOBS, Knob
from ooco_gym.cluster.outcome import FEASIBLE_VIOLATION_RATE
from ooco_gym.cluster.telemetry import Telemetry
from ooco_gym.evaluation.aggregate import Results, performance_profile

#: One colour per policy wherever it appears (Okabe-Ito, safe for colour-blind readers).
_COLOURS = {
    "no-offline": "#999999",
    "base-pd": "#D55E00",
    "online-priority": "#E69F00",
    "ooco": "#0072B2",
    "ppo-untrained": "#56B4E9",
    "ppo": "#009E73",
    "slack-ooco": "#3B9AB2",
    "ooco-report": "#7FB2D5",
    "tuned-ooco": "#C6A5D6",
    "tuned-global": "#CC79A7",
    "tuned-all": "#882255",
    "vllm-priority": "#B8A100",
    "hygen": "#117733",
    "conserve": "#66A61E",
    "dedicated-split": "#555555",
    "arrow": "#A6761D",
}
#: For policies of one's own: by name, so that a policy keeps its colour from figure to figure.
_OTHERS = ("#CC79A7", "#8C6BB1", "#A65628", "#F781BF", "#1B9E77", "#000000")


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
    panels = sorted({(row["workload"], row["load"], row["role"]) for row in rows})
    columns = min(len(panels), 3)
    lines = -(-len(panels) // columns)
    figure = _figure(5.0 * columns, 3.6 * lines)
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    for axis, (workload, load, role) in zip(axes.flat, panels, strict=False):
        _comparison_panel(axis, [row for row in rows if (row["workload"], row["load"]) == (workload, load)])
        axis.set_title(f"{workload}, load {load:g}" + ("" if role == "train" else f", role={role}"), fontsize=10)
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
            fmt="s" if row["policy"] == "ooco" else "o",
            markersize=8 if row["policy"] == "ooco" else 5,
            markerfacecolor="none" if row["policy"] == "ooco" else colour(row["policy"]),
            color=colour(row["policy"]),
            label=row["policy"],
            capsize=2,
        )
    axis.axvline(100 * FEASIBLE_VIOLATION_RATE, color="#888888", linestyle="--", linewidth=1, label="3 % line")
    axis.set_xscale("symlog", linthresh=1.0)
    axis.set_xlim(-0.05, 130.0)
    axis.xaxis.set_major_locator(FixedLocator([0.0, 0.5, 1.0, 3.0, 10.0, 30.0, 100.0]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_ylim(bottom=0.0)
    axis.set_xlabel("online SLO violations [%]")
    axis.set_ylabel("offline output [tokens/s]")
    axis.legend(fontsize=7, loc="lower right")


def plot_scores(results: Results, path: Path) -> Path:
    """A panel per scenario: score of every policy with its interval, hollow where it misses the online objectives."""
    scores, draws = results.scores(), results.draws(500)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    columns = min(len(results.scenarios), 5)
    lines = -(-len(results.scenarios) // columns)
    figure = _figure(1.2 + 2.2 * columns, 0.6 + lines * (0.5 + 0.17 * len(results.policies)))
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
    heights = np.arange(len(results.policies))[::-1]
    for axis in list(axes.flat)[len(results.scenarios) :]:
        axis.set_visible(False)
    for column, (axis, name) in enumerate(zip(axes.flat, results.scenarios, strict=False)):
        for row, policy in enumerate(results.policies):
            value, tint = 100 * scores[row, column], colour(policy)
            axis.plot([100 * low[row, column], 100 * high[row, column]], [heights[row]] * 2, color=tint, linewidth=1.5)
            kept = scores[row, column] > 0
            axis.plot(value, heights[row], "o", color=tint, markersize=4, markerfacecolor=tint if kept else "none")
        axis.set_title(name, fontsize=8)
        axis.set_xlim(-4, 104)
        axis.tick_params(labelsize=7)
        axis.grid(axis="x", color="#dddddd", linewidth=0.5)
    axes[0, 0].set_yticks(heights, results.policies)
    figure.supxlabel(
        "useful offline work [% of the upper bound]; hollow at 0: nothing useful or SLOs missed", fontsize=8
    )
    return _save(figure, path)


def plot_profiles(results: Results, path: Path) -> Path:
    """Share of scenarios on which a policy scores more than x, with 95 % bands."""
    thresholds = np.linspace(0.0, 1.0, 101)
    shares, low, high = performance_profile(results, thresholds)
    figure = _figure(7.6, 4.2)
    axis = figure.subplots()
    styles = ("-", "--", ":", "-.")
    for row, policy in enumerate(results.policies):
        axis.plot(
            100 * thresholds, 100 * shares[row], styles[row % 4], color=colour(policy), label=policy, linewidth=1.3
        )
        axis.fill_between(
            100 * thresholds, 100 * low[row], 100 * high[row], color=colour(policy), alpha=0.12, linewidth=0
        )
    axis.set(xlabel="score: useful offline work [% of the upper bound]", ylabel="scenarios with a higher score [%]")
    axis.set_xlim(0, 100)
    axis.set_ylim(-2, 102)
    figure.legend(fontsize=7, loc="outside right center")
    return _save(figure, path)


def _knob_axis(axis: Axes, knob: Knob) -> None:
    """The knob's whole range, a little wider so that a line on a bound can be seen, and OOCO's setting."""
    axis.axhline(knob.ooco, color=colour("ooco"), linestyle="--", linewidth=1, label="OOCO")
    if knob.log:
        axis.set_yscale("log")
        axis.set_ylim(knob.low / 1.2, knob.high * 1.2)
        axis.yaxis.set_major_locator(LogLocator(10.0, subs=(1.0, 3.0)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
    else:
        margin = 0.05 * (knob.high - knob.low)
        axis.set_ylim(knob.low - margin, knob.high + margin)


def plot_learning(history: Sequence[Mapping[str, float]], path: Path) -> Path:
    """Reward, validation outcome and knob means over training steps."""
    training = [entry for entry in history if "train/reward" in entry]
    validation = [entry for entry in history if "validation/violation_rate" in entry]
    figure = _figure(11.0, 8.0)
    axes = list(figure.subplots(3, 4).flat)
    steps = [entry["step"] / 1000 for entry in training]
    checked = [entry["step"] / 1000 for entry in validation]
    axes[0].plot(steps, [entry["train/reward"] for entry in training], color=colour("ppo"))
    axes[0].set_title("reward per control interval", fontsize=9)
    useful = [100 * entry["validation/offline_ideal_s_per_instance_s"] for entry in validation]
    axes[1].plot(checked, useful, "o-", color=colour("ppo"), label="useful offline work [%]")
    rates = [100 * entry["validation/violation_rate"] for entry in validation]
    axes[1].plot(checked, rates, "x:", color=colour("base-pd"), label="SLO violations [%]")
    axes[1].axhline(100 * FEASIBLE_VIOLATION_RATE, color="#888888", linestyle="--", linewidth=1, label="3 % line")
    axes[1].set_ylim(bottom=0.0)
    axes[1].set_title("validation", fontsize=9)
    axes[1].legend(fontsize=7)
    for axis, knob in zip(axes[2:], KNOBS, strict=True):
        axis.plot(steps, [entry[f"knobs/{knob.name}"] for entry in training], color=colour("ppo"))
        _knob_axis(axis, knob)
        axis.set_title(knob.name, fontsize=9)
    axes[2].legend(fontsize=7)
    for axis in axes:
        axis.tick_params(labelsize=7)
        axis.set_xlabel("environment steps [thousands]", fontsize=7)
    return _save(figure, path)


def plot_knobs(history: Sequence[Telemetry], path: Path) -> Path:
    """Knob trajectories of one episode beside the online prefill load that they answer to."""
    figure = _figure(8.0, 12.0)
    axes = figure.subplots(len(KNOBS) + 1, 1, sharex=True)
    times = [record["time_s"] for record in history]
    load = [100 * record["arriving_prefill_10s"] / max(record["relaxed_instances"], 1.0) for record in history]
    axes[0].plot(times, load, color=colour("no-offline"))
    axes[0].set_ylabel("online prefill\nload, 10 s [%]", fontsize=7)
    axes[0].set_ylim(bottom=0.0)
    for axis, knob in zip(axes[1:], KNOBS, strict=True):
        axis.plot(times, [record[f"knob_{knob.name}"] for record in history], color=colour("ppo"), label="policy")
        _knob_axis(axis, knob)
        axis.set_ylabel(knob.name, fontsize=7)
    axes[1].legend(fontsize=7, loc="upper right", ncols=2)
    axes[-1].set_xlabel("simulated time [s]")
    for axis in axes:
        axis.tick_params(labelsize=7)
    return _save(figure, path)
