"""How to read the event log: every outcome metric but ``events``, counted again from its records in plain Python.

``recount(simulator.log(), scenario)`` needs nothing else of the simulator. Numbers in brackets are sentences of
docs/specification.md, whose section on metrics this follows.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ooco_gym.cluster.log import EVENT_NAMES
from ooco_gym.scenario import Scenario

RELAXED = 0  # a role, as the log writes it


class Event(NamedTuple):
    """One record of the log; ``ooco_gym.cluster.log.EVENTS`` says what ``a``, ``b``, ``d`` and ``seconds`` mean."""

    time_s: float
    kind: str
    instance: int
    offline: int
    request: int
    a: int
    b: int
    d: int
    seconds: float


def read(log: np.ndarray) -> list[Event]:
    return [Event(time_s, EVENT_NAMES[kind], *rest) for time_s, kind, *rest in log.tolist()]


@dataclass
class Online:
    """What the log says of one online request."""

    arrival_s: float
    output: int
    slo_class: int
    token_s: list[float] = field(default_factory=list)
    finish_s: float = math.inf
    gone_s: float = math.inf

    @property
    def first_s(self) -> float:
        return self.token_s[0] if self.token_s else math.inf


def online_requests(events: list[Event], instances: int) -> dict[int, Online]:
    """Every online request that was not rejected, with the time of each of its tokens.

    A prefill emits one token when it is complete (15, 18); from ``enter`` to ``exit`` a request emits one with every
    iteration of its instance.
    """
    requests: dict[int, Online] = {}
    batches: list[set[tuple[int, int]]] = [set() for _ in range(instances)]  # of (offline, request)
    for event in events:
        who = (event.offline, event.request)
        if event.kind == "arrival":
            requests[event.request] = Online(event.time_s, output=event.b, slo_class=event.d)
        elif event.kind == "enter":
            batches[event.instance].add(who)
        elif event.kind == "exit":
            batches[event.instance].remove(who)
        elif event.kind == "iteration":
            assert event.a in (0, len(batches[event.instance]))  # none decode while a relaxed instance prefills
            for offline, request in batches[event.instance] if event.a else ():
                if not offline:
                    requests[request].token_s.append(event.time_s)
        elif not event.offline and event.kind == "prefilled":
            requests[event.request].token_s.append(event.time_s)
        elif not event.offline and event.kind == "finished":
            requests[event.request].finish_s = event.time_s
        elif event.kind == "cancelled":
            requests[event.request].gone_s = event.time_s
    return requests


def recount(log: np.ndarray, scenario: Scenario) -> dict[str, float | dict[str, float]]:
    """The metrics of ``Outcome`` under their names there, of an episode that was run to its horizon."""
    events = read(log)
    return {
        **_of_online_requests(online_requests(events, scenario.instances), scenario),
        **_rejected(events),
        **_of_offline_requests(events, scenario),
        **_of_instances(events, scenario),
        **_counts(events, scenario),
    }


def _measured(events: list[Event], scenario: Scenario) -> list[Event]:
    """What happens at the very end of warm-up still belongs to it; without one everything is measured."""
    return [event for event in events if event.time_s > scenario.warmup_s or not scenario.warmup_s]


# --- Online requests --------------------------------------------------------------------------------------------------


def _of_online_requests(requests: dict[int, Online], scenario: Scenario) -> dict[str, float | dict[str, float]]:
    classes = scenario.slo.all_classes
    counted, late, late_first = Counter(), Counter(), 0
    ttfts, tpots = [], []
    for request in requests.values():
        slo, gaps = classes[request.slo_class], request.output - 1
        first_by = request.arrival_s + slo.ttft_s
        finish_by = request.first_s + gaps * slo.tpot_s
        ttft_late = request.first_s > first_by
        tpot_late = not ttft_late and gaps > 0 and request.finish_s > finish_by
        certain_s = first_by if ttft_late else finish_by if tpot_late else math.inf
        if request.gone_s < min(certain_s, math.inf):  # went away before its violation was certain
            continue
        deadline_s = first_by + gaps * slo.tpot_s
        if request.arrival_s < scenario.warmup_s or deadline_s > scenario.horizon_s:
            continue
        counted[request.slo_class] += 1
        late[request.slo_class] += ttft_late or tpot_late
        late_first += ttft_late
        # what has not come by the end, or before the client went away, counts with its wait or its pace so far
        end_s = min(scenario.horizon_s, request.gone_s)
        ttfts.append(min(request.first_s, end_s) - request.arrival_s)
        if gaps and request.first_s <= end_s:
            tpots.append((min(request.finish_s, end_s) - request.first_s) / gaps)
    tokens = [time_s for request in requests.values() for time_s in pairwise(request.token_s)]
    between = [later - earlier for earlier, later in tokens if scenario.warmup_s < later <= scenario.horizon_s]
    return {
        "online_requests": counted.total(),
        "violations": late.total(),
        "violation_rate": late.total() / max(counted.total(), 1),
        "class_requests": {slo.name: counted[i] for i, slo in enumerate(classes)},
        "class_violation_rates": {slo.name: late[i] / max(counted[i], 1) for i, slo in enumerate(classes)},
        "ttft_violations": late_first,
        "ttft_p50_s": quantile(ttfts, 0.5),
        "ttft_p99_s": quantile(ttfts, 0.99),
        "tpot_p50_s": quantile(tpots, 0.5),
        "tpot_p99_s": quantile(tpots, 0.99),
        "tbt_p99_s": least(between, 0.99),
    }


def quantile(values: list[float], q: float) -> float:
    """Linear interpolation between the order statistics."""
    if not values:
        return math.nan
    values, place = sorted(values), q * (len(values) - 1)
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return values[below] + (place - below) * (values[above] - values[below])


def least(values: list[float], q: float) -> float:
    """The least value that a share ``q`` of all values does not exceed."""
    return sorted(values)[max(math.ceil(q * len(values)), 1) - 1] if values else 0.0


def _rejected(events: list[Event]) -> dict[str, float]:
    rejected = [event for event in events if event.kind == "rejected"]
    return {
        "rejected_online": sum(event.d == 0 for event in rejected),
        "rejected_offline": sum(event.d == 1 for event in rejected),
    }


# --- Offline requests -------------------------------------------------------------------------------------------------


def _of_offline_requests(events: list[Event], scenario: Scenario) -> dict[str, float]:
    finished = [event for event in _measured(events, scenario) if event.kind == "finished" and event.offline]
    prompt_tokens, output_tokens = sum(event.a for event in finished), sum(event.b for event in finished)
    ideal_s = prompt_tokens * scenario.ideal_prompt_token_s + output_tokens * scenario.ideal_output_token_s
    return {
        "offline_output_tokens_per_s": output_tokens / scenario.episode_s,
        "offline_prompt_tokens_per_s": prompt_tokens / scenario.episode_s,
        "offline_requests_per_s": len(finished) / scenario.episode_s,
        "offline_ideal_s_per_instance_s": ideal_s / (scenario.episode_s * scenario.instances),
    }


# --- Instances --------------------------------------------------------------------------------------------------------


def _of_instances(events: list[Event], scenario: Scenario) -> dict[str, float]:
    """Seconds are booked when an iteration ends; one that a failure cuts off leaves no trace (47)."""
    busy_s = wasted_s = 0.0
    for event in _measured(events, scenario):
        if event.kind == "iteration":
            busy_s += event.seconds
            wasted_s += event.seconds * event.d / (event.a + event.b)  # its share of tokens prefilled again
        elif event.kind == "interrupted":
            busy_s += event.seconds
            wasted_s += event.seconds
    return {"wasted_fraction": wasted_s / max(busy_s, 1e-9)}


#: Outcome metrics that are numbers of records of one kind.
COUNTED = {
    "preemptions": "interrupted",
    "evictions": "evicted",
    "migrations": "pulled",
    "pushbacks": "pushed",
    "role_changes": "role",
    "checkpoints": "checkpointed",
    "restores": "restored",
    "failures": "failed",
    "lost": "lost",
    "cancelled": "cancelled",
    "iterations": "iteration",
}


def _counts(events: list[Event], scenario: Scenario) -> dict[str, float]:
    kinds = Counter(event.kind for event in _measured(events, scenario))
    roles, mixed = list(scenario.cluster.roles), []
    for event in events:
        if event.kind == "role":
            roles[event.instance] = event.a
        elif event.kind == "iteration" and event.b and roles[event.instance] != RELAXED:  # (38): it prefills pieces
            mixed.append(event)
    counts = {metric: kinds[kind] for metric, kind in COUNTED.items()}
    return counts | {"mixed_iterations": len(_measured(mixed, scenario))}
