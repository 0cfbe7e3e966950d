"""Writes the answers of `drift predict` to a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from drift.contract import PromptBatch


class PredictionCallback(Callback):
    """Writes one JSON line an answer: its data set and place, prompt, completion, reward and timesteps.

    Args:
        path: the file; None: `predictions.jsonl` in the run's folder. Each rank above 0 writes a file of its
            own, with its number before the ending.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self.folder = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Asks for the run's folder, which all ranks must do together."""
        self.folder = Path(trainer.log_dir or trainer.default_root_dir)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts an empty file."""
        path = self._file(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: PromptBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds the answers of the batch."""
        rollout = batch.rollout
        assert rollout is not None
        assert rollout.rewards is not None
        assert rollout.num_timesteps is not None
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        name = data.evaluation_sets["test"][dataloader_idx].name
        texts = data.template.answers(rollout.completion_ids, batch.problems)
        rewards, timesteps = rollout.rewards.sum(dim=1).tolist(), rollout.num_timesteps.tolist()
        with self._file(trainer).open("a", encoding="utf-8") as file:
            for i, (problem, position) in enumerate(
                zip(batch.problems, batch.positions.tolist(), strict=True)
            ):
                answer = {
                    "dataset": name,
                    "position": position,
                    "prompt": problem.prompt,
                    "completion": texts[i],
                }
                line = json.dumps({**answer, "reward": rewards[i], "timesteps": timesteps[i]})
                file.write(f"{line}\n")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says where the answers are."""
        rank_zero_info(f"the answers are in {self._file(trainer)}")

    def _file(self, trainer: Trainer) -> Path:
        path = Path(self.path) if self.path is not None else self.folder / "predictions.jsonl"
        return path if trainer.global_rank == 0 else path.with_suffix(f".{trainer.global_rank}{path.suffix}")
