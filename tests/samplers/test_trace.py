import math

import pytest
import torch
from torch import Tensor

from drift.contract import DRAWN, ConfigError, Rollout, TimestepPlan
from drift.samplers import FullSampler, StepSampler, TraceSampler

# Four timesteps of which the second committed padding alone: three candidates, 0, 2 and 3.
STEPS = [[0, 2, 2, 1, 3, 0]]
VALID = [[1, 1, 1, 0, 1, 1]]
PROBS = [[0.5, 0.5, 1.0, 0.9, 0.25, 0.5]]


def rollout(steps: list = STEPS, valid: list = VALID, probs: list | None = PROBS, num: int = 1) -> Rollout:
    step_map = torch.tensor(steps)
    source = Rollout(
        prompt_ids=torch.zeros(len(steps), 1, dtype=torch.int64),
        prompt_mask=torch.ones(len(steps), 1, dtype=torch.bool),
        completion_ids=torch.full_like(step_map, 5),
        completion_mask=torch.tensor(valid).bool(),
        step_map=step_map,
        token_probs=None if probs is None else torch.tensor(probs),
        seeds=torch.arange(len(steps)) + 7,
    )
    return source if num == 1 else source.select(torch.zeros(num, dtype=torch.int64))


def timesteps(plan: TimestepPlan, source: Rollout) -> Tensor:
    """[K,N] the timesteps of a plan, -1 where it has none."""
    return torch.where(plan.current, source.step_map, -1).amax(dim=2)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("importance", ["surprise", "uniform"])
def test_step_weights_are_unbiased_over_all_draws(k: int, importance: str):
    source = rollout(num=20_000)
    source.seeds = torch.arange(20_000)
    plan = StepSampler(k=k, importance=importance).plan(source)
    steps = timesteps(plan, source)
    # Summed -log p: 2 ln 2, ln 2 + 0 and ln 4 of timesteps 0, 2 and 3: 0.4, 0.2, 0.4 of the draws.
    chance = {"surprise": [0.4, 0.2, 0.4], "uniform": [1 / 3] * 3}[importance]
    num_states = (plan.weight > 0).sum(dim=0)
    for step, share in zip((0, 2, 3), chance, strict=True):
        drawn = ((steps == step) & (plan.weight > 0)).double()
        assert (drawn.sum(dim=0) <= 1).all(), "a timestep is one state"
        # Strata hold k * share draws on average; the mean over the states of weight is 1/3 of each
        # timestep's.
        mean = (drawn * plan.weight).sum(dim=0) / num_states
        five_errors = 5 * float(mean.std()) / math.sqrt(20_000)
        assert mean.mean().item() == pytest.approx(1 / 3, abs=five_errors + 1e-6)
        if k == 1:
            assert plan.weight[0, steps[0] == step].unique().tolist() == pytest.approx([1 / (3 * share)])
    assert plan.current_only
    assert plan.replay
    assert plan.num_timesteps is not None
    assert plan.num_timesteps[0] == 3


def test_step_draws_of_strata_worked_by_hand():
    # Uniform chances and three strata: each holds one timestep, whatever is drawn: full, with weights 1.
    plan = StepSampler(k=3, importance="uniform").plan(rollout())
    assert timesteps(plan, rollout()).T.tolist() == [[0, 2, 3]]
    assert plan.weight[:, 0].tolist() == pytest.approx([1.0, 1.0, 1.0])
    # Six strata: every timestep twice, which is one state of the same weight.
    plan = StepSampler(k=6, importance="uniform").plan(rollout())
    assert plan.weight[:3, 0].tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert (plan.weight[3:] == 0).all()


def test_a_step_of_certain_tokens_keeps_a_finite_weight():
    source = rollout([[0, 1]], [[1, 1]], [[1.0, 0.5]])
    plan = StepSampler(k=2).plan(source)
    assert torch.isfinite(plan.weight).all()
    assert timesteps(plan, source)[plan.weight > 0].tolist() == [1]


