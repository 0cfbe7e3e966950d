import json
from dataclasses import asdict
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from drift.callbacks import AnswerCallback, CheckpointCallback, RolloutCallback, SummaryCallback
from drift.data import PromptDataModule
from drift.models import weights_digest
from drift.module import RLDFModule
from drift.rollout import DenoiseConfig

DECODE = DenoiseConfig(block_length=16, threshold=0.5, temperature=1.0)


@pytest.fixture
def setup(tiny_folder: Path, spread_task, make_trainer):
    def make(steps: int = 1, path: str | None = None, checkpoint: bool = False, **settings):
        summary = SummaryCallback(path)
        rollout = RolloutCallback(group_size=2, completion_length=16, decode=DECODE, evaluation=DECODE)
        callbacks = [rollout, summary] + [CheckpointCallback()] * checkpoint
        trainer = make_trainer(steps, callbacks=callbacks, enable_checkpointing=checkpoint, **settings)
        data = PromptDataModule(spread_task, prompts_per_step=2, num_validation=3, num_test=4)
        return trainer, RLDFModule(str(tiny_folder)), data, summary

    return make


def test_training_ends_with_a_summary(setup, capsys, tmp_path: Path):
    settings = {"limit_val_batches": 1.0, "val_check_interval": 3, "logger": TensorBoardLogger(tmp_path, "")}
    trainer, module, data, summary = setup(7, checkpoint=True, **settings)
    trainer.fit(module, datamodule=data)
    out = capsys.readouterr().out
    assert "--- summary ---" in out
    lines = {line[:18].strip(): line[19:] for line in out.splitlines() if not line.startswith("---")}
    assert lines["steps"].startswith("0 -> 7 in ")
    rewards = summary.history["reward/mean"]
    assert len(rewards) == 7
    expected = f"{sum(rewards[:5]) / 5:.3f} -> {sum(rewards[-5:]) / 5:.3f} (first and last 5 steps)"
    assert lines["reward/mean"] == expected
    assert "->" in lines["rollout/timesteps"]
    assert "->" in lines["loss/total"]
    assert lines["val/accuracy"] == "0.000 -> 0.000, best 0.000"
    assert lines["best checkpoint"].endswith("best.ckpt")
    assert lines["last checkpoint"].endswith("last.ckpt")
    assert lines["logs"] == f"tensorboard --logdir {tmp_path / 'version_0'}"
    # Validations in training leave no results file.
    assert not (tmp_path / "val.json").exists()


def test_other_logs_are_named_and_none_where_there_are_none(setup, capsys, tmp_path: Path):
    for logger, expected in (
        (CSVLogger(tmp_path, ""), [f"logs               {tmp_path / 'version_0'}"]),
        (False, []),
    ):
        trainer, module, data, _ = setup(1, logger=logger)
        trainer.fit(module, datamodule=data)
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if line.startswith("logs ")] == expected


def test_a_resumed_run_counts_from_where_it_was(setup, capsys, tmp_path: Path):
    trainer, module, data, _ = setup(2)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    capsys.readouterr()
    trainer, module, data, _ = setup(3)
    trainer.fit(module, datamodule=data, ckpt_path=str(tmp_path / "two.ckpt"))
    assert "2 -> 3 in " in capsys.readouterr().out


@pytest.mark.parametrize(("command", "num"), [("validate", 3), ("test", 4)])
def test_results_are_printed_and_written(setup, capsys, tmp_path: Path, command: str, num: int):
    trainer, module, data, _ = setup(limit_val_batches=1.0)
    (found,) = getattr(trainer, command)(module, datamodule=data, verbose=False)
    prefix = {"validate": "val", "test": "test"}[command]
    out = capsys.readouterr().out
    assert f"--- {prefix} ---" in out
    written = json.loads((tmp_path / f"{prefix}.json").read_text())
    assert written["checkpoint"] == ""
    assert written["weights"] == weights_digest(module.policy)
    (result,) = written["results"]
    assert {name: result[name.removeprefix(f"{prefix}/")] for name in found} == pytest.approx(found)
    assert {f"{prefix}/{name}" for name in ("accuracy", "reward", "unfinished", "num")} <= found.keys()
    assert result["num"] == num
    assert result["dataset"] == "sudoku"
    assert result["settings"]["decode"] == asdict(DECODE)
    assert 0 <= result["accuracy_low"] <= result["accuracy"] <= result["accuracy_high"] <= 1
    assert f"{result['accuracy_low']:.3f} to {result['accuracy_high']:.3f}" in out
    assert f"  {result['timesteps']:.2f}  " in out


def test_results_name_their_checkpoint_and_go_where_they_are_told(setup, tmp_path: Path):
    trainer, module, data, _ = setup(1)
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    file = tmp_path / "deep" / "results.json"
    trainer, module, data, _ = setup(path=str(file))
    trainer.test(module, datamodule=data, ckpt_path=str(tmp_path / "one.ckpt"), verbose=False)
    assert json.loads(file.read_text())["checkpoint"] == str(tmp_path / "one.ckpt")


def test_an_earlier_test_is_not_overwritten(setup, tmp_path: Path):
    kept = []
    for answers in (True, False, True):
        trainer, module, data, _ = setup()
        trainer.callbacks.append(AnswerCallback(enabled=answers))
        trainer.test(module, datamodule=data, verbose=False)
        files = {name: tmp_path / name for name in ("test.json", "test.jsonl")}
        kept.append({name: file.read_bytes() for name, file in files.items() if file.exists()})
    assert [len(files) for files in kept] == [2, 1, 2]
    for number, files in enumerate(kept[:-1], start=1):
        # What one test wrote has one number.
        there = {f"test.{path.suffix[1:]}": path.read_bytes() for path in tmp_path.glob(f"test.{number}.*")}
        assert there == files


def test_results_that_are_told_where_to_go_replace_what_was_there(setup, tmp_path: Path):
    (tmp_path / "test.json").write_text("of another")
    for _ in range(2):
        trainer, module, data, _ = setup(path=str(tmp_path / "own.json"))
        trainer.test(module, datamodule=data, verbose=False)
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["own.json", "test.json"]


def test_an_earlier_validation_is_kept_but_not_by_training(setup, tmp_path: Path):
    (tmp_path / "val.json").write_text("of another")
    trainer, module, data, _ = setup(limit_val_batches=1.0, val_check_interval=1)
    trainer.fit(module, datamodule=data)
    assert not (tmp_path / "val.1.json").exists()
    trainer, module, data, _ = setup(limit_val_batches=1.0)
    trainer.validate(module, datamodule=data, verbose=False)
    assert (tmp_path / "val.1.json").read_text() == "of another"
    assert json.loads((tmp_path / "val.json").read_text())["results"]


def test_results_told_to_go_where_they_would_are_not_taken_for_earlier_ones(setup, tmp_path: Path):
    for _ in range(2):
        trainer, module, data, _ = setup(path=str(tmp_path / "test.json"))
        trainer.callbacks.append(AnswerCallback())
        trainer.test(module, datamodule=data, verbose=False)
    assert sorted(path.name for path in tmp_path.glob("test.*")) == [
        "test.1.jsonl",
        "test.json",
        "test.jsonl",
    ]
