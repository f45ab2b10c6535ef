"""Arrival times: Poisson, regime-switching (MMPP), and a whole day of bursty traffic.

All three are one construction. A process of unit rate is drawn in *operational time* (expected arrivals so
far) and mapped to seconds through the inverse of the integrated rate: Daley and Vere-Jones, "An Introduction
to the Theory of Point Processes", vol. I, 2nd ed., sec. 7.4. The unit process and the rate come from separate
streams, so another ``rate_scale`` keeps the regimes in place and only packs the same unit process tighter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any, Protocol

import numpy as np

from ooco_gym.errors import OocoError
from ooco_gym.workload.chain import RegimeChain
from ooco_gym.workload.checks import not_negative, positive
from ooco_gym.workload.randomness import FloatArray, normal_pair

DAY_S = 86_400.0


class Arrivals(Protocol):
    """Random arrival times; ``rate_scale`` multiplies the rates and leaves dwell times alone."""

    @property
    def mean_rate_per_s(self) -> float:
        """Expected arrivals per second at ``rate_scale`` 1."""
        ...

    def sample(self, rng: np.random.Generator, duration_s: float, rate_scale: float = 1.0) -> FloatArray:
        """Sorted arrival times in [0, duration_s): float64 (n,), seconds."""
        ...


class PoissonArrivals:
    """Poisson process of constant rate."""

    def __init__(self, rate_per_s: float) -> None:
        self.mean_rate_per_s = positive(rate_per_s, "rate_per_s")

    def sample(self, rng: np.random.Generator, duration_s: float, rate_scale: float = 1.0) -> FloatArray:
        rate_per_s = self.mean_rate_per_s * rate_scale
        return _before(_unit_process(rng, rate_per_s * duration_s) / rate_per_s, duration_s)


@dataclass(frozen=True)
class Ticks:
    """Arrivals released on a pace-maker's grid: a share of them waits for the next tick and a small delay.

    The delay is |N(0, jitter_s)| plus an exponential of mean ``delay_s``. The grid's phase is drawn per
    sample.
    """

    period_s: float
    probability: float
    jitter_s: float
    delay_s: float

    def __post_init__(self) -> None:
        positive(self.period_s, "period_s")
        if not 0 <= self.probability <= 1:
            raise OocoError(f"probability is {self.probability!r}, it must lie between 0 and 1")
        not_negative(self.jitter_s, "jitter_s")
        not_negative(self.delay_s, "delay_s")

    def snap(self, rng: np.random.Generator, times_s: FloatArray) -> FloatArray:
        phase_s = self.period_s * rng.random()
        uniforms = rng.random((times_s.size, 4))
        normal, _ = normal_pair(uniforms[:, 1], uniforms[:, 2])
        late_s = self.jitter_s * np.abs(normal) - self.delay_s * np.log1p(-uniforms[:, 3])
        ticks_s = phase_s + self.period_s * np.ceil((times_s - phase_s) / self.period_s)
        return np.sort(np.where(uniforms[:, 0] < self.probability, ticks_s + late_s, times_s))


class MarkovArrivals:
    """Markov-modulated Poisson process: a chain on bins picks the rate, arrivals are Poisson within the bin.

    ``rate_per_s`` is (n_states,), ``transition_per_bin`` (n_states, n_states). ``ticks`` optionally moves
    arrivals to a pace-maker's grid.
    """

    def __init__(self, rate_per_s: Any, transition_per_bin: Any, bin_s: float, ticks: Ticks | None = None) -> None:
        self.chain = RegimeChain(transition_per_bin, bin_s)
        self.rate_per_s = _per_state(rate_per_s, self.chain, "rate_per_s")
        self.ticks = ticks
        self.mean_rate_per_s = positive(self.rate_per_s @ self.chain.stationary, "mean of rate_per_s")

    def sample(self, rng: np.random.Generator, duration_s: float, rate_scale: float = 1.0) -> FloatArray:
        path_rng, unit_rng, tick_rng = rng.spawn(3)
        edges_s, states = self.chain.path(path_rng, duration_s)
        times_s = _time_change(unit_rng, edges_s, self.rate_per_s[states] * rate_scale)
        return times_s if self.ticks is None else _before(self.ticks.snap(tick_rng, times_s), duration_s)


class DiurnalArrivals:
    """A day of traffic: daily harmonics x lognormal AR(1) x regime multiplier, Gamma renewal arrivals.

    rate(t) = mean_rate_per_s * D(t) * exp(e(t) - sigma^2/2) * m(t), where

    - D: exp(sum_k cos_k cos(2 pi k t/day) + sin_k sin(2 pi k t/day)), held for ``block_s``, scaled to mean 1;
    - e: stationary AR(1) per block with sd ``residual_sigma`` and correlation ``residual_ar1``;
    - m: ``state_multiplier`` of a :class:`RegimeChain`, scaled to mean 1;
    - arrivals: stationary renewal process with Gamma(``gamma_shape``) gaps in operational time; a shape below
      1 is burstier than Poisson (shape 1).

    Each sample starts at a uniform time of day. ``compress`` runs the day (D and e, not m) that many times
    faster, to let short episodes see its range. ``harmonics`` is (n, 2): cos_k and sin_k for k = 1..n.
    """

    def __init__(
        self,
        mean_rate_per_s: float,
        harmonics: Any,
        residual_sigma: float,
        residual_ar1: float,
        block_s: float,
        state_multiplier: Any,
        transition_per_bin: Any,
        bin_s: float,
        gamma_shape: float = 1.0,
        compress: float = 1.0,
    ) -> None:
        self.mean_rate_per_s = positive(mean_rate_per_s, "mean_rate_per_s")
        self.residual_sigma = not_negative(residual_sigma, "residual_sigma")
        if not -1 < residual_ar1 < 1:
            raise OocoError(f"residual_ar1 is {residual_ar1!r}, it must lie between -1 and 1")
        self.residual_ar1 = float(residual_ar1)
        self.block_s = positive(block_s, "block_s")
        self.gamma_shape = positive(gamma_shape, "gamma_shape")
        self.compress = positive(compress, "compress")
        self.chain = RegimeChain(transition_per_bin, bin_s)
        multiplier = _per_state(state_multiplier, self.chain, "state_multiplier")
        mean_multiplier = positive(multiplier @ self.chain.stationary, "mean of state_multiplier")
        self._multiplier = multiplier / mean_multiplier
        self._day = _daily_profile(harmonics, self.block_s)

    def sample(self, rng: np.random.Generator, duration_s: float, rate_scale: float = 1.0) -> FloatArray:
        day_rng, path_rng, unit_rng = rng.spawn(3)
        block_edges_s, base = self._base(day_rng, duration_s)
        run_edges_s, states = self.chain.path(path_rng, duration_s)
        edges_s = np.union1d(block_edges_s, run_edges_s)
        block = np.searchsorted(block_edges_s, edges_s[:-1], side="right") - 1
        run = np.searchsorted(run_edges_s, edges_s[:-1], side="right") - 1
        rate_per_s = self.mean_rate_per_s * rate_scale * base[block] * self._multiplier[states[run]]
        return _time_change(unit_rng, edges_s, rate_per_s, self.gamma_shape)

    def _base(self, rng: np.random.Generator, duration_s: float) -> tuple[FloatArray, FloatArray]:
        """Relative rate per block: (edges_s (m + 1,) from 0 to duration_s, base (m,) of mean 1)."""
        start_s = rng.random() * DAY_S
        first = int(start_s // self.block_s)
        n_blocks = int((start_s + duration_s * self.compress) // self.block_s) - first + 1
        inner_s = (np.arange(first + 1, first + n_blocks) * self.block_s - start_s) / self.compress
        edges_s = np.concatenate(([0.0], np.clip(inner_s, 0.0, duration_s), [duration_s]))
        uniforms = rng.random((n_blocks, 2))
        normals = normal_pair(uniforms[:, 0], uniforms[:, 1])[0].tolist()
        fresh = sqrt(1 - self.residual_ar1**2)
        residual = [normals[0]]
        for normal in normals[1:]:
            residual.append(self.residual_ar1 * residual[-1] + fresh * normal)
        noise = np.exp(self.residual_sigma * np.array(residual) - self.residual_sigma**2 / 2)
        return edges_s, self._day[np.arange(first, first + n_blocks) % self._day.size] * noise


def _daily_profile(harmonics: Any, block_s: float) -> FloatArray:
    """Relative rate of each block of a day, at the block's middle, mean 1."""
    n_blocks = round(DAY_S / block_s)
    if n_blocks < 1 or abs(n_blocks * block_s - DAY_S) > 1e-6:
        raise OocoError(f"block_s is {block_s:g}, it must divide the day of {DAY_S:g} s")
    table = np.array(harmonics, dtype=np.float64).reshape(-1, 2)
    angle = 2 * np.pi * (np.arange(n_blocks) + 0.5) / n_blocks
    log_rate = np.zeros(n_blocks)
    for k, (cosine, sine) in enumerate(table, start=1):
        log_rate += cosine * np.cos(k * angle) + sine * np.sin(k * angle)
    profile = np.exp(log_rate)
    return np.asarray(profile / profile.mean())


