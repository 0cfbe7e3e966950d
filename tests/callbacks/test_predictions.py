import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from drift.callbacks import PredictionCallback, RolloutCallback
from drift.data import PromptDataModule
from drift.models import load_tokenizer
from drift.module import RLDFModule
from drift.rollout import DenoiseConfig

GREEDY = DenoiseConfig(block_length=16)


def predict(folder: Path, task, make_trainer, callback: PredictionCallback) -> list:
    rollout = RolloutCallback(completion_length=16, decode=GREEDY, evaluation=GREEDY)
    trainer = make_trainer(callbacks=[rollout, callback])
    data = PromptDataModule(task, num_test=5, evaluation_batch_size=2)
    return trainer.predict(RLDFModule(str(folder)), datamodule=data)


@pytest.mark.parametrize("path", [None, "deep/answers.jsonl"])
def test_writes_one_line_an_answer(tiny_folder, spread_task, make_trainer, tmp_path: Path, path: str | None):
    file = tmp_path / (path or "predictions.jsonl")
    callback = PredictionCallback(path if path is None else str(file))
    batches = predict(tiny_folder, spread_task, make_trainer, callback)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [line["position"] for line in lines] == [0, 1, 2, 3, 4]
    assert {line["dataset"] for line in lines} == {"sudoku"}
    tokenizer = load_tokenizer(tiny_folder)
    rows = [(batch, i) for batch in batches for i in range(len(batch.problems))]
    for line, (batch, i) in zip(lines, rows, strict=True):
        assert line["prompt"] == batch.problems[i].prompt
        text = tokenizer.decode(batch.rollout.completion_ids[i], skip_special_tokens=True)
        assert line["completion"] == text
        assert line["reward"] == pytest.approx(spread_task.reward.score(text, batch.problems[i]))
        assert line["timesteps"] == int(batch.rollout.num_timesteps[i])


def test_a_second_run_starts_an_empty_file(tiny_folder, spread_task, make_trainer, tmp_path: Path):
    for _ in range(2):
        predict(tiny_folder, spread_task, make_trainer, PredictionCallback(str(tmp_path / "a.jsonl")))
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 5


def test_each_rank_writes_a_file_of_its_own(tmp_path: Path):
    for rank in range(2):
        trainer = SimpleNamespace(log_dir=str(tmp_path), default_root_dir=None, global_rank=rank)
        predictions = PredictionCallback()
        predictions.setup(trainer, None, "predict")
        predictions.on_predict_start(trainer, None)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["predictions.1.jsonl", "predictions.jsonl"]


def test_rewards_and_answers_see_the_answer_prefix(
    tiny_folder, spread_task, make_trainer, tmp_path: Path, monkeypatch
):
    real = type(spread_task).problem
    monkeypatch.setattr(
        type(spread_task), "problem", lambda self, row: replace(real(self, row), answer_prefix="is: ")
    )
    batches = predict(
        tiny_folder, spread_task, make_trainer, PredictionCallback(str(tmp_path / "answers.jsonl"))
    )
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(tiny_folder)
    rows = [(batch, i) for batch in batches for i in range(len(batch.problems))]
    for line, (batch, i) in zip(lines, rows, strict=True):
        assert tokenizer.decode(batch.prompt_ids[i]) == f"{batch.problems[i].prompt}\nis: "
        completion = tokenizer.decode(batch.rollout.completion_ids[i], skip_special_tokens=True)
        assert line["completion"] == f"is: {completion}"
        assert line["reward"] == pytest.approx(
            spread_task.reward.score(f"is: {completion}", batch.problems[i])
        )
