"""A run directory says what it is, and refuses to become another run unless told."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import signal
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from safetensors.torch import load_file

from srcflow import artifacts
from srcflow.autoencoders.pixels import PixelPatches
from srcflow.cli import main, run_identity
from srcflow.errors import ArtifactError, CheckpointError, ConfigError, ManifestMismatchError
from srcflow.tasks.flow import FlowTask

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*Experiment logs directory .* exists:UserWarning"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up shapes, twice: 43 and 44 training images; and a codec of pixel patches, twice."""
    root = tmp_path_factory.mktemp("shapes")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        for n in (43, 44):
            importlib.import_module("synthetic").main(["--out", str(root / str(n)), "--train", str(n), "--eval", "8"])
    artifacts.save(root / "codec", PixelPatches(32, 8))
    artifacts.save(root / "moved", PixelPatches(32, 8))
    return root


@pytest.fixture
def command(data: Path, tmp_path: Path) -> list[str]:
    """`fit` of a tiny flow for 12 steps, a checkpoint every 4."""
    place = tmp_path / "run"
    content = yaml.safe_load((ROOT / "configs/smoke/flow.yaml").read_text())
    content["model"]["init_args"].update(artifact=None, codec=str(data / "codec"), evaluation={"samples": 0})
    content["model"]["init_args"]["flow"]["init_args"].update(channels=192, layers=[1, 1])
    content["data"]["init_args"].update({s: str(data / "43" / f"{s}-*.tar") for s in ("train", "val", "test")}, batch_size=4)
    content["trainer"].update(
        max_steps=12, accelerator="cpu", devices=1, limit_val_batches=1, log_every_n_steps=1, default_root_dir=str(place),
        enable_progress_bar=False, enable_model_summary=False, logger={"class_path": "CSVLogger", "init_args": {"save_dir": str(place)}},
        callbacks=[{"class_path": "EMA", "init_args": {"decay": 0.9}}, {"class_path": "Checkpoints", "init_args": {"every_n_steps": 4}}],
    )  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    return ["--debug", "fit", "--config", str(tmp_path / "run.yaml")]


def record(tmp_path: Path) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads((tmp_path / "run/run.json").read_text()))


def weights(path: Path) -> dict[str, Any]:
    return cast(dict[str, Any], torch.load(path, weights_only=True))


