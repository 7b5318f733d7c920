"""One training step of each stage as named parts, for counting: on the meta device or on fake tensors, without data and weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor, nn

from srcflow.autoencoders.base import Autoencoder
from srcflow.codec import Codec
from srcflow.compressors.base import Compressor
from srcflow.errors import ConfigError
from srcflow.losses.perceptual import LPIPS, Perceptual
from srcflow.nn.unregistered import Unregistered
from srcflow.objectives.flow import FlowObjective, denoiser_error, flow_objective
from srcflow.objectives.reconstruction import ImageWeights, adversarial_objective, feature_objective, image_objective
from srcflow.tasks.autoencoder import AutoencoderTask
from srcflow.tasks.base import Task
from srcflow.tasks.compressor import CompressorTask
from srcflow.tasks.flow import FlowTask
from srcflow.tasks.reconstruction import ReconstructionTask
from srcflow.types import Condition, Features

T = TypeVar("T")


class Phases(Protocol):
    """What watches a step."""

    def __call__(self, name: str, function: Callable[[], T]) -> T:
        """Run `function`, a part of the step called `name`, and return its result."""


@dataclass(frozen=True)
class Stage:
    """A task and the frozen parts of earlier stages that it reads, all on the meta device.

    Args:
        task: an untrained task.
        autoencoder: the frozen autoencoder of a compressor's or flow's run; None: not known (a flow's step then starts at its codes).
        compressor: the frozen compressor of a flow's run.
        stored: features are read from a store, so that no encoder runs.
    """

    task: Task
    autoencoder: Autoencoder | None = None
    compressor: Compressor | None = None
    stored: bool = False

    def copied(self) -> Stage:
        """A copy that can be changed, ready to be run: fitted parts are marked as fitted, and losses have their networks."""
        made: Stage = copy.deepcopy(self)
        task = made.task
        if isinstance(task, CompressorTask) and made.autoencoder is not None:
            task.set_outside("autoencoder", made.autoencoder)
        perceptual = task.outside.get("perceptual")
        if isinstance(perceptual, LPIPS):
            _install(perceptual)
        for module in made.modules():
            mark_fitted(module)
        return made

    def modules(self) -> list[nn.Module]:
        """The task and everything that is beside it, each once."""
        found: list[nn.Module] = [self.task]
        for module in (self.autoencoder, self.compressor, *self.task.outside.values()):
            if module is not None and not any(module is f for f in found):
                found.append(module)
        for module in list(found):
            found += [m.module for m in module.modules() if isinstance(m, Unregistered)]
        return found

    @property
    def trains(self) -> bool:
        """Whether anything is trained by gradients."""
        return any(p.requires_grad for p in self.task.parameters())

    def run(self, phases: Phases, batch: int, device: str) -> None:
        """One forward and backward pass over `batch` images. All losses are on, as late in training.

        Raises:
            ConfigError: a task that is none of the three stages', or a compressor whose autoencoder is not known.
        """
        if not self.trains:
            return
        if isinstance(self.task, FlowTask):
            loss = _flow(self, self.task, phases, batch, device)
        elif isinstance(self.task, ReconstructionTask):
            loss = _reconstruction(self, self.task, phases, batch, device)
        else:
            raise ConfigError("model", type(self.task).__name__, "is none of the three stages' tasks.")
        phases("backward", loss.backward)  # what else the step made is gone by now, as when a task's training_step has returned

    def features(self, codec: Codec, batch: int, device: str) -> Features:
        """Raw features, computed from images or as a store gives them."""
        autoencoder, indices = codec.autoencoder, torch.zeros(batch, dtype=torch.int64)
        if not self.stored:
            return codec.features({"images": _images(autoencoder, batch, device), "indices": indices})
        rows, columns = autoencoder.grid
        stored = torch.zeros(batch, rows * columns, autoencoder.dim, device=device)
        return codec.features({"features": stored, "grid": (rows, columns), "indices": indices})


def _images(autoencoder: Autoencoder, batch: int, device: str) -> Tensor:
    return torch.zeros(batch, 3, *autoencoder.image_size, device=device)


def mark_fitted(module: nn.Module) -> None:
    """Let fitted parts be used; their statistics have no values here anyway."""
    for name in ("statistics_fitted", "fitted", "pca_started"):
        for m in module.modules():
            if name in m._buffers:
                m.register_buffer(name, torch.tensor(True))


def _install(perceptual: LPIPS) -> None:
    """Give LPIPS its backbone, without weights."""
    import torchvision

    name = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}[perceptual.net]
    with torch.device("meta"):
        perceptual._install(torchvision.models.get_model(name).state_dict())
    perceptual.to("meta")


def _flow(stage: Stage, task: FlowTask, phases: Phases, batch: int, device: str) -> Tensor:
    flow, autoencoder, compressor = task.flow, stage.autoencoder, stage.compressor
    empty = torch.zeros(batch, flow.grid[0] * flow.grid[1], flow.channels, device=device)

    def codes() -> Tensor:
        if autoencoder is None or compressor is None:
            return empty
        with torch.no_grad():
            codec = Codec(autoencoder, compressor)
            return codec.codes(stage.features(codec, batch, device)).x

    trains_denoiser = flow.self_denoiser is not None
    x = phases("frozen parts", codes).detach().requires_grad_(trains_denoiser)
    condition = Condition(labels=torch.zeros(batch, dtype=torch.int64, device=device)) if flow.num_classes else None

    def forward() -> FlowObjective:
        return flow_objective(flow, x, condition, latent_norm_weight=task.latent_norm_weight)

    found = phases("forward", forward)
    if not trains_denoiser:
        return found.total
    return found.total + phases("denoiser", lambda: denoiser_error(flow, x, condition, found.likelihood, 1.0))


def _reconstruction(stage: Stage, task: ReconstructionTask, phases: Phases, batch: int, device: str) -> Tensor:
    if isinstance(task, AutoencoderTask):
        autoencoder = task.autoencoder
    elif stage.autoencoder is None:
        raise ConfigError("model.autoencoder", None, "is not known.", "Name the configuration that writes it: --stages FILE.")
    else:
        autoencoder = stage.autoencoder
    images, codec = _images(autoencoder, batch, device), Codec(autoencoder)
    features = phases("frozen parts", lambda: stage.features(codec, batch, device))
    clean = codec.normalized(features, 0, "plan")

    def reconstruct() -> tuple[Tensor | None, Tensor | None]:
        if isinstance(task, AutoencoderTask):
            return None, task.reconstruct(features, None, 0, "plan")
        compressor = cast(CompressorTask, task).compressor
        _, expanded = compressor(clean, features.grid)
        return expanded, codec.decoded(expanded, features.grid) if task.decodes else None

    expanded, fake = phases("forward", reconstruct)

    def losses() -> Tensor:
        loss = torch.zeros((), device=device)
        if fake is not None:
            weights = ImageWeights(task.pixel_weight, task.pixel_kind, task.perceptual_weight)
            loss = loss + image_objective(fake, images, weights, cast("Perceptual | None", task.outside.get("perceptual"))).total
            if task.discriminator is not None:
                adversarial = task.discriminator.adversarial
                adversarial.discriminator_loss(images, fake)[0].backward()  # type: ignore[no-untyped-call]  # torch is untyped here
                last = task.last_layer()
                game = adversarial.generator_loss(fake) if last is None else adversarial_objective(adversarial, loss, fake, last).total
                loss = loss + game
        if expanded is not None and isinstance(task, CompressorTask) and task.feature_weight > 0:
            loss = loss + feature_objective(expanded, clean, task.feature_weight).total
        return loss

    return phases("losses", losses)
