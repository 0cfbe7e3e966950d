"""Sees that all ranks were started with the same settings, and keeps these beside the run's results."""

from __future__ import annotations

from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from drift.distributed import require_agreement
from drift.resume import CONFIG
from drift.storage import replacing


class AgreedConfigCallback(SaveConfigCallback):
    """Writes `config.yaml` into the run's folder, once all ranks have shown that they hold the same.

    It is written whole or not at all: by these settings the next start finds the run.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compares, then writes."""
        settings = {key: repr(value) for key, value in vars(self.config.as_flat()).items()}
        # Files of the same content may lie elsewhere on each machine.
        settings.pop("config", None)
        require_agreement("the settings", settings)
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # all ranks must ask
        if not trainer.is_global_zero or self.already_saved:
            return
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / CONFIG) as new:
            self.parser.save(self.config, str(new), skip_none=False, overwrite=True, multifile=False)
        self.already_saved = True
