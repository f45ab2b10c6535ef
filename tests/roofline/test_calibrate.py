"""Fits on made-up tables whose constants are known, the preset files they become, and tables that are refused."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ooco_gym.errors import OocoError
from ooco_gym.roofline import build_cost, iteration_s, resolve_hardware, resolve_model
from ooco_gym.roofline.calibration.fit import errors, fit
from ooco_gym.roofline.calibration.measurement import Measurement, balanced, batch_kind
from ooco_gym.roofline.calibration.preset import write_yaml
from ooco_gym.roofline.calibration.table import COLUMNS, read_table
from ooco_gym.roofline.calibration.terms import predict_s, terms
from ooco_gym.roofline.calibration.two_numbers import from_two_numbers, two_numbers
from ooco_gym.roofline.cost import causal_pairs
from ooco_gym.roofline.hardware import hardware_from_mapping

ROOT = Path(__file__).resolve().parents[2]
TRUE = resolve_hardware("rtx-pro-6000")  # every constant has a value of its own there
DONOR = replace(TRUE, calibrated=resolve_hardware("h100").calibrated)
MODELS = [resolve_model(name) for name in ("llama-3.1-8b", "qwen2.5-7b", "qwen2.5-72b")]
MOE = resolve_model("qwen3-30b-a3b")


def batches(mixed=True):
    """(prefills, new, past, decodes, context)"""
    found = [(0, 0, 0, b, c) for b in (1, 8, 64, 256) for c in (128, 2048, 16384)]
    found += [(p, n, past, 0, 0) for p in (1, 2) for n in (64, 512, 4096) for past in (0, 2048)]
    if mixed:
        found += [(1, n, 0, b, c) for n in (128, 1024) for b in (4, 64) for c in (512, 8192)]
    return found


def table(models=MODELS, tps=(1, 2), mixed=True, kernels=True, noise=0.0, seed=0):
    """Rows that TRUE's formula gives, with lognormal noise."""
    rows = []
    for model in models:
        for tp in tps:
            names = ("prefills", "prefill_tokens", "past_tokens", "decodes", "context_tokens")
            for batch in batches(mixed):
                given = dict(zip(names, map(float, batch), strict=True)) | {"group": model.name}
                rows.append(Measurement("iteration", 1.0, model, tp, **given))
                if kernels:
                    rows.append(Measurement("attention", 1.0, model, tp, **given))
            for tokens in (1, 64, 1024, 8192) if kernels else ():
                rows.append(Measurement("gemm", 1.0, tokens=tokens, n=4096, k=8192, group=model.name))
                rows.append(Measurement("elementwise", 1.0, model, tp, tokens=tokens, group=model.name))
                if tp > 1:
                    rows.append(Measurement("allreduce", 1.0, model, tp, tokens=tokens, group=model.name))
    seconds = predict_s(terms(rows, TRUE), TRUE.calibrated)
    seconds = seconds * np.random.default_rng(seed).lognormal(0.0, noise, len(rows))
    return [replace(row, seconds=float(one)) for row, one in zip(rows, seconds, strict=True)]


@pytest.mark.parametrize("model", [*MODELS, MOE], ids=lambda model: model.name)
@pytest.mark.parametrize("tp", [1, 2])
def test_the_vectorised_form_is_the_compiled_one(model, tp):
    rows = [row for row in table([model], (tp,), kernels=False)]
    cost = build_cost(model, DONOR, tp=tp)[0]
    predicted = predict_s(terms(rows, DONOR), DONOR.calibrated)
    for row, seconds in zip(rows, predicted, strict=True):
        new, past, chunks = row.prefill_tokens, row.past_tokens, row.prefills
        prefill = (chunks * new, chunks * causal_pairs(new, past), 0.0, chunks * (new + past), chunks)
        decode = (row.decodes, row.decodes * row.context_tokens, row.context_tokens)
        assert iteration_s(cost, *prefill, *decode) == pytest.approx(seconds, rel=1e-9)


def test_known_constants_come_back_from_noisy_times():
    fitted = fit(table(noise=0.03), DONOR)
    for name, one in fitted.constants.items():
        if name.startswith("moe"):
            continue
        truth = getattr(TRUE.calibrated, name)
        assert one.identified, name
        assert abs(one.value - truth) < 5 * one.error + 0.02 * truth, (name, one, truth)
        assert one.error < 0.25 * truth + 2.0, (name, one)
    assert fitted.in_sample["iteration"]["mape"] < 4
    assert fitted.device.is_calibrated and fitted.device.peak_flops_per_s == TRUE.peak_flops_per_s


def test_a_few_wild_rows_hardly_move_the_fit():
    rows = table(noise=0.02)
    wild = [replace(row, seconds=row.seconds * 5) if index % 40 == 0 else row for index, row in enumerate(rows)]
    fitted = fit(wild, DONOR, by_group=False)
    for name in ("gemm_flops", "gemm_bytes", "attention_bytes"):
        assert fitted.constants[name].value == pytest.approx(getattr(TRUE.calibrated, name), rel=0.05)


