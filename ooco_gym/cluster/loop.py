"""The event loop: one compiled call advances any number of clusters, each to its own time."""

from __future__ import annotations

import math

from ooco_gym._jit import entry_point, kernel
from ooco_gym.cluster import lists
from ooco_gym.cluster.backlog import fits_anywhere, fresh_slot
from ooco_gym.cluster.control import KNOB_COUNT, PREEMPT_SLACK
from ooco_gym.cluster.decode import end_iteration
from ooco_gym.cluster.faults import cancel, fail, recover
from ooco_gym.cluster.lists import pop_front
from ooco_gym.cluster.log import ARRIVAL, REJECTED, note
from ooco_gym.cluster.prefill import complete_prefill, interrupt_at_layer
from ooco_gym.cluster.queues import (
    CLUSTER_SOURCES,
    DISRUPTION,
    OFFLINE_ARRIVAL,
    ONLINE_ARRIVAL,
    cluster_source,
    next_source,
    schedule,
    timer_pop,
)
from ooco_gym.cluster.relaxed import choose_relaxed
from ooco_gym.cluster.residents import drop_cancelled, enqueue_online, ring_second, wake, wake_takers
from ooco_gym.cluster.restore import restore_end
from ooco_gym.cluster.roles import begin_role_change, change_role_if_drained, consider_roles
from ooco_gym.cluster.rules import ITERATION
from ooco_gym.cluster.run import advance_to_time
from ooco_gym.cluster.state import (
    CANCEL,
    DECODING,
    FAIL,
    FREE,
    IDLE,
    NONE,
    PREFILLING_OFFLINE,
    RELAXED,
    STRICT,
    cluster_at,
)
from ooco_gym.cluster.strict import choose_strict
from ooco_gym.cluster.transfer import start_granted_pulls, transfer_end
from ooco_gym.cluster.unified import choose_unified

#: What :func:`run_many` says of a cluster.
REACHED, NEEDS_SLOTS, NEEDS_LOG = 0, 1, 2


@kernel
def _decide(c, instance):
    """The end of an iteration, or a wake-up: book what ended, then choose what is next as the role has it."""
    state = c.instances[instance]
    was_decoding = state.activity == DECODING
    c.world[0].refusals -= state.head_refused
    state.head_refused = 0
    if was_decoding:
        end_iteration(c, instance)
    else:
        if state.activity != IDLE:
            complete_prefill(c, instance)
            state.activity = IDLE
        if state.cancelled > 0:
            drop_cancelled(c, instance)
    start_granted_pulls(c, instance)
    change_role_if_drained(c, instance)
    if state.role == RELAXED:
        choose_relaxed(c, instance, was_decoding)
    elif state.role == STRICT:
        choose_strict(c, instance, was_decoding)
    else:
        choose_unified(c, instance, was_decoding)


@kernel
def _maybe_preempt(c, instance, slot):
    """On-demand preemption, judged at an online arrival on the instance it was routed to."""
    world = c.world[0]
    state = c.instances[instance]
    if state.activity != PREFILLING_OFFLINE or world.rule_preemption == ITERATION:
        return
    predicted_ttft_s = max(state.predicted_end_s - world.now_s, 0.0) + state.pending_s
    ttft_slo_s = world.slo_s[c.online[c.slots[slot].online].slo_class, 0]
    if predicted_ttft_s > c.world[0].knobs[PREEMPT_SLACK] * ttft_slo_s:
        interrupt_at_layer(c, instance)


@kernel
def _online_arrival(c):
    world = c.world[0]
    request = world.next_online
    prompt, output = c.online[request].prompt, c.online[request].output
    second = ring_second(c, world.now_s)
    second.arrivals += 1
    second.prompt_tokens += prompt
    if fits_anywhere(c, prompt, output):
        slot = pop_front(c, world.instances, FREE)
        record = c.slots[slot]
        record.online = request
        record.prompt = prompt
        record.output = output
        record.arrival_s = world.now_s
        fresh_slot(c, slot)
        c.online[request].slot = slot
        note(c, ARRIVAL, NONE, slot, prompt, output, c.online[request].slo_class, 0.0)
        instance = enqueue_online(c, slot, False)
        second.prefill_s += record.estimate_s
        _maybe_preempt(c, instance, slot)
    else:
        c.online[request].first_s = math.nan
        note(c, REJECTED, NONE, NONE, request, 0, 0, 0.0)
        world.rejected_online += 1
    world.next_online = request + 1
    following = c.online[request + 1].arrival_s if request + 1 < world.online_requests else math.inf
    schedule(c, cluster_source(c, ONLINE_ARRIVAL), following)


@kernel
def _offline_arrival(c):
    world = c.world[0]
    world.offline_arrived += 1
    arrived = world.offline_arrived
    following = c.offline[arrived].arrival_s if arrived < world.offline_jobs else math.inf
    schedule(c, cluster_source(c, OFFLINE_ARRIVAL), following)
    wake_takers(c)


@kernel
def _disruption(c):
    world = c.world[0]
    event = c.disruptions[world.next_disruption]
    if event.kind == CANCEL:
        cancel(c, event.index)
    elif event.kind == FAIL:
        fail(c, event.index)
    else:
        recover(c, event.index)
    world.next_disruption += 1
    following = world.next_disruption
    due_s = c.disruptions[following].time_s if following < c.disruptions.shape[0] else math.inf
    schedule(c, cluster_source(c, DISRUPTION), due_s)


