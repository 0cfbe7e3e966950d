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
    width: int | None = None,
    one_pass: bool = False,
) -> TokenLogProbs:
    """log pi(token | prompt, noisy state) over the legal tokens, at the scored positions.

    Args:
        policy: the model that scores.
        batch: M noisy states.
        entropy: also give the entropy of the distribution at every scored position, with its graph.
        width: tokens whose logits exist at once; None: see `drift.token_scores.tile_width`.
        one_pass: feed all states at once; False: states of unlike lengths one after the other, without the
            padding between them.

    Returns:
        [M,C] log-probabilities in nats, float32, 0 where not scored.
    """
    groups = [torch.arange(len(batch), device=batch.row.device)] if one_pass else by_length(batch)
    hidden = torch.cat([_scored_states(policy, batch.select(group)) for group in groups])
    order = torch.cat(groups)
    scored = batch.scored[order]
    scores = TokenScores(batch.targets[order][scored], policy.illegal_token_ids, entropy, width)
    found = policy.head(hidden, scores)
    blank = torch.zeros(scored.shape, dtype=torch.float32, device=hidden.device)
    spread = [blank.masked_scatter(scored, values)[order.argsort()] for values in found]
    return TokenLogProbs(logp=spread[0], entropy=spread[1] if entropy else None)


def _scored_states(policy: DiffusionLM, batch: MaskedBatch) -> Tensor:
    """[n,D] hidden states of the scored positions; columns that are padding in all rows are not fed."""
    completion_length = batch.targets.shape[1]
    fed = batch.attention_mask.any(dim=0).long().argmax() if len(batch) else 0
    ids, mask = batch.input_ids[:, fed:], batch.attention_mask[:, fed:]
    row, position = batch.scored.nonzero(as_tuple=True)
    wanted = (row, position + (ids.shape[1] - completion_length))
    return policy(ids, None if bool(mask.all()) else mask, wanted=wanted)
