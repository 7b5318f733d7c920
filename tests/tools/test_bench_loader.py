from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("bench_loader")


def test_it_measures_both_modes_with_and_without_a_worker(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--images", "40", "--repeats", "1", "--sizes", "40:32"]) == 0
    said = capsys.readouterr().out
    assert "40 px to 32 px, 32 images" in said
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("|")][2:]
    assert [r[0] for r in rows] == ["decode, resize, crop", "map, 0 workers", "map, 1 worker", "stream, 0 workers", "stream, 1 worker"]
    assert rows[0][3:] == ["100.0%", "100.0%"]
    assert all(float(r[1]) > 0 and float(r[2]) > 0 for r in rows)


def test_shares_are_taken_round_by_round(tool: ModuleType) -> None:
    timing = tool.Timing
    found = {
        "limit": [timing(1.0, 0.5), timing(4.0, 0.5), timing(2.0, 0.5)],
        "loader": [timing(2.0, 1.0), timing(5.0, 2.0), timing(2.0, 1.0)],
    }
    assert tool.table(found, 10)[2:] == ["| limit | 5 | 20 | 100.0% | 100.0% |", "| loader | 5 | 10 | 80.0% | 50.0% |"]


@pytest.mark.parametrize("arguments", [["--sizes", "32:64"], ["--sizes", "32"], ["--sizes", "x:y"], ["--images", "31"], ["--repeats", "0"]])
def test_arguments_that_make_no_sense(tool: ModuleType, arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        tool.main(arguments)
