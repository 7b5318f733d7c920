"""Whole representation autoencoders (RAE, arXiv 2510.11690): encoder, latent statistics and decoder of the published code, and back."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from srcflow.autoencoders.representation import RepresentationAutoencoder
from srcflow.convert.config import known
from srcflow.convert.encoder import encoder as convert_encoder
from srcflow.convert.encoder import to_transformers
from srcflow.convert.rae_decoder import BUFFERS, State, check_epsilon, check_tensors, rae_decoder, to_rae_decoder
from srcflow.convert.state import precision
from srcflow.encoders.dinov2 import DINOv2
from srcflow.errors import ConfigError, Problems, ProblemsError, ShapeError, UnknownNameError, WeightsError
from srcflow.statistics import EpsConvention
from srcflow.types import Grid


@known
def rae(
    state_dict: State,
    statistics: Mapping[str, Tensor] | None = None,
    *,
    encoder: str | None = None,
    encoder_dim: int | None = None,
    encoder_depth: int | None = None,
    encoder_heads: int | None = None,
    encoder_mlp: int | None = None,
    encoder_input_size: int | Sequence[int] | None = None,
    encoder_patch: int | None = None,
    encoder_trained_at: int | Sequence[int] | None = None,
    layer_norm_eps: float | None = None,
    act: str | None = None,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    decoder: Mapping[str, Any] | None = None,
    noise_tau: float | None = None,
    stat_eps: float = 1e-5,
) -> RepresentationAutoencoder:
    """A whole RAE (arXiv 2510.11690; E1 to E3) from its published code's state dict: `encoder.*` (transformers' names) and `decoder.*`.

    A DINOv2 has its four registers there; one without is refused.

    Args:
        state_dict: the published weights.
        statistics: {"mean", "var"}, what `stat.pt` holds: anything that broadcasts to (B, C, H, W). Without "mean" (some files have none)
            it is 0, as in the published code. None: no normalisation, as in the published code without that file.
        encoder: "dinov2", "siglip2" or "mae"; this and the next as `encoder` takes them.
        encoder_dim: width of its tokens.
        encoder_depth: its layers.
        encoder_heads: its attention heads.
        encoder_mlp: inner width of its MLPs.
        encoder_input_size: what images are resized to for it; None: what gives the decoder's grid.
        encoder_patch: its patch in pixels.
        encoder_trained_at: image size of its position table.
        layer_norm_eps: epsilon of its LayerNorms.
        act: activation of its MLPs.
        image_mean: RGB mean of its images, which the decoder's are in as well.
        image_std: standard deviation, likewise.
        decoder: configuration of the decoder, as `rae_decoder` takes it.
        noise_tau: noise of the decoder's training; changes nothing here.
        stat_eps: epsilon of the normalisation, added to the variance.

    Returns:
        The autoencoder in eval mode, on the CPU.

    Raises:
        ConfigError: a value contradicts the weights, or is needed and not given, or the statistics hold negative variances or numbers that
            are not finite (several problems: ProblemsError).
        WeightsError: lists every missing, unknown and misshaped key.
        ShapeError: the statistics do not broadcast.

    Warns:
        UserWarning: the statistics have no mean.
    """
    del noise_tau
    check_epsilon("rae.stat_eps", stat_eps)
    check_tensors("RAE", state_dict)
    moments = None if statistics is None else _moments(statistics)
    encoder_config = {
        "encoder": encoder,
        "encoder_dim": encoder_dim,
        "encoder_depth": encoder_depth,
        "encoder_heads": encoder_heads,
        "encoder_mlp": encoder_mlp,
        "encoder_input_size": encoder_input_size,
        "encoder_patch": encoder_patch,
        "encoder_trained_at": encoder_trained_at,
        "layer_norm_eps": layer_norm_eps,
        "act": act,
        "image_mean": image_mean,
        "image_std": image_std,
    }
    hint = "A folder of diffusers' AutoencoderRAE is read by rae_diffusers." if any(k in state_dict for k in BUFFERS) else ""
    autoencoder = assemble(state_dict, encoder_config, decoder or {}, stat_eps, "variance", hint=hint)
    if moments is None:
        autoencoder.set_statistics(torch.zeros(()), torch.tensor(1 - stat_eps, dtype=torch.float64))  # divides by exactly 1
        return autoencoder
    autoencoder.set_statistics(*(by_position(moments[k], autoencoder, f"statistics.{k}", positive=k == "var") for k in ("mean", "var")))
    return autoencoder


def to_rae(autoencoder: RepresentationAutoencoder) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dict and statistics for RAE's published code.

    Decoder and statistics come back bit for bit. The encoder gives the same tokens; the position of its class token has been added to the
    token. Its position table is the published one if the autoencoder was converted, else the one in use: then its configuration there needs
    `image_size` = our input size. Sizes and the epsilon, `statistics_eps`, go to the published code's configuration. Statistics whose
    epsilon is added to the deviation (diffusers') are turned into variances that give the same divisors, up to rounding, with 1e-5.

    Returns:
        `encoder.*` and `decoder.*`, and {"mean", "var"} of shape (C, H, W), all on the CPU.

    Raises:
        ConfigError: the published code has no such encoder or decoder, or the statistics are not fitted or not expressible.
    """
    check_fitted(autoencoder)
    problems, state = Problems(), dict[str, Tensor]()
    registers = getattr(autoencoder.encoder, "registers", 4)
    if registers != 4:
        problems.add(ConfigError("encoder.registers", registers, "RAE's DINOv2 always has 4."))
    with problems.collect():
        inner = "encoder" if isinstance(autoencoder.encoder, DINOv2) else "model"
        state.update({f"encoder.{inner}.{k}": v for k, v in published_encoder(autoencoder).items()})
    with problems.collect():
        state.update({f"decoder.{k}": v for k, v in to_rae_decoder(autoencoder.decoder).items()})
    var = autoencoder.var
    if autoencoder.eps_convention == "std":
        var = ((var.double().sqrt() + autoencoder.statistics_eps).square() - 1e-5).to(var.dtype)
        if bool((var < 0).any()):
            why = "RAE adds 1e-5 to the variance, and some divisors here are smaller than its root."
            problems.add(ConfigError("autoencoder.eps_convention", "std", why))
    problems.raise_if_any()
    return state, {"mean": as_maps(autoencoder.mean, autoencoder.grid), "var": as_maps(var, autoencoder.grid)}


