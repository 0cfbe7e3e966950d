import pytest
import torch

from drift.models.head import VocabHead


@pytest.fixture
def head() -> VocabHead:
    torch.manual_seed(0)
    return VocabHead(8, 12, bias=False)


def scores(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return logits.log_softmax(dim=-1).gather(-1, targets[:, None])[:, 0], logits.argmax(dim=-1)


def test_without_reduction_it_is_linear(head: VocabHead):
    hidden = torch.randn(2, 3, 8)
    assert torch.equal(head(hidden), hidden @ head.weight.T)


class SquareOf:
    """The square of one logit of every row, and of nothing else."""

    def __init__(self) -> None:
        self.num_rows = 0

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor]:
        return (logits.gather(-1, targets[:, None])[:, 0].square(),)

    def gradient(self, logits: torch.Tensor, gradients: tuple[torch.Tensor], targets: torch.Tensor):
        self.num_rows += len(logits)
        values = 2 * logits.gather(-1, targets[:, None]) * gradients[0][:, None]
        return torch.zeros_like(logits).scatter(-1, targets[:, None], values)


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 10, 99])
def test_chunks_give_the_same_values_and_gradients(head: VocabHead, chunk_size: int | None):
    hidden = torch.randn(10, 8, requires_grad=True)
    targets = torch.arange(10)
    whole = (hidden @ head.weight.T)[targets, targets].square()
    expected = torch.autograd.grad(whole.square().sum(), [hidden, head.weight])
    (squares,) = head(hidden, SquareOf(), targets, chunk_size=chunk_size)
    found = torch.autograd.grad(squares.square().sum(), [hidden, head.weight])
    torch.testing.assert_close(squares, whole)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_rows_without_a_gradient_are_not_computed_again(head: VocabHead):
    hidden, reduce = torch.randn(10, 8, requires_grad=True), SquareOf()
    (squares,) = head(hidden, reduce, torch.arange(10), chunk_size=2)
    squares[[1, 4, 7]].sum().backward()
    assert reduce.num_rows == 3
    assert (hidden.grad != 0).any(dim=1).nonzero()[:, 0].tolist() == [1, 4, 7]


def test_a_frozen_head_has_no_gradient_but_passes_one_on(head: VocabHead):
    hidden = torch.randn(10, 8, requires_grad=True)
    head.requires_grad_(False)
    head(hidden, SquareOf(), torch.arange(10))[0].sum().backward()
    assert head.weight.grad is None
    assert (hidden.grad != 0).any()


def test_a_plain_reduction_gives_values_without_a_graph(head: VocabHead):
    hidden, targets = torch.randn(10, 8), torch.arange(10)
    logp, best = head(hidden, scores, targets, chunk_size=3)
    whole = scores(hidden @ head.weight.T, targets)
    torch.testing.assert_close(logp, whole[0])
    assert torch.equal(best, whole[1])
    assert not logp.requires_grad


def test_nothing_to_score_gives_nothing(head: VocabHead):
    logp, best = head(torch.zeros(0, 8), scores, torch.zeros(0, dtype=torch.int64), chunk_size=4)
    assert (logp.shape, best.shape) == ((0,), (0,))


def test_no_chunk_is_wider_than_asked_and_all_are_float32(head: VocabHead):
    seen = []

    def reduce(logits: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append((tuple(logits.shape), logits.dtype))
        return (logits.sum(dim=-1),)

    with torch.no_grad():
        head.bfloat16()(torch.zeros(7, 8, dtype=torch.bfloat16), reduce, chunk_size=3)
    assert seen == [((3, 12), torch.float32), ((3, 12), torch.float32), ((1, 12), torch.float32)]
