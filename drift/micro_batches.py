"""Which noisy states are fed together: as little padding as can be, within a budget of memory."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from drift.contract import MaskedBatch
from drift.distributed import max_over_ranks

# A pass takes longer states in until it has this many positions: smaller ones don't keep a device busy.
_LEAST_POSITIONS = 1024
# Share of a pass that may be padding, beyond that.
_MOST_PADDING = 0.03


def micro_batches(batch: MaskedBatch, max_states: int, max_positions: int | None) -> list[Tensor]:
    """The states of each micro-batch, longest prompts first, about as many in each.

    Args:
        batch: M noisy states of this rank.
        max_states: of a micro-batch, >= 1.
        max_positions: of a micro-batch, padding up to its longest state included; a single state may have
            more. None: any number.

    Returns:
        index tensors, together a permutation of the M states; as many on every rank, some of them empty if
        need be: each backward pass communicates.
    """
    lengths = batch.attention_mask.sum(dim=1)
    # Stable: states of equal length stay in their order, slot by slot.
    order = lengths.argsort(descending=True, stable=True)
    number = -(-len(batch) // max_states)
    while max_positions is not None and number < len(batch):
        parts = order.tensor_split(number)
        if all(len(part) * int(lengths[part[0]]) <= max_positions for part in parts):
            break
        number += 1
    number = max_over_ranks(number, order.device)
    return list(order.tensor_split(number)) if number else []


def by_length(batch: MaskedBatch) -> list[Tensor]:
    """The states in groups of about the same length, longest first: each is fed without much padding.

    Args:
        batch: M noisy states.

    Returns:
        index tensors, together a permutation of the M states; at least one, which may be empty.
    """
    lengths, order = batch.attention_mask.sum(dim=1).sort(descending=True, stable=True)
    cuts, first, real = [0], 0, 0
    for place, length in enumerate(lengths.tolist()):
        positions = (place - first) * int(lengths[first])
        padded = (place + 1 - first) * int(lengths[first])
        if positions >= _LEAST_POSITIONS and padded - real - length > _MOST_PADDING * padded:
            cuts.append(place)
            first, real = place, 0
        real += length
    return [order[start:stop] for start, stop in pairwise([*cuts, len(batch)])]
