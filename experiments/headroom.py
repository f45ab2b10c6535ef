"""How much there is to win: constants tuned for ever narrower purposes, and the best knobs per window in hindsight.

    python experiments/headroom.py                         the training scenarios of suite v1; half an hour of two cores
    python experiments/headroom.py --only conv bursts      some of them; tuned-global is then of these alone
    python experiments/headroom.py --quick                 a rough form

Five settings of the knobs, each searched by CMA-ES from the one before, on training seeds of training scenarios:

    ooco          the paper's
    tuned-ooco    the four knobs that the paper's scheduler has, per deployment (model, hardware, cluster, SLO)
    tuned-global  every knob, one vector for all scenarios
    tuned-all     every knob, one vector per deployment
    tuned-here    every knob, one vector per scenario: the workload and its load are known as well

`hindsight` takes the best of these and of random neighbours anew in every 60 s window, by what follows from the same
state over the rest of the episode: what a scheduler that knew the future would do. Rewards are useful share - 5 x
violation rate, in points, on fresh episodes; differences are paired, with 95 % intervals over episodes. Ctrl-C keeps
what was tuned; the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # agents live in the checkout, not in the package

from agents.levels import Tuned, Tuner, searches, tune_levels
from ooco_gym.errors import OocoError
from ooco_gym.evaluation.headroom import LEVELS, PRICE, STEPS, Effort, measure
from ooco_gym.evaluation.report import write_json
from ooco_gym.evaluation.statistics import Estimate
from ooco_gym.evaluation.suite import Entry, load_suite
from ooco_gym.scenario import Scenario

FULL = Effort(24, 2, 600.0, 16, 600.0, 8, 16)
QUICK = Effort(4, 1, 200.0, 4, 300.0, 4, 7)


def admitted(entries: Sequence[Entry], effort: Effort, console: Console) -> dict[str, Scenario]:
    scenarios = {}
    with console.status("admission") as status:
        for entry in entries:
            status.update(f"admission: {entry.name}")
            scenarios[entry.name] = entry.admitted(episode_s=effort.episode_s).scenario
    return scenarios


def tuned(
    scenarios: Mapping[str, Scenario],
    deployments: Mapping[str, str],
    effort: Effort,
    arguments: argparse.Namespace,
    threads: Executor,
    console: Console,
) -> Tuned:
    """Every level, tuned on short episodes."""
    short = {name: replace(scenario, episode_s=effort.tuning_episode_s) for name, scenario in scenarios.items()}
    with Progress(console=console) as progress:
        task = progress.add_task("CMA-ES", total=searches(deployments) * effort.generations)

        def tick(label: str, generations: int) -> None:
            progress.update(task, advance=generations, description=f"CMA-ES {label}")

        tuner = Tuner(effort, arguments.seed, arguments.out / "tuned.json", tick, threads)
        return tune_levels(tuner, short, deployments)


def empty_table() -> Table:
    table = Table(title="reward, points; differences paired, 95 % intervals", title_justify="left", box=SIMPLE_HEAD)
    headings = ("scenario", *LEVELS, *(f"{ours}\n- {theirs}" for ours, theirs in STEPS), "hindsight\n- tuned-here")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "scenario" else "right")
    return table


def cells(row: Mapping[str, Any]) -> list[str]:
    """What a scenario's line of the table shows of its measurement."""
    estimates = [*row["differences"].values(), row["hindsight - tuned-here"]]
    means = [f"{100 * np.mean(row['rewards'][level]):.1f}" for level in LEVELS]
    return [*means, *(Estimate(**estimate).shown("+.1f", 100) for estimate in estimates)]


def run(entries: Sequence[Entry], arguments: argparse.Namespace, effort: Effort, console: Console) -> None:
    scenarios = admitted(entries, effort, console)
    deployments = {entry.name: entry.deployment for entry in entries}
    threads = ThreadPoolExecutor(os.cpu_count())
    found = tuned(scenarios, deployments, effort, arguments, threads, console)
    OmegaConf.save(OmegaConf.create(found.table()), arguments.out / "tuned.yaml")
    table, rows = empty_table(), {}
    for name, scenario in scenarios.items():
        with console.status(f"{name}: hindsight"):
            levels = found.levels(name, deployments[name])
            rows[name] = measure(scenario, levels, effort, arguments.seed, threads)
        output = {
            "suite": arguments.suite,
            "price": PRICE,
            "seed": arguments.seed,
            "effort": asdict(effort),
            "tuned": found.table(),
            "scenarios": rows,
        }
        write_json(arguments.out / "results.json", output)
        table.add_row(name, *cells(rows[name]))
    console.print(table)
    console.print(f"results.json, and tuned.yaml, which conf/tuned/NAME.yaml may become: {arguments.out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="v1", help="name in conf/suite (default v1)")
    parser.add_argument("--only", nargs="+", metavar="SCENARIO", help="names of training scenarios; default all")
    parser.add_argument("--quick", action="store_true", help="few generations, four episodes of 300 s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder of results.json and tuned.yaml; default runs/headroom[...]")
    arguments = parser.parse_args()
    if arguments.seed < 0:
        parser.error(f"--seed is {arguments.seed}, at least 0 is accepted")
    if arguments.out is None:  # a part or a rough form never overwrites the whole
        parts = ["headroom", *(["quick"] if arguments.quick else []), *(arguments.only or [])]
        arguments.out = Path("runs") / "-".join(parts)
    effort = QUICK if arguments.quick else FULL
    console = Console() if sys.stdout.isatty() else Console(width=150)
    try:
        entries = load_suite(arguments.suite, "train")
        if unknown := sorted(set(arguments.only or ()) - {entry.name for entry in entries}):
            known = ", ".join(entry.name for entry in entries)
            raise OocoError(f"no training scenario '{unknown[0]}' in suite '{arguments.suite}': known are {known}")
        entries = [entry for entry in entries if not arguments.only or entry.name in arguments.only]
        arguments.out.mkdir(parents=True, exist_ok=True)
        run(entries, arguments, effort, console)
    except OSError as error:
        print(f"error: {error.filename or arguments.out}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except OocoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(
            f"interrupted: what was tuned is in {arguments.out / 'tuned.json'}, the same command goes on from there"
        )


if __name__ == "__main__":
    main()
