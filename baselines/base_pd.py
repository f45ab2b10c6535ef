"""Plain prefill/decode disaggregation: an offline request is treated like any other.

The "base P/D" of the xLLM report's Fig. 23 (arXiv 2510.14686): one first-come-first-served prefill queue, every decode
in the decode pool, no bound on the decode batch, KV overflow evicts the newest request whatever its class. The gate
stands at its top, so that only arrivals and KV limit how much offline work is in flight.
"""

from ooco_gym.policy import ConstantPolicy

POLICY = ConstantPolicy(
    name="base-pd",
    rules={
        "prefill_order": "fcfs",
        "preemption": "iteration",
        "offline_decode": "strict",
        "placement": "least_kv",
        "mix_selection": "all",
        "migration": "none",
        "eviction": "newest",
    },
    knobs={"gate_batch": 8.0},
    description="prefill/decode pools, one queue for both classes",
)
