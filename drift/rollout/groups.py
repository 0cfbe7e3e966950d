"""Rollouts of a batch of prompts: a group of completions for each."""

from __future__ import annotations

from collections.abc import Callable

import torch

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
        on_progress: see `denoise`.

    Returns:
        N = B * group_size rows, without rewards.
    """
    members = torch.arange(group_size, device=batch.positions.device)
    seeds = fold(seed, batch.positions[:, None], members).flatten()
    prompt_ids = batch.prompt_ids.repeat_interleave(group_size, dim=0)
    prompt_mask = batch.prompt_mask.repeat_interleave(group_size, dim=0)
    return denoise(
        policy,
        prompt_ids,
        prompt_mask,
        completion_length,
        config,
        seeds=seeds,
        batch_size=batch_size,
        on_progress=on_progress,
    )
