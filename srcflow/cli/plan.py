"""`srcflow plan`: what a run will cost, before it is made."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from srcflow.errors import ArtifactError, ConfigError, Problems

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from srcflow.cli.parser import Parser
    from srcflow.plan.estimate import Run
    from srcflow.plan.step import Stage
    from srcflow.tasks.base import Task

HELP = "Parameters, FLOPs, hours, memory and disk of a run, without making it."


def configure(parser: Parser) -> None:
    """Add the command's arguments."""
    parser.add_argument("configs", type=str, nargs="+", help="The run's YAML files, as fit's --config: the later ones win.")
    parser.add_argument("--set", type=str, nargs="+", default=[], help="Further values: KEY=VALUE, with fit's keys.")
    parser.add_argument("--stages", type=str, nargs="*", default=[], help="YAML files of earlier stages that are not trained yet.")
    parser.add_argument("--gpu", type=str, default="h100", help="The device: b200, h200, h100, a100, l40s, rtx4090, ...; or any name.")
    parser.add_argument("--gpus", type=int | None, default=None, help="How many; default: trainer.devices times trainer.num_nodes.")
    parser.add_argument("--mfu", type=float, default=0.4, help="Share of the device's peak that the run sustains.")
    parser.add_argument("--tflops", type=float | None, default=None, help="Another peak, in 1e12 FLOP per second, of the run's precision.")
    parser.add_argument("--memory", type=float | None, default=None, help="Another memory, in 1e9 bytes.")
    parser.add_argument("--images", type=int | None, default=None, help="Images to encode, for the size of a feature store.")
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")


def run(config: Namespace) -> int:
    """Plan and print. The status is 1 where the run does not fit into the device's memory.

    Raises:
        ConfigError: arguments or a configuration that cannot be used.
    """
    from srcflow.cli import load_parts
    from srcflow.plan.estimate import plan
    from srcflow.plan.hardware import accelerator

    memory = None if config.memory is None else config.memory * 1e9
    device = accelerator(config.gpu, config.tflops, memory)
    if config.images is not None and config.images < 1:
        raise ConfigError("images", config.images, "must be at least 1.")
    load_parts()
    content = settings(config.configs, config.set)
    stage, notes = stage_of(content, config.stages)
    made = plan(stage, run_of(content, config.gpus), device, config.mfu, config.images)
    made["notes"] = notes
    if config.json:
        print(json.dumps(made, indent=1))
    else:
        print("\n".join(report(made)))
    return 1 if made["warnings"] else 0


# --- the configuration ---------------------------------------------------------------------------------------------------------------


def settings(files: list[str], values: list[str]) -> dict[str, Any]:
    """The sections model, data and trainer of a run, as `srcflow fit` would read them.

    Raises:
        ConfigError: a file or a value that cannot be used.
    """
    import lightning as L

    from srcflow.cli import sources
    from srcflow.cli.parser import Parser
    from srcflow.tasks.base import Task

    problems = Problems()
    for file in files:
        with problems.collect():
            sources.read(file, "configs")
    for value in values:
        if not re.match(r"[\w.]+=", value):
            problems.add(ConfigError("set", value, "is not KEY=VALUE.", "For example trainer.max_steps=1000."))
    problems.raise_if_any()
    parser = Parser(prog="srcflow plan")
    parser.bases = {"model": Task, "data": L.LightningDataModule}
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(Task, "model", fail_untyped=False, required=True)
    parser.add_subclass_arguments(L.LightningDataModule, "data", fail_untyped=False, required=True)
    parser.add_class_arguments(L.Trainer, "trainer", fail_untyped=False, instantiate=False)
    for key in ("seed_everything", "ckpt_path", "weights_only", "optimizer", "lr_scheduler"):  # fit's, which cost nothing
        parser.add_argument(f"--{key}", type=Any, default=None)
    arguments = [a for file in files for a in ("--config", file)]
    arguments += [f"--{value}" for value in values]
    parsed = parser.parse_args(arguments)
    return dict(parsed.as_dict())


