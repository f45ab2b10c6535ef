"""manifest.json of an exported policy: what it holds, and the checks that stand between a folder and a live cluster.

The observation and the knobs are written out in full, so that a program without this package can run the policy, and
compared in full on loading: a policy trained for other entries, bounds or ranges would decide nonsense without a sound.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ooco_gym.cluster.control import KNOBS, check_rules
from ooco_gym.cluster.observation import ENTRIES
from ooco_gym.errors import OocoError

FORMAT = "ooco-gym exported policy"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
NETWORK = "policy.onnx"
INPUT, OUTPUT = "observation", "action"
MAX_JSON_BYTES = 4 << 20
MAX_NETWORK_BYTES = 64 << 20
MAX_NAME = 200
KINDS = ("constant", "network")
ACTION_TO_KNOB = (
    "u = clip((action + 0.9) / 1.8, 0, 1); knob = low + u * (high - low), or low * (high / low) ** u where log is "
    "true; a knob within 1e-6 * max(ooco, 1) of ooco is ooco"
)


def observation_schema() -> list[dict[str, Any]]:
    """Every entry of the observation in order: its bounds, and how it is computed from Telemetry."""
    entries: list[dict[str, Any]] = [
        {
            "name": entry.name,
            "low": 0.0,
            "high": entry.high,
            "field": entry.field,
            "per": entry.per,
            "scale": entry.scale,
            "live": entry.live,
        }
        for entry in ENTRIES
    ]
    previous = [{"name": f"previous_{knob.name}", "low": -1.0, "high": 1.0, "knob": knob.name} for knob in KNOBS]
    return entries + previous


def knob_schema() -> list[dict[str, Any]]:
    """Every knob in the order of the action: range, scale, OOCO's setting, meaning."""
    return [
        {
            "name": knob.name,
            "low": knob.low,
            "high": knob.high,
            "log": knob.log,
            "ooco": knob.ooco,
            "meaning": knob.meaning,
        }
        for knob in KNOBS
    ]


def read_file(path: Path, limit: int) -> bytes:
    """A regular file of at most ``limit`` bytes; raises OocoError otherwise."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OocoError(f"{path} is not a regular file")
        with open(path, "rb") as file:
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise OocoError(f"{path} not found") from None
    except OSError as error:
        raise OocoError(f"{path}: {error.strerror or error}") from None
    if len(content) > limit:
        raise OocoError(f"{path} is larger than {limit:,} bytes, the most that is accepted")
    return content


def read_object(path: Path) -> dict[str, Any]:
    """A file that holds one JSON object; raises OocoError otherwise."""
    try:
        content = json.loads(read_file(path, MAX_JSON_BYTES).decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise OocoError(f"{path} is not JSON ({str(error).splitlines()[0]})") from None
    except OocoError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise OocoError(f"{path} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise OocoError(f"{path} holds a JSON {type(content).__name__}, an object is needed")
    return content


def is_export(folder: Path) -> bool:
    """Whether ``folder`` has a manifest of this format, of any version."""
    try:
        return bool(read_object(folder / MANIFEST).get("format") == FORMAT)
    except OocoError:
        return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked manifest of an exported policy; raises OocoError that names the folder and what does not fit."""
    path = folder / MANIFEST
    manifest = read_object(path)
    try:
        _check(manifest)
    except OocoError as error:
        raise OocoError(f"{path}: {error}") from None
    return manifest


def _check(manifest: Mapping[str, Any]) -> None:
    if manifest.get("format") != FORMAT:
        raise OocoError(f"format is {manifest.get('format')!r}, {FORMAT!r} is needed")
    version = manifest.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise OocoError(f"format_version is {version!r}, this version of ooco-gym reads {FORMAT_VERSION}")
    if manifest.get("kind") not in KINDS:
        raise OocoError(f"kind is {manifest.get('kind')!r}, accepted are {', '.join(KINDS)}")
    for key in ("name", "package_version"):
        value = manifest.get(key)
        if not isinstance(value, str) or not value.strip() or len(value) > MAX_NAME or not value.isprintable():
            raise OocoError(f"{key} is {str(value)[:40]!r}, a line of 1 to {MAX_NAME} printable characters is needed")
    _compare("observation", manifest.get("observation"), observation_schema(), ignored="live")
    _compare("knobs", manifest.get("knobs"), knob_schema(), ignored="meaning")
    action = manifest.get("action")
    if not isinstance(action, dict) or action.get("to_knob") != ACTION_TO_KNOB:
        raise OocoError("action.to_knob is another mapping from action to knob than this version's; export it again")
    rules = manifest.get("rules")
    if check_rules(rules) != rules:  # type: ignore[arg-type]  # check_rules says what is wrong with anything else
        raise OocoError("rules does not name every rule; export it again")


def _compare(what: str, theirs: Any, ours: list[dict[str, Any]], ignored: str) -> None:
    """Equal entries in equal order, but for one of prose; raises OocoError at the first that differs."""
    if not isinstance(theirs, list) or len(theirs) != len(ours):
        count = len(theirs) if isinstance(theirs, list) else type(theirs).__name__
        raise OocoError(f"{what} has {count} entries, this version has {len(ours)}; train and export it again")
    for index, (their, our) in enumerate(zip(theirs, ours, strict=True)):
        if not isinstance(their, dict):
            raise OocoError(f"{what}[{index}] is {type(their).__name__}, an object is needed")
        for key in sorted((our.keys() | their.keys()) - {ignored}):
            if key not in their or key not in our or their[key] != our[key]:
                raise OocoError(
                    f"{what}[{index}] ('{our['name']}'): {key} is {str(their.get(key))[:60]!r}, this version has "
                    f"{our.get(key)!r}; train and export it again"
                )
