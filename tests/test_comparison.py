from pathlib import Path

import pytest

from drift.commands import run
from drift.comparison import compare_accuracy, comparison, differing_settings
from drift.contract import ConfigError
from drift.evaluation import Answer, Cell, CellResult
from drift.metrics import difference_interval, wilson_interval
from drift.results import record, write_results
from drift.rollout import DenoiseConfig

WARM = DenoiseConfig(block_length=8, temperature=1.0)


def made(correct: list[str], dataset: str = "math", rows: str = "r", **settings: object) -> dict:
    answers = [
        Answer(i, j, correct=mark == "1", finished=True, reward=float(mark), timesteps=4, tokens=6)
        for i, marks in enumerate(correct)
        for j, mark in enumerate(marks)
    ]
    cell = Cell(name="warm", length=16, decode=WARM, samples=len(correct[0]))
    given = {"num_rows": len(correct), "rows": rows, **settings}
    return record(dataset, cell, CellResult(answers=answers, seconds=2.0), given)


# Right of 20: the first 8 by A; 2 of them and 7 others by B.
A = ["1"] * 8 + ["0"] * 12
B = ["1"] * 2 + ["0"] * 6 + ["1"] * 7 + ["0"] * 5


def test_the_same_rows_are_compared_prompt_by_prompt():
    found = compare_accuracy(made(A), made(B))
    assert found.value == pytest.approx(0.05)
    assert (found.better, found.worse) == (7, 6)
    assert found.p_value == 1.0
    # Phi: (2 * 5 - 6 * 7) / sqrt(8 * 12 * 9 * 11) = -0.32827.
    shares = [(k / 20, *wilson_interval(k, 20)) for k in (8, 9)]
    assert (found.low, found.high) == pytest.approx(difference_interval(*shares, -0.32827), abs=1e-5)
    same = compare_accuracy(made(A), made(A))
    assert (same.value, same.better, same.worse, same.p_value) == (0.0, 0, 0, 1.0)
    # A policy against itself: only how lopsided the two intervals are is left of them.
    assert same.high - same.low < 0.1


def test_other_rows_are_not_paired():
    found = compare_accuracy(made(A), made(B, rows="s"))
    shares = [(k / 20, *wilson_interval(k, 20)) for k in (8, 9)]
    assert (found.low, found.high) == pytest.approx(difference_interval(*shares))
    assert found.better is found.worse is found.p_value is None


def test_several_samples_are_compared_by_their_means():
    # 1, 0.5, 0 against 0.75, 0.75, 0: one better, one worse, one alike.
    found = compare_accuracy(made(["11", "10", "00"]), made(["1101", "1110", "0000"]))
    assert (found.better, found.worse) == (1, 1)
    assert found.value == pytest.approx(0)


def test_differing_settings_are_named():
    first = made(A, decode={"threshold": 0.9, "steps": None}, task={"class": "MathTask"})
    second = made(A, decode={"threshold": 0.5, "steps": None}, length=3, task={"class": "MathTask"})
    assert differing_settings(first, second) == {"decode.threshold": (0.9, 0.5), "length": (None, 3)}


@pytest.fixture
def compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What `drift compare` prints of two lists of results."""

    def printed(first: list[dict], second: list[dict]) -> str:
        for name, results in (("a", first), ("b", second)):
            policy = {"policy": "folder", "checkpoint": f"{name}.ckpt", "weights": f"weights_{name}"}
            write_results(tmp_path / f"{name}.json", policy, results)
        run(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
        return capsys.readouterr().out

    return printed


def test_the_report_names_policies_and_differences(compare):
    text = compare([made(A)], [made(B)])
    assert "a.json  policy folder, weights weights_a, checkpoint a.ckpt" in text
    assert "weights_b, checkpoint b.ckpt" in text
    (row,) = [line for line in text.splitlines() if line.startswith("math, length 16, warm  ")]
    assert row.split()[4:8] == ["0.400", "0.450", "+0.050", row.split()[7]]
    assert "B is better on 7 prompts and worse on 6 (p = 1, exact sign test)" in text
    assert "WARNING" not in text


def test_other_settings_are_a_warning_that_names_them(compare):
    text = compare([made(A, decode={"threshold": 0.9})], [made(B, decode={"threshold": 0.5})])
    assert "WARNING math, length 16, warm: not measured in the same way" in text
    assert "  decode.threshold: 0.9 in A, 0.5 in B\n" in text
    assert "B is better on 7 prompts" in text


def test_other_data_are_a_warning_and_not_paired(compare):
    text = compare([made(A)], [made(B, dataset="other", rows="s")])
    assert "math, length 16, warm and other, length 16, warm" in text
    assert "not the same rows, so that prompts are not paired" in text
    assert "  rows: 'r' in A, 's' in B\n" in text


def test_results_are_matched_by_name(compare):
    text = compare(
        [made(A), made(B, dataset="code")],
        [made(A, dataset="code"), made(B), made(A, dataset="third")],
    )
    assert "math, length 16, warm: B is better on 7 prompts and worse on 6" in text
    assert "code, length 16, warm: B is better on 6 prompts and worse on 7" in text
    assert "1 results are in one of the files only" in text


def test_files_without_a_common_result_are_refused(tmp_path: Path):
    write_results(tmp_path / "a.json", {}, [made(A)])
    write_results(tmp_path / "b.json", {}, [made(A, dataset="x"), made(A, dataset="y")])
    with pytest.raises(
        ConfigError, match=r"has math, length 16, warm, .*no data, length and decode are in both"
    ):
        comparison(tmp_path / "a.json", tmp_path / "b.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nowhere.json", "b.json"],
            "drift: error: 'nowhere.json' is no file; give the val.json or test.json",
        ),
        (["a.json"], "drift: error: the following arguments are required: B.json"),
        (["a.json", "b.json", "--frist=1"], "drift: error: unrecognized arguments: --frist=1"),
    ],
)
def test_bad_arguments_are_one_line(arguments: list[str], message: str):
    with pytest.raises(SystemExit) as stopped:
        run(["compare", *arguments])
    assert str(stopped.value.code).startswith(message)
