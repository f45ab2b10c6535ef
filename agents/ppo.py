"""PPO (Schulman et al. 2017) from stable-baselines3 on ``OOCO/Cluster-v0``, started at the paper's scheduler.

The mean layer starts with zero weights and OOCO's action as its bias, so the untrained policy, run deterministically,
*is* OOCO; exploration is Gaussian around it. The deterministic policy is exported as plain arrays.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

from agents.training import Training, typed_config
from agents.vec_env import Sb3VecEnv
from ooco_gym.cluster.control import KNOB_NAMES, action_to_knobs, ooco_action
from ooco_gym.errors import OocoError
from ooco_gym.policy import NetworkPolicy, SavedPolicy


@dataclass
class PpoConfig:
    """Hyperparameters, as conf/agent/ppo.yaml sets them."""

    name: str = "ppo"
    total_steps: int = 200_000  # environment steps over all environments
    environments: int = 32
    n_steps: int = 32  # per environment and update
    batch_size: int = 256
    n_epochs: int = 4
    learning_rate: float = 1e-3
    gamma: float = 0.9
    gae_lambda: float = 0.9
    clip_range: float = 0.2
    ent_coef: float = 0.0
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    hidden: list[int] = field(default_factory=lambda: [64, 64])
    initial_log_std: float = -1.5
    validate_every: int = 20_000
    validation_episodes: int = 12

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            if not low <= getattr(self, name) <= high:
                raise OocoError(f"agent.{name} is {getattr(self, name)}, accepted is {low:g} to {high:g}")
        if any(width < 1 for width in self.hidden):
            raise OocoError(f"agent.hidden is {list(self.hidden)}, layer widths of at least 1 are accepted")


_RANGES = {
    "total_steps": (1, 1e12),
    "environments": (1, 4096),
    "n_steps": (2, 1e6),
    "batch_size": (2, 1e9),
    "n_epochs": (1, 1000),
    "learning_rate": (1e-8, 1.0),
    "gamma": (0.0, 1.0),
    "gae_lambda": (0.0, 1.0),
    "clip_range": (1e-3, 1.0),
    "ent_coef": (0.0, 10.0),
    "vf_coef": (0.0, 100.0),
    "max_grad_norm": (1e-6, 1e6),
    "initial_log_std": (-10.0, 2.0),
    "validate_every": (1, 1e12),
    "validation_episodes": (1, 10_000),
}


def configure(values: Mapping[str, Any]) -> PpoConfig:
    """The checked config; raises OocoError naming the setting and what is accepted."""
    return typed_config(PpoConfig, values, "agent")


def build_model(run: Training, config: PpoConfig) -> PPO:
    """An SB3 PPO whose deterministic policy is OOCO's action whatever it observes."""
    torch.set_num_threads(1)  # networks this small lose more to threads than they gain
    environments = Sb3VecEnv(run.environments(config.environments))
    model = PPO(
        "MlpPolicy",
        environments,
        n_steps=config.n_steps,
        batch_size=min(config.batch_size, config.n_steps * config.environments),
        n_epochs=config.n_epochs,
        learning_rate=config.learning_rate,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
        clip_range=config.clip_range,
        ent_coef=config.ent_coef,
        vf_coef=config.vf_coef,
        max_grad_norm=config.max_grad_norm,
        policy_kwargs={"net_arch": list(config.hidden), "log_std_init": config.initial_log_std},
        seed=run.seed,
        device="cpu",
    )
    with torch.no_grad():
        model.policy.action_net.weight.zero_()
        model.policy.action_net.bias.copy_(torch.as_tensor(ooco_action(), dtype=torch.float32))
    return model


def export(model: PPO, name: str, provenance: dict[str, Any]) -> NetworkPolicy:
    """The deterministic policy as numpy arrays."""
    linears = [layer for layer in model.policy.mlp_extractor.policy_net if isinstance(layer, torch.nn.Linear)]
    layers = [
        (linear.weight.detach().numpy().copy(), linear.bias.detach().numpy().copy())
        for linear in [*linears, model.policy.action_net]
    ]
    return NetworkPolicy(name, layers, provenance=provenance)


class _Report(BaseCallback):  # type: ignore[misc]
    """Progress, tracking, validation and checkpoints, once per rollout."""

    def __init__(self, model: PPO, run: Training, config: PpoConfig, progress: Progress) -> None:
        super().__init__()
        self.run, self.config, self.progress = run, config, progress
        self.model = model
        self.task = progress.add_task("training", total=config.total_steps, note="")
        self.next_validation = config.validate_every
        self.validated_at = 0
        self.started_s = time.perf_counter()
        self.violations = self.arrivals = 0.0

    def _on_step(self) -> bool:
        interval = self.locals["env"].interval
        self.violations += interval["violations"].sum()
        self.arrivals += interval["mean_arrivals"].sum()
        return True

    def _on_rollout_end(self) -> None:
        buffer = self.model.rollout_buffer
        knobs = action_to_knobs(np.clip(buffer.actions.reshape(-1, len(KNOB_NAMES)), -1.0, 1.0))
        reward = float(buffer.rewards.mean())
        violation_rate = self.violations / max(self.arrivals, 1e-9)
        values = {
            "train/reward": reward,
            "train/violation_rate": violation_rate,
            "train/steps_per_s": self.num_timesteps / (time.perf_counter() - self.started_s),
            "train/action_std": float(torch.exp(self.model.policy.log_std).mean().item()),
        }
        values |= {f"knobs/{name}": float(knobs[:, index].mean()) for index, name in enumerate(KNOB_NAMES)}
        self.run.tracker.log(values, self.num_timesteps)
        self.run.history.append({"step": self.num_timesteps, **values})
        self.violations = self.arrivals = 0.0
        note = f"reward {reward:+.3f}  violations {violation_rate:.1%}  {values['train/steps_per_s']:,.0f} steps/s"
        self.progress.update(self.task, completed=self.num_timesteps, note=note)
        if self.num_timesteps >= self.next_validation:
            self.next_validation += self.config.validate_every
            self.validate()

    def validate(self) -> None:
        step = self.validated_at = self.num_timesteps
        policy = export(self.model, self.config.name, {"steps": step, "seed": self.run.seed, "role": self.run.role})
        summary = self.run.validate(policy, step, self.config.validation_episodes)
        values = {f"validation/{name}": estimate.value for name, estimate in summary.items()}
        self.run.history.append({"step": step, **values})
        checkpoints = self.run.folder / "checkpoints"
        checkpoints.mkdir(exist_ok=True)
        self.model.save(checkpoints / "latest")


def train(run: Training) -> SavedPolicy:
    """Train until the step budget or Ctrl-C; returns the best feasible policy seen in validation."""
    config = configure(run.config)
    model = build_model(run, config)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=run.console) as progress:
        report = _Report(model, run, config, progress)
        report.validate()
        try:
            model.learn(config.total_steps, callback=report)
        except KeyboardInterrupt:
            run.interrupted = True
        except ValueError as error:  # torch refuses a distribution of NaN
            raise OocoError(
                f"training diverged at step {model.num_timesteps}: lower agent.learning_rate ({config.learning_rate:g})"
            ) from error
        if report.num_timesteps > report.validated_at:
            report.validate()
    return run.best_policy()
