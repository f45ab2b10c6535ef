"""What a vLLM user does today: stock engines, chunked prefill, ``--scheduling-policy priority`` with online first.

Source: vLLM's V1 scheduler (docs.vllm.ai, "Scheduling policy"). For ``cluster=unified4``. A waiting online request goes
before any offline one, offline prompts fill what the iteration's token budget leaves, and when KV runs short the
lowest priority, offline, is evicted and recomputed. No latency bound on the batch, no interruption inside an iteration.
"""

from ooco_gym.policy import ConstantPolicy

POLICY = ConstantPolicy(
    name="vllm-priority",
    rules={"preemption": "iteration", "mix_selection": "all", "migration": "none", "routing": "least_pending"},
    knobs={"gate_batch": 8.0},
    description="stock engines with chunked prefill and priorities",
)
