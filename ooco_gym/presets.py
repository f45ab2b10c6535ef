"""Named presets: the YAML files of ``conf/``, one file per model, device, workload or SLO.

Hydra reads the same files in a checkout; an installed wheel carries them inside the package.
"""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]

from ooco_gym.errors import OocoError


def conf_dir() -> Path:
    """Folder that holds the preset groups: inside an installed wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def names(group: str) -> list[str]:
    """Sorted preset names of one group, for example ``names("hardware")``."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def load(group: str, name: str) -> dict[str, Any]:
    """Read one preset; raises :class:`OocoError` that lists the known names when there is no such file."""
    path = conf_dir() / group / f"{name}.yaml"
    if name not in names(group):
        raise OocoError(f"unknown {group} '{name}': known are {', '.join(names(group)) or 'none'}")
    try:
        content = deepcopy(_parsed(path, path.stat().st_mtime_ns))
    except YAMLError as error:
        raise OocoError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


@cache
def _parsed(path: Path, changed_ns: int) -> Any:
    """What a file holds. Parsing takes milliseconds and a scenario reads seven presets, so a file is parsed again only
    when its time of change is another."""
    return OmegaConf.to_container(OmegaConf.load(path))  # Hydra's own parser: 1.6e12 is a number here, too
