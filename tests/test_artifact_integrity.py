"""Opening a directory of weights: which code it may name, and whether its files are those that were written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from srcflow import artifacts, chain, registry, trust
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.compressors.identity import Identity
from srcflow.couplings.base import Coupling
from srcflow.errors import ArtifactError, ManifestMismatchError
from srcflow.flows import presets
from srcflow.flows.flow import Flow
from srcflow.pipeline import Pipeline
from srcflow.testing import perturb

STRANGER = "stranger_beside_the_program"
IMPORTED, BUILT = "imported_by_the_program", "built_by_the_program"
"""Modules that tests import; they stay in sys.modules, as a class without its module would break every later look-up of names."""
BENIGN = {"class_path": "Affine", "init_args": {}}


def flow() -> Flow:
    return perturb(presets.srcflow((2, 2), 12, 16, [1, 1], num_classes=2, head_dim=16))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return artifacts.save(tmp_path / "flow", flow(), raw={"prior_std": torch.ones(4, 12)})


@pytest.fixture
def chained(tmp_path: Path) -> Path:
    """A flow that is built on a codec, as three stages write it."""
    codec = artifacts.save(tmp_path / "codec", PixelPatches(4, 2, scale="linear"))
    target = tmp_path / "chained"
    return artifacts.save(target, flow(), manifest={"built_on": {"autoencoder": artifacts.reference(codec, start=target)}})


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module on Python's path that leaves a mark when it runs; returns where the mark would be."""
    folder = tmp_path / "beside"
    mark = folder / "it-ran"
    for name in (STRANGER, IMPORTED, BUILT):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
        (folder / name / "parts.py").write_text("from srcflow.couplings.affine import Affine\nclass Own(Affine): ...\n")
    monkeypatch.syspath_prepend(str(folder))
    return mark


def rewritten(root: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The artifact with another config.json, and a manifest that goes with it."""
    spec = json.loads((root / "config.json").read_text())
    spec = change(spec) or spec
    (root / "config.json").write_text(json.dumps(spec))
    manifest = json.loads((root / "manifest.json").read_text())
    manifest.pop("files", None)
    (root / "manifest.json").write_text(json.dumps({**manifest, "hash": artifacts.content_hash(root)}))
    return root


def flip(file: Path, at: int = -1) -> None:
    """Turn one bit of a file."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


# --- code ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda s: {"class_path": f"{STRANGER}.parts.Own", "init_args": {}}, "class_path"),
        (lambda s: s["init_args"].update(coupling={"class_path": f"{STRANGER}.parts.Own"}), "coupling.class_path"),
        (lambda s: s["init_args"].update(coupling=[{"deep": {**BENIGN, "init_args": {"x": [{"class_path": f"{STRANGER}.Own"}]}}}]),
         r"coupling\[0\].deep.x\[0\].class_path"),
    ],
)  # fmt: skip
def test_a_module_that_happens_to_be_importable_does_not_run(
    saved: Path, stranger: Path, change: Callable[[dict[str, Any]], Any], key: str
) -> None:
    with pytest.raises(ArtifactError, match=rf"config.json: {key} = '{STRANGER}.*' is not imported.*entry point") as e:
        artifacts.load(rewritten(saved, change), Flow)
    assert str(saved) in str(e.value)
    assert not stranger.exists()
    assert STRANGER not in sys.modules


def test_no_part_of_a_chain_runs_foreign_code(tmp_path: Path, chained: Path, stranger: Path) -> None:
    bundle = Pipeline.from_pretrained(chained).save_pretrained(tmp_path / "bundle")
    part = rewritten(bundle / "compressor", lambda s: {"class_path": f"{STRANGER}.parts.Own"})
    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["parts"]["compressor"] = artifacts.content_hash(part)
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=rf"compressor/config.json: class_path = '{STRANGER}"):
        Pipeline.from_pretrained(bundle)
    assert not stranger.exists()


def test_registered_plugins_and_what_the_program_imported_itself_are_opened(saved: Path, stranger: Path) -> None:
    pytest.importorskip("srcflow_goodplugin", reason="make test installs it")
    path = "srcflow_goodplugin.couplings.BoundedAffine"
    assert trust.foreign({"class_path": path}, artifacts.GROUPS, imported=False) is None  # since it is registered, not since it is there
    rewritten(saved, lambda s: s["init_args"].update(coupling={"class_path": path}))
    assert type(artifacts.load(saved, Flow).blocks[0].coupling).__name__ == "BoundedAffine"
    rewritten(saved, lambda s: s["init_args"].update(coupling={"class_path": "BoundedAffine"}))
    assert type(artifacts.load(saved, Flow).blocks[0].coupling).__name__ == "BoundedAffine"
    __import__(f"{IMPORTED}.parts")
    rewritten(saved, lambda s: s["init_args"].update(coupling={"class_path": f"{IMPORTED}.parts.Own"}))
    assert type(artifacts.load(saved, Flow).blocks[0].coupling).__name__ == "Own"


