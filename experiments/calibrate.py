"""Constants of your own accelerator, from times you measured on it, as a preset that `hardware=NAME` uses at once.

    python experiments/calibrate.py --name my-gpu --peak-flops 989e12 --bandwidth 3.35e12 --memory 80e9 \\
        --table my.csv                       fit every constant that the table identifies
    python experiments/calibrate.py --name my-gpu --peak-flops 989e12 --bandwidth 3.35e12 --memory 80e9 \\
        --two-numbers 0.75 0.89              or: the shares of peak FLOP/s and bytes/s that its GEMMs reach

The table is a CSV file, one measured time per row. Leave a column empty, or out, where it does not apply:

{columns}

For example:

    kind,ms,model,tp,tokens,n,k,prefill_tokens,decodes,context_tokens
    gemm,0.151,,,1024,12288,4096,,,
    attention,0.074,llama-3.1-8b,1,,,,,64,2048
    iteration,11.8,llama-3.1-8b,1,,,,,64,2048
    iteration,43.0,llama-3.1-8b,1,,,,512,64,2048

Whole iterations (what one step of the engine took on the device) decide; they alone cannot tell the fixed times of an
operator from those of its neighbours, for which some single kernels are needed. A good table has decode batches of 1 to
256 at several contexts, prefills of 64 to 8,192 tokens, mixtures of both, and at least two models; three or more models
make the uncertainty honest. `chain_ns` and `decode_row_pad` need mixtures, `allreduce_*` need tp of 2 or more.

What the data do not identify keeps the donor's value and is printed as such. docs/calibration.md has the errors to
expect. The preset goes to conf/hardware/NAME.yaml, or to --out.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ooco_gym import presets
from ooco_gym.errors import OocoError
from ooco_gym.roofline.calibration.fit import Fit, fit
from ooco_gym.roofline.calibration.preset import write_yaml
from ooco_gym.roofline.calibration.table import COLUMNS, read_table
from ooco_gym.roofline.calibration.two_numbers import from_two_numbers
from ooco_gym.roofline.hardware import HardwareSpec, resolve_hardware


def described_columns() -> str:
    lines = []
    for name, what in COLUMNS.items():
        lines += textwrap.wrap(what, 118, initial_indent=f"  {name:<16}", subsequent_indent=" " * 18)
    return "\n".join(lines)


def print_fit(fitted: Fit, console: Console) -> None:
    table = Table(title=f"{fitted.device.name}: constants", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("constant", "value", "standard error", "donor's", ""):
        table.add_column(heading, justify="left" if heading in ("constant", "") else "right")
    for name, one in fitted.constants.items():
        error = f"{one.error:.2g}" if one.error < float("inf") else "no such row"
        said = "" if one.identified else "not identified: the donor's value kept"
        table.add_row(name, f"{one.value:.4g}", error, f"{one.donor:.4g}", said)
    console.print(table)
    for kind, seen in fitted.in_sample.items():
        errors = f"MAPE {seen['mape']:.1f} %, p95 {seen['p95']:.1f} %, bias {seen['bias']:+.1f} %"
        console.print(f"in sample, {kind}: {errors} of {seen['n']:,}")


def calibrated(arguments: argparse.Namespace, console: Console) -> tuple[HardwareSpec, dict[str, str], str]:
    """The device, notes beside its constants, and the comment at the top."""
    donor = resolve_hardware(arguments.donor)
    peaks = replace(
        donor,
        name=arguments.name,
        peak_flops_per_s=arguments.peak_flops,
        hbm_bytes_per_s=arguments.bandwidth,
        hbm_bytes=arguments.memory,
        link_bytes_per_s=arguments.link,
    )
    if arguments.two_numbers:
        flops, moved = arguments.two_numbers
        return from_two_numbers(peaks, flops, moved, [donor]), {}, "Peaks and two measured numbers."
    fitted = fit(read_table(arguments.table, arguments.host_ms), peaks)
    print_fit(fitted, console)
    kept = [name for name, one in fitted.constants.items() if not one.identified]
    whole = fitted.in_sample.get("iteration")
    source = f"fitted to {arguments.table.name}"
    if whole:
        source += f"; whole iterations in sample: MAPE {whole['mape']:.1f} %, p95 {whole['p95']:.1f} %"
    note = f"not identified: that of {donor.name}"
    device = replace(fitted.device, source=source)
    return device, dict.fromkeys(kept, note), f"Fitted to {arguments.table.name}; peaks as given."


def main() -> None:
    assert __doc__ is not None
    text = __doc__.replace("{columns}", described_columns())
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", required=True, help="name of the device and of its preset")
    parser.add_argument("--peak-flops", type=float, required=True, help="dense 16-bit FLOP/s of the datasheet")
    parser.add_argument("--bandwidth", type=float, required=True, help="memory bytes/s of the datasheet")
    parser.add_argument("--memory", type=float, required=True, help="memory in bytes")
    parser.add_argument("--link", type=float, default=32e9,
                        help="bytes/s to another device, one way (32e9: PCIe 4.0 x16)")  # fmt: skip
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--table", type=Path, help="CSV file of measured times")
    source.add_argument("--two-numbers", type=float, nargs=2, metavar=("GEMM_FLOPS", "GEMM_BYTES"),
                        help="shares of the two peaks that GEMMs reach")  # fmt: skip
    parser.add_argument("--donor", default="h100",
                        help="preset that gives what is not measured; take the nearest kin: "
                        + ", ".join(presets.names("hardware")))  # fmt: skip
    parser.add_argument("--host-ms", type=float, default=0.0,
                        help="the engine's own milliseconds in each whole iteration of the table (0)")  # fmt: skip
    parser.add_argument("--out", type=Path, help="file to write (conf/hardware/NAME.yaml)")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    arguments = parser.parse_args()
    if not re.fullmatch(r"[a-z][a-z0-9._-]*", arguments.name) or arguments.name in ("true", "false", "null"):
        parser.error(
            f"--name is '{arguments.name}', accepted are small letters, digits, '-', '_' and '.', a letter first"
        )
    if arguments.two_numbers and not all(share <= 1.5 for share in arguments.two_numbers):
        parser.error(f"--two-numbers are {arguments.two_numbers}, shares of the peaks are needed, at most 1.5")
    if not 0.0 <= arguments.host_ms < float("inf"):
        parser.error(f"--host-ms is {arguments.host_ms}, milliseconds of at least 0 are needed")
    console = Console() if sys.stdout.isatty() else Console(width=120)
    path = arguments.out or presets.conf_dir() / "hardware" / f"{arguments.name}.yaml"
    try:
        if path.exists() and not arguments.overwrite:
            raise OocoError(f"{path} is there: choose another --name or --out, or give --overwrite")
        device, notes, head = calibrated(arguments, console)
        write_yaml(device, path, notes, head)
        console.print(f"{path}: {device.source}")
        if arguments.out is None:
            resolve_hardware(arguments.name)  # what was written can be read
            console.print(f"use it as hardware={arguments.name}")
    except OocoError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
