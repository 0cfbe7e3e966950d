import json
from pathlib import Path

import pytest

from drift.contract import ConfigError
from drift.rewards import MathReward
from drift.tasks import BoxedMathTask, Gsm8kTask, MathTask


def test_the_problem_of_a_row():
    row = {"question": "What is 1+1?", "ground_truth_answer": " 2 ", "level": 1}
    task = MathTask(instruction="Box it.")
    problem = task.problem(row)
    assert (problem.prompt, problem.answer, problem.demonstration) == ("What is 1+1?\nBox it.", "2", None)
    assert problem.row == row
    assert "\\boxed{}" in MathTask().problem(row).prompt
    assert MathTask(instruction="").problem(row).prompt == "What is 1+1?"
    assert task.own_text(row) == "What is 1+1?"


@pytest.mark.parametrize(
    ("answer", "text"),
    [(2, "2"), (0, "0"), (2.5, "2.5"), (142.0, "142"), (-3.0, "-3"), (1e3, "1000"), ("\\frac12", "\\frac12")],
)
def test_answers_become_text(answer: object, text: str):
    row = {"question": "?", "ground_truth_answer": answer}
    assert MathTask().problem(row).answer == text


@pytest.mark.parametrize("answer", ["", "  ", ["2"], {"a": 1}, True, float("nan"), float("inf")])
def test_other_answers_are_refused(answer: object):
    row = {"question": "?", "ground_truth_answer": answer}
    with pytest.raises(
        ConfigError, match=r"data.train \(row 7\): field 'ground_truth_answer' is .* data.task"
    ):
        MathTask().check(row, "data.train (row 7)")
    with pytest.raises(ConfigError, match="field 'ground_truth_answer' is "):
        MathTask().problem(row)


@pytest.mark.parametrize("question", ["", " \n", 5, ["?"]])
def test_other_questions_are_refused(question: object):
    row = {"question": question, "ground_truth_answer": "2"}
    with pytest.raises(ConfigError, match=r"row 7\): field 'question' is "):
        MathTask().check(row, "data.train (row 7)")


def test_fields_can_be_named():
    task = MathTask(question_field="problem", answer_field="solution")
    assert task.fields == ("problem", "solution")
    assert task.problem({"problem": "?", "solution": 1}).answer == "1"
    with pytest.raises(
        ConfigError, match=r"no field 'problem'; it has \['question'\]: set data.task.question_field"
    ):
        task.check({"question": "?"}, "data.train")
    with pytest.raises(ConfigError, match=r"no field 'solution'; .* set data.task.answer_field"):
        task.check({"problem": "?"}, "data.train")
    with pytest.raises(ConfigError, match="both 'text'"):
        MathTask(question_field="text", answer_field="text")


def test_the_reward_can_be_given():
    reward = MathReward(timeout_seconds=1.0, num_workers=3)
    assert MathTask(reward=reward).reward is reward
    assert MathTask().reward.timeout_seconds == 5.0


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("He eats 3 #### and 4.\n#### 7", "7"),
        ("It costs $2,125.\n#### 2,125", "2125"),
        ("#### -1,000,000 ", "-1000000"),
        ("#### 0.5", "0.5"),
    ],
)
def test_gsm8k_has_its_answer_behind_the_mark(solution: str, answer: str):
    assert Gsm8kTask().problem({"question": "?", "answer": solution}).answer == answer


@pytest.mark.parametrize("solution", ["7", "#### ", "####", "#### seven", "#### 7 apples", "#### nan", 7, []])
def test_gsm8k_without_a_number_behind_the_mark_is_refused(solution: object):
    with pytest.raises(ConfigError, match=r"^row 7: field 'answer' is .* ends in '####' and a number"):
        Gsm8kTask().check({"question": "?", "answer": solution}, "row 7")


def test_math_has_its_answer_in_the_last_box():
    row = {"problem": "?", "level": "Level 1", "solution": "$\\boxed{3}$, no, $\\boxed{\\frac{1}{2}}$."}
    assert BoxedMathTask().problem(row).answer == "\\frac{1}{2}"
    for solution in ("3", "\\boxed{}", "\\boxed{ }", "\\boxed{3", 3):
        with pytest.raises(ConfigError, match=r"^row 7: field 'solution' is .* its answer in \\boxed{}"):
            BoxedMathTask().check({**row, "solution": solution}, "row 7")


def test_amc_rows_of_the_hub():
    """AI-MO/aimo-validation-amc holds floats, math-ai/amc23 texts."""
    amc = MathTask(question_field="problem", answer_field="answer")
    floats = amc.problem({"id": 0, "problem": "?", "answer": 142.0, "url": ""})
    texts = MathTask(answer_field="answer").problem({"id": 0, "question": "?", "answer": "27.0"})
    assert (floats.answer, texts.answer) == ("142", "27.0")
    assert amc.reward(["\\boxed{142}", "\\boxed{27}"], [floats, texts]).tolist() == [1.0, 1.0]
    amc.reward.close()


@pytest.mark.parametrize("name", ["MATH500.json", "gsm8k_test.json", "MATH_train.json"])
def test_benchmark_files_suit_the_task(shared: Path, name: str):
    task = MathTask()
    rows = json.loads((shared / "data" / name).read_text())
    problems = [task.problem(row) for row in rows if row["ground_truth_answer"]]
    assert len(rows) - len(problems) == (2 if name == "MATH_train.json" else 0)
    completions = [f"So \\boxed{{{problem.answer}}}" for problem in problems]
    assert task.reward(completions, problems).mean() == 1.0
