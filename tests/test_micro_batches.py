import pytest
import torch

from drift.contract import MaskedBatch
from drift.logprobs import token_logprobs
from drift.micro_batches import by_length, micro_batches

COMPLETION = 8


def states(*prompts: int) -> MaskedBatch:
    """A noisy state for every length of a prompt, left-padded; all of the completion is masked."""
    number, longest = len(prompts), max(prompts)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(3, 20, (number, COMPLETION), generator=generator)
    prompt_mask = torch.arange(longest) >= longest - torch.tensor(prompts)[:, None]
    prompt_ids = torch.randint(3, 20, (number, longest), generator=generator).masked_fill(~prompt_mask, 0)
    scored = torch.ones_like(targets, dtype=torch.bool)
    ones, rows = torch.ones(number), torch.arange(number)
    return MaskedBatch(
        input_ids=torch.cat((prompt_ids, torch.ones_like(targets)), dim=1),
        attention_mask=torch.cat((prompt_mask, scored), dim=1),
        targets=targets,
        scored=scored,
        current=scored,
        weight=ones,
        row_share=ones,
        slot=torch.zeros_like(rows),
        row=rows,
        advantages=ones,
        num_slots=1,
    )


def listed(parts: list[torch.Tensor]) -> list[list[int]]:
    return [part.tolist() for part in parts]


def test_states_of_like_length_go_together_longest_first():
    assert listed(micro_batches(states(2, 9, 2, 8, 5), 2, None)) == [[1, 3], [4, 0], [2]]


@pytest.mark.parametrize(
    ("max_positions", "expected"),
    [
        (10**6, [[1, 3, 4, 0, 2]]),
        # Lengths are 17, 16, 13, 10, 10 with the completion: 3 x 17 = 51, and 2 x 10.
        (51, [[1, 3, 4], [0, 2]]),
        (50, [[1, 3], [4, 0], [2]]),
        (3, [[1], [3], [4], [0], [2]]),
    ],
)
def test_no_micro_batch_has_more_positions_than_asked(max_positions: int, expected: list[list[int]]):
    assert listed(micro_batches(states(2, 9, 2, 8, 5), 99, max_positions)) == expected


def test_no_states_make_no_micro_batch():
    none = states(2, 3).select(torch.zeros(0, dtype=torch.int64))
    assert micro_batches(none, 4, 100) == []
    assert listed(by_length(none)) == [[]]


def test_passes_have_little_padding_but_are_not_small():
    long, short = [1000] * 3, [10] * 100
    # 3 x 1008 positions are enough for a pass; a shorter state would be 998 of padding.
    assert [len(group) for group in by_length(states(*short, *long))] == [3, 100]
    # 30 x 28 are too few to stand alone.
    assert [len(group) for group in by_length(states(*short[:29], 20))] == [30]


def test_passes_of_their_own_give_what_one_pass_gives(policy):
    batch = states(*[3] * 80, *[60] * 20)
    assert len(by_length(batch)) > 1
    seen = []
    hook = policy.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    try:
        with torch.no_grad():
            found, together = (token_logprobs(policy, batch, one_pass=one) for one in (False, True))
    finally:
        hook.remove()
    assert seen == [(20, 68), (80, 11), (100, 68)]
    torch.testing.assert_close(found.logp, together.logp, rtol=0, atol=1e-5)
