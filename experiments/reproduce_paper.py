"""The paper's figure and table under stated assumptions: ``python experiments/reproduce_paper.py``."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import DictConfig
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # baselines live in the checkout, not in the package

import baselines
from ooco_gym import presets
from ooco_gym.errors import OocoError
from ooco_gym.evaluation import admit, episode_seeds, run_episodes
from ooco_gym.evaluation.bound import offline_bound
from ooco_gym.evaluation.capacity import Capacity, Prober, capacity_ratio, find_capacity
from ooco_gym.evaluation.command import (
    compile_kernel,
    flag,
    guarded,
    launch,
    listed,
    make_console,
    plain,
    positive,
    save_config,
    whole,
)
from ooco_gym.evaluation.figures import colour
from ooco_gym.evaluation.report import write_json
from ooco_gym.evaluation.statistics import Estimate, ratio_interval, summarise
from ooco_gym.policy import Policy
from ooco_gym.scenario import SCENARIO_KEYS, Scenario, build_scenario

#: Fig. 23 of the report: sustained offline requests/s; the last column reached the end of its sweep.
PUBLISHED = {
    "azure-code-2023": {"base-pd": 3.0, "online-priority": 2.0, "ooco": 3.5},
    "ooc-like": {"base-pd": 1.0, "online-priority": 1.0, "ooco": 3.0},
}
#: What a workload or an assumption may change.
CHANGEABLE = tuple(key for key in SCENARIO_KEYS if key != "workload")
QUICK = {"seeds": 4, "episode_s": 200.0, "warmup_s": 40.0, "precision": 0.05}


class Study:
    """Policies on scenarios: admission once per scenario, every probe kept for the next start."""

    def __init__(self, settings: Mapping[str, Any], folder: Path, console: Console) -> None:
        self.settings, self.folder, self.console = settings, folder, console
        self.seeds = episode_seeds("evaluation", int(settings["seed"]), int(settings["seeds"]))
        self.policies: list[Policy] = baselines.resolve_all(listed(settings, "policies"))

    def admitted(self, workload: str, changes: Mapping[str, Any]) -> Scenario:
        """The workload at the rate that the admission rule gives it on this cluster, times the ``load`` of changes."""
        config = {key: self.settings[key] for key in CHANGEABLE if key in self.settings}
        config |= {key: value for key, value in changes.items() if key != "load"} | {"workload": workload}
        with self.console.status(f"{workload} {dict(changes) or ''}: admission"):
            admission = admit(build_scenario(config))
        return admission.scenario.with_rate_scale(admission.rate_scale * float(changes.get("load", 1.0)))

    def prober(self, policy: Policy, scenario: Scenario, label: str) -> Prober:
        knobs = dict(getattr(policy, "knobs", {}))
        described = json.dumps([scenario.identity, dict(policy.rules), knobs], default=str)
        key = f"{policy.name} {label} {blake2b(described.encode(), digest_size=8).hexdigest()}"
        return Prober(policy, scenario, self.seeds, memory=self.folder / "probes.jsonl", key=key)

    def capacities(self, scenario: Scenario, label: str, limits: list[float]) -> dict[str, dict[float, Capacity]]:
        """Capacity of every policy at every limit."""
        found: dict[str, dict[float, Capacity]] = {}
        for policy in self.policies:
            with self.console.status(f"{label}: {policy.name}") as status:
                prober = self.prober(policy, scenario, label)
                prober.on_probe = lambda probe, name=policy.name: status.update(
                    f"{label}: {name} at {probe.rate_per_s:.2f}/s violates {probe.violation_rate():.1%}"
                )
                precision = float(self.settings["precision"])
                guess, by_limit = 1.0, {}
                for limit in limits:
                    by_limit[limit] = find_capacity(prober, limit, guess, precision)
                    guess = max(by_limit[limit].rate_per_s.value, 0.1)
                # Violations do not grow evenly with the rate: a search may have met a higher rate that another limit
                # allows. Strictest first, so that what it sustains counts for the looser ones.
                for limit in sorted(limits):
                    best = prober.largest_sustained(limit)
                    if best > by_limit[limit].rate_per_s.value:
                        by_limit[limit] = find_capacity(prober, limit, best, precision)
                found[policy.name] = {limit: by_limit[limit] for limit in limits}
        return found


def show(estimate: Estimate | None) -> str:
    return "-" if estimate is None else estimate.shown(".2f")


def named_workload(entry: Any) -> tuple[str, dict[str, Any]]:
    """An entry of ``workloads``: a preset's name, or a mapping with ``workload`` and what else it needs."""
    changes = dict(entry) if isinstance(entry, Mapping) else {"workload": entry}
    if not isinstance(changes.get("workload"), str):
        raise OocoError(f"workloads: {entry!r} is not understood, a name or a mapping with workload: NAME is needed")
    presets.load("workload", changes["workload"])
    return changes.pop("workload"), changes


