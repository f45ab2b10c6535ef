"""A plain Python simulator of docs/specification.md, written apart from the compiled kernel to hold it to the text.

model.py        requests, instances and the backlog (14): what they hold, nothing of what is decided
simulator.py    set-up, events (5-8), the order of a decision (9), results
iterations.py   cost and start of an iteration (24, 36, 38), what is booked at its end (9, 15, 16), preemption (20, 21)
memory.py       KV and eviction (26, 31, 32, 37), checkpoints (43, 44)
moves.py        routing (19), choice of an instance (35), hand-over (17), transfers (29, 30)
relaxed.py      a relaxed instance (10-13), and what the backlog offers (32)
strict.py       a strict instance (22, 23, 25, 27, 39), pushback (42)
unified.py      a unified instance (40)
disruptions.py  role changes (45, 46), failures (47-49), cancellations (50)

The numbers are those of the sentences of the specification.
"""

from tests.reference.simulator import Reference

__all__ = ["Reference"]
