"""Says so when the simulator is being compiled: a minute or two, once per machine and version."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

from numba.core import event
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

NOTICE = "compiling the simulator, once on this machine: a minute or two"


class CompileNotice(event.Listener):  # type: ignore[misc]
    """A bar on a terminal, one line on any other standard error, while functions of this package are compiled.

    What comes from the cache on disk is never announced. The bar counts functions up to its middle; then the compiler
    optimises them all together, of which there is no news until it is done.

    Ctrl-C ends the compilation at the next function. The compiler calls back into Python where an interrupt would be
    reported and forgotten, so it is remembered here and raised again.
    """

    def __init__(self) -> None:
        self.expected = 0  # functions that decorators announced
        self._depth = 0  # a function is compiled in the middle of its first caller
        self._done = 0
        self._progress: Progress | None = None
        self._interrupted = False
        self._handler: Any = None  # of SIGINT, while ours is in its place

    def on_start(self, event: Any) -> None:
        if not _is_ours(event):
            return
        self._depth += 1
        if self._depth == 1:
            self._watch_interrupts()
        if self._depth == 1 and self._progress is None:
            if sys.stderr.isatty():
                columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
                self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
                self._progress.add_task(NOTICE, total=2 * self.expected)
                self._progress.start()
            elif self._done == 0:
                print(f"ooco-gym: {NOTICE}", file=sys.stderr, flush=True)

    def on_end(self, event: Any) -> None:
        if not _is_ours(event):
            return
        self._depth -= 1
        self._done += 1
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=min(self._done, self.expected))
            if self._depth == 0:
                self._progress.stop()
                self._progress = None
        if self._depth == 0 and self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None
        if self._interrupted:
            self._interrupted = self._depth > 0
            raise KeyboardInterrupt("while compiling; the next start compiles again")

    def _watch_interrupts(self) -> None:
        here = threading.current_thread() is threading.main_thread()
        if here and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._handler = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, number: int, frame: Any) -> None:
        self._interrupted = True
        raise KeyboardInterrupt("while compiling; the next start compiles again")


def _is_ours(event: Any) -> bool:
    return str(event.data["dispatcher"].py_func.__module__).startswith("ooco_gym.")


def watch() -> CompileNotice:
    """Announce compilation in this process from now on."""
    notice = CompileNotice()
    event.register("numba:compile", notice)
    return notice
