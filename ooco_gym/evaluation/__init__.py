"""From episodes to tables with intervals; admission of scenarios; figures."""

from ooco_gym.evaluation.admission import Admission, admit
from ooco_gym.evaluation.comparison import Case, Comparison
from ooco_gym.evaluation.episodes import run_episode, run_episodes
from ooco_gym.evaluation.seeds import episode_seeds

__all__ = ["Admission", "Case", "Comparison", "admit", "episode_seeds", "run_episode", "run_episodes"]
