"""Loading an export: without torch, fast, and with one clear sentence for every way in which a folder can be wrong."""

import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from ooco_gym.bridge.exports import deployed as loading
from ooco_gym.bridge.exports import manifest as schema
from ooco_gym.bridge.exports.deployed import DeployedNetwork, load_deployed, named
from ooco_gym.cluster.control import KNOB_COUNT, KNOB_NAMES, ooco_knobs
from ooco_gym.cluster.observation import OBSERVATION_SIZE
from ooco_gym.errors import OocoError
from ooco_gym.policy import ConstantPolicy, NetworkPolicy, Policy, save_policy
from tests.bridge.exports import CONSTANT, export_of, network, random_observations, record

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["network", "constant"])
def exported(request, tmp_path):
    """Both kinds of export, to be spoiled, each with its manifest."""
    return export_of(request.param, tmp_path / "export")


@pytest.fixture
def exported_network(tmp_path):
    return export_of("network", tmp_path / "export")


def refused(folder, *parts):
    """Loading raises one sentence that names the folder and ``parts``."""
    with pytest.raises(OocoError) as caught:
        load_deployed(folder)
    said = str(caught.value)
    assert "\n" not in said and said.startswith(f"policy {folder}"), said
    assert all(part in said for part in parts), said


def rewrite(folder, manifest, **changes):
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


# What loads.


def test_both_kinds_are_policies(exported):
    policy = load_deployed(exported[0])
    assert isinstance(policy, Policy)
    policy.reset()
    knobs = policy.decide(record())
    assert knobs.shape == (KNOB_COUNT,) and knobs.dtype == np.float64


@pytest.mark.parametrize("policy", [network(), CONSTANT], ids=["network", "constant"])
def test_a_saved_policy_and_a_run_load_too(policy, tmp_path):
    save_policy(policy, tmp_path / "run" / "policy")
    for folder in (tmp_path / "run" / "policy", str(tmp_path / "run")):
        again = load_deployed(folder)
        assert type(again) is type(policy)
        assert again.decide(record(3)).tolist() == policy.decide(record(3)).tolist()


def test_the_fallback_is_oocos_and_needs_no_file():
    policy = named("ooco")
    assert policy.name == "ooco" and policy.rules == ConstantPolicy("x").rules
    assert policy.decide(record()).tolist() == ooco_knobs().tolist()
    with pytest.raises(OocoError, match=r"unknown policy 'best': known without a folder are ooco"):
        named("best")


HIDDEN = "torch gymnasium stable_baselines3 onnx onnxscript agents baselines hydra wandb cmaes matplotlib"


