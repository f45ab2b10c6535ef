"""Export of a policy for serving: a folder with ``manifest.json`` and, for a network, ``policy.onnx``.

A constant has no network: its knobs stand in the manifest. An ONNX graph that ignores its input would only add a
runtime that can be missing or fail, and would round the knobs to float32.

The folder is made beside its destination, loaded as a live system loads it, compared with the policy that it came from,
and only then moved into place.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.markup import escape

import ooco_gym
from ooco_gym.bridge.arguments import command, parse
from ooco_gym.bridge.exports import manifest as schema
from ooco_gym.bridge.exports.deployed import DeployedNetwork, load_deployed
from ooco_gym.bridge.exports.onnx_network import write_network
from ooco_gym.cluster.control import KNOB_NAMES
from ooco_gym.cluster.observation import OBSERVATION_SIZE, observation_bounds
from ooco_gym.errors import OocoError
from ooco_gym.policy import ConstantPolicy, NetworkPolicy, SavedPolicy, load_policy

PARITY = 1e-5  # largest difference of an action accepted between the policy and its export
RANDOM_OBSERVATIONS = 1000
RANDOM_CORNERS = 254  # besides the two corners where everything is lowest and highest
USAGE = """
python -m ooco_gym.bridge export RUN_DIR [out=policy/]      a training run: its best policy, with its provenance
python -m ooco_gym.bridge export RUN_DIR/policy [out=...]   any folder that training saved
python -m ooco_gym.bridge export baseline=ooco [out=...]    a rule scheduler, from a checkout

Writes manifest.json (observation, knobs, rules, provenance, evaluation table) and, for a network, policy.onnx to the
folder `out`, which may be absent, empty or an earlier export; anything else is left alone. The export is compared with
the policy on 1,000 random observations and 256 corners of the observation's bounds; an action that differs by more than
1e-5 is an error and leaves `out` as it was. Needs the extras train and export; what it writes needs neither.
"""


@dataclass(frozen=True)
class Source:
    """A policy and what is known of its making."""

    policy: SavedPolicy
    training: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None


def source_from_folder(folder: str | Path) -> Source:
    """A training run, or a folder inside one, with its config and results; or any other saved policy.

    Raises OocoError when there is no policy or when the run's own files are damaged.
    """
    folder = Path(folder)
    policy = load_policy(folder)
    run = _run_folder(folder)
    training: dict[str, Any] = dict(policy.provenance) if isinstance(policy, NetworkPolicy) else {}
    if run is None:
        return Source(policy, training)
    config = _read_config(run / "config.yaml")
    workload = config.get("workload")
    training = {
        **{key: config[key] for key in ("seed", "role", "admitted_rate_scale") if key in config},
        "workload": workload.get("name") if isinstance(workload, dict) else None,
        **training,
        "run": run.resolve().name,
        "config": config,
    }
    return Source(policy, training, _read_evaluation(run / "results.json"))


def source_from_baseline(name: str) -> Source:
    """A rule scheduler of the checkout's ``baselines``; raises OocoError where that is not importable."""
    try:
        baselines = importlib.import_module("baselines")
        load = baselines.load
    except (ImportError, AttributeError):
        raise OocoError(
            f"baseline={name}: baselines are part of the checkout, not of the package; run this in the checkout"
        ) from None
    policy = load(name)
    if not isinstance(policy, (ConstantPolicy, NetworkPolicy)):
        raise OocoError(f"baseline={name}: a {type(policy).__name__} cannot be exported, constants and networks can")
    return Source(policy, {"baseline": name})


