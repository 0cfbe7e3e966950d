"""Rollouts of a batch of prompts: a group of completions for each, in pieces that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from drift.contract import PromptBatch, Rollout
from drift.models import DiffusionLM
from drift.randomness import fold
from drift.rollout.config import DenoiseConfig
from drift.rollout.denoise import denoise


def rollout_groups(
    policy: DiffusionLM,
    batch: PromptBatch,
    completion_length: int,
    config: DenoiseConfig,
    *,
    group_size: int = 1,
    batch_size: int | None = None,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Rollout:
    """`group_size` completions of every prompt, groups one after the other.

    Args:
        policy: the policy.
        batch: B prompts; their places in the stream key the draws, so that a sample is the same in any batch.
        completion_length: positions of a completion.
        config: how to decode.
        group_size: completions of a prompt.
        batch_size: rows decoded at once; None: all.
        seed: of the draws.
        on_progress: called with (done, total), in positions.

    Returns:
        N = B * group_size rows, without rewards.
    """
    members = torch.arange(group_size, device=batch.positions.device)
    seeds = fold(seed, batch.positions[:, None], members).flatten()
    prompt_ids = batch.prompt_ids.repeat_interleave(group_size, dim=0)
    prompt_mask = batch.prompt_mask.repeat_interleave(group_size, dim=0)
    pieces = torch.arange(len(seeds), device=seeds.device).split(batch_size or len(seeds))
    parts = []
    for number, rows in enumerate(pieces):
        report = _scaled(on_progress, number, len(pieces)) if on_progress is not None else None
        parts.append(
            denoise(
                policy,
                prompt_ids[rows],
                prompt_mask[rows],
                completion_length,
                config,
                seeds=seeds[rows],
                on_progress=report,
            )
        )
    return concatenate(parts)


def concatenate(parts: Sequence[Rollout]) -> Rollout:
    """One rollout of the rows of several that have the same lengths."""
    joined = {}
    for field in fields(Rollout):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], Tensor):
            joined[field.name] = torch.cat(values)
    return replace(parts[0], **joined, num_forwards=sum(part.num_forwards for part in parts))


def _scaled(
    on_progress: Callable[[int, int], None], piece: int, num_pieces: int
) -> Callable[[int, int], None]:
    return lambda done, total: on_progress(piece * total + done, num_pieces * total)
