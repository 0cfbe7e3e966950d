"""A LightningModule that measures rollouts: in training as they come, in evaluation answer by answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lightning import LightningModule
from torch import Tensor
from torchmetrics import Metric

from drift.collapse import CONFIDENT, CollapseMetrics
from drift.contract import ConfigError, PromptBatch, Rollout
from drift.evaluation import Cell, CellResult, Tally, logged
from drift.metrics import RolloutMetrics
from drift.rollout import DenoiseConfig


class MeasuredModule(LightningModule):
    """Measures the rollouts that the rollout callback attaches to every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.rollout_metrics = RolloutMetrics()
        self.collapse_metrics = CollapseMetrics()
        self.cells: list[Cell] = []  # of the evaluation at hand; the rollout callback sets them
        self.tally = Tally()
        self.results: dict[tuple[int, int], CellResult] = {}  # of the last evaluation, by (set, cell)

    def measure_parts(self, reward_names: Sequence[str]) -> None:
        """Measures every part of training rollouts' reward, too, from here on.

        Args:
            reward_names: [R] the parts of each rollout that comes, the same on every rank.
        """
        self.rollout_metrics = RolloutMetrics(reward_names)

    def measure_confidence(self, decode: DenoiseConfig) -> None:
        """Calls tokens of training rollouts confident, from here on, as their decoding does.

        Args:
            decode: whose threshold that is, where it has one that is compared with a probability.
        """
        threshold = decode.threshold if decode.score == "confidence" else None
        self.collapse_metrics = CollapseMetrics(CONFIDENT if threshold is None else threshold)

    def measure(self, rollout: Rollout) -> dict[str, Tensor]:
        """What a training rollout was like, over all ranks, by the names under which it is logged."""
        found, collapse = _of_one(self.rollout_metrics, rollout), _of_one(self.collapse_metrics, rollout)
        names = {
            "reward/mean": "reward",
            "reward/accuracy": "accuracy",
            "rollout/timesteps": "timesteps",
            "rollout/tokens_per_forward": "tokens_per_forward",
        }
        parts = {name: value for name, value in found.items() if name.startswith("reward/")}
        return {
            **{name: found[metric] for name, metric in names.items()},
            **parts,
            **{f"collapse/{name}": value for name, value in collapse.items()},
        }

    def validation_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Keeps what counts of the batch's answers."""
        require_rollout(batch)
        self.tally.add(dataloader_idx, batch)

    def on_validation_epoch_end(self) -> None:
        """Logs `val/accuracy` and its fellows."""
        self._log_results("val", "validation")

    def test_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Keeps what counts of the batch's answers."""
        require_rollout(batch)
        self.tally.add(dataloader_idx, batch)

    def on_test_epoch_end(self) -> None:
        """Logs `test/accuracy` and its fellows, or `test/SET/LENGTH/DECODE/accuracy` of each cell."""
        self._log_results("test", "test")

    def predict_step(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> PromptBatch:
        """The batch with its rollout."""
        require_rollout(batch)
        return batch

    def _log_results(self, prefix: str, split: str) -> None:
        # Computed here, over all ranks: an interval can't be averaged.
        self.results = self.tally.close()
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        names = [found.name for found in data.evaluation_sets[split]]
        values = logged(self.results, names, self.cells)
        self.log_dict({f"{prefix}/{name}": value for name, value in values.items()}, rank_zero_only=False)


def _of_one(metrics: Metric, rollout: Rollout) -> dict[str, Tensor]:
    metrics.update(rollout)
    found = metrics.compute()
    metrics.reset()
    return found


def require_rollout(batch: PromptBatch) -> Rollout:
    """The batch's rollout; raises ConfigError where nothing has attached one."""
    if batch.rollout is None:
        raise ConfigError(
            "the batch has no rollout: add drift.callbacks.RolloutCallback to the trainer's callbacks"
        )
    return batch.rollout


def placed_rollout(batch: PromptBatch) -> Rollout:
    """The batch's rollout, whose rows say where their prompts are from."""
    rollout = require_rollout(batch)
    group_size = len(rollout.completion_ids) // len(batch.problems)
    return replace(rollout, positions=batch.positions.repeat_interleave(group_size))
