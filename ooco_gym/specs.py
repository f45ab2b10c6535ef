"""The parts of a scenario that are plain numbers: cluster, objectives, clocks, faults. Validated on the way in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ooco_gym.errors import OocoError
from ooco_gym.roofline import FORMS, HardwareSpec, resolve_hardware

MOST_CLASSES = 16
ROLES = ("relaxed", "strict", "unified")


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check(ok: bool, name: str, value: Any, accepted: str) -> None:
    if not ok:
        raise OocoError(f"{name} is {value!r}, {accepted}")


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


@dataclass(frozen=True)
class ClusterSpec:
    """Instances, their limits and the links between them.

    ``relaxed`` and ``strict`` instances make up the two pools; ``unified`` ones run both phases as a stock engine does.
    ``*_hardware`` names another device for a pool: a preset, a mapping of its fields, or a list with one per instance.
    ``kv_blocks``, one number or one per instance, overrides what memory leaves.
    """

    relaxed: int = 2
    strict: int = 2
    unified: int = 0
    tensor_parallel: int = 1
    max_batch_tokens: int = 8192
    max_seqs: int = 256
    chunk_tokens: int = 2048
    block_tokens: int = 16
    memory_utilization: float = 0.9
    kv_blocks: int | Sequence[int] | None = None
    link_bytes_per_s: float = 25e9
    link_latency_s: float = 0.002
    host_kv_bytes: float = 64e9
    host_bytes_per_s: float = 25e9
    pull_interval_s: float = 0.1
    relaxed_hardware: Any = None
    strict_hardware: Any = None
    unified_hardware: Any = None

    def __post_init__(self) -> None:
        for name in ROLES:
            _check(
                _is_count(getattr(self, name), 0), f"cluster.{name}", getattr(self, name), "a whole number is needed"
            )
        if not ((self.relaxed and self.strict) or (self.unified and not self.relaxed and not self.strict)):
            raise OocoError(
                f"cluster has {self.relaxed} relaxed, {self.strict} strict and {self.unified} unified instances: "
                "it needs at least one relaxed and one strict instance, or unified ones alone"
            )
        for name in ("tensor_parallel", "max_batch_tokens", "max_seqs", "chunk_tokens", "block_tokens"):
            value = getattr(self, name)
            _check(_is_count(value, 1), f"cluster.{name}", value, "it must be an integer of at least 1")
        share = self.memory_utilization
        _check(
            is_number(share) and 0.0 < share <= 1.0,
            "cluster.memory_utilization",
            share,
            "accepted is above 0, at most 1",
        )
        for name in ("link_bytes_per_s", "host_bytes_per_s", "pull_interval_s"):
            value = getattr(self, name)
            _check(is_number(value) and value > 0, f"cluster.{name}", value, "it must be a positive number")
        for name in ("link_latency_s", "host_kv_bytes"):
            value = getattr(self, name)
            _check(is_number(value) and value >= 0, f"cluster.{name}", value, "it must be at least 0")
        if self.kv_blocks is not None:
            several = _is_list(self.kv_blocks)
            blocks = list(self.kv_blocks) if several else [self.kv_blocks]  # type: ignore[arg-type]
            fits = not several or len(blocks) == self.instances
            _check(
                fits and all(_is_count(block, 1) for block in blocks),
                "cluster.kv_blocks",
                self.kv_blocks,
                f"one positive integer, or {self.instances} of them, is accepted",
            )

    @property
    def instances(self) -> int:
        return self.relaxed + self.strict + self.unified

    @property
    def roles(self) -> tuple[int, ...]:
        """Role of each instance, an index of :data:`ROLES`."""
        return (0,) * self.relaxed + (1,) * self.strict + (2,) * self.unified

    def hardware_of(self, default: HardwareSpec) -> tuple[HardwareSpec, ...]:
        """The device of each instance; raises OocoError on a list that is not one per instance of its pool."""
        devices: list[HardwareSpec] = []
        for role in ROLES:
            count, source = getattr(self, role), getattr(self, f"{role}_hardware")
            if source is None:
                devices += [default] * count
            elif _is_list(source):
                if len(source) != count:
                    raise OocoError(f"cluster.{role}_hardware has {len(source)} entries for {count} instances")
                devices += [resolve_hardware(entry) for entry in source]
            else:
                devices += [resolve_hardware(source)] * count
        return tuple(devices)


@dataclass(frozen=True)
class SloClass:
    """Objectives of a share of the online requests, seconds."""

    name: str
    share: float
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True)
class SloSpec:
    """Online service level objectives, seconds: time to first token, time per output token.

    ``classes``, where given, split the online requests by their shares, which are normalised; the two numbers are then
    the tightest objectives of any class.
    """

    ttft_s: float = 0.5
    tpot_s: float = 0.05
    classes: tuple[SloClass, ...] = ()

    def __post_init__(self) -> None:
        _check(
            len(self.classes) <= MOST_CLASSES, "slo.classes", len(self.classes), f"at most {MOST_CLASSES} are accepted"
        )
        for entry in (self, *self.classes):
            where = f"slo.classes.{entry.name}" if isinstance(entry, SloClass) else "slo"
            for name in ("ttft_s", "tpot_s"):
                value = getattr(entry, name)
                _check(
                    is_number(value) and value > 0, f"{where}.{name}", value, "it must be a positive number of seconds"
                )
        for entry in self.classes:
            _check(is_number(entry.share) and entry.share > 0, f"slo.classes.{entry.name}.share", entry.share,
                   "it must be a positive number")  # fmt: skip

    @property
    def all_classes(self) -> tuple[SloClass, ...]:
        return self.classes or (SloClass("online", 1.0, self.ttft_s, self.tpot_s),)


@dataclass(frozen=True)
class CostSpec:
    """The two clocks: what times the cluster and what schedulers predict with, and how the first one errs.

    ``noise_sigma`` is the lognormal error of each batch, ``bias_sigma`` that of a whole episode; ``host_s`` is the
    serving engine's own time per iteration.
    """

    true_form: str = "calibrated"
    scheduler_form: str = "calibrated"
    host_s: float = 0.001
    noise_sigma: float = 0.05
    bias_sigma: float = 0.03

    def __post_init__(self) -> None:
        for name in ("host_s", "noise_sigma", "bias_sigma"):
            value = getattr(self, name)
            _check(is_number(value) and 0 <= value < 1, f"cost.{name}", value, "accepted is at least 0 and below 1")
        for name in ("true_form", "scheduler_form"):
            if getattr(self, name) not in FORMS:
                raise OocoError(f"cost.{name} is {getattr(self, name)!r}, known are {', '.join(FORMS)}")


@dataclass(frozen=True)
class Outage:
    """One failure of one instance: down from ``at_s`` for ``for_s`` seconds."""

    instance: int
    at_s: float
    for_s: float


@dataclass(frozen=True)
class FaultSpec:
    """What goes wrong: instances that fail and clients that go away.

    ``outages`` are given ones; beside them every instance fails at exponential intervals of mean
    ``mean_time_between_failures_s`` (null: never) and is down for exponential times of mean ``mean_repair_s``. A
    ``cancel_share`` of the online requests is cancelled an exponential time of mean ``cancel_after_s`` after arrival.
    """

    outages: tuple[Outage, ...] = ()
    mean_time_between_failures_s: float | None = None
    mean_repair_s: float = 60.0
    cancel_share: float = 0.0
    cancel_after_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("mean_time_between_failures_s", "mean_repair_s", "cancel_after_s"):
            value = getattr(self, name)
            if not (name == "mean_time_between_failures_s" and value is None):
                _check(
                    is_number(value) and value > 0, f"faults.{name}", value, "it must be a positive number of seconds"
                )
        share = self.cancel_share
        _check(is_number(share) and 0 <= share <= 1, "faults.cancel_share", share, "accepted is 0 to 1")
        for outage in self.outages:
            ok = _is_count(outage.instance, 0) and is_number(outage.at_s) and is_number(outage.for_s)
            _check(ok and outage.at_s >= 0 and outage.for_s > 0, "faults.outages", outage,
                   "an instance index, at_s >= 0 and for_s > 0 are needed")  # fmt: skip


def faults_from_mapping(values: Mapping[str, Any]) -> FaultSpec:
    """Build from a preset's keys; ``outages`` is a list of mappings. Raises OocoError naming what is unknown."""
    given = {key: value for key, value in values.items() if key not in ("description", "name")}
    outages = given.pop("outages", None) or ()
    try:
        return FaultSpec(outages=tuple(Outage(**outage) for outage in outages), **given)
    except TypeError as error:
        raise OocoError(
            f"faults: {error}, accepted are outages (instance, at_s, for_s), mean_time_between_failures_s, "
            "mean_repair_s, cancel_share, cancel_after_s"
        ) from None
