"""The Python face of the compiled cluster: build it for an episode, advance it, read it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from ooco_gym.cluster.control import KNOB_COUNT, RULES, check_knobs, check_rules, ooco_knobs
from ooco_gym.cluster.disruptions import disruptions
from ooco_gym.cluster.loop import NEEDS_SLOTS, REACHED, prepare, run_many, set_knobs_many
from ooco_gym.cluster.outcome import Outcome, measure, totals
from ooco_gym.cluster.queues import CLUSTER_SOURCES
from ooco_gym.cluster.state import (
    COMPLETION,
    EVENT,
    FREE,
    INSTANCE,
    LIST_COUNT,
    LOG,
    NONE,
    OFFLINE,
    ONLINE,
    RING_SECONDS,
    SECOND,
    SLOT,
    TIMER,
    TRUE_COST,
    WORLD,
    Cluster,
)
from ooco_gym.cluster.telemetry import Telemetry, deployment, read
from ooco_gym.errors import OocoError
from ooco_gym.scenario import Scenario
from ooco_gym.workload import OfflineJobs, Requests

_COST_ERROR_FREE = ("layers", "hard_max", "log_untouched")  # coefficients that are not seconds


#: Arrays of a cluster that an episode never writes; copies of its state share them.
_READ_ONLY = ("costs", "offline", "disruptions")


@dataclass(frozen=True)
class SimulatorState:
    """A snapshot taken by :meth:`Simulator.state`; opaque, valid for the episode it came from."""

    cluster: Cluster
    at_warmup: npt.NDArray[np.void]
    episode: bytes  # digest of what the episode was before it began


def _digest(cluster: Cluster, scenario: Scenario) -> bytes:
    """What tells one episode from another: its deployment, rules, seeds and online requests."""
    digest = blake2b(repr((scenario.warmup_s, scenario.episode_s)).encode())
    for array in (cluster.world, cluster.instances, cluster.costs, cluster.online[:1000], cluster.offline[:1000]):
        digest.update(array.tobytes())
    return digest.digest()


def _copy(cluster: Cluster) -> Cluster:
    return cluster.replace(**{name: getattr(cluster, name).copy() for name in Cluster.FIELDS if name not in _READ_ONLY})


class Simulator:
    """One episode of one scenario under fixed rules; ``log`` keeps a record of every event (:meth:`log`).

    >>> simulator = Simulator(scenario, rules={}, seed=0)
    >>> simulator.run(60.0)
    """

    def __init__(
        self, scenario: Scenario, rules: Mapping[str, str] | None = None, seed: int = 0, log: bool = False
    ) -> None:
        if not isinstance(scenario, Scenario):
            raise OocoError(f"scenario is {scenario!r}: a Scenario is needed, build_scenario makes one of a mapping")
        if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0:
            raise OocoError(f"seed is {seed!r}, an integer of at least 0 is needed")
        self.scenario = scenario
        self.rules = check_rules(rules or {})
        self.seed = int(seed)
        self.cluster = _build(scenario, self.rules, seed)
        self._constants = deployment(scenario)
        if log:
            self.cluster = _with_more_log(self.cluster)
        self._episode = _digest(self.cluster, scenario)
        prepare(self.cluster)
        self._at_warmup = totals(self.cluster)

    @property
    def now_s(self) -> float:
        return float(self.cluster.world[0]["now_s"])

    def run(self, until_s: float) -> None:
        """Advance to ``until_s``, simulated seconds from the start of the episode; raises OocoError if that is past."""
        if not self.now_s <= until_s < math.inf:
            raise OocoError(f"until_s is {until_s!r}, accepted is a finite time from now ({self.now_s:g} s) on")
        if self.now_s < self.scenario.warmup_s <= until_s:
            self._advance(self.scenario.warmup_s)
            self._at_warmup = totals(self.cluster)
        self._advance(until_s)

    def _advance(self, until_s: float) -> None:
        status = np.zeros(1, np.int64)
        while True:
            run_many(self._addresses, np.array([until_s], np.float64), status)
            if status[0] == REACHED:
                return
            self.cluster = (_with_more_slots if status[0] == NEEDS_SLOTS else _with_more_log)(self.cluster)

    @property
    def _addresses(self) -> npt.NDArray[np.int64]:
        return np.array([self.cluster.address], np.int64)

    def set_knobs(self, knobs: npt.ArrayLike) -> None:
        """Set the knob vector, float64 [KNOB_COUNT]; it acts from the next decision on."""
        set_knobs_many(self._addresses, check_knobs(knobs).reshape(1, KNOB_COUNT))

    def state(self) -> SimulatorState:
        """A copy of everything that the rest of the episode depends on; :meth:`restore` returns to it."""
        return SimulatorState(_copy(self.cluster), self._at_warmup.copy(), self._episode)

    def restore(self, state: SimulatorState) -> None:
        """Go back to a state taken from this episode, bit for bit, however often; raises OocoError for another's."""
        if not isinstance(state, SimulatorState) or state.episode != self._episode:
            raise OocoError(
                "this state is of another episode: seed, rules and scenario must be those it was taken from"
            )
        self.cluster = _copy(state.cluster)
        self._at_warmup = state.at_warmup.copy()

    def telemetry(self) -> Telemetry:
        """What a policy may know now."""
        return read(self.cluster, self._constants)

    def log(self) -> npt.NDArray[np.void]:
        """The events so far, [events] LOG in order; ``log.EVENTS`` says what they mean. Empty unless asked for."""
        return self.cluster.log[: self.cluster.world[0]["logged"]].copy()

    def outcome(self) -> Outcome:
        """Outcome metrics; meaningful once the scenario's horizon has been reached."""
        return measure(self.cluster, self.scenario, self._at_warmup)