def alone(code, *arguments, hidden=HIDDEN):
    """Run code in an interpreter in which some modules cannot be imported."""
    hide = f"import sys\nfor name in {hidden.split()}: sys.modules[name] = None\n"
    return subprocess.run(
        [sys.executable, "-P", "-c", hide + code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_no_training_library_is_needed(tmp_path):
    """Loads and decides where neither torch nor gymnasium nor stable-baselines3 can be imported."""
    net, _ = export_of("network", tmp_path / "network")
    constant, _ = export_of("constant", tmp_path / "constant")
    saved = save_policy(network(), tmp_path / "saved")
    telemetry = tmp_path / "telemetry.json"
    telemetry.write_text(json.dumps(record(5).to_dict()))
    done = alone(
        "import json\n"
        "from ooco_gym.bridge.exports.deployed import load_deployed, named\n"
        "from ooco_gym.cluster.telemetry import Telemetry\n"
        "telemetry = Telemetry.from_dict(json.load(open(sys.argv[1])))\n"
        "policies = [*map(load_deployed, sys.argv[2:]), named('ooco')]\n"
        "print(json.dumps([policy.decide(telemetry).tolist() for policy in policies]))\n",
        telemetry,
        net,
        constant,
        saved,
    )
    assert done.returncode == 0, done.stderr
    decided = json.loads(done.stdout)
    assert decided[0] == pytest.approx(network().decide(record(5)).tolist(), rel=1e-4, abs=1e-5)
    assert decided[1] == CONSTANT.vector.tolist()
    assert decided[2] == pytest.approx(network().decide(record(5)).tolist(), rel=1e-6)
    assert decided[3] == ooco_knobs().tolist()


def test_a_constant_needs_no_onnxruntime_and_a_network_says_that_it_does(tmp_path):
    net, _ = export_of("network", tmp_path / "network")
    constant, _ = export_of("constant", tmp_path / "constant")
    code = "from ooco_gym.bridge.exports.deployed import load_deployed\nprint(load_deployed(sys.argv[1]).name)"
    done = alone(code, constant, hidden=f"{HIDDEN} onnxruntime")
    assert (done.returncode, done.stdout) == (0, "patient\n"), done.stderr
    done = alone(code, net, hidden=f"{HIDDEN} onnxruntime")
    assert "OocoError: policy" in done.stderr and "needs onnxruntime: pip install" in done.stderr


def test_a_decision_takes_less_than_a_millisecond(tmp_path):
    """The 99th percentile over 2,000 decisions, in CPU time of this thread, observation and mapping included."""
    policy = load_deployed(export_of("network", tmp_path / "export")[0])
    records = [record(seed) for seed in range(50)]
    for telemetry in records:
        policy.decide(telemetry)
    taken_s = []
    for index in range(2000):
        before = time.thread_time_ns()
        policy.decide(records[index % len(records)])
        taken_s.append((time.thread_time_ns() - before) * 1e-9)
    assert np.percentile(taken_s, 99) < 1e-3


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads as Linux shows them")
def test_a_decision_stays_on_its_thread(exported_network):
    """A pool of its own would compete with the gateway for the cores."""
    load_deployed(exported_network[0])  # whatever the libraries start once
    before = set(os.listdir("/proc/self/task"))
    policies = [load_deployed(exported_network[0]) for _ in range(3)]
    for policy in policies:
        policy.actions(random_observations(2000))
    assert set(os.listdir("/proc/self/task")) <= before  # one of an earlier test may have ended


# What is refused.


def test_folders_that_are_none(tmp_path):
    refused(tmp_path / "absent", "not found", "manifest.json", "policy.json")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "neither manifest.json", "nor policy.json")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]", b"3", b'"x"', b"null", b"9" * 5000])
def test_a_manifest_that_is_no_object(exported, content):
    (exported[0] / "manifest.json").write_bytes(content)
    refused(exported[0], "manifest.json", "JSON")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.99])
def test_a_truncated_manifest(exported, share):
    content = (exported[0] / "manifest.json").read_bytes()
    (exported[0] / "manifest.json").write_bytes(content[: int(share * len(content))])
    refused(exported[0], "not JSON")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"format": "another"}, ["format is 'another'", schema.FORMAT]),
        ({"format": None}, ["format is None"]),
        ({"format_version": 2}, ["format_version is 2", "reads 1"]),
        ({"format_version": True}, ["format_version is True"]),
        ({"format_version": "1"}, ["format_version is '1'"]),
        ({"kind": "tree"}, ["kind is 'tree'", "constant, network"]),
        ({"kind": ["network"]}, ["kind is ['network']"]),
        ({"name": ""}, ["name is ''", "printable"]),
        ({"name": "a\x1b[2Jb"}, ["name is", "printable"]),
        ({"name": "a" * 201}, ["name is", "1 to 200"]),
        ({"name": 3}, ["name is '3'"]),
        ({"package_version": None}, ["package_version is 'None'"]),
        ({"rules": {"routing": "random"}}, ["rule 'routing' is 'random'", "least_pending"]),
        ({"rules": {"turns": "left"}}, ["unknown rule 'turns'"]),
        ({"rules": {"routing": ["least_pending"]}}, ["rule 'routing'"]),
        ({"rules": {}}, ["does not name every rule"]),
        ({"rules": None}, ["rules is None"]),
        ({"observation": []}, ["observation has 0 entries", f"has {OBSERVATION_SIZE}"]),
        ({"observation": None}, ["observation has NoneType entries"]),
        ({"knobs": {}}, ["knobs has dict entries", f"has {KNOB_COUNT}"]),
        ({"action": {"to_knob": "knob = action"}}, ["action.to_knob"]),
        ({"action": None}, ["action.to_knob"]),
    ],
    ids=str,
)
def test_a_manifest_that_does_not_fit(exported, changes, parts):
    folder, manifest = exported
    rewrite(folder, manifest, **changes)
    refused(folder, "manifest.json", *parts)


