"""What the blocks of all families are made of."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache as memoized
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class KeyValueCache(Protocol):
    """Keys and values of positions that are not fed again."""

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values to attend to, given those of the positions being fed.

        Args:
            layer: index of the transformer block.
            keys: [B,H,l,d] of the fed positions.
            values: [B,H,l,d] of the fed positions.
        """
        ...

    @property
    def state_to_keep(self) -> int | None:
        """The position to be fed that is to leave its last hidden state in `state`; None: none."""
        ...

    state: Tensor | None
    """[B,D] last hidden state of the position before the fed ones; None where they begin the sequence."""


class Block(nn.Module):
    """A transformer block: what each family does before attention and after it.

    Args:
        layer: its index.
    """

    # Compile both halves; what is between them, cache and attention, has no use of it.
    compiled: bool = False

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self,
        x: Tensor,
        table: tuple[Tensor, Tensor],
        key_mask: Tensor | None,
        cache: KeyValueCache | None,
        wanted: Tensor | None = None,
    ) -> Tensor:
        """The residual stream [B,l,D] after this block, or [n,D] of the wanted of its B*l positions."""
        project, finish = type(self).project, type(self).finish
        if self.compiled:
            project, finish = _compiled(project), _compiled(finish)
        query, key, value = project(self, x, table)
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)
        mixed = attend(query, key, value, key_mask)
        if wanted is not None:
            # What follows looks at no other position.
            x, mixed = (t.flatten(0, 1).index_select(0, wanted) for t in (x, mixed))
        return finish(self, x, mixed)

    def project(self, x: Tensor, table: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B,H,l,d], keys and values [B,Hkv,l,d] of the residual stream; see `rotary_table`."""
        raise NotImplementedError

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The residual stream [...,D] after the block, given what attention mixed, [...,H*d]."""
        raise NotImplementedError


@memoized
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # One for all layers and calls: a new one would be compiled again. The number of rows changes often.
    return torch.compile(function, dynamic=True)


class RMSNorm(nn.Module):
    """Root-mean-square layer norm (Zhang and Sennrich, arXiv 1910.07467), computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The normalised input, in its own dtype."""
        return cast(Tensor, _Norm.apply(x, self.weight, self.eps))


class _Norm(torch.autograd.Function):
    """Keeps the input and one number a position: what autograd would keep is twice that, or more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        full = x.float()
        scale = torch.rsqrt(full.square().mean(dim=-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        full = full * scale  # what was cast is gone
        return weight * full.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        x, weight, scale = ctx.saved_tensors
        gradient, normed = gradients[0].float(), x.float() * scale
        slopes = gradient * normed
        by_weight = slopes.flatten(0, -2).sum(dim=0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        # No matrix product: autocast would make it one of low precision.
        along = slopes.mul_(weight).mean(dim=-1, keepdim=True)
        del slopes
        gradient = gradient * weight
        return gradient.addcmul_(normed, along, value=-1).mul_(scale).to(x.dtype), by_weight, None


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, the gated linear unit of both families (Shazeer, arXiv 2002.05202)."""
    return cast(Tensor, _Gated.apply(gate, up))


class _Gated(torch.autograd.Function):
    """Keeps what it is given alone."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
        gate, up = ctx.saved_tensors
        by_gate = torch.ops.aten.silu_backward(gradients[0] * up, gate)
        return by_gate, F.silu(gate).mul_(gradients[0])


def default_positions(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """[B,L] int64 positions of whole rows [B,L], which do not count padding."""
    if attention_mask is not None:
        return positions_from_mask(attention_mask)
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)


def positions_from_mask(attention_mask: Tensor) -> Tensor:
    """[B,L] int64 positions that do not count padding, from a [B,L] bool mask."""
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)


def rotary_table(position_ids: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of rotary position embeddings (Su et al., arXiv 2104.09864).

    Args:
        position_ids: [B,l] int64.
        head_width: width of one attention head.
        theta: base of the frequencies.

    Returns:
        two [B,1,l,head_width] float32 tensors; the sine is negative in the left half, see `rotate`.
    """
    exponent = torch.arange(0, head_width, 2, device=position_ids.device).float() / head_width
    angle = position_ids[:, None, :, None].float() * (theta**-exponent)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys [B,H,l,d] turned by their position, in float32 whatever the dtype of `x`."""
    cos, sin = table
    left, right = x.float().chunk(2, dim=-1)
    return torch.addcmul(x.float() * cos, torch.cat((right, left), dim=-1), sin).to(x.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    """Bidirectional attention over the keys that are no padding.

    Args:
        query: [B,H,l,d].
        key: [B,Hkv,L,d]; H is a multiple of Hkv.
        value: [B,Hkv,L,d].
        key_mask: [B,1,1,L] bool, False at padding; None: no padding.

    Returns:
        [B,l,H*d].
    """
    grouped = query.shape[1] != key.shape[1]
    if grouped and key_mask is not None:
        # Accelerators have no kernel for groups with a mask: what they fall back to keeps [B,H,l,L] scores.
        share = query.shape[1] // key.shape[1]
        key, value, grouped = key.repeat_interleave(share, 1), value.repeat_interleave(share, 1), False
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=key_mask, enable_gqa=grouped)
    return mixed.transpose(1, 2).flatten(2)
