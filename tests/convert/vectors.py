"""Numbers computed by the published implementations (tests/reference): weights `sd.*`, inputs `in.*`, outputs `out.*`, a JSON sidecar."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file
from torch import Tensor

REFERENCE = Path(__file__).parents[1] / "reference"


class Vector(NamedTuple):
    """One file: its configuration, the published state dict, inputs and outputs."""

    config: dict[str, Any]
    state: dict[str, Tensor]
    given: dict[str, Tensor]
    out: dict[str, Tensor]


def read(name: str) -> Vector:
    """The vector called `name`."""
    tensors = load_file(REFERENCE / f"{name}.safetensors")
    config = json.loads((REFERENCE / f"{name}.json").read_text())["config"]
    parts = [{k.removeprefix(p): v for k, v in tensors.items() if k.startswith(p)} for p in ("sd.", "in.", "out.")]
    return Vector(config, *parts)
