import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import datasets
import pytest
import torch

from drift.contract import ConfigError, PromptBatch
from drift.data.stream import (
    EvaluationPrompts,
    ProceduralRows,
    PromptStream,
    Rows,
    ShuffledRows,
    StreamedRows,
    collate_prompts,
)
from drift.data.template import PromptTemplate
from drift.models.characters import character_tokenizer
from drift.tasks import MathTask, SudokuTask

NUMBERS = [{"n": n} for n in range(7)]


def numbers(rows: Iterator, num: int) -> list[int]:
    return [row["n"] for row in islice(rows, num)]


def procedural(tmp_path: Path) -> Rows:
    return ProceduralRows(SudokuTask())


def shuffled(tmp_path: Path) -> Rows:
    return ShuffledRows(NUMBERS, seed=3)


def in_order(tmp_path: Path) -> Rows:
    return ShuffledRows(NUMBERS, seed=3, shuffle=False)


def streamed(tmp_path: Path) -> Rows:
    return StreamedRows(streaming_dataset(tmp_path), seed=3)


def streaming_dataset(tmp_path: Path, rows: list | None = None) -> datasets.IterableDataset:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in NUMBERS if rows is None))
    if rows is not None:
        return datasets.IterableDataset.from_generator(lambda: iter(rows))
    return datasets.load_dataset(
        "json", data_files=str(file), split="train", streaming=True, cache_dir=str(tmp_path / "cache")
    )


KINDS = pytest.mark.parametrize("kind", [procedural, shuffled, in_order, streamed])


