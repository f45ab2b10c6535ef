"""Suites: frozen lists of scenarios, each with the role that says what it may be used for.

Training and tuning ask for role "train" and get nothing else; an entry whose role and workload disagree is refused, so
that real test traces cannot enter training by a slip in a list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ooco_gym import presets
from ooco_gym.errors import OocoError
from ooco_gym.evaluation.admission import Admission, admit
from ooco_gym.policy import ConstantPolicy
from ooco_gym.scenario import build_scenario
from ooco_gym.workload.sources import ROLES, Role

_OWN_KEYS = ("role", "load")
_DEPLOYMENT = ("model", "hardware", "cluster", "slo", "cost")


@dataclass(frozen=True)
class Entry:
    """One scenario of a suite: its name, role, load and config; built and admitted on demand."""

    name: str
    role: Role
    load: float
    config: Mapping[str, Any]

    @property
    def deployment(self) -> str:
        """What an operator fixes before any request comes: scenarios with the same words share tuned constants."""
        said = [f"{group}={_words(self.config[group])}" for group in _DEPLOYMENT if group in self.config]
        return " ".join(said) or "default"

    def admitted(self, **settings: Any) -> Admission:
        """Built with ``settings`` (episode_s, data_dir, ...) over the entry's config, at ``load`` times the admitted
        rate. Raises OocoError where a trace is not at hand or the admission rule fails."""
        admission = admit(build_scenario({**self.config, **settings}))
        scale = admission.rate_scale * self.load
        return Admission(admission.scenario.with_rate_scale(scale), scale, admission.violation_rate)


def tuned_policy(tuned: str, level: str, deployment: str) -> ConstantPolicy:
    """The constants that ``conf/tuned/NAME.yaml`` holds for a deployment; one vector for all where level is
    tuned-global. Raises OocoError where it has none."""
    table = presets.load("tuned", tuned).get(level, {})
    if not isinstance(table, Mapping):
        raise OocoError(f"tuned '{tuned}': {level} is {table!r}, a mapping is needed")
    knobs = table if level == "tuned-global" else table.get(deployment)
    if not isinstance(knobs, Mapping) or not knobs:
        raise OocoError(
            f"tuned '{tuned}': no {level} for the deployment '{deployment}'; known are {'; '.join(map(str, table))}"
        )
    return ConstantPolicy(level, {}, knobs, f"constants tuned on training scenarios ({tuned})")


def _words(choice: Any) -> str:
    if isinstance(choice, Mapping):
        return "{" + ",".join(f"{key}:{value}" for key, value in choice.items()) + "}"
    return str(choice)


def load_suite(name: str, *roles: Role) -> list[Entry]:
    """Entries of ``conf/suite/NAME.yaml`` with one of the roles, in their order; all of them without a role."""
    settings = presets.load("suite", name)
    scenarios = settings.get("scenarios")
    if not isinstance(scenarios, Mapping) or not scenarios:
        raise OocoError(f"suite '{name}': scenarios is {scenarios!r}, a mapping from names to configs is needed")
    entries = [_entry(name, label, values) for label, values in scenarios.items()]
    return [entry for entry in entries if not roles or entry.role in roles]


def _entry(suite: str, label: str, values: Any) -> Entry:
    where = f"suite '{suite}', scenario '{label}'"
    if not isinstance(values, Mapping) or "workload" not in values or values.get("role") not in ROLES:
        raise OocoError(f"{where}: a mapping with a workload and a role of {', '.join(ROLES)} is needed")
    workload = presets.load("workload", values["workload"])
    if workload["role"] != values["role"]:
        raise OocoError(
            f"{where}: role is {values['role']}, but workload '{values['workload']}' is {workload['role']} data"
        )
    load = values.get("load", 1.0)
    if isinstance(load, bool) or not isinstance(load, (int, float)) or not load > 0:
        raise OocoError(f"{where}: load is {load!r}, a positive number is needed")
    return Entry(
        label, values["role"], float(load), {key: value for key, value in values.items() if key not in _OWN_KEYS}
    )