@pytest.mark.parametrize("key", ["format", "format_version", "kind", "name", "rules", "observation", "knobs", "action"])
def test_a_manifest_with_something_missing(exported, key):
    folder, manifest = exported
    del manifest[key]
    rewrite(folder, manifest)
    refused(folder, "manifest.json", key.partition("_")[0])


@pytest.mark.parametrize(
    ("what", "index", "key", "value"),
    [
        ("observation", 0, "name", "queued_prefill"),
        ("observation", 3, "high", 9.0),
        ("observation", 18, "per", None),
        ("observation", 21, "scale", 1 / 1024),
        ("observation", 21, "field", "output_mean_tokens"),
        ("observation", 40, "knob", "tpot_bound"),
        ("knobs", 1, "log", False),
        ("knobs", 6, "high", 4096.0),
        ("knobs", 2, "ooco", 0.9),
    ],
)
def test_another_observation_or_other_knobs(exported, what, index, key, value):
    """Each of these would load and decide nonsense if only names or only lengths were compared."""
    folder, manifest = exported
    manifest[what][index][key] = value
    rewrite(folder, manifest)
    refused(folder, f"{what}[{index}]", f"{key} is", "train and export it again")


def test_entries_in_another_order_or_not_objects(exported):
    folder, manifest = exported
    rewrite(folder, manifest, observation=manifest["observation"][::-1])
    refused(folder, "observation[0]")
    rewrite(folder, manifest, observation=[3] * OBSERVATION_SIZE)
    refused(folder, "observation[0] is int")


def test_prose_may_differ(exported):
    folder, manifest = exported
    manifest["knobs"][0]["meaning"] = manifest["observation"][0]["live"] = "other words"
    rewrite(folder, manifest, training=None, evaluation=None, another_key=1)
    assert load_deployed(folder).name == manifest["name"]


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (None, "settings must give all of"),
        ({}, "settings must give all of"),
        (dict.fromkeys((*KNOB_NAMES, "more"), 1.0), "settings must give all of"),
        ({**dict.fromkeys(KNOB_NAMES, 0.6), "prefill_chunk": 512, "gate_batch": 99}, "'gate_batch' is 99"),
        ({**dict.fromkeys(KNOB_NAMES, 0.6), "gate_batch": 10**400}, "too large"),
        ({**dict.fromkeys(KNOB_NAMES, 0.6), "gate_batch": "1"}, "'gate_batch' is '1'"),
        ({**dict.fromkeys(KNOB_NAMES, 0.6), "prefill_chunk": 512, "gate_batch": float("nan")}, "'gate_batch' is nan"),
    ],
)
def test_constant_settings_that_are_wrong(tmp_path, settings, part):
    folder, manifest = export_of("constant", tmp_path / "export")
    rewrite(folder, manifest, settings=settings)
    refused(folder, part)


def test_a_network_that_is_missing(exported_network):
    (exported_network[0] / "policy.onnx").unlink()
    refused(exported_network[0], "policy.onnx not found")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: content + b"\0",
        lambda content: content[:1000] + bytes([content[1000] ^ 1]) + content[1001:],
    ],
    ids=["truncated", "empty", "longer", "one bit"],
)
def test_a_network_that_was_damaged_or_altered(exported_network, spoil):
    path = exported_network[0] / "policy.onnx"
    path.write_bytes(spoil(path.read_bytes()))
    refused(exported_network[0], "SHA-256", "damaged or altered")


