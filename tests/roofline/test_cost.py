"""The compiled cost function: OOCO's golden numbers, an independent plain-Python roofline, invariants."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ooco_gym.errors import OocoError
from ooco_gym.roofline import (
    FORMS,
    ModelSpec,
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
from ooco_gym.roofline.cost import causal_pairs

QWEN_7B, QWEN_72B, LLAMA_8B = (resolve_model(name) for name in ("qwen2.5-7b", "qwen2.5-72b", "llama-3.1-8b"))
ASCEND, A100, H100 = (resolve_hardware(name) for name in ("ascend-910b", "a100", "h100"))
MODELS, DEVICES = (QWEN_7B, QWEN_72B, LLAMA_8B), (A100, H100, ASCEND)
EIGHT_BIT = replace(QWEN_7B, name="qwen-8-bit-weights", bytes_per_param=1.0)
HOST_S = 0.0015


# OOCO.md, "Compute-saturation batch": the numbers that the open implementation's formulas give.


@pytest.fixture(scope="module")
def golden():
    return build_cost(QWEN_7B, ASCEND, "ooco-xllm")[0]


def test_the_saturation_batch_of_the_open_implementation():
    assert saturation_batch(QWEN_7B, ASCEND, "ooco-xllm") == 340


def test_decode_floor_and_slope_of_the_open_implementation(golden):
    floor_s, per_token_s = decode_affine(golden, 1.0)
    assert floor_s == pytest.approx(15.2e-3, rel=0.02)
    assert per_token_s == pytest.approx(94e-9, rel=0.02)


@pytest.mark.parametrize(("batch", "context", "ms"), [(128, 1024, 28.3), (256, 2048, 66.2)])
def test_decodes_of_the_open_implementation(golden, batch, context, ms):
    assert decode_s(golden, float(batch), float(batch * context)) == pytest.approx(ms * 1e-3, rel=0.02)


@pytest.mark.parametrize(("tokens", "ms"), [(512, 27), (1024, 53), (2048, 109), (4096, 232)])
def test_prefills_of_the_open_implementation(golden, tokens, ms):
    assert prefill_s(golden, float(tokens)) == pytest.approx(ms * 1e-3, rel=0.02)


def test_one_projection_by_hand():
    """A100, T = 128, 4096 x 4096: 4.29 GFLOP are 18.8 us and 35.7 MB are 21.9 us, so 28.8 us + 5.5 us."""
    model = ModelSpec("square", 4096, 1, 32, 32, 128, 1, 4096)  # its LM head is that projection
    cost = build_cost(model, A100)[0]
    head = iteration_s(cost, *[0.0] * 5, 128.0, 0.0, 0.0) - layers_s(cost, *[0.0] * 4, 128.0, 0.0, 0.0)
    assert head == pytest.approx(34.3e-6, rel=0.005)


def test_query_and_key_pairs_by_hand():
    """Rows are padded to 128; a row sees the past and on average half of its own chunk."""
    assert causal_pairs(100.0, 0.0) == 128 * 50.5
    assert causal_pairs(128.0, 1000.0) == 128 * 1064.5
    assert causal_pairs(300.0, 1000.0) == 384 * 1150.5


# The same two forms once more, written from ROOFLINE.md and OOCO.md, one operator and one request at a time.


def calibrated_plain(model, device, tp, chunks, contexts):
    """ROOFLINE.md, "Recommended form"; ``chunks`` are (new, past) tokens, ``contexts`` of the decodes."""
    k = device.calibrated
    peak, bw = device.peak_flops_per_s, device.hbm_bytes_per_s
    d, f, hd = model.hidden, model.intermediate, model.head_dim
    h, hk = model.q_heads, model.kv_heads
    hl, kl = h / tp, max(hk / tp, 1)
    b = len(contexts)
    p = sum(new for new, _ in chunks)
    t = p + b

    def gemm(n, kk, rows):
        compute = 2 * rows * n * kk / (peak * k.gemm_flops)
        memory = (model.bytes_per_param * n * kk + 2 * rows * (n + kk)) / (bw * k.gemm_bytes)
        return math.sqrt(compute**2 + memory**2) + k.gemm_us * 1e-6

    gemms = gemm((h + 2 * hk) * hd / tp, d, t) + gemm(d, h * hd / tp, t) + gemm(2 * f / tp, d, t)
    gemms += gemm(d, f / tp, t)
    values = 8 * d + 2 * (h + 2 * hk) * hd / tp + 3 * f / tp
    elementwise = 2 * t * values / (bw * k.elementwise_bytes) + k.elementwise_us * 1e-6
    sum_c, max_c = sum(contexts), max(contexts, default=0)
    memory = (4 * kl * hd * (sum(new + past for new, past in chunks) + sum_c) + 4 * t * hl * hd) / (
        bw * k.attention_bytes
    )
    attention = memory
    if p:
        padded = sum(math.ceil(new / 128) * 128 * (past + (new + 1) / 2) for new, past in chunks)
        compute = 4 * hl * hd * (padded + k.decode_row_pad * sum_c) / (peak * k.prefill_attention_flops)
        attention = math.sqrt(compute**2 + memory**2 + (k.chain_ns * 1e-9 * max_c) ** 2)
    attention += k.attention_us * 1e-6
    reduce = 0.0
    if tp > 1:
        wire = 2 * (tp - 1) / tp * 2 * t * d / (device.link_bytes_per_s * k.allreduce_bytes)
        reduce = 2 * (k.allreduce_us * 1e-6 + wire)
    layers = model.layers * (gemms + elementwise + attention + reduce)
    return layers + gemm(model.vocab / tp, d, len(chunks) + b) + HOST_S


def xllm_plain(model, device, tp, prompt, contexts):
    """OOCO.md, "Performance model": one prompt of ``prompt`` tokens, or decodes."""
    k = device.xllm
    peak, bw = device.peak_flops_per_s, device.hbm_bytes_per_s
    h, m, g = model.hidden, model.intermediate, model.q_heads / model.kv_heads
    tokens = prompt or len(contexts)
    attention_flops = k.prefill_attention_flops if prompt else k.decode_attention_flops

    def gemm(inputs, outputs, rows):
        data = 2 * rows * inputs + model.bytes_per_param * inputs * outputs + 2 * rows * outputs
        return max(2 * inputs * outputs * rows / (peak * k.gemm_flops), data / (bw * k.gemm_bytes))

    def attention(q, kv):
        data = 2 * h / tp * (2 * q + 2 * kv / g)
        return max(4 * h / tp * q * kv / (peak * attention_flops), data / (bw * k.attention_bytes))

    reduce = 2 * tokens * h * (tp - 1) / tp / k.allreduce_bytes_per_s
    layer = gemm(h, (h + 2 * h / g) / tp, tokens) + gemm(h / tp, h, tokens) + 2 * reduce
    layer += 2 * gemm(h, m / tp, tokens) + gemm(m / tp, h, tokens)
    layer += attention(prompt, prompt) if prompt else sum(attention(1, kv) for kv in contexts)
    return model.layers * layer + gemm(h, model.vocab / tp, 1 if prompt else len(contexts)) + HOST_S


def aggregates(chunks, contexts):
    """The arguments of ``iteration_s`` for one batch."""
    return [
        float(value)
        for value in (
            sum(new for new, _ in chunks),
            sum(math.ceil(new / 128) * 128 * (past + (new + 1) / 2) for new, past in chunks),
            sum(new * (past + new) for new, past in chunks),
            sum(past + new for new, past in chunks),
            len(chunks),
            len(contexts),
            sum(contexts),
            max(contexts, default=0),
        )
    ]


CHUNKS = st.lists(st.tuples(st.integers(1, 4096), st.integers(0, 8192)), max_size=4)
CONTEXTS = st.lists(st.integers(1, 16384), max_size=40)
SETUPS = st.tuples(st.sampled_from([*MODELS, EIGHT_BIT]), st.sampled_from(DEVICES), st.sampled_from([1, 2, 4]))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    ("chunks", "contexts"),
    [([], [1024] * 64), ([(1000, 0)], []), ([(512, 0), (300, 2048)], [100, 9000])],
    ids=["decode", "prefill", "mixed"],
)
def test_calibrated_form_in_the_three_kinds_of_batch(tp, chunks, contexts):
    cost = build_cost(QWEN_7B, A100, "calibrated", tp, HOST_S)[0]
    plain = calibrated_plain(QWEN_7B, A100, tp, chunks, contexts)
    assert iteration_s(cost, *aggregates(chunks, contexts)) == pytest.approx(plain, rel=1e-12)


@settings(max_examples=80, deadline=None)
@given(SETUPS, CHUNKS, CONTEXTS)
def test_calibrated_form_is_the_plain_roofline(setup, chunks, contexts):
    model, device, tp = setup
    cost = build_cost(model, device, "calibrated", tp, HOST_S)[0]
    plain = calibrated_plain(model, device, tp, chunks, contexts)
    assert iteration_s(cost, *aggregates(chunks, contexts)) == pytest.approx(plain, rel=1e-12)
    alone = prefill_s(cost, float(len(contexts) + 1))
    assert alone == pytest.approx(calibrated_plain(model, device, tp, [(len(contexts) + 1, 0)], []), rel=1e-12)


@settings(max_examples=80, deadline=None)
@given(SETUPS, st.integers(1, 16384), st.lists(st.integers(1, 16384), min_size=1, max_size=40))
def test_xllm_form_is_the_plain_roofline(setup, prompt, contexts):
    model, device, tp = setup
    cost = build_cost(model, device, "ooco-xllm", tp, HOST_S)[0]
    assert prefill_s(cost, float(prompt)) == pytest.approx(xllm_plain(model, device, tp, prompt, []), rel=1e-12)
    decode = decode_s(cost, float(len(contexts)), float(sum(contexts)))
    assert decode == pytest.approx(xllm_plain(model, device, tp, 0, contexts), rel=1e-12)


def test_more_ranks_than_kv_heads_copy_the_heads():
    many, four = (build_cost(QWEN_7B, A100, tp=tp)[0] for tp in (28, 4))  # 4 KV heads: one per rank in both
    assert decode_affine(many, 1.0)[1] == decode_affine(four, 1.0)[1] > 0


# Invariants.


@settings(max_examples=80, deadline=None)
@given(SETUPS, st.sampled_from(FORMS), CHUNKS, CONTEXTS, st.integers(1, 2048))
def test_more_work_never_takes_less_time(setup, form, chunks, contexts, more):
    model, device, tp = setup
    cost = build_cost(model, device, form, tp, HOST_S)[0]
    base = iteration_s(cost, *aggregates(chunks, contexts))
    assert iteration_s(cost, *aggregates(chunks, [*contexts, more])) > base
    assert iteration_s(cost, *aggregates([*chunks, (more, 0)], contexts)) > base
    if contexts:
        longer = [contexts[0] + more, *contexts[1:]]
        assert iteration_s(cost, *aggregates(chunks, longer)) >= base
    if chunks:
        (new, past), *rest = chunks
        assert iteration_s(cost, *aggregates([(new, past + more), *rest], contexts)) >= base
        assert iteration_s(cost, *aggregates([(new + more, past), *rest], contexts)) > base


@settings(max_examples=50, deadline=None)
@given(SETUPS, st.sampled_from(FORMS), CHUNKS, CONTEXTS)
def test_an_iteration_is_layers_and_head_and_host(setup, form, chunks, contexts):
    """What is not in the layers depends on the number of sequences alone: take it from a decode batch."""
    model, device, tp = setup
    batch = aggregates(chunks, contexts)
    with_host, bare = build_cost(model, device, form, tp, HOST_S)[0], build_cost(model, device, form, tp)[0]
    layers = layers_s(bare, *batch[:4], *batch[5:])
    rows = float(len(chunks) + len(contexts))
    head = decode_affine(bare, rows)[0] - layers_s(bare, 0.0, 0.0, 0.0, 0.0, rows, 0.0, 0.0)
    assert iteration_s(with_host, *batch) == pytest.approx(layers + head + HOST_S, rel=1e-12)
    assert layers_s(with_host, *batch[:4], *batch[5:]) == layers  # the host is not in them


@settings(max_examples=80, deadline=None)
@given(SETUPS, st.sampled_from(FORMS), st.lists(st.integers(1, 16384), min_size=1, max_size=300))
def test_a_decode_iteration_is_affine_in_the_context(setup, form, contexts):
    model, device, tp = setup
    cost = build_cost(model, device, form, tp, HOST_S)[0]
    c0, c1 = decode_affine(cost, float(len(contexts)))
    assert iteration_s(cost, *aggregates([], contexts)) == pytest.approx(c0 + c1 * sum(contexts), rel=1e-12)


def test_the_context_of_a_prefill_iteration_ends_with_its_padding():
    """In the calibrated form a 129th token opens a second tile of 128 query rows: attention pays for 256."""
    cost = build_cost(LLAMA_8B, A100)[0]
    tile, one_more, tiles = (prefill_s(cost, float(tokens)) for tokens in (8064, 8065, 8066))
    assert one_more - tile > 5 * (tiles - one_more) > 0


# B_sat against a search.


def searched_saturation(model, device, form, tp):
    """Smallest batch at which every linear of a layer has flops / bytes of at least F_g / M_g."""
    k = device.xllm if form == "ooco-xllm" else device.calibrated
    ratio = device.peak_flops_per_s * k.gemm_flops / (device.hbm_bytes_per_s * k.gemm_bytes)
    attention = model.q_heads * model.head_dim / tp
    up = model.intermediate / tp if form == "ooco-xllm" else 2 * model.intermediate / tp
    linears = [(model.hidden, model.qkv_width / tp), (attention, model.hidden)]
    linears += [(model.hidden, up), (model.intermediate / tp, model.hidden)]
    for batch in range(1, 4096):
        weights = [(2 * i * o * batch, model.bytes_per_param * i * o + 2 * batch * (i + o)) for i, o in linears]
        if all(flops / data >= ratio for flops, data in weights):
            return batch
    return 4096


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("device", DEVICES, ids=lambda spec: spec.name)
@pytest.mark.parametrize("model", [*MODELS, EIGHT_BIT], ids=lambda spec: spec.name)
def test_saturation_batch_is_the_smallest_that_saturates(model, device, form, tp):
    assert saturation_batch(model, device, form, tp) == searched_saturation(model, device, form, tp)


def test_layers_too_small_to_saturate_are_capped():
    tiny = ModelSpec("tiny", hidden=128, layers=2, q_heads=2, kv_heads=2, head_dim=64, intermediate=256, vocab=512)
    assert saturation_batch(tiny, A100) == 4096


# What is refused.


def test_an_unknown_form_lists_the_known():
    with pytest.raises(OocoError, match=r"unknown cost form 'roof': known are calibrated, ooco-xllm"):
        build_cost(QWEN_7B, A100, "roof")


@pytest.mark.parametrize("tp", [0, -1, 3, 8])
def test_tensor_parallelism_that_does_not_divide_the_heads(tp):
    with pytest.raises(OocoError, match=f"tensor_parallel is {tp}, it must divide the 28 heads of qwen2.5-7b"):
        build_cost(QWEN_7B, A100, tp=tp)
