"""What one iteration costs: a compiled roofline over O(1) aggregates of the batch.

Two forms share one function and one coefficient record:

``calibrated``  every operator costs ``sqrt(compute^2 + memory^2) + fixed``. The form and its constants were fitted to
                public measurements of A100, H100, RTX PRO 6000 and RTX 4090 (docs/roofline.md).
``ooco-xllm``   every operator costs ``max(compute, memory)`` with the constants read in the open OOCO
                implementation (arXiv 2510.14686; golden numbers in tests/roofline).

A batch is described by seven numbers, so a batch of 500 sequences costs no more to time than one of 5:

=================  =======================================================================================
``prefill_tokens``  P: prompt tokens processed in this iteration
``causal_pairs``    A': sum over prefill chunks of pad128(q) * (past + (q + 1) / 2)
``full_pairs``      sum over prefill chunks of q * (past + q); used by ``ooco-xllm``, which has no causal saving
``prefill_kv``      S: sum over prefill chunks of past + q, tokens
``prefills``        number of prefill chunks
``decodes``         B: number of decoding sequences, one token each
``decode_context``  SumC: sum of their contexts, tokens (``decode_context_max``: the longest)
=================  =======================================================================================

Mixture of experts: T tokens are T k rows in the gate+up and down GEMMs, and the weights of the E (1 - (1 - k/E)^T)
experts are read that T independent, uniform choices of k out of E are expected to touch (docs/roofline.md).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ooco_gym._jit import entry_point, kernel
from ooco_gym.errors import OocoError
from ooco_gym.roofline.hardware import HardwareSpec
from ooco_gym.roofline.model import ModelSpec

FORMS = ("calibrated", "ooco-xllm")
ACTIVATION_BYTES = 2.0
MAX_SATURATION_BATCH = 4096

#: Coefficients of one (model, device, tensor parallelism, form), in seconds except for the first three. GEMM entries
#: are in the order qkv, attention output, gate+up, down, LM head, router; all but the LM head are per layer. Those of
#: gate+up and down are per token (k rows) and for all experts' weights; the router's are 0 in a dense model.
COST = np.dtype(
    [
        ("layers", np.float64),
        ("hard_max", np.float64),  # 1: max(compute, memory); 0: root of the sum of squares
        ("log_untouched", np.float64),  # log(1 - k/E): of the chance that a token passes an expert by; 0: dense
        ("gemm_row_compute_s", np.float64, (6,)),
        ("gemm_weight_s", np.float64, (6,)),
        ("gemm_row_memory_s", np.float64, (6,)),
        ("gemm_fixed_s", np.float64, (6,)),
        ("token_s", np.float64),  # element-wise operators and all-reduce, per token and layer
        ("layer_fixed_s", np.float64),  # fixed kernel times of one layer other than GEMMs
        ("pair_s", np.float64),  # prefill attention arithmetic per (query, key) pair
        ("mixed_context_s", np.float64),  # arithmetic per decode-context token inside a mixed batch
        ("kv_s", np.float64),  # reading one KV token in one layer
        ("query_s", np.float64),  # reading and writing one query row in one layer
        ("chain_s", np.float64),
        ("host_s", np.float64),  # per iteration; belongs to the serving engine, not to the device
    ]
)


def build_cost(
    model: ModelSpec, hardware: HardwareSpec, form: str = "calibrated", tp: int = 1, host_s: float = 0.0
) -> np.ndarray:
    """Coefficients as a length-1 array of dtype :data:`COST`.

    ``tp`` is the tensor-parallel degree; ``host_s`` the engine's own seconds per iteration. Raises OocoError on an
    unknown form, or when ``tp`` does not divide the heads.
    """
    if form not in FORMS:
        raise OocoError(f"unknown cost form '{form}': known are {', '.join(FORMS)}")
    if tp < 1 or model.q_heads % tp or (model.kv_heads % tp and tp % model.kv_heads):
        raise OocoError(f"tensor_parallel is {tp}, it must divide the {model.q_heads} heads of {model.name}")
    cost = np.zeros(1, COST)
    record = cost[0]
    record["layers"] = model.layers
    record["host_s"] = host_s
    if model.experts:
        chosen = model.experts_per_token / model.experts
        # Where every token takes all experts the logarithm is -inf, and 0 tokens times -inf is not a number.
        record["log_untouched"] = math.log1p(-chosen) if chosen < 1.0 else -700.0
    if form == "ooco-xllm":
        _fill_xllm(record, model, hardware, tp)
    else:
        _fill_calibrated(record, model, hardware, tp)
    return cost


class Gemm(NamedTuple):
    """One linear operator on one rank: columns in and out, its rows per token, and how many such weights there are."""

    inputs: float
    outputs: float
    rows: float = 1.0
    weights: float = 1.0


def gemm_shapes(model: ModelSpec, tp: int) -> list[Gemm]:
    """The linear operators on one rank in the order of COST; the router, which is not sharded, in MoE models only."""
    attention_width = model.q_heads * model.head_dim / tp
    width = (model.expert_intermediate if model.experts else model.intermediate) / tp
    rows, weights = float(model.experts_per_token or 1), float(model.experts or 1)
    shapes = [
        Gemm(model.hidden, model.qkv_width / tp),
        Gemm(attention_width, model.hidden),
        Gemm(model.hidden, 2.0 * width, rows, weights),
        Gemm(width, model.hidden, rows, weights),
        Gemm(model.hidden, model.vocab / tp),
    ]
    return [*shapes, Gemm(model.hidden, model.experts)] if model.experts else shapes


def _fill_gemms(
    record: Any,
    shapes: list[Gemm],
    flops_per_s: float,
    bytes_per_s: float,
    fixed_s: float,
    weight_bytes: float,
) -> None:
    for index, (inputs, outputs, rows, weights) in enumerate(shapes):
        record["gemm_row_compute_s"][index] = rows * 2.0 * inputs * outputs / flops_per_s
        record["gemm_weight_s"][index] = weights * weight_bytes * inputs * outputs / bytes_per_s
        record["gemm_row_memory_s"][index] = rows * ACTIVATION_BYTES * (inputs + outputs) / bytes_per_s
        record["gemm_fixed_s"][index] = fixed_s


def _fill_attention(record: Any, model: ModelSpec, tp: int, flops_per_s: float, bytes_per_s: float) -> None:
    query_width = model.q_heads * model.head_dim / tp
    kv_width = max(model.kv_heads / tp, 1.0) * model.head_dim
    record["pair_s"] = 4.0 * query_width / flops_per_s
    record["kv_s"] = 2.0 * ACTIVATION_BYTES * kv_width / bytes_per_s
    record["query_s"] = 2.0 * ACTIVATION_BYTES * query_width / bytes_per_s


def _fill_calibrated(record: Any, model: ModelSpec, hardware: HardwareSpec, tp: int) -> None:
    c = hardware.calibrated
    peak, bandwidth = hardware.peak_flops_per_s, hardware.hbm_bytes_per_s
    _fill_gemms(
        record,
        gemm_shapes(model, tp),
        peak * c.gemm_flops,
        bandwidth * c.gemm_bytes,
        c.gemm_us * 1e-6,
        model.bytes_per_param,
    )
    _fill_attention(record, model, tp, peak * c.prefill_attention_flops, bandwidth * c.attention_bytes)
    record["mixed_context_s"] = c.decode_row_pad * record["pair_s"]
    record["chain_s"] = c.chain_ns * 1e-9
    rotary_width = 2.0 * (model.q_heads + 2 * model.kv_heads) * model.head_dim / tp
    if model.experts:
        chosen = model.experts_per_token
        activation = 3.0 * chosen * model.expert_intermediate / tp + (chosen + 1.0) * model.hidden  # and their sum
    else:
        activation = 3.0 * model.intermediate / tp
    token_values = 8.0 * model.hidden + rotary_width + activation
    record["token_s"] = ACTIVATION_BYTES * token_values / (bandwidth * c.elementwise_bytes)
    record["layer_fixed_s"] = (c.elementwise_us + c.attention_us) * 1e-6
    if model.experts:
        record["gemm_row_compute_s"][2:4] /= c.moe_flops
        record["layer_fixed_s"] += c.moe_us * 1e-6
    if tp > 1:
        ring = 2.0 * (tp - 1) / tp * ACTIVATION_BYTES * model.hidden
        record["token_s"] += 2.0 * ring / (hardware.link_bytes_per_s * c.allreduce_bytes)
        record["layer_fixed_s"] += 2.0 * c.allreduce_us * 1e-6


def _fill_xllm(record: Any, model: ModelSpec, hardware: HardwareSpec, tp: int) -> None:
    c = hardware.xllm
    peak, bandwidth = hardware.peak_flops_per_s, hardware.hbm_bytes_per_s
    shapes = gemm_shapes(model, tp)
    up = shapes[2]  # gate and up are two GEMMs there
    shapes[2] = Gemm(up.inputs, up.outputs / 2.0, 2.0 * up.rows, 2.0 * up.weights)
    record["hard_max"] = 1.0
    _fill_gemms(record, shapes, peak * c.gemm_flops, bandwidth * c.gemm_bytes, 0.0, model.bytes_per_param)
    _fill_attention(record, model, tp, peak * c.prefill_attention_flops, bandwidth * c.attention_bytes)
    record["mixed_context_s"] = 4.0 * model.q_heads * model.head_dim / tp / (peak * c.decode_attention_flops)
    if record["mixed_context_s"] > record["kv_s"]:
        raise OocoError(f"model '{model.name}': decode attention would be compute bound, which is not modelled")
    record["token_s"] = 2.0 * ACTIVATION_BYTES * model.hidden * (tp - 1) / tp / c.allreduce_bytes_per_s


@kernel
def _operator_s(hard_max, compute_s, memory_s):
    if hard_max > 0.5:
        return max(compute_s, memory_s)
    return math.sqrt(compute_s * compute_s + memory_s * memory_s)


@kernel
def _gemm_s(cost, index, rows):
    compute = cost.gemm_row_compute_s[index] * rows
    memory = cost.gemm_weight_s[index] + cost.gemm_row_memory_s[index] * rows
    return _operator_s(cost.hard_max, compute, memory) + cost.gemm_fixed_s[index]


@kernel
def _expert_gemm_s(cost, index, tokens, touched):
    """gate+up or down of a MoE layer; ``touched`` is the share of the experts whose weights are read."""
    compute = cost.gemm_row_compute_s[index] * tokens
    memory = cost.gemm_weight_s[index] * touched + cost.gemm_row_memory_s[index] * tokens
    return _operator_s(cost.hard_max, compute, memory) + cost.gemm_fixed_s[index]


@kernel
def _linear_layer_s(cost, tokens):
    """One layer without attention's data-dependent part."""
    gemms = _gemm_s(cost, 0, tokens) + _gemm_s(cost, 1, tokens)
    if cost.log_untouched == 0.0:
        gemms = gemms + _gemm_s(cost, 2, tokens) + _gemm_s(cost, 3, tokens)
    else:
        touched = -math.expm1(tokens * cost.log_untouched)
        experts = _expert_gemm_s(cost, 2, tokens, touched) + _expert_gemm_s(cost, 3, tokens, touched)
        gemms = gemms + _gemm_s(cost, 5, tokens) + experts
    return gemms + cost.token_s * tokens + cost.layer_fixed_s


