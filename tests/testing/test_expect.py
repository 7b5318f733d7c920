"""What the checks share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from srcflow.testing.expect import close, watch_files


def test_close_does_not_pass_nan() -> None:
    nan = torch.tensor([1.0, float("nan")])
    with pytest.raises(AssertionError, match="inf"):
        close(nan, torch.ones(2), 1.0, "x", "a and b")
    with pytest.raises(AssertionError, match="inf"):
        close(torch.ones(2), nan, 1.0, "x", "a and b")


def test_files_are_watched_only_inside_the_block(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"1")
    with watch_files() as touched:
        pass
    path.read_bytes()
    assert touched == []
    with watch_files() as touched:
        path.read_bytes()
    assert touched == [str(path)]