def _build(scenario: Scenario, rules: Mapping[str, str], seed: int) -> Cluster:
    online_seed, offline_seed, noise_seed, bias_seed, class_seed, fault_seed = (
        int(part.generate_state(1, np.uint64)[0]) for part in np.random.SeedSequence(seed).spawn(6)
    )
    online = scenario.online.sample(online_seed, scenario.horizon_s)
    offline = scenario.offline.sample(offline_seed, scenario.horizon_s)
    spec, classes = scenario.cluster, scenario.slo.all_classes
    count, requests = scenario.instances, len(online.arrival_s)

    world = np.zeros(1, WORLD)
    values = {
        "instances": count,
        "relaxed": spec.relaxed,
        "strict": spec.strict,
        "max_batch_tokens": spec.max_batch_tokens,
        "max_seqs": spec.max_seqs,
        "chunk_tokens": spec.chunk_tokens,
        "block_tokens": spec.block_tokens,
        "max_context_tokens": scenario.model.max_context_tokens,
        "smallest_kv_blocks": scenario.kv_blocks,
        "kv_bytes_per_token": scenario.model.kv_bytes_per_token,
        "link_bytes_per_s": spec.link_bytes_per_s,
        "link_latency_s": spec.link_latency_s,
        "host_bytes_per_s": spec.host_bytes_per_s,
        "slo_classes": len(classes),
        "tightest_tpot_s": min(entry.tpot_s for entry in classes),
        "pull_interval_s": spec.pull_interval_s,
        "noise_sigma": scenario.cost.noise_sigma,
        "noise_seed": noise_seed,
        "measure_from_s": scenario.warmup_s,
        "measure_to_s": scenario.horizon_s,
        "online_requests": requests,
        "routed_last": NONE,
        "role_change_s": -math.inf,
        "endless": int(offline.endless),
        "offline_jobs": len(offline.prompt_tokens),
    }
    for name, value in values.items():
        world[0][name] = value
    for name, choice in rules.items():
        world[0][f"rule_{name}"] = RULES[name].index(choice)
    world[0]["knobs"] = ooco_knobs()
    world[0]["slo_s"][: len(classes)] = [(entry.ttft_s, entry.tpot_s) for entry in classes]

    instances = np.zeros(count, INSTANCE)
    instances["role"] = instances["becoming"] = spec.roles
    instances["saturation_batch"] = scenario.instance_saturation_batch
    instances["kv_blocks"] = scenario.instance_kv_blocks
    instances["host_blocks"] = scenario.host_blocks
    instances["pulled_slot"] = instances["pushed_slot"] = NONE
    instances["grown"] = 1
    if spec.relaxed:  # strict instance i starts with relaxed instance i mod R: after the one before it
        instances["pull_cursor"] = (np.arange(count) % spec.relaxed) - 1

    costs = np.stack([scenario.true_cost, scenario.scheduler_cost], axis=1)
    bias = float(np.exp(scenario.cost.bias_sigma * np.random.default_rng(bias_seed).standard_normal()))
    for name in costs.dtype.names or ():
        if name not in _COST_ERROR_FREE:
            costs[name][:, TRUE_COST] *= bias
    lists = np.zeros((count + 1, LIST_COUNT, 3), np.int64)
    lists[:, :, :2] = NONE
    ring = np.zeros(RING_SECONDS, SECOND)
    ring["second"] = -1
    cluster = Cluster(
        world=world,
        instances=instances,
        slots=np.zeros(0, SLOT),
        lists=lists,
        heaps=np.zeros((count, 0), COMPLETION),
        block_phase=np.zeros((count, 2, spec.block_tokens), np.int64),
        queue=np.zeros(2 * (1 << (3 * count + CLUSTER_SOURCES - 1).bit_length()), EVENT),
        costs=costs,
        online=_online_records(online, _classes([entry.share for entry in classes], requests, class_seed)),
        offline=_offline_records(offline),
        timers=np.zeros(requests + 1, TIMER),
        disruptions=disruptions(scenario.faults, online.arrival_s, count, scenario.horizon_s, fault_seed),
        ring=ring,
        log=np.zeros(0, LOG),
    )
    return _with_more_slots(cluster)


