"""The one exception that a user is meant to read."""


class OocoError(ValueError):
    """Bad input, told in one sentence: what was wrong, where, and what is accepted.

    Commands catch it, print the sentence and exit with status 2; a traceback is for our own defects.
    """


def shown(value: object) -> str:
    """What a user gave, short enough to stand in a sentence."""
    text = "empty" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
