"""The adversarial loss of autoencoders and compressors: frozen features, light trainable heads, hinge."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from srcflow.encoders.base import Encoder
from srcflow.encoders.intermediates import feature_dims, feature_maps
from srcflow.errors import ConfigError
from srcflow.losses.diffaug import DiffAug
from srcflow.nn.unregistered import Unregistered
from srcflow.registry import Recorded


class Head(nn.Module):
    """Logits of one feature map: a pointwise convolution, a residual wide one along the raster of tokens, and a pointwise read-out.

    All convolutions are spectrally normalised. The norms take one sample as a whole (one group, so that no channel loses its mean, which
    may be what tells the sets apart); a logit does not depend on the batch.

    Args:
        dim: channels C of the feature map.
        kernel: width of the residual convolution in tokens.
    """

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.enter = spectral_norm(nn.Conv1d(dim, dim, 1))
        self.enter_norm = nn.GroupNorm(1, dim)
        self.mix = spectral_norm(nn.Conv1d(dim, dim, kernel, padding=kernel // 2))
        self.mix_norm = nn.GroupNorm(1, dim)
        self.read = spectral_norm(nn.Conv1d(dim, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, N) of a feature map (B, C, h, w), N = h * w."""
        x = F.leaky_relu(self.enter_norm(self.enter(features.flatten(2))), 0.2)
        x = (x + F.leaky_relu(self.mix_norm(self.mix(x)), 0.2)) / math.sqrt(2)
        out: Tensor = self.read(x).squeeze(1)
        return out


class Adversarial(nn.Module, metaclass=Recorded):
    """A discriminator on frozen features with trainable heads, and the generator's loss against it.

    Method: RAE, arXiv 2510.11690; features as in StyleGAN-T, arXiv 2301.09515; adaptive weight as in VQGAN, arXiv 2012.09841.

    The frozen network is held outside the module tree (it is not saved, averaged or sharded); `parameters()` are the heads' and belong to
    the discriminator's own optimizer. Neither loss leaves gradients where they do not belong: `generator_loss` none at the heads,
    `discriminator_loss` none at the images.

    Args:
        encoder: the frozen encoder; RAE uses DINO-S/8, which is TimmViT with model vit_small_patch8_224.dino.
        layers: indices of the encoder's feature maps that get a head; null for all of them.
        kernel: width of the heads' wide convolution in tokens; odd.
        weight: factor of the generator's loss on top of the adaptive weight; 0 switches the loss off (the task then never calls it).
        train_from: optimizer step from which on the discriminator is trained.
        count_from: optimizer step from which on the generator's loss counts; not before `train_from`.
        max_adaptive: cap of the ratio of gradient norms.
        augment: differentiable augmentation of real and fake images; null for none.
    """

    def __init__(
        self,
        encoder: Encoder,
        layers: Sequence[int] | None = (2, 5, 8, 11),
        kernel: int = 9,
        weight: float = 0.75,
        train_from: int = 0,
        count_from: int = 0,
        max_adaptive: float = 1e4,
        augment: DiffAug | None = None,
    ) -> None:
        super().__init__()
        if kernel < 1 or kernel % 2 == 0:
            raise ConfigError("adversarial.kernel", kernel, "the width of a centred convolution is odd.", f"Write {max(1, kernel + 1)}.")
        for name, value in (("weight", weight), ("max_adaptive", max_adaptive), ("train_from", train_from)):
            if value < 0:
                raise ConfigError(f"adversarial.{name}", value, "must not be negative.")
        if count_from < train_from:
            raise ConfigError(
                "adversarial.count_from",
                count_from,
                "an untrained discriminator would count.",
                f"Write at least train_from ({train_from}).",
            )
        dims = feature_dims(encoder, layers, key="adversarial.layers")
        self.encoder, self.layers = Unregistered(encoder), None if layers is None else list(layers)
        self.heads = nn.ModuleList(Head(dim, kernel) for dim in dims)
        self.weight, self.train_from, self.count_from = weight, train_from, count_from
        self.max_adaptive, self.augment = max_adaptive, augment

    def setup(self) -> None:
        """Load the frozen encoder's weights. Called before the first use, also after a run is resumed.

        Raises:
            ConfigError: the weights are not at hand.
        """
        self.encoder.module.setup()

    def logits(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits of every head at every token, after augmentation.

        Args:
            images: (B, 3, H, W), nominally in [0, 1]; gradients pass to them.
            generator: CPU generator of the augmentation; None for torch's global one.

        Returns:
            (B, L), at least float32: the tokens of all layers side by side.
        """
        if self.augment is not None:
            images = self.augment(images, generator)
        maps = feature_maps(self.encoder.module, images.to(self.encoder.dtype), self.layers)
        out = torch.cat([head(m) for head, m in zip(self.heads, maps, strict=True)], dim=1)
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def generator_loss(self, fake: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """-mean(logits) of reconstructed images; the heads get no gradient and keep their state.

        Args:
            fake: (B, 3, H, W), nominally in [0, 1], not clamped; receives gradients.
            generator: CPU generator of the augmentation.

        Returns:
            A scalar.
        """
        with self._heads_fixed():
            return -self.logits(fake, generator).mean()

    def discriminator_loss(
        self, real: Tensor, fake: Tensor, *, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The hinge loss of the heads.

        Args:
            real: (B, 3, H, W) in [0, 1].
            fake: (B, 3, H, W), not clamped; detached here.
            generator: CPU generator of the augmentation; real and fake images get different draws.

        Returns:
            The scalar loss, and detached numbers for logging: mean logits of real and fake images and the share of correct signs.
        """
        both = self.logits(torch.cat([real.to(fake.dtype), fake]).detach(), generator)
        on_real, on_fake = both[: real.shape[0]], both[real.shape[0] :]
        correct = ((on_real > 0).float().mean() + (on_fake < 0).float().mean()) / 2
        logs = {"logits_real": on_real.detach().mean(), "logits_fake": on_fake.detach().mean(), "accuracy": correct}
        return hinge_loss(on_real, on_fake), logs

    def adaptive_weight(self, reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
        """`weight` times the ratio of the two losses' gradient norms at the last trained layer, capped.

        Args:
            reconstruction: scalar reconstruction loss (pixels and perceptual), with its graph.
            adversarial: scalar from `generator_loss`, with its graph.
            last_layer: the parameter at which the gradients are compared.

        Returns:
            A detached scalar, at least float32. The graphs stay usable.
        """
        if self.weight == 0:
            return torch.zeros((), device=reconstruction.device)
        (of_reconstruction,) = torch.autograd.grad(reconstruction, last_layer, retain_graph=True)
        (of_adversarial,) = torch.autograd.grad(adversarial, last_layer, retain_graph=True)
        dtype = torch.promote_types(of_reconstruction.dtype, torch.float32)
        ratio = of_reconstruction.to(dtype).norm() / (of_adversarial.to(dtype).norm() + 1e-4)
        return (self.weight * ratio.clamp(max=self.max_adaptive)).detach()  # type: ignore[no-any-return]  # torch is untyped here

    @contextmanager
    def _heads_fixed(self) -> Iterator[None]:
        """Heads without gradients and, in eval mode, without the power iteration of the spectral norm."""
        trained = [p for p in self.heads.parameters() if p.requires_grad]
        training = self.heads.training
        self.heads.eval()
        for p in trained:
            p.requires_grad_(False)
        try:
            yield
        finally:
            self.heads.train(training)
            for p in trained:
                p.requires_grad_(True)


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Half the sum of mean(relu(1 - real)) and mean(relu(1 + fake)) of logits of any shape: a scalar."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
