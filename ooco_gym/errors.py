"""The one exception that a user is meant to read, and wordings that more than one place needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class OocoError(ValueError):
    """Bad input, told in one sentence: what was wrong, where, and what is accepted.

    Commands catch it, print the sentence and exit with status 2; a traceback is for our own defects.
    """


def shown(value: object) -> str:
    """What a user gave, short enough to stand in a sentence."""
    text = "empty" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def refuse_unknown_keys(given: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raise OocoError for the first key by name that is not a known one; ``where`` begins the sentence."""
    for key in sorted(set(given) - set(known)):
        raise OocoError(f"{where}: unknown key '{key}', accepted are {', '.join(known)}")
