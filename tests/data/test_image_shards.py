from __future__ import annotations

import io
import json
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from PIL import Image

from srcflow.data.image_shards import ImageShardsDataset
from srcflow.data.shard_index import ShardIndex
from srcflow.data.transforms import ImageTransform
from srcflow.errors import DataError, ProblemsError

from .made_shards import damaged, png, shards, special, write

EVAL = ImageTransform(4)


def test_random_access_agrees_with_webdataset(tmp_path: Path) -> None:
    paths = shards(tmp_path, [3, 5, 1])
    data = ImageShardsDataset(ShardIndex.scan(paths), EVAL, 10)
    assert len(data) == 9

    def opened(source: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:  # webdataset leaves the closing to the garbage collector
        for shard in source:
            with open(shard["url"], "rb") as stream:
                yield {**shard, "stream": stream}

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


def test_damage_is_never_silent(tmp_path: Path) -> None:
    """The cases where webdataset ends a shard early without an error, and the ones where it raises."""
    path = Path(shards(tmp_path, [10])[0])
    whole = path.read_bytes()

    def check(data: bytes, message: str) -> None:
        path.write_bytes(data)
        with pytest.raises(DataError, match=message) as error:
            ShardIndex.scan([str(path)])
        assert str(path) in str(error.value)

    messages = {
        "cut in data": "is cut",
        "cut at a header": "is cut after a/0004",
        "cut in a header": "cut or damaged after a/0004",
        "zeroed header": "data behind the end-of-archive marker",
        "garbage header": "no readable header",
    }
    for kind, content in damaged(path).items():
        check(content, messages[kind])
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


def test_fingerprint(tmp_path: Path) -> None:
    paths = shards(tmp_path, [2, 2])
    before = ShardIndex.scan(paths).fingerprint()
    assert ShardIndex.scan(paths[::-1]).fingerprint() != before
    Path(paths[0]).rename(tmp_path / "moved.tar")
    assert ShardIndex.scan([str(tmp_path / "moved.tar"), paths[1]]).fingerprint() != before
    assert np.array_equal(ShardIndex.scan([paths[1]]).starts, [0, 2])


def test_what_the_system_does_not_read_is_listed(tmp_path: Path) -> None:
    paths = shards(tmp_path, [2])
    (tmp_path / "folder.tar").mkdir()
    with pytest.raises(ProblemsError, match=r"(?s)folder\.tar: cannot be read: .*none\.tar: cannot be read: "):
        ShardIndex.scan([*paths, str(tmp_path / "folder.tar"), str(tmp_path / "none.tar")])


KINDS = [
    (tarfile.LNKTYPE, r"a hard link to a\.png.*--hard-dereference"),
    (tarfile.SYMTYPE, r"a symbolic link to a\.png.*`tar -h`"),
    (tarfile.FIFOTYPE, "a named pipe"),
    (tarfile.CHRTYPE, "a device"),
    (tarfile.BLKTYPE, "a device"),
    (b"Z", "of the unknown kind b'Z'"),
]


@pytest.mark.parametrize(("kind", "message"), KINDS)
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_that_are_no_files_are_errors(kind: bytes, message: str, form: int, tmp_path: Path) -> None:
    path = special(tmp_path / "a.tar", "b.png", kind, form=form)
    with pytest.raises(DataError, match=rf"a\.tar: b\.png is {message}"):
        ShardIndex.scan([str(path)])


def test_folders_and_labels_of_archives_are_no_samples(tmp_path: Path) -> None:
    for number, kind in enumerate((tarfile.DIRTYPE, b"V")):
        path = special(tmp_path / f"{number}.tar", "photos", kind)
        assert len(ShardIndex.scan([str(path)])) == 1


def test_sparse_members_are_errors(tmp_path: Path) -> None:
    with (tmp_path / "b.png").open("wb") as f:
        f.write(png(0))
        f.truncate(1 << 20)
    path = tmp_path / "a.tar"
    subprocess.run(["tar", "--sparse", "-cf", str(path), "-C", str(tmp_path), "b.png"], check=True)
    if path.stat().st_size > 1 << 19:
        pytest.skip("this file system stores no sparse files")
    with pytest.raises(DataError, match=r"a\.tar: b\.png is a sparse file.*without `--sparse`"):
        ShardIndex.scan([str(path)])


@pytest.mark.parametrize(
    ("form", "length"),
    [(tarfile.USTAR_FORMAT, 1), (tarfile.GNU_FORMAT, 1), (tarfile.PAX_FORMAT, 1), (tarfile.GNU_FORMAT, 120), (tarfile.PAX_FORMAT, 120)],
)
def test_names_in_latin_1_are_names(form: int, length: int, tmp_path: Path) -> None:
    """As short and as long names (which have headers of their own)."""
    path, raw = tmp_path / "a.tar", "caf\xe9" * length
    with tarfile.open(path, "w", format=form, encoding="latin-1") as tar:
        for name, data in ((f"{raw}.png", png(7)), (f"{raw}.cls", b"3")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if form == tarfile.PAX_FORMAT:  # as writers that do not convert names have it
                info.pax_headers = {}
                info.name = name.encode("latin-1").decode("utf-8", "surrogateescape")
            tar.addfile(info, io.BytesIO(data))
    index = ShardIndex.scan([str(path)], num_classes=10)
    assert index.keys[0].encode(errors="surrogateescape") == raw.encode("latin-1")
    data = ImageShardsDataset(index, EVAL, 3)
    index.fingerprint()
    with pytest.raises(DataError, match=r"a\.tar: (caf\\xe9)+: label 3 is not in 0 \.\. 2") as error:
        data[0]
    str(error.value).encode()


def test_labels_are_checked_when_the_headers_are_read(tmp_path: Path) -> None:
    files = [("a.png", png(1)), ("a.cls", b" 1\n"), ("b.png", png(1)), ("b.cls", b"4"), ("c.png", png(1)), ("c.cls", b"-1")]
    files += [("d.png", png(1)), ("d.cls", b"cat"), ("e.png", png(1)), ("f.png", png(1)), ("f.json", b'{"label": 1.0}')]
    files += [("g.png", png(1)), ("g.cls", b"9" * 30), ("h.png", png(1)), ("h.json", b"[" * 100_000)]
    path = str(write(tmp_path / "a.tar", files))
    with pytest.raises(DataError, match="1 shards: 7 labels cannot be used") as error:
        ShardIndex.scan([path], num_classes=4)
    for line in (
        "a.tar: b: label 4 is not in 0 .. 3 (data.num_classes = 4)",
        "a.tar: c: label -1 is not in 0 .. 3",
        "a.tar: d: cls is not an integer",
        "a.tar: e: has no label",
        "a.tar: f: json has no integer",
        "a.tar: g: label 99999",
        "a.tar: h: json has no integer",
    ):
        assert line in str(error.value), line
    assert ShardIndex.scan([path]).labels is None
    good = ShardIndex.scan(shards(tmp_path, [3, 9]), num_classes=10)
    assert good.labels is not None
    assert good.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert ImageShardsDataset(good, EVAL, 10).label_counts() == {0: 2, 1: 2, **dict.fromkeys(range(2, 10), 1)}


def test_a_jpg_beside_another_kind_of_file_is_the_image(tmp_path: Path) -> None:
    """A depth map, say; two of the usual kinds remain an error."""
    tiff = io.BytesIO()
    Image.new("RGB", (4, 4), (9, 0, 0)).save(tiff, "TIFF")
    path = write(tmp_path / "a.tar", [("a.png", png(5)), ("a.tif", tiff.getvalue()), ("b.tif", tiff.getvalue())])
    data = ImageShardsDataset(ShardIndex.scan([str(path)]), EVAL)
    assert [int(data[i]["image"][0, 0, 0]) for i in range(2)] == [5, 9]
