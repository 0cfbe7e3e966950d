import errno
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import Timer

from drift.callbacks import CheckpointCallback, RolloutCallback
from drift.contract import ConfigError, StorageError
from drift.data import PromptDataModule
from drift.module import RLDFModule
from drift.optimizer import OptimizerConfig
from drift.rollout import DenoiseConfig

DECODE = DenoiseConfig(block_length=16, threshold=0.5, temperature=1.0)


class Accuracies(Callback):
    """Sets the validation accuracy, and keeps the weights after every step."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.weights.append({n: p.detach().clone() for n, p in pl_module.policy.named_parameters()})

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val/score", self.values.pop(0))


@pytest.fixture
def train(tiny_folder: Path, spread_task, make_trainer):
    def run(
        steps: int, accuracies: Accuracies, checkpoint: CheckpointCallback, more=(), trial=False, **settings
    ):
        rollout = RolloutCallback(group_size=2, completion_length=16, decode=DECODE, evaluation=DECODE)
        trainer = make_trainer(
            steps,
            callbacks=[rollout, accuracies, *more, checkpoint],
            fast_dev_run=trial,
            enable_checkpointing=True,
            limit_val_batches=1.0,
            val_check_interval=2,
        )
        module = RLDFModule(str(tiny_folder), optimizer=OptimizerConfig(lr=1e-3))
        data = PromptDataModule(spread_task, prompts_per_step=2, num_validation=1)
        trainer.fit(module, datamodule=data, **settings)
        return trainer

    return run


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def test_best_and_last_are_written(train, tmp_path: Path):
    accuracies = Accuracies(0.2, 0.7, 0.5)
    checkpoint = CheckpointCallback(every=2, monitor="val/score", dirpath=str(tmp_path / "kept"))
    train(7, accuracies, checkpoint)
    assert sorted(file.name for file in (tmp_path / "kept").iterdir()) == [
        "best.ckpt",
        "last.ckpt",
        "previous.ckpt",
    ]
    best, last = load(tmp_path / "kept" / "best.ckpt"), load(tmp_path / "kept" / "last.ckpt")
    # 7 is no multiple of 2: the end writes too.
    assert (best["global_step"], last["global_step"]) == (4, 7)
    for saved, step in ((best, 4), (last, 7)):
        for name, value in accuracies.weights[step - 1].items():
            assert torch.equal(saved["state_dict"][f"policy.{name}"], value)
        assert saved["optimizer_states"][0]["state"][0]["step"] == step
    assert checkpoint.best_model_path.endswith("best.ckpt")
    assert checkpoint.last_model_path.endswith("last.ckpt")
    assert float(checkpoint.best_model_score) == pytest.approx(0.7)


def test_the_lowest_can_be_best(train, tmp_path: Path):
    checkpoint = CheckpointCallback(monitor="val/score", mode="min", dirpath=str(tmp_path / "kept"))
    train(6, Accuracies(0.6, 0.1, 0.5), checkpoint)
    assert load(tmp_path / "kept" / "best.ckpt")["global_step"] == 4


def test_last_is_written_as_training_goes_on(train, tmp_path: Path):
    seen = []

    class Look(Accuracies):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            file = tmp_path / "kept" / "last.ckpt"
            seen.append(load(file)["global_step"] if file.exists() else None)

    checkpoint = CheckpointCallback(every=2, monitor="val/score", dirpath=str(tmp_path / "kept"))
    train(5, Look(0.5, 0.5), checkpoint)
    assert seen == [None, None, 2, 2, 4]


def test_a_resumed_run_remembers_its_best(train, tmp_path: Path):
    folder = str(tmp_path / "kept")
    train(2, Accuracies(0.9), CheckpointCallback(monitor="val/score", dirpath=folder))
    checkpoint = CheckpointCallback(monitor="val/score", dirpath=folder)
    train(4, Accuracies(0.5), checkpoint, ckpt_path=str(tmp_path / "kept" / "last.ckpt"))
    assert float(checkpoint.best_model_score) == pytest.approx(0.9)
    assert load(tmp_path / "kept" / "best.ckpt")["global_step"] == 2
    assert load(tmp_path / "kept" / "last.ckpt")["global_step"] == 4


def test_whose_time_was_up_goes_on_with_more_of_it(train, tmp_path: Path):
    class Slow(Timer):
        """Every step takes an hour."""

        def on_train_batch_end(self, trainer, *args, **kwargs):
            self._offset += 3600
            super().on_train_batch_end(trainer, *args, **kwargs)

    def run(hours: int, **settings):
        checkpoint = CheckpointCallback(monitor="val/score", dirpath=str(tmp_path))
        checkpoint.continue_run([])
        timer = Slow(timedelta(hours=hours))
        return train(6, Accuracies(0.1, 0.2, 0.3), checkpoint, more=(timer,), **settings).global_step

    assert run(2) == 2
    last = tmp_path / "last.ckpt"
    assert run(2, ckpt_path=last) == 2
    assert run(5, ckpt_path=last) == 5


def test_a_damaged_last_never_takes_the_place_of_the_one_before(train, tmp_path: Path):
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    train(4, Accuracies(0.2, 0.3), CheckpointCallback(every=2, monitor="val/score", dirpath=str(tmp_path)))
    assert (load(last)["global_step"], load(previous)["global_step"]) == (4, 2)
    last.write_bytes(last.read_bytes()[:-300])
    for damaged in (True, False):
        checkpoint = CheckpointCallback(every=2, monitor="val/score", dirpath=str(tmp_path))
        checkpoint.continue_run([])
        checkpoint.start = str(previous)
        train(3 if damaged else 5, Accuracies(0.1, 0.1), checkpoint, ckpt_path=previous)
        assert load(previous)["global_step"] == (2 if damaged else 4)


def test_a_trial_run_writes_no_checkpoint(train, tmp_path: Path):
    checkpoint = CheckpointCallback(monitor="val/score", dirpath=str(tmp_path / "kept"))
    train(2, Accuracies(0.2), checkpoint, trial=True)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_settings_out_of_range():
    with pytest.raises(ConfigError, match=r"checkpoint\.every is 0: set it to 1 or more steps"):
        CheckpointCallback(every=0)


@pytest.mark.parametrize("what", ["link", "flush"])
def test_what_is_written_beside_a_checkpoint_may_fail_too(train, tmp_path: Path, monkeypatch, what: str):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = tmp_path / "kept"
    train(2, Accuracies(0.9), CheckpointCallback(monitor="val/score", dirpath=str(folder)))
    monkeypatch.setattr(f"drift.callbacks.checkpoint.{what}", full)
    checkpoint = CheckpointCallback(every=1, monitor="val/score", dirpath=str(folder))
    with pytest.raises(StorageError, match=r"last\.ckpt: the checkpoint cannot be written \(No space left"):
        train(4, Accuracies(0.5), checkpoint, ckpt_path=str(folder / "last.ckpt"))
    assert load(folder / "last.ckpt")["global_step"] == 2
