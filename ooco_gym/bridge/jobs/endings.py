"""How a batch ends: its lines become an output file and an error file, in the transaction that changes its state."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

from ooco_gym.bridge.jobs.records import PART_BYTES, error_line, new_id, request_id

NOT_RUN = {
    "expired": ("batch_expired", "This request could not be executed before the completion window expired."),
    "cancelled": ("batch_cancelled", "This request was not executed because its batch was cancelled."),
}


def finish(connection: sqlite3.Connection, number: int, now: int) -> str | None:
    """End batch ``number`` if it is due and return its last state; None where there is nothing to end.

    Every request of the batch has exactly one line in one of the two files: its result, or that it was not run. The
    rows of its requests go with the same commit: an ended batch costs what its files cost.
    """
    batch = connection.execute("SELECT * FROM batches WHERE number = ?", (number,)).fetchone()
    status = _last_status(batch, now) if batch else None
    if status is None:
        return None
    output_id = error_id = None
    failed = batch["failed"]
    if batch["in_progress_at"] is not None:
        code, message = NOT_RUN.get(status, ("not_run", "This request was not executed."))
        rest = [
            (number, custom_id, error_line(request_id(batch["id"], line), custom_id, code, message))
            for line, custom_id in connection.execute(
                "SELECT line, custom_id FROM requests WHERE batch = ? AND state <> 'done'", (number,)
            )
        ]
        connection.executemany("INSERT INTO results (batch, custom_id, is_error, output) VALUES (?, ?, 1, ?)", rest)
        failed += len(rest)
        output_id = _write_file(connection, batch, False, now)
        error_id = _write_file(connection, batch, True, now)
    connection.execute(
        f"UPDATE batches SET status = ?, {status}_at = ?, failed = ?, output_file_id = ?, error_file_id = ?"
        " WHERE number = ?",
        (status, now, failed, output_id, error_id, number),
    )
    connection.execute("DELETE FROM results WHERE batch = ?", (number,))
    connection.execute("DELETE FROM requests WHERE batch = ?", (number,))
    return status


def _last_status(batch: sqlite3.Row, now: int) -> str | None:
    if batch["status"] == "finalizing":
        return "completed"
    if batch["status"] == "cancelling":
        return "cancelled"
    if batch["status"] in ("validating", "in_progress") and batch["expires_at"] <= now:
        return "expired"
    return None


def _write_file(connection: sqlite3.Connection, batch: sqlite3.Row, is_error: bool, now: int) -> str | None:
    """One of the two files, its lines in the order of the input; None where it would be empty."""
    lines = connection.execute(
        "SELECT results.output FROM requests JOIN results USING (batch, custom_id)"
        " WHERE batch = ? AND is_error = ? ORDER BY requests.line",
        (batch["number"], is_error),
    )
    first = next(lines, None)
    if first is None:
        return None
    kind = "error" if is_error else "output"
    file_id = new_id("file-")
    expires_at = None if batch["output_lifetime_s"] is None else now + batch["output_lifetime_s"]
    number = connection.execute(
        "INSERT INTO files (id, filename, purpose, bytes, created_at, expires_at, complete)"
        " VALUES (?, ?, 'batch_output', 0, ?, ?, 1)",
        (file_id, f"{batch['id']}_{kind}.jsonl", now, expires_at),
    ).lastrowid
    size = 0
    for part, content in enumerate(_parts(first[0], lines)):
        connection.execute("INSERT INTO file_parts VALUES (?, ?, ?)", (number, part, content))
        size += len(content)
    connection.execute("UPDATE files SET bytes = ? WHERE number = ?", (size, number))
    return file_id


def _parts(first: str, rest: sqlite3.Cursor) -> Iterator[bytes]:
    buffer = bytearray(first.encode() + b"\n")
    for (line,) in rest:
        if len(buffer) >= PART_BYTES:
            yield bytes(buffer)
            buffer.clear()
        buffer += line.encode() + b"\n"
    yield bytes(buffer)
