"""Prompt and output lengths of requests: a fitted mixture, rows of a table, or fixed numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import erf, exp, log, sqrt
from typing import Any, Protocol

import numpy as np

from ooco_gym.errors import OocoError
from ooco_gym.workload.checks import not_negative, positive, whole
from ooco_gym.workload.randomness import FloatArray, IntArray, normal_pair
from ooco_gym.workload.requests import token_array


class Lengths(Protocol):
    """Joint law of (prompt_tokens, output_tokens).

    ``sample(rng, n)`` gives two int32 (n,) arrays; row k is the same for every n > k.
    """

    @property
    def mean_prompt_tokens(self) -> float: ...

    @property
    def mean_output_tokens(self) -> float: ...

    def sample(self, rng: np.random.Generator, n: int) -> tuple[IntArray, IntArray]: ...


@dataclass(frozen=True)
class Component:
    """One bivariate lognormal: (ln prompt, ln output) is normal with these means, sds and correlation."""

    weight: float
    mu_prompt: float
    mu_output: float
    sigma_prompt: float
    sigma_output: float
    rho: float

    def __post_init__(self) -> None:
        positive(self.weight, "weight")
        not_negative(self.sigma_prompt, "sigma_prompt")
        not_negative(self.sigma_output, "sigma_output")
        if not -1 <= self.rho <= 1:
            raise OocoError(f"rho is {self.rho!r}, it must lie between -1 and 1")


class MixtureLengths:
    """Mixture of bivariate lognormals: pick a component by weight, draw, exp, round, clip to the support.

    Weights must sum to 1 within 0.001 (published ones are rounded) and are renormalised. ``support_*`` are
    the smallest and largest length. The means are closed forms, see :func:`_clipped_lognormal_mean`.
    """

    def __init__(
        self,
        components: Sequence[Component],
        support_prompt_tokens: tuple[int, int],
        support_output_tokens: tuple[int, int],
    ) -> None:
        self.components = tuple(components)
        self.support_prompt_tokens = _support(support_prompt_tokens, "support of prompt_tokens")
        self.support_output_tokens = _support(support_output_tokens, "support of output_tokens")
        total = sum(part.weight for part in self.components)
        if abs(total - 1) > 1e-3:
            raise OocoError(f"weights of the length components sum to {total:g}, they must sum to 1")
        table = np.array(
            [[p.weight, p.mu_prompt, p.mu_output, p.sigma_prompt, p.sigma_output, p.rho] for p in self.components]
        )
        self._cumulated = np.cumsum(table[:, 0] / total)
        self._cumulated[-1] = 1.0
        self._columns = table[:, 1:].T.copy()
        self.mean_prompt_tokens = sum(
            p.weight / total * _clipped_lognormal_mean(p.mu_prompt, p.sigma_prompt, *self.support_prompt_tokens)
            for p in self.components
        )
        self.mean_output_tokens = sum(
            p.weight / total * _clipped_lognormal_mean(p.mu_output, p.sigma_output, *self.support_output_tokens)
            for p in self.components
        )

    def sample(self, rng: np.random.Generator, n: int) -> tuple[IntArray, IntArray]:
        uniforms = rng.random((n, 3))  # one row per request: see Lengths
        which = np.searchsorted(self._cumulated, uniforms[:, 0], side="right")
        mu_prompt, mu_output, sigma_prompt, sigma_output, rho = self._columns[:, which]
        z1, z2 = normal_pair(uniforms[:, 1], uniforms[:, 2])
        z2 = rho * z1 + np.sqrt(1.0 - rho * rho) * z2
        prompt = _to_tokens(mu_prompt + sigma_prompt * z1, self.support_prompt_tokens)
        output = _to_tokens(mu_output + sigma_output * z2, self.support_output_tokens)
        return prompt, output


class TableLengths:
    """Rows of a length table, drawn with replacement: keeps the joint law of the table exactly."""

    def __init__(self, prompt_tokens: Any, output_tokens: Any) -> None:
        self._prompt = token_array(prompt_tokens, "prompt_tokens")
        self._output = token_array(output_tokens, "output_tokens", self._prompt.size)
        if self._prompt.size == 0:
            raise OocoError("a length table must have at least one row")
        self.mean_prompt_tokens = float(self._prompt.mean())
        self.mean_output_tokens = float(self._output.mean())

    def sample(self, rng: np.random.Generator, n: int) -> tuple[IntArray, IntArray]:
        rows = (rng.random(n) * self._prompt.size).astype(np.int64)
        return self._prompt[rows], self._output[rows]


class FixedLengths:
    """Every request has the same lengths: for hand-worked examples and microbenchmarks."""

    def __init__(self, prompt_tokens: int, output_tokens: int) -> None:
        self._prompt = whole(prompt_tokens, "prompt_tokens")
        self._output = whole(output_tokens, "output_tokens")
        self.mean_prompt_tokens = float(self._prompt)
        self.mean_output_tokens = float(self._output)

    def sample(self, rng: np.random.Generator, n: int) -> tuple[IntArray, IntArray]:
        return np.full(n, self._prompt, np.int32), np.full(n, self._output, np.int32)


def _support(bounds: Sequence[int], what: str) -> tuple[int, int]:
    if len(bounds) != 2:
        raise OocoError(f"{what} is {list(bounds)!r}, it must be [smallest, largest]")
    smallest = whole(bounds[0], f"smallest value in the {what}")
    return smallest, whole(bounds[1], f"largest value in the {what}", least=smallest)


def _to_tokens(log_tokens: FloatArray, support: tuple[int, int]) -> IntArray:
    return np.clip(np.rint(np.exp(log_tokens)), *support).astype(np.int32)


def _clipped_lognormal_mean(mu: float, sigma: float, low: int, high: int) -> float:
    """E[min(max(X, low), high)] for ln X ~ N(mu, sigma^2).

    low P(X < low) + high P(X > high) + exp(mu + sigma^2/2) times the normal mass that the tilted law N(mu +
    sigma^2, sigma^2) puts between ln low and ln high (partial expectation of the lognormal: Johnson, Kotz and
    Balakrishnan 1994, ch. 14). Rounding to whole tokens moves it by far less than a token and is left out.
    """
    if sigma == 0:
        return min(max(exp(mu), low), high)
    a, b = (log(low) - mu) / sigma, (log(high) - mu) / sigma
    inside = exp(mu + sigma * sigma / 2) * (_normal_cdf(b - sigma) - _normal_cdf(a - sigma))
    return low * _normal_cdf(a) + high * _normal_cdf(-b) + inside


def _normal_cdf(x: float) -> float:
    return 0.5 * (1.0 + erf(x / sqrt(2.0)))
