"""Random streams with common random numbers: one seed, one independent generator per purpose.

Two runs that differ in the rate or the scheduler must see the *same* requests. Hence each purpose has its own
stream, and each consumer draws a fixed number of uniforms per request, so that item k of a stream never
depends on how many items are drawn.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from ooco_gym.errors import OocoError
from ooco_gym.workload.checks import is_number

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int32]

_WORKLOAD = 0x574C  # keeps these streams apart from any other use of the same episode seed


class Stream(IntEnum):
    """What a stream is for. The numbers are part of the results: never renumber, only append."""

    ONLINE_ARRIVALS = 0
    ONLINE_LENGTHS = 1
    TRACE_WINDOW = 2
    OFFLINE_ARRIVALS = 3
    OFFLINE_LENGTHS = 4


def generator(seed: Any, stream: Stream) -> np.random.Generator:
    """Generator of one stream of one seed; OocoError unless the seed is a whole number of at least zero."""
    if not is_number(seed) or seed != int(seed) or seed < 0:
        raise OocoError(f"seed is {seed!r}, it must be a whole number of at least 0")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(int(seed), spawn_key=(_WORKLOAD, stream))))


def normal_pair(u1: FloatArray, u2: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Two independent standard normals from two uniforms on [0, 1) (Box and Muller 1958).

    Used instead of ``Generator.standard_normal``, whose rejection takes a varying number of draws per value.
    """
    radius = np.sqrt(-2.0 * np.log1p(-u1))
    angle = 2.0 * np.pi * u2
    return radius * np.cos(angle), radius * np.sin(angle)
