"""Planning the next decode run of an instance: who takes part, and how long nothing will change."""

from __future__ import annotations

import math

from ooco_gym._jit import kernel
from ooco_gym.cluster import lists
from ooco_gym.cluster.control import PULL_KV, TPOT_BOUND
from ooco_gym.cluster.queues import first_finish_step, schedule
from ooco_gym.cluster.residents import complete_finished, grow, select, unselect
from ooco_gym.cluster.rules import PULL_NONE, mix_bound_s, mix_stride
from ooco_gym.cluster.run import (
    advance,
    batch_noise,
    boundary_after,
    boundary_s,
    duration_s,
    growth_steps_that_fit,
    tbt_bin,
)
from ooco_gym.cluster.state import DECODING, IDLE, NONE, OFFLINE_DECODES, ONLINE_DECODES, STRICT
from ooco_gym.roofline.cost import decode_affine, decode_s

#: The open implementation pulls while the last step took less than 0.9 of the TPOT SLO, plans the pulled batch to the
#: whole SLO, and mixes up to 0.98 of it. One knob scales all three, so they keep these ratios.
PULL_STEP_RATIO = 0.9 / 0.98
PULL_TARGET_RATIO = 1.0 / 0.98


@kernel
def batch_size(state):
    return state.selected_online + state.selected_offline


@kernel
def batch_context(state):
    return state.context_online + state.context_offline


@kernel
def _last_selected(c, instance):
    """The end of the selected prefix of online decodes followed by offline decodes."""
    state = c.instances[instance]
    which = OFFLINE_DECODES if state.selected_offline > 0 else ONLINE_DECODES
    slot = lists.last(c, instance, which)
    while slot != NONE and c.slots[slot].selected == 0:
        slot = c.slots[slot].prev
    return slot


@kernel
def _next_unselected(c, instance, after):
    if after == NONE:
        slot = lists.first(c, instance, ONLINE_DECODES)
    else:
        slot = c.slots[after].next
    if slot == NONE and (after == NONE or c.slots[after].online != NONE):
        slot = lists.first(c, instance, OFFLINE_DECODES)
    return slot


@kernel
def _before_in_batch(c, instance, slot):
    before = c.slots[slot].prev
    if before == NONE and c.slots[slot].online == NONE:
        before = lists.last(c, instance, ONLINE_DECODES)
    return before


@kernel
def _checkpoint(c, instance, tail, stride):
    """Size and context of the selected prefix at the last size that was checked: a multiple of ``stride``."""
    state = c.instances[instance]
    size = batch_size(state)
    context = batch_context(state)
    slot = tail
    for _ in range(size % stride):
        context -= c.slots[slot].context + state.steps
        slot = _before_in_batch(c, instance, slot)
    return size - size % stride, context


@kernel
def _select_new_online(c, instance):
    """Online sequences that arrived while offline ones were selected belong before them: take them in."""
    slot = lists.last(c, instance, ONLINE_DECODES)
    while slot != NONE and c.slots[slot].selected == 0:
        slot = c.slots[slot].prev
    slot = lists.first(c, instance, ONLINE_DECODES) if slot == NONE else c.slots[slot].next
    while slot != NONE:
        select(c, instance, slot)
        slot = c.slots[slot].next


@kernel
def mix_selection(c, instance):
    """Mix decoding selection: the longest prefix, online before offline and first come first served, that stays
    within the bound, re-estimated at every ``stride``-th sequence (the one that fails is left out).

    The prefix of the previous iteration is corrected at its end, so the cost follows the change, not the batch. The
    result does not depend on that starting point because the estimate grows with the prefix.
    """
    state = c.instances[instance]
    bound_s = mix_bound_s(c, c.knobs[TPOT_BOUND])
    stride = mix_stride(c)
    cost = c.scheduler_cost[instance]
    if state.selected_offline > 0:
        _select_new_online(c, instance)
    tail = _last_selected(c, instance)
    while tail != NONE:
        size, context = _checkpoint(c, instance, tail, stride)
        if size == 0 or decode_s(cost, float(size), float(context)) <= bound_s:
            break
        while batch_size(state) >= size:
            before = _before_in_batch(c, instance, tail)
            unselect(c, instance, tail)
            tail = before
    following = _next_unselected(c, instance, tail)
    while following != NONE:
        size = batch_size(state) + 1
        if size % stride == 0:
            context = batch_context(state) + c.slots[following].context
            if decode_s(cost, float(size), float(context)) > bound_s:
                break
        select(c, instance, following)
        tail = following
        following = _next_unselected(c, instance, tail)


