"""One mapping of a configuration file, read key by key, so that every mistake is named in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ooco_gym.errors import OocoError
from ooco_gym.workload.checks import is_number, not_negative, positive, whole
from ooco_gym.workload.randomness import FloatArray

MANDATORY = "???"  # Hydra's mark for a value that the user has to give


class Section:
    """Reader of a mapping. ``where`` names it in messages, for example "workload 'azure-conv': arrivals".

    Each method returns the checked value of a key or raises OocoError; :meth:`close` raises if keys are left
    that nothing asked for.
    """

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping):
            raise OocoError(f"{where} is {values!r}, it must be a mapping of keys to values")
        self._values = values
        self._asked: list[str] = []
        self.where = where

    def has(self, key: str) -> bool:
        """True where the key is there and not null."""
        self._note(key)
        return self._values.get(key) is not None

    def raw(self, key: str) -> Any:
        self._note(key)
        value = self._values.get(key)
        if value is None or (isinstance(value, str) and value == MANDATORY):
            raise OocoError(f"{self.where}: {key} is missing, it must be given")
        return value

    def text(self, key: str) -> str:
        value = self.raw(key)
        if not isinstance(value, str):
            raise OocoError(f"{self.label(key)} is {value!r}, it must be text")
        return value

    def choice(self, key: str, options: Sequence[str]) -> str:
        value = self.raw(key)
        if value not in options:
            raise OocoError(f"{self.label(key)} is {value!r}, it must be one of {', '.join(options)}")
        return str(value)

    def positive(self, key: str) -> float:
        return positive(self.raw(key), self.label(key))

    def not_negative(self, key: str) -> float:
        return not_negative(self.raw(key), self.label(key))

    def number(self, key: str) -> float:
        value = self.raw(key)
        if not is_number(value):
            raise OocoError(f"{self.label(key)} is {value!r}, it must be a number")
        return float(value)

    def whole(self, key: str) -> int:
        return whole(self.raw(key), self.label(key))

    def pair(self, key: str) -> tuple[float, float]:
        """Two numbers."""
        value = self.sequence(key)
        if len(value) != 2 or not all(is_number(item) for item in value):
            raise OocoError(f"{self.label(key)} is {value!r}, it must be two numbers")
        return float(value[0]), float(value[1])

    def array(self, key: str, ndim: int) -> FloatArray:
        """Numbers as float64: a list (``ndim`` 1) or a list of equally long lists (``ndim`` 2)."""
        try:
            rows = self.sequence(key)
            array = np.array([list(row) for row in rows] if ndim == 2 else list(rows), dtype=np.float64)
        except (TypeError, ValueError):
            array = np.zeros(0)
        if array.size == 0 or array.ndim != ndim or not np.isfinite(array).all():
            shape = "a list of numbers" if ndim == 1 else "a list of equally long lists of numbers"
            raise OocoError(f"{self.label(key)} is {self._values.get(key)!r}, it must be {shape}")
        return array

    def sequence(self, key: str) -> list[Any]:
        value = self.raw(key)
        if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
            raise OocoError(f"{self.label(key)} is {value!r}, it must be a list")
        return list(value)

    def section(self, key: str) -> Section:
        return Section(self.raw(key), self.label(key))

    def sections(self, key: str) -> list[Section]:
        """A list of mappings."""
        return [Section(item, f"{self.label(key)}[{index}]") for index, item in enumerate(self.sequence(key))]

    def label(self, key: str) -> str:
        return f"{self.where}: {key}"

    def close(self) -> None:
        """Raise OocoError for the first key that nothing asked for."""
        for key in self._values:
            if key not in self._asked:
                raise OocoError(f"{self.where}: unknown key '{key}', accepted are {', '.join(self._asked)}")

    def _note(self, key: str) -> None:
        if key not in self._asked:
            self._asked.append(key)
