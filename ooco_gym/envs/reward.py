"""Rewards: what one control interval was worth. A new reward is a new class here or anywhere Hydra can import."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np

from ooco_gym.errors import OocoError

Value = Any  # a float, or an array [N] where N clusters are rewarded at once


@dataclass(frozen=True)
class Interval:
    """What happened in one control interval; counts of the whole cluster, or arrays [N] of them for N clusters."""

    interval_s: Value
    instances: Value
    offline_ideal_s: Value  # useful offline work in ideal seconds
    violations: Value  # that became certain in the interval
    mean_arrivals: Value  # of the scenario, per interval

    def row(self, index: int) -> Interval:
        """One of N clusters, as plain numbers."""
        return Interval(*(getattr(self, field.name)[index].item() for field in fields(self)))


class Reward(Protocol):
    """Interval in, float out; arrays in, array [N] out."""

    def __call__(self, interval: Interval) -> Value: ...


@dataclass(frozen=True)
class IdealSeconds:
    """Useful offline work in ideal seconds per instance-second, minus ``price`` per violation over the scenario's mean
    arrivals: an episode's mean reward is utilisation - price * violation rate.
    """

    price: float = 5.0

    def __post_init__(self) -> None:
        if isinstance(self.price, bool) or not isinstance(self.price, (int, float)) or not self.price >= 0:
            raise OocoError(f"reward.price is {self.price!r}, a number of at least 0 is needed")

    def __call__(self, interval: Interval) -> Value:
        useful = interval.offline_ideal_s / (interval.interval_s * interval.instances)
        return useful - self.price * interval.violations / np.maximum(interval.mean_arrivals, 1e-9)
