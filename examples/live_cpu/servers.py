"""Processes of the live example: vLLM servers and the gateway, on free ports of loopback, ended whatever happens.

Every server is a process group of its own, because vLLM is several processes; the group ends when its ``with`` block
does, and the kernel ends its first process if this program is killed before that.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODEL = "tiny"  # the name under which the servers offer the model
START_S = 240.0  # a server that is not ready by then is given up; 30 to 90 s are usual
STOP_S = 15.0

#: Seconds that a vLLM server may take to accept a connection or to answer /health while all cores are busy.
PATIENT = {"connect_s": 10.0, "probe_s": 10.0}

#: What keeps vLLM off the network and several of them peaceful on few cores.
VLLM_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
}


class ServerError(Exception):
    """A server did not start; one sentence, with the end of its log."""


@dataclass(frozen=True)
class Engine:
    """Settings of one vLLM server; the defaults suit the tiny model on two cores."""

    dtype: str = "float32"
    context: int = 4096
    kv_bytes: str = "128M"
    max_seqs: int = 32
    batch_tokens: int = 512
    more: Sequence[str] = ()  # further options of vLLM's server
    environment: Mapping[str, str] = field(default_factory=dict)  # variables beside VLLM_ENVIRONMENT

    def options(self) -> list[str]:
        return ["--dtype", self.dtype, "--max-model-len", str(self.context), "--kv-cache-memory-bytes", self.kv_bytes,
                "--max-num-seqs", str(self.max_seqs), "--max-num-batched-tokens", str(self.batch_tokens),
                "--enforce-eager", *self.more]  # fmt: skip


def example_connector(folder: Path) -> list[str]:
    """Options that hand KV over through files in ``folder``; a prompt must fit into one batch."""
    extra = {"shared_storage_path": str(folder)}
    config = {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": extra}
    return [
        "--disable-hybrid-kv-cache-manager",
        "--no-enable-prefix-caching",
        "--kv-transfer-config",
        json.dumps(config),
    ]


def with_nixl(engine: Engine) -> Engine:
    """The engine of one server that hands KV over through NixlConnector: buffers of the CPU, UCX on loopback."""
    config = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu",
              "kv_load_failure_policy": "fail", "kv_connector_extra_config": {"backends": ["UCX"]}}  # fmt: skip
    environment = {
        "UCX_TLS": "tcp,shm,self,sysv,posix,cma",
        "UCX_NET_DEVICES": "lo",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
    }
    return replace(engine, more=("--kv-transfer-config", json.dumps(config)), environment=environment)


@dataclass
class Server:
    """A running process group that serves HTTP."""

    name: str
    url: str
    log: Path
    process: subprocess.Popen[bytes] = field(repr=False)

    def alive(self) -> bool:
        return self.process.poll() is None

    def answers(self, path: str = "/health") -> bool:
        try:
            with urllib.request.urlopen(self.url + path, timeout=2.0) as answer:
                return bool(answer.status == 200)
        except (OSError, urllib.error.URLError):
            return False

    def wait_ready(self, seconds: float = START_S) -> None:
        """Until /health says 200; raises ServerError where the process ends or takes too long."""
        end = time.monotonic() + seconds
        while not self.answers():
            if not self.alive():
                raise ServerError(f"{self.name} ended with status {self.process.returncode}: {self.last_words()}")
            if time.monotonic() > end:
                raise ServerError(f"{self.name} was not ready within {seconds:g} s: {self.last_words()}")
            time.sleep(0.25)

    def last_words(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        telling = [line for line in lines if "Error" in line or line.startswith("error")]
        return f"{(telling or lines or ['nothing'])[-1][-300:]} (log: {self.log})"

    def metrics(self, *names: str) -> list[float]:
        """Values of one page of vLLM's or the gateway's metrics, each summed over its labels."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=10.0) as answer:
            lines = answer.read().decode().splitlines()
        found = dict.fromkeys(names, 0.0)
        for line in lines:
            name = line.split("{")[0].split(" ")[0]
            if name in found:
                found[name] += float(line.rsplit(" ", 1)[1])
        return [found[name] for name in names]

    def counter(self, name: str, label: str = "") -> float:
        """One metric, summed over those of its lines that contain ``label``."""
        with urllib.request.urlopen(self.url + "/metrics", timeout=10.0) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name) and label in line)

    def load(self) -> tuple[int, int]:
        """Requests that a vLLM server runs, and that wait in it."""
        running, waiting = self.metrics("vllm:num_requests_running", "vllm:num_requests_waiting")
        return int(running), int(waiting)

    def kill(self) -> None:
        """SIGKILL the whole group, as a machine that fails would."""
        _signal(self.process, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """SIGTERM, then SIGKILL for what is left of the group."""
        if self.alive():
            _signal(self.process, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
        _signal(self.process, signal.SIGKILL)
        self.process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _shares(count: int) -> list[set[int]]:
    """CPU cores for each of ``count`` servers: its own ones where there are enough, as every instance has its GPU."""
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // count
    return [set(cores[index * each : (index + 1) * each] if each else cores) for index in range(count)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def spawn(
    name: str,
    command: Sequence[str],
    port: int,
    log: Path,
    environment: Mapping[str, str],
    cwd: Path,
    cores: set[int] | None = None,
) -> Server:
    """Start one server without waiting for it, on ``cores`` where they are given."""

    def prepare() -> None:
        _die_with_parent()
        if cores:
            os.sched_setaffinity(0, cores)

    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, cwd=cwd,
            env={**os.environ, **environment}, start_new_session=True, preexec_fn=prepare,
        )  # fmt: skip
    return Server(name, f"http://127.0.0.1:{port}", log, process)


def start_vllm(
    python: Path, model: Path, name: str, folder: Path, engine: Engine = Engine(), cores: set[int] | None = None
) -> Server:
    """Start vLLM without waiting for it; its log is ``folder/NAME.log``."""
    port = free_port()
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port),
               "--model", str(model), "--served-model-name", MODEL, *engine.options()]  # fmt: skip
    environment = {**VLLM_ENVIRONMENT, **engine.environment}
    return spawn(name, command, port, folder / f"{name}.log", environment, folder, cores)


