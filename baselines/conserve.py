"""ConServe (Qiao et al., arXiv 2410.01228): token budget, preemption by layer, KV kept on the host.

For ``cluster=unified4`` or pools. Offline prompts enter in small pieces; evicted offline KV is checkpointed to host
memory and restored instead of recomputed; an online arrival interrupts an offline prefill at a layer and finished
pieces are kept (the mechanism's ``chunk`` granularity). Its checkpoints are incremental and free in the background,
here they are taken at the eviction; its token budget is profiled, here it is a bound on the iteration.
"""

from ooco_gym.policy import ConstantPolicy

POLICY = ConstantPolicy(
    name="conserve",
    rules={"preemption": "chunk", "mix_selection": "exact", "evicted_kv": "host", "migration": "none"},
    knobs={"tpot_bound": 0.7, "gate_batch": 4.0, "prefill_chunk": 512.0},
    description="small offline pieces, interrupted by layer, KV kept on the host",
)
