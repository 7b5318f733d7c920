"""The flow: an invertible normalisation, then causal blocks, each an exact bijection with a triangular Jacobian."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from srcflow.conditioners.base import Field, merged
from srcflow.conditioners.base import resolve as resolve_condition
from srcflow.errors import ConfigError, ShapeError
from srcflow.flows.denoise import tweedie
from srcflow.flows.denoiser import Denoiser
from srcflow.flows.inversion import GuidanceWarning, invert
from srcflow.flows.likelihood import normal_log_prob
from srcflow.flows.normalization import Normalization
from srcflow.flows.temperatures import check_temperature
from srcflow.flows.traits import Block, fields_of, is_parallel, order_of, shape_of
from srcflow.flows.trunk import recomputed
from srcflow.guidance.base import Guidance
from srcflow.nn.permutation import permute
from srcflow.registry import Recorded
from srcflow.solvers.base import Solver
from srcflow.solvers.sequential import Sequential
from srcflow.types import BlockOutput, CausalBlock, Condition, Context, FlowOutput, Grid, Inversion

__all__ = ["Flow", "GuidanceWarning", "Steps"]


class Steps(NamedTuple):
    """The way of a batch through a flow: the normalised data y (B, N, d), every block's output, and the summed log-determinant (B,)."""

    y: Tensor
    blocks: list[BlockOutput]
    logdet: Tensor


