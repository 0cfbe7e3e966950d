import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from drift.callbacks import DoctorCallback, RolloutCallback
from drift.contract import ConfigError
from drift.data import PromptDataModule
from drift.models import LLaDA
from drift.module import RLDFModule
from drift.rollout import DenoiseConfig
from drift.tasks import SudokuTask

DECODE = DenoiseConfig(block_length=16, threshold=0.5, temperature=1.0)


@pytest.fixture
def go(make_trainer):
    """Runs a command on a folder with the doctor; gives the module."""

    def run(folder: Path, command: str = "fit", **settings: object) -> RLDFModule:
        callbacks = [RolloutCallback(2, 16, decode=DECODE, evaluation=DECODE), DoctorCallback(**settings)]
        module = RLDFModule(str(folder))
        trainer = make_trainer(1, callbacks=callbacks, limit_test_batches=1, limit_predict_batches=1)
        data = PromptDataModule(SudokuTask(), prompts_per_step=2, num_test=4, num_validation=4)
        getattr(trainer, command)(module, datamodule=data)
        return module

    return run


@pytest.fixture
def broken(tiny_folder: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "broken"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.transformer.ln_f.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("command", ["fit", "test", "predict"])
def test_a_bad_policy_stops_before_anything_is_done(go, broken: Path, command: str, monkeypatch):
    monkeypatch.setattr(RolloutCallback, "experience", lambda *_: pytest.fail("something was rolled out"))
    with pytest.raises(ConfigError, match=r"model.policy is .*weights: 1 tensors hold NaN.*copy it again"):
        go(broken, command)


def test_a_validation_is_examined_too(go, broken: Path, make_trainer):
    callbacks = [RolloutCallback(2, 16, decode=DECODE, evaluation=DECODE), DoctorCallback()]
    trainer = make_trainer(callbacks=callbacks, limit_val_batches=1)
    data = PromptDataModule(SudokuTask(), num_validation=2)
    with pytest.raises(ConfigError, match="tensors hold NaN"):
        trainer.validate(RLDFModule(str(broken)), datamodule=data)


def test_a_sound_policy_is_trained_and_left_in_train_mode(go, tiny_folder: Path, caplog):
    caplog.set_level("INFO")
    module = go(tiny_folder)
    assert module.global_step == 1
    assert module.policy.training
    (line,) = [record.getMessage() for record in caplog.records if "doctor:" in record.getMessage()]
    assert "doctor: 4 checks passed in" in line
    assert "no evidence either way on shift, mask id" in line


def test_padding_that_the_attention_reads_stops_training(go, tiny_folder: Path, monkeypatch):
    whole = LLaDA.forward
    monkeypatch.setattr(
        LLaDA, "forward", lambda self, ids, mask=None, *rest, **more: whole(self, ids, None, *rest, **more)
    )
    with pytest.raises(ConfigError, match=r"padding: .*the attention reads padding"):
        go(tiny_folder)


def test_it_can_be_switched_off(go, tiny_folder: Path, monkeypatch):
    monkeypatch.setattr("drift.callbacks.doctor.examine", lambda *_: pytest.fail("the doctor was called"))
    go(tiny_folder, enabled=False)


def test_draws_of_the_run_do_not_depend_on_it(go, tiny_folder: Path):
    """Bit for bit the same training with and without."""
    weights = []
    for enabled in (True, False):
        torch.manual_seed(0)
        weights.append(go(tiny_folder, enabled=enabled).policy.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
