import json
from pathlib import Path

import datasets
import pytest

from drift.contract import ConfigError
from drift.data import Benchmark, PromptDataModule, Source
from drift.data.benchmarks import EvaluationSet, chosen, evaluation_sources
from drift.tasks import CountdownTask, MathTask, SudokuTask

MATH = MathTask(instruction="")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def write(tmp_path: Path):
    def run(name: str, *texts: str, field: str = "question") -> str:
        rows = [{field: text, "ground_truth_answer": "1"} for text in texts]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return run


def test_one_source_and_no_source_are_one_set(write):
    (found,) = evaluation_sources("test", Source(path="data/MATH500.json"), MATH, 5)
    assert (found.key, found.name, found.task, found.where) == (
        "data.test",
        "MATH500",
        MATH,
        "data.test (data/MATH500.json)",
    )
    (found,) = evaluation_sources("validation", None, SudokuTask(), 5)
    assert (found.name, found.source, found.where) == ("sudoku", None, "data.validation (SudokuTask)")
    assert len(found.load("validation")) == 5


def test_every_benchmark_has_its_rows_and_its_task(tiny_folder: Path, write):
    own = MathTask(question_field="q", instruction="")
    prompts = PromptDataModule(
        MATH,
        tokenizer=str(tiny_folder),
        test={
            "math": Benchmark(path=write("a.jsonl", "one", "two", "three"), limit=2),
            "other": Benchmark(path=write("b.jsonl", "four", field="q"), task=own),
            "sudoku": Benchmark(task=SudokuTask(), limit=3),
            "countdown": Benchmark(task=CountdownTask()),
        },
        num_test=4,
        evaluation_batch_size=2,
    )
    prompts.setup("test")
    sets = prompts.evaluation_sets["test"]
    assert [(found.name, len(found.rows)) for found in sets] == [
        ("math", 2),
        ("other", 1),
        ("sudoku", 3),
        ("countdown", 4),
    ]
    assert sets[0].task is MATH
    assert sets[1].task is own
    assert sets[1].where == f"data.test.other ({prompts.evaluation_sources['test'][1].source.path})"
    loaders = prompts.test_dataloader()
    assert [[p.prompt for batch in loader for p in batch.problems] for loader in loaders[:2]] == [
        ["one", "two"],
        ["four"],
    ]
    assert [len(batch.problems) for batch in loaders[2]] == [2, 1]
    assert prompts.examples[0].prompt == "one"


def test_some_of_the_benchmarks_are_chosen_by_name(tiny_folder: Path, write):
    several = {name: Benchmark(path=write(f"{name}.jsonl", name)) for name in ("one", "two", "three")}
    prompts = PromptDataModule(MATH, str(tiny_folder), test=several, benchmarks=["three", "one"])
    prompts.setup("test")
    assert [found.name for found in prompts.evaluation_sets["test"]] == ["three", "one"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["mth"], r"data\.benchmarks names 'mth': data\.test has only math, other; did you mean 'math'\?"),
        (["zzz"], r"names 'zzz': data\.test has only math, other$"),
        ([], r"data\.benchmarks is \[\]: name each benchmark once, or set it to null"),
        (["math", "math"], r"data\.benchmarks is \['math', 'math'\]: name each benchmark once"),
    ],
)
def test_names_of_no_benchmark(names: list[str], message: str):
    sources = evaluation_sources("test", {"math": Benchmark(path="a"), "other": Benchmark(path="b")}, MATH, 1)
    with pytest.raises(ConfigError, match=message):
        chosen(sources, names)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"data\.test is \{\}: name at least one benchmark, or set data\.test\.path"),
        ({"a/b": Benchmark(path="x")}, r"data\.test has a benchmark 'a/b': use letters, digits"),
        ({"m": Benchmark()}, r"data\.test\.m is None: MathTask doesn't make .*; set data\.test\.m\.path"),
        ({"s": Benchmark(task=SudokuTask(), limit=0)}, r"data\.test\.s\.limit is 0: set it to 1 or more"),
    ],
)
def test_bad_benchmarks_are_refused_before_anything_is_loaded(given: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        PromptDataModule(MATH, test=given)


def test_bad_rows_name_their_benchmark(tiny_folder: Path, write):
    def setup(path: str, **settings: object) -> None:
        both = {"fine": Benchmark(path=write("fine.jsonl", "one")), "bad": Benchmark(path=path)}
        PromptDataModule(MATH, str(tiny_folder), test=both, **settings).setup("test")

    with pytest.raises(ConfigError, match=r"data\.test\.bad\.path='nowhere\.json' does not exist"):
        setup("nowhere.json")
    with pytest.raises(ConfigError, match=r"data\.test\.bad\.path=.* is empty or cannot be read"):
        setup(write("empty.jsonl"))
    with pytest.raises(
        ConfigError, match=r"data\.test\.bad \(file q\.jsonl, row 0\) has no field 'question'"
    ):
        setup(write("q.jsonl", "one", field="q"))
    with pytest.raises(ConfigError, match=r"data\.test\.bad \(.*\) row 1: its prompt has 6 tokens"):
        setup(write("long.jsonl", "one", "longer"), max_prompt_length=5)


def test_the_settings_of_a_set_say_what_was_asked_and_how_it_was_judged(tiny_folder: Path):
    prompts = PromptDataModule(SudokuTask(), str(tiny_folder), system_prompt="Go.", num_test=1)
    prompts.setup("test")

    def settings(*rows: dict, task: MathTask = MATH, positions: tuple = (0,), name: str = "a") -> dict:
        found = EvaluationSet(name=name, rows=list(rows), task=task, where=name)
        return found.settings(prompts.template, positions)

    one, two = ({"question": q, "ground_truth_answer": "2"} for q in "13")
    base = settings(one, two, positions=(0, 1))
    assert base["num_rows"] == 2
    assert base["system_prompt"] == "Go."
    assert base["task"]["class"] == "drift.tasks.math.MathTask"
    assert "reward" not in base["task"]
    assert base["reward"] == {"class": "drift.rewards.math.MathReward", "timeout_seconds": 5.0}
    turned = {"ground_truth_answer": "2", "question": "1"}
    assert settings(turned, two, positions=(0, 1), name="b") == base
    # Only the rows that were used count, and their order.
    assert settings(one) == settings(one, two) != base
    assert settings(two, one, positions=(0, 1))["rows"] != base["rows"]
    # Another answer is another set of rows with the same prompts; another instruction the reverse.
    other = settings(one | {"ground_truth_answer": "5"}, two, positions=(0, 1))
    assert other["rows"] != base["rows"]
    assert other["prompts"] == base["prompts"]
    other = settings(one, two, task=MathTask(instruction="Box it."), positions=(0, 1))
    assert other["rows"] == base["rows"]
    assert other["prompts"] != base["prompts"]


def test_teardown_ends_every_reward_once(monkeypatch):
    closed, own = [], SudokuTask()
    monkeypatch.setattr(SudokuTask().reward.__class__, "close", lambda self: closed.append(self))
    task = SudokuTask()
    PromptDataModule(task, test={"a": Benchmark(), "b": Benchmark(task=own)}).teardown("test")
    assert closed == [task.reward, own.reward]
