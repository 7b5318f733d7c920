from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from srcflow.errors import ConfigError, DataError
from srcflow.tasks.autoencoder import AutoencoderTask
from srcflow.tasks.report import table, write_metrics

Make = Callable[..., Any]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "new" / "m.json", {"a": 1.5, "b": float("nan"), "n": 3}, {"seed": 0})
    assert json.loads(path.read_text()) == {"metrics": {"a": 1.5, "b": None, "n": 3}, "protocol": {"seed": 0}}
    assert [p.name for p in path.parent.iterdir()] == ["m.json"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for place in ("file/m.json", "folder"):
        with pytest.raises(DataError, match=r"metrics_file = .*cannot be written: .* The numbers are on the screen\."):
            write_metrics(tmp_path / place, {"a": 1}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_columns_are_aligned() -> None:
    lines = table({"long name": 0.123456, "n": 10}).splitlines()
    assert len({len(x) for x in lines}) == 1
    assert "0.1235" in lines[0]


def test_the_place_is_tried_before_the_test(autoencoder: Make, pictures: Make, trainer: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    seen: list[object] = []
    task = AutoencoderTask(autoencoder(), noise=None, eval_noise=None, metrics_file=str(tmp_path / "file" / "m.json"))
    task.test_step = lambda *batch: seen.append(batch)  # type: ignore[method-assign, assignment]
    with pytest.raises(ConfigError, match=r"^model\.metrics_file = .*is not a directory"):
        trainer().test(task, datamodule=pictures(), verbose=False)
    assert not seen


def test_numbers_that_cannot_be_written_are_printed(
    autoencoder: Make, pictures: Make, trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    fitted = autoencoder()
    fitted.set_statistics(torch.zeros(1, 16), torch.ones(1, 16))
    task = AutoencoderTask(fitted, noise=None, eval_noise=None, metrics_file=str(tmp_path / "m.json"))
    with pytest.raises(DataError, match=r"m\.json': cannot be written: No space left on device\. The numbers are on the screen\."):
        trainer().test(task, datamodule=pictures(), verbose=False)
    assert re.search(r"^  psnr +\d", capsys.readouterr().out, re.M)
    assert not list(tmp_path.glob("*.json")) + list(tmp_path.glob(".*.partial"))
