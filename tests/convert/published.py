"""TARFlow and STARFlow a second time, plainly and slowly: what every option of their constructors means, on published state dicts.

Written from the published formulae (arXiv 2412.06329 and 2506.06276) and not from srcflow, whose converted flows are held against it.
Functions over a state dict with the published keys and the constructor's arguments; no module, no cache: the inverse recomputes the whole
sequence for every token. B batch, n tokens, D width of a token, L tokens of the text. Everything stays in the dtype that it is given.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

State = dict[str, Tensor]
Options = dict[str, Any]
Grid = tuple[int, int]

TARFLOW: Options = {"nvp": True, "num_classes": 0, "expansion": 4, "head_dim": 64, "seq_order": "R2L"}
STARFLOW: Options = {
    "head_dim": 64,
    "num_heads": None,
    "num_kv_heads": None,
    "rope": False,
    "pt_seq_len": None,
    "sos": False,
    "txt_size": 0,
    "txt_dim": 0,
    "cond_top_only": False,
    "use_softplus": False,
    "soft_clip": 0.0,
    "norm_type": "layer_norm",
    "use_qk_norm": False,
    "use_post_norm": False,
    "use_swiglu": False,
    "expansion": 4,
    "use_bias": True,
    "use_final_norm": False,
    "seq_order": "R2L",
    "top_block_channels": None,
    "learnable_self_denoiser": False,
    "conditional_denoiser": False,
}
DENOISER = "learnable_self_denoiser"
DENOISER_LAYERS = 8
THIRD_AXIS = 8  # frequencies of the third axis, in models with text
SOFTPLUS_OFFSET = math.log(math.e - 1)  # softplus of it is one


class Stream(NamedTuple):
    """One pass of one model: its weights and constructor, what it is told, and its attention temperature, a number or one per row (B,)."""

    state: State
    config: Options
    labels: Tensor | None = None
    text: Tensor | None = None
    mask: Tensor | None = None
    temperature: float | Tensor = 1.0


class Block(NamedTuple):
    """A block of the forward pass: its output in raster order; in its own order a, m, log-det per element, all (B, n, D)."""

    z: Tensor
    a: Tensor
    m: Tensor
    logdet: Tensor


class Gaussian(NamedTuple):
    """Log-scale and mean of every token given those before it, (B, n, D) each, in a block's own order."""

    log_sigma: Tensor
    m: Tensor


Parameters = Callable[[Tensor], Gaussian]
Rule = Callable[[Gaussian, Gaussian], Gaussian]


# ---- tokens


def tokens(images: Tensor, p: int, order: str) -> Tensor:
    """Images (B, C, H, W) to tokens (B, HW/p^2, C p^2), row by row; a token's features: channel, row, column (cpp), or channel last."""
    _, _, height, width = images.shape
    rows = []
    for r in range(0, height, p):
        for c in range(0, width, p):
            patch = images[:, :, r : r + p, c : c + p]
            rows.append((patch if order == "cpp" else patch.permute(0, 2, 3, 1)).flatten(1))
    return torch.stack(rows, 1)


def images(x: Tensor, p: int, order: str, grid: Grid) -> Tensor:
    """What `tokens` undoes."""
    rows = []
    for r in range(grid[0]):
        row = []
        for c in range(grid[1]):
            patch = x[:, r * grid[1] + c]
            row.append(patch.unflatten(1, (-1, p, p)) if order == "cpp" else patch.unflatten(1, (p, p, -1)).permute(0, 3, 1, 2))
        rows.append(torch.cat(row, 3))
    return torch.cat(rows, 2)


# ---- the constructor


def options(config: Options) -> Options:
    """The constructor's arguments with STARFlow's defaults filled in and every block's layers listed."""
    full = {**STARFLOW, **config}
    layers = config["layers_per_block"]
    layers = [layers] if isinstance(layers, int) else list(layers)
    full["layers"] = layers * config["num_blocks"] if len(layers) == 1 else layers
    full["side"] = config["img_size"] // config["patch_size"]
    full["P"] = full["pt_seq_len"] or full["side"]
    full["D"] = config["in_channels"] * config["patch_size"] ** 2
    return full


