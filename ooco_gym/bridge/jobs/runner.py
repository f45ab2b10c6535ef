"""Takes pending requests from the store, gives them to a dispatcher, and brings their results back.

The runner keeps nothing that a crash could lose: whatever it does is in the store first (what is to be done) or last
(what was done), and everything in between is done again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import sqlite3
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from ooco_gym.bridge.jobs.database import StoreClosedError
from ooco_gym.bridge.jobs.records import Request, UnknownError, Waiting, error_line, response_line
from ooco_gym.bridge.jobs.store import Store
from ooco_gym.bridge.jobs.validation import Limits, Validator

logger = logging.getLogger(__name__)

PURGE_S = 60.0  # between two looks for files whose lifetime is over
PATIENCE_S = 10.0  # with a dispatcher that does not let itself be cancelled


class Dispatcher(Protocol):
    """Where offline requests are run; the gateway's scheduler is one."""

    async def complete(self, path: str, body: Mapping[str, Any], request_id: str) -> tuple[int, dict[str, Any]]:
        """Run one offline request (path '/v1/completions' or '/v1/chat/completions') to its end.

        However often it has to be retried: the HTTP status and JSON body returned are final. Raises
        asyncio.CancelledError on cancellation. After a crash the same ``request_id`` comes again.
        """


