"""Keeps what there is when training stops on an error: a checkpoint, and the sample that caused it."""

from __future__ import annotations

import json
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from drift.contract import SampleError, StorageError


class RescueCallback(Callback):
    """On an error in training, saves `rescue.ckpt`, and `rescue.json` where a sample caused it.

    Both go to the run's folder. The checkpoint holds the weights of the last finished step: `--ckpt_path`
    goes on from there.
    """

    def __init__(self) -> None:
        self.started = False
        self.folder = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Asks for the run's folder, which all ranks must do together."""
        self.folder = Path(trainer.log_dir or trainer.default_root_dir)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on there is something to keep."""
        self.started = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Saves, and says where; an interrupt is no error, and a disk that is full holds no more."""
        if not self.started or not isinstance(exception, Exception) or isinstance(exception, StorageError):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if isinstance(exception, SampleError) and trainer.is_global_zero:
            text = json.dumps({"message": str(exception), **exception.sample}, indent=2)
            (self.folder / "rescue.json").write_text(text, encoding="utf-8")
            rank_zero_info(f"the sample that stopped training: {self.folder / 'rescue.json'}")
        trainer.save_checkpoint(self.folder / "rescue.ckpt")
        kept = self.folder / "rescue.ckpt"
        rank_zero_info(f"the weights of the last finished step: {kept} (go on with --ckpt_path)")