def tarflow_options(config: Options) -> Options:
    """TARFlow's are STARFlow's with nothing switched on."""
    return options({**TARFLOW, **config})


def width(o: Options, k: int) -> int:
    """Of block k; the last may have its own."""
    top = o["top_block_channels"] if k == o["num_blocks"] - 1 else None
    return int(top or o["channels"])


def heads(o: Options, channels: int) -> tuple[int, int]:
    """Heads of the queries, and of the keys and values."""
    queries = o["num_heads"] or channels // o["head_dim"]
    return queries, o["num_kv_heads"] or queries


def reads_text(o: Options, k: int) -> bool:
    return o["txt_size"] > 0 and (not o["cond_top_only"] or k == o["num_blocks"] - 1)


def is_reversed(o: Options, k: int) -> bool:
    return k % 2 == (1 if o["seq_order"] == "R2L" else 0)


def is_identity(o: Options, k: int) -> bool:
    """A block without layers below the last is nothing at all; as the last block it keeps its maps in and out."""
    return o["layers"][k] == 0 and k < o["num_blocks"] - 1


# ---- weights


class _Draw:
    """Weights by name: linear maps that keep the size of what they are given, gains and biases that do something."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator, self.dtype, self.state = torch.Generator().manual_seed(seed), dtype, State()

    def normal(self, name: str, *shape: int, scale: float) -> None:
        self.state[name] = scale * torch.randn(*shape, generator=self.generator, dtype=self.dtype)

    def linear(self, name: str, fan_out: int, fan_in: int, *, bias: bool = True, gain: float = 1.0) -> None:
        self.normal(f"{name}.weight", fan_out, fan_in, scale=gain / math.sqrt(fan_in))
        if bias:
            self.normal(f"{name}.bias", fan_out, scale=0.1)

    def norm(self, name: str, size: int, *, rms: bool) -> None:
        self.normal(f"{name}.weight", size, scale=0.2)  # of an RMSNorm: it multiplies by 1 + w
        if not rms:
            self.state[f"{name}.weight"] += 1
            self.normal(f"{name}.bias", size, scale=0.1)

    def layer(self, name: str, o: Options, channels: int) -> None:
        (queries, pairs), bias, rms = heads(o, channels), o["use_bias"], o["norm_type"] == "rms_norm"
        inner, hidden = queries * o["head_dim"], o["expansion"] * channels
        self.norm(f"{name}.attention.norm", channels, rms=rms)
        self.linear(f"{name}.attention.qkv", inner + 2 * pairs * o["head_dim"], channels, bias=bias, gain=1.4)
        self.linear(f"{name}.attention.proj", channels, inner, bias=bias)
        if o["use_qk_norm"]:
            self.norm(f"{name}.attention.query_norm", o["head_dim"], rms=True)
            self.norm(f"{name}.attention.key_norm", o["head_dim"], rms=True)
        if o["use_post_norm"]:
            self.norm(f"{name}.attention.post_norm", channels, rms=True)
            self.norm(f"{name}.mlp.post_norm", channels, rms=True)
        self.norm(f"{name}.mlp.norm", channels, rms=rms)
        if o["use_swiglu"]:
            self.linear(f"{name}.mlp.gate_proj", hidden, channels, bias=bias)
            self.linear(f"{name}.mlp.up_proj", hidden, channels, bias=bias)
            self.linear(f"{name}.mlp.down_proj", channels, hidden, bias=bias)
        else:
            self.linear(f"{name}.mlp.main.0", hidden, channels, bias=bias)
            self.linear(f"{name}.mlp.main.2", channels, hidden, bias=bias)

    def trunk(self, name: str, o: Options, channels: int, layers: int, out: int, *, text: bool) -> None:
        self.linear(f"{name}.proj_in", channels, o["D"], gain=0.6)
        if text:
            self.linear(f"{name}.proj_txt", channels, o["txt_dim"])
        for index in range(layers):
            self.layer(f"{name}.attn_blocks.{index}", o, channels)
        if o["use_final_norm"]:
            self.norm(f"{name}.final_norm", channels, rms=True)
        self.linear(f"{name}.proj_out", out, channels, gain=0.12)


def random_state(kind: str, config: Options, seed: int, dtype: torch.dtype = torch.float64) -> State:
    """A state dict with every published key of a "tarflow" or "starflow" of this configuration, save the buffers that nothing reads.

    Attention, MLPs and norms are at work, log-scales are a few tenths, and TARFlow's `var` is not one where it is learned (nvp=False).
    """
    draw = _Draw(seed, dtype)
    o = tarflow_options(config) if kind == "tarflow" else options(config)
    n = (o["side"] if kind == "tarflow" else o["P"]) ** 2
    for k, layers in enumerate(o["layers"]):
        name, channels = f"blocks.{k}", width(o, k)
        if is_identity(o, k):
            continue
        draw.trunk(name, o, channels, layers, o["D"] * (2 if o.get("nvp", True) else 1), text=reads_text(o, k))
        if kind == "tarflow":
            draw.normal(f"{name}.pos_embed", n, channels, scale=0.5)
            if o["num_classes"]:
                draw.normal(f"{name}.class_embed", o["num_classes"], 1, channels, scale=0.5)
        elif o["sos"]:
            draw.normal(f"{name}.sos_embed", 1, 1, o["D"], scale=1.0)
    if o["learnable_self_denoiser"]:
        draw.trunk(DENOISER, o, o["channels"], DENOISER_LAYERS, o["D"], text=o["conditional_denoiser"])
    draw.state["var"] = torch.ones(n, o["D"], dtype=dtype)
    if not o.get("nvp", True):
        draw.state["var"] += torch.rand(n, o["D"], generator=draw.generator, dtype=dtype)
    return draw.state


# ---- the network


def linear(state: State, name: str, x: Tensor) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def rms_norm(state: State, name: str, x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + state[f"{name}.weight"])


def layer_norm(state: State, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def norm(state: State, name: str, x: Tensor, o: Options) -> Tensor:
    return (rms_norm if o["norm_type"] == "rms_norm" else layer_norm)(state, name, x)


def gelu(x: Tensor, *, tanh: bool = False) -> Tensor:
    gate = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)) if tanh else torch.erf(x / math.sqrt(2))
    return 0.5 * x * (1 + gate)


def angles(o: Options, grid: Grid, length: int) -> Tensor:
    """RoPE's angles (length + h w, head_dim/2) of a text of `length` tokens and then of the image's slots, row by row, in float64."""
    return _angles(o["head_dim"], o["P"], THIRD_AXIS if o["txt_size"] > 0 else 0, grid, length)


@functools.cache
def _angles(dim: int, side: int, third: int, grid: Grid, length: int) -> Tensor:
    h, w = grid
    spatial = dim // 2 - third  # channels of one spatial axis, two per frequency
    along = [10000.0 ** (-2 * j / spatial) for j in range(spatial // 2)]
    across = [10000.0 ** (-j / third) for j in range(third)]
    stretch = side / math.sqrt(h * w)
    places = [(0.0, 0.0, t * side / length) for t in range(length)]
    places += [(r * stretch, c * stretch, 0.0) for r in range(h) for c in range(w)]
    table = [[row * f for f in along] + [column * f for f in along] + [other * f for f in across] for row, column, other in places]
    return torch.tensor(table, dtype=torch.float64)


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Neighbouring channels of x (B, s, heads, head_dim) are real and imaginary part of numbers that turn by `angle` (s, head_dim/2)."""
    real, imaginary = x[..., 0::2], x[..., 1::2]
    cos, sin = (t[:, None].to(x) for t in (angle.cos(), angle.sin()))
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).flatten(-2)


