"""Any vision transformer of timm as an encoder."""

from __future__ import annotations

import inspect
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srcflow import artifacts
from srcflow.encoders.base import Encoder
from srcflow.errors import ConfigError, ShapeError, SrcflowError, UnknownNameError
from srcflow.nn.patchify import pair
from srcflow.types import Grid

_HEADS = ("norm.", "fc_norm.", "head.", "head_dist.", "head_drop.", "attn_pool.")
"""Parts of a timm file behind the tokens: the final norm (replaced by one without affine), pooling and classifier."""


class TimmViT(Encoder):
    """Patch tokens of any timm vision transformer, by name.

    The model's own prefix tokens (class, registers) are removed by its own count, its final norm is replaced by a LayerNorm without affine,
    and mean and std of the images are those the weights were trained with.

    Args:
        model: timm's name, with the tag of the weights where there are several, e.g. `vit_base_patch14_reg4_dinov2.lvd142m`.
        image_size: what images are resized to inside, one number or [height, width], multiples of the model's patch; null: the model's own.
        weights: "hub" (what timm downloads for this name), the path of a local safetensors file in timm's layout, the directory of an
            encoder that `srcflow convert encoder` wrote (or its model.safetensors; its mean and std come along), or null for random
            weights. Read by `setup`; a position table of another grid is resampled.
        last_layers: k: the tokens are the sum of the outputs of the last k transformer blocks (the residual stream after each, before the
            final norm), patch tokens only; 1: the last block's output.
        norm_eps: epsilon of every LayerNorm of the model, the final one included; null: the model's own.
        antialias: how a position table of another grid is resampled (bicubic; the two kinds differ for enlargement too).
        act_layer: activation of the MLPs as timm calls it ("gelu", "gelu_tanh"); null: the model's own.
        dynamic: take images as they come instead of resizing them; sides must be multiples of the patch. Position tables are resampled
            on the fly, which timm does with antialias.
        timm_args: further arguments of the timm model, e.g. `depth`, `embed_dim`, `num_heads` of a small one.

    Raises:
        UnknownNameError: timm has no such model.
        ConfigError: the model is not a plain vision transformer, or a value does not fit it.
    """

    def __init__(
        self,
        model: str,
        image_size: int | tuple[int, int] | None = None,
        weights: str | None = "hub",
        last_layers: int = 1,
        norm_eps: float | None = None,
        antialias: bool = True,
        act_layer: str | None = None,
        dynamic: bool = False,
        timm_args: dict[str, Any] | None = None,
    ) -> None:
        if dynamic and not antialias:
            raise ConfigError("dynamic", True, "timm resamples on the fly with antialias only.", "Set antialias: true.")
        arguments: dict[str, Any] = dict(timm_args or {})
        if act_layer is not None:
            arguments["act_layer"] = act_layer
        if norm_eps is not None:
            arguments["norm_layer"] = partial(nn.LayerNorm, eps=norm_eps)
        if dynamic:
            arguments["dynamic_img_size"] = True
        size = None if image_size is None else pair(image_size, "encoder.image_size")
        vit = _create(model, arguments if size is None else {**arguments, "img_size": size})
        patch = vit.patch_embed.patch_size[0]
        built: tuple[int, int] = tuple(vit.patch_embed.img_size)
        if vit.patch_embed.patch_size[1] != patch:
            raise ConfigError("encoder.model", model, "its patches are not square.")
        if any(s % patch for s in built):
            raise ConfigError("encoder.image_size", image_size, f"the sides must be multiples of {model}'s patch, {patch}.")
        if not 1 <= last_layers <= len(vit.blocks):
            raise ConfigError("encoder.last_layers", last_layers, f"{model} has {len(vit.blocks)} layers.")
        cfg = vit.pretrained_cfg
        super().__init__(vit.embed_dim, patch, tuple(cfg["mean"]), tuple(cfg["std"]), None if dynamic else built)
        self.norm_eps = float(vit.norm.eps if norm_eps is None else norm_eps)
        vit.norm = nn.Identity()  # Encoder.forward ends with the LayerNorm without affine
        self.model = vit
        self.name, self.weights, self.last_layers, self.antialias = model, weights, last_layers, antialias
        self._arguments = arguments

    @property
    def intermediate_dims(self) -> list[int]:
        """Channels of each map of `intermediates`: D for every transformer block."""
        return [self.dim] * len(self.model.blocks)

    def tokens(self, images: Tensor) -> tuple[Tensor, Grid]:
        """See `Encoder.tokens`."""
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise ShapeError(f"images of {height} x {width} pixels do not divide into {self.name}'s patches of {self.patch_size}.")
        if self.last_layers == 1:
            x = self.model.forward_features(images)[:, self.model.num_prefix_tokens :]
        else:
            depth = len(self.model.blocks)
            layers = list(range(depth - self.last_layers, depth))
            x = torch.stack(
                self.model.forward_intermediates(images, indices=layers, norm=False, output_fmt="NLC", intermediates_only=True)
            ).sum(0)
        return x, (height // self.patch_size, width // self.patch_size)

    def intermediates(self, images: Tensor) -> list[Tensor]:
        """Patch tokens after every transformer block as maps (B, D, h, w), of images (B, 3, H, W) in [0, 1] (gradients pass)."""
        maps: list[Tensor] = self.model.forward_intermediates(self.prepare(images), norm=False, output_fmt="NCHW", intermediates_only=True)
        return maps

    def setup(self) -> None:
        """Load the weights that `weights` names, the position table resampled to this encoder's grid. Random weights stay as they are.

        Raises:
            ConfigError: the file is missing, is not safetensors, does not fit the model, or was written by an encoder of other settings.
        """
        if self.weights is None:
            return
        grid = None
        if self.weights == "hub":
            state = _from_hub(self.name, self._arguments)
        else:
            state, grid = self._from_file(self.weights)
        convert = getattr(sys.modules[type(self.model).__module__], "checkpoint_filter_fn", None)
        if "pos_embed" in state and getattr(self.model, "pos_embed", None) is not None:
            state["pos_embed"] = self.resampled(state["pos_embed"], grid)
        if convert is not None:  # other projects' key layouts that timm itself reads
            takes = inspect.signature(convert).parameters
            state = convert(state, self.model, **({"antialias": self.antialias} if "antialias" in takes else {}))
        state = {k: v for k, v in state.items() if not k.startswith(_HEADS) and k != "mask_token"}
        load_exactly(self.model, state, str(self.weights), "encoder.weights")

    def resampled(self, table: Tensor, grid: Grid | None = None) -> Tensor:
        """A position table of another grid as this model's: bicubic with or without antialias as `antialias` says, at least in float32.

        Args:
            table: (1, prefix + N, D), the prefix being the tokens that have a position here (none, or the class token).
            grid: the table's (rows, columns); null: it is square.

        Returns:
            (1, prefix + rows * columns, D) of this model's grid; `table` itself if it has that grid, or is no table of such a grid.
        """
        prefix = 0 if getattr(self.model, "no_embed_class", False) else int(self.model.num_prefix_tokens)
        own: Grid = tuple(self.model.patch_embed.grid_size)
        side = math.isqrt(max(0, table.shape[1] - prefix))
        grid = grid or (side, side)
        if grid[0] * grid[1] != table.shape[1] - prefix or grid == own:
            return table  # the right grid, or a layout that timm's own conversion knows
        patches = table[:, prefix:].reshape(1, *grid, -1).permute(0, 3, 1, 2).to(torch.promote_types(table.dtype, torch.float32))
        patches = F.interpolate(patches, size=own, mode="bicubic", align_corners=False, antialias=self.antialias)
        return torch.cat([table[:, :prefix], patches.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)], 1)

    def _from_file(self, weights: str) -> tuple[dict[str, Tensor], Grid | None]:
        """The weights in timm's layout, and the grid of their position table if it is known; takes mean and std from an artifact."""
        path = Path(weights)
        if path.is_dir():
            if (path / artifacts.MANIFEST).is_file():
                artifacts.verify(path)
            path /= artifacts.MODEL
        state = read_safetensors(str(path), "encoder.weights")
        if not all(k in ("mean", "std") or k.startswith("model.") for k in state):
            return state, None
        config, grid = path.with_name(artifacts.CONFIG), None
        if config.is_file():
            grid = self._checked(weights, config)
        for name in ("mean", "std"):
            if name in state:
                getattr(self, name).copy_(state.pop(name))
        return {k.removeprefix("model."): v for k, v in state.items()}, grid

    def _checked(self, weights: str, config: Path) -> Grid:
        """The grid of the encoder that an artifact holds, if that has the settings of this one that its weights do not show."""
        try:
            spec = artifacts.read_spec_file(config)
            with torch.device("meta"):
                source = artifacts.build_spec(spec, Encoder, config)
        except SrcflowError as e:
            raise ConfigError("encoder.weights", weights, f"is no artifact of an encoder: {e}") from e
        if not isinstance(source, TimmViT):
            raise ConfigError("encoder.weights", weights, f"holds the weights of {type(source).__name__}, not of {type(self).__name__}.")
        there, here = source._settings(), self._settings()
        if wrong := [f"{k} {there[k]} there, {here[k]} here" for k in here if there[k] != here[k]]:
            raise ConfigError(
                "encoder.weights", weights, f"belongs to an encoder of other settings: {'; '.join(wrong)}.", f"Its own: {json.dumps(spec)}"
            )
        grid: Grid = tuple(source.model.patch_embed.grid_size)
        return grid

    def _settings(self) -> dict[str, Any]:
        """What changes the tokens and cannot be seen in the weights."""
        block = self.model.blocks[0]
        heads = getattr(getattr(block, "attn", None), "num_heads", None)
        return {"norm_eps": self.norm_eps, "heads": heads, "activation": type(getattr(getattr(block, "mlp", None), "act", None)).__name__}


