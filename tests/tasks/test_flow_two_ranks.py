"""FlowTask on two processes: FSDP2 gives DDP's numbers, in training and in every number of `srcflow test`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_fsdp2_gives_the_numbers_of_ddp(tmp_path: Path) -> None:
    numbers, runaway = {}, {}
    for mode in ("ddp", "fsdp2"):
        script = Path(__file__).with_name("flow_two_ranks.py")
        out = subprocess.run([sys.executable, str(script), mode, str(tmp_path)], capture_output=True, text=True, timeout=300)
        assert out.returncode == 0, out.stderr[-3000:]
        numbers[mode] = json.loads((tmp_path / f"{mode}.json").read_text())["metrics"]
        runaway[mode] = json.loads((tmp_path / f"{mode}-runaway.json").read_text())["metrics"]
        del numbers[mode]["images_per_second"], runaway[mode]["images_per_second"]
    assert numbers["fsdp2"] == pytest.approx(numbers["ddp"], rel=1e-5)
    assert {"nll", "nll_marginal", "accuracy", "gfid_24", "rfid_24", "floor_24"} <= set(numbers["ddp"])
    bad = runaway["ddp"]["samples_non_finite"]  # counted on both ranks, and not in the padding of the last batch
    assert 0 < bad <= 24
    assert runaway["fsdp2"].keys() == runaway["ddp"].keys()
    assert "gfid_24" not in runaway["ddp"]
    assert (f"gfid_{24 - bad}_finite_of_24" in runaway["ddp"]) == (bad < 23)
