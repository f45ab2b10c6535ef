"""Measured request streams, each with the deployment that served it: what engine_validation.py replays.

Sources are public measurements beside the checkout (../shared/data/measured); nothing of them is copied. What a source
does not record (memory left for KV, batch limits) is the engine's documented default and marked "assumed".
"""

from __future__ import annotations

import csv
import gzip
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ooco_gym.errors import OocoError
from ooco_gym.roofline import HardwareSpec, build_cost, resolve_hardware, resolve_model
from ooco_gym.workload import Requests
from ooco_gym.workload.trace import find_data

Floats = npt.NDArray[np.float64]
Row = dict[str, str]
BELOW_TTFT_S, BELOW_MEAN_TTFT_S, BELOW_QUEUE_S, BELOW_TPOT_SPREAD = 1.0, 2.0, 0.1, 2.0


@dataclass(frozen=True, eq=False)
class Times:
    """Seconds of each request; ``tpot_s`` is nan for requests of one output token."""

    ttft_s: Floats
    tpot_s: Floats
    e2e_s: Floats


@dataclass(frozen=True)
class Deployment:
    """The cluster that stands for the measured one; ``serving`` is a key of engine_replay.SERVING."""

    model: str
    hardware: HardwareSpec
    serving: str = "chunked"
    cluster: Mapping[str, Any] = field(default_factory=dict)
    model_changes: Mapping[str, Any] = field(default_factory=dict)
    assumed: str = ""


@dataclass(frozen=True, eq=False)
class Run:
    """One measured run. ``engine`` names the version that has one host time, fitted on the run that ``fits``.

    With ``concurrency`` the load is a closed loop of as many clients and ``measured`` holds one row, the means.
    """

    source: str
    name: str
    engine: str
    deployment: Deployment
    requests: Requests
    measured: Times
    queue_s: Floats | None = None
    concurrency: int | None = None
    fits: bool = False
    workload: str = ""  # where one engine was measured under unlike ones, which are judged apart

    @property
    def below_saturation(self) -> bool:
        """As the measurement itself says, never the model: 9 of 10 requests queued for less than 0.1 s where queueing
        was recorded, or had their first token within 1 s; their p90 of TPOT within twice the median (a queue before
        the decode instance). Where only means were recorded: a mean TTFT within 2 s."""
        if self.concurrency is not None:
            return bool(self.measured.ttft_s[0] <= BELOW_MEAN_TTFT_S)
        waited_s, most_s = (self.measured.ttft_s, BELOW_TTFT_S)
        if self.queue_s is not None:
            waited_s, most_s = self.queue_s, BELOW_QUEUE_S
        tpot_s = self.measured.tpot_s
        spread = np.nanquantile(tpot_s, 0.9) / np.nanmedian(tpot_s)
        return bool(np.quantile(waited_s, 0.9) <= most_s and spread <= BELOW_TPOT_SPREAD)

    @property
    def peak_share(self) -> float:
        """Share of the datasheet's FLOP/s that a closed loop must have sustained by its own record (Little's law,
        weights alone); nan for open streams."""
        if self.concurrency is None:
            return float("nan")
        tokens = float(self.requests.prompt_tokens.mean() + self.requests.output_tokens.mean())
        model, device = resolve_model(self.deployment.model), self.deployment.hardware
        devices = self.deployment.cluster["tensor_parallel"]
        flops = 2.0 * (model.params - model.hidden * model.vocab) * tokens
        return float(flops * self.concurrency / self.measured.e2e_s[0] / (devices * device.peak_flops_per_s))

    @property
    def group(self) -> str:
        """Runs of one deployment at different loads; for a closed loop device, model and precision."""
        return " ".join(self.name.split()[:3]) if self.concurrency is not None else self.source


MOST_PEAK_SHARE = 0.7


def contradictory(runs: list[Run]) -> set[str]:
    """Groups whose records contradict themselves: some run would have sustained a share of the datasheet's FLOP/s that
    no device sustains while serving. What explains it (say, cached prompts) holds for the whole group."""
    return {run.group for run in runs if run.peak_share > MOST_PEAK_SHARE}


