"""Learned schedulers, one file each: a module ``agents/NAME.py`` with two functions.

``configure(values)`` checks the agent's config; ``train(run: Training)`` returns the trained policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from agents.training import Training
from ooco_gym.errors import OocoError
from ooco_gym.policy import SavedPolicy

_NOT_AGENTS = ("training", "tracking", "closing", "vec_env", "levels")


def known() -> list[str]:
    """Names of all agents."""
    return sorted(module.name for module in iter_modules(__path__) if module.name not in _NOT_AGENTS)


def load(name: str) -> Callable[[Training], SavedPolicy]:
    """The training function of an agent; raises OocoError listing the known ones."""
    if name not in known():
        raise OocoError(f"unknown agent '{name}': known are {', '.join(known())}")
    train: Callable[[Training], SavedPolicy] = _function(name, "train")
    return train


def check(name: str, values: Mapping[str, Any]) -> None:
    """Refuse a config that the agent could not train with, before anything slow happens."""
    _function(name, "configure")(values)


def _function(name: str, function: str) -> Any:
    try:
        return getattr(import_module(f"{__name__}.{name}"), function)
    except (AttributeError, SyntaxError) as error:
        raise OocoError(f"agents/{name}.py: {error}; it must define configure(values) and train(run)") from None
