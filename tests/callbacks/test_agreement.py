from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn

from drift.callbacks import agreement
from drift.callbacks.agreement import AgreedConfigCallback


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list:
    """What ranks were asked to agree on."""
    asked = []
    monkeypatch.setattr(agreement, "require_agreement", lambda name, value: asked.append((name, value)))
    return asked


def test_all_settings_are_compared_and_then_written(compared: list, make_trainer, tmp_path: Path):
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--model.lr", type=float)
    file = tmp_path / "given.yaml"
    file.write_text("model:\n  lr: 0.1\n")
    config = parser.parse_args([f"--config={file}"])
    callback = AgreedConfigCallback(parser, config, overwrite=True)
    trainer: Trainer = make_trainer()
    callback.setup(trainer, None, "fit")  # type: ignore[arg-type]
    # Not where the file lies: that may differ from machine to machine.
    assert compared == [("the settings", {"model.lr": "0.1"})]
    # There is no logger, and so no folder of the run's own: whatever lies in this one is the user's.
    root = Path(trainer.default_root_dir)
    assert not (root / "config.yaml").exists()
    assert yaml.safe_load((root / "checkpoints" / "config.yaml").read_text())["model"] == {"lr": 0.1}
    other = Namespace(model=Namespace(lr=0.2))
    AgreedConfigCallback(parser, other, overwrite=True).setup(trainer, None, "fit")  # type: ignore[arg-type]
    assert compared[1] != compared[0]


def test_other_commands_leave_the_config_of_training_alone(compared: list, make_trainer, tmp_path: Path):
    def setup(lr: float, stage: str, **settings: object) -> None:
        callback = AgreedConfigCallback(parser, Namespace(model=Namespace(lr=lr)), overwrite=True)
        callback.setup(make_trainer(**settings), None, stage)  # type: ignore[arg-type]

    parser = ArgumentParser()
    parser.add_argument("--model.lr", type=float)
    logger = CSVLogger(tmp_path / "runs", "name", version=0)
    setup(0.1, "fit", logger=logger)
    # As Lightning calls them.
    setup(0.2, TrainerFn.TESTING, logger=logger)
    setup(0.3, TrainerFn.PREDICTING)
    found = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("config*.yaml")}
    folder = Path("runs/name/version_0")
    assert {path: yaml.safe_load(text)["model"]["lr"] for path, text in found.items()} == {
        folder / "config.yaml": 0.1,
        folder / "config.test.yaml": 0.2,
    }