def attention(
    state: State, name: str, x: Tensor, o: Options, *, angle: Tensor | None, causal: bool, temperature: float | Tensor = 1.0
) -> Tensor:
    """One attention of x (B, s, width), without the residual."""
    dim, (queries, pairs) = o["head_dim"], heads(o, x.shape[-1])
    qkv = linear(state, f"{name}.qkv", norm(state, f"{name}.norm", x, o))
    q, k, v = (part.unflatten(-1, (-1, dim)) for part in qkv.split([queries * dim, pairs * dim, pairs * dim], -1))
    if o["use_qk_norm"]:
        q, k = rms_norm(state, f"{name}.query_norm", q), rms_norm(state, f"{name}.key_norm", k)
    if angle is not None:
        q, k = rotate(q, angle), rotate(k, angle)
    out, s = [], x.shape[1]
    hidden = torch.ones(s, s, dtype=torch.bool, device=x.device).triu(1)
    heat = torch.as_tensor(temperature, dtype=x.dtype, device=x.device).reshape(-1, 1, 1)
    for head in range(queries):
        pair = head // (queries // pairs)
        logits = q[:, :, head] @ k[:, :, pair].mT / math.sqrt(dim) / heat
        if causal:
            logits = logits.masked_fill(hidden, -math.inf)
        out.append(logits.softmax(-1) @ v[:, :, pair])
    y = linear(state, f"{name}.proj", torch.cat(out, -1))
    return rms_norm(state, f"{name}.post_norm", y) if o["use_post_norm"] else y


