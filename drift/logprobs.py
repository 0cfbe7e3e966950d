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
    temperature: float = 1.0,
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
        temperature: of the softmax of tokens and entropies, > 0; likeliest tokens are untempered.
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
    looked_at, scored = looked_at[order], batch.scored[order]
    illegal = policy.illegal_token_ids
    blank = torch.zeros(scored.shape, dtype=torch.float32, device=hidden.device)

    def read(where: Tensor, use: TokenScores, heat: float = 1.0) -> list[Tensor]:
        """[M,C] of the scores at some of the positions that were looked at."""
        states = hidden if where is looked_at else hidden[where[looked_at]]
        found = policy.head(states if heat == 1 else states / heat, use)
        return [blank.masked_scatter(where, values)[order.argsort()] for values in found]

    here = looked_at if decided is None else scored
    found = read(here, TokenScores(batch.targets[order][here], illegal, entropy, width), temperature)
    likeliest = None
    if decided is not None:
        at = decided[order]
        tokens = torch.zeros_like(batch.targets[order][at])
        likeliest = read(at, TokenScores(tokens, illegal, width=width, top=True))[1]
    return TokenLogProbs(logp=found[0], entropy=found[1] if entropy else None, top=likeliest)


def _states(policy: DiffusionLM, batch: MaskedBatch, looked_at: Tensor) -> Tensor:
    """[n,D] hidden states of some positions; columns that are padding in all rows are not fed."""
    completion_length = batch.targets.shape[1]
    fed = batch.attention_mask.any(dim=0).long().argmax() if len(batch) else 0
    ids, mask = batch.input_ids[:, fed:], batch.attention_mask[:, fed:]
    row, position = looked_at.nonzero(as_tuple=True)
    wanted = (row, position + (ids.shape[1] - completion_length))
    return policy(ids, None if bool(mask.all()) else mask, wanted=wanted)
