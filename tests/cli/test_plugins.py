"""`srcflow plugins`."""

from __future__ import annotations

import json

import pytest

from srcflow import registry
from srcflow.cli import main
from srcflow.cli.plugins import table


def test_every_part_of_srcflow_is_listed_and_none_is_broken(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plugins", "--json"])
    listed = json.loads(capsys.readouterr().out)
    assert set(listed) == {"parts", "broken"}
    assert {p["family"] for p in listed["parts"]} == set(registry.FAMILIES)
    assert not [b for b in listed["broken"] if b["distribution"] == "srcflow"]
    assert {"family": "couplings", "name": "Affine", "distribution": "srcflow"}.items() <= next(
        p for p in listed["parts"] if p["name"] == "Affine"
    ).items()
    assert all(p["description"].endswith(".") for p in listed["parts"] if p["distribution"] == "srcflow")


def test_one_family(capsys: pytest.CaptureFixture[str]) -> None:
    main(["plugins", "--family", "solvers"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["family", "name", "distribution", "description"]
    assert {line.split()[0] for line in lines[1:] if line} <= {"solvers"}
    assert any(line.split()[:3] == ["solvers", "Sequential", "srcflow"] for line in lines[1:])


def test_broken_ones_follow_with_their_errors(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    bad = registry.Broken("solvers", "Newton", "srcflow-newton", "ImportError: no newton")
    monkeypatch.setattr(registry, "broken", lambda family: [bad] if family == "solvers" else [])
    main(["plugins", "--family", "solvers"])
    captured = capsys.readouterr()
    assert "Newton" in captured.out.partition("broken:")[2]
    assert "ImportError: no newton" in captured.out
    assert not captured.err  # said once, in the table
    main(["plugins", "--family", "solvers", "--json"])
    assert json.loads(capsys.readouterr().out)["broken"][0]["error"] == "ImportError: no newton"


def test_the_last_column_is_wrapped_under_itself() -> None:
    text = table(("a", "b"), [("long name", "one two three four five six seven eight nine ten")], width=41)
    assert text.splitlines() == ["a          b", "long name  one two three four five six", "           seven eight nine ten"]
