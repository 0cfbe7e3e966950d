import math

import pytest
import torch
from torch import Tensor

from drift.contract import MaskedBatch, SequenceLevel, TokenLogProbs
from drift.losses import LossConfig, rldf_loss
from drift.sequence_loss import sequence_coefficients

ROWS = [0, 2, 0, 1, 2]  # of each state
ADVANTAGES = {0: 1.5, 1: 0.0, 2: -0.5}
LENGTHS = {0: 3, 1: 2, 2: 4}


def noisy(level: SequenceLevel, seed: int = 0) -> MaskedBatch:
    generator = torch.Generator().manual_seed(seed)
    scored = torch.rand(5, 4, generator=generator) < 0.6
    scored[:, 0] = True
    count = torch.tensor([ROWS.count(row) for row in ROWS])
    blank = torch.zeros(5, 4, dtype=torch.int64)
    return MaskedBatch(
        input_ids=blank,
        attention_mask=blank.bool(),
        targets=blank,
        scored=scored,
        current=scored,
        weight=torch.rand(5, generator=generator) + 0.5,
        row_share=1.0 / count,
        slot=torch.tensor([0, 0, 1, 0, 1]),
        row=torch.tensor(ROWS),
        advantages=torch.tensor([ADVANTAGES[row] for row in ROWS]),
        num_slots=2,
        length=torch.tensor([float(LENGTHS[row]) for row in ROWS]),
        sequence=level,
    )


def logprobs(batch: MaskedBatch, seed: int, spread: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (-spread * torch.rand(5, 4, generator=generator) - 0.1) * batch.scored


def loss_in_plain_loops(
    logp: Tensor, old: Tensor | None, batch: MaskedBatch, level: SequenceLevel, eps: tuple[float, float]
) -> Tensor:
    """The objective's negative as the papers write it, row by row and position by position."""

    def likelihood(values: Tensor, row: int) -> Tensor:
        states = [m for m in range(5) if ROWS[m] == row]
        share = [batch.weight[m] * batch.row_share[m] for m in states]
        lower = sum(
            (s * values[m][batch.scored[m]].sum() for m, s in zip(states, share, strict=True)),
            torch.zeros(()),
        )
        if ADVANTAGES[row] >= 0 or level.omega == 0:
            return lower
        logs = []
        for position in range(4):
            inner = [
                s * LENGTHS[row] * values[m, position].exp() ** level.beta
                for m, s in zip(states, share, strict=True)
                if batch.scored[m, position]
            ]
            if inner:
                logs.append(sum(inner, torch.zeros(())).log() / level.beta)
        return level.omega * sum(logs, torch.zeros(())) / len(logs) + (1 - level.omega) * lower

    total = torch.zeros(())
    for row, advantage in ADVANTAGES.items():
        value = likelihood(logp, row)
        if old is None:
            total = total - advantage * value
            continue
        scale = LENGTHS[row] if level.whole_ratio else 1
        ratio = ((value - likelihood(old, row)) * scale).exp()
        bounded = ratio.clamp(1 - eps[0], 1 + eps[1])
        total = total - torch.minimum(ratio * advantage, bounded * advantage) / scale
    return total / len(ADVANTAGES)


LEVELS = [
    SequenceLevel(),
    SequenceLevel(whole_ratio=True),
    SequenceLevel(omega=1.0),
    SequenceLevel(omega=0.5, beta=1.5),
    SequenceLevel(omega=0.3, beta=2.0),
]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("eps", [None, (0.9, 9.0), (0.02, 0.02)])
def test_coefficients_give_the_gradient_of_the_objective(
    level: SequenceLevel, eps: tuple[float, float] | None
):
    batch = noisy(level)
    logp = logprobs(batch, 1).requires_grad_()
    old = None if eps is None else logprobs(batch, 2)
    low, high = eps or (0.2, 0.2)
    expected = loss_in_plain_loops(logp, old, batch, level, (low, high))
    (gradient,) = torch.autograd.grad(expected, logp)
    before = None if old is None else TokenLogProbs(logp=old)
    found = sequence_coefficients(
        TokenLogProbs(logp=logp.detach()), batch, LossConfig(eps_low=low, eps_high=high), old=before
    )
    torch.testing.assert_close(found.parts["policy"], expected.detach(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(
        -found.coefficients * batch.scored, gradient * batch.scored, rtol=1e-5, atol=1e-8
    )
    assert (found.coefficients[~batch.scored] == 0).all()


def test_a_clipped_ratio_worked_by_hand():
    batch = noisy(SequenceLevel()).select(torch.tensor([0, 2, 1, 4]))
    batch.scored, batch.weight = torch.ones(4, 4, dtype=torch.bool), torch.full((4,), 0.25)
    old = torch.full((4, 4), -1.0)
    # Per token each row's likelihood is the mean: 0.3 higher in row 0 (A 1.5), 0.1 lower in row 2 (A -0.5).
    now = torch.tensor([-0.7, -0.7, -1.1, -1.1])[:, None].expand(4, 4)
    found = sequence_coefficients(
        TokenLogProbs(logp=now), batch, LossConfig(), old=TokenLogProbs(logp=old), num_rows=4
    )
    # Row 0: e^0.3 = 1.3499 is clipped at 1.2. Row 2: e^-0.1 = 0.9048 is not. Of 4 rows on all ranks, 2 here.
    assert found.parts["ratio"].item() == pytest.approx((1.3499 + 0.9048) / 4, abs=1e-4)
    assert found.parts["clip_fraction"].item() == pytest.approx(1 / 4)
    assert found.parts["policy"].item() == pytest.approx(-(1.2 * 1.5 - 0.9048 * 0.5) / 4, abs=1e-4)
    # Weight 0.25, two states a row: each token is 1/8 of its row's likelihood.
    expected = torch.tensor([0.0, 0.0, -0.9048 * 0.5 / 8 / 4, -0.9048 * 0.5 / 8 / 4])
    torch.testing.assert_close(found.coefficients, expected[:, None].expand(4, 4), rtol=1e-3, atol=0)


def test_the_upper_bound_worked_by_hand():
    # One row of two tokens, A = -1, two states: the first masks both tokens, the second the second.
    batch = noisy(SequenceLevel(omega=1.0, beta=2.0)).select(torch.tensor([1, 4]))
    batch.scored = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0]]).bool()
    batch.weight, batch.advantages = torch.tensor([0.5, 1.0]), torch.tensor([-1.0, -1.0])
    batch.length = torch.tensor([2.0, 2.0])
    now = torch.tensor([[0.5, 0.5, 1.0, 1.0], [1.0, 0.8, 1.0, 1.0]]).log()
    found = sequence_coefficients(TokenLogProbs(logp=now), batch, LossConfig())
    # w(t) is weight * 2 tokens, halved in the mean: 0.5 and 1. Position 0: 0.5 * 0.25 = 0.125. Position 1:
    # 0.5 * 0.25 + 1 * 0.64 = 0.765. The bound is (ln 0.125 + ln 0.765) / 2 per power, / 2 per token =
    # -0.5868.
    value = (math.log(0.125) + math.log(0.765)) / 4
    assert found.parts["policy"].item() == pytest.approx(value, rel=1e-5)
    # Of the second position the states have 0.125 / 0.765 and 0.64 / 0.765; each position is half of the
    # mean.
    expected = torch.tensor([[-0.5, -0.5 * 0.125 / 0.765, 0, 0], [0, -0.5 * 0.64 / 0.765, 0, 0]])
    torch.testing.assert_close(found.coefficients, expected)


