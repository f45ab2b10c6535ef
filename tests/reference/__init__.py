"""A plain Python simulator of docs/specification.md, written apart from the compiled kernel to hold it to the text.

model.py      requests, instances and the backlog of offline work: what they hold, nothing of what is decided
simulator.py  the mechanism; the numbers in its comments are those of the sentences of the specification
"""

from tests.reference.simulator import Reference

__all__ = ["Reference"]
