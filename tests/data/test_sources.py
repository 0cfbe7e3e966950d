import json
from pathlib import Path

import datasets
import pytest

from drift.contract import ConfigError
from drift.data.sources import Source, load_rows
from drift.rewards import CodeReward
from drift.tasks import CodeTask, MathTask

ROWS = [{"question": f"What is {n}+1?", "ground_truth_answer": str(n + 1)} for n in range(10)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, rows: list | None = None) -> str:
    rows = ROWS if rows is None else rows
    if path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=2))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return str(path)


def load(path: str, **settings) -> datasets.Dataset | datasets.IterableDataset:
    return load_rows(Source(path=path, **settings), MathTask(), "data.train")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet", "odd [1] *.json"])
def test_local_files(tmp_path: Path, name: str, streaming: bool):
    rows = load(write(tmp_path / name), streaming=streaming)
    assert isinstance(rows, datasets.IterableDataset if streaming else datasets.Dataset)
    assert list(rows) == ROWS


def test_a_changed_file_is_read_anew(tmp_path: Path):
    assert len(load(write(tmp_path / "a.json"))) == 10
    assert list(load(write(tmp_path / "a.json", ROWS[3:5]))) == ROWS[3:5]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("limit", "num"), [(1, 1), (3, 3), (99, 10), (None, 10)])
def test_limit_keeps_the_first_rows(tmp_path: Path, limit: int | None, num: int, streaming: bool):
    rows = load(write(tmp_path / "a.json"), limit=limit, streaming=streaming)
    assert list(rows) == ROWS[:num]


def test_the_split_of_a_file_is_what_it_is_called(tmp_path: Path):
    path = write(tmp_path / "a.json")
    assert list(load(path, split="test")) == ROWS
    assert list(load(path, split="test[2:4]")) == ROWS[2:4]
    with pytest.raises(ConfigError, match=r"split is 'test\[2:4\]' and .*streaming is true: .*cannot be cut"):
        load(path, split="test[2:4]", streaming=True)


