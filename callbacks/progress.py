"""The progress bar: steps, the stage of the step at hand, and reward, timesteps and loss."""

from __future__ import annotations

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from drift.policy_module import PolicyModule


class ProgressCallback(TQDMProgressBar):
    """One bar over all optimizer steps; in front of it, how far the rollout or the update of this step is.

    Args:
        refresh_rate: steps between two drawings; 0 draws nothing.
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=refresh_rate)

    @property
    def total_train_batches(self) -> int | float:
        """Steps in all, or batches where a step has several: the stream itself has no end."""
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the module's reports."""
        super().setup(trainer, pl_module, stage)
        if isinstance(pl_module, PolicyModule) and self.is_enabled:
            pl_module.on_progress = self._show_stage

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Starts the bar where training is, after a resume too."""
        super().on_train_epoch_start(trainer)
        done = trainer.global_step * trainer.accumulate_grad_batches
        self.train_progress_bar.initial = self.train_progress_bar.n = done
        self.train_progress_bar.set_description("step")

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """What stands behind the bar, without Lightning's version number."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def _show_stage(self, stage: str, done: int, total: int) -> None:
        if self.trainer.training and self._train_progress_bar is not None:
            self.train_progress_bar.set_description(f"{stage} {done / total:4.0%}")
