"""Says at the end what came out and where it is."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

_EDGE = 5  # steps that the first and the last figure of a column are averaged over


class SummaryCallback(Callback):
    """Prints a summary of training, and the results of a validation or test, which it also writes as JSON.

    Args:
        path: file of the validation or test results; None: `val.json` or `test.json` in the run's folder.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.history: dict[str, list[float]] = {"reward/mean": [], "rollout/timesteps": [], "loss/total": []}
        self.accuracy: list[float] = []
        self.start = 0.0
        self.first_step = 0
        self.folder = Path()

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

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the validation accuracy; prints the results where validation is the whole command."""
        if "val/accuracy" in trainer.callback_metrics:
            self.accuracy.append(float(trainer.callback_metrics["val/accuracy"]))
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._report(trainer, "val")

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the summary of training."""
        seconds = time.perf_counter() - self.start
        lines = [f"{'steps':<18} {self.first_step} -> {trainer.global_step} in {seconds:.0f} s"]
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
        lines.append(f"{'logs':<18} tensorboard --logdir {self.folder}")
        _print("summary", lines)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the test results, and writes them."""
        self._report(trainer, "test")

    @rank_zero_only
    def _report(self, trainer: Trainer, prefix: str) -> None:
        results = {
            name.removeprefix(f"{prefix}/"): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(f"{prefix}/")
        }
        path = Path(self.path) if self.path is not None else self.folder / f"{prefix}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**results, "checkpoint": str(trainer.ckpt_path or "")}, indent=2)
        path.write_text(text, encoding="utf-8")
        interval = f"{results['accuracy_low']:.3f} to {results['accuracy_high']:.3f}"
        _print(
            prefix,
            [
                f"accuracy             {results['accuracy']:.3f}  (95 % interval {interval}, "
                f"{results['num']:.0f} problems)",
                f"mean reward          {results['reward']:.3f}",
                f"timesteps per answer {results['timesteps']:.2f}",
                f"tokens per forward   {results['tokens_per_forward']:.2f}",
                f"written to           {path}",
            ],
        )


def _print(title: str, lines: list[str]) -> None:
    sys.stdout.write("\n".join([f"--- {title} ---", *lines, ""]))
    sys.stdout.flush()
