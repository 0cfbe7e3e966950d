"""The sequences of a rollout while they are being unmasked."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drift.contract import Rollout
from drift.models import DiffusionLM
from drift.models.layers import positions_from_mask
from drift.rollout.config import DenoiseConfig


@dataclass(kw_only=True, slots=True)
class Canvas:
    """Sequences being unmasked, and what is recorded of it; nothing here waits for the device."""

    input_ids: Tensor  # [N,P+C] int64
    attention_mask: Tensor  # [N,P+C] bool
    position_ids: Tensor  # [N,P+C] int64
    prompt_mask: Tensor  # [N,P] bool
    seeds: Tensor  # [N] int64
    undecoded: Tensor  # [N,C] bool
    step_map: Tensor  # [N,C] int64
    token_probs: Tensor  # [N,C] float32
    timestep: Tensor  # [N] int64, timesteps that the row has had
    pad_token_id: int
    mask_token_id: int
    config: DenoiseConfig
    commit_kind: Tensor | None = None  # [N,C] int64, see `Rollout`; None: nothing is committed by a draw
    num_forwards: int = 0

    @classmethod
    def blank(
        cls,
        policy: DiffusionLM,
        prompt_ids: Tensor,
        prompt_mask: Tensor,
        completion_length: int,
        seeds: Tensor,
        config: DenoiseConfig,
    ) -> Canvas:
        """The prompts, followed by masks."""
        shape, device = (prompt_ids.shape[0], completion_length), prompt_ids.device
        masks = torch.full(shape, policy.mask_token_id, device=device)
        attention_mask = torch.cat((prompt_mask.bool(), torch.ones_like(masks, dtype=torch.bool)), dim=1)
        return cls(
            input_ids=torch.cat((prompt_ids, masks), dim=1),
            attention_mask=attention_mask,
            position_ids=positions_from_mask(attention_mask),
            prompt_mask=prompt_mask.bool(),
            seeds=seeds,
            undecoded=torch.ones_like(masks, dtype=torch.bool),
            step_map=torch.zeros_like(masks),
            token_probs=torch.zeros(shape, dtype=torch.float32, device=device),
            timestep=torch.zeros(shape[0], dtype=torch.int64, device=device),
            pad_token_id=policy.pad_token_id,
            mask_token_id=policy.mask_token_id,
            config=config,
            commit_kind=torch.zeros_like(masks) if config.rule == "stochastic" else None,
        )

    @property
    def prompt_length(self) -> int:
        """P."""
        return self.prompt_mask.shape[1]

    def commit(
        self,
        rows: Tensor,
        columns: Tensor,
        chosen: Tensor,
        token: Tensor,
        prob: Tensor,
        kind: Tensor | None = None,
    ) -> Tensor:
        """Writes the chosen tokens of one block of each row, and ends the rows' timestep.

        Args:
            rows: [n] int64.
            columns: [n,b] int64, positions of the completion.
            chosen: [n,b] bool.
            token: [n,b] int64; any value where not chosen.
            prob: [n,b] float32; any value where not chosen.
            kind: [n,b] int64, how they are committed; any value where not chosen; None: by rule.

        Returns:
            [n] int64 positions of the block that are still masked; -1 where the whole block is padding.
        """
        at = (rows[:, None], columns)
        whole = (at[0], columns + self.prompt_length)
        undecoded = self.undecoded[at] & ~chosen
        tokens = torch.where(chosen, token, self.input_ids[whole])
        self.input_ids[whole] = tokens
        self.token_probs[at] = torch.where(chosen, prob, self.token_probs[at])
        self.step_map[at] = torch.where(chosen, self.timestep[rows][:, None], self.step_map[at])
        if kind is not None and self.commit_kind is not None:
            self.commit_kind[at] = torch.where(chosen, kind, self.commit_kind[at])
        self.undecoded[at] = undecoded
        self.timestep[rows] += 1
        padding = (tokens == self.pad_token_id).all(dim=1)
        return torch.where(padding, -1, undecoded.sum(dim=1))

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
            commit_kind=self.commit_kind,
            commit_rule=self._commit_rule(),
            block_length=self.config.block_length,
        )

    def _commit_rule(self) -> Tensor | None:
        if self.commit_kind is None:
            return None
        rule = torch.tensor([self.config.threshold, self.config.width], device=self.seeds.device)
        return rule.expand(len(self.seeds), 2)
