"""Learned schedulers, one file each: a module ``agents/NAME.py`` with ``train(run: Training) -> Policy``."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules

from agents.training import Training
from ooco_gym.errors import OocoError
from ooco_gym.policy import NetworkPolicy

_NOT_AGENTS = ("training", "tracking", "closing")


def known() -> list[str]:
    """Names of all agents."""
    return sorted(module.name for module in iter_modules(__path__) if module.name not in _NOT_AGENTS)


def load(name: str) -> Callable[[Training], NetworkPolicy]:
    """The training function of an agent; raises OocoError listing the known ones."""
    if name not in known():
        raise OocoError(f"unknown agent '{name}': known are {', '.join(known())}")
    train: Callable[[Training], NetworkPolicy] = import_module(f"{__name__}.{name}").train
    return train
