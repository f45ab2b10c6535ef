"""OOCO that interrupts only where an online request would otherwise miss its TTFT.

One change to the paper's scheduler: an arrival interrupts a running offline prefill when its predicted TTFT without the
interruption exceeds 0.8 of the objective, instead of always. The prediction is OOCO's own cost model.
"""

from ooco_gym.policy import ConstantPolicy

POLICY = ConstantPolicy(
    name="slack-ooco", knobs={"preempt_slack": 0.8}, description="OOCO that interrupts only when TTFT is at risk"
)
