"""Says at the end what came out and where it is."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

_EDGE = 5  # steps that the first and the last figure of a column are averaged over


class SummaryCallback(Callback):
    """Prints a summary of training, and the results of a test, which it also writes as JSON.

    Args:
        path: file of the test results; None: `test.json` in the run's folder.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.history: dict[str, list[float]] = {"reward/mean": [], "rollout/timesteps": [], "loss/total": []}
        self.accuracy: list[float] = []
        self.start = 0.0
        self.first_step = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts the clock."""
        self.start = time.perf_counter()
        self.first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the step's figures."""
        for name, values in self.history.items():
            if name in trainer.callback_metrics:
                values.append(float(trainer.callback_metrics[name]))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the validation accuracy."""
        if "val/accuracy" in trainer.callback_metrics:
            self.accuracy.append(float(trainer.callback_metrics["val/accuracy"]))

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the summary of training."""
        seconds = time.perf_counter() - self.start
        lines = [f"steps        {self.first_step} -> {trainer.global_step} in {seconds:.0f} s"]
        for name, values in self.history.items():
            if values:
                first, last = values[:_EDGE], values[-_EDGE:]
                change = f"{sum(first) / len(first):.3f} -> {sum(last) / len(last):.3f}"
                lines.append(f"{name:<18} {change} (first and last {len(first)} steps)")
        if self.accuracy:
            lines.append(
                f"{'val/accuracy':<18} {self.accuracy[0]:.3f} -> {self.accuracy[-1]:.3f}, best {max(self.accuracy):.3f}"
            )
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                lines += [f"best checkpoint  {callback.best_model_path}"] * bool(callback.best_model_path)
                lines += [f"last checkpoint  {callback.last_model_path}"] * bool(callback.last_model_path)
        lines.append(f"logs             tensorboard --logdir {trainer.log_dir or trainer.default_root_dir}")
        _print("summary", lines)

    @rank_zero_only
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the test results, and writes them."""
        results = {
            name.removeprefix("test/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith("test/")
        }
        path = (
            Path(self.path)
            if self.path is not None
            else Path(trainer.log_dir or trainer.default_root_dir) / "test.json"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            json.dumps({**results, "checkpoint": str(trainer.ckpt_path or "")}, indent=2), encoding="utf-8"
        )
        lines = [
            f"accuracy             {results['accuracy']:.3f}  (95 % interval {results['accuracy_low']:.3f} to "
            f"{results['accuracy_high']:.3f}, {results['num']:.0f} problems)",
            f"mean reward          {results['reward']:.3f}",
            f"timesteps per answer {results['timesteps']:.2f}",
            f"tokens per forward   {results['tokens_per_forward']:.2f}",
            f"written to           {path}",
        ]
        _print("test", lines)


def _print(title: str, lines: list[str]) -> None:
    sys.stdout.write("\n".join([f"--- {title} ---", *lines, ""]))
    sys.stdout.flush()
