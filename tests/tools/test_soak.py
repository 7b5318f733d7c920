"""The soak, made short: a few kills, and the weights of the undisturbed run."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("soak")


@pytest.mark.slow
def test_a_run_under_kills_ends_with_the_weights_of_an_undisturbed_one(soak: ModuleType, tmp_path: Path) -> None:
    root = tmp_path / "soak"
    assert soak.main(["--root", str(root), "--steps", "300", "--save", "10", "--minutes", "1", "--every", "15", "--seed", "1"]) == 0
    report = json.loads((root / "soak.json").read_text())
    assert report["differing"] == []
    assert report["starts"] >= 2
    assert sum(report["kills"].values()) >= 1


def test_a_difference_of_one_bit_is_found(soak: ModuleType, tmp_path: Path) -> None:
    value = torch.ones(4)
    other = value.clone()
    other[2] = torch.nextafter(other[2], torch.tensor(2.0))
    for name, weights in (("straight", value), ("disturbed", other)):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        content = {"state_dict": {"w": weights, "v": value}, "optimizer_states": [{"step": 3}], "global_step": 5, "lr_schedulers": []}
        torch.save(content, tmp_path / name / "checkpoints/step-5.ckpt")
    assert soak.compare(tmp_path, 5) == ["callbacks (missing)", "state_dict/w"]
