"""Forming a prefill batch: who goes next, as far as places, KV and the gate allow."""

from __future__ import annotations

from ooco_gym._jit import kernel
from ooco_gym.cluster import lists
from ooco_gym.cluster.backlog import offline_waits, peek_offline, take_offline
from ooco_gym.cluster.control import GATE_BATCH, KV_RESERVE
from ooco_gym.cluster.lists import pop_front, push_back
from ooco_gym.cluster.residents import free_blocks, make_room_for_online, take_blocks
from ooco_gym.cluster.run import blocks_for
from ooco_gym.cluster.state import BATCH, NONE, OFFLINE_DECODES, WAITING


@kernel
def _gate_open(c, instance, members):
    """Whether the gate admits another offline request beside those resident, on their way out, or in this batch."""
    state = c.instances[instance]
    here = lists.length(c, instance, OFFLINE_DECODES) + state.held_offline + members
    return here < c.knobs[GATE_BATCH] * state.saturation_batch


@kernel
def _enter_batch(c, instance, slot):
    """Join the batch and reserve KV for prompt (or recomputed context) + 1 tokens."""
    push_back(c, instance, BATCH, slot)
    record = c.slots[slot]
    record.instance = instance
    record.blocks = blocks_for(c, record.context + 1)
    take_blocks(c, instance, slot, record.blocks)


@kernel
def _batch_has_place(c, members, tokens, more):
    world = c.world[0]
    return members == 0 or (members < world.max_seqs and tokens + more <= world.max_batch_tokens)


@kernel
def batch_online(c, instance):
    """First come, first served, up to the batch limits and the KV that offline work can be made to give up."""
    tokens = 0
    members = 0
    while lists.length(c, instance, WAITING) > 0:
        slot = lists.first(c, instance, WAITING)
        context = c.slots[slot].context
        if not _batch_has_place(c, members, tokens, context):
            break
        if not make_room_for_online(c, instance, blocks_for(c, context + 1)):
            break
        pop_front(c, instance, WAITING)
        _enter_batch(c, instance, slot)
        tokens += context
        members += 1
    return members


@kernel
def _offline_fits(c, instance, context):
    """Offline prefill leaves the reserved share of the KV free."""
    state = c.instances[instance]
    limit = (1.0 - c.knobs[KV_RESERVE]) * state.kv_blocks
    fits = state.used_blocks + blocks_for(c, context + 1) <= limit
    state.head_too_large = 0 if fits else 1
    return fits


@kernel
def batch_offline(c, instance):
    """From the head of the backlog, while the gate is open and the unreserved KV has room."""
    tokens = 0
    members = 0
    while offline_waits(c) and _gate_open(c, instance, members):
        context, _ = peek_offline(c)
        if not _batch_has_place(c, members, tokens, context) or not _offline_fits(c, instance, context):
            break
        slot = take_offline(c)
        _enter_batch(c, instance, slot)
        tokens += context
        members += 1
    return members


@kernel
def batch_fcfs(c, instance):
    """Both classes in one queue by arrival, as a plain prefill instance would serve them."""
    tokens = 0
    members = 0
    while True:
        waiting = lists.first(c, instance, WAITING)
        offline = offline_waits(c) and _gate_open(c, instance, members)
        if offline:
            context, since_s = peek_offline(c)
            if waiting != NONE and c.slots[waiting].arrival_s <= since_s:
                offline = False
        if not offline:
            if waiting == NONE:
                break
            context = c.slots[waiting].context
        if not _batch_has_place(c, members, tokens, context):
            break
        if free_blocks(c, instance) < blocks_for(c, context + 1):
            c.instances[instance].head_too_large = 1
            break
        if offline:
            slot = take_offline(c)
        else:
            slot = pop_front(c, instance, WAITING)
        _enter_batch(c, instance, slot)
        tokens += context
        members += 1
    return members
