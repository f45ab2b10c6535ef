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
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from omegaconf import OmegaConf
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # agents live in the checkout, not in the package

from agents.cmaes import KnobSearch
from ooco_gym.cluster.control import KNOB_NAMES, action_to_knobs, knobs_from_mapping, ooco_knobs
from ooco_gym.errors import OocoError
from ooco_gym.evaluation import episode_seeds
from ooco_gym.evaluation.hindsight import held_reward, windowed_hindsight
from ooco_gym.evaluation.report import write_json
from ooco_gym.evaluation.statistics import Estimate, mean_interval
from ooco_gym.evaluation.suite import Entry, load_suite
from ooco_gym.scenario import Scenario

PAPERS_KNOBS = ("gate_batch", "tpot_bound", "pull_kv", "pull_length")
PRICE = 5.0
Vector = npt.NDArray[np.float64]
Tick = Callable[[str, int], None]  # what is tuned, and by how many generations it went on


@dataclass(frozen=True)
class Effort:
    """How long to search and to measure."""

    generations: int
    tuning_episodes: int  # per candidate and scenario; new ones in every generation
    tuning_episode_s: float
    episodes: int  # fresh ones of the table
    episode_s: float
    hindsight_episodes: int  # the first of them
    neighbours: int  # random candidates of the hindsight


FULL = Effort(24, 2, 600.0, 16, 600.0, 8, 16)
QUICK = Effort(4, 1, 200.0, 4, 300.0, 4, 7)


class Tuner:
    """Constants by label, each tuned once and kept in a file, so that an interrupted run goes on."""

    def __init__(self, effort: Effort, seed: int, memory: Path, tick: Tick, threads: ThreadPoolExecutor) -> None:
        self.effort, self.seed, self.memory, self.tick, self.threads = effort, seed, memory, tick, threads
        self.known = remembered(memory)

    def rewards(self, scenarios: Sequence[Scenario], vectors: Sequence[Vector], seeds: Sequence[int]) -> Vector:
        """Rewards of constants, float64 [vectors, scenarios, seeds]."""
        cells = list(product(vectors, scenarios, seeds))
        found = self.threads.map(lambda cell: held_reward(cell[1], cell[2], cell[0], PRICE), cells)
        return np.array(list(found)).reshape(len(vectors), len(scenarios), len(seeds))

    def tune(
        self, label: str, scenarios: Mapping[str, Scenario], names: Sequence[str], starts: Sequence[Vector]
    ) -> Vector:
        """The vector with the best mean reward, searched from the best of ``starts`` over the knobs ``names``."""
        settings = {
            "scenarios": {name: scenario.identity for name, scenario in scenarios.items()},
            "starts": [named(start) for start in starts],
            **{"knobs": list(names), "price": PRICE, "seed": self.seed, "effort": asdict(self.effort)},
        }
        if label in self.known and self.known[label].get("settings") == settings:
            self.tick(label, self.effort.generations)
            return knobs_from_mapping(self.known[label]["found"])
        where = list(scenarios.values())
        validation = episode_seeds("validation", self.seed, 2 * self.effort.tuning_episodes)
        start = starts[int(np.argmax(self.rewards(where, starts, validation).mean((1, 2))))]
        search = KnobSearch(start, names, sigma=0.3, population=10, seed=self.seed + 1)
        per_generation = self.effort.tuning_episodes
        fresh = episode_seeds("train", self.seed, self.effort.generations * per_generation)
        for generation in range(self.effort.generations):
            seeds = fresh[generation * per_generation : (generation + 1) * per_generation]
            search.tell((-self.rewards(where, search.ask(), seeds).mean((1, 2))).tolist())
            self.tick(label, 1)
        finalists = [search.centre, *starts]
        found = finalists[int(np.argmax(self.rewards(where, finalists, validation).mean((1, 2))))]
        self.known[label] = {"settings": settings, "found": named(found)}
        write_json(self.memory, self.known)
        return knobs_from_mapping(named(found))  # as the file has it, so that a resumed run is the same


def remembered(memory: Path) -> dict[str, dict[str, Any]]:
    """What an earlier run tuned; raises OocoError where the file is damaged."""
    if not memory.is_file():
        return {}
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
        return {label: dict(entry) for label, entry in known.items()}
    except (ValueError, AttributeError, TypeError):
        raise OocoError(f"{memory} is damaged; delete it or choose another --out") from None


def named(knobs: Vector) -> dict[str, float]:
    return dict(zip(KNOB_NAMES, (float(f"{knob:.4g}") for knob in knobs), strict=True))


