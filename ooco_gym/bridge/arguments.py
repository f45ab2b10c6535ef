"""Command lines of the form ``COMMAND POSITIONAL... key=value...``, and mistakes in them told in one sentence."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from ooco_gym.errors import OocoError

Command = Callable[[list[str]], int]


def parse(arguments: Sequence[str], known: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Positional arguments and ``key=value`` settings among ``known``; raises OocoError on anything else.

    What names something on disk is positional, even with '=' in it.
    """
    positional: list[str] = []
    pairs: list[str] = []
    for argument in arguments:
        key, equals, _ = argument.partition("=")
        if not equals or "/" in key:
            positional.append(argument)
        elif key not in known:
            raise OocoError(f"unknown setting '{key}': known are {', '.join(known)}; --help explains them")
        else:
            pairs.append(argument)
    try:
        settings = OmegaConf.to_container(OmegaConf.from_cli(pairs), resolve=True)
    except (OmegaConfBaseException, YAMLError) as error:
        raise OocoError(f"{' '.join(pairs)}: {str(error).splitlines()[0]}") from None
    assert isinstance(settings, dict)
    return positional, {str(key): value for key, value in settings.items()}


def text(settings: dict[str, Any], key: str, default: str) -> str:
    """A setting as text; raises OocoError when it is empty or a list."""
    value = settings.get(key, default)
    if value is None or isinstance(value, (dict, list)) or not str(value):
        raise OocoError(f"{key} is {value!r}, {key}=TEXT is needed")
    return str(value)


def choice(settings: dict[str, Any], key: str, choices: Sequence[Any]) -> Any:
    """One of ``choices``, the first where the setting is absent; raises OocoError otherwise."""
    value = settings.get(key, choices[0])
    for accepted in choices:
        if type(value) is type(accepted) and value == accepted:
            return accepted
    raise OocoError(f"{key} is {value!r}, accepted are {', '.join(str(accepted).lower() for accepted in choices)}")


def command(usage: str) -> Callable[[Command], Command]:
    """A command that prints ``usage`` when asked, and a user's mistake as one sentence with status 2."""

    def decorate(run: Command) -> Command:
        @functools.wraps(run)
        def guarded(arguments: list[str]) -> int:
            if not arguments or {"-h", "--help"} & set(arguments):
                print(usage.strip())
                return 0 if arguments else 2
            try:
                return run(arguments)
            except OocoError as error:
                print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
            except OSError as error:
                print(f"error: {error.filename or 'disk'}: {error.strerror or error}", file=sys.stderr)
            return 2

        return guarded

    return decorate
