"""One look at noisy states: the log-probability of every scored token, and of nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from drift.contract import MaskedBatch, TokenLogProbs
from drift.micro_batches import by_length
from drift.models import DiffusionLM
from drift.token_scores import TokenScores


def token_logprobs(
    policy: DiffusionLM,
    batch: MaskedBatch,
    *,
    entropy: bool = False,
    top: bool = False,
    width: int | None = None,
    one_pass: bool = False,
) -> TokenLogProbs:
    """log pi(token | prompt, noisy state) over the legal tokens, at the scored positions.

    Args:
        policy: the model that scores.
        batch: M noisy states.
        entropy: also give the entropy of the distribution at every scored position, with its graph.
        top: also give the log-probability of the likeliest token wherever a draw decided over a commit, with
            its graph.
        width: tokens whose logits exist at once; None: see `drift.token_scores.tile_width`.
        one_pass: feed all states at once; False: states of unlike lengths one after the other, without the
            padding between them.

    Returns:
        [M,C] log-probabilities in nats, float32, 0 where not scored.
    """
    groups = [torch.arange(len(batch), device=batch.row.device)] if one_pass else by_length(batch)
    decided = None if batch.decision is None or not top else batch.decision != 0
    looked_at = batch.scored if decided is None else batch.scored | decided
    hidden = torch.cat([_states(policy, batch.select(group), looked_at[group]) for group in groups])
    order = torch.cat(groups)
    looked_at = looked_at[order]
    targets = batch.targets[order][looked_at]
    scores = TokenScores(targets, policy.illegal_token_ids, entropy, width, decided is not None)
    blank = torch.zeros(looked_at.shape, dtype=torch.float32, device=hidden.device)
    found = [
        blank.masked_scatter(looked_at, values)[order.argsort()] for values in policy.head(hidden, scores)
    ]
    if decided is None:
        return TokenLogProbs(logp=found[0], entropy=found[1] if entropy else None)
    # Where only the likeliest token counts, the target may be one that has no probability.
    seen = [torch.where(batch.scored, values, 0.0) for values in found[:-1]]
    likeliest = torch.where(decided, found[-1], 0.0)
    return TokenLogProbs(logp=seen[0], entropy=seen[1] if entropy else None, top=likeliest)


def _states(policy: DiffusionLM, batch: MaskedBatch, looked_at: Tensor) -> Tensor:
    """[n,D] hidden states of some positions; columns that are padding in all rows are not fed."""
    completion_length = batch.targets.shape[1]
    fed = batch.attention_mask.any(dim=0).long().argmax() if len(batch) else 0
    ids, mask = batch.input_ids[:, fed:], batch.attention_mask[:, fed:]
    row, position = looked_at.nonzero(as_tuple=True)
    wanted = (row, position + (ids.shape[1] - completion_length))
    return policy(ids, None if bool(mask.all()) else mask, wanted=wanted)
