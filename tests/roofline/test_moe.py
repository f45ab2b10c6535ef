"""Mixture of experts in the cost function: a layer by hand, the number of experts touched, B_sat against a search."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ooco_gym.roofline import (
    FORMS,
    build_cost,
    decode_affine,
    decode_s,
    iteration_s,
    layers_s,
    prefill_s,
    resolve_hardware,
    resolve_model,
    saturation_batch,
)
from ooco_gym.roofline.cost import MAX_SATURATION_BATCH, causal_pairs

QWEN = resolve_model("qwen3-30b-a3b")
MIXTRAL = replace(
    resolve_model("llama-3.1-8b"),
    name="mixtral-8x7b",
    vocab=32000,
    experts=8,
    experts_per_token=2,
    expert_intermediate=14336,
)
EVERY_EXPERT = replace(QWEN, name="every-expert", experts=8)
EIGHT_BIT = replace(QWEN, name="qwen-8-bit-weights", bytes_per_param=1.0)
MODELS = (QWEN, MIXTRAL, EVERY_EXPERT, EIGHT_BIT)
DEVICES = tuple(resolve_hardware(name) for name in ("a100", "h100", "ascend-910b"))
A100 = DEVICES[0]
SETUPS = st.tuples(st.sampled_from(MODELS), st.sampled_from(DEVICES), st.sampled_from([1, 2, 4]))


def linear_s(model, device, form, tp, tokens):
    """Seconds of one layer for ``tokens`` decodes without context."""
    return layers_s(build_cost(replace(model, layers=1), device, form, tp)[0], *[0.0] * 4, float(tokens), 0.0, 0.0)


def touched(model, tokens):
    """Expected number of experts: each token passes a given expert by with probability 1 - k/E."""
    return model.experts * (1 - (1 - model.experts_per_token / model.experts) ** tokens)


def layer_plain(model, device, form, tp, tokens):
    """The same once more, one operator at a time."""
    hard = form == "ooco-xllm"
    k = device.xllm if hard else device.calibrated
    peak, bw = device.peak_flops_per_s, device.hbm_bytes_per_s
    d, hd, f = model.hidden, model.head_dim, model.expert_intermediate / tp
    h, w = model.q_heads / tp, model.bytes_per_param
    rows = tokens * model.experts_per_token
    experts = touched(model, tokens)

    def gemm(m, n, kk, matrices=1.0, reach=1.0):
        compute = 2 * m * n * kk / (peak * k.gemm_flops * reach)
        memory = (matrices * w * n * kk + 2 * m * (n + kk)) / (bw * k.gemm_bytes)
        return max(compute, memory) if hard else math.sqrt(compute**2 + memory**2) + k.gemm_us * 1e-6

    total = gemm(tokens, model.qkv_width / tp, d) + gemm(tokens, d, h * hd) + gemm(tokens, model.experts, d)
    total += 2 * 2 * tokens * h * hd / (bw * k.attention_bytes)  # queries in and attention out; no context here
    if hard:
        reduce = 2 * 2 * tokens * d * (tp - 1) / tp / k.allreduce_bytes_per_s
        return total + 2 * gemm(rows, f, d, experts) + gemm(rows, d, f, experts) + reduce
    total += gemm(rows, 2 * f, d, experts, k.moe_flops) + gemm(rows, d, f, experts, k.moe_flops)
    values = 8 * d + 2 * model.qkv_width / tp  # norms and residuals, rotary embedding
    values += 3 * model.experts_per_token * f + (model.experts_per_token + 1) * d  # activation, sum over the experts
    total += 2 * tokens * values / (bw * k.elementwise_bytes)
    total += (k.elementwise_us + k.attention_us + k.moe_us) * 1e-6
    if tp > 1:
        wire = 2 * (tp - 1) / tp * 2 * tokens * d / (device.link_bytes_per_s * k.allreduce_bytes)
        total += 2 * (k.allreduce_us * 1e-6 + wire)
    return total


def test_the_experts_gemms_of_one_decode_by_hand():
    """A100, one token: 8 of 128 experts, 3 x 2048 x 768 weights each, are 75.5 MB: 46.3 us at 1.63 TB/s."""
    read_s = 8 * 3 * 2048 * 768 * 2 / (2.039e12 * 0.8)
    assert read_s == pytest.approx(46.3e-6, rel=1e-3)
    idle = replace(A100, peak_flops_per_s=1e21)  # nothing is bound by arithmetic
    narrow = replace(QWEN, expert_intermediate=1)
    experts_s = linear_s(QWEN, idle, "calibrated", 1, 1.0) - linear_s(narrow, idle, "calibrated", 1, 1.0)
    assert experts_s == pytest.approx(read_s, rel=0.01)


@settings(max_examples=150, deadline=None)
@given(SETUPS, st.sampled_from(FORMS), st.floats(0.25, 8192))
def test_a_layer_is_the_plain_roofline(setup, form, tokens):
    model, device, tp = setup
    plain = layer_plain(model, device, form, tp, tokens)
    assert linear_s(model, device, form, tp, tokens) == pytest.approx(plain, rel=1e-12)


def experts_read(model, tokens):
    """Number of experts whose weights take time: on a device whose only limit is reading weights."""
    free = {"elementwise_bytes": 1e12, "attention_bytes": 1e12, "gemm_us": 0.0, "elementwise_us": 0.0}
    free |= {"attention_us": 0.0, "moe_us": 0.0}
    device = replace(A100, peak_flops_per_s=1e24, calibrated=replace(A100.calibrated, **free))
    wide, narrow = (replace(model, expert_intermediate=f, bytes_per_param=1e6) for f in (2000, 1000))
    read_s = linear_s(wide, device, "calibrated", 1, tokens) - linear_s(narrow, device, "calibrated", 1, tokens)
    return read_s / (3 * model.hidden * 1000 * 1e6 / (device.hbm_bytes_per_s * device.calibrated.gemm_bytes))


@pytest.mark.parametrize("model", MODELS, ids=lambda spec: spec.name)
def test_one_token_touches_its_own_experts_and_many_tokens_all(model):
    assert experts_read(model, 1.0) == pytest.approx(model.experts_per_token, rel=1e-3)
    assert experts_read(model, 4096.0) == pytest.approx(model.experts, rel=1e-2)
    counts = [experts_read(model, tokens) for tokens in (0.5, 1.0, 1.5, 2.0, 8.0, 64.0)]
    assert all(few <= more for few, more in pairwise(counts))


def test_two_tokens_share_some_experts():
    """128 experts, 8 a token: two tokens touch 8 + 8 x 120/128 = 15.5 on average."""
    assert experts_read(QWEN, 2.0) == pytest.approx(15.5, rel=1e-3)


@settings(max_examples=60, deadline=None)
@given(SETUPS, st.sampled_from(FORMS), st.floats(0, 8192), st.floats(0.01, 512), st.floats(0, 1e6))
def test_more_tokens_never_take_less_time(setup, form, tokens, more, context):
    model, device, tp = setup
    cost = build_cost(model, device, form, tp)[0]
    assert decode_s(cost, tokens + more, context) > decode_s(cost, tokens, context)
    assert decode_s(cost, tokens, context + 1.0) > decode_s(cost, tokens, context)
    assert prefill_s(cost, tokens + more) > prefill_s(cost, tokens)


@pytest.mark.parametrize("form", FORMS)
def test_a_decode_iteration_is_affine_in_the_context(form):
    cost = build_cost(QWEN, A100, form)[0]
    c0, c1 = decode_affine(cost, 37.0)
    for context in (0.0, 1e4, 1e6):
        whole = iteration_s(cost, *[0.0] * 5, 37.0, context, context / 37)
        assert whole == pytest.approx(c0 + c1 * context, rel=1e-12)


@pytest.mark.parametrize("model", MODELS, ids=lambda spec: spec.name)
def test_an_empty_batch_takes_a_finite_time(model):
    assert math.isfinite(decode_affine(build_cost(model, A100)[0], 0.0)[0])


def test_one_expert_for_every_token_is_a_dense_layer_with_a_router():
    """What is left of a MoE layer with a single expert: the dense layer, the router, and the sorting of rows."""
    single = replace(QWEN, experts=1, experts_per_token=1, expert_intermediate=6144, intermediate=6144)
    dense = replace(single, experts=0, experts_per_token=0, expert_intermediate=0)
    device = replace(A100, calibrated=replace(A100.calibrated, moe_flops=1.0, moe_us=0.0))
    k = device.calibrated
    row = 2 * 2.0 * QWEN.hidden / (device.hbm_bytes_per_s * k.elementwise_bytes)
    for tokens in (1.0, 100.0, 5000.0):
        memory = (2 * QWEN.hidden + 2 * tokens * (QWEN.hidden + 1)) / (device.hbm_bytes_per_s * k.gemm_bytes)
        compute = 2 * tokens * QWEN.hidden / (device.peak_flops_per_s * k.gemm_flops)
        extra = tokens * row + math.hypot(compute, memory) + k.gemm_us * 1e-6
        moe, plain = (linear_s(model, device, "calibrated", 1, tokens) for model in (single, dense))
        assert moe == pytest.approx(plain + extra, rel=1e-9)


# B_sat.


def searched_saturation(model, device, form, tp):
    """Smallest batch at which attention's linears and the experts' have flops / bytes of at least F_g / M_g."""
    k = device.xllm if form == "ooco-xllm" else device.calibrated
    ratio = device.peak_flops_per_s * k.gemm_flops / (device.hbm_bytes_per_s * k.gemm_bytes)
    reach = 1.0 if form == "ooco-xllm" else k.moe_flops
    f, w = model.expert_intermediate / tp, model.bytes_per_param
    attention = [(model.hidden, model.qkv_width / tp), (model.q_heads * model.head_dim / tp, model.hidden)]
    experts = [(model.hidden, f if form == "ooco-xllm" else 2 * f), (f, model.hidden)]

    def bound(shapes, rows, matrices, needed):
        return all(2 * i * o * rows / (matrices * w * i * o + 2 * rows * (i + o)) >= needed for i, o in shapes)

    for batch in range(1, MAX_SATURATION_BATCH):
        rows = batch * model.experts_per_token
        if bound(attention, batch, 1, ratio) and bound(experts, rows, touched(model, batch), ratio * reach):
            return batch
    return MAX_SATURATION_BATCH


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("device", DEVICES, ids=lambda spec: spec.name)
@pytest.mark.parametrize("model", MODELS, ids=lambda spec: spec.name)
def test_saturation_batch_is_the_smallest_that_saturates(model, device, form, tp):
    assert saturation_batch(model, device, form, tp) == searched_saturation(model, device, form, tp)


def test_sparse_experts_saturate_later():
    few = replace(QWEN, experts=16)
    assert saturation_batch(few, A100) < saturation_batch(QWEN, A100) < MAX_SATURATION_BATCH


# Causal pairs are attention's: experts do not change them.


def test_attention_is_that_of_the_dense_model():
    dense = replace(QWEN, experts=0, experts_per_token=0, expert_intermediate=0)
    batch = [512.0, causal_pairs(512.0, 4096.0), 512.0 * 4608, 4608.0]
    differences = []
    for model in (QWEN, dense):
        cost = build_cost(model, A100)[0]
        differences.append(layers_s(cost, *batch, 3.0, 9000.0, 5000.0) - layers_s(cost, *batch, 3.0, 3000.0, 1000.0))
    assert differences[0] == pytest.approx(differences[1], rel=1e-9)
