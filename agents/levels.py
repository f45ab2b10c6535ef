"""Constants tuned for ever narrower purposes: for all scenarios, per deployment, and for one scenario alone.

Every vector is searched by CMA-ES, from the best of the broader ones, on training seeds. What is found is kept in a
file, so that an interrupted run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agents.cmaes import KnobSearch
from ooco_gym.cluster.control import KNOB_NAMES, knobs_from_mapping, ooco_knobs
from ooco_gym.errors import OocoError
from ooco_gym.evaluation import episode_seeds
from ooco_gym.evaluation.headroom import PRICE, Effort
from ooco_gym.evaluation.hindsight import Vector, held_rewards
from ooco_gym.evaluation.report import write_json
from ooco_gym.scenario import Scenario

PAPERS_KNOBS = ("gate_batch", "tpot_bound", "pull_kv", "pull_length")
Tick = Callable[[str, int], None]  # what is tuned, and by how many generations it went on


class Tuner:
    """Constants by label, each tuned once and kept in a file. Raises OocoError where the file is damaged."""

    def __init__(self, effort: Effort, seed: int, memory: Path, tick: Tick, threads: Executor) -> None:
        self.effort, self.seed, self.memory, self.tick, self.threads = effort, seed, memory, tick, threads
        self.known = _remembered(memory)

    def tune(
        self, label: str, scenarios: Mapping[str, Scenario], names: Sequence[str], starts: Sequence[Vector]
    ) -> Vector:
        """The vector with the best mean reward, searched from the best of ``starts`` over the knobs ``names``."""
        settings = {
            "scenarios": {name: scenario.identity for name, scenario in scenarios.items()},
            "starts": [_named(start) for start in starts],
            **{"knobs": list(names), "price": PRICE, "seed": self.seed, "effort": asdict(self.effort)},
        }
        if label in self.known and self.known[label].get("settings") == settings:
            self.tick(label, self.effort.generations)
            return knobs_from_mapping(self.known[label]["found"])
        where = list(scenarios.values())
        per_generation = self.effort.tuning_episodes
        validation = episode_seeds("validation", self.seed, 2 * per_generation)
        search = KnobSearch(self._best(where, starts, validation), names, sigma=0.3, population=10, seed=self.seed + 1)
        fresh = episode_seeds("train", self.seed, self.effort.generations * per_generation)
        for generation in range(self.effort.generations):
            seeds = fresh[generation * per_generation : (generation + 1) * per_generation]
            search.tell((-self._rewards(where, search.ask(), seeds)).tolist())
            self.tick(label, 1)
        found = _named(self._best(where, [search.centre, *starts], validation))
        self.known[label] = {"settings": settings, "found": found}
        write_json(self.memory, self.known)
        return knobs_from_mapping(found)  # as the file has it, so that a resumed run is the same

    def _rewards(self, scenarios: Sequence[Scenario], vectors: Sequence[Vector], seeds: Sequence[int]) -> Vector:
        """Mean rewards, float64 [vectors]."""
        means: Vector = held_rewards(self.threads, vectors, scenarios, seeds, PRICE).mean((1, 2))
        return means

    def _best(self, scenarios: Sequence[Scenario], vectors: Sequence[Vector], seeds: Sequence[int]) -> Vector:
        return vectors[int(np.argmax(self._rewards(scenarios, vectors, seeds)))]


def _remembered(memory: Path) -> dict[str, dict[str, Any]]:
    """What an earlier run tuned."""
    if not memory.is_file():
        return {}
    try:
        known = json.loads(memory.read_text(encoding="utf-8"))
        return {label: dict(entry) for label, entry in known.items()}
    except (ValueError, AttributeError, TypeError):
        raise OocoError(f"{memory} is damaged; delete it or choose another --out") from None


def _named(knobs: Vector) -> dict[str, float]:
    return dict(zip(KNOB_NAMES, (float(f"{knob:.4g}") for knob in knobs), strict=True))


@dataclass(frozen=True)
class Tuned:
    """The tuned vectors: one for all scenarios, tuned-ooco and tuned-all by deployment, tuned-here by scenario."""

    everywhere: Vector
    by_deployment: Mapping[str, Mapping[str, Vector]]
    here: Mapping[str, Vector]

    def levels(self, scenario: str, deployment: str) -> dict[str, Vector]:
        """Every level in one scenario."""
        return {
            "ooco": ooco_knobs(),
            **self.by_deployment[deployment],
            "tuned-global": self.everywhere,
            "tuned-here": self.here[scenario],
        }

    def table(self) -> dict[str, Any]:
        """As conf/tuned/NAME.yaml has it: knobs by level, and by deployment or scenario below that."""
        return {
            "tuned-global": _named(self.everywhere),
            **{
                level: {deployment: _named(vectors[level]) for deployment, vectors in self.by_deployment.items()}
                for level in ("tuned-ooco", "tuned-all")
            },
            "tuned-here": {name: _named(knobs) for name, knobs in self.here.items()},
        }


def tune_levels(tuner: Tuner, scenarios: Mapping[str, Scenario], deployments: Mapping[str, str]) -> Tuned:
    """Every level of LEVELS but the paper's; ``deployments`` are by scenario. A lone scenario of its deployment has one
    vector for both."""
    everywhere = tuner.tune("tuned-global", scenarios, KNOB_NAMES, [ooco_knobs()])
    by_deployment: dict[str, dict[str, Vector]] = {}
    here: dict[str, Vector] = {}
    for deployment, members in _grouped(deployments).items():
        chosen = {name: scenarios[name] for name in members}
        papers = tuner.tune(f"tuned-ooco {deployment}", chosen, PAPERS_KNOBS, [ooco_knobs()])
        every = tuner.tune(f"tuned-all {deployment}", chosen, KNOB_NAMES, [everywhere, papers])
        by_deployment[deployment] = {"tuned-ooco": papers, "tuned-all": every}
        for name in members:
            alone = len(members) == 1
            here[name] = every if alone else tuner.tune(
                f"tuned-here {name}", {name: scenarios[name]}, KNOB_NAMES, [every, everywhere]
            )  # fmt: skip
    return Tuned(everywhere, by_deployment, here)


def searches(deployments: Mapping[str, str]) -> int:
    """How many vectors :func:`tune_levels` tunes."""
    groups = _grouped(deployments).values()
    return 1 + 2 * len(groups) + sum(len(members) for members in groups if len(members) > 1)


def _grouped(deployments: Mapping[str, str]) -> dict[str, list[str]]:
    """Scenario names by deployment, in their order."""
    groups: dict[str, list[str]] = {}
    for name, deployment in deployments.items():
        groups.setdefault(deployment, []).append(name)
    return groups
