import json
from pathlib import Path

import pytest

from drift.contract import ConfigError
from drift.evaluation import Answer, Cell, CellResult
from drift.results import aligned, read_results, record, results_table, write_results
from drift.rollout import DenoiseConfig

WARM = DenoiseConfig(block_length=8, temperature=1.0)


def made(dataset: str = "math", correct: str = "10 11", **settings: object) -> dict:
    prompts = correct.split()
    answers = [
        Answer(i, j, correct=mark == "1", finished=j > 0, reward=float(mark), timesteps=4, tokens=6)
        for i, marks in enumerate(prompts)
        for j, mark in enumerate(marks)
    ]
    cell = Cell(name="warm", length=16, decode=WARM, samples=len(prompts[0]))
    return record(dataset, cell, CellResult(answers=answers, seconds=2.0), {"rows": "r", **settings})


def test_what_is_written_is_read(tmp_path: Path):
    path = tmp_path / "deep" / "test.json"
    write_results(path, {"policy": 'a "b"', "checkpoint": ""}, [made(), made("code")])
    found = read_results(path)
    assert found == {"policy": 'a "b"', "checkpoint": "", "results": [made(), made("code")]}
    # A line a result, so that files can be compared by eye; nothing else is left in the folder.
    assert [line for line in path.read_text().splitlines() if '"dataset"' in line][1].startswith("  {")
    assert list(path.parent.iterdir()) == [path]


def test_a_record_says_how_it_was_measured():
    found = made(length=16)
    assert found["num_correct"] == [1, 2]
    assert found["accuracy"] == 0.75
    assert found["pass@2"] == 1.0
    assert found["settings"] == {"rows": "r", "length": 16}
    assert found["fingerprint"] == made(length=16)["fingerprint"] != made(length=32)["fingerprint"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"x\.json' is no file; give the val\.json or test\.json of a run"),
        ("{", r"x\.json' cannot be read \(.*\); give"),
        ("[]", r"x\.json' holds no results"),
        ('{"accuracy": 0.5}', r"x\.json' holds no results"),
        ('{"results": []}', r"x\.json' holds no results"),
        ('{"results": [{"dataset": "a"}]}', r"x\.json': result 0 has no \['length', 'decode', "),
        ('{"results": [1]}', r"result 0 has no"),
    ],
)
def test_files_that_are_no_results(tmp_path: Path, content: str | None, message: str):
    if content is not None:
        (tmp_path / "x.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_results(tmp_path / "x.json")


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path):
    path = tmp_path / "test.json"
    write_results(path, {}, [made()])
    with pytest.raises(TypeError):
        write_results(path, {"policy": object()}, [made()])
    assert json.loads(path.read_text())["results"] == [made()]


def test_columns_are_aligned():
    assert aligned([["a", "b", "c"], ["long", "12", "3"]], left=1) == ["a      b  c", "long  12  3"]


def test_the_table_has_a_line_a_cell():
    head, first, second = results_table([made("math", "10 11"), made("a_long_name", "00 00")])
    assert head.split("  ")[0] == "data"
    assert "pass@2" in head
    assert "pass@1" not in head
    assert first.split()[:6] == ["math", "16", "warm", "2", "x", "2"]
    assert "0.750" in first
    assert "1.000" in first
    assert "50.0%" in first
    assert len(head) == len(first) == len(second)
    assert "pass@" not in results_table([made("math", "1 0")])[0]
