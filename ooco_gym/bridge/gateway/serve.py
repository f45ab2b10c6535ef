"""``python -m ooco_gym.bridge serve``: wires the parts, runs them under uvicorn, and ends them in order.

At SIGTERM or SIGINT the gateway stops accepting, aborts offline work (a job's requests stay in the store, an
interactive client is told), lets online requests end for up to timeouts.drain_s, then tells those that are left. A
second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette

from ooco_gym.bridge.gateway.api import Gateway
from ooco_gym.bridge.gateway.config import BridgeConfig, load_config
from ooco_gym.bridge.gateway.control import Control
from ooco_gym.bridge.gateway.enforcement import not_enforced
from ooco_gym.bridge.gateway.instances import Instance, make_session
from ooco_gym.bridge.gateway.ledger import Ledger
from ooco_gym.bridge.gateway.live_telemetry import read
from ooco_gym.bridge.gateway.metrics import exporter
from ooco_gym.bridge.gateway.placement import LOOKAHEAD
from ooco_gym.bridge.gateway.prediction import Prediction
from ooco_gym.bridge.gateway.scheduler import Scheduler
from ooco_gym.bridge.gateway.status import page, status
from ooco_gym.cluster.observation import observe
from ooco_gym.errors import OocoError, shown
from ooco_gym.policy import ConstantPolicy, Policy

log = logging.getLogger("ooco_gym.bridge")
SWEEP_S = 0.5
_STANDARD = set(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "color_message", "taskName"}


class Bridge:
    """One gateway with everything it runs: build it, serve ``app``, and tell it when to shut down."""

    def __init__(self, config: BridgeConfig, policy: Policy) -> None:
        self.config, self.policy = config, policy
        slo = config.scenario.slo
        self.ledger = Ledger(slo.ttft_s, slo.tpot_s)
        self.scheduler = Scheduler(config, self.ledger, Prediction(config.scenario))
        self.runner: Any = None
        self._store: Any = None
        self.control = Control(config, self.scheduler, policy, self.stored)
        self.notes = not_enforced(config, policy.rules)
        observe(read(self.scheduler, self.scheduler.placement.knobs))  # compiled before the first decision is timed
        metrics = exporter(self.scheduler, self.control, self.stored)
        self.gateway = Gateway(
            config, self.scheduler, self.control, metrics, lambda: status(self.control, self.notes, self.stored), page()
        )
        self._logged_up: dict[int, bool] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._runner_task: asyncio.Task[None] | None = None
        self.app = self.gateway.app(self._lifespan, self._job_routes())

    def stored(self) -> int:
        """Requests of jobs that the runner has not yet given to the scheduler."""
        return int(self.runner.pending()) if self.runner is not None else 0

    def _job_routes(self) -> list[Any]:
        if self.config.jobs is None:
            return []
        from ooco_gym.bridge import jobs  # SQLite and the multipart parser are needed by nobody else

        self._store = jobs.Store(self.config.jobs)
        # Enough for every seat of every instance, and for a pull to choose among.
        window = sum(instance.max_seqs for instance in self.scheduler.instances) + LOOKAHEAD
        self.runner = jobs.Runner(self._store, self.scheduler, window=window)
        return list(jobs.routes(self._store, self.runner, jobs.Limits(body_s=self.config.timeouts.body_s)))

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.scheduler.forwarder.session = make_session(self.config.timeouts)
        for note in self.notes:
            log.warning("not enforced", extra={"note": note})
        await asyncio.gather(*(self._probe(instance) for instance in self.scheduler.instances))
        for instance in self.scheduler.instances:
            self._start(self._probe_forever(instance))
        self._start(self._sweep_forever())
        self._start(self.control.run())
        if self.runner is not None:
            self._runner_task = self._start(self.runner.run())
        log.info("serving", extra={"policy": self.policy.name, "instances": len(self.scheduler.instances),
                                   "dry_run": self.config.dry_run, "connector": self.config.connector})  # fmt: skip
        try:
            yield
        finally:
            self.begin_shutdown()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self.scheduler.forwarder.session.close()
            if self._store is not None:
                self._store.close()
            log.info("stopped", extra={"online_finished": self.ledger.totals.online_finished,
                                       "offline_finished": self.ledger.totals.offline_finished})  # fmt: skip

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        task.add_done_callback(_report)
        self._tasks.append(task)
        return task

    async def _probe(self, instance: Instance) -> None:
        session = self.scheduler.forwarder.session
        assert session is not None
        key = self.config.upstream_key
        headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
        await instance.probe(session, self.config.timeouts, headers)
        if instance.up != self._logged_up.get(instance.index):  # a request may have found it dead since the last probe
            self._logged_up[instance.index] = instance.up
            if instance.up:
                log.info("instance is up", extra={"instance": instance.config.url})
            else:
                log.warning("instance is down", extra={"instance": instance.config.url, "why": instance.scrape_error})
        self.scheduler.after_scrape(instance)

    async def _probe_forever(self, instance: Instance) -> None:
        while True:
            await asyncio.sleep(self.config.scrape_interval_s)
            with _survived("probe failed"):
                await self._probe(instance)

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            with _survived("sweep failed"):
                self.scheduler.sweep()

    def begin_shutdown(self) -> None:
        """Refuse new requests, give offline work up, and end the rest after timeouts.drain_s."""
        if self.scheduler.closing:
            return
        log.info("shutting down", extra={"online_in_flight": len(self.ledger.live)})
        if self._runner_task is not None:
            self._runner_task.cancel()
        self.scheduler.begin_shutdown()
        asyncio.get_running_loop().call_later(self.config.timeouts.drain_s, self.scheduler.end_online)


@contextmanager
def _survived(event: str) -> Iterator[None]:
    """A defect in one round of watching is logged, and the next round goes on."""
    try:
        yield
    except Exception:
        log.exception(event)


def _report(task: asyncio.Task[None]) -> None:
    """A background task that dies is a defect that must be seen."""
    if not task.cancelled() and task.exception() is not None:
        log.critical("background task ended", exc_info=task.exception(), extra={"task": task.get_name()})


class Server(uvicorn.Server):
    """uvicorn, which tells the bridge about the first signal while requests still run."""

    def __init__(self, bridge: Bridge, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.bridge = bridge
        self.on_started: Callable[[int], None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn would raise the signal again once it has ended in order; an orderly end is status 0.
        self.force_exit = self.should_exit
        self.should_exit = True
        if self.force_exit:  # what is cut off now is cut off on purpose
            logging.getLogger("uvicorn.error").disabled = True
        with suppress(RuntimeError):
            asyncio.get_running_loop().call_soon_threadsafe(self.bridge.begin_shutdown)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.on_started is not None:
            self.on_started(self.port())

    def port(self) -> int:
        """The port that it listens on."""
        return int(self.servers[0].sockets[0].getsockname()[1])


def bound(host: str, port: int) -> socket.socket:
    """A socket that has the address; raises OocoError where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:  # the latter for a name that cannot be one
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OocoError(f"listen: {host[:80]}:{port} cannot be used: {why}") from None
    return listener


