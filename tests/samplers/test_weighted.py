import math
from itertools import permutations
from types import ModuleType

import pytest
import torch
from torch import Tensor

from drift.contract import ConfigError, Rollout, TimestepPlan
from drift.samplers import UniformSampler, WeightedSampler

INF = math.inf
NUM = 4000


def rollout(
    step_map: list[list[int]], probs: list[list[float]] | None, valid: list[list[int]] | None = None
) -> Rollout:
    steps = torch.tensor(step_map)
    return Rollout(
        prompt_ids=torch.zeros(len(steps), 1, dtype=torch.int64),
        prompt_mask=torch.ones(len(steps), 1, dtype=torch.bool),
        completion_ids=torch.full_like(steps, 5),
        completion_mask=torch.ones_like(steps, dtype=torch.bool)
        if valid is None
        else torch.tensor(valid).bool(),
        step_map=steps,
        token_probs=None if probs is None else torch.tensor(probs),
    )


def chosen(plan: TimestepPlan, source: Rollout) -> Tensor:
    """[K,N] the timesteps of a plan, -1 where it has none."""
    return torch.where(plan.current, source.step_map, -1).amax(dim=2)


# Weights (minus the logs) 0.1054, 2.3026, 0.9163, 0.3567 of timesteps 0 to 3, which are not in order.
ROW = rollout([[3, 0, 2, 1]], [[0.7, 0.9, 0.4, 0.1]])
WEIGHTS = {0: -math.log(0.9), 1: -math.log(0.1), 2: -math.log(0.4), 3: -math.log(0.7)}


def many(source: Rollout, num: int = NUM) -> Rollout:
    return source.select(torch.zeros(num, dtype=torch.int64))


