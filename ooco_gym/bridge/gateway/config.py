"""cluster.yaml: which vLLM instances there are, what they run on, and within which limits the gateway works.

Everything is checked here, at the edge, and becomes frozen dataclasses; every error is one sentence that begins with
the path of the key. Secrets never stand in the file: it names the environment variables that hold them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from ooco_gym.errors import OocoError
from ooco_gym.scenario import DEFAULT_PRESETS, Scenario, build_scenario

ROLES = ("relaxed", "strict")
CONNECTORS = ("none", "example", "nixl")
PULLS = ("auto", "handover", "recompute", "off")


@dataclass(frozen=True)
class InstanceConfig:
    """One vLLM server. ``kv_blocks`` and ``max_num_seqs`` override what its metrics or the scenario say."""

    url: str
    role: str
    kv_blocks: int | None = None
    max_num_seqs: int | None = None


@dataclass(frozen=True)
class Listen:
    """Where the gateway listens; loopback unless told otherwise."""

    host: str = "127.0.0.1"
    port: int = 8000


@dataclass(frozen=True)
class Limits:
    """Sizes and counts above which a request is refused: 413 for the body, 429 for the backlog, 503 for online work."""

    max_body_bytes: int = 16 * 2**20
    max_queue: int = 10_000  # interactive offline requests waiting
    max_online: int = 4_096  # online requests in flight
    max_response_bytes: int = 64 * 2**20  # of one answer that has to be kept until it is complete


@dataclass(frozen=True)
class Timeouts:
    """Seconds after which something is given up."""

    connect_s: float = 2.0
    idle_s: float = 300.0  # an instance that sends nothing for a request
    body_s: float = 30.0  # a client that does not finish its request
    client_s: float = 60.0  # a client that does not read its answer
    probe_s: float = 2.0  # health and metrics of an instance
    drain_s: float = 30.0  # online requests at shutdown


@dataclass(frozen=True)
class BridgeConfig:
    """The whole file, resolved. ``scenario`` predicts seconds; its rows are the instances, relaxed ones first."""

    instances: tuple[InstanceConfig, ...]
    scenario: Scenario
    connector: str = "none"
    handover_fallback: bool = True  # recompute the prompt where a hand-over failed
    pull: str = "auto"
    listen: Listen = field(default_factory=Listen)
    limits: Limits = field(default_factory=Limits)
    timeouts: Timeouts = field(default_factory=Timeouts)
    control_interval_s: float = 1.0
    scrape_interval_s: float = 0.5
    policy_time_s: float = 0.25
    cost_correction: bool = True  # of predicted iterations by what the engines show
    dry_run: bool = False
    bytes_per_token: float = 4.0
    decision_log: str | None = None
    jobs: str | None = None
    api_key: str | None = field(default=None, repr=False)
    upstream_key: str | None = field(default=None, repr=False)

    @property
    def pull_mode(self) -> str:
        """How a strict instance gets offline work: ``handover``, ``recompute`` or ``off``."""
        if self.pull == "auto":
            return "recompute" if self.connector == "none" else "handover"
        return self.pull


_KEYS = (
    "instances",
    "scenario",
    "connector",
    "handover_fallback",
    "pull",
    "listen",
    "limits",
    "timeouts",
    "control_interval_s",
    "scrape_interval_s",
    "policy_time_s",
    "cost_correction",
    "dry_run",
    "bytes_per_token",
    "decision_log",
    "jobs",
    "api_key_env",
    "upstream_key_env",
)


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> BridgeConfig:
    """Read a cluster file; ``overrides`` are keys of the same shape that win over it. Raises OocoError."""
    path = Path(path)
    try:
        content = OmegaConf.load(path)
        merged = OmegaConf.merge(content, OmegaConf.create(dict(overrides or {})))
        values = OmegaConf.to_container(merged, resolve=True)
    except FileNotFoundError:
        raise OocoError(f"config {path}: no such file, a cluster file in YAML is needed") from None
    except OSError as error:
        raise OocoError(f"config {path}: {error.strerror or error}") from None
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise OocoError(f"config {path}: not valid YAML ({' '.join(str(error).split())})") from None
    try:
        return parse_config(values)
    except OocoError as error:
        raise OocoError(f"config {path}: {error}") from None


def parse_config(values: Any, environment: Mapping[str, str] | None = None) -> BridgeConfig:
    """Check a mapping of the documented shape; raises OocoError that names the key."""
    environment = os.environ if environment is None else environment
    top = _mapping(values, "the file")
    _known(top, _KEYS, "")
    instances = _instances(top.get("instances"))
    connector = _choice(top, "connector", CONNECTORS, "none")
    roles = {instance.role for instance in instances}
    if connector != "none" and roles != set(ROLES):
        raise OocoError(f"connector is '{connector}', which needs at least one relaxed and one strict instance")
    if top.get("pull") is False:
        top = {**top, "pull": "off"}  # as YAML reads the word
    pull = _choice(top, "pull", PULLS, "auto")
    if pull == "handover" and connector == "none":
        raise OocoError("pull is 'handover', which needs a connector (example or nixl)")
    return BridgeConfig(
        instances=instances,
        scenario=_scenario(top.get("scenario"), instances),
        connector=connector,
        handover_fallback=_flag(top, "handover_fallback", True),
        pull=pull,
        listen=_listen(_mapping(top.get("listen") or {}, "listen")),
        limits=Limits(**_numbers(Limits, top.get("limits"), "limits", whole=True)),
        timeouts=Timeouts(**_numbers(Timeouts, top.get("timeouts"), "timeouts")),
        control_interval_s=_positive(top, "control_interval_s", 1.0),
        scrape_interval_s=_positive(top, "scrape_interval_s", 0.5),
        policy_time_s=_positive(top, "policy_time_s", 0.25),
        cost_correction=_flag(top, "cost_correction", True),
        dry_run=_flag(top, "dry_run", False),
        bytes_per_token=_positive(top, "bytes_per_token", 4.0),
        decision_log=_text(top, "decision_log"),
        jobs=_text(top, "jobs"),
        api_key=_secret(top, "api_key_env", environment),
        upstream_key=_secret(top, "upstream_key_env", environment),
    )


def _instances(value: Any) -> tuple[InstanceConfig, ...]:
    if not isinstance(value, list) or not value:
        raise OocoError(
            "instances must be a list with at least one entry such as {url: http://127.0.0.1:8001, role: relaxed}"
        )
    entries = [
        _instance(_mapping(entry, f"instances[{index}]"), f"instances[{index}]") for index, entry in enumerate(value)
    ]
    seen: dict[str, int] = {}
    for index, entry in enumerate(entries):
        if entry.url in seen:
            raise OocoError(f"instances[{index}].url is {entry.url}, which instances[{seen[entry.url]}] has already")
        seen[entry.url] = index
    return tuple(sorted(entries, key=lambda entry: ROLES.index(entry.role)))  # stable: the file's order within a pool


def _instance(values: Mapping[str, Any], where: str) -> InstanceConfig:
    _known(values, [entry.name for entry in fields(InstanceConfig)], where)
    url = values.get("url")
    try:
        parts = urlsplit(url) if isinstance(url, str) else None
        usable = parts is not None and parts.scheme in ("http", "https") and bool(parts.hostname)
        usable = (
            usable
            and parts is not None
            and (parts.port is None or parts.port > 0)
            and not (parts.query or parts.fragment)
        )
    except ValueError:
        usable = False
    if not usable:
        raise OocoError(f"{where}.url is {url!r}, a URL such as http://127.0.0.1:8001 is needed")
    if parts is not None and (parts.username or parts.password):
        raise OocoError(
            f"{where}.url holds a user or password, keys belong into the variable that upstream_key_env names"
        )
    role = values.get("role")
    if role not in ROLES:
        raise OocoError(f"{where}.role is {role!r}, accepted are {' and '.join(ROLES)}")
    counts = {}
    for name in ("kv_blocks", "max_num_seqs"):
        if values.get(name) is not None:
            counts[name] = _count(values[name], f"{where}.{name}")
    return InstanceConfig(url=str(url).rstrip("/").removesuffix("/v1"), role=str(role), **counts)


def _scenario(value: Any, instances: tuple[InstanceConfig, ...]) -> Scenario:
    """The scenario whose scheduler costs predict this deployment: instance counts come from the list of instances."""
    settings = dict(_mapping(value if value is not None else {}, "scenario"))
    _known(settings, (*DEFAULT_PRESETS, "data_dir"), "scenario")
    cluster = settings.get("cluster", {})
    if not isinstance(cluster, Mapping):
        raise OocoError(
            f"scenario.cluster is {cluster!r}, a mapping such as {{tensor_parallel: 2}} is needed: "
            "the numbers of instances follow from the list of instances"
        )
    for role in ("relaxed", "strict", "unified"):
        if role in cluster:
            raise OocoError(f"scenario.cluster.{role} is not accepted: it follows from the list of instances")
    counts = {role: sum(entry.role == role for entry in instances) for role in ROLES}
    pools = counts if all(counts.values()) else {"relaxed": 0, "strict": 0, "unified": len(instances)}
    blocks = [entry.kv_blocks for entry in instances]
    given = {"kv_blocks": blocks} if all(blocks) else {}
    try:
        return build_scenario({**settings, "cluster": {**given, **cluster, **pools}})
    except OocoError as error:
        raise OocoError(f"scenario: {error}") from None


def _listen(values: Mapping[str, Any]) -> Listen:
    _known(values, ("host", "port"), "listen")
    host, port = values.get("host", Listen.host), values.get("port", Listen.port)
    if not isinstance(host, str) or not host:
        raise OocoError(f"listen.host is {host!r}, an address such as 127.0.0.1 is needed")
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
        raise OocoError(f"listen.port is {port!r}, a port from 0 (any free one) to 65535 is needed")
    return Listen(host, port)


def _numbers(kind: type, value: Any, where: str, whole: bool = False) -> dict[str, Any]:
    values = _mapping(value or {}, where)
    _known(values, [entry.name for entry in fields(kind)], where)
    if whole:
        return {name: _count(entry, f"{where}.{name}") for name, entry in values.items()}
    return {name: _positive(values, name, 0.0, f"{where}.") for name in values}


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise OocoError(f"{where} is {value!r}, a mapping of keys to values is needed")
    return value


def _known(values: Mapping[str, Any], known: Any, where: str) -> None:
    unknown = [key for key in values if key not in known]
    if unknown:
        path = f"{where}.{unknown[0]}" if where else f"{unknown[0]}"
        raise OocoError(f"{path} is an unknown key, accepted are {', '.join(known)}")


def _choice(values: Mapping[str, Any], key: str, accepted: tuple[str, ...], default: str) -> str:
    value = values.get(key, default)
    if value not in accepted:
        raise OocoError(f"{key} is {value!r}, accepted are {', '.join(accepted)}")
    return str(value)


def _flag(values: Mapping[str, Any], key: str, default: bool) -> bool:
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise OocoError(f"{key} is {value!r}, true or false is needed")
    return value


def _positive(values: Mapping[str, Any], key: str, default: float, where: str = "") -> float:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise OocoError(f"{where}{key} is {value!r}, a positive number is needed")
    return float(value)


def _count(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OocoError(f"{where} is {value!r}, a whole number of at least 1 is needed")
    return value


def _text(values: Mapping[str, Any], key: str) -> str | None:
    value = values.get(key)
    if value is not None and (not isinstance(value, str) or not value):
        raise OocoError(f"{key} is {value!r}, a path is needed")
    return value


def _secret(values: Mapping[str, Any], key: str, environment: Mapping[str, str]) -> str | None:
    """The value of the environment variable that ``key`` names; a named variable must be set."""
    name = values.get(key)
    if name is None:
        return None
    if not isinstance(name, str) or not name.isidentifier():
        # Not repeated: what stands there may be the secret itself.
        raise OocoError(
            f"{key} is not the name of an environment variable, which is needed: the secret is read from it"
        )
    secret = environment.get(name, "").strip()
    if not secret:
        raise OocoError(f"{key} names the environment variable {name}, which is not set or empty")
    return secret
