"""Perceptual distances: how far apart two images are in the eyes of a frozen network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srcflow.encoders.base import Encoder
from srcflow.encoders.intermediates import feature_dims, feature_maps
from srcflow.errors import ConfigError, ShapeError
from srcflow.nn.unregistered import Unregistered
from srcflow.registry import Recorded


class Perceptual(nn.Module, metaclass=Recorded):
    """A distance between images by a frozen network.

    The network is held outside the module tree (`Unregistered`): a task may assign a Perceptual to an attribute, and it moves with the
    task between devices, but is not part of its checkpoints, parameters or averages. `setup` loads the weights and is called before the
    first use, also after a run is resumed.
    """

    def setup(self) -> None:
        """Load the network's weights.

        Raises:
            ConfigError: the weights are not at hand; says where they are looked up.
        """

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """The distance, averaged over the batch; computed in the network's own dtype, whatever the autocast.

        Args:
            pred: (B, 3, H, W), nominally in [0, 1], not clamped; receives gradients.
            target: (B, 3, H, W) in [0, 1]; receives none.

        Returns:
            A scalar, at least float32, 0 for equal images.

        Raises:
            ShapeError: the shapes differ, or are not those of RGB images.
        """
        if pred.shape != target.shape or pred.ndim != 4 or pred.shape[1] != 3:
            raise ShapeError(f"pred has shape {tuple(pred.shape)} and target {tuple(target.shape)}; both must be the same (B, 3, H, W).")
        with torch.autocast(pred.device.type, enabled=False):
            dtype = torch.promote_types(pred.dtype, torch.float32)
            return self.distance(pred.to(dtype), target.to(dtype)).mean()

    @abstractmethod
    def distance(self, pred: Tensor, target: Tensor) -> Tensor:
        """Distances (B,), at least float32; gradients to `pred` only."""


class LPIPS(Perceptual):
    """Learned perceptual image patch similarity (Zhang et al., 2018, arXiv 1801.03924), version 0.1.

    The linear heads come with torchmetrics. The backbone is torchvision's and is looked up on disk: in `weights`, or under its published
    name in torch's hub directory. Inputs need not lie inside [0, 1].

    Args:
        net: backbone: vgg (what autoencoders are trained with), alex (what papers report) or squeeze.
        weights: file with the backbone's torchvision state dict; null for `<torch hub directory>/checkpoints/<published name>`.
        allow_download: let torchvision's published file be downloaded if it is in neither place.
    """

    _FILES: dict[str, tuple[str, str]] = {  # noqa: RUF012  # a constant
        "vgg": ("VGG16_Weights", "vgg16-397923af.pth"),
        "alex": ("AlexNet_Weights", "alexnet-owt-7be5be79.pth"),
        "squeeze": ("SqueezeNet1_1_Weights", "squeezenet1_1-b8a52dc0.pth"),
    }

    def __init__(self, net: Literal["vgg", "alex", "squeeze"] = "vgg", weights: str | None = None, allow_download: bool = False) -> None:
        super().__init__()
        if net not in self._FILES:
            raise ConfigError("perceptual.net", net, "no such backbone.", f"Known: {', '.join(self._FILES)}.")
        self.net, self.weights, self.allow_download = net, weights, allow_download
        self.register_buffer("anchor", torch.empty(0), persistent=False)  # where the owner lives, before the network exists
        self.anchor: Tensor
        self.network: Unregistered[Any] | None = None

    def setup(self) -> None:
        """See `Perceptual.setup`."""
        self._install(self._backbone())

    def _backbone(self) -> dict[str, Tensor]:
        enum, name = self._FILES[self.net]
        cached = Path(torch.hub.get_dir()) / "checkpoints" / name
        path = Path(self.weights) if self.weights is not None else cached
        if path.is_file():
            return _read(path, "perceptual.weights")
        if self.weights is None and self.allow_download:
            import torchvision

            url = getattr(torchvision.models, enum).DEFAULT.url
            state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
            return state
        cure = (
            f"Put torchvision's {name} there, name another file in perceptual.weights, set perceptual.allow_download: true, "
            "or use EncoderPerceptual, which needs no file of its own."
        )
        raise ConfigError(
            "perceptual.weights", self.weights, f"LPIPS's {self.net} backbone is looked up at {path}, where no file is.", cure
        )

    def _install(self, backbone: dict[str, Tensor]) -> None:
        """Assemble torchmetrics' network from a torchvision state dict and torchmetrics' own linear heads."""
        from torchmetrics.functional.image import lpips

        with torch.device("meta"):  # no time is spent on initialising what is overwritten
            network = lpips._LPIPS(pretrained=False, pnet_rand=True, net=self.net, use_dropout=True)
        network.scaling_layer = lpips.ScalingLayer()
        state = {}
        for name in network.net.state_dict():  # slice3.10.weight is features.10.weight of torchvision's model
            parts = name.split(".")
            source = "features." + ".".join(parts[2:] if parts[0] == "slices" else parts[1:])
            if source not in backbone:
                raise ConfigError(
                    "perceptual.weights", self.weights, f"{source} is missing.", f"Name torchvision's {self._FILES[self.net][1]}."
                )
            state[f"net.{name}"] = backbone[source]
        state |= _read(Path(lpips.__file__).parent / "lpips_models" / f"{self.net}.pth", "torchmetrics")
        missing, unexpected = network.load_state_dict(state, strict=False, assign=True)
        if unexpected or any(not m.startswith("lins.") for m in missing):  # `lins` lists lin0, lin1, ... once more
            raise ConfigError("perceptual.net", self.net, f"torchmetrics' LPIPS network has changed: {missing or unexpected}.")
        del network.lins  # a list of lin0, lin1, ..., still on the meta device
        held: Unregistered[Any] = Unregistered(network)
        self.network = held.to(self.anchor.device) if not self.anchor.is_meta else held

    def distance(self, pred: Tensor, target: Tensor) -> Tensor:
        """See `Perceptual.distance`."""
        if self.network is None:
            raise ConfigError("perceptual", "LPIPS", "used before its weights were loaded.", "Call setup() first.")
        network, dtype = self.network.module, self.network.dtype
        with torch.no_grad():
            wanted = network.net(network.scaling_layer(2 * target.to(dtype) - 1))
        found = network.net(network.scaling_layer(2 * pred.to(dtype) - 1))
        total = torch.zeros(pred.shape[0], dtype=dtype, device=pred.device)
        for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
            weight = getattr(network, f"lin{i}").model[-1].weight.reshape(1, -1, 1, 1)  # the 1x1 convolution, outside autocast
            difference = (_unit(a) - _unit(b)).square()
            total = total + (difference * weight).sum(1).mean((1, 2))
        return total


class EncoderPerceptual(Perceptual):
    """Distance between feature maps of any registered encoder; needs no weights besides the encoder's.

    As in LPIPS, every position's feature vector is scaled to length 1, the squared difference is summed over the channels and averaged
    over positions; then it is averaged over the layers. Shallow layers (strides 2 to 8) see texture and edges, deep ones see objects; a low
    reconstruction FID wants several.

    Args:
        encoder: the frozen encoder. It should not be the network that evaluates the run.
        image_size: pixels of the shorter side that both images are resized to first, or null to take them as they come. Smaller costs less.
        layers: indices of the encoder's feature maps, shallowest first; null for all. An encoder without intermediates has its tokens only.
    """

    def __init__(self, encoder: Encoder, image_size: int | None = None, layers: Sequence[int] | None = None) -> None:
        super().__init__()
        if image_size is not None and image_size < 1:
            raise ConfigError("perceptual.image_size", image_size, "a size is positive.", "Write null to take the images as they come.")
        if image_size is not None and encoder.input_size is not None:
            raise ConfigError(
                "perceptual.image_size",
                image_size,
                f"{type(encoder).__name__} resizes its input to {encoder.input_size} itself.",
                "Remove image_size, or the encoder's own size.",
            )
        feature_dims(encoder, layers, key="perceptual.layers")
        self.encoder, self.image_size, self.layers = Unregistered(encoder), image_size, None if layers is None else list(layers)

    def setup(self) -> None:
        """See `Perceptual.setup`."""
        self.encoder.module.setup()

    def distance(self, pred: Tensor, target: Tensor) -> Tensor:
        """See `Perceptual.distance`."""
        with torch.no_grad():
            wanted = self._maps(target)
        terms = [(_unit(a) - _unit(b)).square().sum(1).mean((1, 2)) for a, b in zip(self._maps(pred), wanted, strict=True)]
        return torch.stack(terms).mean(0)

    def _maps(self, images: Tensor) -> list[Tensor]:
        images = images.to(self.encoder.dtype)
        if self.image_size is not None and min(images.shape[-2:]) != self.image_size:
            scale = self.image_size / min(images.shape[-2:])
            size = [max(1, round(s * scale)) for s in images.shape[-2:]]
            images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=scale < 1)
        return feature_maps(self.encoder.module, images, self.layers)


def _unit(x: Tensor) -> Tensor:
    """Feature vectors (B, C, h, w) scaled to length 1 over the channels, at least float32."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().sum(1, keepdim=True) + 1e-8)


def _read(path: Path, key: str) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged file fails in many ways
        raise ConfigError(key, str(path), f"is not a readable state dict: {type(e).__name__}: {e}.", "Download it again.") from e
    if not isinstance(state, dict):
        raise ConfigError(key, str(path), f"holds a {type(state).__name__}, not a state dict.")
    return state
