"""2N steps are N steps, a stop, and N steps, bit for bit: through the command line, in the middle of an epoch, under accumulation."""

from __future__ import annotations

import csv
import importlib
import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import lightning as L
import pytest
import torch
import yaml
from torch import Tensor

from srcflow import artifacts
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.callbacks.ema import EMA
from srcflow.cli import main
from srcflow.datamodules.image_shards import ImageShards
from srcflow.flows import presets
from srcflow.tasks.autoencoder import AutoencoderTask
from srcflow.tasks.base import Task
from srcflow.tasks.compressor import CompressorTask
from srcflow.tasks.flow import FlowTask
from srcflow.tasks.optimization import Optimization

ROOT = Path(__file__).parents[2]
HALF = 8
BATCHES = 11  # per epoch: under accumulation by 2 its last step has one batch only
pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode:UserWarning"),
    pytest.mark.filterwarnings("ignore:code health:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Experiment logs directory .* exists:UserWarning"),
]


class Killed(Exception):
    """Ends a run where the test wants it."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up shapes: 8 x 11 + 3 training images of 32 pixels, and a codec of pixel patches."""
    root = tmp_path_factory.mktemp("shapes")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        assert importlib.import_module("synthetic").main(["--out", str(root), "--train", str(8 * BATCHES + 3), "--eval", "8"]) == 0
    artifacts.save(root / "codec", PixelPatches(32, 8))
    return root


@pytest.fixture(scope="module")
def streamed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training images in five shards, with an index."""
    root = tmp_path_factory.mktemp("streamed")
    (source,) = data.glob("train-*.tar")
    with tarfile.open(source) as whole:
        files: dict[str, list[tuple[tarfile.TarInfo, bytes]]] = {}
        for member in whole:
            files.setdefault(member.name.partition(".")[0], []).append((member, cast(Any, whole.extractfile(member)).read()))
    for shard in range(5):
        with tarfile.open(root / f"train-{shard}.tar", "w") as part:
            for key in list(files)[shard::5]:
                for member, content in files[key]:
                    part.addfile(member, io.BytesIO(content))
    main(["--debug", "index", f"{root}/train-*.tar"])
    return root


def configuration(data: Path, here: Path, stage: str, model: dict[str, Any], trainer: dict[str, Any], **more: Any) -> list[str]:
    """configs/smoke with other places, a checkpoint every HALF steps, and what the test wants."""
    callbacks = [
        {"class_path": "EMA", "init_args": {"decay": 0.9}},
        {"class_path": "ModelCheckpoint", "init_args": {"dirpath": str(here / "kept"), "every_n_train_steps": HALF, "save_top_k": -1}},
        {"class_path": "LearningRateMonitor"},
    ]
    overlay = {
        "model": {"init_args": {"artifact": None, **model}},
        "data": {
            "init_args": {
                **{split: str(data / f"{split}-*.tar") for split in ("train", "val", "test")},
                "batch_size": 8,
                **more,
            }
        },
        "trainer": {
            "max_steps": 2 * HALF,
            "log_every_n_steps": 1,
            "default_root_dir": str(here),
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(here), "name": "logs"}},
            "callbacks": callbacks,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **trainer,
        },
    }
    here.mkdir(exist_ok=True)
    (here / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    files = [ROOT / "configs/smoke" / f"{stage}.yaml", ROOT / "configs/trainer/cpu.yaml", here / "overlay.yaml"]
    return ["--debug", "fit", *(a for f in files for a in ("--config", str(f)))]


def kept(here: Path, step: int) -> Path:
    """The checkpoint of a step."""
    (found,) = here.glob(f"kept/*step={step}.ckpt")
    return found


def logged(here: Path) -> dict[tuple[int, str], float]:
    """What the runs of a folder logged, by step and name; a value that is logged twice is the same."""
    values: dict[tuple[int, str], float] = {}
    for file in sorted(here.glob("logs/version_*/metrics.csv")):
        for row in csv.DictReader(io.StringIO(file.read_text())):
            for name, text in row.items():
                if text and name not in ("step", "epoch"):
                    value = values.setdefault((int(row["step"]), name), float(text))
                    assert value == float(text), (row["step"], name)
    return values


def differences(a: Any, b: Any, name: str = "") -> Iterator[str]:
    """Names of what differs between two checkpoints, bit for bit; where the files are and how long things took does not count."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            if "ModelCheckpoint" not in str(key):
                yield from differences(a.get(key), b.get(key), f"{name}/{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{name}/{i}")
    elif isinstance(a, Tensor) and isinstance(b, Tensor):
        if not (a.dtype == b.dtype and torch.equal(a, b)):
            yield name
    elif a != b:
        yield name


