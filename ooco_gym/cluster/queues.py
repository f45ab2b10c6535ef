"""Priority queues of the event loop: who is next, which decode finishes first, which deadline passes first."""

from __future__ import annotations

from ooco_gym._jit import kernel
from ooco_gym.cluster.state import NONE

# Next event: a tournament over fixed sources. Instance i is source i, its link source I + i, its host link source
# 2 I + i, and after them come the sources of the whole cluster. The lower source wins a tie, which is exactly the
# specified order of equal times.
ONLINE_ARRIVAL, OFFLINE_ARRIVAL, CANCELLATION, FAULT, ROLE_CHANGE = range(5)
CLUSTER_SOURCES = 5


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
    c.times[source] = time_s
    leaves = c.winners.shape[0] // 2
    node = (leaves + source) // 2
    while node >= 1:
        left = c.winners[2 * node]
        right = c.winners[2 * node + 1]
        if right == NONE or (left != NONE and c.times[left] <= c.times[right]):
            c.winners[node] = left
        else:
            c.winners[node] = right
        node //= 2


@kernel
def next_source(c):
    return c.winners[1]


# Completions of one instance: a binary heap of slots keyed by the decode step at which each emits its last token.


@kernel
def _finish_step(c, slot):
    record = c.slots[slot]
    return record.prompt + record.output - record.context


@kernel
def _before(c, a, b):
    step_a, step_b = _finish_step(c, a), _finish_step(c, b)
    return step_a < step_b or (step_a == step_b and c.slots[a].order < c.slots[b].order)


@kernel
def _sift(c, instance, at):
    heap = c.heaps[instance]
    size = c.instances[instance].heap_size
    slot = heap[at]
    while at > 0:
        parent = (at - 1) // 2
        if not _before(c, slot, heap[parent]):
            break
        heap[at] = heap[parent]
        c.slots[heap[at]].heap_at = at
        at = parent
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and _before(c, heap[child + 1], heap[child]):
            child += 1
        if not _before(c, heap[child], slot):
            break
        heap[at] = heap[child]
        c.slots[heap[at]].heap_at = at
        at = child
    heap[at] = slot
    c.slots[slot].heap_at = at


@kernel
def completion_push(c, instance, slot):
    at = c.instances[instance].heap_size
    c.instances[instance].heap_size = at + 1
    c.heaps[instance, at] = slot
    _sift(c, instance, at)


@kernel
def completion_remove(c, instance, slot):
    at = c.slots[slot].heap_at
    size = c.instances[instance].heap_size - 1
    c.instances[instance].heap_size = size
    if at < size:
        moved = c.heaps[instance, size]
        c.heaps[instance, at] = moved
        c.slots[moved].heap_at = at
        _sift(c, instance, at)
    c.slots[slot].heap_at = NONE


@kernel
def first_finish_step(c, instance):
    return _finish_step(c, c.heaps[instance, 0])


# TPOT deadlines: a binary heap of (time, request); entries of requests that finished stay until their time comes.


@kernel
def timer_push(c, time_s, request):
    world = c.world[0]
    at = world.timer_count
    world.timer_count = at + 1
    while at > 0:
        parent = (at - 1) // 2
        if c.timer_s[parent] <= time_s:
            break
        c.timer_s[at] = c.timer_s[parent]
        c.timer_request[at] = c.timer_request[parent]
        at = parent
    c.timer_s[at] = time_s
    c.timer_request[at] = request


@kernel
def timer_pop(c):
    """Remove the earliest entry; the caller has read it at index 0."""
    world = c.world[0]
    size = world.timer_count - 1
    world.timer_count = size
    time_s, request = c.timer_s[size], c.timer_request[size]
    at = 0
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and c.timer_s[child + 1] < c.timer_s[child]:
            child += 1
        if c.timer_s[child] >= time_s:
            break
        c.timer_s[at] = c.timer_s[child]
        c.timer_request[at] = c.timer_request[child]
        at = child
    c.timer_s[at] = time_s
    c.timer_request[at] = request
