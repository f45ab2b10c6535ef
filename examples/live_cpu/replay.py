"""Replays a slice of a workload through a gateway and counts the outcome by the definitions of the simulator.

Online requests arrive when the slice says and are streamed; offline ones are one job of the Batch API, submitted with
the stock `openai` client at the start, more than can be done in time. Prompts are random token ids and answers have the
length that the slice says (``ignore_eos``), so every policy gets exactly the same work.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import numpy as np
import openai

from examples.live_cpu.servers import MODEL, Server
from ooco_gym.cluster.outcome import FEASIBLE_VIOLATION_RATE
from ooco_gym.scenario import Scenario
from ooco_gym.workload import OfflineWork, OnlineSource

PATH: Final = "/v1/completions"
GRACE_S = 30.0  # for online requests that still run at the end of the slice


@dataclass(frozen=True)
class Piece:
    """One request of the slice."""

    arrival_s: float
    prompt: list[int]
    output_tokens: int

    def body(self, **more: Any) -> dict[str, Any]:
        return {"model": MODEL, "prompt": self.prompt, "max_tokens": self.output_tokens, "ignore_eos": True,
                "temperature": 0.0, **more}  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """What is replayed, the same for every policy."""

    seconds: float
    online: Sequence[Piece]
    offline: Sequence[Piece]


@dataclass
class Seen:
    """What the client saw of one online request; seconds on the client's clock, nan for what never came."""

    arrival_s: float
    output_tokens: int
    first_s: float = math.nan
    last_s: float = math.nan
    error: str = ""


