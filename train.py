"""Train a scheduler and compare it with the rule schedulers: ``python train.py agent=ppo``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

import agents
import baselines
from agents.closing import close_run
from agents.tracking import Tracker
from agents.training import Training
from ooco_gym.evaluation.command import (
    admit_scenario,
    compile_kernel,
    control_interval,
    describe,
    guarded,
    launch,
    make_console,
    plain,
    save_config,
    scenario_of,
    whole,
)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
@guarded
def main(config: DictConfig) -> None:
    settings: dict[str, Any] = plain(config)
    console = make_console()
    train = agents.load(settings["agent"]["name"])
    agents.check(settings["agent"]["name"], settings["agent"])
    seed, episodes = whole(settings, "seed", 0), whole(settings["evaluation"], "episodes", 1, "evaluation.")
    interval_s, reward = control_interval(settings), instantiate(settings["reward"])
    rivals = [baselines.load(name) for name in settings["evaluation"]["baselines"]]
    scenario = scenario_of(settings)
    describe(scenario, console)
    compile_kernel(scenario)
    admission = admit_scenario(scenario, settings, console)
    role = "train" if scenario.online.role == "train" else "demo"
    if role == "demo":
        console.print(
            f"[yellow]role=demo[/yellow]: {scenario.online.name} is {scenario.online.role} data; "
            "training on it shows the machinery, it is not a result"
        )
    folder = Path(HydraConfig.get().runtime.output_dir)
    settings |= {"role": role, "admitted_rate_scale": admission.rate_scale}
    save_config(settings, folder)
    run = Training(
        scenario=admission.scenario,
        config=settings["agent"],
        reward=reward,
        control_interval_s=interval_s,
        seed=seed,
        folder=folder,
        tracker=Tracker(**settings["logger"], folder=folder, name=folder.name, config=settings),
        console=console,
        role=role,
    )
    policy = train(run)
    close_run(run, policy, rivals, admission, episodes)


if __name__ == "__main__":
    launch(main)