class Runner:
    """Runs the jobs of ``store`` on ``dispatcher`` while ``run`` runs; one runner per store.

    window      most requests with the dispatcher at once; may be changed at any time, 0 starts nothing new
    attempts    how often a dispatcher that raises is tried before the request gets an error line
    backoff_s   wait before the second attempt; doubled for each one after, up to ``most_backoff_s``
    tick_s      how often expiry is looked at when nothing else happens
    """

    def __init__(
        self,
        store: Store,
        dispatcher: Dispatcher,
        limits: Limits | None = None,
        *,
        window: int = 64,
        attempts: int = 5,
        backoff_s: float = 0.5,
        most_backoff_s: float = 30.0,
        tick_s: float = 1.0,
    ) -> None:
        self._store = store
        self._dispatcher = dispatcher
        self._limits = limits or Limits()
        self._window = window
        self._attempts = attempts
        self._backoff_s, self._most_backoff_s = backoff_s, most_backoff_s
        self._tick_s = tick_s
        self._changed = asyncio.Event()
        self._running: dict[asyncio.Task[None], int] = {}  # task -> batch
        self._commits: set[asyncio.Task[bool]] = set()
        self._validation: tuple[asyncio.Task[None], int] | None = None
        self._pending = 0

    @property
    def window(self) -> int:
        return self._window

    @window.setter
    def window(self, window: int) -> None:
        self._window = window
        self.wake()

    def pending(self) -> int:
        """Valid requests that the dispatcher has not been given yet, as of the runner's last look at the store."""
        return self._pending

    def running(self) -> int:
        """Requests that the dispatcher has now."""
        return len(self._running)

    def wake(self) -> None:
        """Look at the store now: something in it was changed."""
        self._changed.set()

    async def run(self) -> None:
        """Work until cancelled. What is unfinished then is taken up by the next run."""
        loop = asyncio.get_running_loop()
        purge_at_s = loop.time()
        try:
            await self._store.release()
            while True:
                self._changed.clear()
                try:
                    await self._step()
                    if loop.time() >= purge_at_s:
                        await self._store.purge()
                        purge_at_s = loop.time() + PURGE_S
                except sqlite3.Error:
                    logger.exception("the job store failed; trying again in %g s", self._tick_s)
                    await asyncio.sleep(self._tick_s)
                with contextlib.suppress(TimeoutError):  # not wait_for: Python 3.11's can swallow a cancellation
                    async with asyncio.timeout(self._tick_s):
                        await self._changed.wait()
        finally:
            tasks = list(self._running)
            if self._validation:
                tasks.append(self._validation[0])
            await _cancelled(tasks)
            if self._commits:
                await asyncio.wait(self._commits, timeout=PATIENCE_S)

    async def _step(self) -> None:
        work = await self._store.work(self._window - len(self._running))
        self._pending = work.pending
        for request in work.claimed:
            task = asyncio.create_task(self._serve(request))
            self._running[task] = request.batch
            task.add_done_callback(self._forget)
        for batch in work.ending:
            await self._end(batch)
        if self._validation is None and work.validating:
            waiting = work.validating[0]
            task = asyncio.create_task(self._validate(waiting))
            self._validation = task, waiting.number
            task.add_done_callback(self._validated)

    async def _end(self, batch: int) -> None:
        tasks = [task for task, owner in self._running.items() if owner == batch]
        if self._validation and self._validation[1] == batch:
            tasks.append(self._validation[0])
        await _cancelled(tasks)
        status = await self._store.finish(batch)
        logger.info("batch %d: %s", batch, status)
        self.wake()

    # one request

    async def _serve(self, request: Request) -> None:
        is_error, output = await self._result(request)
        commit = asyncio.create_task(self._record(request, is_error, output))
        self._commits.add(commit)
        commit.add_done_callback(self._commits.discard)
        await asyncio.shield(commit)  # a result that is there is not lost to a cancellation

    async def _result(self, request: Request) -> tuple[bool, str]:
        """The line of a request and whether it is for the error file: as at OpenAI, answers of 400 and above are."""
        body = json.loads(request.body)
        reason = ""
        for attempt in range(self._attempts):
            if attempt:
                wait_s = min(self._most_backoff_s, self._backoff_s * 2.0 ** (attempt - 1))
                await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
            try:
                status_code, answer = await self._dispatcher.complete(request.endpoint, body, request.request_id)
                return status_code >= 400, response_line(request, status_code, answer)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                reason = "the dispatcher cancelled it"
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
            logger.warning("%s: attempt %d of %d failed: %s", request.request_id, attempt + 1, self._attempts, reason)
        message = f"The request failed {self._attempts} times, the last time with {reason}."
        return True, error_line(request.request_id, request.custom_id, "dispatch_failed", message)

    async def _record(self, request: Request, is_error: bool, output: str) -> bool:
        while True:
            try:
                return await self._store.record(request, is_error, output)
            except sqlite3.Error:
                logger.exception("%s: its result could not be written; trying again", request.request_id)
                await asyncio.sleep(self._tick_s)
            except StoreClosedError:
                logger.warning("%s: the store was closed before its result; it will be run again", request.request_id)
                return False

    def _forget(self, task: asyncio.Task[None]) -> None:
        del self._running[task]
        if not task.cancelled() and (error := task.exception()):
            logger.error("a request's task failed", exc_info=error)
        self.wake()

    # validation

    async def _validate(self, waiting: Waiting) -> None:
        """Read the input file in pieces, in a thread, so that neither the loop nor the writer waits long."""
        validator = Validator(waiting.endpoint, self._limits)
        await self._store.forget_requests(waiting.number)
        try:
            async for piece in self._store.content(waiting.input_file_id):
                found = await asyncio.to_thread(validator.feed, piece)
                if not validator.errors:
                    await self._store.add_requests(waiting.number, found)
                if validator.is_over:
                    break
            found = await asyncio.to_thread(validator.end)
        except UnknownError as error:
            validator.errors.append({"code": "invalid_file", "line": None, "message": str(error), "param": None})
        if validator.errors:
            await self._store.fail(waiting.number, validator.errors)
            return
        await self._store.add_requests(waiting.number, found)
        await self._store.activate(waiting.number)

    def _validated(self, task: asyncio.Task[None]) -> None:
        self._validation = None
        if not task.cancelled() and (error := task.exception()):
            logger.error("a validation failed; it starts over", exc_info=error)
            asyncio.get_running_loop().call_later(self._tick_s, self.wake)
        else:
            self.wake()


async def _cancelled(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel tasks and wait for them, but not forever."""
    waiting = list(tasks)
    for task in waiting:
        task.cancel()
    if waiting:
        _, late = await asyncio.wait(waiting, timeout=PATIENCE_S)
        if late:
            logger.warning("%d tasks did not end within %g s of being cancelled", len(late), PATIENCE_S)
