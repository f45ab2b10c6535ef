"""Reading trace files: fast when the file is good, exact about the culprit when it is not.

A good file is parsed by numpy in one go. Only when that fails, or a value is out of range, is the file read
again row by row to find the first bad value; so the messages cost nothing until they are needed.
"""

from __future__ import annotations

import csv
import gzip
import os
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from ooco_gym.errors import OocoError
from ooco_gym.workload.checks import MAX_TOKENS
from ooco_gym.workload.randomness import FloatArray, IntArray
from ooco_gym.workload.requests import Requests

TRACE_COLUMNS = ("arrival_s", "prompt_tokens", "output_tokens")
LENGTH_COLUMNS = ("prompt_tokens", "output_tokens")


def read_trace(path: str | os.PathLike[str]) -> Requests:
    """Requests of a ``.csv`` or ``.csv.gz`` file with columns arrival_s, prompt_tokens, output_tokens.

    Other columns are ignored. Rows out of order are sorted, with a warning that names the first one. Raises
    OocoError naming the file, its line (1 is the header) and the column of the first bad value.
    """
    file = Path(path)
    values = _read(file, TRACE_COLUMNS)
    arrival_s = values[:, 0]
    order = np.argsort(arrival_s, kind="stable")
    late = np.flatnonzero(np.diff(arrival_s) < 0)
    if late.size:
        line = _line_of_row(file, int(late[0]) + 1)
        warnings.warn(f"{file}: line {line}: arrival_s is below the row above; sorted", stacklevel=2)
        values = values[order]
    return Requests(values[:, 0], values[:, 1].astype(np.int32), values[:, 2].astype(np.int32))


def read_lengths(path: str | os.PathLike[str]) -> tuple[IntArray, IntArray]:
    """(prompt_tokens, output_tokens), int32 (n,) each, of a length table; errors as in :func:`read_trace`."""
    values = _read(Path(path), LENGTH_COLUMNS).astype(np.int32)
    return np.ascontiguousarray(values[:, 0]), np.ascontiguousarray(values[:, 1])


def find_data(filename: str | os.PathLike[str], data_dir: str | os.PathLike[str] | None = None) -> Path:
    """Path of a data file: as given if it exists, else inside the data folder.

    That is ``data_dir``, else the environment variable OOCO_DATA, else ``../shared/data`` relative to the
    checkout. In each folder its ``traces`` subfolder is tried too. Raises OocoError that says where was
    looked.
    """
    given = Path(filename).expanduser()
    if given.is_file():
        return given
    folder = Path(data_dir or os.environ.get("OOCO_DATA") or _shared_data()).expanduser()
    for place in (folder, folder / "traces"):
        if not given.is_absolute() and (place / given).is_file():
            return place / given
    where = f" as given or in {folder} and {folder / 'traces'}" if not given.is_absolute() else ""
    raise OocoError(
        f"data file '{filename}' not found{where}: give the path of a file, "
        "or the folder that holds it with data_dir= or the environment variable OOCO_DATA"
    )


def _shared_data() -> Path:
    checkout = Path(__file__).resolve().parents[2]
    return checkout.parent / "shared" / "data"


def _read(file: Path, columns: tuple[str, ...]) -> FloatArray:
    """The columns of a file as float64 (n, len(columns)), every value checked."""
    try:
        values = _parse(file, columns)
    except FileNotFoundError:
        raise OocoError(f"{file}: no such file") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise OocoError(f"{file}: cannot be read as a .csv or .csv.gz file: {error}") from None
    if values is None or not _all_good(values, columns):
        raise OocoError(_first_problem(file, columns))
    return values


def _parse(file: Path, columns: tuple[str, ...]) -> FloatArray | None:
    """Numbers of the file, or None where some text is not a number."""
    with _open(file) as text:
        used = _column_indices(file, next(csv.reader(text), []), columns)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # "input contained no data": told as an error
                return np.loadtxt(text, delimiter=",", usecols=used, comments=None, quotechar='"', ndmin=2)
        except UnicodeDecodeError:
            raise
        except ValueError:
            return None


def _column_indices(file: Path, header: list[str], columns: tuple[str, ...]) -> list[int]:
    names = [name.strip() for name in header]
    if not any(names):
        raise OocoError(f"{file}: the file is empty, it must start with the header {','.join(columns)}")
    for column in columns:
        if column not in names:
            raise OocoError(f"{file}: line 1: column {column} is missing, needed are {','.join(columns)}")
    return [names.index(column) for column in columns]


def _all_good(values: FloatArray, columns: tuple[str, ...]) -> bool:
    tokens = values[:, len(columns) - 2 :]
    return bool(
        len(values)
        and np.isfinite(values).all()
        and values.min() >= 0
        and tokens.min() >= 1
        and tokens.max() <= MAX_TOKENS
        and (tokens == np.rint(tokens)).all()
    )


def _first_problem(file: Path, columns: tuple[str, ...]) -> str:
    """The careful path: the sentence about the first bad value in the file."""
    rows = _rows(file)
    used = _column_indices(file, next(rows)[1], columns)
    n_rows = 0
    for line, row in rows:
        n_rows += 1
        for column, index in zip(columns, used, strict=True):
            problem = _problem(column, row[index].strip() if index < len(row) else "")
            if problem:
                return f"{file}: line {line}: {column} {problem}"
    if n_rows == 0:
        return f"{file}: no rows below the header"
    return f"{file}: cannot be parsed as comma-separated numbers"


def _problem(column: str, text: str) -> str | None:
    """What is wrong with one value, or None."""
    if not text:
        return "is empty, it must be a number"
    try:
        value = float(text)
    except ValueError:
        return f"is '{text}', it must be a number"
    if not np.isfinite(value):
        return f"is {text}, it must be finite"
    if column == "arrival_s":
        return f"is {text}, it must be at least 0" if value < 0 else None
    if value != int(value):
        return f"is {text}, it must be a whole number"
    return None if 1 <= value <= MAX_TOKENS else f"is {text}, it must lie between 1 and {MAX_TOKENS}"


def _line_of_row(file: Path, row: int) -> int:
    """Line in the file of data row ``row`` (0 is the first below the header): blank lines count too."""
    for index, (line, _) in enumerate(_rows(file)):
        if index == row + 1:
            return line
    raise IndexError(row)


def _rows(file: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of the header and of every row that is not blank."""
    with _open(file) as text:
        reader = csv.reader(text)
        for cells in reader:
            if cells:
                yield reader.line_num, cells


def _open(file: Path) -> IO[str]:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    return open(file, encoding="utf-8-sig", newline="")
