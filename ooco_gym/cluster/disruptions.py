"""Failures and cancellations of an episode, drawn before it starts, so that every policy meets the same ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ooco_gym.specs import FaultSpec

Times = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


def cancellations(faults: FaultSpec, arrival_s: Times, seed: int) -> tuple[Times, Indices]:
    """(when, which request), float64 [C] and int64 [C] in order of time."""
    if faults.cancel_share == 0.0:
        return np.zeros(0), np.zeros(0, np.int64)
    generator = np.random.default_rng((seed, 0))
    chosen = np.flatnonzero(generator.random(len(arrival_s)) < faults.cancel_share)
    when_s = arrival_s[chosen] + generator.exponential(faults.cancel_after_s, len(arrival_s))[chosen]
    order = np.argsort(when_s, kind="stable")
    return when_s[order], chosen[order].astype(np.int64)


def outages(faults: FaultSpec, instances: int, horizon_s: float, seed: int) -> tuple[Times, Indices, Indices]:
    """(when, which instance, 1 for a recovery), [F] each, in order of time, then of the instance."""
    events = [
        event
        for outage in faults.outages
        for event in ((outage.at_s, outage.instance, 0), (outage.at_s + outage.for_s, outage.instance, 1))
    ]
    if faults.mean_time_between_failures_s is not None:
        for instance in range(instances):
            generator = np.random.default_rng((seed, 1, instance))
            now_s = generator.exponential(faults.mean_time_between_failures_s)
            while now_s < horizon_s:
                up_s = now_s + generator.exponential(faults.mean_repair_s)
                events += [(now_s, instance, 0), (up_s, instance, 1)]
                now_s = up_s + generator.exponential(faults.mean_time_between_failures_s)
    events.sort(key=lambda event: event[:2])
    columns = list(zip(*events, strict=True)) or [(), (), ()]
    return np.array(columns[0], np.float64), np.array(columns[1], np.int64), np.array(columns[2], np.int64)
