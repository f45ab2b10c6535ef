"""A strict instance: online decode, offline decodes mixed in under the TPOT bound, and pulls for more of them."""

from __future__ import annotations

import math

from ooco_gym._jit import kernel
from ooco_gym.cluster import lists
from ooco_gym.cluster.control import PULL_KV, PULL_LENGTH, TPOT_BOUND
from ooco_gym.cluster.decode import (
    PULL_TARGET_RATIO,
    batch_context,
    batch_size,
    decode_or_idle,
    end_iteration,
    mix_selection,
    pull_step_limit_s,
)
from ooco_gym.cluster.residents import context_now, free_blocks, wake
from ooco_gym.cluster.rules import PULL_NONE, migration_score
from ooco_gym.cluster.run import advance_to_time
from ooco_gym.cluster.state import DECODING, NONE, OFFLINE_DECODES
from ooco_gym.cluster.transfer import admit_inbound
from ooco_gym.roofline.cost import decode_affine


@kernel
def preferred_length(c, instance, free_tokens, left):
    """L*: the longest context such that ``left`` more sequences of it exhaust either the TPOT slack or the free KV.

    Closed form min(free / left, (bound - c0(batch + left) - c1 sum) / (c1 left)); below 1 there is no such length.
    """
    state = c.instances[instance]
    bound_s = PULL_TARGET_RATIO * c.knobs[TPOT_BOUND] * c.world[0].tpot_slo_s
    c0, c1 = decode_affine(c.scheduler_cost[instance], float(batch_size(state) + left))
    by_time = (bound_s - c0 - c1 * batch_context(state)) / (c1 * left)
    return min(by_time, float(free_tokens // left))


@kernel
def pull(c, instance):
    """Ask one relaxed instance, in turn, for the offline decode closest to the preferred length."""
    world = c.world[0]
    state = c.instances[instance]
    if world.rule_migration == PULL_NONE or state.pulled_slot != NONE or world.now_s < state.next_pull_s:
        return
    if state.used_blocks >= c.knobs[PULL_KV] * state.kv_blocks or state.last_iteration_s >= pull_step_limit_s(c):
        return
    state.next_pull_s = world.now_s + world.pull_interval_s
    source = state.pull_cursor % world.relaxed
    state.pull_cursor += 1
    free_tokens = free_blocks(c, instance) * world.block_tokens
    left = max(int(math.ceil(state.saturation_batch)) - batch_size(state), 1)
    length = preferred_length(c, instance, free_tokens, left)
    if length < 1.0:
        return
    length = math.floor(length) * c.knobs[PULL_LENGTH]
    advance_to_time(c, source, world.now_s)
    best = NONE
    best_score = math.inf
    slot = lists.first(c, source, OFFLINE_DECODES)
    while slot != NONE:
        context = context_now(c, slot)
        if context <= free_tokens and c.slots[slot].leaving == 0:
            score = migration_score(c, length, context)
            if score < best_score:
                best, best_score = slot, score
        slot = c.slots[slot].next
    if best == NONE:
        return
    c.slots[best].leaving = 1
    c.slots[best].target = instance
    state.pulled_slot = best
    wake(c, source)


@kernel
def strict_decision(c, instance):
    """The end of an iteration, or a wake-up, of a strict instance."""
    world = c.world[0]
    state = c.instances[instance]
    was_decoding = state.activity == DECODING
    if was_decoding:
        end_iteration(c, instance)
    else:
        state.last_iteration_s = 0.0
    admit_inbound(c, instance)
    pull(c, instance)
    mix_selection(c, instance)
    # An idle instance has no steps to pull after; it steps emptily every pull interval instead.
    polls = world.rule_migration != PULL_NONE
    next_look_s = max(state.next_pull_s, world.now_s + world.pull_interval_s) if polls else math.inf
    decode_or_idle(c, instance, was_decoding, next_look_s)
