"""What must hold in every episode, whatever the rules, knobs and work."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ooco_gym.cluster import lists
from ooco_gym.cluster.control import GATE_BATCH, KV_RESERVE, RULES
from ooco_gym.cluster.simulator import Simulator
from ooco_gym.cluster.state import (
    FREE,
    IDLE,
    LIST_COUNT,
    NONE,
    OFFLINE_DECODES,
    REQUEUED,
    UNUSED,
    WAITING,
)
from ooco_gym.roofline import decode_s, prefill_s
from ooco_gym.scenario import CostSpec
from ooco_gym.workload import MixtureLengths, OfflineWork, PoissonArrivals, SyntheticSource
from ooco_gym.workload.lengths import Component
from tests.reference.cases import Case, cases

SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True, "max_examples": 200}
RULE_NAMES = tuple(RULES)


def _stops(case: Case):
    """The case's simulator at each of its stops."""
    simulator = case.simulator()
    for seconds, knobs in case.ticks():
        simulator.run(seconds)
        yield simulator
        if knobs is not None:
            simulator.set_knobs(knobs)


def _noisy(case: Case, seed: int) -> Simulator:
    scenario = replace(case.scenario(), cost=CostSpec(case.true_form, case.scheduler_form, 0.001, 0.05, 0.03))
    simulator = Simulator(scenario, dict(zip(RULES, case.rules, strict=True)), seed)
    simulator.cluster.instances["kv_blocks"][:] = case.kv_blocks[0]
    simulator.cluster.instances["saturation_batch"][:] = case.saturation_batch
    return simulator


def _without(case: Case, **choices: str) -> Case:
    rules = {**dict(zip(RULES, case.rules, strict=True)), **choices}
    return replace(case, rules=tuple(rules.values()))


def _results(simulator: Simulator) -> dict[str, bytes]:
    cluster = simulator.cluster
    results = {name: getattr(cluster, name).tobytes() for name in ("online_first_s", "online_finish_s", "tbt")}
    for name in cluster.world.dtype.names:
        if name != "events":
            results[name] = cluster.world[name].tobytes()
    return results


@given(case=cases())
@settings(**SETTINGS)
def test_kv_stays_within_capacity(case):
    for simulator in _stops(case):
        instances = simulator.cluster.instances
        assert (instances["used_blocks"] <= instances["kv_blocks"]).all()
        assert (instances["online_blocks"] >= 0).all()
        assert (instances["online_blocks"] <= instances["used_blocks"]).all()


@given(case=cases())
@settings(**SETTINGS)
def test_causality(case):
    """arrival <= first - its prefill, and the other tokens take at least a decode iteration of it alone each."""
    simulator = case.simulator()
    for seconds, _ in case.ticks():  # OOCO's knobs
        simulator.run(seconds)
    cluster = simulator.cluster
    cost = cluster.true_cost[0]
    for i in np.flatnonzero(np.isfinite(cluster.online_first_s)):
        prompt, output = int(cluster.online_prompt[i]), int(cluster.online_output[i])
        first_s, finish_s = cluster.online_first_s[i], cluster.online_finish_s[i]
        assert first_s >= cluster.online_arrival_s[i] + prefill_s(cost, float(prompt)) * (1 - 1e-9)
        assert finish_s - first_s >= (output - 1) * decode_s(cost, 1.0, float(prompt + 1)) * (1 - 1e-9) - 1e-12
    assert (np.isinf(cluster.online_finish_s) | np.isfinite(cluster.online_first_s)).all()


