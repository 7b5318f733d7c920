"""The command line as a user meets it: commands, errors, and a checkpoint that overrides nothing."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.demos.boring_classes import BoringDataModule
from torch import Tensor, nn

import srcflow
from srcflow import artifacts, registry
from srcflow.cli import COMMANDS, TRAINER_COMMANDS, main
from srcflow.couplings.base import Coupling
from srcflow.errors import ConfigError, SrcflowError
from srcflow.guidance.base import Guidance
from srcflow.solvers.base import Solver
from srcflow.tasks.base import Task


class FakeNet(nn.Module, metaclass=registry.Recorded):
    """One layer."""

    def __init__(self, coupling: Coupling | None = None, width: int = 2) -> None:
        super().__init__()
        if width == 13:
            raise ConfigError("width", width, "is unlucky.", "Write 12.")
        self.layer = nn.Linear(32, width)


class FakeTask(Task):
    """A stage that only exists in this test.

    Args:
        net: what is trained.
        guidance: rule used at test time.
        solver: how a flow would be inverted.
        samples: how many images would be drawn.
        broken: None, or where an error is raised.
    """

    product = "net"

    def __init__(
        self,
        net: FakeNet,
        guidance: Guidance | None = None,
        solver: Solver | None = None,
        samples: int = 4,
        broken: str | None = None,
        artifact: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(artifact=artifact, seed=seed)
        if broken == "constructor":
            raise ConfigError("model.broken", broken, "as asked.", "Leave it out.")
        self.net, self.guidance, self.solver, self.samples, self.broken = net, guidance, solver, samples, broken

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.broken == "step":
            raise SrcflowError("the step is broken")
        return self.net.layer(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        if batch_idx == 0:
            report = {"guidance": repr(self.guidance), "samples": self.samples, "weight": self.net.layer.weight.flatten().tolist()}
            self.metrics_path().write_text(json.dumps(report))


class FakeData(BoringDataModule):
    """Random numbers."""


QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
RUN = ["--data=FakeData", "--model=FakeTask", "--model.net=FakeNet", *QUIET]


def error_of(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_status:
        main(args)
    assert exit_status.value.code == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert "usage:" not in captured.err
    return captured.err


def fit(folder: Path, *more: str) -> Path:
    """Train two steps; returns the checkpoint."""
    main(["fit", *RUN, f"--trainer.default_root_dir={folder}", "--trainer.max_steps=2", "--trainer.limit_train_batches=1", *more])
    return next(folder.rglob("*.ckpt"))


# --- commands ----------------------------------------------------------------------------------------------------------------------


def test_overview_lists_every_command_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    text = capsys.readouterr().out
    for name in (*TRAINER_COMMANDS, *COMMANDS):
        assert [line for line in text.splitlines() if line.startswith(f"  {name} ") and line.endswith(".")], name


def test_no_command_is_help_and_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert "commands:" in capsys.readouterr().out
    main(["--version"])
    assert capsys.readouterr().out == f"srcflow {srcflow.__version__}\n"


@pytest.mark.parametrize("name", [*TRAINER_COMMANDS, *COMMANDS])
def test_help_of_every_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main([name, "--help"])
    assert status.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: srcflow {name}" if name in COMMANDS else "usage: srcflow")
    if name in TRAINER_COMMANDS:
        assert TRAINER_COMMANDS[name] in " ".join(text.split())
        assert "FakeTask" in text  # known subclasses are named


def test_help_of_a_part(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", "FakeTask"])
    text = capsys.readouterr().out
    assert "--model.samples" in text
    assert "how many images would be drawn" in text
    with pytest.raises(SystemExit):
        main(["fit", "--model", "FakeTask", "--model.guidance.help", "Linear"])
    assert "guidance strength w >= 0" in " ".join(capsys.readouterr().out.split())


def test_arguments_and_environment_are_left_as_they_were(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    before = list(sys.argv)
    with pytest.raises(ConfigError):
        main(["--debug", "sample", "--pipeline=x", "--out=x.png"])
    assert sys.argv == before
    assert os.environ["SRCFLOW_TRACEBACK"] == "0"


# --- errors ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["fitt"], ["'fitt' is not a command", "Did you mean fit?", "sample"]),
        (["fit", "--model=FakeTusk"], ["model = 'FakeTusk'", "Did you mean FakeTask", "Known:", "FlowTask"]),
        (["fit", "--data=FakeDat"], ["data = 'FakeDat'", "Did you mean FakeData"]),
        (["fit", "--model=FakeTask", "--model.net=FakeNot"], ["model.net = 'FakeNot'", "Known: FakeNet."]),
        (["fit", *RUN, "--model.guidance=Linaer"], ["model.guidance = 'Linaer'", "Did you mean Linear?", "Gaussian"]),
        (["fit", *RUN, "--model.net.coupling=Afine"], ["model.net.coupling = 'Afine'", "Affine?", "Additive"]),
        (
            ["fit", *RUN, "--model.guidance=Linear", "--model.guidance.strength=Anealed"],
            ["strength = 'Anealed'", "Did you mean Annealed", "Constant"],
        ),
        (["fit", *RUN, "--model.net=nowhere.Net"], ["model.net = 'nowhere.Net'", "No module named 'nowhere'", "Known: FakeNet"]),
        (["fit", *RUN, "--model.net.widht=3"], ["model.net.widht: FakeNet has no such option", "Did you mean width?"]),
        (["fit", *RUN, "--model.net.width=wide"], ["model.net.width: expected int, got wide"]),
        (["fit", *RUN, "--trainer.callbacks+=EarlyStoping"], ["trainer.callbacks = 'EarlyStoping'", "EarlyStopping"]),
        (["fit", *RUN, "--modle=x"], ["unrecognized arguments: --modle=x"]),
        (["fit", "--model=FakeTask"], ["model: ", "required: net"]),
        (["fit", "--model=FakeTask", "--model.net=FakeNet"], ["required", "data"]),
        (["fit", *RUN, "--model.guidance=Linear", "--model.guidance.strength=big"], ["model.guidance.strength"]),
        (
            ["fit", *RUN, "--model.guidance=Linear", '--model.guidance.strength={"class_path": "Interval", "init_args": {"strt": 1}}'],
            ["strt: Interval has no such option", "Did you mean start?"],
        ),
        (["fit", "--config=missing.yaml"], ["config", "missing.yaml"]),
        (["plugins", "--family=encoder"], ["encoder", "encoders"]),
    ],
)
def test_wrong_arguments_are_named_with_the_cure(args: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    text = error_of(args, capsys)
    message = text[text.index("error: ") :]
    for word in words:
        assert word in message
    assert "Union" not in message
    assert "NoneType" not in message
    assert len(message.splitlines()) <= 4


def test_known_names_are_those_of_the_family(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Gaussian" not in error_of(["fit", *RUN, "--model.net.coupling=Afine"], capsys)


def test_errors_in_a_file_name_the_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    model = {"class_path": "FakeTask", "init_args": {"net": {"class_path": "FakeNet", "init_args": {"coupling": "Afine"}}}}
    config.write_text(yaml.safe_dump({"model": model, "data": "FakeData"}))
    assert "model.net.coupling = 'Afine': no such name. Did you mean Affine" in error_of(["fit", f"--config={config}"], capsys)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model.broken=constructor"], "error: model.broken = 'constructor': as asked. Leave it out.\n"),
        (["--model.broken=step"], "error: the step is broken\n"),
        (["--model.net.width=13"], "error: width = 13: is unlucky. Write 12.\n"),
        (["--model.guidance=Linear", "--model.guidance.strength=Interval", "--model.guidance.strength.strength=1"]
         + ["--model.guidance.strength.start=2"], "error: schedule.start/stop = (2.0, 1.0): an interval of progress lies in [0, 1]."),
    ],
)  # fmt: skip
def test_our_own_errors_are_one_message(more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_of(["fit", *RUN, *more, f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=1"], capsys)


def test_debug_raises_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="as asked"):
        main(["--debug", "fit", *RUN, "--model.broken=constructor"])
    monkeypatch.setenv("SRCFLOW_TRACEBACK", "1")
    with pytest.raises(ConfigError, match="as asked"):
        main(["fit", *RUN, "--model.broken=constructor"])
    with pytest.raises(Exception, match="dot import path"):
        main(["fit", "--model=FakeTusk"])


def test_errors_that_are_not_ours_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeTask, "training_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["fit", *RUN, f"--trainer.default_root_dir={tmp_path}", "--trainer.max_steps=1"])


def test_broken_plugins_are_reported_once_and_not_fatal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    broken = registry.Broken("couplings", "Spline", "srcflow-splines", "ImportError: no splines")
    monkeypatch.setattr(registry, "load_plugins", lambda families=None: None)
    monkeypatch.setattr(registry, "broken", lambda family: [broken] if family == "couplings" else [])
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", "FakeTask"])
    line = "warning: plug-in srcflow-splines: couplings Spline is left out: ImportError: no splines\n"
    assert capsys.readouterr().err.count(line) == 1


# --- checkpoints -------------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_overrides_nothing_that_the_user_asks_for(tmp_path: Path) -> None:
    asked_then = ["--model.guidance=Linear", "--model.guidance.strength=1", "--model.solver=Sequential", "--model.samples=4"]
    checkpoint = fit(tmp_path / "fit", *asked_then)
    trained = torch.load(checkpoint, weights_only=True)
    assert not trained.get("hyper_parameters")
    asked_now = ["--model.guidance=Gaussian", "--model.guidance.strength=2.5", "--model.samples=9", "--model.seed=3"]
    main(["test", *RUN, *asked_now, f"--trainer.default_root_dir={tmp_path / 'fit'}", f"--ckpt_path={checkpoint}"])
    report = json.loads((tmp_path / "fit" / "metrics.json").read_text())
    assert report["samples"] == 9
    assert report["guidance"].startswith("Gaussian(strength=2.5")
    torch.testing.assert_close(torch.tensor(report["weight"]), trained["state_dict"]["net.layer.weight"].flatten())


def test_the_saved_configuration_runs_again_and_resumes(tmp_path: Path) -> None:
    checkpoint = fit(tmp_path / "a", "--model.samples=5")
    saved = next((tmp_path / "a").rglob("config.yaml"))
    model = yaml.safe_load(saved.read_text())["model"]
    assert model["class_path"].endswith("FakeTask")
    assert model["init_args"]["samples"] == 5
    main(["fit", f"--config={saved}", f"--ckpt_path={checkpoint}", "--trainer.max_steps=3", "--change_config=true"])
    assert torch.load(max((tmp_path / "a").rglob("*.ckpt"), key=os.path.getmtime), weights_only=True)["global_step"] == 3


# --- export ------------------------------------------------------------------------------------------------------------------------


def test_export_writes_what_the_checkpoint_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = fit(tmp_path / "run", "--model.net.width=3")
    saved = next((tmp_path / "run").rglob("config.yaml"))
    main(["export", f"--config={saved}", f"--ckpt_path={checkpoint}", f"--out={tmp_path / 'artifact'}"])
    net: Any = artifacts.load(tmp_path / "artifact", FakeNet)
    torch.testing.assert_close(
        net.layer.weight, torch.load(checkpoint, weights_only=True)["state_dict"]["net.layer.weight"], rtol=0, atol=0
    )
    assert artifacts.read_manifest(tmp_path / "artifact")["steps"] == 2
    assert "Wrote" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], ["config", "ckpt_path", "is missing"]),
        (["--config=nowhere.yaml", "--ckpt_path=nowhere.ckpt"], ["2 problems", "nowhere.yaml", "nowhere.ckpt", "no such file"]),
        (["--pipeline=a", "--config=b"], ["does not go with --pipeline"]),
        (["--pipeline=nowhere"], ["nowhere", "does not exist"]),
    ],
)
def test_export_refuses(more: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = error_of(["export", f"--out={tmp_path / 'x'}", *more], capsys)
    assert all(word in text for word in words)
    assert not (tmp_path / "x").exists()


def test_export_wants_a_models_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.yaml", "a.ckpt"):
        (tmp_path / name).write_text("trainer: {}")
    text = error_of(["export", f"--out={tmp_path / 'x'}", f"--config={tmp_path / 'a.yaml'}", f"--ckpt_path={tmp_path / 'a.ckpt'}"], capsys)
    assert "has no section `model`" in text
