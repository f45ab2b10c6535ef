"""A relaxed instance: online prefill if any waits, else offline prefill through the gate, else offline decode."""

from __future__ import annotations

import math

from ooco_gym._jit import kernel
from ooco_gym.cluster import lists
from ooco_gym.cluster.batching import batch_fcfs, batch_offline, batch_online
from ooco_gym.cluster.decode import decode_or_idle, stop_decoding
from ooco_gym.cluster.prefill import start_prefill
from ooco_gym.cluster.residents import select
from ooco_gym.cluster.restore import start_restores
from ooco_gym.cluster.rules import FCFS
from ooco_gym.cluster.state import BATCH, NONE, OFFLINE_DECODES, PREFILLING_OFFLINE, PREFILLING_ONLINE


@kernel
def _select_all(c, instance):
    """A relaxed instance decodes every offline request it holds."""
    slot = lists.last(c, instance, OFFLINE_DECODES)
    while slot != NONE and c.slots[slot].selected == 0:
        select(c, instance, slot)
        slot = c.slots[slot].prev


@kernel
def choose_relaxed(c, instance, was_decoding):
    """The next batch of a relaxed instance."""
    start_restores(c, instance)
    activity = PREFILLING_ONLINE
    if c.world[0].rule_prefill_order == FCFS:
        batch_fcfs(c, instance)
    else:
        batch_online(c, instance)
        if lists.length(c, instance, BATCH) == 0:
            activity = PREFILLING_OFFLINE
            batch_offline(c, instance)
    if lists.length(c, instance, BATCH) > 0:
        if was_decoding:
            stop_decoding(c, instance)
        start_prefill(c, instance, activity)
        return
    _select_all(c, instance)
    decode_or_idle(c, instance, was_decoding, math.inf)
