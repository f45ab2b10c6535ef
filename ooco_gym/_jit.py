"""One place for the compiler's settings, and for keeping its on-disk cache honest.

Numba's cache notices a change in the file of the cached function, not in the files of the functions it
calls. The simulator is many small functions over several files, so a digest of all of them is kept beside
the cache and the cache is dropped when the digest changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

_PACKAGE = Path(__file__).resolve().parent
_COMPILED = ("roofline", "cluster", "envs")


def _drop_stale_cache() -> None:
    sources = sorted(path for folder in _COMPILED for path in (_PACKAGE / folder).glob("*.py"))
    digest = hashlib.sha256(numba.__version__.encode())
    for path in [*sources, Path(__file__)]:
        digest.update(path.read_bytes())
    stamp = _PACKAGE / "__pycache__" / "kernel.sha256"
    try:
        if stamp.is_file() and stamp.read_text() == digest.hexdigest():
            return
        for folder in _COMPILED:
            for pattern in ("*.nbi", "*.nbc"):
                for path in (_PACKAGE / folder / "__pycache__").glob(pattern):
                    path.unlink(missing_ok=True)
        stamp.parent.mkdir(exist_ok=True)
        stamp.write_text(digest.hexdigest())
    except OSError:
        pass  # a read-only installation: its sources do not change either


_drop_stale_cache()


def njit(function: Callable[..., Any]) -> Any:
    """Compile in nopython mode: cached, releasing the GIL, IEEE arithmetic (no reassociation), no Python checks."""
    return numba.njit(cache=True, nogil=True, error_model="numpy", fastmath=False)(function)


def inline(function: Callable[..., Any]) -> Any:
    """Like :func:`njit` for the smallest helpers; never an entry point, so it is not cached on its own."""
    return numba.njit(nogil=True, error_model="numpy", fastmath=False)(function)
