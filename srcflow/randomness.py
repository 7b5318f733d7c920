"""Random numbers keyed by (seed, purpose, step, global sample index).

Every sample has a generator of its own, so what is drawn for it does not depend on the batch size, the number of ranks or workers, the
order, or on a resumed run. Draws are made on the CPU by a counter-based generator (Philox, 128-bit keys); the caller moves them to the
device.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

THREADED = 1 << 20
"""Batches of more normal numbers than this are drawn by several threads."""

Indices = Tensor | Sequence[int]


def key(seed: int, purpose: str, step: int, index: int) -> int:
    """A 128-bit key; different arguments give different keys (up to collisions of a cryptographic hash)."""
    text = f"{seed}/{purpose}/{step}/{index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")


def generator(seed: int, purpose: str, step: int = 0, index: int = 0) -> np.random.Generator:
    """The generator of one sample (or of one event that has no sample: index 0)."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, step, index)))


def normal(shape: Sequence[int], *, seed: int, purpose: str, step: int, indices: Indices) -> Tensor:
    """Standard normal numbers (B, *shape), float32 on the CPU; row b belongs to sample indices[b] alone."""
    ids = list(_ints(indices))
    out = np.empty((len(ids), *shape), dtype=np.float32)

    def fill(b: int) -> None:
        out[b] = generator(seed, purpose, step, ids[b]).standard_normal(tuple(shape), dtype=np.float32)

    if out.size > THREADED and len(ids) > 1:  # numpy fills without holding the interpreter's lock
        list(_threads().map(fill, range(len(ids))))
    else:
        for b in range(len(ids)):
            fill(b)
    return torch.from_numpy(out)


def uniform(shape: Sequence[int], *, seed: int, purpose: str, step: int, indices: Indices) -> Tensor:
    """Uniform numbers in [0, 1), (B, *shape), float32 on the CPU; row b belongs to sample indices[b] alone."""
    rows = [generator(seed, purpose, step, i).random(tuple(shape), dtype=np.float32) for i in _ints(indices)]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty((0, *shape))


def bernoulli(probability: float, *, seed: int, purpose: str, step: int, indices: Indices) -> Tensor:
    """(B,) bool, True with the given probability."""
    return uniform((), seed=seed, purpose=purpose, step=step, indices=indices) < probability


def permutation(n: int, *, seed: int, purpose: str, step: int = 0) -> Tensor:
    """A random order of 0 .. n-1 as int64."""
    return torch.from_numpy(generator(seed, purpose, step).permutation(n))


@functools.cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="srcflow-noise")


def _ints(indices: Indices) -> Iterable[int]:
    return indices.tolist() if isinstance(indices, Tensor) else indices
