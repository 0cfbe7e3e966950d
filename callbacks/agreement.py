"""Sees that all ranks were started with the same settings, and keeps these beside the run's results."""

from __future__ import annotations

from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn

from drift.distributed import require_agreement
from drift.resume import CONFIG
from drift.storage import replacing


class AgreedConfigCallback(SaveConfigCallback):
    """Writes `config.yaml` into the run's folder, once all ranks have shown that they hold the same.

    It is written whole or not at all: by these settings the next start of training finds the run. Other
    commands that look at a run write `config.test.yaml` and so on. Without a logger training writes it to its
    checkpoints, and the other commands nothing.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compares, then writes."""
        settings = {key: repr(value) for key, value in vars(self.config.as_flat()).items()}
        # Files of the same content may lie elsewhere on each machine.
        settings.pop("config", None)
        require_agreement("the settings", settings)
        log_dir = trainer.log_dir  # all ranks must ask
        own = any(logger.log_dir is not None for logger in trainer.loggers[:1])
        if not trainer.is_global_zero or self.already_saved or not (own or stage == "fit"):
            return
        folder = Path(log_dir if own and log_dir else self._checkpoints(trainer))
        folder.mkdir(parents=True, exist_ok=True)
        name = CONFIG if stage == "fit" else f"config.{TrainerFn(stage).value}.yaml"
        with replacing(folder / name) as new:
            self.parser.save(self.config, str(new), skip_none=False, overwrite=True, multifile=False)
        self.already_saved = True

    def _checkpoints(self, trainer: Trainer) -> str:
        return self.config.get("checkpoint.dirpath") or f"{trainer.default_root_dir}/checkpoints"
