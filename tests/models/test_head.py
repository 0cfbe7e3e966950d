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


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 10, 99])
def test_chunks_give_the_same_values_and_gradients(head: VocabHead, chunk_size: int | None):
    hidden = torch.randn(10, 8, requires_grad=True)
    targets = torch.arange(10)
    whole = scores(hidden @ head.weight.T, targets)
    expected = torch.autograd.grad(whole[0].square().sum(), [hidden, head.weight])
    logp, best = head(hidden, scores, targets, chunk_size=chunk_size)
    found = torch.autograd.grad(logp.square().sum(), [hidden, head.weight])
    torch.testing.assert_close(logp, whole[0])
    assert torch.equal(best, whole[1])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


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