def same(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def stopped_at(step: int, signum: int, command: list[str], patch: pytest.MonkeyPatch, hook: str = "training_step") -> Any:
    """Run until a signal comes in a hook of the task at some step; gives the exit status."""
    original = getattr(FlowTask, hook)

    def told(self: FlowTask, *args: Any) -> Any:
        if self.global_step == step:
            os.kill(os.getpid(), signum)
        return original(self, *args)

    with patch.context() as p:
        p.setattr(FlowTask, hook, told)
        with pytest.raises(SystemExit) as e:
            main(command)
    return e.value.code


def test_a_run_is_recorded_stopped_gone_on_with_bit_for_bit_and_refused_to_others(
    command: list[str],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    main([*command, "--trainer.default_root_dir", str(tmp_path / "straight")])
    last = [*command, "--ckpt_path", "last"]
    assert stopped_at(9, signal.SIGTERM, last, monkeypatch) == 75  # an epoch's last of ten batches: step 10 is done, and then the run stops
    assert "no checkpoint in" in caplog.text
    way = f"--ckpt_path last goes on from {tmp_path}/run/checkpoints/step-10.ckpt.\n"
    assert f"stopped by SIGTERM at step 10; {way}" in capsys.readouterr().err
    assert {p.name for p in (tmp_path / "run/checkpoints").iterdir()} == {"step-8.ckpt", "step-10.ckpt", "last.ckpt"}
    assert stopped_at(10, signal.SIGINT, last, monkeypatch) == 130
    monkeypatch.setattr("sys.argv", ["srcflow"])
    free = ["--data.num_workers", "0", "--data.max_bad_fraction", "0.1", "--model.optimization.dump_bad_steps", "1"]
    main([*last, *free, "--trainer.log_every_n_steps", "2"])
    a, b = (weights(d / "checkpoints/step-12.ckpt") for d in (tmp_path / "straight", tmp_path / "run"))
    keys = ["state_dict", "raw_state", "optimizer_states", "lr_schedulers", "global_step", "callbacks"]
    assert {k: same(a[k], b[k]) for k in keys} == dict.fromkeys(keys, True)

    found = record(tmp_path)
    starts = found["starts"]
    assert [(s["step"], s["ended"]["step"]) for s in starts] == [(0, 10), (10, 11), (11, 12)]
    assert [s["ended"]["how"].partition(";")[0] for s in starts] == [
        "StoppedError: stopped by SIGTERM at step 10",
        "StoppedError: stopped by SIGINT at step 11",
        "finished",
    ]
    assert starts[0]["checkpoint"] is None
    assert starts[1]["checkpoint"].endswith("last.ckpt")
    assert starts[2]["changed"] == {
        "trainer.log_every_n_steps": [1, 2],
        "data.init_args.max_bad_fraction": [1e-3, 0.1],
        "model.init_args.optimization.dump_bad_steps": [0, 1],
    }
    assert starts[2]["command"].startswith("srcflow fit --config")
    assert starts[2]["command"].endswith(f"--ckpt_path last {' '.join(free)} --trainer.log_every_n_steps 2")
    assert found["config"]["trainer"]["max_steps"] == 12
    assert found["identity"]["data"]["content"]["samples"] == 43
    assert starts[0]["torch"] == torch.__version__
    assert starts[0]["ranks"] == 1

    # what is another run
    saved = (tmp_path / "run/run.json").read_bytes()
    logs = sorted((tmp_path / "run").rglob("config.yaml"))
    other = ["--model.optimization.learning_rate", "0.5", "--trainer.max_steps", "14", "--data.batch_size", "2"]
    with pytest.raises(ManifestMismatchError) as e:
        main([*last, *other])
    assert e.value.differences == {
        "model.init_args.optimization.learning_rate": (2e-3, 0.5),
        "data.global_batch": (4, 2),
        "trainer.max_steps": (12, 14),
    }
    assert "--change_config true" in str(e.value)
    overlay = tmp_path / "ema.yaml"
    overlay.write_text("trainer: {callbacks: [{class_path: EMA, init_args: {decay: 0.8}}, Checkpoints]}\n")
    with pytest.raises(ManifestMismatchError, match=r"trainer\.ema\.0\.decay"):
        main([*last, "--config", str(overlay)])
    assert (tmp_path / "run/run.json").read_bytes() == saved
    assert sorted((tmp_path / "run").rglob("config.yaml")) == logs
    data_too = [f"--data.{s}={data}/44/{s}-*.tar" for s in ("train", "val", "test")]
    with pytest.raises(ManifestMismatchError, match=r"data\.content\.samples: stored 43, this run 44\n  data\.content\.content: "):
        main([*last, *data_too])
    assert (tmp_path / "run/run.json").read_bytes() == saved

    # what is not: places, parallelism, evaluation; and what is told
    accumulate = ["--data.batch_size", "2", "--trainer.accumulate_grad_batches", "2", "--model.codec", str(data / "moved")]
    main([*last, *accumulate, "--model.evaluation.round_trip", "4"])
    main([*last, "--trainer.max_steps", "13", "--change_config", "true"])
    assert record(tmp_path)["starts"][-1]["changed"]["trainer.max_steps"] == [12, 13]
    assert record(tmp_path)["identity"]["trainer"]["max_steps"] == 13


def test_a_signal_before_the_first_step_asks_for_another_start(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stopped_at(0, signal.SIGUSR1, command, monkeypatch, "on_fit_start") == 75
    assert "stopped by SIGUSR1 before the first step" in capsys.readouterr().err
    assert not (tmp_path / "run/checkpoints").exists()


def test_a_run_goes_around_bad_data_as_the_guide_says(command: list[str], tmp_path: Path) -> None:
    """The guide's own command line, with this run's places; every later start needs the seed."""
    main(command)
    straight = weights(tmp_path / "run/checkpoints/step-12.ckpt")
    guide = (ROOT / "docs/howto/divergence.md").read_text().partition("## Going back, and around")[2]
    (line,) = [x.removeprefix("$ srcflow ") for x in guide.partition("\n## ")[0].splitlines() if x.startswith("$ srcflow fit ")]
    words = shlex.split(line)
    for option, place in (("--config", tmp_path / "run.yaml"), ("--ckpt_path", tmp_path / "run/checkpoints/step-8.ckpt")):
        words[words.index(option) + 1] = str(place)
    with pytest.raises(ManifestMismatchError, match=r"data\.init_args\.seed"):
        main(["--debug", *words[: words.index("--change_config")]])
    main(["--debug", *words])
    assert [s["step"] for s in record(tmp_path)["starts"]] == [0, 8]
    around = weights(tmp_path / "run/checkpoints/step-12.ckpt")
    assert around["global_step"] == straight["global_step"] == 12
    assert not same(around["raw_state"], straight["raw_state"])

    later = [*command, *words[words.index("--ckpt_path") :][:2]]
    with pytest.raises(ManifestMismatchError, match=r"data\.init_args\.seed"):
        main(later)
    main([*later, "--data.seed", "1"])
    assert [s["step"] for s in record(tmp_path)["starts"]] == [0, 8, 8]
    assert same(weights(tmp_path / "run/checkpoints/step-12.ckpt")["raw_state"], around["raw_state"])


def test_a_damaged_checkpoint_or_record_is_refused_before_anything_is_made(command: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes(b"PK")
    with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
        main([*command, "--ckpt_path", str(broken)])
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    for content, problem in (("{", "cannot be read"), ("{}", "not a record of format 1")):
        (tmp_path / "run/run.json").write_text(content)
        with pytest.raises(ArtifactError, match=problem):
            main(command)


def test_a_class_that_moved_or_has_a_short_path_is_the_same_run() -> None:
    def record(path: str) -> dict[str, object]:
        return {"model": {"list": [{"class_path": path, "init_args": {}}]}}

    now = record("srcflow.conditioners.class_table.ClassTable")
    assert not run_identity.differences(record("srcflow.flows.conditioners.ClassTable"), now)
    assert not run_identity.differences(record("srcflow.conditioners.ClassTable"), now)
    other = record("srcflow.conditioners.ClassToken")
    assert run_identity.differences(other, now) == {
        "model.list.0.class_path": ("srcflow.conditioners.ClassToken", "srcflow.conditioners.class_table.ClassTable")
    }
    assert run_identity.differences({"class_path": "srcflow.nowhere.A"}, {"class_path": "srcflow.nowhere.B"}), "paths of what is gone"


def test_a_run_from_before_there_was_a_choice_about_exif_continues_and_says_so(command: list[str], tmp_path: Path) -> None:
    """With the new default and a warning, or without one if the old behaviour is asked for; also where its version is another one."""
    main([*command, "--data.exif", "ignore"])
    old = record(tmp_path)
    for part in (old["identity"]["data"]["init_args"], old["identity"]["data"]["content"]["transform"], old["config"]["data"]["init_args"]):
        assert part.pop("exif") == "ignore"
    for version in (old["starts"][-1]["srcflow"], "0.0.1"):
        old["starts"][-1]["srcflow"] = version
        (tmp_path / "run/run.json").write_text(json.dumps(old))
        with pytest.warns(UserWarning, match="exif = 'transpose': this run began before there was a choice, with what is now 'ignore'"):
            main([*command, "--ckpt_path", "last"])
        (tmp_path / "run/run.json").write_text(json.dumps(old))
        main([*command, "--ckpt_path", "last", "--data.exif", "ignore"])


def test_a_run_stopped_before_its_artifact_still_writes_it(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sets of weights as an undisturbed run writes them; a second start leaves them alone."""

    def dying(task: Any, path: str) -> Path:
        raise OSError(28, "No space left on device")

    content = yaml.safe_load((tmp_path / "run.yaml").read_text())
    content["model"]["init_args"]["artifact"] = str(tmp_path / "model")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    with monkeypatch.context() as patch:
        patch.setattr("srcflow.tasks.artifact.write", dying)
        with pytest.raises(OSError, match="No space left"):
            main(command)
    assert not (tmp_path / "model").exists()
    main([*command, "--ckpt_path", "last"])
    main([*command, "--trainer.default_root_dir", str(tmp_path / "straight"), "--model.artifact", str(tmp_path / "straight/model")])
    for name in ("model", "raw"):
        a, b = (load_file(root / "model" / f"{name}.safetensors") for root in (tmp_path, tmp_path / "straight"))
        assert same(a, b)
    place = tmp_path / "untrained"
    main([*command, f"--trainer.default_root_dir={place}", f"--model.artifact={place}/model", "--trainer.limit_train_batches=0"])
    assert not (place / "model").exists()
    before = (tmp_path / "model/model.safetensors").stat().st_mtime_ns
    main([*command, "--ckpt_path", "last"])
    assert (tmp_path / "model/model.safetensors").stat().st_mtime_ns == before


def test_what_is_saved_is_read_by_other_commands_and_a_run_is_not_begun_anew(command: list[str], tmp_path: Path) -> None:
    main(command)
    with pytest.raises(ConfigError, match=r"ckpt_path = None: .* holds step-12\.ckpt of an earlier start.* --ckpt_path last"):
        main(command)
    main([*command, "--ckpt_path", "last", "--trainer.max_steps", "13", "--change_config", "true"])
    saved = sorted((tmp_path / "run").rglob("config.yaml"), key=lambda p: p.stat().st_mtime_ns)[-1]
    assert "change_config" not in saved.read_text()
    last = tmp_path / "run/checkpoints/last.ckpt"
    main(["--debug", "validate", "--config", str(saved), "--ckpt_path", str(last)])
    assert "change_config" not in record(tmp_path)["config"]
    with pytest.raises(ManifestMismatchError, match="max_steps"):
        main([*command, "--ckpt_path", "last"])


def test_a_record_that_lacks_its_starts_is_refused(command: list[str], tmp_path: Path) -> None:
    main(command)
    broken = {k: v for k, v in record(tmp_path).items() if k != "starts"}
    (tmp_path / "run/run.json").write_text(json.dumps(broken))
    with pytest.raises(ArtifactError, match=r"run\.json lacks what it should hold .*Move it away"):
        main([*command, "--ckpt_path", "last"])


def test_a_run_with_another_optimizer_and_schedule_continues_bit_for_bit_and_they_belong_to_it(command: list[str], tmp_path: Path) -> None:
    """Stochastic gradient descent with momentum and a late decay, given as options and as YAML."""
    optimization = {
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}},
        "schedule": {"class_path": "WSD", "init_args": {"decay_steps": 3, "shape": "linear"}},
        "learning_rate": 1e-2, "min_learning_rate": 1e-3, "warmup_steps": 2, "decay": "matrices", "weight_decay": 0.1,
    }  # fmt: skip
    content = yaml.safe_load((tmp_path / "run.yaml").read_text())
    content["model"]["init_args"]["optimization"] = optimization
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    main([*command, "--trainer.default_root_dir", str(tmp_path / "straight")])
    main([*command, "--trainer.max_steps", "8", "--model.optimization.schedule.decay_steps", "2"])
    resumed = [*command, "--ckpt_path", str(tmp_path / "run/checkpoints/step-4.ckpt")]
    with pytest.raises(ManifestMismatchError) as e:
        main(resumed)
    assert e.value.differences == {
        "model.init_args.optimization.schedule.init_args.decay_steps": (2, 3),
        "trainer.max_steps": (8, 12),
    }
    with pytest.raises(ManifestMismatchError, match=r"optimization\.optimizer\.init_args\.momentum: stored 0\.9, this run 0\.8"):
        main([*resumed, "--model.optimization.optimizer.init_args.momentum", "0.8"])
    main(
        [*resumed, "--change_config", "true"]
    )  # nothing has decayed at step 4, so a longer run continues as if it had always been that long
    a, b = (weights(tmp_path / d / "checkpoints/step-12.ckpt") for d in ("straight", "run"))
    keys = ["state_dict", "raw_state", "optimizer_states", "lr_schedulers", "global_step"]
    assert {k: same(a[k], b[k]) for k in keys} == dict.fromkeys(keys, True)
    groups = a["optimizer_states"][0]["param_groups"]
    assert [(g["momentum"], g["weight_decay"]) for g in groups] == [(0.9, 0.1), (0.9, 0.0)]
    rates = [1e-3 + 9e-3 * share for share in (0, 0.5, *[1.0] * 8, 2 / 3, 1 / 3, 0)]
    assert groups[0]["lr"] == pytest.approx(rates[12])

    back = ["--model.optimization.optimizer=null", "--model.optimization.schedule=null", "--change_config", "true"]
    with pytest.raises(
        CheckpointError, match=r"the checkpoint holds the state of torch\.optim\.SGD, and this run trains with torch\.optim\.AdamW"
    ):
        main([*command, "--ckpt_path", "last", *back])
    with pytest.raises(ConfigError, match=r"optimization\.betas = \(0\.8, 0\.9\): has no effect on torch\.optim\.SGD"):
        main([*command, "--model.optimization.betas", "[0.8, 0.9]"])
