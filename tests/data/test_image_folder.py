from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from srcflow.data.image_folder import ImageFolderDataset, resolve_classes
from srcflow.data.sampler import Draw
from srcflow.data.transforms import ImageTransform
from srcflow.errors import ConfigError, DataError

EVAL = ImageTransform(8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for label, name in enumerate(["ant", "bee"]):
        for i in range(3):
            path = tmp_path / "set" / name / ("deep" if i == 2 else "") / f"{i}.{'JPG' if i else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (10, 9), (label * 100, i * 10, 0)).save(path)
    (tmp_path / "set" / "bee" / "notes.txt").write_text("x")
    (tmp_path / "set" / ".hidden").mkdir()
    return tmp_path / "set"


def test_labels_order_and_content(folder: Path) -> None:
    data = ImageFolderDataset(folder, EVAL, ["ant", "bee"])
    assert [data.key(i) for i in range(len(data))] == [
        "ant/0.png",
        "ant/1.JPG",
        "ant/deep/2.JPG",
        "bee/0.png",
        "bee/1.JPG",
        "bee/deep/2.JPG",
    ]
    assert [data[i]["label"] for i in range(6)] == [0, 0, 0, 1, 1, 1]
    sample = data[Draw(epoch=3, index=3, valid=False)]
    assert sample["index"] == 3
    assert not sample["valid"]
    assert sample["image"][:, 0, 0].tolist() == [100, 0, 0]


def test_without_labels(folder: Path) -> None:
    data = ImageFolderDataset(folder, EVAL)
    assert {data[i]["label"] for i in range(len(data))} == {-1}
    flat = ImageFolderDataset(folder / "ant", EVAL)
    assert len(flat) == 3


def test_labels_follow_the_given_classes(folder: Path) -> None:
    data = ImageFolderDataset(folder, EVAL, ["aphid", "ant", "bee"])
    assert [data[i]["label"] for i in range(6)] == [1, 1, 1, 2, 2, 2]
    with pytest.raises(DataError, match="classes bee"):
        ImageFolderDataset(folder, EVAL, ["ant", "wasp"])


def test_number_of_classes_is_checked(folder: Path) -> None:
    assert resolve_classes([folder], 0) is None
    assert resolve_classes([folder], 2) == ["ant", "bee"]
    with pytest.raises(ConfigError, match=r"data.num_classes = 10.*2 class folders.*num_classes: 2"):
        resolve_classes([folder], 10)
    with pytest.raises(ConfigError, match=r"no class folders.*num_classes: 0"):
        resolve_classes([folder / "ant" / "deep"], 10)


def test_problems_are_named(folder: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        ImageFolderDataset(folder / "none", EVAL)
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="no image"):
        ImageFolderDataset(folder / "empty", EVAL)
    (folder / "empty").rmdir()
    (folder / "stray.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"stray.png lies beside"):
        ImageFolderDataset(folder, EVAL, ["ant", "bee"])
    with pytest.raises(DataError, match=r"stray.png: cannot be decoded"):
        ImageFolderDataset(folder, EVAL)[6]


def test_fingerprint_follows_the_content(folder: Path) -> None:
    before = ImageFolderDataset(folder, EVAL).fingerprint()
    assert before == ImageFolderDataset(folder, ImageTransform(4)).fingerprint()
    (folder / "ant" / "0.png").rename(folder / "ant" / "00.png")
    assert before != ImageFolderDataset(folder, EVAL).fingerprint()


def test_links_to_nothing_are_all_named(folder: Path) -> None:
    inside = next(d for d in sorted(folder.iterdir()) if d.is_dir() and not d.name.startswith("."))
    for name in ("lost.png", "gone.jpg"):
        (inside / name).symlink_to("nowhere")
    with pytest.raises(DataError, match="2 files or folders cannot be read") as error:
        ImageFolderDataset(folder, ImageTransform(8))
    assert all(name in str(error.value) for name in ("lost.png", "gone.jpg"))
