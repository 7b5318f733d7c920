"""Validation, test, sampling and artifacts of one checkpoint are the same under one process, DDP and FSDP2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What same_numbers.py leaves behind."""
    root = tmp_path_factory.mktemp("same")
    for ranks in ("one", "two"):
        script = Path(__file__).with_name("same_numbers.py")
        out = subprocess.run([sys.executable, str(script), ranks, str(root)], capture_output=True, text=True, timeout=600)
        assert out.returncode == 0, out.stderr[-3000:]
    return root


def metrics(root: Path, name: str) -> dict[str, Any]:
    numbers = json.loads((root / f"{name}.json").read_text())["metrics"]
    del numbers["images_per_second"]
    return dict(numbers)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
@pytest.mark.parametrize("bits", [32, 64])
def test_every_strategy_gives_the_numbers_of_one_process(root: Path, mode: str, bits: int) -> None:
    """The batches are not of equal shape: 44 images in batches of 8, on one rank and on two."""
    one, other = metrics(root, f"one{bits}"), metrics(root, f"{mode}{bits}")
    assert {"nll", "nll_marginal", "accuracy", "nll_gaussian", "gfid_40", "rfid_noisy_40", "floor_40"} <= set(one)
    assert one.keys() == other.keys()
    error = one.pop("round_trip_error")
    assert other.pop("round_trip_error") == pytest.approx(error, rel=0.5)
    assert error < (1e-5 if bits == 32 else 1e-13)
    for name, value in one.items():
        distance = "fid" in name or name.startswith(("fd_", "floor"))
        tolerance = (1e-3 if distance else 1e-5) if bits == 32 else 1e-10
        assert other[name] == pytest.approx(value, rel=tolerance, abs=1e-12), name


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
@pytest.mark.parametrize("bits", [32, 64])
def test_samples_of_equal_batch_shape_and_artifacts_are_equal_in_every_bit(root: Path, mode: str, bits: int) -> None:
    one = torch.load(root / f"one{bits}-0.pt", weights_only=True)
    assert one["samples"].std() > 0.01
    for rank in (0, 1):
        other = torch.load(root / f"{mode}{bits}-{rank}.pt", weights_only=True)
        assert torch.equal(other["samples"], one["samples"])
        assert other["val/nll"] == pytest.approx(one["val/nll"], rel=1e-6 if bits == 32 else 1e-7)  # logged in float32
    written = load_file(root / f"artifact-one{bits}" / "model.safetensors")
    found = load_file(root / f"artifact-{mode}{bits}" / "model.safetensors")
    assert written.keys() == found.keys()
    assert all(torch.equal(v, found[k]) for k, v in written.items())
    assert any(v.dtype == (torch.float32 if bits == 32 else torch.float64) for v in written.values())
