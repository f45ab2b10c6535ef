"""A workload whose rows are given: for replays of recorded streams and for drawn examples."""

from __future__ import annotations

from typing import Any

import numpy as np

from ooco_gym.workload import OfflineJobs, Requests


class Given:
    """A workload that gives the same rows at every seed."""

    def __init__(self, sample: Requests | OfflineJobs) -> None:
        self._sample = sample
        self.mean_prompt_tokens = float(np.mean(sample.prompt_tokens)) if len(sample) else 0.0
        self.mean_output_tokens = float(np.mean(sample.output_tokens)) if len(sample) else 0.0

    def sample(self, seed: int, duration_s: float) -> Any:
        return self._sample
