import pytest
import torch

from drift.contract import ConfigError, Problem, PromptBatch, Rollout, SampleError
from drift.rewards import FormatReward, LengthReward
from drift.rewards.base import PerSampleReward, Reward
from drift.tasks import ExtraReward, judge, part_names, score

COMPLETIONS = ["one", "two", "three"]
PROBLEMS = [Problem(prompt=f"question {n}", answer=str(n)) for n in range(3)]


class LettersReward(PerSampleReward):
    def score(self, completion, problem):
        return len(completion)


class TouchyReward(PerSampleReward):
    def score(self, completion, problem):
        if completion == "two":
            raise KeyError("two")
        return 1.0


class LeavingReward(PerSampleReward):
    """Runs what it judges, as research code does."""

    def score(self, completion, problem):
        exec("raise SystemExit(0)" if completion == "three" else "")
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
    found = score(LettersReward(), COMPLETIONS, PROBLEMS)
    assert found.dtype == torch.float32
    assert found.tolist() == [3, 3, 5]


def test_a_list_of_numbers_will_do():
    assert score(GivesReward([0, 1, 0.5]), COMPLETIONS, PROBLEMS).tolist() == [0, 1, 0.5]


def test_a_completion_that_leaves_the_interpreter_does_not_end_training_silently():
    with pytest.raises(SampleError, match=r"^LeavingReward raised SystemExit: 0 for completion 2, to "):
        score(LeavingReward(), COMPLETIONS, PROBLEMS)


def test_a_reward_that_raises_is_named_with_its_culprit():
    with pytest.raises(
        SampleError, match=r"^TouchyReward raised KeyError: 'two' for completion 1, to .*mend it"
    ) as caught:
        score(TouchyReward(), COMPLETIONS, PROBLEMS, places=[7, 8, 9])
    assert caught.value.sample == {
        "reason": "KeyError: 'two'",
        "place": 8,
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
    message = r"^GivesReward gave values of shape \[.*\] for 3 .*\[0, 1, 2\].*the first value is 1.0"
    with pytest.raises(SampleError, match=message) as caught:
        score(GivesReward(values), COMPLETIONS, PROBLEMS)
    assert caught.value.sample["completion"] == "one"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_reward_must_be_finite(bad: float):
    with pytest.raises(
        SampleError, match=rf"^GivesReward gave {bad} for completion 2, to prompt 2"
    ) as caught:
        score(GivesReward([0.0, 1.0, bad]), COMPLETIONS, PROBLEMS)
    assert caught.value.sample == {
        "reason": str(bad),
        "place": 2,
        "prompt": "question 2",
        "answer": "2",
        "completion": "three",
    }


@pytest.mark.parametrize(
    ("values", "named", "culprit"),
    [(None, "None", 0), ("high", "'high'", 0), ([1, None, 2], "None", 1), ([1, 2, "3"], "'3'", 2)],
)
def test_what_is_no_number_is_an_error_of_the_reward(values, named: str, culprit: int):
    message = f"^GivesReward gave {named}, no number, for completion {culprit}, to prompt {culprit} "
    with pytest.raises(SampleError, match=message) as caught:
        score(GivesReward(values), COMPLETIONS, PROBLEMS)
    assert caught.value.sample["prompt"] == f"question {culprit}"


def judged(*extra: ExtraReward, reward: Reward | None = None) -> Rollout:
    """A rollout of two completions to each of two prompts, judged."""
    ids = torch.zeros(4, 6, dtype=torch.int64)
    rollout = Rollout(
        prompt_ids=ids,
        prompt_mask=ids.bool(),
        completion_ids=ids,
        completion_mask=torch.arange(6) < torch.tensor([1, 3, 5, 6])[:, None],
        step_map=ids,
    )
    batch = PromptBatch(
        prompt_ids=ids[:2], prompt_mask=ids[:2].bool(), problems=PROBLEMS[:2], positions=torch.tensor([4, 9])
    )
    judge(batch, rollout, ["a", "b", "ab", "c"], reward or FormatReward("a"), extra)
    return rollout


def test_the_sum_is_weighted_and_its_parts_are_kept():
    rollout = judged(
        ExtraReward(FormatReward("b"), 0.5, name="b"),
        ExtraReward(LengthReward(max_length=6, margin=2), 0.25),
    )
    assert rollout.reward_names == ("format", "b", "length")
    # 1, 3, 5 and 6 tokens of at most 6, falling from 4 on: 0, 0, -1/2 and -1.
    assert rollout.scores.tolist() == [[1, 0, 0], [0, 1, 0], [1, 1, -0.5], [0, 0, -1]]
    assert rollout.rewards.sum(dim=1).tolist() == [1.0, 0.5, 1.5 - 0.125, -0.25]
    assert rollout.rewards[2].tolist() == [1.0, 0.5, -0.125]
    assert rollout.rewards.dtype == torch.float32


@pytest.mark.parametrize("weight", [100.0, -100.0])
def test_only_the_tasks_own_reward_says_what_is_correct(weight: float):
    rollout = judged(ExtraReward(FormatReward("b"), weight, name="b"))
    assert rollout.correct.tolist() == [True, False, True, False]


def test_an_error_says_which_prompt_of_the_data():
    with pytest.raises(
        SampleError, match=r"^GivesReward gave nan for completion 2, to prompt 9 \('question 1"
    ):
        judged(reward=GivesReward([0, 0, float("nan"), 0]))
    with pytest.raises(SampleError, match=r"^GivesReward gave inf for completion 0, to prompt 4 "):
        judged(ExtraReward(GivesReward([float("inf"), 0, 0, 0])))


def test_names_of_parts():
    class HTTPStatus2Reward(GivesReward): ...

    class Judge(GivesReward): ...

    names = part_names(FormatReward("a"), [ExtraReward(HTTPStatus2Reward([])), ExtraReward(Judge([]))])
    assert names == ("format", "http_status2", "judge")


def test_a_class_whose_name_is_taken_is_told_apart():
    class MeanReward(FormatReward):
        pass

    assert part_names(MeanReward("a"), [ExtraReward(FormatReward("b"))]) == ("mean_reward", "format")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([ExtraReward(FormatReward("b"))], r"name 'format' for several rewards \['format', 'format'\]"),
        ([ExtraReward(FormatReward("b"), name="mean")], "name 'mean', under which drift logs something else"),
    ],
)
def test_names_that_are_taken(extra: list[ExtraReward], message: str):
    with pytest.raises(ConfigError, match=message):
        part_names(FormatReward("a"), extra)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0.0}, "weight is 0.0: set it to a number other than 0"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"name": "a/b"}, "name is 'a/b': use letters"),
    ],
)
def test_extra_rewards_that_cannot_work(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        ExtraReward(FormatReward("a"), **settings)
