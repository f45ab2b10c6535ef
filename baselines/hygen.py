"""HyGen (Sun et al., arXiv 2501.14808): offline work is admitted into an iteration as far as a latency budget allows.

One engine, a latency predictor, online first; offline decodes and prompt pieces are added one by one while the
predicted iteration stays within the budget. For ``cluster=unified4``; with pools the same budget acts on the strict
instances. The paper searches the budget by profiling: of 0.6 to 0.9 of the TPOT SLO, 0.7 serves most within 3 %
violations on four unified instances under the default training workload. Its prefix-sharing order of offline requests
is not in the mechanism.
"""

from ooco_gym.policy import ConstantPolicy

POLICY = ConstantPolicy(
    name="hygen",
    rules={"preemption": "iteration", "mix_selection": "exact", "migration": "none"},
    knobs={"tpot_bound": 0.7, "gate_batch": 4.0},
    description="offline work within a latency budget per iteration",
)
