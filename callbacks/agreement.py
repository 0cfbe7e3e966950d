"""Sees that all ranks were started with the same settings, and keeps these beside the run's results."""

from __future__ import annotations

from lightning import LightningModule, Trainer

from drift.distributed import require_agreement
from drift.resume import KeepConfig


class AgreedConfigCallback(KeepConfig):
    """Writes `config.yaml` into the run's folder, once all ranks have shown that they hold the same."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compares, then writes."""
        settings = {key: repr(value) for key, value in vars(self.config.as_flat()).items()}
        # Files of the same content may lie elsewhere on each machine.
        settings.pop("config", None)
        require_agreement("the settings", settings)
        super().setup(trainer, pl_module, stage)
