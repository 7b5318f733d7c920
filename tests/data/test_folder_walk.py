"""Which files of a folder count, for the data set and for the tool that makes shards: one rule, and nothing is lost in silence."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from srcflow.data.folder_walk import class_names, walk
from srcflow.data.image_folder import ImageFolderDataset, resolve_classes
from srcflow.data.image_shards import ImageShardsDataset
from srcflow.data.shard_index import ShardIndex
from srcflow.data.shard_sources import expand
from srcflow.data.transforms import ImageTransform
from srcflow.errors import DataError

EVAL = ImageTransform(4)
LATIN = b"caf\xe9".decode(errors="surrogateescape")


def image(path: Path, red: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix.lower().replace(".jfif", ".jpg")
    Image.new("RGB", (5, 4), (red, 0, 0)).save(path, Image.registered_extensions()[kind])
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(3):
        image(tmp_path / "photos" / "ant" / f"{i}.png", i)
        image(tmp_path / "photos" / "bee" / f"{i}.png", 10 + i)
    return tmp_path / "photos"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    monkeypatch.delitem(sys.modules, "make_shards", raising=False)
    return importlib.import_module("make_shards")


def as_set(folder: Path) -> list[tuple[bytes, int]]:
    """What the data set holds: contents and labels."""
    data = ImageFolderDataset(folder, EVAL, class_names(folder))
    return sorted(data.read(i) for i in range(len(data)))


def as_shards(tool: ModuleType, folder: Path, out: Path) -> list[tuple[bytes, int]]:
    """What the tool makes of it."""
    assert tool.main(["--folder", str(folder), "--out", str(out)]) == 0
    data = ImageShardsDataset(ShardIndex.scan(expand(f"{out}/train-*.tar", "x")), EVAL, 99)
    return sorted(data.read(i) for i in range(len(data)))


def test_links_are_followed_by_both(folder: Path, tool: ModuleType, tmp_path: Path) -> None:
    for i in range(4):
        image(tmp_path / "disk" / "deep" / f"{i}.png", 50 + i)
    (folder / "ant" / "more").symlink_to(tmp_path / "disk")
    (folder / "cat").symlink_to(tmp_path / "disk" / "deep")
    (folder / "bee" / "one.png").symlink_to(tmp_path / "disk" / "deep" / "0.png")
    found = as_set(folder)
    assert [label for _, label in found].count(0) == 3 + 4
    assert [label for _, label in found].count(1) == 3 + 1
    assert [label for _, label in found].count(2) == 4
    assert as_shards(tool, folder, tmp_path / "out") == found


def test_what_cannot_be_read_is_one_error_of_both(
    folder: Path, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Links to nothing, be they of an image, of a folder or of neither; links in a circle, direct and through another; a pipe."""
    (folder / "ant" / "lost.png").symlink_to(tmp_path / "gone.png")
    (folder / "ant" / "album").symlink_to(tmp_path / "unmounted")
    (folder / "ant" / "again").symlink_to(folder)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "back").symlink_to(folder / "bee")
    (folder / "bee" / "there").symlink_to(tmp_path / "other")
    os.mkfifo(folder / "bee" / "pipe.png")
    with pytest.raises(DataError, match="5 files or folders cannot be read") as error:
        walk(folder)
    for line in (
        "lost.png",
        "album",
        "ant/again: is a link to a folder that it is in",
        "bee/there/back: is a link",
        "pipe.png: is neither",
    ):
        assert line in str(error.value)
    with pytest.raises(DataError, match="5 files or folders"):
        ImageFolderDataset(folder, EVAL)
    with pytest.raises(SystemExit):
        tool.main(["--folder", str(folder), "--out", str(tmp_path / "out")])
    assert "5 files or folders cannot be read" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_systems_leave_behind_is_counted_and_left_out_by_both(
    folder: Path, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = as_set(folder)
    image(folder / "ant" / ".ipynb_checkpoints" / "0-checkpoint.png")
    image(folder / "@eaDir" / "ant" / "0.png")
    image(folder / "__MACOSX" / "ant" / "0.png")
    (folder / "lost+found").mkdir()
    for name in ("._0.png", "Thumbs.db", "desktop.ini", ".DS_Store"):
        (folder / "ant" / name).write_bytes(b"\0\5\x16\7")
    (folder / "bee" / "notes.txt").write_text("x")
    (folder / "bee" / "README").write_text("x")
    assert resolve_classes([folder], 2) == ["ant", "bee"]
    assert as_set(folder) == expected
    unused = ImageFolderDataset(folder, EVAL).unused
    assert "2 files of other kinds (1 without an ending, 1 .txt), e.g. bee/README" in unused
    assert "8 hidden or system entries" in unused
    assert "\n" not in unused
    capsys.readouterr()
    assert as_shards(tool, folder, tmp_path / "out") == expected
    assert unused in capsys.readouterr().err


def test_a_class_without_images_is_an_error_of_both(
    folder: Path, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "cow").mkdir()
    (folder / "dog").mkdir()
    (folder / "dog" / ".hidden.png").write_bytes(b"x")
    for name in ("1.xcf", "2.xcf", "a.heic"):
        (folder / "dog" / name).write_bytes(b"x")
    message = r"2 of 4 class folders have no images: cow \(nothing in it\), dog \(2 \.xcf, 1 \.heic, 1 hidden\)"
    with pytest.raises(DataError, match=message):
        ImageFolderDataset(folder, EVAL, class_names(folder))
    for number in (2, 3):  # never the cure to count them in
        with pytest.raises(DataError, match=message):
            resolve_classes([folder], number)
    assert len(ImageFolderDataset(folder, EVAL)) == 6  # without labels there are no classes
    with pytest.raises(SystemExit):
        tool.main(["--folder", str(folder), "--out", str(tmp_path / "out")])
    assert "cow (nothing in it)" in capsys.readouterr().err


def test_images_beside_class_folders_are_an_error_of_both(folder: Path, tool: ModuleType, tmp_path: Path) -> None:
    image(folder / "stray.png")
    with pytest.raises(DataError, match=r"stray\.png lies beside the class folders"):
        ImageFolderDataset(folder, EVAL, ["ant", "bee"])
    with pytest.raises(SystemExit):
        tool.main(["--folder", str(folder), "--out", str(tmp_path / "out")])


def test_every_kind_of_image_that_pillow_reads(folder: Path, tool: ModuleType, tmp_path: Path) -> None:
    for i, kind in enumerate(("bmp", "TIF", "tiff", "gif", "jfif", "webp", "ppm")):
        image(folder / "cow" / f"{i}.{kind}", 100)
    found = as_set(folder)
    assert [label for _, label in found].count(2) == 7
    assert as_shards(tool, folder, tmp_path / "out") == found
    data = ImageFolderDataset(folder / "cow", EVAL)
    assert all(abs(int(data[i]["image"][0].float().mean()) - 100) < 6 for i in range(7))


def test_names_that_are_not_utf8(folder: Path, tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files and class folders named in Latin-1, as old cameras and archives have it."""
    image(folder / "ant" / f"{LATIN}.png", 77)
    image(folder / LATIN / "0.png", 78)
    found = as_set(folder)
    assert sorted(label for _, label in found) == [0, 0, 0, 0, 1, 1, 1, 2]
    data = ImageFolderDataset(folder, EVAL, class_names(folder))
    names = [data.key(i) for i in range(8)]
    assert f"ant/{LATIN}.png" in names
    assert f"{LATIN}/0.png" in names
    assert data[names.index(f"{LATIN}/0.png")]["label"] == 2
    assert data.fingerprint() != ImageFolderDataset(folder, EVAL).fingerprint()
    assert as_shards(tool, folder, tmp_path / "out") == found
    (folder / LATIN / "1.png").write_bytes(b"no image")
    broken = ImageFolderDataset(folder, EVAL)
    with pytest.raises(DataError, match=r"caf\\xe9/1\.png: cannot be decoded") as error:
        broken[names.index(f"{LATIN}/0.png") + 1]
    str(error.value).encode()
    assert tool.main(["--folder", str(folder), "--out", str(tmp_path / "second")]) == 1
    assert r"caf\xe9/1.png: cannot be decoded" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"the classes caf\\xe9 \(1 in all\)"):
        ImageFolderDataset(folder, EVAL, ["ant", "bee"])


def test_a_class_of_another_split_only_is_refused_and_a_missing_one_is_not(folder: Path, tmp_path: Path) -> None:
    image(tmp_path / "val" / "bee" / "0.png")
    assert ImageFolderDataset(tmp_path / "val", EVAL, ["ant", "bee"]).labels == [1]
    image(tmp_path / "val" / "wasp" / "0.png")
    with pytest.raises(DataError, match="the classes wasp"):
        ImageFolderDataset(tmp_path / "val", EVAL, ["ant", "bee"])