def assemble(
    state: State,
    encoder_config: Mapping[str, Any],
    decoder_config: Mapping[str, Any],
    eps: float,
    convention: EpsConvention,
    *,
    beside: Sequence[str] = (),
    hint: str = "",
) -> RepresentationAutoencoder:
    """A whole RAE without its statistics.

    Args:
        state: `encoder.*` and `decoder.*`.
        encoder_config: for `encoder`.
        decoder_config: for `rae_decoder`.
        eps: epsilon of the statistics.
        convention: where it is added.
        beside: further keys that are no part of encoder and decoder.
        hint: a sentence added to the error about unknown keys.

    Raises:
        ConfigError: as `rae`.
        WeightsError: as `rae`.
    """
    problems = Problems()
    if not isinstance(decoder_config, Mapping):
        raise ConfigError("rae.decoder", decoder_config, "is no configuration of the decoder.", "Give a mapping, e.g. {heads: 16}.")
    if other := [
        f"unknown {k} {tuple(v.shape)}" for k, v in state.items() if k not in beside and not k.startswith(("encoder.", "decoder."))
    ]:
        problems.add(
            WeightsError("RAE: the weights hold more than an encoder and a decoder:\n  " + "\n  ".join(other) + f"\n{hint}" * bool(hint))
        )
    of_encoder = {k: v for k, v in state.items() if k.startswith("encoder.")}
    decoder = encoder = None
    with problems.collect(), _of_decoder():
        decoder = rae_decoder({k: v for k, v in state.items() if k.startswith("decoder.")}, **decoder_config)
    given = dict(encoder_config)
    patch = given.get("encoder_patch") or next((int(v.shape[-1]) for v in of_encoder.values() if v.ndim == 4), None)
    if given.get("encoder_input_size") is None and decoder is not None and patch is not None:
        given["encoder_input_size"] = [side * patch for side in decoder.grid]
    with problems.collect():
        encoder = convert_encoder(of_encoder, **given)
    if len(problems.found) > 1 and all(isinstance(e, WeightsError) for e in problems.found):
        raise WeightsError("\n".join(map(str, problems.found)))
    problems.raise_if_any()
    if encoder is None or decoder is None:  # a problem was found then
        raise WeightsError("RAE: no encoder or decoder.")
    autoencoder = RepresentationAutoencoder(encoder, decoder, statistics_eps=eps, eps_convention=convention)
    if autoencoder.grid != decoder.grid:
        why = "gives {} x {} tokens, and the decoder decodes {} x {}.".format(*autoencoder.grid, *decoder.grid)
        cure = f"Write {[side * encoder.patch_size for side in decoder.grid]}, or leave it out."
        raise ConfigError("rae.encoder_input_size", given["encoder_input_size"], why, cure)
    found = positions_in(of_encoder)
    if found is not None and found[1].shape[1] != autoencoder.grid[0] * autoencoder.grid[1]:
        autoencoder.published_positions = found[1].detach().clone()
    return autoencoder.to(precision(state)).eval()


@contextmanager
def _of_decoder() -> Iterator[None]:
    """Name the decoder's settings in errors as they are named in the whole autoencoder's configuration: decoder.heads, and so on."""
    try:
        yield
    except (ConfigError, ProblemsError) as e:
        problems = Problems()
        for problem in e.problems if isinstance(e, ProblemsError) else [e]:
            if isinstance(problem, UnknownNameError):
                problem = UnknownNameError("decoder", problem.value, problem.known, paths=False)
            elif isinstance(problem, ConfigError):
                key = "decoder." + problem.key.removeprefix("rae_decoder.")
                cure = 'Write decoder={"heads": ...}.' if (key, problem.value) == ("decoder.heads", None) else problem.cure
                problem = ConfigError(key, problem.value, problem.problem, cure)
            problems.found.append(problem)
        problems.raise_if_any()


