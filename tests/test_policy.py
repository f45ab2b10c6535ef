"""Policies: a network worked by hand, the saved form, and every way in which a folder can be wrong."""

import contextlib
import json
import zipfile
from itertools import pairwise

import numpy as np
import pytest

from ooco_gym.cluster import Simulator, observe, ooco_knobs
from ooco_gym.cluster.control import KNOB_COUNT, KNOB_NAMES, RULES, action_to_knobs
from ooco_gym.cluster.observation import OBSERVATION_NAMES, OBSERVATION_SIZE
from ooco_gym.errors import OocoError
from ooco_gym.policy import ConstantPolicy, NetworkPolicy, Policy, load_policy, save_policy
from ooco_gym.scenario import build_scenario


def random_network(seed=0, widths=(OBSERVATION_SIZE, 16, 16, KNOB_COUNT)):
    rng = np.random.default_rng(seed)
    layers = [
        (rng.normal(size=(out, inputs)).astype(np.float32), rng.normal(size=out).astype(np.float32))
        for inputs, out in pairwise(widths)
    ]
    return NetworkPolicy("net", layers, {"routing": "round_robin"}, {"steps": 1000, "seed": seed})


@pytest.fixture(scope="module")
def records():
    simulator = Simulator(build_scenario({"episode_s": 20, "warmup_s": 0}), {}, 0)
    telemetry = []
    for second in range(1, 21):
        simulator.run(float(second))
        telemetry.append(simulator.telemetry())
    return telemetry


@pytest.fixture
def saved(tmp_path):
    """A folder with a saved network, and its manifest to be spoiled."""
    folder = save_policy(random_network(), tmp_path / "policy")
    return folder, json.loads((folder / "policy.json").read_text())


def refused(folder, *named):
    """Loading raises one OocoError sentence that names the folder and ``named``."""
    with pytest.raises(OocoError) as caught:
        load_policy(folder)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in (str(folder), *named)), caught.value


# By hand.


def test_a_network_by_hand():
    """One hidden unit tanh(observation[0] + 0.25), read with weights 1, -1, 0, 4, -4, 0, 2, 0, 0, 0 and two biases."""
    hidden = np.zeros((1, OBSERVATION_SIZE), np.float32)
    hidden[0, 0] = 1.0
    out = np.array([[1], [-1], [0], [4], [-4], [0], [2], [0], [0], [0]], np.float32)
    bias = np.array([0, 0, 0.5, 0, 0, 0, -1, 0, 0, -0.25], np.float32)
    policy = NetworkPolicy("hand", [(hidden, np.array([0.25], np.float32)), (out, bias)])
    observation = np.zeros(OBSERVATION_SIZE, np.float32)
    observation[0] = 0.5
    t = np.tanh(0.75)
    by_hand = [t, -t, 0.5, 1.0, -1.0, 0.0, 2 * t - 1, 0.0, 0.0, -0.25]
    assert policy.action(observation) == pytest.approx(by_hand, rel=1e-6)


def test_a_constant_policy_is_oocos_where_it_is_silent(records):
    policy = ConstantPolicy("mine", {"migration": "none"}, {"gate_batch": 2.0})
    expected = ooco_knobs()
    expected[1] = 2.0
    assert policy.decide(records[0]).tolist() == policy.decide(records[-1]).tolist() == expected.tolist()
    assert policy.rules == {name: choices[0] for name, choices in RULES.items()} | {"migration": "none"}


def test_both_kinds_are_policies():
    assert isinstance(ConstantPolicy("c"), Policy) and isinstance(random_network(), Policy)


def test_a_caller_that_edits_its_knobs_does_not_edit_the_policy(records):
    policy = ConstantPolicy("c")
    knobs = policy.decide(records[0])
    with contextlib.suppress(ValueError):  # read-only is as good as a copy
        knobs *= 0.5
    assert policy.decide(records[0]).tolist() == ooco_knobs().tolist()


# Save and load.


@pytest.mark.parametrize(
    "policy",
    [
        ConstantPolicy("c", {"migration": "none"}, {"gate_batch": 1 / 3, "tpot_bound": 0.7}, "of mine"),
        random_network(),
        random_network(1, (OBSERVATION_SIZE, KNOB_COUNT)),
    ],
    ids=["constant", "network", "linear"],
)
def test_a_saved_policy_decides_the_same_bits(policy, records, tmp_path):
    again = load_policy(save_policy(policy, tmp_path / "deep" / "folder"))
    assert type(again) is type(policy) and (again.name, again.rules) == (policy.name, policy.rules)
    for telemetry in records:
        assert again.decide(telemetry).tolist() == policy.decide(telemetry).tolist()
    if isinstance(policy, NetworkPolicy):
        assert again.provenance == policy.provenance
        actions = np.array([again.action(observe(telemetry)) for telemetry in records])
        assert actions.dtype == np.float32 and (np.abs(actions) <= 1).all() and np.ptp(actions) > 0
        assert action_to_knobs(actions[0]).tolist() == again.decide(records[0]).tolist()
    else:
        assert again.description == policy.description


def test_saving_again_replaces_the_policy(records, tmp_path):
    save_policy(random_network(0), tmp_path)
    save_policy(ConstantPolicy("later"), tmp_path)
    assert load_policy(tmp_path).name == "later"
    save_policy(random_network(1), tmp_path)
    assert load_policy(tmp_path).decide(records[3]).tolist() == random_network(1).decide(records[3]).tolist()
    assert not list(tmp_path.glob("*.part"))


