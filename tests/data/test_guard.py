import json
import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import datasets
import pytest

from drift.callbacks import RolloutCallback
from drift.contract import ConfigError, Problem
from drift.data import PromptDataModule, Source
from drift.data import guard as module_under_test
from drift.module import RLDFModule
from drift.rollout import DenoiseConfig
from drift.sft import SFTModule
from drift.tasks import CountdownTask, MathTask, SudokuTask, Task

DECODE = DenoiseConfig(block_length=16)
LONG = "In a bag there are three red balls and four blue balls, how many ways are there to draw two"
TRAIN = ["one", "What is 1+1?", "three", f"{LONG} red ones?", "five"]
# In turn: the same, the same but for its writing, most 8-grams of the 4th of TRAIN, and none.
TEST = ["three", "what is $1 + 1$", f"{LONG}.", "other"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


class Trainer:
    """As much of a trainer as the data module looks at."""

    max_steps = 100
    val_check_interval = 1
    limit_train_batches = 1.0
    accumulate_grad_batches = 1
    global_step = 0
    lightning_module = type("Module", (), {"num_updates": 1})()

    def __init__(self, folder: Path) -> None:
        self.log_dir = None
        self.default_root_dir = str(folder / "run")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Source]:
    def run(name: str, texts: list[str], **settings) -> Source:
        path = tmp_path / f"{name}.jsonl"
        rows = [{"question": text, "ground_truth_answer": "1"} for text in texts]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return Source(path=str(path), **settings)

    return run


@pytest.fixture
def prompts(tiny_folder: Path, tmp_path: Path) -> Callable[..., PromptDataModule]:
    def run(**settings) -> PromptDataModule:
        defaults = {
            "task": MathTask(),
            "tokenizer": str(tiny_folder),
            "prompts_per_step": 1,
            "shuffle": False,
        }
        made = PromptDataModule(**defaults | settings)
        made.trainer = Trainer(tmp_path)
        return made

    return run


def listed(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "run" / "contamination.jsonl").read_text().splitlines()]


def trained_on(prompts: PromptDataModule, num: int) -> list[str]:
    stream = islice(prompts.train_dataloader(), num)
    return [problem.row["question"] for batch in stream for problem in batch.problems]


def test_validation_on_test_rows_is_warned_of(prompts, write):
    train, test = write("train", ["other"]), write("test", ["one", "two", "three"])
    validation = write("validation", ["one", "four", "two"])
    with pytest.warns(UserWarning, match=r"^2 of 3 prompts of data\.validation .* are in data\.test "):
        prompts(train=train, validation=validation, test=test).setup("fit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompts(train=train, validation=write("apart", ["four"]), test=test).setup("fit")


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_contaminated_run_stops(prompts, write, tmp_path: Path, capsys, split: str):
    train, evaluation = write("train", TRAIN), write("evaluation", TEST)
    with pytest.raises(ConfigError) as caught:
        prompts(train=train, **{split: evaluation}).setup("fit")
    where = f"data.{split} ({evaluation.path})"
    file = tmp_path / "run" / "contamination.jsonl"
    counts = f"3 of 4 prompts of {where} (1 exact, 1 normalised, 1 overlap)"
    assert str(caught.value) == (
        f"data.train ({train.path}) holds evaluation prompts: {counts}, listed in {file}. Use other data, or "
        "leave 3 of 5 training rows out with data.drop_contaminated: true, or train on all of them with "
        "data.allow_contamination: true"
    )
    assert capsys.readouterr().out == (
        "--- contamination ---\n"
        f"{counts} are in data.train ({train.path})\n"
        f"  normalised: training row 1, {where} row 1: what is $1 + 1$\n"
        f"  exact: training row 2, {where} row 0: three\n"
        f"  overlap 1.00: training row 3, {where} row 2: {LONG[:70]}...\n"
        "---\n"
    )
    assert [(hit["train_row"], hit["row"], hit["kind"], hit["overlap"]) for hit in listed(tmp_path)] == [
        (1, 1, "normalised", 1.0),
        (2, 0, "exact", 1.0),
        (3, 2, "overlap", 1.0),
    ]
    assert listed(tmp_path)[0] == {
        "evaluation": where,
        "row": 1,
        "train_row": 1,
        "kind": "normalised",
        "overlap": 1.0,
        "prompt": "what is $1 + 1$",
        "train_prompt": "What is 1+1?",
    }
    assert [path.name for path in file.parent.iterdir()] == ["contamination.jsonl"]


def test_only_the_first_hits_are_shown_and_all_are_written(prompts, write, tmp_path: Path, capsys):
    with pytest.raises(ConfigError, match="12 of 13 prompts"):
        prompts(
            train=write("train", [f"number {i}" for i in range(12)]),
            test=write("test", [f"number {i}" for i in range(13)]),
        ).setup("fit")
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith("  exact: ") for line in lines[2:7]] == [True] * 5
    assert lines[7:] == ["  and 7 more", "---"]
    assert len(listed(tmp_path)) == 12


