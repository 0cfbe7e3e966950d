import json
from pathlib import Path

import pytest
from lightning import Callback

from drift.callbacks import AnswerCallback, RolloutCallback
from drift.callbacks.answers import merge
from drift.data import PromptDataModule
from drift.evaluation import GridConfig
from drift.models import load_tokenizer
from drift.models.characters import character_tokenizer
from drift.module import RLDFModule
from drift.rollout import DenoiseConfig

WARM = DenoiseConfig(block_length=8, temperature=1.0, threshold=0.5)
GRID = GridConfig(lengths=[8, 16], decodes={"warm": WARM}, samples=2)


class Keep(Callback):
    def __init__(self) -> None:
        self.batches = []

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.batches.append(batch)


@pytest.fixture
def test(tiny_folder: Path, spread_task, make_trainer):
    def run(answers: AnswerCallback, *callbacks: Callback, num: int = 3):
        rollout = RolloutCallback(completion_length=16, decode=WARM, evaluation=WARM, test=GRID)
        data = PromptDataModule(spread_task, num_test=num, evaluation_batch_size=2, system_prompt="Solve.")
        trainer = make_trainer(callbacks=[rollout, answers, *callbacks])
        trainer.test(RLDFModule(str(tiny_folder)), datamodule=data, verbose=False)

    return run


@pytest.mark.parametrize("path", [None, "deep/answers.jsonl"])
def test_every_answer_is_a_line(test, tiny_folder: Path, spread_task, tmp_path: Path, path: str | None):
    keep, file = Keep(), tmp_path / (path or "test.jsonl")
    test(AnswerCallback(None if path is None else str(file)), keep)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    places = [(line["position"], line["length"], line["sample"]) for line in lines]
    assert places == [(p, length, sample) for p in range(3) for length in (8, 16) for sample in range(2)]
    tokenizer = load_tokenizer(tiny_folder)
    expected = {
        (int(batch.positions[i]), rollout.completion_ids.shape[1], sample): (
            batch,
            i,
            rollout,
            i * 2 + sample,
        )
        for batch in keep.batches
        for rollout in batch.grid
        for i in range(len(batch.problems))
        for sample in range(2)
    }
    for line, place in zip(lines, places, strict=True):
        batch, prompt, rollout, row = expected[place]
        problem = batch.problems[prompt]
        assert (line["dataset"], line["decode"]) == ("sudoku", "warm")
        assert line["prompt"] == f"Solve.\n{problem.prompt}"
        assert line["truth"] == problem.answer
        assert line["answer"] == tokenizer.decode(rollout.completion_ids[row], skip_special_tokens=True)
        assert line["reward"] == pytest.approx(spread_task.reward.score(line["answer"], problem))
        assert line["correct"] == (line["reward"] >= 1)
        assert line["finished"] == (0 in rollout.completion_ids[row])
        assert line["timesteps"] == int(rollout.num_timesteps[row])
        assert line["token_ids"] == rollout.completion_ids[row].tolist()[: len(line["token_ids"])]
        assert line["step_map"] == rollout.step_map[row].tolist()[: len(line["step_map"])]
    assert [
        entry.name for entry in file.parent.iterdir() if "part" in entry.name or "new" in entry.name
    ] == []


def test_the_trace_ends_where_the_row_had_ended(make_policy, make_trainer, tmp_path: Path, spread_task):
    tokenizer = character_tokenizer()
    make_policy(favour={0: 150.0}, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    rollout = RolloutCallback(
        completion_length=24, decode=WARM, evaluation=DenoiseConfig(block_length=4, temperature=1.0)
    )
    keep = Keep()
    trainer = make_trainer(callbacks=[rollout, AnswerCallback(), keep])
    data = PromptDataModule(spread_task, num_test=8)
    trainer.test(RLDFModule(str(tmp_path / "policy")), datamodule=data, verbose=False)
    lines = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    lengths = {len(line["token_ids"]) for line in lines}
    assert len(lengths) > 1
    assert lengths <= set(range(4, 25, 4))
    (batch,) = keep.batches
    for line, ids, steps in zip(
        lines, batch.rollout.completion_ids.tolist(), batch.rollout.step_map.tolist(), strict=True
    ):
        length = len(line["token_ids"])
        assert line["token_ids"] + [0] * (24 - length) == ids
        assert line["step_map"] + [line["timesteps"]] * (24 - length) == steps
        assert max(line["step_map"]) < line["timesteps"]
        assert line["finished"] == (0 in ids)


def test_a_test_that_is_stopped_leaves_what_it_has_seen(test, tmp_path: Path):
    class Stop(Callback):
        def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 1:
                raise RuntimeError("power cut")

    (tmp_path / "test.jsonl").write_text("of an earlier test\n")
    with pytest.raises(RuntimeError, match="power cut"):
        test(AnswerCallback(), Stop(), num=5)
    lines = (tmp_path / ".test.jsonl.0.part").read_text().splitlines()
    assert {json.loads(line)["position"] for line in lines} == {0, 1, 2, 3}
    assert (tmp_path / "test.jsonl").read_text() == "of an earlier test\n"


def test_nothing_is_written_where_nobody_wants_it(test, tmp_path: Path):
    test(AnswerCallback(enabled=False))
    assert not list(tmp_path.glob("*.jsonl"))


def test_parts_are_merged_in_the_order_of_sets_and_positions(tmp_path: Path):
    def write(name: str, *places: tuple[int, int]) -> Path:
        lines = [json.dumps({"set": s, "position": p, "of": i}) for s, p in places for i in range(2)]
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
        return tmp_path / name

    parts = [write("a", (0, 0), (0, 2), (1, 0)), write("b", (0, 1)), write("c")]
    merge(parts, tmp_path / "all.jsonl")
    found = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    places = [(0, 0), (0, 1), (0, 2), (1, 0)]
    expected = [(s, p, i) for s, p in places for i in range(2)]
    assert [(line["set"], line["position"], line["of"]) for line in found] == expected
    assert [entry.name for entry in tmp_path.iterdir()] == ["all.jsonl"]