class Flow(nn.Module, metaclass=Recorded):
    """A normalizing flow over tokens (B, N, d); `forward` goes from data to noise, `inverse` back.

    Blocks are listed in the order of `forward`; the last one, on the noise side, is inverted first. `presets` builds the published models.
    A block is any module that follows `types.CausalBlock` or `types.ParallelBlock` (`srcflow.testing.check_block` tells).

    Args:
        blocks: the blocks.
        normalization: an invertible first layer (norm2), or None.
        learn_prior: keep the prior's standard deviation as a running average of the noise's second moments, for volume-preserving flows
            (TARFlow with `nvp=False`); otherwise the prior is standard normal.
        denoiser: a network that predicts the noise in x (STARFlow's learnable denoiser); None for a flow without.
        channels: width d of a token; None: what the blocks say.
        grid: (rows, columns) of the tokens; None: what the blocks say.

    Attributes:
        fields: the fields of the condition that the flow reads, by name.
        prior_std: (N, d) standard deviation of the prior, used by `log_prob` and sampling only.
        prior_var: (N, d) the running average itself, whose root is `prior_std`; None without `learn_prior`.

    Raises:
        ConfigError: something that is not a block; blocks that disagree on channels, grid or a field of the condition.
    """

    prior_std: Tensor
    prior_var: Tensor | None
    null_text: Tensor | None
    null_mask: Tensor | None

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        normalization: Normalization | None = None,
        learn_prior: bool = False,
        denoiser: Denoiser | None = None,
        channels: int | None = None,
        grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if not blocks:
            raise ConfigError("flow.blocks", blocks, "a flow has at least one block.")
        self.channels, self.grid = shape_of(blocks, channels, grid)
        self.blocks = nn.ModuleList(blocks)
        self.normalization = normalization
        self.learn_prior = learn_prior
        if normalization is not None and normalization.channels != self.channels:
            raise ConfigError("flow.normalization.channels", normalization.channels, f"the blocks have channels = {self.channels}.")
        if denoiser is not None and (denoiser.channels, denoiser.grid) != (self.channels, self.grid):
            ours = (self.channels, self.grid)
            raise ConfigError("flow.denoiser", (denoiser.channels, denoiser.grid), f"channels and grid differ from the blocks' {ours}.")
        self.self_denoiser = denoiser
        self.fields: dict[str, Field] = merged(f for part in self._parts() for f in fields_of(part))
        ones = torch.ones(self.grid[0] * self.grid[1], self.channels)
        self.register_buffer("prior_std", ones)
        self.register_buffer("prior_var", ones.clone() if learn_prior else None)
        for name in ("text", "mask", *self._null_names()):
            if f"null_{name}" not in self._buffers:
                self.register_buffer(f"null_{name}", None)

    @property
    def deep(self) -> int:
        """Index of the deep block of a deep-shallow flow: the last one, on the noise side, however many layers the others have."""
        return len(self.blocks) - 1

    @property
    def num_classes(self) -> int:
        """Number of classes that `labels` name; 0 for a flow that reads none."""
        return self.fields["labels"].size if "labels" in self.fields else 0

    def set_null(self, text: Tensor | None = None, mask: Tensor | None = None, **fields: Tensor) -> None:
        """Set null values: used for rows that are dropped, for condition=None and as the default negative.

        Args:
            text: (L, T) null text.
            mask: (L,) bool, its mask.
            fields: null values of other fields: (size,) for a dense one, (L, size) for a sequence.

        Raises:
            ConfigError: the flow reads no such field, or its null is fixed (-1 for an index).
            ShapeError: a value that does not fit the field.
        """
        given = {k: v for k, v in {"text": text, "mask": mask, **fields}.items() if v is not None}
        known = self._null_names()
        for name, value in given.items():
            if name not in known:
                cure = f"Fields with a null to set: {', '.join(known)}." if known else "Only flows on text, or on dense fields, have one."
                raise ConfigError("set_null", name, "this flow has no null value of this name.", cure)
            field = next(f for f in self.fields.values() if name in (f.name, f.mask))
            wanted = f"({field.size},)" if field.kind == "dense" else f"(L, {field.size})" if name == field.name else "(L,)"
            fits = {"dense": value.shape == (field.size,), "sequence": value.ndim == 2 and value.shape[1:] == (field.size,)}[field.kind]
            if name == field.mask:
                owner = given.get(field.name)
                fits = value.ndim == 1 and owner is not None and owner.shape[:1] == value.shape
            if not fits:
                raise ShapeError(f"the null {name} is {wanted}, not {tuple(value.shape)}.")
        for name, value in given.items():
            setattr(self, f"null_{name}", value.detach().clone().to(self.prior_std.device))
        for f in self.fields.values():
            if f.name in given and f.mask is not None and f.mask not in given:
                setattr(self, f"null_{f.mask}", None)

    def _null_names(self) -> list[str]:
        """Fields whose null value the flow keeps, and their masks."""
        return [n for f in self.fields.values() if f.kind != "index" for n in (f.name, f.mask) if n is not None]

    def prepare_state(self, state: Mapping[str, Tensor]) -> None:
        """Make room for what only some state dicts hold: null values, and the prior's variance. Called before one is loaded."""
        nulls = [name for name in self._buffers if name.startswith("null_")]
        for name in (*nulls, *(["prior_var"] if self.learn_prior else [])):
            setattr(self, name, torch.empty_like(state[name], device=self.prior_std.device) if name in state else None)

    def resolve(self, condition: Condition | None, batch: int) -> Condition | None:
        """The condition with every null filled in, for `batch` rows; None for an unconditional flow.

        Raises:
            ConfigError: a field that the flow does not read, labels out of range, or a null text that is needed and not set.
            ShapeError: a field that does not fit, or not `batch` rows.
        """
        nulls = {n: v for n in self._null_names() if (v := self._buffers[f"null_{n}"]) is not None}
        return resolve_condition(condition, batch, fields=self.fields, nulls=nulls, device=self.prior_std.device)

    def normalize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The first layer alone: y (B, N, d) and its log-determinant (B,)."""
        if self.normalization is None:
            dtype = torch.promote_types(x.dtype, torch.float32)
            return x, x.new_zeros(x.shape[0], dtype=dtype)
        return self.normalization(x)  # type: ignore[no-any-return]  # torch is untyped here

    def blocks_forward(self, x: Tensor, condition: Condition | None = None, *, grid: Grid | None = None) -> list[BlockOutput]:
        """Every block's output from data x (B, N, d), in the order of `forward`; the normalisation comes before the first."""
        return self.steps(x, condition, grid=grid).blocks

    def steps(self, x: Tensor, condition: Condition | None = None, *, grid: Grid | None = None) -> Steps:
        """Everything that `forward` computes on its way from data x (B, N, d) to noise."""
        ctx = self._context(x, condition, grid, 1.0)
        y, logdet = self.normalize(x)
        outputs = self._blocks_forward(y, ctx)
        for o in outputs:
            logdet = logdet + o.logdet.flatten(1).sum(1)
        return Steps(y, outputs, logdet)

    def forward(self, x: Tensor, condition: Condition | None = None, *, grid: Grid | None = None) -> FlowOutput:
        """Data to noise.

        Args:
            x: (B, N, d) data tokens in raster order.
            condition: labels or text; None means the null condition.
            grid: (rows, columns) of the tokens; None means the grid the flow was built for.

        Returns:
            z (B, N, d) and the log-determinant (B,) in nats.

        Raises:
            ShapeError: x does not fit the channels or the grid.
        """
        steps = self.steps(x, condition, grid=grid)
        return FlowOutput(steps.blocks[-1].z, steps.logdet)

    def log_prob(self, x: Tensor, condition: Condition | None = None, *, grid: Grid | None = None) -> Tensor:
        """Log-density (B,) of data x (B, N, d) in nats, under the (possibly learned) prior."""
        out = self(x, condition, grid=grid)
        return normal_log_prob(out.z, self._prior(out.z.shape[1])) + out.logdet  # type: ignore[no-any-return]  # torch is untyped here

    def class_log_probs(self, x: Tensor, *, grid: Grid | None = None) -> Tensor:
        """Log-densities (B, classes) of data x (B, N, d) under every class, in nats; blocks that see no class are run once.

        Further fields of the condition, if the flow reads any, are null.

        Raises:
            ConfigError: the flow is not conditioned on classes.
        """
        if "labels" not in self.fields:
            what = ", ".join(self.fields) or "unconditional"
            raise ConfigError("flow", what, "only a class-conditional flow has densities per class.")
        ctx = self._context(x, None, grid, 1.0)
        y, logdet = self.normalize(x)
        blocks = list(self.blocks)
        first = next((i for i, b in enumerate(blocks) if any(f.name == "labels" for f in fields_of(b))), len(blocks))
        for o in self._blocks_forward(y, ctx, range(first)):
            y, logdet = o.z, logdet + o.logdet.flatten(1).sum(1)
        columns = []
        for label in range(self.num_classes):
            labels = torch.full((x.shape[0],), label, device=x.device)
            condition = Condition(**{**({} if ctx.condition is None else ctx.condition.fields), "labels": labels})
            z, total = y, logdet
            for o in self._blocks_forward(y, ctx.replace(condition=condition), range(first, len(blocks))):
                z, total = o.z, total + o.logdet.flatten(1).sum(1)
            columns.append(normal_log_prob(z, self._prior(z.shape[1])) + total)
        return torch.stack(columns, dim=1)

    @torch.no_grad()
    def solve(
        self,
        z: Tensor,
        condition: Condition | None = None,
        *,
        grid: Grid | None = None,
        guidance: Guidance | None = None,
        solver: Solver | None = None,
        temperature: float = 1.0,
        attention_temperature: float | Tensor = 1.0,
    ) -> Inversion:
        """Noise to data, and how each block was inverted.

        Args:
            z: (B, N, d) noise in raster order. For a learned prior multiply standard normal noise by `prior_std` first.
            condition: labels or text; None means the null condition.
            grid: (rows, columns) of the tokens; None means the grid the flow was built for.
            guidance: how to move away from a negative stream.
            solver: how a block is inverted; None means `Sequential()`. Blocks that are the identity, and parallel blocks, need none.
            temperature: multiplies z.
            attention_temperature: divides the attention logits in every block and stream; a number or (B,).

        Returns:
            data x (B, N, d) and a `Solution` per block in the block's own order, noise-side block first; the normalisation is undone in x
            alone. A block that needs no solver has 0 iterations (the identity) or 1 (parallel).

        Raises:
            ConfigError: guidance or solver that does not fit the flow; a temperature that is not positive and finite.
            ShapeError: z does not fit the channels or the grid.
        """
        for key, value in (("temperature", temperature), ("attention_temperature", attention_temperature)):
            check_temperature(key, value)
        ctx = self._context(z, condition, grid, attention_temperature)
        x, solutions = invert(self, z * temperature, ctx, guidance, Sequential() if solver is None else solver)
        return Inversion(x if self.normalization is None else self.normalization.inverse(x), solutions)

    @torch.no_grad()
    def inverse(
        self,
        z: Tensor,
        condition: Condition | None = None,
        *,
        grid: Grid | None = None,
        guidance: Guidance | None = None,
        solver: Solver | None = None,
        temperature: float = 1.0,
        attention_temperature: float | Tensor = 1.0,
    ) -> Tensor:
        """Noise to data (B, N, d): `solve(...).x`, whose arguments it takes."""
        return self.solve(
            z,
            condition,
            grid=grid,
            guidance=guidance,
            solver=solver,
            temperature=temperature,
            attention_temperature=attention_temperature,
        ).x

    @torch.no_grad()
    def blocks_inverse(
        self,
        z: Tensor,
        condition: Condition | None = None,
        *,
        grid: Grid | None = None,
        guidance: Guidance | None = None,
        solver: Solver | None = None,
        temperature: float = 1.0,
        attention_temperature: float | Tensor = 1.0,
    ) -> list[Tensor]:
        """What each block's inversion gives, (B, N, d) in raster order, noise-side block first; before the normalisation is undone.

        Arguments as `solve`.
        """
        solutions = self.solve(
            z,
            condition,
            grid=grid,
            guidance=guidance,
            solver=solver,
            temperature=temperature,
            attention_temperature=attention_temperature,
        ).solutions
        return [permute(s.u, order_of(b)) for s, b in zip(solutions, reversed(list(self.blocks)), strict=True)]

    def denoise(self, x: Tensor, sigma: float | Tensor, condition: Condition | None = None, *, grid: Grid | None = None) -> Tensor:
        """One-step score denoising of x (B, N, d); see `flows.denoise.tweedie`."""
        return tweedie(self, x, sigma, condition, grid=grid)

    def denoiser(self, x: Tensor, condition: Condition | None = None, *, grid: Grid | None = None) -> Tensor:
        """The learnable denoiser's raw prediction (B, N, d), about the unit noise in x (B, N, d); x - sigma * prediction is denoised (E20).

        Args:
            x: noisy tokens in raster order.
            condition: of x; an unconditional denoiser does not look at it.
            grid: token grid of the call.

        Raises:
            ConfigError: the flow has no denoiser.
        """
        if self.self_denoiser is None:
            raise ConfigError("flow.denoiser", None, "this flow has no learnable denoiser.", "Use Flow.denoise (the score), or train one.")
        seen = bool(fields_of(self.self_denoiser))
        ctx = self._context(x, condition if seen else None, grid, 1.0, resolve=seen)
        return self.self_denoiser(x, ctx)  # type: ignore[no-any-return]  # torch is untyped here

    @torch.no_grad()
    def update_prior(self, z: Tensor, rate: float = 0.1) -> None:
        """Move prior_std^2 towards the second moments of z (B, N, d) by `rate` (TARFlow's rule, E7); only if `learn_prior`."""
        if not self.learn_prior:
            return
        moments = z.detach().square().mean(0).to(self.prior_std.dtype)
        if bool(torch.isfinite(moments).all()):  # a bad batch must not spoil the average for good
            self.set_prior(self.prior_variance.lerp(moments, rate))

    @property
    def prior_variance(self) -> Tensor:
        """(N, d) variance of the prior: `prior_var` as long as `prior_std` is its root, else the square of `prior_std`."""
        var = self.prior_var
        return var if var is not None and torch.equal(var.sqrt(), self.prior_std) else self.prior_std.square()

    @torch.no_grad()
    def set_prior(self, variance: Tensor) -> None:
        """Set the prior's variance (N, d); both buffers follow.

        Raises:
            ConfigError: the flow does not learn its prior.
        """
        if not self.learn_prior:
            raise ConfigError("flow.learn_prior", self.learn_prior, "this flow's prior is standard normal.", "Set learn_prior: true.")
        if self.prior_var is None:  # see prepare_state
            self.prior_var = torch.empty_like(self.prior_std)
        self.prior_var.copy_(variance)
        self.prior_std.copy_(variance.sqrt())

    def set_checkpointing(self, every: int, *, heads: bool = True) -> None:
        """Choose what is computed again in the backward pass instead of kept for it; gradients are the same, bit for bit.

        Args:
            every: every so many layers' activations, beginning with a block's first; 1: all layers', 0: none.
            heads: the float32 values inside heads and couplings. They are recomputed by default: it costs next to nothing, and keeps the
                layers' outputs (in autocast's type) and the couplings' inputs alone.
        """
        for part in self._parts():
            if hasattr(part, "recompute"):
                part.recompute(every, heads)

    def compile_layers(self) -> None:
        """torch.compile each layer of the blocks that can do so; parameter names stay as they are."""
        for part in self._parts():
            if hasattr(part, "compile_layers"):
                part.compile_layers()

    def block(self, k: int) -> Block:
        """Block k; 0 is the data side."""
        return self.blocks[k]  # type: ignore[return-value]  # the constructor takes nothing else

    def _parts(self) -> list[Any]:
        return [*self.blocks, *([] if self.self_denoiser is None else [self.self_denoiser])]

    def _blocks_forward(self, x: Tensor, ctx: Context, which: range | None = None) -> list[BlockOutput]:
        outputs = []
        for k in range(len(self.blocks)) if which is None else which:
            block, here = self.block(k), ctx.replace(block=k, blocks=len(self.blocks))
            if is_parallel(block):
                x, logdet = block.forward(x, here)
                outputs.append(BlockOutput(x, None, logdet[:, None, None]))
                continue
            causal: CausalBlock = block  # type: ignore[assignment]  # the constructor takes nothing else
            order = order_of(block)
            u = permute(x, order)
            params = causal.params(u, here)
            forward = causal.coupling.forward
            z, logdet = recomputed(forward, u, params) if getattr(block, "recompute_head", True) else forward(u, params)
            x = permute(z, order)
            outputs.append(BlockOutput(x, params, logdet))
        return outputs

    def _context(
        self, x: Tensor, condition: Condition | None, grid: Grid | None, attention_temperature: float | Tensor, *, resolve: bool = True
    ) -> Context:
        grid = self.grid if grid is None else (int(grid[0]), int(grid[1]))
        if x.ndim != 3 or x.shape[2] != self.channels or x.shape[1] != grid[0] * grid[1]:
            raise ShapeError(f"tokens {tuple(x.shape)} do not fit (B, {grid[0]} x {grid[1]}, channels = {self.channels}).")
        if isinstance(attention_temperature, Tensor):
            if attention_temperature.numel() not in (1, x.shape[0]):
                raise ShapeError(f"attention_temperature {tuple(attention_temperature.shape)} is neither one number nor one per row.")
            attention_temperature = attention_temperature.reshape(-1).expand(x.shape[0])
        return Context(self.resolve(condition, x.shape[0]) if resolve else None, grid, attention_temperature)

    def _prior(self, tokens: int) -> Tensor | None:
        if not self.learn_prior:
            return None
        if tokens != self.prior_std.shape[0]:
            raise ShapeError(f"the learned prior has {self.prior_std.shape[0]} tokens, the data {tokens}.")
        return self.prior_std
