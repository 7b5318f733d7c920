"""One training step of each stage as named parts, for counting: on the meta device or on fake tensors, without data and weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srcflow.autoencoders.base import Autoencoder
from srcflow.compressors.base import Compressor
from srcflow.errors import ConfigError
from srcflow.flows.flow import Steps
from srcflow.flows.likelihood import normal_log_prob
from srcflow.losses.perceptual import LPIPS
from srcflow.losses.reconstruction import feature_loss, pixel_loss
from srcflow.nn.unregistered import Unregistered
from srcflow.tasks.autoencoder import AutoencoderTask
from srcflow.tasks.base import Task
from srcflow.tasks.compressor import CompressorTask
from srcflow.tasks.flow import FlowTask
from srcflow.tasks.reconstruction import ReconstructionTask
from srcflow.types import Condition, Grid

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

    def features(self, autoencoder: Autoencoder, batch: int, device: str) -> tuple[Tensor, Grid]:
        """Raw features and their grid, computed from images or as a store gives them."""
        if self.stored:
            rows, columns = autoencoder.grid
            return torch.zeros(batch, rows * columns, autoencoder.dim, device=device), (rows, columns)
        return autoencoder.features(_images(autoencoder, batch, device))


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
            raw, grid = stage.features(autoencoder, batch, device)
            return compressor.compress(autoencoder.normalize(raw), grid).float()

    x = phases("frozen parts", codes).detach().requires_grad_(flow.self_denoiser is not None)
    condition = Condition(labels=torch.zeros(batch, dtype=torch.int64, device=device)) if flow.num_classes else None

    def forward() -> tuple[Tensor, Steps]:
        steps = flow.steps(x, condition)
        z = steps.blocks[-1].z
        loss = -(normal_log_prob(z).mean() + steps.logdet.mean()) / z.shape[1:].numel()
        if task.latent_norm_weight > 0:
            penalty = sum((o.z.square().mean() for o in steps.blocks[:-1]), start=steps.y.square().mean())
            loss = loss + task.latent_norm_weight * penalty
        return loss, steps

    def denoiser() -> Tensor:
        (score,) = torch.autograd.grad((normal_log_prob(steps.blocks[-1].z) + steps.logdet).sum(), x, retain_graph=True)
        return F.mse_loss(flow.denoiser(x.detach(), condition), -score.detach())

    loss, steps = phases("forward", forward)
    return loss if flow.self_denoiser is None else loss + phases("denoiser", denoiser)


def _reconstruction(stage: Stage, task: ReconstructionTask, phases: Phases, batch: int, device: str) -> Tensor:
    if isinstance(task, AutoencoderTask):
        autoencoder = task.autoencoder
    elif stage.autoencoder is None:
        raise ConfigError("model.autoencoder", None, "is not known.", "Name the configuration that writes it: --stages FILE.")
    else:
        autoencoder = stage.autoencoder
    images = _images(autoencoder, batch, device)
    raw, grid = phases("frozen parts", lambda: stage.features(autoencoder, batch, device))
    clean = autoencoder.normalize(raw)

    def reconstruct() -> tuple[Tensor | None, Tensor | None]:
        if isinstance(task, AutoencoderTask):
            return None, task.reconstruct(raw, grid, None)
        compressor = cast(CompressorTask, task).compressor
        _, features = compressor(clean, grid)
        return features, autoencoder.decode(features, grid) if task.decodes else None

    features, fake = phases("forward", reconstruct)

    def losses() -> Tensor:
        loss = torch.zeros((), device=device)
        if fake is not None:
            loss = loss + pixel_loss(fake, images, task.pixel_kind)
            if "perceptual" in task.outside:
                loss = loss + task.outside["perceptual"](fake, images)
            if task.discriminator is not None:
                game = task.discriminator.adversarial
                game.discriminator_loss(images, fake)[0].backward()  # type: ignore[no-untyped-call]  # torch is untyped here
                term = game.generator_loss(fake)
                last = task.last_layer()
                loss = loss + (term if last is None else game.adaptive_weight(loss, term, last) * term)
        if features is not None and isinstance(task, CompressorTask) and task.feature_weight > 0:
            loss = loss + feature_loss(features, clean)
        return loss

    return phases("losses", losses)
