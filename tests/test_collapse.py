import pytest
import torch

from drift.collapse import BUCKETS, CollapseMetrics, tokens_at_once
from drift.contract import Rollout


def rollout(
    steps: list[list[int]], valid: list[int], rewards: list[list[float]], correct: list[bool], probs=None
) -> Rollout:
    """Rows of which the first `valid` tokens are neither padding nor mask."""
    step_map = torch.tensor(steps)
    return Rollout(
        prompt_ids=step_map,
        prompt_mask=step_map >= 0,
        completion_ids=step_map,
        completion_mask=torch.arange(step_map.shape[1]) < torch.tensor(valid)[:, None],
        step_map=step_map,
        commit_probs=None if probs is None else torch.tensor(probs),
        rewards=torch.tensor(rewards),
        correct=torch.tensor(correct),
    )


# Row 0: timesteps of 3, 2 and 1 valid tokens, 2 in the mean; the last two positions were never decoded.
# Row 1: 3 and 2 valid tokens, 2.5 in the mean; its last timestep committed padding alone.
# Row 2: all 8 at once. Row 3: nothing but padding.
STEPS = [[0, 0, 0, 1, 1, 2, 3, 3], [0, 0, 0, 1, 1, 2, 2, 2], [0] * 8, [0, 0, 0, 0, 1, 1, 1, 1]]
PROBS = [
    [0.95, 0.9, 0.89, 0.99, 0.5, 0.3, 0.0, 0.0],  # 3 of at least 0.9
    [0.97, 0.2, 0.3, 0.4, 0.92, 0.99, 0.99, 0.99],  # 2, and padding, which doesn't count
    [0.91] * 8,  # 8
    [0.99] * 8,
]
FIRST = rollout(
    STEPS, [6, 5, 8, 0], [[1.0, 0.5], [0.0, 0.25], [0.0, 0.0], [0.0, 7.0]], [True, False, False, False], PROBS
)
# 4 tokens one by one, the others never decoded; and 5 and 3 at once, 4 in the mean.
SECOND = rollout(
    [[0, 1, 2, 3, 4, 4, 4, 4], [0, 0, 0, 0, 0, 1, 1, 1]],
    [4, 8],
    [[1.0], [0.0]],
    [True, False],
    [[0.5] * 8] * 2,
)


def figures(*rollouts: Rollout, **settings) -> dict[str, float]:
    metrics = CollapseMetrics(**settings)
    for each in rollouts:
        metrics.update(each)
    return {name: value.item() for name, value in metrics.compute().items()}


def test_tokens_at_once_is_the_mean_over_timesteps_with_valid_tokens():
    assert tokens_at_once(FIRST).tolist() == [2.0, 2.5, 8.0, 0.0]
    assert tokens_at_once(SECOND).tolist() == [1.0, 4.0]


@pytest.mark.parametrize(
    ("bucket", "numbers"),
    [("1", (1,)), ("2", (2,)), ("3_4", (3, 4)), ("5_8", (5, 8)), ("9_16", (9, 16)), ("17_up", (17, 40))],
)
def test_every_number_has_its_bucket(bucket: str, numbers: tuple[int, ...]):
    for num in numbers:
        found = figures(rollout([[0] * 40], [num], [[0.5]], [False]))
        assert {name: found[f"share_{name}"] for name in BUCKETS} == {
            name: name == bucket for name in BUCKETS
        }
        assert {name for name in found if name.startswith("reward_")} == {f"reward_{bucket}"}


def test_sums_over_everything_seen():
    # Confident are 3 + 2 + 8 tokens, of which 2 + 8 are in wrong answers; the second rollout has none.
    # Five answers have valid tokens. In "3_4" are rewards 0.25 and 0.0, in the others one each.
    expected = {
        "confident_wrong": 10 / 13,
        "share_1": 1 / 5,
        "share_2": 1 / 5,
        "share_3_4": 2 / 5,
        "share_5_8": 1 / 5,
        "share_9_16": 0.0,
        "share_17_up": 0.0,
        "reward_1": 1.0,
        "reward_2": 1.5,
        "reward_3_4": 0.125,
        "reward_5_8": 0.0,
    }
    assert figures(FIRST, SECOND) == pytest.approx(expected)


def test_the_threshold_says_what_is_confident():
    # 0.95, 0.99 | 0.97 | none of 0.91.
    assert figures(FIRST, confident=0.93)["confident_wrong"] == pytest.approx(1 / 3)
    # 0.95, 0.9, 0.89, 0.99, 0.5 | 0.97, 0.92 | 8.
    assert figures(FIRST, confident=0.5)["confident_wrong"] == pytest.approx(10 / 15)


def test_no_figure_where_there_is_nothing_to_divide_by():
    assert "confident_wrong" not in figures(SECOND)
    # Rollouts of another origin have no probabilities.
    assert "confident_wrong" not in figures(rollout(STEPS, [6, 5, 8, 0], [[1.0]] * 4, [True] * 4))
    empty = figures(rollout([[0] * 8], [0], [[1.0]], [True]))
    assert empty == {f"share_{name}": 0.0 for name in BUCKETS}


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_reset():
    metrics = CollapseMetrics()
    metrics.update(FIRST)
    metrics.reset()
    assert metrics.compute().keys() == {f"share_{name}" for name in BUCKETS}
