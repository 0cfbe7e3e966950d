"""What the blocks of all families are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.Module):
    """Root-mean-square layer norm (Zhang and Sennrich, arXiv 1910.07467), computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """The normalised input, in its own dtype."""
        full = x.float()
        full = full * torch.rsqrt(full.square().mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * full.to(x.dtype)


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
        two [B,1,l,head_width] float32 tensors.
    """
    exponent = torch.arange(0, head_width, 2, device=position_ids.device).float() / head_width
    angle = position_ids[:, None, :, None].float() * (theta**-exponent)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys [B,H,l,d] turned by their position, in float32 whatever the dtype of `x`."""
    cos, sin = table
    left, right = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


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
