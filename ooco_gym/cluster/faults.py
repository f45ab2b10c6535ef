"""What goes wrong: an instance fails with all its KV and comes back empty; a client goes away."""

from __future__ import annotations

import math

from ooco_gym._jit import kernel
from ooco_gym.cluster import lists
from ooco_gym.cluster.batching import clear_pieces
from ooco_gym.cluster.decode import stop_decoding
from ooco_gym.cluster.lists import pop_front, remove
from ooco_gym.cluster.log import CANCELLED, FAILED, LOST, RECOVERED, note_instance, note_request
from ooco_gym.cluster.queues import host_source, link_source, schedule
from ooco_gym.cluster.residents import (
    cancel_pull,
    enqueue_online,
    free_slot,
    leave,
    newest_held,
    release,
    requeue,
    wake,
)
from ooco_gym.cluster.run import advance_to_time
from ooco_gym.cluster.state import (
    BATCH,
    CHECKPOINTS,
    DECODING,
    DOWN,
    HELD,
    IDLE,
    INBOUND_OFFLINE,
    INBOUND_ONLINE,
    LINK,
    NONE,
    OFFLINE_DECODES,
    ONLINE_DECODES,
    PARTIAL,
    PARTIAL_OFFLINE,
    PARTIAL_ONLINE,
    PREFILL,
    QUEUED,
    RESIDENT,
    RESTORES,
    WAITING,
)
from ooco_gym.cluster.transfer import abandon_transfer, hand_over, start_link


@kernel
def _lose(c, slot):
    """A request without KV, off every list: it starts again, unless its client has gone."""
    record = c.slots[slot]
    if record.cancelled == 1:
        free_slot(c, slot)
        return
    c.world[0].lost += 1
    note_request(c, LOST, record.instance, slot)
    computed = record.done if record.phase == PREFILL or record.phase == PARTIAL else record.context - 1
    record.computed = max(record.computed, computed)
    requeue(c, slot)


@kernel
def _lose_list(c, instance, which):
    """Everything in one list, whose members hold KV here, from its last to its first."""
    while lists.length(c, instance, which) > 0:
        slot = lists.last(c, instance, which)
        if which in (ONLINE_DECODES, OFFLINE_DECODES):
            cancel_pull(c, slot)
            leave(c, instance, slot)
        else:
            remove(c, instance, which, slot)
        if which != CHECKPOINTS:
            release(c, instance, slot)
        _lose(c, slot)


@kernel
def _lose_held(c, instance):
    slot = newest_held(c, instance, False)
    while slot != NONE:
        remove(c, c.slots[slot].target, c.slots[slot].queue, slot)
        release(c, instance, slot)
        _lose(c, slot)
        slot = newest_held(c, instance, False)


@kernel
def _lose_transfers(c, source, instance):
    """The transfers on one link that start or end at ``instance``, from the last to the first."""
    slot = lists.last(c, source, LINK)
    while slot != NONE:
        before = c.slots[slot].prev
        if source == instance or c.slots[slot].target == instance:
            on_the_wire = before == NONE
            remove(c, source, LINK, slot)
            abandon_transfer(c, source, slot)
            _lose(c, slot)
            if on_the_wire:
                start_link(c, source)
        slot = before


@kernel
def _reroute_waiting(c, instance):
    for _ in range(lists.length(c, instance, WAITING)):
        slot = lists.last(c, instance, WAITING)
        remove(c, instance, WAITING, slot)
        enqueue_online(c, slot, True)


@kernel
def _hand_over_anew(c, instance):
    for which in (INBOUND_ONLINE, INBOUND_OFFLINE):
        for _ in range(lists.length(c, instance, which)):
            hand_over(c, pop_front(c, instance, which))


@kernel
def fail(c, instance):
    """An instance goes down: whatever it ran, held, sent or was sent is lost and starts again elsewhere."""
    world = c.world[0]
    state = c.instances[instance]
    if state.activity == DOWN:
        return
    world.failures += 1
    note_instance(c, FAILED, instance, 0)
    advance_to_time(c, instance, world.now_s)
    if state.activity == DECODING:
        stop_decoding(c, instance)
    state.activity = DOWN
    state.pending_s = 0.0  # all of it leaves before the first of it is routed
    schedule(c, instance, math.inf)
    pulled = state.pulled_slot
    if pulled != NONE and c.slots[pulled].leaving == 1:
        cancel_pull(c, pulled)
    _reroute_waiting(c, instance)
    for which in (BATCH, PARTIAL_ONLINE, PARTIAL_OFFLINE, ONLINE_DECODES, OFFLINE_DECODES):
        _lose_list(c, instance, which)
    _lose_held(c, instance)
    _lose_list(c, instance, CHECKPOINTS)
    _lose_list(c, instance, RESTORES)
    state.host_used = 0
    state.cancelled = 0
    schedule(c, host_source(c, instance), math.inf)
    _lose_transfers(c, instance, instance)
    schedule(c, link_source(c, instance), math.inf)
    for source in range(world.instances):
        _lose_transfers(c, source, instance)
    clear_pieces(c, instance)
    _hand_over_anew(c, instance)
    for other in range(world.instances):
        wake(c, other)


@kernel
def recover(c, instance):
    """The instance is up again, empty, and decides at once."""
    if c.instances[instance].activity == DOWN:
        c.instances[instance].activity = IDLE
        note_instance(c, RECOVERED, instance, 0)
        wake(c, instance)


@kernel
def cancel(c, request):
    """The client of an online request goes away: it leaves at once, or as soon as what it takes part in has ended."""
    slot = c.online[request].slot
    if slot == NONE:
        return
    world = c.world[0]
    record = c.slots[slot]
    instance = record.instance
    state = c.instances[instance]
    world.cancelled += 1
    note_request(c, CANCELLED, instance, slot)
    c.online[request].gone_s = world.now_s
    if record.phase == QUEUED:
        remove(c, instance, WAITING, slot)
        state.pending_s -= record.estimate_s
    elif record.phase == PARTIAL:
        remove(c, instance, PARTIAL_ONLINE, slot)
        state.pending_s -= record.estimate_s
        release(c, instance, slot)
    elif record.phase == HELD:
        remove(c, record.target, record.queue, slot)
        release(c, instance, slot)
        wake(c, record.target)
    else:
        record.cancelled = 1
        if record.phase == RESIDENT:
            state.cancelled += 1
            wake(c, instance)
        return
    free_slot(c, slot)
    wake(c, instance)
