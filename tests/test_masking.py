from types import ModuleType

import pytest
import torch

from drift.contract import CERTAIN, DRAWN, SUREST, Rollout, TimestepPlan
from drift.masking import masked_batch
from drift.samplers import (
    AllMaskSampler,
    CoupledMaskSampler,
    FullSampler,
    RandomMaskSampler,
    TimestepSampler,
    UniformSampler,
)

MASK = 1


def random_rollout(seed: int, num: int = 5, length: int = 10) -> Rollout:
    generator = torch.Generator().manual_seed(seed)
    completion = torch.randint(2, 48, (num, length), generator=generator)
    valid = torch.rand(num, length, generator=generator) < 0.8
    return Rollout(
        prompt_ids=torch.randint(2, 48, (num, 4), generator=generator),
        prompt_mask=torch.arange(4) >= torch.randint(0, 4, (num, 1), generator=generator),
        completion_ids=completion.masked_fill(~valid, 0),
        completion_mask=valid,
        step_map=torch.randint(0, 5, (num, length), generator=generator),
        advantages=torch.randn(num, generator=generator),
    )


def test_worked_by_hand():
    rollout = Rollout(
        prompt_ids=torch.tensor([[0, 7], [8, 9]]),
        prompt_mask=torch.tensor([[False, True], [True, True]]),
        completion_ids=torch.tensor([[10, 11, 0], [12, 13, 14]]),
        completion_mask=torch.tensor([[True, True, False], [True, True, True]]),
        step_map=torch.tensor([[0, 1, 1], [2, 0, 1]]),
        advantages=torch.tensor([0.5, -0.5]),
    )
    batch = masked_batch(rollout, FullSampler().plan(rollout), MASK)
    # Slots 0 and 1 of both rows, slot 2 of the second; the padding of row 0 is masked, but never scored.
    assert (batch.slot.tolist(), batch.row.tolist()) == ([0, 0, 1, 1, 2], [0, 1, 0, 1, 1])
    assert batch.input_ids.tolist() == [
        [0, 7, 1, 1, 1],
        [8, 9, 1, 1, 1],
        [0, 7, 10, 1, 1],
        [8, 9, 1, 13, 1],
        [8, 9, 1, 13, 14],
    ]
    assert batch.attention_mask.long().tolist() == [
        [0, 1, 1, 1, 1],
        [1] * 5,
        [0, 1, 1, 1, 1],
        [1] * 5,
        [1] * 5,
    ]
    assert batch.scored.long().tolist() == [[1, 1, 0], [1, 1, 1], [0, 1, 0], [1, 0, 1], [1, 0, 0]]
    assert batch.current.long().tolist() == [[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert batch.advantages.tolist() == [0.5, -0.5, 0.5, -0.5, -0.5]
    assert batch.row_share.tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 2, 1 / 3, 1 / 3])
    assert batch.num_slots == 3
    assert len(batch) == 5


@pytest.mark.parametrize("seed", range(4))
def test_noisy_states_are_the_oracles(oracle: ModuleType, seed: int):
    rollout = random_rollout(seed)
    plan = UniformSampler(k=3).plan(rollout, torch.Generator().manual_seed(seed))
    batch = masked_batch(rollout, plan, MASK)
    for i in range(len(batch)):
        row = int(batch.row[i])
        steps = rollout.step_map[row]
        timestep = int(steps[plan.current[batch.slot[i], row]][0])
        valid = rollout.completion_mask[row]
        state, masked, current = oracle.noisy_state(
            rollout.completion_ids[row].tolist(), steps.tolist(), timestep, MASK
        )
        assert batch.input_ids[i].tolist() == rollout.prompt_ids[row].tolist() + state
        assert batch.scored[i].tolist() == (torch.tensor(masked) & valid).tolist()
        assert batch.current[i].tolist() == (torch.tensor(current) & valid).tolist()
        assert torch.equal(batch.targets[i], rollout.completion_ids[row])


def test_slots_of_weight_zero_and_rows_left_out_are_no_states():
    rollout = random_rollout(0)
    masked = torch.ones(2, 5, 10, dtype=torch.bool)
    weight = torch.tensor([[1.0, 0, 1, 1, 0], [1, 1, 0, 1, 0]])
    plan = TimestepPlan(masked=masked, current=masked, weight=weight)
    batch = masked_batch(rollout, plan, MASK, rows=torch.tensor([True, True, True, False, True]))
    assert list(zip(batch.slot.tolist(), batch.row.tolist(), strict=True)) == [(0, 0), (0, 2), (1, 0), (1, 1)]
    assert batch.row_share.tolist() == [0.5, 1.0, 0.5, 1.0]
    assert batch.num_slots == 2


