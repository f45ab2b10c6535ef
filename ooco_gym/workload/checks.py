"""Checks of single numbers, so that every wrong one is reported in the same words."""

from __future__ import annotations

import math
from typing import Any

from ooco_gym.errors import OocoError

MAX_TOKENS = 2**31 - 1  # token counts are stored as int32


def is_number(value: Any) -> bool:
    """True for finite ints and floats (numpy's too), False for bools, NaN, infinities and everything else."""
    if isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except (TypeError, ValueError):
        return False


def positive(value: Any, what: str) -> float:
    """``value`` as a float; OocoError naming ``what`` unless it is a finite number above zero."""
    if not is_number(value) or not value > 0:
        raise OocoError(f"{what} is {value!r}, it must be a positive number")
    return float(value)


def not_negative(value: Any, what: str) -> float:
    """``value`` as a float; OocoError naming ``what`` unless it is a finite number of at least zero."""
    if not is_number(value) or value < 0:
        raise OocoError(f"{what} is {value!r}, it must be a number of at least 0")
    return float(value)


def whole(value: Any, what: str, least: int = 1, most: int = MAX_TOKENS) -> int:
    """``value`` as an int; OocoError naming ``what`` unless it is a whole number in [least, most]."""
    if not is_number(value) or value != int(value) or not least <= value <= most:
        raise OocoError(f"{what} is {value!r}, it must be a whole number between {least} and {most}")
    return int(value)
