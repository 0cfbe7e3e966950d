"""Everything that knows about ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from drift.contract import ConfigError


def world_size() -> int:
    """Number of ranks; 1 where nothing is distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This rank; 0 where nothing is distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, on every rank; not differentiable."""
    if world_size() == 1:
        return value
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def gather_over_ranks(value: Any) -> list[Any]:
    """Every rank's value, by rank, on every rank."""
    values = [value]
    if world_size() > 1:
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return values


def rows_over_ranks(value: Tensor) -> Tensor:
    """Every rank's rows, one rank after the other, on every rank: [ranks * N,...] of each rank's [N,...]."""
    if world_size() == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts)


def highest_over_ranks(value: Tensor) -> Tensor:
    """The element-wise largest of the ranks' tensors, on every rank; not differentiable."""
    if world_size() == 1:
        return value
    highest = value.detach().clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return highest


def max_over_ranks(value: int, device: torch.device) -> int:
    """The largest of the ranks' whole numbers, on every rank.

    Args:
        value: this rank's number.
        device: where the ranks communicate.
    """
    return value if world_size() == 1 else int(highest_over_ranks(torch.tensor(value, device=device)))


def share_of_rank(num: int, key: str) -> range:
    """The indices of this rank's share of `num` things, the same number on every rank.

    Args:
        num: things in all.
        key: the setting that says how many, for the error message.

    Raises:
        ConfigError: where they cannot be shared evenly.
    """
    if num % world_size():
        raise ConfigError(f"{key} is {num}: it must be a multiple of the {world_size()} ranks")
    size = num // world_size()
    return range(rank() * size, (rank() + 1) * size)
