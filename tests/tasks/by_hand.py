"""A tiny conditioned flow on stored features, and what `FlowTask` promises of it, written out in plain torch and float64.

Nothing here calls what it is there to check: the keyed numbers are drawn from numpy's generator as the documentation defines the keys, the
coupling, the normalisation, the prior and the sums are written out. Only the blocks' networks are the flow's own.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from srcflow.autoencoders.pixels import PixelPatches
from srcflow.conditioners.class_table import ClassTable
from srcflow.couplings.affine import Affine
from srcflow.flows.block import TransformerBlock
from srcflow.flows.flow import Flow
from srcflow.flows.normalization import ChannelNormalization
from srcflow.flows.positions import Learned
from srcflow.types import Condition, Context

GRID, TOKENS, CHANNELS, CLASSES = (2, 2), 4, 4, 3
DIMS = TOKENS * CHANNELS
SIGMA = 0.4


def pixels() -> PixelPatches:
    """A codec that does nothing to stored features but add the noise: four tokens of four numbers."""
    return PixelPatches(4, 2, channels=1, scale="linear")


def tiny_flow(*, normalization: bool = True, learn_prior: bool = False) -> Flow:
    """Three blocks, of which the first sees no class; log-scales and shifts within 0.5; far from the identity; float64; always the same."""
    torch.manual_seed(7)

    def block(order: Any, start: Any, conditioned: bool) -> TransformerBlock:
        conditioner = ClassTable(CLASSES, 8, null="learned") if conditioned else None
        positions = Learned(GRID, 8)
        more: dict[str, Any] = {"start": start, "order": order, "head_dim": 4, "clip": 0.5, "clip_what": "both"}
        return TransformerBlock(CHANNELS, 8, 1, positions, Affine(), conditioner, **more)

    blocks = [block("raster", "sos", False), block("reverse", "shift", True), block("raster", "sos", True)]
    flow = Flow(blocks, ChannelNormalization(CHANNELS) if normalization else None, learn_prior).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3)
        if learn_prior:
            flow.set_prior(0.5 + torch.rand(TOKENS, CHANNELS, generator=generator, dtype=torch.float64))
    return flow


# --- data -------------------------------------------------------------------------------------------------------------------------------


class Rows(L.LightningDataModule):
    """Features as a store yields them, in float64; the samples' indices are not their positions. Evaluation ends in a padded row."""

    num_classes = CLASSES

    def __init__(self, train: int = 24, held_out: int = 7, batch_size: int = 6, first: int = 40, stride: int = 7) -> None:
        super().__init__()
        self.train, self.held_out, self.batch_size, self.first, self.stride = train, held_out, batch_size, first, stride

    def samples(self, n: int, seed: int, *, first: int, stride: int) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        scale = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)  # what the normalisation has to undo
        x = torch.randn(n, TOKENS, CHANNELS, generator=generator, dtype=torch.float64) * scale + 0.7
        return [
            {
                "features": x[i],
                "labels": torch.tensor(i % CLASSES),
                "indices": torch.tensor(first + stride * i),
                "valid": torch.tensor(True),
            }
            for i in range(n)
        ]

    def loader(self, rows: list[dict[str, Tensor]], size: int) -> Any:
        def collate(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
            return {**{k: torch.stack([r[k] for r in rows]) for k in rows[0]}, "grid": GRID}

        return DataLoader(rows, batch_size=size, collate_fn=collate)  # type: ignore[arg-type]

    def train_dataloader(self) -> Any:
        return self.loader(self.samples(self.train, 0, first=self.first, stride=self.stride), self.batch_size)

    def val_dataloader(self) -> Any:
        rows = self.samples(self.held_out, 1, first=self.first, stride=self.stride)
        padding = {**rows[0], "features": rows[0]["features"] + 3, "valid": torch.tensor(False)}
        return self.loader([*rows, padding], 3)

    def test_dataloader(self) -> Any:
        return self.loader(self.samples(self.held_out, 1, first=0, stride=1), 3)

    predict_dataloader = val_dataloader


def trainer(folder: Path, **more: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 4,
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
        "log_every_n_steps": 1,
    }
    return L.Trainer(**{**settings, **more})


# --- keyed numbers ----------------------------------------------------------------------------------------------------------------------


def generator(seed: int, purpose: str, step: int, index: int) -> np.random.Generator:
    """docs/concepts/determinism.md: Philox under the 128-bit BLAKE2b hash of the key, little end first."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}/{index}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def noise(seed: int, purpose: str, step: int, indices: Tensor, shape: Sequence[int] = (TOKENS, CHANNELS), sigma: float = SIGMA) -> Tensor:
    """Gaussian noise (B, *shape) of one deviation."""
    rows = [generator(seed, purpose, step, int(i)).standard_normal(tuple(shape), dtype=np.float32) for i in indices]
    return torch.from_numpy(np.stack(rows)) * sigma


def noisy(batch: Any, seed: int, purpose: str, step: int) -> Tensor:
    """Codes of stored features under noise."""
    return batch["features"] + noise(seed, purpose, step, batch["indices"]).double()


def dropped(batch: Any, seed: int, step: int, probability: float) -> Tensor:
    """Labels in training, -1 where they are dropped."""
    coins = [float(generator(seed, "label_dropout", step, int(i)).random((), dtype=np.float32)) for i in batch["indices"]]
    return torch.tensor([-1 if c < probability else int(y) for c, y in zip(coins, batch["labels"], strict=True)])


# --- the flow ---------------------------------------------------------------------------------------------------------------------------


class Way(NamedTuple):
    """The way of codes (B, N, d) to noise."""

    first: Tensor  # (B, N, d) what the first block is given
    zs: list[Tensor]  # of every block, in raster order
    log_scales: list[Tensor]  # of every block
    logdet: Tensor  # (B,)


def way(flow: Flow, x: Tensor, labels: Tensor) -> Way:
    """From data to noise."""
    norm: Any = flow.normalization
    y, logdet = x, x.new_zeros(len(x))
    if norm is not None:
        y = (x - norm.mean) / norm.std
        logdet = logdet - TOKENS * torch.log(norm.std).sum()
    first, zs, scales = y, [], []
    block: Any
    for block in flow.blocks:
        backwards = block.order == "reverse"
        u = torch.flip(y, dims=[1]) if backwards else y
        params = block.params(u, Context(Condition(labels=labels), GRID, 1.0))
        a, m = params[:, :, 0, :], params[:, :, 1, :]
        z = (u - m) / torch.exp(a)
        logdet = logdet - a.sum(dim=(1, 2))
        y = torch.flip(z, dims=[1]) if backwards else z
        zs.append(y)
        scales.append(a)
    return Way(first, zs, scales, logdet)


def prior_log_prob(z: Tensor, deviation: Tensor | None = None) -> Tensor:
    """Log-density (B,) of independent normals, element by element."""
    s = torch.ones_like(z[0]) if deviation is None else deviation
    return (-0.5 * (z / s) ** 2 - torch.log(s) - 0.5 * math.log(2 * math.pi)).sum(dim=(1, 2))


def log_prob(flow: Flow, x: Tensor, labels: Tensor) -> Tensor:
    """Log-density (B,) in nats, under the learned prior if there is one."""
    w = way(flow, x, labels)
    return prior_log_prob(w.zs[-1], flow.prior_std if flow.learn_prior else None) + w.logdet


def per_class(flow: Flow, x: Tensor) -> Tensor:
    """Log-densities (B, classes) in nats."""
    return torch.stack([log_prob(flow, x, torch.full((len(x),), c)) for c in range(CLASSES)], dim=1)