@kernel
def _run(c, until_s):
    """Process every event up to and including ``until_s`` and account all running iterations up to it.

    Returns REACHED, or NEEDS_SLOTS or NEEDS_LOG when the caller must provide more request slots, or room in the log,
    and call again.
    """
    world = c.world[0]
    instances = world.instances
    reserve = world.max_seqs + 1  # no single event takes more
    room = 6 * c.slots.shape[0] + 64  # more than a single event logs: it touches every request a few times at most
    while True:
        source = next_source(c)
        time_s = c.queue[source].time_s
        if time_s > until_s:
            break
        if lists.length(c, instances, FREE) < reserve:
            return NEEDS_SLOTS
        if c.log.shape[0] > 0 and c.log.shape[0] - world.logged < room:
            return NEEDS_LOG
        world.now_s = time_s
        world.acting = source
        world.events += 1
        if source < instances:
            _decide(c, source)
        elif source < 2 * instances:
            transfer_end(c, source - instances)
        elif source < 3 * instances:
            restore_end(c, source - 2 * instances)
        elif source == cluster_source(c, ONLINE_ARRIVAL):
            _online_arrival(c)
        elif source == cluster_source(c, OFFLINE_ARRIVAL):
            _offline_arrival(c)
        elif source == cluster_source(c, DISRUPTION):
            _disruption(c)
        else:
            begin_role_change(c)
    world.now_s = until_s
    world.acting = 3 * instances + CLUSTER_SOURCES  # a stop comes after every event of its instant
    for instance in range(instances):
        advance_to_time(c, instance, until_s)
    _judge_deadlines(c)
    return REACHED


@entry_point
def run_many(addresses, until_s, status):
    """Advance each cluster, given by its address, to its time; ``status`` says which wants more slots or log first.

    ``addresses`` int64 [N], ``until_s`` float64 [N], ``status`` int64 [N], written.
    """
    for index in range(addresses.shape[0]):
        status[index] = _run(cluster_at(addresses[index]), until_s[index])


@kernel
def _judge_deadlines(c):
    """Book every violation that became certain by now at the second in which it did.

    TTFT deadlines of a class pass in order of arrival, so a cursor walks them; TPOT deadlines come off a heap. A
    request is booked once: its TPOT deadline is only armed when its first token was in time.
    """
    world = c.world[0]
    now_s = world.now_s
    for which in range(world.slo_classes):
        request = c.world[0].ttft_cursor[which]
        while request < world.next_online:
            if c.online[request].slo_class == which:
                deadline_s = c.online[request].arrival_s + c.world[0].slo_s[which, 0]
                if deadline_s > now_s:
                    break
                if c.online[request].first_s > deadline_s:  # false for a rejected request: nan
                    _book_violation(c, request, deadline_s)
            request += 1
        c.world[0].ttft_cursor[which] = request
    while world.timer_count > 0 and c.timers[0].time_s <= now_s:
        deadline_s, request = c.timers[0].time_s, c.timers[0].request
        timer_pop(c)
        if c.online[request].finish_s > deadline_s:
            _book_violation(c, request, deadline_s)


@kernel
def _book_violation(c, request, deadline_s):
    if c.online[request].gone_s >= deadline_s:  # not one whose client went away before
        ring_second(c, deadline_s).violations += 1
        c.world[0].violations += 1


@entry_point
def set_knobs_many(addresses, knobs):
    """Apply a knob vector, row of ``knobs`` float64 [N, KNOB_COUNT], to each cluster from its next decision on."""
    for index in range(addresses.shape[0]):
        _set_knobs(cluster_at(addresses[index]), knobs[index])


@kernel
def _set_knobs(c, knobs):
    """An instance in a run decides at its next boundary, an idle one at once."""
    same = True
    for index in range(KNOB_COUNT):
        if c.world[0].knobs[index] != knobs[index]:
            same = False
    if same:
        return
    for index in range(KNOB_COUNT):
        c.world[0].knobs[index] = knobs[index]
    for instance in range(c.world[0].instances):
        wake(c, instance)
    consider_roles(c)


@entry_point
def prepare(c):
    """Give a freshly filled cluster its first events."""
    world = c.world[0]
    world.acting = 3 * world.instances + CLUSTER_SOURCES
    leaves = c.queue.shape[0] // 2
    sources = 3 * world.instances + CLUSTER_SOURCES
    for index in range(c.queue.shape[0]):
        c.queue[index].winner = -1
    for source in range(sources):
        c.queue[source].time_s = math.inf
        c.queue[leaves + source].winner = source
    for instance in range(world.instances):
        schedule(c, instance, 0.0)  # the first decision: offline work may start at once
    for source in range(world.instances, sources):
        schedule(c, source, math.inf)
    schedule(c, cluster_source(c, ONLINE_ARRIVAL), c.online[0].arrival_s if c.online.shape[0] > 0 else math.inf)
    if world.endless == 0:
        schedule(c, cluster_source(c, OFFLINE_ARRIVAL), c.offline[0].arrival_s if c.offline.shape[0] > 0 else math.inf)
    schedule(c, cluster_source(c, DISRUPTION), c.disruptions[0].time_s if c.disruptions.shape[0] > 0 else math.inf)
