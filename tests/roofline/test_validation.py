"""The cost model against measured kernels put together to whole iterations, where the measurements are at hand.

``experiments/roofline_validation.py`` prints the errors; docs/calibration.md explains them. Here: that the iterations
are what they claim to be, that fits without a model predict it, and that the presets err as their ``source`` says.
"""

import csv
import gzip
from dataclasses import replace
from pathlib import Path

import measured_iterations as measured
import numpy as np
import pytest
import roofline_validation as validation

from ooco_gym.errors import OocoError
from ooco_gym.roofline import resolve_hardware
from ooco_gym.roofline.calibration.fit import errors, fit
from ooco_gym.roofline.calibration.terms import predict_s, terms
from ooco_gym.roofline.calibration.two_numbers import from_two_numbers

ROOT = Path(__file__).resolve().parents[2]

FOLDER = ROOT.parent / "shared" / "data" / "measured"
needs_data = pytest.mark.skipif(
    not (FOLDER / "llmservingsim_layers.csv.gz").is_file(),
    reason="the public kernel timings are not beside this checkout (../shared/data/measured)",
)


def rows(name, wanted):
    with gzip.open(FOLDER / f"{name}.csv.gz", "rt", newline="") as lines:
        return [row for row in csv.DictReader(lines) if wanted.items() <= row.items()]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(OocoError, match="--data-dir"):
        measured.folder(str(tmp_path))


def test_interpolation_stays_inside_what_was_measured():
    curve = measured.Curve({1.0: 2.0, 4.0: 8.0})
    assert curve(2.0) == pytest.approx(4.0) and curve(4.0) == pytest.approx(8.0)
    assert curve(0.5) is None and curve(5.0) is None


@needs_data
def test_an_iteration_is_the_sum_of_its_kernels():
    """Llama-3.1-8B on RTX 4090, 16 decodes on 1,024 tokens each, added up by hand."""
    mine = {"hardware": "RTX4090", "model": "meta-llama/Llama-3.1-8B", "tensor_parallel": "1"}
    layer = {row["layer"]: float(row["ms"]) for row in rows("llmservingsim_layers", mine | {"tokens": "16"})}
    batch = {"prefill_tokens": "0", "decode_seqs": "16", "decode_kv_context": "1024"}
    attention = float(rows("llmservingsim_attention_mixed", mine | batch)[0]["ms"])
    gemms = sum(layer[name] for name in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"))
    other = 2 * layer["layernorm"] + layer["rotary_emb"] + layer["act_fn"]
    ms = 32 * (gemms + other + attention) + layer["lm_head"]
    found = [row for row in measured.iterations(FOLDER, "rtx-4090") if (row.decodes, row.context_tokens) == (16, 1024)]
    decode = [row for row in found if not row.prefills]
    assert len(decode) == 1 and decode[0].seconds * 1e3 == pytest.approx(ms, rel=1e-6)


@needs_data
@pytest.mark.parametrize("device", ["a100", "h100"])
def test_every_iteration_fits_the_device_and_no_model_is_in_its_own_training(device):
    found = measured.iterations(FOLDER, device)
    models = {row.group for row in found}
    assert len(models) == {"a100": 7, "h100": 5}[device]
    for row in found:
        held = row.model.weight_bytes + row.model.kv_bytes_per_token * row.decodes * row.context_tokens
        assert held / row.tp <= 0.9 * 80e9
    for model in models:
        training = measured.training_rows(FOLDER, device, ("decode", "prefill"), model)
        assert training and model not in {row.group for row in training}


@needs_data
def test_models_left_out_on_h100_meet_the_bars():
    device = validation.Device("h100", FOLDER)
    whole = np.isin(device.kinds, ("decode", "prefill"))
    found = errors(device.held_out(device.calibrated)[whole], device.terms.measured_s[whole])
    print(f"h100, models held out: {validation.triple(found)}")
    assert found["mape"] <= 5.0 and found["p95"] <= 14.0 and abs(found["bias"]) <= 1.0


@needs_data
@pytest.mark.parametrize(
    ("name", "mape", "p95", "bias"),
    [
        ("a100", 5.7, 15.5, 1.5),
        ("h100", 4.7, 13.7, 2.0),
        ("rtx-pro-6000", 6.6, 23.5, 1.5),
        ("rtx-4090", 5.8, 14.7, 1.5),
    ],
)
def test_presets_err_as_their_source_says(name, mape, p95, bias):
    device = validation.Device(name, FOLDER)
    preset = predict_s(device.terms, resolve_hardware(name).calibrated)
    found = device.by_kind(preset)["whole"]
    print(f"{name}, preset: {validation.triple(found)}")
    assert found["mape"] <= mape and found["p95"] <= p95 and abs(found["bias"]) <= bias


@needs_data
def test_a_device_from_its_datasheet_and_two_numbers():
    """A100 from H100's fit: not one row of A100 but GEMMs."""
    donor = validation.Device("h100", FOLDER)
    fitted = fit(donor.training(""), donor.peaks, by_group=False).device
    device = validation.Device("a100", FOLDER)
    preset = from_two_numbers(device.peaks, *validation.measured_two(FOLDER, "a100"), [fitted])
    found = device.by_kind(predict_s(device.terms, preset.calibrated))["whole"]
    assert found["mape"] <= validation.DEVICE_BAR


@needs_data
def test_two_kernels_one_after_the_other_are_not_a_fused_one():
    """Mixed batches of A100 are a prefill and a decode kernel: a padded row per decode would be far too slow."""
    device = validation.Device("a100", FOLDER)
    mixed, seen = device.kinds == "mixed", device.terms.measured_s
    fitted = fit(device.training(""), device.peaks, by_group=False).device
    pads = [0.0, 80.0]
    with_pad = [replace(fitted.calibrated, decode_row_pad=pad) for pad in pads]
    bias = [errors(predict_s(device.terms, c)[mixed], seen[mixed])["bias"] for c in with_pad]
    assert abs(bias[0]) < 8 < bias[1]
    assert device.two_kernels(fitted, "").constants["decode_row_pad"].value < 20


@needs_data
def test_the_serial_term_over_every_context_predicts_small_chunks_on_a_long_past():
    """What the form misses: a chunk of few tokens walks its whole past, too (more so on RTX PRO 6000)."""
    device = validation.Device("rtx-4090", FOLDER)
    seen = device.terms.measured_s
    size = {}
    for chain_all in (False, True):
        rows = device.training("")
        c = fit(rows, device.peaks, by_group=False, chain_all=chain_all).device.calibrated
        size[chain_all] = errors(predict_s(terms(device.rows, device.peaks, chain_all=chain_all), c), seen)
    assert size[True]["mape"] < size[False]["mape"] - 0.5 and size[True]["p95"] < size[False]["p95"]
