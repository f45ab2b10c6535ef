"""The mechanism of docs/specification.md in plain Python, one decode iteration at a time.

Numbers in brackets are sentences of the specification. Written for reading; the kernel is the fast one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from ooco_gym.cluster.control import GATE_BATCH, KV_RESERVE, PREEMPT_SLACK, PULL_KV, PULL_LENGTH, TPOT_BOUND
from ooco_gym.cluster.simulator import Simulator
from ooco_gym.roofline.cost import causal_pairs, decode_affine, iteration_s, layers_s, prefill_s
from tests.reference.model import Backlog, Instance, Request

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
    "rejected_online",
    "iterations",
)


class Reference:
    """The cluster that ``simulator`` was built to be, before it has run; nothing is shared with it afterwards."""

    def __init__(self, simulator: Simulator) -> None:
        cluster = simulator.cluster
        world = cluster.world[0]
        assert world["now_s"] == 0 and world["noise_sigma"] == 0, "the reference starts at 0 and knows no noise"
        self.rules = dict(simulator.rules)
        self.knobs = [float(value) for value in cluster.knobs]
        for name in ("max_batch_tokens", "max_seqs", "block_tokens"):
            setattr(self, name, int(world[name]))
        for name in ("kv_bytes_per_token", "link_bytes_per_s", "link_latency_s", "ttft_slo_s", "tpot_slo_s"):
            setattr(self, name, float(world[name]))
        for name in ("pull_interval_s", "measure_from_s", "measure_to_s"):
            setattr(self, name, float(world[name]))
        self.true_cost, self.scheduler_cost = cluster.true_cost.copy(), cluster.scheduler_cost.copy()
        relaxed = int(world["relaxed"])
        self.instances = [
            Instance(i, i >= relaxed, int(record["kv_blocks"]), float(record["saturation_batch"]))
            for i, record in enumerate(cluster.instances)
        ]
        self.relaxed, self.strict = self.instances[:relaxed], self.instances[relaxed:]
        for i, instance in enumerate(self.instances):
            instance.asked = i  # (27) strict instance i starts with relaxed instance i mod R
        self.most_tokens = min(instance.kv_blocks for instance in self.instances) * self.block_tokens
        columns = (cluster.online_arrival_s, cluster.online_prompt, cluster.online_output)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        self.online = [Request(True, i, *row) for i, row in enumerate(rows)]
        self.next_online = 0
        jobs = (cluster.offline_arrival_s, cluster.offline_prompt, cluster.offline_output)
        self.backlog = Backlog(bool(world["endless"]), *(job.tolist() for job in jobs), self.most_tokens)
        self.offline_finish: list[tuple[float, Request]] = []
        self.routings = 0
        self.now = 0.0
        self.count: Counter[str] = Counter()
        self.seconds: Counter[str] = Counter()
        self.events: list[tuple[float, str, Request | None, int]] = []

    # --- the loop -------------------------------------------------------------------------------------------------

    def run(self, until_s: float) -> None:
        while True:
            # (6) at equal times: iteration ends and wake-ups, transfer ends, online arrivals, offline arrivals
            due = [(instance.due_s, 0, instance.index) for instance in self.instances]
            due += [(instance.link_end_s, 1, instance.index) for instance in self.instances]
            if self.next_online < len(self.online):
                due.append((self.online[self.next_online].arrival_s, 2, 0))
            due.append((self.backlog.next_arrival_s, 3, 0))
            time, kind, index = min(due)
            if time > until_s:
                break
            self.now = time
            if kind == 0:
                self.decide(self.instances[index])
            elif kind == 1:
                self.transfer_end(self.instances[index])
            elif kind == 2:
                self.online_arrival(self.online[self.next_online])
            else:
                self.backlog.arrived += 1
                self.wake(self.relaxed)  # (32)
        self.now = until_s

    def set_knobs(self, knobs: Sequence[float]) -> None:
        """(8) Idle instances are woken when a knob changes, or work that it lets in would wait beside them."""
        before, self.knobs = self.knobs, [float(value) for value in knobs]
        if self.knobs != before:
            self.wake(self.instances)

    def log(self, kind: str, request: Request | None, instance: Instance) -> None:
        self.events.append((self.now, kind, request, instance.index))

    def wake(self, instances: Sequence[Instance]) -> None:
        """(5) An idle instance decides at this same instant."""
        for instance in instances:
            if instance.activity == "idle":
                instance.due_s = self.now

    def decide(self, instance: Instance) -> None:
        doing, instance.activity, instance.due_s = instance.activity, "deciding", math.inf
        if doing == "decode":
            self.after_decode(instance)
        elif doing == "prefill" and instance.interrupted:
            self.after_interruption(instance)
        elif doing == "prefill":
            self.after_prefill(instance)
        else:
            instance.last_iteration_s = 0.0  # (27)
        if instance.strict:
            self.decide_strict(instance)
        else:
            self.decide_relaxed(instance)
        if instance.activity == "deciding":
            instance.activity, instance.batch = "idle", []

    # --- tokens and KV --------------------------------------------------------------------------------------------

    def blocks(self, tokens: int) -> int:
        return math.ceil(tokens / self.block_tokens)  # (1)

    def emit(self, request: Request, instance: Instance) -> bool:
        """One more token; True if it was the last, when the request finishes and frees its KV."""
        request.computed = max(request.computed, request.context)
        request.generated += 1
        request.token_s.append(self.now)
        if not request.online:
            self.count["credited_output_tokens"] += 1
        elif request.generated == 1:
            self.log("first token", request, instance)
        if request.generated < request.output:
            return False
        self.log("finish", request, instance)
        del instance.kv[request]
        if request in instance.residents:
            self.depart(request, instance)
        if request.online:
            self.count["online_finished"] += 1
        else:
            self.offline_finish.append((self.now, request))
            if self.measure_from_s < self.now <= self.measure_to_s:
                self.count["offline_finished"] += 1
                self.count["offline_finished_prompt_tokens"] += request.prompt
                self.count["offline_finished_output_tokens"] += request.output
        return True

    def join(self, request: Request, instance: Instance) -> None:
        instance.residents.append(request)
        instance.k = 0  # (24) the residents change

    def depart(self, request: Request, instance: Instance) -> None:
        instance.residents.remove(request)
        instance.k = 0

    def evict(self, request: Request, instance: Instance) -> None:
        """(31)"""
        where = "strict" if instance.strict else "relaxed"
        what = "held" if request in instance.held else "online" if request.online else "offline"
        self.log(f"eviction of {what} ({where})", request, instance)
        self.count["evictions"] += 1
        del instance.kv[request]
        if request in instance.residents:
            self.depart(request, instance)
        else:
            instance.held.remove(request)
            for target in self.strict:
                if any(entry[0] is request for entry in target.inbound_offline):
                    target.inbound_offline = [e for e in target.inbound_offline if e[0] is not request]
                    self.wake([target])  # the next of the queue may fit
        if request.online:
            self.route(request, at_head=True)
        else:
            self.backlog.requeued.insert(0, request)
            self.wake(self.relaxed)

    def after_decode(self, instance: Instance) -> None:
        """(9a)"""
        instance.last_iteration_s = instance.duration_s
        self.seconds["busy_s"] += self.now - instance.start_s
        self.count["iterations"] += 1
        growing = [request for request in instance.batch if not self.emit(request, instance)]
        while True:  # (26)
            growing = [request for request in growing if request in instance.residents]
            needed = sum(self.blocks(request.context) - instance.kv[request] for request in growing)
            if needed <= instance.free:
                break
            offline = [request for request in instance.residents if not request.online]
            offline_first = self.rules["eviction"] == "offline_first" and offline
            self.evict((offline if offline_first else instance.residents)[-1], instance)
        for request in growing:
            instance.kv[request] = self.blocks(request.context)
        instance.batch = growing

    def start_decode(self, instance: Instance, batch: list[Request]) -> None:
        """(24)"""
        if instance.k == 0 or batch != instance.batch:
            c0, c1 = decode_affine(self.true_cost[instance.index], float(len(batch)))
            context = sum(request.context for request in batch)
            instance.anchor, instance.k = (self.now, c0 + c1 * context, c1, len(batch)), 0
            self.log("decode batch", None, instance)
        instance.k += 1
        anchor_s, first_s, c1, size = instance.anchor
        k = instance.k
        instance.activity, instance.batch, instance.start_s = "decode", list(batch), self.now
        instance.due_s = anchor_s + (k * first_s + c1 * size * (0.5 * k * (k - 1)))
        instance.duration_s = first_s + c1 * size * (k - 1)

    # --- a relaxed instance ---------------------------------------------------------------------------------------

    def decide_relaxed(self, instance: Instance) -> None:
        leaving, instance.leaving = instance.leaving, []
        for request, puller in sorted(leaving, key=lambda pull: pull[1].index):  # (9c, 29)
            if request in instance.residents and self.blocks(request.context) <= puller.free:
                self.depart(request, instance)
                self.count["migrations"] += 1
                self.start_transfer(request, instance, puller)
            else:
                self.log("pull off", request, instance)
                puller.pulled = None
        if self.rules["prefill_order"] == "online_first":  # (10)
            batch = self.online_batch(instance)
            instance.offline_prefill = not batch
            batch = batch or self.offline_batch(instance)
        else:
            batch = self.fcfs_batch(instance)
        if batch:
            instance.k = 0
            self.start_prefill(instance, batch)
        elif instance.residents:
            self.start_decode(instance, instance.residents)
        else:
            instance.k = 0

    def has_place(self, batch: list[Request], request: Request) -> bool:
        tokens = sum(member.context for member in batch) + request.context
        return not batch or (len(batch) < self.max_seqs and tokens <= self.max_batch_tokens)  # (11)

    def gate_open(self, instance: Instance, batch: list[Request]) -> bool:
        """(12) All offline KV on a relaxed instance that decides is resident, on its way out, or of this batch."""
        members = sum(not request.online for request in instance.kv)
        if self.rules["prefill_order"] == "fcfs":  # (13)
            members += sum(request.online for request in batch)
        if members < self.knobs[GATE_BATCH] * instance.saturation_batch:
            return True
        self.log("gate closed", None, instance)
        return False

    def offered(self) -> Request | None:
        return self.backlog.head() if self.rules["admission"] == "gate" else None

    def take_offline(self) -> Request:
        """Another request is at the head of the backlog now, which may fit where this one did not."""
        self.wake(self.relaxed)
        return self.backlog.take(self.now)

    def online_batch(self, instance: Instance) -> list[Request]:
        """(11)"""
        batch: list[Request] = []
        while instance.waiting and self.has_place(batch, instance.waiting[0]):
            need = self.blocks(instance.waiting[0].context + 1)
            while need > instance.free and self.rules["eviction"] == "offline_first":
                held = [request for request in instance.held if not request.online]
                if not instance.residents and not held:
                    break
                self.evict((instance.residents or held)[-1], instance)
            if need > instance.free:
                self.log("no KV for online prefill", instance.waiting[0], instance)
                break
            batch.append(instance.waiting.pop(0))
            instance.kv[batch[-1]] = need
        return batch

    def offline_batch(self, instance: Instance) -> list[Request]:
        """(12)"""
        batch: list[Request] = []
        while (request := self.offered()) and self.gate_open(instance, batch) and self.has_place(batch, request):
            need = self.blocks(request.context + 1)
            if instance.used + need > (1 - self.knobs[KV_RESERVE]) * instance.kv_blocks:
                self.log("no KV for offline prefill", request, instance)
                break
            batch.append(self.take_offline())
            instance.kv[batch[-1]] = need
        return batch

    def fcfs_batch(self, instance: Instance) -> list[Request]:
        """(13)"""
        batch: list[Request] = []
        while True:
            online = instance.waiting[0] if instance.waiting else None
            offline = self.offered()
            offline = offline if self.gate_open(instance, batch) else None
            if offline and (online is None or offline.arrival_s < online.arrival_s):
                request = offline
            elif online:
                request = online
            else:
                return batch
            need = self.blocks(request.context + 1)
            if not self.has_place(batch, request) or need > instance.free:
                return batch
            if request is offline:
                self.take_offline()
            else:
                instance.waiting.pop(0)
            batch.append(request)
            instance.kv[request] = need

    def start_prefill(self, instance: Instance, batch: list[Request]) -> None:
        tokens = [float(request.context) for request in batch]
        shape = (sum(tokens), sum(causal_pairs(n, 0.0) for n in tokens), sum(n * n for n in tokens), sum(tokens))
        true, scheduler = self.true_cost[instance.index], self.scheduler_cost[instance.index]
        instance.activity, instance.batch, instance.start_s = "prefill", batch, self.now
        instance.interrupted = False
        instance.due_s = self.now + iteration_s(true, *shape, float(len(batch)), 0.0, 0.0, 0.0)
        instance.predicted_end_s = self.now + iteration_s(scheduler, *shape, float(len(batch)), 0.0, 0.0, 0.0)
        instance.layers = float(true["layers"])
        instance.layer_s = layers_s(true, *shape, 0.0, 0.0, 0.0) / instance.layers
        for request in batch:
            self.log("prefill start", request, instance)

    def after_prefill(self, instance: Instance) -> None:
        """(15, 16, 18)"""
        self.count["iterations"] += 1
        batch_s = self.now - instance.start_s
        self.seconds["busy_s"] += batch_s
        tokens = sum(request.context for request in instance.batch)
        again = sum(min(request.computed, request.context) for request in instance.batch)
        self.count["prefilled_tokens"] += tokens
        self.count["recomputed_tokens"] += again
        self.seconds["recompute_s"] += batch_s * again / tokens
        batch, instance.batch = instance.batch, []
        for request in batch:
            self.log("prefill end", request, instance)
            if not request.online and request.computed == 0:
                self.count["credited_prompt_tokens"] += request.prompt
            if self.emit(request, instance):
                continue
            if request.online or self.rules["offline_decode"] == "strict":
                self.hand_over(request, instance)
            else:
                self.join(request, instance)

    def hand_over(self, request: Request, source: Instance) -> None:
        """(17)"""
        everything = not request.online or self.rules["placement"] == "least_kv"
        target = min(self.strict, key=lambda instance: (instance.share(everything), instance.index))
        online_queue = request.online or self.rules["prefill_order"] == "fcfs"
        before = target.inbound_online if online_queue else target.inbound_online + target.inbound_offline
        if not before and self.blocks(request.context) <= target.free:
            self.start_transfer(request, source, target)
        else:
            self.log("held", request, source)
            source.held.append(request)
            (target.inbound_online if online_queue else target.inbound_offline).append((request, source))
            self.wake([target])

    # --- routing and preemption -----------------------------------------------------------------------------------

    def online_arrival(self, request: Request) -> None:
        self.next_online += 1
        if request.prompt + request.output > self.most_tokens:  # (4)
            request.rejected = True
            self.count["rejected_online"] += 1
            self.events.append((self.now, "rejected", request, -1))
            return
        self.preempt(self.route(request, at_head=False))

    def pending_s(self, instance: Instance) -> float:
        running = [request for request in instance.batch if request.online]
        cost = self.scheduler_cost[instance.index]
        units = [math.floor(prefill_s(cost, float(request.context)) * 2**40) for request in instance.waiting + running]
        return sum(units) / 2**40  # whole units of 2^-40 s, so that equal loads are ties

    def route(self, request: Request, at_head: bool) -> Instance:
        """(19)"""
        if self.rules["routing"] == "round_robin":
            instance = self.relaxed[self.routings % len(self.relaxed)]
        else:
            instance = min(self.relaxed, key=lambda candidate: (self.pending_s(candidate), candidate.index))
        self.routings += 1
        instance.waiting.insert(0 if at_head else len(instance.waiting), request)
        self.wake([instance])
        return instance

    def preempt(self, instance: Instance) -> None:
        """(20)"""
        if self.rules["preemption"] != "layer" or instance.activity != "prefill":
            return
        if not instance.offline_prefill or instance.interrupted:
            return
        left_s = max(instance.predicted_end_s - self.now, 0.0)
        if left_s + self.pending_s(instance) > self.knobs[PREEMPT_SLACK] * self.ttft_slo_s:
            layer = math.ceil((self.now - instance.start_s) / instance.layer_s)
            if layer < instance.layers:
                instance.interrupted = True
                instance.due_s = instance.start_s + layer * instance.layer_s
                self.log("preemption", None, instance)

    def after_interruption(self, instance: Instance) -> None:
        """(21)"""
        self.count["preemptions"] += 1
        self.seconds["busy_s"] += self.now - instance.start_s
        self.seconds["interrupted_s"] += self.now - instance.start_s
        for request in instance.batch:
            del instance.kv[request]
            self.log("interrupted", request, instance)
        self.backlog.requeued[:0] = instance.batch
        instance.batch = []
        self.wake(self.relaxed)

    # --- a strict instance ----------------------------------------------------------------------------------------

    def decide_strict(self, instance: Instance) -> None:
        """(22)"""
        self.start_waiting(instance)
        self.pull(instance)
        batch = self.select(instance)
        if batch:
            self.start_decode(instance, batch)
        else:
            instance.k = 0
            if self.rules["migration"] != "none":
                instance.due_s = max(instance.next_pull_s, self.now + self.pull_interval_s)

    def start_waiting(self, instance: Instance) -> None:
        """(25)"""
        for queue in (instance.inbound_online, instance.inbound_offline):
            while queue:
                request, source = queue[0]
                need = self.blocks(request.context)
                if request.online and self.rules["eviction"] == "offline_first":
                    while need > instance.free:
                        offline = [resident for resident in instance.residents if not resident.online]
                        if not offline:
                            break
                        self.evict(offline[-1], instance)
                if need > instance.free:
                    break
                queue.pop(0)
                source.held.remove(request)
                self.start_transfer(request, source, instance)

    def pull(self, instance: Instance) -> None:
        """(27)"""
        bound_s = self.knobs[TPOT_BOUND] * self.tpot_slo_s
        if (
            self.rules["migration"] == "none"
            or instance.pulled is not None
            or self.now < instance.next_pull_s
            or instance.used >= self.knobs[PULL_KV] * instance.kv_blocks
            or instance.last_iteration_s >= 0.9 / 0.98 * bound_s
        ):
            return
        source = self.relaxed[instance.asked % len(self.relaxed)]
        instance.asked += 1
        instance.next_pull_s = self.now + self.pull_interval_s
        batch = [request for request in instance.batch if request in instance.residents]
        context = sum(request.context for request in batch)
        left = max(math.ceil(instance.saturation_batch) - len(batch), 1)
        free = instance.free * self.block_tokens
        c0, c1 = decode_affine(self.scheduler_cost[instance.index], float(len(batch) + left))
        length = math.floor(min(free // left, (bound_s / 0.98 - c0 - c1 * context) / (c1 * left)))
        leaving = [request for request, _ in source.leaving]
        candidates = [
            request
            for request in source.residents
            if not request.online and request not in leaving and request.context <= free
        ]
        if length < 1 or not candidates:
            return
        if self.rules["migration"] == "longest":
            granted = max(candidates, key=lambda request: request.context)  # the first of equals
        else:
            wanted = self.knobs[PULL_LENGTH] * length
            granted = min(candidates, key=lambda request: abs(request.context - wanted))
        self.log("pull granted", granted, instance)
        instance.pulled = granted
        source.leaving.append((granted, instance))
        self.wake([source])  # (28)

    def select(self, instance: Instance) -> list[Request]:
        """(23)"""
        online = [request for request in instance.residents if request.online]
        offline = [request for request in instance.residents if not request.online]
        rule = self.rules["mix_selection"]
        if rule == "all":
            return online + offline
        selected: list[Request] = []
        context = 0
        for request in online + offline:
            context += request.context
            if rule == "exact" or (len(selected) + 1) % 3 == 0:
                c0, c1 = decode_affine(self.scheduler_cost[instance.index], float(len(selected) + 1))
                if c0 + c1 * context > self.knobs[TPOT_BOUND] * self.tpot_slo_s:
                    self.log("paused", request, instance)
                    break
            selected.append(request)
        return selected

    # --- transfers ------------------------------------------------------------------------------------------------

    def start_transfer(self, request: Request, source: Instance, target: Instance) -> None:
        """(30)"""
        self.log("transfer start", request, source)
        target.kv[request] = self.blocks(request.context)
        source.link.append((request, target))
        if len(source.link) == 1:
            self.next_on_link(source)

    def next_on_link(self, source: Instance) -> None:
        source.link_end_s = math.inf
        if source.link:
            size = (source.link[0][0].context - 1) * self.kv_bytes_per_token
            source.link_end_s = self.now + (self.link_latency_s + size / self.link_bytes_per_s)

    def transfer_end(self, source: Instance) -> None:
        request, target = source.link.pop(0)
        self.next_on_link(source)
        self.log("transfer end", request, target)
        del source.kv[request]
        self.join(request, target)
        if target.pulled is request:
            target.pulled = None
        self.wake([source, target])

    # --- results --------------------------------------------------------------------------------------------------

    def counters(self) -> dict[str, int]:
        """The integer counters of the kernel's world, at this time."""
        counts = {name: self.count[name] for name in COUNTERS}
        counts["rejected_offline"] = self.backlog.rejected
        counts["violations"] = sum(self.booked_violation_s(request) <= self.now for request in self.online)
        return counts

    def booked_violation_s(self, request: Request) -> float:
        """The first instant at which it is certain that the request violates; inf if it does not, or not yet."""
        first_by = request.arrival_s + self.ttft_slo_s
        if request.rejected:
            return math.inf
        if request.first_s > first_by:
            return first_by
        last_by = request.first_s + (request.output - 1) * self.tpot_slo_s
        return last_by if request.output > 1 and request.finish_s > last_by else math.inf
