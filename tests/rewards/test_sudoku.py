import pytest
import torch

from drift.contract import ConfigError, Problem
from drift.rewards import SudokuReward

# 12|34
# 34|12
# --+--
# 21|43
# 43|21
SOLUTION = "1234341221434321"
PUZZLE = "1.3434.2.1434.21"


def judge(completion: str, puzzle: str = PUZZLE, size: int = 4) -> float:
    return SudokuReward(size=size)(
        [completion], [Problem(prompt="", answer="", row={"puzzle": puzzle})]
    ).item()


@pytest.mark.parametrize(
    "completion", [SOLUTION, "1234\n3412\n2143\n4321\n", "1 2 3 4  3 4 1 2\t2143 4321", "\u00a0" + SOLUTION]
)
def test_the_solution_is_right_however_it_is_spaced(completion: str):
    assert judge(completion) == 1.0


def test_every_valid_grid_that_keeps_the_givens_is_right():
    # Rows 1 and 2 fixed, rows 3 and 4 blank: 2143/4321 and 4321/2143 both fill it.
    puzzle = "12343412........"
    assert judge("1234341221434321", puzzle) == 1.0
    assert judge("1234341243212143", puzzle) == 1.0


def test_a_valid_grid_that_changes_a_given_is_wrong():
    # The solution with 1 and 2 exchanged obeys the rules, but the puzzle begins with a 1.
    assert judge("2134342112434312", "................") == 1.0
    assert judge("2134342112434312") == 0.0


@pytest.mark.parametrize(
    ("grid", "broken"),
    [
        ("1234234134124123", "boxes only: a cyclic Latin square"),
        ("1234341212343412", "columns only: two rows twice"),
        ("1212343421214343", "rows only: two pairs in each"),
        ("1111111111111111", "everything"),
    ],
)
def test_every_kind_of_unit_counts(grid: str, broken: str):
    assert judge(grid, "................") == 0.0, broken


@pytest.mark.parametrize(
    "completion",
    [
        "",
        " ",
        "\x00",
        SOLUTION[:-1],
        SOLUTION + "1",
        SOLUTION + "\x00",
        SOLUTION[:-1] + "\x00",
        SOLUTION[:-1] + "I",
        SOLUTION.replace("1", "\uff11"),  # full-width digit one
        SOLUTION.replace("1", "\u00b9"),
        SOLUTION.replace("4", "0"),
        SOLUTION.replace("4", "5"),
        SOLUTION[:-1] + "-1",
        PUZZLE,
        "The answer is " + SOLUTION,
        SOLUTION * 2,
        SOLUTION * 100_000,
        "\ud800" * 16,
        "[" * 100_000,
    ],
)
def test_anything_else_is_wrong_and_nothing_raises(completion: str):
    assert judge(completion) == 0.0


def test_nine_by_nine():
    # The standard pattern: each row of a band is shifted by 3, each band by 1.
    grid = "".join(str((3 * (r % 3) + r // 3 + c) % 9 + 1) for r in range(9) for c in range(9))
    assert judge(grid, "." * 81, size=9) == 1.0
    assert judge(grid[9:] + grid[:9], "." * 81, size=9) == 0.0  # rows moved by one: the boxes break


def test_a_batch_is_judged_in_order():
    problems = [Problem(prompt="", answer="", row={"puzzle": PUZZLE})] * 3
    rewards = SudokuReward()(["no", SOLUTION, ""], problems)
    assert rewards.tolist() == [0.0, 1.0, 0.0]
    assert (rewards.dtype, rewards.device) == (torch.float32, torch.device("cpu"))
    assert SudokuReward()([], []).shape == (0,)


def test_completions_and_problems_must_match():
    with pytest.raises(ValueError, match="shorter"):
        SudokuReward()([SOLUTION, SOLUTION], [Problem(prompt="", answer="", row={"puzzle": PUZZLE})])


@pytest.mark.parametrize("size", [0, 3, 5, 16])
def test_other_sizes_are_refused(size: int):
    with pytest.raises(ConfigError, match=f"size={size} "):
        SudokuReward(size=size)


def test_a_puzzle_of_another_size_is_refused():
    with pytest.raises(ConfigError, match="has 16 cells, size=9"):
        judge(SOLUTION, PUZZLE, size=9)