@pytest.mark.parametrize(("name", "num_unusable"), [("MATH_train.json", 2), ("MATH500.json", 0)])
def test_benchmark_files(shared: Path, name: str, num_unusable: int):
    rows = load(str(shared / "data" / name), skip_unusable=True)
    expected = json.loads((shared / "data" / name).read_text())
    assert len(rows) == len(expected) - num_unusable  # two questions of MATH_train have no answer
    assert rows[0] == expected[0]
    assert rows[-1] == expected[-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "no/such/file.json"}, r"data.train.path='no/such/file.json' does not exist.*looked for /"),
        ({"path": "file.jsonl"}, "does not exist"),
        ({"path": "../nothing"}, "does not exist"),
        ({"path": "/no/such/thing"}, "does not exist"),
        ({"path": "~/no/such/thing"}, "does not exist"),
        ({"path": "."}, r"data.train.path='.' is a folder: name one file in it \(.json, .jsonl, .parquet\)"),
        ({"path": "a.json", "limit": 0}, "data.train.limit=0 must be at least 1"),
        ({"path": "a.json", "limit": -1}, "data.train.limit=-1 must be at least 1"),
        (
            {"path": "nobody/nothing"},
            "data.train: path='nobody/nothing', name=None, split='train' is no file here",
        ),
        (
            {"path": "nothing", "name": "main"},
            "path='nothing', name='main'.*not be loaded from the hub.*go online",
        ),
    ],
)
def test_impossible_sources_are_refused(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        load_rows(Source(**settings), MathTask(), "data.train")


def test_other_file_types_are_refused(tmp_path: Path):
    path = tmp_path / "a.csv"
    path.write_text("question,ground_truth_answer\n1,2\n")
    with pytest.raises(ConfigError, match=r"has no known file type: convert it to one of \.json, \.jsonl, "):
        load(str(path))


def test_a_file_has_no_configurations(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"data.train.name='main' is for hub datasets.*remove it"):
        load(write(tmp_path / "a.json"), name="main")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", ""),
        ("a.jsonl", ""),
        ("a.json", "[]"),
        ("a.json", '[{"question": "?", '),
        ("a.jsonl", '{"question": "?"}\n{"question'),
        ("a.parquet", "no parquet"),
        ("a.parquet", ""),
    ],
)
def test_broken_and_empty_files_are_refused(tmp_path: Path, name: str, content: str, streaming: bool):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(
        ConfigError, match=rf"data.train.path='.*{name}'.*(cannot be read|holds no rows).*orrect"
    ):
        load(str(path), streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_field_is_named_with_the_fix(tmp_path: Path, streaming: bool):
    path = write(tmp_path / "a.json", [{"problem": "?", "ground_truth_answer": "1"}])
    with pytest.raises(
        ConfigError,
        match=r"data.train \(file a.json, row 0\) has no field 'question'; it has \['ground_truth_answer', "
        r"'problem'\]: set data.task.question_field",
    ):
        load(path, streaming=streaming)


def test_an_answer_that_cannot_be_judged_is_named(tmp_path: Path):
    path = write(tmp_path / "a.json", [{"question": "?", "ground_truth_answer": ""}])
    with pytest.raises(ConfigError, match=r"\(file a.json, row 0\): field 'ground_truth_answer' is ''"):
        load(path)


def test_a_bad_row_in_the_middle_is_found_at_the_start(tmp_path: Path):
    path = write(tmp_path / "a.json", [*ROWS[:3], {"question": "?", "ground_truth_answer": ""}, *ROWS[3:]])
    with pytest.raises(
        ConfigError, match=r"row 3\): field .*; data.train.skip_unusable=true leaves out such rows"
    ):
        load(path)
    assert list(load(path, limit=3)) == ROWS[:3]  # what is not used need not be right


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("place", [0, 3])
def test_bad_rows_can_be_left_out(tmp_path: Path, place: int, streaming: bool):
    bad = {"question": "?", "ground_truth_answer": ""}
    path = write(tmp_path / "a.json", [*ROWS[:place], bad, *ROWS[place:]])
    assert list(load(path, streaming=streaming, skip_unusable=True)) == ROWS
    assert list(load(path, streaming=streaming, skip_unusable=True, limit=4)) == ROWS[:4]


@pytest.mark.parametrize("streaming", [False, True])
def test_leaving_out_every_row_is_an_error(tmp_path: Path, streaming: bool):
    path = write(tmp_path / "a.json", [{"problem": "?"}] * 3)
    with pytest.raises(ConfigError, match=r"row 0\) has no field 'question'"):
        load(path, streaming=streaming, skip_unusable=True)


def test_hub_datasets_get_every_setting(monkeypatch: pytest.MonkeyPatch):
    seen = []

    def fake(*args, **settings):
        seen.append((args, settings))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    rows = load("owner/name", name="main", split="test", limit=2)
    assert list(rows) == ROWS[:2]
    assert seen == [(("owner/name", "main"), {"split": "test", "streaming": False})]


@pytest.mark.parametrize("content", ["null", "3", '"text"', "\n  true"])
def test_json_that_holds_no_objects_is_refused_before_it_is_parsed(tmp_path: Path, content: str):
    """A bare null ended the whole process, without a word."""
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(
        ConfigError, match=r"data\.train\.path='.*a\.json' holds no objects: a JSON file holds a"
    ):
        load(str(tmp_path / "a.json"))


def test_rows_whose_tests_never_end_are_named_or_left_out(tmp_path: Path, bwrap: None):
    row = {
        "question": "f",
        "test_method": "function",
        "test_time_limit": 1,
        "test_list": ["assert f(1) == 1"],
    }
    endless = {**row, "test_list": ["assert f(1) == 1\nfor _ in iter(int, 1): pass"]}
    path = tmp_path / "rows.jsonl"
    # Row 0 has no question; the number that is named is that of the file all the same.
    lines = [{**row, "question": ""}, row, endless, row]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = CodeTask(reward=CodeReward(timeout_seconds=0.5))
    assert len(load_rows(Source(path=str(path), skip_unusable=True), task, "data.train")) == 2
    path.write_text("".join(json.dumps(line) + "\n" for line in lines[1:]))
    with pytest.raises(ConfigError, match=r"data\.train \(.*, row 1\): .*does not end.*skip_unusable"):
        load_rows(Source(path=str(path)), task, "data.train")
    path.write_text(json.dumps(endless) + "\n")
    with pytest.raises(ConfigError, match=r"row 0\): .*does not end"):
        load_rows(Source(path=str(path), skip_unusable=True), task, "data.train")