def main_table(study: Study, workload: str, changes: Mapping[str, Any], limits: list[float]) -> dict[str, Any]:
    """One workload: capacities beside the published ones, saturated throughput, and the points of the curve."""
    scenario = study.admitted(workload, changes)
    found = study.capacities(scenario, workload, limits)
    bound = offline_bound(scenario, study.seeds)
    published = PUBLISHED.get(workload, {})
    title = f"{workload}: sustained offline requests/s; no scheduler can exceed {bound.offline_requests_per_s:.1f}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in ("policy", *(f"at {limit:.0%}" for limit in limits), "published", "saturated", "violations"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    rows: dict[str, Any] = {}
    for policy in study.policies:
        with study.console.status(f"{workload}: {policy.name} with an endless backlog"):
            saturated = summarise(run_episodes(policy, scenario, study.seeds))
        capacities = found[policy.name]
        rows[policy.name] = {
            "capacity_per_s": {f"{limit:g}": asdict(capacities[limit].rate_per_s) for limit in limits},
            "bounded_by": {f"{limit:g}": capacities[limit].bounded_by for limit in limits},
            "published_per_s": published.get(policy.name),
            "saturated_requests_per_s": asdict(saturated["offline_requests_per_s"]),
            "saturated_violation_rate": asdict(saturated["violation_rate"]),
            "curve": curve(study, policy, scenario, workload),
        }
        table.add_row(
            policy.name,
            *(show(capacities[limit].rate_per_s) for limit in limits),
            f"{published[policy.name]:.1f}" if policy.name in published else "",
            f"{saturated['offline_requests_per_s'].value:.2f}",
            f"{saturated['violation_rate'].value:.1%}",
        )
    study.console.print(table)
    gains = {
        rival: capacity_ratio(found["ooco"][limits[0]], found[rival][limits[0]])
        for rival in ("base-pd", "online-priority")
        if rival in found and "ooco" in found
    }
    for rival, gain in gains.items():
        said = f", published {published['ooco'] / published[rival]:.2f}" if published else ""
        study.console.print(f"  ooco / {rival} at {limits[0]:.0%}: {show(gain)}{said}")
    return {
        "rate_scale": scenario.online.rate_scale,
        "online_requests_per_s": scenario.online.mean_rate_per_s,
        "bound_requests_per_s": bound.offline_requests_per_s,
        "policies": rows,
        "gains_of_ooco": {rival: gain and asdict(gain) for rival, gain in gains.items()},
    }


def curve(study: Study, policy: Policy, scenario: Scenario, label: str) -> list[dict[str, Any]]:
    """Violation rate and completions over the grid of offline rates."""
    prober = study.prober(policy, scenario, label)
    points = []
    for rate in study.settings["curve_per_s"]:
        with study.console.status(f"{label}: {policy.name} at {rate:g}/s"):
            probe = prober(float(rate))
        late = ratio_interval(probe.violations, probe.online_requests)
        points.append({"rate_per_s": rate, "violation_rate": asdict(late), "completed": probe.completed_share()})
    return points


def sensitivity(
    study: Study,
    workload: str,
    given: Mapping[str, Any],
    variants: Mapping[str, Mapping[str, Any]],
    limits: list[float],
) -> dict[str, Any]:
    """Capacities at the first limit and gains of ooco at the first two, with one assumption changed at a time."""
    limits, names = limits[:2], [policy.name for policy in study.policies]
    rivals = [name for name in ("base-pd", "online-priority") if {name, "ooco"} <= set(names)]
    title = f"{workload}, one assumption changed: offline requests/s at {limits[0]:.0%}, and gains of ooco"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    gains = [(rival, limit) for rival in rivals for limit in limits]
    for heading in ("assumption", *names, *(f"/ {rival}\nat {limit:.0%}" for rival, limit in gains)):
        table.add_column(heading, justify="left" if heading == "assumption" else "right")
    rows: dict[str, Any] = {}
    for label, changes in variants.items():
        try:
            scenario = study.admitted(workload, {**given, **changes})
        except OocoError as error:
            study.console.print(f"[yellow]{workload}, {label}[/yellow] left out: {error}")
            continue
        found = study.capacities(scenario, f"{workload} {label}", limits)
        ratios = [capacity_ratio(found["ooco"][limit], found[rival][limit]) for rival, limit in gains]
        rows[label] = {
            "capacity_per_s": {
                name: {f"{limit:g}": asdict(found[name][limit].rate_per_s) for limit in limits} for name in names
            },
            "bounded_by": {name: found[name][limits[0]].bounded_by for name in names},
            "gains_of_ooco": {
                f"{rival} at {limit:g}": ratio and asdict(ratio)
                for (rival, limit), ratio in zip(gains, ratios, strict=True)
            },
        }
        table.add_row(label, *(f"{found[name][limits[0]].rate_per_s.value:.2f}" for name in names), *map(show, ratios))
    study.console.print(table)
    return rows


