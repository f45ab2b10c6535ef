"""The Gymnasium face of the simulator."""

from ooco_gym.envs.cluster_env import ClusterEnv
from ooco_gym.envs.reward import IdealSeconds, Interval, Reward

__all__ = ["ClusterEnv", "IdealSeconds", "Interval", "Reward"]
