"""A compact table of strings: one array of bytes and one of offsets, so that millions of keys neither bloat workers nor need pickles."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray


class StringTable:
    """An immutable list of strings.

    >>> table = StringTable.of(["a", "", "müsli"])
    >>> len(table), table[2]
    (3, 'müsli')

    Names of files that are not UTF-8 keep their bytes, as Python's `surrogateescape` has it; `errors.printable` makes them readable.

    >>> StringTable.of([b"caf\\xe9".decode(errors="surrogateescape")]).blob.tobytes()
    b'caf\\xe9'

    Args:
        blob: (total,) uint8, all strings in UTF-8, one after the other.
        offsets: (n + 1,) int64, where each string begins, and the end of the last.
    """

    def __init__(self, blob: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        self.blob, self.offsets = blob, offsets

    @classmethod
    def of(cls, strings: Iterable[str]) -> StringTable:
        """A table of the given strings."""
        encoded = [s.encode(errors="surrogateescape") for s in strings]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(e) for e in encoded], out=offsets[1:])
        return cls(np.frombuffer(b"".join(encoded), np.uint8), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> str:
        if not 0 <= i < len(self):
            raise IndexError(i)
        piece: Any = self.blob[int(self.offsets[i]) : int(self.offsets[i + 1])]
        return bytes(piece).decode(errors="surrogateescape")
