"""OOCO, literally as its open implementation schedules (arXiv 2511.21862; arXiv 2510.14686, section 3.1).

Every rule and knob of the Control contract defaults to it: layer preemption at every online arrival, the B_sat gate,
mix decoding selection re-estimated at every third sequence, pulls by preferred length 100 ms apart, one outstanding
per strict instance. The one correction: its TPOT comparison in the pull uses seconds on both sides.
"""

from ooco_gym.policy import ConstantPolicy

POLICY = ConstantPolicy(name="ooco", description="the paper's bottleneck scheduler and preemption")
