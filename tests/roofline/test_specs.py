"""Model and device specs: published sizes, Hugging Face config files, and what is refused."""

import json
from dataclasses import asdict, replace

import pytest

from ooco_gym.errors import OocoError
from ooco_gym.roofline import HardwareSpec, ModelSpec, model_from_hf_config, resolve_hardware, resolve_model

# The keys that matter and some that do not, as published on Hugging Face.
QWEN_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rope_scaling": {"factor": 8.0, "rope_type": "llama3"},
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
QWEN_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}


def config_file(folder, content):
    path = folder / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("qwen2.5-7b", 7.62e9),
        ("qwen2.5-72b", 72.7e9),
        ("llama-3.1-8b", 8.03e9),
        ("llama-3.1-70b", 70.6e9),
        ("qwen3-32b", 32.8e9),
        ("qwen3-30b-a3b", 30.5e9),
    ],
)
def test_the_number_of_weights_is_the_published_one(name, params):
    assert resolve_model(name).params == pytest.approx(params, rel=0.01)


def test_bytes_of_qwen_by_hand():
    model = resolve_model("qwen2.5-7b")
    assert model.kv_bytes_per_token == 2 * 2 * 4 * 128 * 28 == 57344  # K and V, 16 bit, 4 heads of 128, 28 layers
    assert model.weight_bytes == 2 * model.params
    assert model.qkv_width == 3584 + 2 * 512


def test_tied_embeddings_are_counted_once():
    model = resolve_model("llama-3.1-8b")
    assert model.params - replace(model, tied_embeddings=True).params == 128256 * 4096


@pytest.mark.parametrize(
    ("config", "preset"), [(QWEN_7B, "qwen2.5-7b"), (LLAMA_8B, "llama-3.1-8b"), (QWEN_30B_A3B, "qwen3-30b-a3b")]
)
def test_a_hugging_face_config_gives_the_preset(tmp_path, config, preset):
    path = config_file(tmp_path, config)
    expected = asdict(resolve_model(preset)) | {"name": tmp_path.name}
    assert asdict(model_from_hf_config(path)) == expected
    assert resolve_model(str(path)) == resolve_model({"hf_config": str(path)}) == model_from_hf_config(path)


def test_a_mixtral_config_gives_experts_of_the_dense_width(tmp_path):
    model = model_from_hf_config(config_file(tmp_path, MIXTRAL_8X7B))
    assert (model.experts, model.experts_per_token, model.expert_intermediate) == (8, 2, 14336)
    assert model.params == pytest.approx(46.7e9, rel=0.01)


def test_weights_of_the_experts_by_hand():
    model = resolve_model("qwen3-30b-a3b")
    dense = replace(model, experts=0, experts_per_token=0, expert_intermediate=0)
    experts = 48 * (128 * 3 * 2048 * 768 + 2048 * 128)  # gate, up and down of each; the router
    assert model.params == dense.params - 48 * 3 * 2048 * 6144 + experts
    assert model.weight_bytes == 2 * model.params


def test_absent_keys_of_older_configs_take_their_usual_values(tmp_path):
    older = {key: QWEN_7B[key] for key in QWEN_7B if key not in ("num_key_value_heads", "tie_word_embeddings")}
    model = model_from_hf_config(config_file(tmp_path, older))
    assert (model.kv_heads, model.head_dim, model.tied_embeddings) == (28, 128, False)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (
            {k: v for k, v in QWEN_7B.items() if k != "num_hidden_layers"},
            ["'num_hidden_layers' is missing", "integer"],
        ),
        (QWEN_7B | {"hidden_size": "3584"}, ["'hidden_size' is '3584'", "integer"]),
        (QWEN_7B | {"num_local_experts": 8}, ["'num_experts_per_tok' is missing", "integer"]),
        (QWEN_7B | {"num_experts": 8, "num_experts_per_tok": 2}, ["'moe_intermediate_size' is missing", "integer"]),
        (QWEN_7B | {"kv_lora_rank": 512}, ["'kv_lora_rank' is set", "full attention"]),
        (QWEN_7B | {"n_routed_experts": 256}, ["'n_routed_experts' is set", "not modelled"]),
        (
            QWEN_30B_A3B | {"shared_expert_intermediate_size": 512},
            ["shared_expert_inter", "not modelled"],
        ),
        (QWEN_30B_A3B | {"n_shared_experts": 1}, ["'n_shared_experts' is set", "shared experts are not modelled"]),
        (QWEN_30B_A3B | {"mlp_only_layers": [0]}, ["'mlp_only_layers' is set", "dense layers among"]),
        (QWEN_30B_A3B | {"decoder_sparse_step": 2}, ["'decoder_sparse_step' is 2", "only 1"]),
        (QWEN_30B_A3B | {"num_experts_per_tok": 200}, ["experts_per_token is 200", "the 128 experts"]),
        (MIXTRAL_8X7B | {"sliding_window": 4096}, ["'sliding_window' is set", "full attention"]),
        (QWEN_7B | {"num_key_value_heads": 5}, ["28 query heads are not a multiple of 5"]),
        (QWEN_7B | {"vocab_size": -1}, ["vocab is -1", "positive"]),
        ("{'hidden_size': 1}", ["not valid JSON"]),
        ("[1, 2]", ["a JSON object is needed", "list"]),
    ],
)
def test_a_config_that_cannot_be_used(tmp_path, content, named):
    with pytest.raises(OocoError) as caught:
        model_from_hf_config(config_file(tmp_path, content))
    assert all(part in str(caught.value) for part in named)


