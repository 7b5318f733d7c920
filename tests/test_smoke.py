"""The whole chain as a user runs it: made-up data, three stages, test, sample, encode, export, plugins, through the command line."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from srcflow import artifacts
from srcflow.cli import main
from srcflow.errors import ManifestMismatchError, SrcflowError
from srcflow.metrics.non_finite import NonFiniteImagesWarning

ROOT = Path(__file__).parents[1]
SMOKE = ROOT / "configs/smoke"
CHECKPOINT = "runs/smoke/flow/checkpoints/last.ckpt"
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode:UserWarning"),  # Lightning's note on the frozen encoder
    pytest.mark.filterwarnings("ignore:code health:UserWarning"),  # of a compressor after eight steps
]


def srcflow(*arguments: str) -> None:
    """One command; errors are raised, not printed."""
    main(["--debug", *arguments])


def trainer(command: str, stage: str, *more: str) -> None:
    """fit or test of a stage of configs/smoke, on the CPU."""
    overlay = str(ROOT / "configs/trainer/cpu.yaml")
    srcflow(command, "--config", str(SMOKE / f"{stage}.yaml"), "--config", overlay, *QUIET, *more)


def written(path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Numbers and protocol of a metrics.json."""
    content = json.loads(Path(path).read_text())
    return content["metrics"], content["protocol"]


def arrays(path: str) -> dict[str, Any]:
    """The arrays of an npz file."""
    with np.load(path) as file:
        return dict(file)


@pytest.fixture(scope="module")
def synthetic() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        yield importlib.import_module("synthetic")


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, synthetic: ModuleType) -> Path:
    """A working directory in which all three stages have run, as written in configs/smoke."""
    place = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert synthetic.main([]) == 0
        for stage in ("autoencoder", "compressor", "flow"):
            trainer("fit", stage)
    return place


