import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from drift.callbacks import CheckpointCallback, CurveCallback, RolloutCallback
from drift.data import Benchmark, PromptDataModule
from drift.module import RLDFModule
from drift.rollout import DenoiseConfig
from drift.tasks import SudokuTask

DECODE = DenoiseConfig(block_length=16, threshold=0.5, temperature=1.0)
NAMES = ("accuracy_timesteps.json", "accuracy_timesteps.png")


@pytest.fixture
def fit(tiny_folder: Path, spread_task, make_trainer, tmp_path: Path):
    """Trains with a validation every second step; `validation`: None for a single set of 3 puzzles."""

    def run(
        steps: int, folder: str = "run", ckpt_path: Path | None = None, enabled=True, validation=None, **more
    ):
        curve = CurveCallback(enabled)
        rollout = RolloutCallback(group_size=2, completion_length=16, decode=DECODE, evaluation=DECODE)
        checkpoints = [CheckpointCallback(every=1)] if more.get("enable_checkpointing", True) else []
        settings = {
            "callbacks": [rollout, curve, *checkpoints],
            "enable_checkpointing": True,
            "default_root_dir": tmp_path / folder,
            "limit_val_batches": 1.0,
            "val_check_interval": 2,
        }
        trainer = make_trainer(steps, **settings | more)
        data = PromptDataModule(spread_task, validation=validation, prompts_per_step=2, num_validation=3)
        trainer.fit(
            RLDFModule(str(tiny_folder)), data, ckpt_path=None if ckpt_path is None else str(ckpt_path)
        )
        return curve, trainer

    return run


def written(folder: Path) -> list[dict]:
    return json.loads((folder / NAMES[0]).read_text(encoding="utf-8"))


def test_every_validation_of_training_is_a_point(fit, tmp_path: Path):
    curve, trainer = fit(5)
    found = written(tmp_path / "run")
    assert [each["step"] for each in found] == [2, 4]
    figures = trainer.callback_metrics
    last = {name: pytest.approx(figures[f"val/{name}"].item()) for name in ("accuracy", "timesteps")}
    # No puzzle of 3 is solved by a random policy: Wilson's interval is (0, z^2 / (3 + z^2)) = (0, 0.56150).
    assert found[1] == {
        "dataset": "sudoku",
        "step": 4,
        "low": 0.0,
        "high": pytest.approx(0.5615, abs=1e-4),
        **last,
    }
    assert 1 <= found[1]["timesteps"] <= 16
    assert (tmp_path / "run" / NAMES[1]).read_bytes().startswith(b"\x89PNG")
    assert len(curve.curve) == 2


def test_it_is_there_after_each_validation(fit, tmp_path: Path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "drift.callbacks.curve.write_curve", lambda folder, curve: seen.append((folder, len(curve)))
    )
    fit(5)
    # And once more at the end.
    assert seen == [(tmp_path / "run", 1), (tmp_path / "run", 2), (tmp_path / "run", 2)]


def test_a_resumed_run_goes_on_with_its_curve(fit, tmp_path: Path):
    fit(4)
    before = written(tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 4
    fit(6, folder="resumed", ckpt_path=last)
    found = written(tmp_path / "resumed")
    assert [each["step"] for each in found] == [2, 4, 6]
    assert found[:2] == before


def test_a_validation_that_is_done_again_is_one_point(fit, tmp_path: Path):
    curve, trainer = fit(4)
    (tmp_path / "run" / NAMES[0]).unlink()
    curve.on_validation_end(trainer, trainer.lightning_module)
    assert [each["step"] for each in written(tmp_path / "run")] == [2, 4]


@pytest.mark.parametrize(("batches", "steps"), [(-1, [0, 2]), (1, [2])])
def test_a_whole_validation_before_the_first_step_is_the_first_point(fit, tmp_path: Path, batches, steps):
    fit(2, num_sanity_val_steps=batches)
    assert [each["step"] for each in written(tmp_path / "run")] == steps


def test_a_resumed_run_does_not_validate_before_it_goes_on(fit, tmp_path: Path):
    fit(3, num_sanity_val_steps=-1)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    fit(4, folder="resumed", ckpt_path=last, num_sanity_val_steps=-1)
    assert [each["step"] for each in written(tmp_path / "resumed")] == [0, 2, 4]


def test_each_set_has_a_curve(fit, tmp_path: Path):
    sets = {"many": Benchmark(limit=3), "one": Benchmark(task=SudokuTask(blanks=(3, 4)), limit=1)}
    # With several sets no figure is called val/accuracy.
    fit(4, validation=sets, enable_checkpointing=False)
    found = [(each["dataset"], each["step"]) for each in written(tmp_path / "run")]
    assert found == [("many", 2), ("many", 4), ("one", 2), ("one", 4)]


@pytest.mark.parametrize("settings", [{"enabled": False}, {"limit_val_batches": 0}])
def test_nothing_is_written_where_there_is_nothing_to_draw(fit, tmp_path: Path, settings: dict):
    fit(2, **settings)
    assert not any((tmp_path / "run" / name).exists() for name in NAMES)


def test_a_validation_by_itself_is_no_part_of_a_curve(fit, tmp_path: Path):
    curve, trainer = fit(2)
    trainer.validate(trainer.lightning_module, trainer.datamodule, verbose=False)
    assert [point.step for point in curve.curve] == [2]
    (tmp_path / "run" / NAMES[0]).unlink()
    trainer.validate(trainer.lightning_module, trainer.datamodule, verbose=False)
    assert not (tmp_path / "run" / NAMES[0]).exists()


def test_only_rank_0_writes(tmp_path: Path, fit):
    curve, _ = fit(2)
    curve.folder = tmp_path / "other"
    curve.on_fit_end(SimpleNamespace(is_global_zero=False), None)
    assert not curve.folder.exists()
    curve.on_fit_end(SimpleNamespace(is_global_zero=True), None)
    assert {path.name for path in curve.folder.iterdir()} == set(NAMES)


def test_a_plot_that_cannot_be_written_does_not_stop_training(tmp_path: Path, fit):
    curve, _ = fit(2)
    (tmp_path / "file").write_text("")
    curve.folder = tmp_path / "file" / "run"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        curve.on_fit_end(SimpleNamespace(is_global_zero=True), None)
    (message,) = [str(warning.message) for warning in caught]
    assert "accuracy_timesteps.png cannot be written (Not a directory)" in message
