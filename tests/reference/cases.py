"""Small random clusters for the differential and invariant tests: a case is data, and says how to build itself.

Request k of a case depends on (seed, k) alone, so that a case with fewer requests is a prefix of it and hypothesis
can shrink it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st

from ooco_gym.cluster.control import KNOB_NAMES, KNOBS, RULES, ooco_knobs
from ooco_gym.cluster.simulator import Simulator
from ooco_gym.roofline.hardware import CalibratedConstants, HardwareSpec
from ooco_gym.roofline.model import ModelSpec
from ooco_gym.scenario import Scenario
from ooco_gym.specs import ClusterSpec, CostSpec, FaultSpec, Outage, SloClass, SloSpec
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
# Another device, for clusters of mixed ones: less arithmetic, more bandwidth, twice the saturation batch.
OTHER_HARDWARE = replace(HARDWARE, name="other toy", peak_flops_per_s=1e11, hbm_bytes_per_s=3e9)
DEVICES = (HARDWARE, OTHER_HARDWARE)
FORMS = ("calibrated", "ooco-xllm")


def examples(in_ci: int, here: int) -> int:
    """How many random cases a test draws: CI looks long, the inner loop stays under two minutes."""
    return in_ci if os.environ.get("CI") else here


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
    unified: int = 0
    kv_blocks: tuple[int, ...] = (64, 64)  # of a relaxed, a strict and a unified instance
    devices: tuple[int, ...] = ()  # of each instance, an index of DEVICES; none: all the first
    block_tokens: int = 4
    max_context_tokens: int = MODEL.max_context_tokens
    max_batch_tokens: int = 256
    max_seqs: int = 4
    chunk_tokens: int = 64
    saturation_batch: float = 4.0  # of the first device
    true_form: str = "calibrated"
    scheduler_form: str = "calibrated"
    ttft_s: float = 0.3
    tpot_s: float = 0.03
    classes: tuple[tuple[float, float, float], ...] = ()  # share, TTFT and TPOT SLO; none: one class of the above
    link_latency_s: float = 0.002
    link_bytes_per_s: float = 1e8
    host_blocks: int = 64
    host_bytes_per_s: float = 1e9
    pull_interval_s: float = 0.1
    outages: tuple[tuple[int, float, float], ...] = ()  # instance, from when, for how long
    cancel_share: float = 0.0
    cancel_after_s: float = 0.5
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
            model=replace(MODEL, max_context_tokens=self.max_context_tokens),
            hardware=HARDWARE,
            cluster=self._cluster(),
            slo=self._slo(),
            cost=CostSpec(self.true_form, self.scheduler_form, noise_sigma=0.0, bias_sigma=0.0),
            online=Given(online),
            offline=Given(jobs),
            episode_s=self.horizon_s - self.warmup_s,
            warmup_s=self.warmup_s,
            faults=FaultSpec(
                outages=tuple(Outage(*outage) for outage in self.outages),
                cancel_share=self.cancel_share,
                cancel_after_s=self.cancel_after_s,
            ),
        )

    @property
    def _pools(self) -> tuple[int, int, int]:
        return self.relaxed, self.strict, self.unified

    def _device_of_each(self) -> list[int]:
        return list(self.devices) or [0] * sum(self._pools)

    def _cluster(self) -> ClusterSpec:
        kv_blocks = [
            self.kv_blocks[min(role, len(self.kv_blocks) - 1)] for role, n in enumerate(self._pools) for _ in range(n)
        ]
        devices = [DEVICES[device] for device in self._device_of_each()]
        strict_from, unified_from = self.relaxed, self.relaxed + self.strict
        return ClusterSpec(
            relaxed=self.relaxed,
            strict=self.strict,
            unified=self.unified,
            max_batch_tokens=self.max_batch_tokens,
            max_seqs=self.max_seqs,
            chunk_tokens=self.chunk_tokens,
            block_tokens=self.block_tokens,
            kv_blocks=tuple(kv_blocks),
            link_bytes_per_s=self.link_bytes_per_s,
            link_latency_s=self.link_latency_s,
            host_kv_bytes=self.host_blocks * self.block_tokens * MODEL.kv_bytes_per_token,
            host_bytes_per_s=self.host_bytes_per_s,
            pull_interval_s=self.pull_interval_s,
            relaxed_hardware=devices[:strict_from],
            strict_hardware=devices[strict_from:unified_from],
            unified_hardware=devices[unified_from:],
        )

    def _slo(self) -> SloSpec:
        if not self.classes:
            return SloSpec(self.ttft_s, self.tpot_s)
        classes = tuple(SloClass(f"class {k}", *entry) for k, entry in enumerate(self.classes))
        return SloSpec(min(entry.ttft_s for entry in classes), min(entry.tpot_s for entry in classes), classes)

    def simulator(self) -> Simulator:
        simulator = Simulator(self.scenario(), dict(zip(RULES, self.rules, strict=True)))
        saturation = [self.saturation_batch * (1 + device) for device in self._device_of_each()]
        simulator.cluster.instances["saturation_batch"][:] = saturation
        return simulator

    def ticks(self) -> list[tuple[float, np.ndarray | None]]:
        """(seconds, knob vector or None) of every stop of the episode, in order; the last is the horizon."""
        marks = [(s, np.array(vector)) for s, vector in self.knobs] + [(s, None) for s in self.stops_s]
        marks = sorted((mark for mark in marks if mark[0] < self.horizon_s), key=lambda mark: mark[0])
        return [*marks, (self.horizon_s, None)]


#: Values near which a knob decides something in clusters this small.
TELLING = {
    "prefill_chunk": (128.0, 130.5, 200.0, 400.0),
    "strict_prefill": (0.5, 1.0, 20.0, 128.0, 200.7, 512.0),
    "pushback": (0.5, 0.6, 0.8),
    "strict_share": (-0.5, -0.34, -0.2, 0.2, 0.34, 0.5),
}


def _knob(index: int) -> st.SearchStrategy[float]:
    knob = KNOBS[index]
    drawn = st.sampled_from([knob.low, knob.high, knob.ooco]) | st.floats(knob.low, knob.high).map(
        lambda value: float(np.clip(round(value, 3), knob.low, knob.high))
    )
    return drawn | st.sampled_from(TELLING[knob.name]) if knob.name in TELLING else drawn


def knob_vectors() -> st.SearchStrategy[tuple[float, ...]]:
    usual = tuple(ooco_knobs().tolist())
    return st.just(usual) | st.tuples(*(_knob(index) for index in range(len(KNOBS))))


def _roles_stay(vector: tuple[float, ...]) -> tuple[float, ...]:
    share = KNOB_NAMES.index("strict_share")
    return (*vector[:share], 0.0, *vector[share + 1 :])


def _chunking() -> st.SearchStrategy[tuple[float, ...]]:
    """Small pieces of prompts on either pool, and offline work enough to fill the caches."""
    telling = {name: st.sampled_from(TELLING[name]) for name in ("prefill_chunk", "strict_prefill")}
    telling |= {"gate_batch": st.sampled_from([2.0, 8.0]), "pull_kv": st.sampled_from([0.9, 1.0])}
    usual = zip(KNOB_NAMES, ooco_knobs().tolist(), strict=True)
    return st.tuples(*(telling.get(name, st.just(value)) for name, value in usual))


def _outages(instances: int, horizon_s: float) -> st.SearchStrategy[tuple[tuple[int, float, float], ...]]:
    """On the grids of the arrivals, so that they tie with them and with one another."""
    steps = st.integers(0, max(int(horizon_s / 0.05) - 1, 0)).map(lambda n: n * 0.05)
    lasting = st.sampled_from([0.05, 0.1, 0.5, 2.0])
    return st.lists(st.tuples(st.integers(0, instances - 1), steps, lasting), min_size=1, max_size=6).map(tuple)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Cases small enough for plain Python and tight enough that every rule has something to do.

    About half of them know no failures, cancellations or role changes.
    """
    pick = st.sampled_from
    relaxed, strict = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    unified = draw(pick([0, 0, 0, 1, 2]))
    if draw(pick([False, False, False, True])):
        relaxed, strict, unified = 0, 0, max(unified, 1)
    instances = relaxed + strict + unified
    disrupted = draw(st.booleans())
    failing, cancelling, changing = (disrupted and draw(pick([True, True, False])) for _ in range(3))
    block = draw(st.integers(1, 16))
    chunking = draw(st.booleans())
    prompt_max = draw(pick([300, 1500] if chunking else [20, 100, 300]))
    output_max = draw(pick([4, 30, 60, 100, 200]))
    # room for about 1 to 6 (2) of the longest requests of each pool; the smallest one rejects a few
    longest = (prompt_max + output_max) // block + 1
    blocks = st.integers(longest * 7, longest * (20 if chunking else 60)).map(lambda tenths: max(tenths // 10, 2))
    # a second change of roles comes 10 s after the first
    long = changing and draw(st.booleans())
    horizon_s = draw(pick([12.0, 25.0])) if long else draw(pick([1.0, 3.0, 6.0]))
    times = st.floats(0.0, horizon_s) | st.integers(0, 60).map(lambda n: n / 20)
    seconds = st.tuples(pick([0.2, 1.0, 3.0]), pick([0.05, 0.3, 1.0]), pick([0.01, 0.02, 0.04, 0.1]))
    vectors = knob_vectors() if changing else knob_vectors().map(_roles_stay)
    return Case(
        relaxed=relaxed,
        strict=strict,
        unified=unified,
        kv_blocks=(draw(blocks), draw(blocks), draw(blocks)),
        devices=tuple(draw(st.just([]) | st.lists(st.integers(0, 1), min_size=instances, max_size=instances))),
        block_tokens=block,
        max_context_tokens=draw(pick([MODEL.max_context_tokens, MODEL.max_context_tokens, 200])),
        max_batch_tokens=draw(pick([32, 128, 512, 4096])),
        max_seqs=draw(pick([1, 2, 4, 32])),
        chunk_tokens=draw(pick([16, 64, 130, 256])),
        saturation_batch=draw(pick([1.0, 2.5, 4.0, 12.0])),
        true_form=draw(pick(FORMS)),
        scheduler_form=draw(pick(FORMS)),
        ttft_s=draw(pick([0.05, 0.3, 1.0])),
        tpot_s=draw(pick([0.01, 0.02, 0.04, 0.1])),
        classes=tuple(draw(st.just([]) | st.lists(seconds, min_size=1, max_size=3))),
        link_latency_s=draw(pick([0.0, 0.002, 0.05])),
        link_bytes_per_s=draw(pick([1e8, 1e9, 1e10])),
        host_blocks=draw(pick([0, longest // 2, longest * 4])),
        host_bytes_per_s=draw(pick([1e7, 1e8, 1e9])),
        pull_interval_s=draw(pick([0.01, 0.1, 0.5])),
        outages=draw(_outages(instances, horizon_s)) if failing else (),
        cancel_share=0.3 if cancelling else 0.0,
        cancel_after_s=draw(pick([0.01, 0.1, 0.5])) if cancelling else 0.5,
        rules=tuple(draw(pick(choices)) for choices in RULES.values()),
        knobs=(((0.0, draw(_chunking())),) if chunking else ())
        + tuple(draw(st.lists(st.tuples(times, vectors), max_size=1 if chunking else 4))),
        online=draw(st.integers(0, 30 if long else 100)),
        online_per_s=draw(pick([3.0, 10.0] if long else [3.0, 10.0, 40.0])),
        offline_kind=draw(pick(["poisson", "jobs", "none"] if long else ["endless", "poisson", "jobs", "none"])),
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