def test_allow_contamination_warns_and_changes_nothing(prompts, write, tmp_path: Path):
    data = prompts(
        train=write("train", TRAIN),
        validation=write("validation", TEST),
        test=write("test", ["new", "five"]),
        allow_contamination=True,
    )
    with pytest.warns(
        UserWarning, match=r"1 of 2 prompts of data\.test .*all 4 of 5 training rows are train"
    ):
        data.setup("fit")
    assert trained_on(data, 5) == TRAIN
    assert len(listed(tmp_path)) == 4


def test_drop_contaminated_leaves_the_rows_out(prompts, write, tmp_path: Path, caplog):
    data = prompts(train=write("train", TRAIN), test=write("test", TEST), drop_contaminated=True)
    with caplog.at_level("INFO"):
        data.setup("fit")
    assert "data.drop_contaminated is true: 3 of 5 training rows are left out" in caplog.text
    assert trained_on(data, 4) == ["one", "five"] * 2
    assert [problem.row["question"] for problem in data.examples[:2]] == ["one", "five"]
    assert len(listed(tmp_path)) == 3


def test_dropping_everything_is_an_error(prompts, write):
    source = write("both", TRAIN)
    with pytest.raises(ConfigError, match=r"data\.drop_contaminated leaves no training row: use other data"):
        prompts(train=source, test=source, drop_contaminated=True).setup("fit")


def test_clean_data_is_reported_and_leaves_no_file(prompts, write, tmp_path: Path, capsys):
    train, test = write("train", TRAIN), write("test", ["other", "another"])
    data = prompts(train=train, test=test)
    data.setup("fit")
    assert capsys.readouterr().out == (
        "--- contamination ---\n"
        f"0 of 2 prompts of data.test ({test.path}) (0 exact, 0 normalised, 0 overlap) are in "
        f"data.train ({train.path})\n"
        "---\n"
    )
    assert not (tmp_path / "run").exists()


def test_the_threshold_is_a_setting(prompts, write):
    # 19 words have 12 runs of 8; other last words change one of them.
    settings = {"train": write("train", [f"{LONG} here"]), "test": write("test", [f"{LONG} there"])}
    prompts(**settings).setup("fit")
    with pytest.raises(ConfigError, match="0 exact, 0 normalised, 1 overlap"):
        prompts(**settings, contamination_threshold=0.9).setup("fit")


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_only_fit_compares(prompts, write, stage: str, capsys):
    source = write("both", TRAIN)
    prompts(train=source, validation=source, test=source).setup(stage)
    assert capsys.readouterr().out == ""


def test_instruction_and_system_prompt_do_not_count(prompts, write):
    words = " ".join("abcdefghijklmnopqrstuvwxyz" * 3)
    data = prompts(
        task=MathTask(instruction=words),
        system_prompt=words,
        train=write("train", ["one"]),
        test=write("test", ["two"]),
        contamination_threshold=0.01,
    )
    data.setup("fit")


def test_few_shot_examples_of_a_task_of_ones_own_do_not_count(prompts, write):
    class FewShot(Task):
        fields = ("question",)
        reward = MathTask().reward

        def problem(self, row):
            shots = " ".join(f"Question {i}: how much is {i} and {i}? Answer: {2 * i}." for i in range(20))
            return Problem(prompt=f"{shots} Question: {row['question']}", answer="1", row=dict(row))

    train, test = write("train", [f"{i} and 2" for i in range(9)]), [f"{i} and 3" for i in range(9)]
    prompts(task=FewShot(), train=train, test=write("test", test)).setup("fit")
    with pytest.raises(ConfigError, match="1 of 10 prompts"):
        prompts(task=FewShot(), train=train, test=write("more", [*test, "4 and 2"])).setup("fit")