@entry_point
def decode_affine(cost, decodes):
    """(c0, c1) in seconds so that a decode-only iteration of ``decodes`` sequences takes c0 + c1 * SumC."""
    c0 = cost.layers * (_linear_layer_s(cost, decodes) + cost.query_s * decodes) + _gemm_s(cost, 4, decodes)
    return c0 + cost.host_s, cost.layers * cost.kv_s


@entry_point
def layers_s(cost, prefill_tokens, causal_pairs, full_pairs, prefill_kv, decodes, decode_context, decode_context_max):
    """Seconds in the transformer layers of one iteration: without LM head and host."""
    tokens = prefill_tokens + decodes
    memory = cost.kv_s * (prefill_kv + decode_context) + cost.query_s * tokens
    if prefill_tokens == 0:
        attention = memory
    elif cost.hard_max > 0.5:
        attention = max(cost.pair_s * full_pairs + cost.mixed_context_s * decode_context, memory)
    else:
        compute = cost.pair_s * causal_pairs + cost.mixed_context_s * decode_context
        chain = cost.chain_s * decode_context_max
        attention = math.sqrt(compute * compute + memory * memory + chain * chain)
    return cost.layers * (_linear_layer_s(cost, tokens) + attention)


@entry_point
def iteration_s(
    cost,
    prefill_tokens,
    causal_pairs,
    full_pairs,
    prefill_kv,
    prefills,
    decodes,
    decode_context,
    decode_context_max,
):
    """Seconds of one iteration; ``cost`` is one record of dtype COST, the rest as in the module's table."""
    inside = layers_s(
        cost, prefill_tokens, causal_pairs, full_pairs, prefill_kv, decodes, decode_context, decode_context_max
    )
    return inside + _gemm_s(cost, 4, prefills + decodes) + cost.host_s


