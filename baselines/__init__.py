"""Rule schedulers, one file each. ``load("online-priority")`` finds ``online_priority.py``'s POLICY."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from ooco_gym.errors import OocoError
from ooco_gym.policy import Policy


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
