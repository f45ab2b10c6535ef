"""The Gymnasium face of the simulator."""

from ooco_gym.envs.cluster_env import ClusterEnv
from ooco_gym.envs.reward import IdealSeconds, Interval, Reward
from ooco_gym.envs.vector_env import ClusterVectorEnv

__all__ = ["ClusterEnv", "ClusterVectorEnv", "IdealSeconds", "Interval", "Reward"]
