"""Forming a prefill batch: who goes next, as far as places, KV and the gate allow."""

from __future__ import annotations

import math

from ooco_gym._jit import kernel
from ooco_gym.cluster import lists
from ooco_gym.cluster.backlog import offline_waits, peek_offline, take_offline
from ooco_gym.cluster.control import GATE_BATCH, KV_RESERVE, PREFILL_CHUNK, WHOLE_PROMPT
from ooco_gym.cluster.lists import pop_front, push_back
from ooco_gym.cluster.log import PIECE, note
from ooco_gym.cluster.residents import free_blocks, make_room_for_online, reserve
from ooco_gym.cluster.run import blocks_for
from ooco_gym.cluster.state import BATCH, NONE, PARTIAL_OFFLINE, PREFILL, WAITING
from ooco_gym.roofline.cost import causal_pairs

#: The shortest piece of a prompt worth an iteration's fixed cost: attention kernels pad a piece to this many rows.
SHORTEST_PIECE_TOKENS = 128


@kernel
def clear_pieces(c, instance):
    state = c.instances[instance]
    state.piece_tokens = 0
    state.piece_offline_tokens = 0
    state.online_pieces = 0
    state.piece_recomputed = 0
    state.piece_causal = 0.0
    state.piece_full = 0.0
    state.piece_kv = 0


@kernel
def begin_prefill(c, instance, slot):
    """Reserve KV for prompt (or recomputed context) + 1 tokens before the first piece."""
    record = c.slots[slot]
    record.instance = instance
    record.blocks = blocks_for(c, record.context + 1)
    reserve(c, instance, slot, record.blocks)


@kernel
def add_piece(c, instance, slot, tokens):
    """Let the next ``tokens`` of a prompt take part in the batch being formed."""
    state = c.instances[instance]
    record = c.slots[slot]
    past = record.done
    push_back(c, instance, BATCH, slot)
    record.phase = PREFILL
    record.piece = tokens
    state.piece_tokens += tokens
    state.piece_recomputed += max(0, min(record.computed, past + tokens) - past)
    state.piece_causal += causal_pairs(float(tokens), float(past))
    state.piece_full += float(tokens) * float(past + tokens)
    state.piece_kv += past + tokens
    if record.online == NONE:
        state.piece_offline_tokens += tokens
    else:
        state.online_pieces += 1
    note(c, PIECE, instance, slot, tokens, past, 0, 0.0)


@kernel
def too_short(piece, left):
    return piece < min(SHORTEST_PIECE_TOKENS, left)


@kernel
def chunk_limit(c):
    """Most offline prompt tokens in one iteration; infinite where prompts are not cut."""
    chunk = c.world[0].knobs[PREFILL_CHUNK]
    return math.inf if chunk >= WHOLE_PROMPT else math.floor(chunk)


@kernel
def gate_open(c, instance, others):
    """Whether the gate admits another offline request beside those that hold KV here and ``others``."""
    state = c.instances[instance]
    return state.offline_here + others < c.world[0].knobs[GATE_BATCH] * state.saturation_batch


@kernel
def offline_fits(c, instance, tokens):
    """Offline work leaves the reserved share of the KV free."""
    state = c.instances[instance]
    return state.used_blocks + blocks_for(c, tokens) <= (1.0 - c.world[0].knobs[KV_RESERVE]) * state.kv_blocks


@kernel
def _has_place(c, instance, more):
    world = c.world[0]
    members = lists.length(c, instance, BATCH)
    tokens = c.instances[instance].piece_tokens
    return members == 0 or (members < world.max_seqs and tokens + more <= world.max_batch_tokens)


@kernel
def batch_online(c, instance):
    """First come, first served, up to the batch limits and the KV that offline work can be made to give up."""
    while lists.length(c, instance, WAITING) > 0:
        slot = lists.first(c, instance, WAITING)
        context = c.slots[slot].context
        if not _has_place(c, instance, context) or not make_room_for_online(c, instance, blocks_for(c, context + 1)):
            break
        pop_front(c, instance, WAITING)
        begin_prefill(c, instance, slot)
        add_piece(c, instance, slot, context)


@kernel
def refuse_head(c, instance):
    """Note that the head of the backlog does not fit here: the next one may."""
    c.world[0].refusals += 1 - c.instances[instance].head_refused
    c.instances[instance].head_refused = 1


@kernel
def batch_offline(c, instance):
    """What has begun, then from the head of the backlog, while the gate is open and the unreserved KV has room."""
    state = c.instances[instance]
    limit = chunk_limit(c)
    while lists.length(c, instance, PARTIAL_OFFLINE) > 0:
        slot = lists.first(c, instance, PARTIAL_OFFLINE)
        left = c.slots[slot].context - c.slots[slot].done
        piece = int(min(float(left), limit - state.piece_tokens))
        if too_short(piece, left) or not _has_place(c, instance, piece):
            return
        pop_front(c, instance, PARTIAL_OFFLINE)
        add_piece(c, instance, slot, piece)
    if lists.length(c, instance, WAITING) > 0:
        return  # for want of KV, of which the backlog would take more
    while offline_waits(c, instance) and gate_open(c, instance, 0):
        context, _ = peek_offline(c)
        piece = int(min(float(context), limit - state.piece_tokens))
        if not _has_place(c, instance, piece):
            return
        if too_short(piece, context) or not offline_fits(c, instance, context + 1):
            refuse_head(c, instance)
            return
        slot = take_offline(c)
        begin_prefill(c, instance, slot)
        add_piece(c, instance, slot, piece)


@kernel
def next_by_arrival(c, instance):
    """(whether there is one, whether it is offline, its context) of the head of both classes' queues by arrival; here
    the gate also counts the online members of the batch."""
    waiting = lists.first(c, instance, WAITING)
    if offline_waits(c, instance) and gate_open(c, instance, c.instances[instance].online_pieces):
        context, since_s = peek_offline(c)
        if waiting == NONE or since_s < c.slots[waiting].arrival_s:
            return True, True, context
    if waiting == NONE:
        return False, False, 0
    return True, False, c.slots[waiting].context


@kernel
def take_by_arrival(c, instance, offline):
    slot = take_offline(c) if offline else pop_front(c, instance, WAITING)
    begin_prefill(c, instance, slot)
    return slot


@kernel
def batch_fcfs(c, instance):
    """Both classes in one queue by arrival, in whole prompts, as a plain prefill instance would serve them."""
    while True:
        any_waits, offline, context = next_by_arrival(c, instance)
        if not any_waits or not _has_place(c, instance, context):
            return
        if free_blocks(c, instance) < blocks_for(c, context + 1):
            refuse_head(c, instance)
            return
        slot = take_by_arrival(c, instance, offline)
        add_piece(c, instance, slot, context)
