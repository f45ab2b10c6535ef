"""The durable side of the offline jobs: files, batches, their requests and results, in one SQLite file.

Content lies in the database (256 KiB per row), not beside it: an output file and the state of its batch change in one
commit, and a crash leaves no orphans. A request belongs to the store until its result is committed; the unique key
(batch, custom_id) and the request's state make that happen once, whoever delivers it twice.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ooco_gym.bridge.jobs import endings, progress
from ooco_gym.bridge.jobs.database import Database, opening
from ooco_gym.bridge.jobs.records import (
    ENDED,
    ConflictError,
    Request,
    UnknownError,
    Work,
    batch_object,
    file_object,
    new_id,
)
from ooco_gym.errors import OocoError


class Store:
    """Opens the store at ``path``, making it where it is missing; ``clock`` gives Unix seconds.

    Opening puts right what a crash left: running requests are pending again, half-uploaded files are gone, half-done
    validations start over. Raises OocoError where another gateway has the store open. Every coroutine but those said to
    be repeatable returns after its effect is on disk.
    """

    def __init__(self, path: str | Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._database = Database(path)
        try:
            with opening(self._database.path):
                self._database.write_now(progress.recover).result()
        except BaseException:
            self._database.close()
            raise

    def close(self) -> None:
        """Commit what is queued and let go of the file; blocks for as long as that takes."""
        self._database.close()

    # files

    async def begin_file(self) -> int:
        """Start an upload, which nobody sees before ``complete_file``; returns its number."""

        def insert(connection: sqlite3.Connection) -> int:
            row = (new_id("file-"), self._now())
            sql = "INSERT INTO files (id, filename, purpose, bytes, created_at, complete) VALUES (?, '', '', 0, ?, 0)"
            return int(connection.execute(sql, row).lastrowid or 0)

        return await self._database.write(insert, durable=False)

    async def add_part(self, number: int, part: int, content: bytes) -> None:
        """The next piece of an upload."""
        sql = "INSERT INTO file_parts VALUES (?, ?, ?)"
        await self._database.write(lambda c: c.execute(sql, (number, part, content)).close(), durable=False)

    async def complete_file(
        self, number: int, filename: str, purpose: str, size: int, lifetime_s: int | None = None
    ) -> dict[str, Any]:
        """Make an upload a file; returns the file object."""

        def complete(connection: sqlite3.Connection) -> dict[str, Any]:
            expires_at = None if lifetime_s is None else self._now() + lifetime_s
            connection.execute(
                "UPDATE files SET filename = ?, purpose = ?, bytes = ?, expires_at = ?, complete = 1 WHERE number = ?",
                (filename, purpose, size, expires_at, number),
            )
            return file_object(_one(connection, "SELECT * FROM files WHERE number = ?", number))

        return await self._database.write(complete)

    async def discard_file(self, number: int) -> None:
        """Forget an upload that was not completed."""
        sql = "DELETE FROM files WHERE number = ? AND complete = 0"
        await self._database.write(lambda c: c.execute(sql, (number,)).close(), durable=False)

    async def file(self, file_id: str) -> dict[str, Any]:
        """The file object; raises UnknownError."""
        return await self._database.read(lambda c: file_object(_file(c, file_id)))

    async def files(
        self, after: str | None, limit: int, purpose: str | None = None, newest_first: bool = True
    ) -> tuple[list[dict[str, Any]], bool]:
        """A page of file objects and whether there are more; raises UnknownError for an unknown ``after``."""

        def page(connection: sqlite3.Connection) -> tuple[list[dict[str, Any]], bool]:
            start = None if after is None else _file(connection, after)["number"]
            chosen = ("complete = 1 AND purpose = ?", (purpose,)) if purpose else ("complete = 1", ())
            return _page(connection, "files", chosen, start, limit, newest_first, file_object)

        return await self._database.read(page)

    async def content(self, file_id: str) -> AsyncIterator[bytes]:
        """A file's bytes in pieces; raises UnknownError, also in the middle if the file is deleted meanwhile."""
        part = size = 0
        while True:
            piece, total = await self._database.read(partial(_piece, file_id=file_id, part=part))
            if piece is None:
                if size < total:
                    raise UnknownError(f"file '{file_id}' is not whole")
                return
            yield piece
            size += len(piece)
            part += 1

    async def delete_file(self, file_id: str) -> None:
        """Delete a file; raises UnknownError, and ConflictError while a batch that reads it is being validated."""

        def delete(connection: sqlite3.Connection) -> None:
            row = _file(connection, file_id)
            reader = connection.execute(
                "SELECT id FROM batches WHERE status = 'validating' AND input_file_id = ?", (file_id,)
            ).fetchone()
            if reader:
                raise ConflictError(f"file '{file_id}' is being read by batch '{reader[0]}', which is validating")
            connection.execute("DELETE FROM files WHERE number = ?", (row["number"],))

        await self._database.write(delete)

    # batches

    async def create_batch(
        self,
        input_file_id: str,
        endpoint: str,
        completion_window: str,
        window_s: int,
        metadata: Mapping[str, str] | None = None,
        output_lifetime_s: int | None = None,
    ) -> dict[str, Any]:
        """A batch in state validating; raises UnknownError or OocoError for a file that is not there or not for it."""

        def create(connection: sqlite3.Connection) -> dict[str, Any]:
            if _file(connection, input_file_id)["purpose"] != "batch":
                raise OocoError(f"file '{input_file_id}' is not for batches; upload it with purpose 'batch'")
            now = self._now()
            row = (
                *(new_id("batch_"), endpoint, input_file_id, completion_window),
                *(None if metadata is None else json.dumps(metadata), output_lifetime_s, now, now + window_s),
            )
            number = connection.execute(
                "INSERT INTO batches (id, endpoint, input_file_id, completion_window, status, metadata,"
                " output_lifetime_s, created_at, expires_at) VALUES (?, ?, ?, ?, 'validating', ?, ?, ?, ?)",
                row,
            ).lastrowid
            return batch_object(_one(connection, "SELECT * FROM batches WHERE number = ?", number))

        return await self._database.write(create)

    async def batch(self, batch_id: str) -> dict[str, Any]:
        """The batch object; raises UnknownError."""
        return await self._database.read(lambda c: batch_object(_batch(c, batch_id)))

    async def batches(self, after: str | None, limit: int) -> tuple[list[dict[str, Any]], bool]:
        """A page of batch objects, newest first, and whether there are more."""

        def page(connection: sqlite3.Connection) -> tuple[list[dict[str, Any]], bool]:
            start = None if after is None else _batch(connection, after)["number"]
            return _page(connection, "batches", ("1", ()), start, limit, True, batch_object)

        return await self._database.read(page)

    async def cancel_batch(self, batch_id: str) -> dict[str, Any]:
        """Ask for the end of a batch; raises ConflictError where it has ended otherwise. Twice is as good as once."""

        def cancel(connection: sqlite3.Connection) -> dict[str, Any]:
            status = _batch(connection, batch_id)["status"]
            if status == "finalizing" or (status in ENDED and status != "cancelled"):
                raise ConflictError(f"Cannot cancel a batch with status '{status}'.")
            if status in ("validating", "in_progress"):
                connection.execute(
                    "UPDATE batches SET status = 'cancelling', cancelling_at = ? WHERE id = ?", (self._now(), batch_id)
                )
            return batch_object(_batch(connection, batch_id))

        return await self._database.write(cancel)

    # the runner's side

    async def release(self) -> None:
        """Take back every claim: for a runner that starts. Repeatable."""
        await self._database.write(progress.release, durable=False)

    async def work(self, room: int) -> Work:
        """What there is to do now; claims up to ``room`` requests, oldest batch first. Repeatable."""
        return await self._database.write(lambda c: progress.work(c, max(0, room), self._now()), durable=False)

    async def add_requests(self, batch: int, rows: Sequence[tuple[int, str, str]]) -> None:
        """Lines (line, custom_id, body) of a batch being validated; seen only after ``activate``. Repeatable."""
        sql = (
            "INSERT INTO requests (batch, line, custom_id, body) SELECT ?, ?, ?, ?"
            " WHERE EXISTS (SELECT 1 FROM batches WHERE number = ? AND status = 'validating')"
        )
        values = [(batch, *row, batch) for row in rows]
        await self._database.write(lambda c: c.executemany(sql, values).close(), durable=False)

    async def forget_requests(self, batch: int) -> None:
        """Drop the lines of a batch still being validated, to start its validation over. Repeatable."""
        await self._database.write(lambda c: progress.forget(c, batch), durable=False)

    async def activate(self, batch: int) -> bool:
        """End of a validation that found no fault; False where the batch was cancelled or expired meanwhile."""
        sql = (
            "UPDATE batches SET status = 'in_progress', in_progress_at = ?,"
            " total = (SELECT count(*) FROM requests WHERE batch = number) WHERE number = ? AND status = 'validating'"
        )
        return await self._database.write(lambda c: c.execute(sql, (self._now(), batch)).rowcount == 1)

    async def fail(self, batch: int, errors: Sequence[Mapping[str, Any]]) -> bool:
        """End of a validation that found faults."""

        def fail(connection: sqlite3.Connection) -> bool:
            progress.forget(connection, batch)
            sql = (
                "UPDATE batches SET status = 'failed', failed_at = ?, errors = ?"
                " WHERE number = ? AND status = 'validating'"
            )
            return connection.execute(sql, (self._now(), json.dumps(errors), batch)).rowcount == 1

        return await self._database.write(fail)

    async def record(self, request: Request, is_error: bool, output: str) -> bool:
        """Commit the result of a request; False, without effect, where it has one or its batch has ended."""
        return await self._database.write(lambda c: progress.record(c, request, is_error, output, self._now()))

    async def finish(self, batch: int) -> str | None:
        """End a batch that is due: its two files and its last state in one commit; returns that state."""
        return await self._database.write(lambda c: endings.finish(c, batch, self._now()))

    async def purge(self) -> int:
        """Delete the files whose lifetime is over; returns how many."""
        sql = (
            "DELETE FROM files WHERE complete = 1 AND expires_at <= ? AND id NOT IN"
            " (SELECT input_file_id FROM batches WHERE status = 'validating')"
        )
        return await self._database.write(lambda c: c.execute(sql, (self._now(),)).rowcount, durable=False)

    def _now(self) -> int:
        return int(self._clock())