def stage_of(content: Mapping[str, Any], stages: list[str]) -> tuple[Stage, list[str]]:
    """The task on the meta device with the frozen parts it reads, and remarks about these.

    What an earlier stage writes is read from its directory, or else built from the configuration that writes it. No other file is read.

    Args:
        content: the run's configuration (see `settings`).
        stages: configurations of earlier stages.

    Raises:
        ConfigError: a file of `stages` cannot be used, the compressor's autoencoder cannot be found, or the parts do not fit each other.
    """
    from srcflow.autoencoders.base import Autoencoder
    from srcflow.chain import check_chain
    from srcflow.compressors.base import Compressor
    from srcflow.compressors.identity import Identity
    from srcflow.datamodules.feature_store import FeatureStore
    from srcflow.plan.step import Stage
    from srcflow.tasks.compressor import CompressorTask
    from srcflow.tasks.flow import FlowTask

    task = task_on_meta(content["model"])
    earlier = Earlier(stages)
    path = str(content["data"]["class_path"])
    stored = path.rpartition(".")[2] == FeatureStore.__name__
    autoencoder: Autoencoder | None = None
    compressor: Compressor | None = None
    if isinstance(task, CompressorTask):
        found = earlier.part(task.place_of_autoencoder, "autoencoder")
        if found is None:
            raise ConfigError(
                "model.autoencoder",
                task.place_of_autoencoder,
                "is not a directory, and no configuration that was given writes it.",
                "Name the one that does: --stages FILE.",
            )
        autoencoder = cast(Autoencoder, found)
    elif isinstance(task, FlowTask):
        product = earlier.part(task.codec, "compressor")
        place = task.moved_autoencoder or earlier.autoencoder_of(task.codec)
        if isinstance(product, Autoencoder):
            autoencoder, compressor = product, Identity(product.dim)
        elif isinstance(product, Compressor) and place is not None:
            autoencoder, compressor = cast("Autoencoder | None", earlier.part(place, "autoencoder")), product
        if autoencoder is not None and compressor is not None:
            check_chain(autoencoder, compressor, task.flow)
        else:
            autoencoder = compressor = None
            earlier.notes.append(
                f"model.codec = {task.codec!r} is not a directory, and no configuration that was given writes it, or its autoencoder: "
                "encoder and compressor are not counted. Name the ones that do: --stages FILE FILE."
            )
    return Stage(task, autoencoder, compressor, stored), earlier.notes


class Earlier:
    """Finds what earlier stages make, in their directories or in the configurations that write these.

    Args:
        stages: YAML files of earlier stages; of several that write one directory, the first.

    Raises:
        ConfigError: a file of `stages` cannot be read.
    """

    def __init__(self, stages: list[str]) -> None:
        from srcflow.cli import sources

        self.notes: list[str] = []
        self._writers: dict[str, tuple[str, dict[str, Any]]] = {}
        for path in stages:
            model = sources.read(path, "stages").get("model")
            arguments = model.get("init_args") if isinstance(model, dict) else None
            artifact = arguments.get("artifact") if isinstance(arguments, dict) else None
            if isinstance(artifact, str):
                self._writers.setdefault(artifact, (path, cast("dict[str, Any]", model)))

    def part(self, place: str, role: str) -> Any:
        """The untrained module that the directory `place` holds or will hold, on the meta device; None if it cannot be known.

        Args:
            place: the directory, as the configuration names it.
            role: which part of a bundle is meant.
        """
        import torch
        from torch import nn

        from srcflow import artifacts
        from srcflow.chain import locate
        from srcflow.cli import sources

        try:
            found = locate(place)
        except ArtifactError:
            found = {}
        directory = found.get(role) or found.get("autoencoder")
        if directory is not None:
            spec = artifacts.read_spec(directory)
            with torch.device("meta"):
                return artifacts.build_spec(spec, nn.Module, Path(directory) / artifacts.CONFIG)
        if place not in self._writers:
            return None
        file, model = self._writers[place]
        sources.read(file, "stages")  # the one that is meant now, if an error has to say where
        return task_on_meta(model).made

    def autoencoder_of(self, place: str) -> str | None:
        """The directory of the autoencoder that a compressor's directory is built on; None if it cannot be known."""
        from srcflow.chain import locate

        try:
            return str(locate(place)["autoencoder"])
        except (ArtifactError, KeyError):
            found = self._writers[place][1].get("init_args", {}).get("autoencoder") if place in self._writers else None
            return found if isinstance(found, str) else None


def task_on_meta(model: Mapping[str, Any]) -> Task:
    """The task that a section `model` describes, on the meta device."""
    import torch

    from srcflow.cli.parser import Parser
    from srcflow.tasks.base import Task

    parser = Parser(prog="srcflow plan")
    parser.bases = {"model": Task}
    parser.add_subclass_arguments(Task, "model", fail_untyped=False, required=True)
    with torch.device("meta"):
        task: Task = parser.instantiate(parser.parse_object({"model": model})).model
    return task


