"""The mechanism of docs/specification.md in plain Python, one decode iteration at a time: set-up, events, decisions.

Numbers in brackets are sentences of the specification. Written for reading; the kernel is the fast one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from ooco_gym.cluster.simulator import Simulator
from ooco_gym.cluster.state import SCHEDULER_COST, TRUE_COST
from tests.reference.disruptions import Disruptions
from tests.reference.iterations import Iterations
from tests.reference.memory import Memory
from tests.reference.model import Backlog, Instance, Request
from tests.reference.moves import Moves
from tests.reference.relaxed import Relaxed
from tests.reference.strict import Strict
from tests.reference.unified import Unified

#: Integer counters of the kernel's world that the reference keeps too; two more are derived in ``counters``.
COUNTERS = (
    "online_finished",
    "offline_finished",
    "offline_finished_prompt_tokens",
    "offline_finished_output_tokens",
    "credited_prompt_tokens",
    "credited_output_tokens",
    "prefilled_tokens",
    "recomputed_tokens",
    "preemptions",
    "evictions",
    "migrations",
    "pushbacks",
    "role_changes",
    "checkpoints",
    "restores",
    "cancelled",
    "failures",
    "lost",
    "rejected_online",
    "iterations",
    "mixed_iterations",
)

ROLES = ("relaxed", "strict", "unified")


class Reference(Relaxed, Strict, Unified, Iterations, Memory, Moves, Disruptions):
    """The cluster that ``simulator`` was built to be, before it has run; nothing is shared with it afterwards."""

    def __init__(self, simulator: Simulator) -> None:
        cluster = simulator.cluster
        world = cluster.world[0]
        assert world["now_s"] == 0 and world["noise_sigma"] == 0, "the reference starts at 0 and knows no noise"
        self.rules = dict(simulator.rules)
        self.knobs = world["knobs"].tolist()
        for name in ("max_batch_tokens", "max_seqs", "block_tokens", "chunk_tokens"):
            setattr(self, name, int(world[name]))
        for name in ("kv_bytes_per_token", "link_bytes_per_s", "link_latency_s", "host_bytes_per_s"):
            setattr(self, name, float(world[name]))
        for name in ("pull_interval_s", "measure_from_s", "measure_to_s"):
            setattr(self, name, float(world[name]))
        self.true_cost = cluster.costs[:, TRUE_COST].copy()
        self.scheduler_cost = cluster.costs[:, SCHEDULER_COST].copy()
        self.built_relaxed, self.built_strict = int(world["relaxed"]), int(world["strict"])
        self.instances = [
            Instance(i, ROLES[record["role"]], *(int(record[name]) for name in ("kv_blocks", "host_blocks")),
                     float(record["saturation_batch"]))
            for i, record in enumerate(cluster.instances)
        ]  # fmt: skip
        for i, instance in enumerate(self.instances):
            instance.becoming = instance.role
            if self.built_relaxed:  # (27) strict instance i starts with relaxed instance i mod R: after the one before
                instance.asked = i % self.built_relaxed - 1
        # (4)
        self.most_tokens = min(int(world["max_context_tokens"]), int(world["smallest_kv_blocks"]) * self.block_tokens)
        slo_s = world["slo_s"].tolist()[: int(world["slo_classes"])]
        self.tightest_tpot_s = min(tpot_s for _, tpot_s in slo_s)
        self.online: list[Request] = []
        columns = cluster.online[["arrival_s", "prompt", "output", "slo_class"]].tolist()
        for i, (arrival_s, prompt, output, slo_class) in enumerate(columns):
            self.online.append(Request(True, i, arrival_s, prompt, output, *slo_s[slo_class]))  # (34)
        self.next_online = 0
        jobs = (cluster.offline[name].tolist() for name in ("arrival_s", "prompt", "output"))
        self.backlog = Backlog(bool(world["endless"]), *jobs, self.most_tokens)
        self.disruptions: list[tuple[float, int, int]] = cluster.disruptions.tolist()  # in order
        self.role_change_s = math.inf  # when the next instance begins to change its role
        self.last_role_change_s = -math.inf
        self.offline_finish: list[tuple[float, Request]] = []
        self.routed_last = -1
        self.now = 0.0
        self.count: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.events: list[tuple[float, str, Request | None, int]] = []

    # --- events ---------------------------------------------------------------------------------------------------

    def run(self, until_s: float) -> None:
        while True:
            time, kind, index = min(self.next_events())
            if time > until_s:
                break
            self.now = time
            self.happen(kind, index)
        self.now = until_s

    def next_events(self) -> list[tuple[float, int, int]]:
        """(seconds, kind, instance) of the next event of every source; the kinds are in the order of (6)."""
        events = [(instance.due_s, 0, instance.index) for instance in self.instances]
        events += [(instance.link_end_s, 1, instance.index) for instance in self.instances]
        events += [(instance.restore_end_s, 2, instance.index) for instance in self.instances]
        if self.next_online < len(self.online):
            events.append((self.online[self.next_online].arrival_s, 3, 0))
        events.append((self.backlog.next_arrival_s, 4, 0))
        if self.disruptions:  # cancellations come before failures and recoveries in the list
            events.append((self.disruptions[0][0], 5, 0))
        events.append((self.role_change_s, 6, 0))
        return events

    def happen(self, kind: int, index: int) -> None:
        if kind == 0:
            self.decide(self.instances[index])
        elif kind == 1:
            self.transfer_end(self.instances[index])
        elif kind == 2:
            self.restore_end(self.instances[index])
        elif kind == 3:
            self.online_arrival(self.online[self.next_online])
        elif kind == 4:
            self.backlog.arrived += 1
            self.wake_takers()  # (32)
        elif kind == 5:
            self.disruption(*self.disruptions.pop(0)[1:])
        else:
            self.begin_role_change()

    def set_knobs(self, knobs: Sequence[float]) -> None:
        """(8) Idle instances are woken when a knob changes, or work that it lets in would wait beside them."""
        before, self.knobs = self.knobs, [float(value) for value in knobs]
        if self.knobs != before:
            self.plan_role_change(self.last_role_change_s)
            self.wake(self.instances)

    def log(self, kind: str, request: Request | None, instance: Instance) -> None:
        self.events.append((self.now, kind, request, instance.index))

    def wake(self, instances: Sequence[Instance]) -> None:
        """(5) An idle instance decides at this same instant."""
        for instance in instances:
            if instance.activity == "idle":
                instance.due_s = self.now

    # --- decisions ------------------------------------------------------------------------------------------------

    def decide(self, instance: Instance) -> None:
        """(9)"""
        doing, instance.activity, instance.due_s = instance.activity, "deciding", math.inf
        instance.stopped_at_head = False
        if doing == "idle":
            instance.last_iteration_s = 0.0  # (27)
            self.cancelled_leave(instance)
        elif instance.interrupted:
            self.after_interruption(instance)
        else:
            self.after_iteration(instance)
        self.pulls_leave(instance)
        if instance.draining and self.drained(instance):
            self.change_role(instance)
        if instance.role != "strict":
            self.start_restores(instance)
        {"relaxed": self.decide_relaxed, "strict": self.decide_strict, "unified": self.decide_unified}[instance.role](
            instance
        )
        if instance.activity == "deciding":
            instance.activity, instance.k = "idle", 0

    # --- results --------------------------------------------------------------------------------------------------

    def counters(self) -> dict[str, int]:
        """The integer counters of the kernel's world, at this time."""
        counts = {name: self.count[name] for name in COUNTERS}
        counts["rejected_offline"] = self.backlog.rejected
        counts["violations"] = sum(self.booked_violation_s(request) <= self.now for request in self.online)
        return counts

    def booked_violation_s(self, request: Request) -> float:
        """The first instant at which it is certain that the request violates; inf if it does not, or not yet."""
        first_by = request.arrival_s + request.ttft_slo_s
        if request.rejected:
            return math.inf
        if request.first_s > first_by:
            certain_s = first_by
        else:
            last_by = request.first_s + (request.output - 1) * request.tpot_slo_s
            certain_s = last_by if request.output > 1 and request.finish_s > last_by else math.inf
        return certain_s if certain_s <= request.gone_s else math.inf