def test_weights_worked_by_hand():
    source = rollout(
        [[0, 0, 1, 1, 3, 3], [2, 2, 0, 1, 0, 3]],
        [[0.5, 0.25, 0.8, 0.0, 0.1, 0.1], [0.2, 0.5, 1.0, 0.0, 0.25, 0.0]],
        [[1, 1, 1, 0, 1, 1], [1, 1, 1, 0, 1, 0]],
    )
    expected = [
        # (ln 2 + ln 4) / 2 = 1.0397, -ln 0.8 = 0.2231 (the padding doesn't count), nobody, ln 10 = 2.3026
        [1.0397, 0.2231, -INF, 2.3026],
        # (0 + ln 4) / 2 = 0.6931, only padding, (ln 5 + ln 2) / 2 = 1.1513, only padding
        [0.6931, -INF, 1.1513, -INF],
    ]
    found = WeightedSampler().weights(source)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_weights_are_the_oracles(oracle: ModuleType, seed: int):
    generator = torch.Generator().manual_seed(seed)
    source = rollout(torch.randint(0, 6, (5, 12), generator=generator).tolist(), None)
    source.token_probs = torch.rand(5, 12, generator=generator).clamp(min=1e-3)
    source.completion_mask = torch.rand(5, 12, generator=generator) < 0.7
    found = WeightedSampler().weights(source)
    for row in range(5):
        expected = oracle.timestep_weights(
            source.step_map[row].tolist(),
            source.completion_mask[row].tolist(),
            source.token_probs[row].tolist(),
        )
        assert (found[row] > -INF).nonzero()[:, 0].tolist() == list(expected)
        assert found[row][list(expected)].tolist() == pytest.approx(list(expected.values()), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_draws_have_the_stated_probabilities(oracle: ModuleType, temperature: float, k: int):
    source = many(ROW)
    plan = WeightedSampler(k=k, temperature=temperature).plan(source, torch.Generator().manual_seed(1))
    steps = chosen(plan, source)
    assert (steps.T.sort(dim=1).values.diff(dim=1) > 0).all(), "drawn without replacement"
    counts = steps.flatten().bincount(minlength=4).double()
    expected = torch.tensor(list(oracle.inclusion_probabilities(WEIGHTS, temperature, k).values())).double()
    # 5 standard errors of a share of NUM rows.
    tolerance = 5 * (expected * (1 - expected) / NUM).sqrt() + 1e-9
    assert ((counts / NUM - expected).abs() <= tolerance).all()
    # The first draw follows the softmax itself: chi-square with 3 degrees of freedom, 0.999 quantile 16.3.
    softmax = torch.tensor(list(WEIGHTS.values())).double().div(temperature).softmax(dim=0) * NUM
    first = steps[0].bincount(minlength=4).double()
    assert ((first - softmax).square() / softmax).sum() < 16.3


def test_more_draws_than_timesteps_take_all_and_repeat_from_the_same_distribution():
    source = many(ROW)
    plan = WeightedSampler(k=7, temperature=1.0).plan(source, torch.Generator().manual_seed(2))
    steps = chosen(plan, source)
    assert torch.equal(steps[:4].sort(dim=0).values, torch.arange(4)[:, None].expand(-1, NUM))
    counts = steps[4:].flatten().bincount(minlength=4).double()
    softmax = torch.tensor(list(WEIGHTS.values())).double().softmax(dim=0) * 3 * NUM
    assert ((counts - softmax).square() / softmax).sum() < 16.3
    # Independent of each other and of the first draws: equal with probability sum p^2 = 0.0739^2 + 0.6649^2 +
    # 0.1662^2 + 0.0950^2 = 0.4842, standard error sqrt(0.25 / 4000) = 0.0079.
    for one, other in ((4, 5), (5, 6), (0, 4)):
        assert (steps[one] == steps[other]).double().mean().item() == pytest.approx(0.4842, abs=0.04)
    assert (plan.weight == 1).all()


@pytest.mark.parametrize(("k", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (6, [0, 1, 1, 1, 2, 3])])
def test_temperature_zero_takes_the_largest_and_repeats_the_largest(k: int, expected: list[int]):
    source = many(ROW, 50)
    plan = WeightedSampler(k=k, temperature=0.0).plan(source, torch.Generator().manual_seed(3))
    assert (chosen(plan, source).T.sort(dim=1).values == torch.tensor(expected)).all()


@pytest.mark.parametrize(
    ("sampler", "source"),
    [
        (WeightedSampler(k=2, temperature=INF), ROW),
        (UniformSampler(k=2), ROW),
        (UniformSampler(k=2), rollout([[3, 0, 2, 1]], None)),  # needs no probabilities
        (WeightedSampler(k=2, temperature=1.0), rollout([[3, 0, 2, 1]], [[0.3] * 4])),
        (WeightedSampler(k=2, temperature=0.0), rollout([[3, 0, 2, 1]], [[0.3] * 4])),
        (WeightedSampler(k=2, temperature=0.0), rollout([[3, 0, 2, 1]], [[0.3, 0.3 + 1e-9, 0.3, 0.3]])),
    ],
)
def test_uniform_where_the_temperature_or_the_weights_say_so(sampler: WeightedSampler, source: Rollout):
    source = many(source)
    steps = chosen(sampler.plan(source, torch.Generator().manual_seed(4)), source)
    assert (steps[0] != steps[1]).all()
    for draw in steps:  # 3 degrees of freedom, 0.999 quantile 16.3
        assert ((draw.bincount(minlength=4).double() - NUM / 4).square() / (NUM / 4)).sum() < 16.3


def test_a_row_has_weight_zero_only_where_nothing_was_committed():
    source = rollout(
        [[0, 0, 0], [0, 1, 1], [1, 1, 1]],
        [[0.5] * 3, [0.5, 0.2, 0.0], [0.0] * 3],
        [[1, 1, 1], [1, 1, 0], [0, 0, 0]],
    )
    plan = WeightedSampler(k=3).plan(source, torch.Generator().manual_seed(0))
    # A row with one timestep learns from it; a row without a valid token has nothing.
    assert plan.weight.T.tolist() == [[1.0] * 3, [1.0] * 3, [0.0] * 3]
    assert plan.masked[:, 0].all()
    assert not plan.masked[:, 2].any()
    assert not plan.current[:, 2].any()


@pytest.mark.parametrize(
    "sampler",
    [
        WeightedSampler(k=4),
        UniformSampler(k=4),
        WeightedSampler(k=8),
        WeightedSampler(k=3, importance_correction=True),
    ],
)
def test_seeds_make_a_rows_plan_its_own(sampler: WeightedSampler):
    generator = torch.Generator().manual_seed(0)
    source = rollout(torch.randint(0, 6, (8, 12), generator=generator).tolist(), None)
    source.token_probs = torch.rand(8, 12, generator=generator).clamp(min=1e-3)
    source.seeds = torch.arange(8) * 1000
    # Every row has the batch's last timestep, so that the number of draws a row is the same.
    source.step_map[:, 0] = 5
    whole = sampler.plan(source)
    order = torch.tensor([5, 2, 7])
    some = sampler.plan(source.select(order))
    assert torch.equal(some.masked, whole.masked[:, order])
    assert torch.equal(some.current, whole.current[:, order])
    assert torch.equal(some.weight, whole.weight[:, order])


def test_a_rows_plan_does_not_depend_on_how_long_its_neighbours_are():
    probs = [[0.5, 0.3, 0.6, 0.2], [0.9, 0.8, 0.7, 0.6]]
    both = rollout([[0, 1, 2, 2], [0, 1, 2, 3]], probs)
    both.seeds = torch.tensor([11, 12])
    alone = both.select(torch.tensor([0]))
    for k in (1, 2, 3, 6):
        sampler = WeightedSampler(k=k)
        assert torch.equal(sampler.plan(both).masked[:, :1], sampler.plan(alone).masked), k


def test_a_generator_goes_before_the_seeds():
    source = many(ROW, 20)
    source.seeds = torch.zeros(20, dtype=torch.int64)
    same = chosen(WeightedSampler(k=2).plan(source), source)
    assert (same == same[:, :1]).all()
    drawn = [
        chosen(WeightedSampler(k=2).plan(source, torch.Generator().manual_seed(s)), source) for s in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not (drawn[0] == drawn[0][:, :1]).all()


@pytest.mark.parametrize("probs", [None, [[0.7, 0.9, 0.2, 0.1], [0.0, 0.0, 0.0, 0.0]]])
def test_probabilities_that_were_not_recorded_are_refused(probs: list | None):
    source = rollout([[3, 0, 2, 1]] * 2, probs)
    with pytest.raises(ConfigError, match=r"token_probs is missing, or 0 at all valid.*use UniformSampler"):
        WeightedSampler().plan(source)
    UniformSampler().plan(source)


@pytest.mark.parametrize("k", [0, -2])
@pytest.mark.parametrize("sampler", [WeightedSampler, UniformSampler])
def test_a_k_below_one_is_refused(sampler: type, k: int):
    with pytest.raises(ConfigError, match=f"k is {k}: set it to 1 or more timesteps"):
        sampler(k=k)


@pytest.mark.parametrize("temperature", [-1.0, math.nan])
def test_a_temperature_below_zero_is_refused(temperature: float):
    with pytest.raises(ConfigError, match=f"temperature is {temperature}: set it to 0"):
        WeightedSampler(temperature=temperature)


def test_a_probability_that_underflowed_is_the_smallest_not_a_missing_one():
    # Row 0: -ln(1e-10) = 23.026 at timestep 2. Row 1 has no valid token, hence nothing to record.
    source = rollout([[3, 0, 2, 1]] * 2, [[0.5, 0.5, 0.0, 0.5], [0.0] * 4], [[1, 1, 1, 1], [0, 0, 0, 0]])
    found = WeightedSampler().weights(source)
    torch.testing.assert_close(found[0], torch.tensor([0.6931, 0.6931, 23.0259, 0.6931]), rtol=0, atol=1e-4)
    assert (found[1] == -torch.inf).all()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0, INF])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 6])
