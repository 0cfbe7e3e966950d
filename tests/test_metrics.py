import pytest
import torch

from drift.contract import Rollout
from drift.metrics import RolloutMetrics, wilson_interval


@pytest.mark.parametrize(
    ("num_correct", "num", "expected"),
    [
        # z^2 = 3.8415: (0.5 + 0.19207) / 1.38415 = 0.5, 1.95996 / 1.38415 * sqrt(0.025 + 0.0096) = 0.26341.
        (5, 10, (0.23659, 0.76341)),
        # Centre and half width are both (z^2 / 2n) / (1 + z^2 / n) = 0.19207 / 1.38415 = 0.13877.
        (0, 10, (0.0, 0.27753)),
        (10, 10, (0.72247, 1.0)),
        # (0.81 + 0.01921) / 1.03841 = 0.79853; 1.88746 * sqrt(0.001539 + 0.000096) = 0.07632.
        (81, 100, (0.72222, 0.87485)),
        (1, 1, (0.20655, 1.0)),
    ],
)
def test_wilson_interval(num_correct: int, num: int, expected: tuple[float, float]):
    assert wilson_interval(num_correct, num) == pytest.approx(expected, abs=2e-5)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """p = 0.9 and 50 trials: the chance that the interval holds p, summed over all outcomes, is near 0.95."""
    outcomes = torch.distributions.Binomial(50, torch.tensor(0.9, dtype=torch.float64))
    covered = 0.0
    for k in range(51):
        low, high = wilson_interval(k, 50)
        covered += outcomes.log_prob(torch.tensor(float(k))).exp().item() * (low <= 0.9 <= high)
    assert covered == pytest.approx(0.95, abs=0.025)


def rollout(
    correct: list[bool], rewards: list[list[float]], timesteps: list[int], valid: list[int]
) -> Rollout:
    ids = torch.zeros(len(correct), 8, dtype=torch.int64)
    return Rollout(
        prompt_ids=ids,
        prompt_mask=ids.bool(),
        completion_ids=ids,
        completion_mask=torch.arange(8) < torch.tensor(valid)[:, None],
        step_map=ids,
        num_timesteps=torch.tensor(timesteps),
        rewards=torch.tensor(rewards),
        correct=torch.tensor(correct),
    )


FIRST = rollout([True, False], [[1.0, 0.5], [0.0, 0.5]], [4, 2], [8, 4])
SECOND = rollout([True], [[1.0, 0.0]], [4], [3])


def test_sums_over_everything_seen():
    metrics = RolloutMetrics()
    metrics.update(FIRST)
    metrics.update(SECOND)
    found = {name: value.item() for name, value in metrics.compute().items()}
    low, high = wilson_interval(2, 3)
    assert found == pytest.approx(
        {
            "accuracy": 2 / 3,
            "accuracy_low": low,
            "accuracy_high": high,
            "reward": (1.5 + 0.5 + 1.0) / 3,
            "timesteps": 10 / 3,
            "tokens_per_forward": (8 + 4 + 3) / 10,
            "num": 3.0,
        },
        rel=1e-6,
    )


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_reset_and_nothing_seen():
    metrics = RolloutMetrics()
    metrics.update(FIRST)
    metrics.reset()
    found = metrics.compute()
    assert found["num"] == 0
    assert all(value.isfinite() for value in found.values())
