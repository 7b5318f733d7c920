from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from srcflow.data.encode import encode_images
from srcflow.data.feature_store import FeatureStoreDataset, FeatureStoreWriter
from srcflow.data.manifest import weights_hash
from srcflow.data.sampler import Draw
from srcflow.errors import ArtifactError, ConfigError, DataError, ManifestMismatchError, ShapeError
from srcflow.types import Batch, Grid

N, TOKENS, DIM = 7, 6, 4
FACTS: dict[str, Any] = {
    "grid": (2, 3),
    "encoder": {"spec": {"class_path": "E", "init_args": {"size": 8}}, "weights": "abc"},
    "transform": {"size": 8},
}


def images(n: int = N) -> Tensor:
    return torch.randint(0, 256, (n, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def encode(x: Tensor) -> tuple[Tensor, Grid]:
    """Pools 4x2 patches and repeats the channels; not symmetric under mirroring."""
    pooled = torch.nn.functional.adaptive_avg_pool2d(x, (2, 3)).flatten(2).transpose(1, 2)
    ramp = (x * torch.linspace(0, 1, 8)).mean((1, 2, 3))
    return torch.cat([pooled, ramp[:, None, None].expand(-1, TOKENS, 1)], -1), (2, 3)


def batches(size: int = 3, flipped: bool = False, valid: list[bool] | None = None) -> list[Batch]:
    mask = torch.tensor(valid if valid is not None else [True] * N)
    whole = Batch(images=images(), labels=torch.arange(N) % 3, indices=torch.arange(N), valid=mask, flipped=torch.full((N,), flipped))
    return [Batch(**{k: v[i : i + size] for k, v in whole.items()}) for i in range(0, N, size)]  # type: ignore[index, typeddict-item]


def write(path: Path, dtype: str = "float32", flip: bool = False, **facts: Any) -> FeatureStoreDataset:
    with FeatureStoreWriter(
        path, n=N, tokens=TOKENS, dim=DIM, image_size=(8, 8), dtype=dtype, manifest={**FACTS, **facts}, flip=flip
    ) as writer:
        assert encode_images(encode, batches(), writer, lambda i: f"clé/{i}", progress=False) == N
    return FeatureStoreDataset(path)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.0), ("float16", 1e-3), ("bfloat16", 8e-3)])
def test_what_is_written_is_read(tmp_path: Path, dtype: str, tolerance: float) -> None:
    data = write(tmp_path / "store", dtype)
    wanted = encode(images().float() / 255)[0]
    batch = data.__getitems__([Draw(0, 5), Draw(0, 2, valid=False), 0])
    assert batch["features"].dtype == getattr(torch, dtype)
    assert (batch["features"].float() - wanted[[5, 2, 0]]).abs().max() <= tolerance
    assert torch.equal(batch["images"], images()[[5, 2, 0]])
    assert batch["labels"].tolist() == [2, 2, 0]
    assert batch["indices"].tolist() == [5, 2, 0]
    assert batch["valid"].tolist() == [True, False, True]
    assert batch["grid"] == (2, 3)
    assert data.key(5) == "clé/5"
    assert not (tmp_path / "store.partial").exists()
    assert "images" not in FeatureStoreDataset(tmp_path / "store", with_images=False)[0]
    copy = pickle.loads(pickle.dumps(data))  # as a spawned worker gets it
    assert torch.equal(copy[3]["features"], data[3]["features"])
    assert len(pickle.dumps(data)) < 5000
    with pytest.raises(IndexError):
        data.__getitems__([N])


def test_flip_stores_each_image_twice(tmp_path: Path) -> None:
    data = write(tmp_path / "store", flip=True)
    assert len(data) == 2 * N
    plain, mirrored = data.__getitems__(range(N)), data.__getitems__(range(N, 2 * N))
    assert torch.equal(mirrored["images"], plain["images"].flip(-1))
    assert torch.equal(mirrored["features"], encode(images().flip(-1).float() / 255)[0])
    assert not torch.allclose(mirrored["features"], plain["features"])
    assert mirrored["indices"].tolist() == list(range(N, 2 * N))
    assert mirrored["flipped"].all()
    assert not plain["flipped"].any()
    assert torch.equal(mirrored["labels"], plain["labels"])
    assert data.key(N + 2) == data.key(2)
    assert len(FeatureStoreDataset(tmp_path / "store", originals_only=True)) == N


def test_unfinished_stores_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "store"
    writer = FeatureStoreWriter(path, n=N, tokens=TOKENS, dim=DIM, image_size=(8, 8), manifest=FACTS)
    encode_images(encode, batches()[:1], writer, str, progress=False)
    with pytest.raises(ArtifactError, match=r"not a feature store.*store.partial is an unfinished one"):
        FeatureStoreDataset(path)
    with pytest.raises(DataError, match=r"4 of 7 rows were never written, e.g. row 3"):
        writer.close()
    with (
        pytest.raises(RuntimeError, match="interrupted"),
        FeatureStoreWriter(path, n=N, tokens=TOKENS, dim=DIM, image_size=(8, 8), manifest=FACTS),
    ):
        raise RuntimeError("interrupted")
    assert not list(tmp_path.iterdir())  # the second writer cleared the first one's rest, too
    write(path)
    with pytest.raises(ArtifactError, match="exists and is a feature store"):
        write(path)


