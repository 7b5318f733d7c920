from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor

from srcflow.cli import main
from srcflow.data.feature_store import FeatureStoreWriter
from srcflow.datamodules.base import DataModule
from srcflow.datamodules.feature_store import FeatureStore
from srcflow.datamodules.image_folder import ImageFolder
from srcflow.datamodules.image_shards import ImageShards
from srcflow.errors import ArtifactError, ConfigError, DataError, ManifestMismatchError, ProblemsError
from srcflow.types import Batch

SIZES = {"train": 22, "val": 7, "test": 5}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning"),  # Lightning's own call of torch
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),  # tests use none
    pytest.mark.filterwarnings("ignore:.*number of training batches:UserWarning"),  # logging interval, nothing is logged
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same data three times: sample i of a split is plain, of colour i, with label i % 3 in `shards` and `store`."""
    root = tmp_path_factory.mktemp("data")
    for split, n in SIZES.items():
        for i in range(n):
            path = root / "folder" / split / f"class{i % 3}" / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (12, 10), (i, 0, 0)).save(path)
        for shard in range(2):
            with wds.TarWriter(str(root / f"{split}-{shard}.tar")) as writer:
                for i in range(shard, n, 2):
                    writer.write({"__key__": f"{i:03d}", "png": Image.new("RGB", (12, 10), (i, 0, 0)), "cls": i % 3})
        flip = split == "train"
        facts: dict[str, Any] = {"grid": (2, 2), "encoder": {"weights": "w"}}
        with FeatureStoreWriter(root / f"store_{split}", n=n, tokens=4, dim=3, image_size=(8, 8), manifest=facts, flip=flip) as store:
            for mirrored in (False, True) if flip else (False,):
                images = torch.arange(n, dtype=torch.uint8).reshape(n, 1, 1, 1).expand(n, 3, 8, 8)
                store.write(
                    torch.arange(n), torch.zeros(n, 4, 3), images, torch.arange(n) % 3, [str(i) for i in range(n)], mirrored=mirrored
                )
    return root


def make(kind: str, place: Path, **options: Any) -> DataModule:
    options = {"batch_size": 4, "num_classes": 3, **options}
    if kind == "folder":
        return ImageFolder(*(str(place / "folder" / s) for s in SIZES), size=8, flip=True, **options)
    if kind == "store":
        return FeatureStore(*(str(place / f"store_{s}") for s in SIZES), **options)
    return ImageShards(
        *(str(place / f"{s}-{{0..1}}.tar") for s in SIZES), size=8, flip=True, mode="stream" if kind == "stream" else "map", **options
    )


class Recorder(L.LightningModule):
    """Remembers what each loop was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[Batch]] = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch: Batch) -> Tensor:
        self.seen["train"].append(batch)
        return self.weight * 0

    def validation_step(self, batch: Batch) -> None:
        self.seen["val"].append(batch)

    def test_step(self, batch: Batch) -> None:
        self.seen["test"].append(batch)

    def predict_step(self, batch: Batch) -> Tensor:
        self.seen["predict"].append(batch)
        return batch["indices"]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(tmp_path: Path, **options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(default_root_dir=tmp_path, accelerator="cpu", devices=1, num_sanity_val_steps=0, **quiet, **options)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["folder", "map", "stream", "store"])
