"""Requests on an instance: entering and leaving the decode batch, growing, finishing, being evicted."""

from __future__ import annotations

import math

from ooco_gym._jit import kernel
from ooco_gym.cluster import lists
from ooco_gym.cluster.control import STRICT_PREFILL
from ooco_gym.cluster.lists import push_back, push_front, remove
from ooco_gym.cluster.log import (
    BECAME_RESIDENT,
    CHECKPOINTED,
    ENTER,
    EVICTED,
    EXIT,
    FINISHED,
    ROUTED,
    note,
    note_request,
)
from ooco_gym.cluster.queues import (
    completion_push,
    completion_remove,
    first_finish_step,
    schedule,
    timer_push,
)
from ooco_gym.cluster.rules import KEEP_ON_HOST, evicts_for_online, routing_score, unavailability, victim
from ooco_gym.cluster.run import blocks_for, boundary_s, cut, growth_at
from ooco_gym.cluster.state import (
    CHECKPOINT,
    CHECKPOINTS,
    DECODING,
    FREE,
    IDLE,
    INBOUND_OFFLINE,
    INBOUND_ONLINE,
    NONE,
    OFFLINE_DECODES,
    ONLINE_DECODES,
    PARTIAL,
    PARTIAL_OFFLINE,
    PARTIAL_ONLINE,
    QUEUED,
    RELAXED,
    REQUEUED,
    RESIDENT,
    RING_SECONDS,
    SCHEDULER_COST,
    STRICT,
    UNIFIED,
    UNKNOWN,
    UNUSED,
    WAITING,
)
from ooco_gym.roofline.cost import prefill_s


@kernel
def free_blocks(c, instance):
    state = c.instances[instance]
    return state.kv_blocks - state.used_blocks


@kernel
def take_blocks(c, instance, slot, blocks):
    state = c.instances[instance]
    state.used_blocks += blocks
    if c.slots[slot].online != NONE:
        state.online_blocks += blocks


@kernel
def reserve(c, instance, slot, blocks):
    """Take the first KV of a request on an instance."""
    take_blocks(c, instance, slot, blocks)
    if c.slots[slot].online == NONE:
        c.instances[instance].offline_here += 1


@kernel
def give_back(c, instance, slot, blocks):
    """Free all KV of a request on an instance."""
    take_blocks(c, instance, slot, -blocks)
    if c.slots[slot].online == NONE:
        c.instances[instance].offline_here -= 1


@kernel
def ring_second(c, time_s):
    """The history record of the second that contains ``time_s``, emptied when it still holds an older one."""
    second = int(time_s)
    record = c.ring[second % RING_SECONDS]
    if record.second < second:
        record.second = second
        record.arrivals = 0
        record.prefill_s = 0.0
        record.prompt_tokens = 0
        record.finished = 0
        record.output_tokens = 0
        record.violations = 0
    return record


@kernel
def wake(c, instance):
    """Give an instance a decision: at once when idle, at its next boundary when decoding."""
    activity = c.instances[instance].activity
    now_s = c.world[0].now_s
    if activity == IDLE:
        schedule(c, instance, now_s)
    elif activity == DECODING:
        cut(c, instance, now_s)


@kernel
def wake_takers(c):
    """The backlog has work to offer: wake whoever may take it."""
    strict_too = c.world[0].knobs[STRICT_PREFILL] >= 1.0
    for instance in range(c.world[0].instances):
        if strict_too or c.instances[instance].role != STRICT:
            wake(c, instance)


@kernel
def decode_list(c, slot):
    return OFFLINE_DECODES if c.slots[slot].online == NONE else ONLINE_DECODES


@kernel
def partial_list(c, slot):
    return PARTIAL_OFFLINE if c.slots[slot].online == NONE else PARTIAL_ONLINE


@kernel
def context_now(c, slot):
    """Prompt and generated tokens of a resident, brought up to the accounted step."""
    record = c.slots[slot]
    if record.selected == 1:
        return record.context + c.instances[record.instance].steps
    return record.context