def _create(name: str, arguments: dict[str, Any], pretrained: bool = False) -> Any:
    import timm

    if not timm.is_model(name):
        raise UnknownNameError("encoder.model", name, timm.list_models("*vit*"))
    try:
        vit = timm.create_model(name, pretrained=pretrained, num_classes=0, global_pool="", **arguments)
    except (TypeError, AssertionError, RuntimeError) as e:
        raise ConfigError("encoder.model", name, f"timm cannot build it with {arguments}: {e}.", "Change timm_args or the model.") from e
    missing = [a for a in ("blocks", "norm", "num_prefix_tokens", "forward_intermediates") if not hasattr(vit, a)]
    missing += [] if hasattr(getattr(vit, "patch_embed", None), "img_size") else ["patch_embed.img_size"]
    if missing or not hasattr(vit.norm, "eps"):
        raise ConfigError("encoder.model", name, f"is not a plain vision transformer (no {', '.join(missing) or 'final LayerNorm'}).")
    return vit


def _from_hub(name: str, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The weights timm downloads for `name`, at the grid they were trained at."""
    try:
        # timm's own loading at the native size resamples nothing
        vit = _create(name, {k: v for k, v in arguments.items() if k != "img_size"}, pretrained=True)
    except ConfigError:
        raise
    except Exception as e:  # hub clients raise what they like: network, cache and authorisation errors
        raise ConfigError("encoder.weights", "hub", f"{name} could not be fetched: {e}.", "Give the path of a safetensors file.") from e
    return dict(vit.state_dict())


def read_safetensors(path: str, key: str) -> dict[str, Tensor]:
    """The tensors of a local safetensors file, on the CPU.

    Raises:
        ConfigError: the file is missing, or is not a safetensors file; `key` names the configuration key.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise ConfigError(key, path, "there is no such file.", "Give the path of a safetensors file, or null.")
    try:
        return dict(load_file(path))
    except SafetensorError as e:
        raise ConfigError(key, path, f"is not a safetensors file: {e}.", "Convert it with safetensors.torch.save_file.") from e


def load_exactly(module: nn.Module, state: dict[str, Tensor], path: str, key: str) -> None:
    """Load `state` into `module`, strictly.

    Raises:
        ConfigError: names or shapes do not match; `key` names the configuration key.
    """
    own = module.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [f"{k}: {tuple(state[k].shape)} for {tuple(v.shape)}" for k, v in own.items() if k in state and state[k].shape != v.shape]
    if missing or extra or shapes:
        found = [f"{n} {what} ({', '.join(names[:3])}{', ...' if n > 3 else ''})" for what, names in
                 (("missing", missing), ("unknown", extra), ("of another shape", shapes)) if (n := len(names))]  # fmt: skip
        raise ConfigError(key, path, f"does not fit {type(module).__name__}: {'; '.join(found)}.", "Is it a file of this very model?")
    module.load_state_dict(state)
