"""Keeps what there is when training stops on an error: a checkpoint, and the batch that caused it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from safetensors.torch import save_file

from drift.contract import SampleError, StorageError
from drift.distributed import world_size


class RescueCallback(Callback):
    """On an error in training, saves `rescue.ckpt`, and the batch where one caused it.

    The files go to the run's folder. The checkpoint holds the weights of the last finished step:
    `--ckpt_path` goes on from there. It takes all ranks to write it: an error of one rank alone writes none.

    `rescue.json` tells of the batch. Where the loss or the gradient was not finite, `rescue.safetensors`
    holds it whole: `Rollout(**safetensors.torch.load_file(path))` is the rollout with ids, masks, step_map,
    rewards, advantages and seeds. Rank 1 writes `rescue.rank1.json`, and so on.
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
        if isinstance(exception, SampleError):
            self._save_batch(exception, trainer)
        if world_size() > 1 and not (isinstance(exception, SampleError) and exception.on_all_ranks):
            return  # the others may be waiting elsewhere
        trainer.save_checkpoint(self.folder / "rescue.ckpt")
        kept = self.folder / "rescue.ckpt"
        rank_zero_info(f"the weights of the last finished step: {kept} (go on with --ckpt_path)")

    def _save_batch(self, error: SampleError, trainer: Trainer) -> None:
        name = "rescue.json" if trainer.is_global_zero else f"rescue.rank{trainer.global_rank}.json"
        path = self.folder / name
        sample = {"message": str(error), **error.sample}
        if error.tensors and "prompts" not in sample:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            rows = zip(error.tensors["prompt_ids"], error.tensors["prompt_mask"], strict=True)
            sample["prompts"] = [data.tokenizer.decode(ids[mask]) for ids, mask in rows]
        path.write_text(json.dumps(sample, indent=2), encoding="utf-8")
        if error.tensors:
            # Each by itself: some may be two names of one tensor, which the format refuses.
            tensors = {
                name: value.detach().cpu().contiguous().clone() for name, value in error.tensors.items()
            }
            save_file(tensors, path.with_suffix(".safetensors"))
        rank_zero_info(f"the batch that stopped training: {path}")