def test_what_no_row_depends_on_keeps_the_donors_value_and_is_said_so():
    fitted = fit(table(tps=(1,), mixed=False), DONOR)
    for name in ("allreduce_us", "allreduce_bytes", "chain_ns", "decode_row_pad", "moe_flops", "moe_us"):
        one = fitted.constants[name]
        assert not one.identified and one.value == one.donor == getattr(DONOR.calibrated, name)
    assert fitted.constants["gemm_bytes"].identified


def test_iterations_alone_do_not_tell_fixed_times_apart():
    """Each layer has four GEMMs, one attention and one lot of element-wise kernels: only their sum shows."""
    fitted = fit(table(kernels=False, noise=0.01), DONOR)
    assert not fitted.constants["elementwise_us"].identified
    assert not fitted.constants["attention_us"].identified
    assert fitted.constants["gemm_bytes"].identified
    assert fitted.in_sample["iteration"]["mape"] < 2


def test_too_few_rows_identify_nothing_and_calibrate_nothing():
    fitted = fit(table([MODELS[0]], (1,), kernels=False)[:2], DONOR)
    assert fitted.device.calibrated == DONOR.calibrated and not fitted.device.is_calibrated


def test_kept_constants_are_left_alone():
    fitted = fit(table(), DONOR, by_group=False, keep=["gemm_flops"])
    assert fitted.constants["gemm_flops"].value == DONOR.calibrated.gemm_flops
    assert not fitted.constants["gemm_flops"].identified


def test_two_numbers_from_gemms_and_the_preset_of_them():
    sizes = [(t, n, k) for t in (1, 16, 256, 4096) for n in (2048, 8192) for k in (1024, 16384)]
    rows = [Measurement("gemm", 1.0, tokens=t, n=n, k=k) for t, n, k in sizes]
    seconds = predict_s(terms(rows, TRUE), TRUE.calibrated)
    rows = [replace(row, seconds=float(one)) for row, one in zip(rows, seconds, strict=True)]
    flops, moved = two_numbers(rows, DONOR)
    assert flops == pytest.approx(TRUE.calibrated.gemm_flops, rel=0.02)
    assert moved == pytest.approx(TRUE.calibrated.gemm_bytes, rel=0.02)
    h100, a100 = resolve_hardware("h100"), resolve_hardware("a100")
    preset = from_two_numbers(TRUE, 0.7, 0.8, [h100, a100])
    assert (preset.calibrated.gemm_flops, preset.calibrated.gemm_bytes) == (0.7, 0.8)
    assert preset.calibrated.gemm_us == pytest.approx((h100.calibrated.gemm_us + a100.calibrated.gemm_us) / 2)
    assert not preset.is_calibrated and "h100, a100" in preset.source
    with pytest.raises(OocoError, match="no donor"):
        from_two_numbers(TRUE, 0.7, 0.8, [])
    with pytest.raises(OocoError, match="1024 rows"):
        two_numbers(rows[:4], DONOR)