@given(case=cases())
@settings(**SETTINGS)
def test_everything_is_served_once_given_time(case):
    # Rules under which work may wait for ever: no admission, and an exact bound below a single decode.
    case = _without(case, admission="gate", mix_selection="all")
    if case.offline_kind == "endless":
        case = replace(case, offline_kind="jobs")
    simulator = case.simulator()
    simulator.cluster.world["measure_to_s"] = np.inf
    for seconds in (30.0, 300.0, 3e3, 1e4):
        simulator.run(seconds)
        world = simulator.cluster.world[0]
        arrived = world["next_online"] == case.online and world["offline_arrived"] == world["offline_jobs"]
        if arrived and (simulator.cluster.slots["phase"] == UNUSED).all():
            break
    cluster, world = simulator.cluster, simulator.cluster.world[0]

    # every request finished once, and nothing is left anywhere
    served = ~np.isnan(cluster.online_first_s)
    assert np.isfinite(cluster.online_finish_s[served]).all()
    assert world["online_finished"] == served.sum()
    assert world["rejected_online"] == (~served).sum()
    jobs = len(cluster.offline_prompt)
    assert world["offline_output_count"] + world["rejected_offline"] == jobs  # finished at any time, and rejected
    assert (cluster.slots["phase"] == UNUSED).all()
    assert (cluster.instances["used_blocks"] == 0).all()
    assert (cluster.instances["online_blocks"] == 0).all()
    lengths = cluster.lists[:, :LIST_COUNT, lists.LENGTH].copy()
    assert lengths[-1, FREE] == len(cluster.slots)
    lengths[-1, FREE] = 0
    assert not lengths.any()

    # every token was counted once
    smaller = int(cluster.instances["kv_blocks"].min()) * case.block_tokens
    fits = cluster.offline_prompt + cluster.offline_output <= smaller
    prompts, outputs = int(cluster.offline_prompt[fits].sum()), int(cluster.offline_output[fits].sum())
    if case.warmup_s == 0:
        assert world["offline_finished_prompt_tokens"] == prompts
        assert world["offline_finished_output_tokens"] == outputs
        assert cluster.tbt.sum() == (cluster.online_output[served] - 1).sum()
    assert (world["credited_prompt_tokens"], world["credited_output_tokens"]) == (prompts, outputs)
    # An evicted request had KV for all but its newest token: prefilling it again computes one token for the first time.
    first_time = prompts + int(cluster.online_prompt[served].sum()) + world["evictions"]
    assert world["prefilled_tokens"] == first_time + world["recomputed_tokens"]


@given(case=cases())
@settings(**SETTINGS)
def test_no_relaxed_instance_idles_beside_work_it_could_start(case):
    fcfs = case.rules[RULE_NAMES.index("prefill_order")] == "fcfs"
    for simulator in _stops(case):
        cluster = simulator.cluster
        for i in np.flatnonzero(cluster.instances["activity"][: case.relaxed] == IDLE):
            instance = cluster.instances[i]
            assert cluster.lists[i, OFFLINE_DECODES, lists.LENGTH] == 0, "an idle instance beside its own decodes"
            free = instance["kv_blocks"] - instance["used_blocks"]
            online = _waiting_head(cluster, i)
            offline = _backlog_head(case, cluster)
            if instance["held_offline"] >= cluster.knobs[GATE_BATCH] * instance["saturation_batch"]:
                offline = None
            if fcfs:  # whoever is behind the first of both waits with it
                heads = [head for head in (online, offline) if head is not None]
                if heads:
                    assert _prefill_blocks(case, min(heads)) > free, "an idle instance beside the first request"
                continue
            if online is not None:
                assert _prefill_blocks(case, online) > free, "an idle instance beside an online request"
            if offline is not None:
                room = (1 - cluster.knobs[KV_RESERVE]) * instance["kv_blocks"] - instance["used_blocks"]
                assert _prefill_blocks(case, offline) > room, "an idle instance beside the backlog"


