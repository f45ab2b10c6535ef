"""Transformer shapes: everything about a model that its iteration time and KV cache depend on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from ooco_gym import presets
from ooco_gym.errors import OocoError, refuse_unknown_keys

_EXPERT_FIELDS = ("experts", "experts_per_token", "expert_intermediate")

#: Keys of Hugging Face configs that, when set, change what a layer computes in a way that is not modelled.
_REFUSED_KEYS = {
    "kv_lora_rank": "only full attention is modelled, not multi-head latent attention",
    "n_routed_experts": "DeepSeek's experts (some layers dense, some experts shared) are not modelled",
    "shared_expert_intermediate_size": "shared experts are not modelled",
    "n_shared_experts": "shared experts are not modelled",
    "num_shared_experts": "shared experts are not modelled",
    "shared_intermediate_size": "shared experts are not modelled",
    "first_k_dense_replace": "dense layers among MoE layers are not modelled",
    "mlp_only_layers": "dense layers among MoE layers are not modelled",
}


@dataclass(frozen=True)
class ModelSpec:
    """A decoder with gated MLP and (possibly grouped) full attention; every layer dense, or every layer with experts.

    With ``experts`` > 0 each token goes through ``experts_per_token`` MLPs of width ``expert_intermediate``, and
    ``intermediate``, the width of a dense MLP, is not used. Shared experts, dense layers among MoE layers, multi-head
    latent attention and sliding windows are not modelled. Raises OocoError on sizes that do not fit together.
    """

    name: str
    hidden: int
    layers: int
    q_heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied_embeddings: bool = False
    bytes_per_param: float = 2.0
    max_context_tokens: int = 131072
    experts: int = 0  # routed experts of a layer; 0: a dense model
    experts_per_token: int = 0
    expert_intermediate: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("name", "tied_embeddings", *_EXPERT_FIELDS) and not value > 0:
                raise OocoError(f"model '{self.name}': {field.name} is {value!r}, it must be a positive number")
        if self.q_heads % self.kv_heads:
            raise OocoError(
                f"model '{self.name}': {self.q_heads} query heads are not a multiple of {self.kv_heads} KV heads"
            )
        self._check_experts()

    def _check_experts(self) -> None:
        given = {name: getattr(self, name) for name in _EXPERT_FIELDS}
        for name, value in given.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise OocoError(f"model '{self.name}': {name} is {value!r}, it must be an integer of 0 or more")
        if any(given.values()) and not all(given.values()):
            absent = next(name for name, value in given.items() if not value)
            raise OocoError(f"model '{self.name}': {absent} is 0, {', '.join(_EXPERT_FIELDS)} go together (0: dense)")
        if self.experts_per_token > self.experts:
            chosen = f"experts_per_token is {self.experts_per_token}"
            raise OocoError(f"model '{self.name}': {chosen}, it must not exceed the {self.experts} experts")

    @property
    def qkv_width(self) -> int:
        """Output columns of the fused QKV projection."""
        return (self.q_heads + 2 * self.kv_heads) * self.head_dim

    @property
    def params(self) -> int:
        """Number of weights, all experts and their router included; norms and biases (under 0.01 %) are left out."""
        attention = self.hidden * self.qkv_width + self.q_heads * self.head_dim * self.hidden
        mlp = 3 * self.hidden * self.intermediate
        if self.experts:
            mlp = 3 * self.hidden * self.expert_intermediate * self.experts + self.hidden * self.experts
        embeddings = self.hidden * self.vocab * (1 if self.tied_embeddings else 2)
        return self.layers * (attention + mlp) + embeddings

    @property
    def weight_bytes(self) -> float:
        return self.params * self.bytes_per_param

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of K and V of one token over all layers, 16-bit cache."""
        return 2.0 * 2.0 * self.kv_heads * self.head_dim * self.layers


def model_from_mapping(values: Mapping[str, Any], where: str = "model") -> ModelSpec:
    """Build a spec from a preset's keys; raises OocoError naming unknown or missing keys."""
    known = sorted(field.name for field in fields(ModelSpec))
    given = {key: value for key, value in values.items() if key not in ("description", "hf_config")}
    refuse_unknown_keys(given, known, where)
    missing = [field.name for field in fields(ModelSpec) if field.default is MISSING and field.name not in given]
    if missing:
        raise OocoError(f"{where}: {', '.join(missing)} missing, accepted are {', '.join(known)}")
    try:
        return ModelSpec(**given)
    except TypeError as error:
        raise OocoError(f"{where}: {error}") from None


def model_from_hf_config(path: str | Path) -> ModelSpec:
    """Read a Hugging Face ``config.json``: dense (Llama, Qwen2, Mistral) or all MoE layers (Qwen3-MoE, Mixtral).

    Raises OocoError, naming the key, on what cannot be read and on what ModelSpec does not model.
    """
    path = Path(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OocoError(f"model config {path}: {error.strerror or error}, a readable config.json is needed") from None
    except ValueError as error:
        raise OocoError(f"model config {path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise OocoError(f"model config {path}: a JSON object is needed, got {type(config).__name__}")
    for key, reason in _REFUSED_KEYS.items():
        if config.get(key):
            raise OocoError(f"model config {path}: '{key}' is set, {reason}")
    step = config.get("decoder_sparse_step") or 1
    if step != 1:
        raise OocoError(f"model config {path}: 'decoder_sparse_step' is {step!r}, only 1 (no dense layers) is modelled")
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        raise OocoError(f"model config {path}: 'sliding_window' is set, only full attention is modelled")
    experts, width = "num_experts", "moe_intermediate_size"  # Qwen3-MoE
    if config.get("num_local_experts"):  # Mixtral: 'intermediate_size' is the width of an expert
        experts, width = "num_local_experts", "intermediate_size"
    needed = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"]
    if config.get(experts):
        needed += [experts, "num_experts_per_tok", width]
    for key in needed:
        if not isinstance(config.get(key), int):
            what = f"is {config[key]!r}" if key in config else "is missing"
            raise OocoError(f"model config {path}: '{key}' {what}, an integer is needed")
    heads = config["num_attention_heads"]
    return ModelSpec(
        name=str(config.get("_name_or_path") or path.parent.name or "model"),
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        q_heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate=config["intermediate_size"],
        vocab=config["vocab_size"],
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        max_context_tokens=config.get("max_position_embeddings") or 131072,
        experts=config.get(experts) or 0,
        experts_per_token=config["num_experts_per_tok"] if config.get(experts) else 0,
        expert_intermediate=config[width] if config.get(experts) else 0,
    )


def resolve_model(source: str | Path | Mapping[str, Any] | ModelSpec) -> ModelSpec:
    """A preset name, a path to a ``config.json``, a mapping of the fields, or a finished spec."""
    if isinstance(source, ModelSpec):
        return source
    if isinstance(source, Mapping):
        if source.get("hf_config"):
            return model_from_hf_config(str(source["hf_config"]))
        return model_from_mapping(source)
    if str(source).endswith(".json"):
        return model_from_hf_config(source)
    return model_from_mapping(presets.load("model", str(source)), where=f"conf/model/{source}.yaml")
