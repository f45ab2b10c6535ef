"""Closed loops measured on data-centre GPUs: mean TTFT and TPOT at a fixed number of clients.

InferenceX publishes its client and the commands its servers are started with: ten requests per client, lengths uniform
between 0.8 and 1 of the nominal ones, 8192 tokens an iteration, as many seats as clients, an 8-bit KV cache on B200. Of
the other runs nothing but the nominal lengths is known.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from measured_streams import Deployment, Run, Times, read_rows

from ooco_gym.roofline import HardwareSpec, ModelSpec, resolve_hardware, resolve_model
from ooco_gym.workload import Requests

DEVICES = {"h100_sxm": "h100", "h200_sxm": "h200", "b200_sxm": "b200"}
MODELS = {
    "meta-llama/Llama-3.1-70B": "llama-3.1-70b",
    "Qwen/Qwen3-32B": "qwen3-32b",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "llama-3.1-8b",
}
WAVES = 10  # requests per client
NVIDIA, INFERENCEX = "vLLM 0.12", "vLLM in InferenceX"
#: Lengths over the nominal ones. Where nothing is known a tenth to both sides is assumed: were they equal, clients
#: would go on in step for ever and wait for each other's prompts. TTFT depends on it, TPOT hardly.
LENGTH_SHARES = {NVIDIA: (0.9, 1.1), INFERENCEX: (0.8, 1.0)}
SHAPE = ("tensor_parallel", "prompt_tokens", "output_tokens", "client_concurrency")
FITTED = {
    NVIDIA: ("h100", "qwen3-32b", "bf16", "2", "1024", "1024", "8"),
    INFERENCEX: ("h100", "llama-3.1-70b", "fp8", "4", "1024", "1024", "8"),
}
MEMORY_SHARE = 0.9


def fp8(device: HardwareSpec, cache: bool) -> HardwareSpec:
    """Twice the peak for GEMMs; attention stays at 16 bits unless its ``cache`` has 8, which it reads twice as fast."""
    constants = device.calibrated
    calibrated = replace(
        constants,
        prefill_attention_flops=constants.prefill_attention_flops / 2,
        attention_bytes=constants.attention_bytes * (2 if cache else 1),
    )
    peak = 2 * device.peak_flops_per_s
    return replace(device, name=f"{device.name}-fp8", peak_flops_per_s=peak, calibrated=calibrated)


def eight_bit_blocks(model: ModelSpec, device: HardwareSpec, devices: int) -> int:
    """KV blocks of an 8-bit cache beside 8-bit weights."""
    free_bytes = MEMORY_SHARE * devices * device.hbm_bytes - model.params
    return int(free_bytes // (model.kv_bytes_per_token / 2 * 16))


def drawn_lengths(count: int, prompt: int, output: int, shares: tuple[float, float]) -> Requests:
    """``count`` requests at 0 with lengths uniform between ``shares`` of the nominal ones; always the same."""
    random = np.random.default_rng(0)
    lengths = [np.rint(random.uniform(*shares, count) * tokens).astype(np.int32) for tokens in (prompt, output)]
    return Requests(np.zeros(count), *lengths)


def closed_loops(data_dir: str | None) -> list[Run]:
    """Closed loops on data-centre GPUs, dense models, vLLM, 16 and 8 bits."""
    return [_run(row) for row in read_rows("aic_silicon_e2e_ttft_tpot", data_dir) if _known(row)]


def _known(row: dict[str, str]) -> bool:
    vllm = (row["backend"], row["mode"]) == ("vllm", "agg") and row["precision"] in ("", "fp8")
    return vllm and row["hardware"] in DEVICES and row["model"] in MODELS and bool(row["client_concurrency"])


def _run(row: dict[str, str]) -> Run:
    engine = NVIDIA if row["backend_version"] else INFERENCEX
    device, model, precision = DEVICES[row["hardware"]], MODELS[row["model"]], row["precision"] or "bf16"
    clients, devices = int(row["client_concurrency"]), int(row["tensor_parallel"])
    cluster: dict[str, Any] = {"unified": 1, "tensor_parallel": devices, "max_seqs": 1024, "chunk_tokens": 8192}
    hardware, changes, cache = resolve_hardware(device), {}, "16-bit"
    if precision == "fp8":
        changes["bytes_per_param"] = 1.0
        if (engine, device) == (INFERENCEX, "b200"):
            cluster["kv_blocks"], cache = eight_bit_blocks(resolve_model(model), hardware, devices), "8-bit"
        hardware = fp8(hardware, cache == "8-bit")
    shares = LENGTH_SHARES[engine]
    assumed = (
        f"8192 tokens, {MEMORY_SHARE} of the memory, {cache} KV, lengths {shares[0]} to {shares[1]} of the nominal"
    )
    requests = drawn_lengths(clients * WAVES, int(row["prompt_tokens"]), int(row["output_tokens"]), shares)
    ttft_s, tpot_s = float(row["ttft_ms"]) / 1e3, float(row["tpot_ms"]) / 1e3
    e2e_s = ttft_s + (float(requests.output_tokens.mean()) - 1.0) * tpot_s
    key = (device, model, precision, *(row[name] for name in SHAPE))
    return Run(
        source="aic",
        name=f"{device} {model} {precision} tp{devices} " + "/".join(key[4:]),
        engine=engine,
        deployment=Deployment(model, hardware, "chunked", cluster, changes, assumed),
        requests=requests,
        measured=Times(np.array([ttft_s]), np.array([tpot_s]), np.array([e2e_s])),
        concurrency=clients,
        fits=key == FITTED[engine],
    )
