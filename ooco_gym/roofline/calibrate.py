"""Fit the constants of a device to measured times: whole iterations, single kernels, or two numbers.

A measurement becomes the terms of the formula in ``cost.py`` at efficiency 1 (:func:`terms`), so that one vectorised
function, :func:`predict_s`, gives kernels and whole iterations for any constants, and the fit is a bounded, robust
least-squares problem in some twelve numbers. The terms come out of :func:`~ooco_gym.roofline.cost.build_cost` on a
device with unit constants: the formula is written down once.
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from ooco_gym.errors import OocoError
from ooco_gym.roofline.cost import ACTIVATION_BYTES, build_cost, causal_pairs
from ooco_gym.roofline.hardware import CalibratedConstants, HardwareSpec, XllmConstants
from ooco_gym.roofline.model import ModelSpec, resolve_model

KINDS = ("iteration", "gemm", "elementwise", "attention", "allreduce")

#: Columns of a tidy table and what they hold; ``kind`` and ``ms`` are needed in every row, the rest by kind.
COLUMNS = {
    "kind": "iteration: a whole iteration; or one kernel: gemm, elementwise (norms, rotary embedding, activation and "
    "residuals of one layer), attention (of one layer), allreduce (one of a layer's two)",
    "ms": "measured milliseconds",
    "model": "preset name or path of a config.json; needed by every kind but gemm",
    "tp": "tensor-parallel degree (1)",
    "tokens": "rows T: of gemm, elementwise and allreduce",
    "n": "columns out of a gemm, on one rank",
    "k": "columns in of a gemm, on one rank",
    "prefills": "prefill chunks in the batch, of equal size (1 where prefill_tokens is above 0)",
    "prefill_tokens": "new tokens of each chunk",
    "past_tokens": "tokens of each chunk's prompt that are in the KV cache already",
    "decodes": "decoding sequences in the batch",
    "context_tokens": "context of each of them",
}


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
KERNEL_WEIGHT = 0.1
NOISE = 0.02  # relative error that a time has at least, for standard errors: a few rows can be met exactly by chance
_PRIOR_WEIGHT = 1e-3  # of a constant's distance to the donor: keeps it there when no row depends on it

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Measurement:
    """One measured time. ``seconds`` is of the whole iteration or of one kernel; the fields are those of COLUMNS.

    ``group`` is the unit that is left out for the uncertainty, a model as a rule. ``host_s`` is the engine's part of a
    whole iteration, which is no property of the device.
    """

    kind: str
    seconds: float
    model: ModelSpec | None = None
    tp: int = 1
    tokens: float = 0.0
    n: float = 0.0
    k: float = 0.0
    prefills: float = 0.0
    prefill_tokens: float = 0.0
    past_tokens: float = 0.0
    decodes: float = 0.0
    context_tokens: float = 0.0
    group: str = ""
    weight: float = 1.0
    host_s: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OocoError(f"kind is '{self.kind}', known are {', '.join(KINDS)}")
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name in ("kind", "model", "group"):
                continue
            if not math.isfinite(value) or value < 0:
                raise OocoError(f"{entry.name} is {value!r}, a finite number of at least 0 is needed")
        if self.seconds <= self.host_s:
            raise OocoError(
                f"the time is {self.seconds * 1e3:g} ms, no more than the {self.host_s * 1e3:g} ms of the engine"
            )
        if self.kind != "gemm" and self.model is None:
            raise OocoError(f"model is missing, a row of kind '{self.kind}' needs it")
        if self.kind == "gemm":
            needed: tuple[str, ...] = ("tokens", "n", "k")
        elif self.kind in ("elementwise", "allreduce"):
            needed = ("tokens",)
        else:
            needed = ()
            if self.decodes > 0 and self.context_tokens <= 0:
                raise OocoError("decodes is above 0, so context_tokens is needed")
            if self.prefill_tokens * self.prefills + self.decodes <= 0:
                raise OocoError("prefill_tokens and decodes are both 0, a batch needs one of them")
        for name in needed:
            if getattr(self, name) <= 0:
                raise OocoError(f"{name} is {getattr(self, name):g}, a row of kind '{self.kind}' needs a positive one")
        if self.kind == "allreduce" and self.tp < 2:
            raise OocoError(f"tp is {self.tp}, an all-reduce needs at least 2")


@dataclass(frozen=True)
class Terms:
    """What n measurements are made of, in seconds at efficiency 1; arrays of length n, GEMMs (n, 6).

    ``*_count`` say how often a term occurs (layers; 0: not at all) and so multiply the fixed times.
    """

    gemm_count: Array
    gemm_compute_s: Array
    gemm_memory_s: Array
    grouped: Array  # (n, 6): 1 for the experts' GEMMs
    elementwise_count: Array
    elementwise_s: Array
    attention_count: Array
    has_prefill: Array
    pairs_s: Array  # arithmetic of the prefill chunks
    context_s: Array  # arithmetic per padded row of the decode contexts
    kv_s: Array
    context_max_tokens: Array
    allreduce_count: Array
    allreduce_s: Array
    moe_count: Array
    measured_s: Array  # less the engine's part
    weight: Array

    def __len__(self) -> int:
        return len(self.measured_s)

    def __getitem__(self, chosen: Any) -> Terms:
        return Terms(**{entry.name: getattr(self, entry.name)[chosen] for entry in fields(self)})


def unit_device(peaks: HardwareSpec) -> HardwareSpec:
    """The device with every efficiency 1 and every fixed time 0: its datasheet."""
    ones = {entry.name: 0.0 if entry.name.endswith(("_us", "_ns")) else 1.0 for entry in fields(CalibratedConstants)}
    xllm = {entry.name: 1.0 for entry in fields(peaks.xllm)}
    return replace(peaks, calibrated=CalibratedConstants(**ones), xllm=replace(peaks.xllm, **xllm))


@lru_cache(maxsize=1024)
def _unit_costs(model: ModelSpec, tp: int, peaks: HardwareSpec, form: str) -> tuple[Any, float, float]:
    """Coefficients at efficiency 1, and the seconds per token of element-wise operators and of one all-reduce."""
    unit = unit_device(peaks)
    both = build_cost(model, unit, form, tp)[0]
    if form == "ooco-xllm":
        return both, 0.0, float(both["token_s"])  # one term per layer there, at 1 byte/s
    alone = float(build_cost(model, replace(unit, link_bytes_per_s=1e30), form, tp)[0]["token_s"])
    return both, alone, (float(both["token_s"]) - alone) / 2.0


def terms(rows: Iterable[Measurement], peaks: HardwareSpec, form: str = "calibrated", chain_all: bool = False) -> Terms:
    """The terms of measurements on a device with these datasheet peaks. ``form`` as in ``build_cost``.

    ``chain_all`` lets the serial term run over the longest context in the batch, that of a prefill chunk included.
    ``cost.py`` takes the longest decode context: the difference is an experiment (docs/calibration.md).
    """
    found = [_row_terms(row, peaks, form, chain_all) for row in rows]
    if not found:
        raise OocoError("no measurements: at least one row is needed")
    return Terms(**{entry.name: np.array([one[entry.name] for one in found]) for entry in fields(Terms)})


def _row_terms(row: Measurement, peaks: HardwareSpec, form: str, chain_all: bool) -> dict[str, Any]:
    one: dict[str, Any] = {entry.name: 0.0 for entry in fields(Terms)}
    for name in ("gemm_count", "gemm_compute_s", "gemm_memory_s", "grouped"):
        one[name] = np.zeros(6)
    one["measured_s"], one["weight"] = row.seconds - row.host_s, row.weight
    if row.kind == "gemm":
        moved = ACTIVATION_BYTES * (row.n * row.k + row.tokens * (row.n + row.k))
        one["gemm_count"][0] = 1.0
        one["gemm_compute_s"][0] = 2.0 * row.tokens * row.n * row.k / peaks.peak_flops_per_s
        one["gemm_memory_s"][0] = moved / peaks.hbm_bytes_per_s
        return one
    assert row.model is not None
    cost, elementwise_s, allreduce_s = _unit_costs(row.model, row.tp, peaks, form)
    whole = row.kind == "iteration"
    tokens = row.prefills * row.prefill_tokens + row.decodes if row.kind in ("iteration", "attention") else row.tokens
    layers = float(row.model.layers) if whole else 1.0
    if whole:
        _fill_gemm_terms(one, row, cost, tokens)
    if whole or row.kind == "elementwise":
        one["elementwise_count"], one["elementwise_s"] = layers, layers * elementwise_s * tokens
        one["moe_count"] = layers if row.model.experts and whole else 0.0
    if whole or row.kind == "attention":
        _fill_attention_terms(one, row, cost, layers, tokens, form)
        if chain_all and row.prefills:
            one["context_max_tokens"] = max(one["context_max_tokens"], layers * (row.past_tokens + row.prefill_tokens))
    if row.tp > 1 and (whole or row.kind == "allreduce"):
        one["allreduce_count"] = 2.0 * layers if whole and form == "calibrated" else layers
        one["allreduce_s"] = one["allreduce_count"] * allreduce_s * tokens
    return one


def _fill_gemm_terms(one: dict[str, Any], row: Measurement, cost: Any, tokens: float) -> None:
    assert row.model is not None
    rows = np.array([tokens, tokens, tokens, tokens, row.prefills + row.decodes, tokens])
    count = np.array([row.model.layers] * 4 + [1, row.model.layers if row.model.experts else 0], dtype=float)
    touched = np.ones(6)
    if row.model.experts:
        touched[2:4] = -math.expm1(tokens * float(cost["log_untouched"]))
        one["grouped"][2:4] = 1.0
    one["gemm_count"] = count
    one["gemm_compute_s"] = cost["gemm_row_compute_s"] * rows
    one["gemm_memory_s"] = cost["gemm_weight_s"] * touched + cost["gemm_row_memory_s"] * rows


def _fill_attention_terms(
    one: dict[str, Any], row: Measurement, cost: Any, layers: float, tokens: float, form: str
) -> None:
    past, new = row.past_tokens, row.prefill_tokens
    context = row.decodes * row.context_tokens
    pairs = causal_pairs(new, past) if form == "calibrated" else new * (past + new)
    kv_tokens = row.prefills * (past + new) + context
    one["attention_count"], one["has_prefill"] = layers, float(row.prefills > 0 and new > 0)
    one["pairs_s"] = layers * float(cost["pair_s"]) * row.prefills * pairs
    one["context_s"] = layers * float(cost["mixed_context_s"]) * context
    one["kv_s"] = layers * (float(cost["kv_s"]) * kv_tokens + float(cost["query_s"]) * tokens)
    one["context_max_tokens"] = layers * (row.context_tokens if row.decodes else 0.0)


def predict_s(t: Terms, constants: CalibratedConstants | Mapping[str, float]) -> Array:
    """Seconds (n,) of the calibrated form; equal to ``cost.iteration_s`` for rows that are whole iterations."""
    c = dict(constants) if isinstance(constants, Mapping) else asdict(constants)
    rate = c["gemm_flops"] * (1.0 + t.grouped * (c["moe_flops"] - 1.0))
    gemm = np.hypot(t.gemm_compute_s / rate, t.gemm_memory_s / c["gemm_bytes"]) + c["gemm_us"] * 1e-6
    memory = t.kv_s / c["attention_bytes"]
    compute = (t.pairs_s + c["decode_row_pad"] * t.context_s) / c["prefill_attention_flops"]
    chain = c["chain_ns"] * 1e-9 * t.context_max_tokens
    attention = np.sqrt(memory**2 + t.has_prefill * (compute**2 + chain**2))
    seconds = (t.gemm_count * gemm).sum(axis=1) + attention + t.attention_count * c["attention_us"] * 1e-6
    seconds += t.elementwise_s / c["elementwise_bytes"] + t.elementwise_count * c["elementwise_us"] * 1e-6
    seconds += t.allreduce_s / c["allreduce_bytes"] + t.allreduce_count * c["allreduce_us"] * 1e-6
    return np.asarray(seconds + t.moe_count * c["moe_us"] * 1e-6)


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


def from_two_numbers(
    peaks: HardwareSpec, gemm_flops: float, gemm_bytes: float, donors: Sequence[HardwareSpec]
) -> HardwareSpec:
    """A preset from the two numbers that differ most between devices: the shares of peak FLOP/s and of peak bytes/s
    that its GEMMs reach. The other constants are the mean of the donors'."""
    if not donors:
        raise OocoError("no donor: name at least one calibrated device to take the other constants from")
    mean = {name: float(np.mean([getattr(one.calibrated, name) for one in donors])) for name in BOUNDS}
    constants = CalibratedConstants(**{**mean, "gemm_flops": gemm_flops, "gemm_bytes": gemm_bytes})
    whence = ", ".join(one.name for one in donors)
    source = f"gemm_flops and gemm_bytes measured, the other constants from {whence}"
    return replace(peaks, calibrated=constants, is_calibrated=False, source=source)


