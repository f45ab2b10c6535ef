"""How much there is to win: tuned constants per deployment, one for all, and the best knobs per window in hindsight.

    python experiments/headroom.py                         the training scenarios of suite v1; some minutes on two cores
    python experiments/headroom.py --only conv bursts      some of them
    python experiments/headroom.py --quick                 a rough form

Constants are tuned by CMA-ES on training seeds of each scenario and measured on fresh ones. `ooco` is the paper's
setting, `tuned-ooco` tunes the four knobs it has, `tuned-all` every knob, `tuned-global` one vector for all scenarios.
`hindsight` is the best of tuned-all, its neighbours and the others per 60 s window. Rewards are useful share - 5 x
violation rate, in points; differences are paired, with 95 % intervals over episodes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from cmaes import CMA
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ooco_gym.cluster.control import KNOB_NAMES, action_to_knobs, ooco_action, ooco_knobs
from ooco_gym.errors import OocoError
from ooco_gym.evaluation import episode_seeds
from ooco_gym.evaluation.hindsight import held_reward, windowed_hindsight
from ooco_gym.evaluation.statistics import Estimate, mean_interval
from ooco_gym.evaluation.suite import load_suite
from ooco_gym.scenario import Scenario

PAPERS_KNOBS = ("gate_batch", "tpot_bound", "pull_kv", "pull_length")
PRICE = 5.0
Vector = npt.NDArray[np.float64]


def rewards(scenario: Scenario, knobs: Vector, seeds: Sequence[int]) -> list[float]:
    """Reward per episode of one knob vector held throughout."""

    def one(seed: int) -> float:
        return held_reward(scenario, seed, knobs, PRICE)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, seeds))


def tune(
    scenarios: Sequence[Scenario], names: Sequence[str], generations: int, seed: int, tick: Callable[[], None]
) -> Vector:
    """The knob vector with the best mean reward over the scenarios; knobs not named stay OOCO's."""
    tuned = [KNOB_NAMES.index(name) for name in names]

    def knobs_at(point: Vector) -> Vector:
        knobs, action = ooco_knobs(), ooco_action().astype(float)
        action[tuned] = point
        knobs[tuned] = action_to_knobs(action)[tuned]
        return knobs

    start = ooco_action().astype(float)[tuned]
    bounds = np.tile([-1.0, 1.0], (len(tuned), 1))
    search = CMA(start, 0.4, bounds=bounds, population_size=10, seed=seed + 1)
    fresh = iter(episode_seeds("train", seed, generations * 2))
    for _ in range(generations):
        seeds = [next(fresh), next(fresh)]
        points = [search.ask() for _ in range(search.population_size)]
        worth = [np.mean([rewards(scenario, knobs_at(point), seeds) for scenario in scenarios]) for point in points]
        search.tell([(point, -float(value)) for point, value in zip(points, worth, strict=True)])
        tick()
    found = knobs_at(search.mean)
    check = episode_seeds("validation", seed, 4)
    kept = max((found, ooco_knobs()), key=lambda knobs: np.mean([rewards(s, knobs, check) for s in scenarios]))
    return kept


def neighbours(knobs: Vector, others: Sequence[Vector], count: int, seed: int) -> list[Vector]:
    """Candidates of the hindsight: the vector itself first, the others, and random ones around it."""
    random = np.random.default_rng(seed)
    spread = np.array([_scaled(knobs, random) for _ in range(count)])
    return [knobs, *others, *spread]


def _scaled(knobs: Vector, random: np.random.Generator) -> Vector:
    """One to three knobs drawn anew over their whole range."""
    drawn = action_to_knobs(random.uniform(-1.0, 1.0, len(KNOB_NAMES)))
    chosen = random.choice(len(KNOB_NAMES), int(random.integers(1, 4)), replace=False)
    changed = knobs.copy()
    changed[chosen] = drawn[chosen]
    return changed


