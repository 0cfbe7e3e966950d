"""The output head: the only place that is as wide as the vocabulary."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# What is made of n hidden states [n,D] and the head's weight [V,D]: tensors of n rows.
Use = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


class VocabHead(nn.Linear):
    """Linear map to the vocabulary, of which a part at a time can be made use of: no [.., V] tensor is kept.

    Everything that needs its weight runs inside its own `forward`: a sharded head is gathered there and
    nowhere else.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden: Tensor, use: Use | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """Logits, or what `use` makes of the hidden states and the weight.

        Args:
            hidden: [..., D]; [n,D] where `use` is given.
            use: is given both in the dtype that logits are computed in.

        Returns:
            [..., V] logits, or what `use` gives.
        """
        if use is None:
            return super().forward(hidden)
        # What autocast would do: the matrices of a function of one's own it does not see.
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        return use(hidden.to(dtype), self.weight.to(dtype))


def in_chunks(reduce: Callable[..., tuple[Tensor, ...]], *rows: Tensor, size: int) -> Use:
    """A use of the head: the logits of some hidden states at a time, reduced, without a graph.

    Args:
        reduce: maps float32 logits [m,V], which it may overwrite, and the matching rows of `rows` to a tuple
            of [m,...] tensors.
        rows: tensors of n rows that are cut along with the hidden states.
        size: hidden states that are expanded to the vocabulary at once.
    """

    @torch.no_grad()
    def use(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        chunks = [
            reduce(F.linear(part, weight).float(), *parts)
            for part, *parts in zip(*(t.split(size) for t in (hidden, *rows)), strict=True)
        ]
        return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))

    return use
