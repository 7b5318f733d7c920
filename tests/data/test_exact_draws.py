"""What is drawn for a sample of the data: against numbers that are drawn here from the same keys, and against what must differ."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from PIL import Image

from srcflow.data.batches import Sample, collate, collate_tolerantly
from srcflow.data.sampler import KeyedSampler
from srcflow.data.shard_plan import ShardPlan
from srcflow.data.transforms import ImageTransform


def generator(seed: int, purpose: str, step: int, index: int) -> np.random.Generator:
    """docs/concepts/determinism.md: Philox under the 128-bit BLAKE2b hash of the key, little end first."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}/{index}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def places(width: int, height: int) -> Image.Image:
    """An image whose pixels say where they are: column in red, row in green."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([columns, rows, 0 * rows], -1).astype(np.uint8))


def test_crops_and_flips_are_drawn_anew_in_every_epoch() -> None:
    """The image has its final short side already, so that a crop copies pixels; the drawn corner is (left, top)."""
    image, size = places(48, 40), 24
    transform = ImageTransform(size, "random", 40, flip=True, seed=3)
    corners, flips = set(), []
    for epoch in range(12):
        for index in (0, 17):
            pixels, flipped = transform(image, epoch=epoch, index=index)
            where = generator(3, "crop", epoch, index)
            left, top = int(where.integers(48 - size + 1)), int(where.integers(40 - size + 1))
            mirrored = bool(generator(3, "flip", epoch, index).random() < 0.5)
            columns = torch.arange(left, left + size)
            assert flipped == mirrored
            assert torch.equal(pixels[0, 0], (columns.flip(0) if mirrored else columns).to(torch.uint8))
            assert torch.equal(pixels[1, :, 0], torch.arange(top, top + size).to(torch.uint8))
            corners.add((left, top))
            flips.append(mirrored)
    assert len(corners) > 20
    assert 5 < sum(flips) < 19


def test_a_batch_keeps_each_samples_own_fields() -> None:
    samples = [
        Sample(image=torch.full((3, 2, 2), 9 + i, dtype=torch.uint8), label=label, index=index, valid=valid, flipped=flipped)
        for i, (label, index, valid, flipped) in enumerate([(4, 70, True, False), (-1, 31, False, True), (0, 5, True, True)])
    ]
    for batch in (collate(samples), collate_tolerantly(samples)[0]):
        assert batch["images"][:, 0, 0, 0].tolist() == [9, 10, 11]
        assert batch["labels"].tolist() == [4, -1, 0]
        assert batch["indices"].tolist() == [70, 31, 5]
        assert batch["valid"].tolist() == [True, False, True]
        assert batch["flipped"].tolist() == [False, True, True]


def test_an_epochs_order_is_a_permutation_keyed_by_seed_and_epoch() -> None:
    for epoch in (0, 1, 5):
        sampler = KeyedSampler(list(range(11)), shuffle=True, seed=4)  # type: ignore[arg-type]
        sampler.set_epoch(epoch)
        assert [d.index for d in sampler] == generator(4, "order", epoch, 0).permutation(11).tolist()


def test_shards_come_in_another_order_in_every_epoch() -> None:
    """One stream over shards of equal size, nothing left out: what is read is the shards' order."""
    plan = ShardPlan(np.full(9, 4), 1, 36, 1, seed=6)
    orders = [tuple(p.shard for p in plan.pieces(epoch, 0)) for epoch in range(5)]
    assert orders == [tuple(generator(6, "shards", epoch, 0).permutation(9)) for epoch in range(5)]
    assert len(set(orders)) == 5


def test_streams_are_shuffled_each_in_its_own_order() -> None:
    plan = ShardPlan(np.full(4, 20), 4, 20, 8, seed=6)
    orders = {tuple(plan.order(epoch, stream)) for epoch in range(3) for stream in range(4)}
    assert len(orders) == 12
