"""Runs: many iterations of one unchanged decode batch, simulated as a single event.

Within a run nothing but the contexts changes, one token per sequence and iteration, and a decode iteration is affine
in the sum of contexts. So iteration k after the batch change (the *anchor*) ends at

    anchor + k (c0 + c1 C) + c1 B k (k - 1) / 2

with batch B and context sum C at the anchor. Where a run is cut, by an arrival or by a control tick, only ``run_end``
moves: the anchor and with it every time stay the same bits.
"""

from __future__ import annotations

import math

import numpy as np

from ooco_gym._jit import kernel
from ooco_gym.cluster import lists
from ooco_gym.cluster.log import ITERATION_END, is_on, note
from ooco_gym.cluster.queues import schedule
from ooco_gym.cluster.state import DECODING, NONE, ONLINE_DECODES, TBT_BINS, TBT_FIRST_S, TBT_RATIO

_LOG_RATIO = math.log(TBT_RATIO)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@kernel
def _hash(value):
    """SplitMix64 finaliser (Steele, Lea, Flood 2014)."""
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


@kernel
def batch_noise(c, instance):
    """Multiplicative error of the next batch on this instance: lognormal with mean 1, keyed, so never path dependent.

    One factor holds for a whole unchanged batch: a cost model's error belongs to the shape of the batch, which the
    run repeats.
    """
    sigma = c.world[0].noise_sigma
    state = c.instances[instance]
    count = state.batches
    state.batches = count + np.uint64(1)
    if sigma <= 0.0:
        return 1.0
    key = c.world[0].noise_seed + _GOLDEN * (np.uint64(2 * instance + 1) + (count << np.uint64(20)))
    u1 = (np.float64(_hash(key) >> np.uint64(11)) + 0.5) * 2.0**-53
    u2 = (np.float64(_hash(key + _GOLDEN) >> np.uint64(11)) + 0.5) * 2.0**-53
    normal = math.sqrt(-2.0 * math.log(u1)) * math.cos(2.0 * math.pi * u2)
    return math.exp(sigma * normal - 0.5 * sigma * sigma)


@kernel
def boundary_s(state, k):
    """End of iteration k after the anchor."""
    first_s = state.c0_s + state.c1_s * state.anchor_context
    return state.anchor_s + (k * first_s + state.c1_s * state.anchor_batch * (0.5 * k * (k - 1.0)))


@kernel
def duration_s(state, k):
    """Duration of iteration k (1, 2, ...) after the anchor."""
    return state.c0_s + state.c1_s * (state.anchor_context + (k - 1.0) * state.anchor_batch)


@kernel
def boundary_after(state, time_s):
    """Smallest k whose boundary lies strictly after ``time_s``: the root of the closed form, then made exact."""
    slope = 0.5 * state.c1_s * state.anchor_batch
    linear = state.c0_s + state.c1_s * state.anchor_context - slope
    elapsed = time_s - state.anchor_s
    if elapsed <= 0.0:
        k = 0
    else:
        k = int(2.0 * elapsed / (linear + math.sqrt(linear * linear + 4.0 * slope * elapsed)))
    while boundary_s(state, k) <= time_s:
        k += 1
    while k > 0 and boundary_s(state, k - 1) > time_s:
        k -= 1
    return k


@kernel
def ended_by(c, instance, time_s):
    """Iterations since the anchor that have ended at ``time_s``.

    One that ends at that very instant has, unless the event now running is the boundary of a lower instance: equal
    times go by index.
    """
    state = c.instances[instance]
    if boundary_s(state, state.done + 1) > time_s:
        return state.done  # as always in a crowd of instances that all look at each other
    k = boundary_after(state, time_s) - 1
    if c.world[0].acting < instance and k > state.done and boundary_s(state, k) == time_s:
        k -= 1
    return k


@kernel
def blocks_for(c, tokens):
    block = c.world[0].block_tokens
    return (tokens + block - 1) // block


@kernel
def growth_at(c, instance, step, offline):
    """Blocks that the selected sequences of one class need to go from ``step`` to ``step + 1``."""
    block = c.world[0].block_tokens
    return c.block_phase[instance, offline, (-step) % block]


