"""A strict instance: online decode, offline decodes mixed in under the TPOT bound, pulls for more of them and, where KV
runs short, pushing them back."""

from __future__ import annotations

import math

from ooco_gym._jit import kernel
from ooco_gym.cluster import lists
from ooco_gym.cluster.control import KV_RESERVE, PULL_KV, PULL_LENGTH, PUSHBACK, STRICT_PREFILL, TPOT_BOUND
from ooco_gym.cluster.decode import (
    PULL_TARGET_RATIO,
    batch_context,
    batch_size,
    decode_or_idle,
    mix_selection,
    pull_step_limit_s,
)
from ooco_gym.cluster.log import PUSHED, note
from ooco_gym.cluster.mixing import add_strict_prefill
from ooco_gym.cluster.residents import context_now, free_blocks, leave, wake
from ooco_gym.cluster.restore import start_restores
from ooco_gym.cluster.rules import PULL_NONE, draining, migration_score, tpot_slo_s, unavailability
from ooco_gym.cluster.run import advance_to_time, blocks_for
from ooco_gym.cluster.state import DOWN, NONE, OFFLINE_DECODES, PARTIAL_OFFLINE, RELAXED, SCHEDULER_COST
from ooco_gym.cluster.transfer import admit_inbound, start_transfer
from ooco_gym.roofline.cost import decode_affine


@kernel
def preferred_length(c, instance, batch, context, free_tokens, left):
    """L*: the longest context such that ``left`` more sequences of it exhaust either the TPOT slack or the free KV.

    Closed form min(free / left, (bound - c0(batch + left) - c1 sum) / (c1 left)); below 1 there is no such length.
    """
    bound_s = PULL_TARGET_RATIO * c.world[0].knobs[TPOT_BOUND] * tpot_slo_s(c, instance)
    c0, c1 = decode_affine(c.costs[instance, SCHEDULER_COST], float(batch + left))
    by_time = (bound_s - c0 - c1 * context) / (c1 * left)
    return min(by_time, float(free_tokens // left))


@kernel
def _next_source(c, instance):
    """The relaxed instance whose turn it is to be asked: by index and around; NONE while none is up."""
    count = c.world[0].instances
    cursor = c.instances[instance].pull_cursor
    for step in range(1, count + 1):
        source = (cursor + step) % count
        if c.instances[source].role == RELAXED and c.instances[source].activity != DOWN:
            return source
    return NONE


@kernel
def _closest_decode(c, source, length, free_tokens):
    """The offline decode of ``source`` with the best migration score that fits, the first come of equals, or NONE."""
    best = NONE
    best_score = math.inf
    steps = c.instances[source].steps
    for at in range(c.instances[source].heap_size):  # those that decode
        entry = c.heaps[source, at]
        context = entry.context + steps
        score = migration_score(c, length, context)
        if context <= free_tokens and score <= best_score:
            record = c.slots[entry.slot]
            free = record.online == NONE and record.leaving == 0
            if free and (score < best_score or record.order < c.slots[best].order):
                best, best_score = entry.slot, score
    slot = lists.last(c, source, OFFLINE_DECODES)
    tail = NONE
    while slot != NONE and c.slots[slot].selected == 0:  # and those that have joined since
        tail = slot
        slot = c.slots[slot].prev
    while tail != NONE:
        record = c.slots[tail]
        if record.context <= free_tokens and record.leaving == 0:
            score = migration_score(c, length, record.context)
            if score < best_score:
                best, best_score = tail, score
        tail = record.next
    return best


@kernel
def pull(c, instance, was_decoding):
    """Ask one relaxed instance, in turn, for the offline decode closest to the preferred length."""
    world = c.world[0]
    state = c.instances[instance]
    if world.rule_migration == PULL_NONE or state.pulled_slot != NONE or world.now_s < state.next_pull_s:
        return
    if draining(c, instance) or state.used_blocks >= c.world[0].knobs[PULL_KV] * state.kv_blocks:
        return
    if state.last_iteration_s >= pull_step_limit_s(c, instance):
        return
    source = _next_source(c, instance)
    if source == NONE:
        return
    state.next_pull_s = world.now_s + world.pull_interval_s
    state.pull_cursor = source
    free_tokens = free_blocks(c, instance) * world.block_tokens
    batch = batch_size(state) if was_decoding else 0
    context = batch_context(state) if was_decoding else 0
    left = max(int(math.ceil(state.saturation_batch)) - batch, 1)
    length = preferred_length(c, instance, batch, context, free_tokens, left)
    if length < 1.0:
        return
    length = math.floor(length) * c.world[0].knobs[PULL_LENGTH]
    advance_to_time(c, source, world.now_s)
    best = _closest_decode(c, source, length, free_tokens)
    if best == NONE:
        return
    c.slots[best].leaving = 1
    c.slots[best].target = instance
    c.instances[source].granted += 1
    state.pulled_slot = best
    wake(c, source)


@kernel
def push_back_offline(c, instance):
    """Above its KV mark a strict instance sends its newest offline decode to the emptiest relaxed instance."""
    world = c.world[0]
    state = c.instances[instance]
    if c.world[0].knobs[PUSHBACK] >= 1.0 or state.pushed_slot != NONE or world.now_s < state.next_push_s:
        return
    slot = lists.last(c, instance, OFFLINE_DECODES)
    if slot == NONE or state.used_blocks <= c.world[0].knobs[PUSHBACK] * state.kv_blocks:
        return
    state.next_push_s = world.now_s + world.pull_interval_s
    target = NONE
    least = math.inf
    for other in range(world.instances):
        if c.instances[other].role == RELAXED and unavailability(c, other) == 0:
            if c.instances[other].used_blocks / c.instances[other].kv_blocks >= least:
                continue  # as last accounted; by now it can only have grown
            advance_to_time(c, other, world.now_s)
            share = c.instances[other].used_blocks / c.instances[other].kv_blocks
            if share < least:
                target, least = other, share
    if target == NONE:
        return
    used = c.instances[target].used_blocks + blocks_for(c, context_now(c, slot))
    if used <= (1.0 - c.world[0].knobs[KV_RESERVE]) * c.instances[target].kv_blocks:
        leave(c, instance, slot)
        state.pushed_slot = slot
        world.pushbacks += 1
        note(c, PUSHED, instance, slot, target, 0, 0, 0.0)
        start_transfer(c, slot, target)


@kernel
def choose_strict(c, instance, was_decoding):
    """The next iteration of a strict instance."""
    world = c.world[0]
    state = c.instances[instance]
    if not was_decoding:
        state.last_iteration_s = 0.0
    admit_inbound(c, instance)
    pull(c, instance, was_decoding)
    start_restores(c, instance)
    push_back_offline(c, instance)
    mix_selection(c, instance)
    if c.world[0].knobs[STRICT_PREFILL] >= 1.0 or lists.length(c, instance, PARTIAL_OFFLINE) > 0:
        add_strict_prefill(c, instance)
    # An idle instance has no steps to pull after; it steps emptily every pull interval instead.
    polls = world.rule_migration != PULL_NONE
    next_look_s = max(state.next_pull_s, world.now_s + world.pull_interval_s) if polls else math.inf
    decode_or_idle(c, instance, was_decoding, next_look_s)
