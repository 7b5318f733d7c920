"""Inception-v3 features, as the published FID numbers use them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srcflow.errors import ConfigError, ShapeError
from srcflow.metrics.features.base import Extractor
from srcflow.metrics.features.quantisation import to_uint8
from srcflow.nn.unregistered import Unregistered


class Inception(Extractor):
    """Torch-fidelity's `inception-v3-compat`: 2048 pooled features of the 2015 TensorFlow graph, with its own bilinear resizing to 299 px.

    Images become uint8 by `to_uint8` (nearest level, halves up). The network runs in float32, without autocast and TF32. It needs the extra
    `fid` (torch-fidelity) and its weights file.

    Args:
        weights: path of torch-fidelity's weights file (weights-inception-2015-12-05-6726825d.pth); null for the one in torch's hub
            directory. Nothing is downloaded.
    """

    FILE = "weights-inception-2015-12-05-6726825d.pth"
    SHA256 = "6726825d"  # the published file's digest starts so

    name = "inception-v3-compat"
    dim = 2048

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        self.weights = weights
        self.register_buffer("anchor", torch.empty(0), persistent=False)  # where the owner lives, before the network exists
        self.anchor: Tensor
        self.network: Unregistered[Any] | None = None

    @property
    def path(self) -> Path:
        """Where the weights are looked up."""
        return Path(self.weights) if self.weights is not None else Path(torch.hub.get_dir()) / "checkpoints" / self.FILE

    def setup(self) -> None:
        """See `Extractor.setup`."""
        if not self.path.is_file():
            raise ConfigError(
                "extractor.weights",
                self.weights,
                f"Inception's weights are looked up at {self.path}, where no file is.",
                f"Put torch-fidelity's release file {self.FILE} there, name another place, or use EncoderFeatures.",
            )
        digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
        if not digest.startswith(self.SHA256):
            raise ConfigError(
                "extractor.weights",
                str(self.path),
                f"its sha256 is {digest}, that of torch-fidelity's file starts with {self.SHA256}: not {self.name}.",
                f"Download {self.FILE} again.",
            )
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as e:
            raise ConfigError("extractor", "Inception", "needs torch-fidelity.", "Install the extra: pip install 'srcflow[fid]'.") from e
        network = FeatureExtractorInceptionV3(self.name, ["2048"], feature_extractor_weights_path=str(self.path))
        held: Unregistered[Any] = Unregistered(network)
        self.network = held.to(self.anchor.device) if not self.anchor.is_meta else held

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """See `Extractor.forward`."""
        if self.network is None:
            raise ConfigError("extractor", "Inception", "used before its weights were loaded.", "Call setup() first.")
        if images.ndim != 4 or images.shape[1] != 3:
            raise ShapeError(f"images have shape {tuple(images.shape)}; (B, 3, H, W) is wanted.")
        cudnn = torch.backends.cudnn
        exact = cudnn.flags(enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False)
        with torch.autocast(images.device.type, enabled=False), exact:
            features: Tensor = self.network(to_uint8(images))[0]
        return features.float()
