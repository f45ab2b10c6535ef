"""A unified instance: prefill and decode of both classes in mixed iterations, as a stock engine runs them."""

from __future__ import annotations

import math

from ooco_gym._jit import kernel
from ooco_gym.cluster.decode import decode_or_idle, mix_selection
from ooco_gym.cluster.mixing import add_fcfs, add_online_first
from ooco_gym.cluster.restore import start_restores
from ooco_gym.cluster.rules import FCFS


@kernel
def choose_unified(c, instance, was_decoding):
    """The next iteration of a unified instance."""
    start_restores(c, instance)
    mix_selection(c, instance)
    if c.world[0].rule_prefill_order == FCFS:
        add_fcfs(c, instance)
    else:
        add_online_first(c, instance)
    decode_or_idle(c, instance, was_decoding, math.inf)
