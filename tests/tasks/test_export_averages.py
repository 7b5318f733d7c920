"""`srcflow export` picks one of several averages, from a checkpoint or a snapshot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from srcflow import artifacts
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.callbacks.averages import choose, read_weights
from srcflow.callbacks.ema import EMA
from srcflow.cli import main
from srcflow.errors import CheckpointError, ConfigError
from srcflow.tasks import artifact

from . import test_flow as parts


def test_an_average_of_a_checkpoint_is_its_snapshots(tmp_path: Path) -> None:
    codec = str(artifacts.save(tmp_path / "codec", PixelPatches(12, 6)))
    run = parts.trainer(tmp_path, steps=6, callbacks=[EMA([0.9, 0.5], warmup=False, snapshot_every=3)], limit_val_batches=0)
    run.fit(parts.make(codec), parts.SquaresData())
    run.save_checkpoint(tmp_path / "last.ckpt")
    snapshot = tmp_path / "snapshots/step-00000006-ema-0.5.safetensors"
    sources: dict[str, tuple[Path, float | None]] = {
        "first": (tmp_path / "last.ckpt", None), "0.9": (tmp_path / "last.ckpt", 0.9), "0.5": (tmp_path / "last.ckpt", 0.5),
        "snapshot": (snapshot, None),
    }  # fmt: skip
    written = {}
    for name, (file, decay) in sources.items():
        written[name] = load_file(artifact.export(parts.make(codec), str(file), str(tmp_path / name), ema=decay) / "model.safetensors")
    assert all(torch.equal(v, written["0.9"][k]) for k, v in written["first"].items())
    assert all(torch.equal(v, written["snapshot"][k]) for k, v in written["0.5"].items())
    assert not all(torch.equal(v, written["first"][k]) for k, v in written["0.5"].items())
    wanted = choose(read_weights(tmp_path / "last.ckpt"), 0.5, what="it")
    assert all(torch.equal(v, wanted[f"flow.{k}"]) for k, v in written["0.5"].items())
    with pytest.raises(ConfigError, match=r"ema = 0.7: .*last.ckpt keeps averages of decay 0.9, 0.5\. Name one"):
        artifact.export(parts.make(codec), str(tmp_path / "last.ckpt"), str(tmp_path / "no"), ema=0.7)
    with pytest.raises(ConfigError, match=r"keeps one average, whose decay it does not say"):
        artifact.export(parts.make(codec), str(snapshot), str(tmp_path / "no"), ema=0.7)
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "last.ckpt").read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"cut\.ckpt is not a whole checkpoint.* The newest whole one beside it is .*last\.ckpt"):
        artifact.export(parts.make(codec), str(tmp_path / "cut.ckpt"), str(tmp_path / "no"))
    assert not (tmp_path / "no").exists()


def test_a_pipeline_has_no_average_to_pick(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "--pipeline", "somewhere", "--ema", "0.9", "--out", "place"])
    assert "ema = 0.9: does not go with --pipeline." in capsys.readouterr().err
