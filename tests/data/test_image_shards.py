from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader

from srcflow.data.batches import collate
from srcflow.data.image_shards import ImageShardsDataset, ImageShardsStream, opened
from srcflow.data.shard_index import ShardIndex, expand
from srcflow.data.transforms import ImageTransform
from srcflow.errors import DataError, ProblemsError

EVAL = ImageTransform(4)


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, files: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def shards(folder: Path, sizes: list[int]) -> list[str]:
    """Shards whose sample i is a plain image of red i with label i % 10."""
    paths, i = [], 0
    for number, size in enumerate(sizes):
        path = folder / f"s-{number:03d}.tar"
        with wds.TarWriter(str(path)) as writer:
            for _ in range(size):
                writer.write({"__key__": f"a/{i:04d}", "png": png(i), "cls": i % 10})
                i += 1
        paths.append(str(path))
    return paths


def test_random_access_agrees_with_webdataset(tmp_path: Path) -> None:
    paths = shards(tmp_path, [3, 5, 1])
    data = ImageShardsDataset(ShardIndex.scan(paths), EVAL, 10)
    assert len(data) == 9
    plain = list(wds.DataPipeline(wds.SimpleShardList(paths), opened, wds.tariterators.tar_file_expander, wds.tariterators.group_by_keys))
    for i, raw in enumerate(plain):
        assert data.read(i) == (raw["png"], int(raw["cls"]))
        assert data.key(i) == raw["__key__"]
        assert data[i]["image"][0, 0, 0] == i
        assert data[i]["index"] == i
    assert "s-001.tar" in data.where(4)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_kinds_of_headers(tmp_path: Path, form: int) -> None:
    names = ["short", "d/" + "n" * 95, "p" * 60 + "/" + "q" * 60, "umlaut-é"]
    if form != tarfile.USTAR_FORMAT:
        names.append("x" * 180)
    path = write(tmp_path / "a.tar", [(f"{n}.PNG", png(i)) for i, n in enumerate(names)], form)
    index = ShardIndex.scan([str(path)])
    assert [index.keys[i] for i in range(len(index))] == names
    data = ImageShardsDataset(index, EVAL)
    assert [int(data[i]["image"][0, 0, 0]) for i in range(len(names))] == list(range(len(names)))
    assert data[0]["label"] == -1


def test_json_labels_and_label_errors(tmp_path: Path) -> None:
    files = [("a.png", png(1)), ("a.json", json.dumps({"label": 3, "caption": "x"}).encode())]
    files += [("b.png", png(1)), ("b.json", b'{"class": 1}'), ("c.png", png(1)), ("d.png", png(1)), ("d.cls", b"12")]
    index = ShardIndex.scan([str(write(tmp_path / "a.tar", files))])
    data = ImageShardsDataset(index, EVAL, 10)
    assert data[0]["label"] == 3
    for i, message in [(1, r"a.tar: b: json has no integer"), (2, r"a.tar: c: has no label"), (3, r"a.tar: d: label 12 is not in 0 .. 9")]:
        with pytest.raises(DataError, match=message):
            data[i]
    assert [ImageShardsDataset(index, EVAL)[i]["label"] for i in range(4)] == [-1] * 4


def test_patterns(tmp_path: Path) -> None:
    paths = shards(tmp_path, [1, 1, 1])
    assert expand(f"{tmp_path}/s-{{000..002}}.tar", "data.train") == paths
    assert expand(f"{tmp_path}/s-*.tar", "data.train") == paths
    assert expand([paths[2], paths[0]], "data.train") == [paths[2], paths[0]]
    with pytest.raises(
        DataError, match=r"(?s)data.train: 4 of the shards.*s-003.tar: no such file.*s-004.tar.*none-\*.*s-000.tar: named twice"
    ):
        expand([f"{tmp_path}/s-{{000..004}}.tar", f"{tmp_path}/none-*.tar", paths[0]], "data.train")
    with pytest.raises(DataError, match="the list is empty"):
        expand([], "data.val")


def test_damage_is_never_silent(tmp_path: Path) -> None:
    """The cases where webdataset ends a shard early without an error, and the ones where it raises."""
    path = Path(shards(tmp_path, [10])[0])
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    fifth = members[10]  # sample 5's first member; its pax header stands before it
    header = fifth.offset

    def check(data: bytes, message: str) -> None:
        path.write_bytes(data)
        with pytest.raises(DataError, match=message) as error:
            ShardIndex.scan([str(path)])
        assert str(path) in str(error.value)

    check(whole[: fifth.offset_data + 20], "is cut")
    check(whole[:header], "is cut after a/0004")
    check(whole[: header + 300], "cut or damaged after a/0004")
    check(whole[:header] + bytes(512) + whole[header + 512 :], "data behind the end-of-archive marker")
    check(whole[:header] + b"\x07" * 512 + whole[header + 512 :], "no readable header")
    check(b"not a tar" * 200, "not an uncompressed tar archive")
    check(b"", "is empty")
    check(bytes(10240), "holds no samples")
    path.write_bytes(whole)
    assert len(ShardIndex.scan([str(path)])) == 10