def test_a_stream_is_compared_as_it_passes(prompts, write, tmp_path: Path):
    train, test = write("train", ["0"] * 20 + TRAIN, streaming=True), write("test", TEST)
    data = prompts(train=train, test=test)
    data.setup("fit")
    assert trained_on(data, 21) == ["0"] * 20 + ["one"]
    with pytest.raises(ConfigError) as caught:
        trained_on(data, 22)
    assert str(caught.value) == (
        f"data.train ({train.path}) row 21 holds evaluation prompts: normalised: training row 21, data.test "
        f"({test.path}) row 1: what is $1 + 1$, listed in {tmp_path / 'run' / 'contamination.jsonl'}. Use "
        "other data, or leave such rows out with data.drop_contaminated: true, or train on all of them with "
        "data.allow_contamination: true"
    )
    assert [hit["train_row"] for hit in listed(tmp_path)] == [21]


def test_a_stream_whose_first_rows_are_contaminated_stops_at_once(prompts, write):
    with pytest.raises(ConfigError, match="row 1 holds evaluation prompts"):
        prompts(train=write("train", TRAIN, streaming=True), test=write("test", TEST)).setup("fit")


@pytest.mark.parametrize("start", [0, 3])
def test_a_stream_is_filtered(prompts, write, tmp_path: Path, caplog, start: int):
    data = prompts(
        train=write("train", TRAIN, streaming=True), test=write("test", TEST), drop_contaminated=True
    )
    data.trainer.global_step = start  # a resumed run goes on in the rows that were left
    data.setup("fit")
    assert trained_on(data, 4) == (["one", "five"] * 4)[start : start + 4]
    assert [hit["train_row"] for hit in listed(tmp_path)] == [1, 2, 3]  # once, whatever the epochs
    with caplog.at_level("INFO"):
        data.teardown("fit")
    assert "3 of the rows that were read hold evaluation prompts; they were left out" in caplog.text


