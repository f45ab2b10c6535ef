"""Prefill pieces that ride on decode iterations: offline ones on a strict instance, both classes on a unified one."""

from __future__ import annotations

import math

from ooco_gym._jit import kernel
from ooco_gym.cluster import lists
from ooco_gym.cluster.backlog import offline_waits, peek_offline, take_offline
from ooco_gym.cluster.batching import (
    SHORTEST_PIECE_TOKENS,
    add_piece,
    begin_prefill,
    chunk_limit,
    gate_open,
    next_by_arrival,
    offline_fits,
    refuse_head,
    take_by_arrival,
)
from ooco_gym.cluster.control import PULL_KV, STRICT_PREFILL
from ooco_gym.cluster.decode import batch_size, iteration_with_pieces_s
from ooco_gym.cluster.lists import pop_front
from ooco_gym.cluster.residents import free_blocks, make_room_for_online
from ooco_gym.cluster.rules import mix_bound_s
from ooco_gym.cluster.run import blocks_for
from ooco_gym.cluster.state import (
    BATCH,
    OFFLINE_DECODES,
    ONLINE_DECODES,
    PARTIAL_OFFLINE,
    PARTIAL_ONLINE,
    SCHEDULER_COST,
    WAITING,
)


@kernel
def largest_piece(c, instance, past, left, most, bound_s):
    """The largest n <= ``most`` for which the predicted iteration with a piece of n of the ``left`` tokens stays within
    the bound; 0 where that would be too short.

    The time grows with n, so false position between a length that fits and one that does not closes in on it; every
    second step halves instead, which bounds the number of steps.
    """
    low = min(SHORTEST_PIECE_TOKENS, left)
    if most < low:
        return 0
    if bound_s == math.inf:
        return most
    cost = c.costs[instance, SCHEDULER_COST]
    high_over_s = iteration_with_pieces_s(c, cost, instance, most, past) - bound_s
    if high_over_s <= 0.0:
        return most
    low_over_s = iteration_with_pieces_s(c, cost, instance, low, past) - bound_s
    if low_over_s > 0.0:
        return 0
    high = most
    halve = False
    while high - low > 1:
        guess = (low + high) // 2
        if not halve:
            guess = low + int((high - low) * (-low_over_s / (high_over_s - low_over_s)))
            guess = min(max(guess, low + 1), high - 1)
        halve = not halve
        over_s = iteration_with_pieces_s(c, cost, instance, guess, past) - bound_s
        if over_s <= 0.0:
            low, low_over_s = guess, over_s
        else:
            high, high_over_s = guess, over_s
    return low


@kernel
def add_strict_prefill(c, instance):
    """Offline prompt tokens for the arithmetic that a strict iteration leaves idle, as far as its bound allows."""
    world = c.world[0]
    state = c.instances[instance]
    budget = int(math.floor(c.world[0].knobs[STRICT_PREFILL]))
    bound_s = mix_bound_s(c, instance)
    begun = max(budget, SHORTEST_PIECE_TOKENS)  # what has begun goes on, or it would hold its KV for ever
    while lists.length(c, instance, PARTIAL_OFFLINE) > 0:
        if lists.length(c, instance, BATCH) == world.max_seqs:
            return
        slot = lists.first(c, instance, PARTIAL_OFFLINE)
        past = c.slots[slot].done
        left = c.slots[slot].context - past
        piece = largest_piece(c, instance, past, left, min(left, begun - state.piece_tokens), bound_s)
        if piece == 0:
            return
        pop_front(c, instance, PARTIAL_OFFLINE)
        add_piece(c, instance, slot, piece)
    if budget < 1:
        return
    while lists.length(c, instance, BATCH) < world.max_seqs and offline_waits(c, instance):
        context, _ = peek_offline(c)
        piece = largest_piece(c, instance, 0, context, min(context, budget - state.piece_tokens), bound_s)
        need = blocks_for(c, context + 1)
        if piece == 0 or state.used_blocks + need > c.world[0].knobs[PULL_KV] * state.kv_blocks:
            refuse_head(c, instance)
            return
        slot = take_offline(c)
        begin_prefill(c, instance, slot)
        add_piece(c, instance, slot, piece)