def test_damaged_stores_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "store"
    write(path)
    np.save(path / "labels.npy", np.zeros(3, np.int64))
    with pytest.raises(ArtifactError, match=r"labels.npy: shape \(3,\).*\(7,\)"):
        FeatureStoreDataset(path)
    (path / "labels.npy").unlink()
    with pytest.raises(ArtifactError, match=r"labels.npy cannot be read"):
        FeatureStoreDataset(path)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(ArtifactError, match="version 99"):
        FeatureStoreDataset(path)


def test_a_mismatch_names_every_field(tmp_path: Path) -> None:
    data = write(tmp_path / "store")
    data.check({"encoder": FACTS["encoder"], "grid": (2, 3), "dtype": "float32"})
    with pytest.raises(ManifestMismatchError) as error:
        data.check(
            {"encoder": {"spec": {"class_path": "E", "init_args": {"size": 16}}, "weights": "abc"}, "dtype": "float16", "grid": (2, 3)}
        )
    assert error.value.differences == {"encoder.spec.init_args.size": (8, 16), "dtype": ("float32", "float16")}
    with pytest.raises(ManifestMismatchError, match=r"transform.crop: stored None, this run 'random'"):
        data.check({"transform": {"crop": "random"}})


def test_what_the_writer_refuses(tmp_path: Path) -> None:
    path = tmp_path / "store"
    sizes: dict[str, Any] = {"n": N, "tokens": TOKENS, "dim": DIM, "image_size": (8, 8)}
    with pytest.raises(ConfigError, match="dtype = 'float8'"):
        FeatureStoreWriter(path, **sizes, dtype="float8", manifest=FACTS)
    with pytest.raises(ShapeError, match="grid"):
        FeatureStoreWriter(path, **sizes, manifest={**FACTS, "grid": (2, 2)})
    with FeatureStoreWriter(path, **sizes, manifest=FACTS) as writer:
        encode_images(encode, batches(), writer, str, progress=False)
        with pytest.raises(DataError, match="not finite as float16"):
            encode_images(lambda x: (encode(x)[0] * 1e6, (2, 3)), batches(), writer, str, progress=False)
        with pytest.raises(ShapeError, match="grid of"):
            encode_images(lambda x: (encode(x)[0], (3, 2)), batches(), writer, str, progress=False)
        with pytest.raises(ShapeError, match=r"features: shape \(3, 6, 3\)"):
            encode_images(lambda x: (encode(x)[0][..., :3], (2, 3)), batches(), writer, str, progress=False)
        with pytest.raises(DataError, match="flipped already"):
            encode_images(encode, batches(flipped=True), writer, str, progress=False)


def test_padding_is_not_stored(tmp_path: Path) -> None:
    writer = FeatureStoreWriter(tmp_path / "store", n=N, tokens=TOKENS, dim=DIM, image_size=(8, 8), manifest=FACTS)
    assert encode_images(encode, batches(valid=[True] * 5 + [False] * 2), writer, str, progress=False) == 5
    with pytest.raises(DataError, match="2 of 7 rows"):
        writer.close()


def test_labels_are_checked(tmp_path: Path) -> None:
    data = write(tmp_path / "store")
    data.check_labels(3)
    data.check_labels(0)
    with pytest.raises(DataError, match=r"label 2 of 'clé/2' is not in 0 .. 1"):
        data.check_labels(2)


def test_weights_hash() -> None:
    torch.manual_seed(0)
    a, b = torch.nn.Linear(3, 4), torch.nn.Linear(3, 4)
    assert weights_hash(a) != weights_hash(b)
    b.load_state_dict(a.state_dict())
    assert weights_hash(a) == weights_hash(b)
    assert weights_hash(a) != weights_hash(a.bfloat16())


def test_reading_is_cheap(tmp_path: Path) -> None:
    """The features of the demo (64 x 112, float16) must not hold up training: 5,000 samples a second with 0 workers."""
    import time

    n = 2048
    with FeatureStoreWriter(tmp_path / "s", n=n, tokens=64, dim=112, image_size=(32, 32), manifest={"grid": (8, 8)}) as writer:
        writer.write(
            torch.arange(n),
            torch.zeros(n, 64, 112),
            torch.zeros(n, 3, 32, 32, dtype=torch.uint8),
            torch.zeros(n, dtype=torch.int64),
            ["k"] * n,
        )
    data = FeatureStoreDataset(tmp_path / "s")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()

    def seconds() -> float:
        start = time.process_time()
        for i in range(0, n, 256):
            data.__getitems__([Draw(0, j) for j in order[i : i + 256]])
        return time.process_time() - start

    assert n / min(seconds() for _ in range(3)) > 5000


