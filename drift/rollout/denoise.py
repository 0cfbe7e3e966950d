"""Block-wise denoising: from prompts to completions and the feedback that they leave."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor

from drift.contract import CERTAIN, DRAWN, SUREST, Rollout
from drift.models import DiffusionLM
from drift.models.head import in_chunks
from drift.models.layers import Block
from drift.randomness import draw_keys, fold, uniform
from drift.rollout.cache import PrefixCache
from drift.rollout.canvas import Canvas
from drift.rollout.config import DRAWN_FACTOR, DenoiseConfig
from drift.rollout.schedule import Cohort, Schedule
from drift.rollout.unmask import candidates, commits

# Positions whose logits are expanded to the vocabulary at once.
CHUNK_SIZE = 256


@torch.no_grad()
def denoise(
    policy: DiffusionLM,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_length: int,
    config: DenoiseConfig,
    generator: torch.Generator | None = None,
    *,
    seeds: Tensor | None = None,
    batch_size: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Rollout:
    """Completions of the prompts, with the timestep and the probability at which every token was committed.

    A row's result does not depend on the other rows: neither on their number, nor on their padding, nor on
    chance, since every draw is keyed by (row's seed, row's timestep, position). Rows go from block to block
    on their own, and the next prompt takes the place of a row that has ended.

    Args:
        policy: the policy; its train or eval mode is left alone.
        prompt_ids: [N,P] int64, left-padded.
        prompt_mask: [N,P] bool, False at padding.
        completion_length: C, a multiple of config.block_length.
        config: the schedule and how tokens are chosen.
        generator: draws one seed a row where `seeds` is not given; None: torch's default generator.
        seeds: [N] int64, key of each row's draws.
        batch_size: rows decoded at once; None: all.
        on_progress: called when blocks are finished, with (positions decoded, positions in all) of the
            average row.

    Returns:
        rollout of N rows, without rewards. Its `num_forwards` counts forward passes of the whole call.

    Raises:
        ConfigError: where the completion length doesn't fit the block length or the steps.
    """
    config.require_fits(completion_length)
    num_rows, prompt_length = prompt_ids.shape
    if seeds is None:
        seeds = draw_keys(num_rows, generator)
    seeds = seeds.to(prompt_ids.device)
    canvas = Canvas.blank(policy, prompt_ids, prompt_mask, completion_length, seeds, config)
    schedule = Schedule(
        (prompt_length - prompt_mask.sum(dim=1)).tolist(),
        prompt_length + completion_length,
        completion_length // config.block_length,
        config,
        batch_size or num_rows,
        prompt_ids.device,
        config.quotas(completion_length) if config.rule == "static" else None,
    )
    num_done = 0
    with _compiled(policy, config.compile):
        while not schedule.done:
            cohort = schedule.next()
            schedule.passed(cohort, _pass(policy, canvas, cohort, schedule.quotas(cohort), config))
            canvas.num_forwards += 1
            if on_progress is not None and schedule.num_blocks_done > num_done:
                num_done = schedule.num_blocks_done
                on_progress(num_done * config.block_length // num_rows, completion_length)
    return canvas.rollout()


def _pass(
    policy: DiffusionLM, canvas: Canvas, cohort: Cohort, quotas: Tensor | int, config: DenoiseConfig
) -> Tensor:
    """[n] positions that a timestep leaves masked in the block of each row; see `Canvas.commit`."""
    rows, columns = cohort.index, cohort.columns
    masked = canvas.undecoded[rows[:, None], columns]
    # Their number is known: the device need not be asked.
    row, place = torch.nonzero_static(masked, size=cohort.num_masked).unbind(dim=1)
    token, prob, score = _scored(policy, canvas, cohort, row, columns[row, place], config)
    grid = score.new_zeros(masked.shape).masked_scatter_(masked, score)
    chosen = commits(grid, masked, config.least_score, quotas)
    kind = _kinds(grid, chosen) if config.rule == "stochastic" else None
    if config.block_opening == "first_token":
        opening = torch.tensor([[row.num_passes == 0] for row in cohort.rows], device=rows.device)
        first = torch.arange(config.block_length, device=rows.device) == 0
        chosen = torch.where(opening, first, chosen)
        kind = None if kind is None else kind.masked_fill(opening, CERTAIN)
    tokens = torch.zeros_like(columns).masked_scatter_(masked, token)
    probs = torch.zeros_like(grid).masked_scatter_(masked, prob)
    return canvas.commit(rows, columns, chosen, tokens, probs, kind)


def _kinds(score: Tensor, chosen: Tensor) -> Tensor:
    """[n,b] int64 how chosen positions are committed: DRAWN, or SUREST where it is the surest alone.

    What follows is then the same whether its own draw committed it or no draw did: the sum over both is
    known, and learning from either would add noise to the gradient, and nothing else (Rao-Blackwell).

    Args:
        score: [n,b] float32, 0 where not masked.
        chosen: [n,b] bool.
    """
    prob = torch.where(score > 1, score / DRAWN_FACTOR, score)
    surest = torch.zeros_like(chosen).scatter_(1, prob.argmax(dim=1, keepdim=True), True)
    alone = (chosen == surest).all(dim=1, keepdim=True)
    return torch.where(alone, SUREST, DRAWN).expand_as(chosen)


def _scored(
    policy: DiffusionLM, canvas: Canvas, cohort: Cohort, row: Tensor, position: Tensor, config: DenoiseConfig
) -> tuple[Tensor, ...]:
    """Token, probability and score of m positions: one pass of the body, one of the head, and no other.

    Args:
        policy: the policy.
        canvas: the sequences.
        cohort: n rows.
        row: [m] int64 in [0,n).
        position: [m] int64 of the completion.
        config: how tokens are chosen.
    """
    rows, start, stop = cohort.index, cohort.start, canvas.input_ids.shape[1]
    seen = stop
    if config.use_cache:
        first = canvas.prompt_length + cohort.rows[0].block * config.block_length
        if cohort.cache is None:
            cohort.cache = PrefixCache(first - start, dual=config.dual_cache)
        else:
            start = first
            if config.horizon is not None:
                stop = min(first + config.block_length + config.horizon, stop)
            seen = seen if config.dual_cache else stop
    mask = canvas.attention_mask[rows, cohort.start : seen] if cohort.padded else None
    fed = canvas.input_ids[rows, start:stop]
    where = (row, position + (canvas.prompt_length - start))
    hidden = policy(fed, mask, canvas.position_ids[rows, start:stop], cohort.cache, where)
    draws = []
    if config.draws:
        key = fold(canvas.seeds[rows[row]], canvas.timestep[rows[row]], position)
        draws = [uniform(torch.stack((fold(key, 0), fold(key, 1)), dim=1))]

    def read(logits: Tensor, uniforms: Tensor | None = None) -> tuple[Tensor, ...]:
        found = candidates(policy.forbid_illegal(logits, in_place=True), config, uniforms, overwrite=True)
        return found.token, found.prob, found.score

    return policy.head(hidden, in_chunks(read, *draws, size=CHUNK_SIZE))


@contextmanager
def _compiled(policy: DiffusionLM, compiled: bool) -> Iterator[None]:
    """A context in which the policy's blocks are compiled, if they are to be."""
    blocks = [cast(Block, block) for block in policy.blocks]
    try:
        for block in blocks:
            block.compiled = compiled
        yield
    finally:
        for block in blocks:
            block.compiled = False
