"""`srcflow plugins`: every registered part, and every plug-in that could not be loaded."""

from __future__ import annotations

import json
import os
import shutil
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from srcflow import registry

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from srcflow.cli.parser import Parser

HELP = "List the parts that can be named in a configuration, and plug-ins that are broken."


def configure(parser: Parser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--family", choices=list(registry.FAMILIES), help="Only this family.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object with the keys parts and broken.")


def run(config: Namespace) -> int:
    """Print the table; 0 even if a plug-in is broken, since the others work."""
    families = [config.family] if config.family else list(registry.FAMILIES)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", registry.PluginWarning)  # they are in the table
        parts = [member for family in families for member in registry.registered(family).values()]
        broken = [b for family in families for b in registry.broken(family)]
    if config.json:
        described = [{"family": m.family, "name": m.name, "distribution": m.distribution, "description": m.description} for m in parts]
        print(json.dumps({"parts": described, "broken": [asdict(b) for b in broken]}, indent=1))
        return 0
    rows = [(m.family, m.name, m.distribution, m.description) for m in sorted(parts, key=lambda m: (families.index(m.family), m.name))]
    print(table(("family", "name", "distribution", "description"), rows))
    if broken:
        print("\nbroken:")
        print(table(("family", "name", "distribution", "error"), [(b.family, b.name, b.distribution, b.error) for b in broken]))
    return 0


def table(header: Sequence[str], rows: Sequence[Sequence[str]], width: int | None = None) -> str:
    """A plain table; its last column is wrapped to the terminal.

    Args:
        header: column titles.
        rows: one sequence of cells per row.
        width: characters per line; None: the terminal's, or no limit where there is none.
    """
    if width is None:
        width = shutil.get_terminal_size((100, 24)).columns if os.isatty(1) else 10_000
    cells: list[Sequence[Any]] = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header) - 1)]
    indent = sum(widths) + 2 * len(widths)
    lines: list[str] = []
    for row in cells:
        start = "".join(f"{cell:<{w}}  " for cell, w in zip(row, widths, strict=False))
        wrapped = textwrap.wrap(" ".join(row[-1].split()), max(width - indent, 30)) or [""]
        lines += [(start if i == 0 else " " * indent) + line for i, line in enumerate(wrapped)]
    return "\n".join(line.rstrip() for line in lines)