def neighbours(knobs: Vector, count: int, seed: int) -> list[Vector]:
    """Candidates of the hindsight: the vector with one to three of its knobs drawn anew over their whole range."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        drawn = action_to_knobs(random.uniform(-1.0, 1.0, len(KNOB_NAMES)))
        chosen = random.choice(len(KNOB_NAMES), int(random.integers(1, 4)), replace=False)
        found.append(knobs.copy())
        found[-1][chosen] = drawn[chosen]
    return found


def grouped(deployments: Mapping[str, str]) -> dict[str, list[str]]:
    """Scenario names by deployment, in their order."""
    groups: dict[str, list[str]] = {}
    for name, deployment in deployments.items():
        groups.setdefault(deployment, []).append(name)
    return groups


def tune_all(
    tuner: Tuner, scenarios: Mapping[str, Scenario], deployments: Mapping[str, str]
) -> tuple[Vector, dict[str, dict[str, Vector]], dict[str, Vector]]:
    """tuned-global, the two tuned vectors of every deployment, and tuned-here of every scenario."""
    everywhere = tuner.tune("tuned-global", scenarios, KNOB_NAMES, [ooco_knobs()])
    by_deployment: dict[str, dict[str, Vector]] = {}
    here: dict[str, Vector] = {}
    for deployment, members in grouped(deployments).items():
        chosen = {name: scenarios[name] for name in members}
        papers = tuner.tune(f"tuned-ooco {deployment}", chosen, PAPERS_KNOBS, [ooco_knobs()])
        every = tuner.tune(f"tuned-all {deployment}", chosen, KNOB_NAMES, [everywhere, papers])
        by_deployment[deployment] = {"tuned-ooco": papers, "tuned-all": every}
        for name in members:
            alone = len(members) == 1
            here[name] = every if alone else tuner.tune(
                f"tuned-here {name}", {name: scenarios[name]}, KNOB_NAMES, [every, everywhere]
            )  # fmt: skip
    return everywhere, by_deployment, here


def searches(deployments: Mapping[str, str]) -> int:
    """How many vectors :func:`tune_all` tunes."""
    groups = grouped(deployments).values()
    return 1 + 2 * len(groups) + sum(len(members) for members in groups if len(members) > 1)


def show(estimate: Estimate) -> str:
    return f"{100 * estimate.value:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"


LEVELS = ("ooco", "tuned-ooco", "tuned-global", "tuned-all", "tuned-here")
STEPS = (("tuned-ooco", "ooco"), ("tuned-all", "tuned-global"), ("tuned-here", "tuned-all"))


def measure(
    tuner: Tuner, scenario: Scenario, levels: Mapping[str, Vector], effort: Effort, seed: int
) -> dict[str, Any]:
    """Rewards of every level on fresh episodes, paired differences, and what hindsight adds to the best level."""
    seeds = episode_seeds("evaluation", seed, effort.episodes)
    known = seeds[: effort.hindsight_episodes]
    rewards = tuner.rewards([scenario], list(levels.values()), seeds)[:, 0]
    values = dict(zip(levels, rewards, strict=True))
    constants = [levels[name] for name in reversed(LEVELS)]
    candidates = [*constants, *neighbours(constants[0], effort.neighbours, seed)]
    gains = list(tuner.threads.map(lambda s: windowed_hindsight(scenario, s, candidates, price=PRICE), known))
    over_here = [gain.hindsight - gain.first for gain in gains]
    over_all = np.array([gain.hindsight for gain in gains]) - values["tuned-all"][: len(known)]
    return {
        "rewards": {name: value.tolist() for name, value in values.items()},
        "differences": {f"{a} - {b}": asdict(mean_interval(values[a] - values[b])) for a, b in STEPS},
        "hindsight - tuned-here": asdict(mean_interval(over_here)),
        "hindsight - tuned-all": asdict(mean_interval(over_all)),
        "windows_that_switch": float(np.mean([gain.switches for gain in gains])) * 60.0 / scenario.episode_s,
    }  # fmt: skip


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


def run(entries: Sequence[Entry], arguments: argparse.Namespace, effort: Effort, console: Console) -> None:
    with console.status("admission") as status:
        scenarios = {}
        for entry in entries:
            status.update(f"admission: {entry.name}")
            scenarios[entry.name] = entry.admitted(episode_s=effort.episode_s).scenario
    short = {name: replace(scenario, episode_s=effort.tuning_episode_s) for name, scenario in scenarios.items()}
    deployments = {entry.name: entry.deployment for entry in entries}
    threads = ThreadPoolExecutor(os.cpu_count())
    with Progress(console=console) as progress:
        task = progress.add_task("CMA-ES", total=searches(deployments) * effort.generations)

        def tick(label: str, generations: int) -> None:
            progress.update(task, advance=generations, description=f"CMA-ES {label}")

        tuner = Tuner(effort, arguments.seed, arguments.out / "tuned.json", tick, threads)
        everywhere, by_deployment, here = tune_all(tuner, short, deployments)
    table = Table(title="reward, points; differences paired, 95 % intervals", title_justify="left", box=SIMPLE_HEAD)
    headings = ("scenario", *LEVELS, *(f"{ours}\n- {theirs}" for ours, theirs in STEPS), "hindsight\n- tuned-here")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "scenario" else "right")
    results: dict[str, Any] = {}
    tuned = {
        "tuned-global": named(everywhere),
        **{
            level: {deployment: named(vectors[level]) for deployment, vectors in by_deployment.items()}
            for level in ("tuned-ooco", "tuned-all")
        },
        "tuned-here": {name: named(knobs) for name, knobs in here.items()},
    }
    OmegaConf.save(OmegaConf.create(tuned), arguments.out / "tuned.yaml")
    output = {
        "suite": arguments.suite,
        "price": PRICE,
        "seed": arguments.seed,
        "effort": asdict(effort),
        "tuned": tuned,
        "scenarios": results,
    }
    for name, scenario in scenarios.items():
        with console.status(f"{name}: hindsight"):
            levels = {
                "ooco": ooco_knobs(),
                **by_deployment[deployments[name]],
                "tuned-global": everywhere,
                "tuned-here": here[name],
            }
            row = results[name] = measure(
                tuner, scenario, {level: levels[level] for level in LEVELS}, effort, arguments.seed
            )
        write_json(arguments.out / "results.json", output)
        estimates = [*row["differences"].values(), row["hindsight - tuned-here"]]
        means = [f"{100 * np.mean(row['rewards'][level]):.1f}" for level in LEVELS]
        table.add_row(name, *means, *(show(Estimate(**estimate)) for estimate in estimates))
    console.print(table)
    console.print(f"results.json, and tuned.yaml, which conf/tuned/NAME.yaml may become: {arguments.out}")


if __name__ == "__main__":
    main()