def cut(
    source: OnlineSource,
    offline: OfflineWork,
    seconds: float,
    rate_per_s: float,
    scale: float,
    context: int,
    jobs: int,
    seed: int,
) -> Slice:
    """``seconds`` of ``source`` at ``rate_per_s``, every length times ``scale`` and cut to fit ``context``."""
    rng = np.random.default_rng(seed)
    found = source.with_rate_scale(source.rate_scale * rate_per_s / source.mean_rate_per_s).sample(seed, seconds)
    work = OfflineWork("jobs", offline.lengths, jobs=jobs).sample(seed, seconds)

    def piece(arrival_s: float, prompt: int, output: int) -> Piece:
        prompt_tokens = min(max(round(prompt * scale), 1), context // 2)
        output_tokens = min(max(round(output * scale), 2), context // 4)
        return Piece(arrival_s, rng.integers(0, 256, prompt_tokens).tolist(), output_tokens)

    online = [
        piece(*row) for row in zip(found.arrival_s.tolist(), found.prompt_tokens, found.output_tokens, strict=True)
    ]
    return Slice(
        seconds, online, [piece(0.0, *row) for row in zip(work.prompt_tokens, work.output_tokens, strict=True)]
    )


def replay(
    front: Server, work: Slice, scenario: Scenario, tick: Callable[[float], None]
) -> tuple[dict[str, Any], list[Seen]]:
    """One row of the outcome table, and what it was counted from; ``tick`` is told the seconds that have passed."""
    client = openai.OpenAI(base_url=front.url + "/v1", api_key="none", max_retries=2)
    lines = [{"custom_id": f"offline-{index}", "method": "POST", "url": PATH, "body": piece.body()}
             for index, piece in enumerate(work.offline)]  # fmt: skip
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    file = client.files.create(file=("offline.jsonl", content), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=PATH, completion_window="24h")
    before = _counts(front)
    seen = asyncio.run(_online(front.url, work, tick))
    after = _counts(front)
    with suppress(openai.ConflictError):  # it has ended
        client.batches.cancel(batch.id)
    return outcome(seen, {name: after[name] - before[name] for name in after}, work, scenario), seen


_COUNTERS = {
    "offline_prompt": ("ooco_prompt_tokens_total", "offline"),
    "offline_output": ("ooco_output_tokens_total", "offline"),
    "offline_finished": ("ooco_requests_total", 'class="offline",outcome="finished"'),
    "wasted_prompt": ("ooco_wasted_tokens_total", "prompt"),
    "wasted_output": ("ooco_wasted_tokens_total", "output"),
    "preemptions": ("ooco_preemptions_total", ""),
    "pulls": ("ooco_pulls_total", ""),
}


def _counts(front: Server) -> dict[str, float]:
    """The gateway's own counters."""
    return {key: front.counter(name, label) for key, (name, label) in _COUNTERS.items()}


async def _online(base: str, work: Slice, tick: Callable[[float], None]) -> list[Seen]:
    began = time.perf_counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        tasks = [asyncio.create_task(_one(session, base, piece, began)) for piece in work.online]
        try:
            while (passed := time.perf_counter() - began) < work.seconds:
                tick(passed)
                await asyncio.sleep(min(0.5, work.seconds - passed))
            await asyncio.wait(tasks, timeout=GRACE_S) if tasks else None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    return [task.result() for task in tasks if not task.cancelled()]


async def _one(session: aiohttp.ClientSession, base: str, piece: Piece, began: float) -> Seen:
    await asyncio.sleep(piece.arrival_s - (time.perf_counter() - began))
    seen = Seen(time.perf_counter() - began, piece.output_tokens)
    try:
        async with session.post(base + PATH, json=piece.body(stream=True)) as answer:
            if answer.status != 200:
                seen.error = f"HTTP {answer.status}"
                return seen
            async for line in answer.content:
                if line.startswith(b'data: {"error"'):
                    seen.error = line.decode()
                elif line.startswith(b"data: {"):
                    now = time.perf_counter() - began
                    seen.first_s = now if math.isnan(seen.first_s) else seen.first_s
                    seen.last_s = now
    except asyncio.CancelledError:
        seen.error = "unfinished"
    except aiohttp.ClientError as error:
        seen.error = str(error)
    return seen


def outcome(seen: Sequence[Seen], counts: Mapping[str, float], work: Slice, scenario: Scenario) -> dict[str, Any]:
    """A request violates by its TTFT, by its TPOT, or by failing (docs/specification.md, Metrics)."""
    slo = scenario.slo
    ttft = np.array([entry.first_s - entry.arrival_s for entry in seen])
    tpot = np.array([(entry.last_s - entry.first_s) / max(entry.output_tokens - 1, 1) for entry in seen])
    failed = np.array([bool(entry.error) for entry in seen], bool)
    late = failed | ~(ttft <= slo.ttft_s) | ~(tpot <= slo.tpot_s)
    violations = float(late.mean()) if len(seen) else math.nan
    useful_s = counts["offline_prompt"] * scenario.ideal_prompt_token_s
    useful_s += counts["offline_output"] * scenario.ideal_output_token_s
    wasted_s = counts["wasted_prompt"] * scenario.ideal_prompt_token_s
    wasted_s += counts["wasted_output"] * scenario.ideal_output_token_s
    row = {
        "violation_rate": violations,
        "ttft_p50_s": _quantile(ttft, 0.5),
        "ttft_p99_s": _quantile(ttft, 0.99),
        "tpot_p50_s": _quantile(tpot, 0.5),
        "tpot_p99_s": _quantile(tpot, 0.99),
        "offline_output_tokens_per_s": counts["offline_output"] / work.seconds,
        "offline_requests_per_s": counts["offline_finished"] / work.seconds,
        "offline_ideal_s_per_instance_s": useful_s / (work.seconds * scenario.instances),
        "wasted_fraction": wasted_s / max(useful_s + wasted_s, 1e-12),
        "online_requests": len(seen),
        "online_failed": int(failed.sum()),
        "preemptions": counts["preemptions"],
        "pulls": counts["pulls"],
        "offline_left": len(work.offline) - counts["offline_finished"],
        "feasible": violations <= FEASIBLE_VIOLATION_RATE,
    }
    return row


def _quantile(values: Any, q: float) -> float:
    known = values[~np.isnan(values)]
    return float(np.quantile(known, q)) if len(known) else math.nan
