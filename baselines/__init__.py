"""Rule schedulers, one file each. ``load("online-priority")`` finds ``online_priority.py``'s POLICY."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from ooco_gym.errors import OocoError
from ooco_gym.policy import ConstantPolicy, Policy, load_policy


def known() -> list[str]:
    """Names of all baselines."""
    return sorted(module.name.replace("_", "-") for module in iter_modules(__path__))


def load(name: str) -> Policy:
    """The baseline of that name; raises OocoError listing the known ones."""
    if name not in known():
        raise OocoError(f"unknown baseline '{name}': known are {', '.join(known())}, or a saved policy's folder")
    module = f"{name.replace('-', '_')}"
    try:
        policy = import_module(f"{__name__}.{module}").POLICY
    except (AttributeError, SyntaxError) as error:
        raise OocoError(f"baselines/{module}.py: {error}; it must define POLICY") from None
    if not isinstance(policy, Policy):
        raise OocoError(f"baselines/{module}.py: POLICY is {policy!r}, a Policy is needed")
    return policy


def resolve(entry: Any) -> Policy:
    """A baseline's name, a saved policy's folder, ``{baseline, name, knobs, rules}`` or ``{policy, name}``."""
    if isinstance(entry, Mapping):
        keys = set(entry)
        if keys == {"policy", "name"}:
            return replace(load_policy(str(entry["policy"])), name=str(entry["name"]))
        if "baseline" not in keys or keys - {"baseline", "name", "knobs", "rules"}:
            raise OocoError(
                f"policies: {dict(entry)} is not understood, "
                "accepted are {baseline, name, knobs, rules} and {policy, name}"
            )
        return _changed(entry)
    if Path(str(entry)).is_dir() or "/" in str(entry):
        return load_policy(str(entry))
    return load(str(entry))


def _changed(entry: Mapping[str, Any]) -> Policy:
    """A baseline with some knobs or rules of one's own."""
    changes = {key: entry.get(key, {}) for key in ("knobs", "rules")}
    for key, given in changes.items():
        if not isinstance(given, Mapping):
            raise OocoError(
                f"policies: {key} is {given!r}, a mapping from the names of {key} to their values is needed"
            )
    base = load(str(entry["baseline"]))
    if set(entry) == {"baseline"}:
        return base
    if not isinstance(base, ConstantPolicy):
        raise OocoError(f"policies: '{base.name}' decides as it goes, no name, knobs or rules can be given to it")
    knobs, rules = ({**getattr(base, key), **changes[key]} for key in ("knobs", "rules"))
    return ConstantPolicy(str(entry.get("name", f"{base.name}*")), rules, knobs)


def resolve_all(entries: Sequence[Any]) -> list[Policy]:
    """All of them; raises OocoError where two have one name."""
    policies = [resolve(entry) for entry in entries]
    refuse_twice([policy.name for policy in policies])
    return policies


def refuse_twice(names: Sequence[str]) -> None:
    """Raises OocoError where two policies of a comparison have one name."""
    for name in names:
        if names.count(name) > 1:
            raise OocoError(
                f"policies: two are called '{name}', rename one as {{baseline: NAME, name: ANOTHER}} or "
                f"{{policy: FOLDER, name: ANOTHER}}; a copied baseline has a name= of its own to change in its file"
            )
