"""The output head: the only place that is as wide as the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Reduce = Callable[..., tuple[Tensor, ...]]


class VocabHead(nn.Linear):
    """Linear map to the vocabulary that can be reduced chunk by chunk, so that no [.., V] tensor is kept.

    Everything that needs its weight runs inside its own `forward`: a sharded head is gathered there and
    nowhere else.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden: Tensor, reduce: Reduce | None = None, *rows: Tensor, chunk_size: int | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """Logits, or what `reduce` makes of them.

        Args:
            hidden: [..., D]; [n, D] where `reduce` is given.
            reduce: maps float32 logits [m,V] and the matching rows of `rows` to a tuple of [m,...] tensors.
            rows: tensors of n rows that are cut along with `hidden`.
            chunk_size: rows of `hidden` that are expanded to the vocabulary at once; None: all.

        Returns:
            [..., V] logits, or the reduced tensors, each [n,...].
        """
        if reduce is None:
            return super().forward(hidden)
        size = max(chunk_size or hidden.shape[0], 1)
        chunks = [
            self._reduced(reduce, *parts)
            for parts in zip(*(t.split(size) for t in (hidden, *rows)), strict=True)
        ]
        return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))

    def _reduced(self, reduce: Reduce, hidden: Tensor, *rows: Tensor) -> Sequence[Tensor]:
        def run(hidden: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
            return reduce(super(VocabHead, self).forward(hidden).float(), *rows)

        if torch.is_grad_enabled() and (hidden.requires_grad or self.weight.requires_grad):
            # The logits are recomputed in backward: they cost more memory than everything below the head.
            return checkpoint(run, hidden, *rows, use_reentrant=False)
        return run(hidden, *rows)
