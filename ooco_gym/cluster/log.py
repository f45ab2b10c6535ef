"""The event log: everything that happens in an episode, one record each, for debugging, figures and recounting.

Off by default. Switched on, runs of unchanged decode iterations are cut into single ones, so that each is an event;
times and results stay the same bits, and an episode takes about three times as long.
"""

from __future__ import annotations

from ooco_gym._jit import kernel
from ooco_gym.cluster.state import NONE

#: Kinds of events: (name, what its numbers a, b, d and ``seconds`` mean). ``instance`` is where it happens.
EVENTS: tuple[tuple[str, str], ...] = (
    ("arrival", "an online request arrives; a: prompt, b: output tokens, d: SLO class"),
    ("rejected", "a request fits no instance; a: its row, d: 1 for an offline job"),
    ("routed", "it joins the waiting queue of an instance, at its arrival or anew after it lost its KV"),
    ("piece", "a piece of a prefill joins the batch being formed; a: its tokens, b: tokens done before"),
    ("iteration", "an iteration ends; a: decodes, b: tokens prefilled, d: of them again, seconds: its duration"),
    ("interrupted", "a prefill is interrupted; a: its requests, seconds: thrown away"),
    ("prefilled", "a prefill is complete and emits one token"),
    ("enter", "a resident joins the decode batch: it emits a token with every iteration to come"),
    ("exit", "it leaves the decode batch"),
    ("resident", "a request becomes resident"),
    ("finished", "the last token of a request; a: prompt, b: output tokens"),
    ("held", "a hand-over waits at its source for room; a: target"),
    ("transfer", "KV joins the outgoing link; a: target, b: context tokens"),
    ("transferred", "KV has arrived; a: source"),
    ("pulled", "an offline decode starts to migrate to the strict instance that pulled it; a: target"),
    ("pushed", "an offline decode starts to move back to the relaxed pool; a: target"),
    ("evicted", "a request loses its KV to another"),
    ("checkpointed", "the KV of an evicted request stays in host memory"),
    ("restored", "KV is back from host memory"),
    ("draining", "an instance will change its role; a: the role to be"),
    ("role", "it has changed its role; a: the role"),
    ("failed", "an instance goes down"),
    ("recovered", "it is up again, empty"),
    ("lost", "a request loses its KV, or its running prefill, to a failure"),
    ("cancelled", "the client of an online request goes away"),
)
EVENT_NAMES = tuple(name for name, _ in EVENTS)
(
    ARRIVAL,
    REJECTED,
    ROUTED,
    PIECE,
    ITERATION_END,
    INTERRUPTED,
    PREFILLED,
    ENTER,
    EXIT,
    BECAME_RESIDENT,
    FINISHED,
    WAITS_HELD,
    TRANSFER_START,
    TRANSFERRED,
    PULLED,
    PUSHED,
    EVICTED,
    CHECKPOINTED,
    RESTORED,
    STARTS_DRAINING,
    ROLE_CHANGED,
    FAILED,
    RECOVERED,
    LOST,
    CANCELLED,
) = range(len(EVENTS))


@kernel
def is_on(c):
    return c.log.shape[0] > 0


@kernel
def note(c, kind, instance, slot, a, b, d, seconds):
    """Append one event; ``slot`` is the request's, or NONE. The caller of ``run`` has seen to the room."""
    if c.log.shape[0] == 0:
        return
    world = c.world[0]
    record = c.log[world.logged]
    world.logged += 1
    record.time_s = world.now_s
    record.kind = kind
    record.instance = instance
    record.offline = 0
    record.request = NONE
    if slot != NONE:
        record.offline = int(c.slots[slot].online == NONE)
        record.request = c.slots[slot].serial if c.slots[slot].online == NONE else c.slots[slot].online
    record.a = a
    record.b = b
    record.d = d
    record.seconds = seconds


@kernel
def note_request(c, kind, instance, slot):
    note(c, kind, instance, slot, 0, 0, 0, 0.0)


@kernel
def note_instance(c, kind, instance, a):
    note(c, kind, instance, NONE, a, 0, 0, 0.0)
