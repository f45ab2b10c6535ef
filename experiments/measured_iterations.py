"""Whole iterations put together from public kernel timings, as rows to fit to and to judge by.

    iteration = layers x (linear and element-wise operators + attention + 2 all-reduces) + LM head

Every part is a measured time of the same device, model shape and tensor parallelism; nothing comes out of the formula.
Between the sizes that were measured, times are interpolated linearly in the logarithms of size and time; nothing is
extrapolated but the LM head, whose columns lie beyond the GEMM table. Iterations that do not fit the device's memory
are left out. The tables (shared/data/measured, see its README) are read only and never copied.

=================  ==================================================================================================
A100, H100          Vidur: linear and element-wise operators of seven (A100) and five (H100) models at tp 1, 2, 4, 8.
                    aiconfigurator (vLLM 0.14): attention, LM head, all-reduce. A mixed batch is one prefill kernel and
                    one decode kernel, each measured alone: no table holds a fused kernel on these devices.
RTX PRO 6000, 4090  LLMServingSim (vLLM 0.19): operators, LM head, and the fused attention kernel of mixed batches. The
                    all-reduce of two RTX PRO 6000 is aiconfigurator's, of the Server Edition.
=================  ==================================================================================================
"""

from __future__ import annotations

import csv
import gzip
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ooco_gym.errors import OocoError
from ooco_gym.roofline.calibration.measurement import Measurement, balanced, batch_kind
from ooco_gym.roofline.hardware import HardwareSpec, resolve_hardware
from ooco_gym.roofline.model import ModelSpec, resolve_model

DEVICES = ("a100", "h100", "rtx-pro-6000", "rtx-4090")
#: Names of the devices in the tables.
AIC_NAMES = {
    "a100": "a100_sxm", "h100": "h100_sxm", "h200": "h200_sxm", "b200": "b200_sxm", "l40s": "l40s",
    "rtx-pro-6000": "rtx_pro_6000_server",
}  # fmt: skip
SIM_NAMES = {"rtx-pro-6000": "RTXPRO6000", "rtx-4090": "RTX4090"}
#: Layers of the models in Vidur's tables, which give the other sizes. phi-2 has no gated MLP and is left out.
VIDUR_LAYERS = {
    "Qwen/Qwen-72B": 80, "codellama/CodeLlama-34b-Instruct-hf": 48, "internlm/internlm-20b": 60,
    "meta-llama/Llama-2-70b-hf": 80, "meta-llama/Llama-2-7b-hf": 32, "meta-llama/Meta-Llama-3-70B": 80,
    "meta-llama/Meta-Llama-3-8B": 32,
}  # fmt: skip
SIM_MODELS = {"meta-llama/Llama-3.1-8B": "llama-3.1-8b", "Qwen/Qwen3-30B-A3B-Instruct-2507": "qwen3-30b-a3b"}

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
PREFILLS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)
CHUNKS = (256, 512, 1024, 2048)
_VIDUR_ONCE = ("input_layernorm", "attn_rope", "post_attention_layernorm", "mlp_act")
_VIDUR_GEMMS = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")  # in the order of cost.gemm_shapes
MEMORY_SHARE = 0.9  # of the device, for weights and KV cache


def folder(data_dir: str | None = None) -> Path:
    """``measured/`` in ``data_dir``, else in OOCO_DATA, else in ../shared/data; raises OocoError where it is absent."""
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    found = Path(data_dir or os.environ.get("OOCO_DATA") or beside).expanduser() / "measured"
    if not found.is_dir():
        raise OocoError(f"{found} is not there: name the folder that holds measured/ with --data-dir or OOCO_DATA")
    return found


def _rows(path: Path, wanted: Mapping[str, Sequence[str]]) -> Iterator[dict[str, str]]:
    if not path.is_file():
        raise OocoError(f"{path} is not there: the table is needed for this device")
    with gzip.open(path, "rt", newline="", encoding="utf-8") as lines:
        reader = csv.reader(lines)
        header = next(reader)
        needed = [(header.index(name), frozenset(values)) for name, values in wanted.items()]
        for row in reader:
            if all(row[column] in values for column, values in needed):
                yield dict(zip(header, row, strict=True))


