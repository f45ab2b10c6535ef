"""A bar: one figure of a benchmark beside what was asked of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table


@dataclass(frozen=True)
class Bar:
    """``value`` in ``unit`` must be at most, or at least, ``limit``; ``interval`` is its 95 % interval, where known."""

    what: str
    value: float
    limit: float
    unit: str = ""
    at_least: bool = False
    interval: tuple[float, float] | None = None

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit  # nan meets nothing

    def asked(self) -> str:
        if not self.limit and not self.at_least:
            return "0"
        return f"{'>=' if self.at_least else '<='} {number(self.limit)} {self.unit}".strip()

    def measured(self) -> str:
        text = f"{number(self.value)} {self.unit}".strip()
        return f"{text} ({number(self.interval[0])} .. {number(self.interval[1])})" if self.interval else text

    def to_dict(self) -> dict[str, Any]:
        """What results.json says of it."""
        kind = "at_least" if self.at_least else "at_most"
        return {"what": self.what, "value": self.value, "interval95": self.interval, kind: self.limit,
                "unit": self.unit, "met": self.met}  # fmt: skip


def number(value: float) -> str:
    """Three digits, or all of them before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(bars: Iterable[tuple[str, Bar]], title: str) -> Table:
    """Every (part, bar): what was asked, what was measured."""
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("part", "measured", "bar", "result", ""):
        shown.add_column(column, justify="right" if column in ("bar", "result") else "left")
    last = ""
    for part, bar in bars:
        met = "[green]met[/green]" if bar.met else "[red]missed[/red]"
        shown.add_row(part if part != last else "", bar.what, bar.asked(), bar.measured(), met)
        last = part
    return shown
