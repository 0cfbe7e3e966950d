"""From rollouts and a plan to noisy states: what the policy saw, ready to be scored."""

from __future__ import annotations

import torch
from torch import Tensor

from drift.contract import CERTAIN, DRAWN, MaskedBatch, Rollout, TimestepPlan


def masked_batch(
    rollout: Rollout,
    plan: TimestepPlan,
    mask_token_id: int,
    rows: Tensor | None = None,
    *,
    current_only: bool = False,
) -> MaskedBatch:
    """The noisy states of a plan whose weight is not 0, slot by slot.

    Args:
        rollout: N rollouts; rows without advantages get 0.
        plan: K draws for each of them.
        mask_token_id: what a masked position holds.
        rows: [N] bool, rollouts to take; None: all.
        current_only: score the tokens committed at the state's own timestep alone, whatever the plan says.

    Returns:
        M noisy states, of as many draws as the longest of the rows has. Positions committed at or after the
        timestep are masked, padding included, and the rest of the completion is as the policy saw it. They
        hold the rollout's probabilities and the decisions of its draws only where the plan replays its
        timesteps: at any other noisy state the policy would have given other ones.
    """
    real = plan.weight > 0
    if rows is not None:
        real = real & rows
    slot, row = real.nonzero(as_tuple=True)
    masked = plan.masked[slot, row]
    completion = rollout.completion_ids[row]
    valid = rollout.completion_mask[row]
    prompt_mask = rollout.prompt_mask[row]
    current = plan.current[slot, row] & valid
    commit_logp = None
    if plan.replay and rollout.commit_probs is not None:
        commit_logp = rollout.commit_probs[row].log().masked_fill(~current, 0.0)
    advantages = rollout.advantages
    if advantages is None:
        advantages = torch.zeros(rollout.completion_ids.shape[0], dtype=torch.float32, device=row.device)
    return MaskedBatch(
        input_ids=torch.cat((rollout.prompt_ids[row], completion.masked_fill(masked, mask_token_id)), dim=1),
        attention_mask=torch.cat((prompt_mask, torch.ones_like(masked)), dim=1),
        targets=completion,
        scored=current if current_only or plan.current_only else masked & valid,
        current=current,
        weight=plan.weight[slot, row],
        row_share=1.0 / real.sum(dim=0)[row],
        slot=slot,
        row=row,
        advantages=advantages[row],
        # Draws that only rows left out had (of a plan as long as its longest row) don't count in the mean.
        num_slots=int(slot[-1]) + 1 if len(slot) else 0,
        commit_logp=commit_logp,
        num_timesteps=None if plan.num_timesteps is None else plan.num_timesteps[row].float(),
        decision=_decisions(rollout, plan, slot, row),
        commit_rule=None if rollout.commit_rule is None else rollout.commit_rule[row],
        length=valid.sum(dim=1).float(),
        sequence=plan.sequence,
    )


def _decisions(rollout: Rollout, plan: TimestepPlan, slot: Tensor, row: Tensor) -> Tensor | None:
    """[M,C] int64, see `MaskedBatch.decision`: padding is committed, and left masked, like anything else."""
    if rollout.commit_kind is None or not plan.replay:
        return None
    masked, current = plan.masked[slot, row], plan.current[slot, row]
    # All that a timestep commits is of one block and of one kind.
    kind = torch.where(current, rollout.commit_kind[row], CERTAIN).amax(dim=1, keepdim=True)
    block = torch.arange(masked.shape[1], device=row.device) // rollout.block_length
    here = block == torch.where(current, block, -1).amax(dim=1, keepdim=True)
    committed = current & (kind == DRAWN)
    stayed = masked & here & ~current & (kind != CERTAIN)
    return committed.long() - stayed.long()
