"""Checkpoints: the best by validation accuracy, and the last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from drift.contract import ConfigError


class CheckpointCallback(ModelCheckpoint):
    """Writes `best.ckpt` after a validation that beats the earlier ones, and `last.ckpt` as training goes on.

    Args:
        every: optimizer steps between two writings of `last.ckpt`, >= 1; it is also written at the end.
        monitor: logged figure that decides which is best.
        mode: `max` or `min`.
        dirpath: folder; None: `checkpoints` in the run's folder.

    Raises:
        ConfigError: where `every` is below 1.
    """

    def __init__(
        self, every: int = 50, monitor: str = "val/accuracy", mode: str = "max", dirpath: str | None = None
    ) -> None:
        if every < 1:
            raise ConfigError(f"checkpoint.every is {every}: set it to 1 or more steps")
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.every = every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes `last.ckpt` where it is due."""
        if trainer.global_step % self.every == 0:
            self._write_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes `last.ckpt` once more."""
        self._write_last(trainer)

    def _write_last(self, trainer: Trainer) -> None:
        assert self.dirpath is not None
        path = str(Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
        # Named before it is written: the checkpoint itself holds this callback's state.
        self.last_model_path = path
        trainer.save_checkpoint(path)
