import math

import pytest
import torch

from drift.contract import Rollout
from drift.metrics import (
    RolloutMetrics,
    clustered_interval,
    correlation,
    difference_interval,
    pass_at_k,
    sign_test,
    wilson_interval,
)


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
    correct: list[bool], scores: list[list[float]], timesteps: list[int], valid: list[int]
) -> Rollout:
    ids = torch.zeros(len(correct), 8, dtype=torch.int64)
    return Rollout(
        prompt_ids=ids,
        prompt_mask=ids.bool(),
        completion_ids=ids,
        completion_mask=torch.arange(8) < torch.tensor(valid)[:, None],
        step_map=ids,
        num_timesteps=torch.tensor(timesteps),
        scores=torch.tensor(scores),
        rewards=torch.tensor(scores).sum(dim=1),
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


def test_every_part_of_the_reward_has_a_mean_of_its_own():
    metrics = RolloutMetrics(["math", "length"])
    metrics.update(FIRST)
    metrics.update(SECOND)
    found = metrics.compute()
    assert found["reward/math"].item() == pytest.approx((1.0 + 0.0 + 1.0) / 3)
    assert found["reward/length"].item() == pytest.approx((0.5 + 0.5 + 0.0) / 3)
    assert found["reward"].item() == pytest.approx(1.0)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_reset_and_nothing_seen():
    metrics = RolloutMetrics()
    metrics.update(FIRST)
    metrics.reset()
    found = metrics.compute()
    assert found["num"] == 0
    assert all(value.isfinite() for value in found.values())


@pytest.mark.parametrize(("num_correct", "num"), [(0, 10), (3, 10), (10, 10), (1, 1)])
def test_one_answer_a_prompt_has_wilsons_interval(num_correct: int, num: int):
    found = clustered_interval([1] * num_correct + [0] * (num - num_correct), 1)
    assert found == pytest.approx(wilson_interval(num_correct, num), abs=1e-12)


def test_answers_that_are_all_alike_count_once():
    # Four equal answers to each of 10 prompts say as much as one: 5 of 10.
    assert clustered_interval([4] * 5 + [0] * 5, 4) == pytest.approx(wilson_interval(5, 10))
    # All right: nothing says that the answers are independent.
    assert clustered_interval([4] * 10, 4) == pytest.approx(wilson_interval(10, 10))


def test_the_interval_of_clustered_answers():
    # Accuracies 1, 0.5, 0, 0.5 of 2 answers each: mean 0.5, variance 0.125; independent answers would have
    # 0.5 * 0.5 / 2 = 0.125: the design effect is 1, and 4 of 8 are right.
    assert clustered_interval([2, 1, 0, 1], 2) == pytest.approx(wilson_interval(4, 8))
    # Accuracies 1, 1, 0, 0.5: mean 0.625, variance (0.140625 * 2 + 0.390625 + 0.015625) / 4 = 0.171875;
    # independent answers: 0.234375 / 2 = 0.1171875. Design effect 1.46667, 8 / 1.46667 = 5.4545 answers.
    assert clustered_interval([2, 2, 0, 1], 2) == pytest.approx(wilson_interval(0.625 * 5.454545, 5.454545))
    # More even than chance: never more than the answers that there are.
    assert clustered_interval([1, 1, 1, 1], 2) == pytest.approx(wilson_interval(4, 8))


def test_the_interval_of_clustered_answers_covers_the_truth_as_often_as_it_says():
    """100 prompts with accuracies from Beta(0.6, 0.6), whose mean is 0.5, and 8 answers each."""
    torch.manual_seed(0)
    chances = torch.distributions.Beta(0.6, 0.6).sample((1000, 100))
    counts = torch.distributions.Binomial(8, chances).sample().int().tolist()
    covered, naive = 0, 0
    for prompts in counts:
        low, high = clustered_interval(prompts, 8)
        covered += low <= 0.5 <= high
        low, high = wilson_interval(sum(prompts), 800)
        naive += low <= 0.5 <= high
    # Standard error of the share of 1000: 0.007.
    assert covered / 1000 == pytest.approx(0.95, abs=0.02)
    assert naive / 1000 < 0.75


@pytest.mark.parametrize(
    ("num", "num_correct", "k", "expected"),
    [
        (4, 1, 1, 0.25),
        (4, 1, 2, 0.5),  # of 6 pairs 3 hold the one
        (4, 2, 2, 5 / 6),  # 1 of 6 pairs holds neither
        (5, 2, 3, 0.9),  # 1 of 10 triples holds neither
        (4, 0, 4, 0.0),
        (4, 4, 1, 1.0),
        (4, 1, 4, 1.0),
    ],
)
def test_pass_at_k(num: int, num_correct: int, k: int, expected: float):
    assert pass_at_k(num, num_correct, k) == pytest.approx(expected)


def test_pass_at_k_is_unbiased():
    """Over all outcomes of 6 answers, each right with 0.3: the mean is the chance that one of 3 is right."""
    chances = [math.comb(6, c) * 0.3**c * 0.7 ** (6 - c) for c in range(7)]
    mean = sum(chance * pass_at_k(6, c, 3) for c, chance in enumerate(chances))
    assert mean == pytest.approx(1 - 0.7**3)


def test_difference_interval_of_independent_shares():
    """Newcombe 1998, table II, example (a), method 10: 56/70 - 48/80 has 0.0524 to 0.3339."""
    shares = [(k / n, *wilson_interval(k, n)) for k, n in ((48, 80), (56, 70))]
    assert difference_interval(*shares) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_difference_interval_of_paired_shares():
    # 7 and 12 of 20 right, correlation 0.5: Wilson 0.18119 to 0.56715 and 0.38658 to 0.78119.
    # Below: 0.21342, 0.21715; sqrt(0.045548 - 0.046344 + 0.047154) = 0.21531.
    # Above: 0.18119, 0.16881; sqrt(0.032830 - 0.030587 + 0.028497) = 0.17533.
    shares = [(k / 20, *wilson_interval(k, 20)) for k in (7, 12)]
    low, high = difference_interval(*shares, 0.5)
    assert (low, high) == pytest.approx((0.25 - 0.21531, 0.25 + 0.17533), abs=5e-5)
    # What goes together says more of the difference.
    assert high - low < sum((-1) ** (1 - i) * end for i, end in enumerate(difference_interval(*shares)))


def test_correlation():
    assert correlation([0, 1, 1, 0], [0, 1, 1, 0]) == pytest.approx(1)
    # Means 0.5: products (-0.5)(-0.5) + 0.5 * 0.5 + 0.5 * (-0.5) + (-0.5) * 0.5 = 0.
    assert correlation([0, 1, 1, 0], [0, 1, 0, 1]) == pytest.approx(0)
    assert correlation([1, 1, 1], [0, 1, 0]) == 0


@pytest.mark.parametrize(
    ("better", "worse", "expected"),
    [(0, 0, 1.0), (5, 0, 2 / 32), (0, 5, 2 / 32), (3, 3, 1.0), (8, 2, 2 * (1 + 10 + 45) / 1024)],
)
def test_sign_test(better: int, worse: int, expected: float):
    assert sign_test(better, worse) == pytest.approx(expected)


def test_sign_test_of_many_prompts():
    # Far beyond a float's range of 2^n; a normal approximation: 2 * (1 - Phi(199 / sqrt(5000))) = 0.0049.
    assert sign_test(2600, 2400) == pytest.approx(0.0049, abs=2e-4)
