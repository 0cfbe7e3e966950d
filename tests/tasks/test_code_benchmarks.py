import json
from pathlib import Path

import pytest

from drift.contract import ConfigError
from drift.rewards import CodeReward
from drift.tasks import CodeTask, HumanEvalTask, MbppTask

FULL = {
    "task_id": 1,
    "text": "Write a function to double. ",
    "code": "def double(x):\r\n  return 2 * x",
    "test_list": ["assert double(1) == two", "assert double(2)==4"],
    "test_setup_code": "two = 2",
    "challenge_test_list": ["assert double(3) == 6"],
}
SANITIZED = {
    "source_file": "a.ipynb",
    "task_id": 1,
    "prompt": "Write a function to halve.",
    "code": "def halve(x):\n    return x / 2",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(halve(1), 0.5)", "assert halve(4) == 2"],
}
HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'import math\n\n\ndef double(x):\n    """Twice x."""\n',
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(2) == 4\n",
    "entry_point": "double",
}


@pytest.fixture
def reward() -> CodeReward:
    return CodeReward(sandbox="rlimits")


def test_the_problem_of_an_mbpp_row(reward: CodeReward):
    task = MbppTask(reward=reward)
    problem = task.problem(FULL)
    first = "Write a function to double.\nYour code should pass the test:\nassert double(1) == two\n"
    assert problem.prompt.startswith(first + "Place your code")
    assert (problem.answer_prefix, problem.row["task_id"]) == ("", 1)
    assert task.own_text(FULL) + "\n" == first
    halve = task.problem(SANITIZED)
    answers = [
        f"```python\n{code}\n```" for code in (FULL["code"], "double = lambda x: 2", SANITIZED["code"])
    ]
    found = reward(answers, [problem, problem, halve]).tolist()
    # The second answer passes the first of three tests.
    assert found == [1.0, pytest.approx(1 / 3), 1.0]


def test_the_problem_of_a_humaneval_row(reward: CodeReward):
    task = HumanEvalTask(reward=reward)
    problem = task.problem(HUMAN_EVAL)
    assert problem.answer_prefix == f"Here is the completed code:\n```python\n{HUMAN_EVAL['prompt']}\n"
    right, half = HUMAN_EVAL["canonical_solution"], "    return 2\n"
    answers = [f"{problem.answer_prefix}{body}```" for body in (right, half)]
    assert reward(answers, [problem, problem]).tolist() == [1.0, 0.5]


@pytest.mark.parametrize(
    ("kind", "row", "change", "message"),
    [
        (MbppTask, FULL, {"text": ""}, "field 'text' is ''; it must be a text"),
        (MbppTask, SANITIZED, {"prompt": None}, "field 'prompt' is None"),
        (MbppTask, FULL, {"test_list": []}, r"field 'test_list' is \[\]; .* at least one"),
        (MbppTask, FULL, {"test_list": "assert f(1)"}, "field 'test_list' is 'assert"),
        (
            MbppTask,
            FULL,
            {"test_list": ["assert f("]},
            "field 'test_list' cannot be used: test 0 is no Python",
        ),
        (MbppTask, FULL, {"challenge_test_list": [1]}, r"field 'challenge_test_list' is \[1\]"),
        (MbppTask, FULL, {"test_setup_code": 1}, "field 'test_setup_code' is 1"),
        (HumanEvalTask, HUMAN_EVAL, {"prompt": 3}, "field 'prompt' is 3"),
        (HumanEvalTask, HUMAN_EVAL, {"test": " "}, "field 'test' is ' '"),
        (
            HumanEvalTask,
            HUMAN_EVAL,
            {"test": "x = 1"},
            "field 'test' cannot be used: test 0 has no assertion",
        ),
        (HumanEvalTask, HUMAN_EVAL, {"entry_point": "f(x)"}, r"field 'entry_point' is 'f\(x\)'"),
        (HumanEvalTask, HUMAN_EVAL, {"entry_point": None}, "no field 'entry_point'"),
    ],
)
def test_bad_rows_are_refused(
    kind: type[CodeTask], row: dict, change: dict, message: str, reward: CodeReward
):
    task = kind(reward=reward)
    task.check(row, "row 7")
    with pytest.raises(ConfigError, match=f"^row 7(: | has ){message}"):
        task.check({**row, **change}, "row 7")


def test_humaneval_of_the_hub_is_asked_as_the_prepared_file_asks(shared: Path, reward: CodeReward):
    prepared, hub = CodeTask(reward=reward), HumanEvalTask(reward=reward)
    rows = json.loads((shared / "data" / "HumanEval.json").read_text())
    for row in rows:
        prompt = row["prefix"].removeprefix("Here is the completed code:\n```python\n")
        test, _, call = row["test_list"][0].rpartition("check(")
        raw = {"prompt": prompt[:-1], "test": test, "entry_point": call[:-1]}
        ours, theirs = hub.problem(raw), prepared.problem(row)
        assert (ours.prompt, ours.answer_prefix) == (theirs.prompt, theirs.answer_prefix)
        assert hub.own_text(raw).strip() == row["question"].strip()
    assert len(rows) == 164