def test_names_that_webdataset_would_misread(tmp_path: Path) -> None:
    for files, message in [
        (["img.png", "img.cls", "noextension"], "not KEY.EXTENSION"),
        (["a.png", "b.png", "a.cls"], "do not follow each other"),
        (["a_0.5.png"], r"'a_0' has no image"),
        (["a.cls"], "has no image"),
        (["a.png", "a.jpg"], "has 2 images"),
        (["a.png", "a.PNG"], "occurs twice"),
        ([".png"], "not KEY.EXTENSION"),
    ]:
        path = write(tmp_path / "a.tar", [(f, b"1") for f in files])
        with pytest.raises(DataError, match=message):
            ShardIndex.scan([str(path)])
    other = write(tmp_path / "b.tar", [("x", b"")])
    with pytest.raises(ProblemsError, match="2 problems"):
        ShardIndex.scan([str(path), str(other)])
    ok = write(tmp_path / "c.tar", [("__meta__", b"{}"), ("a.png", b"1"), ("a.txt", b"note")])
    assert len(ShardIndex.scan([str(ok)])) == 1


def stream(paths: list[str], rank: int = 0, world: int = 1, batch: int = 2, buffer: int = 8) -> ImageShardsStream:
    transform = ImageTransform(4)
    return ImageShardsStream(ShardIndex.scan(paths), transform, 10, batch_size=batch, rank=rank, world_size=world, buffer=buffer)


def test_stream_sees_everything_once_and_in_another_order_every_epoch(tmp_path: Path) -> None:
    paths = shards(tmp_path, [4, 6, 5, 5])
    data = stream(paths)
    orders = []
    for epoch in (0, 1, 1):
        data.set_epoch(epoch)
        samples = list(data)
        assert sorted(s["index"] for s in samples) == list(range(20))
        assert all(s["image"][0, 0, 0] == s["index"] and s["label"] == s["index"] % 10 for s in samples)
        orders.append([s["index"] for s in samples])
    assert orders[0] != orders[1] == orders[2]
    assert orders[0] != sorted(orders[0])


def test_stream_gives_all_ranks_and_workers_equal_steps(tmp_path: Path) -> None:
    paths = shards(tmp_path, [9, 1, 5, 2, 2, 4])  # unequal on purpose
    seen = []
    for rank in range(2):
        data = stream(paths, rank, 2, batch=3)
        loader = DataLoader(data, batch_size=3, collate_fn=collate, num_workers=2, persistent_workers=True, drop_last=True)
        epochs = []
        for epoch in range(2):
            data.set_epoch(epoch)
            batches = list(loader)
            assert len(batches) == data.steps == 23 // 6
            assert all(len(b["labels"]) == 3 for b in batches)
            epochs.append([i for b in batches for i in b["indices"].tolist()])
        assert epochs[0] != epochs[1]  # persistent workers learn the epoch
        seen.append(epochs)
    shard_of = ShardIndex.scan(paths).shard_of
    for epoch in range(2):
        assert not {shard_of(i) for i in seen[0][epoch]} & {shard_of(i) for i in seen[1][epoch]}


def test_stream_notices_shards_that_change(tmp_path: Path) -> None:
    paths = shards(tmp_path, [4])
    data = stream(paths, batch=1)
    whole = Path(paths[0]).read_bytes()
    with tarfile.open(paths[0]) as tar:
        cut = tar.getmembers()[4].offset
    Path(paths[0]).write_bytes(whole[:cut])  # webdataset itself ends without an error here
    with pytest.raises(DataError, match="ended 2 samples early"):
        list(data)


def test_fingerprint(tmp_path: Path) -> None:
    paths = shards(tmp_path, [2, 2])
    before = ShardIndex.scan(paths).fingerprint()
    assert ShardIndex.scan(paths[::-1]).fingerprint() != before
    Path(paths[0]).rename(tmp_path / "moved.tar")
    assert ShardIndex.scan([str(tmp_path / "moved.tar"), paths[1]]).fingerprint() != before
    assert np.array_equal(ShardIndex.scan([paths[1]]).starts, [0, 2])
