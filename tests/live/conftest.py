"""Real vLLM for the tests of this folder: one server per role for all of them, more where a test needs its own.

They run only when asked for, `pytest tests/live -m live`, and only where vLLM's environment is there:
`python examples/live_cpu/setup_vllm.py` makes it, or OOCO_VLLM_PYTHON names its interpreter.
"""

from contextlib import ExitStack
from pathlib import Path

import pytest

from examples.live_cpu import deployment, servers
from examples.live_cpu.servers import Engine
from examples.live_cpu.setup_vllm import SetupError, ready_python

ENGINE = Engine(max_seqs=8)


def pytest_collection_modifyitems(config, items):
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    for item in here:
        item.add_marker(pytest.mark.live)
        if "live" not in config.option.markexpr:
            item.add_marker(pytest.mark.skip(reason="starts vLLM servers: pytest tests/live -m live"))


@pytest.fixture(scope="session")
def python():
    try:
        found = ready_python()
    except SetupError as error:
        pytest.fail(str(error))
    if found is None:
        pytest.skip("vLLM's environment is absent: python examples/live_cpu/setup_vllm.py makes it")
    return found


@pytest.fixture(scope="session")
def model(python, tmp_path_factory):
    return servers.ensure_model(python, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def pair(python, model, tmp_path_factory):
    """A relaxed and a strict server that no test harms."""
    with servers.vllm_servers(
        python, model, {"relaxed": ENGINE, "strict": ENGINE}, tmp_path_factory.mktemp("pair")
    ) as found:
        yield found


@pytest.fixture(scope="session")
def scenario(pair, model):
    """The deployment as measured on the idle relaxed server."""
    return deployment.scenario(deployment.measure(pair["relaxed"]), model, ENGINE)


@pytest.fixture
def front(scenario, tmp_path):
    """Starts gateways: ``front([(server, role), ...], policy=..., **keys of the cluster file)``."""
    with ExitStack() as stack:

        def start(instances, policy="ooco", **more):
            keys = {"scrape_interval_s": 0.1, "control_interval_s": 0.2, "timeouts": servers.PATIENT, **more}
            path = servers.write_cluster(tmp_path / "cluster.yaml", instances, scenario, **keys)
            return stack.enter_context(servers.gateway(path, policy, tmp_path / "gateway.log"))

        yield start