def run_of(content: Mapping[str, Any], gpus: int | None) -> Run:
    """Batch, processes, precision and length of a run.

    Args:
        content: the sections of its configuration.
        gpus: how many processes; None: as the trainer has it, one where it leaves that to the machine.

    Raises:
        ConfigError: a setting that plan cannot read, or that a task would refuse.
    """
    from srcflow.plan.estimate import Run

    trainer, data = content["trainer"], content["data"].get("init_args") or {}
    batch_size = data.get("batch_size")
    if not isinstance(batch_size, int):
        raise ConfigError("data.batch_size", batch_size, "is not said, so nothing can be planned.", "Write it.")
    precision = str(trainer.get("precision") or "32-true")
    known = {"bf16-mixed": True, "bf16": True, "32-true": False, "32": False}
    if precision not in known:
        raise ConfigError("trainer.precision", precision, "cannot be planned.", f"Known: {', '.join(known)}.")
    strategy = trainer.get("strategy")
    name, arguments = _class(strategy)
    steps = trainer.get("max_steps")
    callbacks = trainer.get("callbacks") or []
    pairs = [_class(c) for c in (callbacks if isinstance(callbacks, list) else [callbacks])]
    emas = [a for n, a in pairs if n == "EMA"]
    decays = [a.get("decay") for a in emas]
    return Run(
        batch_size=batch_size,
        accumulate=int(trainer.get("accumulate_grad_batches") or 1),
        ranks=_devices(trainer) if gpus is None else gpus,
        steps=steps if isinstance(steps, int) and steps > 0 else None,
        mixed=known[precision],
        sharded=name == "ModelParallelStrategy",
        bucket_views=bool(arguments.get("gradient_as_bucket_view")),
        averages=sum(len(d) if isinstance(d, list) else 1 for d in decays),
        kept=_kept(pairs, steps),
        snapshots=_snapshots(emas, steps),
        like="cpu" if trainer.get("accelerator") == "cpu" else "cuda",
    )


def _class(value: Any) -> tuple[str, dict[str, Any]]:
    """Class name and arguments of a part of a configuration."""
    if isinstance(value, str):
        return value.rpartition(".")[2], {}
    if not isinstance(value, Mapping):
        return "", {}
    return str(value.get("class_path", "")).rpartition(".")[2], {**(value.get("init_args") or {}), **(value.get("dict_kwargs") or {})}


def _devices(trainer: Mapping[str, Any]) -> int:
    devices, nodes = trainer.get("devices"), int(trainer.get("num_nodes") or 1)
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if isinstance(devices, list):
        return len(devices) * nodes
    return devices * nodes if isinstance(devices, int) and devices > 0 else nodes


def _kept(callbacks: list[tuple[str, dict[str, Any]]], steps: Any) -> int | None:
    """How many checkpoint files are there at the end; None where that depends on the length of an epoch."""
    total, length = 0, steps if isinstance(steps, int) and steps > 0 else None
    ours = [(n, a) for n, a in callbacks if n in ("Checkpoints", "ModelCheckpoint")]
    for name, arguments in ours or [("ModelCheckpoint", {})]:  # without one Lightning adds its own
        if name == "Checkpoints":  # last.ckpt is a link; a file that stays for good may be among the newest
            every, forever, keep = (arguments.get(k) for k in ("every_n_steps", "keep_every_n_steps", "keep"))
            keep = 2 if keep is None else int(keep)
            if length is None:
                if every is None or forever is not None:
                    return None
                total += keep
                continue
            written = [] if every is None else [*range(every, length + 1, every)]
            written += [length] if every is not None and length % every else []  # one at the end
            total += keep if every is None else len({*written[-keep:], *(s for s in written if forever and s % forever == 0)})
            continue
        top = arguments.get("save_top_k", 1)
        if top == -1:
            every = arguments.get("every_n_train_steps")
            if not every or length is None:
                return None
            top = length // every
        total += top + bool(arguments.get("save_last"))
    return total