@pytest.mark.parametrize("kind", [shuffled, in_order, streamed])
def test_every_epoch_holds_every_row_once(kind: Callable[[Path], Rows], tmp_path: Path):
    found = numbers(kind(tmp_path).starting_at(0), 28)
    epochs = [found[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    if kind is in_order:
        assert epochs == [list(range(7))] * 4
    else:
        assert len({tuple(epoch) for epoch in epochs}) > 1, "each epoch has an order of its own"


@KINDS
def test_rows_can_start_anywhere(kind: Callable[[Path], Rows], tmp_path: Path):
    whole = list(islice(kind(tmp_path).starting_at(0), 20))
    for position in (1, 6, 7, 8, 15):
        late = list(islice(kind(tmp_path).starting_at(position), 20 - position))
        assert late == whole[position:], position


def test_orders_depend_on_the_seed():
    first, other = (numbers(ShuffledRows(NUMBERS, seed).starting_at(0), 7) for seed in (0, 100))
    assert first != other


def test_procedural_rows_are_the_tasks_training_rows():
    task = SudokuTask()
    assert list(islice(ProceduralRows(task).starting_at(5), 3)) == [task.row("train", n) for n in (5, 6, 7)]


def test_a_stream_without_rows_is_an_error(tmp_path: Path):
    rows = StreamedRows(streaming_dataset(tmp_path).filter(lambda row: False))
    with pytest.raises(ConfigError, match=r"data\.train is a streaming dataset without rows"):
        next(iter(rows.starting_at(0)))


@KINDS
def test_rows_beside_the_stream_can_start_anywhere_too(kind: Callable[[Path], Rows], tmp_path: Path):
    rows = kind(tmp_path)
    beside = list(islice(rows.beside().starting_at(0), 20))
    assert beside == list(islice(kind(tmp_path).beside().starting_at(0), 20))
    assert beside[9:] == list(islice(rows.beside().starting_at(9), 11))
    stream = list(islice(rows.starting_at(0), 20))
    assert beside != stream
    if kind is procedural:
        puzzles = [[row["puzzle"] for row in found] for found in (beside, stream)]
        assert not set(puzzles[0]) & set(puzzles[1])
    else:
        for epoch in (beside[:7], beside[7:14]):
            assert sorted(row["n"] for row in epoch) == list(range(7))
            assert epoch != NUMBERS, "they are shuffled, whatever the stream is"


Batch = tuple[list, list[int], int]


def collate(rows, positions, update) -> Batch:
    return (list(rows), list(positions), update)


def stream(rows: Rows, start_step: int = 0, num_updates: int = 1, share: range = range(4)) -> Iterator[Batch]:
    return iter(PromptStream(rows, collate, 4, share, start_step, num_updates))


def test_stream_gives_each_batch_once_for_every_update(tmp_path: Path):
    found = list(islice(stream(in_order(tmp_path), num_updates=3), 7))
    assert [positions for _, positions, _ in found] == [[0, 1, 2, 3]] * 3 + [[4, 5, 6, 7]] * 3 + [
        [8, 9, 10, 11]
    ]
    assert [update for *_, update in found] == [0, 1, 2, 0, 1, 2, 0]
    # Seven rows: the second batch begins the second epoch with its last one.
    assert [row["n"] for row in found[3][0]] == [4, 5, 6, 0]


@pytest.mark.parametrize("num_updates", [1, 3])
@KINDS
def test_a_resumed_stream_is_the_tail_of_the_uninterrupted_one(
    kind: Callable[[Path], Rows], num_updates: int, tmp_path: Path
):
    whole = list(islice(stream(kind(tmp_path), num_updates=num_updates), 12))
    for start in range(1, 11):
        late = list(islice(stream(kind(tmp_path), start, num_updates), 12 - start))
        assert late == whole[start:], start


@pytest.mark.parametrize("world_size", [2, 4])
@KINDS
def test_the_ranks_share_the_prompts_of_every_step(
    kind: Callable[[Path], Rows], world_size: int, tmp_path: Path
):
    alone = list(islice(stream(kind(tmp_path)), 4))
    size = 4 // world_size
    ranks = [
        list(islice(stream(kind(tmp_path), share=range(r * size, (r + 1) * size)), 4))
        for r in range(world_size)
    ]
    for step, (rows, positions, _) in enumerate(alone):
        assert [row for rank in ranks for row in rank[step][0]] == rows
        assert [position for rank in ranks for position in rank[step][1]] == positions


@pytest.mark.parametrize(
    ("num", "batch_size", "world_size"), [(7, 3, 1), (7, 2, 2), (8, 4, 4), (3, 2, 5), (1, 1, 2)]
)
def test_evaluation_sees_every_row_once(num: int, batch_size: int, world_size: int):
    rows, seen = NUMBERS[:num] + [{"n": 7}] * (num > 7), []
    for rank in range(world_size):
        prompts = EvaluationPrompts(rows, collate, batch_size, rank, world_size)
        batches = list(prompts)
        assert all(0 < len(found) <= batch_size for found, *_ in batches)
        for found, positions, update in batches:
            assert found == [rows[i] for i in positions]
            assert update == 0
            seen += positions
    assert sorted(seen) == list(range(num))


def test_evaluation_batches_are_in_order_and_the_last_one_may_be_small():
    found = [positions for _, positions, _ in EvaluationPrompts(NUMBERS, collate, 3, 0, 1)]
    assert found == [[0, 1, 2], [3, 4, 5], [6]]


def batch_of(*questions: str, **settings) -> PromptBatch:
    task = MathTask(instruction="")
    rows = [{"question": q, "ground_truth_answer": "1"} for q in questions]
    template = PromptTemplate(character_tokenizer(), None, 64)
    return collate_prompts(task, template, rows, range(5, 5 + len(rows)), 2, **settings)


def test_prompts_are_padded_on_the_left():
    batch, tokenizer = batch_of("abc", "a", "ab"), character_tokenizer()
    a, b, c = tokenizer("abc")["input_ids"]
    assert batch.prompt_ids.tolist() == [[a, b, c], [0, 0, a], [0, a, b]]
    assert batch.prompt_mask.tolist() == [[True] * 3, [False, False, True], [False, True, True]]
    assert batch.positions.tolist() == [5, 6, 7]
    assert batch.update == 2
    assert [problem.prompt for problem in batch.problems] == ["abc", "a", "ab"]
    assert batch.completion_ids is None
    assert batch.rollout is None
    assert (batch.prompt_ids.dtype, batch.prompt_mask.dtype) == (torch.int64, torch.bool)


def test_demonstrations_are_padded_on_the_right():
    task, tokenizer = SudokuTask(), character_tokenizer()
    rows = [task.row("train", n) for n in range(2)]
    batch = collate_prompts(
        task, PromptTemplate(tokenizer, None, 64), rows, [0, 1], 0, demonstration_length=18
    )
    for row, ids in zip(rows, batch.completion_ids.tolist(), strict=True):
        assert ids[16:] == [0, 0]
        assert tokenizer.decode(ids[:16]) == row["demonstration"]


def test_an_unusable_prompt_is_named_by_its_place():
    with pytest.raises(ConfigError, match=r"^data\.test \(rows\.json\) row 6: its prompt has 65 tokens"):
        batch_of("a", "b" * 65, where="data.test (rows.json) row")
