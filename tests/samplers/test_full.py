import torch

from drift.contract import CERTAIN, DRAWN, SUREST, Rollout
from drift.samplers import FullSampler, ProportionalSampler, TraceSampler, WeightedSampler


def rollout(step_map: list[list[int]], valid: list[list[int]]) -> Rollout:
    steps = torch.tensor(step_map)
    return Rollout(
        prompt_ids=torch.zeros(len(steps), 1, dtype=torch.int64),
        prompt_mask=torch.ones(len(steps), 1, dtype=torch.bool),
        completion_ids=torch.full_like(steps, 5),
        completion_mask=torch.tensor(valid).bool(),
        step_map=steps,
    )


def test_every_timestep_that_committed_a_valid_token_once_and_in_order():
    source = rollout(
        [[2, 0, 1, 1, 3], [0, 0, 1, 2, 2], [1, 1, 1, 1, 1]],
        [[1, 1, 0, 0, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]],
    )
    plan = FullSampler().plan(source)
    # Row 0: timestep 1 committed padding only; row 1: timestep 2 as well; row 2 has no valid token.
    assert plan.weight.tolist() == [[1, 1, 0], [1, 1, 0], [1, 0, 0]]
    assert plan.current.long().tolist() == [
        [[0, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0] * 5],
        [[1, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0] * 5],
        [[0, 0, 0, 0, 1], [0] * 5, [0] * 5],
    ]
    # Padding is masked like everything else that came at or after the timestep.
    assert plan.masked.long().tolist() == [
        [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0] * 5],
        [[1, 0, 0, 0, 1], [0, 0, 1, 1, 1], [0] * 5],
        [[0, 0, 0, 0, 1], [0] * 5, [0] * 5],
    ]


def test_nothing_valid_at_all():
    plan = FullSampler().plan(rollout([[0, 0]], [[0, 0]]))
    assert plan.weight.tolist() == [[0.0]]
    assert not plan.masked.any()


def test_current_covers_every_valid_token_exactly_once():
    generator = torch.Generator().manual_seed(0)
    source = rollout(torch.randint(0, 7, (6, 20), generator=generator).tolist(), [[1] * 20] * 6)
    source.completion_mask = torch.rand(6, 20, generator=generator) < 0.6
    plan = FullSampler().plan(source)
    assert torch.equal(
        plan.current.sum(dim=0)[source.completion_mask], torch.ones(source.completion_mask.sum()).long()
    )


def test_draws_of_commits_count_where_padding_alone_is_committed():
    source = rollout([[1, 0, 2], [1, 0, 2]], [[1, 0, 0], [1, 0, 0]])
    assert FullSampler().plan(source).weight.tolist() == [[1, 1]]
    source.commit_kind = torch.tensor([[DRAWN, DRAWN, SUREST], [CERTAIN, CERTAIN, CERTAIN]])
    plan = FullSampler().plan(source)
    assert plan.weight.tolist() == [[1, 1], [1, 0], [1, 0]]
    assert plan.num_timesteps.tolist() == [3, 1]
    source.token_probs = torch.full((2, 3), 0.5)
    for sampler in (WeightedSampler(3, importance_correction=True), TraceSampler()):
        assert (sampler.plan(source).weight > 0).sum(dim=0).tolist() == [3, 1], type(sampler)
    assert (ProportionalSampler().sizes(source) > 0).sum(dim=1).tolist() == [3, 1]
