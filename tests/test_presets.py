"""Preset files: where they are found, how numbers are read, and the sentence for a name that is not there."""

import os
from dataclasses import fields

import pytest
from omegaconf import OmegaConf

from ooco_gym import presets
from ooco_gym.errors import OocoError
from ooco_gym.scenario import DEFAULT_PRESETS
from ooco_gym.specs import ClusterSpec, FaultSpec


def test_groups_and_names():
    assert {path.name for path in presets.conf_dir().iterdir() if path.is_dir()} >= set(DEFAULT_PRESETS)
    assert {"1x3", "2x2", "3x1", "8x8", "unified4"} <= set(presets.names("cluster"))
    assert presets.names("cluster") == sorted(presets.names("cluster"))
    assert presets.names("slo") == ["loose", "medium", "tight", "two-classes"]
    assert presets.names("faults") == ["none", "unreliable"]
    assert {"llama-3.1-70b", "qwen2.5-7b", "qwen3-30b-a3b"} <= set(presets.names("model"))
    assert presets.names("nothing") == []


def test_scientific_notation_is_a_number():
    """Plain YAML reads 312.0e12 as text."""
    assert presets.load("hardware", "a100")["peak_flops_per_s"] == 312.0e12
    assert presets.load("cluster", "2x2")["link_bytes_per_s"] == 25e9


@pytest.mark.parametrize("group", sorted(DEFAULT_PRESETS))
def test_every_preset_is_a_mapping_that_is_named_like_its_file(group):
    assert DEFAULT_PRESETS[group] in presets.names(group)
    for name in presets.names(group):
        content = presets.load(group, name)
        assert content and content.get("name", name) == name


def test_every_cluster_preset_names_every_field():
    """So that any of them can be changed on the command line without a plus sign."""
    for name in presets.names("cluster"):
        assert list(presets.load("cluster", name)) == [field.name for field in fields(ClusterSpec)]
    for name in presets.names("faults"):
        assert list(presets.load("faults", name)) == [field.name for field in fields(FaultSpec)]


def test_an_unknown_name_lists_the_known():
    with pytest.raises(OocoError) as caught:
        presets.load("slo", "../cluster/2x2")
    assert str(caught.value) == f"unknown slo '../cluster/2x2': known are {', '.join(presets.names('slo'))}"
    with pytest.raises(OocoError, match="unknown shape 'round': known are none"):
        presets.load("shape", "round")


def test_an_installed_package_carries_its_own_presets(monkeypatch, tmp_path):
    (tmp_path / "conf" / "slo").mkdir(parents=True)
    (tmp_path / "conf" / "slo" / "mine.yaml").write_text("ttft_s: 1e-1\n")
    monkeypatch.setattr(presets, "__file__", str(tmp_path / "presets.py"))
    assert presets.names("slo") == ["mine"] and presets.load("slo", "mine") == {"ttft_s": 0.1}
    (tmp_path / "conf").rename(tmp_path / "other")
    assert presets.conf_dir() == tmp_path.parent / "conf"


def test_an_empty_file_is_an_empty_mapping(monkeypatch, tmp_path):
    (tmp_path / "slo").mkdir()
    (tmp_path / "slo" / "empty.yaml").write_text("# nothing\n")
    monkeypatch.setattr(presets, "conf_dir", lambda: tmp_path)
    assert presets.load("slo", "empty") == {}


def test_a_preset_is_the_callers_own_and_is_read_again_when_it_changes(monkeypatch, tmp_path):
    path = tmp_path / "slo" / "mine.yaml"
    path.parent.mkdir()
    path.write_text("ttft_s: 1.0\nclasses: [{name: a}]\n")
    monkeypatch.setattr(presets, "conf_dir", lambda: tmp_path)
    first = presets.load("slo", "mine")
    first["classes"][0]["name"] = "b"
    assert presets.load("slo", "mine") == {"ttft_s": 1.0, "classes": [{"name": "a"}]}
    path.write_text("ttft_s: 2.0\n")
    os.utime(path, ns=(0, 0))  # another time of change however coarse the clock of the file system
    assert presets.load("slo", "mine") == {"ttft_s": 2.0}


def test_a_preset_that_is_no_yaml(monkeypatch, tmp_path):
    (tmp_path / "slo").mkdir()
    (tmp_path / "slo" / "broken.yaml").write_text("ttft_s: [1, 2\n")
    monkeypatch.setattr(presets, "conf_dir", lambda: tmp_path)
    with pytest.raises(OocoError, match=r"broken\.yaml"):
        presets.load("slo", "broken")


def test_defaults_agree_with_the_configuration_file():
    """``conf/config.yaml`` names the presets of ``DEFAULT_PRESETS``."""
    groups = {}
    for entry in OmegaConf.load(presets.conf_dir() / "config.yaml").defaults:
        if entry != "_self_":
            groups |= {str(key).removeprefix("override "): value for key, value in entry.items()}
    assert {group: groups.get(group) for group in DEFAULT_PRESETS} == DEFAULT_PRESETS