def _moments(statistics: Any) -> dict[str, Any]:
    """Mean and variance; the mean is 0 where there is none."""
    if not isinstance(statistics, Mapping):
        cure = 'Give {"mean": ..., "var": ...}, or nothing.'
        raise ConfigError("statistics", type(statistics).__name__, "latent statistics are a mapping.", cure)
    found = {k: v for k, v in statistics.items() if v is not None}
    if not {"var"} <= set(found) <= {"mean", "var"}:
        raise ConfigError("statistics", sorted(map(str, found)), "latent statistics have a mean and a var.", "Give these two, or none.")
    if "mean" not in found:
        warnings.warn("the latent statistics have no mean: it is taken to be 0, as in the published code.", UserWarning, stacklevel=4)
    return {"mean": torch.zeros(()), **found}


def by_position(value: Any, autoencoder: RepresentationAutoencoder, name: str, *, positive: bool = False) -> Tensor:
    """Statistics (N, D) of what broadcasts to (B, C, H, W), in the autoencoder's precision.

    Args:
        value: a tensor, or numbers in (nested) lists.
        autoencoder: whose latents they are of.
        name: what they are called in errors.
        positive: whether they must not be negative.

    Raises:
        ShapeError: it does not broadcast.
        ConfigError: it holds no numbers, or numbers that are not finite, or negative.
    """
    tensor, (rows, columns) = checked_numbers(value, autoencoder.var.dtype, name, positive=positive), autoencoder.grid
    try:
        return tensor.broadcast_to(1, autoencoder.dim, rows, columns)[0].flatten(1).t()
    except RuntimeError as e:
        raise ShapeError(f"{name} of shape {tuple(tensor.shape)} does not broadcast to (B, {autoencoder.dim}, {rows}, {columns}).") from e


def checked_numbers(value: Any, dtype: torch.dtype, name: str, *, positive: bool = False) -> Tensor:
    """`value` as a tensor of finite, and if `positive` not negative, numbers; see `by_position`."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as e:
        raise ConfigError(name, value, f"is no array of numbers: {e}.") from e
    tensor = tensor.detach().to(tensor.dtype if tensor.dtype == torch.float64 else dtype)
    bad = ~torch.isfinite(tensor.to(dtype))
    cure = "The file is damaged, or of something else."
    if bool(bad.any()):
        raise ConfigError(name, float(tensor[bad][0]), f"{int(bad.sum())} of {tensor.numel()} numbers are not finite.", cure)
    if positive and bool((tensor < 0).any()):
        why = f"{int((tensor < 0).sum())} of {tensor.numel()} numbers are negative; this is the least."
        raise ConfigError(name, float(tensor.min()), why, cure)
    return tensor


def as_maps(x: Tensor, grid: Grid) -> Tensor:
    """Statistics (N, D) as (C, H, W), on the CPU."""
    return x.detach().t().reshape(x.shape[1], *grid).to("cpu", copy=True).contiguous()


def published_encoder(autoencoder: RepresentationAutoencoder, kept: bool = True) -> dict[str, Tensor]:
    """The encoder's tensors in transformers 4's names without an outer prefix, as RAE has it: without the final norm's affine part.

    The position table is the published one if that was kept (and `kept`), else the one in use.

    Raises:
        ConfigError: transformers has no such encoder.
    """
    state = {k: v for k, v in to_transformers(autoencoder.encoder).items() if not k.startswith(("layernorm.", "post_layernorm."))}
    table = autoencoder.published_positions
    return with_positions(state, table) if kept and table is not None else state


def positions_in(state: State) -> tuple[str, Tensor] | None:
    """Key and rows (1, n, D) of the patches in the encoder's position table; None if there is none of a fitting shape."""
    for name, first in (("embeddings.position_embedding.weight", 0), ("embeddings.position_embeddings", 1)):
        for key, table in state.items():
            if (key == name or key.endswith(f".{name}")) and table.ndim in (2, 3):
                return key, table.reshape(1, *table.shape[-2:])[:, first:]
    return None


def with_positions(state: State, patches: Tensor) -> dict[str, Tensor]:
    """The encoder's tensors with another position table (1, n, D) of the patches; the class token keeps its own."""
    found = positions_in(state)
    if found is None:
        return dict(state)
    key, old = found
    table, rows = state[key], patches.detach().to("cpu", copy=True).to(old.dtype)
    if table.ndim == 3:
        rows = torch.cat([table[:, : table.shape[1] - old.shape[1]], rows], 1)
    return {**state, key: rows.reshape(*table.shape[:-2], *rows.shape[-2:]).contiguous()}


def check_fitted(autoencoder: RepresentationAutoencoder) -> None:
    """Refuse an autoencoder without statistics.

    Raises:
        ConfigError: its statistics have not been fitted.
    """
    if autoencoder.needs_statistics:
        cure = "Train stage 0, or call set_statistics."
        raise ConfigError("autoencoder.statistics", None, "the latent statistics have not been fitted.", cure)