def _snapshots(averages: list[dict[str, Any]], steps: Any) -> int | None:
    """How many files of averaged weights the EMA callbacks leave; None where the run's length is not said."""
    total = 0
    for arguments in averages:
        decay, every = arguments.get("decay"), arguments.get("snapshot_every")
        if every is not None:
            if not isinstance(steps, int) or steps < 1:
                return None
            total += steps // every * (len(decay) if isinstance(decay, list) else 1)
    return total


# --- the report ----------------------------------------------------------------------------------------------------------------------

ROWS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer (AdamW)",
    "ema": "moving average",
    "frozen": "frozen parts",
    "buckets": "gradient buckets",
    "gathered": "gathered layers",
    "activations": "activations",
    "peak": "largest at one moment",
}


def report(made: Mapping[str, Any]) -> list[str]:
    """The plan as lines of text."""
    run, parameters, flops, hours, memory, disk = (made[k] for k in ("run", "parameters", "flops", "hours", "memory", "disk"))
    device = run["device"]
    heads = f", {parameters['discriminator']:,} in the discriminator's heads" if parameters["discriminator"] else ""
    lines = [
        f"parameters  {parameters['trained']:,} trained{heads}; frozen parts and buffers {_size(parameters['frozen_bytes'])}",
        f"batch       {run['global_batch']} = {run['batch_size']} x {run['ranks']} processes x {run['accumulate']} accumulated",
    ]
    if flops:
        split = ", ".join(f"{name} {_flop(n)}" for name, n in flops["parts"].items() if n)
        lines.append(f"FLOPs       {_flop(flops['image'])} per image ({split}), and {_flop(flops['recomputed'])} computed a second time")
        if flops["all"] is not None:
            lines[-1] += f"; {flops['all']:.3g} in all, {run['steps']:,} steps"
    else:
        lines.append("FLOPs       0: nothing is trained by gradients")
    if hours is not None:
        lines.append(
            f"time        {_hours(hours['wall'])} on {run['ranks']} x {device['name']} at {run['mfu']:.0%} of "
            f"{device['tflops' if run['mixed'] else 'tflops32']:g} TFLOP/s: {hours['device']:.3g} device hours. Loading data, validation "
            "and sampling not included"
        )
    elif flops:
        lines.append("time        unknown: trainer.max_steps is not set")
    if memory:
        lines += ["", f"memory per process ({'bf16-mixed' if run['mixed'] else 'float32'})"]
        strategies = memory["strategies"]
        lines.append(
            f"  {'':<24}" + "".join(f"{n + (' *' if n == memory['chosen'] and len(strategies) > 1 else ''):>14}" for n in strategies)
        )
        for key, title in ROWS.items():
            if any(s[key] for s in strategies.values()):
                lines.append(f"  {title:<24}" + "".join(f"{_size(s[key]):>14}" for s in strategies.values()))
        if memory["activations"]:
            each = ", ".join(f"{k}: {_size(v)}" for k, v in memory["activations"].items())
            lines.append(
                f"  activations by checkpoint_every (here {memory['checkpoint_every']}; 0 keeps all, 1 recomputes every layer): {each}"
            )
        lines.append(f"  of {device['memory'] / 1e9:.0f} GB; CUDA's context, kernels' workspace and the allocator's gaps come on top")
    kept = "depends on the length of an epoch" if disk["kept"] is None else f"{disk['kept']} kept: {_size(disk['checkpoints'])}"
    lines += ["", f"disk        checkpoint {_size(disk['checkpoint'])}, {kept}; artifact {_size(disk['artifact'])}"]
    if disk["snapshots"] != 0:
        many = "their number depends on the length of the run" if disk["snapshots"] is None else f"{disk['snapshots']} of them"
        lines.append(f"            snapshots of averages {_size(disk['snapshot'])}, {many}")
    if "features" in disk:
        f = disk["features"]
        lines.append(
            f"            srcflow encode: {_size(f['image'])} per image, {_size(f['all'])} for {f['images']:,} (twice that with --flip)"
        )
    lines += [f"note: {n}" for n in made["notes"]]
    return lines + [f"warning: {w}" for w in made["warnings"]]


def _size(n: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n >= scale:
            return f"{n / scale:.2f} {unit}"
    return f"{n:.0f} B"


def _flop(n: float) -> str:
    for unit, scale in (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n:.0f} FLOP"


def _hours(hours: float) -> str:
    return f"{hours / 24:.3g} days" if hours >= 72 else f"{hours:.3g} hours" if hours >= 1 else f"{hours * 60:.3g} minutes"