@kernel
def select(c, instance, slot):
    """Put a resident into the decode batch."""
    state = c.instances[instance]
    record = c.slots[slot]
    context = record.context
    if state.selected_online + state.selected_offline == 0:
        state.longest = context - state.steps
    elif state.longest != UNKNOWN:
        state.longest = max(state.longest, context - state.steps)
    if record.online == NONE:
        state.selected_offline += 1
        state.context_offline += context
    else:
        state.selected_online += 1
        state.context_online += context
    record.context = context - state.steps
    record.selected = 1
    c.block_phase[instance, int(record.online != NONE), record.context % c.world[0].block_tokens] += 1
    completion_push(c, instance, slot)
    state.changed = 1
    note_request(c, ENTER, instance, slot)


@kernel
def unselect(c, instance, slot):
    """Take a resident out of the decode batch (at a boundary); its KV stays."""
    state = c.instances[instance]
    record = c.slots[slot]
    c.block_phase[instance, int(record.online != NONE), record.context % c.world[0].block_tokens] -= 1
    completion_remove(c, instance, slot)
    if record.context == state.longest:
        state.longest = UNKNOWN
    context = record.context + state.steps
    if record.online == NONE:
        state.selected_offline -= 1
        state.context_offline -= context
    else:
        state.selected_online -= 1
        state.context_online -= context
    record.context = context
    record.selected = 0
    record.blocks = blocks_for(c, context if state.grown == 1 else context - 1)
    if record.last_token_s < 0.0:  # it took part in the run; not when it was selected in this very decision
        record.last_token_s = boundary_s(state, state.done)
    state.changed = 1
    note_request(c, EXIT, instance, slot)


@kernel
def longest_context(c, instance):
    """The longest context among the selected; 0 when there are none."""
    state = c.instances[instance]
    if state.selected_online + state.selected_offline == 0:
        return 0
    if state.longest == UNKNOWN:
        for which in (ONLINE_DECODES, OFFLINE_DECODES):
            slot = lists.first(c, instance, which)
            while slot != NONE and c.slots[slot].selected == 1:  # a prefix of either list is selected
                state.longest = max(state.longest, c.slots[slot].context)
                slot = c.slots[slot].next
    return state.longest + state.steps


@kernel
def join(c, instance, slot):
    """Make a request resident; it takes part from the next decision on."""
    world = c.world[0]
    record = c.slots[slot]
    record.instance = instance
    record.phase = RESIDENT
    record.order = world.sequence
    world.sequence += 1
    push_back(c, instance, decode_list(c, slot), slot)
    c.instances[instance].changed = 1
    if record.online != NONE:
        c.instances[instance].class_decodes[c.online[record.online].slo_class] += 1
    note_request(c, BECAME_RESIDENT, instance, slot)


@kernel
def leave(c, instance, slot):
    """Take a resident off the instance's lists; its blocks stay taken until the caller frees them."""
    record = c.slots[slot]
    if record.selected == 1:
        unselect(c, instance, slot)
    remove(c, instance, decode_list(c, slot), slot)
    c.instances[instance].changed = 1
    if record.online != NONE:
        c.instances[instance].class_decodes[c.online[record.online].slo_class] -= 1


@kernel
def release(c, instance, slot):
    """Free the KV that a slot holds on an instance."""
    give_back(c, instance, slot, c.slots[slot].blocks)
    c.slots[slot].blocks = 0


@kernel
def free_slot(c, slot):
    if c.slots[slot].online != NONE:
        c.online[c.slots[slot].online].slot = NONE
    c.slots[slot].phase = UNUSED
    push_front(c, c.world[0].instances, FREE, slot)  # used again first: it is in the cache


