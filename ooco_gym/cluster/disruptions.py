"""Failures and cancellations of an episode, drawn before it starts, so that every policy meets the same ones."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ooco_gym.cluster.state import CANCEL, DISRUPTION, FAIL, RECOVER
from ooco_gym.specs import FaultSpec


def disruptions(
    faults: FaultSpec, arrival_s: npt.NDArray[np.float64], instances: int, horizon_s: float, seed: int
) -> npt.NDArray[np.void]:
    """[D] DISRUPTION in order: by time, cancellations before failures and recoveries, then by index."""
    events = [*_cancellations(faults, arrival_s, seed), *_outages(faults, instances, horizon_s, seed)]
    return np.array(sorted(events, key=lambda event: (event[0], event[1] != CANCEL, event[2])), DISRUPTION)


def _cancellations(faults: FaultSpec, arrival_s: npt.NDArray[np.float64], seed: int) -> list[tuple[float, int, int]]:
    """Drawn for every request in order of arrival, so that each meets the same fate under every policy."""
    if faults.cancel_share == 0.0:
        return []
    generator = np.random.default_rng((seed, 0))
    chosen = generator.random(len(arrival_s)) < faults.cancel_share
    when_s = arrival_s + generator.exponential(faults.cancel_after_s, len(arrival_s))
    return [(float(when_s[request]), CANCEL, int(request)) for request in np.flatnonzero(chosen)]


def _outages(faults: FaultSpec, instances: int, horizon_s: float, seed: int) -> list[tuple[float, int, int]]:
    events = [
        event
        for outage in faults.outages
        for event in (
            (outage.at_s, FAIL, outage.instance),
            (outage.at_s + outage.for_s, RECOVER, outage.instance),
        )
    ]
    mean_s = faults.mean_time_between_failures_s
    if mean_s is None:
        return events
    for instance in range(instances):
        generator = np.random.default_rng((seed, 1, instance))
        now_s = generator.exponential(mean_s)
        while now_s < horizon_s:
            up_s = now_s + generator.exponential(faults.mean_repair_s)
            events += [(now_s, FAIL, instance), (up_s, RECOVER, instance)]
            now_s = up_s + generator.exponential(mean_s)
    return events
