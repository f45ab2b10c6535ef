"""Rules: the decisions that are fixed for an episode, each a small compiled function.

Every score has one signature, ``(cluster, instance, slot) -> float``; the lowest score wins and ties go to the lower
index. A new choice is one branch here and one name in ``control.RULES``; the branch is predicted perfectly, and one
compiled simulator serves every combination of rules (numba cannot cache code that takes functions as arguments).
"""

from __future__ import annotations

import math

from ooco_gym._jit import kernel
from ooco_gym.cluster import lists
from ooco_gym.cluster.control import RULES
from ooco_gym.cluster.state import NONE, OFFLINE_DECODES, ONLINE_DECODES

ADMIT_NONE = RULES["admission"].index("none")
FCFS = RULES["prefill_order"].index("fcfs")
LAYER = RULES["preemption"].index("layer")
ROUND_ROBIN = RULES["routing"].index("round_robin")
DECODE_STRICT = RULES["offline_decode"].index("strict")
LEAST_KV = RULES["placement"].index("least_kv")
MIX_EXACT = RULES["mix_selection"].index("exact")
MIX_ALL = RULES["mix_selection"].index("all")
PULL_LONGEST = RULES["migration"].index("longest")
PULL_NONE = RULES["migration"].index("none")
EVICT_NEWEST = RULES["eviction"].index("newest")


@kernel
def routing_score(c, instance, slot):
    """Which relaxed instance prefills an online request: least predicted seconds of pending online prefill."""
    world = c.world[0]
    if world.rule_routing == ROUND_ROBIN:
        return float((instance - world.round_robin) % world.relaxed)
    return c.instances[instance].pending_s


@kernel
def placement_score(c, instance, slot):
    """Which strict instance decodes a request handed over after prefill: least KV taken, by online work or by all."""
    state = c.instances[instance]
    if c.world[0].rule_placement == LEAST_KV or c.slots[slot].online == NONE:
        return state.used_blocks / state.kv_blocks
    return state.online_blocks / state.kv_blocks


@kernel
def migration_score(c, preferred_tokens, context):
    """Which offline decode a strict instance pulls: the one whose context is closest to the preferred length."""
    if c.world[0].rule_migration == PULL_LONGEST:
        return -float(context)
    return abs(context - preferred_tokens)


@kernel
def evicts_for_online(c):
    """Whether offline work gives way when online work finds no KV room."""
    return c.world[0].rule_eviction != EVICT_NEWEST


@kernel
def victim(c, instance):
    """Whose KV goes when a decode batch outgrows its instance: the newest offline, then the newest online request."""
    offline = lists.last(c, instance, OFFLINE_DECODES)
    online = lists.last(c, instance, ONLINE_DECODES)
    if offline == NONE:
        return online
    if online == NONE or c.world[0].rule_eviction != EVICT_NEWEST:
        return offline
    return offline if c.slots[offline].order > c.slots[online].order else online


@kernel
def mix_bound_s(c, tpot_bound):
    """Longest strict iteration that mix selection may plan; infinite where every resident decodes."""
    if c.world[0].rule_mix_selection == MIX_ALL:
        return math.inf
    return tpot_bound * c.world[0].tpot_slo_s


@kernel
def mix_stride(c):
    """Every how many sequences mix selection re-estimates the iteration time."""
    return 1 if c.world[0].rule_mix_selection == MIX_EXACT else 3