@entry_point
def causal_pairs(new_tokens, past_tokens):
    """A' of one prefill chunk: query rows padded to 128, each seeing the past and half of the chunk."""
    padded = 128.0 * math.ceil(new_tokens / 128.0)
    return padded * (past_tokens + 0.5 * (new_tokens + 1.0))


@entry_point
def prefill_s(cost, tokens):
    """Seconds of an iteration that prefills one whole prompt of ``tokens``."""
    return iteration_s(cost, tokens, causal_pairs(tokens, 0.0), tokens * tokens, tokens, 1.0, 0.0, 0.0, 0.0)


@entry_point
def decode_s(cost, decodes, context):
    """Seconds of a decode-only iteration of ``decodes`` sequences with ``context`` tokens in total."""
    c0, c1 = decode_affine(cost, decodes)
    return c0 + c1 * context


def saturation_batch(model: ModelSpec, hardware: HardwareSpec, form: str = "calibrated", tp: int = 1) -> int:
    """B_sat: the smallest decode batch at which every linear layer is compute bound, in sequences.

    Closed form R0 / (1 - R0 (1/in + 1/out)) with R0 = F_g / M_g in rows, maximum over the four linears of a layer
    (open OOCO implementation). An expert sees B k / E rows, and by then all experts are touched. A MoE router is left
    out: it has too few columns to saturate ever, and takes microseconds. Capped at MAX_SATURATION_BATCH for layers
    too small to saturate at any batch.
    """
    c = hardware.xllm if form == "ooco-xllm" else hardware.calibrated
    dense = hardware.peak_flops_per_s * c.gemm_flops / (hardware.hbm_bytes_per_s * c.gemm_bytes)
    grouped = 1.0 if form == "ooco-xllm" else hardware.calibrated.moe_flops
    worst = 1.0
    for index, (inputs, outputs, rows, weights) in enumerate(gemm_shapes(model, tp)[:4]):
        rate = dense * grouped if model.experts and index >= 2 else dense
        # flops/bytes of a GEMM is 2TNK / (w NK + a T(N + K)): at w = a = 2 bytes the row count R0 equals the rate.
        needed = rate * model.bytes_per_param / 2.0 * (weights / rows)
        head_room = 1.0 - rate * ACTIVATION_BYTES / 2.0 * (1.0 / inputs + 1.0 / outputs)
        worst = max(worst, needed / head_room if head_room > 0 else MAX_SATURATION_BATCH)
    return min(int(math.ceil(worst - 1e-6)), MAX_SATURATION_BATCH)