def test_a_specification_that_the_program_wrote_may_name_any_class(stranger: Path) -> None:
    assert type(registry.build({"class_path": f"{BUILT}.parts.Own"}, Coupling)).__name__ == "Own"
    assert stranger.exists()


def distribution(folder: Path, name: str, files: list[str], entry: str) -> None:
    """Metadata of an installed distribution, with its files."""
    info = folder / f"{name}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[srcflow.couplings]\nOwn = {entry}\n")
    (info / "RECORD").write_text("".join(f"{f},,\n" for f in [*files, f"{info.name}/METADATA"]))
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text("")


def test_a_registered_distribution_is_known_by_all_it_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ["owner_a/__init__.py", "owner_a/deep/parts.py", "owner_b.py", "shared_ns/owner/__init__.py", "shared_ns/owner/parts.py"]
    distribution(tmp_path, "owner-parts", files, "owner_a.deep.parts:Own")
    monkeypatch.syspath_prepend(str(tmp_path))
    known = trust.registered(["srcflow.couplings"])
    assert {"srcflow", "owner_a", "owner_b", "shared_ns.owner"} <= known
    assert "shared_ns" not in known  # any folder on the path can add modules to a namespace package
    assert trust.foreign({"class_path": "owner_b.Own"}, ["srcflow.couplings"]) is None
    assert trust.foreign({"class_path": "shared_ns.other.Own"}, ["srcflow.couplings"]) == ("", "shared_ns.other.Own")
    assert trust.foreign({"class_path": "owner_bother.Own"}, ["srcflow.couplings"]) is not None


def test_an_entry_point_into_a_namespace_package_frees_only_its_own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(tmp_path, "editable-parts", [], "loose_ns.mine.parts:Own")  # as an editable installation, without a list of files
    (tmp_path / "loose_ns" / "mine").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    groups = ["srcflow.couplings"]
    assert trust.foreign({"class_path": "loose_ns.mine.parts.Own"}, groups) is None
    assert trust.foreign({"class_path": "loose_ns.other.Own"}, groups) is not None


# --- hashes --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["model", "raw"])
def test_one_flipped_bit_is_found(saved: Path, weights: Any) -> None:
    artifacts.load(saved, Flow, weights=weights)
    flip(saved / f"{weights}.safetensors")
    with pytest.raises(ArtifactError, match=rf"flow/{weights}.safetensors is not what manifest.json records.*srcflow export"):
        artifacts.load(saved, Flow, weights=weights)


def test_a_configuration_that_was_edited_is_found(saved: Path) -> None:
    text = (saved / "config.json").read_text()
    (saved / "config.json").write_text(text.replace('"head_dim": 16', '"head_dim": 8'))
    assert (saved / "config.json").read_text() != text
    with pytest.raises(ArtifactError, match=r"flow/config.json is not what manifest.json records"):
        artifacts.load(saved, Flow)


def test_an_artifact_that_records_one_hash_for_both_files_is_checked_too(saved: Path) -> None:
    manifest = json.loads((saved / "manifest.json").read_text())
    del manifest["files"]  # as before they were recorded
    (saved / "manifest.json").write_text(json.dumps(manifest))
    artifacts.load(saved, Flow)
    artifacts.load(saved, Flow, weights="raw")
    flip(saved / "model.safetensors")
    with pytest.raises(ArtifactError, match=r"config.json or model.safetensors is not what"):
        artifacts.load(saved, Flow)


@pytest.mark.parametrize("part", ["codec", "chained"])
def test_every_part_of_a_chain_and_its_last_stage_are_compared(chained: Path, part: str) -> None:
    Pipeline.from_pretrained(chained)
    flip(chained.parent / part / ("config.json" if part == "codec" else "model.safetensors"), -4)
    with pytest.raises(ArtifactError, match=rf"{part}/(model.safetensors|config.json) is not what"):
        Pipeline.from_pretrained(chained)


@pytest.mark.parametrize("part", ["autoencoder", "compressor", "flow"])
def test_every_part_of_a_bundle_is_compared(tmp_path: Path, chained: Path, part: str) -> None:
    bundle = Pipeline.from_pretrained(chained).save_pretrained(tmp_path / "bundle")
    flip(bundle / part / "model.safetensors")
    with pytest.raises(ArtifactError, match=rf"{part}/model.safetensors"):
        Pipeline.from_pretrained(bundle)


def test_a_part_that_was_replaced_by_another_sound_one_is_told_from_a_damaged_one(chained: Path) -> None:
    artifacts.save(chained.parent / "codec", PixelPatches(4, 2, scale="levels"))
    with pytest.raises(ManifestMismatchError, match="was built on another autoencoder"):
        Pipeline.from_pretrained(chained)


# --- damage --------------------------------------------------------------------------------------------------------------------------

