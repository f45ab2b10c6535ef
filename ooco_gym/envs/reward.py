"""Rewards: what one control interval was worth. A new reward is a new class here or anywhere Hydra can import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ooco_gym.errors import OocoError


@dataclass(frozen=True)
class Interval:
    """What happened in one control interval; counts of the whole cluster."""

    interval_s: float
    instances: int
    offline_ideal_s: float  # useful offline work in ideal seconds
    violations: int  # that became certain in the interval
    mean_arrivals: float  # of the scenario, per interval


class Reward(Protocol):
    """Interval in, float out."""

    def __call__(self, interval: Interval) -> float: ...


@dataclass(frozen=True)
class IdealSeconds:
    """Useful offline work in ideal seconds per instance-second, minus ``price`` per violation over the scenario's mean
    arrivals: an episode's mean reward is utilisation - price * violation rate.
    """

    price: float = 5.0

    def __post_init__(self) -> None:
        if isinstance(self.price, bool) or not isinstance(self.price, (int, float)) or not self.price >= 0:
            raise OocoError(f"reward.price is {self.price!r}, a number of at least 0 is needed")

    def __call__(self, interval: Interval) -> float:
        useful = interval.offline_ideal_s / (interval.interval_s * interval.instances)
        return useful - self.price * interval.violations / max(interval.mean_arrivals, 1e-9)