def test_a_preset_file_reads_back_as_it_was(tmp_path):
    from omegaconf import OmegaConf

    xllm = replace(TRUE.xllm, gemm_flops=0.5)
    device = replace(TRUE, name="mine", source='a "quoted" source', xllm=xllm)
    write_yaml(device, tmp_path / "mine.yaml", {"chain_ns": "not identified"}, "Two lines\nof comment")
    text = (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    assert text.startswith("# Two lines\n# of comment\nname: mine") and "# not identified" in text
    assert hardware_from_mapping(OmegaConf.to_container(OmegaConf.load(tmp_path / "mine.yaml"))) == device


def test_rows_are_balanced_by_kind_not_by_count():
    rows = table([MODELS[0]])
    weight = {}
    for before, row in zip(rows, balanced(rows), strict=True):
        assert replace(row, weight=1.0) == before
        kind = row.kind if row.kind != "iteration" else batch_kind(row)
        weight[kind] = weight.get(kind, 0.0) + row.weight
    assert {kind: weight[kind] for kind in ("decode", "prefill", "mixed")} == pytest.approx(
        dict.fromkeys(("decode", "prefill", "mixed"), 1.0)
    )
    assert weight["gemm"] == pytest.approx(0.1)
    assert sum(row.weight for row in balanced([row for row in rows if row.kind == "gemm"])) == pytest.approx(1.0)


def test_errors_are_in_per_cent_and_signed():
    found = errors(np.array([1.1, 0.9, 1.2]), np.ones(3))
    assert found["mape"] == pytest.approx(40 / 3) and found["bias"] == pytest.approx(20 / 3) and found["n"] == 3


REFUSED = {
    "unknown column": ("kind,ms,colour\ngemm,1,red\n", "unknown column 'colour'"),
    "no ms": ("kind,tokens\ngemm,1\n", "column 'ms' is missing"),
    "no rows": ("kind,ms\n", "no rows"),
    "not a number": ("kind,ms,tokens,n,k\ngemm,1,4,4,4\ngemm,fast,4,4,4\n", "row 2: ms is 'fast'"),
    "negative time": ("kind,ms,tokens,n,k\ngemm,-1,4,4,4\n", "row 1: ms is -1"),
    "unknown kind": ("kind,ms\nmatmul,1\n", "row 1: kind is 'matmul'"),
    "no size": ("kind,ms,tokens,n\ngemm,1,4,4\n", "row 1: k is 0"),
    "no model": ("kind,ms,decodes,context_tokens\niteration,1,4,4\n", "row 1: model is missing"),
    "unknown model": ("kind,ms,model,decodes\niteration,1,abacus,4\n", "row 1: unknown model 'abacus'"),
    "empty batch": ("kind,ms,model\niteration,1,llama-3.1-8b\n", "row 1: prefill_tokens and decodes are both 0"),
    "tp": ("kind,ms,model,tp,prefill_tokens\niteration,1,llama-3.1-8b,3,4\n", "row 1: tensor_parallel is 3"),
    "tp not whole": ("kind,ms,model,tp,decodes\niteration,1,llama-3.1-8b,1.5,4\n", "row 1: tp is '1.5'"),
    "negative size": ("kind,ms,model,decodes\niteration,1,llama-3.1-8b,-4\n", "row 1: decodes is -4"),
    "one device": ("kind,ms,model,tp,tokens\nallreduce,1,llama-3.1-8b,1,4\n", "row 1: tp is 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_tables_are_refused_by_row_and_column(tmp_path, name):
    content, message = REFUSED[name]
    (tmp_path / "bad.csv").write_text(content, encoding="utf-8")
    with pytest.raises(OocoError) as refused:
        read_table(tmp_path / "bad.csv")
    assert message in str(refused.value) and "bad.csv" in str(refused.value) and "\n" not in str(refused.value)


def test_missing_and_unreadable_tables(tmp_path):
    with pytest.raises(OocoError, match="No such file"):
        read_table(tmp_path / "absent.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OocoError, match="not a CSV file"):
        read_table(tmp_path / "binary.csv")


def test_the_engines_part_is_taken_off_whole_iterations(tmp_path):
    content = "kind,ms,model,decodes,context_tokens\niteration,10,llama-3.1-8b,4,100\nattention,1,llama-3.1-8b,4,100\n"
    (tmp_path / "own.csv").write_text(content, encoding="utf-8")
    measured = terms(read_table(tmp_path / "own.csv", host_ms=2.0), TRUE).measured_s
    assert measured.tolist() == pytest.approx([8e-3, 1e-3])
    with pytest.raises(OocoError, match="no more than the 11 ms of the engine"):
        read_table(tmp_path / "own.csv", host_ms=11.0)


def run(*arguments):
    command = [sys.executable, "experiments/calibrate.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=False)


PEAKS = ("--name", "mine", "--peak-flops", 503.8e12, "--bandwidth", 1.792e12, "--memory", 96e9)


@pytest.mark.slow
def test_the_command_fits_a_table_and_writes_a_preset(tmp_path):
    lines = [",".join(COLUMNS)]
    for row in table([resolve_model("llama-3.1-8b")], tps=(1,)):
        name = row.model.name if row.model else ""
        values = {"kind": row.kind, "ms": row.seconds * 1e3, "model": name, "tp": row.tp}
        lines.append(",".join(str(values[name] if name in values else getattr(row, name)) for name in COLUMNS))
    (tmp_path / "my.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    out = tmp_path / "mine.yaml"
    done = run(*PEAKS, "--table", tmp_path / "my.csv", "--out", out)
    assert done.returncode == 0, done.stderr
    assert "in sample, iteration: MAPE 0." in done.stdout and "the donor's value kept" in done.stdout
    assert "# not identified: that of h100" in out.read_text(encoding="utf-8")
    again = run(*PEAKS, "--table", tmp_path / "my.csv", "--out", out)
    assert again.returncode == 1 and "is there: choose another" in again.stderr


@pytest.mark.slow
def test_the_command_with_two_numbers(tmp_path):
    done = run(*PEAKS, "--two-numbers", 0.7, 0.8, "--out", tmp_path / "mine.yaml")
    assert done.returncode == 0, done.stderr
    assert "is_calibrated: false" in (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    bad = run(*PEAKS, "--two-numbers", 0, 0.8, "--out", tmp_path / "other.yaml")
    assert bad.returncode == 1 and "gemm_flops is 0.0" in bad.stderr and "Traceback" not in bad.stderr
