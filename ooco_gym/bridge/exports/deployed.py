"""Exported policies as a live system loads them: onnxruntime and numpy, no torch, no gymnasium, no pickle.

A constant needs neither a network nor onnxruntime, so the fallback of the gateway works where all else is missing.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ooco_gym.bridge.exports.manifest import (
    INPUT,
    MANIFEST,
    MAX_JSON_BYTES,
    MAX_NETWORK_BYTES,
    NETWORK,
    OUTPUT,
    read_file,
    read_manifest,
)
from ooco_gym.cluster.control import KNOB_COUNT, KNOB_NAMES, action_to_knobs, ooco_knobs
from ooco_gym.cluster.observation import OBSERVATION_SIZE, observe
from ooco_gym.cluster.telemetry import FIRST_KNOB, Telemetry
from ooco_gym.errors import OocoError
from ooco_gym.policy import ConstantPolicy, Knobs, Policy, load_policy

FALLBACKS = ("ooco",)
Actions = npt.NDArray[np.float32]
_REHEARSAL = Telemetry(np.array([0.0] * FIRST_KNOB + ooco_knobs().tolist()))


class DeployedNetwork:
    """A policy network in onnxruntime on one thread: observation -> action -> knobs, nothing kept between decisions."""

    def __init__(self, name: str, rules: Mapping[str, str], network: bytes) -> None:
        self.name = name
        self.rules = dict(rules)
        self._session = _session(network)

    def reset(self) -> None:
        """Nothing to forget."""

    def actions(self, observations: Actions) -> Actions:
        """Deterministic actions, float32 [N, KNOB_COUNT], of observations float32 [N, OBSERVATION_SIZE]."""
        try:
            actions: Actions = self._session.run([OUTPUT], {INPUT: observations})[0]
        except Exception as error:  # onnxruntime has no base class of its own
            raise OocoError(f"policy '{self.name}': the network failed ({str(error).splitlines()[0]})") from None
        if actions.shape != (len(observations), KNOB_COUNT) or not np.isfinite(actions).all():
            raise OocoError(f"policy '{self.name}': the network gave an action that is not {KNOB_COUNT} finite numbers")
        return actions

    def action(self, observation: Actions) -> Actions:
        """Deterministic action, float32 [KNOB_COUNT], of one observation."""
        actions = self.actions(observation[None].astype(np.float32, copy=False))
        return actions.reshape(KNOB_COUNT)

    def decide(self, telemetry: Telemetry) -> Knobs:
        return action_to_knobs(self.action(observe(telemetry)))


def load_deployed(folder: str | Path) -> Policy:
    """The policy of an export folder, or of a folder saved by training; raises OocoError that says what is wrong.

    A network is checked against the manifest's SHA-256 and for its inputs and outputs. Every policy decides once before
    it is returned, so that the first decision that counts waits for no compiler or cache.
    """
    folder = Path(folder)
    policy = _load(folder)
    try:
        policy.decide(_REHEARSAL)
    except OocoError as error:
        raise OocoError(f"policy {folder}: {error}") from None
    return policy


def _load(folder: Path) -> Policy:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "not found"
        needed = f"a folder with {MANIFEST} or policy.json is needed"
        raise OocoError(f"policy {folder}: {what}, {needed}; export baseline=NAME out=FOLDER makes one of a baseline")
    if (folder / MANIFEST).exists():
        try:
            return _load_export(folder)
        except OocoError as error:
            raise OocoError(f"policy {folder}: {str(error).removeprefix(f'{folder}/')}") from None
    for saved in (folder / "policy", folder):
        if (saved / "policy.json").exists():
            return _load_saved(saved)
    raise OocoError(f"policy {folder}: neither {MANIFEST} (an export) nor policy.json (a saved policy) is in it")


def named(name: str) -> Policy:
    """A policy that needs no file, for the gateway to fall back on; raises OocoError on an unknown name."""
    if name not in FALLBACKS:
        raise OocoError(f"unknown policy '{name}': known without a folder are {', '.join(FALLBACKS)}")
    return ConstantPolicy(name=name, description="the paper's bottleneck scheduler and preemption")


def _load_export(folder: Path) -> Policy:
    manifest = read_manifest(folder)
    name, rules = manifest["name"], manifest["rules"]
    if manifest["kind"] == "constant":
        return _constant(manifest)
    network = read_file(folder / NETWORK, MAX_NETWORK_BYTES)
    recorded = manifest.get("network")
    digest = hashlib.sha256(network).hexdigest()
    if not isinstance(recorded, dict) or recorded.get("sha256") != digest:
        said = str(recorded.get("sha256"))[:12] if isinstance(recorded, dict) else "nothing"
        raise OocoError(
            f"{NETWORK} has SHA-256 {digest[:12]}..., {MANIFEST} says {said}...: damaged or altered, export it again"
        )
    try:
        return DeployedNetwork(name, rules, network)
    except OocoError as error:
        raise OocoError(f"{NETWORK}: {error}") from None


def _constant(manifest: Mapping[str, Any]) -> ConstantPolicy:
    settings = manifest.get("settings")
    if not isinstance(settings, dict) or set(settings) != set(KNOB_NAMES):
        raise OocoError(f"{MANIFEST}: settings must give all of {', '.join(KNOB_NAMES)}")
    description = manifest.get("description", "")
    try:
        return ConstantPolicy(manifest["name"], manifest["rules"], settings, str(description))
    except OverflowError:
        raise OocoError(f"{MANIFEST}: a setting is too large for a float64") from None


def _load_saved(folder: Path) -> Policy:
    _check_saved_sizes(folder)
    try:
        return load_policy(folder)
    except OocoError:
        raise
    except Exception as error:  # what a damaged archive or a header that lies makes zlib and numpy raise
        raise OocoError(f"policy {folder}: not a saved policy ({error!r})") from None


def _check_saved_sizes(folder: Path) -> None:
    """A saved policy within the limits of an export, its arrays counted unpacked; the rest load_policy checks."""
    read_file(folder / "policy.json", MAX_JSON_BYTES)
    weights = folder / "weights.npz"
    if weights.exists():
        read_file(weights, MAX_NETWORK_BYTES)
        try:
            with zipfile.ZipFile(weights) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
        except (zipfile.BadZipFile, OSError, ValueError):
            return  # load_policy says so if the policy needs it
        if unpacked > MAX_NETWORK_BYTES:
            raise OocoError(f"{weights} unpacks to {unpacked:,} bytes, at most {MAX_NETWORK_BYTES:,} are accepted")


def _session(network: bytes) -> Any:
    """An onnxruntime session on the calling thread whose one input and one output are those of a policy."""
    try:
        onnxruntime = importlib.import_module("onnxruntime")
    except ImportError:
        raise OocoError("a policy network needs onnxruntime: pip install 'ooco-gym[bridge]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4  # errors come as exceptions
    # Weights in a file beside the network would escape the digest: they are looked for where nothing can be.
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", f"{os.devnull}/none")
    try:
        session = onnxruntime.InferenceSession(network, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no base class of its own
        raise OocoError(f"not a network that onnxruntime loads ({str(error).splitlines()[0]})") from None
    _check_side("input", session.get_inputs(), INPUT, OBSERVATION_SIZE)
    _check_side("output", session.get_outputs(), OUTPUT, KNOB_COUNT)
    return session


def _check_side(side: str, tensors: Any, name: str, width: int) -> None:
    found = [(tensor.name, tensor.type, list(tensor.shape)) for tensor in tensors]
    fits = len(found) == 1 and found[0][:2] == (name, "tensor(float)") and len(found[0][2]) == 2
    if not fits or isinstance(found[0][2][0], int) or found[0][2][1] != width:
        raise OocoError(f"{side} is {found}, one float tensor '{name}' of shape [batch, {width}] is needed")
