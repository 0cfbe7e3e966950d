import pytest
import torch

from drift.models.head import VocabHead, in_chunks


@pytest.fixture
def head() -> VocabHead:
    torch.manual_seed(0)
    return VocabHead(8, 12, bias=False)


def scores(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return logits.log_softmax(dim=-1).gather(-1, targets[:, None])[:, 0], logits.argmax(dim=-1)


def test_without_a_use_it_is_linear(head: VocabHead):
    hidden = torch.randn(2, 3, 8)
    assert torch.equal(head(hidden), hidden @ head.weight.T)


def test_a_use_is_given_states_and_weight_in_the_dtype_of_logits(head: VocabHead):
    def use(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return hidden, weight

    hidden = torch.randn(3, 8)
    assert [t.dtype for t in head(hidden, use)] == [torch.float32] * 2
    with torch.autocast("cpu", torch.bfloat16):
        assert [t.dtype for t in head(hidden, use)] == [torch.bfloat16] * 2
    assert [t.dtype for t in head.bfloat16()(hidden, use)] == [torch.bfloat16] * 2


@pytest.mark.parametrize("size", [1, 3, 10, 99])
def test_chunks_give_the_same_values_without_a_graph(head: VocabHead, size: int):
    hidden, targets = torch.randn(10, 8), torch.arange(10)
    logp, best = head(hidden, in_chunks(scores, targets, size=size))
    whole = scores(hidden @ head.weight.T, targets)
    torch.testing.assert_close(logp, whole[0])
    assert torch.equal(best, whole[1])
    assert not logp.requires_grad


def test_nothing_to_score_gives_nothing(head: VocabHead):
    use = in_chunks(scores, torch.zeros(0, dtype=torch.int64), size=4)
    logp, best = head(torch.zeros(0, 8), use)
    assert (logp.shape, best.shape) == ((0,), (0,))


def test_no_chunk_is_larger_than_asked_and_all_are_float32(head: VocabHead):
    seen = []

    def reduce(logits: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append((tuple(logits.shape), logits.dtype))
        return (logits.sum(dim=-1),)

    head.bfloat16()(torch.zeros(7, 8, dtype=torch.bfloat16), in_chunks(reduce, size=3))
    assert seen == [((3, 12), torch.float32), ((3, 12), torch.float32), ((1, 12), torch.float32)]