def make_server(bridge: Bridge) -> Server:
    listen = bridge.config.listen
    return Server(
        bridge,
        uvicorn.Config(
            bridge.app,
            host=listen.host,
            port=listen.port,
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="on",
            server_header=False,
            date_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=int(bridge.config.timeouts.drain_s) + 3,
        ),
    )


class JsonLines(logging.Formatter):
    """One JSON object per line: time, level, event, and whatever a call gave as ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        entry |= {key: value for key, value in record.__dict__.items() if key not in _STANDARD}
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def set_up_logging() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


def resolve_policy(source: str) -> Policy:
    """``ooco``, a folder that export wrote, or one that training saved."""
    if source == "ooco":
        return ConstantPolicy(name="ooco")
    from ooco_gym.bridge.exports import deployed  # onnxruntime is needed for networks only

    return deployed.load_deployed(source)


def main(settings: Mapping[str, Any]) -> None:
    """Serve until a signal; ``settings`` are config, policy, and keys of the cluster file that win over it."""
    rest = dict(settings)
    config_path, source = rest.pop("config", None), rest.pop("policy", "ooco")
    if not isinstance(config_path, str):
        raise OocoError("serve needs config=FILE, a cluster file such as the one in docs/bridge.md")
    if not isinstance(source, str):
        raise OocoError(f"policy is {shown(source)}, a folder or ooco is needed")
    config = load_config(config_path, rest)
    policy = resolve_policy(source)
    listener = bound(config.listen.host, config.listen.port)  # before the store is opened
    set_up_logging()
    bridge = Bridge(config, policy)
    if sys.stderr.isatty():  # the log has the same for programs
        print(f"policy {policy.name}{' (dry run: nothing is enforced)' if config.dry_run else ''}", file=sys.stderr)
        for note in bridge.notes:
            print(f"note: {note}", file=sys.stderr)
    gc.collect()
    gc.freeze()  # the compiler's hundreds of thousands of objects: walking them again would stop streams for 100 ms
    server = make_server(bridge)
    host = f"[{config.listen.host}]" if ":" in config.listen.host else config.listen.host
    server.on_started = lambda port: print(f"listening on http://{host}:{port}", file=sys.stderr, flush=True)
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


__all__ = ["Bridge", "Server", "main", "make_server"]
