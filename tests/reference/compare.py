"""Run the kernel and the reference side by side and say where they differ first."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from ooco_gym.cluster.simulator import Simulator
from ooco_gym.cluster.state import DECODING, DOWN, TBT_BINS, TBT_FIRST_S, TBT_RATIO
from tests.reference.cases import Case
from tests.reference.simulator import ROLES, Reference

TOLERANCE = 1e-9


def differences(simulator: Simulator, reference: Reference) -> list[str]:
    """One line per result that the two do not agree on, empty if there is none."""
    cluster = simulator.cluster
    found = []
    for name in ("first_s", "finish_s", "gone_s"):
        mine = np.array([getattr(request, name) for request in reference.online])
        values = cluster.online[name]
        if name != "gone_s":  # a rejected request has no times
            rejected = np.isnan(cluster.online["first_s"])
            values, mine = np.where(rejected, np.nan, values), np.where(rejected & np.isinf(mine), np.nan, mine)
        bad = ~np.isclose(values, mine, rtol=TOLERANCE, atol=0.0, equal_nan=True)
        found += [f"{name} of online {i}: kernel {values[i]!r}, reference {mine[i]!r}" for i in np.flatnonzero(bad)]
    world = cluster.world[0]
    for name, count in reference.counters().items():
        if world[name] != count:
            found.append(f"{name}: kernel {world[name]}, reference {count}")
    seconds = {name: float(world[name]) for name in ("busy_s", "interrupted_s", "recompute_s")}
    seconds["busy_s"] += sum(_running_s(instance) for instance in cluster.instances)
    for name, value in seconds.items():
        if not math.isclose(value, reference.seconds[name], rel_tol=TOLERANCE, abs_tol=1e-12):
            found.append(f"{name}: kernel {value!r}, reference {reference.seconds[name]!r}")
    for instance in reference.instances:
        record = cluster.instances[instance.index]
        fields = {"role": ROLES.index(instance.role), "becoming": ROLES.index(instance.becoming)}
        fields["host_used"] = sum(instance.host.values())
        if record["grown"] == 1:
            fields |= {"used_blocks": instance.used, "online_blocks": instance.online_used}
        for name, value in fields.items():
            if record[name] != value:
                found.append(f"{name} of instance {instance.index}: kernel {record[name]}, reference {value}")
        if (record["activity"] == DOWN) == instance.up:
            found.append(f"instance {instance.index} is {'up' if instance.up else 'down'} in the reference alone")
    return found


def _running_s(record: np.void) -> float:
    """Seconds of the decode iterations that have ended in a run whose books are still open."""
    if record["activity"] != DECODING:
        return 0.0
    k, first_s = int(record["done"]), record["c0_s"] + record["c1_s"] * record["anchor_context"]
    return float(k * first_s + record["c1_s"] * record["anchor_batch"] * 0.5 * k * (k - 1))


def tbt_difference(simulator: Simulator, reference: Reference) -> int:
    """Gaps that lie in another bin, neighbours apart (a gap on the edge of a bin may fall to either side)."""
    gaps = np.array(
        [
            later - earlier
            for request in reference.online
            for earlier, later in pairwise(request.token_s)
            if reference.measure_from_s < later <= reference.measure_to_s
        ]
    )
    place = np.log(np.maximum(gaps, TBT_FIRST_S) / TBT_FIRST_S) / math.log(TBT_RATIO)
    low = np.bincount(np.clip(place - 1e-6, 0, TBT_BINS - 1).astype(int), minlength=TBT_BINS)
    high = np.bincount(np.clip(place + 1e-6, 0, TBT_BINS - 1).astype(int), minlength=TBT_BINS)
    kernel = np.cumsum(simulator.cluster.world[0]["tbt"])
    outside = np.maximum(kernel - np.cumsum(low), 0) + np.maximum(np.cumsum(high) - kernel, 0)
    return int(outside.max())


def run_both(case: Case) -> tuple[Simulator, Reference, list[str]]:
    """Advance both to the first stop where they differ, or to the end."""
    simulator = case.simulator()
    reference = Reference(simulator)
    for seconds, knobs in case.ticks():
        simulator.run(seconds)
        reference.run(seconds)
        found = differences(simulator, reference)
        if found:
            return simulator, reference, [f"at {seconds} s", *found]
        if knobs is not None:
            simulator.set_knobs(knobs)
            reference.set_knobs(knobs)
    missed = tbt_difference(simulator, reference)
    return simulator, reference, [f"{missed} gaps in the wrong TBT bin"] if missed else []
