"""The demo's own code: its table, and that it agrees with its configurations."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "tools" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FLOW = {
    "rfid_2k": 20.0,
    "rfid_noisy_2k": 25.0,
    "floor_2k": 4.0,
    "gfid_2k": 30.0,
    "fd_decoded_2k": 6.0,
    "nll": 0.4,
    "nll_marginal": 0.41,
    "nll_gaussian": 0.6,
    "accuracy": 0.8,
    "round_trip_error": 1e-6,
    "images_per_second": 90.0,
}


def written(demo: ModuleType, folder: Path, **changes: float) -> None:
    protocol = {"extractor": "judge", "noise": {"init_args": {"sigma": 0.4}}, "guidance": None}
    numbers = {"autoencoder": {"l1": 0.05, "rfid_2k": 18.0}, "compressor": {"l1": 0.052}, "flow": {**FLOW, **changes}}
    for stage, found in numbers.items():
        path = folder / demo.RUN / stage / "metrics.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"metrics": found, "protocol": protocol}))


def test_the_table_says_what_was_met(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    written(demo, tmp_path)
    demo.summary({"data": 60.0}, 60.0, "bf16-mixed")
    lines = capsys.readouterr().out.splitlines()
    verdicts = {line.split("  ")[1].strip(): line for line in lines if line.endswith(("met", "NOT MET"))}
    assert [v.endswith("NOT MET") for v in verdicts.values()] == [False, True, False, False, False]
    combined = json.loads((tmp_path / demo.RUN / "metrics.json").read_text())
    assert combined["flow"]["metrics"]["accuracy"] == 0.8
    written(demo, tmp_path, rfid_2k=11.0, accuracy=0.7)
    demo.summary({"data": 60.0}, 60.0, "bf16-mixed")
    assert capsys.readouterr().out.count("NOT MET") == 1


def test_missing_numbers_end_the_demo(demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="--from test"):
        demo.summary({}, 0.0, "32-true")


def test_it_agrees_with_its_configurations(demo: ModuleType) -> None:
    flow = yaml.safe_load((ROOT / demo.CONFIGS["flow"]).read_text())["model"]["init_args"]
    assert flow["evaluation"]["samples"] == demo.IMAGES["test"] == flow["evaluation"]["classified"]
    for stage, config in demo.CONFIGS.items():
        content = yaml.safe_load((ROOT / config).read_text())
        assert content["model"]["init_args"]["artifact"] == str(demo.RUN / stage / "artifact")
        assert content["model"]["init_args"]["metrics_file"] == str(demo.RUN / stage / "metrics.json")
        assert content["data"]["init_args"]["path_train"] == str(demo.RUN / "features" / "train")


def test_the_faster_precision_is_one_of_two(demo: ModuleType) -> None:
    assert demo.faster_precision() in ("bf16-mixed", "32-true")
