"""cluster.yaml: which vLLM instances there are, what they run on, and within which limits the gateway works.

Everything is checked here, at the edge, and becomes frozen dataclasses; every error is one sentence that names
the key. Secrets never stand in the file: it names the environment variables that hold them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from yarl import URL

from ooco_gym.errors import OocoError, shown
from ooco_gym.scenario import DEFAULT_PRESETS, Scenario, build_scenario

ROLES = ("relaxed", "strict")
CONNECTORS = ("none", "example", "nixl")
PULLS = ("auto", "handover", "recompute", "off")
_FILE = "instances: [...]"
_ENTRY = "url: http://127.0.0.1:8001, role: relaxed"


def _number(default: Any, low: float, high: float) -> Any:
    """A field that holds a number, and the range in which it makes sense."""
    return field(default=default, metadata={"range": (low, high)})


@dataclass(frozen=True)
class InstanceConfig:
    """One vLLM server. ``kv_blocks`` and ``max_num_seqs`` override what its metrics or the scenario say."""

    url: str
    role: str
    kv_blocks: int | None = _number(None, 1, 10**9)
    max_num_seqs: int | None = _number(None, 1, 10**6)


@dataclass(frozen=True)
class Listen:
    """Where the gateway listens; loopback unless told otherwise."""

    host: str = "127.0.0.1"
    port: int = 8000


@dataclass(frozen=True)
class Limits:
    """Sizes and counts above which a request is refused: 413 for the body, 429 for the backlog, 503 for online work."""

    max_body_bytes: int = _number(16 * 2**20, 2**10, 2**30)
    max_queue: int = _number(10_000, 1, 10**6)  # interactive offline requests waiting
    max_online: int = _number(4_096, 1, 10**6)  # online requests in flight
    max_response_bytes: int = _number(64 * 2**20, 2**10, 2**32)  # of an answer that is kept until it is complete


@dataclass(frozen=True)
class Timeouts:
    """Seconds after which something is given up."""

    connect_s: float = _number(5.0, 0.01, 600)
    idle_s: float = _number(300.0, 0.1, 86_400)  # an instance that sends nothing for a request
    body_s: float = _number(30.0, 0.01, 3_600)  # a client that does not finish its request
    client_s: float = _number(60.0, 0.1, 86_400)  # a client that does not read its answer
    probe_s: float = _number(5.0, 0.01, 600)  # health and metrics of an instance; a busy front end takes seconds
    drain_s: float = _number(30.0, 0.01, 3_600)  # online requests at shutdown


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
    control_interval_s: float = _number(1.0, 0.01, 600)
    scrape_interval_s: float = _number(0.5, 0.01, 600)
    policy_time_s: float = _number(0.25, 0.001, 600)
    cost_correction: bool = True  # of predicted iterations by what the engines show
    dry_run: bool = False
    bytes_per_token: float = _number(4.0, 0.1, 100)
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
    where = f"config {path}" + (" and the command line" if overrides else "")
    try:
        content = _mapping(OmegaConf.to_container(OmegaConf.load(path), resolve=False), "the file", _FILE)
        merged = OmegaConf.create(_merged(content, dict(overrides or {})))
        values = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except FileNotFoundError:
        raise OocoError(f"config {path}: no such file, a cluster file in YAML is needed") from None
    except OSError as error:
        why = error.strerror or f"the file holds one value, a mapping such as {{{_FILE}}} is needed"
        raise OocoError(f"config {path}: {why}") from None
    except OocoError as error:
        raise OocoError(f"config {path}: {error}") from None
    except Exception as error:  # YAML's own, OmegaConf's, and what dates, numbers and depth make their code raise
        why = " ".join(str(error).partition("\n    full_key")[0].split())
        raise OocoError(f"config {path}: not a cluster file in YAML ({why[:300]})") from None
    try:
        return parse_config(values)
    except OocoError as error:
        raise OocoError(f"{where}: {error}") from None


def _merged(below: Any, above: Any) -> Any:
    """``above`` wins, key by key where both are mappings."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _merged(below.get(key), value) for key, value in above.items()}


def parse_config(values: Any, environment: Mapping[str, str] | None = None) -> BridgeConfig:
    """Check a mapping of the documented shape; raises OocoError that names the key."""
    environment = os.environ if environment is None else environment
    top = _mapping(values, "the file", _FILE)
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
        listen=_listen(_part(top, "listen", "host: 127.0.0.1, port: 8000")),
        limits=Limits(**_only_numbers(Limits, _part(top, "limits", "max_queue: 1000"), "limits")),
        timeouts=Timeouts(**_only_numbers(Timeouts, _part(top, "timeouts", "drain_s: 30"), "timeouts")),
        cost_correction=_flag(top, "cost_correction", True),
        dry_run=_flag(top, "dry_run", False),
        **_files(top),
        **_numbers(BridgeConfig, top),
        api_key=_secret(top, "api_key_env", environment),
        upstream_key=_secret(top, "upstream_key_env", environment),
    )


def _instances(value: Any) -> tuple[InstanceConfig, ...]:
    if not isinstance(value, list) or not value:
        raise OocoError(f"instances is {shown(value)}, a list of at least one mapping such as {{{_ENTRY}}} is needed")
    entries = [_instance(entry, f"instances[{index}]") for index, entry in enumerate(value)]
    seen: dict[URL, int] = {}
    for index, entry in enumerate(entries):
        first = seen.setdefault(URL(f"{entry.url}/"), index)
        if first != index:
            raise OocoError(f"instances[{index}].url is {entry.url}, which instances[{first}] has already")
    return tuple(sorted(entries, key=lambda entry: ROLES.index(entry.role)))  # stable: the file's order within a pool


