"""One look at noisy states: the log-probability of every scored token, and of nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drift.contract import MaskedBatch, TokenLogProbs
from drift.micro_batches import by_length
from drift.models import DiffusionLM
from drift.models.base import ILLEGAL_LOGIT

# Scored positions whose logits exist at once: 1024 x 126464 float32 are 0.5 GiB.
CHUNK_SIZE = 1024


def token_logprobs(
    policy: DiffusionLM,
    batch: MaskedBatch,
    *,
    entropy: bool = False,
    chunk_size: int = CHUNK_SIZE,
    one_pass: bool = False,
) -> TokenLogProbs:
    """log pi(token | prompt, noisy state) over the legal tokens, at the scored positions.

    Args:
        policy: the model that scores.
        batch: M noisy states.
        entropy: also give the entropy of the distribution at every scored position, with its graph.
        chunk_size: positions that are expanded to the vocabulary at once.
        one_pass: feed all states at once; False: states of unlike lengths one after the other, without the
            padding between them.

    Returns:
        [M,C] log-probabilities in nats, float32, 0 where not scored.
    """
    groups = [torch.arange(len(batch), device=batch.row.device)] if one_pass else by_length(batch)
    hidden = torch.cat([_scored_states(policy, batch.select(group)) for group in groups])
    order = torch.cat(groups)
    scored = batch.scored[order]
    scores = TokenScores(policy.illegal_token_ids, entropy)
    found = policy.head(hidden, scores, batch.targets[order][scored], chunk_size=chunk_size)
    blank = torch.zeros(scored.shape, dtype=torch.float32, device=hidden.device)
    spread = [blank.masked_scatter(scored, values)[order.argsort()] for values in found]
    return TokenLogProbs(logp=spread[0], entropy=spread[1] if entropy else None)


def _scored_states(policy: DiffusionLM, batch: MaskedBatch) -> Tensor:
    """[n,D] hidden states of the scored positions; columns that are padding in all rows are not fed."""
    completion_length = batch.targets.shape[1]
    fed = batch.attention_mask.any(dim=0).long().argmax() if len(batch) else 0
    ids, mask = batch.input_ids[:, fed:], batch.attention_mask[:, fed:]
    hidden = policy(ids, None if bool(mask.all()) else mask)
    return hidden[:, ids.shape[1] - completion_length :][batch.scored]


@dataclass(frozen=True)
class TokenScores:
    """Log-probabilities of tokens, and entropies, from logits: a reduction of the head with its gradient.

    Args:
        illegal: ids that get no probability.
        entropy: whether entropies are wanted.
    """

    illegal: list[int]
    entropy: bool

    def __call__(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        """[m] log-probabilities in nats, and [m] entropies if wanted; overwrites the logits."""
        logp = self._log_softmax(logits)
        found = logp.gather(-1, targets[:, None])[:, 0]
        if not self.entropy:
            return (found,)
        return found, -(logp.exp() * logp).sum(dim=-1)

    def gradient(self, logits: Tensor, gradients: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """[m,V] gradient of the logits: 1 - p at the token, -p elsewhere; -p (log p + H) of an entropy H."""
        logp = self._log_softmax(logits)
        places = torch.arange(len(logits), device=logits.device), targets
        by_logp = gradients[0][:, None]
        if not self.entropy:
            by_logits = logp.exp_()
            by_logits[places] -= 1
            return by_logits.mul_(-by_logp)
        prob = logp.exp()
        entropy = -(prob * logp).sum(dim=-1, keepdim=True)
        by_logits = logp.add_(entropy).mul_(gradients[1][:, None]).add_(by_logp).mul_(prob).neg_()
        by_logits[places] += gradients[0]
        return by_logits

    def _log_softmax(self, logits: Tensor) -> Tensor:
        illegal = torch.tensor(self.illegal, dtype=torch.int64, device=logits.device)
        logits.index_fill_(-1, illegal, ILLEGAL_LOGIT)
        # In place: each row's sum is known before any of it is written.
        return torch.log_softmax(logits, dim=-1, out=logits)
