"""Writes the trained policy as a Hugging Face folder, and lets checkpoints know how to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from drift.export import PROVENANCE
from drift.models import merged_state_dict
from drift.models.writing import ExportDType, require_export_options, require_exportable, write_folder
from drift.policy_module import PolicyModule


class ExportCallback(Callback):
    """At the end of training, writes weights, configuration and tokenizer to a folder for `model.policy`.

    The folder has the tensor names, dtypes and config keys of the one that training started from; adapters
    are merged. `drift export` makes the same of a checkpoint.

    Args:
        folder: where to; None: nothing is written. An earlier policy there is replaced, anything else is
            refused before training.
        dtype: of the weights; `source` gives each tensor the one that it had at the start.
        max_shard_size: of one safetensors file, such as 5GB or 500MB.

    Raises:
        ConfigError: where an option is none, or the folder holds something else.
    """

    def __init__(
        self, folder: str | None = None, dtype: ExportDType = "source", max_shard_size: str = "5GB"
    ) -> None:
        require_export_options(dtype, max_shard_size)
        self.folder = folder
        self.dtype: ExportDType = dtype
        self.max_shard_size = max_shard_size

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses a folder that holds something else, before training."""
        if self.folder is not None and stage == "fit" and isinstance(pl_module, PolicyModule):
            require_exportable(Path(self.folder), pl_module.policy_folder)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds what `drift export` needs beside the weights."""
        if isinstance(pl_module, PolicyModule):
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            checkpoint[PROVENANCE] = {
                "policy": str(pl_module.policy_folder.resolve()),
                "tokenizer": data.tokenizer_path,
                "chat_template": data.template.added_chat_template,
            }

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the folder."""
        if self.folder is not None and isinstance(pl_module, PolicyModule):
            pl_module.show_average()  # where there was nothing left to train
            self._write(trainer, pl_module, Path(self.folder))

    def _write(self, trainer: Trainer, pl_module: PolicyModule, folder: Path) -> None:
        weights = merged_state_dict(pl_module.policy)  # which takes all ranks
        if not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        write_folder(
            weights,
            pl_module.policy_folder,
            folder,
            tokenizer=data.tokenizer_folder,
            dtype=self.dtype,
            max_shard_size=self.max_shard_size,
            chat_template=data.template.added_chat_template,
        )
        rank_zero_info(f"the policy is in {folder}")
