"""`srcflow export`: a stage's artifact from a checkpoint, a self-contained Pipeline directory, or the files of another project."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from srcflow.errors import ArtifactError, ConfigError, Problems

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from srcflow.cli.parser import Parser
    from srcflow.tasks.base import Task

HELP = "Write a stage's artifact from a checkpoint, a whole pipeline in one directory, or published formats."


def configure(parser: Parser) -> None:
    """Add the command's arguments."""
    from srcflow.formats import FORMATS

    parser.add_argument("--out", type=str, required=True, help="Directory to write.")
    stage = parser.add_argument_group("one stage, from a checkpoint")
    stage.add_argument(
        "--config", type=str | None, default=None, help="The run's configuration: its config.yaml, or the file given to fit."
    )
    stage.add_argument(
        "--ckpt_path", type=str | None, default=None, help="A checkpoint or snapshot that fit wrote; its averaged weights become the model."
    )
    stage.add_argument("--ema", type=float | None, default=None, help="Decay of the average to take, where the EMA callback kept several.")
    bundle = parser.add_argument_group("a self-contained pipeline")
    bundle.add_argument("--pipeline", type=str | None, default=None, help="A flow's artifact, or a Pipeline directory.")
    bundle.add_argument("--autoencoder", type=str | None, default=None, help="Where the pipeline's autoencoder is now, if it moved.")
    bundle.add_argument("--compressor", type=str | None, default=None, help="Where the pipeline's compressor is now, if it moved.")
    bundle.add_argument("--weights", choices=["ema", "raw"], default="ema", help="Averaged or last weights of the last stage.")
    published = parser.add_argument_group("files for published code, from --pipeline")
    published.add_argument(
        "--format",
        choices=list(FORMATS),
        default=None,
        help="Write the flow (tarflow, starflow) or the autoencoder (rae, diffusers) as that project's code loads it.",
    )
    published.add_argument(
        "--in_channels", type=int | None, default=None, help="tarflow, starflow: channels of the images or latents that the flow models."
    )


def run(config: Namespace) -> int:
    """Write the directory."""
    problems = Problems()
    if config.pipeline is not None:
        for key in ("config", "ckpt_path", "ema"):
            if config[key] is not None:
                problems.add(ConfigError(key, config[key], "does not go with --pipeline.", "Export either a stage or a pipeline."))
        if config.format is None and config.in_channels is not None:
            problems.add(ConfigError("in_channels", config.in_channels, "does nothing without --format."))
        for key in ("autoencoder", "compressor"):
            if config.format is not None and config[key] is not None:
                problems.add(ConfigError(key, config[key], "does not go with --format.", "Name the part's own directory as --pipeline."))
        problems.raise_if_any()
        if config.format is not None:
            from srcflow.convert.files import export_file

            files = export_file(config.format, config.pipeline, config.out, weights=config.weights, in_channels=config.in_channels)
            print(f"Wrote {', '.join(str(f) for f in files)}.")
            return 0
        from srcflow.chain import check_bundle_target
        from srcflow.pipeline import Pipeline

        check_bundle_target(config.out, "out")
        pipeline = Pipeline.from_pretrained(
            config.pipeline, weights=config.weights, autoencoder=config.autoencoder, compressor=config.compressor
        )
        pipeline.save_pretrained(config.out)
        print(f"Wrote {config.out}.")
        return 0
    for key in ("format", "in_channels"):
        if config[key] is not None:
            problems.add(ConfigError(key, config[key], "needs --pipeline.", "Export the stage first, then name its directory."))
    for key in ("config", "ckpt_path"):
        if config[key] is None:
            problems.add(ConfigError(key, None, "is missing.", "Give --config and --ckpt_path for a stage, or --pipeline for a bundle."))
        elif Path(config[key]).is_dir():
            shards = " To export a sharded checkpoint, resume from it with save_distributed_checkpoint: false, which writes one file."
            problems.add(ArtifactError(f"{key} = {config[key]!r} is a directory; a file is needed.{shards if key == 'ckpt_path' else ''}"))
        elif not Path(config[key]).is_file():
            problems.add(ArtifactError(f"{key} = {config[key]!r}: there is no such file."))
    from srcflow import artifacts

    with problems.collect():
        artifacts.check_target(config.out, "out")
    problems.raise_if_any()
    from srcflow.cli import load_parts
    from srcflow.tasks import artifact

    load_parts()
    artifact.export(task_of(config.config), config.ckpt_path, config.out, ema=config.ema)
    print(f"Wrote {config.out}.")
    return 0


def task_of(path: str) -> Task:
    """The task that a run's YAML describes, untrained. The rest of the file (trainer, data) is not looked at.

    Args:
        path: a configuration of `srcflow fit`.

    Raises:
        ConfigError: the file cannot be read, or describes no model.
    """
    from srcflow.cli import sources
    from srcflow.cli.parser import Parser
    from srcflow.tasks.base import Task

    content: Any = sources.read(path)
    content = content.get("fit", content)
    if not isinstance(content, dict) or "model" not in content:
        raise ConfigError("config", path, "has no section `model`.", "Give the config.yaml that fit saved beside its logs.")
    parser = Parser(prog="srcflow export")
    parser.bases = {"model": Task}
    parser.add_subclass_arguments(Task, "model", fail_untyped=False, required=True)
    task: Task = parser.instantiate(parser.parse_object({"model": content["model"]})).model
    return task
