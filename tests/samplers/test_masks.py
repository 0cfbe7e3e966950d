import pytest
import torch

from drift.contract import ConfigError, Rollout
from drift.samplers import AllMaskSampler, CoupledMaskSampler, RandomMaskSampler

NUM_VALID = (10, 3, 1, 0)


@pytest.fixture
def rollout() -> Rollout:
    valid = torch.arange(10) < torch.tensor(NUM_VALID)[:, None]
    return Rollout(
        prompt_ids=torch.zeros(4, 1, dtype=torch.int64),
        prompt_mask=torch.ones(4, 1, dtype=torch.bool),
        completion_ids=torch.full((4, 10), 5),
        completion_mask=valid,
        step_map=torch.zeros(4, 10, dtype=torch.int64),
        seeds=torch.arange(4),
    )


@pytest.mark.parametrize(
    ("ratio", "expected"),
    # floor(ratio * valid), at least one where there is any
    [(0.05, [1, 1, 1, 0]), (0.3, [3, 1, 1, 0]), (0.75, [7, 2, 1, 0]), (1.0, [10, 3, 1, 0])],
)
def test_random_masks_cover_their_share_of_the_valid_tokens(
    rollout: Rollout, ratio: float, expected: list[int]
):
    plan = RandomMaskSampler(k=5, ratio=ratio).plan(rollout)
    assert plan.masked.sum(dim=2).tolist() == [expected] * 5
    assert not (plan.masked & ~rollout.completion_mask).any()
    assert torch.equal(plan.masked, plan.current)
    assert plan.weight.tolist() == [[1.0, 1.0, 1.0, 0.0]] * 5


def test_random_masks_are_uniform_and_independent(rollout: Rollout):
    many = rollout.select(torch.zeros(2000, dtype=torch.int64))
    masked = RandomMaskSampler(k=2, ratio=0.3).plan(many, torch.Generator().manual_seed(0)).masked
    # 3 of 10: every position in 0.3 of the masks, standard error sqrt(0.3 * 0.7 / 2000) = 0.0102.
    torch.testing.assert_close(masked.float().mean(dim=1), torch.full((2, 10), 0.3), rtol=0, atol=0.051)
    # Two masks share a position with probability 0.09, standard error sqrt(0.09 * 0.91 / 20000) = 0.002.
    assert abs((masked[0] & masked[1]).float().mean().item() - 0.09) < 0.01


def test_coupled_masks_are_complements(rollout: Rollout):
    plan = CoupledMaskSampler().plan(rollout)
    assert torch.equal(plan.masked[0] ^ plan.masked[1], rollout.completion_mask)
    # The second covers half, rounded down and at least one, the first the rest.
    assert plan.masked.sum(dim=2).tolist() == [[5, 2, 0, 0], [5, 1, 1, 0]]
    assert plan.weight.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]


def test_coupled_halves_are_random(rollout: Rollout):
    many = rollout.select(torch.zeros(2000, dtype=torch.int64))
    masked = CoupledMaskSampler().plan(many, torch.Generator().manual_seed(0)).masked
    # Standard error sqrt(0.25 / 2000) = 0.0112.
    torch.testing.assert_close(masked.float().mean(dim=1), torch.full((2, 10), 0.5), rtol=0, atol=0.056)


def test_all_masks_everything_valid_once(rollout: Rollout):
    plan = AllMaskSampler().plan(rollout)
    assert torch.equal(plan.masked, rollout.completion_mask[None])
    assert torch.equal(plan.current, plan.masked)
    assert plan.weight.tolist() == [[1.0, 1.0, 1.0, 0.0]]


@pytest.mark.parametrize("sampler", [RandomMaskSampler(k=3), CoupledMaskSampler()])
def test_seeds_make_a_rows_masks_its_own(rollout: Rollout, sampler: RandomMaskSampler):
    rows = torch.tensor([2, 0])
    assert torch.equal(sampler.plan(rollout.select(rows)).masked, sampler.plan(rollout).masked[:, rows])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, r"k is 0: set it to 1 or more"),
        ({"ratio": 0.0}, r"ratio is 0.0: set it in \(0, 1\]"),
        ({"ratio": 1.2}, r"ratio is 1.2: set it in \(0, 1\]"),
        ({"ratio": float("nan")}, r"ratio is nan: set it in \(0, 1\]"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        RandomMaskSampler(**settings)
