"""Decides when the training feedback refreshes the rollout's token probabilities."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer

from drift.contract import ConfigError, PromptBatch
from drift.module import RLDFModule


class FeedbackCallback(Callback):
    """Between the updates of one rollout, replaces `token_probs` by what the trained model gave those tokens.

    The probabilities come from the last update's own forward passes, before its step, and cost nothing;
    timesteps that it did not visit keep theirs. The next update's timesteps are drawn by them.

    Args:
        every: updates between two refreshes, >= 1.

    Raises:
        ConfigError: where `every` is below 1.
    """

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise ConfigError(f"feedback.every is {every}: set it to 1 or more updates")
        self.every = every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Refreshes where another update of the same rollout follows."""
        if not isinstance(pl_module, RLDFModule):
            return
        done = batch.update + 1
        if done < pl_module.num_updates and done % self.every == 0:
            pl_module.refresh_feedback()
