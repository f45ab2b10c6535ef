"""What happened in a logged episode, read off its event log alone: what every instance did and when, the KV on its way,
the life of a request, and when it emitted its tokens.

``Simulator(scenario, rules, seed, log=True)`` keeps the log; ``cluster.log.EVENTS`` says what its fields mean.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ooco_gym.cluster import log as events

Log = npt.NDArray[np.void]
Key = tuple[bool, int]  # (offline, row or serial number): names a request in a log


@dataclass(frozen=True)
class Span:
    """What one instance did for a time; pairs are (online, offline).

    ``kind`` is ``iteration``, ``thrown away`` (an interrupted prefill, or one that a failure cut off), ``down`` or
    ``draining``. ``recomputed`` counts the prompt tokens that had been prefilled before.
    """

    instance: int
    start_s: float
    end_s: float
    kind: str = "iteration"
    decodes: tuple[int, int] = (0, 0)
    prompt_tokens: tuple[int, int] = (0, 0)
    recomputed: int = 0

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s

    @property
    def parts(self) -> tuple[str, ...]:
        """Each class and phase that takes part."""
        amounts = (*self.decodes, *self.prompt_tokens)
        names = ("online decode", "offline decode", "online prefill", "offline prefill")
        return tuple(name for name, amount in zip(names, amounts, strict=True) if amount)


@dataclass(frozen=True)
class Transfer:
    """KV on its way, time in the link's queue included. ``why``: ``hand-over``, ``pull`` or ``push``."""

    source: int
    target: int
    start_s: float
    end_s: float
    request: Key
    tokens: int
    why: str


@dataclass(frozen=True)
class Stage:
    """A time in a request's life: ``waiting``, ``prefill``, ``thrown away``, ``held``, ``transfer``, ``decode``,
    ``resident`` (with its KV there, not in the decode batch), ``begun`` (a partial prefill) or ``on host``."""

    name: str
    instance: int
    start_s: float
    end_s: float


def key_of(event: Any) -> Key:
    """The request that an event is about."""
    return bool(event["offline"]), int(event["request"])


def end_of(log: Log) -> float:
    """Seconds of the last event; 0 for an empty log."""
    return float(log["time_s"][-1]) if len(log) else 0.0


_ENDS_BATCH = (events.ITERATION_END, events.INTERRUPTED, events.FAILED)


def _pieces(log: Log) -> Iterable[tuple[Any, list[Any]]]:
    """Every event with the pieces of the batch that it ends, where it ends one."""
    open_pieces: dict[int, list[Any]] = defaultdict(list)
    for event in log:
        instance = int(event["instance"])
        if event["kind"] == events.PIECE:
            open_pieces[instance].append(event)
            yield event, []
        elif event["kind"] in _ENDS_BATCH:
            yield event, open_pieces.pop(instance, [])
        else:
            yield event, []


def read_spans(log: Log) -> list[Span]:
    """Iterations, work thrown away, down times and drains, in order of their ends.

    The log does not say when a decode iteration began that a failure cut off; it is left out.
    """
    spans: list[Span] = []
    selected: dict[int, set[Key]] = defaultdict(set)
    since: dict[tuple[str, int], float] = {}
    for event, pieces in _pieces(log):
        kind, instance, time_s = int(event["kind"]), int(event["instance"]), float(event["time_s"])
        tokens = tuple(sum(int(p["a"]) for p in pieces if bool(p["offline"]) == offline) for offline in (False, True))
        prompt = (tokens[0], tokens[1])
        if kind == events.ENTER:
            selected[instance].add(key_of(event))
        elif kind == events.EXIT:
            selected[instance].discard(key_of(event))
        elif kind == events.ITERATION_END:
            offline = sum(key[0] for key in selected[instance]) if event["a"] else 0
            decodes = (int(event["a"]) - offline, offline)
            start_s = time_s - float(event["seconds"])
            spans.append(Span(instance, start_s, time_s, "iteration", decodes, prompt, int(event["d"])))
        elif kind == events.INTERRUPTED:
            spans.append(Span(instance, time_s - float(event["seconds"]), time_s, "thrown away", (0, 0), prompt))
        elif kind == events.FAILED:
            since["down", instance] = time_s
            if pieces:
                spans.append(Span(instance, float(pieces[0]["time_s"]), time_s, "thrown away", (0, 0), prompt))
        elif kind == events.STARTS_DRAINING and ("draining", instance) not in since:
            since["draining", instance] = time_s
        else:
            ended = {events.RECOVERED: "down", events.ROLE_CHANGED: "draining", events.STARTS_DRAINING: "draining"}
            if (start := since.pop((ended.get(kind, ""), instance), None)) is not None:
                spans.append(Span(instance, start, time_s, ended[kind]))
    spans += [Span(instance, start_s, end_of(log), kind) for (kind, instance), start_s in since.items()]
    return spans