def mlp(state: State, name: str, x: Tensor, o: Options) -> Tensor:
    """One MLP, without the residual."""
    x = norm(state, f"{name}.norm", x, o)
    if o["use_swiglu"]:
        y = linear(state, f"{name}.down_proj", gelu(linear(state, f"{name}.gate_proj", x), tanh=True) * linear(state, f"{name}.up_proj", x))
    else:
        y = linear(state, f"{name}.main.2", gelu(linear(state, f"{name}.main.0", x)))
    return rms_norm(state, f"{name}.post_norm", y) if o["use_post_norm"] else y


def layers(
    state: State, name: str, h: Tensor, o: Options, count: int, *, angle: Tensor | None, causal: bool, temperature: float | Tensor = 1.0
) -> Tensor:
    for index in range(count):
        layer = f"{name}.attn_blocks.{index}"
        h = h + attention(state, f"{layer}.attention", h, o, angle=angle, causal=causal, temperature=temperature)
        h = h + mlp(state, f"{layer}.mlp", h, o)
    return h


def turned(x: Tensor, backwards: bool) -> Tensor:
    """Tokens x (B, n, D) from raster order to a block's own, or back."""
    return x.flip(1) if backwards else x


def shift(a: Tensor) -> Tensor:
    """Token i takes what was said at i-1; the first token zero."""
    return torch.cat([torch.zeros_like(a[:, :1]), a[:, :-1]], 1)


# ---- TARFlow: blocks


def tarflow_parameters(stream: Stream, k: int, u: Tensor) -> tuple[Tensor, Tensor]:
    """a and m of block k for tokens u (B, n, D) in its own order; a is zero for a volume-preserving one."""
    state, o, name = stream.state, tarflow_options(stream.config), f"blocks.{k}"
    positions = state[f"{name}.pos_embed"]
    h = linear(state, f"{name}.proj_in", u) + (positions.flip(0) if is_reversed(o, k) else positions)
    if o["num_classes"]:
        table = state[f"{name}.class_embed"]
        labels = torch.full((len(u),), -1) if stream.labels is None else stream.labels
        h = h + torch.stack([table.mean(0) if label < 0 else table[label] for label in labels.tolist()])
    h = layers(state, name, h, o, o["layers"][k], angle=None, causal=True, temperature=stream.temperature)
    out = shift(linear(state, f"{name}.proj_out", h))
    if not o["nvp"]:
        return torch.zeros_like(out), out
    return out[..., : o["D"]], out[..., o["D"] :]


