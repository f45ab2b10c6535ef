"""Tables for people and for programs. Figures are in ``figures.py``; both print what ``comparison.py`` computed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]

#: (heading, metric, factor, digits)
_COLUMNS = (
    ("violations\n[%]", "violation_rate", 100.0, 2),
    ("TTFT p99\n[ms]", "ttft_p99_s", 1e3, 0),
    ("TPOT p99\n[ms]", "tpot_p99_s", 1e3, 1),
    ("TBT p99\n[ms]", "tbt_p99_s", 1e3, 1),
    ("offline\n[tokens/s]", "offline_output_tokens_per_s", 1.0, 0),
    ("offline\n[requests/s]", "offline_requests_per_s", 1.0, 2),
    ("useful\n[%]", "offline_ideal_s_per_instance_s", 100.0, 1),
    ("wasted\n[%]", "wasted_fraction", 100.0, 1),
)


def _cell(row: Row, metric: str, factor: float, digits: int, bold: bool) -> str:
    value, (low, high) = row[metric] * factor, (bound * factor for bound in row[f"{metric}_ci95"])
    text = f"{value:,.{digits}f}"
    spread = f"{low:,.{digits}f}..{high:,.{digits}f}"
    return f"[bold]{text}[/bold]\n[dim]{spread}[/dim]" if bold else f"{text}\n[dim]{spread}[/dim]"


def comparison_table(rows: Sequence[Row], title: str) -> Table:
    """A rich table: estimates over 95 % intervals; infeasible policies are marked."""
    table = Table(title=title, title_justify="left", pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for heading, *_ in _COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("<= 3 %")
    for row in rows:
        cells = [_cell(row, metric, factor, digits, row["feasible"]) for _, metric, factor, digits in _COLUMNS]
        table.add_row(row["policy"], *cells, "[green]yes[/green]" if row["feasible"] else "[red]no[/red]")
    return table


def print_comparison(console: Console, rows: Sequence[Row], title: str) -> None:
    console.print(comparison_table(rows, title))
    console.print(
        "[dim]95 % bootstrap intervals over paired episodes. useful: finished offline work in ideal seconds per "
        "instance-second; wasted: busy time lost to interruption and recomputation.[/dim]"
    )
    for key, what in (("rejected_online", "online"), ("rejected_offline", "offline")):
        rejected = max((row[key] for row in rows), default=0)
        if rejected:
            console.print(f"{rejected} {what} requests were larger than any KV cache: rejected and counted apart.")


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader never sees half a file; refuses NaN and infinity, which JSON cannot carry."""
    staged = path.with_suffix(path.suffix + ".part")
    staged.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    staged.replace(path)
