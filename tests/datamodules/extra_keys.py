"""Data with keys of their own, from every kind of source."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from PIL import Image

from srcflow import randomness
from srcflow.data.image_folder import ImageFolderDataset
from srcflow.data.image_shards import ImageShardsDataset
from srcflow.data.images import ImageSource
from srcflow.data.rules import Drop, Keep, Pad, Rule, Stack
from srcflow.data.sampler import Draw
from srcflow.data.shard_stream import ShardImages
from srcflow.datamodules.base import DataModule, Split
from srcflow.datamodules.image_folder import ImageFolder
from srcflow.datamodules.image_shards import ImageShards

N = 21
RULES: Mapping[str, Rule] = {"caption": Keep(), "words": Pad(mask="real_words", value=-1), "size": Stack(), "note": Drop()}


class Captioned(ImageSource):
    """Each image has a caption, i % 3 vectors of words drawn anew in every epoch, and its size in pixels."""

    rules = RULES

    def extras(self, draw: Draw, picture: Image.Image) -> Mapping[str, Any]:
        words = randomness.normal((draw.index % 3, 2), seed=0, purpose="words", step=draw.epoch, indices=[draw.index])[0]
        return {"caption": f"image {draw.index}", "words": words, "size": np.array(picture.size), "note": object}


class Folder(Captioned, ImageFolderDataset):
    """From files."""


class Shards(Captioned, ImageShardsDataset):
    """From shards at random."""


class Stream(Captioned, ShardImages):
    """From shards in order."""


def captioned(data: Any) -> Any:
    """A data set of srcflow's, with keys of its own."""
    data.__class__ = {ImageFolderDataset: Folder, ImageShardsDataset: Shards, ShardImages: Stream}[type(data)]
    return data


class CaptionedFolder(ImageFolder):
    """Of files."""

    def open(self, split: Split, training: bool) -> Any:
        return captioned(super().open(split, training))


class CaptionedShards(ImageShards):
    """Of shards."""

    def open(self, split: Split, training: bool) -> Any:
        return captioned(super().open(split, training))


def written(root: Path, bad: tuple[int, ...] = ()) -> Path:
    """N images of different widths as a folder and as three shards."""
    (root / "folder").mkdir()
    for shard, numbers in enumerate([range(8), range(8, 12), range(12, N)]):
        with wds.TarWriter(str(root / f"train-{shard}.tar")) as writer:
            for i in numbers:
                path = root / "folder" / f"{i:03d}.png"
                Image.new("RGB", (8 + i, 8), (i, 0, 0)).save(path)
                if i in bad:
                    path.write_bytes(b"no image")
                writer.write({"__key__": f"{i:03d}", "png": path.read_bytes()})
    return root


def made(kind: str, place: Path, **options: Any) -> DataModule:
    """The datamodule of a kind: folder, map or stream."""
    options = {"size": 8, "batch_size": 4, "flip": True, **options}
    if kind == "folder":
        return CaptionedFolder(str(place / "folder"), str(place / "folder"), **options)
    if kind == "stream":
        options = {"mode": "stream", "shuffle_buffer": 6, **options}
    shards = str(place / "train-{0..2}.tar")
    return CaptionedShards(shards, shards, **options)


def plain(batch: Any) -> dict[str, Any]:
    """A batch that can be compared."""
    return {k: v.tolist() if hasattr(v, "tolist") else v for k, v in batch.items()}
