"""Intrusive lists of slots: a slot is in at most one list, and every operation is O(1)."""

from __future__ import annotations

from ooco_gym._jit import kernel
from ooco_gym.cluster.state import NONE

HEAD, TAIL, LENGTH = 0, 1, 2


@kernel
def first(c, row, which):
    return c.lists[row, which, HEAD]


@kernel
def last(c, row, which):
    return c.lists[row, which, TAIL]


@kernel
def length(c, row, which):
    return c.lists[row, which, LENGTH]


@kernel
def push_back(c, row, which, slot):
    ends = c.lists[row, which]
    tail = ends[TAIL]
    c.slots[slot].prev = tail
    c.slots[slot].next = NONE
    if tail == NONE:
        ends[HEAD] = slot
    else:
        c.slots[tail].next = slot
    ends[TAIL] = slot
    ends[LENGTH] += 1


@kernel
def push_front(c, row, which, slot):
    ends = c.lists[row, which]
    head = ends[HEAD]
    c.slots[slot].next = head
    c.slots[slot].prev = NONE
    if head == NONE:
        ends[TAIL] = slot
    else:
        c.slots[head].prev = slot
    ends[HEAD] = slot
    ends[LENGTH] += 1


@kernel
def remove(c, row, which, slot):
    ends = c.lists[row, which]
    before = c.slots[slot].prev
    after = c.slots[slot].next
    if before == NONE:
        ends[HEAD] = after
    else:
        c.slots[before].next = after
    if after == NONE:
        ends[TAIL] = before
    else:
        c.slots[after].prev = before
    ends[LENGTH] -= 1


@kernel
def pop_front(c, row, which):
    slot = c.lists[row, which, HEAD]
    remove(c, row, which, slot)
    return slot
