"""Headroom: what a scheduler could gain by changing its knobs with the cluster's state.

An episode is cut into windows. At the start of each, every candidate knob vector is tried from the same snapshot, for
the window and then the first candidate to the end, and the best is kept for the window: one step of policy improvement
by rollout (Bertsekas, Tesauro), with the future known, so it is never worse than the first candidate. A choice that
looked at its own window alone would live on credit: it leaves work half done and queues full, and loses to the
constant it started from (by 0.4 points on the default scenario). What is gained over the first candidate is a lower
bound on what state is worth to an all-knowing scheduler with these knobs, and a generous estimate of what a learned one
can hope for.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt

from ooco_gym.cluster import Simulator
from ooco_gym.cluster.outcome import counters_many
from ooco_gym.scenario import Scenario

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Gain:
    """Reward of an episode per instance-second (useful share - price x violation rate): the first candidate held
    throughout, and the best one per window."""

    first: float
    hindsight: float
    switches: int  # windows whose best candidate differs from the one before


def windowed_hindsight(
    scenario: Scenario, seed: int, candidates: Sequence[Vector], window_s: float = 60.0, price: float = 5.0
) -> Gain:
    """One episode: the first candidate held throughout, and the best candidate of every window in hindsight."""
    first = held_reward(scenario, seed, candidates[0], price)
    simulator = _warm(scenario, seed)
    total, switches, last = 0.0, 0, 0
    while simulator.now_s < scenario.horizon_s:
        start = simulator.state()
        until_s = min(simulator.now_s + window_s, scenario.horizon_s)
        rewards = []
        for candidate in candidates:
            reward = _window(simulator, scenario, candidate, until_s, price)
            rewards.append(reward + _window(simulator, scenario, candidates[0], scenario.horizon_s, price))
            simulator.restore(start)
        best = int(np.argmax(rewards))
        total += _window(simulator, scenario, candidates[best], until_s, price)
        switches += best != last
        last = best
    return Gain(first, total / scenario.episode_s, switches)


def held_reward(scenario: Scenario, seed: int, knobs: Vector, price: float = 5.0) -> float:
    """Reward of one episode per instance-second under one knob vector held throughout."""
    simulator = _warm(scenario, seed)
    return _window(simulator, scenario, knobs, scenario.horizon_s, price) / scenario.episode_s


def held_rewards(
    threads: Executor, vectors: Sequence[Vector], scenarios: Sequence[Scenario], seeds: Sequence[int], price: float
) -> Vector:
    """:func:`held_reward` of every vector in every episode, float64 [vectors, scenarios, seeds]."""
    cells = list(product(vectors, scenarios, seeds))
    found = threads.map(lambda cell: held_reward(cell[1], cell[2], cell[0], price), cells)
    return np.array(list(found)).reshape(len(vectors), len(scenarios), len(seeds))


def _warm(scenario: Scenario, seed: int) -> Simulator:
    simulator = Simulator(scenario, {}, seed)
    simulator.run(scenario.warmup_s)
    return simulator


def _window(simulator: Simulator, scenario: Scenario, knobs: Vector, until_s: float, price: float) -> float:
    """Reward of the seconds up to ``until_s`` under some knobs, as the environment's default reward counts it."""
    before = _counters(simulator)
    simulator.set_knobs(knobs)
    simulator.run(until_s)
    _, prompt, output, violations = _counters(simulator) - before
    useful_s = prompt * scenario.ideal_prompt_token_s + output * scenario.ideal_output_token_s
    arrivals_per_s = max(scenario.online.mean_rate_per_s, 1e-9)
    return float(useful_s / scenario.instances - price * violations / arrivals_per_s)


def _counters(simulator: Simulator) -> Vector:
    counters = np.empty((1, 4))
    counters_many(np.array([simulator.cluster.address], np.int64), counters)
    row: Vector = counters[0]
    return row
