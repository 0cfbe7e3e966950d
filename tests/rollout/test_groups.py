from collections.abc import Callable

import pytest
import torch

from drift.contract import Problem, PromptBatch, Rollout
from drift.models import LLaDA
from drift.rollout import DenoiseConfig, rollout_groups

CONFIG = DenoiseConfig(block_length=4, threshold=0.6, temperature=1.0)
TENSORS = ("completion_ids", "completion_mask", "step_map", "num_timesteps", "seeds")


@pytest.fixture
def batch(make_prompts: Callable) -> PromptBatch:
    ids, mask = make_prompts(9, 5, 7)
    return PromptBatch(
        prompt_ids=ids,
        prompt_mask=mask,
        problems=[Problem(prompt="", answer="")] * 3,
        positions=torch.tensor([4, 17, 5]),
    )


def assert_same(one: Rollout, other: Rollout) -> None:
    for name in TENSORS:
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    torch.testing.assert_close(one.token_probs, other.token_probs, rtol=0, atol=1e-5)
    assert torch.equal(one.commit_probs, one.token_probs)
    assert torch.equal(other.commit_probs, other.token_probs)


def test_a_group_is_several_completions_of_one_prompt(policy: LLaDA, batch: PromptBatch):
    rollout = rollout_groups(policy, batch, 12, CONFIG, group_size=4)
    assert rollout.completion_ids.shape == (12, 12)
    assert torch.equal(rollout.prompt_ids, batch.prompt_ids[[0] * 4 + [1] * 4 + [2] * 4])
    assert len(rollout.seeds.unique()) == 12
    assert len({tuple(row) for row in rollout.completion_ids[:4].tolist()}) > 1


@pytest.mark.parametrize("batch_size", [1, 5, 12, 100])
def test_the_pieces_do_not_matter(ending_policy: LLaDA, batch: PromptBatch, batch_size: int):
    whole = rollout_groups(ending_policy, batch, 12, CONFIG, group_size=4, seed=3)
    pieces = rollout_groups(ending_policy, batch, 12, CONFIG, group_size=4, seed=3, batch_size=batch_size)
    assert_same(pieces, whole)
    assert pieces.num_forwards >= whole.num_forwards


def test_a_prompt_gives_the_same_samples_in_any_batch(ending_policy: LLaDA, batch: PromptBatch):
    whole = rollout_groups(ending_policy, batch, 12, CONFIG, group_size=2)
    alone = PromptBatch(
        prompt_ids=batch.prompt_ids[1:2, -5:],
        prompt_mask=batch.prompt_mask[1:2, -5:],
        problems=batch.problems[:1],
        positions=batch.positions[1:2],
    )
    assert_same(
        rollout_groups(ending_policy, alone, 12, CONFIG, group_size=2), whole.select(torch.tensor([2, 3]))
    )


def test_seed_and_position_decide_the_samples(ending_policy: LLaDA, batch: PromptBatch):
    first = rollout_groups(ending_policy, batch, 12, CONFIG)
    assert not torch.equal(rollout_groups(ending_policy, batch, 12, CONFIG, seed=1).seeds, first.seeds)
    batch.positions += 100
    moved = rollout_groups(ending_policy, batch, 12, CONFIG)
    assert not torch.isin(moved.seeds, first.seeds).any()


def test_progress_goes_from_the_first_block_to_the_end(policy: LLaDA, batch: PromptBatch):
    seen: list[tuple[int, int]] = []
    config = DenoiseConfig(block_length=4, threshold=None, steps=2)
    rollout_groups(policy, batch, 8, config, batch_size=2, on_progress=lambda *at: seen.append(at))
    # Two rows of two blocks of four positions, then the third: 8, 16, 20 and 24 of 24, for three rows.
    assert seen == [(2, 8), (5, 8), (6, 8), (8, 8)]
