"""Two fleets: the pools serve online requests only, unified instances serve offline requests only.

What operators do without co-location. Deploy it with ``cluster=1x1u2`` (one relaxed, one strict, two unified): on a
cluster without unified instances offline work finds nowhere to go.
"""

from ooco_gym.policy import ConstantPolicy

POLICY = ConstantPolicy(
    name="dedicated-split",
    rules={"admission": "unified", "migration": "none"},
    knobs={"gate_batch": 8.0},
    description="separate instances for online and offline work",
)
