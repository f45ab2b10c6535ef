"""Checkpoints in host memory: bringing the KV of evicted offline requests back to their instance."""

from __future__ import annotations

import math

from ooco_gym._jit import kernel
from ooco_gym.cluster import lists
from ooco_gym.cluster.batching import gate_open, offline_fits
from ooco_gym.cluster.control import PULL_KV
from ooco_gym.cluster.lists import pop_front, push_back
from ooco_gym.cluster.log import RESTORED, note_request
from ooco_gym.cluster.queues import host_source, schedule
from ooco_gym.cluster.residents import join, reserve, wake
from ooco_gym.cluster.run import blocks_for
from ooco_gym.cluster.state import (
    CHECKPOINTS,
    INBOUND_OFFLINE,
    INBOUND_ONLINE,
    NONE,
    RESTORE,
    RESTORES,
    STRICT,
    WAITING,
)


@kernel
def may_restore(c, instance):
    """Whether the first checkpoint that waits here has room that nobody before it wants; False when none waits."""
    slot = lists.first(c, instance, CHECKPOINTS)
    if slot == NONE:
        return False
    for which in (WAITING, INBOUND_ONLINE, INBOUND_OFFLINE):
        if lists.length(c, instance, which) > 0:
            return False
    state = c.instances[instance]
    context = c.slots[slot].context
    empty = state.used_blocks == 0  # where it must fit, whatever the knobs keep free
    if state.role == STRICT:
        return empty or state.used_blocks + blocks_for(c, context) <= c.world[0].knobs[PULL_KV] * state.kv_blocks
    return (empty or offline_fits(c, instance, context)) and gate_open(c, instance, 0)


@kernel
def start_restores(c, instance):
    """Reserve KV for the checkpoints that wait here, in order, and queue them on the host link."""
    while may_restore(c, instance):
        slot = pop_front(c, instance, CHECKPOINTS)
        record = c.slots[slot]
        record.phase = RESTORE
        record.blocks = blocks_for(c, record.context)
        reserve(c, instance, slot, record.blocks)
        push_back(c, instance, RESTORES, slot)
        if lists.length(c, instance, RESTORES) == 1:
            start_host_link(c, instance)


@kernel
def start_host_link(c, instance):
    """Put the first restore of the queue on the host link; without one it is quiet."""
    world = c.world[0]
    slot = lists.first(c, instance, RESTORES)
    end_s = math.inf
    if slot != NONE:
        end_s = world.now_s + (c.slots[slot].context - 1) * world.kv_bytes_per_token / world.host_bytes_per_s
    schedule(c, host_source(c, instance), end_s)


@kernel
def restore_end(c, instance):
    """The head of a host link has arrived: it is resident, and its host memory is free."""
    slot = pop_front(c, instance, RESTORES)
    c.instances[instance].host_used -= blocks_for(c, c.slots[slot].context)
    c.world[0].restores += 1
    note_request(c, RESTORED, instance, slot)
    join(c, instance, slot)
    wake(c, instance)
    start_host_link(c, instance)
