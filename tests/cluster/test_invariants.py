"""What must hold in every episode, whatever the cluster, rules, knobs, failures and work.

Numbers in brackets are sentences of docs/specification.md. Each invariant has its own test over random small clusters.
"""

from __future__ import annotations

import copy
import pickle
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ooco_gym.cluster import lists
from ooco_gym.cluster.control import KNOB_NAMES, RULES, knobs_from_mapping
from ooco_gym.cluster.log import EVENT_NAMES
from ooco_gym.cluster.simulator import Simulator
from ooco_gym.cluster.state import (
    BATCH,
    CHECKPOINT,
    CHECKPOINTS,
    DOWN,
    FREE,
    HELD,
    IDLE,
    INBOUND_OFFLINE,
    INBOUND_ONLINE,
    LINK,
    LIST_COUNT,
    NONE,
    OFFLINE_DECODES,
    ONLINE_DECODES,
    PARTIAL,
    PARTIAL_OFFLINE,
    PARTIAL_ONLINE,
    PREFILL,
    QUEUED,
    RELAXED,
    REQUEUED,
    RESIDENT,
    RESTORE,
    RESTORES,
    SCHEDULER_COST,
    STRICT,
    TRANSFER,
    TRUE_COST,
    UNIFIED,
    UNUSED,
    WAITING,
)
from ooco_gym.roofline import decode_s, iteration_s
from ooco_gym.roofline.cost import causal_pairs
from ooco_gym.specs import CostSpec, FaultSpec
from ooco_gym.workload import MixtureLengths, OfflineWork, PoissonArrivals, SyntheticSource
from ooco_gym.workload.lengths import Component
from tests.reference.cases import Case, cases, examples

SETTINGS = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
SETTINGS["max_examples"] = examples(200, 40)
RULE_NAMES = tuple(RULES)


# --- Building and running cases ---------------------------------------------------------------------------------------


def built(case: Case, seed: int = 0, noise: bool = False, log: bool = False) -> Simulator:
    """The case's simulator, with another seed, an erring clock or a log."""
    scenario = case.scenario()
    if noise:
        cost = CostSpec(case.true_form, case.scheduler_form, host_s=0.001, noise_sigma=0.05, bias_sigma=0.03)
        scenario = replace(scenario, cost=cost)
    simulator = Simulator(scenario, rules_of(case), seed, log)
    simulator.cluster.instances["saturation_batch"] = case.simulator().cluster.instances["saturation_batch"]
    return simulator


def rules_of(case: Case) -> dict[str, str]:
    return dict(zip(RULE_NAMES, case.rules, strict=True))


def under(case: Case, **choices: str) -> Case:
    """The case under other rules."""
    return replace(case, rules=tuple({**rules_of(case), **choices}.values()))


def stops(case: Case, simulator: Simulator | None = None):
    """The case's simulator at each of its stops, before the knobs of the stop are set."""
    simulator = simulator or case.simulator()
    for seconds, knobs in case.ticks():
        simulator.run(seconds)
        yield simulator
        if knobs is not None:
            simulator.set_knobs(knobs)


def results(simulator: Simulator) -> dict[str, bytes]:
    """Everything that an episode brings about; ``events`` and ``logged`` count how it was simulated.

    A job that fits nowhere is passed over when an instance looks at it, which has no other effect: of jobs taken and
    rejected the difference counts.
    """
    cluster = simulator.cluster
    found = {f"online {name}": cluster.online[name].tobytes() for name in ("first_s", "finish_s", "gone_s")}
    for name in cluster.world.dtype.names:
        if name not in ("events", "logged", "slots", "offline_taken", "rejected_offline"):
            found[name] = cluster.world[name].tobytes()
    found["offline served"] = (cluster.world["offline_taken"] - cluster.world["rejected_offline"]).tobytes()
    for name in ("role", "becoming", "activity", "used_blocks", "online_blocks", "host_used", "offline_here"):
        found[f"instance {name}"] = cluster.instances[name].tobytes()
    return found


