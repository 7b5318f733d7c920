"""tools/bench_step.py and tools/bench_memory.py, on the smoke run's flow."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
FLOW = str(ROOT / "configs/smoke/flow.yaml")


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("bench_step"), importlib.import_module("bench_memory")


def test_a_step_in_bfloat16_lowers_the_loss(tools: tuple[ModuleType, ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    assert tools[0].main([FLOW, "--batch-size", "4", "--ema", "float32", "--checkpoint-every", "1"]) == 0
    said = capsys.readouterr().out
    found = re.search(r"nll ([\d.]+) before, ([\d.]+) after; (\d+) of (\d+) averaged tensors differ", said)
    assert found is not None
    before, after, moved, tensors = map(float, found.groups())
    assert after < before
    assert 0 < moved <= tensors
    assert " 0 parameter tensors without a gradient" in said
    assert re.search(r"^AdamW +\d+\.\d s +peak so far +\d+\.\d\d GB$", said, re.M)


def test_a_step_that_memory_does_not_hold_is_refused(
    tools: tuple[ModuleType, ModuleType], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools[0], "available", lambda: 1e9)
    assert tools[0].main([FLOW]) == 1
    assert "not enough memory" in capsys.readouterr().err


def test_peaks_are_measured_beside_the_plan(tools: tuple[ModuleType, ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    bench = tools[1]
    assert bench.main([FLOW, "--batch-size", "64", "--checkpoint-every", "0", "--precision", "32-true"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| flow |")]
    assert len(rows) == 1
    assert re.fullmatch(r"\| flow \| 0 \| \d+\.\d\d \| \d+\.\d\d \| \d+\.\d\d \|", rows[0])
    kept = bench.predict(Path(FLOW), 0, 64, False, "cpu")
    assert bench.predict(Path(FLOW), 1, 64, False, "cpu") < kept < bench.predict(Path(FLOW), 0, 128, False, "cpu") < 2 * kept
