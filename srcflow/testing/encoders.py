"""The contract of encoders."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srcflow import registry
from srcflow.encoders.base import Encoder
from srcflow.errors import ConfigError, ShapeError, SrcflowError
from srcflow.testing.expect import check_construction, close, device_of, differ, distance, fail, finite, require
from srcflow.types import Grid


def check_encoder(encoder: Encoder, images: Tensor | None = None, *, seed: int = 0) -> None:
    """Check everything that `Encoder` promises: unit tokens, frozen weights, gradients to the input, and a constructor that reads nothing.

    Args:
        encoder: the encoder, with or without pretrained weights.
        images: (B, 3, H, W) in [0, 1], B >= 2; random ones of the encoder's own size, or of 4 x 4 patches, if not given.
        seed: of the random images.

    Raises:
        AssertionError: what is broken, and by how much.
    """
    require(isinstance(encoder.dim, int) and encoder.dim > 0, encoder, f"dim is {encoder.dim!r}.")
    require(isinstance(encoder.patch_size, int) and encoder.patch_size > 0, encoder, f"patch_size is {encoder.patch_size!r}.")
    for name in ("mean", "std"):
        value = getattr(encoder, name, None)
        require(isinstance(value, Tensor) and value.shape == (3,), encoder, f"{name} is not a tensor of shape (3,).")
    require(bool((encoder.std > 0).all()), encoder, f"std {encoder.std.tolist()} is not positive.")
    if images is None:
        size = encoder.input_size or (4 * encoder.patch_size, 4 * encoder.patch_size)
        images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(seed))
    require(images.ndim == 4 and images.shape[0] >= 2 and images.shape[1] == 3, encoder, f"trial images have shape {tuple(images.shape)}.")
    images = images.to(device_of(encoder))
    encoder = copy.deepcopy(encoder)

    with torch.no_grad():
        x = _features(encoder, images, "the trial images")
    _frozen(encoder)
    with torch.no_grad():
        _repeatable(encoder, images, x)
        _sizes(encoder, images)
        _unusual(encoder, images)
        again = check_construction(encoder, Encoder)
        close(again(images)[0], x, 1e-5, encoder, "features of the encoder, and of what its specification and state_dict build")
    _gradient(encoder, images)


def _expected_grid(encoder: Encoder, images: Tensor) -> tuple[set[int], set[int]]:
    size = encoder.input_size or (int(images.shape[-2]), int(images.shape[-1]))
    rows, columns = ({n // encoder.patch_size, -(-n // encoder.patch_size)} for n in size)
    return rows, columns


def _features(encoder: Encoder, images: Tensor, what: str) -> Tensor:
    result = encoder(images)
    require(isinstance(result, tuple) and len(result) == 2, encoder, "does not return (tokens, grid).")
    x, grid = result
    _shape(encoder, images, x, grid, what)
    finite(x, encoder, f"features of {what}")
    require(x.dtype in (torch.float32, torch.float64), encoder, f"features of {what} are {x.dtype}, expected at least float32.")
    mean, rms = float(x.mean(-1).abs().max()), x.square().mean(-1).sqrt()
    require(mean <= 1e-3, encoder, f"tokens of {what} have mean up to {mean:.3g} over the channels, expected 0.")
    require(
        float((rms - 1).abs().max()) <= 2e-2,
        encoder,
        f"tokens of {what} have an RMS of {float(rms.min()):.4g} to {float(rms.max()):.4g} over the channels, expected 1.",
    )
    return x  # type: ignore[no-any-return]  # torch is untyped here


def _shape(encoder: Encoder, images: Tensor, x: Tensor, grid: Grid, what: str) -> None:
    require(
        isinstance(grid, tuple) and len(grid) == 2 and all(type(n) is int for n in grid),
        encoder,
        f"the grid is {grid!r}, not two integers.",
    )
    wanted = (images.shape[0], grid[0] * grid[1], encoder.dim)
    require(
        tuple(x.shape) == wanted,
        encoder,
        f"features of {what} have shape {tuple(x.shape)}; B, grid {grid} and dim {encoder.dim} say {wanted}.",
    )
    rows, columns = _expected_grid(encoder, images)
    require(
        grid[0] in rows and grid[1] in columns,
        encoder,
        f"the grid of {what} is {grid}, but patch_size {encoder.patch_size} and the size of the images say {min(rows)} x {min(columns)}.",
    )


def _frozen(encoder: Encoder) -> None:
    fresh = registry.build(registry.spec_of(encoder), Encoder)
    for what, subject, switch in (
        ("construction", fresh, lambda: None),
        ("train()", encoder, lambda: encoder.train()),
        ("a parent's train()", encoder, lambda: nn.ModuleList([encoder]).train()),
    ):
        switch()
        training = [n or "the encoder" for n, m in subject.named_modules() if m.training]
        require(not training, encoder, f"after {what}, in training mode: {', '.join(training[:5])}.")
        loose = [n for n, p in subject.named_parameters() if p.requires_grad]
        require(not loose, encoder, f"after {what}, {len(loose)} parameters require a gradient: {', '.join(loose[:5])}.")


def _repeatable(encoder: Encoder, images: Tensor, x: Tensor) -> None:
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    close(encoder(images)[0], x, 0.0, encoder, "features of the same images, called twice")
    changed = [k for k, v in encoder.state_dict().items() if not torch.equal(v, before[k])]
    require(not changed, encoder, f"a call changes its buffers {', '.join(changed)}.")
    close(encoder(images[1:2])[0], x[1:2], 1e-3, encoder, "features of an image alone and in a batch")
    differ(x[1], x[0], encoder, "two different images have the same features.", least=1e-5)


def _sizes(encoder: Encoder, images: Tensor) -> None:
    height, width = int(images.shape[-2]), int(images.shape[-1])
    p = encoder.patch_size
    for what, size in (
        ("a rectangle", (height, width + p)),
        ("a larger square", (height + p, width + p)),
        ("an uneven size", (height + 1, width + p // 2)),
    ):
        other = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        try:
            encoder(other)
        except (ShapeError, ConfigError):
            continue  # refusing is fine as long as it is said
        except Exception as e:
            fail(encoder, f"{what} of {size} pixels raises {type(e).__name__} ({e}); it must work, or raise ShapeError or ConfigError.")
        _features(encoder, other, f"{what} of {size} pixels")


def _unusual(encoder: Encoder, images: Tensor) -> None:
    for what, value in (("black", 0.0), ("white", 1.0)):
        finite(encoder(torch.full_like(images, value))[0], encoder, f"features of {what} images")
    try:
        encoder((255 * images).to(torch.uint8))
    except SrcflowError:
        pass
    else:
        fail(encoder, "takes integer images without a word; images are floats in [0, 1].")
    with torch.autocast(images.device.type, dtype=torch.bfloat16):
        x = encoder(images)[0]
    require(x.dtype == torch.float32, encoder, f"features under bfloat16 autocast are {x.dtype}, expected float32.")


def _gradient(encoder: Encoder, images: Tensor) -> None:
    leaf = images.clone().requires_grad_()
    x, _ = encoder(leaf)
    require(x.requires_grad, encoder, "no gradient reaches the images (perceptual losses need it): is there a no_grad inside?")
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)  # a plain sum is constant: each token has mean 0
    (x * weights).sum().backward()
    gradient = leaf.grad
    require(gradient is not None and all(bool(g.any()) for g in gradient), encoder, "the gradient at the images is zero.")
    finite(leaf.grad if leaf.grad is not None else leaf, encoder, "the gradient at the images")
    require(distance(leaf.detach(), images) == 0, encoder, "changes the images in place.")
    collected = [n for n, p in encoder.named_parameters() if p.grad is not None]
    require(not collected, encoder, f"frozen parameters collect gradients: {', '.join(collected[:5])}.")
