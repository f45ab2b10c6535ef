"""Train a scheduler and compare it with the rule schedulers: ``python train.py agent=ppo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track

import agents
import baselines
from agents.tracking import Tracker
from agents.training import Training
from ooco_gym.cluster import Simulator
from ooco_gym.evaluation import Case, Comparison, admit, episode_seeds
from ooco_gym.evaluation.command import (
    admit_scenario,
    compile_kernel,
    describe,
    guarded,
    plain,
    save_config,
    scenario_of,
)
from ooco_gym.evaluation.figures import plot_comparison, plot_knobs, plot_learning
from ooco_gym.evaluation.report import print_comparison, write_json
from ooco_gym.policy import NetworkPolicy, Policy
from ooco_gym.scenario import Scenario
