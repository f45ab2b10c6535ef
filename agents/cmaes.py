"""Tuned constants: CMA-ES (Hansen 2016, package ``cmaes``) over one knob vector that holds for the whole episode.

The yardstick of every policy that looks at the cluster's state. The search starts at OOCO's setting and moves in the
action space of the environment, where every knob has the same range; ``knobs`` restricts it, the others stay OOCO's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cmaes import CMA
from rich.progress import Progress

from agents.training import Training, typed_config
from ooco_gym.cluster.control import KNOB_NAMES, action_to_knobs, knobs_to_action, ooco_knobs
from ooco_gym.errors import OocoError
from ooco_gym.evaluation.episodes import run_episodes
from ooco_gym.evaluation.seeds import episode_seeds
from ooco_gym.policy import ConstantPolicy, Knobs


@dataclass
class CmaesConfig:
    """As conf/agent/cmaes.yaml sets them."""

    name: str = "cmaes"
    policy: str = "tuned-all"  # name of the result
    knobs: list[str] = field(default_factory=lambda: list(KNOB_NAMES))
    rules: dict[str, str] = field(default_factory=dict)
    generations: int = 40
    population: int = 12
    episodes: int = 4  # per candidate; new ones in every generation, the same for all of its candidates
    sigma: float = 0.3  # first step size; the action range is [-1, 1]
    price: float = 5.0  # of a violation rate of 1, in useful share
    validate_every: int = 5  # generations
    validation_episodes: int = 12

    def __post_init__(self) -> None:
        unknown = [name for name in self.knobs if name not in KNOB_NAMES]
        if unknown or not self.knobs:
            what = f"unknown knob '{unknown[0]}'" if unknown else "no knob to tune"
            raise OocoError(f"agent.knobs: {what}, accepted are some of {', '.join(KNOB_NAMES)}")
        for name, least in (("generations", 1), ("population", 2), ("episodes", 1), ("validate_every", 1),
                            ("validation_episodes", 1)):  # fmt: skip
            if getattr(self, name) < least:
                raise OocoError(f"agent.{name} is {getattr(self, name)}, at least {least} is accepted")
        if not 0.0 < self.sigma <= 1.0 or not self.price >= 0.0:
            raise OocoError(
                f"agent.sigma is {self.sigma:g} and agent.price {self.price:g}, accepted are a sigma above 0 up to 1 "
                "and a price of at least 0"
            )


class KnobSearch:
    """CMA-ES over some knobs in the action space of the environment, started at ``start``; the others stay there."""

    def __init__(self, start: Knobs, names: Sequence[str], sigma: float, population: int, seed: int) -> None:
        self.start, self.tuned = start.copy(), [KNOB_NAMES.index(name) for name in names]
        self.population = population
        bounds = np.tile([-1.0, 1.0], (len(names), 1))
        self._search = CMA(
            knobs_to_action(start)[self.tuned], sigma, bounds=bounds, population_size=population, seed=seed % 2**32
        )
        self._points: list[Knobs] = []

    def ask(self) -> list[Knobs]:
        """The knob vectors of the next generation."""
        self._points = [self._search.ask() for _ in range(self.population)]
        return [self._knobs_at(point) for point in self._points]

    def tell(self, costs: Sequence[float]) -> None:
        """What the vectors of the last :meth:`ask` cost, in their order; less is better."""
        self._search.tell(list(zip(self._points, map(float, costs), strict=True)))

    @property
    def centre(self) -> Knobs:
        """The mean of the search distribution, as knobs."""
        return self._knobs_at(self._search.mean)

    def _knobs_at(self, point: Knobs) -> Knobs:
        knobs, action = self.start.copy(), knobs_to_action(self.start)
        action[self.tuned] = point
        knobs[self.tuned] = action_to_knobs(action)[self.tuned]
        return knobs


def configure(values: Mapping[str, Any]) -> CmaesConfig:
    """The checked config; raises OocoError naming the setting and what is accepted."""
    return typed_config(CmaesConfig, values, "agent")


def train(run: Training) -> ConstantPolicy:
    """Search until the generations are spent or Ctrl-C; returns the best feasible constant seen in validation."""
    config = configure(run.config)

    def policy_of(knobs: Knobs) -> ConstantPolicy:
        values = dict(zip(KNOB_NAMES, knobs.tolist(), strict=True))
        return ConstantPolicy(config.policy, config.rules, values, f"constant tuned on {run.scenario.online.name}")

    def cost_of(policy: ConstantPolicy, seeds: list[int]) -> float:
        outcomes = run_episodes(policy, run.scenario, seeds)
        counted = max(sum(outcome.online_requests for outcome in outcomes), 1)
        useful = float(np.mean([outcome.offline_ideal_s_per_instance_s for outcome in outcomes]))
        return config.price * sum(outcome.violations for outcome in outcomes) / counted - useful

    search = KnobSearch(ooco_knobs(), config.knobs, config.sigma, config.population, run.seed)
    fresh = iter(episode_seeds("train", run.seed, config.generations * config.episodes))
    with Progress(console=run.console) as progress:
        task = progress.add_task("CMA-ES", total=config.generations)
        run.validate(policy_of(ooco_knobs()), 0, config.validation_episodes)
        try:
            for generation in range(1, config.generations + 1):
                seeds = [next(fresh) for _ in range(config.episodes)]
                costs = [cost_of(policy_of(knobs), seeds) for knobs in search.ask()]
                search.tell(costs)
                step = generation * config.population * config.episodes
                values = {"train/reward": -float(np.mean(costs)), "train/best_reward": -min(costs)}
                centre = policy_of(search.centre)
                values |= {f"knobs/{name}": float(knob) for name, knob in zip(KNOB_NAMES, centre.vector, strict=True)}
                run.tracker.log(values, step)
                run.history.append({"step": step, **values})
                progress.update(task, advance=1, description=f"CMA-ES  mean reward {values['train/reward']:+.3f}")
                if generation % config.validate_every == 0 or generation == config.generations:
                    summary = run.validate(centre, step, config.validation_episodes)
                    validated = {f"validation/{name}": estimate.value for name, estimate in summary.items()}
                    run.history.append({"step": step, **validated})
        except KeyboardInterrupt:
            run.interrupted = True
    best = run.best_policy()
    assert isinstance(best, ConstantPolicy)
    return best
