"""A relaxed instance: online prefill if any waits, else offline prefill through the gate, else offline decode."""

from __future__ import annotations

import math

from ooco_gym._jit import kernel
from ooco_gym.cluster import lists
from ooco_gym.cluster.batching import batch_fcfs, batch_offline, batch_online
from ooco_gym.cluster.decode import decode_or_idle, end_iteration, stop_decoding
from ooco_gym.cluster.prefill import complete_prefill, start_prefill
from ooco_gym.cluster.residents import select
from ooco_gym.cluster.rules import FCFS
from ooco_gym.cluster.state import DECODING, IDLE, NONE, OFFLINE_DECODES, PREFILLING_OFFLINE, PREFILLING_ONLINE
from ooco_gym.cluster.transfer import start_granted_pulls


@kernel
def _select_all(c, instance):
    """A relaxed instance decodes every offline request it holds."""
    slot = lists.last(c, instance, OFFLINE_DECODES)
    while slot != NONE and c.slots[slot].selected == 0:
        select(c, instance, slot)
        slot = c.slots[slot].prev


@kernel
def relaxed_decision(c, instance):
    """The end of an iteration, or a wake-up, of a relaxed instance."""
    state = c.instances[instance]
    was_decoding = state.activity == DECODING
    if was_decoding:
        end_iteration(c, instance)
    elif state.activity != IDLE:
        complete_prefill(c, instance)
        state.activity = IDLE
    start_granted_pulls(c, instance)
    activity = PREFILLING_ONLINE
    if c.world[0].rule_prefill_order == FCFS:
        members = batch_fcfs(c, instance)
    else:
        members = batch_online(c, instance)
        if members == 0:
            activity = PREFILLING_OFFLINE
            members = batch_offline(c, instance)
    if members > 0:
        if was_decoding:
            stop_decoding(c, instance)
        start_prefill(c, instance, activity)
        return
    _select_all(c, instance)
    decode_or_idle(c, instance, was_decoding, math.inf)