def show(estimate: Estimate) -> str:
    return f"{100 * estimate.value:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="v1", help="name in conf/suite (default v1)")
    parser.add_argument("--only", nargs="+", metavar="SCENARIO", help="names of training scenarios; default all")
    parser.add_argument("--quick", action="store_true", help="6 generations, 4 episodes of 300 s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/headroom"), help="folder of results.json")
    arguments = parser.parse_args()
    generations, episodes = (6, 4) if arguments.quick else (25, 16)
    settings = {"episode_s": 300.0} if arguments.quick else {}
    console = Console() if sys.stdout.isatty() else Console(width=150)
    try:
        entries = load_suite(arguments.suite, "train")
    except OocoError as error:
        sys.exit(str(error))
    if unknown := set(arguments.only or ()) - {entry.name for entry in entries}:
        parser.error(f"no training scenario '{unknown.pop()}': known are {', '.join(entry.name for entry in entries)}")
    entries = [entry for entry in entries if not arguments.only or entry.name in arguments.only]
    arguments.out.mkdir(parents=True, exist_ok=True)
    with console.status("admission"):
        scenarios = {entry.name: entry.admitted(**settings).scenario for entry in entries}
    tuned: dict[str, dict[str, Vector]] = {name: {} for name in scenarios}
    with Progress(console=console) as progress:
        task = progress.add_task("CMA-ES", total=generations * (2 * len(scenarios) + 1))
        tick = partial(progress.advance, task)
        for name, scenario in scenarios.items():
            tuned[name]["tuned-ooco"] = tune([scenario], PAPERS_KNOBS, generations, arguments.seed, tick)
            tuned[name]["tuned-all"] = tune([scenario], KNOB_NAMES, generations, arguments.seed, tick)
        shared = tune(list(scenarios.values()), KNOB_NAMES, generations, arguments.seed, tick)
    seeds = episode_seeds("evaluation", arguments.seed, episodes)
    table = Table(title="reward, points; differences paired, 95 % intervals", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("scenario", "ooco", "tuned-ooco", "tuned-global", "tuned-all", "all - global", "hindsight - all"):
        table.add_column(heading, justify="left" if heading == "scenario" else "right")
    results = {}
    for name, scenario in scenarios.items():
        with console.status(f"{name}: hindsight"):
            values = {
                label: np.array(rewards(scenario, knobs, seeds))
                for label, knobs in {"ooco": ooco_knobs(), **tuned[name], "tuned-global": shared}.items()
            }
            others = [tuned[name]["tuned-ooco"], shared, ooco_knobs()]
            candidates = neighbours(tuned[name]["tuned-all"], others, 8 if arguments.quick else 28, arguments.seed)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                gains = list(pool.map(lambda s: windowed_hindsight(scenario, s, candidates, price=PRICE), seeds))  # noqa: B023
        over_global = mean_interval(values["tuned-all"] - values["tuned-global"])
        over_all = mean_interval([gain.hindsight - gain.first for gain in gains])
        means = [f"{100 * values[label].mean():.1f}" for label in ("ooco", "tuned-ooco", "tuned-global", "tuned-all")]
        table.add_row(name, *means, show(over_global), show(over_all))
        results[name] = {
            "rewards": {label: value.tolist() for label, value in values.items()},
            "knobs": {
                label: dict(zip(KNOB_NAMES, knobs.tolist(), strict=True)) for label, knobs in tuned[name].items()
            },
            "all_minus_global": asdict(over_global),
            "hindsight_minus_all": asdict(over_all),
            "switches_per_episode": float(np.mean([gain.switches for gain in gains])),
        }
    console.print(table)
    output = {
        "price": PRICE,
        "seed": arguments.seed,
        "episodes": episodes,
        "tuned_global": dict(zip(KNOB_NAMES, shared.tolist(), strict=True)),
        "scenarios": results,
    }
    (arguments.out / "results.json").write_text(json.dumps(output, indent=2), encoding="utf-8")
    console.print(f"results.json: {arguments.out}")


if __name__ == "__main__":
    main()
