"""The store alone: what survives, what is refused, and random work against a plain model."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ooco_gym.bridge.jobs import Store
from ooco_gym.bridge.jobs.records import Request
from ooco_gym.errors import OocoError
from tests.bridge.jobs_server import URL, Clock


def crash_copy(store: Store, folder: Path) -> Path:
    """The file as a SIGKILL at this instant would leave it."""
    path = store._database.path
    folder.mkdir()
    for suffix in ("", "-wal"):
        shutil.copy(f"{path}{suffix}", folder / f"{path.name}{suffix}")
    return folder / path.name


async def upload(store: Store, *pieces: bytes) -> str:
    number = await store.begin_file()
    for part, piece in enumerate(pieces):
        await store.add_part(number, part, piece)
    return str((await store.complete_file(number, "a", "batch", sum(map(len, pieces))))["id"])


async def active(store: Store, requests: int) -> str:
    """A batch in progress."""
    batch = await store.create_batch(await upload(store, b"x"), URL, "24h", 1000)
    [waiting] = (await store.work(0)).validating
    await store.add_requests(waiting.number, [(number, f"id-{number}", "{}") for number in range(1, requests + 1)])
    assert await store.activate(waiting.number)
    return str(batch["id"])


async def text(store: Store, file_id: str | None) -> str:
    return b"".join([piece async for piece in store.content(file_id)]).decode() if file_id else ""


def test_two_gateways_on_one_store(tmp_path: Path) -> None:
    store = Store(tmp_path / "jobs.sqlite")
    sentence = rf"jobs.sqlite is in use by process {os.getpid()}: one gateway per store"
    with pytest.raises(OocoError, match=sentence):
        Store(tmp_path / "jobs.sqlite")
    code = "import sys; from ooco_gym.bridge.jobs import Store; Store(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path / "jobs.sqlite")]
    other = subprocess.run(command, capture_output=True, text=True, check=False)
    assert other.returncode != 0
    assert f"in use by process {os.getpid()}" in other.stderr
    store.close()
    store.close()
    Store(tmp_path / "jobs.sqlite").close()


def test_files_that_are_not_a_store(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a database, but long enough to be looked at as one" * 30)
    with pytest.raises(OocoError, match="file is not a database"):
        Store(tmp_path / "text")
    with sqlite3.connect(tmp_path / "other") as connection:
        connection.execute("CREATE TABLE notes (note TEXT)")
    connection.close()
    with pytest.raises(OocoError, match="of another program"):
        Store(tmp_path / "other")
    Store(tmp_path / "newer").close()
    with sqlite3.connect(tmp_path / "newer") as connection:
        connection.execute("UPDATE schema_version SET version = 2")
    connection.close()
    with pytest.raises(OocoError, match="schema version 2; this program reads version 1"):
        Store(tmp_path / "newer")
    with pytest.raises(OocoError, match="its folder must exist"):
        Store(tmp_path / "missing" / "jobs.sqlite")


def test_what_is_promised_is_synced(tmp_path: Path) -> None:
    store = Store(tmp_path / "jobs.sqlite")
    connection = store._database._writer
    assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert connection.execute("PRAGMA foreign_keys").fetchone()[0] == 1

    def level(c: sqlite3.Connection) -> int:
        return int(c.execute("PRAGMA synchronous").fetchone()[0])

    assert store._database.write_now(level).result() == 2  # FULL
    assert store._database.write_now(level, durable=False).result() == 1
    store.close()


def test_a_result_is_committed_once(tmp_path: Path) -> None:
    async def work() -> None:
        store = Store(tmp_path / "jobs.sqlite")
        await active(store, 2)
        one, two = (await store.work(9)).claimed
        assert await store.record(one, False, "first")
        assert not await store.record(one, False, "second")
        assert not await store.record(one, True, "third")
        answers = await asyncio.gather(*(store.record(two, False, f"{n}") for n in range(20)))
        assert sum(answers) == 1
        [number] = (await store.work(9)).ending
        assert await store.finish(number) == "completed"
        assert await store.finish(number) is None
        assert not await store.record(two, False, "late")
        [batch], _ = await store.batches(None, 9)
        assert batch["request_counts"] == {"total": 2, "completed": 2, "failed": 0}
        assert await text(store, batch["output_file_id"]) == "first\n0\n"
        store.close()

    asyncio.run(work())


def test_a_batch_that_is_cancelled_stays_so_when_its_last_result_comes(tmp_path: Path) -> None:
    async def work() -> None:
        store = Store(tmp_path / "jobs.sqlite")
        batch_id = await active(store, 1)
        [request] = (await store.work(9)).claimed
        await store.cancel_batch(batch_id)
        assert await store.record(request, False, "late")
        [number] = (await store.work(9)).ending
        assert await store.finish(number) == "cancelled"
        assert await text(store, (await store.batch(batch_id))["output_file_id"]) == "late\n"
        store.close()

    asyncio.run(work())


def test_a_write_that_fails_takes_no_other_with_it(tmp_path: Path) -> None:
    async def work() -> None:
        store = Store(tmp_path / "jobs.sqlite")
        file_id = await upload(store, b"x")
        create: Callable[[str], Awaitable[Any]] = lambda name: store.create_batch(name, URL, "24h", 9)  # noqa: E731
        answers = await asyncio.gather(
            *(create(file_id if n % 2 else "file-none") for n in range(40)), return_exceptions=True
        )
        assert [isinstance(answer, OocoError) for answer in answers] == [n % 2 == 0 for n in range(40)]
        assert len((await store.batches(None, 100))[0]) == 20

        def half(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM batches")
            raise OocoError("half-way")

        answers = await asyncio.gather(
            *(create(file_id), store._database.write(half), create(file_id)), return_exceptions=True
        )
        assert str(answers[1]) == "half-way"
        assert len((await store.batches(None, 100))[0]) == 22
        store.close()

    asyncio.run(work())


def test_a_crash_in_an_upload_or_a_validation_leaves_no_half(tmp_path: Path) -> None:
    async def work() -> None:
        store = Store(tmp_path / "jobs.sqlite")
        kept = await upload(store, b"ab", b"c")
        number = await store.begin_file()
        await store.add_part(number, 0, b"half")
        await store.create_batch(kept, URL, "24h", 9)
        [waiting] = (await store.work(0)).validating
        await store.add_requests(waiting.number, [(1, "a", "{}")])
        after = Store(crash_copy(store, tmp_path / "crash"))
        files, _ = await after.files(None, 9)
        assert [file["id"] for file in files] == [kept]
        assert await text(after, kept) == "abc"
        count = "SELECT (SELECT count(*) FROM file_parts) * 100 + (SELECT count(*) FROM requests)"
        assert await after._database.read(lambda c: c.execute(count).fetchone()[0]) == 200
        assert (await after.work(9)).validating == [waiting]
        after.close()
        store.close()

    asyncio.run(work())


def test_a_batch_does_not_lose_its_file_while_it_is_read(tmp_path: Path) -> None:
    async def work() -> None:
        store = Store(tmp_path / "jobs.sqlite")
        file_id = await upload(store, b"x")
        await store.create_batch(file_id, URL, "24h", 9)
        with pytest.raises(OocoError, match="which is validating"):
            await store.delete_file(file_id)
        [waiting] = (await store.work(0)).validating
        await store.fail(waiting.number, [{"code": "empty_file", "line": None, "message": "", "param": None}])
        await store.delete_file(file_id)
        store.close()

    asyncio.run(work())


def test_looking_for_work_does_not_read_what_is_done(tmp_path: Path) -> None:
    """A look at 50,000 requests per result would make a large batch slow."""
    store, statements = Store(tmp_path / "jobs.sqlite"), []
    connection = store._database._writer
    connection.set_trace_callback(statements.append)
    asyncio.run(store.work(4))
    connection.set_trace_callback(None)
    plans = [
        "; ".join(step["detail"] for step in connection.execute(f"EXPLAIN QUERY PLAN {statement}"))
        for statement in statements
        if statement.startswith("SELECT")
    ]
    assert len(plans) == 5
    assert [index for plan in plans for index in ("requests_pending", "requests_running") if index in plan] == [
        *("requests_pending", "requests_running")
    ]
    assert "autoindex_requests" not in " ".join(plans)
    store.close()


class Model:
    """What the store must hold: batches by id with their requests, what was answered, and how they end."""

    def __init__(self) -> None:
        self.total: dict[str, int] = {}
        self.answers: dict[str, dict[str, tuple[bool, str]]] = {}
        self.status: dict[str, str] = {}
        self.claimed: list[Request] = []

    def names(self, batch_id: str) -> list[str]:
        return [f"id-{number}" for number in range(1, self.total[batch_id] + 1)]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), steps=st.integers(10, 60))
def test_random_work_with_crashes(tmp_path_factory: pytest.TempPathFactory, seed: int, steps: int) -> None:
    """After any work and any crash: no request lost, none answered twice, and each in exactly one of the two files."""
    folder, rng = tmp_path_factory.mktemp("random"), random.Random(seed)
    asyncio.run(_random_work(folder, rng, steps))


async def _random_work(folder: Path, rng: random.Random, steps: int) -> None:
    clock, model = Clock(), Model()
    store, crashes = Store(folder / "jobs.sqlite", clock), 0
    for _ in range(steps):
        action = rng.choice(["new", "claim", "record", "record", "record", "cancel", "later", "end", "crash", "stop"])
        if action == "new":
            size = rng.randint(1, 5)
            batch_id = await active(store, size)
            model.total[batch_id], model.answers[batch_id] = size, {}
            model.status[batch_id] = "in_progress"
        elif action == "claim":
            claimed = (await store.work(rng.randint(0, 4))).claimed
            order = [(request.batch, request.line) for request in claimed]
            assert order == sorted(order)
            held = {request.request_id for request in model.claimed}
            assert not held & {request.request_id for request in claimed}
            model.claimed += claimed
        elif action == "record" and model.claimed:
            request = rng.choice(model.claimed)
            if rng.random() < 0.8:  # else it is delivered once more later
                model.claimed.remove(request)
            _record(
                model,
                request,
                *(answer := (rng.random() < 0.3, f"{rng.random()}")),
                await store.record(request, *answer),
            )
        elif action == "cancel" and model.status:
            batch_id = rng.choice(list(model.status))
            try:
                await store.cancel_batch(batch_id)
                if model.status[batch_id] == "in_progress":
                    model.status[batch_id] = "cancelling"
                assert model.status[batch_id] in ("cancelling", "cancelled")
            except OocoError:
                assert model.status[batch_id] in ("finalizing", "completed", "expired")
        elif action == "later":
            clock.now += rng.choice([1, 400])
        elif action == "end":
            await _end(store, model)
        elif action in ("crash", "stop"):
            crashes += 1
            if action == "crash":
                after = crash_copy(store, folder / f"crash-{crashes}")
                store.close()
            else:
                after = store._database.path
                store.close()
            store, model.claimed = Store(after, clock), []
        await _compare(store, model)
    clock.now += 1000
    await _end(store, model)
    await _compare(store, model)
    assert all(status in ("completed", "expired", "cancelled") for status in model.status.values())
    store.close()


def _record(model: Model, request: Request, is_error: bool, output: str, was_taken: bool) -> None:
    batch_id = "batch_" + request.request_id.split("_")[2]
    answers = model.answers[batch_id]
    assert was_taken == (model.status[batch_id] in ("in_progress", "cancelling") and request.custom_id not in answers)
    if was_taken:
        answers[request.custom_id] = is_error, output
        if model.status[batch_id] == "in_progress" and len(answers) == model.total[batch_id]:
            model.status[batch_id] = "finalizing"


async def _end(store: Store, model: Model) -> None:
    for number in (await store.work(0)).ending:
        status = await store.finish(number)
        batches = {batch["id"]: batch["status"] for batch in (await store.batches(None, 100))[0]}
        [batch_id] = [name for name, now in batches.items() if now != model.status[name]]
        expected = {"finalizing": "completed", "cancelling": "cancelled", "in_progress": "expired"}
        assert status == batches[batch_id] == expected[model.status[batch_id]]
        model.status[batch_id] = status


async def _compare(store: Store, model: Model) -> None:
    batches = {batch["id"]: batch for batch in (await store.batches(None, 100))[0]}
    assert {name: batch["status"] for name, batch in batches.items()} == model.status
    for name, batch in batches.items():
        answers, counts = model.answers[name], batch["request_counts"]
        assert counts["total"] == model.total[name]
        errors = [custom_id for custom_id in model.names(name) if answers.get(custom_id, (True,))[0]]
        if model.status[name] in ("completed", "expired", "cancelled"):
            output = [answers[custom_id][1] for custom_id in model.names(name) if custom_id not in errors]
            assert (await text(store, batch["output_file_id"])).splitlines() == output
            lines = (await text(store, batch["error_file_id"])).splitlines()
            assert len(lines) == len(errors) == counts["failed"]
            for custom_id, line in zip(errors, lines, strict=True):
                assert line == answers[custom_id][1] if custom_id in answers else custom_id in line
        else:
            assert counts["completed"] + counts["failed"] == len(answers)
