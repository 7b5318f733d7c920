"""A stage's directory: complete, exact, checked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from srcflow import artifacts
from srcflow.compressors.base import Compressor
from srcflow.compressors.semantic import Semantic
from srcflow.errors import ArtifactError, ManifestMismatchError
from srcflow.flows import presets
from srcflow.flows.flow import Flow
from srcflow.testing import perturb


def flow() -> Flow:
    return perturb(presets.srcflow((2, 2), 3, 32, [1, 1], num_classes=2, head_dim=16))


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    first = flow()
    path = artifacts.save(tmp_path / "a", first, raw={"prior_std": torch.full((4, 3), 2.0)}, manifest={"steps": 7})
    again = artifacts.load(path, Flow)
    for k, v in first.state_dict().items():
        assert torch.equal(again.state_dict()[k], v)
    assert not again.training
    assert artifacts.read_manifest(path)["steps"] == 7
    assert float(artifacts.load(path, Flow, weights="raw").prior_std[0, 0]) == 2.0
    assert float(again.prior_std[0, 0]) == 1.0


def test_configuration_names_the_preset_and_its_arguments(tmp_path: Path) -> None:
    config = json.loads((artifacts.save(tmp_path / "a", flow()) / "config.json").read_text())
    assert config["class_path"] == "srcflow.flows.presets.srcflow"
    assert config["init_args"]["layers"] == [1, 1]


def test_saving_again_replaces_the_whole_artifact(tmp_path: Path) -> None:
    artifacts.save(tmp_path / "a", flow(), raw={"prior_std": torch.ones(4, 3)})
    artifacts.save(tmp_path / "a", flow())
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", "manifest.json", "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_other_directories_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ArtifactError, match="not an artifact"):
        artifacts.save(tmp_path, flow())
    assert (tmp_path / "thesis.txt").exists()


def test_missing_and_incomplete_artifacts_say_so(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        artifacts.load(tmp_path / "none", Flow)
    path = artifacts.save(tmp_path / "a", flow())
    (path / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"model.safetensors missing"):
        artifacts.load(path, Flow)


def test_damaged_weights_say_so(tmp_path: Path) -> None:
    path = artifacts.save(tmp_path / "a", flow())
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtifactError, match="cannot be read"):
        artifacts.load(path, Flow)


def test_keys_that_do_not_fit_are_all_listed() -> None:
    module = Semantic(8, 2, width=32, layers=1, head_dim=16, grid=2)
    state = dict(module.state_dict())
    first, second, *_ = state
    state["surplus"] = state.pop(first)
    state[second] = torch.zeros(1, 2, 3)
    with pytest.raises(ArtifactError) as e:
        artifacts.load_state(module, state, what="file")
    for words in (f"missing {first}", "unknown surplus", f"{second}: shape (1, 2, 3)"):
        assert words in str(e.value)


def test_what_an_artifact_was_built_on_is_found_and_checked(tmp_path: Path) -> None:
    base = artifacts.save(tmp_path / "runs" / "codec", Semantic(8, 2, width=32, layers=1, head_dim=16, grid=2))
    top = tmp_path / "runs" / "flow"
    reference = artifacts.reference(base, start=top)
    artifacts.save(top, flow(), manifest={"built_on": {"compressor": reference}})
    assert artifacts.built_on(top, "compressor").resolve() == base.resolve()
    (tmp_path / "runs").rename(tmp_path / "moved")  # together: still found
    assert artifacts.built_on(tmp_path / "moved" / "flow", "compressor").name == "codec"
    (tmp_path / "moved" / "codec").rename(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="Name its new place"):
        artifacts.built_on(tmp_path / "moved" / "flow", "compressor")
    assert artifacts.built_on(tmp_path / "moved" / "flow", "compressor", tmp_path / "elsewhere") == tmp_path / "elsewhere"
    other = artifacts.save(tmp_path / "other", perturb(Semantic(8, 2, width=32, layers=1, head_dim=16, grid=2)))
    with pytest.raises(ManifestMismatchError, match="hash"):
        artifacts.built_on(tmp_path / "moved" / "flow", "compressor", other)
    with pytest.raises(ArtifactError, match="does not say what autoencoder"):
        artifacts.built_on(tmp_path / "moved" / "flow", "autoencoder")


def test_the_class_must_be_the_one_asked_for(tmp_path: Path) -> None:
    path = artifacts.save(tmp_path / "a", flow())
    with pytest.raises(Exception, match="Compressor"):
        artifacts.load(path, Compressor)


def test_float64_stays_float64(tmp_path: Path) -> None:
    flow = perturb(presets.tarflow(2, 3, 16, 1, 1, head_dim=16)).double()
    artifacts.save(tmp_path / "flow", flow)
    again = artifacts.load(tmp_path / "flow", Flow)
    assert all(torch.equal(v, flow.state_dict()[k]) and v.dtype == flow.state_dict()[k].dtype for k, v in again.state_dict().items())


def test_weights_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    first = perturb(presets.tarflow(2, 3, 16, 2, 1, head_dim=16))
    first.blocks[1].positions.weight = first.blocks[0].positions.weight
    whole = torch.randn(2, 4, 16)
    first.blocks[0].proj_in.weight.data, first.blocks[1].proj_in.weight.data = whole[0].mT[:, :3], whole[1].mT[:, :3]
    again = artifacts.load(artifacts.save(tmp_path / "flow", first), Flow)
    assert all(torch.equal(v, first.state_dict()[k]) for k, v in again.state_dict().items())
