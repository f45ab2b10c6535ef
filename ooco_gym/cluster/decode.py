"""Planning the next decode run of an instance: who takes part, and how long nothing will change."""

from __future__ import annotations

import math

from ooco_gym._jit import kernel
from ooco_gym.cluster import lists
from ooco_gym.cluster.control import PULL_KV, PUSHBACK, TPOT_BOUND
from ooco_gym.cluster.log import is_on
from ooco_gym.cluster.prefill import complete_pieces
from ooco_gym.cluster.queues import first_finish_step, schedule
from ooco_gym.cluster.residents import complete_finished, drop_cancelled, grow, longest_context, select, unselect
from ooco_gym.cluster.restore import may_restore
from ooco_gym.cluster.rules import PULL_NONE, draining, mix_bound_s, mix_stride, tpot_slo_s
from ooco_gym.cluster.run import (
    advance,
    batch_noise,
    boundary_after,
    boundary_s,
    duration_s,
    growth_steps_that_fit,
    growth_steps_within,
)
from ooco_gym.cluster.state import (
    BATCH,
    DECODING,
    IDLE,
    NONE,
    OFFLINE_DECODES,
    ONLINE_DECODES,
    RELAXED,
    SCHEDULER_COST,
    STRICT,
    TRUE_COST,
)
from ooco_gym.roofline.cost import causal_pairs, decode_affine, decode_s, iteration_s

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
    bound_s = mix_bound_s(c, instance)
    stride = mix_stride(c)
    cost = c.costs[instance, SCHEDULER_COST]
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
    bound_s = mix_bound_s(c, instance)
    if bound_s == math.inf:
        return math.inf
    size, context = _checkpoint(c, instance, _last_selected(c, instance), mix_stride(c))
    if size == 0:
        return math.inf
    c0, c1 = decode_affine(c.costs[instance, SCHEDULER_COST], float(size))
    return max(1.0, math.floor(((bound_s - c0) / c1 - context) / size) - 1.0)


@kernel
def pull_step_limit_s(c, instance):
    return PULL_STEP_RATIO * c.world[0].knobs[TPOT_BOUND] * tpot_slo_s(c, instance)


@kernel
def _first_boundary_at(c, instance, time_s):
    """The first boundary to come that is not before ``time_s``."""
    state = c.instances[instance]
    k = state.done + 1
    if boundary_s(state, k) < time_s:
        k = boundary_after(state, time_s)
        if boundary_s(state, k - 1) >= time_s:
            k -= 1
    return k


@kernel
def _first_pull_boundary(c, instance):
    """Iteration after which this strict instance should next ask for offline work; infinite if it will not."""
    state = c.instances[instance]
    if c.world[0].rule_migration == PULL_NONE or state.pulled_slot != NONE or draining(c, instance):
        return math.inf
    if state.used_blocks >= c.world[0].knobs[PULL_KV] * state.kv_blocks:
        return math.inf  # KV only fills up during a run
    k = _first_boundary_at(c, instance, state.next_pull_s)
    return float(k) if duration_s(state, k) < pull_step_limit_s(c, instance) else math.inf


@kernel
def _first_push_boundary(c, instance):
    """Iteration after which KV use calls for sending an offline decode back; infinite if it will not."""
    state = c.instances[instance]
    share = c.world[0].knobs[PUSHBACK]
    if share >= 1.0 or state.pushed_slot != NONE or lists.length(c, instance, OFFLINE_DECODES) == 0:
        return math.inf
    room = int(math.floor(share * state.kv_blocks)) - state.used_blocks
    steps = growth_steps_within(c, instance, room) if room >= 0 else 0
    return float(max(state.done + 1 + steps, _first_boundary_at(c, instance, state.next_push_s)))


