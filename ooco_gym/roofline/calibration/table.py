"""A table of timings as a CSV file: its columns, and its rows checked and read as measurements."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ooco_gym.errors import OocoError
from ooco_gym.roofline.calibration.measurement import Measurement, balanced
from ooco_gym.roofline.cost import build_cost
from ooco_gym.roofline.hardware import CalibratedConstants, HardwareSpec
from ooco_gym.roofline.model import resolve_model

#: Columns of a tidy table and what they hold; ``kind`` and ``ms`` are needed in every row, the rest by kind.
COLUMNS = {
    "kind": "iteration: a whole iteration; or one kernel: gemm, elementwise (norms, rotary embedding, activation and "
    "residuals of one layer), attention (of one layer), allreduce (one of a layer's two)",
    "ms": "measured milliseconds",
    "model": "preset name or path of a config.json; needed by every kind but gemm",
    "tp": "tensor-parallel degree (1)",
    "tokens": "rows T: of gemm, elementwise and allreduce",
    "n": "columns out of a gemm, on one rank",
    "k": "columns in of a gemm, on one rank",
    "prefills": "prefill chunks in the batch, of equal size (1 where prefill_tokens is above 0)",
    "prefill_tokens": "new tokens of each chunk",
    "past_tokens": "tokens of each chunk's prompt that are in the KV cache already",
    "decodes": "decoding sequences in the batch",
    "context_tokens": "context of each of them",
}

_ANY_DEVICE = HardwareSpec("any", 1e15, 1e12, 1e11, 1e11, CalibratedConstants(*[1.0] * 8))


def read_table(path: str | Path, host_ms: float = 0.0) -> list[Measurement]:
    """Measurements of a CSV file with the columns of COLUMNS; raises OocoError naming the row and the column.

    ``host_ms`` is taken off whole iterations. Rows are grouped by model for the uncertainty and come :func:`balanced`.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            header = reader.fieldnames or []
            unknown = [name for name in header if name not in COLUMNS]
            if unknown:
                raise OocoError(f"{path}: unknown column '{unknown[0]}', known are {', '.join(COLUMNS)}")
            for name in ("kind", "ms"):
                if name not in header:
                    raise OocoError(f"{path}: column '{name}' is missing, known are {', '.join(COLUMNS)}")
            rows = [_read_row(f"{path}, row {number}", values, host_ms) for number, values in enumerate(reader, 1)]
    except OSError as error:
        raise OocoError(f"{path}: {error.strerror or error}, a readable CSV file is needed") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise OocoError(f"{path}: not a CSV file ({error})") from None
    if not rows:
        raise OocoError(f"{path}: no rows below the header")
    return balanced(rows)


def _read_row(where: str, values: Mapping[str, str | None], host_ms: float) -> Measurement:
    given: dict[str, Any] = {}
    for name in COLUMNS:
        text = (values.get(name) or "").strip()
        if name in ("kind", "model") or not text:
            continue
        try:
            given[name] = int(text) if name == "tp" else float(text)
        except ValueError:
            whole = "a whole number" if name == "tp" else "a number"
            raise OocoError(f"{where}: {name} is '{text}', {whole} is needed") from None
    if "ms" not in given or not 0 < given["ms"] < math.inf:
        raise OocoError(f"{where}: ms is {given.get('ms', 'empty')}, a positive number is needed")
    if given.get("prefill_tokens"):
        given.setdefault("prefills", 1.0)
    kind, name = (values.get("kind") or "").strip(), (values.get("model") or "").strip()
    try:
        model = resolve_model(name) if name else None
        row = Measurement(
            kind,
            given.pop("ms") / 1e3,
            model,
            group=name,
            host_s=host_ms / 1e3 if kind == "iteration" else 0.0,
            **given,
        )
        if model is not None:
            build_cost(model, _ANY_DEVICE, tp=row.tp)  # refuses a tp that does not divide the heads
    except OocoError as error:
        raise OocoError(f"{where}: {error}") from None
    return row
