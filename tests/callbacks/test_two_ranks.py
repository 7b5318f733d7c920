"""The average and the guard on two processes: DDP, FSDP2 with one checkpoint file, FSDP2 with a sharded checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def run(mode: str, root: Path) -> dict[str, dict[str, Any]]:
    script = Path(__file__).with_name("two_ranks.py")
    out = subprocess.run([sys.executable, str(script), mode, str(root)], capture_output=True, text=True, timeout=300)
    assert out.returncode == 0, out.stderr[-3000:]
    line = next(x for x in out.stdout.splitlines() if x.startswith("RESULT"))
    return dict(json.loads(line.removeprefix("RESULT")))


def test_all_strategies_agree_and_a_resumed_run_is_the_straight_one(tmp_path: Path) -> None:
    results = {}
    for mode in ("ddp", "full", "sharded"):
        (tmp_path / mode).mkdir()
        results[mode] = run(mode, tmp_path / mode)
        assert results[mode]["straight"] == results[mode]["resumed"], mode
        assert results[mode]["kept"] == [8, 0], mode  # four parameters, trained and in the second average
        assert (results[mode]["straight"]["updates"], results[mode]["straight"]["skipped"]) == (7, 1)
    for mode in ("full", "sharded"):
        for name in ("ema", "raw", "further"):
            assert results[mode]["straight"][name] == pytest.approx(results["ddp"]["straight"][name], abs=1e-6)
