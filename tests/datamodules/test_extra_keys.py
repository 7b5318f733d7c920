"""Keys that a data set adds to its samples: the same batches whoever makes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from srcflow.data.rules import Drop, Rule
from srcflow.datamodules.image_folder import ImageFolder
from srcflow.errors import ConfigError, DataError

from .extra_keys import RULES, CaptionedFolder, N, made, plain, written

KINDS = ["folder", "map", "stream"]
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning", "ignore:bad sample:UserWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("extras"))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the images do not decode."""
    return written(tmp_path_factory.mktemp("damaged"), bad=(1, 3, 4, 8, 9, 10, 13, 17, 18, 20))


def epochs(kind: str, place: Path, n: int = 2, **options: Any) -> list[dict[str, Any]]:
    loader = made(kind, place, **options).train_dataloader()
    return [plain(batch) for _ in range(n) for batch in loader]


@pytest.mark.parametrize("kind", KINDS)
def test_training_batches_hold_each_samples_own_keys(kind: str, place: Path) -> None:
    found = epochs(kind, place)
    assert len(found) == 2 * (N // 4)
    seen = set()
    for batch in found:
        assert batch["caption"] == [f"image {i}" for i in batch["indices"]]
        assert batch["size"] == [[8 + i, 8] for i in batch["indices"]]
        lengths = [i % 3 for i in batch["indices"]]
        assert batch["real_words"] == [[k < n for k in range(max(lengths))] for n in lengths]
        assert all(row[k] == [-1, -1] for row, n in zip(batch["words"], lengths, strict=True) for k in range(n, max(lengths)))
        assert "note" not in batch
        seen |= {(i, str(row[:n])) for i, row, n in zip(batch["indices"], batch["words"], lengths, strict=True) if n}
    assert len(seen) > N  # drawn anew in the second epoch


@pytest.mark.parametrize("kind", KINDS)
def test_workers_change_nothing(kind: str, place: Path) -> None:
    expected = epochs(kind, place)
    for workers in (1, 2):
        assert epochs(kind, place, num_workers=workers) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_gets_the_next_batch(kind: str, workers: int, place: Path) -> None:
    expected = epochs(kind, place)
    loader = made(kind, place, num_workers=workers).train_dataloader()
    loader.load_state_dict({"epoch": 1, "done": 8})
    assert [plain(batch) for batch in loader] == expected[len(expected) // 2 + 2 :]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_samples_take_all_of_their_replacements_keys(kind: str, damaged: Path) -> None:
    found = epochs(kind, damaged, batch_size=2 if kind == "stream" else 4, max_bad_fraction=1.0)
    for batch in found:
        assert batch["caption"] == [f"image {i}" for i in batch["indices"]]
        assert batch["size"] == [[8 + i, 8] for i in batch["indices"]]
        assert [sum(row) for row in batch["real_words"]] == [i % 3 for i in batch["indices"]]
        assert [image[0][0][0] for image in batch["images"]] == batch["indices"]
    assert epochs(kind, damaged, batch_size=2 if kind == "stream" else 4, max_bad_fraction=1.0, num_workers=2) == found


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["folder", "map", "piped"])
def test_padding_of_an_evaluation_has_keys_too(kind: str, workers: int, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = made("stream" if kind == "piped" else kind, place, num_workers=workers)
    if kind == "piped":
        (place / "index.json").unlink(missing_ok=True)
        from srcflow.cli import main

        main(["index", *(str(place / f"train-{i}.tar") for i in range(3))])
        data.places["val"] = f"pipe:cat {place}/train-{{0..2}}.tar"  # type: ignore[attr-defined]
        data.index = str(place / "index.json")  # type: ignore[attr-defined]
    captions, padded = [], 0
    for rank in range(2):
        monkeypatch.setattr(data, "share", lambda rank=rank: (rank, 2))
        for batch in map(plain, data.loader("val")):
            assert batch["caption"] == [f"image {i}" for i in batch["indices"]]
            captions += [c for c, valid in zip(batch["caption"], batch["valid"], strict=True) if valid]
            padded += batch["valid"].count(False)
    assert sorted(captions) == sorted(f"image {i}" for i in range(N))
    assert padded > 0


def test_a_datamodule_has_the_last_word(place: Path) -> None:
    class Fewer(CaptionedFolder):
        rules: Mapping[str, Rule] = {"words": Drop(), "caption": Drop()}

    batch = next(iter(Fewer(str(place / "folder"), size=8, batch_size=4).train_dataloader()))
    assert set(batch) == {"images", "labels", "indices", "valid", "flipped", "size"}


class Undeclared(CaptionedFolder):
    """Rules for all keys but one."""

    def open(self, split: Any, training: bool) -> Any:
        data = super().open(split, training)
        data.rules = {k: v for k, v in RULES.items() if k != "caption"}
        return data


@pytest.mark.parametrize("workers", [0, 1])
def test_a_key_without_a_rule_ends_the_run_and_says_the_cure(workers: int, place: Path) -> None:
    data = Undeclared(str(place / "folder"), str(place / "folder"), size=8, batch_size=4, num_workers=workers)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        with pytest.raises(DataError, match=r"key 'caption' of sample \d+ has no rule") as error:
            next(iter(loader))
        error.value.with_traceback(None)  # whose frames keep workers alive


def test_rules_are_checked_before_a_batch_is_made(place: Path) -> None:
    class Clashing(ImageFolder):
        rules: Mapping[str, Rule] = {"labels": Drop()}

    with pytest.raises(ConfigError, match=r"rules\.labels"):
        Clashing(str(place / "folder"), size=8, batch_size=4).setup("fit")


def test_extras_cannot_be_the_samples_own_keys(place: Path) -> None:
    data = made("folder", place).dataset("train", training=True)
    data.extras = lambda draw, picture: {"label": 3}
    with pytest.raises(DataError, match=r"000.png: extras\(\) gives 'label'"):
        data[0]


def test_lists_survive_the_way_to_a_device(place: Path) -> None:
    """Lightning moves the tensors; torch's pinning keeps strings and rebuilds lists."""
    data = made("folder", place)
    batch = next(iter(data.train_dataloader()))
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved["caption"] == batch["caption"]
    assert isinstance(moved["caption"], list)
    assert {moved[k].device.type for k in ("images", "words", "real_words", "size")} == {"meta"}
    assert data.on_after_batch_transfer(moved, 0)["caption"] == batch["caption"]
    if torch.cuda.is_available():
        assert pin_memory(batch)["caption"] == batch["caption"]


class Captions(L.LightningModule):
    """Remembers the captions it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[str]] = []

    def training_step(self, batch: Any) -> Any:
        assert batch["real_words"].shape == batch["words"].shape[:2]
        self.seen.append(batch["caption"])
        return self.weight * 0

    def validation_step(self, batch: Any) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_through_the_trainer(kind: str, place: Path, tmp_path: Path) -> None:
    model = Captions()
    trainer = L.Trainer(
        accelerator="cpu", devices=1, default_root_dir=tmp_path, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, datamodule=made(kind, place))
    assert model.seen == [batch["caption"] for batch in epochs(kind, place, 1)]
