"""Explain: a network whose dependences are known by hand, the words, and every wrong record."""

import json

import numpy as np
import pytest

from ooco_gym.bridge.exports import explain as explaining
from ooco_gym.bridge.exports.deployed import load_deployed
from ooco_gym.bridge.exports.explain import explain_command
from ooco_gym.bridge.exports.explanation import explain
from ooco_gym.bridge.exports.words import KNOB_UNITS, in_words, knob_in_words
from ooco_gym.cluster.control import KNOB_COUNT, KNOB_NAMES, KNOBS, ooco_action, ooco_knobs
from ooco_gym.cluster.observation import OBSERVATION_NAMES, OBSERVATION_SIZE
from ooco_gym.cluster.telemetry import FIELD_NAMES, FIELDS, FIRST_KNOB
from ooco_gym.policy import ConstantPolicy, NetworkPolicy, save_policy
from tests.bridge.exports import CONSTANT, export_of, network, record

IN_FORCE = {f"knob_{name}": value for name, value in zip(KNOB_NAMES, ooco_knobs(), strict=True)}


def linear(weights):
    """OOCO's action plus weights of (knob, entry): a network whose dependences are its weights."""
    matrix = np.zeros((KNOB_COUNT, OBSERVATION_SIZE), np.float32)
    for (knob, entry), weight in weights.items():
        matrix[KNOB_NAMES.index(knob), OBSERVATION_NAMES.index(entry)] = weight
    return NetworkPolicy("linear", [(matrix, ooco_action().astype(np.float32))])


@pytest.fixture
def telemetry_json(tmp_path):
    path = tmp_path / "telemetry.json"
    path.write_text(json.dumps(record(1).to_dict()))
    return path


@pytest.fixture
def policy_folder(tmp_path):
    return export_of("network", tmp_path / "policy")[0]


# What a knob hangs on.


def test_the_drivers_of_a_linear_network_by_hand():
    """tpot_bound starts at action 0.46; its range 0.9 spans 1.8 of the action: weight w moves it 0.5 w per unit."""
    policy = linear(
        {
            ("tpot_bound", "violation_rate_60s"): -0.4,  # over 0..1: from 0.98 down by 0.2
            ("tpot_bound", "oldest_wait"): 0.02,  # over 0..5: up by 0.05
            ("tpot_bound", "relaxed_kv_max"): -0.3,  # over 0..1: down by 0.15
            ("tpot_bound", "strict_kv_max"): 0.01,  # over 0..1: up by 0.005, the fourth
        }
    )
    seen = {"violation_rate_60s": 0.5, "oldest_wait_s": 0.0, "relaxed_kv_max": 0.0, "strict_kv_max": 0.0}
    explanation = explain(policy, record(1, **seen, **IN_FORCE))
    decision = explanation.decisions[KNOB_NAMES.index("tpot_bound")]
    assert decision.value == pytest.approx(0.88) and decision.in_force == 0.98 and decision.changed
    drivers = decision.drivers
    assert [driver.entry for driver in drivers] == ["violation_rate_60s", "relaxed_kv_max", "oldest_wait"]
    assert [(driver.low, driver.high) for driver in drivers] == [(0, 1), (0, 1), (0, 5)]
    assert [driver.knob_at_low for driver in drivers] == pytest.approx([0.98, 0.88, 0.88], abs=1e-5)
    assert [driver.knob_at_high for driver in drivers] == pytest.approx([0.78, 0.73, 0.93], abs=1e-5)
    assert [driver.share_of_range for driver in drivers] == pytest.approx([0.2 / 0.9, 0.15 / 0.9, 0.05 / 0.9], abs=1e-5)
    others = [other for other in explanation.decisions if other is not decision]
    assert not any(other.changed or other.drivers for other in others)


def test_a_logarithmic_knob_is_measured_on_its_own_scale():
    """pull_length from 1 to 10 is half of its range 0.1..10."""
    policy = linear({("pull_length", "violation_rate_60s"): 0.9})
    explanation = explain(policy, record(1, violation_rate_60s=1.0, **IN_FORCE))
    (driver,) = explanation.decisions[KNOB_NAMES.index("pull_length")].drivers
    assert (driver.knob_at_low, driver.knob_at_high) == pytest.approx((1.0, 10.0), rel=1e-5)
    assert driver.share_of_range == pytest.approx(0.5, rel=1e-5)


