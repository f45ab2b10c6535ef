"""What an iteration costs: model and device specs, and the compiled cost function. Knows nothing of clusters."""

from ooco_gym.roofline.cost import (
    COST,
    FORMS,
    build_cost,
    causal_pairs,
    decode_affine,
    decode_s,
    iteration_s,
    layers_s,
    prefill_s,
    saturation_batch,
)
from ooco_gym.roofline.hardware import HardwareSpec, resolve_hardware
from ooco_gym.roofline.model import ModelSpec, model_from_hf_config, resolve_model

__all__ = [
    "COST",
    "FORMS",
    "HardwareSpec",
    "ModelSpec",
    "build_cost",
    "causal_pairs",
    "decode_affine",
    "decode_s",
    "iteration_s",
    "layers_s",
    "model_from_hf_config",
    "prefill_s",
    "resolve_hardware",
    "resolve_model",
    "saturation_batch",
]
