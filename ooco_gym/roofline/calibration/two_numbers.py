"""A device from two measured numbers: the shares of its peak FLOP/s and of its peak bytes/s that its GEMMs reach."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from ooco_gym.errors import OocoError
from ooco_gym.roofline.calibration.fit import BOUNDS, fit
from ooco_gym.roofline.calibration.measurement import Measurement
from ooco_gym.roofline.hardware import CalibratedConstants, HardwareSpec


def from_two_numbers(
    peaks: HardwareSpec, gemm_flops: float, gemm_bytes: float, donors: Sequence[HardwareSpec]
) -> HardwareSpec:
    """A preset from the two numbers that differ most between devices: the shares of peak FLOP/s and of peak bytes/s
    that its GEMMs reach. The other constants are the mean of the donors'."""
    if not donors:
        raise OocoError("no donor: name at least one calibrated device to take the other constants from")
    mean = {name: float(np.mean([getattr(one.calibrated, name) for one in donors])) for name in BOUNDS}
    constants = CalibratedConstants(**{**mean, "gemm_flops": gemm_flops, "gemm_bytes": gemm_bytes})
    whence = ", ".join(one.name for one in donors)
    source = f"gemm_flops and gemm_bytes measured, the other constants from {whence}"
    return replace(peaks, calibrated=constants, is_calibrated=False, source=source)


def two_numbers(rows: Iterable[Measurement], peaks: HardwareSpec) -> tuple[float, float]:
    """(gemm_flops, gemm_bytes) of a device from 16-bit GEMM timings, as whole iterations see them.

    The two and the fixed time are fitted to the GEMMs with 1,024 to 32,768 columns in and out and at most 8,192 rows:
    the best rate of the largest GEMM is some 10 % above what a model's GEMMs reach. Raises OocoError when the table has
    none with at least 1,024 rows or none with at most 16.
    """
    chosen = [
        row
        for row in rows
        if row.kind == "gemm" and min(row.n, row.k) >= 1024 and max(row.n, row.k) <= 32768 and row.tokens <= 8192
    ]
    if not any(row.tokens >= 1024 for row in chosen) or not any(row.tokens <= 16 for row in chosen):
        raise OocoError("GEMMs of 1024 to 32768 columns are needed, some of 1024 rows or more and some of 1 to 16")
    fitted = fit(chosen, peaks, by_group=False).device.calibrated
    return fitted.gemm_flops, fitted.gemm_bytes