def two_numbers(rows: Iterable[Measurement], peaks: HardwareSpec) -> tuple[float, float]:
    """(gemm_flops, gemm_bytes) of a device from 16-bit GEMM timings, as whole iterations see them.

    The two and the fixed time are fitted to the GEMMs with 1,024 to 32,768 columns in and out and at most 8,192 rows:
    the best rate of the largest GEMM is some 10 % above what a model's GEMMs reach. Raises OocoError when the table has
    none with at least 1,024 rows or none with at most 16.
    """
    chosen = [
        row
        for row in rows
        if row.kind == "gemm" and min(row.n, row.k) >= 1024 and max(row.n, row.k) <= 32768 and row.tokens <= 8192
    ]
    if not any(row.tokens >= 1024 for row in chosen) or not any(row.tokens <= 16 for row in chosen):
        raise OocoError("GEMMs of 1024 to 32768 columns are needed, some of 1024 rows or more and some of 1 to 16")
    fitted = fit(chosen, peaks, by_group=False).device.calibrated
    return fitted.gemm_flops, fitted.gemm_bytes


def batch_kind(row: Measurement) -> str:
    """decode, prefill or mixed."""
    if not row.decodes:
        return "prefill"
    return "mixed" if row.prefill_tokens else "decode"


def balanced(rows: Sequence[Measurement]) -> list[Measurement]:
    """The same rows, weighed so that counts do not decide: decode, prefill and mixed iterations 1 in total, each.

    A kind of kernel weighs KERNEL_WEIGHT where there are iterations, otherwise 1: iterations decide, kernels only tell
    apart what iterations cannot, the fixed times of one layer's operators.
    """
    kinds = [batch_kind(row) if row.kind == "iteration" else row.kind for row in rows]
    kernel = KERNEL_WEIGHT if any(row.kind == "iteration" for row in rows) else 1.0
    count = Counter(kinds)
    return [
        replace(row, weight=(1.0 if row.kind == "iteration" else kernel) / count[kind])
        for row, kind in zip(rows, kinds, strict=True)
    ]


