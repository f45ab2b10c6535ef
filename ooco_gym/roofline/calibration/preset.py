"""A device written down as a preset: YAML that ``hardware=NAME`` reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from ooco_gym.errors import OocoError
from ooco_gym.roofline.hardware import HardwareSpec, XllmConstants


def write_yaml(device: HardwareSpec, path: str | Path, notes: Mapping[str, str] | None = None, head: str = "") -> None:
    """The device as a preset file. In ``conf/hardware`` it is a name for ``hardware=``; elsewhere, a mapping.

    ``notes`` are comments beside constants; ``head`` is the comment at the top.
    """
    lines = [f"# {line}".rstrip() for line in head.splitlines()]
    lines.append(f"name: {device.name}")
    for name in ("peak_flops_per_s", "hbm_bytes_per_s", "hbm_bytes", "link_bytes_per_s"):
        lines.append(f"{name}: {_scientific(getattr(device, name))}")
    lines.append("calibrated:")
    for name, value in asdict(device.calibrated).items():
        note = (notes or {}).get(name)
        lines.append(f"  {name}: {float(f'{value:.4g}')}" + (f"  # {note}" if note else ""))
    if device.xllm != XllmConstants():
        lines.append("xllm:")
        lines += [f"  {name}: {float(f'{value:.4g}')}" for name, value in asdict(device.xllm).items()]
    if not device.is_calibrated:
        lines.append("is_calibrated: false")
    quoted = device.source.replace("\\", "\\\\").replace('"', '\\"')
    lines.append(f'source: "{quoted}"')
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise OocoError(f"{path}: {error.strerror or error}, a place to write the preset is needed") from None


def _scientific(value: float) -> str:
    """989000000000000.0 as 989.0e12: an exponent that is a multiple of three, and a number to every YAML reader."""
    exponent = 3 * int(math.floor(math.log10(value) / 3 + 1e-12))
    return f"{float(f'{value / 10.0**exponent:.6g}')}e{exponent:+d}"
