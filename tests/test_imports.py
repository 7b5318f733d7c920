"""Importing: what a bare import leaves unloaded, and that every module can be imported on its own."""

from __future__ import annotations

import ast
import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import srcflow
from srcflow import registry
from srcflow.autoencoders import PixelPatches
from srcflow.cli import COMMANDS
from srcflow.lazy import defined_at

MODULES = sorted(m.name for m in pkgutil.walk_packages(srcflow.__path__, "srcflow.") if m.name != "srcflow.__main__")


def loaded_after(statement: str, *arguments: str, strict: bool = True) -> set[str]:
    """Top-level packages in a fresh interpreter after `statement`; `strict`: where warnings are errors."""
    code = f"{statement}\nimport sys\nprint('\\n'.join(sorted({{m.partition('.')[0] for m in sys.modules}})))"
    options = ["-W", "error"] if strict else []
    done = subprocess.run([sys.executable, *options, "-c", code, *arguments], capture_output=True, text=True, check=False)
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


# --- commands -----------------------------------------------------------------------------------------------------------------------------

HEAVY = {"lightning", "pytorch_lightning", "torchmetrics", "scipy"}
COMMAND = """
import contextlib, io, json, os, sys
from srcflow.cli import main
for args in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            main(args)
        except SystemExit as e:
            assert not e.code, (args, e.code)
    assert said.getvalue(), args
"""


def loaded_by(*commands: list[str]) -> set[str]:
    """Top-level packages after commands of srcflow in one fresh interpreter."""
    return loaded_after(COMMAND, json.dumps(commands), strict=False)


def test_help_loads_no_lightning() -> None:
    commands = ("sample", "encode", "export", "plan", "replay")
    assert set(commands) <= set(COMMANDS)
    loaded = loaded_by(*([command, "--help"] for command in commands))
    assert "jsonargparse" in loaded, "no help was made"
    assert not loaded & HEAVY


def test_help_of_commands_about_files_and_plug_ins_loads_no_torch() -> None:
    loaded = loaded_by(["index", "--help"], ["plugins", "--help"], ["convert", "--help"])
    assert "jsonargparse" in loaded, "no help was made"
    assert not loaded & (HEAVY | {"torch"})


def test_sampling_and_bundling_load_no_lightning(tmp_path: Path) -> None:
    torch.manual_seed(0)
    flow = srcflow.presets.srcflow(2, channels=12, width=8, layers=[1, 1], head_dim=4, num_classes=2, normalization="none")
    srcflow.Pipeline(PixelPatches(4, 2), None, flow).save_pretrained(tmp_path / "model")
    guided = ["--guidance=Gaussian", "--guidance.strength=1.0", "--solver=Sequential"]
    loaded = loaded_by(
        ["sample", f"--pipeline={tmp_path / 'model'}", f"--out={tmp_path / 's.npz'}", "--n=2", "--device=cpu", *guided],
        ["sample", f"--pipeline={tmp_path / 'model'}", f"--out={tmp_path / 's.png'}", "--classes=all", "--per_class=1", "--device=cpu"],
        ["export", f"--pipeline={tmp_path / 'model'}", f"--out={tmp_path / 'copy'}"],
    )
    assert (tmp_path / "s.npz").is_file()
    assert (tmp_path / "s.png").is_file()
    assert (tmp_path / "copy" / "flow").is_dir()
    assert not loaded & HEAVY


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
    assert {package_of(f) for f in registry.FAMILIES} - {"srcflow.noise", "srcflow.learning_rates"} <= set(packages)
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
