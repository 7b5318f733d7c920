"""What the checks share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from srcflow.testing import (
    perturb,
)
from srcflow.testing.expect import close, watch_files


def test_perturb_moves_every_parameter_by_the_stated_amount() -> None:
    module = nn.Sequential(nn.Linear(50, 40), nn.LayerNorm(40))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    assert perturb(module) is module
    moved = torch.cat([(v - before[k]).flatten() for k, v in module.state_dict().items()])
    assert bool((moved != 0).all())
    assert moved.std().item() == pytest.approx(0.05, rel=0.05)
    again = nn.Sequential(nn.Linear(50, 40), nn.LayerNorm(40))
    again.load_state_dict(before)
    torch.testing.assert_close(perturb(again).state_dict(), module.state_dict(), rtol=0, atol=0)


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
