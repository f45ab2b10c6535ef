"""The compiled kernel against the plain reference simulator, both written from docs/specification.md.

Hypothesis draws small clusters under every rule and knob; the two must agree on every request's times to 1e-9, on every
counter and on KV use, at every stop of the episode.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings

from ooco_gym.cluster.control import KNOB_NAMES, RULES, ooco_knobs
from tests.reference.cases import FORMS, Case, cases
from tests.reference.compare import run_both

SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}

# Cases on which the first kernel and the specification differed, shrunk by hypothesis; each names what went wrong.
REGRESSIONS: dict[str, Case] = {}


def _agree(case: Case) -> None:
    found = run_both(case)[2]
    assert not found, "\n".join([repr(case), *found])


@pytest.mark.parametrize("name", REGRESSIONS)
def test_former_disagreement(name):
    _agree(REGRESSIONS[name])


@given(case=cases())
@example(case=Case(offline_kind="endless", offline=20, relaxed=2, strict=2, online=40))
@settings(max_examples=1000, **SETTINGS)
def test_kernel_agrees_with_reference(case):
    _agree(case)


# What a case can exercise, beside the event kinds that the reference logs.
EVENTS = (
    "prefill start",
    "prefill end",
    "interrupted",
    "first token",
    "finish",
    "rejected",
    "decode batch",
    "paused",
    "gate closed",
    "no KV for online prefill",
    "no KV for offline prefill",
    "preemption",
    "held",
    "transfer start",
    "transfer end",
    "pull granted",
    "pull off",
    "eviction of held (relaxed)",
    "eviction of offline (relaxed)",
    "eviction of offline (strict)",
    "eviction of online (strict)",
)


def _exercised(case: Case, kinds: set[str]) -> set[str]:
    rules = {f"{rule}={choice}" for rule, choice in zip(RULES, case.rules, strict=True)}
    knobs = {f"{name} changed" for _, vector in case.knobs for name, value, usual in
             zip(KNOB_NAMES, vector, ooco_knobs(), strict=True) if value != usual}  # fmt: skip
    forms = {f"true cost {case.true_form}", f"scheduler cost {case.scheduler_form}"}
    ties = {"ties in arrival times"} if case.tie_s else set()
    return rules | knobs | forms | ties | {f"offline {case.offline_kind}"} | kinds


@pytest.mark.slow
def test_kernel_agrees_with_reference_in_ten_thousand_cases():
    seen: Counter[str] = Counter()
    evictions: Counter[str] = Counter()

    @given(case=cases())
    @settings(max_examples=10_000, phases=[Phase.generate, Phase.shrink], **SETTINGS)
    def agree(case):
        _, reference, found = run_both(case)
        assert not found, "\n".join([repr(case), *found])
        kinds = {event[1] for event in reference.events}
        seen.update(_exercised(case, kinds))
        evictions.update(kind for _, kind, _, _ in reference.events if kind.startswith("eviction"))

    agree()
    expected = set(EVENTS) | {f"{rule}={choice}" for rule, choices in RULES.items() for choice in choices}
    expected |= {f"{name} changed" for name in KNOB_NAMES} | {"ties in arrival times"}
    expected |= {f"{which} cost {form}" for which in ("true", "scheduler") for form in FORMS}
    expected |= {f"offline {kind}" for kind in ("none", "poisson", "jobs", "endless")}
    print("\ncases that exercised")
    for name in sorted(expected | set(seen)):
        print(f"{seen[name]:7d}  {name}")
    print("evictions in all:", dict(evictions))
    assert min(seen[name] for name in expected) >= 10, [name for name in sorted(expected) if seen[name] < 10]


def _bits(simulator) -> dict[str, bytes]:
    """Every array and field of the state that a stop may not change; ``events`` counts stops of runs themselves."""
    cluster = simulator.cluster
    bits = {"online_first_s": cluster.online_first_s.tobytes(), "online_finish_s": cluster.online_finish_s.tobytes()}
    bits["tbt"] = cluster.tbt.tobytes()
    for name in cluster.world.dtype.names:
        if name != "events":
            bits[f"world.{name}"] = cluster.world[name].tobytes()
    clocks = "anchor_s c0_s c1_s done last_iteration_s start_s end_s next_pull_s pull_cursor"
    for name in [*clocks.split(), "activity", "used_blocks", "online_blocks", "selected_online", "selected_offline"]:
        bits[f"instance.{name}"] = cluster.instances[name].tobytes()
    for name in ("phase", "online", "prompt", "output", "instance"):
        bits[f"slot.{name}"] = cluster.slots[name].tobytes()
    return bits


@given(case=cases())
@settings(max_examples=200, **SETTINGS)
def test_stops_are_invisible(case):
    """Many control intervals without a change of knobs give the same bits as one run (24: runs may be cut anywhere)."""
    case = replace(case, knobs=())
    whole, pieces = case.simulator(), case.simulator()
    whole.run(case.horizon_s)
    for seconds in np.linspace(0.0, case.horizon_s, 97):
        pieces.run(seconds)
    one, many = _bits(whole), _bits(pieces)
    assert [name for name in one if one[name] != many[name]] == []
