"""Writes the trained policy as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from drift.policy_module import PolicyModule


class ExportCallback(Callback):
    """At the end of training, writes weights, configuration and tokenizer to a folder for `model.policy`.

    Args:
        folder: where to; None: nothing is written.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the folder."""
        if self.folder is None or not trainer.is_global_zero or not isinstance(pl_module, PolicyModule):
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        Path(self.folder).mkdir(parents=True, exist_ok=True)
        pl_module.policy.save_pretrained(self.folder)
        data.tokenizer.save_pretrained(self.folder)
        rank_zero_info(f"the policy is in {self.folder}")
