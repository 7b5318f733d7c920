"""`srcflow plan`: what it reads from configurations, and what it prints."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from srcflow import artifacts
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.cli import load_parts, main
from srcflow.cli.plan import run_of, settings, stage_of
from srcflow.errors import ConfigError, ProblemsError, UnknownNameError

CONFIGS = Path(__file__).parents[2] / "configs"
SMOKE = CONFIGS / "smoke"
STAGES = ["--stages", *map(str, sorted(SMOKE.glob("*.yaml")))]


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    """The JSON object that `srcflow plan ... --json` prints."""
    main(["--debug", "plan", *arguments, "--json"])
    return json.loads(capsys.readouterr().out)


def header(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\nseed_everything")[0]


@pytest.mark.parametrize("stage", ["autoencoder", "compressor", "flow"])
def test_every_stage_is_planned(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = planned(capsys, str(SMOKE / f"{stage}.yaml"), *STAGES)
    stated = re.search(r"Parameters: ([\d,]+) trained", header(SMOKE / f"{stage}.yaml"))
    assert stated is not None
    assert made["parameters"]["trained"] == int(stated[1].replace(",", ""))
    assert made["notes"] == made["warnings"] == []
    assert made["codec_known"]
    assert made["flops"]["parts"]["frozen parts"] > 0
    memory = made["memory"]["strategies"]["one process"]
    assert memory["peak"] > memory["weights"] > 0
    assert made["run"]["averages"] == 1
    assert made["disk"]["kept"] == 2  # the newest, and last.ckpt
    assert made["hours"]["wall"] > 0
    assert "features" in made["disk"]


def test_the_report_names_what_the_numbers_are(capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(SMOKE / "flow.yaml"), str(CONFIGS / "trainer/ddp8.yaml")]
    main(["plan", *files, *STAGES, "--gpu", "a100", "--mfu", "0.3", "--images", "1000", "--set", "trainer.precision=bf16-mixed"])
    said = capsys.readouterr().out
    for words in (
        "52,356 trained",
        "256 = 32 x 8 processes x 1 accumulated",
        "8 x a100 at 30% of 312 TFLOP/s",
        "memory per process (bf16-mixed)",
        "ddp *         fsdp2",
        "activations by checkpoint_every (here 0;",
        "of 80 GB",
        "2 kept",
        "for 1,000 (twice that with --flip)",
    ):
        assert words in said
    assert "gradient buckets" not in said  # gradients are views of them
    assert "note:" not in said
    assert "warning:" not in said


@pytest.mark.slow
def test_the_largest_flow_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    made = planned(capsys, str(CONFIGS / "flow/imagenet256_dinov2b_src32_xl.yaml"), str(CONFIGS / "trainer/ddp8.yaml"), "--stages",
                   *map(str, sorted(CONFIGS.glob("*/imagenet256_dinov2b*.yaml"))))  # fmt: skip
    assert made["parameters"]["trained"] == 1_413_286_464
    assert 2.2e12 < made["flops"]["image"] < 2.3e12
    assert made["flops"]["recomputed"] > 2e11
    assert not made["warnings"]
    activations = made["memory"]["activations"]
    assert activations["0"] > activations["2"] > activations["1"]


def test_a_run_that_does_not_fit_has_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main(["plan", str(SMOKE / "flow.yaml"), *STAGES, "--gpu", "tiny", "--tflops", "1", "--memory", "0.001"])
    assert e.value.code == 1
    said = capsys.readouterr().out
    assert "warning: " in said
    assert "do not fit into 90% of tiny's" in said


# --- earlier stages ------------------------------------------------------------------------------------------------------------------


def pixel_run(folder: Path, codec: str) -> Path:
    """A flow's run on pixels."""
    flow = {"class_path": "srcflow.flows.presets.tarflow", "init_args": {"grid": 4, "channels": 12, "width": 32, "blocks": 2, "layers": 1}}
    flow["init_args"]["head_dim"] = 16  # type: ignore[index]
    content = {
        "model": {"class_path": "FlowTask", "init_args": {"codec": codec, "flow": flow}},
        "data": {"class_path": "ImageFolder", "init_args": {"train": "photos", "size": 8, "batch_size": 4}},
        "trainer": {"max_steps": 10},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder / "run.yaml"


def test_a_codec_is_read_from_its_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifacts.save(tmp_path / "pixels", PixelPatches(8, 2))
    made = planned(capsys, str(pixel_run(tmp_path, str(tmp_path / "pixels"))))
    assert made["codec_known"]
    assert made["notes"] == []


def test_a_codec_that_is_nowhere_is_noted_and_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(pixel_run(tmp_path, "runs/made_elsewhere"))
    made = planned(capsys, path)
    assert not made["codec_known"]
    assert "--stages" in made["notes"][0]
    content = yaml.safe_load((CONFIGS / "autoencoder/pixels64.yaml").read_text(encoding="utf-8"))
    content["model"]["init_args"]["artifact"] = "runs/made_elsewhere"
    content["model"]["init_args"]["autoencoder"]["init_args"].update(image_size=8, patch_size=2)
    other = tmp_path / "stage0.yaml"
    other.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert not planned(capsys, path)["codec_known"]  # no file is read that is not named
    named = planned(capsys, path, "--stages", str(other))
    assert named["codec_known"]
    assert named["notes"] == []
    content["model"]["init_args"]["autoencoder"]["init_args"].update(image_size=16)
    other.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"flow\.grid"):
        main(["--debug", "plan", path, "--stages", str(other)])


