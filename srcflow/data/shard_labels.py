"""Labels of shards: read before training, so that one that the model has no class for does not end a run in the middle of an epoch."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from srcflow.errors import DataError

NO_LABEL = "has no label (cls or json). Set data.num_classes: 0 for images without labels."
SHOWN = 20
MOST = 1 << 40  # no class has a larger number


def parse_label(data: bytes, is_json: bool, name: str) -> int:
    """An integer label from a `.cls` or `.json` file.

    Raises:
        DataError: there is none; names the sample.
    """
    try:
        value = json.load(io.BytesIO(data))["label"] if is_json else int(data.decode("ascii"))
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{value!r} is not an integer")
        return value
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        what = 'json has no integer "label"' if is_json else "cls is not an integer"
        raise DataError(f"{name}: {what} ({e}). Set data.num_classes: 0 to ignore labels.") from e


def outside(label: int, num_classes: int, name: str) -> str:
    """What to say of a label that the model has no class for."""
    return f"{name}: label {label} is not in 0 .. {num_classes - 1} (data.num_classes = {num_classes})."


def read_labels(
    path: str, keys: Sequence[str], spans: Sequence[tuple[int, int, int, int]], json_label: Sequence[bool], num_classes: int | None
) -> tuple[NDArray[np.int64], list[str]]:
    """The labels of a shard's samples, and a line for every one that cannot be used.

    Args:
        path: of the shard.
        keys: of its samples.
        spans: (n, 4): image offset, image size, label offset, label size.
        json_label: whether each label stands in a json file.
        num_classes: labels are below it; None: any that are not negative.

    Raises:
        DataError: the shard cannot be read (any more).
    """
    labels = np.full(len(keys), -1, np.int64)
    lines: list[str] = []
    try:
        with open(path, "rb") as f:
            for i, (key, (_, _, offset, size), is_json) in enumerate(zip(keys, spans, json_label, strict=True)):
                if offset < 0:
                    lines.append(f"{path}: {key}: {NO_LABEL}")
                    continue
                f.seek(offset)
                try:
                    label = parse_label(f.read(size), is_json, f"{path}: {key}")
                except DataError as e:
                    lines.append(str(e))
                    continue
                if 0 <= label < (MOST if num_classes is None else num_classes):
                    labels[i] = label
                else:
                    rule = f"{path}: {key}: label {label} cannot be the number of a class."
                    lines.append(rule if num_classes is None else outside(label, num_classes, f"{path}: {key}"))
    except OSError as e:
        raise DataError(f"{path}: cannot be read: {e}. The shards changed while they were in use.") from e
    return labels, lines


def unusable_labels(lines: Sequence[str], place: str) -> DataError:
    """One error for many labels.

    Args:
        lines: what is wrong with each.
        place: where they are.
    """
    if len(lines) == 1:
        return DataError(lines[0])
    shown = [*lines[:SHOWN], *([f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else [])]
    return DataError(f"{place}: {len(lines)} labels cannot be used:\n  " + "\n  ".join(shown))


def count_labels(labels: NDArray[np.int64]) -> dict[int, int]:
    """How many samples have which label; -1, for none, is left out."""
    values, counts = np.unique(labels[labels >= 0], return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def add_counts(parts: Sequence[Mapping[int, int]]) -> dict[int, int]:
    """Counts of several shards as one, by ascending label."""
    total: dict[int, int] = {}
    for part in parts:
        for label, count in part.items():
            total[label] = total.get(label, 0) + count
    return dict(sorted(total.items()))


def without_samples(counts: Mapping[int, int], num_classes: int) -> str:
    """Classes of 0 .. num_classes - 1 that no sample has, as ranges; empty if there are none.

    >>> without_samples({0: 4, 4: 1}, 7)
    '1-3, 5-6'
    >>> without_samples({0: 1, 10**11: 1}, 10**11 + 1), without_samples({0: 1, 1: 1}, 2)
    ('1-99999999999', '')
    """
    present = sorted(label for label, n in counts.items() if n and label < num_classes)
    gaps = [(a + 1, b - 1) for a, b in pairwise([-1, *present, num_classes]) if b - a > 1]
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in gaps[:SHOWN]]
    return ", ".join([*shown, *(["..."] if len(gaps) > SHOWN else [])])
