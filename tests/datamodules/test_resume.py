"""A training loader goes on with the very next batch."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor

from srcflow.data import image_folder
from srcflow.data.feature_store import FeatureStoreWriter
from srcflow.datamodules.base import DataModule, Resumable, TrainingLoader, as_batch
from srcflow.datamodules.feature_store import FeatureStore
from srcflow.datamodules.image_folder import ImageFolder
from srcflow.datamodules.image_shards import ImageShards
from srcflow.errors import ConfigError
from srcflow.types import Batch

N, SIZE, STEPS = 22, 4, 5  # two samples of each epoch are left out
KINDS = ["folder", "map", "store", "stream"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as a folder, as shards and as a store."""
    root = tmp_path_factory.mktemp("resume")
    (root / "folder").mkdir()
    for shard, numbers in enumerate([range(9), range(9, 12), range(12, N)]):
        with wds.TarWriter(str(root / f"train-{shard}.tar")) as writer:
            for i in numbers:
                image = Image.new("RGB", (9, 8), (i, 0, 0))
                image.putpixel((0, 0), (255, 0, 0))  # mirrored images differ
                image.save(root / "folder" / f"{i:03d}.png")
                writer.write({"__key__": f"{i:03d}", "png": image})
    facts: dict[str, Any] = {"grid": (1, 1), "encoder": {}}
    with FeatureStoreWriter(root / "store", n=N, tokens=1, dim=1, image_size=(8, 8), manifest=facts) as store:
        images = torch.arange(N, dtype=torch.uint8).reshape(N, 1, 1, 1).expand(N, 3, 8, 8)
        store.write(torch.arange(N), torch.arange(N).float()[:, None, None], images, torch.full((N,), -1), [str(i) for i in range(N)])
    return root


def make(kind: str, place: Path, **options: Any) -> DataModule:
    options = {"batch_size": SIZE, **options}
    if kind == "store":
        return FeatureStore(str(place / "store"), **options)
    if kind == "folder":
        return ImageFolder(str(place / "folder"), size=8, flip=True, **options)
    if kind == "stream":
        options = {"mode": "stream", "shuffle_buffer": 6, **options}
    return ImageShards(str(place / "train-{0..2}.tar"), size=8, flip=True, **options)


def content(batch: Batch) -> tuple[list[int], bytes]:
    return batch["indices"].tolist(), batch["images"].numpy().tobytes()


