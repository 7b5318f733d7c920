"""The whole chain behind one object: images -> features -> codes -> noise, and back.

    autoencoder.features + noise -> autoencoder.normalize -> compressor.compress -> flow.forward
    flow.inverse -> compressor.expand -> autoencoder.decode

The codec's part of it is in `codec`. This module needs neither Lightning nor the command line.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from srcflow import artifacts, randomness
from srcflow.autoencoders.base import Autoencoder
from srcflow.chain import PARTS, DenoiserName, check_chain, check_denoising, locate, recorded_noise, save_bundle
from srcflow.codec import Codec, like_weights
from srcflow.compressors.base import Compressor
from srcflow.compressors.identity import Identity
from srcflow.errors import ArtifactError, ConfigError, ShapeError
from srcflow.flows.flow import Flow
from srcflow.flows.temperatures import check_temperature
from srcflow.guidance.base import Guidance, Negative
from srcflow.metrics.non_finite import NonFiniteImagesWarning, finite_rows
from srcflow.noise import Noise
from srcflow.solvers.base import Solver
from srcflow.solvers.report import SolverReport
from srcflow.types import Codes, Condition, Grid

RECORDED: Final = "recorded"
"""The noise law that a flow was trained under, as its directory records it."""


class Pipeline:
    """Autoencoder, compressor and flow. Every call evaluates them in eval mode, and leaves them in the mode they were in.

    >>> pipeline = Pipeline.from_pretrained("runs/demo/flow/artifact")        # doctest: +SKIP
    >>> images = pipeline.sample(Condition(labels=torch.arange(10)), seed=0)   # (10, 3, H, W) in [0, 1]   # doctest: +SKIP

    Args:
        autoencoder: images <-> normalised features.
        compressor: features <-> codes; None means Identity.
        flow: codes <-> noise; None for a codec only (encode, decode, reconstruct).
        noise: the noise law that the flow was trained under, which its directory records; None: not known.

    Raises:
        ConfigError: the widths or token counts of two parts disagree; names both.
    """

    def __init__(
        self, autoencoder: Autoencoder, compressor: Compressor | None = None, flow: Flow | None = None, noise: Noise | None = None
    ) -> None:
        self.autoencoder = autoencoder
        self.compressor = Identity(autoencoder.dim).eval() if compressor is None else compressor
        self.flow, self.noise = flow, noise
        check_chain(self.autoencoder, self.compressor, self.flow)
        if self.autoencoder.needs_statistics:
            raise ConfigError(
                "autoencoder", type(autoencoder).__name__, "its latent statistics were never fitted.", "Run stage 0, or set_statistics."
            )

    # --- places ----------------------------------------------------------------------------------------------------------------

    def to(self, device: torch.device | str) -> Pipeline:
        """Move every part; returns self."""
        for part in (self.autoencoder, self.compressor, self.flow):
            if part is not None:
                part.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        for part in (self.autoencoder, self.compressor, self.flow):
            for t in [] if part is None else [*part.parameters(), *part.buffers()]:
                return t.device
        return torch.device("cpu")

    @property
    def code_shape(self) -> tuple[int, int]:
        """(N, d) of the codes of an image of the nominal size."""
        rows, columns = self.autoencoder.grid
        return self.compressor.out_shape((rows * columns, self.autoencoder.dim))

    # --- images <-> codes ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(
        self,
        images: Tensor,
        *,
        noise: Noise | None = None,
        seed: int = 0,
        indices: Sequence[int] | Tensor | None = None,
        draw_number: int = 0,
    ) -> Tensor:
        """Codes (B, N, d) of images; float64 for a flow in float64. `codes` gives their grid as well, and takes the same arguments."""
        return self.codes(images, noise=noise, seed=seed, indices=indices, draw_number=draw_number).x

    @torch.no_grad()
    def codes(
        self,
        images: Tensor,
        *,
        noise: Noise | None = None,
        seed: int = 0,
        indices: Sequence[int] | Tensor | None = None,
        draw_number: int = 0,
    ) -> Codes:
        """Codes (B, N, d) of images and their grid; float64 for a flow in float64.

        Args:
            images: (B, 3, H, W), float in [0, 1] or uint8. Other sizes than the nominal one work where every part can take them.
            noise: noise law for the features, None for clean codes.
            seed: of the noise.
            indices: (B,) sample indices that key the noise; None means 0 .. B-1.
            draw_number: which of a sample's draws.

        Raises:
            ShapeError: a part cannot take images of this size; names it, and the size it is built for.
        """
        with self._evaluating():
            codec = Codec(self.autoencoder, self.compressor, noise, seed)
            return self._for_flow(codec.codes(self._batch(images, indices), draw_number))

    @torch.no_grad()
    def decode(self, codes: Tensor | Codes, grid: Grid | None = None) -> Tensor:
        """Images (B, 3, H, W), float32, clamped to [0, 1], of codes (B, N, d).

        What is not finite does not become a pixel: it is NaN (an image of codes that are not finite everywhere), and a
        `NonFiniteImagesWarning` says how many images have such numbers.

        Args:
            codes: the codes, with their grid or without.
            grid: of codes without; None means the nominal one.
        """
        if not isinstance(codes, Codes):
            codes = Codes(codes, self.autoencoder.grid if grid is None else grid)
        with self._evaluating():
            images = Codec(self.autoencoder, self.compressor).images(codes)
        bad = int((~finite_rows(images)).sum())
        if bad:
            cure = "Lower the guidance or the temperature, draw with another seed, or look for non-finite weights."
            message = f"{bad} of {len(images)} images are not finite: their numbers are NaN. {cure}"
            warnings.warn(message, NonFiniteImagesWarning, stacklevel=3)
        return images

    def reconstruct(
        self, images: Tensor, *, noise: Noise | None = None, seed: int = 0, indices: Sequence[int] | Tensor | None = None
    ) -> Tensor:
        """Images to codes and back: (B, 3, H, W) in [0, 1]; arguments as `encode`."""
        return self.decode(self.codes(images, noise=noise, seed=seed, indices=indices))

    # --- the flow --------------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        condition: int | Condition,
        *,
        seed: int,
        indices: Sequence[int] | Tensor | None = None,
        guidance: Guidance | None = None,
        solver: Solver | None = None,
        temperature: float = 1.0,
        attention_temperature: float = 1.0,
        denoise: float | None = None,
        denoiser: DenoiserName = "score",
        report: SolverReport | None = None,
        counted: Tensor | None = None,
    ) -> Tensor:
        """Draw images.

        Args:
            condition: how many (under the null condition), or the condition of each.
            seed: of the noise.
            indices: (B,) sample indices that key the noise, so that a set may be made in parts; None means 0 .. B-1.
            guidance: how to move away from a negative stream.
            solver: how blocks are inverted; None means `Sequential()`.
            temperature: multiplies the noise.
            attention_temperature: divides the attention logits in every block.
            denoise: standard deviation of the Gaussian noise that the flow was trained under, in units of the raw features, to take out of
                the samples (`denoise_codes`); None leaves it in. For flows without a compressor only.
            denoiser: how: by the flow's own "score", or its "learned" denoiser.
            report: takes in how each block was inverted.
            counted: (B,) bool, the samples that count in the report; None: all.

        Returns:
            (B, 3, H, W) in [0, 1]; NaN where a sample ran away to numbers that are not finite (see `decode`).

        Raises:
            ConfigError: denoising does not hold for this chain, or a temperature is not positive and finite; says why. Raised before
                anything is computed.
        """
        return self.decode(
            self.sample_codes(
                condition,
                seed=seed,
                indices=indices,
                guidance=guidance,
                solver=solver,
                temperature=temperature,
                attention_temperature=attention_temperature,
                denoise=denoise,
                denoiser=denoiser,
                report=report,
                counted=counted,
            )
        )

    @torch.no_grad()
    def sample_codes(
        self,
        condition: int | Condition,
        *,
        seed: int,
        indices: Sequence[int] | Tensor | None = None,
        guidance: Guidance | None = None,
        solver: Solver | None = None,
        temperature: float = 1.0,
        attention_temperature: float = 1.0,
        denoise: float | None = None,
        denoiser: DenoiserName = "score",
        report: SolverReport | None = None,
        counted: Tensor | None = None,
    ) -> Tensor:
        """Codes (B, N, d) drawn from the flow; arguments as `sample`."""
        flow = self._flow()
        check_denoising(self.compressor, flow, denoise, denoiser)
        for key, value in (("temperature", temperature), ("attention_temperature", attention_temperature)):
            check_temperature(key, value)
        guidance = load_negative(guidance, self.device)
        n = condition if isinstance(condition, int) else len(condition)
        given = None if isinstance(condition, int) else condition
        z = randomness.normal(self.code_shape, seed=seed, purpose="sample", step=0, indices=self._indices(indices, n))
        z = z.to(self.device, torch.promote_types(z.dtype, flow.prior_std.dtype))
        if flow.learn_prior:
            z = z * flow.prior_std
        with self._evaluating():
            codes, solutions = flow.solve(
                z,
                given,
                guidance=guidance,
                solver=solver,
                temperature=temperature,
                attention_temperature=attention_temperature,
            )
        if report is not None:
            report.update(solutions, counted)
        return codes if denoise is None else self.denoise_codes(codes, given, denoise=denoise, denoiser=denoiser)

    @torch.no_grad()
    def denoise_codes(
        self, codes: Tensor, condition: Condition | None = None, *, denoise: float, denoiser: DenoiserName = "score"
    ) -> Tensor:
        """The mean (B, N, d) of what noisy codes (B, N, d) were before the noise, in one step under the condition, without guidance (E16).

        With s the deviation of the noise in the codes, element by element: x + s^2 grad log p(x), or, by the learnable denoiser,
        x - s times its prediction of the unit noise.

        Args:
            codes: samples of the flow, or noisy codes of images.
            condition: labels or text of the codes; None means the null condition.
            denoise: standard deviation of the noise in units of the raw features; `normalize` scales it (`Autoencoder.noise_scale`).
            denoiser: "score" or "learned".

        Raises:
            ConfigError: the noise did not live in the flow's own space, or the flow has no learnable denoiser.
        """
        flow = self._flow()
        check_denoising(self.compressor, flow, denoise, denoiser)
        s = denoise * self.autoencoder.noise_scale()
        codes = like_weights(codes, flow)
        return codes - s * flow.denoiser(codes, condition) if denoiser == "learned" else flow.denoise(codes, s, condition)

    @torch.no_grad()
    def log_prob(
        self,
        images: Tensor,
        condition: Condition | None = None,
        *,
        noise: Noise | Literal["recorded"] | None = RECORDED,
        draws: int = 1,
        seed: int = 0,
        indices: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Expected log-density (B,) in nats of the noisy codes of images, over `draws` seeded noise draws.

        This is a density of codes, not of pixels (unless the autoencoder is `PixelPatches`); compare it only between flows on one codec
        and noise.

        Args:
            images: (B, 3, H, W), float in [0, 1] or uint8.
            condition: labels or text; None means the null condition.
            noise: noise law of the features; "recorded": the one the flow was trained under, None: clean codes.
            draws: noise draws per image; the encoder runs once.
            seed: of the noise.
            indices: (B,) sample indices that key the noise; None means 0 .. B-1.

        Raises:
            ConfigError: the flow's directory does not record its noise.
            ShapeError: see `codes`.
        """
        flow, total = self._flow(), torch.zeros((), device=self.device)
        with self._evaluating():
            for codes in self._draws(images, noise, draws, seed, indices):
                total = total + flow.log_prob(codes.x, condition, grid=codes.grid)
        return total / draws

    @torch.no_grad()
    def classify(
        self,
        images: Tensor,
        *,
        noise: Noise | Literal["recorded"] | None = RECORDED,
        draws: int = 1,
        seed: int = 0,
        indices: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities (B, classes) of the classes given the image under a uniform prior, by Bayes' rule on the flow's likelihoods.

        Every class sees the same noise draws. Arguments as `log_prob`.

        Raises:
            ConfigError: the flow is not class-conditional.
        """
        flow, joint = self._flow(), torch.zeros((), device=self.device)
        with self._evaluating():
            for codes in self._draws(images, noise, draws, seed, indices):
                joint = joint + flow.class_log_probs(codes.x, grid=codes.grid) / draws
        return joint.log_softmax(1)

    @torch.no_grad()
    def interpolate(
        self,
        first: Tensor,
        second: Tensor,
        steps: int,
        *,
        condition: Condition | None = None,
        noise: Noise | None = None,
        seed: int = 0,
        guidance: Guidance | None = None,
        solver: Solver | None = None,
    ) -> Tensor:
        """Images (B, steps, 3, H, W) on the great circle between the noise of two images (B, 3, H, W) each.

        Args:
            first: one end point.
            second: the other.
            steps: number of images, end points included, at least 2.
            condition: of both ends and of everything between them.
            noise: added to the features before they are encoded; a flow trained under noise wants its own level here.
            seed: of the noise.
            guidance: as `sample`; it moves the end points, too.
            solver: as `sample`.
        """
        if steps < 2:
            raise ConfigError("steps", steps, "an interpolation has at least its two end points.")
        flow, guidance = self._flow(), load_negative(guidance, self.device)
        ends = [self.codes(x, noise=noise, seed=seed) for x in (first, second)]
        grid = ends[0].grid
        with self._evaluating():
            a, b = (flow(c.x, condition, grid=c.grid).z for c in ends)
            shape, (a, b) = a.shape, (a.flatten(1), b.flatten(1))
            cosine = torch.nn.functional.cosine_similarity(a, b).clamp(-1 + 1e-6, 1 - 1e-6)
            angle = torch.acos(cosine)[:, None]
            frames = []
            for t in torch.linspace(0.0, 1.0, steps).tolist():
                z = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)
                x = flow.inverse(z.reshape(shape), condition, grid=grid, guidance=guidance, solver=solver)
                frames.append(self.decode(Codes(x, grid)))
        return torch.stack(frames, dim=1)

    # --- directories -----------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        weights: Literal["ema", "raw"] = "ema",
        autoencoder: str | os.PathLike[str] | None = None,
        compressor: str | os.PathLike[str] | None = None,
    ) -> Pipeline:
        """Load a bundle written by `save_pretrained`, or a stage's directory together with what it was built on.

        Args:
            path: the directory.
            weights: averaged or raw weights of the last stage.
            autoencoder: where the autoencoder's directory is now, if it moved; for a flow that records no codec (a converted one), its
                autoencoder. There is no hash then to tell that it is the right one.
            compressor: where the compressor's directory is now, likewise; a flow that records no codec and is given none has no compressor.

        Raises:
            ArtifactError: something is missing or damaged, weights are not finite, or the codec is neither recorded nor named.
            ManifestMismatchError: a part is not what the others were built on.
        """
        places = locate(path, autoencoder=autoencoder, compressor=compressor)
        if "autoencoder" not in places:
            raise ArtifactError(
                f"{path} does not record what autoencoder it was built on (a converted flow does not). Name the autoencoder's directory "
                "(autoencoder: DIRECTORY), and the compressor's if the flow is one of codes (compressor: DIRECTORY)."
            )
        last = list(places)[-1]
        kind: Literal["model", "raw"] = "raw" if weights == "raw" else "model"
        parts: dict[str, Any] = {
            role: artifacts.load(p, PARTS[role], weights=kind if role == last else "model") for role, p in places.items()
        }
        return cls(**parts, noise=recorded_noise(path))

    def save_pretrained(self, path: str | os.PathLike[str]) -> Path:
        """Write all parts into one self-contained directory, which may be moved anywhere; returns it.

        Raises:
            ArtifactError: the directory exists and is not a bundle, or the weights of a part are not finite.
        """
        parts: dict[str, nn.Module] = {role: getattr(self, role) for role in PARTS if getattr(self, role) is not None}
        for role, part in parts.items():
            artifacts.check_finite(part.state_dict(), role)
        return save_bundle(path, parts, self.noise)

    def _flow(self) -> Flow:
        if self.flow is None:
            raise ConfigError("pipeline.flow", None, "this pipeline is a codec without a flow.", "Load the flow stage's directory.")
        return self.flow

    def _batch(self, images: Tensor, indices: Sequence[int] | Tensor | None) -> dict[str, Any]:
        if images.ndim != 4 or images.shape[1] != 3:
            raise ShapeError(f"images are (B, 3, H, W), not {tuple(images.shape)}.")
        return {"images": images.to(self.device), "indices": self._indices(indices, images.shape[0])}

    def _for_flow(self, codes: Codes) -> Codes:
        return codes if self.flow is None else codes._replace(x=codes.x.to(torch.promote_types(codes.x.dtype, self.flow.prior_std.dtype)))

    def _draws(
        self, images: Tensor, noise: Noise | Literal["recorded"] | None, draws: int, seed: int, indices: Sequence[int] | Tensor | None
    ) -> Iterator[Codes]:
        """Codes of images under each of several draws of the noise; the encoder runs once."""
        if draws < 1:
            raise ConfigError("draws", draws, "an expectation needs at least one draw.")
        if noise == RECORDED:
            if self.noise is None:
                why = "this flow's directory does not record what noise it was trained under (an older one, or a converted flow)."
                raise ConfigError("noise", RECORDED, why, "Give noise=Constant(sigma), or noise=None for clean codes.")
            noise = self.noise
        codec = Codec(self.autoencoder, self.compressor, noise, seed)
        features = codec.features(self._batch(images, indices))
        for k in range(draws):
            yield self._for_flow(codec.codes(features, k))

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Inside this block every part is in eval mode; then each module is as it was."""
        parts = [part for part in (self.autoencoder, self.compressor, self.flow) if part is not None]
        training = [m for part in parts for m in part.modules() if m.training]
        for m in training:
            m.training = False
        try:
            yield
        finally:
            for m in training:
                m.training = True

    @staticmethod
    def _indices(indices: Sequence[int] | Tensor | None, n: int) -> Sequence[int] | Tensor:
        if indices is None:
            return range(n)
        if len(indices) != n:
            raise ShapeError(f"{len(indices)} indices for {n} samples.")
        return indices


_negatives: WeakKeyDictionary[Negative, Flow] = WeakKeyDictionary()
"""Flows that were loaded for a negative that names a directory, as long as that negative is in use."""


def load_negative(guidance: Guidance | None, device: torch.device | str) -> Guidance | None:
    """The guidance rule with its negative flow loaded, if it names one by its directory, and on the device of the positive one.

    What is given stays as it is: where there is something to load or to move, the result is a copy. A directory is read once for each
    negative; a flow on another device is copied there at every call, so move it yourself if you sample often.

    Raises:
        ArtifactError: there is no flow at that place.
    """
    given = None if guidance is None else guidance.negative.flow
    if guidance is None or given is None:
        return guidance
    device = torch.empty(0, device=device).device  # cuda becomes cuda:0
    if isinstance(given, str):
        flow = _negatives.get(guidance.negative)
        if flow is None:
            flow = artifacts.load(locate(given)["flow"], Flow)
        _negatives[guidance.negative] = flow.to(device)
    elif any(t.device != device for t in (*given.parameters(), *given.buffers())):
        flow = copy.deepcopy(cast(Flow, given)).to(device)
    else:
        return guidance
    loaded = copy.copy(guidance)
    loaded.negative = copy.copy(guidance.negative)
    loaded.negative.flow = flow
    return loaded
