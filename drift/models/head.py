"""The output head: the only place that is as wide as the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Reduce = Callable[..., tuple[Tensor, ...]]


@runtime_checkable
class Differentiable(Protocol):
    """A reduction of logits that knows its own gradient."""

    def __call__(self, logits: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        """Maps float32 logits [m,V], which it may overwrite, and matching rows to a tuple of [m] tensors.

        The logits' memory is used again for the next chunk: no result may be a view of it.
        """
        ...

    def gradient(self, logits: Tensor, gradients: tuple[Tensor, ...], *rows: Tensor) -> Tensor:
        """[m,V] gradient of the logits, which it may overwrite, from those [m] of the reduced tensors."""
        ...


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
            reduce: maps float32 logits [m,V] and the matching rows of `rows` to a tuple of [m,...] tensors;
                the result has a graph where it is `Differentiable`.
            rows: tensors of n rows that are cut along with `hidden`.
            chunk_size: rows of `hidden` that are expanded to the vocabulary at once; None: all.

        Returns:
            [..., V] logits, or the reduced tensors, each [n,...].
        """
        if reduce is None:
            return super().forward(hidden)
        size = max(chunk_size or hidden.shape[0], 1)
        # What autocast would do: the matrices of a function of one's own it does not see.
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        hidden, weight = hidden.to(dtype), self.weight.to(dtype)
        if isinstance(reduce, Differentiable):
            return _Reduced.apply(reduce, size, hidden, weight, *rows)  # pyright: ignore[reportReturnType]
        with torch.no_grad():
            return _reduced(lambda part: F.linear(part, weight).float(), reduce, size, hidden, *rows)


def _reduced(
    logits: Callable[[Tensor], Tensor], reduce: Reduce, size: int, hidden: Tensor, *rows: Tensor
) -> tuple[Tensor, ...]:
    chunks = [
        reduce(logits(part), *parts)
        for part, *parts in zip(*(t.split(size) for t in (hidden, *rows)), strict=True)
    ]
    return tuple(torch.cat(parts) for parts in zip(*chunks, strict=True))


class _Logits:
    """[m,V] float32 logits of [m,D] states, chunk after chunk in the same memory: new memory costs time."""

    def __init__(self, num_rows: int, weight: Tensor) -> None:
        self.weight = weight
        self.memory = weight.new_empty(num_rows, len(weight))

    def __call__(self, hidden: Tensor) -> Tensor:
        return torch.mm(hidden, self.weight.t(), out=self.memory[: len(hidden)]).float()


class _Reduced(torch.autograd.Function):
    """Reduced logits; backward computes the logits again, of those rows alone that have a gradient.

    The logits cost more memory than everything below the head.
    """

    @staticmethod
    def forward(
        ctx: Any, reduce: Differentiable, size: int, hidden: Tensor, weight: Tensor, *rows: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.reduce, ctx.size = reduce, size
        ctx.save_for_backward(hidden, weight, *rows)
        return _reduced(_Logits(min(size, len(hidden)), weight), reduce, size, hidden, *rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        hidden, weight, *rows = ctx.saved_tensors
        moving = torch.stack(gradients).ne(0).any(dim=0).nonzero()[:, 0]
        by_hidden = torch.zeros_like(hidden) if ctx.needs_input_grad[2] else None
        by_weight = torch.zeros_like(weight) if ctx.needs_input_grad[3] else None
        logits = _Logits(min(ctx.size, len(moving)), weight)
        for part in moving.split(ctx.size):
            states = hidden[part]
            by_logits = ctx.reduce.gradient(
                logits(states), tuple(g[part] for g in gradients), *(r[part] for r in rows)
            ).to(hidden.dtype)
            if by_hidden is not None:
                by_hidden[part] = by_logits @ weight
            if by_weight is not None:
                by_weight.addmm_(by_logits.t(), states)
        return None, None, by_hidden, by_weight, *(None for _ in rows)
