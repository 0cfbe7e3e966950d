from types import ModuleType

import pytest
import torch

from drift.samplers.inclusion import (
    SPAN,
    inverse_weights,
    proportional_inclusion,
    successive_inclusion,
    systematic_draws,
)

INF = torch.inf


def test_two_draws_worked_by_hand():
    # p = 1/2, 1/4, 1/4. The first is left out by the orders (2,3) and (3,2): 2 * 1/4 * (1/4) / (3/4) = 1/6.
    # By symmetry the others share the 2 - 5/6 that are left: 7/12 each.
    logits = torch.tensor([[0.5, 0.25, 0.25]], dtype=torch.float64).log()
    expected = torch.tensor([[5 / 6, 7 / 12, 7 / 12]], dtype=torch.float64)
    torch.testing.assert_close(successive_inclusion(logits, 2), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("num", [2, 5, 7])
def test_probabilities_are_those_of_every_order_enumerated(
    oracle: ModuleType, num: int, k: int, temperature: float
):
    logits = torch.randn(num, generator=torch.Generator().manual_seed(num), dtype=torch.float64)
    found = successive_inclusion((logits / temperature)[None], k)[0]
    expected = oracle.inclusion_probabilities(dict(enumerate(logits.tolist())), temperature, k)
    # The oracle's sums of what is left round, at worst to 1e-9 of it.
    assert found.tolist() == pytest.approx(list(expected.values()), rel=1e-8)


@pytest.mark.parametrize(("num", "k"), [(256, 4), (64, 8), (9, 8)])
def test_equal_chances_at_any_size(num: int, k: int):
    found = successive_inclusion(torch.zeros(2, num, dtype=torch.float64), k)
    torch.testing.assert_close(found, torch.full_like(found, k / num), rtol=1e-9, atol=0)


def test_the_smallest_chance_that_is_allowed_keeps_its_digits():
    # One draw: the softmax itself, to the last of a span of e^30.
    logits = torch.tensor([[0.0, -SPAN]], dtype=torch.float64)
    torch.testing.assert_close(successive_inclusion(logits, 1), logits.softmax(dim=1), rtol=1e-9, atol=0)
    # Two draws of three with p = 1, e^-30, e^-30: the first is always in, the others share the second draw.
    pair = successive_inclusion(torch.tensor([[0.0, -SPAN, -SPAN]], dtype=torch.float64), 2)
    torch.testing.assert_close(pair, torch.tensor([[1.0, 0.5, 0.5]]).double(), rtol=1e-9, atol=0)


def test_rows_without_a_choice():
    logits = torch.tensor([[0.0, -INF, 3.0], [-INF, -INF, -INF]], dtype=torch.float64)
    assert successive_inclusion(logits, 2).tolist() == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]


def test_a_row_is_alone_what_it_is_beside_longer_ones():
    logits = torch.tensor([[0.3, 1.0, -2.0, -INF, -INF], [0.1, 0.2, 0.3, 0.4, 0.5]], dtype=torch.float64)
    both = successive_inclusion(logits, 2)
    assert torch.equal(successive_inclusion(logits[:1, :3], 2), both[:1, :3])


def test_weights_worked_by_hand():
    inclusion = torch.tensor([[0.5, 0.8, 0.7, 0.0], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    timesteps = torch.tensor([[2, 0], [0, 1]])
    drawn = torch.tensor([[True, True], [True, False]])
    # Two draws of three candidates: 2 / (3 * 0.7) and 2 / (3 * 0.5). One of one: 1 / (1 * 1).
    expected = torch.tensor([[0.952381, 1.333333], [1.0, 0.0]])
    torch.testing.assert_close(inverse_weights(inclusion, drawn, timesteps), expected, rtol=1e-6, atol=0)


def test_proportional_chances_worked_by_hand():
    size = torch.tensor([[8.0, 1.0, 1.0, 0.0], [2.0, 1.0, 2.0, 5.0], [0.0] * 4], dtype=torch.float64)
    # Two draws. Row 0: 2 * 8/10 is more than certain, the others have 2/10 each. Row 1: 5/10 is just certain.
    expected = torch.tensor([[1.0, 0.2, 0.2, 0.0], [0.4, 0.2, 0.4, 1.0], [0.0] * 4]).double()
    torch.testing.assert_close(proportional_inclusion(size, 2), expected, rtol=1e-6, atol=0)


def test_systematic_draws_worked_by_hand():
    # Laid end to end the chances end at 0.5, 1.25, 2: of u and u + 1, 0.3 and 1.3 fall into the first and
    # third, 0.1 and 1.1 into the first and second, 0.6 and 1.6 into the second and third.
    inclusion = torch.tensor([[0.5, 0.75, 0.75]], dtype=torch.float64).expand(3, -1)
    found = systematic_draws(inclusion, torch.tensor([[0.3], [0.1], [0.6]], dtype=torch.float64))
    assert found.tolist() == [[True, False, True], [True, True, False], [False, True, True]]


@pytest.mark.parametrize("k", [1, 2, 5])
def test_systematic_draws_have_the_stated_chances_and_are_as_many(k: int):
    size = torch.rand(1, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 4
    inclusion = proportional_inclusion(size, k)
    starts = (torch.arange(20_000, dtype=torch.float64)[:, None] + 0.5) / 20_000
    drawn = systematic_draws(inclusion.expand(len(starts), -1), starts)
    # On a grid of starts every share is right to a few steps of the grid.
    torch.testing.assert_close(drawn.double().mean(dim=0), inclusion[0], rtol=0, atol=2e-4)
    edges = torch.tensor([[2.0**-53], [1 - 2.0**-53]], dtype=torch.float64)
    both = torch.cat((drawn, systematic_draws(inclusion.expand(2, -1), edges))).sum(dim=1).double()
    assert ((both - inclusion.sum()).abs() < 1 + 1e-9).all()
    assert (both >= 1).all()