@contextmanager
def vllm_servers(
    python: Path,
    model: Path,
    engines: Mapping[str, Engine],
    folder: Path,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Server]]:
    """vLLM servers by name, started together, ready when the block begins."""
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        servers = {}
        for (name, engine), cores in zip(engines.items(), _shares(len(engines)), strict=True):
            servers[name] = start_vllm(python, model, name, folder, engine, cores)
            stack.callback(servers[name].stop)
        started = time.monotonic()
        for server in servers.values():
            server.wait_ready()
            say(f"{server.name} is ready at {server.url} after {time.monotonic() - started:.0f} s")
        yield servers


def start_gateway(config: Path, policy: str, port: int, log: Path, overrides: Sequence[str] = ()) -> Server:
    """Start the gateway without waiting for it."""
    command = [sys.executable, "-m", "ooco_gym.bridge", "serve", f"config={config}", f"policy={policy}",
               f"listen.port={port}", *overrides]  # fmt: skip
    path = os.pathsep.join(part for part in (str(ROOT), os.environ.get("PYTHONPATH")) if part)
    return spawn("gateway", command, port, log, {"PYTHONPATH": path}, config.parent)


@contextmanager
def gateway(config: Path, policy: str, log: Path, overrides: Sequence[str] = ()) -> Iterator[Server]:
    """The gateway over the instances of ``config``, ready when the block begins."""
    server = start_gateway(config, policy, free_port(), log, overrides)
    try:
        server.wait_ready(60.0)
        yield server
    finally:
        server.stop()


def write_cluster(
    path: Path, instances: Sequence[tuple[Server, str]], scenario: Mapping[str, Any], **more: Any
) -> Path:
    """cluster.yaml for (server, role) pairs; ``more`` are further keys of the file."""
    entries = [{"url": server.url, "role": role} for server, role in instances]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(OmegaConf.to_yaml(OmegaConf.create({"instances": entries, "scenario": dict(scenario), **more})))
    return path


def ensure_model(python: Path, folder: Path, *options: str) -> Path:
    """The tiny model in ``folder``, made there on first use; ``options`` are those of tiny_model.py."""
    if not (folder / "complete").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        command = [str(python), str(HERE / "tiny_model.py"), str(folder), *options]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **VLLM_ENVIRONMENT})
        if done.returncode:
            raise ServerError(f"the model could not be made: {done.stderr.strip().splitlines()[-1]}")
    return folder