def different(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    return [name for name in one if one[name] != other[name]]


# --- Memory -----------------------------------------------------------------------------------------------------------


def blocks_for(case: Case, tokens: int) -> int:
    return -(-int(tokens) // case.block_tokens)


@given(case=cases())
@settings(**SETTINGS)
def test_kv_stays_within_capacity(case):
    for simulator in stops(case):
        instances = simulator.cluster.instances
        assert (instances["used_blocks"] <= instances["kv_blocks"]).all()
        assert (instances["online_blocks"] >= 0).all()
        assert (instances["online_blocks"] <= instances["used_blocks"]).all()
        assert (instances["host_used"] >= 0).all() and (instances["host_used"] <= instances["host_blocks"]).all()
        down = instances[instances["activity"] == DOWN]  # (47): all KV and host memory there is lost
        assert not down["used_blocks"].any() and not down["online_blocks"].any() and not down["host_used"].any()
        assert not down["offline_here"].any() and not down["incoming"].any()


@given(case=cases())
@settings(**SETTINGS)
def test_kv_in_use_is_what_the_requests_hold(case):
    """(1, 26, 30, 36, 43, 44): no block is leaked, none is counted twice."""
    for simulator in stops(case):
        cluster = simulator.cluster
        used, online, host = Counter(), Counter(), Counter()
        offline_here = Counter()
        for slot in cluster.slots[cluster.slots["phase"] != UNUSED]:
            instance, context = int(slot["instance"]), int(slot["context"])
            if slot["phase"] in (QUEUED, CHECKPOINT):
                held = {}
            elif slot["phase"] in (PREFILL, PARTIAL):
                held = {instance: blocks_for(case, context + 1)}
            elif slot["phase"] == RESIDENT and slot["selected"] == 1:
                held = {instance: blocks_for(case, context + cluster.instances[instance]["steps"])}
            else:
                held = {instance: int(slot["blocks"])}
            if slot["phase"] == TRANSFER:
                held[int(slot["target"])] = blocks_for(case, context)
            if slot["phase"] in (CHECKPOINT, RESTORE):
                host[instance] += blocks_for(case, context)
            for place, blocks in held.items():
                used[place] += blocks
                (online if slot["online"] != NONE else offline_here)[place] += blocks if slot["online"] != NONE else 1
        for i, instance in enumerate(cluster.instances):
            assert instance["grown"] == 1  # a stop lies after the decisions of its instant
            assert instance["used_blocks"] == used[i] and instance["online_blocks"] == online[i]
            assert instance["host_used"] == host[i] and instance["offline_here"] == offline_here[i]


# --- Time -------------------------------------------------------------------------------------------------------------


def fastest_prefill_s(case: Case, costs, tokens: int) -> float:
    """A lower bound for the prefill of a prompt, whole or in pieces, alone or in company, on the fastest instance."""
    n = float(tokens)
    # In pieces the form without causal saving charges no query for keys after its piece: half of them at least.
    full_pairs = n * n if case.relaxed else n * n / 2.0
    batch = (n, causal_pairs(n, 0.0), full_pairs, n, 1.0, 0.0, 0.0, 0.0)
    return min(float(iteration_s(cost, *batch)) for cost in costs)


@given(case=cases())
@settings(**SETTINGS)
def test_causality(case):
    """No first token before a prefill, and the others take at least a decode iteration of the request alone each."""
    *_, simulator = stops(case)
    online, costs = simulator.cluster.online, simulator.cluster.costs[:, TRUE_COST]
    for request in online[np.isfinite(online["first_s"])]:
        prompt, output = int(request["prompt"]), int(request["output"])
        prefill_s = fastest_prefill_s(case, costs, prompt)
        assert request["first_s"] >= request["arrival_s"] + prefill_s * (1 - 1e-9)
        alone_s = min(float(decode_s(cost, 1.0, float(prompt + 1))) for cost in costs)
        assert request["finish_s"] - request["first_s"] >= (output - 1) * alone_s * (1 - 1e-9) - 1e-12
    assert (np.isinf(online["finish_s"]) | np.isfinite(online["first_s"])).all()


@given(case=cases())
@settings(**SETTINGS)
def test_a_client_that_went_away_gets_nothing_more(case):
    """(50): no token of its own prefill after it left, and never the last token."""
    for simulator in stops(case):
        gone = simulator.cluster.online[np.isfinite(simulator.cluster.online["gone_s"])]
        assert len(gone) == simulator.cluster.world[0]["cancelled"]
        assert (gone["gone_s"] >= gone["arrival_s"]).all()
        assert np.isinf(gone["finish_s"]).all()
        assert (np.isinf(gone["first_s"]) | (gone["first_s"] <= gone["gone_s"])).all()


# --- Work conservation ------------------------------------------------------------------------------------------------


class Look:
    """What an idle instance has before it at a stop, in the words of the specification."""

    def __init__(self, case: Case, simulator: Simulator, index: int) -> None:
        self.case, self.index = case, index
        self.cluster, self.rules = simulator.cluster, simulator.rules
        self.state = self.cluster.instances[index]
        self.knobs = dict(zip(KNOB_NAMES, self.cluster.world[0]["knobs"].tolist(), strict=True))
        self.used, self.kv = int(self.state["used_blocks"]), int(self.state["kv_blocks"])
        self.free = self.kv - self.used
        self.draining = bool(self.state["becoming"] != self.state["role"])

    def first(self, which: int):
        """The slot at the head of one of the instance's lists, or None."""
        slot = self.cluster.lists[self.index, which, lists.HEAD]
        return None if slot == NONE else self.cluster.slots[slot]

    def count(self, which: int) -> int:
        return int(self.cluster.lists[self.index, which, lists.LENGTH])

    def blocks(self, tokens: int) -> int:
        return blocks_for(self.case, tokens)

    def gate_open(self) -> bool:  # (12)
        return self.state["offline_here"] < self.knobs["gate_batch"] * self.state["saturation_batch"]

    def unreserved(self) -> float:  # (12): blocks that offline work may fill
        return (1.0 - self.knobs["kv_reserve"]) * self.kv

    def backlog(self) -> tuple[float, int] | None:
        """(14, 12): (on offer since, context) of what the backlog offers this instance."""
        admission, world = self.rules["admission"], self.cluster.world[0]
        if admission == "none" or (admission == "unified" and self.state["role"] != UNIFIED):
            return None
        if self.draining or self.count(CHECKPOINTS):
            return None
        requeued = self.cluster.lists[world["instances"], REQUEUED, lists.HEAD]
        if requeued != NONE:
            return float(self.cluster.slots[requeued]["arrival_s"]), int(self.cluster.slots[requeued]["context"])
        rows = int(world["offline_jobs"])
        last = world["offline_taken"] + rows if world["endless"] else world["offline_arrived"]
        for job in range(world["offline_taken"], last):
            row = self.cluster.offline[job % rows]
            tokens = int(row["prompt"] + row["output"])
            if tokens <= world["max_context_tokens"] and self.blocks(tokens) <= world["smallest_kv_blocks"]:
                since_s = world["offline_head_s"] if world["endless"] else row["arrival_s"]
                return float(since_s), int(row["prompt"])
        return None

    def tpot_slo_s(self) -> float:  # (34)
        slots, world = self.cluster.slots, self.cluster.world[0]
        here = slots[(slots["phase"] == RESIDENT) & (slots["instance"] == self.index) & (slots["online"] != NONE)]
        classes = self.cluster.online["slo_class"][here["online"]]
        return float(world["slo_s"][classes if len(classes) else np.arange(world["slo_classes"]), 1].min())

    def iteration_s(self, tokens: int, past: int) -> float:
        """The predicted iteration of one prefill piece alone."""
        n = float(tokens)
        batch = (n, causal_pairs(n, float(past)), n * (past + n), past + n, 1.0, 0.0, 0.0, 0.0)
        return float(iteration_s(self.cluster.costs[self.index, SCHEDULER_COST], *batch))

    def piece_may_start(self, past: int, left: int, most: float, bound_s: float) -> bool:
        """Whether the shortest piece worth an iteration is within a limit on tokens and one on time."""
        shortest = min(128, left)
        return shortest <= most and self.iteration_s(shortest, past) <= bound_s

    def offline_gave_way(self) -> bool:
        """(37) Nothing offline is left that could give way here."""
        slots = self.cluster.slots
        held = (slots["phase"] == HELD) & (slots["online"] == NONE) & (slots["instance"] == self.index)
        return not self.count(PARTIAL_OFFLINE) and not self.count(OFFLINE_DECODES) and not held.any()

    def no_room_for_online(self, tokens: int) -> bool:
        """KV for an online request is neither free nor to be had from offline work."""
        gave_way = self.rules["eviction"] == "newest" or self.offline_gave_way()
        return self.blocks(tokens) > self.free and gave_way

    def nothing_selected(self, bound_s: float) -> bool:
        """(23) An idle instance has no resident that mix decoding selection would take."""
        resident = self.first(ONLINE_DECODES) if self.count(ONLINE_DECODES) else self.first(OFFLINE_DECODES)
        if resident is None:
            return True
        alone_s = decode_s(self.cluster.costs[self.index, SCHEDULER_COST], 1.0, float(resident["context"]))
        return self.rules["mix_selection"] == "exact" and alone_s > bound_s

    def nothing_to_restore(self) -> bool:
        """(44) Neither while someone waits who would evict it again."""
        slot = self.first(CHECKPOINTS)
        if slot is None or any(self.count(which) for which in (WAITING, INBOUND_ONLINE, INBOUND_OFFLINE)):
            return True
        after = self.used + self.blocks(slot["context"])
        if self.state["role"] == STRICT:
            return after > self.knobs["pull_kv"] * self.kv
        return after > self.unreserved() or not self.gate_open()

    def nothing_by_arrival(self) -> bool:
        """(13) The earlier of the heads of both queues finds no free KV."""
        waiting, offline = self.first(WAITING), self.backlog() if self.gate_open() else None
        heads = [] if waiting is None else [(float(waiting["arrival_s"]), False, int(waiting["context"]))]
        heads += [] if offline is None else [(offline[0], True, offline[1])]
        return not heads or self.blocks(min(heads)[2] + 1) > self.free


def assert_relaxed_has_reason(look: Look) -> None:
    assert look.count(OFFLINE_DECODES) == look.count(ONLINE_DECODES) == 0, "its own decodes"
    assert look.count(PARTIAL_OFFLINE) == look.count(PARTIAL_ONLINE) == 0, "a prefill that has begun"
    assert look.nothing_to_restore(), "a checkpoint"
    if look.rules["prefill_order"] == "fcfs":
        assert look.nothing_by_arrival(), "the first request of both classes"
        return
    waiting, offline = look.first(WAITING), look.backlog()
    assert waiting is None or look.no_room_for_online(waiting["context"] + 1), "an online request"
    if offline is not None and waiting is None and look.gate_open():
        assert look.used + look.blocks(offline[1] + 1) > look.unreserved(), "the backlog"


def assert_strict_has_reason(look: Look) -> None:
    bound_s = np.inf
    if look.rules["mix_selection"] != "all":
        bound_s = look.knobs["tpot_bound"] * look.tpot_slo_s()
    assert look.nothing_selected(bound_s), "its own decodes"
    assert look.nothing_to_restore(), "a checkpoint"
    handed = look.first(INBOUND_ONLINE)  # (25)
    if handed is not None and handed["online"] != NONE:
        assert look.no_room_for_online(handed["context"]), "an online hand-over"
    for slot in (handed, look.first(INBOUND_OFFLINE)):
        assert slot is None or look.blocks(slot["context"]) > look.free, "a hand-over"
    budget = np.floor(look.knobs["strict_prefill"])  # (39)
    partial, offline = look.first(PARTIAL_OFFLINE), look.backlog()
    if partial is not None:
        past, left = int(partial["done"]), int(partial["context"] - partial["done"])
        assert not look.piece_may_start(past, left, budget, bound_s), "a prefill that has begun"
    elif offline is not None and look.used + look.blocks(offline[1] + 1) <= look.knobs["pull_kv"] * look.kv:
        assert not look.piece_may_start(0, offline[1], budget, bound_s), "the backlog"


def assert_unified_has_reason(look: Look) -> None:
    bound_s = np.inf
    if look.rules["mix_selection"] != "all" and look.count(ONLINE_DECODES):
        bound_s = look.knobs["tpot_bound"] * look.tpot_slo_s()
    assert look.nothing_selected(bound_s), "its own decodes"
    assert look.nothing_to_restore(), "a checkpoint"
    assert look.count(PARTIAL_ONLINE) == 0, "an online prefill that has begun"
    seated = sum(look.count(which) for which in (ONLINE_DECODES, OFFLINE_DECODES, PARTIAL_OFFLINE))
    seat = seated < look.case.max_seqs
    if look.rules["prefill_order"] == "fcfs":
        assert look.count(PARTIAL_OFFLINE) == 0, "an offline prefill that has begun"
        assert not seat or look.nothing_by_arrival(), "the first request of both classes"
        return
    waiting, partial, offline = look.first(WAITING), look.first(PARTIAL_OFFLINE), look.backlog()
    assert waiting is None or not seat or look.no_room_for_online(waiting["context"] + 1), "an online request"
    chunk = look.knobs["prefill_chunk"]
    most = look.case.chunk_tokens if chunk >= 8192 else min(look.case.chunk_tokens, np.floor(chunk))
    if partial is not None:
        past, left = int(partial["done"]), int(partial["context"] - partial["done"])
        assert not look.piece_may_start(past, left, most, bound_s), "an offline prefill that has begun"
    elif offline is not None and waiting is None and seat and look.gate_open():
        room = look.used + look.blocks(offline[1] + 1) <= look.unreserved()
        assert not room or not look.piece_may_start(0, offline[1], most, bound_s), "the backlog"


def look_at_idle(case: Case, role: int, judge) -> None:
    often = np.linspace(0.0, case.horizon_s, 25).tolist()
    for simulator in stops(replace(case, stops_s=(*case.stops_s, *often))):
        instances = simulator.cluster.instances
        for index in np.flatnonzero((instances["activity"] == IDLE) & (instances["role"] == role)):
            judge(Look(case, simulator, int(index)))


@given(case=cases())
@settings(**SETTINGS)
def test_no_relaxed_instance_idles_beside_work_it_could_start(case):
    look_at_idle(case, RELAXED, assert_relaxed_has_reason)


@given(case=cases())
@settings(**SETTINGS)
def test_no_strict_instance_idles_beside_work_it_could_start(case):
    look_at_idle(case, STRICT, assert_strict_has_reason)


@given(case=cases())
@settings(**SETTINGS)
def test_no_strict_instance_that_prefills_idles_beside_the_backlog(case):
    """The same with strict prefill on from the start, and room for the shortest pieces."""
    knobs = tuple(knobs_from_mapping({"strict_prefill": 512, "pull_kv": 1.0, "tpot_bound": 1.2}).tolist())
    kind = "endless" if case.offline_kind == "none" else case.offline_kind
    case = replace(case, knobs=((0.0, knobs), *case.knobs), offline_kind=kind, tpot_s=0.1, classes=())
    look_at_idle(case, STRICT, assert_strict_has_reason)


@given(case=cases())
@settings(**SETTINGS)
def test_no_unified_instance_idles_beside_work_it_could_start(case):
    if not case.unified:
        case = replace(case, relaxed=0, strict=0, unified=2, devices=(), outages=())
    look_at_idle(case, UNIFIED, assert_unified_has_reason)


# --- Every request is somewhere, and finishes once --------------------------------------------------------------------


#: The list in which a request of a phase is, at which instance: (online list, offline list, field of the instance).
HOMES = {
    PREFILL: (BATCH, BATCH, "instance"),
    PARTIAL: (PARTIAL_ONLINE, PARTIAL_OFFLINE, "instance"),
    TRANSFER: (LINK, LINK, "instance"),
    RESIDENT: (ONLINE_DECODES, OFFLINE_DECODES, "instance"),
    CHECKPOINT: (None, CHECKPOINTS, "instance"),
    RESTORE: (None, RESTORES, "instance"),
}


def home(slot, instances: int) -> tuple[int, int]:
    """(instance or the cluster's row, list) where a slot must be."""
    if slot["phase"] == UNUSED:
        return instances, FREE
    if slot["phase"] == QUEUED:
        return (int(slot["instance"]), WAITING) if slot["online"] != NONE else (instances, REQUEUED)
    if slot["phase"] == HELD:
        return int(slot["target"]), int(slot["queue"])
    online_list, offline_list, place = HOMES[int(slot["phase"])]
    return int(slot[place]), online_list if slot["online"] != NONE else offline_list


def members(cluster, row: int, which: int) -> list[int]:
    found, slot = [], int(cluster.lists[row, which, lists.HEAD])
    while slot != NONE:
        found.append(slot)
        slot = int(cluster.slots[slot]["next"])
    assert len(found) == cluster.lists[row, which, lists.LENGTH]
    return found


@given(case=cases())
@settings(**SETTINGS)
def test_every_request_is_in_exactly_one_place(case):
    for simulator in stops(case):
        cluster, world = simulator.cluster, simulator.cluster.world[0]
        places = defaultdict(list)
        for row in range(len(cluster.lists)):
            for which in range(LIST_COUNT):
                for slot in members(cluster, row, which):
                    places[slot].append((row, which))
        for index, slot in enumerate(cluster.slots):
            assert places[index] == [home(slot, int(world["instances"]))]
        # online: not here yet, rejected, finished, gone, or in the one slot that says so
        for index, request in enumerate(cluster.online):
            rejected, finished = np.isnan(request["first_s"]), np.isfinite(request["finish_s"])
            if request["slot"] != NONE:
                assert cluster.slots[request["slot"]]["online"] == index and not rejected and not finished
            else:
                gone = np.isfinite(request["gone_s"])
                assert (index >= world["next_online"]) + rejected + finished + gone == 1
        in_flight = cluster.slots[cluster.slots["phase"] != UNUSED]
        assert (in_flight["online"] != NONE).sum() == (cluster.online["slot"] != NONE).sum()
        # offline: still in the job list, rejected, finished, or in a slot of its own
        offline = in_flight[in_flight["online"] == NONE]
        taken = world["offline_taken"] - world["rejected_offline"]
        assert len(offline) == taken - world["offline_output_count"] == len(set(offline["serial"]))
        # an instance that is down has nothing but what was sent to it since (48)
        for index in np.flatnonzero(cluster.instances["activity"] == DOWN):
            there = {which for which in range(LIST_COUNT) if cluster.lists[index, which, lists.LENGTH]}
            assert there <= {WAITING, INBOUND_ONLINE, INBOUND_OFFLINE}


# Rules and knobs under which nothing waits for ever: whoever may be admitted is, no bound stops a decode or a piece, a
# checkpoint may fill the KV of a strict instance, and what was begun on one is finished there.
SERVING_RULES = {"admission": "gate", "mix_selection": "all"}
SERVING_KNOBS = knobs_from_mapping({})


@given(case=cases())
@settings(**SETTINGS)
def test_everything_is_served_once_given_time(case):
    """After the case's own knobs, failures and cancellations: every request finishes once, is rejected or is gone."""
    case = under(case, **SERVING_RULES)
    kind = "jobs" if case.offline_kind == "endless" else case.offline_kind
    case = replace(case, offline_kind=kind, chunk_tokens=max(case.chunk_tokens, 256))
    simulator = built(case, log=True)
    simulator.cluster.world["measure_to_s"] = np.inf
    for _ in stops(case, simulator):
        pass
    simulator.set_knobs(SERVING_KNOBS)
    for seconds in (30.0, 300.0, 3e3, 1e4):
        simulator.run(max(seconds, case.horizon_s))
        world = simulator.cluster.world[0]
        arrived = world["next_online"] == case.online and world["offline_arrived"] == world["offline_jobs"]
        if arrived and (simulator.cluster.slots["phase"] == UNUSED).all():
            break
    cluster, world = simulator.cluster, simulator.cluster.world[0]

    # nothing is left anywhere
    assert (cluster.slots["phase"] == UNUSED).all()
    for name in ("used_blocks", "online_blocks", "host_used", "offline_here", "incoming", "granted", "cancelled"):
        assert not cluster.instances[name].any(), name
    lengths = cluster.lists[:, :LIST_COUNT, lists.LENGTH].copy()
    assert lengths[-1, FREE] == len(cluster.slots)
    lengths[-1, FREE] = 0
    assert not lengths.any()

    # each online request has exactly one end, each offline one too
    online, offline = cluster.online, cluster.offline
    rejected, gone = np.isnan(online["first_s"]), np.isfinite(online["gone_s"])
    finished = np.isfinite(online["finish_s"])
    assert (rejected.astype(int) + gone + finished == 1).all()
    assert (world["online_finished"], world["rejected_online"]) == (finished.sum(), rejected.sum())
    log = simulator.log()
    ends = log[log["kind"] == EVENT_NAMES.index("finished")]
    assert sorted(ends["request"][ends["offline"] == 0]) == np.flatnonzero(finished).tolist()
    most = min(case.max_context_tokens, int(cluster.instances["kv_blocks"].min()) * case.block_tokens)
    fits = offline["prompt"] + offline["output"] <= most
    assert sorted(ends["request"][ends["offline"] == 1]) == np.flatnonzero(fits).tolist()
    assert world["offline_output_count"] + world["rejected_offline"] == len(offline)

    # every token was counted once
    prompts, outputs = int(offline["prompt"][fits].sum()), int(offline["output"][fits].sum())
    assert (world["credited_prompt_tokens"], world["credited_output_tokens"]) == (prompts, outputs)
    if case.warmup_s == 0:
        assert world["offline_finished_prompt_tokens"] == prompts
        assert world["offline_finished_output_tokens"] == outputs
    if gone.any():
        return  # the tokens of a client that left are not all there
    if case.warmup_s == 0:
        assert world["tbt"].sum() == (online["output"][finished] - 1).sum()
    # KV lost after the first token was there for all but the newest: prefilling again computes that one as well
    prefills = log[log["kind"] == EVENT_NAMES.index("prefilled")]
    again = len(prefills) - finished.sum() - fits.sum()
    first_time = prompts + int(online["prompt"][finished].sum()) + again
    assert world["prefilled_tokens"] == first_time + world["recomputed_tokens"]


# --- No starvation ----------------------------------------------------------------------------------------------------


AMPLE = (1 << 20,) * 3  # KV blocks of each kind of instance: enough for everything at once


@given(case=cases())
@settings(**SETTINGS)
def test_no_offline_prefill_starts_beside_an_online_request_that_waits(case):
    """(10, 11) under online_first; there is KV for everything, so whoever waits on a relaxed instance can start."""
    case = replace(under(case, prefill_order="online_first"), kv_blocks=AMPLE)
    case = replace(case, offline_kind="endless" if case.offline_kind == "none" else case.offline_kind)
    simulator = built(case, log=True)
    for _ in stops(case, simulator):
        pass
    role = list(simulator.scenario.cluster.roles)
    waiting = [set() for _ in role]
    for event in simulator.log():
        kind, instance, request = EVENT_NAMES[event["kind"]], int(event["instance"]), int(event["request"])
        if kind == "role":
            role[instance] = int(event["a"])
        elif kind == "piece" and event["offline"] and role[instance] == RELAXED:
            assert not waiting[instance], f"{event} beside {waiting[instance]}"
        elif not event["offline"] and kind in ("routed", "piece", "cancelled"):
            for queue in waiting:  # an instance that fails sends its queue elsewhere
                queue.discard(request)
            if kind == "routed":
                waiting[instance].add(request)


@given(case=cases())
@settings(**SETTINGS)
def test_online_work_is_evicted_last(case):
    """(26) under offline_first: no online request loses its KV beside offline work that could give way."""
    case = under(case, eviction="offline_first")
    simulator = built(case, log=True)
    for _ in stops(case, simulator):
        pass
    resident, in_prefill = [[set() for _ in range(len(simulator.cluster.instances))] for _ in range(2)]
    for event in simulator.log():
        kind, instance, request = EVENT_NAMES[event["kind"]], int(event["instance"]), int(event["request"])
        if kind in ("role", "interrupted"):  # a drained instance has no prefill left; a strict one is not interrupted
            in_prefill[instance].clear()
        elif event["offline"]:
            if kind in ("evicted", "finished", "lost", "transfer", "prefilled"):
                resident[instance].discard(request)
                in_prefill[instance].discard(request)
            elif kind == "resident":
                resident[instance].add(request)
            elif kind == "piece":
                in_prefill[instance].add(request)
        elif kind == "evicted":
            assert not resident[instance] and not in_prefill[instance], f"{event} at {event['time_s']}"


def without_pushback(case: Case) -> Case:
    at = KNOB_NAMES.index("pushback")
    return replace(case, knobs=tuple((s, (*vector[:at], 1.0, *vector[at + 1 :])) for s, vector in case.knobs))


@given(case=cases(), ample=st.booleans())
@settings(**SETTINGS)
def test_a_light_online_load_is_served_in_bounded_time_beside_endless_offline_work(case, ample):
    """One request a second, at most 300 prompt and 30 output tokens, a bound that lets it decode, nothing that fails.

    It may wait for a running offline batch and each of its iterations for what rides along, both of bounded length;
    it never waits for the backlog to end, which it does not. Either there is KV for everything, or offline work stays
    where it is: on its way between instances it cannot give way.
    """
    case = under(case, prefill_order="online_first", eviction="offline_first")
    case = replace(case, offline_kind="endless", online=5, online_per_s=1.0, tie_s=0.0, tpot_s=0.1, classes=())
    case = replace(case, outages=(), cancel_share=0.0, prompt_max=min(case.prompt_max, 300), output_max=30)
    if ample:  # then nothing but the bound keeps a decode batch from growing
        bounded = "every_third" if rules_of(case)["mix_selection"] == "all" else rules_of(case)["mix_selection"]
        case = replace(under(case, mix_selection=bounded), kv_blocks=AMPLE)
    else:
        case = without_pushback(under(case, offline_decode="relaxed", migration="none"))
    simulator = case.simulator()
    for _ in stops(case, simulator):
        pass
    last_s = float(simulator.cluster.online["arrival_s"].max())
    simulator.run(max(case.horizon_s, last_s) + 60.0)
    online = simulator.cluster.online[~np.isnan(simulator.cluster.online["first_s"])]
    assert (online["finish_s"] - online["arrival_s"] <= 10.0 + 0.5 * online["output"]).all()


def test_hand_overs_of_offline_work_do_not_keep_an_online_request_waiting_for_ever():
    """It needs 67 of 73 blocks; two or three hand-overs of 4 blocks each are always on the slow link."""
    case = Case(
        kv_blocks=(73, 73),
        block_tokens=1,
        max_batch_tokens=32,
        max_seqs=1,
        saturation_batch=2.5,
        tpot_s=0.1,
        link_latency_s=0.05,
        online=3,
        online_per_s=1.0,
        offline_kind="endless",
        offline=1,
        seed=523,
    )
    simulator = under(case, offline_decode="strict").simulator()
    simulator.run(60.0)
    assert simulator.cluster.online["prompt"].tolist() == [5, 11, 66]
    assert np.isfinite(simulator.cluster.online["finish_s"]).all()


# --- How an episode is cut or watched changes nothing -----------------------------------------------------------------


def constant(case: Case) -> tuple[Case, np.ndarray]:
    """The case without changes of knobs, and the vector to set at its start."""
    return replace(case, knobs=()), knobs_from_mapping({}) if not case.knobs else np.array(case.knobs[0][1])


@given(case=cases(), seed=st.integers(0, 3), noise=st.booleans())
@settings(**SETTINGS)
def test_leaps_are_invisible(case, seed, noise):
    """Cutting the runs of decode iterations anywhere, at a constant Control, changes no bit of any result."""
    case, knobs = constant(case)
    whole, pieces = built(case, seed, noise), built(case, seed, noise)
    for simulator in (whole, pieces):
        simulator.set_knobs(knobs)
    whole.run(case.horizon_s)
    for seconds in sorted([*np.linspace(0.0, case.horizon_s, 41), *case.stops_s]):
        pieces.run(min(seconds, case.horizon_s))
    assert different(results(whole), results(pieces)) == []


@given(case=cases(), seed=st.integers(0, 3), noise=st.booleans())
@settings(**SETTINGS)
def test_the_log_changes_nothing(case, seed, noise):
    """Switched on, it cuts every run into single iterations; results stay the same bits, at any change of knobs."""
    silent, logged = built(case, seed, noise), built(case, seed, noise, log=True)
    for one, other in zip(stops(case, silent), stops(case, logged), strict=True):
        assert different(results(one), results(other)) == []
    assert len(silent.log()) == 0
    assert (np.diff(logged.log()["time_s"]) >= 0).all()


@given(case=cases(), seed=st.integers(0, 3))
@settings(**{**SETTINGS, "max_examples": examples(50, 20)})
def test_reading_changes_nothing(case, seed):
    read, unread = built(case, seed, noise=True), built(case, seed, noise=True)
    for one, other in zip(stops(case, read), stops(case, unread), strict=True):
        one.telemetry(), one.outcome(), one.state()
        assert different(results(one), results(other)) == []


# --- Determinism ------------------------------------------------------------------------------------------------------


@given(case=cases(), seed=st.integers(0, 3))
@settings(**{**SETTINGS, "max_examples": examples(50, 20)})
def test_same_seed_same_bits(case, seed):
    one, two, other = (built(case, number, noise=True) for number in (seed, seed, seed + 1))
    for simulator in (one, two, other):
        for _ in stops(case, simulator):
            pass
    assert different(results(one), results(two)) == []
    host_s = [simulator.cluster.costs["host_s"][0, TRUE_COST] for simulator in (one, other)]
    assert host_s[0] != host_s[1]  # another bias
    if one.cluster.world[0]["iterations"] > 0 and one.cluster.world[0]["busy_s"] > 0:
        assert different(results(one), results(other))


# At 1.5 s instance 3 is down, transfers are on slow links and a restore on its way.
IN_FLIGHT = Case(
    relaxed=2,
    strict=2,
    unified=1,
    kv_blocks=(60, 60, 60),
    saturation_batch=4.0,
    link_bytes_per_s=2e7,
    host_bytes_per_s=2e7,
    outages=((1, 0.5, 0.9), (3, 1.4, 0.3)),
    cancel_share=0.3,
    classes=((1.0, 0.2, 0.02), (2.0, 1.0, 0.1)),
    rules=tuple({**{name: choices[0] for name, choices in RULES.items()}, "evicted_kv": "host"}.values()),
    knobs=((0.4, tuple(knobs_from_mapping({"pushback": 0.6, "strict_prefill": 256, "prefill_chunk": 128}).tolist())),),
    online=60,
    online_per_s=20.0,
    offline_kind="endless",
    offline=40,
    horizon_s=3.0,
    stops_s=(1.5,),
)


def test_the_example_of_a_copy_has_everything_in_flight():
    simulator = built(IN_FLIGHT, noise=True)
    for seconds, knobs in IN_FLIGHT.ticks()[:2]:
        simulator.run(seconds)
        if knobs is not None:
            simulator.set_knobs(knobs)
    assert simulator.now_s == 1.5
    cluster, world = simulator.cluster, simulator.cluster.world[0]
    assert (cluster.instances["activity"] == DOWN).sum() == 1
    assert {TRANSFER, RESTORE, RESIDENT, PREFILL} <= set(cluster.slots["phase"].tolist())
    assert min(world[name] for name in ("cancelled", "lost", "mixed_iterations", "checkpoints", "pushbacks")) > 0


@pytest.mark.parametrize("how", ["restored", "deep copy", "pickled"])
@given(case=cases(), share=st.floats(0.0, 1.0))
@example(case=IN_FLIGHT, share=0.5)
@settings(**{**SETTINGS, "max_examples": examples(60, 15)})
def test_a_copy_taken_anywhere_goes_on_with_the_same_bits(how, case, share):
    """state() and restore(), or a copy of the whole simulator, log included: both futures are one."""
    simulator = built(case, noise=True, log=True)
    ticks = case.ticks()
    before = [tick for tick in ticks if tick[0] <= share * case.horizon_s]

    def play(simulator, ticks):
        for seconds, knobs in ticks:
            simulator.run(seconds)
            if knobs is not None:
                simulator.set_knobs(knobs)
        return {**results(simulator), "log": simulator.log().tobytes(), "outcome": repr(simulator.outcome()).encode()}

    play(simulator, [*before, (max(simulator.now_s, share * case.horizon_s), None)])
    if how == "restored":
        state = simulator.state()
        first = play(simulator, ticks[len(before) :])
        for _ in range(2):
            simulator.restore(state)
            assert different(first, play(simulator, ticks[len(before) :])) == []
        return
    other = copy.deepcopy(simulator) if how == "deep copy" else pickle.loads(pickle.dumps(simulator))
    first = play(simulator, ticks[len(before) :])
    assert different(first, play(other, ticks[len(before) :])) == []


def test_policies_meet_the_same_world():
    """Common random numbers: work, classes, cancellations, failures and the clock's bias depend on the seed alone."""
    lengths = MixtureLengths([Component(1.0, 4.0, 3.0, 0.5, 0.5, 0.2)], (1, 500), (1, 200))
    scenario = replace(
        Case(relaxed=2, strict=2, unified=1, classes=((1.0, 0.2, 0.02), (3.0, 1.0, 0.1))).scenario(),
        online=SyntheticSource("poisson", PoissonArrivals(5.0), lengths),
        offline=OfflineWork("poisson", lengths, rate_per_s=5.0),
        cost=CostSpec(noise_sigma=0.05, bias_sigma=0.03),
        faults=FaultSpec(mean_time_between_failures_s=10.0, mean_repair_s=1.0, cancel_share=0.3, cancel_after_s=0.5),
        episode_s=20.0,
    )
    last = {name: choices[-1] for name, choices in RULES.items()}
    ooco, other, another_seed = Simulator(scenario, {}, 3), Simulator(scenario, last, 3), Simulator(scenario, {}, 4)
    other.set_knobs([1.0, 0.5, 0.5, 0.3, 2.0, 0.2, 256.0, 512.0, 0.7, 0.25])
    for simulator in (ooco, other, another_seed):
        simulator.run(20.0)

    def met(simulator):
        cluster = simulator.cluster
        found = {f"online {name}": cluster.online[name] for name in ("arrival_s", "prompt", "output", "slo_class")}
        found |= {f"offline {name}": cluster.offline[name] for name in ("arrival_s", "prompt", "output")}
        found |= {"disruptions": cluster.disruptions, "costs": cluster.costs}
        return {name: array.tobytes() for name, array in found.items()}

    assert len(ooco.cluster.online) > 50 and len(ooco.cluster.disruptions) > 20
    assert different(met(ooco), met(other)) == []
    assert different(met(ooco), met(another_seed)) == list(met(ooco))
    assert ooco.cluster.online["finish_s"].tobytes() != other.cluster.online["finish_s"].tobytes()
    for simulator in (ooco, other):  # a client that had not finished by then is gone; all failures happened
        failed = (ooco.cluster.disruptions["kind"] == 1) & (ooco.cluster.disruptions["time_s"] <= 20.0)
        assert simulator.cluster.world[0]["failures"] == failed.sum()
