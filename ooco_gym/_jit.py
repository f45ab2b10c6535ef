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

from ooco_gym import _compiling

_PACKAGE = Path(__file__).resolve().parent
_COMPILED = ("roofline", "cluster")


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
_notice = _compiling.watch()


# No function of the simulator allocates, so none counts references: ``_nrt=False`` makes an allocation a compile error,
# and takes the counting of some twenty arrays off every call, which made the event loop nine times faster.
_COMMON = {"nogil": True, "error_model": "numpy", "fastmath": False, "_nrt": False}


def entry_point(function: Callable[..., Any]) -> Any:
    """Compile a function that Python calls: nopython, cached on disk, GIL released, IEEE arithmetic."""
    _notice.expected += 1
    return numba.njit(cache=True, **_COMMON)(function)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function that only compiled code calls: no Python wrapper, cached as part of its callers."""
    _notice.expected += 1
    return numba.njit(no_cpython_wrapper=True, no_cfunc_wrapper=True, **_COMMON)(function)