@kernel
def growth(c, instance, first_step, count, offline):
    """Blocks needed by one class over ``count`` steps from ``first_step``: whole cycles, then the remainder."""
    block = c.world[0].block_tokens
    state = c.instances[instance]
    selected = state.selected_offline if offline == 0 else state.selected_online
    blocks = (count // block) * selected
    for step in range(first_step, first_step + count % block):
        blocks += growth_at(c, instance, step, offline)
    return blocks


@kernel
def growth_steps_that_fit(c, instance):
    """How many more steps of growth the free blocks allow, counted from the current step."""
    state = c.instances[instance]
    return growth_steps_within(c, instance, state.kv_blocks - state.used_blocks)


@kernel
def growth_steps_within(c, instance, free):
    """How many more steps of growth take at most ``free`` blocks, counted from the current step."""
    block = c.world[0].block_tokens
    state = c.instances[instance]
    batch = state.selected_online + state.selected_offline
    cycles = free // batch
    free -= cycles * batch
    steps = cycles * block
    for step in range(state.steps, state.steps + block):
        free -= growth_at(c, instance, step, 0) + growth_at(c, instance, step, 1)
        if free < 0:
            break
        steps += 1
    return steps


@kernel
def tbt_bin(gap_s):
    if gap_s <= TBT_FIRST_S:
        return 0
    return min(int(math.log(gap_s / TBT_FIRST_S) / _LOG_RATIO), TBT_BINS - 1)


@kernel
def _count_first_gaps(c, instance):
    """A sequence new to the batch has a gap of its own: from its last token, wherever that was, to the end of the
    first iteration here. The others continue from the iteration before."""
    world = c.world[0]
    state = c.instances[instance]
    end_s = boundary_s(state, 1)
    counted = world.measure_from_s < end_s <= world.measure_to_s
    fresh = 0
    slot = lists.last(c, instance, ONLINE_DECODES)
    while slot != NONE:
        record = c.slots[slot]
        if record.selected == 1:
            if record.last_token_s < 0.0:
                break  # members of the previous batch follow
            fresh += 1
            if counted:
                c.world[0].tbt[tbt_bin(end_s - record.last_token_s)] += 1
            record.last_token_s = -1.0
        slot = record.prev
    if counted:
        c.world[0].tbt[tbt_bin(duration_s(state, 1))] += state.selected_online - fresh


@kernel
def _count_gaps(c, instance, first, last):
    """Add the gaps of online tokens of iterations first..last after the anchor to the TBT histogram."""
    state = c.instances[instance]
    while first <= last:
        which = tbt_bin(duration_s(state, first))
        low, high = first, last  # the last iteration of the same bin, by bisection: durations only grow
        while low < high:
            middle = (low + high + 1) // 2
            if tbt_bin(duration_s(state, middle)) == which:
                low = middle
            else:
                high = middle - 1
        c.world[0].tbt[which] += state.selected_online * (low - first + 1)
        first = low + 1


@kernel
def advance(c, instance, k):
    """Account iterations up to k after the anchor. Safe to call at any time and in any number of pieces."""
    state = c.instances[instance]
    count = k - state.done
    if count <= 0:
        return
    world = c.world[0]
    if state.selected_online > 0:
        if state.done == 0:
            _count_first_gaps(c, instance)
        if boundary_s(state, k) > world.measure_from_s:
            _count_gaps(c, instance, max(state.done + 1, 2), k)
    # Growth belongs to the boundary between two iterations; the one at ``run_end`` is left to the decision there.
    grown = count if k < state.run_end else count - 1
    online_growth = growth(c, instance, state.steps, grown, 1)
    state.online_blocks += online_growth
    state.used_blocks += online_growth + growth(c, instance, state.steps, grown, 0)
    state.steps += count
    state.done = k
    state.context_online += count * state.selected_online
    state.context_offline += count * state.selected_offline
    state.last_iteration_s = duration_s(state, k)
    state.grown = 1 if k < state.run_end else 0
    world.iterations += count
    if is_on(c):  # the log cuts runs into single iterations
        batch = state.selected_online + state.selected_offline
        note(c, ITERATION_END, instance, NONE, batch, state.piece_tokens, state.piece_recomputed, duration_s(state, k))
    world.credited_output_tokens += count * state.selected_offline


@kernel
def advance_to_time(c, instance, time_s):
    """Account every iteration that has ended by ``time_s``."""
    state = c.instances[instance]
    if state.activity == DECODING:
        advance(c, instance, min(ended_by(c, instance, time_s), state.run_end))


@kernel
def cut(c, instance, time_s):
    """Make the next iteration boundary to come at ``time_s`` a decision; a no-op when one is due by then."""
    state = c.instances[instance]
    k = ended_by(c, instance, time_s) + 1
    if k < state.run_end:
        advance(c, instance, k - 1)
        state.run_end = k
        schedule(c, instance, boundary_s(state, k))
