from itertools import combinations

import pytest
import torch
from torch import Tensor

from drift.contract import ConfigError, Rollout, TimestepPlan
from drift.samplers import CoupledElboSampler, QuadratureElboSampler, SandwichedSampler, TimestepSampler

NUM_VALID = (4, 1, 0, 6)
SAMPLERS = [
    CoupledElboSampler(k=1),
    CoupledElboSampler(k=3),
    QuadratureElboSampler(k=2),
    SandwichedSampler(k=3),
    SandwichedSampler(k=3, block_length=2),
]


def rollout(num_valid: tuple[int, ...] = NUM_VALID, copies: int = 1) -> Rollout:
    valid = torch.arange(6) < torch.tensor(num_valid).repeat_interleave(copies)[:, None]
    return Rollout(
        prompt_ids=torch.zeros(len(valid), 1, dtype=torch.int64),
        prompt_mask=torch.ones(len(valid), 1, dtype=torch.bool),
        completion_ids=torch.full((len(valid), 6), 5),
        completion_mask=valid,
        step_map=torch.zeros(len(valid), 6, dtype=torch.int64),
        seeds=torch.arange(len(valid)),
    )


def token_values(masked: Tensor) -> Tensor:
    """[...,C] made-up log-probabilities of the masked tokens, which depend on what else is masked."""
    size = masked.sum(dim=-1, keepdim=True)
    return (-0.3 * torch.arange(1.0, 7.0) * size**1.5 - 0.7 * masked[..., :1].float()) * masked


def estimates(plan: TimestepPlan) -> Tensor:
    """[N] float64, each row's mean over its states of weight times the sum of the masked tokens' values."""
    num_states = (plan.weight > 0).sum(dim=0).clamp(min=1)
    return (plan.weight.double() * token_values(plan.masked).sum(dim=2)).sum(dim=0) / num_states


def elbo_per_token(num_valid: int) -> float:
    """By every mask: over sizes, over the masks of a size, over the masked tokens the mean of means."""
    of_sizes = []
    for size in range(1, num_valid + 1):
        found = []
        for chosen in combinations(range(num_valid), size):
            masked = torch.zeros(6, dtype=torch.bool)
            masked[list(chosen)] = True
            found.append(token_values(masked).sum().item() / size)
        of_sizes.append(sum(found) / len(found))
    return sum(of_sizes) / num_valid


@pytest.mark.parametrize(
    "sampler", [CoupledElboSampler(k=1), CoupledElboSampler(k=3), SandwichedSampler(k=2)]
)
@pytest.mark.parametrize("num_valid", [1, 3, 4])
def test_random_masks_are_unbiased_for_the_lower_bound(sampler: TimestepSampler, num_valid: int):
    found = estimates(sampler.plan(rollout((num_valid,), copies=20_000)))
    error = max(found.std().item() / 20_000**0.5, 1e-6)
    assert found.mean().item() == pytest.approx(elbo_per_token(num_valid), abs=5 * error)


def test_quadrature_is_exact_for_what_is_smooth_in_the_share_of_masks():
    # 3 points are exact to the fifth power of t. With 6 tokens, t = 0.1127, 0.5, 0.8873 mask 1, 3 and 5 of
    # them.
    plan = QuadratureElboSampler(k=3).plan(rollout())
    assert plan.masked.sum(dim=2).T.tolist() == [[1, 2, 4], [1, 1, 1], [0, 0, 0], [1, 3, 5]]
    # Weights 5/18, 8/18, 5/18 over the number of masked tokens; times the row's 3 states.
    expected = torch.tensor([5 / 6, 8 / 18, 5 / 30])
    torch.testing.assert_close(plan.weight[:, 3], expected)
    assert plan.sequence is not None
    assert plan.sequence.whole_ratio


def test_coupled_masks_are_complements_and_cover_every_token():
    plan = CoupledElboSampler(k=3).plan(rollout())
    for mask, rest in zip(plan.masked[:3], plan.masked[3:], strict=True):
        assert torch.equal(mask ^ rest, rollout().completion_mask)
    # (L + 1) / (2 k l L) of each token, times the row's states, of which those without a masked token are
    # none.
    for row, length in ((0, 4), (3, 6)):
        states = int((plan.weight[:, row] > 0).sum())
        for masked, weight in zip(plan.masked[:, row], plan.weight[:, row], strict=True):
            size = int(masked.sum())
            expected = 0.0 if size == 0 else states * (length + 1) / (6 * size * length)
            assert weight.item() == pytest.approx(expected)


def test_the_numbers_of_masked_tokens_of_a_rows_pairs_are_spread():
    plan = CoupledElboSampler(k=7).plan(rollout((6,)))
    assert sorted(plan.masked[:7, 0].sum(dim=1).tolist()) == [0, 1, 2, 3, 4, 5, 6]


def test_block_masks_leave_the_past_clean_and_the_future_masked():
    source = rollout((5,), copies=300)
    plan = SandwichedSampler(k=3, block_length=2).plan(source)
    blocks = set()
    for masked in plan.masked.transpose(0, 1).flatten(0, 1):
        first = masked.long().argmax().item() // 2
        assert masked[5] == 0, "padding is not masked"
        assert masked[2 * first + 2 : 5].all()
        assert masked[2 * first : 2 * first + 2].any()
        blocks.add(first)
    assert blocks == {0, 1, 2}
    # Three masks of a row and three blocks: each block once.
    first = plan.masked.long().argmax(dim=2) // 2
    assert (first.sort(dim=0).values == torch.tensor([[0], [1], [2]])).all()
    # Of each row the mean over the tokens of a mask, and over masks.
    torch.testing.assert_close(plan.weight, 1.0 / plan.masked.sum(dim=2))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_seeds_make_a_rows_masks_its_own(sampler: TimestepSampler):
    rows = torch.tensor([3, 0, 2])
    some, whole = sampler.plan(rollout().select(rows)), sampler.plan(rollout())
    assert torch.equal(some.masked, whole.masked[:, rows])
    assert torch.equal(some.weight, whole.weight[:, rows])
    assert not whole.replay
    assert (whole.weight[:, 2] == 0).all()


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (CoupledElboSampler, {"k": 0}, "k is 0"),
        (QuadratureElboSampler, {"k": 0}, "k is 0"),
        (SandwichedSampler, {"k": 0}, "k is 0"),
        (SandwichedSampler, {"beta": 0.5}, "beta is 0.5: set it to 1 or more"),
        (SandwichedSampler, {"omega": 1.5}, r"omega is 1.5: set it in \[0, 1\]"),
        (SandwichedSampler, {"block_length": 0}, "block_length is 0: set it to 1 or more"),
    ],
)
def test_settings_out_of_range_are_refused(kind: type, settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        kind(**settings)
