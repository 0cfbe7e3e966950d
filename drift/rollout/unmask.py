"""One denoising step at a block's masked positions: which token each would take, and which commit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from drift.rollout.config import DRAWN_FACTOR, DenoiseConfig


@dataclass(kw_only=True, slots=True)
class Candidates:
    """What m masked positions would commit."""

    token: Tensor  # [m] int64
    prob: Tensor  # [m] float32, untempered and unfiltered
    score: Tensor  # [m] float32, higher commits first; times DRAWN_FACTOR where a draw commits


def candidates(
    logits: Tensor, config: DenoiseConfig, uniforms: Tensor | None = None, *, overwrite: bool = False
) -> Candidates:
    """The candidate token of every masked position, with its probability and score.

    Args:
        logits: [m,V] float32 over legal tokens.
        config: temperature, filters and score.
        uniforms: [m,2] float64 in (0,1): one draw for the token, one for the random score or the commit; may
            be missing where nothing is drawn.
        overwrite: the logits are not needed afterwards.
    """
    top, token = _highest(logits)
    plain = config.temperature == 1 and config.top_k is None and config.top_p is None
    overwrite = overwrite and (plain or config.temperature == 0)
    mass = torch.sub(logits, top[:, None], out=logits if overwrite else None).exp_()
    total = mass.sum(dim=-1)
    best = 1 / total
    prob = best
    if config.temperature != 0:
        assert uniforms is not None
        draws = uniforms[:, 0]
        token = draw(mass, draws) if plain else sample(logits, draws, config)
        prob = mass.gather(-1, token[:, None])[:, 0] * best
    # Above 0 even where it underflows: 0 says that nothing was recorded.
    prob = prob.clamp(min=torch.finfo(torch.float32).tiny)
    if config.rule == "stochastic":
        assert uniforms is not None
        assert config.threshold is not None
        chance = torch.sigmoid((best - config.threshold) / config.width)
        score = torch.where(uniforms[:, 1] < chance, best * DRAWN_FACTOR, best)
    elif config.score == "confidence":
        score = best if config.commit_by == "top" else prob
    elif config.score == "margin":
        second = mass.topk(2, dim=-1).values[:, 1]
        score = best * (1 - second)
    elif config.score == "neg_entropy":
        score = torch.xlogy(mass, mass).sum(dim=-1) / total - total.log()
    else:
        assert uniforms is not None
        score = uniforms[:, 1].float()
    return Candidates(token=token, prob=prob, score=score)


def sample(logits: Tensor, uniform: Tensor, config: DenoiseConfig) -> Tensor:
    """[m] int64 tokens drawn from the filtered softmax(logits / temperature).

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
    drawn = draw(probs, uniform)
    return drawn if order is None else order.gather(-1, drawn[:, None])[:, 0]


def draw(mass: Tensor, uniform: Tensor) -> Tensor:
    """[m] int64 indices drawn in proportion to `mass`, by inverting its running sum, never one of mass 0.

    First a group of neighbours, then one of these: the running sum of a whole vocabulary is slow, and in
    float32 it is not exact.

    Args:
        mass: [m,V] float32 >= 0, with some above 0 in every row.
        uniform: [m] float64 in (0,1).
    """
    groups = _grouped(mass)
    until = groups.sum(dim=-1).double().cumsum(dim=-1)
    target = _below(uniform * until[:, -1], until[:, -1])
    group = _place(until, target)
    passed = until.gather(-1, (group - 1).clamp(min=0)[:, None])[:, 0].masked_fill(group == 0, 0.0)
    inside = _picked(groups, group).double().cumsum(dim=-1)
    return group * groups.shape[-1] + _place(inside, _below(target - passed, inside[:, -1]))


def _highest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The highest logit [m] of every row and its place [m], the first of equals."""
    # Several times faster than max(dim=-1), which looks for the place of the highest all along.
    groups = _grouped(logits)
    highest, group = groups.amax(dim=-1).max(dim=-1)
    return highest, group * groups.shape[-1] + _picked(groups, group).argmax(dim=-1)


def _grouped(values: Tensor) -> Tensor:
    """[m,V] as [m,V/w,w], w a power of two up to 64."""
    return values.unflatten(-1, (-1, math.gcd(values.shape[-1], 64)))


def _picked(groups: Tensor, group: Tensor) -> Tensor:
    """One group [m,w] of each row of [m,G,w]."""
    return groups[torch.arange(len(group), device=group.device), group]


def _place(until: Tensor, target: Tensor) -> Tensor:
    """[m] the first place of each row at which a running sum [m,n] is above the target."""
    # Nothing is above a sum that is not a number: a policy that broke must not end in an index out of range.
    return torch.searchsorted(until, target[:, None], right=True)[:, 0].clamp(max=until.shape[-1] - 1)


def _below(value: Tensor, bound: Tensor) -> Tensor:
    """The value, or the largest number below the bound where it isn't below: rounding can lead there."""
    return torch.minimum(value, torch.nextafter(bound, torch.zeros_like(bound)))


def commits(score: Tensor, masked: Tensor, threshold: float | None, quota: Tensor | int = 0) -> Tensor:
    """[n,b] bool, the masked positions of a block that commit now.

    Args:
        score: [n,b] float32; any value where not masked.
        masked: [n,b] bool, at least one a row.
        threshold: every position that reaches it commits, or a row's best where none does; None: static.
        quota: static schedule: positions of each row that commit, [n,1] or the same for all; the best ones,
            the first of equals.
    """
    score = score.masked_fill(~masked, -torch.inf)
    if threshold is None:
        rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return (rank < quota) & masked
    reached = (score >= threshold) & masked
    best = torch.zeros_like(masked).scatter_(-1, score.argmax(dim=-1, keepdim=True), True)
    return torch.where(reached.any(dim=-1, keepdim=True), reached, best)