@kernel
def finish(c, slot):
    """Book the last token of a request, whose KV has been released."""
    world = c.world[0]
    record = c.slots[slot]
    note(c, FINISHED, record.instance, slot, record.prompt, record.output, 0, 0.0)
    if record.online != NONE:
        c.online[record.online].finish_s = world.now_s
        world.online_finished += 1
        second = ring_second(c, world.now_s)
        second.finished += 1
        second.output_tokens += record.output
    else:
        if world.measure_from_s < world.now_s <= world.measure_to_s:
            world.offline_finished += 1
            world.offline_finished_prompt_tokens += record.prompt
            world.offline_finished_output_tokens += record.output
        world.offline_output_sum += record.output
        world.offline_output_count += 1
    free_slot(c, slot)


@kernel
def first_token(c, slot):
    """Book the first token of an online request and start its TPOT deadline."""
    world = c.world[0]
    record = c.slots[slot]
    request = record.online
    if c.online[request].first_s < math.inf:
        return  # a recomputed request had its first token before
    c.online[request].first_s = world.now_s
    slo_s = c.world[0].slo_s[c.online[request].slo_class]
    in_time = world.now_s <= record.arrival_s + slo_s[0]
    if in_time and record.output > 1:
        timer_push(c, world.now_s + (record.output - 1) * slo_s[1], request)


@kernel
def drop_cancelled(c, instance):
    """Residents whose clients went away leave."""
    state = c.instances[instance]
    slot = lists.first(c, instance, ONLINE_DECODES)
    while state.cancelled > 0:
        following = c.slots[slot].next
        if c.slots[slot].cancelled == 1:
            state.cancelled -= 1
            leave(c, instance, slot)
            release(c, instance, slot)
            free_slot(c, slot)
        slot = following


@kernel
def complete_finished(c, instance):
    """Release and book every sequence whose last token came with the iteration that just ended."""
    state = c.instances[instance]
    while state.heap_size > 0 and first_finish_step(c, instance) <= state.steps:
        slot = c.heaps[instance, 0].slot
        cancel_pull(c, slot)
        leave(c, instance, slot)
        release(c, instance, slot)
        finish(c, slot)


@kernel
def cancel_pull(c, slot):
    """Call off the pull of a request that finished, was evicted or found no room."""
    record = c.slots[slot]
    if record.leaving == 1:
        record.leaving = 0
        c.instances[record.instance].granted -= 1
        c.instances[record.target].pulled_slot = NONE
        if c.instances[record.target].activity == DECODING:
            cut(c, record.target, c.world[0].now_s)  # its run was planned for no further pull


@kernel
def enqueue_online(c, slot, at_head):
    """Route an online request to an instance that prefills, and wake it; returns the instance."""
    world = c.world[0]
    record = c.slots[slot]
    role = RELAXED if world.relaxed > 0 else UNIFIED
    best = 0
    best_rank = 3
    best_score = math.inf
    for instance in range(world.instances):
        if c.instances[instance].role == role:
            rank = unavailability(c, instance)
            score = routing_score(c, instance, slot)
            if rank < best_rank or (rank == best_rank and score < best_score):
                best, best_rank, best_score = instance, rank, score
    world.routed_last = best
    record.instance = best
    record.phase = QUEUED
    # In units of 2^-40 s the sums of estimates are exact, so that equal loads are ties.
    note_request(c, ROUTED, best, slot)
    record.estimate_s = math.floor(prefill_s(c.costs[best, SCHEDULER_COST], record.context) * 2.0**40) * 2.0**-40
    c.instances[best].pending_s += record.estimate_s
    if at_head:
        push_front(c, best, WAITING, slot)
    else:
        push_back(c, best, WAITING, slot)
    wake(c, best)
    return best


@kernel
def requeue(c, slot):
    """Send a request that lost its KV back to the head of its queue, to be recomputed."""
    if c.slots[slot].online == NONE:
        return_to_backlog(c, slot)
        wake_takers(c)
    else:
        c.slots[slot].done = 0
        enqueue_online(c, slot, True)