def _online_records(requests: Requests, classes: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
    records = np.zeros(len(requests.arrival_s), ONLINE)
    records["arrival_s"], records["prompt"], records["output"] = (
        requests.arrival_s, requests.prompt_tokens, requests.output_tokens,
    )  # fmt: skip
    for name in ("first_s", "finish_s", "gone_s"):
        records[name] = np.inf
    records["slo_class"], records["slot"] = classes, NONE
    return records


def _offline_records(jobs: OfflineJobs) -> npt.NDArray[np.void]:
    records = np.zeros(len(jobs.prompt_tokens), OFFLINE)
    records["prompt"], records["output"] = jobs.prompt_tokens, jobs.output_tokens
    if not jobs.endless:
        records["arrival_s"] = jobs.arrival_s
    return records


def _classes(shares: list[float], requests: int, seed: int) -> npt.NDArray[np.int64]:
    """SLO class of each request, drawn in the order of arrival: the same under every policy."""
    if len(shares) == 1:
        return np.zeros(requests, np.int64)
    edges = np.cumsum(shares) / np.sum(shares)
    drawn = np.searchsorted(edges, np.random.default_rng(seed).random(requests), side="right")
    return np.minimum(drawn, len(shares) - 1).astype(np.int64)


def _with_more_slots(cluster: Cluster) -> Cluster:
    """The same cluster with twice the request slots (at first: enough for any single event)."""
    world = cluster.world[0]
    old = len(cluster.slots)
    reserve = int(world["max_seqs"]) + 1
    new = max(2 * old, reserve + 1024)
    slots = np.zeros(new, SLOT)
    slots[:old] = cluster.slots
    heaps = np.zeros((len(cluster.heaps), new), COMPLETION)
    heaps[:, :old] = cluster.heaps
    free = cluster.lists[int(world["instances"]), FREE]
    added = np.arange(old, new)
    slots["prev"][old:] = added - 1
    slots["next"][old:] = added + 1
    slots["next"][new - 1] = NONE
    slots["prev"][old] = free[1]
    if free[1] == NONE:
        free[0] = old
    else:
        slots["next"][free[1]] = old
    free[1] = new - 1
    free[2] += new - old
    world["slots"] = new
    return cluster.replace(slots=slots, heaps=heaps)


def _with_more_log(cluster: Cluster) -> Cluster:
    """The same cluster with twice the room in its event log."""
    log = np.zeros(max(2 * len(cluster.log), 16 * len(cluster.slots), 1 << 16), LOG)
    log[: len(cluster.log)] = cluster.log
    return cluster.replace(log=log)