class Curve:
    """Time against one size, measured at some: log-log interpolation, None outside what was measured."""

    def __init__(self, points: Mapping[float, float]) -> None:
        sizes = sorted(points)
        self.low, self.high = sizes[0], sizes[-1]
        self.log_size = np.log(sizes)
        self.log_s = np.log([points[size] for size in sizes])

    def __call__(self, size: float) -> float | None:
        if not self.low <= size <= self.high:
            return None
        return math.exp(np.interp(math.log(size), self.log_size, self.log_s))


def _curves(points: Mapping[Any, Mapping[float, float]]) -> dict[Any, Curve]:
    return {key: Curve(found) for key, found in points.items()}


def _nested() -> defaultdict[Any, dict[float, float]]:
    return defaultdict(dict)


def gemm_rows(data: Path, device: str) -> list[Measurement]:
    """bf16 GEMMs of aiconfigurator; ``device`` is a preset name in AIC_NAMES."""
    wanted = {"hardware": [AIC_NAMES[device]], "dtype": ["bfloat16"]}
    return [
        Measurement("gemm", float(row["ms"]) / 1e3, tokens=int(row["m_tokens"]), n=int(row["n"]), k=int(row["k"]))
        for row in _rows(data / "aic_gemm_vllm.csv.gz", wanted)
    ]


class _Allreduce:
    """vLLM's all-reduce inside a CUDA graph by bytes; NCCL's where vLLM falls back to it is part of that table."""

    def __init__(self, data: Path, device: str) -> None:
        points = _nested()
        wanted = {"hardware": [AIC_NAMES.get(device, "")], "collective": ["all_reduce(vllm_graph)"]}
        for row in _rows(data / "aic_collectives.csv.gz", wanted):
            points[int(row["num_gpus"])][2.0 * int(row["message_size"])] = float(row["ms"]) / 1e3
        self.curves = _curves(points)

    def __call__(self, model: ModelSpec, tp: int, tokens: float) -> float | None:
        if tp == 1:
            return 0.0
        return self.curves[tp](2.0 * tokens * model.hidden) if tp in self.curves else None


def allreduce_rows(data: Path, device: str, model: ModelSpec) -> list[Measurement]:
    """All-reduces of ``model``'s hidden size among as many devices as were timed; ``device`` in AIC_NAMES."""
    allreduce = _Allreduce(data, device)
    found = []
    for tp in sorted(allreduce.curves):
        for tokens in (2**power for power in range(14)):
            seconds = allreduce(model, tp, tokens)
            if seconds is not None:
                found.append(Measurement("allreduce", seconds, model, tp, tokens=tokens, group=model.name))
    return found


