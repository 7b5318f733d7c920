"""What all datamodules share: splits, loaders, keyed order, one report of everything that is wrong with the data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol, cast, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import Dataset

from srcflow.data.batches import BadSamples, as_batch, as_training_batch
from srcflow.data.rules import Rule, Rules, rules_of
from srcflow.data.sampler import KeyedSampler
from srcflow.data.shard_labels import without_samples
from srcflow.data.workers import SteadyLoader, worker_start
from srcflow.errors import ConfigError, Problems
from srcflow.types import Batch

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class Source(Protocol):
    """What a datamodule needs of a data set."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """A sample's name."""


@runtime_checkable
class Resumable(Protocol):
    """A training loader whose position is in a checkpoint."""

    def state_dict(self) -> dict[str, int]:
        """The position: the same on every rank."""

    def rewound(self, batches: int) -> dict[str, int]:
        """`state_dict` as it was some batches ago, in the same epoch."""

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go to a position."""


class TrainingLoader(SteadyLoader[Batch]):
    """Endless epochs of complete batches, of which each `iter` yields what is left of the present one.

    The position moves on with every batch that is handed out, and into the next epoch with the last one (Lightning asks for no more then).
    `state_dict` holds it, so that a run that goes on from a checkpoint gets the very next batch: what was seen is neither read nor decoded.
    It is the same on every rank, and it counts samples, not batches, so that it also means something to another number of ranks.

    Without a `KeyedSampler` (Lightning's `overfit_batches` puts another one in its place) it is a plain DataLoader. Samples that do not
    decode are counted and replaced (`BadSamples`).

    Args:
        args: those of DataLoader.
        kwargs: those of DataLoader; `drop_last` is wanted.
    """

    _end = 0  # where the present epoch ends
    _bad: BadSamples | None = None

    @property
    def bad(self) -> BadSamples:
        """What did not decode; none may, unless this is set."""
        self._bad = self._bad or BadSamples(0.0)
        return self._bad

    @bad.setter
    def bad(self, bad: BadSamples) -> None:
        self._bad = bad

    @property
    def position(self) -> KeyedSampler | None:
        """What holds the position."""
        return self.sampler if isinstance(self.sampler, KeyedSampler) else None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # a generator: it starts at the first batch, when the epoch is known
        items, position, size = super().__iter__, self.position, cast(int, self.batch_size)
        if position is None:
            for item in items():
                yield self._mended(item, 0, len(self) * size)
            return
        epoch, start = position.epoch, position.start
        last = (len(position) - start) // size - 1
        self._end = start + (last + 1) * size
        for i, item in enumerate(items()):
            if i == last:
                position.set_epoch(epoch + 1)
            else:
                position.start = start + (i + 1) * size
            yield self._mended(item, epoch, self._end)

    def _mended(self, item: Any, epoch: int, samples: int) -> Batch:
        batch, bad = (item, []) if isinstance(item, dict) else item
        return self.bad.mend(cast(Batch, batch), bad, epoch=epoch, samples=samples)

    def state_dict(self) -> dict[str, int]:
        """The position: `epoch`, and `done`, how many samples of it all ranks have been given."""
        position = self.position
        return {} if position is None else {"epoch": position.epoch, "done": position.start * position.world_size}

    def rewound(self, batches: int) -> dict[str, int]:
        """`state_dict` as it was some batches ago, in the same epoch."""
        position = self.position
        if position is None or batches == 0:
            return self.state_dict()
        over = position.start == 0  # the epoch's last batch was handed out
        start = (self._end if over else position.start) - batches * cast(int, self.batch_size)
        return {"epoch": position.epoch - over, "done": start * position.world_size}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go to a position."""
        position = self.position
        if position is not None and state_dict:
            position.set_epoch(state_dict["epoch"])
            position.start = state_dict["done"] // position.world_size


class DataModule(L.LightningDataModule, ABC):
    """Train, validation and test data as `types.Batch`es. A subclass implements `open` and `describe`.

    Training batches are shuffled, in another order every epoch, and complete (a remainder is dropped, another one in each epoch).
    Evaluation yields every sample exactly once: ranks get equally many batches, and what fills the last ones is marked as not `valid`.
    `predict` runs over the test data. A subclass declares which of its options may change between two starts of one run, at least where the
    data are (`srcflow.cli.run_identity`).

    Attributes:
        num_classes: labels are 0 .. num_classes - 1; 0: no labels, all are -1.
        rules: what becomes of the keys that samples hold besides the package's own, in addition to the `rules` of the data set that makes
            them and before these.

    Args:
        batch_size: per rank.
        num_workers: loader processes per rank.
        num_classes: 0 for data without labels.
        seed: key of the order, crops and flips.
        max_bad_fraction: how many of an epoch's training samples may fail to decode before the run stops.

    Raises:
        ConfigError: sizes that cannot be.
    """

    num_classes: int
    rules: Mapping[str, Rule] = MappingProxyType({})
    place_key = "data.{}"  # configuration key of a split's place, for messages
    start_method: str | None = None  # of the workers
    free_options: ClassVar[frozenset[str]] = frozenset({"batch_size", "num_workers", "max_bad_fraction"})  # the global batch counts

    def __init__(self, *, batch_size: int, num_workers: int, num_classes: int, seed: int, max_bad_fraction: float = 0.0) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("num_workers", num_workers, 0), ("num_classes", num_classes, 0)):
            if value < least:
                raise ConfigError(f"data.{name}", value, f"must be at least {least}.")
        if not 0 <= max_bad_fraction <= 1:
            raise ConfigError("data.max_bad_fraction", max_bad_fraction, "must be between 0 and 1.")
        self.batch_size, self.num_workers, self.num_classes, self.seed = batch_size, num_workers, num_classes, seed
        self.max_bad_fraction = max_bad_fraction
        self._opened: dict[tuple[Split, bool], Any] = {}

    @abstractmethod
    def open(self, split: Split, training: bool) -> Dataset[Any]:
        """Open a split whose place is configured.

        Args:
            split: which.
            training: with the training transform, or as evaluation sees it.

        Raises:
            SrcflowError: it cannot be used.
        """

    @abstractmethod
    def describe(self, split: Split) -> dict[str, Any]:
        """JSON-able identity of a configured split: data and transform."""

    @abstractmethod
    def place(self, split: Split) -> Any:
        """The configured place of a split, or None."""

    def dataset(self, split: Split, *, training: bool = False) -> Any:
        """A split's map-style data set (it also has `key(index)`).

        Args:
            split: "train", "val" or "test".
            training: with the training transform, or as evaluation sees it.

        Raises:
            ConfigError: no such split, or none configured.
            DataError: it cannot be used.
        """
        if split not in SPLITS:
            raise ConfigError("split", split, "no such split.", f"Known: {', '.join(SPLITS)}.")
        if self.place(split) is None:
            raise ConfigError(self.place_key.format(split), None, "is needed here.", "Name the place of the data.")
        if (split, training) not in self._opened:
            data = self.open(split, training)
            self.rules_for(data)  # refuses what cannot be, before a batch is made
            self._opened[split, training] = data
        return self._opened[split, training]

    def rules_for(self, data: Any) -> Rules:
        """The rules by which a data set's samples become batches: its own, and this datamodule's.

        Args:
            data: from `dataset`.

        Raises:
            ConfigError: they cannot be; names the key.
        """
        return rules_of(data, self.rules)

    def setup(self, stage: str | None = None) -> None:
        """Open what a stage needs, and report every problem at once.

        Args:
            stage: fit, validate, test, predict, or None for every configured split.
        """
        needed: dict[str, tuple[Split, ...]] = {"fit": ("train",), "validate": ("val",), "test": ("test",), "predict": ("test",)}
        splits = needed[stage] if stage else tuple(s for s in SPLITS if self.place(s) is not None)
        if stage == "fit" and self.place("val") is not None:
            splits += ("val",)
        problems = Problems()
        for split in splits:
            with problems.collect():
                self.dataset(split, training=split == "train")
        if stage == "fit" and ("train", True) in self._opened:
            with problems.collect():
                self.check_training(len(self.dataset("train", training=True)), self.share()[1])
        problems.raise_if_any()
        if stage == "fit" and self.num_classes:
            counts = self.label_counts()
            never = "" if counts is None else without_samples(counts, self.num_classes)
            if counts is not None and never:
                rank_zero_warn(
                    f"the training data have no sample of {self.num_classes - len(counts)} of the {self.num_classes} classes: {never}. "
                    "They would not be trained, but sampled. Is data.num_classes right?"
                )

    def label_counts(self) -> Mapping[int, int] | None:
        """How many training samples have which label; None where that is known only after reading them."""
        count = getattr(self.dataset("train", training=True), "label_counts", None)
        return None if count is None else cast(Mapping[int, int] | None, count())

    def check_training(self, samples: int, world_size: int) -> None:
        """Whether training can be fed.

        Args:
            samples: of the training set.
            world_size: ranks.

        Raises:
            ConfigError: it cannot.
        """
        if samples < self.batch_size * world_size:
            problem = f"{samples} training samples give no complete batch on {world_size} ranks."
            raise ConfigError("data.batch_size", self.batch_size, problem, "Make it smaller.")

    def share(self) -> tuple[int, int]:
        """(rank, number of ranks) that share the data, as the trainer's strategy says; (0, 1) without a trainer."""
        if self.trainer is None:
            return 0, 1
        kwargs = self.trainer.distributed_sampler_kwargs or {"rank": 0, "num_replicas": 1}
        return int(kwargs["rank"]), int(kwargs["num_replicas"])

    def loader(self, split: Split, *, training: bool = False, limit: int | None = None, batch_size: int | None = None) -> Any:
        """A loader of `Batch`es.

        Args:
            split: "train", "val" or "test".
            training: shuffled and augmented; otherwise each sample once, in order.
            limit: the first samples only.
            batch_size: another one than the configured.
        """
        data = self.dataset(split, training=training)
        rank, world = self.share()
        options: dict[str, Any] = {
            "batch_size": batch_size or self.batch_size,
            "sampler": KeyedSampler(data, shuffle=training, seed=self.seed, rank=rank, world_size=world, limit=limit),
            "drop_last": training,
            "pin_memory": torch.cuda.is_available(),
            **worker_options(self.num_workers, self.start_method),
        }
        rules = self.rules_for(data)
        if not training:
            return SteadyLoader(data, collate_fn=partial(as_batch, rules=rules), **options)
        loader = TrainingLoader(data, collate_fn=partial(as_training_batch, rules=rules), **options)
        loader.bad = BadSamples(self.max_bad_fraction, rules)
        return loader

    def train_dataloader(self) -> Any:
        """Shuffled, augmented, complete batches."""
        return self.loader("train", training=True)

    def val_dataloader(self) -> Any:
        """Every validation sample once; nothing where no validation data are configured."""
        return self.loader("val") if self.place("val") is not None else []

    def test_dataloader(self) -> Any:
        """Every test sample once."""
        return self.loader("test")

    def predict_dataloader(self) -> Any:
        """Every test sample once."""
        return self.loader("test")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Pinning turns the grid into a list; it is a tuple again. Lists of strings stay as they are."""
        if isinstance(batch, dict) and "grid" in batch:
            batch["grid"] = tuple(batch["grid"])
        return batch

    def fingerprint(self) -> dict[str, Any]:
        """JSON-able identity of the data in use and of what is done to the pixels: of the splits opened so far, or else of all."""
        opened = {split for split, _ in self._opened}
        used = [s for s in SPLITS if self.place(s) is not None and (s in opened or not opened)]
        return {"class": type(self).__name__, "num_classes": self.num_classes, **{s: self.describe(s) for s in used}}

    def check(self, expected: Mapping[str, Any]) -> None:
        """Refuse data that do not belong to a run; only stored features can disagree with one (see `FeatureStore.check`)."""


def worker_options(num_workers: int, start_method: str | None) -> dict[str, Any]:
    """What a DataLoader is told about its processes.

    Args:
        num_workers: how many.
        start_method: fork, spawn or forkserver; None: the platform's.
    """
    if num_workers == 0:
        return {"num_workers": 0}
    return {
        "num_workers": num_workers,
        "persistent_workers": True,
        "multiprocessing_context": start_method,
        "worker_init_fn": worker_start(),
    }
