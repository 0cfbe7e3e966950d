import pytest

from drift.contract import ConfigError
from drift.tasks import ReasoningGymTask


@pytest.fixture
def task(fake_gym: None):
    task = ReasoningGymTask("sums", num_workers=1)
    yield task
    task.reward.close()


def test_the_problem_of_a_row(task: ReasoningGymTask):
    row = task.row("train", 0)
    problem = task.problem(row)
    assert problem.prompt == f"{row['question']}\nGive your final answer between <answer> and </answer>."
    assert row["question"].startswith(f"{row['number']}+1 ")
    assert (problem.answer, problem.row) == (str(row["number"] + 1), row)
    assert problem.demonstration == f"<answer>{problem.answer}</answer>"
    assert task.reward([problem.demonstration, "0"], [problem, problem]).tolist() == [1.0, 0.0]
    assert task.problem({**row, "answer": None}).answer == ""
    assert task.problem({**row, "answer": None}).demonstration is None


def test_the_whole_completion_can_be_the_answer(fake_gym: None):
    task = ReasoningGymTask("sums", instruction="", tag=None, num_workers=1)
    problem = task.problem(task.row("test", 0))
    assert (problem.prompt, problem.demonstration) == (problem.row["question"], problem.answer)
    assert task.reward([f" {problem.answer}\n"], [problem]).tolist() == [1.0]
    task.reward.close()


def test_rows_depend_on_seed_split_and_place_alone(task: ReasoningGymTask):
    rows = [task.row("train", index) for index in range(5)]
    task.reward.close()  # the processes that made them are gone
    again = ReasoningGymTask("sums", num_workers=2)
    assert [again.row("train", index) for index in reversed(range(5))] == rows[::-1]
    assert ReasoningGymTask("sums", seed=1, num_workers=1).row("train", 0) not in rows
    again.reward.close()


def test_numbers_that_the_generator_gives_up_on_are_passed_over(task: ReasoningGymTask):
    class Draws:
        def __init__(self, numbers: list[int]) -> None:
            self.numbers = numbers

        def randrange(self, stop: int) -> int:
            return self.numbers.pop(0) if self.numbers else 13

    assert task.generate(Draws([13, 13, 5]))["number"] == 5
    with pytest.raises(ConfigError, match="'sums' of reasoning-gym gave up 100 times in a row"):
        task.generate(Draws([]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"number": 4}, "row 7 has no field 'question'"),
        ({"question": 4, "number": 4}, "row 7: field 'question' is 4; it must be a text"),
        ({"question": "?", "number": "4"}, "row 7: field 'number' is '4'; it must be the integer"),
    ],
)
def test_rows_of_others_are_refused(task: ReasoningGymTask, row: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        task.check(row, "row 7")


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("drift.rewards.reasoning_gym.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'drift\[reasoning\]'"):
        ReasoningGymTask("spell_backward")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("spell_backward", {"min_word_len": 4}),
        ("simple_integration", {}),  # its verifier evaluates the answer with sympy
        ("spiral_matrix", {}),  # its verifier evaluates the answer as it stands
        ("isomorphic_strings", {}),  # its questions depend on the order of sets
        ("acre", {}),  # it knows no place beyond its size
        ("composite", {"datasets": [{"name": n, "weight": 1.0, "config": {}} for n in ("gcd", "chain_sum")]}),
    ],
)
def test_generators_of_reasoning_gym(name: str, settings: dict, tmp_path):
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym (the extra 'reasoning')")
    task = ReasoningGymTask(name, settings, num_workers=1)
    rows = [task.row("train", index) for index in range(3)]
    task.reward.close()
    again = ReasoningGymTask(name, settings, num_workers=1)
    assert [again.row("train", index) for index in range(3)] == rows
    problems = [task.problem(row) for row in rows]
    assert task.reward([p.demonstration for p in problems], problems).tolist() == [1.0] * 3
    attack = f"<answer>[open({str(tmp_path / 'written')!r}, 'w')]</answer>"
    assert all(score < 0.1 for score in task.reward([attack] * 3, problems).tolist())
    assert not (tmp_path / "written").exists()
    task.reward.close()
    again.reward.close()


def test_a_verifier_that_pays_for_anything_is_refused():
    pytest.importorskip("reasoning_gym", reason="needs reasoning-gym (the extra 'reasoning')")
    with pytest.raises(ConfigError, match=r"its verifier gives 1 to the answer '\?!'"):
        ReasoningGymTask("game_of_life_halting")
