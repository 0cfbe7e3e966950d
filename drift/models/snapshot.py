"""The weights of a policy at one moment, to score with them later."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b

import torch
from torch import Tensor, nn

from drift.distributed import split_like, whole

_PIECE = 1 << 24


def trainable_weights(policy: nn.Module) -> list[Tensor]:
    """Copies of the trainable parameters, in their order."""
    return [p.detach().clone() for p in policy.parameters() if p.requires_grad]


@contextmanager
def weights_of(policy: nn.Module, weights: Sequence[Tensor]) -> Iterator[None]:
    """A context in which the policy has other trainable weights; afterwards it has its own again.

    Args:
        policy: the policy.
        weights: what `trainable_weights` gave at another moment, or the whole of it.
    """
    now = trainable_weights(policy)
    try:
        _overwrite(policy, weights)
        yield
    finally:
        _overwrite(policy, now)


@torch.no_grad()
def weights_digest(policy: nn.Module) -> str:
    """A short name for all weights of a policy, to the last bit: 16 hex digits. All ranks must ask."""
    found = blake2b(digest_size=8)
    for name, parameter in policy.named_parameters():
        found.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        # In pieces: the copy of a whole embedding would be large.
        for piece in whole(parameter.detach()).flatten().split(_PIECE):
            found.update(piece.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@torch.no_grad()
def _overwrite(policy: nn.Module, weights: Sequence[Tensor]) -> None:
    # In place: sharded parameters must keep their storage.
    parameters = [p for p in policy.parameters() if p.requires_grad]
    # Autocast keeps the low-precision copies that it made of the weights so far.
    torch.clear_autocast_cache()
    for parameter, value in zip(parameters, weights, strict=True):
        parameter.copy_(split_like(parameter, value))