def export_policy(source: Source, out: str | Path) -> Path:
    """Write the export to ``out`` and return it; raises OocoError and leaves ``out`` alone when anything is wrong."""
    out = Path(out).resolve()
    _check_destination(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{out.name}.part-", dir=out.parent))
    try:
        staged.chmod(0o755)
        _write(source, staged)
        _move(staged, out)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return out


def parity(policy: SavedPolicy, deployed: Any, seed: int = 0) -> dict[str, Any]:
    """Largest difference between a policy and its export; raises OocoError when it is above :data:`PARITY`.

    Networks: of an action, over random observations and corners of the documented bounds, each alone and all in one
    batch. Constants: of a knob.
    """
    if isinstance(policy, ConstantPolicy):
        difference = float(np.abs(policy.vector - deployed.vector).max())
        result: dict[str, Any] = {"of": "knob", "largest_difference": difference}
    else:
        assert isinstance(deployed, DeployedNetwork)
        observations = probes(seed)
        expected = np.stack([policy.action(row) for row in observations])
        alone = np.stack([deployed.action(row) for row in observations])
        together = deployed.actions(observations)
        difference = float(max(np.abs(alone - expected).max(), np.abs(together - expected).max()))
        result = {"of": "action", "observations": len(observations), "largest_difference": difference}
    if not difference <= PARITY:
        raise OocoError(
            f"policy '{policy.name}': its export differs by {difference:.2g}, at most {PARITY:g} is accepted; weights "
            "so large that float32 rounding shows are the usual cause"
        )
    return result | {"accepted": PARITY}


def probes(seed: int = 0) -> npt.NDArray[np.float32]:
    """Random observations inside the documented bounds, then corners, float32 [N, OBSERVATION_SIZE]."""
    low, high = observation_bounds()
    rng = np.random.default_rng(seed)
    inside = rng.uniform(low, high, (RANDOM_OBSERVATIONS, OBSERVATION_SIZE))
    corners = np.where(rng.random((RANDOM_CORNERS, OBSERVATION_SIZE)) < 0.5, low, high)
    return np.concatenate([inside, corners, low[None], high[None]]).astype(np.float32)


def _write(source: Source, folder: Path) -> None:
    """Manifest and network into ``folder``, then the comparison, whose figure is added to the manifest."""
    policy = source.policy
    manifest: dict[str, Any] = {
        "format": schema.FORMAT,
        "format_version": schema.FORMAT_VERSION,
        "package_version": ooco_gym.__version__,
        "name": policy.name,
        "kind": "constant" if isinstance(policy, ConstantPolicy) else "network",
        "rules": dict(policy.rules),
    }
    if isinstance(policy, ConstantPolicy):
        manifest["description"] = policy.description
        manifest["settings"] = dict(zip(KNOB_NAMES, policy.vector.tolist(), strict=True))
    else:
        facts = write_network(policy, folder / schema.NETWORK)
        content = (folder / schema.NETWORK).read_bytes()
        manifest["network"] = {
            "file": schema.NETWORK,
            "sha256": hashlib.sha256(content).hexdigest(),
            "bytes": len(content),
            "input": schema.INPUT,
            "output": schema.OUTPUT,
            **facts,
        }
    manifest |= {
        "action": {"low": -1.0, "high": 1.0, "to_knob": schema.ACTION_TO_KNOB},
        "knobs": schema.knob_schema(),
        "observation_entry": "clip(scale * field / max(per, 1e-9), low, high) of Telemetry; per is 1 where null; "
        "previous_KNOB is the action that gives the knob in force",
        "observation": schema.observation_schema(),
        "training": source.training,
        "evaluation": source.evaluation,
    }
    _write_manifest(manifest, folder)
    manifest["parity"] = parity(policy, load_deployed(folder))
    _write_manifest(manifest, folder)
    load_deployed(folder)


def _write_manifest(manifest: Mapping[str, Any], folder: Path) -> None:
    try:
        content = json.dumps(_plain(manifest), indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise OocoError(f"policy '{manifest['name']}': its provenance cannot be written as JSON ({error})") from None
    (folder / schema.MANIFEST).write_text(content + "\n", encoding="utf-8")


def _plain(content: Any) -> Any:
    """Numbers that are not numbers are null, as in results.json."""
    if isinstance(content, float) and math.isnan(content):
        return None
    if isinstance(content, Mapping):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_plain(value) for value in content]
    return content


def _check_destination(out: Path) -> None:
    """Only what does not exist, an empty folder or an export, with nothing added to it, may be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise OocoError(f"out={out} is a file, a new folder or an earlier export is accepted")
    names = {path.name for path in out.iterdir()}
    if not names:
        return
    if not schema.is_export(out):
        raise OocoError(f"out={out} is not an exported policy and is not overwritten; choose another folder")
    others = sorted(names - {schema.MANIFEST, schema.NETWORK})
    if others:
        raise OocoError(f"out={out} also holds '{others[0]}', which would be lost; choose another folder")


def _move(staged: Path, out: Path) -> None:
    """Put ``staged`` in the place of ``out``: a reader finds the old export, for an instant none, or the new one."""
    if not out.exists():
        os.rename(staged, out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.old-", dir=out.parent))
    os.rename(out, aside)  # over the empty folder just made
    try:
        os.rename(staged, out)
    except OSError:
        os.rename(aside, out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _run_folder(folder: Path) -> Path | None:
    """The training run that ``folder`` is, or lies in."""
    for run in (folder, folder.resolve().parent):
        if (run / "policy" / "policy.json").is_file() and (run / "config.yaml").is_file():
            return run
    return None


def _read_config(path: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        config = OmegaConf.to_container(
            OmegaConf.create(schema.read_file(path, schema.MAX_JSON_BYTES).decode("utf-8")), resolve=False
        )
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise OocoError(f"{path} is not the config of a run ({str(error).splitlines()[0]})") from None
    if not isinstance(config, dict):
        raise OocoError(f"{path} is not the config of a run, a mapping is needed")
    return {str(key): value for key, value in config.items()}


def _read_evaluation(path: Path) -> dict[str, Any] | None:
    """The table of results.json and what qualifies it; None for a run that was stopped before its table."""
    if not path.exists():
        return None
    results = schema.read_object(path)
    rows = results.get("rows")
    if not isinstance(rows, list):
        raise OocoError(f"{path} has no rows, results.json of a training run is needed")
    return {key: value for key, value in results.items() if key != "history"}


@command(USAGE)
def export_command(arguments: list[str]) -> int:
    """``python -m ooco_gym.bridge export``; returns the exit status."""
    folders, settings = parse(arguments, ("out", "baseline"))
    if len(folders) + ("baseline" in settings) != 1:
        raise OocoError("one policy is needed: RUN_DIR, or baseline=NAME; --help shows both")
    source = source_from_folder(folders[0]) if folders else source_from_baseline(settings["baseline"])
    out = export_policy(source, settings.get("out", "policy"))
    manifest = schema.read_manifest(out)
    compared, console = manifest["parity"], Console(highlight=False, soft_wrap=True)
    size = sum(path.stat().st_size for path in out.iterdir())
    console.print(
        f"{escape(manifest['name'])} ({manifest['kind']}): {escape(str(out))}, {size:,} bytes; largest difference of "
        + (f"an action over {compared['observations']:,} observations" if "observations" in compared else "a knob")
        + f": {compared['largest_difference']:.2g}"
    )
    if manifest["evaluation"] is None and folders:
        console.print("note: no results.json of a training run beside it, so the manifest has no evaluation table")
    elif (manifest["training"].get("role") or "train") != "train":
        console.print(f"note: trained with role={manifest['training']['role']}, on data that is not for training")
    return 0
