"""One forward pass over noisy states: the log-probability of every scored token, and of nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

from drift.contract import MaskedBatch, TokenLogProbs
from drift.models import DiffusionLM

# Scored positions whose logits exist at once: 1024 x 126464 float32 are 0.5 GiB.
CHUNK_SIZE = 1024


def token_logprobs(
    policy: DiffusionLM, batch: MaskedBatch, *, entropy: bool = False, chunk_size: int = CHUNK_SIZE
) -> TokenLogProbs:
    """log pi(token | prompt, noisy state) over the legal tokens, at the scored positions.

    Args:
        policy: the model that scores.
        batch: M noisy states.
        entropy: also give the entropy of the distribution at every scored position, with its graph.
        chunk_size: positions that are expanded to the vocabulary at once.

    Returns:
        [M,C] log-probabilities in nats, float32, 0 where not scored.
    """
    prompt_length = batch.input_ids.shape[1] - batch.targets.shape[1]
    mask = None if bool(batch.attention_mask.all()) else batch.attention_mask
    hidden = policy(batch.input_ids, mask)[:, prompt_length:][batch.scored]

    def reduce(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        logits = policy.forbid_illegal(logits)
        log_total = logits.logsumexp(dim=-1)
        logp = logits.gather(-1, targets[:, None])[:, 0] - log_total
        if not entropy:
            return (logp,)
        return logp, log_total - (logits.softmax(dim=-1) * logits).sum(dim=-1)

    found = policy.head(hidden, reduce, batch.targets[batch.scored], chunk_size=chunk_size)
    blank = torch.zeros(batch.scored.shape, dtype=torch.float32, device=hidden.device)
    spread = [blank.masked_scatter(batch.scored, values) for values in found]
    return TokenLogProbs(logp=spread[0], entropy=spread[1] if entropy else None)