def tarflow_forward(stream: Stream, x: Tensor) -> list[Block]:
    """Every block, data to noise, of tokens x (B, n, D). `var` has no part in it."""
    o, blocks = tarflow_options(stream.config), []
    for k in range(o["num_blocks"]):
        backwards = is_reversed(o, k)
        u = turned(x, backwards)
        a, m = tarflow_parameters(stream, k, u)
        x = turned((u - m) * (-a).exp(), backwards)
        blocks.append(Block(x, a, m, -a))
    return blocks


def tarflow_reverse(
    stream: Stream, noise: Tensor, *, guidance: float = 0.0, what: str = "ab", annealed: bool = False, negative: Stream | None = None
) -> list[Tensor]:
    """What noise (B, n, D) of unit variance is after every undone block, raster order, the last block's first.

    In all blocks log-scale ("a"), mean ("b") or both are pushed away from the negative stream.
    """
    o, x, out = tarflow_options(stream.config), noise * stream.state["var"].sqrt(), []

    def push(positive: Gaussian, other: Gaussian) -> Gaussian:
        w = torch.full((x.shape[1],), guidance, dtype=x.dtype)
        if annealed:
            w = w * torch.arange(x.shape[1], dtype=x.dtype) / (x.shape[1] - 1)
        pushed = [c + w[:, None] * (c - u) if letter in what else c for letter, c, u in zip("ab", positive, other, strict=True)]
        return Gaussian(*pushed)

    for k in reversed(range(o["num_blocks"])):
        x = _undo(x, is_reversed(o, k), *_streams(tarflow_parameters, stream, negative if guidance else None, k), push)
        out.append(x)
    return out


# ---- STARFlow: blocks


