"""Online work alone: what the cluster does before anyone shares it, and the yardstick of the admission rule."""

from ooco_gym.policy import ConstantPolicy

POLICY = ConstantPolicy(
    name="no-offline",
    rules={"admission": "none", "migration": "none"},
    description="serves online requests only",
)
