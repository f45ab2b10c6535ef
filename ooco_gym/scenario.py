"""A scenario: the whole resolved description of one simulated world, and what follows from it.

Built from preset names or mappings (Hydra's resolved config has the same shape), validated on entry.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any, TypeVar

import numpy as np

from ooco_gym import presets
from ooco_gym.errors import OocoError, refuse_unknown_keys
from ooco_gym.roofline import (
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
from ooco_gym.specs import ClusterSpec, CostSpec, FaultSpec, SloClass, SloSpec, faults_from_mapping, is_number
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
    "faults": "none",
}
SCENARIO_KEYS = (*DEFAULT_PRESETS, "episode_s", "warmup_s", "data_dir")  # all that a config may set

Spec = TypeVar("Spec", ClusterSpec, CostSpec)


def _spec(kind: type[Spec], values: Mapping[str, Any], group: str) -> Spec:
    known = [entry.name for entry in fields(kind)]
    refuse_unknown_keys(set(values) - {"description", "name"}, known, group)
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
    faults: FaultSpec = field(default_factory=FaultSpec)
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not (is_number(self.episode_s) and self.episode_s > 0):
            raise OocoError(f"episode_s is {self.episode_s!r}, it must be a positive number of seconds")
        if not (is_number(self.warmup_s) and self.warmup_s >= 0):
            raise OocoError(f"warmup_s is {self.warmup_s!r}, it must be at least 0 seconds")
        for outage in self.faults.outages:
            if outage.instance >= self.instances:
                raise OocoError(f"faults.outages: no instance {outage.instance} among {self.instances}, counted from 0")
        for device, blocks in zip(self.instance_hardware, self.instance_kv_blocks, strict=True):
            if blocks < 1:
                need = self.model.weight_bytes / self.cluster.tensor_parallel / 1e9
                have = device.hbm_bytes * self.cluster.memory_utilization / 1e9
                raise OocoError(
                    f"model '{self.model.name}' does not fit '{device.name}': {need:.0f} GB of weights per device "
                    f"at tensor_parallel={self.cluster.tensor_parallel}, {have:.0f} GB usable; "
                    "raise cluster.tensor_parallel"
                )

    @property
    def horizon_s(self) -> float:
        return self.warmup_s + self.episode_s

    @property
    def instances(self) -> int:
        return self.cluster.instances

    @cached_property
    def instance_hardware(self) -> tuple[HardwareSpec, ...]:
        """The device of each instance."""
        return self.cluster.hardware_of(self.hardware)

    @property
    def kv_blocks(self) -> int:
        """KV blocks of the smallest instance."""
        return min(self.instance_kv_blocks)

    @cached_property
    def instance_kv_blocks(self) -> tuple[int, ...]:
        """KV blocks of each instance: usable memory of its devices less the weights, or as the cluster says."""
        given = self.cluster.kv_blocks
        if given is not None:
            return (given,) * self.instances if isinstance(given, int) else tuple(given)
        devices = self.cluster.tensor_parallel
        return tuple(
            self._blocks(devices * hardware.hbm_bytes * self.cluster.memory_utilization - self.model.weight_bytes)
            for hardware in self.instance_hardware
        )

    @property
    def host_blocks(self) -> int:
        """KV blocks that fit into the host memory of an instance."""
        return self._blocks(self.cluster.host_kv_bytes)

    def _blocks(self, kv_bytes: float) -> int:
        # KV heads are copied where there are more ranks than heads
        replicas = max(self.cluster.tensor_parallel / self.model.kv_heads, 1.0)
        return int(kv_bytes // (self.model.kv_bytes_per_token * replicas * self.cluster.block_tokens))

    @cached_property
    def true_cost(self) -> np.ndarray:
        """What times each instance, [instances] COST."""
        return self._costs(self.cost.true_form)

    @cached_property
    def scheduler_cost(self) -> np.ndarray:
        """What schedulers predict each instance with, [instances] COST."""
        return self._costs(self.cost.scheduler_form)

    def _costs(self, form: str) -> np.ndarray:
        tp, host_s = self.cluster.tensor_parallel, self.cost.host_s
        return np.concatenate([build_cost(self.model, device, form, tp, host_s) for device in self.instance_hardware])

    @cached_property
    def instance_saturation_batch(self) -> tuple[int, ...]:
        """B_sat of each instance as the scheduler computes it."""
        form, tp = self.cost.scheduler_form, self.cluster.tensor_parallel
        return tuple(saturation_batch(self.model, device, form, tp) for device in self.instance_hardware)

    @property
    def saturation_batch(self) -> float:
        """B_sat, the mean over the instances."""
        return float(np.mean(self.instance_saturation_batch))

    def _costs_of(self, *roles: int) -> list[np.void]:
        """Scheduler costs of the distinct devices among the instances of some roles."""
        rows = {
            device: row
            for row, (role, device) in enumerate(zip(self.cluster.roles, self.instance_hardware, strict=True))
            if role in roles
        }
        return [self.scheduler_cost[row] for row in rows.values()]

    @cached_property
    def decode_floor_s(self) -> float:
        """Predicted decode iteration of one online request of mean length, on the slowest device that decodes it."""
        context = self.online.mean_prompt_tokens + 0.5 * self.online.mean_output_tokens
        return max(float(decode_s(cost, 1.0, context)) for cost in self._costs_of(1, 2))

    @cached_property
    def mean_prefill_s(self) -> float:
        """Predicted prefill of one online request of mean length, on the slowest device that prefills it."""
        tokens = float(round(self.online.mean_prompt_tokens))
        roles = (0,) if self.cluster.relaxed else (2,)
        return max(float(prefill_s(cost, tokens)) for cost in self._costs_of(*roles))

    @cached_property
    def ideal_prompt_token_s(self) -> float:
        """Ideal seconds of an offline prompt token: its share of a full batch of mean-length offline prompts, on the
        mean device."""
        length = max(self.offline.mean_prompt_tokens, 1.0)
        count = max(self.cluster.max_batch_tokens / length, 1.0)
        tokens = count * length
        pairs = count * causal_pairs(length, 0.0)
        batch = (tokens, pairs, tokens * length, tokens, count, 0.0, 0.0, 0.0)
        return float(np.mean([iteration_s(cost, *batch) for cost in self.scheduler_cost])) / tokens

    @cached_property
    def ideal_output_token_s(self) -> float:
        """Ideal seconds of an offline output token: marginal decode cost of one more mean sequence at B_sat, on the
        mean device."""
        context = self.offline.mean_prompt_tokens + 0.5 * self.offline.mean_output_tokens
        marginal = []
        for cost, saturated in zip(self.scheduler_cost, self.instance_saturation_batch, strict=True):
            batch = float(saturated)
            marginal.append(
                decode_s(cost, batch + 1.0, (batch + 1.0) * context) - decode_s(cost, batch, batch * context)
            )
        return float(np.mean(marginal))

    @property
    def identity(self) -> str:
        """Sixteen characters that tell scenarios apart by what their presets hold, not only by their names."""
        groups = {
            group: presets.load(group, value) if group in DEFAULT_PRESETS and isinstance(value, str) else value
            for group, value in self.settings.items()
        }
        described = json.dumps([groups, self.episode_s, self.warmup_s, self.online.rate_scale], default=str)
        return blake2b(described.encode(), digest_size=8).hexdigest()

    def with_rate_scale(self, rate_scale: float) -> Scenario:
        """The same scenario with its online rate multiplied."""
        settings = {**self.settings, "rate_scale": rate_scale}
        return replace(self, online=self.online.with_rate_scale(rate_scale), settings=settings)

    def with_offline_rate(self, rate_per_s: float) -> Scenario:
        """The same offline mix, arriving as a Poisson process of ``rate_per_s`` requests per second."""
        return replace(self, offline=self.offline.with_rate(rate_per_s))

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
    """Resolve a scenario from groups ``model, hardware, cluster, slo, cost, workload, offline, faults`` and the plain
    keys ``episode_s``, ``warmup_s``, ``data_dir``; everything has a default. Other keys are refused.

    A group is a preset name or a mapping of its fields. Raises OocoError in one sentence on anything unusable.
    """
    if config is not None and not isinstance(config, Mapping):
        raise OocoError(f"scenario is {config!r}, a mapping such as {{'hardware': 'h100'}} is needed")
    config = dict(config or {})
    unknown = sorted(set(config) - set(SCENARIO_KEYS))
    if unknown:
        raise OocoError(f"unknown scenario key '{unknown[0]}': known are {', '.join(SCENARIO_KEYS)}")
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
        faults=faults_from_mapping(_group(config, "faults")),
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


_OBJECTIVES = {"ttft_s": "ttft_prefills", "tpot_s": "tpot_floors"}


def _slo(values: Mapping[str, Any], scenario: Scenario) -> SloSpec:
    """Objectives in seconds, or in multiples of what the deployment needs for the mean request alone."""
    known = [*_OBJECTIVES, *_OBJECTIVES.values(), "classes"]
    refuse_unknown_keys(set(values) - {"description", "name"}, known, "slo")
    classes = values.get("classes") or {}
    if not classes:
        return SloSpec(*_objectives(values, "slo", scenario))
    if not isinstance(classes, Mapping) or not all(isinstance(entry, Mapping) for entry in classes.values()):
        raise OocoError(f"slo.classes is {classes!r}, a mapping from class names to share and objectives is needed")
    resolved = tuple(_slo_class(str(name), entry, scenario) for name, entry in classes.items())
    tightest = (min(entry.ttft_s for entry in resolved), min(entry.tpot_s for entry in resolved))
    return SloSpec(*tightest, classes=resolved)


def _slo_class(name: str, values: Mapping[str, Any], scenario: Scenario) -> SloClass:
    refuse_unknown_keys(values, ["share", *_OBJECTIVES, *_OBJECTIVES.values()], f"slo.classes.{name}")
    return SloClass(name, values.get("share", 1.0), *_objectives(values, f"slo.classes.{name}", scenario))


def _objectives(values: Mapping[str, Any], where: str, scenario: Scenario) -> tuple[float, float]:
    """(TTFT, TPOT) in seconds."""
    units_s = {"ttft_s": scenario.mean_prefill_s, "tpot_s": scenario.decode_floor_s}
    resolved = []
    for seconds, multiple in _OBJECTIVES.items():
        name = seconds if values.get(seconds) is not None else multiple  # seconds win where both are set
        value = values.get(name)
        if value is None or not is_number(value) or value <= 0:
            raise OocoError(f"{where}.{name} is {value!r}: {seconds} or {multiple} must be a positive number")
        resolved.append(float(value) * (units_s[seconds] if name == multiple else 1.0))
    return resolved[0], resolved[1]
