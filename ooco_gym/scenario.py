"""A scenario: the whole resolved description of one simulated world, and what follows from it.

Built from preset names or mappings (Hydra's resolved config has the same shape), validated on entry.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from ooco_gym import presets
from ooco_gym.errors import OocoError
from ooco_gym.roofline import (
    FORMS,
    HardwareSpec,
    ModelSpec,
    build_cost,
    decode_s,
    iteration_s,
    prefill_s,
    resolve_hardware,
    resolve_model,
    saturation_batch,
)
from ooco_gym.roofline.cost import causal_pairs
from ooco_gym.workload.build import offline_work, online_source
from ooco_gym.workload.offline import OfflineWork
from ooco_gym.workload.sources import OnlineSource

MOST_REQUESTS = 20e6  # in one episode; a day of a busy fleet is a tenth of it

#: The default preset of every group; ``conf/config.yaml`` names the same ones.
DEFAULT_PRESETS = {
    "model": "qwen2.5-7b",
    "hardware": "a100",
    "cluster": "2x2",
    "slo": "medium",
    "cost": "calibrated",
    "workload": "azure-conv",
    "offline": "sharegpt-8k",
}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class ClusterSpec:
    """Instances, their limits and the links between them."""

    relaxed: int = 2
    strict: int = 2
    tensor_parallel: int = 1
    max_batch_tokens: int = 8192
    max_seqs: int = 256
    block_tokens: int = 16
    memory_utilization: float = 0.9
    link_bytes_per_s: float = 25e9
    link_latency_s: float = 0.002
    pull_interval_s: float = 0.1

    def __post_init__(self) -> None:
        for name in ("relaxed", "strict", "tensor_parallel", "max_batch_tokens", "max_seqs", "block_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise OocoError(f"cluster.{name} is {value!r}, it must be an integer of at least 1")
        if not (_is_number(self.memory_utilization) and 0.0 < self.memory_utilization <= 1.0):
            raise OocoError(
                f"cluster.memory_utilization is {self.memory_utilization!r}, accepted is above 0, at most 1"
            )
        for name in ("link_bytes_per_s", "pull_interval_s"):
            if not (_is_number(getattr(self, name)) and getattr(self, name) > 0):
                raise OocoError(f"cluster.{name} is {getattr(self, name)!r}, it must be a positive number")
        if not (_is_number(self.link_latency_s) and self.link_latency_s >= 0):
            raise OocoError(f"cluster.link_latency_s is {self.link_latency_s!r}, it must be at least 0")


@dataclass(frozen=True)
class SloSpec:
    """Online service level objectives, seconds: time to first token, time per output token."""

    ttft_s: float = 0.5
    tpot_s: float = 0.05

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            value = getattr(self, name)
            if not (_is_number(value) and value > 0):
                raise OocoError(f"slo.{name} is {value!r}, it must be a positive number of seconds")


@dataclass(frozen=True)
class CostSpec:
    """The two clocks: what times the cluster and what schedulers predict with, and how the first one errs.

    ``noise_sigma`` is the lognormal error of each batch, ``bias_sigma`` that of a whole episode; ``host_s`` is the
    serving engine's own time per iteration.
    """

    true_form: str = "calibrated"
    scheduler_form: str = "calibrated"
    host_s: float = 0.001
    noise_sigma: float = 0.05
    bias_sigma: float = 0.03

    def __post_init__(self) -> None:
        for name in ("host_s", "noise_sigma", "bias_sigma"):
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value < 1):
                raise OocoError(f"cost.{name} is {value!r}, accepted is at least 0 and below 1")
        for name in ("true_form", "scheduler_form"):
            if getattr(self, name) not in FORMS:
                raise OocoError(f"cost.{name} is {getattr(self, name)!r}, known are {', '.join(FORMS)}")


Spec = TypeVar("Spec", ClusterSpec, SloSpec, CostSpec)


def _spec(kind: type[Spec], values: Mapping[str, Any], group: str) -> Spec:
    known = [entry.name for entry in fields(kind)]
    unknown = sorted(set(values) - set(known) - {"description", "name"})
    if unknown:
        raise OocoError(f"{group}: unknown key '{unknown[0]}', accepted are {', '.join(known)}")
    return kind(**{key: value for key, value in values.items() if key in known})


@dataclass(frozen=True)
class Scenario:
    """One world: deployment, objectives, clocks and workload.

    ``episode_s`` counts from the end of ``warmup_s``; both in simulated seconds.
    """

    model: ModelSpec
    hardware: HardwareSpec
    cluster: ClusterSpec
    slo: SloSpec
    cost: CostSpec
    online: OnlineSource
    offline: OfflineWork
    episode_s: float = 600.0
    warmup_s: float = 60.0
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not (_is_number(self.episode_s) and self.episode_s > 0):
            raise OocoError(f"episode_s is {self.episode_s!r}, it must be a positive number of seconds")
        if not (_is_number(self.warmup_s) and self.warmup_s >= 0):
            raise OocoError(f"warmup_s is {self.warmup_s!r}, it must be at least 0 seconds")
        if self.kv_blocks < 1:
            need = self.model.weight_bytes / self.cluster.tensor_parallel / 1e9
            have = self.hardware.hbm_bytes * self.cluster.memory_utilization / 1e9
            raise OocoError(
                f"model '{self.model.name}' does not fit '{self.hardware.name}': {need:.0f} GB of weights per device "
                f"at tensor_parallel={self.cluster.tensor_parallel}, {have:.0f} GB usable; "
                "raise cluster.tensor_parallel"
            )

    @property
    def horizon_s(self) -> float:
        return self.warmup_s + self.episode_s

    @property
    def instances(self) -> int:
        return self.cluster.relaxed + self.cluster.strict

    @cached_property
    def kv_blocks(self) -> int:
        """KV blocks of one instance: usable memory of its devices less the weights."""
        cluster, devices = self.cluster, self.cluster.tensor_parallel
        kv_bytes = devices * self.hardware.hbm_bytes * cluster.memory_utilization - self.model.weight_bytes
        replicas = max(devices / self.model.kv_heads, 1.0)  # KV heads are copied where there are more ranks than heads
        return int(kv_bytes // (self.model.kv_bytes_per_token * replicas * cluster.block_tokens))

    @cached_property
    def true_cost(self) -> np.ndarray:
        return self._cost(self.cost.true_form)

    @cached_property
    def scheduler_cost(self) -> np.ndarray:
        return self._cost(self.cost.scheduler_form)

    def _cost(self, form: str) -> np.ndarray:
        return build_cost(self.model, self.hardware, form, self.cluster.tensor_parallel, self.cost.host_s)

    @cached_property
    def saturation_batch(self) -> int:
        """B_sat as the scheduler computes it."""
        return saturation_batch(self.model, self.hardware, self.cost.scheduler_form, self.cluster.tensor_parallel)

    @cached_property
    def decode_floor_s(self) -> float:
        """Predicted decode iteration of one online request of mean length."""
        context = self.online.mean_prompt_tokens + 0.5 * self.online.mean_output_tokens
        return float(decode_s(self.scheduler_cost[0], 1.0, context))

    @cached_property
    def mean_prefill_s(self) -> float:
        """Predicted prefill of one online request of mean length."""
        return float(prefill_s(self.scheduler_cost[0], float(round(self.online.mean_prompt_tokens))))

    @cached_property
    def ideal_prompt_token_s(self) -> float:
        """Ideal seconds of an offline prompt token: its share of a full batch of mean-length offline prompts."""
        length = max(self.offline.mean_prompt_tokens, 1.0)
        count = max(self.cluster.max_batch_tokens / length, 1.0)
        tokens = count * length
        cost = self.scheduler_cost[0]
        pairs = count * causal_pairs(length, 0.0)
        batch_s = iteration_s(cost, tokens, pairs, tokens * length, tokens, count, 0.0, 0.0, 0.0)
        return float(batch_s) / tokens

    @cached_property
    def ideal_output_token_s(self) -> float:
        """Ideal seconds of an offline output token: marginal decode cost of one more mean sequence at B_sat."""
        context = self.offline.mean_prompt_tokens + 0.5 * self.offline.mean_output_tokens
        batch = float(self.saturation_batch)
        cost = self.scheduler_cost[0]
        return float(decode_s(cost, batch + 1.0, (batch + 1.0) * context) - decode_s(cost, batch, batch * context))

    def with_rate_scale(self, rate_scale: float) -> Scenario:
        """The same scenario with its online rate multiplied."""
        settings = {**self.settings, "rate_scale": rate_scale}
        return replace(self, online=self.online.with_rate_scale(rate_scale), settings=settings)

    def without_offline(self) -> Scenario:
        return replace(self, offline=replace(self.offline, kind="none"))


def _group(config: Mapping[str, Any], group: str) -> Mapping[str, Any]:
    """One group of the config as a mapping: given as such, as a preset name, or by default."""
    value = config.get(group, DEFAULT_PRESETS[group])
    if isinstance(value, str):
        return presets.load(group, value)
    if isinstance(value, Mapping):
        return value
    raise OocoError(f"{group} is {value!r}: a preset name ({', '.join(presets.names(group))}) or a mapping is accepted")


def build_scenario(config: Mapping[str, Any] | None = None) -> Scenario:
    """Resolve a scenario from groups ``model, hardware, cluster, slo, cost, workload, offline`` and the plain keys
    ``episode_s``, ``warmup_s``, ``data_dir``; everything has a default. Other keys are refused.

    A group is a preset name or a mapping of its fields. Raises OocoError in one sentence on anything unusable.
    """
    if config is not None and not isinstance(config, Mapping):
        raise OocoError(f"scenario is {config!r}, a mapping such as {{'hardware': 'h100'}} is needed")
    config = dict(config or {})
    plain = ("episode_s", "warmup_s", "data_dir")
    unknown = sorted(set(config) - set(DEFAULT_PRESETS) - set(plain))
    if unknown:
        raise OocoError(f"unknown scenario key '{unknown[0]}': known are {', '.join([*DEFAULT_PRESETS, *plain])}")
    data_dir = config.get("data_dir")
    model, hardware = config.get("model", DEFAULT_PRESETS["model"]), config.get("hardware", DEFAULT_PRESETS["hardware"])
    settings = {group: config.get(group, preset) for group, preset in DEFAULT_PRESETS.items()}
    scenario = Scenario(
        model=resolve_model(model),
        hardware=resolve_hardware(hardware),
        cluster=_spec(ClusterSpec, _group(config, "cluster"), "cluster"),
        slo=SloSpec(),
        cost=_spec(CostSpec, _group(config, "cost"), "cost"),
        online=online_source(_group(config, "workload"), data_dir),
        offline=offline_work(_group(config, "offline"), data_dir),
        episode_s=config.get("episode_s", 600.0),
        warmup_s=config.get("warmup_s", 60.0),
        settings=settings,
    )
    _check_size(scenario)
    return replace(scenario, slo=_slo(_group(config, "slo"), scenario))


def _check_size(scenario: Scenario) -> None:
    """Refuse an episode that would not fit into memory."""
    offline, horizon_s = scenario.offline, scenario.horizon_s
    rate_per_s = offline.rate_per_s if offline.kind == "poisson" else None
    expected = {
        "online": scenario.online.mean_rate_per_s * horizon_s,
        "offline": (rate_per_s or 0.0) * horizon_s + (offline.jobs or 0 if offline.kind == "jobs" else 0),
    }
    for which, requests in expected.items():
        if requests > MOST_REQUESTS:
            raise OocoError(
                f"{requests:.3g} {which} requests in an episode of {horizon_s:g} s: at most {MOST_REQUESTS:.0e} are "
                "accepted; lower the rate or the length of the episode"
            )


def _slo(values: Mapping[str, Any], scenario: Scenario) -> SloSpec:
    """Objectives in seconds, or in multiples of what the deployment needs for the mean request alone."""
    forms = {
        "ttft_s": ("ttft_prefills", scenario.mean_prefill_s),
        "tpot_s": ("tpot_floors", scenario.decode_floor_s),
    }
    known = [*forms, *(multiple for multiple, _ in forms.values())]
    unknown = sorted(set(values) - set(known) - {"description", "name"})
    if unknown:
        raise OocoError(f"slo: unknown key '{unknown[0]}', accepted are {', '.join(known)}")
    resolved = {}
    for seconds, (multiple, unit_s) in forms.items():
        name = seconds if values.get(seconds) is not None else multiple  # seconds win where both are set
        value = values.get(name)
        if value is None or not _is_number(value) or value <= 0:
            raise OocoError(f"slo.{name} is {value!r}: {seconds} or {multiple} must be a positive number")
        resolved[seconds] = float(value) * (unit_s if name == multiple else 1.0)
    return SloSpec(**resolved)
