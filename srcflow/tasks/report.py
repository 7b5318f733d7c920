"""What an evaluation leaves behind: a table on the screen and a JSON file that says how its numbers were obtained."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from srcflow.errors import DataError

Numbers = Mapping[str, "float | int | str | None"]


def table(numbers: Numbers, title: str = "") -> str:
    """Names and values in two aligned columns.

    >>> print(table({"l1": 0.04321987, "images": 2000, "judge": "inception"}, "test"))
    test
      l1      0.04322
      images     2000
      judge inception
    """
    rows = [(name, _shown(value)) for name, value in numbers.items()]
    left = max((len(n) for n, _ in rows), default=0)
    right = max((len(v) for _, v in rows), default=0)
    return "\n".join(([title] if title else []) + [f"  {n:<{left}} {v:>{right}}" for n, v in rows])


def write_metrics(path: str | os.PathLike[str], numbers: Numbers, protocol: Mapping[str, Any]) -> Path:
    """Write `{"metrics": numbers, "protocol": protocol}` as strict JSON (a number that is not finite becomes null) in one step.

    Args:
        path: the file; its directory is made.
        numbers: the results.
        protocol: how they were obtained; see `Task.protocol`.

    Raises:
        DataError: the file cannot be written.
    """
    target = Path(path)
    content = {"metrics": {k: _finite(v) for k, v in numbers.items()}, "protocol": dict(protocol)}
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        partial.replace(target)
    except OSError as e:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise DataError(f"metrics_file = {str(target)!r}: cannot be written: {e.strerror or e}. The numbers are on the screen.") from e
    return target


def _shown(value: float | int | str | None) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _finite(value: float | int | str | None) -> float | int | str | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value
