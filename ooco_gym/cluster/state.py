"""The typed state of a simulated cluster: every array, field, unit and owner, declared in this one place.

A cluster is a handful of arrays of records. Nothing else holds state, so copying them is a snapshot, and a
compiled function sees named fields instead of positions.

Requests in flight live in recycled *slots*; lists of slots are intrusive (``next``/``prev`` in the slot), so a list
has no capacity and every list operation is O(1). What must outlive a request (its token times) is written to
arrays over all online requests.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ooco_gym.cluster.control import KNOB_COUNT, RULE_NAMES
from ooco_gym.cluster.handle import HandleType, register, table
from ooco_gym.roofline import COST
from ooco_gym.specs import MOST_CLASSES

# Roles of an instance.
RELAXED, STRICT, UNIFIED = 0, 1, 2

# What an instance is doing. DECODING covers mixed iterations: a run of one iteration with prefill pieces in BATCH.
IDLE, DECODING, PREFILLING_ONLINE, PREFILLING_OFFLINE, DOWN = 0, 1, 2, 3, 4

# Lists of slots kept per instance; rows of ``Cluster.lists``. The last row belongs to the whole cluster.
WAITING = 0  # online requests waiting for prefill here, first come first served
BATCH = 1  # members of the running prefill, or prefill pieces of the running mixed iteration
ONLINE_DECODES = 2  # resident online decodes, in order of arrival here
OFFLINE_DECODES = 3  # resident offline decodes, in order of arrival here
INBOUND_ONLINE = 4  # hand-overs to this instance that wait for room, KV held at their source
INBOUND_OFFLINE = 5
LINK = 6  # transfers queued on this instance's outgoing link; the head is on the wire
PARTIAL_ONLINE = 7  # prefills that have begun and are in no running batch
PARTIAL_OFFLINE = 8
CHECKPOINTS = 9  # evicted offline requests whose KV waits in this instance's host memory
RESTORES = 10  # on the host link; the head is on the wire
LIST_COUNT = 11
# The cluster-wide row.
FREE = 0  # unused slots
REQUEUED = 1  # offline work that lost its KV, served before the backlog

# Life of a slot.
UNUSED, QUEUED, PREFILL, HELD, TRANSFER, RESIDENT, PARTIAL, CHECKPOINT, RESTORE = 0, 1, 2, 3, 4, 5, 6, 7, 8

NONE = -1
UNKNOWN = -(1 << 62)

#: Histogram of time between tokens: bins 1 % wide from 0.1 ms; the last bin takes the rest.
TBT_BINS = 1600
TBT_FIRST_S = 1e-4
TBT_RATIO = 1.01


WORLD = np.dtype(
    [
        # clock and counts, owned by the event loop
        ("now_s", np.float64),
        ("acting", np.int64),  # source of the event that is running
        ("instances", np.int64),
        ("relaxed", np.int64),  # as configured; roles may change
        ("strict", np.int64),
        ("slots", np.int64),
        ("events", np.int64),
        ("iterations", np.int64),  # logical iterations: what an iteration-by-iteration simulator would execute
        ("logged", np.int64),  # entries of the event log in use
        ("sequence", np.int64),  # total order of joins; ties and "newest" are decided by it
        # deployment, constant in an episode
        ("max_batch_tokens", np.int64),
        ("max_seqs", np.int64),
        ("block_tokens", np.int64),
        ("chunk_tokens", np.int64),  # token budget of a unified instance's iteration
        ("max_context_tokens", np.int64),
        ("smallest_kv_blocks", np.int64),
        ("kv_bytes_per_token", np.float64),
        ("link_bytes_per_s", np.float64),
        ("link_latency_s", np.float64),
        ("host_bytes_per_s", np.float64),
        ("slo_classes", np.int64),
        ("slo_s", np.float64, (MOST_CLASSES, 2)),  # TTFT and TPOT objective of each class
        ("tightest_tpot_s", np.float64),
        ("pull_interval_s", np.float64),
        ("noise_sigma", np.float64),
        ("noise_seed", np.uint64),
        ("knobs", np.float64, (KNOB_COUNT,)),
        ("measure_from_s", np.float64),
        ("measure_to_s", np.float64),
        # online source
        ("online_requests", np.int64),
        ("next_online", np.int64),
        ("ttft_cursor", np.int64, (MOST_CLASSES,)),  # first request whose TTFT deadline has not been judged, by class
        ("routed_last", np.int64),  # instance chosen by the last routing
        ("timer_count", np.int64),  # size of the heap of TPOT deadlines
        ("next_disruption", np.int64),
        ("role_change_s", np.float64),  # when the last role change began
        ("refusals", np.int64),  # instances whose ``head_refused`` is 1
        # offline source
        ("endless", np.int64),
        ("offline_jobs", np.int64),  # rows of the length table
        ("offline_arrived", np.int64),
        ("offline_taken", np.int64),
        ("offline_head_s", np.float64),  # since when the job at the head of the backlog has been on offer
        # counters, only ever increased
        ("rejected_online", np.int64),
        ("rejected_offline", np.int64),
        ("online_finished", np.int64),
        ("offline_finished", np.int64),
        ("offline_finished_prompt_tokens", np.int64),
        ("offline_finished_output_tokens", np.int64),
        ("credited_prompt_tokens", np.int64),  # offline prompt tokens prefilled for the first time
        ("credited_output_tokens", np.int64),  # offline output tokens emitted
        ("prefilled_tokens", np.int64),
        ("recomputed_tokens", np.int64),
        ("violations", np.int64),
        ("preemptions", np.int64),
        ("evictions", np.int64),
        ("migrations", np.int64),
        ("pushbacks", np.int64),
        ("role_changes", np.int64),
        ("checkpoints", np.int64),
        ("restores", np.int64),
        ("cancelled", np.int64),
        ("failures", np.int64),
        ("lost", np.int64),  # requests that lost their KV to a failure
        ("mixed_iterations", np.int64),
        ("interrupted_s", np.float64),  # instance seconds thrown away by preemption
        ("recompute_s", np.float64),  # instance seconds spent on prefilling tokens again
        ("busy_s", np.float64),
        ("offline_prompt_sum", np.int64),  # of all requests taken from the job list
        ("offline_output_sum", np.int64),  # of all that finished
        ("offline_output_count", np.int64),
        ("tbt", np.int64, (TBT_BINS,)),
    ]
    + [(f"rule_{name}", np.int64) for name in RULE_NAMES]
)

INSTANCE = np.dtype(
    [
        # What others look at when they choose among instances: together, so that a look costs one line of the cache.
        ("role", np.int64),
        ("becoming", np.int64),  # the role it drains for; its role when it does not
        ("activity", np.int64),
        ("pending_s", np.float64),  # predicted prefill seconds of online requests waiting or running; exact sums
        # KV cache in blocks; both counts include reservations for transfers on their way
        ("kv_blocks", np.int64),
        ("used_blocks", np.int64),
        ("online_blocks", np.int64),
        ("pulled_slot", np.int64),  # the decode it pulls, from its choice until it has arrived
        ("saturation_batch", np.float64),
        # decode batch: the selected prefix of ONLINE_DECODES followed by OFFLINE_DECODES
        ("selected_online", np.int64),
        ("selected_offline", np.int64),
        ("context_online", np.int64),  # sum of contexts of the selected, tokens
        ("context_offline", np.int64),
        ("steps", np.int64),  # decode iterations accounted so far; the clock of the completion heap
        ("heap_size", np.int64),
        ("class_decodes", np.int64, (MOST_CLASSES,)),  # online decodes resident, by SLO class
        ("changed", np.int64),  # residents or selection differ from the batch at the anchor
        ("grown", np.int64),  # the selected hold the block of their next token
        # the run of unchanged iterations: iteration k ends at the closed form from the anchor
        ("anchor_s", np.float64),
        ("anchor_batch", np.int64),
        ("anchor_context", np.int64),
        ("c0_s", np.float64),
        ("c1_s", np.float64),
        ("done", np.int64),  # iterations since the anchor that are accounted
        ("run_end", np.int64),  # iteration since the anchor after which the next decision is due
        ("last_iteration_s", np.float64),
        ("batches", np.uint64),  # counter that keys the noise of each batch
        # running prefill
        ("start_s", np.float64),
        ("end_s", np.float64),
        ("layers_s", np.float64),
        ("layer_count", np.float64),
        ("predicted_end_s", np.float64),
        ("interrupted", np.int64),
        # prefill pieces of the running iteration: what the cost model and the accounts need of them
        ("piece_tokens", np.int64),
        ("piece_offline_tokens", np.int64),
        ("online_pieces", np.int64),
        ("piece_recomputed", np.int64),
        ("piece_causal", np.float64),
        ("piece_full", np.float64),
        ("piece_kv", np.int64),
        ("longest", np.int64),  # longest selected context less ``steps``; UNKNOWN when it must be looked up
        ("head_refused", np.int64),  # the last decision stopped at the head of the backlog: it did not fit
        ("offline_here", np.int64),  # offline requests that hold KV here, in whatever state
        ("incoming", np.int64),  # transfers on their way to this instance
        ("cancelled", np.int64),  # residents that leave at the next decision
        # host memory
        ("host_blocks", np.int64),
        ("host_used", np.int64),
        # pull
        ("next_pull_s", np.float64),
        ("granted", np.int64),  # residents here that leave at the next boundary
        ("pull_cursor", np.int64),  # instance asked last
        # pushback
        ("next_push_s", np.float64),
        ("pushed_slot", np.int64),
    ]
)

SLOT = np.dtype(
    [
        ("next", np.int64),
        ("prev", np.int64),
        ("phase", np.int64),  # UNUSED .. RESIDENT
        ("online", np.int64),  # index of the online request, NONE for offline work
        ("serial", np.int64),  # of an offline request: its place in the order in which the backlog gave them out
        ("prompt", np.int64),
        ("output", np.int64),
        ("context", np.int64),  # prompt + generated tokens; of a selected decode: context - steps at selection
        ("selected", np.int64),
        ("heap_at", np.int64),
        ("blocks", np.int64),  # KV blocks held at ``instance`` while not selected
        ("instance", np.int64),
        ("target", np.int64),  # destination of a hand-over or pull
        ("queue", np.int64),  # which of the target's inbound queues it waits in
        ("leaving", np.int64),  # a pull was granted; leaves at the next boundary
        ("done", np.int64),  # tokens of the running prefill whose KV is there
        ("piece", np.int64),  # tokens of it in the running iteration
        ("credited", np.int64),  # prompt tokens credited to the reward
        ("computed", np.int64),  # high-water mark of tokens whose KV was computed
        ("cancelled", np.int64),
        ("order", np.int64),
        ("arrival_s", np.float64),
        ("last_token_s", np.float64),
        ("estimate_s", np.float64),  # predicted prefill seconds, as counted in ``pending_s``
    ]
)

#: One second of history; the ring is indexed by floor(time).
SECOND = np.dtype(
    [
        ("second", np.int64),
        ("arrivals", np.int64),
        ("prefill_s", np.float64),
        ("prompt_tokens", np.int64),
        ("finished", np.int64),
        ("output_tokens", np.int64),
        ("violations", np.int64),
    ]
)
RING_SECONDS = 512

#: An online request over the whole episode: what it asks for and when its tokens came.
ONLINE = np.dtype(
    [
        ("arrival_s", np.float64),
        ("first_s", np.float64),  # first token; inf until then, nan when rejected
        ("finish_s", np.float64),  # last token; inf until then
        ("gone_s", np.float64),  # when its client went away before it finished; else inf
        ("prompt", np.int64),
        ("output", np.int64),
        ("slo_class", np.int64),
        ("slot", np.int64),  # while in flight, else NONE
    ]
)

#: A row of the offline job list, or of the length table of an endless backlog, where nothing arrives.
OFFLINE = np.dtype([("arrival_s", np.float64), ("prompt", np.int64), ("output", np.int64)])

#: A node of the tournament of event sources: its winner; the first records also hold the time of each source.
EVENT = np.dtype([("time_s", np.float64), ("winner", np.int64)])

#: An entry of an instance's heap of completions: what a search over a decode batch needs lies side by side.
COMPLETION = np.dtype([("step", np.int64), ("context", np.int64), ("slot", np.int64)])

#: An entry of the heap of TPOT deadlines.
TIMER = np.dtype([("time_s", np.float64), ("request", np.int64)])

#: What goes wrong and when: a client goes away, an instance fails or recovers.
CANCEL, FAIL, RECOVER = 0, 1, 2
DISRUPTION = np.dtype([("time_s", np.float64), ("kind", np.int64), ("index", np.int64)])

#: An entry of the event log; what the numbers mean depends on the kind (log.py).
LOG = np.dtype(
    [
        ("time_s", np.float64),
        ("kind", np.int64),
        ("instance", np.int64),  # NONE where there is none
        ("offline", np.int64),  # class of the request
        ("request", np.int64),  # row of an online request, serial number of an offline one; NONE where there is none
        ("a", np.int64),
        ("b", np.int64),
        ("d", np.int64),
        ("seconds", np.float64),
    ]
)

# Columns of ``Cluster.costs``.
TRUE_COST, SCHEDULER_COST = 0, 1


_FIELDS = (
    ("world", WORLD, 1),  # [1]
    ("instances", INSTANCE, 1),  # [I]
    ("slots", SLOT, 1),  # [S]
    ("lists", np.dtype(np.int64), 3),  # [I + 1, LIST_COUNT, 3] head, tail, length
    ("heaps", COMPLETION, 2),  # [I, S] the selected, keyed by their finishing step
    ("block_phase", np.dtype(np.int64), 3),  # [I, 2, block_tokens] selected, by class and (context - steps) % block
    ("queue", EVENT, 1),  # [2 P] next event of each source, and the tournament over them
    ("costs", COST, 2),  # [I, 2] what times an instance, what schedulers predict with
    ("online", ONLINE, 1),  # [N]
    ("offline", OFFLINE, 1),  # [J]
    ("timers", TIMER, 1),  # [N + 1] heap of TPOT deadlines of requests whose TTFT was met
    ("disruptions", DISRUPTION, 1),  # [D] in order
    ("ring", SECOND, 1),  # [RING_SECONDS]
    ("log", LOG, 1),  # [L], empty while the log is off
)


class Cluster:
    """Every array of one simulated cluster, by name. I instances, S slots, N online requests, J offline jobs."""

    FIELDS = tuple(name for name, _, _ in _FIELDS)
    world: npt.NDArray[np.void]
    instances: npt.NDArray[np.void]
    slots: npt.NDArray[np.void]
    lists: npt.NDArray[np.int64]
    heaps: npt.NDArray[np.void]
    block_phase: npt.NDArray[np.int64]
    queue: npt.NDArray[np.void]
    costs: npt.NDArray[np.void]
    online: npt.NDArray[np.void]
    offline: npt.NDArray[np.void]
    timers: npt.NDArray[np.void]
    disruptions: npt.NDArray[np.void]
    ring: npt.NDArray[np.void]
    log: npt.NDArray[np.void]

    def __init__(self, **arrays: npt.NDArray[Any]) -> None:
        for name, dtype, ndim in _FIELDS:
            array = arrays[name]
            assert (array.dtype, array.ndim) == (dtype, ndim), f"{name} is {array.dtype} [{array.ndim}]"
            setattr(self, name, array)
        self._table = table([arrays[name] for name in self.FIELDS])
        self.address = int(self._table.ctypes.data)  # what compiled code gets

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made from the arrays: an address means nothing elsewhere."""
        return _from_arrays, ({name: getattr(self, name) for name in self.FIELDS},)

    def replace(self, **arrays: npt.NDArray[Any]) -> Cluster:
        """The same cluster with some arrays exchanged."""
        return Cluster(**{**{name: getattr(self, name) for name in self.FIELDS}, **arrays})


def _from_arrays(arrays: dict[str, npt.NDArray[Any]]) -> Cluster:
    return Cluster(**arrays)


cluster_at = register(HandleType("Cluster", _FIELDS), Cluster)
