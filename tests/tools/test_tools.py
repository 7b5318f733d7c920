from __future__ import annotations

import gzip
import hashlib
import importlib
import io
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from srcflow.artifacts import file_hash
from srcflow.data.image_shards import ImageShardsDataset
from srcflow.data.shard_index import ShardIndex
from srcflow.data.shard_sources import expand, read_index
from srcflow.data.transforms import ImageTransform

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(str(TOOLS))
    for name in ("make_shards", "fashion_mnist"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("make_shards"), importlib.import_module("fashion_mnist")


def idx(array: np.ndarray) -> bytes:  # type: ignore[type-arg]
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


@pytest.fixture
def originals(tmp_path: Path, tools: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small made-up data set in the published format, with the checksums and split sizes to match."""
    fashion = tools[1]
    rng = np.random.default_rng(0)
    folder, sums = tmp_path / "idx", {}
    folder.mkdir()
    for part, n in (("train", 40), ("t10k", 12)):
        for name, array in (
            (f"{part}-images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)),
            (f"{part}-labels-idx1-ubyte", rng.integers(0, 10, n, dtype=np.uint8)),
        ):
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            sums[name] = hashlib.sha256(idx(array)).hexdigest()
    monkeypatch.setattr(fashion, "CONTENT_SHA256", sums)
    monkeypatch.setattr(fashion, "PER_SHARD", 10)
    real = fashion.splits
    monkeypatch.setattr(fashion, "splits", lambda: real(40, 12, 15))
    return folder


def test_fashion_mnist(tools: tuple[ModuleType, ModuleType], originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fashion = tools[1]
    out = tmp_path / "out"
    assert fashion.main(["--folder", str(originals), "--out", str(out)]) == 0
    keys = []
    for split, origin, n in (("train", "train", 25), ("val", "train", 15), ("test", "t10k", 12)):
        data = ImageShardsDataset(ShardIndex.scan(expand(f"{out}/{split}-*.tar", split)), ImageTransform(32), 10)
        assert len(data) == n
        images = fashion.read_idx(gzip.decompress((originals / f"{origin}-images-idx3-ubyte.gz").read_bytes()))
        labels = fashion.read_idx(gzip.decompress((originals / f"{origin}-labels-idx1-ubyte.gz").read_bytes()))
        for i in range(n):
            position = int(data.key(i).rpartition("-")[2])
            pixels = data[i]["image"].numpy()
            assert (pixels[:, 2:30, 2:30] == images[position]).all()
            assert pixels.sum() == 3 * int(images[position].sum())  # the margin is black
            assert data[i]["label"] == labels[position]
        keys += [data.key(i) for i in range(n)]
    assert len(set(keys)) == 52
    assert len(json.loads((out / "classes.json").read_text())) == 10

    before = {p.name: p.read_bytes() for p in out.iterdir()}
    capsys.readouterr()
    assert fashion.main(["--source", "mirror", "--out", str(out)]) == 0  # nothing is fetched
    assert "already there" in capsys.readouterr().out
    (out / "val-000001.tar").write_bytes(b"damaged")
    assert fashion.main(["--folder", str(originals), "--out", str(out)]) == 0
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before  # bit for bit

    assert fashion.main(["--folder", str(originals), "--out", str(out), "--limit", "3"]) == 0
    assert sorted(p.name for p in out.glob("*.tar")) == ["test-000000.tar", "train-000000.tar", "val-000000.tar"]


def test_fashion_mnist_refuses_what_is_not_the_data(
    tools: tuple[ModuleType, ModuleType], originals: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fashion = tools[1]
    (originals / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(12, np.uint8))))
    (originals / "train-labels-idx1-ubyte.gz").unlink()
    assert fashion.main(["--folder", str(originals), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "t10k-labels-idx1-ubyte: sha256" in said
    assert "train-labels" in said
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("dear")
    with pytest.raises(SystemExit):
        fashion.main(["--folder", str(originals), "--out", str(tmp_path / "mine")])
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "dear"


def test_the_published_splits(tools: tuple[ModuleType, ModuleType]) -> None:
    splits = tools[1].splits()
    assert {k: len(v[1]) for k, v in splits.items()} == {"train": 55000, "val": 5000, "test": 10000}
    assert sorted(splits["train"][1] + splits["val"][1]) == list(range(60000))
    assert splits["val"][1][:3] == PUBLISHED_VAL


PUBLISHED_VAL = [16030, 52414, 43817]  # fixed for ever: numbers of different releases must be comparable


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for c, name in enumerate(["ant", "bee"]):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (20, 12 + i), (c * 100, i, 0)).save(tmp_path / "images" / name / f"my.photo {i}.png")
    return tmp_path / "images"


def test_make_shards(tools: tuple[ModuleType, ModuleType], folder: Path, tmp_path: Path) -> None:
    make = tools[0].main
    assert make(["--folder", str(folder), "--out", str(tmp_path / "out"), "--per-shard", "3"]) == 0
    manifest = json.loads((tmp_path / "out" / "train.json").read_text())
    assert [s["samples"] for s in manifest["shards"]] == [3, 3, 2]
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["ant", "bee"]
    index = read_index(str(tmp_path / "out" / "index.json"))
    assert [e.nsamples for e in index.values()] == [3, 3, 2]
    assert all(e.sha256 == file_hash(tmp_path / "out" / e.url) for e in index.values())
    data = ImageShardsDataset(ShardIndex.scan(expand(f"{tmp_path}/out/train-{{000000..000002}}.tar", "x")), ImageTransform(8), 2)
    found = sorted(data.read(i) for i in range(8))
    assert found == sorted((p.read_bytes(), int(p.parent.name == "bee")) for p in folder.rglob("*.png"))
    with pytest.raises(SystemExit):  # never a mixture of two runs
        make(["--folder", str(folder), "--out", str(tmp_path / "out")])


def test_make_shards_resizes(tools: tuple[ModuleType, ModuleType], folder: Path, tmp_path: Path) -> None:
    assert tools[0].main(["--folder", str(folder / "ant"), "--out", str(tmp_path / "out"), "--size", "8", "--prefix", "val"]) == 0
    data = ImageShardsDataset(ShardIndex.scan(expand(f"{tmp_path}/out/val-*.tar", "x")), ImageTransform(8))
    assert {Image.open(io.BytesIO(data.read(i)[0])).size for i in range(4)} == {(8, 8)}
    assert sorted(int(data[i]["image"][1, 0, 0]) for i in range(4)) == [0, 1, 2, 3]


def test_make_shards_drops_nothing_in_silence(
    tools: tuple[ModuleType, ModuleType], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make = tools[0].main
    (folder / "ant" / "cut.png").write_bytes((folder / "ant" / "my.photo 0.png").read_bytes()[:50])
    (folder / "ant" / "readme.txt").write_text("x")
    assert make(["--folder", str(folder), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "cut.png" in said
    assert "readme.txt" in said
    assert not list((tmp_path / "out").iterdir())
    assert make(["--folder", str(folder), "--out", str(tmp_path / "out"), "--skip-bad"]) == 0
    manifest = json.loads((tmp_path / "out" / "train.json").read_text())
    assert manifest["samples"] == 8
    assert "cut.png" in manifest["skipped"][0]


def test_make_shards_keeps_labels_of_another_split(tools: tuple[ModuleType, ModuleType], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.json").write_text('["aphid", "ant", "bee"]')
    arguments = ["--folder", str(folder), "--out", str(tmp_path / "out"), "--classes", str(tmp_path / "classes.json")]
    assert tools[0].main(arguments) == 0
    data = ImageShardsDataset(ShardIndex.scan(expand(f"{tmp_path}/out/train-*.tar", "x")), ImageTransform(8), 3)
    assert sorted(data.read(i)[1] for i in range(8)) == [1] * 4 + [2] * 4
    (tmp_path / "classes.json").write_text('["ant"]')
    with pytest.raises(SystemExit):
        tools[0].main([*arguments, "--prefix", "val"])


def test_make_shards_turns_what_it_resizes_upright(tools: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    """And the result says nothing about orientation any more; copies keep all their bytes."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (16, 16))
    image.paste((255, 0, 0), (0, 0, 8, 16))
    (tmp_path / "in").mkdir()
    image.save(tmp_path / "in" / "0.png", exif=exif)

    def stored(name: str, *options: str) -> bytes:
        assert tools[0].main(["--folder", str(tmp_path / "in"), "--out", str(tmp_path / name), *options]) == 0
        index = ShardIndex.scan(expand(f"{tmp_path / name}/train-*.tar", "x"))
        return ImageShardsDataset(index, ImageTransform(8)).read(0)[0]

    assert stored("copy") == (tmp_path / "in" / "0.png").read_bytes()
    for options, red in (([], (6, 1)), (["--exif", "transpose"], (6, 1)), (["--exif", "ignore"], (1, 6))):
        result = Image.open(io.BytesIO(stored("-".join(["out", *options]), "--size", "8", *options)))
        assert result.size == (8, 8)
        assert result.getpixel(red) == (255, 0, 0)
        assert result.getpixel(red[::-1]) == (0, 0, 0)
        assert 0x0112 not in result.getexif()
    assert json.loads((tmp_path / "out" / "train.json").read_text())["exif"] == "transpose"
    with pytest.raises(SystemExit):
        tools[0].main(["--folder", str(tmp_path / "in"), "--out", str(tmp_path / "no"), "--exif", "ignore"])


@pytest.mark.parametrize("error", [MemoryError(), AssertionError("odd"), Image.DecompressionBombError("large"), RecursionError("deep")])
def test_make_shards_lists_whatever_an_image_raises(
    error: Exception, tools: tuple[ModuleType, ModuleType], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    real = Image.open

    def opened(file: io.BytesIO) -> Image.Image:
        image = real(file)
        if image.height == 13:
            raise error
        return image

    monkeypatch.setattr(Image, "open", opened)
    out = tmp_path / "out"
    assert tools[0].main(["--folder", str(folder), "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert said.count("cannot be read: ") == said.count("my.photo 1.png: cannot be decoded: ") == 2
    assert not list(out.iterdir())
    assert tools[0].main(["--folder", str(folder), "--out", str(out), "--skip-bad"]) == 0
    assert json.loads((out / "train.json").read_text())["samples"] == 6


def test_nothing_but_bad_images_gives_no_shards(tools: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.png").write_bytes(b"no image")
    assert tools[0].main(["--folder", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--skip-bad"]) == 1
    assert not list((tmp_path / "out").iterdir())


def test_targets_are_tried_before_the_work(
    tools: tuple[ModuleType, ModuleType], folder: Path, originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "file").write_text("mine")
    out = str(tmp_path / "file" / "out")

    def never(*args: object) -> None:
        pytest.fail("the work began")

    monkeypatch.setattr(tools[0], "encode", never)
    monkeypatch.setattr(tools[1], "fetch", never)
    monkeypatch.delitem(sys.modules, "synthetic", raising=False)
    synthetic = importlib.import_module("synthetic")
    monkeypatch.setattr(synthetic, "write_shards", never)
    for tool, options in ((tools[0], ["--folder", str(folder)]), (tools[1], []), (synthetic, [])):
        for place in (out, str(tmp_path / "file")):
            with pytest.raises(SystemExit):
                tool.main([*options, "--out", place])
            assert f"--out {place}: " in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("content", ["", "[", "{}", "[1]", '["ant", "ant"]'])
def test_what_is_no_list_of_classes_is_refused(
    content: str, tools: tuple[ModuleType, ModuleType], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(SystemExit):
        tools[0].main(["--folder", str(folder), "--out", str(tmp_path / "out"), "--classes", str(tmp_path / "classes.json")])
    assert "--classes" in capsys.readouterr().err.splitlines()[-1]