def test_draws_of_rows_that_are_left_out_do_not_count():
    """A plan of all timesteps is as long as its longest row; without that row, its draws would dilute."""
    rollout = random_rollout(0)
    masked = torch.ones(3, 5, 10, dtype=torch.bool)
    weight = torch.tensor([[1.0, 1, 1, 1, 1], [0, 1, 0, 1, 0], [0, 0, 0, 1, 0]])
    plan = TimestepPlan(masked=masked, current=masked, weight=weight)
    for left_out, num_slots in (((), 3), ((3,), 2), ((1, 3), 1), ((0, 1, 2, 3, 4), 0)):
        rows = torch.tensor([row not in left_out for row in range(5)])
        assert masked_batch(rollout, plan, MASK, rows=rows).num_slots == num_slots


def test_the_rollouts_probabilities_stand_at_the_current_tokens():
    rollout = random_rollout(0)
    rollout.commit_probs = torch.rand(5, 10, generator=torch.Generator().manual_seed(1))
    rollout.commit_probs[~rollout.completion_mask] = 0.0  # never decoded: no logarithm of it must show
    batch = masked_batch(rollout, FullSampler().plan(rollout), MASK)
    assert batch.current.any()
    for state, row in enumerate(batch.row.tolist()):
        for position, current in enumerate(batch.current[state].tolist()):
            expected = rollout.commit_probs[row, position].log().item() if current else 0.0
            assert batch.commit_logp[state, position].item() == pytest.approx(expected)
    some = batch.select(torch.tensor([3, 0]))
    assert torch.equal(some.commit_logp, batch.commit_logp[[3, 0]])


@pytest.mark.parametrize("sampler", [RandomMaskSampler(), CoupledMaskSampler(), AllMaskSampler()])
def test_states_that_the_policy_never_saw_come_without_them(sampler: TimestepSampler):
    rollout = random_rollout(0)
    rollout.commit_probs = torch.full((5, 10), 0.5)
    assert masked_batch(rollout, FullSampler().plan(rollout), MASK).commit_logp is not None
    assert masked_batch(rollout, sampler.plan(rollout), MASK).commit_logp is None


def test_without_the_rollouts_probabilities_there_are_none():
    rollout = random_rollout(0)
    assert masked_batch(rollout, FullSampler().plan(rollout), MASK).commit_logp is None


def test_without_advantages_they_are_zero():
    rollout = random_rollout(0)
    rollout.advantages = None
    assert (masked_batch(rollout, FullSampler().plan(rollout), MASK).advantages == 0).all()


def test_nothing_to_learn_from_is_an_empty_batch():
    rollout = random_rollout(0)
    rollout.completion_mask[:] = False
    batch = masked_batch(rollout, FullSampler().plan(rollout), MASK)
    assert len(batch) == 0
    assert batch.input_ids.shape == (0, 14)


def test_select_takes_states():
    rollout = random_rollout(1)
    batch = masked_batch(rollout, FullSampler().plan(rollout), MASK)
    some = batch.select(torch.tensor([3, 0]))
    assert torch.equal(some.input_ids, batch.input_ids[[3, 0]])
    assert torch.equal(some.row, batch.row[[3, 0]])
    assert some.num_slots == batch.num_slots


def test_what_draws_decided_worked_by_hand():
    """Blocks of three: draws, the surest alone, draws that end the block, then a timestep by rule."""
    rollout = Rollout(
        prompt_ids=torch.tensor([[7]]),
        prompt_mask=torch.ones(1, 1, dtype=torch.bool),
        completion_ids=torch.tensor([[10, 11, 12, 13, 0, 14]]),
        completion_mask=torch.tensor([[True, True, True, True, False, True]]),
        step_map=torch.tensor([[0, 2, 1, 3, 4, 4]]),
        commit_kind=torch.tensor([[DRAWN, DRAWN, SUREST, CERTAIN, DRAWN, DRAWN]]),
        commit_rule=torch.tensor([[0.9, 0.05]]),
        block_length=3,
    )
    batch = masked_batch(rollout, FullSampler().plan(rollout), MASK, current_only=True)
    assert batch.decision is not None
    assert batch.decision.tolist() == [
        [1, -1, -1, 0, 0, 0],  # one of three commits
        [0, -1, 0, 0, 0, 0],  # the surest commits whatever its draw says, where no other does
        [0, 1, 0, 0, 0, 0],  # the last of the block
        [0, 0, 0, 0, 0, 0],  # by rule: nothing was drawn
        [0, 0, 0, 0, 1, 1],  # padding is drawn like anything else
    ]
    assert batch.scored.long().tolist()[4] == [0, 0, 0, 0, 0, 1]
    assert batch.commit_rule is not None
    assert batch.commit_rule.tolist() == [[pytest.approx(0.9), pytest.approx(0.05)]] * 5
    assert batch.num_timesteps is not None
    assert batch.num_timesteps.tolist() == [5] * 5
    # A noisy state of another kind is not where anything was drawn.
    assert masked_batch(rollout, AllMaskSampler().plan(rollout), MASK).decision is None
