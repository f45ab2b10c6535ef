"""Moving KV between instances: hand-overs after prefill and migrations of running decodes.

A transfer holds KV at its source and reserves it at its destination from the start. Each instance has one outgoing
link that serves first come, first served; a transfer occupies it for latency + bytes / bandwidth.
"""

from __future__ import annotations

import math

from ooco_gym._jit import kernel
from ooco_gym.cluster import lists
from ooco_gym.cluster.lists import pop_front, push_back
from ooco_gym.cluster.log import PULLED, TRANSFER_START, TRANSFERRED, WAITS_HELD, note
from ooco_gym.cluster.queues import link_source, schedule
from ooco_gym.cluster.residents import (
    cancel_pull,
    context_now,
    free_blocks,
    free_slot,
    give_back,
    join,
    leave,
    make_room_for_online,
    release,
    reserve,
    wake,
)
from ooco_gym.cluster.rules import FCFS, evicts_for_online, placement_score, unavailability
from ooco_gym.cluster.run import advance_to_time, blocks_for, cut
from ooco_gym.cluster.state import DECODING, DOWN, HELD, INBOUND_OFFLINE, INBOUND_ONLINE, LINK, NONE, STRICT, TRANSFER


@kernel
def _service_s(c, slot):
    """Seconds on the wire: the KV of every token but the newest, whose KV the next iteration computes."""
    world = c.world[0]
    kv_bytes = (c.slots[slot].context - 1) * world.kv_bytes_per_token
    return world.link_latency_s + kv_bytes / world.link_bytes_per_s


@kernel
def start_transfer(c, slot, target):
    """Reserve room at ``target`` and queue the KV on the source's link. The caller has checked the room."""
    record = c.slots[slot]
    source = record.instance
    now_s = c.world[0].now_s
    record.phase = TRANSFER
    note(c, TRANSFER_START, source, slot, target, record.context, 0, 0.0)
    record.target = target
    advance_to_time(c, target, now_s)  # its free blocks as of now
    reserve(c, target, slot, blocks_for(c, record.context))
    c.instances[target].incoming += 1
    if c.instances[target].activity == DECODING:
        cut(c, target, now_s)  # less room than its run was planned with
    push_back(c, source, LINK, slot)
    if lists.length(c, source, LINK) == 1:
        start_link(c, source)


@kernel
def start_link(c, source):
    """Put the first transfer of the queue on the wire; without one the link is quiet."""
    slot = lists.first(c, source, LINK)
    schedule(c, link_source(c, source), c.world[0].now_s + _service_s(c, slot) if slot != NONE else math.inf)


@kernel
def hand_over(c, slot):
    """After prefill: choose a strict instance and start the transfer, or wait for room at the source."""
    world = c.world[0]
    record = c.slots[slot]
    target = NONE
    best_rank = 3
    best = math.inf
    for instance in range(world.instances):
        if c.instances[instance].role == STRICT:
            rank = unavailability(c, instance)
            if rank > best_rank or (rank == best_rank and placement_score(c, instance, slot) >= best):
                continue  # by its KV as last accounted, which can only have grown
            advance_to_time(c, instance, world.now_s)
            score = placement_score(c, instance, slot)
            if rank < best_rank or score < best:
                target, best_rank, best = instance, rank, score
    if target == record.instance:  # it changed its role while the request was held
        join(c, target, slot)
        return
    record.target = target
    which = INBOUND_OFFLINE if record.online == NONE and world.rule_prefill_order != FCFS else INBOUND_ONLINE
    blocked = lists.length(c, target, INBOUND_ONLINE) > 0 or (
        which == INBOUND_OFFLINE and lists.length(c, target, INBOUND_OFFLINE) > 0
    )
    up = c.instances[target].activity != DOWN
    if up and not blocked and free_blocks(c, target) >= blocks_for(c, record.context):
        start_transfer(c, slot, target)
        return
    record.phase = HELD
    note(c, WAITS_HELD, record.instance, slot, target, 0, 0, 0.0)
    record.queue = which
    record.order = world.sequence
    world.sequence += 1
    push_back(c, target, which, slot)
    wake(c, target)


@kernel
def admit_inbound(c, target):
    """At a decision of ``target``: start the hand-overs that wait for room, online before offline."""
    while lists.length(c, target, INBOUND_ONLINE) > 0:
        slot = lists.first(c, target, INBOUND_ONLINE)
        blocks = blocks_for(c, c.slots[slot].context)
        evicting = c.slots[slot].online != NONE and evicts_for_online(c)
        if evicting:
            fits = make_room_for_online(c, target, blocks)
        else:
            fits = free_blocks(c, target) >= blocks
        if not fits:
            break
        pop_front(c, target, INBOUND_ONLINE)
        start_transfer(c, slot, target)
    while lists.length(c, target, INBOUND_OFFLINE) > 0:
        slot = lists.first(c, target, INBOUND_OFFLINE)
        if free_blocks(c, target) < blocks_for(c, c.slots[slot].context):
            return
        pop_front(c, target, INBOUND_OFFLINE)
        start_transfer(c, slot, target)


@kernel
def start_granted_pulls(c, source):
    """At a boundary of ``source``: send off the decodes that strict instances pulled."""
    world = c.world[0]
    if c.instances[source].granted == 0:
        return
    for target in range(world.instances):
        slot = c.instances[target].pulled_slot
        if slot == NONE:
            continue
        record = c.slots[slot]
        if record.leaving == 0 or record.instance != source:
            continue
        advance_to_time(c, target, world.now_s)
        if free_blocks(c, target) >= blocks_for(c, context_now(c, slot)):
            leave(c, source, slot)
            record.leaving = 0
            c.instances[source].granted -= 1
            world.migrations += 1
            note(c, PULLED, source, slot, target, 0, 0, 0.0)
            start_transfer(c, slot, target)
        else:
            cancel_pull(c, slot)


@kernel
def transfer_end(c, source):
    """The head of a link has arrived: free the source, make it resident at its target, start the next."""
    slot = pop_front(c, source, LINK)
    record = c.slots[slot]
    target = record.target
    forget_transfer(c, source, slot)
    note(c, TRANSFERRED, target, slot, source, 0, 0, 0.0)
    release(c, source, slot)
    record.blocks = blocks_for(c, record.context)
    if record.cancelled == 1:
        release(c, target, slot)
        free_slot(c, slot)
    else:
        join(c, target, slot)
    wake(c, source)
    wake(c, target)
    start_link(c, source)


@kernel
def forget_transfer(c, source, slot):
    """A transfer is over: take it off the books of both ends."""
    target = c.slots[slot].target
    c.instances[target].incoming -= 1
    if c.instances[target].pulled_slot == slot:
        c.instances[target].pulled_slot = NONE
    if c.instances[source].pushed_slot == slot:
        c.instances[source].pushed_slot = NONE


@kernel
def abandon_transfer(c, source, slot):
    """One of its ends failed: free the KV that a transfer, already off its link, holds at both."""
    forget_transfer(c, source, slot)
    release(c, source, slot)
    give_back(c, c.slots[slot].target, slot, blocks_for(c, c.slots[slot].context))