def test_a_steps_plan_is_its_rows_own():
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(0, 6, (8, 12), generator=generator)
    probs = torch.rand(8, 12, generator=generator).clamp(min=1e-3)
    source = rollout(steps.tolist(), [[1] * 12] * 8, probs.tolist())
    whole = StepSampler(k=3).plan(source)
    for row in range(8):
        alone = source.select(torch.tensor([row]))
        assert torch.equal(StepSampler(k=3).plan(alone).current[:, 0], whole.current[:3, row])
        assert torch.equal(StepSampler(k=3).plan(alone).weight[:, 0], whole.weight[:3, row])


def test_trace_without_shrinking_is_the_full_sampler_on_its_own_tokens():
    source = rollout([*STEPS, [1, 0, 0, 2, 2, 2], [0] * 6], [*VALID, [1] * 6, [0] * 6], None)
    plan, full = TraceSampler().plan(source), FullSampler().plan(source)
    assert torch.equal(plan.masked, full.masked)
    assert torch.equal(plan.current, full.current)
    assert torch.equal(plan.weight, full.weight)
    assert plan.replay
    assert plan.current_only
    assert plan.num_timesteps is not None
    assert plan.num_timesteps.tolist() == [3, 3, 0]


def test_shrunk_traces_worked_by_hand():
    source = rollout([*STEPS, [0, 1, 2, 3, 4, 4]], [*VALID, [1] * 6], None)
    plan = TraceSampler(shrink=2).plan(source)
    # Row 0: its first two candidates, 0 and 2, then 3. Row 1: 0 and 1, 2 and 3, 4.
    assert plan.masked.long().tolist() == [
        [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]],
        [[0, 0, 0, 0, 1, 0], [0, 0, 1, 1, 1, 1]],
        [[0] * 6, [0, 0, 0, 0, 1, 1]],
    ]
    assert plan.current.long().tolist() == [
        [[1, 1, 1, 0, 0, 1], [1, 1, 0, 0, 0, 0]],
        [[0, 0, 0, 0, 1, 0], [0, 0, 1, 1, 0, 0]],
        [[0] * 6, [0, 0, 0, 0, 1, 1]],
    ]
    assert plan.weight.tolist() == [[1, 1], [1, 1], [0, 1]]
    assert not plan.replay
    assert plan.num_timesteps is not None
    assert plan.num_timesteps.tolist() == [2, 3]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: StepSampler(k=0), "k is 0: set it to 1 or more"),
        (lambda: StepSampler(importance="entropy"), "importance is 'entropy': choose one of"),  # type: ignore[arg-type]
        (lambda: TraceSampler(shrink=0), "shrink is 0: set it to 1 or more"),
        (lambda: StepSampler().plan(rollout(probs=None)), "token_probs is missing"),
    ],
)
def test_what_cannot_work_is_refused(make, message: str):
    with pytest.raises(ConfigError, match=message):
        make()


def test_step_draws_timesteps_whose_draws_committed_padding_alone():
    source = rollout(num=4000)
    source.seeds = torch.arange(4000)
    step = StepSampler(k=1)
    assert not (timesteps(step.plan(source), source) == 1).any()
    source.commit_kind = torch.full_like(source.step_map, DRAWN)
    plan = step.plan(source)
    # -log p: 2 ln 2, ln 2 and ln 4 of timesteps 0, 2 and 3; a quarter of their mean over four of timestep 1.
    chance = torch.tensor([2, 0.25 * 5 / 4, 1, 2]) / (5 + 0.25 * 5 / 4)
    drawn = timesteps(plan, source)[0]
    share = torch.stack([(drawn == s).float().mean() for s in range(4)])
    assert share.tolist() == pytest.approx(chance.tolist(), abs=0.03)
    assert plan.weight[0].tolist() == pytest.approx((1 / (4 * chance[drawn])).tolist(), rel=1e-4)
