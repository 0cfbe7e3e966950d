import pytest
import torch

from drift.contract import Problem, SampleError
from drift.rewards.base import PerSampleReward, Reward
from drift.tasks import score

COMPLETIONS = ["one", "two", "three"]
PROBLEMS = [Problem(prompt=f"question {n}", answer=str(n)) for n in range(3)]


class LengthReward(PerSampleReward):
    def score(self, completion, problem):
        return len(completion)


class TouchyReward(PerSampleReward):
    def score(self, completion, problem):
        if completion == "two":
            raise KeyError("two")
        return 1.0


class GivesReward(Reward):
    def __init__(self, values) -> None:
        self.values = values

    def __call__(self, completions, problems):
        return self.values


class ManyReward(Reward):
    """Judges one completion at a time, but never several."""

    def __call__(self, completions, problems):
        if len(completions) > 1:
            raise MemoryError("too many")
        return torch.ones(1)


def test_rewards_are_float32():
    found = score(LengthReward(), COMPLETIONS, PROBLEMS)
    assert found.dtype == torch.float32
    assert found.tolist() == [3, 3, 5]


def test_a_list_of_numbers_will_do():
    assert score(GivesReward([0, 1, 0.5]), COMPLETIONS, PROBLEMS).tolist() == [0, 1, 0.5]


def test_a_reward_that_raises_is_named_with_its_culprit():
    with pytest.raises(SampleError, match=r"^TouchyReward raised KeyError: 'two'; .*mend it") as caught:
        score(TouchyReward(), COMPLETIONS, PROBLEMS)
    assert caught.value.sample == {
        "reason": "KeyError: 'two'",
        "prompt": "question 1",
        "answer": "1",
        "completion": "two",
    }
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_reward_that_raises_for_the_whole_batch_only():
    with pytest.raises(SampleError, match=r"^ManyReward raised MemoryError: .*whole batch") as caught:
        score(ManyReward(), COMPLETIONS, PROBLEMS)
    assert caught.value.sample["completion"] == "one"


@pytest.mark.parametrize("values", [[1.0, 2.0], torch.ones(3, 1), 1.0, torch.ones(4)])
def test_a_reward_must_give_one_number_each(values):
    with pytest.raises(SampleError, match=r"^GivesReward gave values of shape \[.*\] for 3") as caught:
        score(GivesReward(values), COMPLETIONS, PROBLEMS)
    assert caught.value.sample["completion"] == "one"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_reward_must_be_finite(bad: float):
    with pytest.raises(SampleError, match=rf"^GivesReward gave {bad} for completion 2: ") as caught:
        score(GivesReward([0.0, 1.0, bad]), COMPLETIONS, PROBLEMS)
    assert caught.value.sample == {
        "reason": str(bad),
        "prompt": "question 2",
        "answer": "2",
        "completion": "three",
    }


@pytest.mark.parametrize("values", [None, "high", [None, 1, 2]])
def test_what_is_no_number_is_an_error_of_the_reward(values):
    with pytest.raises(SampleError, match=r"^GivesReward raised (TypeError|ValueError|RuntimeError)"):
        score(GivesReward(values), COMPLETIONS, PROBLEMS)
