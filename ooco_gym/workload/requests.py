"""The record of online requests: when they arrive and how many tokens they read and write."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ooco_gym.errors import OocoError
from ooco_gym.workload.checks import MAX_TOKENS, positive
from ooco_gym.workload.randomness import FloatArray, IntArray


@dataclass(frozen=True, eq=False)
class Requests:
    """n requests in order of arrival.

    | field | type | unit |
    |---|---|---|
    | arrival_s | float64 (n,) | seconds from the start, non-decreasing, at least 0 |
    | prompt_tokens | int32 (n,) | tokens, at least 1 |
    | output_tokens | int32 (n,) | tokens, at least 1; hidden from every scheduler |

    Raises OocoError naming the field where a value breaks the table.
    """

    arrival_s: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray

    def __post_init__(self) -> None:
        arrival_s = np.ascontiguousarray(self.arrival_s, dtype=np.float64)
        if arrival_s.ndim != 1:
            raise OocoError(f"arrival_s has shape {arrival_s.shape}, it must have one dimension")
        if arrival_s.size and not (np.isfinite(arrival_s).all() and arrival_s[0] >= 0):
            raise OocoError("arrival_s must be finite and at least 0")
        if (np.diff(arrival_s) < 0).any():
            raise OocoError("arrival_s must be sorted")
        object.__setattr__(self, "arrival_s", arrival_s)
        for name in ("prompt_tokens", "output_tokens"):
            object.__setattr__(self, name, token_array(getattr(self, name), name, arrival_s.size))

    def __len__(self) -> int:
        return int(self.arrival_s.size)

    @property
    def duration_s(self) -> float:
        """Last arrival in seconds from the start; 0 without requests."""
        return float(self.arrival_s[-1]) if len(self) else 0.0

    @property
    def mean_rate_per_s(self) -> float:
        """Requests per second of ``duration_s``; 0 where that is 0."""
        return len(self) / self.duration_s if self.duration_s > 0 else 0.0

    @property
    def mean_prompt_tokens(self) -> float:
        return float(self.prompt_tokens.mean()) if len(self) else 0.0

    @property
    def mean_output_tokens(self) -> float:
        return float(self.output_tokens.mean()) if len(self) else 0.0

    def window(self, start_s: float, end_s: float) -> Requests:
        """Requests that arrive in [start_s, end_s), with time counted from ``start_s``."""
        first, last = np.searchsorted(self.arrival_s, (start_s, end_s))
        part = slice(first, max(first, last))
        return Requests(self.arrival_s[part] - start_s, self.prompt_tokens[part], self.output_tokens[part])

    def scaled(self, rate_scale: float) -> Requests:
        """The same requests at ``rate_scale`` times the rate: arrival times divided by it."""
        scale = positive(rate_scale, "rate_scale")
        return Requests(self.arrival_s / scale, self.prompt_tokens, self.output_tokens)


def token_array(values: object, name: str, size: int | None = None) -> IntArray:
    """``values`` as int32 (n,); OocoError naming ``name`` where they are not whole counts of at least 1."""
    given = np.asarray(values)
    if given.ndim != 1 or (size is not None and given.size != size):
        raise OocoError(f"{name} has shape {given.shape}, it must have shape ({'n' if size is None else size},)")
    if given.dtype != np.int32 and not (np.isfinite(given).all() and (given == np.rint(given)).all()):
        raise OocoError(f"{name} must be whole numbers")
    if given.size and not (given.min() >= 1 and given.max() <= MAX_TOKENS):
        raise OocoError(f"{name} must lie between 1 and {MAX_TOKENS}")
    return np.ascontiguousarray(given, dtype=np.int32)
