"""The runner on a store, without HTTP: its window, its order, its retries, and what it does after a crash."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ooco_gym.bridge.jobs import Dispatcher, Limits, Runner, Store
from ooco_gym.bridge.jobs.validation import Validator
from tests.bridge.jobs_server import URL, Clock, Scripted, jsonl, line
from tests.bridge.test_jobs_store import crash_copy, text, upload


async def start(store: Store, content: bytes) -> str:
    return str((await store.create_batch(await upload(store, content), URL, "24h", 1000))["id"])


async def until(what: Callable[[], Any]) -> None:
    for _ in range(2000):
        if what():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it did not get there in time")


async def ended(store: Store, batch_id: str) -> dict[str, Any]:
    for _ in range(2000):
        batch = await store.batch(batch_id)
        if batch["status"] in ("failed", "completed", "expired", "cancelled"):
            return batch
        await asyncio.sleep(0.002)
    raise AssertionError(f"{batch} did not end in time")


async def counted(store: Store, batch_id: str, answers: int) -> None:
    for _ in range(2000):
        counts = (await store.batch(batch_id))["request_counts"]
        if counts["completed"] + counts["failed"] == answers:
            return
        await asyncio.sleep(0.002)
    raise AssertionError(f"{counts} did not become {answers} in time")


def running(
    path: Path, dispatcher: Dispatcher, work: Callable[[Store, Runner], Coroutine[Any, Any, None]], **settings: Any
) -> None:
    """Run ``work`` beside a runner."""

    async def both() -> None:
        store = Store(path, Clock())
        runner = Runner(store, dispatcher, **{"tick_s": 0.01, "backoff_s": 0.001, **settings})
        task = asyncio.create_task(runner.run())
        try:
            await work(store, runner)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            store.close()

    asyncio.run(both())


def test_a_dispatcher_that_raises_is_tried_again_and_then_told_of(tmp_path: Path) -> None:
    dispatcher = Scripted()

    async def work(store: Store, runner: Runner) -> None:
        batch = await ended(store, await start(store, jsonl("one", "raise")))
        assert batch["status"] == "completed"
        assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}
        assert Counter(dispatcher.calls) == {"one": 1, "raise": 3}
        error = json.loads(await text(store, batch["error_file_id"]))
        assert (error["custom_id"], error["response"], error["error"]["code"]) == ("id-1", None, "dispatch_failed")
        assert "failed 3 times, the last time with RuntimeError: no instance" in error["error"]["message"]

    running(tmp_path / "jobs.sqlite", dispatcher, work, attempts=3)


@pytest.mark.parametrize("answer", [(200, {"x": float("nan")}), (200, {"x": object()}), None, "cancel"])
def test_an_answer_that_is_none(tmp_path: Path, answer: Any) -> None:
    class Odd:
        async def complete(self, path: str, body: Mapping[str, Any], request_id: str) -> tuple[int, dict[str, Any]]:
            if answer == "cancel":
                raise asyncio.CancelledError
            return answer  # type: ignore[no-any-return]

    async def work(store: Store, runner: Runner) -> None:
        batch = await ended(store, await start(store, jsonl("one")))
        error = json.loads(await text(store, batch["error_file_id"]))
        assert error["error"]["code"] == "dispatch_failed"

    running(tmp_path / "jobs.sqlite", Odd(), work, attempts=2)


def test_the_window_holds_and_can_be_moved(tmp_path: Path) -> None:
    dispatcher = Scripted()

    async def work(store: Store, runner: Runner) -> None:
        batch_id = await start(store, jsonl(*["hang"] * 10, "one"))
        await until(lambda: runner.running() == 3)
        await until(lambda: runner.pending() == 8)
        runner.window = 5
        await until(lambda: runner.running() == 5)
        await until(lambda: runner.pending() == 6)
        runner.window = 0
        await asyncio.sleep(0.05)  # several ticks
        assert len(dispatcher.calls) == dispatcher.most_at_once == 5
        await store.cancel_batch(batch_id)
        await ended(store, batch_id)
        await until(lambda: runner.running() == runner.pending() == 0)

    running(tmp_path / "jobs.sqlite", dispatcher, work, window=3)


def test_the_oldest_batch_goes_first(tmp_path: Path) -> None:
    dispatcher = Scripted()

    async def work(store: Store, runner: Runner) -> None:
        ids = [await start(store, jsonl(f"{name}1", f"{name}2", f"{name}3")) for name in "abc"]
        await until(lambda: runner.pending() == 9)
        assert dispatcher.calls == []
        runner.window = 1
        for batch_id in ids:
            assert (await ended(store, batch_id))["status"] == "completed"
        assert dispatcher.calls == [f"{name}{number}" for name in "abc" for number in (1, 2, 3)]

    running(tmp_path / "jobs.sqlite", dispatcher, work, window=0)


def test_a_cancelled_batch_does_not_stop_the_others(tmp_path: Path) -> None:
    async def work(store: Store, runner: Runner) -> None:
        first, second = await start(store, jsonl("hang", "hang")), await start(store, jsonl("hang", "one"))
        await counted(store, second, 1)
        await until(lambda: runner.running() == 3)
        await store.cancel_batch(first)
        assert (await ended(store, first))["status"] == "cancelled"
        assert runner.running() == 1

    running(tmp_path / "jobs.sqlite", Scripted(), work)


def test_a_batch_cancelled_in_its_validation(tmp_path: Path) -> None:
    async def work() -> None:
        store = Store(tmp_path / "jobs.sqlite", Clock())
        batch_id = await start(store, jsonl("one"))
        await store.cancel_batch(batch_id)
        runner = asyncio.create_task(Runner(store, Scripted(), tick_s=0.01).run())
        batch = await ended(store, batch_id)
        assert (batch["status"], batch["output_file_id"], batch["error_file_id"]) == ("cancelled", None, None)
        assert batch["request_counts"]["total"] == 0
        runner.cancel()
        await asyncio.gather(runner, return_exceptions=True)
        store.close()

    asyncio.run(work())


def test_after_a_crash_what_was_answered_stays_and_the_rest_is_run_again(tmp_path: Path) -> None:
    before, after = Scripted(), Scripted()
    copies: list[Path] = []

    async def work(store: Store, runner: Runner) -> None:
        await start(store, jsonl("one", "hang", "bad", "hang", "two"))
        await counted(store, (await store.batches(None, 1))[0][0]["id"], 3)
        copies.append(crash_copy(store, tmp_path / "crash"))

    running(tmp_path / "jobs.sqlite", before, work)

    async def work_again(store: Store, runner: Runner) -> None:
        await until(lambda: after.calls == ["hang", "hang"])
        [batch], _ = await store.batches(None, 9)
        assert batch["request_counts"] == {"total": 5, "completed": 2, "failed": 1}

    running(copies[0], after, work_again)


def test_a_stopped_runner_can_be_followed_by_another_on_the_same_store(tmp_path: Path) -> None:
    async def work() -> None:
        store, dispatcher = Store(tmp_path / "jobs.sqlite", Clock()), Scripted()
        batch_id = await start(store, jsonl("hang", "one"))
        first = asyncio.create_task(Runner(store, dispatcher, tick_s=0.01).run())
        await counted(store, batch_id, 1)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert dispatcher.cancelled == ["hang"]
        assert (await store.batch(batch_id))["request_counts"]["completed"] == 1
        second = asyncio.create_task(Runner(store, dispatcher, tick_s=0.01).run())
        await until(lambda: Counter(dispatcher.calls) == {"hang": 2, "one": 1})
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        store.close()

    asyncio.run(work())


def test_a_runner_stops_also_when_it_is_woken_at_the_same_moment(tmp_path: Path) -> None:
    async def work() -> None:
        store = Store(tmp_path / "jobs.sqlite", Clock())
        runner = Runner(store, Scripted(), tick_s=60.0)
        task = asyncio.create_task(runner.run())
        await asyncio.sleep(0.1)
        runner.wake()
        task.cancel()
        assert (await asyncio.wait({task}, timeout=20.0))[0] == {task}
        store.close()

    asyncio.run(work())


def test_a_result_outlives_a_disk_that_fails_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher, failures = Scripted(), []

    async def work(store: Store, runner: Runner) -> None:
        record = store.record

        async def failing(*result: Any) -> bool:
            if len(failures) < 3:
                failures.append(result)
                raise sqlite3.OperationalError("database or disk is full")
            return await record(*result)

        monkeypatch.setattr(store, "record", failing)
        batch = await ended(store, await start(store, jsonl("one", "two")))
        assert batch["request_counts"]["completed"] == 2
        assert Counter(dispatcher.calls) == {"one": 1, "two": 1}
        assert len(failures) == 3

    running(tmp_path / "jobs.sqlite", dispatcher, work)


CONTENT = (
    b"\xef\xbb\xbf"
    + line("a").encode()
    + b"\r\n\n"
    + line("b", "x" * 300).encode()
    + b"\n{\n"
    + line("a").encode()
    + b"\n"
    + line("c", "x" * 1000).encode()
    + b"\n\xff\n"
    + line("d").encode()
)


@given(st.lists(st.integers(0, len(CONTENT)), max_size=12))
def test_how_a_file_is_cut_into_pieces_makes_no_difference(cuts: list[int]) -> None:
    limits = Limits(max_line_bytes=500)

    def validated(edges: list[int]) -> tuple[list[tuple[int, str, str]], list[dict[str, Any]]]:
        validator, found = Validator(URL, limits), []
        for low, high in pairwise(edges):
            found += validator.feed(CONTENT[low:high])
        return found + validator.end(), validator.errors

    found, errors = validated(sorted([0, *cuts, len(CONTENT)]))
    assert [(number, name) for number, name, _ in found] == [(1, "a"), (3, "b"), (8, "d")]
    codes = ["invalid_json_line", "duplicate_custom_id", "line_too_long", "invalid_json_line"]
    assert [(error["code"], error["line"]) for error in errors] == list(zip(codes, (4, 5, 6, 7), strict=True))