@kernel
def start_run(c, instance, was_decoding):
    """Begin, or carry on, the run of the selected batch and plan its end. The batch is not empty."""
    world = c.world[0]
    state = c.instances[instance]
    if state.changed == 1 or not was_decoding:
        world.busy_s += boundary_s(state, state.done) - state.anchor_s if was_decoding else 0.0
        batch = batch_size(state)
        noise = batch_noise(c, instance)
        c0, c1 = decode_affine(c.costs[instance, TRUE_COST], float(batch))
        state.anchor_s = world.now_s
        state.anchor_batch = batch
        state.anchor_context = batch_context(state)
        state.c0_s = c0 * noise
        state.c1_s = c1 * noise
        state.done = 0
        state.changed = 0
    limit = float(first_finish_step(c, instance) - state.steps)
    limit = min(limit, 1.0 + growth_steps_that_fit(c, instance))
    if state.role != RELAXED:
        limit = min(limit, _iterations_within_mix_bound(c, instance))
    run_end = state.done + limit
    if state.role == STRICT:
        run_end = min(run_end, _first_pull_boundary(c, instance), _first_push_boundary(c, instance))
    state.activity = DECODING
    state.run_end = int(run_end)
    # The log shows every iteration; what was checkpointed in this very decision may come back after the next one.
    if is_on(c) or may_restore(c, instance):
        state.run_end = state.done + 1
    schedule(c, instance, boundary_s(state, state.run_end))


@kernel
def start_mixed(c, instance, was_decoding):
    """One iteration of the selected decodes and the prefill pieces in BATCH: a run of a single iteration."""
    state = c.instances[instance]
    if was_decoding:
        stop_decoding(c, instance)
    batch = batch_size(state)
    state.c0_s = batch_noise(c, instance) * iteration_with_pieces_s(c, c.costs[instance, TRUE_COST], instance, 0, 0)
    state.c1_s = 0.0
    state.anchor_s = c.world[0].now_s
    state.anchor_batch = batch
    state.anchor_context = batch_context(state)
    state.done = 0
    state.changed = 1  # whatever follows is another batch
    state.activity = DECODING
    state.run_end = 1
    schedule(c, instance, boundary_s(state, 1))


@kernel
def iteration_with_pieces_s(c, cost, instance, more, past):
    """Seconds of the iteration of the selected decodes, the pieces in BATCH and one more of ``more`` tokens."""
    state = c.instances[instance]
    pieces = lists.length(c, instance, BATCH)
    tokens, causal, full, kv = float(state.piece_tokens), state.piece_causal, state.piece_full, float(state.piece_kv)
    if more > 0:
        pieces += 1
        tokens += more
        causal += causal_pairs(float(more), float(past))
        full += float(more) * float(past + more)
        kv += past + more
    batch, context, longest = float(batch_size(state)), float(batch_context(state)), float(longest_context(c, instance))
    return iteration_s(cost, tokens, causal, full, kv, float(pieces), batch, context, longest)


@kernel
def end_iteration(c, instance):
    """The boundary of a run or of a mixed iteration: whoever is done leaves, pieces are booked, the rest grows."""
    state = c.instances[instance]
    advance(c, instance, state.run_end)
    if state.cancelled > 0:
        drop_cancelled(c, instance)
    complete_finished(c, instance)
    if lists.length(c, instance, BATCH) > 0:
        _complete_mixed(c, instance)
    grow(c, instance)


@kernel
def _complete_mixed(c, instance):
    state = c.instances[instance]
    batch = state.anchor_batch
    decodes_s = (
        decode_s(c.costs[instance, SCHEDULER_COST], float(batch), float(state.anchor_context)) if batch > 0 else 0.0
    )
    state.last_iteration_s = decodes_s  # what a pull may look at: prefill that rides along is no decode load
    c.world[0].mixed_iterations += 1
    complete_pieces(c, instance, state.c0_s, batch)


@kernel
def stop_decoding(c, instance):
    """Close the books of the last run when something other than the same batch follows."""
    state = c.instances[instance]
    c.world[0].busy_s += boundary_s(state, state.done) - state.anchor_s


@kernel
def decode_or_idle(c, instance, was_decoding, next_look_s):
    """Run what was selected, decodes, prefill pieces or both; without any, idle until woken or ``next_look_s``."""
    if lists.length(c, instance, BATCH) > 0:
        start_mixed(c, instance, was_decoding)
        return
    if batch_size(c.instances[instance]) > 0:
        start_run(c, instance, was_decoding)
        return
    if was_decoding:
        stop_decoding(c, instance)
    c.instances[instance].activity = IDLE
    schedule(c, instance, next_look_s)
