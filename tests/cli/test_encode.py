from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from srcflow import artifacts
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.autoencoders.representation import RepresentationAutoencoder
from srcflow.autoencoders.vit_decoder import ViTDecoder
from srcflow.cli import main
from srcflow.data.feature_store import FeatureStoreDataset
from srcflow.data.manifest import made_by, weights_hash
from srcflow.datamodules.feature_store import FeatureStore
from srcflow.encoders.efficientnet_lite import EfficientNetLite
from srcflow.errors import ManifestMismatchError
from srcflow.registry import spec_of

from ..autoencoders.half_means import HalfMeans
from ..data.made_shards import shards
from ..datamodules.extra_keys import CaptionedFolder, N, plain, written

ENCODER = ["--encoder", "EfficientNetLite", "--encoder.image_size", "32", "--encoder.stage", "1", "--encoder.weights", "null"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(5):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").rotate(i * 20).resize((24, 20)).save(path)
    return tmp_path / "images"


def arguments(folder: Path, out: Path, maker: list[str] = ENCODER) -> list[str]:
    data = ["--data", "ImageFolder", "--data.train", str(folder), "--data.size", "16", "--data.num_classes", "2", "--data.batch_size", "2"]
    return ["encode", *maker, *data, "--out", str(out)]


def test_encode(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    encoder = EfficientNetLite(image_size=32, stage=1, weights=None)
    torch.manual_seed(0)  # the command builds the same random weights
    main([*arguments(folder, tmp_path / "store"), "--flip", "--limit", "4", "--dtype", "float32"])
    assert "4 + 4 mirrored images" in capsys.readouterr().out
    store = FeatureStoreDataset(tmp_path / "store")
    store.check({"encoder": {"spec": spec_of(encoder), "weights": weights_hash(encoder)}, "transform": {"size": 16, "crop": "centre"}})
    batch = store.__getitems__(range(8))
    with torch.no_grad():
        wanted, grid = encoder(batch["images"].float() / 255)
    assert batch["grid"] == grid
    assert (batch["features"] - wanted).abs().max() < 1e-4
    assert batch["labels"].tolist() == [0, 0, 0, 1, 0, 0, 0, 1]
    assert store.key(7) == "class1/1.png"


def test_shards_behind_a_command_are_encoded_as_local_ones_are(tmp_path: Path) -> None:
    paths = shards(tmp_path, [3, 4])
    main(["index", *paths])
    stores = []
    for name, where in (("local", f"{tmp_path}/s-*.tar"), ("piped", f"pipe:cat {tmp_path}/s-{{000..001}}.tar")):
        torch.manual_seed(0)
        data = ["--data", "ImageShards", "--data.train", where, "--data.index", str(tmp_path / "index.json"), "--data.num_classes", "10"]
        data += ["--data.size", "16", "--data.batch_size", "2"]
        main(["encode", *ENCODER, *data, "--out", str(tmp_path / name), "--limit", "5", "--flip"])
        stores.append(FeatureStoreDataset(tmp_path / name))
    local, piped = (store.__getitems__(range(10)) for store in stores)
    assert all(torch.equal(local[k], piped[k]) for k in ("features", "images", "labels", "indices", "flipped"))  # type: ignore[literal-required]
    assert [store.key(4) for store in stores] == ["a/0004", "s-001.tar/1"]


def test_encode_in_bfloat16(folder: Path, tmp_path: Path) -> None:
    main([*arguments(folder, tmp_path / "store"), "--precision", "bfloat16", "--dtype", "bfloat16", "--batch_size", "5"])
    store = FeatureStoreDataset(tmp_path / "store")
    assert store.manifest.precision == "bfloat16"
    assert store[0]["features"].dtype == torch.bfloat16
    assert store[0]["features"].float().square().mean(-1).sqrt().sub(1).abs().max() < 0.02  # unit RMS


def test_encode_refuses(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "store").mkdir()
    for extra, message in [
        ([], "store exists"),
        (["--split", "test"], "data.test = None"),
        (["--limit", "0"], "limit = 0"),
        (["--data.num_classes", "3"], "num_classes"),
    ]:
        with pytest.raises(SystemExit):
            main([*arguments(folder, tmp_path / "store"), *extra])
        assert message in capsys.readouterr().err


# --- autoencoders ----------------------------------------------------------------------------------------------------------------------


def test_an_autoencoder_stores_its_deviation(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = f"{HalfMeans.__module__}.HalfMeans"
    main([*arguments(folder, tmp_path / "store", ["--autoencoder", path, "--autoencoder.deviation", "0.5"]), "--flip"])
    assert "5 + 5 mirrored images, 2 x 3 float16 with deviation, to" in capsys.readouterr().out
    autoencoder = HalfMeans(0.5).eval()
    autoencoder.setup()
    data = FeatureStore(str(tmp_path / "store"), batch_size=10)
    batch = next(iter(data.train_dataloader()))
    assert (batch["features"].float() - autoencoder.features(batch["images"].float() / 255)[0]).abs().max() < 1e-3
    assert batch["deviation"].shape == batch["features"].shape
    assert batch["deviation"].eq(0.5).all()
    data.check_maker(autoencoder)
    with pytest.raises(ManifestMismatchError, match=r"autoencoder.spec.init_args.deviation: stored 0.5, this run 0.25"):
        data.check_maker(HalfMeans())
    with pytest.raises(ManifestMismatchError, match=r"encoder.weights"):
        data.check({"encoder": {"weights": "abc"}})


def test_an_autoencoder_without_a_deviation(folder: Path, tmp_path: Path) -> None:
    main(
        arguments(
            folder, tmp_path / "store", ["--autoencoder", "PixelPatches", "--autoencoder.image_size", "16", "--autoencoder.patch_size", "8"]
        )
    )
    store = FeatureStoreDataset(tmp_path / "store")
    store.check(made_by(PixelPatches(16, 8)))
    assert store.manifest.encoder == {}
    assert "deviation" not in store[0]


def test_a_trained_autoencoder_is_read_from_its_directory(folder: Path, tmp_path: Path) -> None:
    """Its features are its encoder's: the store is the same as one of the encoder alone, and belongs to any decoder."""
    torch.manual_seed(3)
    encoder = EfficientNetLite(image_size=32, stage=1, weights=None)
    grid = encoder(torch.zeros(1, 3, 32, 32))[1]
    autoencoder = RepresentationAutoencoder(encoder, ViTDecoder(encoder.dim, dim=8, depth=1, heads=2, mlp_dim=8, patch=4, grid=grid[0]))
    artifacts.save(tmp_path / "stage0", autoencoder, manifest={})
    main([*arguments(folder, tmp_path / "store", ["--artifact", str(tmp_path / "stage0")]), "--dtype", "float32"])
    store = FeatureStoreDataset(tmp_path / "store")
    store.check({"encoder": {"spec": spec_of(encoder), "weights": weights_hash(encoder)}})
    FeatureStore(str(tmp_path / "store")).check_maker(autoencoder)
    with pytest.raises(ManifestMismatchError, match=r"autoencoder.weights: stored None"):
        FeatureStore(str(tmp_path / "store")).check_maker(HalfMeans())
    assert store.manifest.autoencoder == {}
    batch = store.__getitems__(range(5))
    assert (batch["features"] - autoencoder.features(batch["images"].float() / 255)[0]).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("maker", "message"),
    [
        ([], "encoder = None: nothing is there that makes features. Give one of --encoder, --autoencoder and --artifact."),
        ([*ENCODER, "--artifact", "stage0"], "artifact = 'stage0': does not go with --encoder"),
        (["--artifact", "nowhere"], "nowhere"),
    ],
)
def test_one_thing_makes_features(maker: list[str], message: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments(folder, tmp_path / "store", maker))
    assert message in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_keys_of_the_data_are_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = written(tmp_path)
    data = ["--data", f"{CaptionedFolder.__module__}.CaptionedFolder", "--data.train", str(place / "folder"), "--data.size", "16"]
    main(["encode", *ENCODER, *data, "--data.batch_size", "4", "--out", str(tmp_path / "store"), "--flip"])
    assert "float16 with caption, words, size, to" in capsys.readouterr().out
    stored = FeatureStore(str(tmp_path / "store"), batch_size=7)
    again = CaptionedFolder(str(place / "folder"), size=16, batch_size=7)
    keys = ("caption", "words", "real_words", "size")
    for ours, wanted in zip(stored.loader("train", limit=N), again.loader("train"), strict=True):
        assert {k: plain(ours)[k] for k in keys} == {k: plain(wanted)[k] for k in keys}
    batch = next(iter(FeatureStore(str(tmp_path / "store"), batch_size=2 * N, num_workers=1).train_dataloader()))
    assert batch["caption"] == [f"image {i % N}" for i in batch["indices"].tolist()]
