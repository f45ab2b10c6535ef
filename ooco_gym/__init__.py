"""ooco-gym: a reinforcement-learning gym for online-offline co-located LLM serving.

Importing the package registers ``OOCO/Cluster-v0``; ``gymnasium.make("ooco_gym:OOCO/Cluster-v0")`` imports it first.
"""

__version__ = "0.1.0"

try:
    import gymnasium
except ModuleNotFoundError as error:  # a machine that only serves has no use for environments
    if error.name != "gymnasium":
        raise
else:
    gymnasium.register(
        id="OOCO/Cluster-v0",
        entry_point="ooco_gym.envs.cluster_env:ClusterEnv",
        vector_entry_point="ooco_gym.envs.vector_env:ClusterVectorEnv",
    )
