"""Priority queues of the event loop: who is next, which decode finishes first, which deadline passes first."""

from __future__ import annotations

from ooco_gym._jit import kernel
from ooco_gym.cluster.state import NONE

# Next event: a tournament over fixed sources. Instance i is source i, its link source I + i, its host link source
# 2 I + i, and after them come the sources of the whole cluster. The lower source wins a tie, which is exactly the
# specified order of equal times.
ONLINE_ARRIVAL, OFFLINE_ARRIVAL, DISRUPTION, ROLE_CHANGE = range(4)
CLUSTER_SOURCES = 4


@kernel
def link_source(c, instance):
    return c.world[0].instances + instance


@kernel
def host_source(c, instance):
    return 2 * c.world[0].instances + instance


@kernel
def cluster_source(c, which):
    return 3 * c.world[0].instances + which


@kernel
def schedule(c, source, time_s):
    """Set the time of one source's next event and replay its matches."""
    c.queue[source].time_s = time_s
    leaves = c.queue.shape[0] // 2
    node = (leaves + source) // 2
    while node >= 1:
        left = c.queue[2 * node].winner
        right = c.queue[2 * node + 1].winner
        if right == NONE or (left != NONE and c.queue[left].time_s <= c.queue[right].time_s):
            c.queue[node].winner = left
        else:
            c.queue[node].winner = right
        node //= 2


@kernel
def next_source(c):
    return c.queue[1].winner


# Completions of one instance: a binary heap of the selected, keyed by the decode step of each one's last token.


@kernel
def _before(c, a, b):
    return a.step < b.step or (a.step == b.step and c.slots[a.slot].order < c.slots[b.slot].order)


@kernel
def _place(c, instance, at, step, context, slot):
    entry = c.heaps[instance, at]
    entry.step = step
    entry.context = context
    entry.slot = slot
    c.slots[slot].heap_at = at


@kernel
def _sift(c, instance, at, step, context, slot):
    """Put an entry where the order has it, starting from the hole ``at``."""
    heap = c.heaps[instance]
    size = c.instances[instance].heap_size
    order = c.slots[slot].order
    while at > 0:
        parent = heap[(at - 1) // 2]
        if parent.step < step or (parent.step == step and c.slots[parent.slot].order < order):
            break
        _place(c, instance, at, parent.step, parent.context, parent.slot)
        at = (at - 1) // 2
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and _before(c, heap[child + 1], heap[child]):
            child += 1
        below = heap[child]
        if step < below.step or (step == below.step and order < c.slots[below.slot].order):
            break
        _place(c, instance, at, below.step, below.context, below.slot)
        at = child
    _place(c, instance, at, step, context, slot)


@kernel
def completion_push(c, instance, slot):
    """Enter a decode that has just been selected: its context counts from the instance's step 0."""
    record = c.slots[slot]
    at = c.instances[instance].heap_size
    c.instances[instance].heap_size = at + 1
    _sift(c, instance, at, record.prompt + record.output - record.context, record.context, slot)


@kernel
def completion_remove(c, instance, slot):
    at = c.slots[slot].heap_at
    size = c.instances[instance].heap_size - 1
    c.instances[instance].heap_size = size
    if at < size:
        moved = c.heaps[instance, size]
        _sift(c, instance, at, moved.step, moved.context, moved.slot)
    c.slots[slot].heap_at = NONE


@kernel
def first_finish_step(c, instance):
    return c.heaps[instance, 0].step


# TPOT deadlines: a binary heap of (time, request); entries of requests that finished stay until their time comes.


@kernel
def timer_push(c, time_s, request):
    world = c.world[0]
    at = world.timer_count
    world.timer_count = at + 1
    while at > 0:
        parent = (at - 1) // 2
        if c.timers[parent].time_s <= time_s:
            break
        c.timers[at].time_s = c.timers[parent].time_s
        c.timers[at].request = c.timers[parent].request
        at = parent
    c.timers[at].time_s = time_s
    c.timers[at].request = request


@kernel
def timer_pop(c):
    """Remove the earliest entry; the caller has read it at index 0."""
    world = c.world[0]
    size = world.timer_count - 1
    world.timer_count = size
    time_s, request = c.timers[size].time_s, c.timers[size].request
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and c.timers[child + 1].time_s < c.timers[child].time_s:
            child += 1
        if c.timers[child].time_s >= time_s:
            break
        c.timers[at].time_s = c.timers[child].time_s
        c.timers[at].request = c.timers[child].request
        at = child
    c.timers[at].time_s = time_s
    c.timers[at].request = request
