"""Says at the end what came out and where it is."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from drift import __version__
from drift.models import weights_digest
from drift.policy_module import PolicyModule
from drift.results import Earlier, find_earlier, keep_earlier, record, results_table, write_results

_EDGE = 5  # steps that the first and the last figure of a column are averaged over


class SummaryCallback(Callback):
    """Prints a summary of training, and the results of a validation or test, which it also writes as JSON.

    Args:
        path: file of the validation or test results; None: `val.json` or `test.json` in the run's folder,
            where those of an earlier command are kept under a number.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.history: dict[str, list[float]] = {"reward/mean": [], "rollout/timesteps": [], "loss/total": []}
        self.accuracy: list[float] = []
        self.start: float | None = None  # None: there was nothing to train
        self.first_step = 0
        self.folder = Path()
        self._earlier: list[Earlier] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Asks for the run's folder, which all ranks must do together."""
        self.folder = Path(trainer.log_dir or trainer.default_root_dir)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock, where training is after a resume."""
        self.start = time.perf_counter()
        self.first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the step's figures."""
        for name, values in self.history.items():
            # What a rollout was like counts once, also where it serves several updates.
            if name in trainer.callback_metrics and (batch.rollout is not None or name == "loss/total"):
                values.append(float(trainer.callback_metrics[name]))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sees whether an earlier validation left results, where this is the whole command."""
        if self.path is None and trainer.state.fn == TrainerFn.VALIDATING:
            self._earlier = find_earlier(self.folder, "val")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sees whether an earlier test left results."""
        if self.path is None:
            self._earlier = find_earlier(self.folder, "test")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the validation accuracy; prints the results where validation is the whole command."""
        if "val/accuracy" in trainer.callback_metrics:
            self.accuracy.append(float(trainer.callback_metrics["val/accuracy"]))
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._report(trainer, pl_module, "validation", "val")

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the summary of training."""
        done = f"{trainer.global_step}, nothing was left to do"
        if self.start is not None:
            seconds = time.perf_counter() - self.start
            done = f"{self.first_step} -> {trainer.global_step} in {seconds:.0f} s"
        lines = [f"{'steps':<18} {done}"]
        for name, values in self.history.items():
            if values:
                first, last = values[:_EDGE], values[-_EDGE:]
                change = f"{sum(first) / len(first):.3f} -> {sum(last) / len(last):.3f}"
                lines.append(f"{name:<18} {change} (first and last {len(first)} steps)")
        if self.accuracy:
            lines.append(
                f"{'val/accuracy':<18} {self.accuracy[0]:.3f} -> {self.accuracy[-1]:.3f}, "
                f"best {max(self.accuracy):.3f}"
            )
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                lines += [f"{'best checkpoint':<18} {callback.best_model_path}"] * bool(
                    callback.best_model_path
                )
                lines += [f"{'last checkpoint':<18} {callback.last_model_path}"] * bool(
                    callback.last_model_path
                )
        for logger in trainer.loggers:
            command = "tensorboard --logdir " if isinstance(logger, TensorBoardLogger) else ""
            lines.append(f"{'logs':<18} {command}{logger.log_dir or logger.save_dir or logger.name}")
        _print("summary", lines)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the test results, and writes them."""
        self._report(trainer, pl_module, "test", "test")

    def _report(self, trainer: Trainer, module: LightningModule, split: str, name: str) -> None:
        assert isinstance(module, PolicyModule)
        weights = weights_digest(module.policy)  # of all ranks together, where they are split over them
        if not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        records = []
        for (set_number, number), result in module.results.items():
            found, cell = data.evaluation_sets[split][set_number], module.cells[number]
            asked = found.settings(data.template, result.positions)
            settings = {**asked, **cell.settings(), **module.precision_settings}
            records.append(record(found.name, cell, result, settings))
        policy = {
            "drift": __version__,
            "policy": str(module.policy_folder),
            "checkpoint": str(trainer.ckpt_path or ""),
            "weights": weights,
        }
        path = Path(self.path) if self.path is not None else self.folder / f"{name}.json"
        keep_earlier(self._earlier)
        write_results(path, policy, records)
        _print(name, [*results_table(records), f"written to {path}"])


def _print(title: str, lines: list[str]) -> None:
    sys.stdout.write("\n".join([f"--- {title} ---", *lines, ""]))
    sys.stdout.flush()
