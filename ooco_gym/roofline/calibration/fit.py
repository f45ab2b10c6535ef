"""The fit: bounded, robust least squares in some twelve constants, their uncertainty, and which the data identify."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares

from ooco_gym.roofline.calibration.measurement import KINDS, Measurement
from ooco_gym.roofline.calibration.terms import Array, Terms, predict_s, terms
from ooco_gym.roofline.hardware import CalibratedConstants, HardwareSpec


class Bound(NamedTuple):
    low: float
    high: float
    known_within: float  # absolute standard error that is small enough even for a constant near 0


#: What a constant may be. Efficiencies above 1 happen where a cache or a boost clock beats the datasheet.
BOUNDS = {
    "gemm_flops": Bound(0.02, 1.3, 0.0),
    "gemm_bytes": Bound(0.02, 1.5, 0.0),
    "gemm_us": Bound(0.0, 200.0, 2.0),
    "elementwise_bytes": Bound(0.02, 6.0, 0.0),
    "elementwise_us": Bound(0.0, 500.0, 2.0),
    "prefill_attention_flops": Bound(0.02, 1.3, 0.0),
    "attention_bytes": Bound(0.02, 1.5, 0.0),
    "attention_us": Bound(0.0, 500.0, 2.0),
    "chain_ns": Bound(0.0, 500.0, 2.0),
    "decode_row_pad": Bound(0.0, 256.0, 5.0),
    "allreduce_us": Bound(0.0, 500.0, 2.0),
    "allreduce_bytes": Bound(0.005, 1.5, 0.0),
    "moe_flops": Bound(0.05, 1.5, 0.0),
    "moe_us": Bound(0.0, 500.0, 2.0),
}
IDENTIFIED_BELOW = 0.25  # relative standard error up to which the data, not the donor, say what a constant is
NOISE = 0.02  # relative error that a time has at least, for standard errors: a few rows can be met exactly by chance
_PRIOR_WEIGHT = 1e-3  # of a constant's distance to the donor: keeps it there when no row depends on it


def errors(predicted_s: Array, measured_s: Array) -> dict[str, float]:
    """MAPE, 95th percentile of the absolute error, and bias (mean signed error), all in per cent; and their n."""
    error = 100.0 * (np.asarray(predicted_s) / np.asarray(measured_s) - 1.0)
    if not len(error):
        return {"mape": math.nan, "p95": math.nan, "bias": math.nan, "n": 0}
    size = np.abs(error)
    found = {"mape": size.mean(), "p95": np.quantile(size, 0.95), "bias": error.mean()}
    return {**{name: float(value) for name, value in found.items()}, "n": len(error)}


@dataclass(frozen=True)
class Constant:
    """One fitted constant; ``value`` is the donor's where the data do not identify it, and ``error`` is then of that
    which the data alone would have said."""

    value: float
    error: float  # standard error, same unit
    identified: bool
    donor: float


@dataclass(frozen=True)
class Fit:
    """Constants of a device with their uncertainty, and the error on the rows they were fitted to.

    The device counts as calibrated when the data identify ``gemm_flops`` and ``gemm_bytes``.
    """

    device: HardwareSpec
    constants: dict[str, Constant]
    in_sample: dict[str, dict[str, float]]  # by kind


def solve(
    predict: Callable[[Mapping[str, float]], Array],
    measured_s: Array,
    weight: Array,
    start: Mapping[str, float],
    bounds: Mapping[str, tuple[float, float]],
) -> tuple[dict[str, float], dict[str, float]]:
    """Bounded least squares of log(predicted / measured), soft-L1 above 10 %; constants and standard errors by name.

    Standard errors are those of independent rows, s^2 (J^T J)^-1: rows of one kernel at neighbouring sizes are not
    independent, so they are too small; :func:`fit` takes the spread between models where there are several.
    """
    names = list(bounds)
    typical = np.array([start[name] or 0.1 * bounds[name][1] for name in names])
    low, high = (np.array([bounds[name][side] for name in names]) / typical for side in (0, 1))
    begin = np.clip(np.array([start[name] for name in names]) / typical, low + 1e-9, high - 1e-9)
    scale = np.sqrt(weight * len(weight) / weight.sum())

    def residual(x: Array) -> Array:
        values = {**start, **dict(zip(names, x * typical, strict=True))}
        logs = scale * np.log(predict(values) / measured_s)
        return np.concatenate([logs, _PRIOR_WEIGHT * math.sqrt(len(weight)) * (x - begin)])

    found = least_squares(residual, begin, bounds=(low, high), loss="soft_l1", f_scale=0.1)
    data = found.jac[: len(weight)]
    variance = max(2.0 * found.cost / max(len(weight) - len(names), 1), NOISE**2)
    covariance = variance * np.linalg.pinv(data.T @ data + 1e-12 * np.eye(len(names)), hermitian=True)
    spread = np.sqrt(np.maximum(np.diag(covariance), 0.0)) * typical
    at_zero = (low == 0) & (found.x < 1e-6)  # the solver stays inside its bounds
    best = np.where(at_zero, 0.0, found.x * typical)
    return dict(zip(names, best.tolist(), strict=True)), dict(zip(names, spread.tolist(), strict=True))


def fit(
    rows: Sequence[Measurement],
    donor: HardwareSpec,
    by_group: bool = True,
    keep: Sequence[str] = (),
    chain_all: bool = False,
) -> Fit:
    """Constants of the device whose datasheet peaks ``donor`` carries, from ``rows``.

    ``donor.calibrated`` is where the fit starts and what a constant keeps when the data do not identify it: relative
    standard error above IDENTIFIED_BELOW, or a value at an edge of BOUNDS. ``by_group`` adds the spread of fits
    without one group each (a jackknife over models) to the standard errors where there are at least three groups.
    Constants named in ``keep`` are not fitted; ``chain_all`` as in :func:`terms`.
    """
    table = terms(rows, donor, chain_all=chain_all)
    start = asdict(donor.calibrated)
    free = [name for name in _free_names(table) if name not in keep]
    value, error = _solve_terms(table, start, free)
    groups = sorted({row.group for row in rows})
    if by_group and len(groups) >= 3:
        label = np.array([row.group for row in rows])
        without = [_solve_terms(table[label != group], start, free)[0] for group in groups]
        for name in free:
            spread = np.std([one[name] for one in without]) * math.sqrt(len(groups) - 1)
            error[name] = max(error[name], float(spread))
    known = [name for name in free if _identified(name, value[name], error[name])]
    if known != free:  # the others keep the donor's value, and the rest is fitted beside that
        value = {**start, **_solve_terms(table, start, known)[0]}
    final = {**start, **{name: value[name] for name in known}}
    constants = {name: Constant(final[name], error.get(name, math.inf), name in known, start[name]) for name in BOUNDS}
    fitted = "gemm_flops" in known and "gemm_bytes" in known
    device = replace(donor, calibrated=CalibratedConstants(**final), is_calibrated=fitted)
    predicted = predict_s(table, device.calibrated)
    kinds = np.array([row.kind for row in rows])
    in_sample = {
        kind: errors(predicted[kinds == kind], table.measured_s[kinds == kind]) for kind in KINDS if kind in kinds
    }
    return Fit(device, constants, in_sample)


def _solve_terms(
    table: Terms, start: Mapping[str, float], free: Sequence[str]
) -> tuple[dict[str, float], dict[str, float]]:
    if not free:
        return {}, {}
    bounds = {name: (BOUNDS[name].low, BOUNDS[name].high) for name in free}
    return solve(lambda values: predict_s(table, values), table.measured_s, table.weight, start, bounds)


def _free_names(table: Terms) -> list[str]:
    """Constants that at least one row depends on."""
    mixed = (table.has_prefill * table.context_max_tokens).any()
    depends = {
        "gemm": table.gemm_count.any(),
        "elementwise": table.elementwise_count.any(),
        "prefill_attention": table.pairs_s.any(),
        "attention": table.attention_count.any(),
        "chain": mixed,
        "decode_row_pad": mixed,
        "allreduce": table.allreduce_count.any(),
        "moe": table.moe_count.any(),
    }
    return [name for name in BOUNDS if depends[name if name in depends else name.rsplit("_", 1)[0]]]


def _identified(name: str, value: float, error: float) -> bool:
    bound = BOUNDS[name]
    at_edge = value > 0.999 * bound.high or (bound.low > 0 and value < 1.001 * bound.low)
    return not at_edge and error <= max(IDENTIFIED_BELOW * value, bound.known_within)
