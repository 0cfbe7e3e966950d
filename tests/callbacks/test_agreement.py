from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser, Namespace
from lightning import Trainer

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
    assert yaml.safe_load((Path(trainer.default_root_dir) / "config.yaml").read_text())["model"] == {
        "lr": 0.1
    }
    other = Namespace(model=Namespace(lr=0.2))
    AgreedConfigCallback(parser, other, overwrite=True).setup(trainer, None, "fit")  # type: ignore[arg-type]
    assert compared[1] != compared[0]