@pytest.fixture
def here(chain: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(chain)
    return chain


def test_the_data_are_the_same_every_time(synthetic: ModuleType, tmp_path: Path) -> None:
    for name in ("one", "two"):
        synthetic.main(["--out", str(tmp_path / name), "--train", "8", "--eval", "4"])
    for split in ("train", "val", "test"):
        one, two = (tmp_path / name / f"{split}-000000.tar" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    assert (tmp_path / "one/train-000000.tar").read_bytes() != (tmp_path / "one/val-000000.tar").read_bytes()


def test_every_stage_writes_an_artifact_built_on_the_one_before(here: Path) -> None:
    for stage in ("autoencoder", "compressor", "flow"):
        model = here / f"runs/smoke/{stage}/model"
        names = {p.name for p in model.iterdir()}
        assert names == {"config.json", "manifest.json", "model.safetensors", "raw.safetensors"}
        averaged, raw = load_file(model / "model.safetensors"), load_file(model / "raw.safetensors")
        assert any(not torch.equal(raw[k], averaged[k]) for k in raw)
        assert list((here / f"runs/smoke/{stage}/logs").rglob("events.*"))
    assert artifacts.read_manifest("runs/smoke/flow/model")["built_on"]["compressor"]["hash"] == artifacts.content_hash(
        "runs/smoke/compressor/model"
    )
    assert list(here.glob("runs/smoke/flow/logs/version_0/samples/step-*24.png"))
    assert list(here.glob("runs/smoke/compressor/logs/version_0/reconstructions/step-*.png"))


def test_test_writes_what_it_promises(here: Path) -> None:
    trainer("test", "flow", "--ckpt_path", CHECKPOINT)
    numbers, protocol = written("runs/smoke/flow/metrics.json")
    expected = {"nll", "nll_prior", "nll_logdet", "nll_marginal", "nll_gaussian", "accuracy", "round_trip_error", "images_per_second"}
    expected |= {f"{name}_32" for name in ("gfid", "rfid", "rfid_noisy", "floor", "fd_decoded")}
    assert expected <= set(numbers)
    assert all(math.isfinite(numbers[name]) for name in expected)
    assert numbers["nll"] == pytest.approx(numbers["nll_prior"] + numbers["nll_logdet"], abs=1e-5)
    assert 0 <= numbers["accuracy"] <= 1
    assert numbers["round_trip_error"] < 1e-4
    assert protocol["samples"] == 32
    assert protocol["guidance"]["init_args"]["strength"] == 1.0
    assert protocol["weights"] == "ema"
    assert "EfficientNetLite" in protocol["extractor"]
    assert bool(protocol["revision"]) == (ROOT / ".git").exists()  # sources without their history have none
    assert set(protocol["built_on"]) == {"autoencoder", "compressor"}

    trainer("test", "compressor", "--ckpt_path", "runs/smoke/compressor/checkpoints/last.ckpt")
    numbers, _ = written("runs/smoke/compressor/metrics.json")
    assert {"l1", "psnr", "ssim", "noisy_l1", "rfid_64", "noisy_rfid_64", "codes/eigenvalue_min", "codes/kurtosis_max"} <= set(numbers)


def test_options_of_test_win_over_the_checkpoint(here: Path) -> None:
    def tested(name: str, *more: str) -> tuple[dict[str, Any], dict[str, Any]]:
        trainer("test", "flow", "--ckpt_path", CHECKPOINT, "--model.metrics_file", name, "--model.evaluation.floor", "false", *more)
        return written(name)

    plain, _ = tested("plain.json")
    guided, protocol = tested("guided.json", "--model.guidance", "Linear", "--model.guidance.strength", "3", "--model.solver", "Sequential")
    assert protocol["guidance"]["class_path"].endswith("Linear")
    assert protocol["guidance"]["init_args"]["strength"] == 3.0
    assert protocol["solver"]["class_path"].endswith("Sequential")
    assert guided["gfid_32"] != plain["gfid_32"]
    assert guided["nll"] == plain["nll"]  # guidance is a matter of sampling
    fewer, protocol = tested("fewer.json", "--model.evaluation.samples", "16", "--model.guidance", "null", "--model.weights", "raw")
    assert protocol["guidance"] is None
    assert protocol["weights"] == "raw"
    assert "gfid_16" in fewer
    assert "gfid_32" not in fewer
    assert fewer["nll"] != plain["nll"]


def test_samples_that_ran_away_are_counted_and_in_no_distance(here: Path) -> None:
    more = ["--model.evaluation.floor", "false", "--model.evaluation.baseline_batches", "0"]
    with pytest.warns(NonFiniteImagesWarning, match=r"of 32 samples are not finite"):
        trainer("test", "flow", "--ckpt_path", CHECKPOINT, "--model.metrics_file", "ran.json", "--model.guidance.strength", "1e30", *more)
    numbers, protocol = written("ran.json")
    bad = numbers["samples_non_finite"]
    assert 0 < bad < 31
    assert {k for k in numbers if k.startswith(("gfid", "fd_"))} == {f"gfid_{32 - bad}_finite_of_32", f"fd_decoded_{32 - bad}_finite_of_32"}
    assert protocol["counts"]["gfid"] == {"real": 32, "fake": 32 - bad}
    assert "rfid_32" in numbers


def test_float64_through_the_command_line(here: Path) -> None:
    more = ["--model.evaluation.floor", "false", "--trainer.precision", "64-true", "--model.metrics_file", "double.json"]
    trainer("test", "flow", "--ckpt_path", CHECKPOINT, *more)
    numbers, protocol = written("double.json")
    assert protocol["precision"] == "64-true"
    assert numbers["round_trip_error"] < 1e-12
    assert numbers["gfid_32"] > 0


@pytest.mark.parametrize(
    ("stage", "more", "words"),
    [
        ("flow", ["--trainer.limit_test_batches", "1"], r"trainer.limit_test_batches = 1: .*evaluation.samples"),
        ("compressor", ["--trainer.limit_test_batches", "0.5"], r"trainer.limit_test_batches = 0.5: .*smaller test set"),
        ("flow", ["--data.size", "64"], r"data.size = 64: .*32 x 32 pixels. Write data.size: 32"),
        ("flow", ["--model.evaluation.reference", "cut.npz"], r"evaluation.reference = 'cut.npz': is not an npz file"),
        ("flow", ["--model.evaluation.reference", "small.npz"], r"evaluation.reference = 'small.npz': .*width 3, the extractor gives"),
    ],
)
def test_a_test_that_would_mislead_is_refused(here: Path, stage: str, more: list[str], words: str) -> None:
    np.savez_compressed("small.npz", mu=np.zeros(3), sigma=np.eye(3))
    Path("cut.npz").write_bytes(Path("small.npz").read_bytes()[:200])
    checkpoint = f"runs/smoke/{stage}/checkpoints/last.ckpt"
    with pytest.raises(SrcflowError, match=words):
        trainer("test", stage, "--ckpt_path", checkpoint, "--model.metrics_file", "refused.json", *more)
    assert not Path("refused.json").exists()


def test_sample_export_and_bundle(here: Path) -> None:
    srcflow("sample", "--pipeline", "runs/smoke/flow/model", "--out", "grid.png", "--classes", "all", "--per_class", "3")
    with Image.open("grid.png") as grid:
        assert grid.size == (3 * 34 + 2, 4 * 34 + 2)
    srcflow(
        "sample",
        "--pipeline",
        "runs/smoke/flow/model",
        "--out",
        "all.npz",
        "--n",
        "10",
        "--guidance",
        "Gaussian",
        "--guidance.strength",
        "1",
    )
    srcflow("export", "--pipeline", "runs/smoke/flow/model", "--out", "bundle")
    srcflow("sample", "--pipeline", "bundle", "--out", "again.npz", "--n", "10", "--guidance", "Gaussian", "--guidance.strength", "1")
    srcflow("sample", "--pipeline", "bundle", "--out", "unguided.npz", "--n", "10")
    one, two, other = (arrays(name) for name in ("all.npz", "again.npz", "unguided.npz"))
    assert one["arr_0"].shape == (10, 32, 32, 3)
    assert one["arr_1"].tolist() == [0, 1, 2, 3] * 2 + [0, 1]
    assert (one["arr_0"] == two["arr_0"]).all()  # the bundle draws the same images
    assert (one["arr_0"] != other["arr_0"]).any()

    srcflow("export", "--config", str(SMOKE / "flow.yaml"), "--ckpt_path", CHECKPOINT, "--out", "exported")
    ours, theirs = load_file("runs/smoke/flow/model/model.safetensors"), load_file("exported/model.safetensors")
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_encode_makes_a_store_and_a_stage_with_another_encoder_refuses_it(here: Path) -> None:
    data = {"train": "data/smoke/train-*.tar", "size": 32, "num_classes": 4, "batch_size": 64}
    encoder = {
        "model": "vit_tiny_patch16_224",
        "image_size": 64,
        "weights": None,
        "timm_args": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    }
    arguments = ["--encoder", json.dumps({"class_path": "TimmViT", "init_args": encoder})]
    arguments += ["--data", json.dumps({"class_path": "ImageShards", "init_args": data})]
    torch.manual_seed(1)  # of the encoder's random weights; the chain's have seed 0
    srcflow("encode", *arguments, "--out", "features", "--flip", "--limit", "64")
    manifest = json.loads(Path("features/manifest.json").read_text())
    assert (manifest["grid"], manifest["dim"]) == ([4, 4], 32)
    stored = {"path_train": "features", "num_classes": 4, "batch_size": 32}
    data_of_run = ["--data", json.dumps({"class_path": "FeatureStore", "init_args": stored})]
    places = ["--model.artifact", "runs/stored/model", "--trainer.default_root_dir", "runs/stored", "--trainer.logger", "false"]
    with pytest.raises(ManifestMismatchError, match=r"encoder\.weights"):
        trainer("fit", "compressor", *data_of_run, *places, "--trainer.callbacks", "[]")


def test_plugins_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    srcflow("plugins", "--json")
    listed = json.loads(capsys.readouterr().out)
    names = {(p["family"], p["name"]): p["distribution"] for p in listed["parts"]}
    assert names["encoders", "DINOv2"] == "srcflow"
    assert names["encoders", "PatchProjection"] == names["couplings", "BoundedAffine"] == "srcflow-goodplugin"
    assert {b["distribution"] for b in listed["broken"]} == {"srcflow-brokenplugin"}


def test_a_third_partys_parts_train_by_their_class_names(here: Path) -> None:
    """Encoder, coupling and guidance rule of tests/plugins/goodplugin, named as our own are."""
    roots = [f"runs/plugin/{stage}" for stage in ("autoencoder", "flow")]

    def places(root: str) -> list[str]:
        loggers = ["--trainer.logger", "false", "--trainer.default_root_dir", root, "--trainer.callbacks", "[EMA]"]
        return [*loggers, "--trainer.enable_checkpointing", "true", "--model.artifact", f"{root}/model"]

    encoder = {"class_path": "PatchProjection", "init_args": {"dim": 32, "patch_size": 8, "image_size": 32}}
    trainer("fit", "autoencoder", *places(roots[0]), "--trainer.max_steps", "4", "--model.autoencoder.encoder", json.dumps(encoder))
    coupling = {"class_path": "BoundedAffine", "init_args": {"limit": 2.0}}
    rule = {"class_path": "Power", "init_args": {"strength": 1.5, "power": 0.7}}
    flow = ["--model.flow.channels", "32", "--model.flow.coupling", json.dumps(coupling), "--model.guidance", json.dumps(rule)]
    flow += ["--model.codec", f"{roots[0]}/model"]
    trainer("fit", "flow", *places(roots[1]), *flow, "--trainer.max_steps", "6")
    spec = json.loads(Path(roots[1], "model/config.json").read_text())
    assert spec["init_args"]["coupling"] == {"class_path": "srcflow_goodplugin.couplings.BoundedAffine", "init_args": {"limit": 2.0}}
    srcflow("sample", "--pipeline", f"{roots[1]}/model", "--out", "plugin.png", "--n", "4", "--guidance", json.dumps(rule))
    assert Path("plugin.png").is_file()
    checkpoint = next(Path(roots[1]).rglob("*.ckpt"))
    trainer("test", "flow", *places(roots[1]), *flow, "--ckpt_path", str(checkpoint), "--model.evaluation.baseline_batches", "0")
    _, protocol = written(f"{roots[1]}/metrics.json")
    assert protocol["guidance"]["class_path"] == "srcflow_goodplugin.guidance.Power"
