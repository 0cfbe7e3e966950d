import pickle
import time

import pytest

from drift.contract import ConfigError, Problem
from drift.rewards import ReasoningGymReward
from drift.rewards.reasoning_gym import extract_tagged

pytestmark = pytest.mark.usefixtures("fake_gym")


@pytest.fixture
def reward():
    reward = ReasoningGymReward("sums", timeout_seconds=1.0, num_workers=1)
    yield reward
    reward.close()


def problem(reward: ReasoningGymReward, number: int = 4) -> Problem:
    made = reward.make(number)
    assert made is not None
    return Problem(prompt="", answer=made["answer"], row={**made, "number": number})


def judge(reward: ReasoningGymReward, *answers: str, number: int = 4) -> list[float]:
    problems = [problem(reward, number)] * len(answers)
    return reward([f"So <answer>{answer}</answer>." for answer in answers], problems).tolist()


def test_a_problem_is_made_from_its_number(reward: ReasoningGymReward):
    made = reward.make(4)
    assert made is not None
    assert made["question"].startswith("4+1 ")
    assert made["answer"] == "5"
    again = ReasoningGymReward("sums", num_workers=1)
    assert again.make(4) == made  # the order of a set is part of the question
    again.close()
    assert reward.make(13) is None


def test_a_generator_that_knows_no_place_is_made_anew(reward: ReasoningGymReward):
    listed = ReasoningGymReward("sums", {"listed": True}, num_workers=1)
    assert listed.make(7) == reward.make(7)
    listed.close()


def test_the_verifier_gives_the_score(reward: ReasoningGymReward):
    assert judge(reward, "5", "4", "worth 0.25", "0", "5", number=4) == [1.0, 0.5, 0.25, 0.0, 1.0]
    assert judge(reward, "worth 7", "worth -1", "worth nan", "worth inf") == [1.0, 0.0, 0.0, 0.0]


def test_without_an_answer_there_is_nothing(reward: ReasoningGymReward):
    completions = ["5", "<answer>5", "5</answer>", "", "<answer>" + "0" * 20_001 + "5</answer>"]
    assert reward(completions, [problem(reward)] * 5).tolist() == [0.0] * 5
    assert reward([], []).tolist() == []


def test_answers_that_break_the_verifier_are_worth_nothing(reward: ReasoningGymReward):
    started = time.monotonic()
    assert judge(reward, "raise", "hang", "crash", "5", "((", "\x00", "5") == [0, 0, 0, 1, 0, 0, 1]
    assert time.monotonic() - started < 10  # "hang" never ends


def test_answers_are_evaluated_only_where_they_are_harmless(reward: ReasoningGymReward, tmp_path):
    file = tmp_path / "written"
    attacks = [f"open({str(file)!r}, 'w')", f"__import__('pathlib').Path({str(file)!r}).touch()", "self"]
    assert judge(reward, *attacks, "[1, 2]", "3 > 4") == [0.0, 0.0, 0.0, 0.5, 0.0]
    assert not file.exists()


def test_a_generator_that_crashes_is_an_error(reward: ReasoningGymReward):
    with pytest.raises(
        ConfigError, match="'sums' of reasoning-gym does not end within 60 seconds, or crashes"
    ):
        reward.make(14)


def test_a_question_that_comes_out_otherwise_is_an_error(reward: ReasoningGymReward):
    other = Problem(prompt="", answer="5", row={"question": "4+1 of an older version", "number": 4})
    with pytest.raises(RuntimeError, match="problem 4 of 'sums': the generator makes another question"):
        reward(["<answer>5</answer>"], [other])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "sum"}, r"there is no generator 'sum'; there are \['sums'\]. Correct name='sum'"),
        (
            {"settings": {"nix": 1}},
            "unexpected keyword argument 'nix'. Correct name='sums' or settings={'nix': 1}",
        ),
        ({"settings": {"seed": 1}}, r"settings of ReasoningGymReward hold \['seed'\]: remove them"),
        ({"settings": {"nonsense": 1.0}}, r"its verifier gives 1 to the answer '\?!' \(its own is '1'\)"),
        ({"settings": {"own": 0.9}}, "its verifier gives less than 1 to its own answer '1'"),
        ({"timeout_seconds": 0.0}, "timeout_seconds=0.0 "),
        ({"num_workers": 0}, "num_workers=0 "),
        ({"tag": ""}, "tag='' "),
    ],
)
def test_what_cannot_be_used_is_refused_at_once(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        ReasoningGymReward(**{"name": "sums", **settings})


def test_a_copy_has_the_settings_and_its_own_processes(reward: ReasoningGymReward):
    copy = pickle.loads(pickle.dumps(reward))
    assert (copy.name, copy.timeout_seconds, copy.make(4)) == ("sums", 1.0, reward.make(4))
    copy.close()
    assert judge(reward, "5") == [1.0]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer> 5\n</answer>", "5"),
        ("<answer>4</answer> no <answer>5</answer> <answer>", "5"),
        ("<answer>a <answer>5</answer>", "5"),
        ("</answer><answer>5", None),
        ("<answer></answer>", ""),
        ("<Answer>5</Answer>", None),
    ],
)
def test_the_answer_is_in_the_last_tag(text: str, answer: str | None):
    assert extract_tagged(text, "answer") == answer
    assert extract_tagged(text, None) == text.strip()
