"""Running policies over episodes: the same seeds for every policy, so that differences are paired."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from ooco_gym.cluster import Outcome, Simulator
from ooco_gym.policy import ConstantPolicy, Policy
from ooco_gym.scenario import Scenario


def run_episode(
    policy: Policy,
    scenario: Scenario,
    seed: int,
    control_interval_s: float = 1.0,
    on_step: Callable[[Simulator], None] | None = None,
) -> Outcome:
    """One whole episode: warm-up under OOCO's knobs, then ``policy`` every ``control_interval_s`` seconds.

    ``on_step`` sees the simulator after every control interval. Without it, a constant policy runs in one piece, which
    gives the same bits: control intervals are invisible where no knob changes.
    """
    simulator = Simulator(scenario, policy.rules, seed)
    policy.reset()
    simulator.run(scenario.warmup_s)
    in_one_piece = isinstance(policy, ConstantPolicy) and on_step is None
    steps = 1 if in_one_piece else max(round(scenario.episode_s / control_interval_s), 1)
    for step in range(1, steps + 1):
        simulator.set_knobs(policy.decide(simulator.telemetry()))
        simulator.run(scenario.horizon_s if step == steps else scenario.warmup_s + step * control_interval_s)
        if on_step is not None:
            on_step(simulator)
    return simulator.outcome()


def run_episodes(
    policy: Policy,
    scenario: Scenario,
    seeds: Sequence[int],
    control_interval_s: float = 1.0,
    on_episode: Callable[[], None] | None = None,
) -> list[Outcome]:
    """Outcomes in the order of ``seeds``. The kernel releases the GIL, so episodes run on every core at once."""

    def one(seed: int) -> Outcome:
        outcome = run_episode(policy, scenario, seed, control_interval_s)
        if on_episode is not None:
            on_episode()
        return outcome

    if not isinstance(policy, ConstantPolicy):
        return [one(seed) for seed in seeds]  # a policy may keep state between decisions
    with ThreadPoolExecutor(max_workers=min(len(seeds), os.cpu_count() or 1) or 1) as pool:
        return list(pool.map(one, seeds))