def test_through_the_trainer(kind: str, workers: int, place: Path, tmp_path: Path) -> None:
    """Three epochs differ in order (with persistent workers too), and evaluation sees each sample once."""
    data, model = make(kind, place, num_workers=workers), Recorder()
    t = trainer(tmp_path, max_epochs=3)
    t.fit(model, datamodule=data)
    t.test(model, datamodule=data, verbose=False)
    t.predict(model, datamodule=data, return_predictions=False)
    rows = 44 if kind == "store" else 22
    steps = rows // 4
    assert len(model.seen["train"]) == 3 * steps
    epochs = [[i for b in model.seen["train"][e * steps : (e + 1) * steps] for i in b["indices"].tolist()] for e in range(3)]
    assert len({tuple(e) for e in epochs}) == 3
    for epoch in epochs:
        assert max(epoch) < rows
        assert len(set(epoch)) == len(epoch) == steps * 4
    if kind != "store":
        flips = [
            {
                i: f
                for b in model.seen["train"][e * steps : (e + 1) * steps]
                for i, f in zip(b["indices"].tolist(), b["flipped"].tolist(), strict=True)
            }
            for e in range(3)
        ]
        common = flips[0].keys() & flips[1].keys() & flips[2].keys()
        assert any(len({f[i] for f in flips}) == 2 for i in common)  # the epoch reaches the workers
    for split, batches in (("val", model.seen["val"][:2]), ("test", model.seen["test"]), ("predict", model.seen["predict"])):
        n = SIZES.get(split, SIZES["test"])
        assert [i for b in batches for i in b["indices"][b["valid"]].tolist()] == list(range(n))
        assert not any(bool(b["flipped"].any()) for b in batches)
    for batch in model.seen["train"] + model.seen["test"]:
        assert batch["images"].shape[1:] == (3, 8, 8)
        assert batch["images"].dtype == torch.uint8
        colours = batch["images"][:, 0, 0, 0]
        assert torch.equal(batch["labels"], (colours % 3).long())
        assert kind != "store" or (batch["grid"] == (2, 2) and batch["features"].shape[1:] == (4, 3))


@pytest.mark.parametrize("kind", ["folder", "map", "store"])
def test_workers_and_batch_size_change_nothing(kind: str, place: Path) -> None:
    def training(**options: Any) -> list[tuple[int, bool, bytes]]:
        data = make(kind, place, **options)
        loader = data.loader("train", training=True)
        loader.sampler.set_epoch(4)  # type: ignore[attr-defined]
        return [
            (i, f, p.numpy().tobytes())
            for b in loader
            for i, f, p in zip(b["indices"].tolist(), b["flipped"].tolist(), b["images"], strict=True)
        ]

    assert training(batch_size=2) == training(batch_size=11) == training(batch_size=2, num_workers=2)
    assert training(batch_size=2) != training(batch_size=2, seed=1)


