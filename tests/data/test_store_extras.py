"""A feature store keeps the deviation of features and what samples hold besides the image."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from srcflow.autoencoders.pixels import PixelPatches
from srcflow.data.encode import encode_images
from srcflow.data.feature_store import FeatureStoreDataset, FeatureStoreWriter
from srcflow.data.rules import Common, Drop, Keep, Pad, Rule, Rules, Stack
from srcflow.data.sampler import Draw
from srcflow.datamodules.feature_store import FeatureStore
from srcflow.errors import ArtifactError, DataError, ManifestMismatchError, ShapeError
from srcflow.types import Batch, Grid

N = 6
RULES: dict[str, Rule] = {
    "caption": Keep(),
    "words": Pad(mask="real", value=-1),
    "ids": Pad(),
    "size": Stack(),
    "score": Stack(),
    "half": Stack(),
    "note": Drop(),
}
WORDS = [torch.arange(2.0 * n).reshape(n, 2) + 10 for n in (2, 0, 3, 1, 0, 2)]


def posterior(images: Tensor) -> tuple[Tensor, Tensor, Grid]:
    mean = images.mean((2, 3))[:, None]
    return mean, mean / 2, (1, 1)


def columns(rows: list[int]) -> dict[str, Any]:
    """Of the declared keys, as batches have them."""
    found: dict[str, Any] = {"caption": [f"café {i}" if i else "" for i in rows]}
    found |= Pad("real", -1).collate("words", [WORDS[i] for i in rows])
    found |= Pad().collate("ids", [torch.arange(i) for i in rows])
    found["size"] = torch.tensor([[i, 2 * i, 3 * i] for i in rows])
    found["score"] = torch.tensor([i / 4 for i in rows])
    return found | {"half": torch.tensor([[i + 0.5] for i in rows], dtype=torch.bfloat16)}


def batches(size: int = 4, change: Callable[[dict[str, Any]], Any] = lambda batch: None) -> list[Batch]:
    """All images in batches, of which the last is filled with one that is not valid."""
    found: list[Any] = []
    for start in range(0, N, size):
        rows = [min(i, N - 1) for i in range(start, start + size)]
        images = torch.stack([torch.full((3, 4, 4), 10 * i, dtype=torch.uint8) for i in rows])
        valid = torch.tensor([i < N for i in range(start, start + size)])
        batch: dict[str, Any] = {"images": images, "labels": torch.tensor(rows), "indices": torch.tensor(rows), "valid": valid}
        batch |= {"flipped": torch.zeros(size).bool(), **columns(rows)}
        change(batch)
        found.append(batch)
    return found


def write(path: Path, stream: list[Batch] | None = None, rules: Mapping[str, Rule] = RULES, **options: Any) -> FeatureStoreDataset:
    options = {"deviation": True, "dtype": "float32", "manifest": {"grid": (1, 1)}, **options}
    with FeatureStoreWriter(path, n=N, tokens=1, dim=3, image_size=(4, 4), rules=Rules(rules), **options) as writer:
        encode_images(posterior, batches() if stream is None else stream, writer, str, progress=False)
    return FeatureStoreDataset(path)


def plain(batch: Any, keys: Any) -> dict[str, Any]:
    return {k: (batch[k].dtype, batch[k].tolist()) if isinstance(batch[k], Tensor) else batch[k] for k in keys}


@pytest.mark.parametrize("flip", [False, True])
def test_what_is_written_is_read(flip: bool, tmp_path: Path) -> None:
    data = write(tmp_path / "store", flip=flip)
    rows = [5, 1, 0, 2]
    draws = [5, Draw(0, 1, valid=False), 0, 2 + N if flip else 2]
    wanted = columns(rows)
    for copy in (data, pickle.loads(pickle.dumps(data))):
        batch: Any = copy.__getitems__(draws)
        assert plain(batch, wanted) == plain(wanted, wanted)
        assert batch["deviation"].flatten().tolist() == pytest.approx([v * 10 / 255 / 2 for v in rows for _ in range(3)])
        assert set(batch) == {"features", "deviation", "grid", "images", "labels", "indices", "valid", "flipped", *wanted}
    assert len(pickle.dumps(data)) < 6000
    assert plain(data[1], ["words", "real"]) == {"words": (torch.float32, [[]]), "real": (torch.bool, [[]])}
    assert type(data.rules["words"]) is Pad


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 8e-3)])
def test_the_deviation_has_the_stores_type(dtype: str, tolerance: float, tmp_path: Path) -> None:
    batch = write(tmp_path / "store", dtype=dtype).__getitems__(range(N))
    assert batch["deviation"].dtype == batch["features"].dtype == getattr(torch, dtype)
    wanted = torch.arange(N)[:, None, None] * 10 / 255 / 2
    assert (batch["deviation"].float() - wanted).abs().max() <= tolerance


def test_without_them_a_store_is_what_it_was(tmp_path: Path) -> None:
    """The manifest has the fields that it always had, so that earlier versions read it and runs keep their fingerprint."""
    stream = batches(change=lambda batch: [batch.pop(k) for k in columns([0])])
    with FeatureStoreWriter(tmp_path / "store", n=N, tokens=1, dim=3, image_size=(4, 4), manifest={"grid": (1, 1)}) as writer:
        encode_images(lambda x: (posterior(x)[0], (1, 1)), stream, writer, str, progress=False)
    data = FeatureStoreDataset(tmp_path / "store")
    fields = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert not {"deviation", "extras", "autoencoder"} & ({*fields} | {*data.manifest.as_dict()})
    assert set(data[0]) == {"features", "grid", "images", "labels", "indices", "valid", "flipped"}
    assert sorted(p.name for p in (tmp_path / "store").glob("*extra*")) == []
    with pytest.raises(ManifestMismatchError, match=r"autoencoder.weights: stored None, this run 'x'"):
        data.check({"autoencoder": {"weights": "x"}})
    FeatureStore(str(tmp_path / "store")).check_maker(PixelPatches(4, 1))  # nothing is known of its maker


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("score"), r"'score': nothing after .*'float32'.*All images of a store need the same keys"),
        (lambda b: b.update(size=b["size"][:, :2]), r"'size': .*\[2\].* after .*\[3\]"),
        (lambda b: b.update(score=b["score"].double()), r"'score': .*float64.* after .*float32"),
        (lambda b: b.update(caption=[1] * 4), r"'caption': a feature store keeps lists of strings, not of int.*Drop\(\)"),
    ],
)
def test_batches_that_do_not_fit_each_other(change: Any, message: str, tmp_path: Path) -> None:
    later = [batches()[0], batches(change=change)[1]]
    with pytest.raises(DataError, match=message):
        write(tmp_path / "store", later)
    assert not list(tmp_path.iterdir())


def test_keys_that_appear_late_are_not_lost(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'score': .* after nothing"):
        write(tmp_path / "store", [batches(change=lambda b: b.pop("score"))[0], batches()[1]])


def test_what_has_no_form_on_the_disk_is_refused(tmp_path: Path) -> None:
    stream = batches(change=lambda b: b.update(scale=(1, 2)))
    with pytest.raises(DataError, match="'scale': a feature store cannot hold what Common makes of it"):
        write(tmp_path / "store", stream, {**RULES, "scale": Common()})


def test_deviations_that_cannot_be(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"n": N, "tokens": 1, "dim": 3, "image_size": (4, 4), "manifest": {"grid": (1, 1)}}

    def run(make: Any, **options: Any) -> None:
        with FeatureStoreWriter(tmp_path / "store", **sizes, rules=Rules(RULES), **options) as writer:
            encode_images(make, batches(), writer, str, progress=False)

    for make, options, error, message in (
        (lambda x: (posterior(x)[0], -posterior(x)[1] - 1, (1, 1)), {"deviation": True}, DataError, r"deviation of 0 .. 3 is negative \(-"),
        (lambda x: (posterior(x)[0], posterior(x)[1] / 0, (1, 1)), {"deviation": True}, DataError, "deviation of 0 .. 3 are not finite"),
        (lambda x: (posterior(x)[0], posterior(x)[1][..., :2], (1, 1)), {"deviation": True}, ShapeError, r"deviation: shape \(4, 1, 2\)"),
        (lambda x: (posterior(x)[0], None, (1, 1)), {"deviation": True}, ShapeError, "no deviation was given to the store"),
        (posterior, {}, ShapeError, "a deviation was given to the store .* made with deviation=False"),
    ):
        with pytest.raises(error, match=message):
            run(make, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["caption", "words", "size"])
@pytest.mark.parametrize("damage", ["no values", "short values", "no spans", "few spans", "negative span", "odd length"])
def test_damaged_files_are_refused(key: str, damage: str, tmp_path: Path) -> None:
    write(tmp_path / "store")
    values, spans = tmp_path / "store" / f"extra_{key}.bin", tmp_path / "store" / f"extra_{key}_spans.npy"
    table = np.load(spans)
    if damage == "no values":
        values.unlink()
    elif damage == "short values":
        values.write_bytes(values.read_bytes()[:9])
    elif damage == "no spans":
        spans.write_bytes(b"")
    else:
        table[2] += {"few spans": (0, 0), "negative span": (-(10**6), 0), "odd length": (0, -1)}[damage]
        np.save(spans, table[1:] if damage == "few spans" else table)
        if (key, damage) == ("caption", "odd length"):
            return  # strings have any length
    with pytest.raises(ArtifactError, match=rf"extra_{key}: it.*Encode again"):
        FeatureStoreDataset(tmp_path / "store")


@pytest.mark.parametrize(
    "extras",
    [
        [], {"a": 1}, {"a b": {"rule": "Keep"}}, {"a": {"rule": "Heap"}}, {"a": {"rule": "Keep", "shape": []}}, {"a": {"rule": "Stack"}},
        {"a": {"rule": "Stack", "dtype": "nn", "shape": []}}, {"a": {"rule": "Stack", "dtype": "int8", "shape": [-1]}},
        {"a": {"rule": "Pad", "dtype": "int8", "shape": []}}, {"a": {"rule": "Pad", "dtype": "int8", "shape": [], "mask": 1, "fill": 0}},
    ],
)  # fmt: skip
def test_a_manifest_with_extras_that_cannot_be(extras: Any, tmp_path: Path) -> None:
    write(tmp_path / "store")
    file = tmp_path / "store" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "extras": extras or [1]}))
    with pytest.raises(ArtifactError, match=r"manifest.json is damaged: extras = .*Encode again"):
        FeatureStoreDataset(tmp_path / "store")


def test_the_deviations_file_is_checked(tmp_path: Path) -> None:
    write(tmp_path / "store")
    np.save(tmp_path / "store" / "deviation.npy", np.zeros((N, 1, 2), np.float32))
    with pytest.raises(ArtifactError, match=r"deviation.npy: shape \(6, 1, 2\)"):
        FeatureStoreDataset(tmp_path / "store")
