"""Devices: datasheet peaks, and the constants that say how much of them real kernels reach."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ooco_gym import presets
from ooco_gym.errors import OocoError, refuse_unknown_keys


@dataclass(frozen=True)
class CalibratedConstants:
    """Fitted constants of the calibrated form (see ``cost.py`` for the formula each enters).

    Efficiencies are fractions of the datasheet peak; ``*_us`` are fixed microseconds per kernel and layer.
    """

    gemm_flops: float  # Fg
    gemm_bytes: float  # Mg
    gemm_us: float  # tg
    elementwise_bytes: float  # Me; above 1 where activations stay in the last-level cache
    elementwise_us: float  # te
    prefill_attention_flops: float  # Fap
    attention_bytes: float  # Ma
    attention_us: float  # ta
    chain_ns: float = 0.0  # tau: serial cost per token of the longest decode context in a mixed batch
    decode_row_pad: float = 80.0  # qpad: rows that one decode query occupies in a mixed attention kernel
    allreduce_us: float = 7.0  # alpha
    allreduce_bytes: float = 0.35  # Bc
    # Mixture of experts. The share of Fg that the experts' GEMMs reach lies between 0.9 with an engine's kernels tuned
    # for the shape and 0.3 without: a property of the engine more than of the device, hence one value for all.
    moe_flops: float = 0.6
    moe_us: float = 10.0  # top-k choice, sorting rows by expert, summing the experts' outputs

    def __post_init__(self) -> None:
        _check_numbers(self, "calibrated", ("gemm_flops", "gemm_bytes", "elementwise_bytes", "prefill_attention_flops",
                                            "attention_bytes", "allreduce_bytes", "moe_flops"))  # fmt: skip


@dataclass(frozen=True)
class XllmConstants:
    """Constants of the form in the open OOCO implementation: hard maximum, no fixed times."""

    gemm_flops: float = 0.68
    decode_attention_flops: float = 0.60
    prefill_attention_flops: float = 0.59
    gemm_bytes: float = 0.58
    attention_bytes: float = 0.38
    allreduce_bytes_per_s: float = 10e9

    def __post_init__(self) -> None:
        _check_numbers(self, "xllm", tuple(entry.name for entry in fields(self)))


def _check_numbers(constants: Any, where: str, positive: tuple[str, ...]) -> None:
    """Every constant is a finite number of at least 0, and the named ones, which are divided by, are above 0."""
    for entry in fields(constants):
        value = getattr(constants, entry.name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (value == 0 and entry.name in positive):
            least = "above 0" if entry.name in positive else "of at least 0"
            raise OocoError(f"hardware: {where}.{entry.name} is {value!r}, a finite number {least} is needed")


@dataclass(frozen=True)
class HardwareSpec:
    """One accelerator. Rates are per device and per second; memory in bytes."""

    name: str
    peak_flops_per_s: float
    hbm_bytes_per_s: float
    hbm_bytes: float
    link_bytes_per_s: float
    calibrated: CalibratedConstants
    xllm: XllmConstants = field(default_factory=XllmConstants)
    is_calibrated: bool = True
    source: str = ""

    def __post_init__(self) -> None:
        for name in ("peak_flops_per_s", "hbm_bytes_per_s", "hbm_bytes", "link_bytes_per_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise OocoError(
                    f"hardware '{self.name}': {name} is {getattr(self, name)!r}, it must be a positive number"
                )


def hardware_from_mapping(values: Mapping[str, Any], where: str = "hardware") -> HardwareSpec:
    """Build a spec from a preset's keys; raises OocoError naming unknown or missing keys."""
    given = {key: value for key, value in values.items() if key != "description"}
    for key, kind in (("calibrated", CalibratedConstants), ("xllm", XllmConstants)):
        if key in given and not isinstance(given[key], kind):
            if not isinstance(given[key], Mapping):
                raise OocoError(f"{where}: {key} is {given[key]!r}, a mapping of its constants is needed")
            given[key] = _constants(kind, given[key], f"{where}: {key}")
    return _constants(HardwareSpec, given, where)


def _constants(kind: Any, values: Mapping[str, Any], where: str) -> Any:
    known = [entry.name for entry in fields(kind)]
    refuse_unknown_keys(values, known, where)
    try:
        return kind(**values)
    except TypeError as error:
        raise OocoError(f"{where}: {error}, accepted are {', '.join(known)}") from None


def resolve_hardware(source: str | Mapping[str, Any] | HardwareSpec) -> HardwareSpec:
    """A preset name, a mapping of the fields, or a finished spec."""
    if isinstance(source, HardwareSpec):
        return source
    if isinstance(source, Mapping):
        return hardware_from_mapping(source)
    return hardware_from_mapping(presets.load("hardware", source), where=f"conf/hardware/{source}.yaml")