def load(path: Path) -> dict[str, Any]:
    return cast(dict[str, Any], torch.load(path, weights_only=True))


def killed_at(task: type[Task], step: int, monkeypatch: pytest.MonkeyPatch, run: Callable[[], None]) -> None:
    """Run until a batch of some step is worked on."""
    train = task.training_step

    def dying(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step == step:
            raise Killed
        return train(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(task, "training_step", dying)
        with pytest.raises(Killed):
            run()


FLOW: dict[str, Any] = {
    "flow": {
        "class_path": "srcflow.flows.presets.srcflow",
        "init_args": {"grid": 4, "channels": 192, "width": 32, "layers": [1, 1], "head_dim": 16, "num_classes": 4},
    },
    "evaluation": {"samples": 0},
}


def compare(
    name: type[Task], stage: str, model: dict[str, Any], data: Path, tmp_path: Path, patch: pytest.MonkeyPatch, accumulate: int, **more: Any
) -> None:
    """A run of 2 HALF steps, and one that is killed in a later step than its checkpoint and goes on from that, are equal in every bit."""
    trainer = {"accumulate_grad_batches": accumulate, "limit_val_batches": 1}
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    main(configuration(data, straight, stage, model, trainer, **more))
    command = configuration(data, broken, stage, model, trainer, **more)
    killed_at(name, HALF + 2, patch, lambda: main(command))
    checkpoint = kept(broken, HALF)
    assert list(differences(load(kept(straight, HALF)), load(checkpoint))) == []
    main([*command, "--ckpt_path", str(checkpoint)])
    end, other = load(kept(straight, 2 * HALF)), load(kept(broken, 2 * HALF))
    assert {"state_dict", "raw_state", "optimizer_states", "lr_schedulers", "loops", "callbacks"} <= end.keys()
    assert list(differences(end, other)) == []
    values = logged(straight)
    assert {s for s, name in values if name.startswith("train/") and "step" not in name} >= set(range(2 * HALF))
    assert logged(broken) == values


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_flow_goes_on_bit_for_bit(accumulate: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 8 is in the first epoch (8 of 11 batches), and in the second under accumulation (5 of 11)."""
    model = {**FLOW, "codec": str(data / "codec")}
    compare(FlowTask, "flow", model, data, tmp_path, monkeypatch, accumulate)


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_flow_on_a_stream_of_shards_goes_on_bit_for_bit(
    accumulate: int, data: Path, streamed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = {**FLOW, "codec": str(data / "codec")}
    stream = {"train": f"{streamed}/train-{{0..4}}.tar", "mode": "stream", "shuffle_buffer": 24, "num_workers": 2}
    compare(FlowTask, "flow", model, data, tmp_path, monkeypatch, accumulate, **stream)


@pytest.mark.parametrize(("mode", "end"), [("map", "max_steps"), ("map", "max_epochs"), ("stream", "max_steps")])
def test_a_run_resumes_bit_for_bit_from_the_end_of_an_epoch(mode: str, end: str, data: Path, streamed: Path, tmp_path: Path) -> None:
    """With the checkpoints that `Checkpoints` writes by default: the next epoch is neither left out nor seen twice."""
    model = {**FLOW, "codec": str(data / "codec")}
    more: dict[str, Any] = {} if mode == "map" else {"train": f"{streamed}/train-{{0..4}}.tar", "mode": "stream", "shuffle_buffer": 24}
    length = {"max_steps": 3 * BATCHES} if end == "max_steps" else {"max_steps": -1, "max_epochs": 3}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    for here, ckpt in ((straight, []), (resumed, ["--ckpt_path", str(straight / "checkpoints" / f"step-{BATCHES}.ckpt")])):
        callbacks = [{"class_path": "EMA", "init_args": {"decay": 0.9}}, {"class_path": "Checkpoints", "init_args": {"keep": 3}}]
        main([*configuration(data, here, "flow", model, {**length, "limit_val_batches": 1, "callbacks": callbacks}, **more), *ckpt])
    files = [f"step-{n * BATCHES}.ckpt" for n in (2, 3)]
    assert sorted(p.name for p in (resumed / "checkpoints").glob("step-*")) == files
    for file in files:
        a, b = load(straight / "checkpoints" / file), load(resumed / "checkpoints" / file)
        for key in ("state_dict", "raw_state", "optimizer_states", "lr_schedulers", "global_step"):
            assert list(differences(a[key], b[key], f"{file} {key}")) == []
    assert {k: v for k, v in logged(straight).items() if k[0] >= BATCHES} == {k: v for k, v in logged(resumed).items() if k[0] >= BATCHES}


def test_a_run_that_ended_inside_an_epoch_continues_there_when_it_is_made_longer(data: Path, tmp_path: Path) -> None:
    """The rest of the epoch is neither left out nor seen twice."""
    model = {**FLOW, "codec": str(data / "codec")}
    here, seen = tmp_path / "run", []
    train = FlowTask.training_step

    def watched(self: Any, batch: Any, batch_idx: int) -> Any:
        seen.append(batch["indices"].tolist())
        return train(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlowTask, "training_step", watched)
        trainer = {"limit_val_batches": 1, "callbacks": [{"class_path": "Checkpoints"}]}
        for steps, more in ((BATCHES + 4, []), (2 * BATCHES, ["--ckpt_path", "last", "--change_config", "true"])):
            main([*configuration(data, here, "flow", model, {**trainer, "max_steps": steps}), *more])
    assert len(seen) == 2 * BATCHES
    for epoch in (seen[:BATCHES], seen[BATCHES:]):
        indices = [i for batch in epoch for i in batch]
        assert len(set(indices)) == len(indices) == 8 * BATCHES


@pytest.mark.parametrize("batch", [2, 6, 11])
def test_a_stream_gives_the_batches_of_an_unfinished_step_again(batch: int, data: Path, streamed: Path, tmp_path: Path) -> None:
    def module() -> ImageShards:
        return shards(data, train=f"{streamed}/train-{{0..4}}.tar", mode="stream", shuffle_buffer=24)

    path = tmp_path / "inside.ckpt"
    straight = fit(make(data), tmp_path, At(batch, lambda t: t.save_checkpoint(path)), data=module())
    saved = load(path)["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert saved == [{"epoch": batch // BATCHES, "done": batch % BATCHES * 8}]
    assert list(differences(straight, fit(make(data), tmp_path, data=module(), ckpt=path))) == []


@pytest.mark.slow
def test_a_flow_with_workers_goes_on_bit_for_bit(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {**FLOW, "codec": str(data / "codec")}
    compare(FlowTask, "flow", model, data, tmp_path, monkeypatch, 1, num_workers=2)


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_an_autoencoder_and_its_discriminator_go_on_bit_for_bit(
    accumulate: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(AutoencoderTask, "autoencoder", {}, data, tmp_path, monkeypatch, accumulate)
    end = load(kept(tmp_path / "straight", 2 * HALF))["discriminator"]
    assert end["optimizer"]["state"][0]["step"] == 2 * HALF - 4  # train_from
    assert any(key.startswith("train/adversarial") for _, key in logged(tmp_path / "broken"))


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_compressor_goes_on_bit_for_bit(accumulate: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = {
        "autoencoder": str(data / "codec"),
        "compressor": {"class_path": "srcflow.compressors.linear.Linear", "init_args": {"dim": 192, "code_dim": 4}},
    }
    compare(CompressorTask, "compressor", model, data, tmp_path, monkeypatch, accumulate)


# --- without the command line ------------------------------------------------------------------------------------------------------


def shards(data: Path, **more: Any) -> ImageShards:
    options: dict[str, Any] = {"train": str(data / "train-*.tar"), "batch_size": 8, **more}
    return ImageShards(val=str(data / "val-*.tar"), size=32, num_classes=4, flip=True, **options)


def make(data: Path, learn_prior: bool = False) -> FlowTask:
    torch.manual_seed(0)
    net = presets.tarflow((4, 4), 192, 32, 2, 1, head_dim=16, num_classes=4, volume_preserving=True) if learn_prior else None
    net = net or presets.srcflow((4, 4), 192, 32, [1, 1], head_dim=16, num_classes=4)
    return FlowTask(net, str(data / "codec"), optimization=Optimization(learning_rate=2e-3), statistics_batches=3)


class At(L.Callback):
    """Calls something after a batch of some number, counted from the start of the run."""

    def __init__(self, batch: int, call: Callable[[L.Trainer], None]) -> None:
        self.batch, self.call = batch, call

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            self.call(trainer)


def fit(task: FlowTask, here: Path, *callbacks: L.Callback, data: Any, ckpt: Path | None = None, **more: Any) -> dict[str, Any]:
    """Train, and give the checkpoint of the end."""
    settings: dict[str, Any] = {"max_steps": 9, "accumulate_grad_batches": 2, "limit_val_batches": 0, **more}
    trainer = L.Trainer(
        accelerator="cpu", devices=1, default_root_dir=here, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[EMA(0.9), *callbacks], **settings,
    )  # fmt: skip
    loader = {"datamodule": data} if isinstance(data, L.LightningDataModule) else {"train_dataloaders": data}
    trainer.fit(task, **loader, ckpt_path=ckpt, weights_only=True)
    trainer.save_checkpoint(here / "end.ckpt")
    return load(here / "end.ckpt")


@pytest.mark.parametrize("learn_prior", [False, True])
@pytest.mark.parametrize("batch", [2, 6, 11])
def test_a_checkpoint_between_two_batches_of_a_step_gives_the_first_again(
    batch: int, learn_prior: bool, data: Path, tmp_path: Path
) -> None:
    """Its step is made whole: batches 2 and 6 of the first epoch, and the first batch of the second."""
    path = tmp_path / "inside.ckpt"
    straight = fit(make(data, learn_prior), tmp_path, At(batch, lambda t: t.save_checkpoint(path)), data=shards(data))
    saved = load(path)["loops"]["fit_loop"]
    assert saved["epoch_loop.batch_progress"]["total"]["ready"] == batch
    assert saved["state_dict"]["combined_loader"] == [{"epoch": batch // BATCHES, "done": batch % BATCHES * 8}]
    resumed = fit(make(data, learn_prior), tmp_path, data=shards(data), ckpt=path)
    assert list(differences(straight, resumed)) == []
    assert learn_prior == ("flow.prior_var" in straight["state_dict"])


@pytest.mark.parametrize("batch", [4, 10])
def test_an_interrupt_inside_a_batch_loses_nothing(batch: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an epoch's last batch too, after which the loader is in the next epoch."""
    straight = fit(make(data), tmp_path, data=shards(data), max_steps=14, accumulate_grad_batches=1)
    path, train = tmp_path / "interrupted.ckpt", FlowTask.training_step

    def dying(self: FlowTask, some: Any, batch_idx: int) -> Tensor:
        loss = train(self, some, batch_idx)
        if self.global_step == batch:
            self.trainer.save_checkpoint(path)
            raise Killed
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(FlowTask, "training_step", dying)
        with pytest.raises(Killed):
            fit(make(data), tmp_path, data=shards(data), max_steps=14, accumulate_grad_batches=1)
    resumed = fit(make(data), tmp_path, data=shards(data), max_steps=14, accumulate_grad_batches=1, ckpt=path)
    assert list(differences(straight, resumed)) == []


class AtValidation(L.Callback):
    """Saves after the n-th validation, before and after the average has left the module."""

    def __init__(self, n: int, paths: list[Path]) -> None:
        self.left, self.paths = n, paths

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.paths[0])

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.left == 0:
            trainer.save_checkpoint(self.paths[1])


@pytest.mark.parametrize(("interval", "n", "accumulate"), [(1.0, 1, 1), (1.0, 1, 2), (3, 2, 1), (3, 1, 2), (3, 3, 2)])
def test_a_checkpoint_of_a_validation_goes_on_too(interval: float, n: int, accumulate: int, data: Path, tmp_path: Path) -> None:
    """At the end of an epoch, in the middle of one, and in the middle of a step."""
    more: dict[str, Any] = {"limit_val_batches": 1, "val_check_interval": interval, "max_steps": 14, "accumulate_grad_batches": accumulate}
    paths = [tmp_path / "inside.ckpt", tmp_path / "after.ckpt"]
    straight = fit(make(data), tmp_path, AtValidation(n, paths), data=shards(data), **more)
    for path in paths:
        resumed = fit(make(data), tmp_path, data=shards(data), ckpt=path, **more)
        assert [d for d in differences(straight, resumed) if "val_loop" not in d] == []


def test_a_run_whose_length_is_epochs_goes_on_too(data: Path, tmp_path: Path) -> None:
    """Lightning then makes the loader before it reads the checkpoint."""
    path, length = tmp_path / "half.ckpt", {"max_steps": -1, "max_epochs": 2}
    straight = fit(make(data), tmp_path, At(13, lambda t: t.save_checkpoint(path)), data=shards(data), **length)
    assert list(differences(straight, fit(make(data), tmp_path, data=shards(data), ckpt=path, **length))) == []


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning")
def test_statistics_do_not_move_the_training(data: Path, tmp_path: Path) -> None:
    """Not even where both are given the same loader."""
    module = shards(data)
    module.setup("fit")
    ends = [fit(make(data), tmp_path, data=d) for d in (module, module.train_dataloader())]
    facts = [end.pop("srcflow") for end in ends]
    assert facts[0] != facts[1]  # only one knows the data
    assert list(differences(*ends)) == []
