from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from srcflow.cli import main
from srcflow.data.feature_store import FeatureStoreDataset
from srcflow.data.manifest import weights_hash
from srcflow.encoders.efficientnet_lite import EfficientNetLite
from srcflow.registry import spec_of

from ..data.made_shards import shards

ENCODER = ["--encoder", "EfficientNetLite", "--encoder.image_size", "32", "--encoder.stage", "1", "--encoder.weights", "null"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(5):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").rotate(i * 20).resize((24, 20)).save(path)
    return tmp_path / "images"


def arguments(folder: Path, out: Path) -> list[str]:
    data = ["--data", "ImageFolder", "--data.train", str(folder), "--data.size", "16", "--data.num_classes", "2", "--data.batch_size", "2"]
    return ["encode", *ENCODER, *data, "--out", str(out)]


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
