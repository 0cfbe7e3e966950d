"""One denoising step at a block's masked positions: which token each would take, and which commit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drift.rollout.config import DenoiseConfig


@dataclass(kw_only=True, slots=True)
class Candidates:
    """What m masked positions would commit."""

    token: Tensor  # [m] int64
    prob: Tensor  # [m] float32, untempered and unfiltered
    score: Tensor  # [m] float32, higher commits first


def candidates(logits: Tensor, config: DenoiseConfig, uniforms: Tensor) -> Candidates:
    """The candidate token of every masked position, with its probability and score.

    Args:
        logits: [m,V] float32 over legal tokens.
        config: temperature, filters and score.
        uniforms: [m,2] float64 in (0,1): one draw for the token, one for the random score.
    """
    log_total = logits.logsumexp(dim=-1)
    if config.temperature == 0:
        top, token = logits.max(dim=-1)
    else:
        token = sample(logits, uniforms[:, 0], config)
        top = logits.gather(-1, token[:, None])[:, 0]
    # Above 0 even where it underflows: 0 says that nothing was recorded.
    prob = (top - log_total).exp().clamp(min=torch.finfo(torch.float32).tiny)
    if config.score == "confidence":
        score = prob
    elif config.score == "margin":
        best = (logits.topk(2, dim=-1).values - log_total[:, None]).exp()
        score = best[:, 0] - best[:, 1]
    elif config.score == "neg_entropy":
        score = (logits.sub(log_total[:, None]).exp() * logits).sum(dim=-1) - log_total
    else:
        score = uniforms[:, 1].float()
    return Candidates(token=token, prob=prob, score=score)


def sample(logits: Tensor, uniform: Tensor, config: DenoiseConfig) -> Tensor:
    """[m] int64 tokens drawn from the filtered softmax(logits / temperature), by inverting its distribution.

    Args:
        logits: [m,V] float32.
        uniform: [m] float64 in (0,1).
        config: temperature > 0, top_k and top_p.
    """
    scaled = logits / config.temperature
    order = None
    if config.top_k is not None:
        scaled, order = scaled.topk(min(config.top_k, scaled.shape[-1]), dim=-1)
    elif config.top_p is not None:
        scaled, order = scaled.sort(dim=-1, descending=True)
    probs = scaled.softmax(dim=-1)
    if config.top_p is not None:
        before = probs.cumsum(dim=-1) - probs
        probs = probs * (before < config.top_p)
    cumulative = probs.cumsum(dim=-1)
    target = (uniform * cumulative[:, -1].double()).float()
    drawn = torch.searchsorted(cumulative, target[:, None], right=True).clamp(max=probs.shape[-1] - 1)
    # Rounding at the very end of the sum can land on a token of probability 0, which must never be drawn.
    drawn = torch.where(probs.gather(-1, drawn) > 0, drawn, probs.argmax(dim=-1, keepdim=True))
    return (drawn if order is None else order.gather(-1, drawn))[:, 0]


def commits(score: Tensor, masked: Tensor, threshold: float | None, quota: int) -> Tensor:
    """[n,b] bool, the masked positions of a block that commit now.

    Args:
        score: [n,b] float32; any value where not masked.
        masked: [n,b] bool, at least one a row.
        threshold: every position that reaches it commits, or a row's best where none does; None: static.
        quota: static schedule: positions of a row that commit, the best ones; the first of equals.
    """
    score = score.masked_fill(~masked, -torch.inf)
    if threshold is None:
        rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return (rank < quota) & masked
    reached = (score >= threshold) & masked
    best = torch.zeros_like(masked).scatter_(-1, score.argmax(dim=-1, keepdim=True), True)
    return torch.where(reached.any(dim=-1, keepdim=True), reached, best)