@pytest.mark.parametrize("recorded", [None, {}, {"sha256": None}, {"sha256": 3}, "0"])
def test_a_network_without_its_digest(exported_network, recorded):
    rewrite(*exported_network, network=recorded)
    refused(exported_network[0], "SHA-256")


def replace_network(exported_network, content):
    """Another network with a digest that fits, as someone would who builds one by hand."""
    folder, manifest = exported_network
    (folder / "policy.onnx").write_bytes(content)
    rewrite(folder, manifest, network={"sha256": hashlib.sha256(content).hexdigest()})
    return folder


def handmade(
    inputs=("observation",),
    outputs=("action",),
    shape=("batch", OBSERVATION_SIZE),
    out=("batch", KNOB_COUNT),
    weight=None,
    dtype=np.float32,
):
    """A linear ONNX network by hand."""
    onnx = pytest.importorskip("onnx")
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    weight = np.zeros((OBSERVATION_SIZE, KNOB_COUNT), dtype) if weight is None else weight
    tensors = [onnx.numpy_helper.from_array(weight, "weight")]
    nodes = [onnx.helper.make_node("MatMul", [inputs[0], "weight"], [outputs[0]])]
    nodes += [onnx.helper.make_node("Identity", [outputs[0]], [name]) for name in outputs[1:]]
    graph = onnx.helper.make_graph(
        nodes,
        "handmade",
        [onnx.helper.make_tensor_value_info(name, kind, shape) for name in inputs],
        [onnx.helper.make_tensor_value_info(name, kind, out) for name in outputs],
        tensors,
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)


def test_a_network_made_by_hand_loads(exported_network):
    folder = replace_network(exported_network, handmade().SerializeToString())
    assert load_deployed(folder).action(random_observations(1)[0]).tolist() == [0.0] * KNOB_COUNT


