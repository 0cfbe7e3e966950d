"""Log-probabilities of tokens from hidden states and the head's weight, a tile of the vocabulary at a time.

Logits cost more memory than everything below the head. Here a tile of them is made, reduced to one running
sum a state and overwritten; backward makes it again. No sum over the vocabulary is taken twice, and the
gradient of every row of the weight is written once (the idea of Wijmans et al., arXiv 2411.09009).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from drift.models.base import ILLEGAL_LOGIT

# Logits of a tile: on a CPU as many as its cache holds, elsewhere enough to keep the device busy.
_TILE_ON_CPU, _TILE_ELSEWHERE = 2**21, 2**26
_LEAST_WIDTH = 512
# Kernels like rows that begin at multiples of this.
_STRIDE = 128


def tile_width(num_states: int, vocab_rows: int, *, on_cpu: bool = False) -> int:
    """Tokens of a tile.

    Args:
        num_states: hidden states that are scored together.
        vocab_rows: rows of the head.
        on_cpu: whether they are scored there.
    """
    size = _TILE_ON_CPU if on_cpu else _TILE_ELSEWHERE
    return min(max(size // max(num_states, 1) // _STRIDE * _STRIDE, _LEAST_WIDTH), vocab_rows)


@dataclass(frozen=True, eq=False)
class TokenScores:
    """A use of the head: log-probabilities over the legal tokens, and entropies, with their graph.

    Args:
        targets: [n] int64 tokens.
        illegal: ids that get no probability.
        entropy: whether entropies are wanted, too.
        width: tokens of a tile; None: see `tile_width`.
        top: whether the log-probability of the likeliest token is wanted, too.
    """

    targets: Tensor
    illegal: list[int]
    entropy: bool = False
    width: int | None = None
    top: bool = False

    def __call__(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        """[n] log-probabilities, nats; then [n] entropies and [n] of the likeliest token, if wanted."""
        logp, entropy, top = _Scores.apply(self, hidden, weight)  # pyright: ignore[reportGeneralTypeIssues]
        return (logp, *[entropy] * self.entropy, *[top] * self.top)

    def tiles(self, hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The rows of the weight in each tile, its [m,w] float32 logits, and as many of the states' dtype.

        All may be overwritten; the last two are one where the states are float32.
        """
        num_states, vocab_rows = len(hidden), len(weight)
        on_cpu = hidden.device.type == "cpu"
        width = min(self.width or tile_width(num_states, vocab_rows, on_cpu=on_cpu), vocab_rows)
        # The same memory for every tile: new memory costs time.
        memory = hidden.new_empty(num_states * width)
        full = memory if memory.dtype == torch.float32 else torch.empty_like(memory, dtype=torch.float32)
        for first in range(0, vocab_rows, width):
            part = weight[first : first + width]
            size = num_states * len(part)
            logits = spare = memory[:size].view(num_states, len(part))
            torch.mm(hidden, part.t(), out=spare)
            if full is not memory:
                logits = full[:size].view(num_states, len(part)).copy_(spare)
            for start, stop in _runs(self.illegal):
                logits[:, max(start - first, 0) : max(stop - first, 0)] = ILLEGAL_LOGIT
            yield slice(first, first + len(part)), logits, spare


class _Scores(torch.autograd.Function):
    """Backward computes those states alone that have a gradient."""

    @staticmethod
    def forward(ctx: Any, scores: TokenScores, hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        blank = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
        top, at_target = torch.full_like(blank, torch.finfo(torch.float32).min), blank
        # Of exp(logit - top), over the tiles so far: the sum, and that of it times (logit - top).
        total, moment = blank, blank
        likeliest = torch.zeros_like(scores.targets)
        for rows, logits, _ in scores.tiles(hidden, weight):
            place, inside = _places(scores.targets, rows)
            at_target = torch.where(inside, logits.gather(1, place)[:, 0], at_target)
            if scores.top:
                here, at = logits.max(dim=1)
                likeliest = torch.where(here > top, at + rows.start, likeliest)
            highest = torch.maximum(top, logits.amax(dim=1))
            shift, top = top - highest, highest
            distance = logits.sub_(top[:, None])
            mass = distance.exp() if scores.entropy else distance.exp_()
            here = mass.sum(dim=1)
            if scores.entropy:
                moment = (moment + total * shift) * shift.exp() + mass.mul_(distance).sum(dim=1)
            total = total * shift.exp() + here
            del mass  # before the next tile
        rest = total.log()
        normaliser, entropy = top + rest, rest - moment / total
        ctx.scores = scores
        ctx.save_for_backward(hidden, weight, normaliser, entropy, likeliest)
        wanted = (True, scores.entropy, scores.top)
        found = (at_target - normaliser, entropy, -rest)
        ctx.mark_non_differentiable(*(value for value, kept in zip(found, wanted, strict=True) if not kept))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore
        hidden, weight, normaliser, entropy, likeliest = ctx.saved_tensors
        moving = torch.stack(gradients).ne(0).any(dim=0).nonzero()[:, 0]
        scores: TokenScores = ctx.scores
        states, targets, likeliest = hidden[moving], scores.targets[moving], likeliest[moving]
        by_target, by_entropy, by_top = (gradient[moving, None] for gradient in gradients)
        by_logp = by_target + by_top if scores.top else by_target
        normaliser, entropy = normaliser[moving, None], entropy[moving, None]
        # Added up over the tiles: in float32, whatever the dtype of the states.
        by_states = torch.zeros_like(states, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        by_weight = torch.empty_like(weight) if ctx.needs_input_grad[2] else None
        for rows, logits, spare in scores.tiles(states, weight):
            logp = logits.sub_(normaliser)
            if scores.entropy:
                prob = logp.exp()
                by_logits = logp.add_(entropy).mul_(by_entropy).add_(by_logp).mul_(prob).neg_()
                del prob
            else:
                by_logits = logp.exp_().mul_(-by_logp)
            place, inside = _places(targets, rows)
            by_logits.scatter_add_(1, place, by_target * inside[:, None])
            if scores.top:
                place, inside = _places(likeliest, rows)
                by_logits.scatter_add_(1, place, by_top * inside[:, None])
            by_logits = spare.copy_(by_logits)  # nothing to do where they are one
            if by_states is not None and by_states.dtype == weight.dtype:
                by_states.addmm_(by_logits, weight[rows])
            elif by_states is not None:
                by_states += by_logits @ weight[rows]
            if by_weight is not None:
                torch.mm(by_logits.t(), states, out=by_weight[rows])
        by_hidden = None
        if by_states is not None:
            by_hidden = torch.zeros_like(hidden).index_copy_(0, moving, by_states.to(hidden.dtype))
        return None, by_hidden, by_weight


def _places(targets: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """[m,1] places of tokens in a tile, and [m] bool, whether they are in it at all."""
    place = targets - rows.start
    width = rows.stop - rows.start
    return place.clamp(0, width - 1)[:, None], (place >= 0) & (place < width)


def _runs(ids: list[int]) -> list[tuple[int, int]]:
    """Neighbours among ids in ascending order, as (first, last + 1): slices need no copy to the device."""
    edges = [at for at in range(1, len(ids)) if ids[at] != ids[at - 1] + 1]
    return [(ids[start], ids[stop - 1] + 1) for start, stop in pairwise([0, *edges, len(ids)]) if ids]