def _one(connection: sqlite3.Connection, sql: str, *values: Any) -> sqlite3.Row:
    row = connection.execute(sql, values).fetchone()
    assert isinstance(row, sqlite3.Row)
    return row


def _file(connection: sqlite3.Connection, file_id: str) -> sqlite3.Row:
    sql = "SELECT * FROM files WHERE id = ? AND complete = 1"
    row: sqlite3.Row | None = connection.execute(sql, (file_id,)).fetchone()
    if row is None:
        raise UnknownError(f"No such File object: {file_id}")
    return row


def _batch(connection: sqlite3.Connection, batch_id: str) -> sqlite3.Row:
    row: sqlite3.Row | None = connection.execute("SELECT * FROM batches WHERE id = ?", (batch_id,)).fetchone()
    if row is None:
        raise UnknownError(f"No batch found with id '{batch_id}'.")
    return row


def _piece(connection: sqlite3.Connection, file_id: str, part: int) -> tuple[bytes | None, int]:
    row = _file(connection, file_id)
    found = connection.execute(
        "SELECT content FROM file_parts WHERE file = ? AND part = ?", (row["number"], part)
    ).fetchone()
    return (found[0] if found else None), row["bytes"]


def _page(
    connection: sqlite3.Connection,
    table: str,
    chosen: tuple[str, tuple[Any, ...]],
    start: int | None,
    limit: int,
    newest_first: bool,
    make: Callable[[sqlite3.Row], dict[str, Any]],
) -> tuple[list[dict[str, Any]], bool]:
    """``limit`` rows beyond number ``start``, and whether there are more."""
    where, values = chosen
    sign, order = ("<", "DESC") if newest_first else (">", "ASC")
    if start is not None:
        where, values = f"{where} AND number {sign} ?", (*values, start)
    sql = f"SELECT * FROM {table} WHERE {where} ORDER BY number {order} LIMIT ?"
    rows = connection.execute(sql, (*values, limit + 1)).fetchall()
    return [make(row) for row in rows[:limit]], len(rows) > limit
