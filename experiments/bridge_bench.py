"""What the bridge costs and what it is worth, measured, each figure beside its bar.

    python experiments/bridge_bench.py                        every part; some ten minutes
    python experiments/bridge_bench.py parts=[overhead] rounds=5
    python experiments/bridge_bench.py parts=[export] run=runs/MY_RUN

A part is a module with ``DEFAULTS``, its settings, and ``run(settings, console)``, which measures, prints its tables
and returns what goes into results.json and its bars; where it has ``check(settings)``, that is called before any part
runs:

    export     a policy in onnxruntime against the one in torch that it came from, and the time of a decision
    overhead   the gateway against a direct call, over a fake vLLM
    kills      SIGKILLs of the whole gateway while it works on batches; every delivered line is checked
    live       an online request behind long offline work on a real vLLM: abort-and-retry against stock priorities

Figures want a machine with nothing else to do. results.json is written after every part and keeps those of parts that
were not run again. Exit status: 0 measured, 1 a bar was missed and check=true, 2 a mistake, 130 interrupted.
"""

from __future__ import annotations

import importlib
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bridge_bars import Bar, table

from examples.live_cpu.servers import ServerError
from examples.live_cpu.setup_vllm import SetupError, ready_python
from ooco_gym.bridge.arguments import nested
from ooco_gym.errors import OocoError

#: Name of a part -> its module beside this file.
PARTS = {"export": "bridge_export", "overhead": "bridge_overhead", "kills": "bridge_jobs", "live": "bridge_live"}
DEFAULTS: dict[str, Any] = {"parts": list(PARTS), "out": "runs/bridge_bench", "check": False}
NO_VLLM = "live needs vLLM's environment, which `python examples/live_cpu/setup_vllm.py` makes"


class Bench:
    """One call of the command: which parts with which settings, and the results file that they fill."""

    def __init__(self, given: Mapping[str, Any], console: Console) -> None:
        self.console = console
        self.general = chosen(DEFAULTS, given)
        self.parts = {part: importlib.import_module(PARTS[part]) for part in self._parts("parts" in given)}
        known = {**DEFAULTS}
        for module in self.parts.values():
            known |= module.DEFAULTS
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise OocoError(f"unknown setting '{unknown[0]}': known with these parts are {', '.join(known)}")
        self.settings = {
            part: {"out": self.general["out"], **chosen(module.DEFAULTS, given)} for part, module in self.parts.items()
        }
        for part, module in self.parts.items():
            if hasattr(module, "check"):
                module.check(self.settings[part])
        self.path = Path(self.general["out"]) / "results.json"
        self.results = self._earlier()
        self.finished: list[str] = []

    def _parts(self, named: bool) -> list[str]:
        """The parts to run; the absence of vLLM is a mistake where somebody asked for live by name."""
        parts: list[str] = self.general["parts"]
        wrong = [part for part in parts if part not in PARTS]
        if wrong or not parts:
            what = f"unknown part '{wrong[0]}'" if wrong else "parts is empty"
            raise OocoError(f"{what}: known are {', '.join(PARTS)}")
        self.left_out = "live" in parts and ready_python() is None
        if self.left_out and named:
            raise OocoError(NO_VLLM)
        return [part for part in PARTS if part in parts and not (part == "live" and self.left_out)]

    def _earlier(self) -> dict[str, Any]:
        from ooco_gym.bridge.exports.manifest import read_object

        return read_object(self.path) if self.path.exists() else {}

    def run(self) -> int:
        """Every part, then the table of bars; the exit status."""
        load = os.getloadavg()[0]
        if load > 1.0:
            self.console.print(f"[yellow]the load average is {load:.1f}[/yellow]: not the figures of a quiet machine")
        if self.left_out:
            self.console.print(f"left out: {NO_VLLM}")
            self.results.setdefault("live", {})["left_out"] = NO_VLLM
            self._write()
        bars = [(part, bar) for part in self.parts for bar in self._run_part(part)]
        self.console.print(table(bars, f"bars; load average at the start {load:.1f}"))
        if self.left_out:
            self.console.print(f"not measured: {NO_VLLM}")
        self.console.print(f"results in {self.path}")
        return int(self.general["check"] and not all(bar.met for _, bar in bars))

    def _run_part(self, part: str) -> list[Bar]:
        self.console.rule(part)
        began, date, load = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds"), os.getloadavg()
        found, bars = self.parts[part].run(self.settings[part], self.console)
        self.results[part] = {
            "date": date,
            "seconds": round(time.monotonic() - began, 1),
            "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine()},
            "load_average": {"start": load, "end": os.getloadavg()},
            "settings": self.settings[part],
            "bars": [bar.to_dict() for bar in bars],
            "results": found,
        }
        self._write()
        self.finished.append(part)
        return list(bars)

    def _write(self) -> None:
        from ooco_gym.evaluation.report import write_json

        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.results)


def chosen(defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``defaults`` with what was given in their place; raises OocoError where that is of another kind."""
    settings = {}
    for name, default in defaults.items():
        value = given.get(name, default)
        if isinstance(default, list) and isinstance(value, str):
            value = [value]
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        least = 0 if name == "seed" else 1e-9
        if type(value) is not type(default) or (type(value) in (int, float) and not least <= value < math.inf):
            kind = {bool: "true or false", int: "a whole number above 0", float: "a number above 0", str: "a text"}
            raise OocoError(f"{name} is {value!r}, {kind.get(type(default), 'a list')} is needed")
        settings[name] = value
    return settings


def print_help() -> None:
    print(__doc__)
    print("settings:", *(f"{name}={value}" for name, value in DEFAULTS.items()))
    for part, module in PARTS.items():
        defaults = importlib.import_module(module).DEFAULTS
        print(f"  {part}:", *(f"{name}={value}" for name, value in defaults.items()))


def main(arguments: list[str]) -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C, with every child process
    bench = None
    try:
        if {"-h", "--help"} & set(arguments):
            print_help()
            return 0
        bench = Bench(nested(arguments), Console() if sys.stdout.isatty() else Console(width=120))
        return bench.run()
    except KeyboardInterrupt:
        finished = bench.finished if bench else []
        kept = f"{', '.join(finished)} in {bench.path}" if bench and finished else "no part was finished"
        print(f"interrupted, and every process that was started has ended; {kept}", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(("ooco_gym", "bridge_", "examples")):
            raise
        print(f"error: {error.name} is not installed: pip install 'ooco-gym[train,bridge,export,dev]'", file=sys.stderr)
    except (OocoError, ServerError, SetupError) as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
