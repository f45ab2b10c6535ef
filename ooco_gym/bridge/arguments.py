"""Command lines of the form ``COMMAND PATH... key=value...``, and mistakes in them told in one sentence.

``parse`` takes values as they are written: most are names of files, and a folder called 007 or null is none other.
``nested`` reads them as YAML, because they are keys of the cluster file.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ooco_gym.errors import OocoError

Command = Callable[[list[str]], int]


def parse(arguments: Sequence[str], known: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Paths, and ``key=value`` settings among ``known``; raises OocoError on any other, empty or repeated setting.

    What has a '/' before its first '=' is a path.
    """
    paths: list[str] = []
    settings: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or "/" in key:
            paths.append(argument)
            continue
        if key not in known:
            raise OocoError(f"unknown setting '{key}': known are {', '.join(known)}; --help explains them")
        if not value or key in settings:
            raise OocoError(f"{key}= is given {'twice' if key in settings else 'no value'}, {key}=VALUE is needed once")
        settings[key] = value
    return paths, settings


def nested(arguments: Sequence[str]) -> dict[str, Any]:
    """``key=value`` arguments as a nested mapping; raises OocoError on anything else."""
    for argument in arguments:
        if "=" not in argument.lstrip("="):
            raise OocoError(f"argument '{argument}' is not understood, key=value is needed")
    keys = [argument.partition("=")[0] for argument in arguments]
    for key in keys:
        if keys.count(key) > 1:
            raise OocoError(f"{key}= is given {keys.count(key)} times, once is needed")
    try:
        values = OmegaConf.to_container(OmegaConf.from_cli(list(arguments)), resolve=True)
    except OmegaConfBaseException as error:
        raise OocoError(f"arguments: {str(error).splitlines()[0]}") from None
    except Exception as error:  # the YAML parser's own errors
        raise OocoError(f"arguments: not understood ({' '.join(str(error).split())})") from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def choice(settings: Mapping[str, str], key: str, choices: Sequence[str]) -> str:
    """One of ``choices``, the first where the setting is absent; raises OocoError otherwise."""
    value = settings.get(key, choices[0])
    if value not in choices:
        raise OocoError(f"{key} is '{value}', accepted are {', '.join(choices)}")
    return value


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
