"""check_encoder passes a sound encoder and fails each broken one for the reason that is broken."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from srcflow.encoders.base import Encoder
from srcflow.errors import ShapeError
from srcflow.testing import (
    check_encoder,
)
from srcflow.types import Grid


class ConvEncoder(Encoder):
    """Sound: patches through one convolution."""

    def __init__(self, dim: int = 12, patch_size: int = 4, input_size: tuple[int, int] | None = None) -> None:
        super().__init__(dim, patch_size, input_size=input_size)
        self.project = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def tokens(self, images: Tensor) -> tuple[Tensor, Grid]:
        if images.shape[-2] % self.patch_size or images.shape[-1] % self.patch_size:
            raise ShapeError(f"{tuple(images.shape[-2:])} is no multiple of {self.patch_size}")
        x = self.project(images)
        return x.flatten(2).transpose(1, 2), (int(x.shape[2]), int(x.shape[3]))


class LoudEncoder(ConvEncoder):
    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        x, grid = super().forward(images)
        return 1.1 * x, grid


class ShiftedEncoder(ConvEncoder):
    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        x, grid = super().forward(images)
        return x + 0.01, grid


class TrainingEncoder(ConvEncoder):
    def train(self, mode: bool = True) -> TrainingEncoder:
        nn.Module.train(self, mode)
        return self


class LooseEncoder(ConvEncoder):
    def train(self, mode: bool = True) -> LooseEncoder:
        super().train(mode)
        for p in self.parameters():
            p.requires_grad_(mode)
        return self


class DetachedEncoder(ConvEncoder):
    def tokens(self, images: Tensor) -> tuple[Tensor, Grid]:
        with torch.no_grad():
            return super().tokens(images)


class BatchEncoder(ConvEncoder):
    def tokens(self, images: Tensor) -> tuple[Tensor, Grid]:
        x, grid = super().tokens(images)
        return x - 0.5 * x.mean(0, keepdim=True), grid


class DiceEncoder(ConvEncoder):
    def tokens(self, images: Tensor) -> tuple[Tensor, Grid]:
        x, grid = super().tokens(images)
        return x + 1e-3 * torch.randn_like(x), grid


class TransposedEncoder(ConvEncoder):
    """Says (columns, rows)."""

    def tokens(self, images: Tensor) -> tuple[Tensor, Grid]:
        x, (rows, columns) = super().tokens(images)
        return x, (columns, rows)


class WrongPatchEncoder(ConvEncoder):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, self.dim, 2, stride=2)


class WrongDimEncoder(ConvEncoder):
    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        x, grid = super().forward(images)
        return torch.cat([x, x], dim=-1), grid


class ReadingEncoder(ConvEncoder):
    def __init__(self) -> None:
        super().__init__()
        with open(os.devnull):
            pass


class SafetensorsEncoder(ConvEncoder):
    path: ClassVar[Path]

    def __init__(self) -> None:
        super().__init__()
        self.project.load_state_dict(safetensors.torch.load_file(self.path))


class CrashingEncoder(ConvEncoder):
    def tokens(self, images: Tensor) -> tuple[Tensor, Grid]:
        if images.shape[-1] != images.shape[-2]:
            raise RuntimeError("squares only")
        return super().tokens(images)


class CountingEncoder(ConvEncoder):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def tokens(self, images: Tensor) -> tuple[Tensor, Grid]:
        self.calls += 1
        return super().tokens(images)


class FragileEncoder(ConvEncoder):
    """No epsilon, so a black image divides by zero."""

    norm_eps = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.mean.zero_()
        self.project = nn.Conv2d(3, self.dim, self.patch_size, stride=self.patch_size, bias=False)


class HalfEncoder(ConvEncoder):
    def forward(self, images: Tensor) -> tuple[Tensor, Grid]:
        x, grid = super().forward(images)
        return (x.bfloat16() if torch.is_autocast_enabled("cpu") else x), grid


class EagerEncoder(ConvEncoder):
    """Looks at its weights while it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = self.project.weight.detach().abs().max().item()


class ForgetfulEncoder(ConvEncoder):
    """A weight that no state_dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = (torch.rand(self.dim),)

    def tokens(self, images: Tensor) -> tuple[Tensor, Grid]:
        x, grid = super().tokens(images)
        return x * self.hidden[0], grid


class BlindEncoder(ConvEncoder):
    def tokens(self, images: Tensor) -> tuple[Tensor, Grid]:
        x, grid = super().tokens(images)
        return x * 0 + torch.arange(self.dim), grid


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (LoudEncoder, "RMS of 1.1"),
        (ShiftedEncoder, "mean up to 0.01"),
        (TrainingEncoder, "in training mode"),
        (LooseEncoder, "2 parameters require a gradient: project.weight"),
        (DetachedEncoder, "no gradient reaches the images"),
        (BatchEncoder, "alone and in a batch"),
        (DiceEncoder, "called twice"),
        (TransposedEncoder, "the grid of a rectangle"),
        (WrongPatchEncoder, "patch_size 4"),
        (WrongDimEncoder, "shape .*dim 12 say"),
        (ReadingEncoder, f"constructor opens {os.devnull}"),
        (SafetensorsEncoder, "constructor opens .*weights.safetensors"),
        (CrashingEncoder, "a rectangle of .* raises RuntimeError"),
        (CountingEncoder, "changes its buffers calls"),
        (FragileEncoder, "black images.*not finite"),
        (HalfEncoder, "under bfloat16 autocast"),
        (EagerEncoder, "meta device"),
        (ForgetfulEncoder, "what its specification and state_dict build"),
        (BlindEncoder, "two different images"),
    ],
)
def test_broken_encoders_fail(encoder: type[ConvEncoder], message: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    SafetensorsEncoder.path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(ConvEncoder().project.state_dict(), SafetensorsEncoder.path)
    with pytest.raises(AssertionError, match=f"{encoder.__name__}: .*{message}"):
        check_encoder(encoder())


def test_a_sound_encoder_passes_and_is_left_alone() -> None:
    encoder = ConvEncoder(dim=7, input_size=(8, 12))
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    check_encoder(encoder)
    check_encoder(encoder, torch.rand(3, 3, 20, 20))
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    check_encoder(ConvEncoder())
