"""How much there is to win in one scenario: constants tuned for ever narrower purposes, and hindsight over the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ooco_gym.cluster.control import KNOB_NAMES, action_to_knobs
from ooco_gym.evaluation.hindsight import Vector, held_rewards, windowed_hindsight
from ooco_gym.evaluation.seeds import episode_seeds
from ooco_gym.evaluation.statistics import mean_interval
from ooco_gym.scenario import Scenario

#: Settings of the knobs, each searched from the one before it, and the pairs of them that are compared.
LEVELS = ("ooco", "tuned-ooco", "tuned-global", "tuned-all", "tuned-here")
STEPS = (("tuned-ooco", "ooco"), ("tuned-all", "tuned-global"), ("tuned-here", "tuned-all"))
PRICE = 5.0


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


def measure(
    scenario: Scenario, levels: Mapping[str, Vector], effort: Effort, seed: int, threads: Executor
) -> dict[str, Any]:
    """Rewards of every one of LEVELS on fresh episodes, paired differences, and what hindsight adds to the best level.

    Rewards are useful share - PRICE x violation rate; differences are estimates with 95 % intervals over episodes.
    """
    seeds = episode_seeds("evaluation", seed, effort.episodes)
    known = seeds[: effort.hindsight_episodes]
    rewards = held_rewards(threads, [levels[name] for name in LEVELS], [scenario], seeds, PRICE)[:, 0]
    values = dict(zip(LEVELS, rewards, strict=True))
    constants = [levels[name] for name in reversed(LEVELS)]
    candidates = [*constants, *_neighbours(constants[0], effort.neighbours, seed)]
    gains = list(threads.map(lambda s: windowed_hindsight(scenario, s, candidates, price=PRICE), known))
    over_here = [gain.hindsight - gain.first for gain in gains]
    over_all = np.array([gain.hindsight for gain in gains]) - values["tuned-all"][: len(known)]
    return {
        "rewards": {name: value.tolist() for name, value in values.items()},
        "differences": {f"{a} - {b}": asdict(mean_interval(values[a] - values[b])) for a, b in STEPS},
        "hindsight - tuned-here": asdict(mean_interval(over_here)),
        "hindsight - tuned-all": asdict(mean_interval(over_all)),
        "windows_that_switch": float(np.mean([gain.switches for gain in gains])) * 60.0 / scenario.episode_s,
    }


def _neighbours(knobs: Vector, count: int, seed: int) -> Sequence[Vector]:
    """Candidates of the hindsight: the vector with one to three of its knobs drawn anew over their whole range."""
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        drawn = action_to_knobs(random.uniform(-1.0, 1.0, len(KNOB_NAMES)))
        chosen = random.choice(len(KNOB_NAMES), int(random.integers(1, 4)), replace=False)
        found.append(knobs.copy())
        found[-1][chosen] = drawn[chosen]
    return found