class _ServerParts:
    """A100 and H100: Vidur's operators, aiconfigurator's attention, LM head and all-reduce."""

    def __init__(self, data: Path, device: str) -> None:
        self.device = device
        self.allreduce = _Allreduce(data, device)
        self.shapes: dict[tuple[str, int], ModelSpec] = {}
        operators: dict[tuple[str, int], defaultdict[Any, dict[float, float]]] = defaultdict(_nested)
        wanted = {"hardware": [device], "model": list(VIDUR_LAYERS)}
        for row in _rows(data / "vidur_linear_ops.csv.gz", wanted):
            key = row["model"], int(row["tensor_parallel"])
            self.shapes[key] = _vidur_model(row)
            tokens = float(row["num_tokens"])
            other = sum(float(row[f"{name}_ms"]) for name in _VIDUR_ONCE) + 2.0 * float(row["add_ms"])
            operators[key]["elementwise"][tokens] = other / 1e3
            for name in _VIDUR_GEMMS:
                operators[key][name][tokens] = float(row[f"{name}_ms"]) / 1e3
        self.operators = {key: _curves(found) for key, found in operators.items()}
        decode, prefill = _nested(), _nested()
        wanted = {"hardware": [AIC_NAMES[device]], "head_dim": ["128"], "window": ["0"]}
        for row in _rows(data / "aic_attention_vllm_bf16.csv.gz", wanted):
            heads = int(row["num_heads"]), int(row["num_kv_heads"])
            batch, seconds = float(row["batch_size"]), float(row["ms"]) / 1e3
            if row["phase"].startswith("decode"):
                decode[(*heads, int(row["kv_context_tokens"]) + 1)][batch] = seconds
            else:
                prefill[(*heads, int(row["new_tokens_per_seq"]))][batch] = seconds
        self.decode_curves, self.prefill_curves = _curves(decode), _curves(prefill)
        head = _nested()
        for gemm in gemm_rows(data, device):
            if gemm.n == 16384:
                head[int(gemm.k)][gemm.tokens] = gemm.seconds
        self.head_curves = _curves(head)

    def _split(self, curves: dict[Any, Curve], model: ModelSpec, tp: int, length: int, batch: float) -> float | None:
        """Attention is independent between KV heads: h of them are h / g of them on g times the batch. Uses the
        largest share of the heads that was measured."""
        kv = max(model.kv_heads // tp, 1)
        ratio = model.q_heads // tp // kv
        for share in range(kv, 0, -1):
            curve = curves.get((share * ratio, share, length))
            if kv % share == 0 and curve is not None:
                return curve(batch * kv / share)
        return None

    def prefill_s(self, model: ModelSpec, tp: int, prefills: float, new: int) -> float | None:
        return self._split(self.prefill_curves, model, tp, new, prefills)

    def decode_s(self, model: ModelSpec, tp: int, decodes: float, context: int) -> float | None:
        return self._split(self.decode_curves, model, tp, context, decodes)

    def mixed_s(self, model: ModelSpec, tp: int, new: int, decodes: float, context: int) -> float | None:
        return _sum(self.prefill_s(model, tp, 1.0, new), self.decode_s(model, tp, decodes, context))

    def operator_s(self, key: tuple[str, int], name: str, tokens: float) -> float | None:
        return self.operators[key][name](tokens)

    def layer_s(self, key: tuple[str, int], tokens: float) -> float | None:
        return _sum(*(curve(tokens) for curve in self.operators[key].values()))

    def head_s(self, key: tuple[str, int], sequences: float) -> float | None:
        """GEMM of V / tp columns: the widest measured matrix but one, 16,384 columns, as often as it takes."""
        model = self.shapes[key]
        seconds = self.head_curves[model.hidden](sequences) if model.hidden in self.head_curves else None
        return None if seconds is None else seconds * model.vocab / key[1] / 16384.0


def _vidur_model(row: Mapping[str, str]) -> ModelSpec:
    hidden, heads = int(row["n_embd"]), int(row["n_head"])
    return ModelSpec(
        name=row["model"],
        hidden=hidden,
        layers=VIDUR_LAYERS[row["model"]],
        q_heads=heads,
        kv_heads=int(row["n_kv_head"]),
        head_dim=hidden // heads,
        intermediate=int(row["n_expanded_embd"]),
        vocab=int(row["vocab_size"]),
    )


class _SimParts:
    """RTX PRO 6000 and RTX 4090: LLMServingSim's operators and fused attention."""

    def __init__(self, data: Path, device: str) -> None:
        self.device = device
        self.allreduce = _Allreduce(data, device)
        self.shapes = {}
        operators: dict[tuple[str, int], defaultdict[Any, dict[float, float]]] = defaultdict(_nested)
        experts: dict[tuple[str, int], dict[tuple[int, int], float]] = defaultdict(dict)
        wanted = {"hardware": [SIM_NAMES[device]], "model": list(SIM_MODELS)}
        for row in _rows(data / "llmservingsim_layers.csv.gz", wanted):
            key, seconds = (row["model"], int(row["tensor_parallel"])), float(row["ms"]) / 1e3
            if row["layer"] == "moe":
                experts[key][int(row["tokens"]), int(row["activated_experts"])] = seconds
            else:
                operators[key][row["layer"]][float(row["tokens"])] = seconds
        self.operators = {key: _curves(found) for key, found in operators.items()}
        self.attention: dict[tuple[str, int], dict[tuple[int, int, int, int], float]] = defaultdict(dict)
        for row in _rows(data / "llmservingsim_attention_mixed.csv.gz", wanted):
            key = row["model"], int(row["tensor_parallel"])
            names = ("prefill_tokens", "prefill_kv_context", "decode_seqs", "decode_kv_context")
            new, past, decodes, context = (int(row[name]) for name in names)
            self.attention[key][new, past, decodes, context] = float(row["ms"]) / 1e3
        self.experts = {}
        for key in self.operators:
            model = resolve_model(SIM_MODELS[key[0]])
            self.shapes[key] = replace(model, name=key[0])
            if key in experts:
                self.experts[key] = _expected_experts(model, experts[key])

    def operator_s(self, key: tuple[str, int], name: str, tokens: float) -> float | None:
        if name == "elementwise":
            once = [
                self.operators[key][part](tokens)
                for part in ("rotary_emb", "act_fn", "qk_norm")
                if part in self.operators[key]
            ]
            norm = self.operators[key]["layernorm"](tokens)
            return _sum(norm, norm, *once)
        names = dict(zip(_VIDUR_GEMMS, ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"), strict=True))
        curve = self.operators[key].get(names[name])
        return None if curve is None else curve(tokens)

    def layer_s(self, key: tuple[str, int], tokens: float) -> float | None:
        names = ["elementwise", "attn_pre_proj", "attn_post_proj"]
        if not self.shapes[key].experts:
            return _sum(*(self.operator_s(key, name, tokens) for name in (*names, "mlp_up_proj", "mlp_down_proj")))
        moe = self.experts[key](tokens) if key in self.experts else None
        return _sum(moe, *(self.operator_s(key, name, tokens) for name in names))

    def head_s(self, key: tuple[str, int], sequences: float) -> float | None:
        return self.operators[key]["lm_head"](sequences)


def _expected_experts(model: ModelSpec, points: Mapping[tuple[int, int], float]) -> Curve:
    """Experts' time by tokens at the number of experts that uniform routing is expected to touch."""
    by_tokens = _nested()
    for (tokens, touched), seconds in points.items():
        by_tokens[tokens][float(touched)] = seconds
    found = {}
    for tokens, curve in by_tokens.items():
        expected = model.experts * -math.expm1(tokens * math.log1p(-model.experts_per_token / model.experts))
        seconds_or_none = Curve(curve)(min(expected, max(curve)))
        if seconds_or_none is not None and expected < 1.1 * max(curve):
            found[float(tokens)] = seconds_or_none
    return Curve(found)


def _sum(*parts: float | None) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None


@lru_cache(maxsize=4)
def _parts(data: Path, device: str) -> _ServerParts | _SimParts:
    return _SimParts(data, device) if device in SIM_NAMES else _ServerParts(data, device)


@lru_cache(maxsize=4)
def iterations(data: Path, device: str) -> tuple[Measurement, ...]:
    """Whole iterations of one of DEVICES; the group of each is its model's name."""
    parts = _parts(data, device)
    peaks = resolve_hardware(device)
    found = []
    for key, model in parts.shapes.items():
        batches = _sim_batches(parts, key) if isinstance(parts, _SimParts) else _server_batches(parts, key)
        for batch, attention_s in batches:
            tokens = batch["prefills"] * batch["prefill_tokens"] + batch["decodes"]
            kv_tokens = batch["prefills"] * (batch["prefill_tokens"] + batch["past_tokens"])
            kv_tokens += batch["decodes"] * batch["context_tokens"]
            if not _fits(model, key[1], kv_tokens, peaks):
                continue
            allreduce_s = parts.allreduce(model, key[1], tokens)
            inside = _sum(parts.layer_s(key, tokens), attention_s, allreduce_s, allreduce_s)
            head = parts.head_s(key, batch["prefills"] + batch["decodes"])
            if inside is not None and head is not None:
                seconds = model.layers * inside + head
                found.append(Measurement("iteration", seconds, model, key[1], group=model.name, **batch))
    return tuple(found)


def _fits(model: ModelSpec, tp: int, kv_tokens: float, peaks: HardwareSpec) -> bool:
    return (model.weight_bytes + kv_tokens * model.kv_bytes_per_token) / tp <= MEMORY_SHARE * peaks.hbm_bytes


def _batch(prefills: float, new: float, past: float, decodes: float, context: float) -> dict[str, float]:
    return {
        "prefills": prefills,
        "prefill_tokens": new,
        "past_tokens": past,
        "decodes": decodes,
        "context_tokens": context,
    }


def _server_batches(parts: _ServerParts, key: tuple[str, int]) -> Iterator[tuple[dict[str, float], float | None]]:
    model, tp = parts.shapes[key], key[1]
    for decodes in BATCHES:
        for context in CONTEXTS:
            yield _batch(0, 0, 0, decodes, context), parts.decode_s(model, tp, decodes, context)
    for new in PREFILLS:
        for prefills in (1, 2, 4):
            if prefills * new <= 8192:
                yield _batch(prefills, new, 0, 0, 0), parts.prefill_s(model, tp, prefills, new)
    for new in CHUNKS:
        for decodes in (4, 16, 64, 128):
            for context in (512, 2048, 8192):
                yield _batch(1, new, 0, decodes, context), parts.mixed_s(model, tp, new, decodes, context)


def _sim_batches(parts: _SimParts, key: tuple[str, int]) -> Iterator[tuple[dict[str, float], float | None]]:
    """The attention batches that were measured: all decodes, all prefills, and every seventh mixture to save time."""
    for index, ((new, past, decodes, context), seconds) in enumerate(sorted(parts.attention[key].items())):
        mixed = new > 0 and decodes > 0
        if not mixed or index % 7 == 0:
            yield _batch(float(new > 0), new, past if new else 0, decodes, context if decodes else 0), seconds


def training_rows(data: Path, device: str, kinds: Sequence[str], without: str = "") -> list[Measurement]:
    """Rows to fit to: whole iterations of ``kinds`` and single kernels, balanced, none of the model ``without``."""
    whole = [row for row in iterations(data, device) if batch_kind(row) in kinds]
    return balanced([row for row in (*whole, *kernels(data, device)) if row.group != without])


@lru_cache(maxsize=4)
def kernels(data: Path, device: str) -> tuple[Measurement, ...]:
    """The single kernels behind :func:`iterations`: they tell fixed times of different operators apart."""
    parts = _parts(data, device)
    found = []
    for key, model in parts.shapes.items():
        widths = {
            "attn_pre_proj": (model.qkv_width / key[1], model.hidden),
            "attn_post_proj": (model.hidden, model.q_heads * model.head_dim / key[1]),
            "mlp_up_proj": (2.0 * model.intermediate / key[1], model.hidden),
            "mlp_down_proj": (model.hidden, model.intermediate / key[1]),
        }
        for tokens in (1, 4, 16, 64, 128, 256, 512, 1024, 2048):
            for name, (n, k) in widths.items():
                seconds = parts.operator_s(key, name, tokens)
                if seconds is not None:
                    found.append(Measurement("gemm", seconds, tokens=tokens, n=n, k=k, group=model.name))
            seconds = parts.operator_s(key, "elementwise", tokens)
            if seconds is not None and not model.experts:
                found.append(Measurement("elementwise", seconds, model, key[1], tokens=tokens, group=model.name))
            seconds = parts.allreduce(model, key[1], tokens)
            if seconds:
                found.append(Measurement("allreduce", seconds, model, key[1], tokens=tokens, group=model.name))
        batches = _sim_batches(parts, key) if isinstance(parts, _SimParts) else _server_batches(parts, key)
        for index, (batch, seconds) in enumerate(batches):
            separate = isinstance(parts, _ServerParts) and batch["prefills"] and batch["decodes"]
            if seconds is not None and not separate and index % 5 == 0:
                found.append(Measurement("attention", seconds, model, key[1], group=model.name, **batch))
    return tuple(found)