def _per_state(values: Sequence[float], chain: RegimeChain, what: str) -> FloatArray:
    array = np.array(values, dtype=np.float64)
    if array.shape != (chain.n_states,):
        raise OocoError(f"{what} has shape {array.shape}, it must be ({chain.n_states},), one value per state")
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise OocoError(f"{what} must be numbers of at least 0")
    return array


def _time_change(
    rng: np.random.Generator, edges_s: FloatArray, rate_per_s: FloatArray, gamma_shape: float = 1.0
) -> FloatArray:
    """Arrivals of a unit process sped up by a piecewise constant rate; edges (m + 1,), rates (m,)."""
    integrated = np.concatenate(([0.0], np.cumsum(rate_per_s * np.diff(edges_s))))
    times_s = np.interp(_unit_process(rng, integrated[-1], gamma_shape), integrated, edges_s)
    return _before(times_s, edges_s[-1])


def _unit_process(rng: np.random.Generator, total: float, gamma_shape: float = 1.0) -> FloatArray:
    """Points in [0, total) of a stationary renewal process of unit rate with Gamma gaps; shape 1 is Poisson.

    The first point is the equilibrium one (a uniform share of a length-biased gap: Cox, "Renewal Theory",
    1962, ch. 5), so that the expected number of points is exactly ``total``.
    """

    def gaps(n: int) -> FloatArray:
        if gamma_shape == 1.0:
            return rng.standard_exponential(n)
        return rng.standard_gamma(gamma_shape, n) / gamma_shape

    first = rng.random() * rng.standard_gamma(gamma_shape + 1) / gamma_shape
    chunk = ceil(total + 5 * sqrt(total / gamma_shape)) + 16  # nearly always enough
    points = np.cumsum(np.append(first, gaps(chunk)))
    while points[-1] < total:
        points = np.append(points[:-1], np.cumsum(np.append(points[-1], gaps(chunk))))
    return _before(points, total)


def _before(sorted_values: FloatArray, end: float) -> FloatArray:
    return sorted_values[: np.searchsorted(sorted_values, end)]
