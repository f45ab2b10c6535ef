"""Policies to export, and exports made once for all tests, because torch's exporter takes seconds."""

import functools
import json
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np

from ooco_gym.bridge.exports.export import Source, export_policy
from ooco_gym.cluster.control import KNOB_COUNT, KNOBS
from ooco_gym.cluster.observation import ENTRIES, OBSERVATION_SIZE, observation_bounds
from ooco_gym.cluster.telemetry import FIELD_NAMES, Telemetry
from ooco_gym.policy import ConstantPolicy, NetworkPolicy

KEPT = tempfile.TemporaryDirectory(prefix="ooco-exports-")  # removed when the tests end
CONSTANT = ConstantPolicy(
    "patient", {"migration": "none"}, {"gate_batch": 1 / 3, "preempt_slack": 0.8}, "OOCO that interrupts late"
)


def network(seed=0, widths=(OBSERVATION_SIZE, 64, 64, KNOB_COUNT), gain=1.0, name="net"):
    """A tanh network with weights of PPO's size, about ``gain / sqrt(inputs)``."""
    rng = np.random.default_rng(seed)
    layers = [
        (
            rng.normal(0.0, gain / np.sqrt(inputs), (out, inputs)).astype(np.float32),
            rng.normal(0.0, 0.3, out).astype(np.float32),
        )
        for inputs, out in pairwise(widths)
    ]
    return NetworkPolicy(name, layers, {"routing": "round_robin"}, {"steps": 1000, "seed": seed})


@functools.cache
def _kept(kind):
    policy = network() if kind == "network" else CONSTANT
    return export_policy(Source(policy, {"seed": 0}), Path(KEPT.name) / kind)


def export_of(kind, folder):
    """A fresh copy of an export in ``folder``, to be spoiled, and its manifest."""
    shutil.copytree(_kept(kind), folder)
    return folder, json.loads((folder / "manifest.json").read_text())


def record(seed=0, **changes):
    """Telemetry with entries inside their bounds and random knobs in force; ``changes`` are fields."""
    rng = np.random.default_rng(seed)
    values = dict.fromkeys(FIELD_NAMES, 0.0)
    values |= {"ttft_slo_s": 0.5, "tpot_slo_s": 0.05, "decode_floor_s": 0.0125, "mean_prefill_s": 0.1}
    values |= {"relaxed_instances": 2.0, "strict_instances": 3.0, "saturation_batch": 150.0}
    for entry in ENTRIES:
        if values[entry.field] == 0.0:
            values[entry.field] = rng.uniform(0, entry.high) / entry.scale * (values[entry.per] if entry.per else 1.0)
    values |= {f"knob_{knob.name}": rng.uniform(knob.low, knob.high) for knob in KNOBS}
    return Telemetry.from_dict(values | changes)


def random_observations(count, seed=1):
    low, high = observation_bounds()
    return np.random.default_rng(seed).uniform(low, high, (count, OBSERVATION_SIZE)).astype(np.float32)
