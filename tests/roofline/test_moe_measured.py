"""Qwen3-30B-A3B against vLLM 0.14 kernel timings (NVIDIA aiconfigurator), where the measurements are at hand.

A layer is put together from four kernels measured alone: GEMMs, router, fused experts and attention. Norms, rotary
embedding and the choice of experts were not measured; the predictions leave out the former and keep ``moe_us``.
``moe_flops`` and ``moe_us`` were chosen with this shape among some ten others: the errors are not held out.
"""

import csv
import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ooco_gym.roofline import build_cost, layers_s, resolve_hardware, resolve_model
from ooco_gym.roofline.cost import causal_pairs

FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "measured"
FILES = {name: FOLDER / f"aic_{name}.csv.gz" for name in ("gemm_vllm", "moe_vllm_bf16", "attention_vllm_bf16")}
pytestmark = pytest.mark.skipif(
    not all(path.is_file() for path in FILES.values()),
    reason="the public kernel timings are not beside this checkout (../shared/data/measured)",
)

MODEL = replace(resolve_model("qwen3-30b-a3b"), layers=1)
ROUTER, QKV, OUTPUT = (128, 2048), (5120, 2048), (2048, 4096)  # columns out and in
EXPERTS = {"hidden": "2048", "inter": "768", "topk": "8", "experts": "128", "moe_tp": "1", "moe_ep": "1"}
HEADS = {"num_heads": "32", "num_kv_heads": "4", "head_dim": "128", "window": "0"}
LARGEST = 8192  # tokens of an iteration


def rows(name, wanted):
    with gzip.open(FILES[name], "rt", newline="") as lines:
        return [row for row in csv.DictReader(lines) if wanted.items() <= row.items()]


@pytest.fixture(scope="module", params=["a100", "h100"])
def measured(request):
    """(device, GEMM seconds by tokens and shape, [(tokens, experts' seconds)], attention rows) of one device."""
    device = {"hardware": f"{request.param}_sxm"}
    gemms = {
        (int(row["m_tokens"]), (int(row["n"]), int(row["k"]))): float(row["ms"]) / 1e3
        for row in rows("gemm_vllm", device | {"dtype": "bfloat16"})
    }
    experts = [(int(row["tokens"]), float(row["ms"]) / 1e3) for row in rows("moe_vllm_bf16", device | EXPERTS)]
    experts = [(tokens, s) for tokens, s in experts if tokens <= LARGEST and (tokens, ROUTER) in gemms]
    return resolve_hardware(request.param), gemms, experts, rows("attention_vllm_bf16", device | HEADS)


def without_norms_s(device, prefill_tokens, decodes, context):
    """The predicted layer less what was not measured: norms, residuals and rotary embedding."""
    cost, k = build_cost(MODEL, device)[0], device.calibrated
    tokens = float(prefill_tokens + decodes)
    chunk = [float(prefill_tokens), causal_pairs(float(prefill_tokens), 0.0), 0.0, float(prefill_tokens)]
    values = 8 * MODEL.hidden + 2 * MODEL.qkv_width
    norms = 2 * tokens * values / (device.hbm_bytes_per_s * k.elementwise_bytes) + k.elementwise_us * 1e-6
    return layers_s(cost, *chunk, float(decodes), float(decodes * context), float(context)) - norms


def errors(pairs):
    """(MAPE, 95th percentile, bias) in per cent of (predicted, measured)."""
    error = 100 * np.array([predicted / seen - 1 for predicted, seen in pairs])
    assert len(error) >= 20
    return float(np.abs(error).mean()), float(np.quantile(np.abs(error), 0.95)), float(error.mean())


def test_router_and_experts(measured):
    """15 to 17 % on average, but a third too short on H100 above 512 tokens, where the kernel is not tuned for it."""
    device, gemms, experts, _ = measured
    dense = {"experts": 0, "experts_per_token": 0, "expert_intermediate": 0, "intermediate": 1}
    full, rest = build_cost(MODEL, device)[0], build_cost(replace(MODEL, **dense), device)[0]
    pairs = []
    for tokens, seen in experts:
        both = [layers_s(cost, *[0.0] * 4, float(tokens), 0.0, 0.0) for cost in (full, rest)]
        predicted = both[0] - both[1] + 2e-6 * device.calibrated.gemm_us  # `rest` has gate+up and down, of no width
        pairs.append((predicted, seen + gemms[tokens, ROUTER]))
    mape, p95, bias = errors(pairs)
    print(f"router and experts, {device.name}: MAPE {mape:.1f} %, p95 {p95:.1f} %, bias {bias:+.1f} % of {len(pairs)}")
    assert mape < 20 and p95 < 42 and -18 < bias < 5


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_layers(measured, phase):
    device, gemms, experts, attention = measured
    pairs = []
    for tokens, experts_s in experts:
        linear = experts_s + sum(gemms[tokens, shape] for shape in (ROUTER, QKV, OUTPUT))
        for row in attention:
            batch, context = int(row["batch_size"]), int(row["kv_context_tokens"]) + 1
            seen = linear + float(row["ms"]) / 1e3
            if row["phase"] == "decode_attn_kernel_per_layer":
                if phase == "decode" and batch == tokens <= 512 and context >= 128:
                    pairs.append((without_norms_s(device, 0, batch, context), seen))
            elif phase == "prefill" and batch == 1 == context and int(row["new_tokens_per_seq"]) == tokens:
                pairs.append((without_norms_s(device, tokens, 0, 0), seen))
    mape, p95, bias = errors(pairs)
    print(f"{phase} layers, {device.name}: MAPE {mape:.1f} %, p95 {p95:.1f} %, bias {bias:+.1f} % of {len(pairs)}")
    assert mape < 18 and p95 < 35 and abs(bias) < 16
