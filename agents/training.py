"""What a training run hands to an agent, and what it keeps: checkpoints and the best feasible policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from gymnasium.vector import AutoresetMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from agents.tracking import Tracker
from ooco_gym.cluster.outcome import FEASIBLE_VIOLATION_RATE
from ooco_gym.envs import ClusterVectorEnv, Reward
from ooco_gym.errors import OocoError
from ooco_gym.evaluation.episodes import run_episodes
from ooco_gym.evaluation.seeds import episode_seeds
from ooco_gym.evaluation.statistics import Estimate, summarise
from ooco_gym.policy import SavedPolicy, load_policy, save_policy
from ooco_gym.scenario import Scenario

#: A policy is kept as feasible when validation stays this far inside the line, so that fresh episodes do as well.
_MARGIN = 0.8

Config = TypeVar("Config")


def typed_config(kind: type[Config], values: Mapping[str, Any], where: str) -> Config:
    """``values`` as an instance of a config dataclass; raises OocoError naming the key that does not fit."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.create(dict(values)))
        typed = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        if isinstance(error.__cause__, OocoError):
            raise error.__cause__ from None
        reason = str(error).splitlines()[0]
        raise OocoError(f"{where}.{error.full_key}: {reason}") from None
    assert isinstance(typed, kind)
    return typed


@dataclass
class Training:
    """One training run. The agent trains on ``environments(n)``, calls :meth:`validate` now and then, and returns."""

    scenario: Scenario
    config: Mapping[str, Any]
    reward: Reward
    control_interval_s: float
    seed: int
    folder: Path
    tracker: Tracker
    console: Console
    role: str = "train"  # "demo" where the workload is validation or test data
    best_step: int = -1
    best: dict[str, Estimate] | None = None
    interrupted: bool = False
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def untrained_name(self) -> str:
        return f"{self.config['name']}-untrained"

    def environments(self, count: int) -> ClusterVectorEnv:
        """``count`` environments advanced together; each starts its next episode with the step that ends one."""
        return ClusterVectorEnv(
            count,
            self.scenario,
            control_interval_s=self.control_interval_s,
            reward=self.reward,
            autoreset_mode=AutoresetMode.SAME_STEP,
        )

    def validate(self, policy: SavedPolicy, step: int, episodes: int) -> dict[str, Estimate]:
        """Measure a policy on validation episodes and keep it if it is the best feasible one so far."""
        seeds = episode_seeds("validation", self.seed, episodes)
        summary = summarise(run_episodes(policy, self.scenario, seeds, self.control_interval_s))
        self.tracker.log({f"validation/{name}": estimate.value for name, estimate in summary.items()}, step)
        if step == 0:
            save_policy(replace(policy, name=self.untrained_name), self.folder / "untrained")
        if self.best is None or _rank(summary) > _rank(self.best):
            self.best, self.best_step = summary, step
            save_policy(policy, self.folder / "policy")
        return summary

    @property
    def found_feasible(self) -> bool:
        """Whether any validated policy stayed safely within the feasible violation rate."""
        return self.best is not None and _rank(self.best)[0]

    def best_policy(self) -> SavedPolicy:
        """The best feasible policy validated so far, as saved."""
        return load_policy(self.folder / "policy")

    def untrained_policy(self) -> SavedPolicy:
        """The policy as it was validated at step 0."""
        return load_policy(self.folder / "untrained")


def _rank(summary: dict[str, Estimate]) -> tuple[bool, float]:
    """Feasible before infeasible; then more offline work, or fewer violations."""
    rate = summary["violation_rate"].value
    feasible = rate <= _MARGIN * FEASIBLE_VIOLATION_RATE
    return feasible, summary["offline_ideal_s_per_instance_s"].value if feasible else -rate
