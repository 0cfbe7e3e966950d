"""A LightningModule that takes optimizer steps, skips some, and knows the average of its weights."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from drift.averaging import (
    hide_averages,
    parameter_names,
    put_in,
    show_averages,
    with_averages,
    without_averages,
)
from drift.contract import PromptBatch, Rollout
from drift.finite import SkippedSteps
from drift.measured_module import MeasuredModule
from drift.optimizer import OptimizerConfig, apply_settings, build_optimizer, build_schedule

_SKIPPED = "skipped_in_a_row"


class OptimizedModule(MeasuredModule):
    """Optimizes its weights, and knows their average where one is kept.

    Args:
        optimizer: settings of AdamW.
    """

    def __init__(self, optimizer: OptimizerConfig) -> None:
        super().__init__()
        self.optimizer_config = optimizer
        self.skipped = SkippedSteps(optimizer.max_skipped)
        # Of the schedule: where a last validation is left, Lightning is later told of one step more.
        self._num_steps: int | None = None
        self._shown = False  # whether the weights have the value of their average

    def configure_optimizers(self) -> Any:
        """AdamW over the trainable parameters, and its schedule, stepped once an optimizer step."""
        self._shown = False
        optimizer = build_optimizer(self, self.optimizer_config)
        num_steps = self.trainer.max_steps if self._num_steps is None else self._num_steps
        schedule = build_schedule(optimizer, self.optimizer_config, num_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def show_average(self) -> None:
        """Gives the weights the value of their average, where training keeps one; on all ranks."""
        if self._averages and not self._shown:
            show_averages(self.trainer.optimizers[0])
            self._shown = True

    def hide_average(self) -> None:
        """Gives the weights their own value back."""
        if self._averages and self._shown:
            hide_averages(self.trainer.optimizers[0])
            self._shown = False

    @property
    def _averages(self) -> bool:
        """Whether there is an average to be seen: not by other commands, whose weights may be of any file."""
        fitting = self.trainer.state.fn == TrainerFn.FITTING
        return fitting and self.optimizer_config.ema_decay > 0 and bool(self.trainer.optimizers)

    def on_train_start(self) -> None:
        """Has a run that goes on use its own settings of the optimizer; the checkpoint's were loaded."""
        schedule: Any = self.lr_schedulers()
        apply_settings(self.trainer.optimizers[0], schedule, self.optimizer_config)

    def on_train_end(self) -> None:
        """Leaves the average in the weights, for whoever uses them next; the last checkpoint is written."""
        self.show_average()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds how many steps were just skipped, and puts the average in the weights' place."""
        checkpoint[_SKIPPED] = self.skipped.in_a_row
        if self.optimizer_config.ema_decay == 0 or not self.trainer.optimizers:
            return
        optimizer = self.trainer.optimizers[0]
        names = parameter_names(self, optimizer)
        if "optimizer_states" in checkpoint:
            with_averages(checkpoint, names, self._shown)
        elif not self._shown:
            put_in(checkpoint, optimizer, names)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Where training goes on: takes up the weights themselves, and how many steps were just skipped."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._num_steps = self.trainer.max_steps
            without_averages(checkpoint, keep=self.optimizer_config.ema_decay > 0)
            self.skipped.in_a_row = checkpoint.get(_SKIPPED, 0)

    def skip_step(self, what: str, value: Tensor, batch: PromptBatch, rollout: Rollout | None = None) -> None:
        """Counts a step that is not to be taken, on all ranks, or stops; drops its gradients.

        Args:
            what: the number that is not finite, in words.
            value: [], this rank's.
            batch: the prompts.
            rollout: their rollout, with advantages; None in fine-tuning.

        Raises:
            SampleError: too many steps in a row were skipped.
        """
        self.zero_grad()
        self.skipped.add(what, value, self.global_step, batch, rollout)
        self.log("update/skipped", 1.0)

    def take_step(self) -> None:
        """Notes that a step is taken."""
        self.skipped.in_a_row = 0
        self.log("update/skipped", 0.0)

    def step_and_schedule(self) -> None:
        """Takes a step of an optimization by hand, and one of its schedule."""
        optimizer: Any = self.optimizers()
        self.log("update/lr", optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad()
        schedule: Any = self.lr_schedulers()
        schedule.step()
        self.take_step()
