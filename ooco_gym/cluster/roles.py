"""Role changes: moving instances between the pools, each drained first, at most one every ten seconds."""

from __future__ import annotations

import math

from ooco_gym._jit import kernel
from ooco_gym.cluster import lists
from ooco_gym.cluster.control import STRICT_SHARE
from ooco_gym.cluster.log import ROLE_CHANGED, STARTS_DRAINING, note_instance
from ooco_gym.cluster.queues import ROLE_CHANGE, cluster_source, schedule
from ooco_gym.cluster.residents import evict, wake
from ooco_gym.cluster.rules import draining
from ooco_gym.cluster.state import (
    INBOUND_OFFLINE,
    INBOUND_ONLINE,
    NONE,
    ONLINE_DECODES,
    PARTIAL_OFFLINE,
    RELAXED,
    STRICT,
    WAITING,
)

HYSTERESIS_S = 10.0


@kernel
def _missing_strict(c):
    """How many more instances should be strict than are, or will be."""
    world = c.world[0]
    if world.relaxed == 0:
        return 0
    total = world.relaxed + world.strict
    wanted = int(math.floor(world.strict + c.world[0].knobs[STRICT_SHARE] * total + 0.5))
    wanted = min(max(wanted, 1), total - 1)
    for instance in range(world.instances):
        if c.instances[instance].becoming == STRICT:
            wanted -= 1
    return wanted


@kernel
def consider_roles(c):
    """After a change of knobs: let the next role change begin as soon as the last one is ten seconds past."""
    world = c.world[0]
    due_s = max(world.now_s, world.role_change_s + HYSTERESIS_S) if _missing_strict(c) != 0 else math.inf
    schedule(c, cluster_source(c, ROLE_CHANGE), due_s)


@kernel
def begin_role_change(c):
    """One instance at the border of the pools starts to drain, or stops draining for the opposite change."""
    world = c.world[0]
    missing = _missing_strict(c)
    changing = NONE
    for instance in range(world.instances):
        becoming = c.instances[instance].becoming
        if missing > 0 and becoming == RELAXED:
            changing = instance  # the highest index
        elif missing < 0 and becoming == STRICT and changing == NONE:
            changing = instance
    c.instances[changing].becoming = STRICT if missing > 0 else RELAXED
    world.role_change_s = world.now_s
    note_instance(c, STARTS_DRAINING, changing, c.instances[changing].becoming)
    wake(c, changing)
    consider_roles(c)


@kernel
def _drained(c, instance):
    state = c.instances[instance]
    if state.role == RELAXED:
        return lists.length(c, instance, WAITING) == 0
    inbound = lists.length(c, instance, INBOUND_ONLINE) + lists.length(c, instance, INBOUND_OFFLINE) + state.incoming
    return lists.length(c, instance, ONLINE_DECODES) == 0 and inbound == 0 and state.pulled_slot == NONE


@kernel
def change_role_if_drained(c, instance):
    state = c.instances[instance]
    if not draining(c, instance) or not _drained(c, instance):
        return
    state.role = state.becoming
    c.world[0].role_changes += 1
    note_instance(c, ROLE_CHANGED, instance, state.role)
    while lists.length(c, instance, PARTIAL_OFFLINE) > 0:
        evict(c, instance, lists.last(c, instance, PARTIAL_OFFLINE))