def _instance(value: Any, where: str) -> InstanceConfig:
    values = _mapping(value, where, _ENTRY)
    _known(values, [entry.name for entry in fields(InstanceConfig)], where)
    url = _url(values.get("url"), f"{where}.url")
    role = values.get("role")
    if role not in ROLES:
        raise OocoError(f"{where}.role is {shown(role)}, accepted are {' and '.join(ROLES)}")
    given = {key: value for key, value in values.items() if value is not None}
    counts = _numbers(InstanceConfig, given, f"{where}.")
    return InstanceConfig(url=url, role=str(role), **counts)


def _url(value: Any, where: str) -> str:
    """The base address of a server, to which paths such as /v1/models are added."""
    usable = isinstance(value, str) and not any(character <= " " for character in value)
    try:
        url = URL(value if usable else "")
        usable = url.scheme in ("http", "https") and bool(url.host and url.port) and not (url.query or url.fragment)
    except ValueError:
        usable = False
    if not usable:
        raise OocoError(f"{where} is {shown(value)}, a URL such as http://127.0.0.1:8001 is needed")
    if url.user or url.password:
        raise OocoError(f"{where} holds a user or password, keys belong into the variable that upstream_key_env names")
    return str(value).rstrip("/").removesuffix("/v1")


def _scenario(value: Any, instances: tuple[InstanceConfig, ...]) -> Scenario:
    """The scenario whose scheduler costs predict this deployment: instance counts come from the list of instances."""
    settings = dict(_mapping(value if value is not None else {}, "scenario", "model: qwen2.5-7b, hardware: a100"))
    _known(settings, (*DEFAULT_PRESETS, "data_dir"), "scenario")
    cluster = settings.get("cluster", {})
    if not isinstance(cluster, Mapping):
        raise OocoError(
            f"scenario.cluster is {shown(cluster)}, a mapping such as {{tensor_parallel: 2}} is needed: "
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
        raise OocoError(f"listen.host is {shown(host)}, an address such as 127.0.0.1 is needed")
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
        raise OocoError(f"listen.port is {shown(port)}, a port from 0 (any free one) to 65535 is needed")
    return Listen(host, port)


def _only_numbers(kind: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    _known(values, [entry.name for entry in fields(kind)], where)
    return _numbers(kind, values, f"{where}.")


def _numbers(kind: type, values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """The numbers of ``kind`` that ``values`` gives, each within the range that stands beside its default."""
    found: dict[str, Any] = {}
    for entry in fields(kind):
        if "range" not in entry.metadata or entry.name not in values:
            continue
        value, (low, high) = values[entry.name], entry.metadata["range"]
        whole = not isinstance(entry.default, float)
        kinds = (int,) if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            needed = "a whole number" if whole else "a number"
            raise OocoError(f"{where}{entry.name} is {shown(value)}, {needed} from {low:,} to {high:,} is needed")
        found[entry.name] = value if whole else float(value)
    return found


def _part(top: Mapping[str, Any], key: str, example: str) -> Mapping[str, Any]:
    """A mapping inside the file that may be absent."""
    value = top.get(key)
    return {} if value is None else _mapping(value, key, example)


def _mapping(value: Any, where: str, example: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise OocoError(f"{where} is {shown(value)}, a mapping such as {{{example}}} is needed")
    return value


def _known(values: Mapping[str, Any], known: Any, where: str) -> None:
    unknown = [key for key in values if key not in known]
    if unknown:
        key = " ".join(str(unknown[0]).split())[:80]
        path = f"{where}.{key}" if where else key
        raise OocoError(f"{path} is an unknown key, accepted are {', '.join(known)}")


def _choice(values: Mapping[str, Any], key: str, accepted: tuple[str, ...], default: str) -> str:
    value = values.get(key, default)
    if value not in accepted:
        raise OocoError(f"{key} is {shown(value)}, accepted are {', '.join(accepted)}")
    return str(value)


def _flag(values: Mapping[str, Any], key: str, default: bool) -> bool:
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise OocoError(f"{key} is {shown(value)}, true or false is needed")
    return value


def _files(top: Mapping[str, Any]) -> dict[str, Any]:
    """The files that the gateway writes: no folder is made for them, because a misspelt path would be a new store."""
    found: dict[str, str] = {}
    for key in ("decision_log", "jobs"):
        value = top.get(key)
        if value is None:
            continue
        if not isinstance(value, str) or not value or "\0" in value:
            raise OocoError(f"{key} is {shown(value)}, a path is needed")
        folder = os.path.dirname(value) or "."
        if not os.path.isdir(folder):
            raise OocoError(f"{key} is {value}, but there is no folder {folder}, a file in an existing one is needed")
        if os.path.exists(value) and not os.path.isfile(value):  # a pipe would be waited for, a device not kept
            raise OocoError(f"{key} is {value}, which is no regular file, one or a new name is needed")
        found[key] = value
    if len({os.path.realpath(path) for path in found.values()}) < len(found):
        raise OocoError(f"jobs is {found['jobs']}, which is the decision_log as well, two files are needed")
    return found


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
