"""FlowTask on two processes: FSDP2 gives DDP's numbers, in training and in every number of `srcflow test`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_fsdp2_gives_the_numbers_of_ddp(tmp_path: Path) -> None:
    numbers = {}
    for mode in ("ddp", "fsdp2"):
        script = Path(__file__).with_name("flow_two_ranks.py")
        out = subprocess.run([sys.executable, str(script), mode, str(tmp_path)], capture_output=True, text=True, timeout=300)
        assert out.returncode == 0, out.stderr[-3000:]
        numbers[mode] = json.loads((tmp_path / f"{mode}.json").read_text())["metrics"]
        del numbers[mode]["images_per_second"]
    assert numbers["fsdp2"] == pytest.approx(numbers["ddp"], rel=1e-5)
    assert {"nll", "nll_marginal", "accuracy", "gfid_24", "rfid_24", "floor_24"} <= set(numbers["ddp"])