def read_transfers(log: Log) -> list[Transfer]:
    """Every hand-over, pull and pushback, in order of their starts. One that is under way at the end of the log ends
    there; one that a failure cut off ends with the failure."""
    found: list[Transfer] = []
    open_at: dict[Key, int] = {}
    why: dict[Key, str] = {}
    for event in log:
        kind, key = int(event["kind"]), key_of(event)
        if kind in (events.PULLED, events.PUSHED):
            why[key] = "pull" if kind == events.PULLED else "push"
        elif kind == events.TRANSFER_START:
            open_at[key] = len(found)
            source, target, tokens = int(event["instance"]), int(event["a"]), int(event["b"])
            start_s = float(event["time_s"])
            found.append(Transfer(source, target, start_s, end_of(log), key, tokens, why.pop(key, "hand-over")))
        elif kind in (events.TRANSFERRED, events.LOST) and key in open_at:
            at = open_at.pop(key)
            found[at] = replace(found[at], end_s=float(event["time_s"]))
    return found


def token_times(log: Log) -> dict[Key, list[float]]:
    """When each request emitted its tokens, seconds: the first is TTFT's, the gaps are TBT."""
    times: dict[Key, list[float]] = defaultdict(list)
    selected: dict[int, dict[Key, None]] = defaultdict(dict)
    for event in log:
        kind, instance, time_s = int(event["kind"]), int(event["instance"]), float(event["time_s"])
        if kind == events.ENTER:
            selected[instance][key_of(event)] = None
        elif kind == events.EXIT:
            selected[instance].pop(key_of(event), None)
        elif kind == events.PREFILLED:
            times[key_of(event)].append(time_s)
        elif kind == events.ITERATION_END and event["a"]:
            for key in selected[instance]:
                times[key].append(time_s)
    return dict(times)


_STAGE_AFTER = {
    events.ARRIVAL: "waiting",
    events.ROUTED: "waiting",
    events.PIECE: "prefill",
    events.PREFILLED: "resident",
    events.BECAME_RESIDENT: "resident",
    events.ENTER: "decode",
    events.EXIT: "resident",
    events.WAITS_HELD: "held",
    events.TRANSFER_START: "transfer",
    events.EVICTED: "waiting",
    events.LOST: "waiting",
    events.CHECKPOINTED: "on host",
    events.FINISHED: "",
    events.CANCELLED: "",
}


def read_stages(log: Log, request: Key) -> list[Stage]:
    """The life of one request, without gaps, from its arrival; of an offline one from its first piece, for the log does
    not say when it joined the backlog."""
    stages: list[Stage] = []
    name, where, since_s = "", -1, 0.0

    def change(to: str, instance: int, now_s: float) -> None:
        nonlocal name, where, since_s
        if name and now_s > since_s:
            stages.append(Stage(name, where, since_s, now_s))
        name, where, since_s = to, instance, now_s

    own = (log["offline"] == request[0]) & (log["request"] == request[1])
    for event, pieces in _pieces(log[own | np.isin(log["kind"], _ENDS_BATCH)]):
        kind, time_s = int(event["kind"]), float(event["time_s"])
        if pieces:
            cut_off = kind != events.ITERATION_END
            name = "thrown away" if cut_off else name
            change("waiting" if cut_off else "begun", int(event["instance"]), time_s)
        elif kind in _STAGE_AFTER and event["request"] == request[1]:
            change(_STAGE_AFTER[kind], int(event["instance"]), time_s)
    change("", -1, end_of(log))
    return stages
