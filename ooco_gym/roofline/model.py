"""Transformer shapes: everything about a dense model that its iteration time and KV cache depend on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from ooco_gym import presets
from ooco_gym.errors import OocoError


@dataclass(frozen=True)
class ModelSpec:
    """A dense decoder with gated MLP and (possibly grouped) full attention.

    Mixture-of-experts, multi-head latent attention and sliding windows are not modelled.
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

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("name", "tied_embeddings") and not value > 0:
                raise OocoError(f"model '{self.name}': {field.name} is {value!r}, it must be a positive number")
        if self.q_heads % self.kv_heads:
            raise OocoError(
                f"model '{self.name}': {self.q_heads} query heads are not a multiple of {self.kv_heads} KV heads"
            )

    @property
    def qkv_width(self) -> int:
        """Output columns of the fused QKV projection."""
        return (self.q_heads + 2 * self.kv_heads) * self.head_dim

    @property
    def params(self) -> int:
        """Number of weights; norms and biases (under 0.01 %) are left out."""
        attention = self.hidden * self.qkv_width + self.q_heads * self.head_dim * self.hidden
        mlp = 3 * self.hidden * self.intermediate
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
    known = {field.name for field in fields(ModelSpec)}
    given = {key: value for key, value in values.items() if key not in ("description", "hf_config")}
    unknown = sorted(set(given) - known)
    if unknown:
        raise OocoError(f"{where}: unknown key '{unknown[0]}', accepted are {', '.join(sorted(known))}")
    missing = [field.name for field in fields(ModelSpec) if field.default is MISSING and field.name not in given]
    if missing:
        raise OocoError(f"{where}: {', '.join(missing)} missing, accepted are {', '.join(sorted(known))}")
    try:
        return ModelSpec(**given)
    except TypeError as error:
        raise OocoError(f"{where}: {error}") from None


def model_from_hf_config(path: str | Path) -> ModelSpec:
    """Read a Hugging Face ``config.json`` of a dense decoder (Llama, Qwen2, Mistral and their like)."""
    path = Path(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OocoError(f"model config {path}: {error.strerror or error}, a readable config.json is needed") from None
    except ValueError as error:
        raise OocoError(f"model config {path}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise OocoError(f"model config {path}: a JSON object is needed, got {type(config).__name__}")
    for sign in ("num_experts", "num_local_experts", "n_routed_experts", "kv_lora_rank"):
        if config.get(sign):
            raise OocoError(f"model config {path}: '{sign}' is set, only dense models with full attention are modelled")
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        raise OocoError(f"model config {path}: 'sliding_window' is set, only full attention is modelled")
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
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