def test_a_swing_between_the_ends_is_seen():
    """A bump in the middle of the range has equal ends: the difference of the ends alone would call it nothing."""
    hidden = np.zeros((2, OBSERVATION_SIZE), np.float32)
    hidden[:, OBSERVATION_NAMES.index("violation_rate_60s")] = 10.0
    out = np.zeros((KNOB_COUNT, 2), np.float32)
    out[KNOB_NAMES.index("kv_reserve")] = [1.0, -1.0]
    bias = ooco_action().astype(np.float32)
    policy = NetworkPolicy("bump", [(hidden, np.array([-3, -7], np.float32)), (out, bias)])
    explanation = explain(policy, record(1, violation_rate_60s=0.5, **IN_FORCE))
    (driver,) = explanation.decisions[KNOB_NAMES.index("kv_reserve")].drivers
    assert driver.knob_at_low == pytest.approx(driver.knob_at_high, abs=0.01) and driver.share_of_range > 0.9


def test_an_export_is_explained_as_its_policy(policy_folder):
    theirs, ours = explain(load_deployed(policy_folder), record(2)), explain(network(), record(2))
    for their, our in zip(theirs.decisions, ours.decisions, strict=True):
        assert their.value == pytest.approx(our.value, rel=1e-4, abs=1e-5)
        assert [driver.entry for driver in their.drivers] == [driver.entry for driver in our.drivers]
        for one, two in zip(their.drivers, our.drivers, strict=True):
            assert one.share_of_range == pytest.approx(two.share_of_range, abs=1e-4)


def test_a_constant_has_no_drivers():
    explanation = explain(CONSTANT, record(2))
    assert not explanation.is_network and not any(decision.drivers for decision in explanation.decisions)
    assert [decision.value for decision in explanation.decisions] == CONSTANT.vector.tolist()


def test_what_differs_from_ooco_or_from_what_is_in_force_is_changed():
    knobs = {"gate_batch": 2.0, "kv_reserve": 0.3}
    in_force = IN_FORCE | {"knob_gate_batch": 2.0, "knob_pull_kv": 0.5}
    explanation = explain(ConstantPolicy("mine", {}, knobs), record(1, **in_force))
    changed = {decision.knob.name for decision in explanation.decisions if decision.changed}
    assert changed == {"gate_batch", "kv_reserve", "pull_kv"}


def test_clipped_entries_say_from_what():
    explanation = explain(CONSTANT, record(1, oldest_wait_s=9.0, ttft_slo_s=0.5, prompt_mean_tokens=1024.0))
    seen = {entry.name: entry for entry in explanation.seen}
    assert (seen["oldest_wait"].value, seen["oldest_wait"].raw, seen["oldest_wait"].clipped) == (5.0, 18.0, True)
    assert (seen["prompt_mean"].value, seen["prompt_mean"].raw, seen["prompt_mean"].clipped) == (0.5, 0.5, False)
    assert list(seen) == list(OBSERVATION_NAMES)


# Words.


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (0.0021, "s", "2.1 ms"),
        (2.5, "s", "2.5 s"),
        (0.0, "s", "0 s"),
        (0.123, "share", "12.3 %"),
        (1e6, "requests", "endless"),
        (12345.0, "tokens", "12,345 tokens"),
        (0.25, "s/s", "0.25 s/s"),
    ],
)
def test_numbers_with_units(value, unit, words):
    assert in_words(value, unit) == words


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("tpot_bound", 0.98, "0.98 of the TPOT SLO = 49 ms"),
        ("preempt_slack", 1.5, "1.5 of the TTFT SLO = 750 ms"),
        ("gate_batch", 2.0, "2 of B_sat = 300 sequences"),
        ("prefill_chunk", 8192.0, "the whole prompt"),
        ("prefill_chunk", 1024.0, "1,024 tokens"),
        ("pushback", 1.0, "off"),
        ("pushback", 0.9, "0.9 of strict KV"),
        ("strict_share", -0.25, "-0.25 of all instances"),
    ],
)
def test_knobs_in_words(name, value, words):
    assert knob_in_words(KNOBS[KNOB_NAMES.index(name)], value, record(1)) == words


def test_every_knob_has_a_unit():
    assert tuple(KNOB_UNITS) == KNOB_NAMES
    assert {field for _, field, _ in KNOB_UNITS.values() if field} <= set(FIELD_NAMES)


# The command.