def starflow_parameters(stream: Stream, k: int, u: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """a and m of block k, clipped and shifted, for tokens u (B, n, D) in its own order."""
    state, o, name, n = stream.state, options(stream.config), f"blocks.{k}", u.shape[1]
    if is_identity(o, k):
        return torch.zeros_like(u), torch.zeros_like(u)
    if o["sos"]:
        u = torch.cat([state[f"{name}.sos_embed"].expand(len(u), -1, -1), u[:, :-1]], 1)
    h = linear(state, f"{name}.proj_in", u)
    prefix = text_prefix(stream, name) if reads_text(o, k) else None
    h = h if prefix is None else torch.cat([prefix, h], 1)
    angle = angles(o, grid, h.shape[1] - n)
    h = layers(state, name, h, o, o["layers"][k], angle=angle, causal=True, temperature=stream.temperature)[:, -n:]
    if o["use_final_norm"]:
        h = rms_norm(state, f"{name}.final_norm", h)
    out = linear(state, f"{name}.proj_out", h)
    if o["soft_clip"] > 0:
        out = o["soft_clip"] * torch.tanh(out / o["soft_clip"])
    if not o["sos"]:
        out = shift(out)
    return out[..., : o["D"]], out[..., o["D"] :]


def text_prefix(stream: Stream, name: str) -> Tensor:
    """The text's tokens (B, L, width): padding is set to zero before the map, so that the map's bias is left of it."""
    assert stream.text is not None
    text = stream.text if stream.mask is None else stream.text * stream.mask[..., None].to(stream.text)
    return linear(stream.state, f"{name}.proj_txt", text)


def starflow_log_sigma(a: Tensor, o: Options) -> Tensor:
    return torch.log(torch.log1p(torch.exp(a + SOFTPLUS_OFFSET))) if o["use_softplus"] else a


def starflow_forward(stream: Stream, x: Tensor, grid: Grid) -> list[Block]:
    """Every block, data to noise, of tokens x (B, h w, D)."""
    o, blocks = options(stream.config), []
    for k in range(o["num_blocks"]):
        backwards = is_reversed(o, k)
        u = turned(x, backwards)
        a, m = starflow_parameters(stream, k, u, grid)
        log_sigma = starflow_log_sigma(a, o)
        if not is_identity(o, k):
            x = turned((u - m) / log_sigma.exp(), backwards)
        blocks.append(Block(x, a, m, -log_sigma))
    return blocks


def starflow_reverse(
    stream: Stream, noise: Tensor, grid: Grid, *, guidance: float = 0.0, negative: Stream | None = None, top: bool = False
) -> list[Tensor]:
    """What noise (B, h w, D) is after every undone block, raster order, the deep block's first.

    (1 + w) log p(positive) - w log p(negative), per token, in the deep block alone if only it reads the text (`cond_top_only`) or if `top`.
    """
    o, x, out = options(stream.config), noise, []

    def sharpen(positive: Gaussian, other: Gaussian) -> Gaussian:
        s = torch.clamp((positive.log_sigma - other.log_sigma).exp(), max=1.0) ** 2
        d = 1 + guidance - guidance * s
        m = ((1 + guidance) * positive.m - guidance * s * other.m) / d
        return Gaussian(positive.log_sigma - 0.5 * d.log(), m)

    def parameters(one: Stream, k: int, u: Tensor) -> Gaussian:
        a, m = starflow_parameters(one, k, u, grid)
        return Gaussian(starflow_log_sigma(a, options(one.config)), m)

    for k in reversed(range(o["num_blocks"])):
        deep_only = top or o["cond_top_only"]
        guided = bool(guidance) and (not deep_only or k == o["num_blocks"] - 1)
        if not is_identity(o, k):
            x = _undo(x, is_reversed(o, k), *_streams(parameters, stream, negative if guided else None, k), sharpen)
        out.append(x)
    return out


def starflow_denoiser(stream: Stream, x: Tensor, grid: Grid) -> Tensor:
    """The learnable denoiser's prediction (B, h w, D) for noisy tokens x in raster order."""
    state, o, n = stream.state, options(stream.config), x.shape[1]
    h = linear(state, f"{DENOISER}.proj_in", x)
    if o["conditional_denoiser"]:
        h = torch.cat([text_prefix(stream, DENOISER), h], 1)
    angle = angles(o, grid, h.shape[1] - n)
    h = layers(state, DENOISER, h, o, DENOISER_LAYERS, angle=angle, causal=False)[:, -n:]
    if o["use_final_norm"]:
        h = rms_norm(state, f"{DENOISER}.final_norm", h)
    return linear(state, f"{DENOISER}.proj_out", h)


# ---- both


def _streams(
    parameters: Callable[[Stream, int, Tensor], tuple[Tensor, Tensor]], stream: Stream, negative: Stream | None, k: int
) -> tuple[Parameters, Parameters | None]:
    def of(one: Stream) -> Parameters:
        return lambda u: Gaussian(*parameters(one, k, u))

    return of(stream), None if negative is None else of(negative)


def _undo(z: Tensor, backwards: bool, positive: Parameters, negative: Parameters | None, rule: Rule) -> Tensor:
    """A block's inverse: token after token, the whole sequence anew for each."""
    z = turned(z, backwards)
    u = torch.zeros_like(z)
    for i in range(z.shape[1]):
        now = positive(u)
        if negative is not None:
            now = rule(now, negative(u))
        u[:, i] = z[:, i] * now.log_sigma[:, i].exp() + now.m[:, i]
    return turned(u, backwards)


def loss(blocks: list[Block]) -> Tensor:
    """Nats per dimension without the constant: half the mean square of the noise less the mean log-determinants."""
    return 0.5 * blocks[-1].z.square().mean() - torch.stack([b.logdet.mean() for b in blocks]).sum()


def latent_norm(x: Tensor, blocks: list[Block]) -> Tensor:
    """Sum of the mean squares of the input and of every block's output except the last."""
    return torch.stack([t.square().mean() for t in [x, *(b.z for b in blocks[:-1])]]).sum()


def gradient(forward: Callable[[Tensor], list[Block]], x: Tensor) -> Tensor:
    """Of the loss with respect to the tokens x."""
    x = x.detach().requires_grad_(True)
    (grad,) = torch.autograd.grad(loss(forward(x)), x)
    return grad


def denoised(x: Tensor, sigma: float, grad: Tensor) -> Tensor:
    """One step of the score: x - sigma^2 numel(x) d loss / dx."""
    return x - sigma**2 * x.numel() * grad
