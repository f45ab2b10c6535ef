"""Where the compiled simulator spends its time: Linux `perf` on one case of speed.py, by source file and function.

    python experiments/profile_kernel.py a1
    python experiments/profile_kernel.py c64 --functions 30

Samples are taken by `perf record` (package linux-perf) with a map of the compiled functions, so it needs Linux and the
right to sample one's own processes. Small functions are part of the callers they were inlined into. Shares are of the
time in compiled code and in the C library's mathematics, nothing else.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ooco_gym.cluster import Simulator
from ooco_gym.cluster.control import knobs_from_mapping
from ooco_gym.cluster.loop import run_many
from ooco_gym.scenario import build_scenario

sys.path.insert(0, str(Path(__file__).parent))
from speed import CASES, one_core

_MATHEMATICS = re.compile(r"^_*(?:ieee754_)?(log1p|log|exp|expm1|cos|sin|sqrt)(?:_fma)?$")


def write_map(folder: Path) -> None:
    """Tell `perf` where the functions of the event loop lie: addresses of the symbols in its compiled object."""
    library = next(iter(run_many.overloads.values())).library
    cached = Path(run_many.stats.cache_path).glob("loop.run_many-*.nbc")
    code = max(cached, key=lambda path: path.stat().st_mtime).read_bytes()
    (folder / "kernel.o").write_bytes(code[code.index(b"\x7fELF") :])
    symbols = subprocess.run(["nm", "-S", str(folder / "kernel.o")], capture_output=True, text=True, check=False).stdout
    engine = library.codegen._engine._ee
    with (folder / "map").open("w", encoding="utf-8") as file:
        for line in symbols.splitlines():
            fields = line.split()
            if len(fields) == 4 and (address := engine.get_function_address(fields[3])):
                file.write(f"{address:x} {fields[1]} {fields[3]}\n")
    (folder / f"{os.getpid()}.pid").touch()
    shutil.copy(folder / "map", f"/tmp/perf-{os.getpid()}.map")  # the name that perf looks for


def work(name: str, data_dir: str | None, repeats: int, folder: Path) -> None:
    """The child: the case over and over."""
    one_core()
    scenario, knobs = CASES[name][1](data_dir)
    for repeat in range(repeats + 1):
        simulator = Simulator(scenario, seed=0)
        simulator.set_knobs(knobs_from_mapping(knobs))
        simulator.run(scenario.horizon_s)
        if repeat == 0:
            write_map(folder)


def function_of(symbol: str) -> tuple[str, str] | None:
    """(file, function) of a sampled symbol; None for what is not the simulator's."""
    if found := _MATHEMATICS.match(symbol):
        return "C library", found.group(1)
    parts = re.findall(r"(?:8ooco_gym)(?:\d+)(cluster|roofline)\d+([a-z_]+?)(\d+)(_*[a-z].*)", symbol)
    if not parts:
        return None
    folder, file, length, rest = parts[0]
    return f"{folder}/{file}.py", rest[: int(length)]


def sample(name: str, data_dir: str | None, repeats: int, folder: Path) -> Counter[tuple[str, str]]:
    """Share of samples by (file, function)."""
    data = folder / "perf.data"
    child = [sys.executable, __file__, name, "--child", str(folder), "--repeats", str(repeats)]
    child += ["--data-dir", data_dir] if data_dir else []
    record = ["perf", "record", "-q", "-F", "5000", "-e", "cpu-clock", "-o", str(data), *child]
    done = subprocess.run(record, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"perf record failed: {done.stderr.strip().splitlines()[-1]}")
    script = ["perf", "script", "-i", str(data), "-F", "ip,sym"]
    lines = subprocess.run(script, capture_output=True, text=True, check=False).stdout.splitlines()
    symbols = (line.split(maxsplit=1)[1] for line in lines if len(line.split()) > 1)
    for leftover in folder.glob("*.pid"):
        Path(f"/tmp/perf-{leftover.stem}.map").unlink(missing_ok=True)
    counts = Counter(found for symbol in symbols if (found := function_of(symbol.strip())))
    if not counts:
        sys.exit("perf took no sample of the simulator: is the case long enough for --repeats?")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES, help="a case of speed.py")
    parser.add_argument("--functions", type=int, default=16, help="how many functions to list (default 16)")
    parser.add_argument("--repeats", type=int, default=20, help="runs of the case (default 20)")
    parser.add_argument("--data-dir", help="folder of real traces; otherwise OOCO_DATA, otherwise ../shared/data")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        work(arguments.case, arguments.data_dir, arguments.repeats, arguments.child)
        return
    for tool in ("perf", "nm"):
        if shutil.which(tool) is None:
            sys.exit(f"'{tool}' is not on the PATH: this experiment needs Linux perf and binutils")
    try:
        Simulator(build_scenario(), seed=0).run(1e-3)  # compiles, if that has to be, where it is not sampled
        with tempfile.TemporaryDirectory() as folder, Console().status(f"{arguments.case}: sampling"):
            counts = sample(arguments.case, arguments.data_dir, arguments.repeats, Path(folder))
    except KeyboardInterrupt:
        sys.exit(130)
    total, files = sum(counts.values()), Counter[str]()
    for (file, _), samples in counts.items():
        files[file] += samples
    table = Table("file", "share", "function", "share", title=f"{arguments.case}: {total:,} samples", box=SIMPLE_HEAD)
    functions = counts.most_common(arguments.functions)
    for row in range(max(len(functions), len(files))):
        file, here = files.most_common()[row] if row < len(files) else ("", 0)
        (where, function), there = functions[row] if row < len(functions) else (("", ""), 0)
        left = [file, f"{here / total:.1%}"] if file else ["", ""]
        table.add_row(*left, *([f"{where} {function}", f"{there / total:.1%}"] if function else ["", ""]))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