CONTENTS = [b"", b"{", b"[]", b"{}", b"null", b"\xff\xfe", b"7", b"[" * 100_000]


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
def test_json_that_is_none_or_holds_something_else(chained: Path, name: str, content: bytes) -> None:
    (chained / name).write_bytes(content)
    for read in (lambda: artifacts.load(chained, Flow), lambda: Pipeline.from_pretrained(chained)):
        with pytest.raises(ArtifactError, match=rf"chained/{name}.*(srcflow export|version of srcflow)"):
            read()


@pytest.mark.parametrize("content", CONTENTS)
def test_the_manifest_of_a_bundle_likewise(tmp_path: Path, chained: Path, content: bytes) -> None:
    bundle = Pipeline.from_pretrained(chained).save_pretrained(tmp_path / "bundle")
    (bundle / "manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"bundle(/manifest.json| is not a complete artifact)"):
        Pipeline.from_pretrained(bundle)


@pytest.mark.parametrize(
    "change",
    [{"parts": None}, {"parts": []}, {"parts": {}}, {"parts": {"flow": "x"}}, {"parts": {"autoencoder": 1}}, {"parts": {"../flow": "x"}}],
)
def test_parts_of_a_bundle_that_cannot_be(tmp_path: Path, chained: Path, change: dict[str, Any]) -> None:
    bundle = Pipeline.from_pretrained(chained).save_pretrained(tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(ArtifactError, match=r"manifest.json is damaged: its parts are"):
        chain.locate(bundle)


@pytest.mark.parametrize("value", [2, 0, "1", None, True, [1]])
def test_an_unknown_format_is_refused(tmp_path: Path, chained: Path, value: Any) -> None:
    bundle = Pipeline.from_pretrained(chained).save_pretrained(tmp_path / "bundle")
    for root in (chained, bundle):
        manifest = json.loads((root / "manifest.json").read_text())
        (root / "manifest.json").write_text(json.dumps({**manifest, "format": value}))
        with pytest.raises(ArtifactError, match="names no format" if value is None else "reads format 1"):
            Pipeline.from_pretrained(root)


@pytest.mark.parametrize(
    "change",
    [
        {"hash": 5},
        {"hash": None},
        {"class": ["Flow"]},
        {"built_on": []},
        {"built_on": {"autoencoder": "codec"}},
        {"built_on": {"autoencoder": {"path": 1, "hash": "x"}}},
        {"files": "all"},
    ],
)
def test_manifests_with_values_of_the_wrong_kind(chained: Path, change: dict[str, Any]) -> None:
    manifest = json.loads((chained / "manifest.json").read_text())
    (chained / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(ArtifactError, match=rf"manifest.json is damaged: {next(iter(change))}"):
        Pipeline.from_pretrained(chained)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: {"class_path": 5},
        lambda s: {"class_path": s["class_path"], "init_args": [1]},
        lambda s: {**s, "more": 1},
        lambda s: s["init_args"].update(layers="many"),
        lambda s: s["init_args"].update(width=None),
        lambda s: s["init_args"].update(surplus=1),
        lambda s: s["init_args"].update(coupling={"class_path": "Affine", "init_args": "none"}),
        lambda s: {"class_path": "srcflow.flows.presets.none"},
        lambda s: {"class_path": "srcflow.artifacts.os.system", "init_args": {"command": "true"}},
    ],
)
def test_configurations_that_build_nothing(saved: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    with pytest.raises(ArtifactError, match=r"flow/config.json"):
        artifacts.load(rewritten(saved, change), Flow)


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xff" * 8, (10**15).to_bytes(8, "little") + b"{}"])
def test_weights_that_are_none(saved: Path, content: bytes) -> None:
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model.safetensors cannot be read.*Copy"):
        artifacts.load(saved, Flow)


def test_a_full_disk_leaves_the_old_artifact(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    before = artifacts.content_hash(saved)
    monkeypatch.setattr(artifacts, "save_file", full)
    with pytest.raises(ArtifactError, match=r"flow could not be written: No space left on device"):
        artifacts.save(saved, flow())
    assert artifacts.content_hash(saved) == before
    assert [p.name for p in saved.parent.iterdir()] == ["flow"]


def test_a_target_that_cannot_be_replaced_is_refused(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda self: self == saved)
    with pytest.raises(ArtifactError, match="is not an artifact"):
        artifacts.check_target(saved / "config.json")
    with pytest.raises(ValueError, match=r"model.artifact = .*a file system is mounted"):
        artifacts.check_target(saved, "model.artifact")
    with pytest.raises(ValueError, match=r"out = .*cannot be written"):
        chain.check_bundle_target(saved / "config.json" / "x", "out")
    with pytest.raises(ArtifactError, match="not a pipeline"):
        chain.check_bundle_target(saved, "out")


def test_other_parts_keep_loading() -> None:
    assert registry.build(registry.spec_of(Identity(4)), Identity).dim == 4
