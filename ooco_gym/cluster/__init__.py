"""The mechanism: everything a serving cluster can do, and the contract through which policies decide."""

from ooco_gym.cluster.control import KNOBS, RULES, action_to_knobs, knobs_to_action, ooco_action, ooco_knobs
from ooco_gym.cluster.observation import observe
from ooco_gym.cluster.outcome import Outcome
from ooco_gym.cluster.simulator import Simulator
from ooco_gym.cluster.telemetry import Telemetry

__all__ = [
    "KNOBS",
    "RULES",
    "Outcome",
    "Simulator",
    "Telemetry",
    "action_to_knobs",
    "knobs_to_action",
    "observe",
    "ooco_action",
    "ooco_knobs",
]