def test_a_config_that_is_not_there(tmp_path):
    with pytest.raises(OocoError, match=r"nowhere\.json: No such file or directory"):
        resolve_model(tmp_path / "nowhere.json")


def test_a_sliding_window_is_refused(tmp_path):
    """ModelSpec says that sliding windows are not modelled; Mistral-7B-v0.1 has one."""
    mistral = LLAMA_8B | {"sliding_window": 4096, "architectures": ["MistralForCausalLM"]}
    with pytest.raises(OocoError, match="sliding"):
        model_from_hf_config(config_file(tmp_path, mistral))


@pytest.mark.parametrize(
    ("resolve", "known"),
    [(resolve_model, "llama-3.1-8b, qwen2.5-72b, qwen2.5-7b"), (resolve_hardware, "a100, ascend-910b, h100")],
)
def test_an_unknown_name_lists_the_known(resolve, known):
    with pytest.raises(OocoError, match=f"unknown .* 'abacus': known are .*{known.split(', ')[0]}") as caught:
        resolve("abacus")
    assert all(name in str(caught.value) for name in known.split(", "))


MODEL = {"name": "m", "hidden": 64, "layers": 1, "q_heads": 2, "kv_heads": 1, "head_dim": 32}
MODEL |= {"intermediate": 128, "vocab": 10}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"width": 3}, ["unknown key 'width'", "hidden", "vocab"]),
        ({"layers": 0}, ["layers is 0", "positive"]),
        ({"layers": float("nan")}, ["layers is nan", "positive"]),
        ({"kv_heads": 3}, ["2 query heads", "3 KV heads"]),
        ({"experts": 4}, ["experts_per_token is 0", "go together"]),
        ({"expert_intermediate": 4}, ["experts is 0", "go together"]),
        ({"experts": -1}, ["experts is -1", "0 or more"]),
        ({"experts": 2.5}, ["experts is 2.5", "integer"]),
        ({"experts": 2, "experts_per_token": 3, "expert_intermediate": 8}, ["is 3", "the 2 experts"]),
    ],
)
def test_a_model_mapping_that_cannot_be_used(change, named):
    assert resolve_model(MODEL) == ModelSpec(**MODEL)
    with pytest.raises(OocoError) as caught:
        resolve_model(MODEL | change)
    assert all(part in str(caught.value) for part in named)


def test_a_model_mapping_with_a_key_missing_names_it():
    with pytest.raises(OocoError, match="vocab"):
        resolve_model({key: value for key, value in MODEL.items() if key != "vocab"})


CALIBRATED = {
    "gemm_flops": 0.7,
    "gemm_bytes": 0.8,
    "gemm_us": 5,
    "elementwise_bytes": 0.6,
    "elementwise_us": 15,
}
CALIBRATED |= {"prefill_attention_flops": 0.5, "attention_bytes": 0.7, "attention_us": 15}
HARDWARE = {"name": "d", "peak_flops_per_s": 1e14, "hbm_bytes_per_s": 1e12, "hbm_bytes": 8e10}
HARDWARE |= {"link_bytes_per_s": 1e11, "calibrated": CALIBRATED}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"speed": 3}, ["unknown key 'speed'", "peak_flops_per_s"]),
        ({"hbm_bytes": -1.0}, ["hbm_bytes is -1.0", "positive"]),
        ({"hbm_bytes": "80GB"}, ["hardware"]),
        ({"calibrated": {"gemm_flops": 0.7}}, ["calibrated", "gemm_bytes"]),
        ({"xllm": {"gemms": 1}}, ["xllm: unknown key 'gemms'", "gemm_flops"]),
    ],
)
def test_a_hardware_mapping_that_cannot_be_used(change, named):
    assert isinstance(resolve_hardware(HARDWARE), HardwareSpec)
    with pytest.raises(OocoError) as caught:
        resolve_hardware(HARDWARE | change)
    assert all(part in str(caught.value) for part in named)
