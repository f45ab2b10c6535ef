"""Prefill/decode disaggregation with online work first: offline requests fill what is left.

The "online priority" of the xLLM report's Fig. 23 (arXiv 2510.14686): online prefill goes before offline prefill and
offline KV gives way to online KV, but a running offline prefill is not interrupted and the decode batch is not bounded.
"""

from ooco_gym.policy import ConstantPolicy

POLICY = ConstantPolicy(
    name="online-priority",
    rules={
        "preemption": "iteration",
        "offline_decode": "strict",
        "placement": "least_kv",
        "mix_selection": "all",
        "migration": "none",
    },
    description="prefill/decode pools, online first, offline fills",
)
