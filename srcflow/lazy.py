"""Names of a package that are imported on first use (PEP 562), so that importing the package itself costs nothing."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_packages: dict[str, dict[str, str]] = {}
"""Package -> its public names, each with the full name of the module that defines it."""


def lazy(package: str, modules: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """A package's `__getattr__`, `__dir__` and `__all__`.

    The package repeats the imports under `if TYPE_CHECKING:`, as `from package.module import Name as Name`, for type checkers and editors.

    Args:
        package: the package's `__name__`.
        modules: module, relative to the package -> the public names that it defines; a name that is the module's own stands for the module.
    """
    names = {name: f"{package}.{module}" for module, defined in modules.items() for name in defined}
    _packages[package] = names
    public = sorted(names)

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(names[name])
        value = module if module.__name__.rpartition(".")[2] == name else getattr(module, name)
        setattr(sys.modules[package], name, value)  # found without this function from now on
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *public})

    return __getattr__, __dir__, public


def defined_at(path: str) -> str:
    """The full import path of what a package offers under a short one; any other path as it is. Imports packages of srcflow only.

    >>> defined_at("srcflow.guidance.Gaussian")
    'srcflow.guidance.gaussian.Gaussian'
    """
    package, _, name = path.rpartition(".")
    if package.partition(".")[0] == "srcflow" and package not in _packages:
        try:
            importlib.import_module(package)
        except ImportError:
            return path
    module = _packages.get(package, {}).get(name)
    return path if module is None or module.rpartition(".")[2] == name else f"{module}.{name}"
