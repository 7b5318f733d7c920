"""`srcflow replay` through the command line: a run that diverges, its dump, the step again."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from srcflow import artifacts
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.cli import main

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*in eval mode:UserWarning"),
    pytest.mark.filterwarnings("ignore::srcflow.callbacks.non_finite.NonFiniteWarning"),
]


def diverge(here: Path, stage: str, model: dict[str, Any]) -> list[str]:
    """configs/smoke with a learning rate that no run survives."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        assert importlib.import_module("synthetic").main(["--out", str(here / "data"), "--train", "40", "--eval", "8"]) == 0
    overlay = {
        "model": {"init_args": {"artifact": str(here / "artifact"), "optimization": OPTIMIZATION, **model}},
        "data": {"init_args": {**{s: str(here / "data" / f"{s}-*.tar") for s in ("train", "val", "test")}, "batch_size": 8}},
        "trainer": {
            "logger": False,
            "callbacks": [{"class_path": "EMA"}],
            "default_root_dir": str(here / "run"),
            "limit_val_batches": 0,
            "enable_progress_bar": False,
        },
    }
    (here / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    files = [ROOT / "configs/smoke" / f"{stage}.yaml", ROOT / "configs/trainer/cpu.yaml", here / "overlay.yaml"]
    return ["fit", *(a for f in files for a in ("--config", str(f)))]


OPTIMIZATION = {"learning_rate": 1e8, "min_learning_rate": 0.0, "warmup_steps": 0, "max_bad_steps": 3}


def status(*args: str) -> int:
    try:
        main(list(args))
    except SystemExit as e:
        return int(str(e.code))
    return 0


def test_a_flow_that_diverges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifacts.save(tmp_path / "codec", PixelPatches(32, 8))
    flow = {"grid": 4, "channels": 192, "width": 32, "layers": [1, 1], "head_dim": 16, "num_classes": 4}
    model = {
        "codec": str(tmp_path / "codec"),
        "flow": {"class_path": "srcflow.flows.presets.srcflow", "init_args": flow},
        "evaluation": {"samples": 0},
    }
    assert status(*diverge(tmp_path, "flow", model)) == 2
    (place,) = (tmp_path / "run").glob("nonfinite-step*")
    error = capsys.readouterr().err.partition("error: ")[2]
    assert error.startswith(
        "3 steps in a row had a non-finite loss or gradient (optimizer step 3, 3 skipped in all). The most extreme of all"
    )
    assert f"`srcflow replay {place}` makes the step again" in error
    assert sorted(p.name for p in place.iterdir()) == ["config.yaml", "dump.json", "rank0.json", "rank0.safetensors", "weights.safetensors"]
    facts = json.loads((place / "dump.json").read_text())
    assert (facts["step"], facts["in_a_row"], facts["epoch"], facts["precision"]) == (3, 3, 0, "32-true")
    (row,) = json.loads((place / "rank0.json").read_text())
    assert all(f"{i} (train{i:06d})" in row["names"] for i in row["finding"]["indices"])

    assert status("replay", str(place)) == 0
    out = capsys.readouterr().out
    assert out.startswith("optimizer step 3 of FlowTask, epoch 0, seed 0, 32-true")
    assert "the first gradient that is not finite: flow.blocks." in out
    assert "gradient norm nan (recorded nan)" in out
    assert out.endswith("The step is reproduced.\n")
    assert not (tmp_path / "artifact").exists()  # it is no fit
    assert status("replay", str(place), "--config", str(place / "config.yaml"), "--device", "cpu") == 0
    capsys.readouterr()

    assert status("replay", str(place), "--precision", "bf16-mixed") == 1
    assert "numbers differ:\n  batch 3: " in capsys.readouterr().out
    weights = load_file(place / "weights.safetensors")
    weights["flow.blocks.0.head.weight"] *= 1.01
    save_file(weights, place / "weights.safetensors")
    assert status("replay", str(place)) == 1
    out = capsys.readouterr().out
    loss = row["finding"]["loss"]
    assert f"  batch 3: loss: recorded {loss}, now " in out
    assert "The step is not reproduced" in out

    (place / "config.yaml").unlink()
    assert status("replay", str(place)) == 2
    assert "config = None: is missing: the dump has none. Give the run's configuration: --config FILE." in capsys.readouterr().err
    assert status("replay", str(place), "--config", str(tmp_path / "none.yaml")) == 2
    assert "none.yaml': there is no such file" in capsys.readouterr().err
    assert status("replay", str(tmp_path)) == 2
    assert "is no dump of a training step" in capsys.readouterr().err


@pytest.mark.slow
def test_an_autoencoder_that_diverges(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(*diverge(tmp_path, "autoencoder", {})) == 2
    (place,) = (tmp_path / "run").glob("nonfinite-step*")
    assert (place / "discriminator.safetensors").exists()
    capsys.readouterr()
    assert status("replay", str(place)) == 0
    out = capsys.readouterr().out
    assert "of AutoencoderTask" in out
    assert "the first value that is not finite: " in out