def test_the_manifest_says_what_the_policy_needs(saved):
    _, manifest = saved
    assert manifest["observation"] == list(OBSERVATION_NAMES) and manifest["knob_names"] == list(KNOB_NAMES)
    assert (manifest["format"], manifest["kind"], manifest["layers"]) == (1, "network", 3)
    assert manifest["provenance"] == {"steps": 1000, "seed": 0}


# What is refused.


def test_a_folder_that_is_not_there(tmp_path):
    refused(tmp_path / "nowhere", "policy.json", "not found")


def test_a_network_without_its_weights(saved):
    (saved[0] / "weights.npz").unlink()
    refused(saved[0], "weights.npz")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"policy"', "null", '{"kind": "network"}'])
def test_a_manifest_that_is_none(saved, text):
    (saved[0] / "policy.json").write_text(text)
    refused(saved[0], "not a saved policy")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": 2}, ["format 2", "reads 1"]),
        ({"kind": "tree"}, ["kind 'tree'", "constant, network"]),
        ({"observation": list(OBSERVATION_NAMES[:-1])}, ["other observations or knobs"]),
        ({"knob_names": list(KNOB_NAMES[:6])}, ["other observations or knobs"]),  # of an older contract
        ({"knob_names": list(KNOB_NAMES[::-1])}, ["other observations or knobs"]),
        ({"layers": 4}, ["weight_3"]),
        ({"layers": None}, ["not a saved policy"]),
        ({"rules": {"routing": 3}}, ["rule 'routing' is '3'"]),
        ({"rules": "none"}, ["not a saved policy"]),
        ({"layers": 2}, ["16 outputs, 10 knobs"]),
        ({"kind": "constant", "knobs": {"gate": 1}}, ["unknown knob 'gate'"]),
        ({"kind": "constant", "knobs": {"gate_batch": 99}}, ["'gate_batch' is 99"]),
        ({"kind": "constant"}, ["knobs"]),
    ],
    ids=str,
)
def test_a_manifest_that_does_not_fit(saved, change, named):
    folder, manifest = saved
    (folder / "policy.json").write_text(json.dumps(manifest | change))
    with pytest.raises(OocoError) as caught:
        load_policy(folder)
    assert all(part in str(caught.value) for part in named) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change", [{"rules": {"routing": "random"}}, {"kind": "constant", "knobs": {"gate_batch": 99}}]
)
def test_an_error_inside_the_manifest_says_in_which_folder(saved, change):
    (saved[0] / "policy.json").write_text(json.dumps(saved[1] | change))
    refused(saved[0])


@pytest.mark.parametrize("knobs", [[], None])
def test_knobs_that_are_no_mapping(saved, knobs):
    (saved[0] / "policy.json").write_text(json.dumps(saved[1] | {"kind": "constant", "knobs": knobs}))
    refused(saved[0])


def test_pickled_arrays_are_never_loaded(saved):
    marker = saved[0] / "executed"

    class Trap:
        def __reduce__(self):
            return marker.touch, ()

    weights = {name: np.array([Trap()], object) for name in ("weight_0", "bias_0", "weight_1", "bias_1")}
    np.savez(saved[0] / "weights.npz", **weights)
    refused(saved[0], "allow_pickle=False")
    assert not marker.exists()


@pytest.mark.parametrize(
    "weights",
    [
        {"weight_0": np.zeros((KNOB_COUNT, 3)), "bias_0": np.zeros(KNOB_COUNT)},
        {"weight_0": np.zeros((KNOB_COUNT, OBSERVATION_SIZE)), "bias_0": np.zeros(1)},
        {"weight_0": np.zeros((3, OBSERVATION_SIZE)), "bias_0": np.zeros(3)},
        {"weight_0": np.zeros(KNOB_COUNT), "bias_0": np.zeros(KNOB_COUNT)},
    ],
    ids=["inputs", "bias", "outputs", "rank"],
)
def test_weights_of_a_wrong_shape(saved, weights):
    np.savez(saved[0] / "weights.npz", **weights)
    (saved[0] / "policy.json").write_text(json.dumps(saved[1] | {"layers": 1}))
    with pytest.raises(OocoError, match="policy 'net': "):
        load_policy(saved[0])


def _truncated(path):
    path.write_bytes(path.read_bytes()[:200])


def _flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF
    path.write_bytes(bytes(content))


def _other_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weight_0.npy", b"not an array")


@pytest.mark.parametrize("spoil", [_other_zip, lambda path: path.write_text("hello")], ids=["other-zip", "text"])
def test_weights_that_are_something_else(saved, spoil):
    spoil(saved[0] / "weights.npz")
    refused(saved[0], "not a saved policy")


@pytest.mark.parametrize(
    "spoil", [_truncated, _flipped, lambda path: path.write_bytes(b"")], ids=["truncated", "flipped", "empty"]
)
def test_weights_that_are_damaged(saved, spoil):
    spoil(saved[0] / "weights.npz")
    refused(saved[0])


def test_weights_that_are_not_finite(saved):
    layers = [(np.full((KNOB_COUNT, OBSERVATION_SIZE), np.nan, np.float32), np.zeros(KNOB_COUNT, np.float32))]
    with pytest.raises(OocoError, match="finite"):
        NetworkPolicy("nan", layers)
