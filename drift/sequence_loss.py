"""Policy losses whose action is the whole completion: its likelihood is bounded from several noisy states.

The objective is not linear in the tokens' log-probabilities, and the states of a row may be in different
micro-batches. So its derivative with respect to each log-probability is worked out first, from values without
a graph; the gradient of the sum of derivative times log-probability is then that of the objective, exactly,
in whatever parts the sum is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from drift.contract import LossOutput, MaskedBatch, SequenceLevel, TokenLogProbs
from drift.loss_config import LossConfig

_MOST_LOG_RATIO = 30.0  # nats


@dataclass(kw_only=True, slots=True)
class SequenceOutput:
    """A sequence-level objective of all noisy states of a rank; sums over ranks are the global batch's."""

    coefficients: Tensor  # [M,C] float32; the policy loss of some states is -(coefficients * logp).sum()
    # name -> [] float32, mean over the rows of all ranks: `policy`, the loss, `ratio` and `clip_fraction`
    parts: dict[str, Tensor]

    def output(self) -> LossOutput:
        """The values, for the sums over micro-batches, whose own losses have gradients and the value 0."""
        loss = self.parts["policy"]
        none = torch.zeros((), dtype=torch.int64, device=loss.device)
        return LossOutput(loss=loss, parts=self.parts, share=none.float(), num_kept=none, num_scored=none)


def sequence_coefficients(
    now: TokenLogProbs,
    noisy: MaskedBatch,
    config: LossConfig,
    *,
    old: TokenLogProbs | None = None,
    num_rows: Tensor | float | None = None,
) -> SequenceOutput:
    """The derivatives of a sequence-level objective with respect to the tokens' log-probabilities.

    Each row has the objective A * likelihood or, with several updates, min(r A, clip(r, 1 - eps_low,
    1 + eps_high) A), where the likelihood is the lower bound per token (SPG, arXiv 2510.09541, equation 2;
    the mixture of its equation 8 where A < 0) and the ratio r is exp(likelihood - old likelihood) as in ESPO
    (arXiv 2512.03759), or that of whole completions, divided by their length, as in GDPO (arXiv 2510.08554).
    SPG has no ratio: with several updates its bounds are clipped as those of the others. The mean over rows
    is taken.

    Args:
        now: log-probabilities of the model being trained, at all states of this rank; their graph is not
            used.
        noisy: the M states, all those of a row among them, of a plan that says how they make a likelihood.
        config: the clip of several updates per rollout, and the weights of tokens and of advantages below 0.
        old: log-probabilities at the same states before the first update; None: one update per rollout.
        num_rows: rows of all ranks that have states; None: those here.
    """
    level = noisy.sequence
    assert level is not None
    assert noisy.length is not None
    row, place = noisy.row.unique(return_inverse=True)
    total = torch.as_tensor(len(row) if num_rows is None else num_rows).clamp(min=1)
    advantages, length = _of_rows(noisy.advantages, place, row), _of_rows(noisy.length, place, row)
    advantages = config.token_weight * torch.where(advantages < 0, config.negative_weight, 1.0) * advantages
    value, slope = _likelihood(now.logp.detach().double(), noisy, place, advantages)
    if old is None:
        objective, ratio = advantages * value, torch.ones_like(value)
        clipped, outer = torch.zeros_like(value), advantages
    else:
        before, _ = _likelihood(old.logp.detach().double(), noisy, place, advantages)
        scale = length if level.whole_ratio else torch.ones_like(length)
        # Cut before exp, which could overflow.
        ratio = ((value - before) * scale).clamp(max=_MOST_LOG_RATIO).exp()
        bounded = ratio.clamp(1 - config.eps_low, 1 + config.eps_high)
        clipped = (bounded * advantages < ratio * advantages).double()
        objective = torch.minimum(ratio * advantages, bounded * advantages) / scale
        # A ratio outside its bounds on the other side still has a gradient: the minimum is the ratio's own.
        outer = torch.where(clipped > 0, 0.0, ratio * advantages)
    parts = {"policy": -objective, "ratio": ratio, "clip_fraction": clipped}
    return SequenceOutput(
        coefficients=(slope * outer[place][:, None] / total).float(),
        parts={name: (one.sum() / total).float() for name, one in parts.items()},
    )


def _likelihood(logp: Tensor, noisy: MaskedBatch, place: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """[n] of each row its bound per token, and [M,C] derivatives with respect to the log-probabilities."""
    level = noisy.sequence or SequenceLevel()
    share = (noisy.weight.double() * noisy.row_share)[:, None] * noisy.scored
    lower = torch.zeros_like(advantages).index_add(0, place, (share * logp).sum(dim=1))
    if not level.omega:
        return lower, share
    upper, slope = _upper_bound(logp, share, noisy, place, level.beta)
    omega = torch.where(advantages < 0, level.omega, 0.0)
    of_states = omega[place][:, None]
    # 0 * inf is no number: rows that don't use the upper bound don't look at it.
    mixed = torch.where(omega > 0, omega * upper + (1 - omega) * lower, lower)
    return mixed, torch.where(of_states > 0, of_states * slope + (1 - of_states) * share, share)


def _upper_bound(
    logp: Tensor, share: Tensor, noisy: MaskedBatch, place: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """SPG's upper bound (equation 7) and its derivatives, as `_likelihood` gives them.

    Of each position, 1 / beta times the log of the mean over states of w(t) p^beta where it was masked; then
    the mean over the positions that a state masked, which stand for those that none did, as in SPG's code.
    """
    assert noisy.length is not None
    shape = (int(place.max()) + 1 if len(place) else 0, logp.shape[1])
    term = share.log() + beta * logp + noisy.length.double().log()[:, None]  # -inf where not masked
    index = place[:, None].expand_as(term)
    floor = torch.full(shape, -torch.inf, dtype=term.dtype, device=term.device)
    most = floor.scatter_reduce(0, index, term, "amax")
    seen = most > -torch.inf
    shift = torch.where(seen, most, 0.0)
    mass = (term - shift[place]).exp()
    total = torch.zeros_like(shift).scatter_add(0, index, mass)
    num_seen = seen.sum(dim=1).clamp(min=1)
    value = (torch.where(seen, total.log() + shift, 0.0) / beta).sum(dim=1) / num_seen
    return value, mass / total.clamp(min=torch.finfo(mass.dtype).tiny)[place] / num_seen[place][:, None]


def _of_rows(values: Tensor, place: Tensor, row: Tensor) -> Tensor:
    """[n] float64, what all states of a row share, one value a row."""
    return torch.zeros(len(row), dtype=torch.float64, device=row.device).index_copy(0, place, values.double())
