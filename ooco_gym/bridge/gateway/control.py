"""The control loop: every interval Telemetry, the policy's decision under a time limit, knobs in force, a line of log.

A policy runs in a thread of its own. Where it errs, takes too long or answers with knobs that are not finite or out of
range, ooco decides that interval; the policy is asked again at the next one, so the gateway comes back by itself. A
policy that still computes is not asked a second time before it has answered. A constant computes nothing, so it needs
neither thread nor limit.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ooco_gym.bridge.gateway.config import BridgeConfig
from ooco_gym.bridge.gateway.live_telemetry import read
from ooco_gym.bridge.gateway.scheduler import Scheduler
from ooco_gym.cluster.control import KNOB_NAMES, check_knobs, ooco_knobs
from ooco_gym.cluster.telemetry import Telemetry
from ooco_gym.errors import OocoError
from ooco_gym.policy import ConstantPolicy, Knobs, Policy

log = logging.getLogger("ooco_gym.bridge")


class _Thread:
    """Runs one call at a time in a daemon thread, which a policy that never returns cannot keep from ending."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.busy = False

    def call(self, function: Callable[[], Knobs]) -> asyncio.Future[Knobs]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Knobs] = loop.create_future()
        self.busy = True

        def answer(result: Knobs | None, error: BaseException | None) -> None:
            self.busy = False
            if future.done():
                return
            if error is not None:
                future.set_exception(error)
            elif result is not None:
                future.set_result(result)

        def work() -> None:
            result: Knobs | None = None
            error: BaseException | None = None
            try:
                result = np.array(function(), np.float64)
            except BaseException as raised:  # a policy may raise anything; nothing of it may end the gateway
                error = raised if isinstance(raised, Exception) else RuntimeError(repr(raised))
            try:
                loop.call_soon_threadsafe(answer, result, error)
            except RuntimeError:
                return  # the gateway has stopped

        threading.Thread(target=work, name=self._name, daemon=True).start()
        return future


def _open_log(path: str | None) -> IO[bytes] | None:
    if path is None:
        return None
    try:
        return Path(path).open("ab", buffering=0)  # a line is in the file or lost, never kept for later
    except OSError as error:
        raise OocoError(f"decision_log {path}: cannot be written ({error.strerror or error})") from None


@dataclass(frozen=True)
class Decision:
    """One decision: what was seen, what was decided, and by whom."""

    at_s: float  # seconds since the gateway started
    policy: str
    telemetry: Telemetry
    knobs: Mapping[str, float]
    fallback: str | None  # why ooco decided instead of the policy
    took_s: float

    def record(self, dry_run: bool) -> dict[str, Any]:
        return {
            "time": time.time(),
            "at_s": round(self.at_s, 6),
            "policy": self.policy,
            "fallback": self.fallback,
            "enforced": not dry_run,
            "took_ms": round(self.took_s * 1e3, 3),
            "knobs": dict(self.knobs),
            "telemetry": self.telemetry.to_dict(),
        }


class Control:
    """Asks the policy, falls back to ooco, applies and logs."""

    def __init__(
        self, config: BridgeConfig, scheduler: Scheduler, policy: Policy, stored: Callable[[], int] = lambda: 0
    ) -> None:
        self.config, self.scheduler, self.policy, self.stored = config, scheduler, policy, stored
        self.last: Decision | None = None
        self.decisions = self.fallbacks = 0
        self._knobs = dict(zip(KNOB_NAMES, ooco_knobs().tolist(), strict=True))
        self._thread = _Thread("ooco-policy")
        self._log: IO[bytes] | None = _open_log(config.decision_log)
        self._log_fails = False

    async def run(self) -> None:
        """Decide every interval until cancelled."""
        try:
            self.scheduler.placement.rules.update(self.policy.rules)
            try:
                self.policy.reset()
            except Exception:  # a policy may raise anything
                log.exception("policy could not be reset", extra={"policy": self.policy.name})
            loop = asyncio.get_running_loop()
            due = loop.time()
            while True:
                try:
                    await self.step()
                except Exception:  # a defect: serve on as the paper would
                    log.exception("control step failed")
                    if not self.config.dry_run:
                        self.scheduler.apply(dict(zip(KNOB_NAMES, ooco_knobs().tolist(), strict=True)))
                due = max(due + self.config.control_interval_s, loop.time())
                await asyncio.sleep(due - loop.time())
        finally:
            if self._log is not None:
                self._log.close()

    async def step(self) -> Decision:
        """One decision, applied and logged."""
        telemetry = read(self.scheduler, self._knobs, self.stored)
        started = time.perf_counter()
        vector, fallback = await self._ask(telemetry)
        took_s = time.perf_counter() - started
        knobs = dict(zip(KNOB_NAMES, vector.tolist(), strict=True))
        name = self.policy.name if fallback is None else "ooco"
        decision = Decision(telemetry["time_s"], name, telemetry, knobs, fallback, took_s)
        before = self.last.fallback if self.last is not None else None
        if fallback is not None and before is None:
            log.error("policy failed, ooco decides", extra={"policy": self.policy.name, "why": fallback})
        elif fallback is None and before is not None:
            log.warning("policy decides again", extra={"policy": self.policy.name})
        self.decisions += 1
        self.fallbacks += fallback is not None
        self._knobs, self.last = knobs, decision
        if not self.config.dry_run:
            self.scheduler.apply(knobs)
        if self._log is not None:
            self._write(self._log, json.dumps(decision.record(self.config.dry_run)) + "\n")
        return decision

    def _write(self, file: IO[bytes], line: str) -> None:
        """A log that cannot be written changes no decision; it is said once."""
        try:
            file.write(line.encode())
        except OSError as error:
            if not self._log_fails:
                why = error.strerror or str(error)
                log.error("decision log cannot be written", extra={"path": self.config.decision_log, "why": why})
            self._log_fails = True
        else:
            self._log_fails = False

    async def _ask(self, telemetry: Telemetry) -> tuple[Knobs, str | None]:
        """(knobs, why ooco decides or None)."""
        if type(self.policy) is ConstantPolicy:
            return self.policy.decide(telemetry), None
        if self._thread.busy:
            return ooco_knobs(), "the policy still computes an earlier decision"
        try:
            future = self._thread.call(lambda: self.policy.decide(telemetry))
            async with asyncio.timeout(self.config.policy_time_s):
                vector = await future
            return check_knobs(vector), None
        except TimeoutError:
            return ooco_knobs(), f"the policy took more than policy_time_s ({self.config.policy_time_s:g} s)"
        except OocoError as error:
            return ooco_knobs(), str(error)
        except Exception as error:
            return ooco_knobs(), f"the policy raised {type(error).__name__}: {error}"
