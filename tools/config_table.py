"""The table of configurations in docs/reference/configs.md, from the files' headers: `python tools/config_table.py [--write]`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/reference/configs.md"
TABLE = re.compile(r"(?<=\n\|---\|---\|---\|---\|\n)(?:\|.*\n)*")


def rows() -> list[str]:
    """One row per complete run: name, trained parameters, FLOPs, and the first line of its header.

    Raises:
        SystemExit: a header lacks one of the counts.
    """
    found = []
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(("configs/trainer/", "configs/encode/")):
            continue
        header = "\n".join(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
        trained = re.search(r"^# Parameters: ([\d,]+) trained", header, re.M)
        flops = re.search(r"^# FLOPs: ([\d.]+(?: [TGM]?FLOP)?) per image", header, re.M)
        if trained is None or flops is None:
            raise SystemExit(f"{name} does not state its counts; run: python tools/count.py {name} --write")
        found.append(f"| `{name}` | {trained[1]} | {flops[1]} | {header.splitlines()[0][2:].rstrip('.')} |")
    return found


def main() -> None:
    """Print the table, or put it into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="replace the table of the page")
    table = "\n".join(rows()) + "\n"
    if parser.parse_args().write:
        PAGE.write_text(TABLE.sub(lambda _: table, PAGE.read_text(encoding="utf-8"), count=1), encoding="utf-8")
    else:
        print(table, end="")


if __name__ == "__main__":
    main()
