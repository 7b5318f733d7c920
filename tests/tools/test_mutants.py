"""The mutants fit today's source and name tests that are there (`make test-slow` runs these), and the tool tells the truth."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MODULES = ("mutants", "mutant_list")


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    yield importlib.import_module("mutants")
    for name in MODULES:
        sys.modules.pop(name, None)


# --- the list ---------------------------------------------------------------------------------------------------------------------------


def test_every_mutant_fits_todays_source_once_and_names_tests_that_run_by_default(tool: Any) -> None:
    problems = []
    for mutant in tool.MUTANTS:
        try:
            changed = tool.mutated(mutant, ROOT).splitlines()
        except tool.MutantError as e:
            problems.append(str(e))
            continue
        before = (ROOT / mutant.file).read_text(encoding="utf-8").splitlines()
        assert len(changed) == len(before)
        assert sum(a != b for a, b in zip(changed, before, strict=True)) == 1, mutant.name
        problems += [f"{mutant.name!r}: there is no test {t}" for t in tool.missing_tests(mutant.tests, ROOT)]
        problems += [f"{mutant.name!r}: {t} is marked {kind}" for t in mutant.tests for kind in marks(t)]
    assert not problems, "\n".join(problems)
    assert len({m.name for m in tool.MUTANTS}) == len(tool.MUTANTS) >= 40


def marks(test: str) -> set[str]:
    """Those that `make test` leaves out."""
    file, _, name = test.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    function = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name), None)
    decorators = [] if function is None else [ast.unparse(d) for d in function.decorator_list]
    return {kind for kind in ("slow", "gpu", "reference") if any(f"mark.{kind}" in d for d in decorators)}


def test_the_mutants_are_spread_over_the_package(tool: Any) -> None:
    files = {m.file for m in tool.MUTANTS}
    for part in ("tasks", "flows", "guidance", "solvers", "metrics", "data", "callbacks", "couplings", "nn", "losses"):
        assert any(f.startswith(f"srcflow/{part}/") for f in files), part
    assert {"srcflow/randomness.py", "srcflow/statistics.py", "srcflow/noise.py", "srcflow/pipeline.py"} <= files


@pytest.mark.slow
def test_no_mutant_survives() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "mutants.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 problems" in done.stdout


# --- the tool, on a package of a few lines ----------------------------------------------------------------------------------------------

PACKAGE = """import math


def twice(x):
    return 2 * x


def root(x):
    return math.sqrt(x)


def below(x):
    while x > 0:
        x -= 1
    return x
"""
TESTS = """import srcflow


def test_twice():
    assert srcflow.twice(3) == 6


def test_twice_of_nothing():
    assert srcflow.twice(0) == 0


def test_below():
    assert srcflow.below(3) == 0


def test_that_never_passes():
    assert srcflow.twice(1) == 1
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "srcflow").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "srcflow" / "__init__.py").write_text(PACKAGE)
    (tmp_path / "tests" / "test_it.py").write_text(TESTS)
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\naddopts = "-ra"\n')
    return tmp_path


def mutant(tool: Any, name: str, old: str, new: str, *tests: str) -> Any:
    return tool.Mutant(name, "srcflow/__init__.py", old, new, tuple(f"tests/test_it.py::{t}" for t in tests))


def test_killed_survived_endless_and_unimportable_mutants_are_told_apart(
    tool: Any, tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tool, "LIBRARIES", ())
    monkeypatch.setattr(tool, "LIMIT", 4.0)
    mutants = [
        mutant(tool, "seen", "2 * x", "3 * x", "test_twice_of_nothing", "test_twice"),
        mutant(tool, "not seen", "2 * x", "4 * x", "test_twice_of_nothing"),
        mutant(tool, "endless", "x -= 1", "x += 1", "test_below"),
        mutant(tool, "not imported", "import math", "import no_such_module", "test_twice"),
        mutant(tool, "meaningless", "math.sqrt(x)", "math.exp(x)", "test_that_never_passes"),
    ]
    assert tool.main([], mutants, tree) == 1
    out, error = capsys.readouterr()
    verdicts = {line.split("  ")[0].strip(): line for line in out.splitlines() if " s " in line}
    assert "killed" in verdicts["seen"]
    assert verdicts["seen"].endswith("tests/test_it.py::test_twice")
    assert "SURVIVED" in verdicts["not seen"]
    assert "TIMEOUT" in verdicts["endless"]
    assert "ERROR" in verdicts["not imported"]
    assert "meaningless" not in verdicts
    assert "tests/test_it.py::test_that_never_passes: failed without any mutant" in error
    for name in ("not seen", "endless", "not imported"):
        assert f"'{name}' (srcflow/__init__.py)" in error
    assert "'seen'" not in error
    assert (tree / "srcflow" / "__init__.py").read_text() == PACKAGE
    assert tool.main(["--only", "seen", "--jobs", "1"], mutants[:1], tree) == 0


@pytest.mark.parametrize(
    ("old", "new", "test", "words"),
    [
        ("return", "yield", "test_twice", "'x': its snippet occurs 3 times in srcflow/__init__.py, not once: 'return'"),
        ("5 * x", "6 * x", "test_twice", "'x': its snippet occurs 0 times"),
        ("2 * x", "2 *", "test_twice", "'x': the changed line is no Python"),
        ("2 * x", "2  *  x", "test_twice", "'x': the changed line means the same"),
        ("2 * x\n", "3 * x\n", "test_twice", "'x': a mutant changes part of one line"),
        ("2 * x", "3 * x", "test_thrice", "'x': no such tests: tests/test_it.py::test_thrice"),
    ],
)
def test_a_mutant_that_does_not_fit_is_named_before_anything_runs(
    tool: Any, tree: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, test: str, words: str
) -> None:
    assert tool.main([], [mutant(tool, "x", old, new, test)], tree) == 1
    assert words in capsys.readouterr().err


def test_the_list_is_printed_and_an_unknown_name_is_refused(tool: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--list", "--only", "latent norm"]) == 0
    out = capsys.readouterr().out
    assert "the latent norm leaves the input out\n    srcflow/objectives/flow.py: " in out
    assert "cosine" not in out
    with pytest.raises(SystemExit):
        tool.main(["--only", "no such name"])
    assert "--list shows them" in capsys.readouterr().err
