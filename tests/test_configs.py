"""Every file in configs/: parses through the real command line, builds on the meta device, chains, and says the truth in its header."""

from __future__ import annotations

import importlib
import re
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import cli as lightning_cli

from srcflow.cli import encode, main
from srcflow.cli.parser import Parser
from srcflow.conditioners.class_table import ClassTable
from srcflow.couplings.softplus_affine import SoftplusAffine
from srcflow.datamodules.base import DataModule
from srcflow.encoders.base import Encoder

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
FILES = sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob("*.yaml"))
OVERLAYS = [f for f in FILES if f.startswith("trainer/")]
ENCODES = [f for f in FILES if f.startswith("encode/")]
RUNS = [f for f in FILES if f not in (*OVERLAYS, *ENCODES)]
IMAGENET = [f for f in RUNS if "imagenet" in f]


def header_of(name: str) -> str:
    """The comment lines at the top of a file."""
    lines = (CONFIGS / name).read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(lines[:end])


def content_of(name: str) -> Any:
    return yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))


def callbacks_of(run: Any) -> list[tuple[str, dict[str, Any]]]:
    """(class name, arguments) of a run's callbacks, which may be written as a name alone."""
    pairs = [(c, {}) if isinstance(c, str) else (c["class_path"], c.get("init_args", {})) for c in run["trainer"].get("callbacks", [])]
    return [(path.rpartition(".")[2], arguments) for path, arguments in pairs]


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The command line's own LightningCLI, stopped before it makes anything: its parser is made once."""
    made: list[Any] = []

    class Stopped(lightning_cli.LightningCLI):
        def instantiate_classes(self) -> None:
            made.append(self)

        def _run_subcommand(self, subcommand: str) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("srcflow.cli.trainer.LightningCLI", Stopped)
        main(["--debug", "fit", "--config", str(CONFIGS / "smoke/flow.yaml")])
    return made[0]


@pytest.fixture(scope="module")
def count() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "tools"))
        return importlib.import_module("count")


def parse(cli: Any, *files: str, command: str = "fit") -> Any:
    """The configuration of `srcflow <command> --config ... --config ...`."""
    arguments = [a for f in files for a in ("--config", str(CONFIGS / f))]
    parsed = cli.parser.parse_args([command, *arguments])
    return parsed[command]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_parses_and_its_data_and_callbacks_are_built(cli: Any, name: str) -> None:
    config = parse(cli, name)
    own = content_of(name)
    assert config.model.class_path.rpartition(".")[2] == own["model"]["class_path"]
    assert config.trainer.max_steps == own["trainer"]["max_steps"] > 0
    config.pop("model")  # built on the meta device below
    strategy = config.trainer.pop("strategy")
    parser = cli._parser("fit")
    built = parser.instantiate_classes(config)
    assert built.data.num_classes == own["data"]["init_args"].get("num_classes", 0)
    assert [type(c).__name__ for c in built.trainer.callbacks or []] == [name for name, _ in callbacks_of(own)]
    assert strategy == "auto"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_goes_with_a_run_and_changes_the_trainer_only(cli: Any, overlay: str) -> None:
    assert set(content_of(overlay)) == {"trainer"}
    run = "flow/imagenet256_dinov2b_src32_xl.yaml"
    plain, both = parse(cli, run), parse(cli, run, overlay)
    wanted = content_of(overlay)["trainer"]
    for key, value in wanted.items():
        given = both.trainer[key]
        assert (given.class_path.rpartition(".")[2] if isinstance(value, dict) else given) == (
            value["class_path"] if isinstance(value, dict) else value
        )
        if isinstance(value, dict):
            found = {k: str(v) if isinstance(v, timedelta) else v for k, v in given.init_args.as_dict().items()}
            assert found == {**found, **value["init_args"]}
    for config in (plain, both):
        config.pop("config")
        for key in wanted:
            config.trainer.pop(key)
    assert plain.as_dict() == both.as_dict()


@pytest.mark.parametrize("name", ENCODES)
def test_an_encode_configuration_parses_and_is_built(name: str) -> None:
    parser = Parser(prog="srcflow encode")
    encode.configure(parser)
    with torch.device("meta"):
        built = parser.instantiate_classes(parser.parse_args(["--config", str(CONFIGS / name), "--out", "features"]))
    assert isinstance(built.encoder, Encoder)
    assert isinstance(built.data, DataModule)


