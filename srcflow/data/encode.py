"""Images to a feature store: the loop behind `srcflow encode`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext

import torch
from torch import Tensor
from tqdm import tqdm

from srcflow.data.feature_store import FeatureStoreWriter
from srcflow.errors import DataError, ShapeError
from srcflow.types import Batch, Grid

Encode = Callable[[Tensor], tuple[Tensor, Grid] | tuple[Tensor, Tensor | None, Grid]]


@torch.no_grad()
def encode_images(
    encode: Encode,
    batches: Iterable[Batch],
    writer: FeatureStoreWriter,
    key: Callable[[int], str],
    *,
    device: torch.device | str = "cpu",
    autocast: torch.dtype | None = None,
    progress: bool = True,
) -> int:
    """Encode every valid image of `batches`, and its mirror image where the writer wants it; further keys are stored by their rules.

    Args:
        encode: images (B, 3, H, W) in [0, 1] on `device` -> tokens (B, N, D), their deviation if there is one, and their grid: an
            `Encoder`, or an `Autoencoder`'s `posterior`.
        batches: unshuffled, not flipped; `indices` are the rows.
        writer: an open store; the caller closes it.
        key: global sample index -> the sample's name.
        device: where `encode` runs.
        autocast: dtype of the encoder's matrix products (e.g. torch.bfloat16); None: as the weights are.
        progress: show a bar.

    Returns:
        How many images were encoded, mirror images not counted.

    Raises:
        ShapeError: another grid than the store's, or a deviation where it has no room for one.
        DataError: a batch that was flipped already, features that are not finite, or keys that cannot be stored.
    """
    manifest = writer.manifest
    kind = torch.device(device).type
    done = 0
    with tqdm(total=manifest.count, unit="images", desc="encode", disable=not progress, mininterval=1.0) as bar:
        for batch in batches:
            valid = batch["valid"]
            if bool(batch["flipped"][valid].any()):
                raise DataError(
                    "the batches are flipped already; encode the evaluation view of the data and let the writer add mirror images."
                )
            indices, labels, images = batch["indices"][valid], batch["labels"][valid], batch["images"][valid]
            if not len(indices):
                continue
            keys, extras = [key(i) for i in indices.tolist()], writer.rules.rows(batch, valid)
            for mirrored in (False, True) if manifest.flip else (False,):
                view = images.flip(-1) if mirrored else images
                with nullcontext() if autocast is None else torch.autocast(kind, autocast):
                    features, *deviation, grid = encode(view.to(device).float() / 255)
                if tuple(grid) != tuple(manifest.grid):
                    raise ShapeError(
                        f"the encoder gives a grid of {tuple(grid)} tokens, the store {writer.path} has {tuple(manifest.grid)}"
                    )
                writer.write(
                    indices, features, view, labels, keys, mirrored=mirrored, deviation=deviation[0] if deviation else None, extras=extras
                )
            done += len(indices)
            bar.update(len(indices))
    return done