def test_corrected_means_over_the_draws_are_unbiased(temperature: float, k: int):
    source = many(ROW)
    sampler = WeightedSampler(k=k, temperature=temperature, importance_correction=True)
    plan = sampler.plan(source, torch.Generator().manual_seed(5))
    steps, num = chosen(plan, source), min(k, 4)
    assert ((plan.weight > 0).sum(dim=0) == num).all(), "nothing is drawn twice"
    weight = [plan.weight[steps == step].unique() for step in range(4)]
    assert all(len(found) == 1 for found in weight), "a timestep's weight depends on itself alone"
    values = [3.0, -1.0, 0.5, 8.0]
    # Every order of draws, with its probability: the expected estimate is the mean of all four values, 2.625.
    mass = {step: math.exp(WEIGHTS[step] / temperature) for step in range(4)}
    expected = 0.0
    for order in permutations(range(4), num):
        left = [sum(mass.values()) - sum(mass[step] for step in order[:place]) for place in range(num)]
        chance = math.prod(mass[step] / rest for step, rest in zip(order, left, strict=True))
        expected += chance * sum(weight[step].item() * values[step] for step in order) / num
    assert expected == pytest.approx(2.625, rel=1e-5)
    if temperature == INF:
        torch.testing.assert_close(torch.cat(weight), torch.ones(4))


def test_a_chance_beyond_all_use_keeps_a_finite_weight():
    source = rollout([[0, 1]], [[1.0, 1e-10]])
    # Weights 0 and 23.03 at temperature 0.1 are 230 apart, of which 30 are kept.
    plan = WeightedSampler(k=1, temperature=0.1, importance_correction=True).plan(source)
    assert chosen(plan, source).tolist() == [[1]]
    assert plan.weight.tolist() == [[0.5]]  # one draw of two timesteps, certain: 1 / (2 * 1)
    assert torch.isfinite(plan.weight).all()


def test_a_correction_without_chances_is_refused():
    with pytest.raises(ConfigError, match="importance_correction is True with a temperature of 0"):
        WeightedSampler(temperature=0.0, importance_correction=True)


def test_plans_say_how_many_timesteps_they_stand_for():
    source = rollout([[0, 0, 1, 3], [1, 1, 1, 0]], [[0.5] * 4] * 2, [[1, 1, 1, 1], [1, 1, 1, 0]])
    plan = WeightedSampler(k=2).plan(source)
    assert plan.num_timesteps is not None
    assert plan.num_timesteps.tolist() == [3, 1]  # row 1's timestep 0 committed padding alone
