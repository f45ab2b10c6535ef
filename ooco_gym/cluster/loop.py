"""The event loop: one compiled call advances a whole cluster to a time."""

from __future__ import annotations

import math

import numpy as np

from ooco_gym._jit import entry_point, kernel
from ooco_gym.cluster import lists
from ooco_gym.cluster.backlog import fits_anywhere, fresh_slot
from ooco_gym.cluster.control import KNOB_COUNT, PREEMPT_SLACK
from ooco_gym.cluster.decode import end_iteration
from ooco_gym.cluster.faults import cancel, fail, recover
from ooco_gym.cluster.lists import pop_front
from ooco_gym.cluster.prefill import complete_prefill, interrupt_at_layer
from ooco_gym.cluster.queues import (
    CANCELLATION,
    FAULT,
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
from ooco_gym.cluster.state import DECODING, FREE, IDLE, PREFILLING_OFFLINE, RELAXED, STRICT
from ooco_gym.cluster.strict import choose_strict
from ooco_gym.cluster.transfer import start_granted_pulls, transfer_end
from ooco_gym.cluster.unified import choose_unified

#: What :func:`run` returns.
REACHED, NEEDS_SLOTS = 0, 1


@kernel
def _decide(c, instance):
    """The end of an iteration, or a wake-up: book what ended, then choose what is next as the instance's role has it."""
    state = c.instances[instance]
    was_decoding = state.activity == DECODING
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
    ttft_slo_s = c.slo_s[c.online_class[c.slots[slot].online], 0]
    if predicted_ttft_s > c.knobs[PREEMPT_SLACK] * ttft_slo_s:
        interrupt_at_layer(c, instance)


@kernel
def _online_arrival(c):
    world = c.world[0]
    request = world.next_online
    prompt, output = c.online_prompt[request], c.online_output[request]
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
        c.online_slot[request] = slot
        instance = enqueue_online(c, slot, False)
        second.prefill_s += record.estimate_s
        _maybe_preempt(c, instance, slot)
    else:
        c.online_first_s[request] = math.nan
        world.rejected_online += 1
    world.next_online = request + 1
    following = c.online_arrival_s[request + 1] if request + 1 < world.online_requests else math.inf
    schedule(c, cluster_source(c, ONLINE_ARRIVAL), following)


@kernel
def _offline_arrival(c):
    world = c.world[0]
    world.offline_arrived += 1
    arrived = world.offline_arrived
    following = c.offline_arrival_s[arrived] if arrived < world.offline_jobs else math.inf
    schedule(c, cluster_source(c, OFFLINE_ARRIVAL), following)
    wake_takers(c)


@kernel
def _cancellation(c):
    world = c.world[0]
    cancel(c, c.cancel_request[world.next_cancel])
    world.next_cancel += 1
    following = c.cancel_s[world.next_cancel] if world.next_cancel < c.cancel_s.shape[0] else math.inf
    schedule(c, cluster_source(c, CANCELLATION), following)


@kernel
def _fault(c):
    world = c.world[0]
    index = world.next_fault
    if c.fault_up[index] == 1:
        recover(c, c.fault_instance[index])
    else:
        fail(c, c.fault_instance[index])
    world.next_fault += 1
    following = c.fault_s[world.next_fault] if world.next_fault < c.fault_s.shape[0] else math.inf
    schedule(c, cluster_source(c, FAULT), following)


@entry_point
def run(c, until_s):
    """Process every event up to and including ``until_s`` and account all running iterations up to it.

    Returns REACHED, or NEEDS_SLOTS when the caller must provide more request slots and call again.
    """
    world = c.world[0]
    instances = world.instances
    reserve = world.max_seqs + 1  # no single event takes more
    while True:
        source = next_source(c)
        time_s = c.times[source]
        if time_s > until_s:
            break
        if lists.length(c, instances, FREE) < reserve:
            return NEEDS_SLOTS
        world.now_s = time_s
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
        elif source == cluster_source(c, CANCELLATION):
            _cancellation(c)
        elif source == cluster_source(c, FAULT):
            _fault(c)
        else:
            begin_role_change(c)
    world.now_s = until_s
    for instance in range(instances):
        advance_to_time(c, instance, until_s)
    _judge_deadlines(c)
    return REACHED


@kernel
def _judge_deadlines(c):
    """Book every violation that became certain by now at the second in which it did.

    TTFT deadlines of a class pass in order of arrival, so a cursor walks them; TPOT deadlines come off a heap. A request is
    booked once: its TPOT deadline is only armed when its first token was in time.
    """
    world = c.world[0]
    now_s = world.now_s
    for which in range(world.slo_classes):
        request = c.ttft_cursor[which]
        while request < world.next_online:
            if c.online_class[request] == which:
                deadline_s = c.online_arrival_s[request] + c.slo_s[which, 0]
                if deadline_s > now_s:
                    break
                if c.online_first_s[request] > deadline_s:  # false for a rejected request: nan
                    _book_violation(c, request, deadline_s)
            request += 1
        c.ttft_cursor[which] = request
    while world.timer_count > 0 and c.timer_s[0] <= now_s:
        deadline_s, request = c.timer_s[0], c.timer_request[0]
        timer_pop(c)
        if c.online_finish_s[request] > deadline_s:
            _book_violation(c, request, deadline_s)


@kernel
def _book_violation(c, request, deadline_s):
    if c.online_gone_s[request] >= deadline_s:  # not one whose client went away before
        ring_second(c, deadline_s).violations += 1
        c.world[0].violations += 1


@entry_point
def set_knobs(c, knobs):
    """Apply a knob vector from the next decision on; an instance in a run decides at its next boundary."""
    same = True
    for index in range(KNOB_COUNT):
        if c.knobs[index] != knobs[index]:
            same = False
    if same:
        return
    for index in range(KNOB_COUNT):
        c.knobs[index] = knobs[index]
    for instance in range(c.world[0].instances):
        wake(c, instance)
    consider_roles(c)


@entry_point
def prepare(c):
    """Give a freshly filled cluster its first events."""
    world = c.world[0]
    instances = world.instances
    leaves = c.winners.shape[0] // 2
    for index in range(c.winners.shape[0]):
        c.winners[index] = -1
    for source in range(c.times.shape[0]):
        c.times[source] = np.inf
        c.winners[leaves + source] = source
    for instance in range(instances):
        schedule(c, instance, 0.0)  # the first decision: offline work may start at once
    schedule(c, cluster_source(c, ONLINE_ARRIVAL), _first(c.online_arrival_s))
    schedule(c, cluster_source(c, OFFLINE_ARRIVAL), _first(c.offline_arrival_s) if world.endless == 0 else np.inf)
    schedule(c, cluster_source(c, CANCELLATION), _first(c.cancel_s))
    schedule(c, cluster_source(c, FAULT), _first(c.fault_s))


@kernel
def _first(times_s):
    return times_s[0] if times_s.shape[0] > 0 else np.inf
