"""A policy in torch and its export without torch, on the same observations; two processes of part ``export``.

    python experiments/bridge_decisions.py torch RUN FILE.npz        adds `expected`, the actions of RUN's policy
    python experiments/bridge_decisions.py export FOLDER FILE.npz    compares and times the export: FILE.json

The part runs the second one where torch cannot be imported, as on a machine that only serves.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ooco_gym.bridge.exports.deployed import load_deployed
from ooco_gym.cluster.control import KNOB_COUNT, KNOBS, action_to_knobs
from ooco_gym.cluster.observation import ENTRIES, observation_bounds
from ooco_gym.cluster.telemetry import FIELD_NAMES, Telemetry
from ooco_gym.policy import NetworkPolicy, load_policy

RECORDS = 500  # different Telemetry records that are decided on in turn
WARM_UP = 100  # decisions that are not counted

Array = npt.NDArray[Any]


def in_torch(run: str, observations: Array) -> Array:
    """Deterministic actions [N, KNOB_COUNT] of stable-baselines3's actor with the weights of a run's policy."""
    import torch
    from gymnasium.spaces import Box
    from stable_baselines3.common.policies import ActorCriticPolicy

    policy = load_policy(run)
    assert isinstance(policy, NetworkPolicy)
    widths = [len(bias) for _, bias in policy.layers[:-1]]
    actor = ActorCriticPolicy(Box(*observation_bounds()), Box(-1.0, 1.0, (KNOB_COUNT,)), lambda _: 0.0, net_arch=widths)
    linears = [layer for layer in actor.mlp_extractor.policy_net if isinstance(layer, torch.nn.Linear)]
    with torch.no_grad():
        for linear, (weight, bias) in zip([*linears, actor.action_net], policy.layers, strict=True):
            linear.weight.copy_(torch.as_tensor(weight))
            linear.bias.copy_(torch.as_tensor(bias))
    actions: Array = actor.predict(observations, deterministic=True)[0]
    return actions


def exported(folder: str, observations: Array, expected: Array, decisions: int) -> dict[str, Any]:
    """Largest differences over the observations, each decided on alone, and the time of whole decisions."""
    policy: Any = load_deployed(folder)
    actions = np.stack([policy.action(observation) for observation in observations])
    span = np.array([knob.high - knob.low for knob in KNOBS])
    knobs = np.abs(action_to_knobs(actions) - action_to_knobs(expected)) / span
    wall_ms, cpu_ms = decision_ms(policy, decisions)
    return {
        "observations": len(observations),
        "action_difference": float(np.abs(actions - expected).max()),
        "knob_difference": float(knobs.max()),  # as a share of the knob's range
        "action_spread": float(np.ptp(expected, axis=0).max()),  # 0: the policy does not look at what it observes
        "decisions": decisions,
        "wall_ms": quantiles(wall_ms),
        "cpu_ms": quantiles(cpu_ms),
        "torch_is_there": torch_is_there(),
    }


def torch_is_there() -> bool:
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


def decision_ms(policy: Any, decisions: int) -> tuple[Array, Array]:
    """Wall and CPU milliseconds of decisions, each from a Telemetry record to knobs."""
    records = [record(seed) for seed in range(RECORDS)]
    gc.collect()
    gc.freeze()  # as the gateway does
    took = np.empty((decisions + WARM_UP, 2))
    for index in range(len(took)):
        telemetry = records[index % RECORDS]
        wall_ns, cpu_ns = time.perf_counter_ns(), time.process_time_ns()
        policy.decide(telemetry)
        took[index] = time.perf_counter_ns() - wall_ns, time.process_time_ns() - cpu_ns
    wall, cpu = took[WARM_UP:].T / 1e6
    return wall, cpu


def record(seed: int) -> Telemetry:
    """A record whose observation lies anywhere within its bounds."""
    rng = np.random.default_rng(seed)
    values = dict.fromkeys(FIELD_NAMES, 0.0) | {entry.per: 1.0 for entry in ENTRIES if entry.per}
    for entry in ENTRIES:
        if not values[entry.field]:
            values[entry.field] = rng.uniform(0.0, entry.high) / entry.scale
    return Telemetry.from_dict(values | {f"knob_{knob.name}": rng.uniform(knob.low, knob.high) for knob in KNOBS})


def quantiles(milliseconds: Array) -> dict[str, float]:
    median, p99 = np.percentile(milliseconds, [50, 99])
    return {"median": float(median), "p99": float(p99), "max": float(milliseconds.max())}


def main(form: str, source: str, file: str) -> None:
    with np.load(file) as arrays:
        content = dict(arrays)
    if form == "torch":
        np.savez(file, **content, expected=in_torch(source, content["observations"]))
        return
    found = exported(source, content["observations"], content["expected"], int(content["decisions"]))
    Path(file).with_suffix(".json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
