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


def missing(config: BridgeConfig, knob: str) -> str | None:
    """Why a knob has no effect in this deployment; None where it has."""
    if knob in UNENFORCED_KNOBS:
        return UNENFORCED_KNOBS[knob]
    if config.dry_run:
        return "dry_run decides and logs only"
    if knob in ("pull_kv", "pull_length", "tpot_bound", "strict_prefill") and config.pull_mode == "off":
        return "pull is off in the cluster file"
    if knob == "pull_length" and config.pull_mode == "handover":
        return "with a connector the request at the head is handed over"
    if knob == "strict_prefill" and config.pull_mode == "handover":
        return "with a connector strict instances compute no offline prompts"
    return None


def not_enforced(config: BridgeConfig, rules: Mapping[str, str]) -> list[str]:
    """One sentence for each knob or chosen rule that has no or less effect here than in the simulator."""
    notes = [
        f"knob {knob} is not enforced: {reason}" for knob in KNOB_NAMES if (reason := missing(config, knob)) is not None
    ]
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