def test_the_tables(policy_folder, telemetry_json, capsys):
    assert explain_command([str(policy_folder), str(telemetry_json)]) == 0
    said = capsys.readouterr().out
    for part in (
        "Telemetry",
        "Observation of 44 entries",
        "Knobs chosen by net",
        "depend on most",
        "finite difference",
    ):
        assert part in said
    for name in (*OBSERVATION_NAMES, *KNOB_NAMES, *(name for name, _, _ in FIELDS[:FIRST_KNOB])):
        assert name in said
    assert max(map(len, said.splitlines())) <= 150


def test_the_tables_of_a_constant(tmp_path, telemetry_json, capsys):
    folder = save_policy(ConstantPolicy("mine [bold]"), tmp_path / "saved")
    assert explain_command([str(folder), str(telemetry_json)]) == 0
    said = capsys.readouterr().out
    assert "Knobs chosen by mine [bold]" in said and "do not depend on the record" in said


def test_json(policy_folder, telemetry_json, capsys):
    assert explain_command([str(policy_folder), str(telemetry_json), "format=json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["policy"] == "net" and said["telemetry"] == record(1).to_dict()
    assert [entry["name"] for entry in said["observation"]] == list(OBSERVATION_NAMES)
    decided = load_deployed(policy_folder).decide(record(1))
    assert [knob["value"] for knob in said["knobs"]] == decided.tolist()
    assert all(len(knob["drivers"]) <= 3 for knob in said["knobs"]) and any(knob["drivers"] for knob in said["knobs"])
    assert "finite differences" in said["drivers_are"]


def test_an_example_is_written_once(policy_folder, tmp_path, capsys):
    path = tmp_path / "new.json"
    assert explain_command([str(policy_folder), str(path), "example=true", "format=json"]) == 0
    written = json.loads(path.read_text())
    assert written == json.loads(capsys.readouterr().out)["telemetry"] and written["time_s"] == 120.0
    assert written["strict_decodes_mean"] > 0 and written["arrivals_60s"] > 0
    assert explain_command([str(policy_folder), str(path), "example=true"]) == 2
    assert "is not overwritten" in capsys.readouterr().err


def test_a_line_of_the_decision_log_is_a_record_too(policy_folder, telemetry_json, capsys):
    telemetry_json.write_text(json.dumps({"policy": "ooco", "telemetry": record(4).to_dict(), "took_s": 0.1}))
    assert explain_command([str(policy_folder), str(telemetry_json), "format=json"]) == 0
    assert json.loads(capsys.readouterr().out)["telemetry"] == record(4).to_dict()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["not JSON"]),
        ("{", ["not JSON"]),
        ("[]", ["an object is needed"]),
        ("{}", ["field 'time_s' is missing"]),
        (json.dumps(record(1).to_dict() | {"more": 1}), ["field 'more' is unknown"]),
        (json.dumps(record(1).to_dict() | {"time_s": "now"}), ["field 'time_s' is 'now'"]),
        (json.dumps(record(1).to_dict() | {"time_s": float("nan")}), ["field 'time_s' is nan"]),
        (json.dumps(record(1).to_dict() | {"time_s": 10**400}), ["too large"]),
        (json.dumps(record(1).to_dict() | {"knob_gate_batch": 99}), ["'gate_batch' is 99"]),
    ],
)
def test_a_record_that_is_wrong(policy_folder, tmp_path, capsys, content, parts):
    path = tmp_path / "telemetry.json"
    path.write_text(content)
    assert explain_command([str(policy_folder), str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert all(part in said for part in (*parts, str(path))), said


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["{policy}"], "1 paths are given"),
        (["{policy}", "{telemetry}", "third"], "3 paths are given"),
        (["{policy}", "absent.json"], "absent.json not found"),
        (["absent", "{telemetry}"], "policy absent: not found"),
        (["{policy}", "{telemetry}", "format=xml"], "accepted are table, json"),
        (["{policy}", "{telemetry}", "example=maybe"], "accepted are false, true"),
        (["{policy}", "{telemetry}", "colour=red"], "unknown setting 'colour': known are format, example"),
        (["{policy}", "absent/telemetry.json", "example=true"], "absent/telemetry.json"),
    ],
)
def test_a_mistake_is_one_sentence(policy_folder, telemetry_json, capsys, monkeypatch, arguments, named):
    monkeypatch.setattr(explaining, "example_record", lambda: record(1))
    filled = [argument.format(policy=policy_folder, telemetry=telemetry_json) for argument in arguments]
    assert explain_command(filled) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and named in said, said


def test_help_teaches(capsys):
    assert explain_command(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(part in said for part in ("telemetry.json", "format=json", "example=true", "OOCO"))
