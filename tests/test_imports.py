"""Importing: what a bare import leaves unloaded, and that every module can be imported on its own."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import srcflow

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
