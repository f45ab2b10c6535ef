"""What this machine can do, measured, as the scenario that the gateway predicts with.

Telemetry and placement speak in predicted seconds, so the gateway needs a model and a device that fit what it really
drives. Two numbers describe a small model on a CPU well enough: what an iteration costs before any token is counted
(the engine's own work, measured as the time per output token of a lone request), and how many FLOP/s a prompt gets
(measured as the difference between a long and a short one). Objectives are multiples of what a lone request needs,
those of conf/slo/medium.yaml, unless the caller knows better.
"""

from __future__ import annotations

import json
import random
import statistics
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from examples.live_cpu.servers import MODEL, Engine, Server
from ooco_gym.roofline.cost import causal_pairs
from ooco_gym.roofline.model import ModelSpec, model_from_hf_config

TTFT_MULTIPLE, TPOT_MULTIPLE = 6.5, 4.0  # conf/slo/medium.yaml
SHORT, OUTPUT_TOKENS, REPEATS = 64, 128, 5
BLOCK_TOKENS = 128  # vLLM's KV block on a CPU


@dataclass(frozen=True)
class Machine:
    """Medians of a lone request, seconds."""

    ttft_s: float  # of a prompt of ``prompt_tokens``
    tpot_s: float
    long_s: float  # what a prompt of ``long_tokens`` takes longer than one of SHORT
    prompt_tokens: int
    long_tokens: int


def ask(server: Server, prompt_tokens: int, output_tokens: int, rng: random.Random) -> float:
    """Seconds that a whole answer of given lengths takes."""
    prompt = [rng.randrange(256) for _ in range(prompt_tokens)]
    body = {"model": MODEL, "prompt": prompt, "max_tokens": output_tokens, "ignore_eos": True, "temperature": 0.0}
    data = json.dumps(body).encode()
    request = urllib.request.Request(server.url + "/v1/completions", data, {"Content-Type": "application/json"})
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=120.0) as answer:
        answer.read()
    return time.perf_counter() - began


def measure(server: Server, prompt_tokens: int = 512, long_tokens: int = 2048) -> Machine:
    """Time lone requests on an idle server; ``prompt_tokens`` is the length that the TTFT objective refers to."""
    rng = random.Random()  # unseeded: vLLM keeps the KV of prompts that it has seen
    for tokens in (SHORT, long_tokens):  # the first ones warm the engine
        ask(server, tokens, 8, rng)

    def median(prompt: int, output: int) -> float:
        return statistics.median(ask(server, prompt, output, rng) for _ in range(REPEATS))

    short, usual, long = median(SHORT, 1), median(prompt_tokens, 1), median(long_tokens, 1)
    tpot_s = max((median(SHORT, OUTPUT_TOKENS) - short) / (OUTPUT_TOKENS - 1), 1e-4)
    return Machine(usual, tpot_s, max(long - short, 1e-4), prompt_tokens, long_tokens)


def scenario(machine: Machine, model: Path, engine: Engine) -> dict[str, Any]:
    """The ``scenario:`` block of cluster.yaml for servers of ``engine`` on this machine."""
    spec = model_from_hf_config(model / "config.json")
    flops_per_s = (_prefill_flops(spec, machine.long_tokens) - _prefill_flops(spec, SHORT)) / machine.long_s
    unit = {
        "gemm_flops": 1.0,
        "gemm_bytes": 1.0,
        "gemm_us": 0.0,
        "elementwise_bytes": 1000.0,
        "elementwise_us": 0.0,
        "prefill_attention_flops": 1.0,
        "attention_bytes": 1.0,
        "attention_us": 0.0,
        "decode_row_pad": 1.0,
    }
    return {
        "model": {"hf_config": str(model / "config.json")},
        "hardware": {
            "name": "this-machine",
            "peak_flops_per_s": flops_per_s,
            # A batch of this small model costs hardly more than one sequence, so B_sat is what the engine takes.
            "hbm_bytes_per_s": flops_per_s / _intensity(spec.hidden, engine.max_seqs),
            "hbm_bytes": 16e9,
            "link_bytes_per_s": 1e9,
            "calibrated": unit,
            "is_calibrated": False,
            "source": f"measured beside this run: {asdict(machine)}",
        },
        "cost": {"host_s": min(machine.tpot_s, 0.99)},
        "cluster": {"max_batch_tokens": engine.batch_tokens, "chunk_tokens": engine.batch_tokens,
                    "max_seqs": engine.max_seqs, "block_tokens": BLOCK_TOKENS},
        "slo": {"ttft_s": round(TTFT_MULTIPLE * machine.ttft_s, 4), "tpot_s": round(TPOT_MULTIPLE * machine.tpot_s, 5)},
    }  # fmt: skip


def _prefill_flops(spec: ModelSpec, tokens: int) -> float:
    """Arithmetic of a prompt as the cost model counts it, without the LM head, which works for the last token only."""
    linear = 2.0 * (spec.params - 2 * spec.hidden * spec.vocab) * tokens
    return linear + 4.0 * spec.layers * spec.q_heads * spec.head_dim * float(causal_pairs(float(tokens), 0.0))


def _intensity(hidden: int, batch: int) -> float:
    """FLOP per byte at which a square layer of this width is saturated by ``batch`` rows."""
    return batch / (1.0 + 2.0 * batch / hidden)