def take(loader: Any, n: int) -> list[tuple[list[int], bytes]]:
    """The next n batches as Lightning takes them: no iterator is asked for more than its length."""
    got: list[tuple[list[int], bytes]] = []
    while len(got) < n:
        batches = iter(loader)
        for _ in range(min(n - len(got), STEPS - loader.state_dict()["done"] // SIZE)):
            got.append(content(next(batches)))
    return got


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_next_batch_follows_wherever_it_stopped(kind: str, workers: int, place: Path) -> None:
    straight = take(make(kind, place).train_dataloader(), 3 * STEPS)
    assert len({repr(s) for s in straight}) == 3 * STEPS
    for stop in range(1, 2 * STEPS + 1) if workers == 0 else (3, STEPS):
        before = make(kind, place, num_workers=workers).train_dataloader()
        assert take(before, stop) == straight[:stop]
        state = before.state_dict()
        assert state == {"epoch": stop // STEPS, "done": stop % STEPS * SIZE}
        after = make(kind, place, num_workers=workers).train_dataloader()
        after.load_state_dict(state)
        assert len(after) == STEPS
        assert take(after, 3 * STEPS - stop) == straight[stop:]


def test_workers_need_not_be_persistent(place: Path) -> None:
    straight = take(make("map", place).train_dataloader(), 2 * STEPS)
    persistent = make("map", place, num_workers=1).train_dataloader()
    loader = TrainingLoader(
        persistent.dataset, sampler=persistent.sampler, batch_size=SIZE, num_workers=1, collate_fn=as_batch, drop_last=True
    )
    loader.load_state_dict({"epoch": 0, "done": 2 * SIZE})
    assert take(loader, 2 * STEPS - 2) == straight[2:]


def test_what_was_seen_is_not_read_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make("folder", place).train_dataloader()
    loader.load_state_dict({"epoch": 1, "done": 3 * SIZE})
    reads: list[int] = []
    read = image_folder.ImageFolderDataset.read

    def counted(self: image_folder.ImageFolderDataset, i: int) -> tuple[bytes, int]:
        reads.append(i)
        return read(self, i)

    monkeypatch.setattr(image_folder.ImageFolderDataset, "read", counted)
    assert reads == [i for indices, _ in take(loader, 2) for i in indices]
    assert len(reads) == 2 * SIZE


def test_an_epoch_that_ended_early_is_not_finished_later(place: Path) -> None:
    loader, other = make("map", place).train_dataloader(), make("map", place).train_dataloader()
    take(loader, 3)
    loader.position.set_epoch(0)  # where it is
    assert loader.state_dict() == {"epoch": 0, "done": 3 * SIZE}
    loader.position.set_epoch(1)
    other.load_state_dict({"epoch": 1, "done": 0})
    assert take(loader, STEPS) == take(other, STEPS)


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_ranks_share_one_position(kind: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the batch on two ranks goes on with the samples of the whole batch on one."""
    one = make(kind, place).train_dataloader()
    take(one, 2)
    ranks = []
    for rank in range(2):
        data = make(kind, place, batch_size=SIZE // 2)
        monkeypatch.setattr(data, "share", lambda rank=rank: (rank, 2))
        loader = data.train_dataloader()
        loader.load_state_dict(one.state_dict())
        ranks.append([batch["indices"].tolist() for batch in loader])
        assert loader.state_dict() == {"epoch": 1, "done": 0}
    rest = [sorted(indices) for indices, _ in take(one, STEPS - 2)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == rest


@pytest.mark.parametrize("kind", KINDS)
def test_a_position_can_be_taken_back(kind: str, place: Path) -> None:
    loader = make(kind, place).train_dataloader()
    assert isinstance(loader, Resumable)
    for given in range(2 * STEPS):
        take(loader, 1)
        epoch, before = divmod(given, STEPS)
        assert loader.rewound(0) == loader.state_dict()
        back = [loader.rewound(k) for k in range(1, before + 2)]
        assert back == [{"epoch": epoch, "done": done * SIZE} for done in range(before, -1, -1)]


def test_behind_the_end_of_another_batch_size_the_epoch_has_nothing_left(place: Path) -> None:
    loader = make("stream", place, batch_size=11).train_dataloader()
    straight = [content(b) for _ in range(3) for b in loader]
    loader.load_state_dict({"epoch": 1, "done": 33})
    assert loader.state_dict() == {"epoch": 1, "done": 22}
    loader.sampler.set_epoch(1)  # as Lightning does before each epoch
    assert list(loader) == []
    loader.sampler.set_epoch(2)
    assert loader.state_dict() == {"epoch": 2, "done": 0}
    assert [content(b) for b in loader] == straight[4:]


class Recorder(L.LightningModule):
    """Remembers what it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[list[int], bytes]] = []

    def training_step(self, batch: Batch) -> Tensor:
        self.seen.append(content(batch))
        return self.weight * 0

    def validation_step(self, batch: Batch) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Save(L.Callback):
    """A checkpoint after some steps; it goes on."""

    def __init__(self, at: dict[int, Path]) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step in self.at:
            trainer.save_checkpoint(self.at[trainer.global_step])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_through_the_trainer(kind: str, workers: int, place: Path, tmp_path: Path) -> None:
    def run(callbacks: list[L.Callback], ckpt: Path | None = None, **options: Any) -> list[tuple[list[int], bytes]]:
        model = Recorder()
        quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        length = options or {"max_steps": 13}
        trainer = L.Trainer(
            accelerator="cpu", devices=1, default_root_dir=tmp_path, enable_model_summary=False, limit_val_batches=0, callbacks=callbacks,
            **quiet, **length,
        )  # fmt: skip
        trainer.fit(model, datamodule=make(kind, place, num_workers=workers), ckpt_path=ckpt, weights_only=True)
        return model.seen

    points = {k: tmp_path / f"{k}.ckpt" for k in (1, STEPS, STEPS + 3, 2 * STEPS)}
    straight = run([Save(points)])
    assert len(straight) == 13
    for k, path in points.items() if workers == 0 else ((STEPS + 3, points[STEPS + 3]),):
        assert run([], path) == straight[k:], k
    assert run([], points[STEPS + 3], max_epochs=2) == straight[STEPS + 3 : 2 * STEPS]
    assert not multiprocessing.active_children()  # Lightning ends the workers


@pytest.mark.filterwarnings("ignore:You requested to overfit:UserWarning")
def test_overfitting_on_a_few_batches_still_works(place: Path, tmp_path: Path) -> None:
    model = Recorder()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, default_root_dir=tmp_path, max_epochs=2, overfit_batches=2, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    data = make("map", place)
    data.val_dataloader = lambda: [1]  # type: ignore[method-assign]  # Lightning warns of none
    trainer.fit(model, datamodule=data)
    assert [i for i, _ in model.seen] == 2 * [[0, 1, 2, 3], [4, 5, 6, 7]]
    stream = make("stream", place)
    stream.val_dataloader = lambda: [1]  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match=r"trainer.overfit_batches = 2: a stream"):
        trainer.fit(Recorder(), datamodule=stream)
