import pytest
import torch

from drift.advantages import AdvantageConfig, group_advantages, groups_with_spread, refill_size, select_groups
from drift.contract import ConfigError


@pytest.mark.parametrize(
    ("rewards", "group_size", "expected"),
    [
        # Mean 0.5, sample std sqrt(0.5) = 0.7071: 0.5 / 0.7071.
        ([1.0, 0.0, 1.0, 1.0], 2, [0.7071, -0.7071, 0.0, 0.0]),
        # Mean 0.25, std sqrt((0.5625 + 3 * 0.0625) / 3) = 0.5: 0.75 / 0.5 and -0.25 / 0.5.
        ([1.0, 0.0, 0.0, 0.0], 4, [1.5, -0.5, -0.5, -0.5]),
        # Std 0.000707 is below the floor of 0.01: 0.0005 / 0.01.
        ([0.5, 0.501], 2, [-0.05, 0.05]),
        ([0.0] * 4, 4, [0.0] * 4),
        ([1.0] * 4, 2, [0.0] * 4),
        ([-1.0, 1.0, 3.0], 3, [-1.0, 0.0, 1.0]),
    ],
)
def test_group_advantages(rewards: list[float], group_size: int, expected: list[float]):
    found = group_advantages(torch.tensor(rewards), group_size)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize("reward", [0.1, 0.3, 0.7, 1e6 / 3])
def test_equal_rewards_are_exactly_0_where_their_mean_is_rounded(reward: float):
    assert (group_advantages(torch.full((8,), reward), 8) == 0).all()


def test_groups_do_not_see_each_other():
    rewards = torch.rand(12, generator=torch.Generator().manual_seed(0))
    found = group_advantages(rewards, 4)
    for group in range(3):
        rows = slice(4 * group, 4 * group + 4)
        torch.testing.assert_close(found[rows], group_advantages(rewards[rows], 4))
        assert abs(found[rows].sum().item()) < 1e-5


# Groups of two: 0 all wrong (10 timesteps), 1 all correct, 2 differs, 3 all wrong (30), 4 half the reward
# for both, 5 differs, 6 all wrong (20).
REWARDS = torch.tensor([0, 0, 1, 1, 0, 1, 0, 0, 0.5, 0.5, 1, 0, 0, 0])
TIMESTEPS = torch.tensor([10, 10, 5, 5, 9, 9, 20, 40, 8, 8, 2, 2, 15, 25])


@pytest.mark.parametrize(
    ("num_groups", "groups"),
    [
        (1, [2]),
        (2, [2, 5]),
        (3, [1, 2, 5]),  # then all correct, the highest reward first
        (4, [1, 2, 4, 5]),
        (5, [1, 2, 3, 4, 5]),  # then all wrong, the most timesteps first
        (6, [1, 2, 3, 4, 5, 6]),
        (7, [0, 1, 2, 3, 4, 5, 6]),
        (99, [0, 1, 2, 3, 4, 5, 6]),
    ],
)
def test_select_groups(num_groups: int, groups: list[int]):
    found = select_groups(REWARDS, TIMESTEPS, 2, num_groups)
    assert found.tolist() == [row for group in groups for row in (2 * group, 2 * group + 1)]


def test_groups_alike_are_taken_in_their_order():
    assert select_groups(torch.tensor([0, 1.0] * 4), torch.full((8,), 5), 2, 2).tolist() == [0, 1, 2, 3]


def test_groups_with_spread_are_those_whose_rewards_differ():
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    assert groups_with_spread(rewards, 3).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("num_useful", "num_seen", "size"),
    [
        (4, 8, 0),
        (5, 8, 0),
        (3, 8, 3),  # one is missing, 3 of 8 are useful: 8 / 3
        (2, 8, 8),  # two are missing: 2 * 8 / 2
        (1, 8, 8),  # three would take 24
        (0, 8, 8),  # nobody knows
        (3, 3, 1),
    ],
)
def test_a_refill_is_as_large_as_what_is_missing_makes_likely(num_useful: int, num_seen: int, size: int):
    assert refill_size(4, num_useful, num_seen, most=8) == size


def test_baselines_worked_by_hand():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    # First group: mean 1/3, sample standard deviation sqrt(1/3); the others of the first: (0 + 0) / 2.
    third = 1 / 3
    assert group_advantages(rewards, 3, AdvantageConfig("group_mean")).tolist() == pytest.approx(
        [2 * third, -third, -third, 0, 0, 0], abs=1e-6
    )
    assert group_advantages(rewards, 3, AdvantageConfig("leave_one_out")).tolist() == pytest.approx(
        [1, -0.5, -0.5, 0, 0, 0], abs=1e-6
    )
    assert group_advantages(rewards, 3, AdvantageConfig("group_std")).tolist() == pytest.approx(
        [2 * third / third**0.5, -(third**0.5), -(third**0.5), 0, 0, 0], abs=1e-6
    )


def test_without_a_baseline_the_reward_is_the_advantage():
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert group_advantages(rewards, 2, AdvantageConfig("none")).tolist() == [1, 0, 1, 1]


def test_an_unknown_baseline_is_refused():
    with pytest.raises(ConfigError, match=r"baseline is 'mean': choose one of"):
        AdvantageConfig("mean")
