"""Importing: what a bare import leaves unloaded, and that every module can be imported on its own."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import srcflow
from srcflow import registry
from srcflow.lazy import defined_at

MODULES = sorted(m.name for m in pkgutil.walk_packages(srcflow.__path__, "srcflow.") if m.name != "srcflow.__main__")


def loaded_after(statement: str) -> set[str]:
    """Top-level packages in a fresh interpreter after `statement`."""
    code = f"{statement}\nimport sys\nprint('\\n'.join(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "unloaded"),
    [
        ("import srcflow", {"torch", "lightning", "numpy", "jsonargparse"}),
        ("import srcflow; srcflow.__version__", {"torch", "lightning"}),
        ("import srcflow.pipeline", {"lightning", "pytorch_lightning", "jsonargparse", "torchmetrics"}),
        ("import srcflow.registry", {"torch", "lightning", "jsonargparse"}),
        ("import srcflow.cli", {"torch", "lightning", "jsonargparse"}),
        (
            "import contextlib, io, srcflow.cli\nwith contextlib.redirect_stdout(io.StringIO()): srcflow.cli.main(['--help'])",
            {"torch", "lightning"},
        ),
    ],
)
def test_an_import_leaves_what_it_does_not_need_unloaded(statement: str, unloaded: set[str]) -> None:
    assert not loaded_after(statement) & unloaded


def test_public_names_resolve() -> None:
    assert "torch" in loaded_after("import srcflow; [getattr(srcflow, name) for name in srcflow.__all__]")
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        _ = srcflow.Pipelin


def test_every_module_can_be_the_first_one_imported() -> None:
    # one interpreter that forks per module: a fresh state for each without paying for torch every time
    code = (
        "import importlib, os, sys, traceback, torch, lightning, timm\n"
        "failed = []\n"
        "for name in sys.argv[1:]:\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n"
        "        try:\n"
        "            importlib.import_module(name)\n"
        "        except BaseException:\n"
        "            traceback.print_exc()\n"
        "            os._exit(1)\n"
        "        os._exit(0)\n"
        "    if os.waitpid(pid, 0)[1]:\n"
        "        failed.append(name)\n"
        "print(*failed)\n"
    )
    assert len(MODULES) > 40
    done = subprocess.run([sys.executable, "-c", code, *MODULES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split(), done.stderr


# --- names of packages --------------------------------------------------------------------------------------------------------------------

LAZY = sorted(m for m in ("srcflow", *MODULES) if "= lazy(" in Path(str(importlib.import_module(m).__file__)).read_text(encoding="utf-8"))
SECTION = re.compile(r'^\[project\.entry-points\."(.+)"\]\n((?:\w+ = ".+"\n)+)', re.M)  # Python 3.10 has no reader of TOML
ENTRY_POINTS = {
    group: dict(re.findall(r'^(\w+) = "(.+)"$', lines, re.M))
    for group, lines in SECTION.findall((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
}


def package_of(family: str) -> str:
    """Where a family's names are: the package of its base class, or the module, for a family that is one file."""
    module = registry.FAMILIES[family].partition(":")[0]
    return module if module.count(".") == 1 else module.rpartition(".")[0]


def test_a_package_of_parts_loads_nothing_heavy() -> None:
    packages = [p for p in LAZY if p != "srcflow"]
    assert {package_of(f) for f in registry.FAMILIES} - {"srcflow.noise"} <= set(packages)
    assert {f"srcflow.{f}" for f in registry.FAMILIES} == set(ENTRY_POINTS)
    assert not loaded_after(f"import {', '.join(packages)}") & {"torch", "numpy", "lightning", "jsonargparse"}


@pytest.mark.parametrize("group", ENTRY_POINTS)
def test_every_part_of_srcflow_is_a_name_of_its_familys_package(group: str) -> None:
    """Read from pyproject.toml, so that a part is found whether or not the package was installed again since it was added."""
    package = importlib.import_module(package_of(group.removeprefix("srcflow.")))
    for name, value in ENTRY_POINTS[group].items():
        module, _, attribute = value.partition(":")
        assert getattr(package, name) is getattr(importlib.import_module(module), attribute)
        assert name in dir(package)
    base_module, _, base = registry.FAMILIES[group.removeprefix("srcflow.")].partition(":")
    assert getattr(package, base) is getattr(importlib.import_module(base_module), base)


@pytest.mark.parametrize("name", LAZY)
def test_what_a_package_offers_is_what_type_checkers_see(name: str) -> None:
    package = importlib.import_module(name)
    tree = ast.parse(Path(str(package.__file__)).read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    seen = {alias.asname: f"{n.module}.{alias.name}" for n in block.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    offered = set(package.__all__) - {"__version__"}
    assert set(seen) == offered
    assert offered <= set(dir(package))
    for public in offered:
        assert defined_at(f"{name}.{public}") in (seen[public], f"{name}.{public}")
        assert getattr(package, public) is getattr(
            importlib.import_module(seen[public].rpartition(".")[0]), seen[public].rpartition(".")[2]
        )
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'Nothing'"):
        _ = package.Nothing


def test_the_public_names_are_shown() -> None:
    assert {"Condition", "Flow", "Pipeline", "presets", "__version__"} <= set(dir(srcflow))
    assert set(srcflow.__all__) == {"Condition", "Flow", "Pipeline", "presets", "__version__"}
