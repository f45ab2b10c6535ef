"""The event loop: one compiled call advances a whole cluster to a time."""

from __future__ import annotations

import math

import numpy as np

from ooco_gym._jit import entry_point, kernel
from ooco_gym.cluster import lists
from ooco_gym.cluster.backlog import fits_anywhere, fresh_slot
from ooco_gym.cluster.control import KNOB_COUNT, PREEMPT_SLACK
from ooco_gym.cluster.lists import pop_front
from ooco_gym.cluster.prefill import interrupt_at_layer
from ooco_gym.cluster.queues import next_source, schedule, timer_pop
from ooco_gym.cluster.relaxed import relaxed_decision
from ooco_gym.cluster.residents import enqueue_online, ring_second, wake
from ooco_gym.cluster.rules import LAYER
from ooco_gym.cluster.run import advance_to_time
from ooco_gym.cluster.state import FREE, PREFILLING_OFFLINE, RELAXED
from ooco_gym.cluster.strict import strict_decision
from ooco_gym.cluster.transfer import transfer_end

#: What :func:`run` returns.
REACHED, NEEDS_SLOTS = 0, 1


@kernel
def _maybe_preempt(c, instance):
    """On-demand preemption, judged at an online arrival on the instance it was routed to."""
    world = c.world[0]
    state = c.instances[instance]
    if state.activity != PREFILLING_OFFLINE or world.rule_preemption != LAYER:
        return
    predicted_ttft_s = max(state.predicted_end_s - world.now_s, 0.0) + state.pending_s
    if predicted_ttft_s > c.knobs[PREEMPT_SLACK] * world.ttft_slo_s:
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
        instance = enqueue_online(c, slot, False)
        second.prefill_s += record.estimate_s
        _maybe_preempt(c, instance)
    else:
        c.online_first_s[request] = math.nan
        world.rejected_online += 1
    world.next_online = request + 1
    following = c.online_arrival_s[request + 1] if request + 1 < world.online_requests else math.inf
    schedule(c, 2 * world.instances, following)


@kernel
def _offline_arrival(c):
    world = c.world[0]
    world.offline_arrived += 1
    arrived = world.offline_arrived
    schedule(c, 2 * world.instances + 1, c.offline_arrival_s[arrived] if arrived < world.offline_jobs else math.inf)
    for instance in range(world.relaxed):
        wake(c, instance)


@entry_point
def run(c, until_s):
    """Process every event up to and including ``until_s`` and account all running iterations up to it.

    Returns REACHED, or NEEDS_SLOTS when the caller must provide more request slots and call again.
    """
    world = c.world[0]
    instances = world.instances
    reserve = (world.relaxed + 1) * world.max_seqs
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
            if c.instances[source].role == RELAXED:
                relaxed_decision(c, source)
            else:
                strict_decision(c, source)
        elif source < 2 * instances:
            transfer_end(c, source - instances)
        elif source == 2 * instances:
            _online_arrival(c)
        else:
            _offline_arrival(c)
    world.now_s = until_s
    for instance in range(instances):
        advance_to_time(c, instance, until_s)
    _judge_deadlines(c)
    return REACHED


@kernel
def _judge_deadlines(c):
    """Book every violation that became certain by now at the second in which it did.

    TTFT deadlines pass in order of arrival, so a cursor walks them; TPOT deadlines come off a heap. A request is
    booked once: its TPOT deadline is only armed when its first token was in time.
    """
    world = c.world[0]
    now_s = world.now_s
    while world.ttft_cursor < world.next_online:
        request = world.ttft_cursor
        deadline_s = c.online_arrival_s[request] + world.ttft_slo_s
        if deadline_s > now_s:
            break
        if c.online_first_s[request] > deadline_s:  # false for a rejected request: nan
            ring_second(c, deadline_s).violations += 1
            world.violations += 1
        world.ttft_cursor = request + 1
    while world.timer_count > 0 and c.timer_s[0] <= now_s:
        deadline_s, request = c.timer_s[0], c.timer_request[0]
        timer_pop(c)
        if c.online_finish_s[request] > deadline_s:
            ring_second(c, deadline_s).violations += 1
            world.violations += 1


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
    for source in range(instances, 2 * instances):
        schedule(c, source, np.inf)
    schedule(c, 2 * instances, c.online_arrival_s[0] if world.online_requests > 0 else np.inf)
    schedule(
        c,
        2 * instances + 1,
        c.offline_arrival_s[0] if world.endless == 0 and world.offline_jobs > 0 else np.inf,
    )
