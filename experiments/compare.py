"""Compare baselines and saved policies over workloads and loads: ``python experiments/compare.py``."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # baselines live in the checkout, not in the package

import baselines
from ooco_gym import presets
from ooco_gym.evaluation import Case, Comparison, episode_seeds
from ooco_gym.evaluation.admission import ADMITTED_VIOLATION_RATE, online_violation_rate
from ooco_gym.evaluation.command import (
    admit_scenario,
    compile_kernel,
    control_interval,
    describe,
    guarded,
    launch,
    listed,
    make_console,
    plain,
    positive,
    save_config,
    scenario_of,
    whole,
)
from ooco_gym.evaluation.figures import plot_comparison
from ooco_gym.evaluation.report import print_comparison, write_json


def resolve_workload(entry: Any) -> dict[str, Any]:
    """A preset's name, or the path of a CSV trace of one's own."""
    if str(entry).endswith((".csv", ".csv.gz")):
        name = Path(str(entry)).name.removesuffix(".gz").removesuffix(".csv")
        return {**presets.load("workload", "csv"), "name": name, "file": str(entry)}
    return presets.load("workload", str(entry))


def cases(settings: dict[str, Any], console: Console) -> list[Case]:
    """Every workload at every load, the online rate of load 1 set by the admission rule."""
    found = []
    loads = [positive(load, "loads: an entry") for load in listed(settings, "loads")]
    for workload in listed(settings, "workloads"):
        config = {**settings, "workload": resolve_workload(workload)}
        scenario = scenario_of(config)
        compile_kernel(scenario)
        describe(scenario, console)
        admission = admit_scenario(scenario, config, console)
        for load in loads:
            scale = admission.rate_scale * load
            scaled = scenario.with_rate_scale(scale)
            alone = admission.violation_rate if load == 1 else online_violation_rate(scaled)
            if alone > ADMITTED_VIOLATION_RATE:
                console.print(f"[yellow]note[/yellow]: load {load:g} fails the admission rule ({alone:.1%} alone)")
            found.append(Case(scaled, scenario.online.name, load, scale, scenario.online.role, alone))
    return found


@hydra.main(version_base="1.3", config_path="../conf", config_name="compare")
@guarded
def main(config: DictConfig) -> None:
    settings = plain(config)
    console = make_console()
    policies = baselines.resolve_all(listed(settings, "policies"))
    seeds = episode_seeds("evaluation", whole(settings, "seed", 0), whole(settings, "seeds", 1))
    interval_s = control_interval(settings)
    folder = Path(HydraConfig.get().runtime.output_dir)
    save_config(settings, folder)
    rows: list[dict[str, Any]] = []
    try:
        for case in cases(settings, console):
            comparison = Comparison(case, seeds)
            with Progress(console=console, transient=True) as progress:
                total = len(policies) * len(comparison.seeds)
                task = progress.add_task(f"{case.workload}, load {case.load:g}", total=total)
                comparison.run(policies, interval_s, partial(progress.advance, task))
            rows += comparison.rows()
            title = f"{case.workload} ({case.role}), load {case.load:g}: {len(comparison.seeds)} paired episodes"
            print_comparison(console, comparison.rows(), title)
            write_json(folder / "results.json", {"rows": rows})
    except KeyboardInterrupt:
        console.print(f"interrupted: {'keeping what' if rows else 'nothing'} was finished")
        if not rows:
            raise
    if rows:
        plot_comparison(rows, folder / "comparison.png")
        console.print(f"results.json and comparison.png: {folder}")


if __name__ == "__main__":
    launch(main)
