"""One measured time, of a whole iteration or of a single kernel, and how much each weighs in a fit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from ooco_gym.errors import OocoError
from ooco_gym.roofline.model import ModelSpec

KINDS = ("iteration", "gemm", "elementwise", "attention", "allreduce")
KERNEL_WEIGHT = 0.1


@dataclass(frozen=True)
class Measurement:
    """One measured time. ``seconds`` is of the whole iteration or of one kernel; the others are columns of a table.

    ``group`` is the unit that is left out for the uncertainty, a model as a rule. ``host_s`` is the engine's part of a
    whole iteration, which is no property of the device.
    """

    kind: str
    seconds: float
    model: ModelSpec | None = None
    tp: int = 1
    tokens: float = 0.0
    n: float = 0.0
    k: float = 0.0
    prefills: float = 0.0
    prefill_tokens: float = 0.0
    past_tokens: float = 0.0
    decodes: float = 0.0
    context_tokens: float = 0.0
    group: str = ""
    weight: float = 1.0
    host_s: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OocoError(f"kind is '{self.kind}', known are {', '.join(KINDS)}")
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name in ("kind", "model", "group"):
                continue
            if not math.isfinite(value) or value < 0:
                raise OocoError(f"{entry.name} is {value!r}, a finite number of at least 0 is needed")
        if self.seconds <= self.host_s:
            raise OocoError(
                f"the time is {self.seconds * 1e3:g} ms, no more than the {self.host_s * 1e3:g} ms of the engine"
            )
        if self.kind != "gemm" and self.model is None:
            raise OocoError(f"model is missing, a row of kind '{self.kind}' needs it")
        if self.kind == "gemm":
            needed: tuple[str, ...] = ("tokens", "n", "k")
        elif self.kind in ("elementwise", "allreduce"):
            needed = ("tokens",)
        else:
            needed = ()
            if self.decodes > 0 and self.context_tokens <= 0:
                raise OocoError("decodes is above 0, so context_tokens is needed")
            if self.prefill_tokens * self.prefills + self.decodes <= 0:
                raise OocoError("prefill_tokens and decodes are both 0, a batch needs one of them")
        for name in needed:
            if getattr(self, name) <= 0:
                raise OocoError(f"{name} is {getattr(self, name):g}, a row of kind '{self.kind}' needs a positive one")
        if self.kind == "allreduce" and self.tp < 2:
            raise OocoError(f"tp is {self.tp}, an all-reduce needs at least 2")


def batch_kind(row: Measurement) -> str:
    """decode, prefill or mixed."""
    if not row.decodes:
        return "prefill"
    return "mixed" if row.prefill_tokens else "decode"


def balanced(rows: Sequence[Measurement]) -> list[Measurement]:
    """The same rows, weighed so that counts do not decide: decode, prefill and mixed iterations 1 in total, each.

    A kind of kernel weighs KERNEL_WEIGHT where there are iterations, otherwise 1: iterations decide, kernels only tell
    apart what iterations cannot, the fixed times of one layer's operators.
    """
    kinds = [batch_kind(row) if row.kind == "iteration" else row.kind for row in rows]
    kernel = KERNEL_WEIGHT if any(row.kind == "iteration" for row in rows) else 1.0
    count = Counter(kinds)
    return [
        replace(row, weight=(1.0 if row.kind == "iteration" else kernel) / count[kind])
        for row, kind in zip(rows, kinds, strict=True)
    ]