@pytest.mark.parametrize("kind", ["folder", "map", "store"])
def test_the_place_of_the_data_is_no_part_of_the_fingerprint(kind: str, place: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.symlink_to(place)
    assert make(kind, place).fingerprint() == make(kind, moved).fingerprint()
    assert make(kind, place).fingerprint() != make(kind, place, num_classes=0).fingerprint()


def test_a_fit_needs_no_test_data(place: Path) -> None:
    data = ImageFolder(str(place / "folder" / "train"), str(place / "folder" / "val"), str(place / "nowhere"), size=8, batch_size=4)
    data.setup("fit")
    assert set(data.fingerprint()) == {"class", "num_classes", "train", "val"}


def test_without_labels(place: Path) -> None:
    for kind in ("folder", "map", "store"):
        data = make(kind, place, num_classes=0)
        data.setup("fit")
        assert {i for b in data.train_dataloader() for i in b["labels"].tolist()} == {-1}


def test_all_problems_at_once(place: Path) -> None:
    data = ImageShards(str(place / "no-{0..1}.tar"), str(place / "val-9.tar"), num_classes=3)
    with pytest.raises(ProblemsError, match=r"(?s)no-0.tar.*no-1.tar.*val-9.tar"):
        data.setup("fit")
    with pytest.raises(ArtifactError, match="not a feature store"):
        FeatureStore(str(place / "folder")).setup("fit")
    with pytest.raises(ConfigError, match=r"data.num_classes = 7.*3 class folders"):
        make("folder", place, num_classes=7).setup("test")
    with pytest.raises(DataError, match=r"label 2 .*num_classes = 2"):
        make("store", place, num_classes=2).setup("test")


def test_configuration_errors(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.train = None"):
        ImageFolder(size=8).setup("fit")
    with pytest.raises(ConfigError, match=r"data.path_test = None"):
        FeatureStore(str(place / "store_train")).setup("test")
    with pytest.raises(ConfigError, match=r"data.batch_size = 0"):
        ImageFolder(batch_size=0)
    with pytest.raises(ConfigError, match=r"data.batch_size = 100: 22 training samples"):
        make("map", place, batch_size=100).setup("fit")
    with pytest.raises(ConfigError, match=r"2 shards, 1 ranks x 3 workers"):
        make("stream", place, num_workers=3).setup("fit")
    with pytest.raises(ConfigError, match="split = 'training'"):
        make("map", place).dataset("training")  # type: ignore[arg-type]


def test_no_validation_data(place: Path, tmp_path: Path) -> None:
    data, model = ImageFolder(str(place / "folder" / "train"), size=8, num_classes=3, batch_size=4), Recorder()
    with pytest.warns(UserWarning, match="Total length of `list` across ranks is zero"):  # Lightning's word for no validation data
        trainer(tmp_path, max_steps=2).fit(model, datamodule=data)
    assert len(model.seen["train"]) == 2
    assert not model.seen["val"]


def test_stores_must_belong_together(place: Path, tmp_path: Path) -> None:
    facts: dict[str, Any] = {"grid": (2, 2), "encoder": {"weights": "other"}}
    with FeatureStoreWriter(tmp_path / "val", n=1, tokens=4, dim=3, image_size=(8, 8), manifest=facts) as store:
        store.write(
            torch.arange(1), torch.zeros(1, 4, 3), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ["k"]
        )
    with pytest.raises(ManifestMismatchError, match=r"encoder.weights: stored 'other', this run 'w'"):
        FeatureStore(str(place / "store_train"), str(tmp_path / "val"), batch_size=4, num_classes=3).setup("fit")
    data = make("store", place)
    data.check({"encoder": {"weights": "w"}})
    with pytest.raises(ManifestMismatchError, match=r"encoder.weights"):
        data.check({"encoder": {"weights": "v"}})


def test_evaluation_on_several_ranks(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make("map", place)
    ranks = []
    for rank in range(3):
        monkeypatch.setattr(data, "share", lambda rank=rank: (rank, 3))
        ranks.append(list(data.loader("val")))
    assert len({len(r) for r in ranks}) == 1
    assert sorted(i for r in ranks for b in r for i in b["indices"][b["valid"]].tolist()) == list(range(7))
    assert sum(len(b["valid"]) for r in ranks for b in r) == 9


def test_constructors_touch_no_file() -> None:
    ImageFolder("nowhere", num_classes=3)
    ImageShards("nowhere-{0..9}.tar")
    FeatureStore("nowhere")


@pytest.mark.parametrize("kind", ["map", "store"])
def test_classes_that_training_never_sees_are_named(kind: str, place: Path) -> None:
    with pytest.warns(UserWarning, match=r"no sample of 4 of the 7 classes: 3-6\. They would not be trained"):
        make(kind, place, num_classes=7).setup("fit")
    make(kind, place, num_classes=7).setup("test")  # a small test set is nothing to speak of
    make(kind, place).setup("fit")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_label_without_a_class_is_found_before_training(split: str, place: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "late.tar")
    with wds.TarWriter(path) as writer:
        for i in range(8):
            writer.write({"__key__": f"{i:03d}", "png": Image.new("RGB", (8, 8)), "cls": 3 if i == 6 else i % 3})
    splits = {"train": str(place / "train-0.tar"), "val": str(place / "val-0.tar"), split: path}
    data = ImageShards(**splits, size=8, num_classes=3, batch_size=4)
    with pytest.raises(DataError, match=r"late\.tar: 006: label 3 is not in 0 \.\. 2 \(data\.num_classes = 3\)"):
        data.setup("fit")
    ImageShards(**splits, size=8, num_classes=0, batch_size=4).setup("fit")


def test_recorded_labels_of_a_stream_are_checked_before_training(tmp_path: Path) -> None:
    """Of shards that are not read in setup."""
    for shard in range(2):
        with wds.TarWriter(str(tmp_path / f"s-{shard}.tar")) as writer:
            for i in range(4):
                writer.write({"__key__": f"{i:03d}", "png": Image.new("RGB", (8, 8)), "cls": i + shard})
    main(["index", f"{tmp_path}/s-*.tar", "--labels"])
    remote = {"train": f"pipe:cat {tmp_path}/s-{{0..1}}.tar", "index": str(tmp_path / "index.json")}
    for places in ({"train": f"{tmp_path}/s-*.tar"}, remote):
        data = ImageShards(**places, size=8, num_classes=4, batch_size=4, mode="stream")
        with pytest.raises(DataError, match=r"s-1\.tar: by its index: label 4 is not in 0 \.\. 3"):
            data.setup("fit")
        with pytest.warns(UserWarning, match=r"no sample of 2 of the 7 classes: 5-6\."):
            ImageShards(**places, size=8, num_classes=7, batch_size=4, mode="stream").setup("fit")


def test_what_is_not_used_is_said_once(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(place / "folder" / "val", tmp_path / "val")
    (tmp_path / "val" / "class0" / "notes.txt").write_text("x")
    data = ImageFolder(str(tmp_path / "val"), size=8, num_classes=3, batch_size=2)
    with caplog.at_level("INFO"):
        data.setup("fit")
        data.dataset("train")
    assert [r.message for r in caplog.records if "notes.txt" in r.message] == [
        f"{tmp_path}/val: not used: 1 files of other kinds (1 .txt), e.g. class0/notes.txt."
    ]


def test_images_are_upright_unless_told_otherwise(place: Path, tmp_path: Path) -> None:
    """A red left half becomes a red upper one: in a folder and in shards, in training and in evaluation."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGB", (8, 8))
    image.paste((255, 0, 0), (0, 0, 4, 8))
    (tmp_path / "a").mkdir()
    image.save(tmp_path / "a" / "0.png", exif=exif)
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "0", "png": (tmp_path / "a" / "0.png").read_bytes()})
    prints = []
    for options in ({}, {"exif": "ignore"}):
        for data in (
            ImageFolder(str(tmp_path / "a"), test=str(tmp_path / "a"), size=8, batch_size=1, **options),  # type: ignore[arg-type]
            ImageShards(str(tmp_path / "a.tar"), test=str(tmp_path / "a.tar"), size=8, batch_size=1, **options),  # type: ignore[arg-type]
        ):
            for training in (True, False):
                red = data.dataset("train" if training else "test", training=training)[0]["image"][0]
                assert red[1, 6] == (0 if options else 255)
                assert red[6, 1] == (255 if options else 0)
            prints.append(data.fingerprint()["train"])
    assert [p["transform"]["exif"] for p in prints] == ["transpose", "transpose", "ignore", "ignore"]
    assert prints[0] != prints[2]


def test_stores_of_another_orientation_do_not_belong_together(tmp_path: Path) -> None:
    """One that does not say was written when orientation was ignored."""
    for name, transform in (("old", {"size": 8}), ("new", {"size": 8, "exif": "transpose"}), ("plain", {"size": 8, "exif": "ignore"})):
        facts: dict[str, Any] = {"grid": (1, 1), "transform": transform}
        with FeatureStoreWriter(tmp_path / name, n=1, tokens=1, dim=1, image_size=(8, 8), manifest=facts) as store:
            key = b"caf\xe9/0".decode(errors="surrogateescape")
            store.write(
                torch.arange(1), torch.zeros(1, 1, 1), torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), [key]
            )

    def both(train: str, val: str) -> FeatureStore:
        data = FeatureStore(str(tmp_path / train), str(tmp_path / val), batch_size=1)
        data.setup("fit")
        return data

    assert both("old", "plain").dataset("train", training=True).key(0) == b"caf\xe9/0".decode(errors="surrogateescape")
    assert both("old", "plain").fingerprint()["train"]["transform"]["exif"] == "ignore"
    with pytest.raises(ManifestMismatchError, match=r"transform\.exif: stored '(ignore|transpose)', this run '(ignore|transpose)'"):
        both("old", "new")
    old = FeatureStore(str(tmp_path / "old"), batch_size=1)
    old.check({"transform": {"size": 8, "exif": "ignore"}})
    with pytest.raises(ManifestMismatchError, match=r"transform\.exif: stored 'ignore', this run 'transpose'"):
        old.check({"transform": {"size": 8, "exif": "transpose"}})


@pytest.mark.parametrize("training", [True, False])
def test_an_image_of_one_line_is_an_image(training: bool, tmp_path: Path) -> None:
    for i, size in enumerate(((1, 30_000), (30_000, 1))):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.new("RGB", size, (200, 0, 0)).save(tmp_path / "a" / f"{i}.png")
    data = ImageFolder(str(tmp_path / "a"), size=64, crop="random", resize=96, batch_size=1).dataset("train", training=training)
    for i in range(2):
        assert "error" not in data[i]
        assert (data[i]["image"].flatten(1).float().mean(1) == torch.tensor([200.0, 0.0, 0.0])).all()
