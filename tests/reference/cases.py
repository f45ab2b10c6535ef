"""Small random clusters for the differential and invariant tests: a case is data, and says how to build itself.

Request k of a case depends on (seed, k) alone, so that a case with fewer requests is a prefix of it and hypothesis
can shrink it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from ooco_gym.cluster.control import KNOBS, RULES, ooco_knobs
from ooco_gym.cluster.simulator import Simulator
from ooco_gym.roofline.hardware import CalibratedConstants, HardwareSpec
from ooco_gym.roofline.model import ModelSpec
from ooco_gym.scenario import Scenario
from ooco_gym.specs import ClusterSpec, CostSpec, SloSpec
from ooco_gym.workload import OfflineJobs, Requests

# 8 layers, 32 KiB of KV per token on a device with 2 GB/s: a decode iteration costs about 10 ms plus 16 us per token
# of context, a prefill about 0.1 ms per token plus attention, so that a dozen sequences meet a TPOT of 20 to 40 ms.
MODEL = ModelSpec("tiny", hidden=128, layers=8, q_heads=8, kv_heads=8, head_dim=128, intermediate=256, vocab=512)
CONSTANTS = CalibratedConstants(
    gemm_flops=0.7, gemm_bytes=0.7, gemm_us=20.0, elementwise_bytes=0.8, elementwise_us=10.0,
    prefill_attention_flops=0.5, attention_bytes=0.8, attention_us=10.0,
)  # fmt: skip
HARDWARE = HardwareSpec(
    "toy", peak_flops_per_s=2e11, hbm_bytes_per_s=2e9, hbm_bytes=1e9, link_bytes_per_s=1e9, calibrated=CONSTANTS
)
FORMS = ("calibrated", "ooco-xllm")


class Given:
    """A workload source that gives the same rows at every seed."""

    mean_prompt_tokens, mean_output_tokens = 100.0, 10.0

    def __init__(self, sample: Requests | OfflineJobs) -> None:
        self._sample = sample

    def sample(self, seed: int, duration_s: float) -> Requests | OfflineJobs:
        return self._sample


@dataclass(frozen=True)
class Case:
    """One small cluster with its work. Lengths are log-uniform between 1 and ``*_max`` tokens."""

    relaxed: int = 1
    strict: int = 1
    kv_blocks: tuple[int, int] = (64, 64)  # of a relaxed and of a strict instance
    block_tokens: int = 4
    max_batch_tokens: int = 256
    max_seqs: int = 4
    saturation_batch: float = 4.0
    true_form: str = "calibrated"
    scheduler_form: str = "calibrated"
    ttft_s: float = 0.3
    tpot_s: float = 0.03
    link_latency_s: float = 0.002
    link_bytes_per_s: float = 1e8
    pull_interval_s: float = 0.1
    rules: tuple[str, ...] = tuple(choices[0] for choices in RULES.values())
    knobs: tuple[tuple[float, tuple[float, ...]], ...] = ()  # (seconds, knob vector) of control ticks
    online: int = 10
    online_per_s: float = 10.0
    offline_kind: str = "none"
    offline: int = 0  # jobs, or rows of the endless table
    offline_per_s: float = 10.0
    prompt_max: int = 100
    output_max: int = 30
    tie_s: float = 0.0  # arrivals are rounded to this grid, which makes ties; 0: not rounded
    seed: int = 0
    horizon_s: float = 3.0
    warmup_s: float = 0.0
    stops_s: tuple[float, ...] = ()  # where the two simulators are compared on the way

    def _lengths(self, stream: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        u = np.array([np.random.default_rng((self.seed, stream, k)).random(2) for k in range(rows)]).reshape(-1, 2)
        return (self.prompt_max ** u[:, 0]).astype(np.int32), (self.output_max ** u[:, 1]).astype(np.int32)

    def _arrivals(self, stream: int, rows: int, per_s: float) -> np.ndarray:
        gaps = [np.random.default_rng((self.seed, stream, k)).exponential(1 / per_s) for k in range(rows)]
        arrival_s = np.cumsum(gaps) if rows else np.zeros(0)
        return np.floor(arrival_s / self.tie_s) * self.tie_s if self.tie_s else arrival_s

    def scenario(self) -> Scenario:
        online = Requests(self._arrivals(0, self.online, self.online_per_s), *self._lengths(1, self.online))
        rows = 0 if self.offline_kind == "none" else self.offline
        arrival_s = np.zeros(0 if self.offline_kind == "endless" else rows)
        if self.offline_kind == "poisson":
            arrival_s = self._arrivals(2, rows, self.offline_per_s)
        jobs = OfflineJobs(self.offline_kind == "endless", arrival_s, *self._lengths(3, rows))
        return Scenario(
            model=MODEL,
            hardware=HARDWARE,
            cluster=ClusterSpec(
                relaxed=self.relaxed,
                strict=self.strict,
                max_batch_tokens=self.max_batch_tokens,
                max_seqs=self.max_seqs,
                block_tokens=self.block_tokens,
                link_bytes_per_s=self.link_bytes_per_s,
                link_latency_s=self.link_latency_s,
                pull_interval_s=self.pull_interval_s,
            ),
            slo=SloSpec(self.ttft_s, self.tpot_s),
            cost=CostSpec(self.true_form, self.scheduler_form, noise_sigma=0.0, bias_sigma=0.0),
            online=Given(online),
            offline=Given(jobs),
            episode_s=self.horizon_s - self.warmup_s,
            warmup_s=self.warmup_s,
        )

    def simulator(self) -> Simulator:
        simulator = Simulator(self.scenario(), dict(zip(RULES, self.rules, strict=True)))
        kv_blocks = [self.kv_blocks[0]] * self.relaxed + [self.kv_blocks[1]] * self.strict
        simulator.cluster.instances["kv_blocks"][:] = kv_blocks
        simulator.cluster.instances["saturation_batch"][:] = self.saturation_batch
        return simulator

    def ticks(self) -> list[tuple[float, np.ndarray | None]]:
        """(seconds, knob vector or None) of every stop of the episode, in order; the last is the horizon."""
        marks = [(s, np.array(vector)) for s, vector in self.knobs] + [(s, None) for s in self.stops_s]
        marks = sorted((mark for mark in marks if mark[0] < self.horizon_s), key=lambda mark: mark[0])
        return [*marks, (self.horizon_s, None)]


def _knob(index: int) -> st.SearchStrategy[float]:
    knob = KNOBS[index]
    return st.sampled_from([knob.low, knob.high, knob.ooco]) | st.floats(knob.low, knob.high).map(
        lambda value: float(np.clip(round(value, 3), knob.low, knob.high))
    )


def knob_vectors() -> st.SearchStrategy[tuple[float, ...]]:
    usual = tuple(ooco_knobs().tolist())
    return st.just(usual) | st.tuples(*(_knob(index) for index in range(len(KNOBS))))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Cases small enough for plain Python and tight enough that every rule has something to do."""
    pick = st.sampled_from
    relaxed, strict = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    block = draw(st.integers(1, 16))
    prompt_max, output_max = draw(pick([20, 100, 300])), draw(pick([4, 30, 60, 100, 200]))
    # room for about 1 to 6 of the longest requests of each pool; the smaller one rejects a few
    longest = (prompt_max + output_max) // block + 1
    blocks = st.integers(longest * 7, longest * 60).map(lambda tenths: max(tenths // 10, 2))
    horizon_s = draw(pick([1.0, 3.0, 6.0]))
    times = st.floats(0.0, horizon_s) | st.integers(0, 60).map(lambda n: n / 20)
    return Case(
        relaxed=relaxed,
        strict=strict,
        kv_blocks=(draw(blocks), draw(blocks)),
        block_tokens=block,
        max_batch_tokens=draw(pick([32, 128, 512, 4096])),
        max_seqs=draw(pick([1, 2, 4, 32])),
        saturation_batch=draw(pick([1.0, 2.5, 4.0, 12.0])),
        true_form=draw(pick(FORMS)),
        scheduler_form=draw(pick(FORMS)),
        ttft_s=draw(pick([0.05, 0.3, 1.0])),
        tpot_s=draw(pick([0.01, 0.02, 0.04, 0.1])),
        link_latency_s=draw(pick([0.0, 0.002, 0.05])),
        link_bytes_per_s=draw(pick([1e8, 1e9, 1e10])),
        pull_interval_s=draw(pick([0.01, 0.1, 0.5])),
        rules=tuple(draw(pick(choices)) for choices in RULES.values()),
        knobs=tuple(draw(st.lists(st.tuples(times, knob_vectors()), max_size=4))),
        online=draw(st.integers(0, 100)),
        online_per_s=draw(pick([3.0, 10.0, 40.0])),
        offline_kind=draw(pick(["endless", "poisson", "jobs", "none"])),
        offline=draw(st.integers(1, 60)),
        offline_per_s=draw(pick([3.0, 10.0, 40.0])),
        prompt_max=prompt_max,
        output_max=output_max,
        tie_s=draw(pick([0.0, 0.05, 0.5])),
        seed=draw(st.integers(0, 2**16)),
        horizon_s=horizon_s,
        warmup_s=draw(pick([0.0, 0.0, 0.5])),
        stops_s=tuple(draw(st.lists(times, max_size=3))),
    )
