import json
from pathlib import Path

import pytest
import torch
from lightning import Callback

from drift.callbacks import RescueCallback, RolloutCallback
from drift.contract import ConfigError, SampleError
from drift.data import PromptDataModule
from drift.module import RLDFModule
from drift.rollout import DenoiseConfig

DECODE = DenoiseConfig(block_length=16, threshold=0.5, temperature=1.0)


class FailAt(Callback):
    def __init__(self, step: int, error: BaseException) -> None:
        self.step = step
        self.error = error

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise self.error


@pytest.fixture
def train(tiny_folder: Path, spread_task, make_trainer):
    def run(*callbacks: Callback, steps: int = 4, ckpt_path: str | None = None, **settings):
        rollout = RolloutCallback(group_size=2, completion_length=16, decode=DECODE, evaluation=DECODE)
        trainer = make_trainer(steps, callbacks=[rollout, RescueCallback(), *callbacks])
        data = PromptDataModule(spread_task, prompts_per_step=2, **settings)
        trainer.fit(RLDFModule(str(tiny_folder)), datamodule=data, ckpt_path=ckpt_path)
        return trainer

    return run


def test_keeps_the_weights_and_the_sample(train, tmp_path: Path):
    error = SampleError("no number", {"completion": "häh\n"})
    with pytest.raises(SampleError):
        train(FailAt(2, error))
    assert torch.load(tmp_path / "rescue.ckpt", weights_only=True)["global_step"] == 2
    text = (tmp_path / "rescue.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"message": "no number", "completion": "häh\n"}


@pytest.mark.parametrize("joint", [False, True])
def test_of_several_ranks_all_must_write(train, tmp_path: Path, monkeypatch, joint: bool):
    error = SampleError("no number", {"completion": "1"})
    error.on_all_ranks = joint
    monkeypatch.setattr("drift.callbacks.rescue.world_size", lambda: 2)
    with pytest.raises(SampleError):
        train(FailAt(1, error))
    # One that is alone with its error would wait for the others for ever.
    assert (tmp_path / "rescue.ckpt").exists() == joint
    assert (tmp_path / "rescue.json").exists()


def test_training_goes_on_from_there(train, tmp_path: Path):
    with pytest.raises(RuntimeError):
        train(FailAt(2, RuntimeError("no memory")))
    assert not (tmp_path / "rescue.json").exists()
    resumed = train(ckpt_path=str(tmp_path / "rescue.ckpt"))
    whole = train()
    assert resumed.global_step == 4
    expected = whole.lightning_module.policy.state_dict()
    for name, value in resumed.lightning_module.policy.state_dict().items():
        assert torch.equal(value, expected[name])


def test_a_reward_that_fails_is_rescued_too(train, spread_task, tmp_path: Path):
    def broken(completions, problems):
        raise ZeroDivisionError("oh")

    spread_task.reward = broken
    with pytest.raises(SampleError):
        train()
    written = json.loads((tmp_path / "rescue.json").read_text())
    assert written["reason"] == "ZeroDivisionError: oh"
    assert len(written["prompt"]) == 16


def test_an_interruption_is_no_error(train, tmp_path: Path):
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train(FailAt(2, KeyboardInterrupt()))
    assert not (tmp_path / "rescue.ckpt").exists()


def test_nothing_is_rescued_before_there_are_weights(train, tmp_path: Path):
    with pytest.raises(ConfigError):
        train(tokenizer=str(tmp_path / "nowhere"))
    assert not (tmp_path / "rescue.ckpt").exists()


def test_nothing_is_rescued_outside_of_training(tiny_folder, spread_task, make_trainer, tmp_path: Path):
    class Fail(Callback):
        def on_validation_start(self, trainer, pl_module):
            raise RuntimeError("no")

    rollout = RolloutCallback(completion_length=16, decode=DECODE, evaluation=DECODE)
    trainer = make_trainer(callbacks=[rollout, RescueCallback(), Fail()], limit_val_batches=1.0)
    with pytest.raises(RuntimeError):
        trainer.validate(
            RLDFModule(str(tiny_folder)), datamodule=PromptDataModule(spread_task, num_validation=1)
        )
    assert not (tmp_path / "rescue.ckpt").exists()