@pytest.mark.parametrize(
    ("how", "part"),
    [
        ({"inputs": ("obs",)}, "input is [('obs'"),
        ({"outputs": ("knobs",)}, "output is [('knobs'"),
        ({"inputs": ("observation", "state")}, "input is"),
        ({"outputs": ("action", "value")}, "output is"),
        ({"shape": ("batch", 12), "weight": np.zeros((12, KNOB_COUNT), np.float32)}, "[batch, 44] is needed"),
        ({"out": ("batch", 3), "weight": np.zeros((OBSERVATION_SIZE, 3), np.float32)}, "[batch, 10] is needed"),
        ({"shape": (1, OBSERVATION_SIZE), "out": (1, KNOB_COUNT)}, "[batch, 44] is needed"),
        ({"dtype": np.float64}, "tensor(double)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_network_of_another_shape(exported_network, how, part):
    refused(replace_network(exported_network, handmade(**how).SerializeToString()), "policy.onnx", part)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x08\x0a", os.urandom(500)], ids=["empty", "text", "head", "noise"]
)
def test_a_file_that_is_no_network(exported_network, content):
    refused(replace_network(exported_network, content), "policy.onnx", "not a network")


def test_a_network_that_reads_another_file_is_not_loaded(exported_network, tmp_path, monkeypatch):
    """Weights outside the file that was hashed would escape the digest, and reach any file of the machine."""
    onnx = pytest.importorskip("onnx")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    for place in ("outside.bin", "../outside.bin", str(tmp_path / "outside.bin"), str(here / "outside.bin")):
        model = handmade()
        tensor = model.graph.initializer[0]
        for folder in (tmp_path, here, exported_network[0]):
            (folder / "outside.bin").write_bytes(tensor.raw_data)
        onnx.external_data_helper.set_external_data(tensor, place, 0, len(tensor.raw_data))
        tensor.ClearField("raw_data")
        refused(replace_network(exported_network, model.SerializeToString()), "policy.onnx", "not a network")


def test_an_action_that_is_not_finite_is_an_error(exported_network):
    """Of every observation: refused on loading. Of some: when it happens, for the gateway to fall back."""
    weight = np.full((OBSERVATION_SIZE, KNOB_COUNT), np.nan, np.float32)
    refused(replace_network(exported_network, handmade(weight=weight).SerializeToString()), "not 10 finite numbers")
    weight = np.zeros((OBSERVATION_SIZE, KNOB_COUNT), np.float32)
    weight[0] = 3e38  # overflows where queued prefill is above 1
    policy = load_deployed(replace_network(exported_network, handmade(weight=weight).SerializeToString()))
    with pytest.raises(OocoError, match="not 10 finite numbers"):
        policy.decide(record(queued_prefill_mean_s=2.0, ttft_slo_s=0.5))


def test_a_network_that_fails_is_an_error(exported_network):
    policy = load_deployed(exported_network[0])
    with pytest.raises(OocoError, match="policy 'net': the network failed"):
        policy.actions(np.zeros((1, 3), np.float32))
    assert isinstance(policy, DeployedNetwork) and np.isfinite(policy.decide(record())).all()


# Files that would exhaust or block the process.


def test_files_over_the_limits(exported_network, monkeypatch):
    folder = exported_network[0]
    monkeypatch.setattr(loading, "MAX_NETWORK_BYTES", 1000)
    refused(folder, "policy.onnx is larger than 1,000 bytes")
    monkeypatch.setattr(schema, "MAX_JSON_BYTES", 500)
    refused(folder, "manifest.json is larger than 500 bytes")


@pytest.mark.parametrize("name", ["manifest.json", "policy.onnx"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_regular_file(exported_network, name, make):
    """A pipe would block the start of the gateway for ever."""
    (exported_network[0] / name).unlink()
    make(exported_network[0] / name)
    refused(exported_network[0], f"{name} is not a regular file")


def test_saved_arrays_that_unpack_to_more_than_the_limit(tmp_path):
    folder = save_policy(network(), tmp_path / "saved")
    with zipfile.ZipFile(folder / "weights.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("weight_0.npy", bytes(100 << 20))
    with pytest.raises(OocoError, match=r"unpacks to 104,857,600 bytes, at most 67,108,864"):
        load_deployed(folder)


@pytest.mark.parametrize("content", [b"", b"hello"])
def test_saved_arrays_that_are_damaged(tmp_path, content):
    folder = save_policy(network(), tmp_path / "saved")
    (folder / "weights.npz").write_bytes(content)
    refused(folder)


def _deflated(path):
    with np.load(path) as arrays:
        np.savez_compressed(path, **dict(arrays))
    content = bytearray(path.read_bytes())
    content[200:400] = bytes(200)
    path.write_bytes(content)


def _of_a_petabyte(path):
    """A header that claims more than there is memory."""
    with zipfile.ZipFile(path, "w") as archive:
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10, 100000000000000), }"
        archive.writestr("weight_0.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


@pytest.mark.parametrize("spoil", [_deflated, _of_a_petabyte])
def test_saved_arrays_that_make_numpy_fail_in_other_ways(tmp_path, spoil):
    folder = save_policy(network(), tmp_path / "saved")
    spoil(folder / "weights.npz")
    refused(folder)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"knobs": {"gate_batch": 1' + "0" * 400 + "}}"])
def test_a_saved_manifest_that_makes_python_fail_in_other_ways(tmp_path, content):
    folder = save_policy(CONSTANT, tmp_path / "saved")
    if content.startswith("{"):
        content = json.dumps(json.loads((folder / "policy.json").read_text()) | json.loads(content))
    (folder / "policy.json").write_text(content)
    refused(folder)


def test_pickles_are_never_loaded(tmp_path):
    folder, marker = save_policy(network(), tmp_path / "saved"), tmp_path / "executed"

    class Trap:
        def __reduce__(self):
            return marker.touch, ()

    np.savez(folder / "weights.npz", weight_0=np.array([Trap()], object), bias_0=np.zeros(1))
    refused(folder)
    assert not marker.exists()


def test_a_network_policy_is_what_training_saved(tmp_path):
    assert isinstance(load_deployed(save_policy(network(), tmp_path / "saved")), NetworkPolicy)