def test_a_broken_file_beside_the_run_is_not_read_and_one_that_is_named_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifacts.save(tmp_path / "pixels", PixelPatches(8, 2))
    path, broken = str(pixel_run(tmp_path, str(tmp_path / "pixels"))), tmp_path / "notes.yaml"
    broken.write_text("model: [\n", encoding="utf-8")
    assert planned(capsys, path)["codec_known"]
    with pytest.raises(ConfigError, match=r"stages = .*notes\.yaml': line 2, column 1: is not YAML"):
        main(["--debug", "plan", path, "--stages", str(broken)])


def test_a_compressor_without_its_autoencoder_is_refused(tmp_path: Path) -> None:
    content = yaml.safe_load((SMOKE / "compressor.yaml").read_text(encoding="utf-8"))
    content["model"]["init_args"]["autoencoder"] = "runs/nowhere"
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ConfigError, match="--stages"):
        main(["--debug", "plan", str(path)])


def test_stored_features_spare_the_encoder(tmp_path: Path) -> None:
    load_parts()
    content = settings([str(CONFIGS / "flow/fashion_mnist.yaml")], [])
    assert content["data"]["class_path"].endswith("FeatureStore")
    assert stage_of(content, [])[0].stored


# --- settings ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    load_parts()
    return settings([str(SMOKE / "flow.yaml")], [])


def test_later_files_and_values_win() -> None:
    load_parts()
    made = settings([str(SMOKE / "flow.yaml"), str(CONFIGS / "trainer/fsdp2.yaml")], ["trainer.max_steps=7", "data.batch_size=5"])
    run = run_of(made, None)
    assert (run.steps, run.batch_size, run.sharded, run.ranks) == (7, 5, True, 8)
    assert run_of(made, 16).ranks == 16


DDP = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "dict_kwargs": {"gradient_as_bucket_view": True}}
ALL = {"class_path": "x.ModelCheckpoint", "init_args": {"save_top_k": -1}}
OFTEN = {"class_path": "x.ModelCheckpoint", "init_args": {"save_top_k": -1, "every_n_train_steps": 10}}
AVERAGES = {"class_path": "EMA", "init_args": {"decay": [0.9, 0.99]}}
SNAPSHOTS = {"class_path": "EMA", "init_args": {"decay": [0.9, 0.99], "snapshot_every": 30}}


def ours(**arguments: Any) -> dict[str, Any]:
    return {"class_path": "srcflow.callbacks.checkpoints.Checkpoints", "init_args": arguments}


@pytest.mark.parametrize(
    ("trainer", "wanted"),
    [
        ({"devices": 4, "num_nodes": 2}, {"ranks": 8}),
        ({"devices": [0, 3]}, {"ranks": 2}),
        ({"devices": "3"}, {"ranks": 3}),
        ({"devices": "auto"}, {"ranks": 1}),
        ({"precision": "bf16-mixed"}, {"mixed": True}),
        ({"precision": None}, {"mixed": False}),
        ({"accelerator": "cpu"}, {"like": "cpu"}),
        ({"max_steps": -1}, {"steps": None}),
        ({"accumulate_grad_batches": 4}, {"accumulate": 4}),
        ({"strategy": DDP}, {"bucket_views": True}),
        ({"callbacks": []}, {"averages": 0, "kept": 1}),
        ({"callbacks": [AVERAGES]}, {"averages": 2}),
        ({"callbacks": [OFTEN], "max_steps": 95}, {"kept": 9}),
        ({"callbacks": [ALL]}, {"kept": None}),
        ({"callbacks": [ours(every_n_steps=10)], "max_steps": 95}, {"kept": 2}),
        ({"callbacks": [ours(every_n_steps=10, keep=3)], "max_steps": -1}, {"kept": 3}),
        ({"callbacks": [ours(every_n_steps=10, keep=3, keep_every_n_steps=40)], "max_steps": 95}, {"kept": 4}),  # 95, 90, 80, 40
        ({"callbacks": [ours(every_n_steps=10, keep_every_n_steps=40)], "max_steps": -1}, {"kept": None}),
        ({"callbacks": [SNAPSHOTS], "max_steps": 95}, {"snapshots": 6}),
        ({"callbacks": [SNAPSHOTS], "max_steps": -1}, {"snapshots": None}),
    ],
)
def test_what_is_read_from_the_trainer(content: dict[str, Any], trainer: dict[str, Any], wanted: dict[str, Any]) -> None:
    changed = copy.deepcopy(content)
    changed["trainer"].update(trainer)
    run = run_of(changed, None)
    assert {k: getattr(run, k) for k in wanted} == wanted


def test_what_cannot_be_planned_is_refused(content: dict[str, Any]) -> None:
    changed = copy.deepcopy(content)
    changed["trainer"]["precision"] = "16-mixed"
    with pytest.raises(ConfigError, match=r"trainer\.precision"):
        run_of(changed, None)
    with pytest.raises(ProblemsError, match="no such file"):
        settings(["nowhere.yaml"], ["trainer.max_steps"])
    with pytest.raises(UnknownNameError, match="h100"):
        main(["--debug", "plan", str(SMOKE / "flow.yaml"), "--gpu", "h10"])
    with pytest.raises(ConfigError, match="is not sharded"):
        main(["--debug", "plan", str(SMOKE / "autoencoder.yaml"), str(CONFIGS / "trainer/fsdp2.yaml")])


def test_a_wrong_key_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main(["plan", str(SMOKE / "flow.yaml"), "--set", "trainer.max_stepz=3"])
    assert e.value.code == 2
    assert "max_stepz" in capsys.readouterr().err
