"""The flow: an invertible normalisation, then causal blocks, each an exact bijection with a triangular Jacobian."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from srcflow.errors import ConfigError, ShapeError
from srcflow.flows.block import TransformerBlock
from srcflow.flows.conditioners import ClassTable, ClassToken, Kind, TextPrefix, resolve
from srcflow.flows.denoise import tweedie
from srcflow.flows.denoiser import Denoiser
from srcflow.flows.likelihood import normal_log_prob
from srcflow.flows.normalization import Normalization
from srcflow.flows.temperatures import check_temperature
from srcflow.flows.trunk import Trunk, recomputed
from srcflow.guidance.base import Guidance
from srcflow.guidance.guided import GuidedBlock
from srcflow.nn.permutation import permute
from srcflow.registry import Recorded
from srcflow.solvers.base import Solver
from srcflow.solvers.sequential import Sequential
from srcflow.types import BlockOutput, CausalBlock, Condition, Context, FlowOutput, Grid


class GuidanceWarning(UserWarning):
    """Guidance was asked for but cannot have an effect."""


class Steps(NamedTuple):
    """The way of a batch through a flow: the normalised data y (B, N, d), every block's output, and the summed log-determinant (B,)."""

    y: Tensor
    blocks: list[BlockOutput]
    logdet: Tensor


