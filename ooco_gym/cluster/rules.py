"""Rules: the decisions that are fixed for an episode, each a small compiled function.

Every score has one signature, ``(cluster, instance, slot) -> float``; the lowest score wins and ties go to the lower
index. A new choice is one branch here and one name in ``control.RULES``; the branch is predicted perfectly, and one
compiled simulator serves every combination of rules (numba cannot cache code that takes functions as arguments).
"""

from __future__ import annotations

import math

from ooco_gym._jit import kernel
from ooco_gym.cluster import lists
from ooco_gym.cluster.control import RULES, TPOT_BOUND
from ooco_gym.cluster.state import (
    DOWN,
    NONE,
    OFFLINE_DECODES,
    ONLINE_DECODES,
    PARTIAL_OFFLINE,
    PARTIAL_ONLINE,
    UNIFIED,
)

ADMIT_NONE = RULES["admission"].index("none")
ADMIT_UNIFIED = RULES["admission"].index("unified")
FCFS = RULES["prefill_order"].index("fcfs")
CHUNK = RULES["preemption"].index("chunk")
ITERATION = RULES["preemption"].index("iteration")
ROUND_ROBIN = RULES["routing"].index("round_robin")
DECODE_STRICT = RULES["offline_decode"].index("strict")
LEAST_KV = RULES["placement"].index("least_kv")
MIX_EXACT = RULES["mix_selection"].index("exact")
MIX_ALL = RULES["mix_selection"].index("all")
PULL_LONGEST = RULES["migration"].index("longest")
PULL_NONE = RULES["migration"].index("none")
EVICT_NEWEST = RULES["eviction"].index("newest")
KEEP_ON_HOST = RULES["evicted_kv"].index("host")


@kernel
def draining(c, instance):
    return c.instances[instance].becoming != c.instances[instance].role


@kernel
def unavailability(c, instance):
    """0 for an available instance, 1 for one that drains, 2 for one that is down: the last resort."""
    if c.instances[instance].activity == DOWN:
        return 2
    return 1 if draining(c, instance) else 0


@kernel
def routing_score(c, instance, slot):
    """Which instance prefills an online request: least predicted seconds of pending online prefill."""
    world = c.world[0]
    if world.rule_routing == ROUND_ROBIN:
        return float((instance - world.routed_last - 1) % world.instances)
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
    """Whose KV goes when a decode batch outgrows its instance: offline before online, what has begun before what
    decodes, and the newest of each; or, decoding, the newest of both."""
    partial = lists.last(c, instance, PARTIAL_OFFLINE)
    partial_online = lists.last(c, instance, PARTIAL_ONLINE)
    offline = lists.last(c, instance, OFFLINE_DECODES)
    online = lists.last(c, instance, ONLINE_DECODES)
    if partial != NONE:
        return partial
    if c.world[0].rule_eviction != EVICT_NEWEST:
        if offline != NONE:
            return offline
        return partial_online if partial_online != NONE else online
    if partial_online != NONE:
        return partial_online
    if offline == NONE or online == NONE:
        return online if offline == NONE else offline
    return offline if c.slots[offline].order > c.slots[online].order else online


@kernel
def tpot_slo_s(c, instance):
    """The tightest TPOT objective among the online requests that decode here; among all classes where none does."""
    least = math.inf
    for which in range(c.world[0].slo_classes):
        if c.instances[instance].class_decodes[which] > 0:
            least = min(least, c.world[0].slo_s[which, 1])
    return least if least < math.inf else c.world[0].tightest_tpot_s


@kernel
def mix_bound_s(c, instance):
    """Longest iteration that may be planned here; infinite where every resident decodes, or nothing online does."""
    if c.world[0].rule_mix_selection == MIX_ALL:
        return math.inf
    if c.instances[instance].role == UNIFIED and lists.length(c, instance, ONLINE_DECODES) == 0:
        return math.inf
    return c.world[0].knobs[TPOT_BOUND] * tpot_slo_s(c, instance)


@kernel
def mix_stride(c):
    """Every how many sequences mix selection re-estimates the iteration time."""
    return 1 if c.world[0].rule_mix_selection == MIX_EXACT else 3
