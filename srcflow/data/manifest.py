"""What a feature store says about itself, and the comparison with what a run expects."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from srcflow.autoencoders.base import Autoencoder
from srcflow.data import store_extras
from srcflow.errors import ArtifactError, ManifestMismatchError
from srcflow.files import read_json
from srcflow.registry import spec_of

VERSION = 1
FILE = "manifest.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


AGAIN = "Encode again with `srcflow encode`."


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**48


def _pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_whole, value))


def _mapping(value: Any) -> bool:
    return isinstance(value, dict)


_FITS: dict[str, Callable[[Any], bool]] = {
    "count": _whole,
    "flip": lambda v: isinstance(v, bool),
    "tokens": _whole,
    "dim": _whole,
    "grid": _pair,
    "dtype": lambda v: isinstance(v, str) and v in DTYPES,
    "image_size": _pair,
    "encoder": _mapping,
    "transform": _mapping,
    "source": _mapping,
    "precision": lambda v: isinstance(v, str),
    "versions": _mapping,
    "autoencoder": _mapping,
    "deviation": lambda v: isinstance(v, bool),
    "extras": store_extras.fits,
}
"""What each field of a stored manifest has to be."""
_LATER = ("autoencoder", "deviation", "extras")
"""Fields that a manifest has only where they say something: stores from before they were known stay what they are."""


@dataclass(frozen=True)
class Manifest:
    """The description of a feature store.

    Args:
        count: images, mirror images not counted.
        flip: each image is there twice; row i + count is the mirror image of row i.
        tokens: N.
        dim: D.
        grid: (rows, columns) of the tokens.
        dtype: of the features: float16, bfloat16 or float32.
        image_size: (height, width) of the images.
        encoder: {"spec": specification, "weights": hash of the weights} of the frozen encoder that made the features.
        transform: what was done to the pixels before.
        source: fingerprint of the data set.
        precision: arithmetic of the encoder.
        versions: of the software that wrote it; never compared.
        autoencoder: the same of the autoencoder that made them, where it is more than a frozen encoder (`Autoencoder.feature_source`).
        deviation: whether the deviation of the features is stored, too (`Autoencoder.posterior`).
        extras: further keys and how they are read (`store_extras`).
        version: of this layout.
    """

    count: int
    flip: bool
    tokens: int
    dim: int
    grid: tuple[int, int]
    dtype: str
    image_size: tuple[int, int]
    encoder: dict[str, Any] = field(default_factory=dict)
    transform: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    precision: str = "float32"
    versions: dict[str, str] = field(default_factory=dict)
    autoencoder: dict[str, Any] = field(default_factory=dict)
    deviation: bool = False
    extras: dict[str, dict[str, Any]] = field(default_factory=dict)
    version: int = VERSION

    @property
    def rows(self) -> int:
        """Stored rows: `count`, or twice that."""
        return self.count * (2 if self.flip else 1)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able fields."""
        return {k: v for k, v in self._fields().items() if v or k not in _LATER}

    def _fields(self) -> dict[str, Any]:
        return dict(json.loads(json.dumps(asdict(self))))

    def save(self, folder: Path) -> None:
        """Write manifest.json."""
        (folder / FILE).write_text(json.dumps(self.as_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read manifest.json.

        Raises:
            ArtifactError: there is none, it is of another version, or damaged.
        """
        path = folder / FILE
        if not path.exists():
            partial = folder.with_name(folder.name + ".partial")
            hint = f" {partial} is an unfinished one." if partial.exists() else ""
            raise ArtifactError(f"{folder} is not a feature store: no {FILE} in it.{hint} `srcflow encode` writes one.")
        stored = read_json(path, AGAIN)
        version = stored.get("version")
        if isinstance(version, bool) or version != VERSION:
            raise ArtifactError(f"{path}: layout version {version!r}; this srcflow reads version {VERSION}. {AGAIN}")
        names, empty = {f.name for f in fields(cls)}, {"autoencoder": {}, "deviation": False, "extras": {}}
        stored = {**empty, **stored}
        wrong = sorted(names ^ set(stored)) or [k for k, fits in _FITS.items() if not fits(stored[k])]
        if not wrong and math.prod(stored["grid"]) != stored["tokens"]:
            wrong = ["grid", "tokens"]
        if wrong:
            given = ", ".join(f"{k} = {stored[k]!r}" if k in stored else f"{k} is missing" for k in wrong[:4])
            raise ArtifactError(f"{path} is damaged: {given}. {AGAIN}")
        if stored["transform"]:  # stores that were written before there was a choice
            stored["transform"].setdefault("exif", "ignore")
        return cls(**{**stored, "grid": tuple(stored["grid"]), "image_size": tuple(stored["image_size"])})

    def check(self, expected: Mapping[str, Any], what: str) -> None:
        """Compare with what a run expects; nested mappings are compared key by key, and only the keys that `expected` has.

        Args:
            expected: manifest fields, e.g. {"encoder": {"spec": ..., "weights": ...}, "transform": {...}}.
            what: what to call the store in a message.

        Raises:
            ManifestMismatchError: names each field that differs, dotted.
        """
        found = differences(self._fields(), json.loads(json.dumps(expected)))
        if found:
            raise ManifestMismatchError(what, found, "Encode again with `srcflow encode`, or change the run.")


def made_by(autoencoder: Autoencoder) -> dict[str, Any]:
    """What the manifest of a store says of the autoencoder, or the part of one, that made its features.

    Args:
        autoencoder: with its weights.
    """
    name, module = autoencoder.feature_source()
    return {name: {"spec": spec_of(module), "weights": weights_hash(module)}}


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Fields of `wanted` that `stored` has with another value or not at all: dotted name -> (stored, wanted).

    >>> differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}})
    {'a.b': (1, 3)}
    """
    found: dict[str, tuple[Any, Any]] = {}
    for name, value in wanted.items():
        have = stored.get(name)
        if isinstance(value, Mapping) and isinstance(have, Mapping):
            found.update(differences(have, value, f"{prefix}{name}."))
        elif have != value:
            found[prefix + name] = (have, value)
    return found


def weights_hash(module: nn.Module) -> str:
    """sha256 over names, dtypes, shapes and bytes of a module's state; equal for equal weights wherever they were loaded from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def is_store(path: str | os.PathLike[str]) -> bool:
    """Whether a folder holds a finished feature store."""
    return (Path(path) / FILE).is_file()
