from __future__ import annotations

import json
from pathlib import Path

from srcflow.tasks.report import table, write_metrics


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path = write_metrics(tmp_path / "new" / "m.json", {"a": 1.5, "b": float("nan"), "n": 3}, {"seed": 0})
    assert json.loads(path.read_text()) == {"metrics": {"a": 1.5, "b": None, "n": 3}, "protocol": {"seed": 0}}
    assert [p.name for p in path.parent.iterdir()] == ["m.json"]


def test_columns_are_aligned() -> None:
    lines = table({"long name": 0.123456, "n": 10}).splitlines()
    assert len({len(x) for x in lines}) == 1
    assert "0.1235" in lines[0]
