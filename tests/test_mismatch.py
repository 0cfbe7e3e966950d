import math

import pytest
import torch
from torch import Tensor

from drift.contract import ConfigError, MaskedBatch
from drift.mismatch import MAX_RATIO, importance_weights, measure_mismatch


def states(rollout: Tensor | None, current: Tensor) -> MaskedBatch:
    """Noisy states of which only what is compared is filled in; every position is scored."""
    num = len(current)
    return MaskedBatch(
        input_ids=torch.zeros_like(current).long(),
        attention_mask=torch.ones_like(current),
        targets=torch.zeros_like(current).long(),
        scored=torch.ones_like(current),
        current=current,
        weight=torch.ones(num),
        row_share=torch.ones(num),
        slot=torch.zeros(num, dtype=torch.int64),
        row=torch.arange(num),
        advantages=torch.ones(num),
        num_slots=1,
        commit_logp=None if rollout is None else rollout.log().masked_fill(~current, 0.0),
    )


# Update / rollout is 2, 1/2 and 1; the last position was committed at another timestep.
UPDATE = torch.tensor([[0.4, 0.3], [0.7, 0.9]])
ROLLOUT = torch.tensor([[0.2, 0.6], [0.7, 0.1]])
CURRENT = torch.tensor([[True, True], [True, False]])


def test_worked_by_hand():
    found = measure_mismatch(UPDATE.log(), states(ROLLOUT, CURRENT))
    assert found.num_tokens == 3
    # 2 - 1 - ln 2 = 0.3069, 1/2 - 1 + ln 2 = 0.1931, and 0.
    assert found.kl.item() == pytest.approx(0.5, rel=1e-5)
    assert found.max_ratio.item() == pytest.approx(2.0, rel=1e-5)
    assert (found.weight.item(), found.num_capped.item()) == (3.0, 0)


@pytest.mark.parametrize(
    ("cap", "weights", "num_capped"),
    [
        (1.5, [[1.5, 0.5], [1.0, 1.0]], 1),
        (1.0, [[1.0, 0.5], [1.0, 1.0]], 1),
        (3.0, [[2.0, 0.5], [1.0, 1.0]], 0),
    ],
)
def test_weights_worked_by_hand(cap: float, weights: list[list[float]], num_capped: int):
    batch = states(ROLLOUT, CURRENT)
    torch.testing.assert_close(importance_weights(UPDATE.log(), batch, cap), torch.tensor(weights))
    found = measure_mismatch(UPDATE.log(), batch, cap)
    # The token of another timestep, of weight 1, is not part of the sum.
    assert found.weight.item() == pytest.approx(sum(map(sum, weights)) - 1)
    assert found.num_capped == num_capped


def test_the_estimate_averages_to_the_kl_and_the_weights_to_one():
    rollout, update = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.2, 0.6]])
    everything = torch.ones(1, 3, dtype=torch.bool)
    kl = 0.0
    for token, share in enumerate(rollout[0].tolist()):
        only = everything & (torch.arange(3) == token)
        kl += share * measure_mismatch(update.log(), states(rollout, only)).kl.item()
    assert kl == pytest.approx((rollout * (rollout / update).log()).sum().item(), rel=1e-5)
    weights = importance_weights(update.log(), states(rollout, everything), 1e6)
    assert (rollout * weights).sum().item() == pytest.approx(1.0)


def test_small_differences_are_not_lost_in_rounding():
    # d = 1e-4: d^2 / 2 = 5e-9, below float32's resolution at 1.
    update = torch.full((1, 8), -1e-4)
    found = measure_mismatch(update, states(torch.full((1, 8), math.exp(-2e-4)), torch.ones(1, 8).bool()))
    assert found.kl.item() == pytest.approx(8 * 5e-9, rel=0.02)


@pytest.mark.parametrize(("update", "rollout"), [(-200.0, 1.0), (0.0, 1e-38), (0.0, 0.0), (-math.inf, 0.5)])
def test_figures_stay_finite_whatever_a_token_does(update: float, rollout: float):
    batch = states(torch.tensor([[rollout]]), torch.tensor([[True]]))
    found = measure_mismatch(torch.tensor([[update]]), batch)
    assert found.max_ratio.item() == pytest.approx(MAX_RATIO, rel=1e-4)
    assert math.isfinite(found.kl)
    assert found.kl > 12


def test_a_weight_does_not_overflow_below_its_cap():
    batch = states(torch.tensor([[1e-38, 1.0]]), torch.tensor([[True, True]]))
    assert importance_weights(torch.tensor([[0.0, -math.inf]]), batch, 5.0).tolist() == [
        [pytest.approx(5.0), 0.0]
    ]


def test_what_stands_at_other_tokens_does_not_matter():
    update, batch = UPDATE.log(), states(ROLLOUT, CURRENT)
    expected = measure_mismatch(update, batch, 2.0)
    update[1, 1] = math.nan
    assert measure_mismatch(update, batch, 2.0) == expected
    assert importance_weights(update, batch, 2.0)[1, 1] == 1


def test_neither_weights_nor_figures_carry_a_graph():
    update = UPDATE.log().requires_grad_()
    batch = states(ROLLOUT, CURRENT)
    assert not importance_weights(update, batch, 2.0).requires_grad
    assert not measure_mismatch(update, batch, 2.0).kl.requires_grad


def test_no_states_have_no_mismatch():
    batch = states(ROLLOUT, CURRENT).select(torch.zeros(0, dtype=torch.int64))
    found = measure_mismatch(torch.zeros(0, 2), batch, 2.0)
    assert (found.num_tokens, found.kl, found.weight, found.num_capped, found.max_ratio) == (0, 0, 0, 0, 1)


def test_without_the_rollouts_probabilities_nothing_is_measured_and_weights_are_refused():
    assert measure_mismatch(UPDATE.log(), states(None, CURRENT)) is None
    unrecorded = ROLLOUT.clone()
    unrecorded[0, 1] = 0.0
    for batch in (states(None, CURRENT), states(unrecorded, CURRENT)):
        with pytest.raises(ConfigError, match=r"importance_cap is 2\.0: .*commit_probs.*set it to null"):
            importance_weights(UPDATE.log(), batch, 2.0)