@kernel
def return_to_backlog(c, slot):
    """Put an offline request at the head of the backlog; the caller wakes its takers."""
    c.slots[slot].done = 0
    c.slots[slot].phase = QUEUED
    push_front(c, c.world[0].instances, REQUEUED, slot)


@kernel
def _checkpoint(c, instance, slot):
    """Keep the KV of an evicted offline request in the host memory of its instance; False where that has no room."""
    state = c.instances[instance]
    record = c.slots[slot]
    blocks = blocks_for(c, record.context)
    if c.world[0].rule_evicted_kv != KEEP_ON_HOST or state.host_used + blocks > state.host_blocks:
        return False
    state.host_used += blocks
    record.phase = CHECKPOINT
    record.instance = instance
    push_front(c, instance, CHECKPOINTS, slot)
    c.world[0].checkpoints += 1
    note_request(c, CHECKPOINTED, instance, slot)
    wake(c, instance)
    return True


@kernel
def _evict_partial(c, instance, slot):
    record = c.slots[slot]
    remove(c, instance, partial_list(c, slot), slot)
    release(c, instance, slot)
    record.computed = max(record.computed, record.done)
    if record.online != NONE:
        c.instances[instance].pending_s -= record.estimate_s
    requeue(c, slot)


@kernel
def _evict_held(c, instance, slot):
    target = c.slots[slot].target
    remove(c, target, c.slots[slot].queue, slot)
    wake(c, target)  # the next in that queue may fit
    release(c, instance, slot)
    if not _checkpoint(c, instance, slot):
        requeue(c, slot)


@kernel
def _evict_resident(c, instance, slot):
    record = c.slots[slot]
    cancel_pull(c, slot)
    leave(c, instance, slot)
    release(c, instance, slot)
    record.computed = max(record.computed, record.context - 1)
    if record.online != NONE or not _checkpoint(c, instance, slot):
        requeue(c, slot)


@kernel
def evict(c, instance, slot):
    """Free a request's KV; it will be restored from host memory or recomputed."""
    c.world[0].evictions += 1
    note_request(c, EVICTED, instance, slot)
    phase = c.slots[slot].phase
    if phase == RESIDENT:
        _evict_resident(c, instance, slot)
    elif phase == PARTIAL:
        _evict_partial(c, instance, slot)
    else:
        _evict_held(c, instance, slot)


@kernel
def newest_held(c, instance, offline_only):
    """The newest request that was prefilled here and waits for room elsewhere, or NONE."""
    best = NONE
    for target in range(c.world[0].instances):
        for which in (INBOUND_ONLINE, INBOUND_OFFLINE):
            slot = lists.last(c, target, which)
            while slot != NONE:
                record = c.slots[slot]
                if record.instance == instance and (record.online == NONE or not offline_only):
                    if best == NONE or record.order > c.slots[best].order:
                        best = slot
                    break
                slot = record.prev
    return best


@kernel
def make_room_for_online(c, instance, blocks):
    """Offline work gives way until ``blocks`` are free: prefills that have begun, then decodes, then what is held after
    its prefill, the newest of each first. Says whether there is room."""
    while free_blocks(c, instance) < blocks:
        if not evicts_for_online(c):
            return False
        slot = lists.last(c, instance, PARTIAL_OFFLINE)
        if slot == NONE:
            slot = lists.last(c, instance, OFFLINE_DECODES)
        if slot == NONE:
            slot = newest_held(c, instance, True)
        if slot == NONE:
            return False
        evict(c, instance, slot)
    return True


@kernel
def grow(c, instance):
    """Give every sequence of the last iteration the block of its next token; evict where they do not fit."""
    state = c.instances[instance]
    if state.grown == 1:
        return
    while True:
        step = state.steps - 1
        online = growth_at(c, instance, step, 1)
        offline = growth_at(c, instance, step, 0)
        if online + offline <= state.kv_blocks - state.used_blocks:
            break
        evict(c, instance, victim(c, instance))
    state.used_blocks += online + offline
    state.online_blocks += online
    state.grown = 1
