"""Tables for people and for programs. Figures are in ``figures.py``; both print what ``comparison.py`` computed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]

#: (heading, metric, factor, digits, shown on a narrow terminal)
_COLUMNS = (
    ("violations\n%", "violation_rate", 100.0, 2, True),
    ("TTFT p99\nms", "ttft_p99_s", 1e3, 0, True),
    ("TPOT p99\nms", "tpot_p99_s", 1e3, 1, True),
    ("TBT p99\nms", "tbt_p99_s", 1e3, 1, False),
    ("offline\ntokens/s", "offline_output_tokens_per_s", 1.0, 0, True),
    ("offline\nrequests/s", "offline_requests_per_s", 1.0, 2, False),
    ("useful\n%", "offline_ideal_s_per_instance_s", 100.0, 1, True),
    ("of bound\n%", "share_of_bound", 100.0, 1, False),
    ("wasted\n%", "wasted_fraction", 100.0, 1, False),
)
MANY_REJECTED = 0.01
WIDE = 150  # characters that all columns need
_NARROW = 96  # below this there is no room for intervals either


def _cell(row: Row, metric: str, factor: float, digits: int, interval: bool) -> str:
    if math.isnan(row[metric]):
        return "-"
    low, high = (bound * factor for bound in row[f"{metric}_ci95"])
    value = f"{row[metric] * factor:,.{digits}f}"
    value = f"[bold]{value}[/bold]" if row["feasible"] else value
    if not interval:
        return value
    return f"{value}\n[dim]{low:,.{digits}f}..{high:,.{digits}f}[/dim]"


def comparison_table(rows: Sequence[Row], title: str, width: int = WIDE) -> Table:
    """A rich table: estimates over 95 % intervals; policies within 3 % violations are bold and say yes."""
    columns = [column for column in _COLUMNS if column[4] or width >= WIDE]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("policy", no_wrap=True)
    for heading, *_ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("within\n3 %")
    for row in rows:
        cells = [_cell(row, metric, factor, digits, width >= _NARROW) for _, metric, factor, digits, _ in columns]
        table.add_row(row["policy"], *cells, "[green]yes[/green]" if row["feasible"] else "[red]no[/red]")
    return table


def print_comparison(console: Console, rows: Sequence[Row], title: str) -> None:
    console.print(comparison_table(rows, title, console.width))
    if rows and not rows[0]["online_requests"]:
        console.print("[yellow]no online request was counted in these episodes[/yellow]: raise episode_s or the rate")
    console.print(
        "[dim]95 % bootstrap intervals over paired episodes. useful: finished offline work in ideal seconds per "
        "instance-second; wasted: busy time lost to interruption and recomputation"
        + (
            f"; no scheduler can do more than {100 * rows[0]['useful_bound']:.1f} % useful.[/dim]"
            if rows
            else ".[/dim]"
        )
    )
    for key, what in (("rejected_online", "online"), ("rejected_offline", "offline")):
        rejected = max((row[key] for row in rows), default=0)
        if rejected:
            console.print(
                f"{rejected} {what} requests exceeded the model's context or the smallest KV cache: rejected and "
                "counted apart."
            )
    if rows and rows[0]["rejected_online"] > MANY_REJECTED * max(rows[0]["online_requests"], 1):
        console.print("[yellow]That is more than 1 % of the online work[/yellow]: the violation rates are of the rest.")
    for row in rows:
        by_class = row["class_violation_rates"]
        if len(by_class) > 1:
            shown = ", ".join(f"{name} {rate:.2%}" for name, rate in by_class.items())
            console.print(f"[dim]{row['policy']}: violations by SLO class {shown}[/dim]")


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader never sees half a file; what has no value (nan) is null, infinity is refused."""
    staged = path.with_suffix(path.suffix + ".part")
    staged.write_text(json.dumps(_nan_to_null(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    staged.replace(path)


def _nan_to_null(content: Any) -> Any:
    if isinstance(content, float) and math.isnan(content):
        return None
    if isinstance(content, Mapping):
        return {key: _nan_to_null(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_nan_to_null(value) for value in content]
    return content
