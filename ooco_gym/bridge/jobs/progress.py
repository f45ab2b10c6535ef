"""How requests move from pending to running to done: the steps of the runner, each within one transaction."""

from __future__ import annotations

import sqlite3

from ooco_gym.bridge.jobs.records import Request, Waiting, Work, request_id


def recover(connection: sqlite3.Connection) -> None:
    """Put right what a crash left: no half-uploaded file, no half-done validation, nothing running."""
    connection.execute("DELETE FROM files WHERE complete = 0")
    connection.execute("DELETE FROM requests WHERE batch IN (SELECT number FROM batches WHERE status = 'validating')")
    release(connection)


def release(connection: sqlite3.Connection) -> None:
    """Make what was claimed pending again."""
    connection.execute(
        "UPDATE requests SET state = 'pending' WHERE state = 'running' AND batch IN"
        " (SELECT number FROM batches WHERE status IN ('in_progress', 'cancelling'))"
    )


def forget(connection: sqlite3.Connection, batch: int) -> None:
    """Drop the lines of a batch that is still being validated."""
    connection.execute(
        "DELETE FROM requests WHERE batch = ? AND EXISTS"
        " (SELECT 1 FROM batches WHERE number = ? AND status = 'validating')",
        (batch, batch),
    )


def work(connection: sqlite3.Connection, room: int, now: int) -> Work:
    """What there is to do; claims up to ``room`` requests."""
    ending = connection.execute(
        "SELECT number FROM batches WHERE status IN ('finalizing', 'cancelling')"
        " OR (status IN ('validating', 'in_progress') AND expires_at <= ?) ORDER BY number",
        (now,),
    ).fetchall()
    validating = connection.execute(
        "SELECT number, id, endpoint, input_file_id FROM batches"
        " WHERE status = 'validating' AND expires_at > ? ORDER BY number",
        (now,),
    ).fetchall()
    rows = connection.execute(  # CROSS JOIN: batches in their order, and of each only what is pending
        "SELECT r.batch, r.line, r.custom_id, b.id, b.endpoint, r.body FROM batches b CROSS JOIN requests r"
        " ON r.batch = b.number AND r.state = 'pending'"
        " WHERE b.status = 'in_progress' AND b.expires_at > ? ORDER BY b.number, r.line LIMIT ?",
        (now, room),
    ).fetchall()
    claimed = [Request(batch, line, name, request_id(b, line), url, body) for batch, line, name, b, url, body in rows]
    connection.executemany(
        "UPDATE requests SET state = 'running' WHERE batch = ? AND line = ?", [(r.batch, r.line) for r in claimed]
    )
    undone = connection.execute(
        "SELECT coalesce(sum(total - completed - failed), 0) FROM batches WHERE status = 'in_progress'"
    ).fetchone()[0]
    running = connection.execute(
        "SELECT count(*) FROM batches b CROSS JOIN requests r ON r.batch = b.number AND r.state = 'running'"
        " WHERE b.status = 'in_progress'"
    ).fetchone()[0]
    return Work([row[0] for row in ending], [Waiting(*row) for row in validating], claimed, undone - running)


def record(connection: sqlite3.Connection, request: Request, is_error: bool, output: str, now: int) -> bool:
    """Commit a result if it is the first and its batch has not ended; the last one makes the batch finalizing."""
    status = connection.execute("SELECT status FROM batches WHERE number = ?", (request.batch,)).fetchone()[0]
    if status not in ("in_progress", "cancelling"):
        return False
    inserted = connection.execute(
        "INSERT OR IGNORE INTO results (batch, custom_id, is_error, output) VALUES (?, ?, ?, ?)",
        (request.batch, request.custom_id, is_error, output),
    ).rowcount
    if not inserted:
        return False
    connection.execute("UPDATE requests SET state = 'done' WHERE batch = ? AND line = ?", (request.batch, request.line))
    column = "failed" if is_error else "completed"
    connection.execute(f"UPDATE batches SET {column} = {column} + 1 WHERE number = ?", (request.batch,))
    connection.execute(
        "UPDATE batches SET status = 'finalizing', finalizing_at = ?"
        " WHERE number = ? AND status = 'in_progress' AND completed + failed = total",
        (now, request.batch),
    )
    return True
