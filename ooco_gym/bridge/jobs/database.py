"""One SQLite file, one thread that writes it and one that reads it, so that an event loop never waits for a disk.

Writes that arrive together share one transaction and one fsync (group commit); each runs in a savepoint of its own, so
that a failing one takes no other with it. A *durable* write is answered after its fsync (synchronous=FULL); one that is
not may be lost with the power, never with the process, and is used only for what a restart does again anyway.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from ooco_gym.errors import OocoError

T = TypeVar("T")

APPLICATION_ID = 0x6F6F636F  # "ooco": tells our file from anybody else's SQLite file
SCHEMA_VERSION = 1
MOST_GROUPED = 256  # writes that share a transaction
BUSY_S = 10.0

SCHEMA = """
CREATE TABLE schema_version (version INTEGER NOT NULL);
CREATE TABLE files (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER,
    complete INTEGER NOT NULL CHECK (complete IN (0, 1))
);
CREATE TABLE file_parts (
    file INTEGER NOT NULL REFERENCES files (number) ON DELETE CASCADE,
    part INTEGER NOT NULL,
    content BLOB NOT NULL,
    PRIMARY KEY (file, part)
);
CREATE TABLE batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    endpoint TEXT NOT NULL,
    input_file_id TEXT NOT NULL,
    completion_window TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('validating', 'failed', 'in_progress', 'finalizing', 'completed', 'expired',
                                           'cancelling', 'cancelled')),
    metadata TEXT,
    errors TEXT,
    output_lifetime_s INTEGER,
    output_file_id TEXT,
    error_file_id TEXT,
    total INTEGER NOT NULL DEFAULT 0,
    completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    in_progress_at INTEGER,
    finalizing_at INTEGER,
    completed_at INTEGER,
    failed_at INTEGER,
    expired_at INTEGER,
    cancelling_at INTEGER,
    cancelled_at INTEGER
);
CREATE INDEX batches_by_status ON batches (status);
CREATE TABLE requests (
    batch INTEGER NOT NULL REFERENCES batches (number) ON DELETE CASCADE,
    line INTEGER NOT NULL,
    custom_id TEXT NOT NULL,
    body TEXT NOT NULL,
    state TEXT NOT NULL DEFAULT 'pending' CHECK (state IN ('pending', 'running', 'done')),
    PRIMARY KEY (batch, line),
    UNIQUE (batch, custom_id)
);
CREATE INDEX requests_pending ON requests (batch, line) WHERE state = 'pending';
CREATE INDEX requests_running ON requests (batch, line) WHERE state = 'running';
CREATE TABLE results (
    batch INTEGER NOT NULL,
    custom_id TEXT NOT NULL,
    is_error INTEGER NOT NULL CHECK (is_error IN (0, 1)),
    output TEXT NOT NULL,
    PRIMARY KEY (batch, custom_id),
    FOREIGN KEY (batch, custom_id) REFERENCES requests (batch, custom_id) ON DELETE CASCADE
);
"""


class StoreClosedError(RuntimeError):
    """The store was closed before this piece of work was done."""


class Database:
    """Opens or makes the file at ``path`` and keeps every other process out of it until ``close``.

    Raises OocoError where the file belongs to a running gateway, to another program or to a newer version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()  # SQLite takes some relative names for something else than a file
        self._lock = _locked(self.path)
        try:
            with opening(self.path):
                self._writer = _connect(self.path)
                _prepare(self._writer, self.path)
                self._reader = _connect(self.path)
                self._reader.execute("PRAGMA query_only = ON")
        except BaseException:
            os.close(self._lock)
            raise
        self._closed = False
        self._writes: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._reads: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._write_on, name="ooco-store-writer", daemon=True),
            threading.Thread(target=self._read_on, name="ooco-store-reader", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def write_now(self, work: Callable[[sqlite3.Connection], T], durable: bool = True) -> Future[T]:
        """Queue a write; the future is done when it is committed."""
        return self._queue(self._writes, _Work(work, durable))

    async def write(self, work: Callable[[sqlite3.Connection], T], durable: bool = True) -> T:
        return await asyncio.wrap_future(self.write_now(work, durable))

    async def read(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Read what was committed before this call."""
        return await asyncio.wrap_future(self._queue(self._reads, _Work(work, False)))

    def close(self) -> None:
        """Finish what is queued, close the file and let another process in."""
        if self._closed:
            return
        self._closed = True
        self._writes.put(None)
        self._reads.put(None)
        for thread in self._threads:
            thread.join()
        self._reader.close()
        self._writer.close()
        os.close(self._lock)

    def _queue(self, works: queue.SimpleQueue[_Work | None], work: _Work) -> Future[Any]:
        if self._closed:
            raise StoreClosedError(f"{self.path} was closed")
        works.put(work)
        return work.future

    def _read_on(self) -> None:
        while (work := self._reads.get()) is not None:
            if work.future.set_running_or_notify_cancel():
                try:
                    work.future.set_result(work.call(self._reader))
                except Exception as error:
                    work.future.set_exception(error)

    def _write_on(self) -> None:
        while (work := self._writes.get()) is not None:
            group, is_last = [work], False
            while len(group) < MOST_GROUPED:
                try:
                    more = self._writes.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    is_last = True
                    break
                group.append(more)
            self._commit([work for work in group if work.future.set_running_or_notify_cancel()])
            if is_last:
                return

    def _commit(self, group: list[_Work]) -> None:
        """Run a group of writes in one transaction and answer each when it is on disk."""
        connection = self._writer
        answers: list[tuple[Callable[[Any], None], Any]] = []
        try:
            connection.execute(f"PRAGMA synchronous = {'FULL' if any(w.durable for w in group) else 'NORMAL'}")
            connection.execute("BEGIN IMMEDIATE")
            for work in group:
                connection.execute("SAVEPOINT one")
                try:
                    answer: Any = work.call(connection)
                except Exception as error:
                    if not connection.in_transaction:  # a full disk may have rolled all of it back
                        raise
                    connection.execute("ROLLBACK TO one")
                    answers.append((work.future.set_exception, error))
                else:
                    answers.append((work.future.set_result, answer))
                connection.execute("RELEASE one")
            connection.execute("COMMIT")
        except Exception as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            answers = [(work.future.set_exception, error) for work in group]
        for give, answer in answers:
            give(answer)


class _Work:
    """A function over a connection, and the future of its answer."""

    def __init__(self, call: Callable[[sqlite3.Connection], Any], durable: bool) -> None:
        self.call = call
        self.durable = durable
        self.future: Future[Any] = Future()


def _locked(path: Path) -> int:
    """Hold a lock beside the file; the kernel lets go of it however the process ends."""
    lock = path.with_name(path.name + ".lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise OocoError(
            f"cannot open the job store {path}: {error.strerror}; its folder must exist and be writable"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise OocoError(
            f"the job store {path} is in use by process {owner}: one gateway per store, stop that one or choose another"
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


@contextmanager
def opening(path: Path) -> Iterator[None]:
    """What SQLite says of a file that it cannot use, in one sentence."""
    try:
        yield
    except sqlite3.Error as error:
        raise OocoError(
            f"cannot open the job store {path}: {error}; a SQLite file of ours or no file is accepted"
        ) from error


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA journal_size_limit = 67108864")
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Make the tables in a new file; refuse a file that is not ours or not of this version."""
    connection.execute("PRAGMA synchronous = FULL")
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if tables == 0:
        connection.executescript(
            f"BEGIN IMMEDIATE; PRAGMA application_id = {APPLICATION_ID}; {SCHEMA}"
            f"INSERT INTO schema_version VALUES ({SCHEMA_VERSION}); COMMIT;"
        )
        return
    if application != APPLICATION_ID:
        raise OocoError(f"{path} is a SQLite file of another program; a job store of ours or no file is accepted")
    versions = [row[0] for row in connection.execute("SELECT version FROM schema_version")]
    if versions != [SCHEMA_VERSION]:
        has = ", ".join(map(str, versions)) or "none"
        raise OocoError(f"the job store {path} has schema version {has}; this program reads version {SCHEMA_VERSION}")
