"""The notice that the simulator is being compiled: when it speaks, and that the cache keeps it quiet."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from ooco_gym import _compiling
from ooco_gym._compiling import NOTICE, CompileNotice


def told(module):
    function = SimpleNamespace(__module__=module)
    return SimpleNamespace(data={"dispatcher": SimpleNamespace(py_func=function)})


def compile_nested(notice, module="ooco_gym.cluster.loop"):
    """An entry point, and a function it calls."""
    for event in (notice.on_start, notice.on_start, notice.on_end, notice.on_end):
        event(told(module))


def test_one_line_where_standard_error_is_no_terminal(capfd):
    notice = CompileNotice()
    compile_nested(notice)
    compile_nested(notice)
    assert capfd.readouterr().err == f"ooco-gym: {NOTICE}\n"


def test_nothing_about_the_functions_of_others(capfd):
    compile_nested(CompileNotice(), "somebody.else")
    assert capfd.readouterr().err == ""


def test_a_bar_on_a_terminal_that_ends_with_the_entry_point(monkeypatch, capfd):
    monkeypatch.setattr(_compiling.sys.stderr, "isatty", lambda: True, raising=False)
    notice = CompileNotice()
    notice.expected = 4
    notice.on_start(told("ooco_gym.cluster.loop"))
    assert notice._progress is not None
    notice.on_end(told("ooco_gym.cluster.loop"))
    assert notice._progress is None
    compile_nested(notice)
    assert NOTICE.split(",")[0] in capfd.readouterr().err


@pytest.mark.slow
def test_a_process_that_finds_everything_in_the_cache_is_quiet_and_quick():
    code = (
        "import gymnasium, ooco_gym, time; gymnasium.make('OOCO/Cluster-v0').reset(seed=0); print(time.process_time())"
    )
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "" and float(done.stdout) < 3.0