def check(settings: Mapping[str, Any]) -> None:
    """Refuse what would fail only after minutes; raises OocoError."""
    whole(settings, "seeds", 2)
    whole(settings, "seed", 0)
    for limit in listed(settings, "limits"):
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 <= limit < 1:
            raise OocoError(f"limits: {limit!r} is not a violation rate, at least 0 and below 1 is accepted")
    for rate in listed(settings, "curve_per_s"):
        positive(rate, "curve_per_s: an entry")
    if positive(settings["precision"], "precision") >= 1 or settings["precision"] < 1e-4:
        raise OocoError(f"precision is {settings['precision']:g}, 0.0001 to below 1 is accepted")
    for row, changes in settings["sensitivity"].items():
        if not isinstance(changes, Mapping) or set(changes) - set(CHANGEABLE) - {"load"}:
            raise OocoError(f"sensitivity.{row} is {changes!r}, a mapping of scenario settings or load is needed")
        positive(changes.get("load", 1.0), f"sensitivity.{row}.load")
    for workload in settings["sensitivity_of"] if isinstance(settings["sensitivity_of"], list) else [None]:
        if not isinstance(workload, str):
            raise OocoError(f"sensitivity_of is {settings['sensitivity_of']!r}, a list of workload names is needed")
        presets.load("workload", workload)


def chosen_rows(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The sensitivity rows that ``rows`` names, all where it is null; raises OocoError on an unknown one."""
    known, rows = settings["sensitivity"], settings["rows"]
    if rows is None:
        return dict(known)
    unknown = [row for row in rows if row not in known] if isinstance(rows, list) else [rows]
    if unknown:
        raise OocoError(f"rows: '{unknown[0]}' is unknown, accepted is a list of some of {', '.join(known)}")
    return {row: known[row] for row in rows}


def draw(results: Mapping[str, Any], limit: float, path: Path) -> None:
    """Violation rate over the offline rate, one panel per workload, published capacities as ticks on the line."""
    workloads = list(results)
    figure = Figure(figsize=(3.6 * len(workloads), 3.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axis, workload in zip(figure.subplots(1, len(workloads), squeeze=False)[0], workloads, strict=True):
        for name, row in results[workload]["policies"].items():
            x = [point["rate_per_s"] for point in row["curve"]]
            y, low, high = (
                [100 * point["violation_rate"][end] for point in row["curve"]] for end in ("value", "low", "high")
            )
            axis.plot(x, y, marker=".", color=colour(name), label=name)
            axis.fill_between(x, low, high, color=colour(name), alpha=0.15, linewidth=0)
            if row["published_per_s"]:
                axis.plot(row["published_per_s"], 100 * limit, marker="v", markersize=8, color=colour(name))
        axis.axhline(100 * limit, color="0.6", linewidth=0.8)
        axis.set(title=workload, xlabel="offline requests/s", ylim=(0, 12))
    figure.axes[0].set_ylabel("online SLO violations, %")
    figure.axes[0].legend(fontsize=7, title="triangles: published", title_fontsize=7)
    figure.savefig(path)


@hydra.main(version_base="1.3", config_path="../conf", config_name="paper")
@guarded
def main(config: DictConfig) -> None:
    settings = plain(config)
    if flag(settings, "quick"):
        if settings["rows"] is None:
            settings["rows"] = list(settings["sensitivity"])[:3]
        settings |= QUICK
    console, folder = make_console(), Path(HydraConfig.get().runtime.output_dir)
    check(settings)
    workloads = dict(named_workload(entry) for entry in listed(settings, "workloads"))
    limits = [float(limit) for limit in settings["limits"]]
    settings["sensitivity"] = chosen_rows(settings)
    save_config(settings, folder)
    study = Study(settings, folder, console)
    compile_kernel(build_scenario({key: settings[key] for key in CHANGEABLE if key in settings}))
    results: dict[str, Any] = {"workloads": {}, "sensitivity": {}}
    try:
        for workload, changes in workloads.items():
            try:
                results["workloads"][workload] = main_table(study, workload, changes, limits)
            except OocoError as error:
                console.print(f"{workload}: left out, {error}")
            write_json(folder / "results.json", results)
        for workload in settings["sensitivity_of"] if settings["sensitivity"] else []:
            results["sensitivity"][workload] = sensitivity(
                study, workload, workloads.get(workload, {}), settings["sensitivity"], limits
            )
            write_json(folder / "results.json", results)
    except KeyboardInterrupt:
        console.print(f"interrupted: run it again with hydra.run.dir={folder} to resume")
        raise
    finally:
        write_json(folder / "results.json", results)
    if not results["workloads"]:
        raise OocoError("no workload could be run: the reasons are above")
    draw(results["workloads"], limits[0], folder / "capacity.png")
    console.print(f"results.json, probes.jsonl and capacity.png: {folder}")


if __name__ == "__main__":
    launch(main)
