"""Log-probabilities by tiles of the vocabulary, against autograd through whole logits."""

import pytest
import torch
from torch import Tensor

from drift.models.head import VocabHead
from drift.token_scores import TokenScores, _runs, tile_width

ILLEGAL = [1, 9, 11]


@pytest.fixture
def head() -> VocabHead:
    torch.manual_seed(0)
    head = VocabHead(8, 12, bias=False)
    torch.nn.init.normal_(head.weight)
    return head


@pytest.fixture
def states() -> Tensor:
    return (3 * torch.randn(10, 8, generator=torch.Generator().manual_seed(1))).requires_grad_()


def targets() -> Tensor:
    return torch.tensor([0, 2, 3, 4, 5, 6, 7, 8, 10, 2])


def whole(head: VocabHead, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and those of the likeliest, in float64, over all legal tokens at once."""
    logits = states.double() @ head.weight.double().T
    legal = [token for token in range(12) if token not in ILLEGAL]
    logp = logits[:, legal].log_softmax(dim=-1)
    places = torch.tensor([legal.index(token) for token in targets().tolist()])
    return logp.gather(1, places[:, None])[:, 0], -(logp.exp() * logp).sum(dim=1), logp.amax(dim=1)


def loss(found: tuple[Tensor, ...]) -> Tensor:
    slopes = torch.linspace(-1, 2, 10)
    return sum(
        ((slopes + number) * values).sum() + values.square().sum() for number, values in enumerate(found)
    )


@pytest.mark.parametrize("width", [1, 5, 12, 99, None])
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("top", [False, True])
def test_values_and_gradients_are_those_of_whole_logits(
    head: VocabHead, states: Tensor, width, entropy: bool, top: bool
):
    found = head(states, TokenScores(targets(), ILLEGAL, entropy, width, top))
    logp, entropies, likeliest = whole(head, states)
    expected = (logp, *[entropies] * entropy, *[likeliest] * top)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    parts = [states, head.weight]
    gradients = zip(
        torch.autograd.grad(loss(found), parts), torch.autograd.grad(loss(expected), parts), strict=True
    )
    for ours, theirs in gradients:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("width", [4, 12])
def test_logits_far_apart_neither_overflow_nor_vanish(head: VocabHead, width: int):
    states = 400 * torch.randn(10, 8, generator=torch.Generator().manual_seed(2))
    found = head(states, TokenScores(targets(), ILLEGAL, True, width))
    for ours, theirs in zip(found, whole(head, states)[:2], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-2)


def test_states_without_a_gradient_are_not_computed_again(head: VocabHead, states: Tensor, monkeypatch):
    (logp,) = head(states, TokenScores(targets(), ILLEGAL, False, 5))
    sizes = []
    tiles = TokenScores.tiles
    monkeypatch.setattr(TokenScores, "tiles", lambda self, h, w: sizes.append(len(h)) or tiles(self, h, w))
    logp[[1, 4, 7]].sum().backward()
    assert sizes == [3]
    assert (states.grad != 0).any(dim=1).nonzero()[:, 0].tolist() == [1, 4, 7]


def test_no_gradient_at_all_is_a_gradient_of_zero(head: VocabHead, states: Tensor):
    (logp,) = head(states, TokenScores(targets(), ILLEGAL))
    (0 * logp.sum()).backward()
    assert (states.grad == 0).all()
    assert (head.weight.grad == 0).all()


def test_a_frozen_head_has_no_gradient_but_passes_one_on(head: VocabHead, states: Tensor):
    head.requires_grad_(False)
    head(states, TokenScores(targets(), ILLEGAL))[0].sum().backward()
    assert head.weight.grad is None
    assert (states.grad != 0).any()


def test_nothing_to_score_gives_nothing(head: VocabHead):
    none = torch.zeros(0, 8, requires_grad=True)
    logp, entropy = head(none, TokenScores(torch.zeros(0, dtype=torch.int64), ILLEGAL, True))
    assert (logp.shape, entropy.shape) == ((0,), (0,))
    (logp.sum() + entropy.sum()).backward()
    assert (head.weight.grad == 0).all()


def test_low_precision_adds_up_in_float32(head: VocabHead):
    states = torch.randn(4096, 8, generator=torch.Generator().manual_seed(3))
    tokens = torch.full((4096,), 2)
    full = head(states, TokenScores(tokens, ILLEGAL, False, 3))[0]
    expected = torch.autograd.grad(full.sum(), head.weight)[0]
    head.bfloat16()
    found = head(states, TokenScores(tokens, ILLEGAL, False, 3))[0]
    assert found.dtype == torch.float32
    gradient = torch.autograd.grad(found.sum(), head.weight)[0]
    # Thousands of states add to one row: their sum may be rounded, but not each addition to it.
    assert (gradient.float() - expected).norm() < 0.02 * expected.norm()


def test_gradients_of_low_precision_states_are_added_up_in_float32():
    """Over hundreds of tiles: a sum in bfloat16 would be off by several times as much."""
    torch.manual_seed(0)
    head = VocabHead(8, 2048, bias=False).bfloat16()
    torch.nn.init.normal_(head.weight)
    states = torch.randn(64, 8).bfloat16().requires_grad_()
    tokens = torch.arange(64)
    (logp,) = head(states, TokenScores(tokens, [], False, 4))
    (found,) = torch.autograd.grad(logp.sum(), states)
    exact = states.detach().double().requires_grad_()
    whole = (exact @ head.weight.double().T).log_softmax(dim=-1)[tokens, tokens]
    (expected,) = torch.autograd.grad(whole.sum(), exact)
    assert (found.double() - expected).norm() < 0.005 * expected.norm()


@pytest.mark.parametrize("ids", [[], [3], [0, 1, 2, 7, 9, 10], [9, 3, 4]])
def test_runs_are_all_of_the_ids(ids: list[int]):
    found = [token for start, stop in _runs(ids) for token in range(start, stop)]
    assert found == ids
    assert len(_runs([5, 6, 7, 9])) == 2


def test_a_tile_is_within_its_budget_or_of_the_least_width():
    assert tile_width(2048, 10**6, on_cpu=True) == 1024
    assert tile_width(2048, 10**6) == 32768
    assert tile_width(777, 10**6) == 86272 == 674 * 128
    assert tile_width(10**6, 10**6, on_cpu=True) == 512
    assert tile_width(1, 300) == 300
    assert tile_width(0, 300) == 300