def test_impossible_tokens_stay_numbers():
    batch = noisy(SequenceLevel(omega=0.5, beta=1.5))
    logp = torch.full((5, 4), -math.inf).masked_fill(~batch.scored, 0.0)
    found = sequence_coefficients(TokenLogProbs(logp=logp), batch, LossConfig())
    assert not found.coefficients.isnan().any()


def test_no_states_are_an_empty_loss():
    batch = noisy(SequenceLevel(omega=0.5)).select(torch.zeros(0, dtype=torch.int64))
    found = sequence_coefficients(TokenLogProbs(logp=torch.zeros(0, 4)), batch, LossConfig(), num_rows=3)
    assert found.coefficients.shape == (0, 4)
    assert found.parts["policy"].item() == 0


def test_no_states_on_any_rank_are_a_loss_of_zero():
    none = noisy(SequenceLevel()).select(torch.zeros(0, dtype=torch.int64))
    found = sequence_coefficients(
        TokenLogProbs(logp=torch.zeros(0, 4)), none, LossConfig(), num_rows=torch.tensor(0)
    )
    assert {name: value.item() for name, value in found.parts.items()} == dict.fromkeys(found.parts, 0)


def test_weights_of_tokens_and_of_what_did_worse_are_in_values_and_coefficients():
    batch, now = noisy(SequenceLevel()), logprobs(noisy(SequenceLevel()), 1)
    plain = sequence_coefficients(TokenLogProbs(logp=now), batch, LossConfig())
    config = LossConfig(token_weight=2.0, negative_weight=0.25)
    found = sequence_coefficients(TokenLogProbs(logp=now), batch, config)
    factor = torch.where(batch.advantages < 0, 0.5, 2.0)[:, None]
    torch.testing.assert_close(found.coefficients, factor * plain.coefficients)
    # Without several updates the value is that of coefficients times log-probabilities.
    expected = -(found.coefficients * now * batch.scored).sum()
    torch.testing.assert_close(found.parts["policy"], expected, rtol=1e-5, atol=1e-7)


def test_a_ratio_beyond_all_bounds_has_no_gradient_where_it_is_clipped():
    batch = noisy(SequenceLevel(whole_ratio=True))
    low, high = torch.full((5, 4), -2000.0), torch.full((5, 4), -0.1)
    found = sequence_coefficients(TokenLogProbs(logp=high), batch, LossConfig(), old=TokenLogProbs(logp=low))
    assert torch.isfinite(found.coefficients).all()
    assert (found.coefficients[batch.row == 0] == 0).all()


@pytest.mark.parametrize("normalisation", ["token", "sample", "trajectory"])
def test_the_kl_is_per_token_of_a_completion_whatever_the_normalisation(normalisation):
    """Every token has d = log 0.5 - log 0.4, k3 = e^d - 1 - d = 1.25 - 1 - 0.2231 = 0.0269."""
    batch = noisy(SequenceLevel())
    # States that count 1 / (scored tokens) each, as samplers of whole completions weigh them.
    batch.weight = 1.0 / batch.scored.sum(dim=1)
    now = TokenLogProbs(logp=torch.full((5, 4), math.log(0.4)))
    reference = TokenLogProbs(logp=torch.full((5, 4), math.log(0.5)))
    config = LossConfig(beta=0.5, normalisation=normalisation)
    found = rldf_loss(now, batch, config, reference=reference, coefficients=torch.zeros(5, 4))
    assert found.parts["kl"].item() == pytest.approx(0.0269, abs=1e-4)
    assert found.loss.item() == pytest.approx(0.5 * 0.0269, abs=1e-4)