@kernel
def _iterations_within_mix_bound(c, instance):
    """Iterations after which mix selection would first shorten the batch; conservative by one."""
    bound_s = mix_bound_s(c, c.knobs[TPOT_BOUND])
    if bound_s == math.inf:
        return math.inf
    size, context = _checkpoint(c, instance, _last_selected(c, instance), mix_stride(c))
    if size == 0:
        return math.inf
    c0, c1 = decode_affine(c.scheduler_cost[instance], float(size))
    return max(1.0, math.floor(((bound_s - c0) / c1 - context) / size) - 1.0)


@kernel
def pull_step_limit_s(c):
    return PULL_STEP_RATIO * c.knobs[TPOT_BOUND] * c.world[0].tpot_slo_s


@kernel
def _first_pull_boundary(c, instance):
    """Iteration after which this strict instance should next ask for offline work; infinite if it will not."""
    state = c.instances[instance]
    if state.role != STRICT or c.world[0].rule_migration == PULL_NONE or state.pulled_slot != NONE:
        return math.inf
    if state.used_blocks >= c.knobs[PULL_KV] * state.kv_blocks:
        return math.inf  # KV only fills up during a run
    k = state.done + 1
    if boundary_s(state, k) < state.next_pull_s:
        k = boundary_after(state, state.next_pull_s)
        if boundary_s(state, k - 1) >= state.next_pull_s:
            k -= 1
    return float(k) if duration_s(state, k) < pull_step_limit_s(c) else math.inf


@kernel
def start_run(c, instance, was_decoding):
    """Begin, or carry on, the run of the selected batch and plan its end. The batch is not empty."""
    world = c.world[0]
    state = c.instances[instance]
    if state.changed == 1 or not was_decoding:
        world.busy_s += boundary_s(state, state.done) - state.anchor_s if was_decoding else 0.0
        batch = batch_size(state)
        noise = batch_noise(c, instance)
        c0, c1 = decode_affine(c.true_cost[instance], float(batch))
        state.anchor_s = world.now_s
        state.anchor_batch = batch
        state.anchor_context = batch_context(state)
        state.c0_s = c0 * noise
        state.c1_s = c1 * noise
        state.done = 0
        state.changed = 0
        _count_first_gaps(c, instance)
    limit = float(first_finish_step(c, instance) - state.steps)
    limit = min(limit, 1.0 + growth_steps_that_fit(c, instance))
    if state.role == STRICT:
        limit = min(limit, _iterations_within_mix_bound(c, instance))
    run_end = min(state.done + limit, _first_pull_boundary(c, instance))
    state.activity = DECODING
    state.run_end = int(run_end)
    schedule(c, instance, boundary_s(state, state.run_end))


@kernel
def _count_first_gaps(c, instance):
    """A sequence new to the batch has a gap of its own: from its last token, wherever that was, to the end of the
    first iteration here."""
    world = c.world[0]
    state = c.instances[instance]
    state.fresh_online = 0
    if state.selected_online == 0:
        return
    end_s = boundary_s(state, 1)
    counted = world.measure_from_s < end_s <= world.measure_to_s
    slot = lists.last(c, instance, ONLINE_DECODES)
    while slot != NONE:
        record = c.slots[slot]
        if record.selected == 1:
            if record.last_token_s < 0.0:
                break  # members of the previous batch follow
            state.fresh_online += 1
            if counted:
                c.tbt[tbt_bin(end_s - record.last_token_s)] += 1
            record.last_token_s = -1.0
        slot = record.prev


@kernel
def end_iteration(c, instance):
    """The boundary of a decode run: finished sequences leave, the others grow."""
    advance(c, instance, c.instances[instance].run_end)
    complete_finished(c, instance)
    grow(c, instance)


@kernel
def stop_decoding(c, instance):
    """Close the books of the last run when something other than the same batch follows."""
    state = c.instances[instance]
    c.world[0].busy_s += boundary_s(state, state.done) - state.anchor_s


@kernel
def decode_or_idle(c, instance, was_decoding, next_look_s):
    """Decode the selected batch; without one, idle until woken or until ``next_look_s``."""
    if batch_size(c.instances[instance]) > 0:
        start_run(c, instance, was_decoding)
        return
    if was_decoding:
        stop_decoding(c, instance)
    c.instances[instance].activity = IDLE
    schedule(c, instance, next_look_s)