def _prefill_blocks(case: Case, head: tuple[float, bool, int]) -> int:
    return -(-(head[2] + 1) // case.block_tokens)


def _waiting_head(cluster, instance: int) -> tuple[float, bool, int] | None:
    """(arrival, is offline, context) of the online request at the head of an instance's queue."""
    slot = cluster.lists[instance, WAITING, lists.HEAD]
    return None if slot == NONE else (cluster.slots[slot]["arrival_s"], False, int(cluster.slots[slot]["context"]))


def _backlog_head(case: Case, cluster) -> tuple[float, bool, int] | None:
    """(arrival, is offline, context) of the request that the backlog offers, None if it offers nothing."""
    if case.rules[RULE_NAMES.index("admission")] == "none":
        return None
    slot = cluster.lists[case.relaxed + case.strict, REQUEUED, lists.HEAD]
    if slot != NONE:
        return cluster.slots[slot]["arrival_s"], True, int(cluster.slots[slot]["context"])
    world = cluster.world[0]
    smaller = int(cluster.instances["kv_blocks"].min()) * case.block_tokens
    rows = world["offline_jobs"]
    last = world["offline_taken"] + rows if world["endless"] else world["offline_arrived"]
    for job in range(world["offline_taken"], last):
        prompt, output = int(cluster.offline_prompt[job % rows]), int(cluster.offline_output[job % rows])
        if prompt + output <= smaller:
            return world["offline_head_s"] if world["endless"] else cluster.offline_arrival_s[job], True, prompt
    return None


@given(case=cases(), seed=st.integers(0, 3))
@settings(**{**SETTINGS, "max_examples": 50})
def test_same_seed_same_bits(case, seed):
    one, two, other = _noisy(case, seed), _noisy(case, seed), _noisy(case, seed + 1)
    for simulator in (one, two, other):
        for seconds, knobs in case.ticks():
            simulator.run(seconds)
            if knobs is not None:
                simulator.set_knobs(knobs)
    assert _results(one) == _results(two)
    if one.cluster.world[0]["iterations"] > 0 and one.cluster.world[0]["busy_s"] > 0:
        assert one.cluster.true_cost["host_s"][0] != other.cluster.true_cost["host_s"][0]  # another bias
        assert _results(one) != _results(other)


@given(case=cases(), seed=st.integers(0, 3))
@settings(**SETTINGS)
def test_leaps_are_invisible_with_noise(case, seed):
    """Cutting the runs of decode iterations anywhere, at a constant Control, changes no bit of any result."""
    whole, pieces = _noisy(case, seed), _noisy(case, seed)
    whole.run(case.horizon_s)
    for seconds in np.linspace(0.0, case.horizon_s, 41):
        pieces.run(seconds)
    one, many = _results(whole), _results(pieces)
    assert [name for name in one if one[name] != many[name]] == []


def test_policies_meet_the_same_requests():
    """Common random numbers: work depends on the seed alone, not on rules or knobs."""
    lengths = MixtureLengths([Component(1.0, 4.0, 3.0, 0.5, 0.5, 0.2)], (1, 500), (1, 200))
    cost = CostSpec(noise_sigma=0.05, bias_sigma=0.03)
    scenario = replace(
        Case(relaxed=2, strict=2).scenario(),
        online=SyntheticSource("poisson", PoissonArrivals(5.0), lengths),
        offline=OfflineWork("poisson", lengths, rate_per_s=5.0),
        cost=cost,
        episode_s=20.0,
    )
    ooco = Simulator(scenario, {}, seed=3)
    other = Simulator(scenario, {name: choices[-1] for name, choices in RULES.items()}, seed=3)
    other.set_knobs([1.0, 0.5, 0.5, 0.3, 2.0, 0.2])
    another_seed = Simulator(scenario, {}, seed=4)
    for simulator in (ooco, other, another_seed):
        simulator.run(20.0)
    assert ooco.cluster.online_finish_s.tobytes() != other.cluster.online_finish_s.tobytes()
    for name in ("online_arrival_s", "online_prompt", "online_output", "offline_prompt", "offline_output", "true_cost"):
        assert getattr(ooco.cluster, name).tobytes() == getattr(other.cluster, name).tobytes(), name
        assert getattr(ooco.cluster, name).tobytes() != getattr(another_seed.cluster, name).tobytes(), name
    assert len(ooco.cluster.online_arrival_s) > 0
