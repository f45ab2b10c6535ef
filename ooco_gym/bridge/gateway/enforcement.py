"""What of the Control contract a gateway can enforce from outside a stock engine, said in words before it starts.

Honest by construction: the scheduler reads only the knobs and rules that this table calls enforced.
"""

from __future__ import annotations

from collections.abc import Mapping

from ooco_gym.bridge.gateway.config import BridgeConfig
from ooco_gym.cluster.control import KNOB_NAMES, RULES

ENFORCED_KNOBS: dict[str, str] = {
    "preempt_slack": "offline requests in the way of an online arrival are aborted and restarted from their prompt",
    "gate_batch": "offline requests sent to a relaxed instance are counted against gate_batch * B_sat",
    "tpot_bound": "offline work goes to a strict instance while its predicted iteration stays within the bound; "
    "what runs there already is not paused, and online requests are never held back",
    "pull_kv": "offline work goes to a strict instance while its KV usage is below this",
    "pull_length": "the waiting offline request nearest to pull_length * L* goes to the strict instance first",
    "strict_prefill": "a strict instance with online requests computes an offline prompt while a piece of it is within "
    "this and the iteration within tpot_bound; one without any computes what it likes",
    "kv_reserve": "an offline request is sent while its prompt leaves this share of the scraped KV free",
}
UNENFORCED_KNOBS: dict[str, str] = {
    "prefill_chunk": "the engine cuts prompts into pieces by its own max_num_batched_tokens",
    "pushback": "a running decode cannot be moved with its KV; aborting it would waste what pushback wants to save",
    "strict_share": "instances keep the role that the cluster file gives them",
}
ENFORCED_RULES: dict[str, tuple[str, ...]] = {
    "admission": ("gate", "none"),
    "prefill_order": ("online_first", "fcfs"),
    "preemption": ("layer", "chunk", "iteration"),
    "routing": ("least_pending", "round_robin"),
    "offline_decode": ("relaxed", "strict"),
    "placement": ("least_online_kv", "least_kv"),
    "mix_selection": ("all",),
    "migration": ("preferred_length", "longest", "none"),
}
_RULE_NOTES = {
    "preemption": "an abort takes effect at the engine's next iteration, whichever of layer and chunk is chosen",
    "mix_selection": "a stock engine batches whatever it holds; the bound applies when work is sent",
    "eviction": "the engine chooses whom it evicts",
    "evicted_kv": "the engine recomputes what it evicts",
    "admission": "there are no unified instances behind a gateway",
}
_PULL_KNOBS = ("pull_kv", "pull_length", "strict_prefill")
_OFFLINE_KNOBS = ("gate_batch", "kv_reserve", *_PULL_KNOBS)
#: Rules under which knobs have nothing left to decide: rule, choice, knobs, what happens instead.
_SWITCHED_OFF: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("admission", "none", _OFFLINE_KNOBS, "no offline work is sent"),
    ("admission", "unified", _OFFLINE_KNOBS, "no offline work is sent"),
    ("preemption", "iteration", ("preempt_slack",), "nothing is aborted"),
    ("prefill_order", "fcfs", ("preempt_slack",), "nothing is aborted"),
    ("migration", "none", _PULL_KNOBS, "nothing is pulled"),
    ("migration", "longest", ("pull_length",), "the longest request is pulled"),
    ("mix_selection", "all", ("tpot_bound",), "iterations have no bound"),
)


def without_effect(config: BridgeConfig) -> dict[str, str]:
    """Knobs that a gateway of this cluster file does not act on, each with the reason; a dry run is not looked at."""
    why = dict(UNENFORCED_KNOBS)
    if config.pull_mode == "off":
        knobs = _PULL_KNOBS if config.connector == "none" else (*_PULL_KNOBS, "tpot_bound")  # plain routing has a bound
        why |= dict.fromkeys(knobs, "pull is off in the cluster file")
    elif config.pull_mode == "handover":
        why["pull_length"] = "with a connector the request at the head is handed over"
        why["strict_prefill"] = "with a connector strict instances compute no offline prompts"
    return why


def idle(config: BridgeConfig, rules: Mapping[str, str]) -> dict[str, str]:
    """Knobs that change nothing here, each with the reason: those of ``without_effect``, and those that a rule or the
    pools of the cluster file leave nothing to decide."""
    why: dict[str, str] = {}
    for rule, choice, knobs, reason in _SWITCHED_OFF:
        if rules[rule] == choice:
            why |= dict.fromkeys(knobs, f"with the rule {rule}={choice} {reason}")
    if rules["offline_decode"] == "strict" and config.connector != "none":
        why["pull_kv"] = "with the rule offline_decode=strict every offline decode goes to a strict instance"
    if len({entry.role for entry in config.instances}) == 1:
        why |= dict.fromkeys(_PULL_KNOBS, "with one pool there is nobody to pull from")
    return why | without_effect(config)


def not_enforced(config: BridgeConfig, rules: Mapping[str, str]) -> list[str]:
    """One sentence for each knob or chosen rule that has no or less effect here than in the simulator."""
    why = (dict.fromkeys(KNOB_NAMES, "dry_run decides and logs only") if config.dry_run else {}) | without_effect(
        config
    )
    notes = [f"knob {knob} is not enforced: {why[knob]}" for knob in KNOB_NAMES if knob in why]
    for rule in RULES:
        choice = rules[rule]
        if choice not in ENFORCED_RULES.get(rule, ()):
            notes.append(f"rule {rule}={choice} is not enforced: {_RULE_NOTES.get(rule, 'the engine decides')}")
        elif rule == "preemption" and choice != "iteration":
            notes.append(f"rule preemption={choice} is coarser here: {_RULE_NOTES['preemption']}")
        elif rule == "offline_decode" and choice == "strict" and config.connector == "none":
            notes.append(
                "rule offline_decode=strict is not enforced: without a connector decodes stay where they began"
            )
    return notes
