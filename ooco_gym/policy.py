"""Policies: what decides, and the saved form that a live system loads without torch.

A policy fixes rules for an episode and, every control interval, maps Telemetry to a knob vector. A rule scheduler is
a policy whose knobs never change; a learned one evaluates a small network on the observation.

A saved policy is one folder: ``policy.json`` (kind, rules, knobs, schema, provenance) and, for a network,
``weights.npz``. Plain arrays, no pickle.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from ooco_gym.cluster.control import (
    KNOB_NAMES,
    action_to_knobs,
    check_knobs,
    check_rules,
    knobs_from_mapping,
)
from ooco_gym.cluster.observation import OBSERVATION_NAMES, observe
from ooco_gym.cluster.telemetry import Telemetry
from ooco_gym.errors import OocoError

FORMAT = 1
Knobs = npt.NDArray[np.float64]


@runtime_checkable
class Policy(Protocol):
    """Anything that can schedule: rules once per episode, knobs every control interval."""

    @property
    def name(self) -> str:
        """Unique among the policies that are compared."""

    @property
    def rules(self) -> Mapping[str, str]:
        """Choice of every rule; see ``RULES``."""

    def reset(self) -> None:
        """Forget the last episode."""

    def decide(self, telemetry: Telemetry) -> Knobs:
        """Knob vector, float64 [len(KNOBS)], for the next control interval."""


@dataclass(frozen=True)
class ConstantPolicy:
    """A rule scheduler: rules and knobs that hold for the whole episode. Silent entries are OOCO's."""

    name: str
    rules: Mapping[str, str] = field(default_factory=dict)
    knobs: Mapping[str, float] = field(default_factory=dict)
    description: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", check_rules(self.rules))
        vector = knobs_from_mapping(self.knobs)
        vector.flags.writeable = False  # shared with every caller of decide()
        object.__setattr__(self, "_vector", vector)

    @property
    def vector(self) -> Knobs:
        vector: Knobs = self._vector  # type: ignore[attr-defined]
        return vector

    def reset(self) -> None:
        """Nothing to forget."""

    def decide(self, telemetry: Telemetry) -> Knobs:
        return self.vector


@dataclass(frozen=True)
class NetworkPolicy:
    """A tanh multilayer perceptron from observation to action, evaluated in numpy.

    ``layers`` are (weight [out, in], bias [out]) float32 pairs; the last one is linear, its output clipped to [-1, 1].
    """

    name: str
    layers: Sequence[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]
    rules: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", check_rules(self.rules))
        width = len(OBSERVATION_NAMES)
        for weight, bias in self.layers:
            if weight.ndim != 2 or weight.shape[1] != width or bias.shape != (weight.shape[0],):
                raise OocoError(f"policy '{self.name}': layer of shape {weight.shape} cannot follow {width} inputs")
            if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
                raise OocoError(f"policy '{self.name}': a weight is not a finite number")
            width = weight.shape[0]
        if width != len(KNOB_NAMES):
            raise OocoError(f"policy '{self.name}': {width} outputs, {len(KNOB_NAMES)} knobs are needed")

    def reset(self) -> None:
        """Nothing to forget."""

    def action(self, observation: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Deterministic action, float32 [len(KNOBS)] in [-1, 1]."""
        values = observation.astype(np.float32)
        for weight, bias in self.layers[:-1]:
            values = np.tanh(weight @ values + bias)
        weight, bias = self.layers[-1]
        clipped: npt.NDArray[np.float32] = np.clip(weight @ values + bias, -1.0, 1.0)
        return clipped

    def decide(self, telemetry: Telemetry) -> Knobs:
        return action_to_knobs(self.action(observe(telemetry)))


SavedPolicy = ConstantPolicy | NetworkPolicy


def save_policy(policy: SavedPolicy, folder: str | Path) -> Path:
    """Write a policy to ``folder`` (made if absent) and return it; the manifest is written last."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "name": policy.name,
        "rules": dict(policy.rules),
        "observation": list(OBSERVATION_NAMES),
        "knob_names": list(KNOB_NAMES),
    }
    if isinstance(policy, ConstantPolicy):
        knobs = dict(zip(KNOB_NAMES, policy.vector.tolist(), strict=True))
        manifest |= {"kind": "constant", "knobs": knobs, "description": policy.description}
    else:
        manifest |= {"kind": "network", "layers": len(policy.layers), "provenance": dict(policy.provenance)}
        arrays = {}
        for index, (weight, bias) in enumerate(policy.layers):
            arrays[f"weight_{index}"], arrays[f"bias_{index}"] = weight, bias
        with open(folder / "weights.npz.part", "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        (folder / "weights.npz.part").replace(folder / "weights.npz")
    staged = folder / "policy.json.part"
    staged.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    staged.replace(folder / "policy.json")
    return folder


def load_policy(folder: str | Path) -> SavedPolicy:
    """Read a policy folder; raises OocoError when it is missing, malformed or made for other knobs or observations."""
    folder = Path(folder)
    if (folder / "policy" / "policy.json").is_file():
        folder = folder / "policy"  # the folder of a training run
    path = folder / "policy.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        kind, name, rules = manifest["kind"], str(manifest["name"]), dict(manifest["rules"])
        observation, knob_names = list(manifest["observation"]), list(manifest["knob_names"])
        if manifest["format"] != FORMAT:
            raise OocoError(f"policy {path}: format {manifest['format']!r}, this version reads {FORMAT}")
        if observation != list(OBSERVATION_NAMES) or knob_names != list(KNOB_NAMES):
            raise OocoError(f"policy {path}: made for other observations or knobs than this version's; train it again")
        if kind == "constant":
            if not isinstance(manifest["knobs"], dict):
                raise OocoError(f"knobs is {manifest['knobs']!r}, a mapping of knob names to numbers is needed")
            return ConstantPolicy(name, rules, manifest["knobs"], manifest.get("description", ""))
        if kind == "network":
            with np.load(folder / "weights.npz", allow_pickle=False) as arrays:
                layers = [(arrays[f"weight_{i}"], arrays[f"bias_{i}"]) for i in range(int(manifest["layers"]))]
            return NetworkPolicy(name, layers, rules, manifest.get("provenance", {}))
    except OocoError as error:
        raise OocoError(f"policy {path}: {str(error).removeprefix(f'policy {path}: ')}") from None
    except FileNotFoundError as error:
        raise OocoError(f"policy {folder}: '{error.filename}' not found, a folder with policy.json is needed") from None
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise OocoError(f"policy {path}: not a saved policy ({error!r})") from None
    raise OocoError(f"policy {path}: kind {kind!r}, known are constant, network")


__all__ = [
    "ConstantPolicy",
    "Knobs",
    "NetworkPolicy",
    "Policy",
    "SavedPolicy",
    "Telemetry",
    "check_knobs",
    "load_policy",
    "save_policy",
]
