"""The hidden regime of bursty traffic: a Markov chain that steps once per time bin."""

from __future__ import annotations

from bisect import bisect_right
from math import ceil, inf, log1p
from typing import Any

import numpy as np
import numpy.typing as npt

from ooco_gym.errors import OocoError
from ooco_gym.workload.checks import positive
from ooco_gym.workload.randomness import FloatArray


class RegimeChain:
    """Markov chain on bins of ``bin_s`` seconds, started from its stationary law.

    ``transition_per_bin`` is (n_states, n_states); rows must sum to 1 within 0.001 (published ones are
    rounded) and are renormalised. ``stationary`` (n_states,) solves pi P = pi, sum pi = 1.
    """

    def __init__(self, transition_per_bin: Any, bin_s: float) -> None:
        matrix = np.array(transition_per_bin, dtype=np.float64)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
            raise OocoError(f"transition_per_bin has shape {matrix.shape}, it must be a square matrix")
        sums = matrix.sum(axis=1)
        if not ((matrix >= 0).all() and (np.abs(sums - 1) <= 1e-3).all()):
            raise OocoError("each row of transition_per_bin must be probabilities that sum to 1")
        self.bin_s = positive(bin_s, "bin_s")
        self.transition_per_bin = matrix / sums[:, None]
        self.n_states = len(matrix)
        self.stationary = _stationary(self.transition_per_bin)
        self._start = _cumulated(self.stationary)
        jumps = self.transition_per_bin * (1 - np.eye(self.n_states))
        leaves = jumps.sum(axis=1).tolist()
        self._log_stay = [log1p(-leave) if leave < 1 else -inf for leave in leaves]
        self._jump = [_cumulated(jumps[i] / leave) if leave > 0 else [] for i, leave in enumerate(leaves)]

    def path(self, rng: np.random.Generator, duration_s: float) -> tuple[FloatArray, npt.NDArray[np.int64]]:
        """Regimes over [0, duration_s]: (edges_s float64 (m + 1,), states int64 (m,)).

        State i holds from edge i to edge i + 1. Whole dwells are drawn (geometric in bins) instead of
        stepping bin by bin. Uniforms come in blocks of fixed size, so a longer path starts with the shorter
        one.
        """
        n_bins = ceil(duration_s / self.bin_s)
        state = bisect_right(self._start, rng.random())
        starts, states = [0], [state]
        at = 0
        block: list[list[float]] = []
        while self._jump[state]:  # an empty row is an absorbing state
            if not block:
                block = rng.random((32, 2)).tolist()
            u_dwell, u_next = block.pop()
            at += 1 + int(log1p(-u_dwell) / self._log_stay[state])
            if at >= n_bins:
                break
            state = bisect_right(self._jump[state], u_next)
            starts.append(at)
            states.append(state)
        edges_s = np.append(np.array(starts, dtype=np.float64) * self.bin_s, duration_s)
        return edges_s, np.array(states, dtype=np.int64)


def _stationary(matrix: FloatArray) -> FloatArray:
    n = len(matrix)
    equations = np.vstack([matrix.T - np.eye(n), np.ones(n)])
    solution = np.linalg.lstsq(equations, np.append(np.zeros(n), 1.0), rcond=None)[0]
    solution = np.maximum(solution, 0.0)
    return np.asarray(solution / solution.sum())


def _cumulated(probabilities: FloatArray) -> list[float]:
    """Cumulated probabilities whose last reachable entry is exactly 1, for bisection with a uniform."""
    sums = np.cumsum(probabilities)
    sums[np.flatnonzero(probabilities)[-1] :] = 1.0
    return [float(value) for value in sums]