def read_rows(name: str, data_dir: str | None) -> list[Row]:
    """Rows of one measured table; raises OocoError where it is absent."""
    with gzip.open(_path(f"{name}.csv.gz", data_dir), "rt", newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _path(name: str, data_dir: str | None) -> Path:
    try:
        return find_data(Path("measured") / name, data_dir)
    except OocoError:
        return find_data(name, data_dir)  # --data-dir may name the folder itself


def column(rows: list[Row], name: str) -> Floats:
    return np.array([float(row[name] or "nan") for row in rows])


def stream(arrival_s: Floats, rows: list[Row], times: Times) -> tuple[Requests, Times, npt.NDArray[np.intp]]:
    """Requests in order of arrival from 0 on, their times in the same order, and that order."""
    order = np.argsort(arrival_s, kind="stable")
    lengths = [column(rows, name)[order].astype(np.int32) for name in ("prompt_tokens", "output_tokens")]
    requests = Requests(arrival_s[order] - arrival_s.min(), *lengths)
    return requests, Times(times.ttft_s[order], times.tpot_s[order], times.e2e_s[order]), order


def _grouped(rows: list[Row], *names: str) -> dict[tuple[str, ...], list[Row]]:
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return groups


def _times(rows: list[Row], tpot_s: Floats) -> Times:
    return Times(column(rows, "ttft_ms") / 1e3, tpot_s, column(rows, "e2e_ms") / 1e3)


def _recorded_tpot_s(rows: list[Row]) -> Floats:
    tpot_s = column(rows, "tpot_ms") / 1e3
    tpot_s[column(rows, "output_tokens") < 2] = np.nan
    return tpot_s


BENCH_DEVICES = {"RTX4090": "rtx-4090", "RTXPRO6000": "rtx-pro-6000"}
BENCH_MODELS = {"Llama-3.1-8B": "llama-3.1-8b", "Qwen3-30B-A3B-Instruct-2507": "qwen3-30b-a3b"}
FITTED_BENCH = ("RTXPRO6000", "Llama-3.1-8B")


def bench(data_dir: str | None) -> list[Run]:
    """vLLM 0.19 on workstation GPUs: 300 ShareGPT requests in 30 s, more than any of them can serve."""
    configs = json.loads(_path("llmservingsim_bench_engine_configs.json", data_dir).read_text(encoding="utf-8"))
    engines = {(entry["hardware"], entry["model"]): entry for entry in configs}
    runs = []
    for (device, model), rows in _grouped(
        read_rows("llmservingsim_bench_vllm_requests", data_dir), "hardware", "model"
    ).items():
        engine = engines[device, model]
        limits, kv = engine["engine_kwargs"], engine["kv_cache"] or {}
        ranks = limits["data_parallel_size"]
        cluster = {
            "unified": ranks,
            "tensor_parallel": limits["tensor_parallel_size"],
            "max_seqs": limits["max_num_seqs"],
            "chunk_tokens": limits["max_num_batched_tokens"],
            "block_tokens": kv.get("block_size", 16),
            "kv_blocks": kv.get("num_gpu_blocks"),
        }
        # Two ranks share the experts: each holds half of them and gets, of twice the tokens, half the rows.
        changes = {"experts": 128 // ranks} if limits["enable_expert_parallel"] else {}
        assumed = "" if kv else "KV: what 0.9 of the memory leaves (not reached)"
        if ranks > 1:
            assumed += "; two ranks in turn, half the experts each, no all-to-all and no waiting for each other"
        deployment = Deployment(
            BENCH_MODELS[model], resolve_hardware(BENCH_DEVICES[device]), "chunked", cluster, changes, assumed
        )
        # The recorded TTFT counts from the instant at which the engine queued the request.
        queued_s = column(rows, "arrival_s") + column(rows, "queued_minus_arrival_jitter_ms") / 1e3
        requests, times, order = stream(queued_s, rows, _times(rows, _recorded_tpot_s(rows)))
        queue_s = (column(rows, "queue_ms") / 1e3)[order]
        name = f"{device} {model.removesuffix('-Instruct-2507')}"
        run = Run("bench", name, "vLLM 0.19", deployment, requests, times, queue_s)
        workload = "expert parallel" if changes else "dense"
        runs.append(replace(run, fits=(device, model) == FITTED_BENCH, workload=workload))
    return runs


def _opt(data_dir: str | None, config: str, source: str, label: str, deployment: Deployment, fitted: str) -> list[Run]:
    rows = [row for row in read_rows("distserve_opt13b_requests", data_dir) if row["config"] == config]
    runs = []
    for (name,), part in _grouped(rows, "run").items():
        requests, times, _ = stream(column(part, "issue_s"), part, _times(part, _recorded_tpot_s(part)))
        runs.append(Run(source, name, label, deployment, requests, times, fits=name == fitted))
    return runs


#: KV blocks beside OPT-13B on one A100 80GB and on two, as recorded with DistServe's fitted latencies.
OPT_KV_BLOCKS, OPT_PAIR_KV_BLOCKS = 66144 // 16, 163008 // 16


def opt_vllm(data_dir: str | None) -> list[Run]:
    """vLLM of 2023 on one A100: whole prompts before any decode."""
    cluster = {"relaxed": 1, "strict": 1, "max_batch_tokens": 2560, "max_seqs": 256, "kv_blocks": OPT_KV_BLOCKS}
    deployment = Deployment(
        "opt-13b", resolve_hardware("a100"), "prefill-first", cluster, assumed="2560 tokens and 256 sequences a batch"
    )
    return _opt(data_dir, "tp1", "opt-vllm", "vLLM 2023", deployment, "vllm-100-1")


def opt_vllm_mixed(data_dir: str | None) -> list[Run]:
    """The same runs as if prompts shared iterations with decodes, for comparison; left out of the bars."""
    cluster = {"unified": 1, "chunk_tokens": 2560, "max_seqs": 256, "kv_blocks": OPT_KV_BLOCKS}
    deployment = Deployment("opt-13b", resolve_hardware("a100"), "chunked", cluster, assumed="mixed iterations")
    return _opt(data_dir, "tp1", "opt-vllm-mixed", "vLLM 2023, mixed", deployment, "vllm-100-1")


def pair(device: HardwareSpec, model: str) -> HardwareSpec:
    """Two devices under tensor parallelism as one of twice the peaks, for a cluster that has one degree for all.

    Times per token and per layer are those of two ranks with their all-reduce; GEMMs are shared out whole.
    """
    spec = resolve_model(model)
    doubled = replace(
        device, name=f"two {device.name}", peak_flops_per_s=2 * device.peak_flops_per_s,
        hbm_bytes_per_s=2 * device.hbm_bytes_per_s, hbm_bytes=2 * device.hbm_bytes,
    )  # fmt: skip
    of_ranks, of_pair = build_cost(spec, device, tp=2)[0], build_cost(spec, doubled)[0]
    calibrated = replace(
        device.calibrated,
        elementwise_bytes=device.calibrated.elementwise_bytes * float(of_pair["token_s"] / of_ranks["token_s"]),
        elementwise_us=device.calibrated.elementwise_us + 2 * device.calibrated.allreduce_us,
    )
    return replace(doubled, calibrated=calibrated)


def opt_distserve(data_dir: str | None) -> list[Run]:
    """DistServe's engine: prefill on two A100, decode on a third. Its other deployments are left out: decode in a
    pipeline cannot be said, and the runs released without a label do not say where they ran."""
    device = resolve_hardware("a100")
    cluster = {
        "relaxed": 1, "strict": 1, "max_batch_tokens": 2048, "max_seqs": 256, "link_latency_s": 0.0,
        "kv_blocks": [OPT_PAIR_KV_BLOCKS, OPT_KV_BLOCKS], "link_bytes_per_s": device.link_bytes_per_s,
        "relaxed_hardware": pair(device, "opt-13b"),
    }  # fmt: skip
    assumed = "NVLink between the devices, 2048 tokens a prefill batch"
    deployment = Deployment("opt-13b", device, "disaggregated", cluster, assumed=assumed)
    config = "prefill tp2pp1 + decode tp1pp1"
    return _opt(data_dir, config, "opt-distserve", "DistServe 2023", deployment, "distserve-c21d11-300-3")


SHAREGPT_ROWS = 252  # of a complete run; some files hold only the requests that finished
LLMD_STACKS = ("vllm-70b", "baseline-llm-d-70b", "vllm-70b-2replicas")


def llmd(data_dir: str | None) -> list[Run]:
    """Llama-3.1-70B on pods of two A100, one and two replicas, without KV kept from elsewhere."""
    device = resolve_hardware("a100")
    # Of 79.15 GiB per device, 0.95 less 1 GiB for activations, less the weights: 55,000 tokens, which is also where the
    # KV that the saturated streams held at once (from their recorded times) levels off.
    model = resolve_model("llama-3.1-70b")
    kv_bytes = 2 * (0.95 * 79.15 - 1.0) * 2**30 - model.weight_bytes
    blocks = int(kv_bytes / model.kv_bytes_per_token / 16)
    runs = []
    for (_, stack, workload, qps), rows in _grouped(
        read_rows("llmd_lmbench_requests", data_dir), "experiment", "stack", "workload", "target_qps"
    ).items():
        if stack not in LLMD_STACKS or (workload == "sharegpt" and len(rows) != SHAREGPT_ROWS):
            continue
        cluster = {
            "unified": int(rows[0]["replicas"]), "tensor_parallel": 2, "max_seqs": 256, "chunk_tokens": 2048,
            "kv_blocks": blocks,
        }  # fmt: skip
        assumed = f"{blocks} KV blocks by arithmetic, 2048 tokens and 256 sequences, replicas in turn"
        deployment = Deployment("llama-3.1-70b", device, "chunked", cluster, assumed=assumed)
        output = column(rows, "output_tokens")
        tpot_s = np.where(output > 1, column(rows, "generation_ms") / 1e3 / np.maximum(output - 1, 1), np.nan)
        requests, times, _ = stream(column(rows, "launch_s"), rows, _times(rows, tpot_s))
        kind = "short" if workload != "sharegpt" else "ShareGPT"
        fits = (stack, workload, qps) == ("vllm-70b", "sharegpt", "0.5")
        runs.append(
            Run(
                "llmd",
                f"{stack} {kind} {qps}/s",
                "vLLM in llm-d",
                deployment,
                requests,
                times,
                fits=fits,
                workload=kind,
            )
        )
    return runs


STREAMS = {
    "bench": bench,
    "opt-vllm": opt_vllm,
    "opt-vllm-mixed": opt_vllm_mixed,
    "opt-distserve": opt_distserve,
    "llmd": llmd,
}
