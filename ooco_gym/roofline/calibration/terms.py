"""What measurements are made of: the terms of the formula in ``cost.py`` at efficiency 1.

So one vectorised function, :func:`predict_s`, gives kernels and whole iterations for any constants. The terms come out
of :func:`~ooco_gym.roofline.cost.build_cost` on a device with unit constants: the formula is written down once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ooco_gym.errors import OocoError
from ooco_gym.roofline.calibration.measurement import Measurement
from ooco_gym.roofline.cost import ACTIVATION_BYTES, build_cost, causal_pairs
from ooco_gym.roofline.hardware import CalibratedConstants, HardwareSpec
from ooco_gym.roofline.model import ModelSpec

Array = NDArray[np.float64]


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