def read_table(path: str | Path, host_ms: float = 0.0) -> list[Measurement]:
    """Measurements of a CSV file with the columns of COLUMNS; raises OocoError naming the row and the column.

    ``host_ms`` is taken off whole iterations. Rows are grouped by model for the uncertainty and come :func:`balanced`.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            header = reader.fieldnames or []
            unknown = [name for name in header if name not in COLUMNS]
            if unknown:
                raise OocoError(f"{path}: unknown column '{unknown[0]}', known are {', '.join(COLUMNS)}")
            for name in ("kind", "ms"):
                if name not in header:
                    raise OocoError(f"{path}: column '{name}' is missing, known are {', '.join(COLUMNS)}")
            rows = [_read_row(f"{path}, row {number}", values, host_ms) for number, values in enumerate(reader, 1)]
    except OSError as error:
        raise OocoError(f"{path}: {error.strerror or error}, a readable CSV file is needed") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise OocoError(f"{path}: not a CSV file ({error})") from None
    if not rows:
        raise OocoError(f"{path}: no rows below the header")
    return balanced(rows)


def _read_row(where: str, values: Mapping[str, str | None], host_ms: float) -> Measurement:
    given: dict[str, Any] = {}
    for name in COLUMNS:
        text = (values.get(name) or "").strip()
        if name in ("kind", "model") or not text:
            continue
        try:
            given[name] = int(text) if name == "tp" else float(text)
        except ValueError:
            whole = "a whole number" if name == "tp" else "a number"
            raise OocoError(f"{where}: {name} is '{text}', {whole} is needed") from None
    if "ms" not in given or not 0 < given["ms"] < math.inf:
        raise OocoError(f"{where}: ms is {given.get('ms', 'empty')}, a positive number is needed")
    if given.get("prefill_tokens"):
        given.setdefault("prefills", 1.0)
    kind, name = (values.get("kind") or "").strip(), (values.get("model") or "").strip()
    try:
        model = resolve_model(name) if name else None
        row = Measurement(
            kind,
            given.pop("ms") / 1e3,
            model,
            group=name,
            host_s=host_ms / 1e3 if kind == "iteration" else 0.0,
            **given,
        )
        if model is not None:
            build_cost(model, _ANY_DEVICE, tp=row.tp)  # refuses a tp that does not divide the heads
    except OocoError as error:
        raise OocoError(f"{where}: {error}") from None
    return row


_ANY_DEVICE = HardwareSpec("any", 1e15, 1e12, 1e11, 1e11, CalibratedConstants(**dict.fromkeys(list(BOUNDS)[:8], 1.0)))


def write_yaml(device: HardwareSpec, path: str | Path, notes: Mapping[str, str] | None = None, head: str = "") -> None:
    """The device as a preset file. In ``conf/hardware`` it is a name for ``hardware=``; elsewhere, a mapping.

    ``notes`` are comments beside constants; ``head`` is the comment at the top.
    """
    lines = [f"# {line}".rstrip() for line in head.splitlines()]
    lines.append(f"name: {device.name}")
    for name in ("peak_flops_per_s", "hbm_bytes_per_s", "hbm_bytes", "link_bytes_per_s"):
        lines.append(f"{name}: {_scientific(getattr(device, name))}")
    lines.append("calibrated:")
    for name, value in asdict(device.calibrated).items():
        note = (notes or {}).get(name)
        lines.append(f"  {name}: {float(f'{value:.4g}')}" + (f"  # {note}" if note else ""))
    if device.xllm != XllmConstants():
        lines.append("xllm:")
        lines += [f"  {name}: {float(f'{value:.4g}')}" for name, value in asdict(device.xllm).items()]
    if not device.is_calibrated:
        lines.append("is_calibrated: false")
    quoted = device.source.replace("\\", "\\\\").replace('"', '\\"')
    lines.append(f'source: "{quoted}"')
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise OocoError(f"{path}: {error.strerror or error}, a place to write the preset is needed") from None


def _scientific(value: float) -> str:
    """989000000000000.0 as 989.0e12: an exponent that is a multiple of three, and a number to every YAML reader."""
    exponent = 3 * int(math.floor(math.log10(value) / 3 + 1e-12))
    return f"{float(f'{value / 10.0**exponent:.6g}')}e{exponent:+d}"