@kernel
def _has_seat(c, instance):
    """Whether a unified instance may start another request."""
    seated = lists.length(c, instance, BATCH)
    for which in (ONLINE_DECODES, OFFLINE_DECODES, PARTIAL_ONLINE, PARTIAL_OFFLINE):
        seated += lists.length(c, instance, which)
    return seated < c.world[0].max_seqs


@kernel
def _tokens_left(c, instance):
    state = c.instances[instance]
    return c.world[0].chunk_tokens - batch_size(state) - state.piece_tokens


@kernel
def _continue_partial(c, instance, which):
    """Carry on what has begun, as far as the iteration's tokens go; says whether all of it takes part."""
    while lists.length(c, instance, which) > 0:
        slot = lists.first(c, instance, which)
        piece = min(c.slots[slot].context - c.slots[slot].done, _tokens_left(c, instance))
        if piece < 1:
            return False
        pop_front(c, instance, which)
        add_piece(c, instance, slot, piece)
    return True


@kernel
def _add_waiting_online(c, instance):
    while lists.length(c, instance, WAITING) > 0 and _has_seat(c, instance) and _tokens_left(c, instance) >= 1:
        slot = lists.first(c, instance, WAITING)
        context = c.slots[slot].context
        if not make_room_for_online(c, instance, blocks_for(c, context + 1)):
            return
        pop_front(c, instance, WAITING)
        begin_prefill(c, instance, slot)
        add_piece(c, instance, slot, min(context, _tokens_left(c, instance)))


@kernel
def _offline_piece(c, instance, past, left, bound_s):
    allowed = min(float(_tokens_left(c, instance)), chunk_limit(c) - c.instances[instance].piece_offline_tokens)
    return largest_piece(c, instance, past, left, int(min(float(left), allowed)), bound_s)


@kernel
def _add_offline(c, instance):
    bound_s = mix_bound_s(c, instance)
    while lists.length(c, instance, PARTIAL_OFFLINE) > 0:
        slot = lists.first(c, instance, PARTIAL_OFFLINE)
        past = c.slots[slot].done
        left = c.slots[slot].context - past
        piece = _offline_piece(c, instance, past, left, bound_s)
        if piece == 0:
            return
        pop_front(c, instance, PARTIAL_OFFLINE)
        add_piece(c, instance, slot, piece)
    if lists.length(c, instance, WAITING) > 0:
        return
    while offline_waits(c, instance) and gate_open(c, instance, 0) and _has_seat(c, instance):
        context, _ = peek_offline(c)
        piece = _offline_piece(c, instance, 0, context, bound_s)
        if piece == 0 or not offline_fits(c, instance, context + 1):
            refuse_head(c, instance)
            return
        slot = take_offline(c)
        begin_prefill(c, instance, slot)
        add_piece(c, instance, slot, piece)


@kernel
def add_online_first(c, instance):
    """Online prompts, then offline ones within the bound, the gate and the chunk."""
    if _continue_partial(c, instance, PARTIAL_ONLINE):
        _add_waiting_online(c, instance)
    _add_offline(c, instance)


@kernel
def add_fcfs(c, instance):
    """Both classes by arrival, as far as the iteration's tokens and the free KV go."""
    if not _continue_partial(c, instance, PARTIAL_ONLINE) or not _continue_partial(c, instance, PARTIAL_OFFLINE):
        return
    while _has_seat(c, instance) and _tokens_left(c, instance) >= 1:
        any_waits, offline, context = next_by_arrival(c, instance)
        if not any_waits:
            return
        if free_blocks(c, instance) < blocks_for(c, context + 1):
            refuse_head(c, instance)
            return
        slot = take_by_arrival(c, instance, offline)
        add_piece(c, instance, slot, min(context, _tokens_left(c, instance)))