# --- damage and full disks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"null", b"\xff"])
def test_a_manifest_that_is_none(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "store")
    (tmp_path / "store/manifest.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"store/manifest.json.*Encode again"):
        FeatureStoreDataset(tmp_path / "store")


@pytest.mark.parametrize(
    "change",
    [
        {"count": -1}, {"count": 10**30}, {"count": "7"}, {"count": True}, {"flip": 1}, {"tokens": 0}, {"tokens": 5}, {"dim": None},
        {"grid": 6}, {"grid": [2, 3, 1]}, {"grid": ["2", 3]}, {"dtype": "int8"}, {"dtype": ["float32"]}, {"image_size": [8]},
        {"encoder": "E"}, {"versions": []}, {"surplus": 1}, {"precision": 32},
    ],
)  # fmt: skip
def test_fields_of_a_manifest_that_cannot_be(tmp_path: Path, change: dict[str, Any]) -> None:
    write(tmp_path / "store")
    manifest = json.loads((tmp_path / "store/manifest.json").read_text())
    (tmp_path / "store/manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(ArtifactError, match=rf"manifest.json is damaged:.*{next(iter(change))}.*Encode again"):
        FeatureStoreDataset(tmp_path / "store")


def test_counts_that_are_absurd_but_possible_are_compared_with_the_arrays(tmp_path: Path) -> None:
    write(tmp_path / "store")
    manifest = json.loads((tmp_path / "store/manifest.json").read_text())
    (tmp_path / "store/manifest.json").write_text(json.dumps({**manifest, "count": 2**40}))
    with pytest.raises(ArtifactError, match=r"features.npy: shape \(7, .*manifest says \(1099511627776"):
        FeatureStoreDataset(tmp_path / "store")


@pytest.mark.parametrize("name", ["features", "images", "labels", "flipped", "keys", "key_offsets"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b"",
        lambda b: b[:20],
        lambda b: b[:-3],
        lambda b: b"PK\x03\x04" + b[4:],
        lambda b: b[:10] + b"(" + b[11:],
        lambda b: b.replace(b"'descr'", b"'dexcr'"),
        lambda b: b.replace(b"'shape': (", b"'shape': 9"),
        lambda b: b[:20] + b"\xff" * 30 + b[50:],
        lambda b: b.replace(b"fortran_order': False", b"fortran_order': 'yes'"),
    ],
)
def test_arrays_with_a_damaged_header(tmp_path: Path, name: str, damage: Any) -> None:
    write(tmp_path / "store")
    file = tmp_path / "store" / f"{name}.npy"
    data = damage(file.read_bytes())
    assert data != file.read_bytes()
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match=rf"{name}.npy.*Encode again"):
        FeatureStoreDataset(tmp_path / "store")


@pytest.mark.parametrize(
    ("name", "array", "problem"),
    [
        ("labels", np.zeros(7), "dtype float64, it should be int64"),
        ("flipped", np.zeros(7, np.uint8), "dtype uint8"),
        ("features", np.zeros((7, 6, 4), np.float16), "dtype float16, it should be float32"),
        ("keys", np.zeros((2, 3), np.uint8), "shape"),
        ("key_offsets", np.zeros(3, np.int64), "shape"),
        ("key_offsets", np.array([0, 9, 1, 2, 3, 4, 5, 6]), "does not divide"),
        ("key_offsets", np.full(8, 10**9), "does not divide"),
    ],
)
def test_arrays_of_another_kind(tmp_path: Path, name: str, array: Any, problem: str) -> None:
    write(tmp_path / "store")
    np.save(tmp_path / "store" / f"{name}.npy", array)
    with pytest.raises(ArtifactError, match=rf"{name}.npy.*{problem}.*Encode again"):
        FeatureStoreDataset(tmp_path / "store")


def test_keys_that_are_all_empty(tmp_path: Path) -> None:
    with FeatureStoreWriter(tmp_path / "s", n=N, tokens=TOKENS, dim=DIM, image_size=(8, 8), dtype="float32", manifest=FACTS) as writer:
        encode_images(encode, batches(), writer, lambda i: "", progress=False)
    assert FeatureStoreDataset(tmp_path / "s").key(3) == ""


def test_a_store_for_which_there_is_no_room_is_refused_before_it_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(dim: int) -> FeatureStoreWriter:
        return FeatureStoreWriter(tmp_path / "store", n=N, tokens=TOKENS, dim=dim, image_size=(8, 8), manifest=FACTS)

    with pytest.raises(DataError, match=r"no room for features.*No space left.*--dtype float16"):
        make(2**45)
    monkeypatch.setattr("os.posix_fallocate", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")), raising=False)
    with pytest.raises(DataError, match=r"no room for features"):
        make(DIM)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("os.posix_fallocate", lambda *a: (_ for _ in ()).throw(OSError(95, "not supported")), raising=False)
    make(DIM)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be written"):
        FeatureStoreWriter(tmp_path / "file" / "s", n=N, tokens=TOKENS, dim=DIM, image_size=(8, 8), manifest=FACTS)
