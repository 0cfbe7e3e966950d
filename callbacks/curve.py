"""Draws how accuracy and speed go together over training."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from drift.curve import NAME, CurvePoint, joined, write_curve
from drift.policy_module import PolicyModule


class CurveCallback(Callback):
    """Draws validation accuracy against timesteps per answer, a point for each validation of training.

    After each of them `accuracy_timesteps.png`, and `accuracy_timesteps.json` with the same numbers, are
    written anew into the run's folder. To the left answers take fewer timesteps: a curve that goes there and
    down is one of a policy that gets over-confident. A resumed run goes on with its curve. The policy before
    the first step is its first point where trainer.num_sanity_val_steps is -1: a whole validation, not a few
    batches.

    Args:
        enabled: False writes nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.curve: list[CurvePoint] = []
        self.folder = Path()

    def state_dict(self) -> dict[str, Any]:
        """The points so far."""
        return {"curve": [asdict(point) for point in self.curve]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the points of an earlier run."""
        self.curve = [CurvePoint(**point) for point in state_dict["curve"]]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Asks for the run's folder, which all ranks must do together."""
        self.folder = Path(trainer.log_dir or trainer.default_root_dir)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds a point for every set, and writes the curve."""
        part = trainer.sanity_checking and trainer.num_sanity_val_steps != math.inf
        if part or trainer.state.fn != TrainerFn.FITTING or not isinstance(pl_module, PolicyModule):
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        new = []
        for (set_number, _), result in pl_module.results.items():
            figures = result.figures()
            new.append(
                CurvePoint(
                    dataset=data.evaluation_sets["validation"][set_number].name,
                    step=trainer.global_step,
                    accuracy=figures["accuracy"],
                    low=figures["accuracy_low"],
                    high=figures["accuracy_high"],
                    timesteps=figures["timesteps"],
                )
            )
        self.curve = joined(self.curve, new)
        self._write(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the curve once more, where there was nothing left to train, too, and says where it is."""
        if self._write(trainer):
            rank_zero_info(f"accuracy against timesteps is drawn in {self.folder / NAME}.png")

    def _write(self, trainer: Trainer) -> bool:
        if not self.enabled or not self.curve or not trainer.is_global_zero:
            return False
        try:
            write_curve(self.folder, self.curve)
        except OSError as error:
            # No reason to stop, on one rank alone: the points are in the checkpoints, which do stop training.
            rank_zero_warn(
                f"{self.folder / NAME}.png cannot be written ({error.strerror}); it is tried again after the "
                "next validation"
            )
            return False
        return True