def test_a_stream_may_be_contaminated(prompts, write, tmp_path: Path, caplog):
    data = prompts(
        train=write("train", TRAIN, streaming=True), test=write("test", TEST), allow_contamination=True
    )
    with pytest.warns(UserWarning, match="row 1 holds evaluation prompts") as warned:
        data.setup("fit")
    assert len([w for w in warned if "evaluation prompts" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trained_on(data, 10) == TRAIN * 2
    assert [hit["train_row"] for hit in listed(tmp_path)] == [1, 2, 3]
    with caplog.at_level("INFO"):
        data.teardown("fit")
    assert "3 of the rows that were read hold evaluation prompts; they were trained on" in caplog.text


def test_a_clean_stream_says_so_at_the_end(prompts, write, caplog):
    data = prompts(train=write("train", ["1"], streaming=True), test=write("test", TEST))
    data.setup("fit")
    with caplog.at_level("INFO"):
        data.teardown("fit")
    assert "0 of the rows that were read hold evaluation prompts" in caplog.text


def sudoku_file(tmp_path: Path, rows: list[dict]) -> Source:
    path = tmp_path / "sudoku.json"
    path.write_text(json.dumps(rows))
    return Source(path=str(path))


def test_made_puzzles_are_neither_compared_nor_printed(prompts, capsys):
    prompts(task=SudokuTask(), num_validation=4, num_test=4).setup("fit")
    assert capsys.readouterr().out == ""


def test_puzzles_of_a_test_file_are_held_out_of_those_made_for_training(prompts, tmp_path: Path, caplog):
    rows = [SudokuTask().row("train", index) for index in (0, 2)]
    swap = str.maketrans("1234", "4321")
    renamed = {key: value.translate(swap) for key, value in rows[0].items()}  # to a solver the same
    data = prompts(task=SudokuTask(), test=sudoku_file(tmp_path, [renamed, rows[1]]))
    with caplog.at_level("INFO"):
        data.setup("fit")
    assert "its 2 puzzles are held out of training" in caplog.text
    made = [data.task.row("train", index) for index in range(4)]
    plain = [SudokuTask().row("train", index) for index in range(4)]
    assert [row == other for row, other in zip(made, plain, strict=True)] == [False, True, False, True]
    forms = {data.task.canonical(row) for row in rows}
    assert not forms & {data.task.canonical(data.task.row("train", index)) for index in range(50)}


def test_made_test_puzzles_are_looked_for_in_a_training_file(prompts, tmp_path: Path):
    test = SudokuTask().rows("test", 6)
    # One cell differs: it is another puzzle, though nearly all of its text is there.
    puzzle = test[0]["puzzle"]
    last = max(puzzle.rfind(digit) for digit in "1234")
    near = test[0] | {"puzzle": f"{puzzle[:last]}.{puzzle[last + 1 :]}"}
    train = sudoku_file(tmp_path, [near, *SudokuTask().rows("train", 5), test[3]])
    data = prompts(task=SudokuTask(), train=train, num_test=6, contamination_threshold=0.1)
    with pytest.raises(ConfigError, match=r"1 of 6 prompts of data\.test \(SudokuTask\) \(1 exact, 0 norm"):
        data.setup("fit")


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_row_without_a_puzzle_is_named(prompts, tmp_path: Path, split: str):
    source = sudoku_file(tmp_path, [SudokuTask().row(split, 0) | {"puzzle": 12}])
    with pytest.raises(ConfigError) as caught:
        prompts(task=SudokuTask(), **{split: source}).setup("fit")
    assert str(caught.value) == (
        f"data.{split} (file {Path(source.path).name}, row 0): field 'puzzle' is 12; it must be 16 cells in "
        "one text, 1234 and '.': correct the data"
    )


def test_sets_of_other_tasks_are_not_held_out(prompts):
    data = prompts(task=SudokuTask())
    data.guard.compare_with([("data.test (numbers)", CountdownTask().rows("test", 3), CountdownTask())])
    data.guard.hold_out(data.task)
    assert data.task.row("train", 0) == SudokuTask().row("train", 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"contamination_threshold": 0.0}, r"data\.contamination_threshold is 0\.0: set it to more than 0"),
        ({"contamination_threshold": 1.01}, r"data\.contamination_threshold is 1\.01: .*at most 1"),
        ({"contamination_threshold": float("nan")}, r"data\.contamination_threshold is nan"),
        (
            {"allow_contamination": True, "drop_contaminated": True},
            r"data\.allow_contamination and data\.drop_contaminated are both true: .*set one to false",
        ),
    ],
)
def test_bad_settings(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        PromptDataModule(SudokuTask(), **settings)


def test_a_test_set_that_cannot_be_read_stops_before_training(prompts, write):
    with pytest.raises(ConfigError, match=r"data\.test\.path='absent\.json' does not exist"):
        prompts(train=write("train", TRAIN), test=Source(path="absent.json")).setup("fit")


def test_one_rank_writes_and_shows(prompts, write, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(module_under_test, "rank", lambda: 1)
    with pytest.raises(ConfigError, match="3 of 4 prompts"):
        prompts(train=write("train", TRAIN), test=write("test", TEST)).setup("fit")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run").exists()


def test_ranks_that_read_different_rows_stop(prompts, write, monkeypatch):
    monkeypatch.setattr(module_under_test, "gather_over_ranks", lambda value: [value, "other"])
    with pytest.raises(ConfigError, match=r"data\.train .*the ranks read different rows; give all of them"):
        prompts(train=write("train", TRAIN), test=write("test", TEST)).setup("fit")


@pytest.mark.parametrize("kind", [RLDFModule, SFTModule])
def test_no_module_trains_on_its_test_set(tiny_folder: Path, make_trainer, write, tmp_path: Path, kind):
    data = PromptDataModule(MathTask(), train=write("train", TRAIN), test=write("test", TEST))
    rollout = RolloutCallback(group_size=2, completion_length=16, decode=DECODE, evaluation=DECODE)
    with pytest.raises(ConfigError, match="3 of 4 prompts"):
        make_trainer(callbacks=[rollout]).fit(kind(str(tiny_folder)), datamodule=data)
    assert len((tmp_path / "contamination.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("MATH_rldf", r"248 of 500 prompts of data\.test .*\(248 exact, 0 normalised, 0 overlap\)"),
        ("MATH_train", ""),
    ],
)
def test_benchmark_files(prompts, shared: Path, train: str, message: str, capsys):
    sources = {
        "train": Source(path=str(shared / "data" / f"{train}.json"), skip_unusable=True),
        "test": Source(path=str(shared / "data" / "MATH500.json")),
    }
    data = prompts(**sources, max_prompt_length=10_000)
    if message:
        with pytest.raises(ConfigError, match=message):
            data.setup("fit")
    else:
        data.setup("fit")
        assert "0 of 500 prompts of" in capsys.readouterr().out
