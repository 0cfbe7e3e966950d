"""Block-wise denoising: from prompts to completions and the feedback that they leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from drift.contract import Rollout
from drift.models import DiffusionLM
from drift.models.layers import positions_from_mask
from drift.randomness import draw_keys, fold, uniform
from drift.rollout.cache import PrefixCache
from drift.rollout.config import DenoiseConfig
from drift.rollout.unmask import candidates, commits

# Positions whose logits are expanded to the vocabulary at once.
CHUNK_SIZE = 4096


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
    on_progress: Callable[[int, int], None] | None = None,
) -> Rollout:
    """Completions of the prompts, with the timestep and the probability at which every token was committed.

    A row's result does not depend on the other rows: neither on their number, nor on their padding, nor on
    chance, since every draw is keyed by (row's seed, row's timestep, position).

    Args:
        policy: the policy; its train or eval mode is left alone.
        prompt_ids: [N,P] int64, left-padded.
        prompt_mask: [N,P] bool, False at padding.
        completion_length: C, a multiple of config.block_length.
        config: the schedule and how tokens are chosen.
        generator: draws one seed a row where `seeds` is not given; None: torch's default generator.
        seeds: [N] int64, key of each row's draws.
        on_progress: called after every block with (positions decoded, positions in all).

    Returns:
        rollout of N rows, without rewards. Its `num_forwards` counts forward passes of the whole call.

    Raises:
        ConfigError: where the completion length doesn't fit the block length or the steps.
    """
    config.require_fits(completion_length)
    if seeds is None:
        seeds = draw_keys(prompt_ids.shape[0], generator)
    canvas = _Canvas.blank(policy, prompt_ids, prompt_mask, completion_length, seeds.to(prompt_ids.device))
    quotas = config.quotas(completion_length) if config.threshold is None else None
    for block, start in enumerate(range(0, completion_length, config.block_length)):
        rows = (~canvas.ended).nonzero()[:, 0]
        if len(rows) == 0:
            break
        _decode_block(policy, canvas, rows, start, config, quotas[block] if quotas is not None else None)
        if config.stop_at_padding:
            canvas.end_at_padding(rows, start, config.block_length)
        if on_progress is not None:
            on_progress(start + config.block_length, completion_length)
    return canvas.rollout()


def _decode_block(
    policy: DiffusionLM,
    canvas: _Canvas,
    rows: Tensor,
    start: int,
    config: DenoiseConfig,
    quotas: list[int] | None,
) -> None:
    """Unmasks one block of the given rows; rows whose block is finished leave the forward passes."""
    end = start + config.block_length
    cache = PrefixCache(canvas.prompt_length + start) if config.use_cache else None
    num_passes = 0
    while len(rows):
        hidden = _block_hidden(policy, canvas, rows, start, end, config, cache, opening=num_passes == 0)
        masked = canvas.undecoded[rows, start:end]
        where = masked.nonzero()
        row, position = rows[where[:, 0]], where[:, 1] + start
        key = fold(canvas.seeds[row], canvas.timestep[row], position)
        uniforms = uniform(torch.stack((fold(key, 0), fold(key, 1)), dim=1))
        token, prob, score = policy.head(
            hidden[where[:, 0], where[:, 1]], _reader(policy, config), uniforms, chunk_size=CHUNK_SIZE
        )
        grid = score.new_zeros(masked.shape).masked_scatter_(masked, score)
        if num_passes == 0 and config.block_opening == "first_token":
            commit = torch.zeros_like(masked)
            commit[:, 0] = True
        else:
            commit = commits(grid, masked, config.threshold, quotas[num_passes] if quotas is not None else 0)
        canvas.commit(row, position, token, prob, commit[where[:, 0], where[:, 1]])
        canvas.timestep[rows] += 1
        canvas.num_forwards += 1
        num_passes += 1
        unfinished = (masked & ~commit).any(dim=1)
        if cache is not None and not bool(unfinished.all()):
            cache.keep(unfinished)
        rows = rows[unfinished]


def _block_hidden(
    policy: DiffusionLM,
    canvas: _Canvas,
    rows: Tensor,
    start: int,
    end: int,
    config: DenoiseConfig,
    cache: PrefixCache | None,
    *,
    opening: bool,
) -> Tensor:
    """Hidden states [n,b,D] of a block, from a pass over the sequence or over the window behind the cache."""
    first, last = canvas.prompt_length + start, canvas.prompt_length + end
    if cache is None or opening:
        window = slice(0, canvas.input_ids.shape[1])
    else:
        stop = None if config.horizon is None else last + config.horizon
        window = slice(first, stop)
    mask = None if canvas.attention_mask is None else canvas.attention_mask[rows, : window.stop]
    hidden = policy(canvas.input_ids[rows, window], mask, canvas.position_ids[rows, window], cache)
    return hidden[:, first - window.start : last - window.start]


def _reader(policy: DiffusionLM, config: DenoiseConfig) -> Callable[..., tuple[Tensor, ...]]:
    def read(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, ...]:
        found = candidates(policy.forbid_illegal(logits), config, uniforms)
        return found.token, found.prob, found.score

    return read


@dataclass(kw_only=True, slots=True)
class _Canvas:
    """Sequences being unmasked, and what is recorded of it."""

    input_ids: Tensor  # [N,P+C] int64
    attention_mask: Tensor | None  # [N,P+C] bool; None where nothing is padding
    position_ids: Tensor  # [N,P+C] int64
    prompt_mask: Tensor  # [N,P] bool
    seeds: Tensor  # [N] int64
    undecoded: Tensor  # [N,C] bool
    step_map: Tensor  # [N,C] int64
    token_probs: Tensor  # [N,C] float32
    timestep: Tensor  # [N] int64, timesteps that the row has had
    ended: Tensor  # [N] bool
    pad_token_id: int
    mask_token_id: int
    num_forwards: int = 0

    @classmethod
    def blank(
        cls,
        policy: DiffusionLM,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_length: int,
        seeds: Tensor,
    ) -> _Canvas:
        """The prompts, followed by masks."""
        shape, device = (prompt_ids.shape[0], completion_length), prompt_ids.device
        masks = torch.full(shape, policy.mask_token_id, device=device)
        attention_mask = torch.cat((prompt_mask.bool(), torch.ones_like(masks, dtype=torch.bool)), dim=1)
        return cls(
            input_ids=torch.cat((prompt_ids, masks), dim=1),
            attention_mask=None if bool(prompt_mask.all()) else attention_mask,
            position_ids=positions_from_mask(attention_mask),
            prompt_mask=prompt_mask.bool(),
            seeds=seeds,
            undecoded=torch.ones_like(masks, dtype=torch.bool),
            step_map=torch.zeros_like(masks),
            token_probs=torch.zeros(shape, dtype=torch.float32, device=device),
            timestep=torch.zeros(shape[0], dtype=torch.int64, device=device),
            ended=torch.zeros(shape[0], dtype=torch.bool, device=device),
            pad_token_id=policy.pad_token_id,
            mask_token_id=policy.mask_token_id,
        )

    @property
    def prompt_length(self) -> int:
        return self.prompt_mask.shape[1]

    def commit(self, row: Tensor, position: Tensor, token: Tensor, prob: Tensor, chosen: Tensor) -> None:
        """Writes the chosen ones of some candidates [m] at (row, position) of the completion."""
        row, position = row[chosen], position[chosen]
        self.input_ids[row, self.prompt_length + position] = token[chosen]
        self.token_probs[row, position] = prob[chosen]
        self.step_map[row, position] = self.timestep[row]
        self.undecoded[row, position] = False

    def end_at_padding(self, rows: Tensor, start: int, block_length: int) -> None:
        """Ends the rows whose block is all padding: what comes after it is padding that was never decoded."""
        block = self.input_ids[rows, self.prompt_length + start : self.prompt_length + start + block_length]
        self.ended[rows] = (block == self.pad_token_id).all(dim=1)

    def rollout(self) -> Rollout:
        """What was decoded; positions that were not are padding, of timestep S."""
        completion_ids = self.input_ids[:, self.prompt_length :].masked_fill(
            self.undecoded, self.pad_token_id
        )
        return Rollout(
            prompt_ids=self.input_ids[:, : self.prompt_length].clone(),
            prompt_mask=self.prompt_mask,
            completion_ids=completion_ids,
            completion_mask=(completion_ids != self.pad_token_id) & (completion_ids != self.mask_token_id),
            step_map=torch.where(self.undecoded, self.timestep[:, None], self.step_map),
            token_probs=self.token_probs,
            commit_probs=self.token_probs,
            num_timesteps=self.timestep,
            num_forwards=self.num_forwards,
            seeds=self.seeds,
        )
