"""Seeds by purpose, so that training, model selection, admission and final evaluation never share an episode."""

from __future__ import annotations

from typing import Literal

import numpy as np

Purpose = Literal["train", "validation", "evaluation", "admission"]
_PURPOSES: tuple[Purpose, ...] = ("train", "validation", "evaluation", "admission")


def episode_seeds(purpose: Purpose, base_seed: int, count: int) -> list[int]:
    """``count`` episode seeds, a prefix of an endless stream that is disjoint between purposes and base seeds."""
    root = np.random.SeedSequence(base_seed, spawn_key=(_PURPOSES.index(purpose),))
    return [int(seed) for seed in root.generate_state(count, np.uint64) >> np.uint64(2)]
