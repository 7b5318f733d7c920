"""Causal (or full) self-attention with grouped queries, rotary positions, a key/value cache and a temperature per row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from srcflow.errors import ConfigError
from srcflow.nn.norm import RMSNorm
from srcflow.nn.rope import rotate

SMALL = 96
"""Up to so many tokens SDPA's math kernel is faster than its fused one in bfloat16 on CPUs."""

_watch: ContextVar[list[Tensor] | None] = ContextVar("attention_logits", default=None)


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A context without autocast for the device of x; the meta device, which has none, included."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def favourable_kernel(x: Tensor, tokens: int) -> AbstractContextManager[None]:
    """A context in which `scaled_dot_product_attention` over `tokens` tokens uses the faster kernel for activations like x."""
    kind = x.device.type
    if kind != "cpu" or tokens > SMALL:
        return nullcontext()
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return sdpa_kernel(SDPBackend.MATH) if dtype == torch.bfloat16 else nullcontext()


@contextmanager
def watch_logits() -> Iterator[list[Tensor]]:
    """Inside the block, every `Attention` call appends the largest absolute attention logit (a scalar tensor) to the yielded list."""
    logits: list[Tensor] = []
    token = _watch.set(logits)
    try:
        yield logits
    finally:
        _watch.reset(token)


class Cache:
    """Keys and values of one attention layer (B, kv_heads, slots, head_dim); allocated at the first write, owned by a solver's call."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def write(self, k: Tensor, v: Tensor, at: int) -> tuple[Tensor, Tensor]:
        """Store k, v (B, kv_heads, m, head_dim) at slots at .. at+m-1; returns everything up to there."""
        if self.k is None or self.v is None:
            shape = (*k.shape[:2], self.slots, k.shape[3])
            self.k, self.v = k.new_empty(shape), v.new_empty(shape)
        end = at + k.shape[2]
        self.k[:, :, at:end] = k
        self.v[:, :, at:end] = v
        return self.k[:, :, :end], self.v[:, :, :end]


class Attention(nn.Module):
    """Self-attention. The rows of `qkv` are [q | k | v] with heads contiguous; heads * head_dim need not equal the width.

    Args:
        width: input and output width.
        head_dim: width of a head.
        heads: query heads.
        kv_heads: key/value heads; each serves heads / kv_heads consecutive query heads.
        bias: whether the linear layers have biases.
        qk_norm: RMSNorm over the head dim of queries and keys, before the rotation.
    """

    def __init__(
        self, width: int, head_dim: int, heads: int, kv_heads: int | None = None, bias: bool = True, qk_norm: bool = False
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads < 1 or kv_heads < 1 or heads % kv_heads:
            raise ConfigError("kv_heads", kv_heads, f"does not divide heads = {heads}.")
        self.head_dim, self.heads, self.kv_heads = head_dim, heads, kv_heads
        self.qkv = nn.Linear(width, (heads + 2 * kv_heads) * head_dim, bias=bias)
        self.proj = nn.Linear(heads * head_dim, width, bias=bias)
        self.q_norm = RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim) if qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        *,
        rotation: tuple[Tensor, Tensor] | None = None,
        causal: bool = True,
        temperature: float | Tensor = 1.0,
        cache: Cache | None = None,
        at: int = 0,
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, m, width), the tokens of slots at .. at+m-1.
            rotation: cos and sin (m, head_dim / 2) of these slots.
            causal: each slot sees itself and the slots before it; otherwise all.
            temperature: logits are divided by it; a number or (B,).
            cache: earlier slots' keys and values; the new ones are stored in it.
            at: first slot of x.

        Returns:
            (B, m, width).
        """
        m = x.shape[1]
        q, k, v = (
            t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for t in self.qkv(x).split([n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)], dim=-1)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if (rotation is not None or not isinstance(self.q_norm, nn.Identity)) and cache is None and v.requires_grad:
            v = v.contiguous()  # else autograd would keep the whole of [q | k | v] for it, beside the new q and k
        if isinstance(temperature, Tensor):
            q = q / temperature.to(q).reshape(-1, 1, 1, 1)
        elif temperature != 1.0:
            q = q / temperature
        if cache is not None:
            k, v = cache.write(k, v, at)
        mask = None
        if causal and cache is not None and m > 1 and at > 0:
            slots = torch.arange(k.shape[2], device=x.device)
            mask = slots <= at + torch.arange(m, device=x.device)[:, None]
        if (seen := _watch.get()) is not None:
            seen.append(self._largest_logit(q, k, causal=causal, at=at))
        with favourable_kernel(q, k.shape[2]):
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=bool(causal and mask is None and m > 1), enable_gqa=self.kv_heads != self.heads
            )
        return self.proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]  # torch is untyped here

    def _largest_logit(self, q: Tensor, k: Tensor, *, causal: bool, at: int) -> Tensor:
        k = k.repeat_interleave(self.heads // self.kv_heads, dim=1)
        logits = (q.float() @ k.float().transpose(-1, -2)) * self.head_dim**-0.5
        if causal:
            seen = torch.arange(k.shape[2], device=q.device) <= at + torch.arange(q.shape[2], device=q.device)[:, None]
            logits = logits.masked_fill(~seen, 0.0)
        return logits.detach().abs().amax()  # type: ignore[no-any-return]  # torch is untyped here