class Flow(nn.Module, metaclass=Recorded):
    """A normalizing flow over tokens (B, N, d); `forward` goes from data to noise, `inverse` back.

    Blocks are listed in the order of `forward`; the last one, on the noise side, is inverted first. `presets` builds the published models.

    Args:
        blocks: the causal blocks.
        normalization: an invertible first layer (norm2), or None.
        learn_prior: keep the prior's standard deviation as a running average of the noise's second moments, for volume-preserving flows
            (TARFlow with `nvp=False`); otherwise the prior is standard normal.
        denoiser: a network that predicts the noise in x (STARFlow's learnable denoiser); None for a flow without.

    Attributes:
        prior_std: (N, d) standard deviation of the prior, used by `log_prob` and sampling only.
        prior_var: (N, d) the running average itself, whose root is `prior_std`; None without `learn_prior`.

    Raises:
        ConfigError: blocks disagree on channels, grid or the kind of condition.
    """

    prior_std: Tensor
    prior_var: Tensor | None
    null_text: Tensor | None
    null_mask: Tensor | None

    def __init__(
        self,
        blocks: list[TransformerBlock],
        normalization: Normalization | None = None,
        learn_prior: bool = False,
        denoiser: Denoiser | None = None,
    ) -> None:
        super().__init__()
        if not blocks:
            raise ConfigError("flow.blocks", blocks, "a flow has at least one block.")
        self.blocks = nn.ModuleList(blocks)
        self.normalization = normalization
        self.learn_prior = learn_prior
        self.channels, self.grid = blocks[0].channels, blocks[0].grid
        for i, b in enumerate(blocks):
            if (b.channels, b.grid) != (self.channels, self.grid):
                raise ConfigError(
                    f"flow.blocks[{i}]", (b.channels, b.grid), f"channels and grid differ from block 0's {(self.channels, self.grid)}."
                )
        if normalization is not None and normalization.channels != self.channels:
            raise ConfigError("flow.normalization.channels", normalization.channels, f"the blocks have channels = {self.channels}.")
        if denoiser is not None and (denoiser.channels, denoiser.grid) != (self.channels, self.grid):
            ours = (self.channels, self.grid)
            raise ConfigError("flow.denoiser", (denoiser.channels, denoiser.grid), f"channels and grid differ from the blocks' {ours}.")
        self.self_denoiser = denoiser
        trunks = self._trunks()
        kinds = {t.conditioner.kind for t in trunks if t.conditioner is not None}
        if len(kinds) > 1:
            raise ConfigError("flow.blocks", sorted(kinds), "blocks read different kinds of condition.")
        self.kind: Kind | None = next(iter(kinds), None)
        classes = {t.conditioner.num_classes for t in trunks if isinstance(t.conditioner, ClassTable | ClassToken)}
        if len(classes) > 1:
            raise ConfigError("flow.blocks num_classes", sorted(classes), "blocks (and the denoiser) know different numbers of classes.")
        ones = torch.ones(self.grid[0] * self.grid[1], self.channels)
        self.register_buffer("prior_std", ones)
        self.register_buffer("prior_var", ones.clone() if learn_prior else None)
        self.register_buffer("null_text", None)
        self.register_buffer("null_mask", None)

    @property
    def deep(self) -> int:
        """Index of the deep block of a deep-shallow flow: the last one, on the noise side, however many layers the others have."""
        return len(self.blocks) - 1

    @property
    def shape(self) -> tuple[int, Grid, tuple[str, ...]]:
        """Channels, grid and the order of every block: what two flows must share to be each other's negative."""
        return self.channels, self.grid, tuple(b.order for b in self._blocks())

    @property
    def num_classes(self) -> int:
        """Number of classes the flow is conditioned on; 0 if it is not."""
        return next((t.conditioner.num_classes for t in self._trunks() if isinstance(t.conditioner, ClassTable | ClassToken)), 0)

    def set_null(self, text: Tensor, mask: Tensor | None = None) -> None:
        """Set the null text (L, T) and its mask (L,): used for label -1, for condition=None and as the default negative.

        Raises:
            ConfigError: the flow is not conditioned on text.
        """
        if self.kind != "text":
            raise ConfigError("set_null", self.kind, "only flows conditioned on text have a null text.")
        if text.ndim != 2 or (mask is not None and mask.shape != text.shape[:1]):
            raise ShapeError(
                f"the null text is (L, T) with a mask (L,), not {tuple(text.shape)} and {None if mask is None else tuple(mask.shape)}."
            )
        wanted = next(t.conditioner.text_dim for t in self._trunks() if isinstance(t.conditioner, TextPrefix))
        if text.shape[1] != wanted:
            raise ShapeError(f"the null text has features of width {text.shape[1]}, the model takes text_dim = {wanted}.")
        device = self.prior_std.device
        self.null_text = text.detach().clone().to(device)
        self.null_mask = None if mask is None else mask.detach().clone().to(device)

    def prepare_state(self, state: Mapping[str, Tensor]) -> None:
        """Make room for what only some state dicts hold: the null text, and the prior's variance. Called before one is loaded."""
        for name in ("null_text", "null_mask", *(["prior_var"] if self.learn_prior else [])):
            setattr(self, name, torch.empty_like(state[name], device=self.prior_std.device) if name in state else None)

    def resolve(self, condition: Condition | None, batch: int) -> Condition | None:
        """The condition with every null filled in, for `batch` rows; None for an unconditional flow.

        Raises:
            ConfigError: the condition is not of the flow's kind, or a null text is needed and not set.
            ShapeError: its number of rows is not `batch`.
        """
        device = self.prior_std.device
        null = None if self.null_text is None else (self.null_text, self.null_mask)
        return resolve(condition, batch, kind=self.kind, num_classes=self.num_classes, null=null, device=device)

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

        Raises:
            ConfigError: the flow is not conditioned on classes.
        """
        if self.kind != "labels":
            raise ConfigError("flow", self.kind or "unconditional", "only a class-conditional flow has densities per class.")
        ctx = self._context(x, None, grid, 1.0)
        y, logdet = self.normalize(x)
        blocks = self._blocks()
        first = next((i for i, b in enumerate(blocks) if b.conditioned), len(blocks))
        for o in self._blocks_forward(y, ctx, blocks[:first]):
            y, logdet = o.z, logdet + o.logdet.flatten(1).sum(1)
        columns = []
        for label in range(self.num_classes):
            labels = torch.full((x.shape[0],), label, device=x.device)
            z, total = y, logdet
            for o in self._blocks_forward(y, ctx.replace(condition=Condition(labels=labels)), blocks[first:]):
                z, total = o.z, total + o.logdet.flatten(1).sum(1)
            columns.append(normal_log_prob(z, self._prior(z.shape[1])) + total)
        return torch.stack(columns, dim=1)

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
        """Noise to data.

        Args:
            z: (B, N, d) noise in raster order. For a learned prior multiply standard normal noise by `prior_std` first.
            condition: labels or text; None means the null condition.
            grid: (rows, columns) of the tokens; None means the grid the flow was built for.
            guidance: how to move away from a negative stream.
            solver: how a block is inverted; None means `Sequential()`.
            temperature: multiplies z.
            attention_temperature: divides the attention logits in every block and stream; a number or (B,).

        Returns:
            (B, N, d) data.

        Raises:
            ConfigError: a temperature is not positive and finite.
        """
        last = self.blocks_inverse(
            z,
            condition,
            grid=grid,
            guidance=guidance,
            solver=solver,
            temperature=temperature,
            attention_temperature=attention_temperature,
        )[-1]
        return last if self.normalization is None else self.normalization.inverse(last)

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

        Arguments as `inverse`, and errors.
        """
        for key, value in (("temperature", temperature), ("attention_temperature", attention_temperature)):
            check_temperature(key, value)
        ctx = self._context(z, condition, grid, attention_temperature)
        solver = Sequential() if solver is None else solver
        guided = self._guided_blocks(guidance)
        negative = self._negative(guidance, z.shape[0]) if guidance is not None and guided else None
        x, outputs = z * temperature, []
        for k in reversed(range(len(self.blocks))):
            block: CausalBlock = self._blocks()[k]
            order = self._blocks()[k].order
            if guidance is not None and k in guided:
                other = guidance.negative.flow
                negative_block = other._blocks()[k] if isinstance(other, Flow) else None
                block = GuidedBlock(block, guidance, negative_block=negative_block, negative_condition=negative)
            with torch.compiler.set_stance("force_eager"):  # a compiled layer would be compiled anew for every token
                u = solver(block, permute(x, order), ctx).u
            x = permute(u, order)
            outputs.append(x)
        return outputs

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
        ctx = self._context(x, condition if self.self_denoiser.conditioned else None, grid, 1.0, resolve=self.self_denoiser.conditioned)
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
        for b in self._trunks():
            b.checkpoint_every, b.recompute_head = every, heads

    def compile_layers(self) -> None:
        """torch.compile each transformer layer; parameter names stay as they are."""
        for b in self._trunks():
            if b.layer_count:
                for layer in b.layers:
                    layer.compile()

    def _blocks(self) -> list[TransformerBlock]:
        return list(self.blocks)  # type: ignore[arg-type]  # only TransformerBlocks are put in

    def _trunks(self) -> list[Trunk]:
        return [*self._blocks(), *([] if self.self_denoiser is None else [self.self_denoiser])]

    def _blocks_forward(self, x: Tensor, ctx: Context, blocks: list[TransformerBlock] | None = None) -> list[BlockOutput]:
        outputs = []
        for block in self._blocks() if blocks is None else blocks:
            u = permute(x, block.order)
            params = block.params(u, ctx)
            forward = block.coupling.forward
            z, logdet = recomputed(forward, u, params) if block.recompute_head else forward(u, params)
            x = permute(z, block.order)
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

    def _guided_blocks(self, guidance: Guidance | None) -> set[int]:
        if guidance is None or guidance.strength.is_zero:
            return set()
        negative = guidance.negative
        other = negative.flow
        if other is not None and not (isinstance(other, Flow) and other.shape == self.shape):
            raise ConfigError(
                "guidance.negative.flow", type(other).__name__, "is not a Flow with the same blocks, orders, channels and grid."
            )
        blocks = self._blocks()
        if guidance.blocks == "all":
            against = blocks if other is None else other._blocks()
            chosen = {i for i, (b, o) in enumerate(zip(blocks, against, strict=True)) if not (b.identity and o.identity)}
        elif guidance.blocks == "deep":
            chosen = {self.deep}
        else:
            chosen = {i for i, b in enumerate(blocks) if b.conditioned}
        if other is None and negative.attention_temperature == 1.0:
            effective = {i for i in chosen if blocks[i].conditioned}  # elsewhere both streams are the same
        else:
            effective = chosen
        if not effective:
            why = "no block sees a condition" if self.kind is None else "the blocks it names see no condition"
            warnings.warn(
                f"{guidance!r} has no effect: {why} and the negative stream differs in nothing else. "
                'Give negative an attention_temperature or a flow, or name other blocks ("all", "deep").',
                GuidanceWarning,
                stacklevel=3,
            )
        return effective

    def _negative(self, guidance: Guidance | None, batch: int) -> Condition | None:
        if guidance is None:
            return None
        flow = guidance.negative.flow if isinstance(guidance.negative.flow, Flow) else self
        condition = guidance.negative.condition
        if condition is not None and len(condition) == 1 and batch != 1:
            condition = condition.index(torch.zeros(batch, dtype=torch.long))
        return flow.resolve(condition, batch)