@pytest.mark.parametrize("name", RUNS)
def test_the_header_says_what_the_run_is(name: str, count: ModuleType) -> None:
    header = header_of(name)
    assert re.search(r"^# Source: \S|arXiv \d{4}\.\d{5}", header, re.M), f"{name}: no source"
    for fact in ("Parameters", "FLOPs"):
        assert re.search(rf"^# {fact}: \S", header, re.M), f"{name}: run python tools/count.py configs/{name} --write"
    assert f"srcflow fit --config configs/{name}" in header
    for overlay in re.findall(r"--config (configs/trainer/\S+)", header):
        assert (ROOT / overlay).is_file()
    assert all(len(line) <= 140 for line in header.splitlines())
    # the numbers are counted, not remembered
    task = count.shared(CONFIGS / name)
    trained, heads = count.parameters(task)
    stated = re.search(r"^# Parameters: ([\d,]+) trained", header, re.M)
    assert stated is not None
    assert int(stated[1].replace(",", "")) == trained
    stated_heads = re.search(r"and ([\d,]+) in the discriminator's heads", header)
    assert (int(stated_heads[1].replace(",", "")) if stated_heads else 0) == heads
    assert all(p.is_meta for p in task.parameters())


# one of each kind; `python tools/count.py` counts all of them
@pytest.mark.parametrize(
    "name", [f"smoke/{s}.yaml" for s in ("autoencoder", "compressor", "flow")] + ["flow/imagenet256_dinov2b_src32_b.yaml"]
)
def test_the_flops_of_the_header_are_counted(name: str, count: ModuleType) -> None:
    line = f"# FLOPs: {count.header(CONFIGS / name)['FLOPs']}"
    assert line in header_of(name).splitlines(), f"run: python tools/count.py configs/{name} --write"


@pytest.mark.parametrize("name", [n for n in RUNS if n.split("/")[0] != "autoencoder"])
def test_what_a_run_is_built_on_is_written_by_another_and_fits(name: str, count: ModuleType) -> None:
    arguments = content_of(name)["model"]["init_args"]
    sources = [arguments[key] for key in ("codec", "autoencoder") if isinstance(arguments.get(key), str)]
    if not sources:
        return  # a stage 0 outside its folder
    task = count.shared(CONFIGS / name)
    if "codec" in arguments:
        autoencoder, compressor = count.codec_of(task)
        assert task.flow.channels == compressor.code_dim
        assert tuple(task.flow.grid) == tuple(autoencoder.grid)
        assert task.flow.num_classes == content_of(name)["data"]["init_args"].get("num_classes", 0)
    else:
        autoencoder, compressor = count.part(sources[0]), task.compressor
    assert compressor.dim == autoencoder.dim
    assert tuple(getattr(compressor, "grid", autoencoder.grid)) == tuple(autoencoder.grid)
    size = content_of(name)["data"]["init_args"].get("size")  # stored features name none
    assert size is None or autoencoder.image_size == (size, size)
    assert sources[0] in header_of(name)  # under "Needs"


def test_no_two_runs_write_to_one_place() -> None:
    runs = [content_of(n) for n in RUNS]
    artifacts = [r["model"]["init_args"]["artifact"] for r in runs]
    roots = [r["trainer"]["default_root_dir"] for r in runs]
    assert len(set(artifacts)) == len(artifacts)
    assert len(set(roots)) == len(roots)
    for artifact, root, run in zip(artifacts, roots, runs, strict=True):
        assert artifact.startswith(f"{root}/")
        for callback, arguments in callbacks_of(run):
            if callback == "Checkpoints":
                assert arguments["dirpath"] == f"{root}/checkpoints"


def test_the_xl_flow_is_the_papers(count: ModuleType) -> None:
    task = count.shared(CONFIGS / "flow/imagenet256_dinov2b_src32_xl.yaml")
    flow = task.flow
    assert round(sum(p.numel() for p in flow.parameters()) / 1e9, 2) == 1.41
    assert [len(b.layers) for b in flow.blocks] == [2, 2, 2, 2, 2, 18]
    assert all(isinstance(b.coupling, SoftplusAffine) for b in flow.blocks)
    assert [isinstance(b.conditioner, ClassTable) for b in flow.blocks] == [False] * 5 + [True]
    assert task.noise.sigma == 0.4


@pytest.mark.parametrize("name", [n for n in IMAGENET if not n.startswith("flow/") and "pca" not in n])
def test_epochs_of_the_rae_recipe_are_converted_to_steps(name: str) -> None:
    epoch = 1_281_167 // 512  # complete batches
    run = content_of(name)
    arguments = run["model"]["init_args"]
    adversarial = arguments["adversarial"]["init_args"]
    assert run["trainer"]["max_steps"] == 16 * epoch
    assert (adversarial["train_from"], adversarial["count_from"]) == (6 * epoch, 8 * epoch)
    assert arguments["optimization"]["warmup_steps"] == arguments["discriminator"]["warmup_steps"] == epoch


@pytest.mark.parametrize("name", IMAGENET + ["flow/tarflow_pixels64.yaml"])
def test_eight_gpus_make_the_global_batch_of_512(name: str) -> None:
    run = content_of(name)
    if run["trainer"]["max_steps"] > 1:
        assert run["data"]["init_args"]["batch_size"] * run["trainer"].get("accumulate_grad_batches", 1) * 8 == 512
