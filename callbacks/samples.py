"""Shows what the policy writes: a table of samples each few steps."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger

from drift.contract import ConfigError, PromptBatch

_WIDTH = 60


class SampleTableCallback(Callback):
    """Prints a few completions with their rewards and timesteps, and writes them whole to TensorBoard.

    Args:
        every: steps between two tables, >= 1.
        num: completions of a table, >= 1.

    Raises:
        ConfigError: where a value is below 1.
    """

    def __init__(self, every: int = 10, num: int = 4) -> None:
        for key, value in (("every", every), ("num", num)):
            if value < 1:
                raise ConfigError(f"samples.{key} is {value}: set it to 1 or more")
        self.every = every
        self.num = num
        self.due = 0
        self._resumed = False

    def state_dict(self) -> dict[str, Any]:
        """When a resumed run shows its next table."""
        return {"due": self.due}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the order of an earlier run."""
        self.due = state_dict["due"]
        self._resumed = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first table comes after `every` steps."""
        if not self._resumed:
            self.due = trainer.global_step + self.every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Shows the first completions of the batch."""
        if batch.rollout is None or trainer.global_step < self.due or not trainer.is_global_zero:
            return
        self.due = trainer.global_step + self.every
        rows = self._rows(trainer, batch)
        lines = [f"samples at step {trainer.global_step}: reward, timesteps, prompt => completion"]
        lines += [f"  {row[0]:>5} {row[1]:>4}  {_short(row[2])} => {_short(row[3])}" for row in rows]
        bar = trainer.progress_bar_callback
        if isinstance(bar, ProgressBar):
            bar.print("\n".join(lines))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                # The scalars of a step are logged under the number of steps before it.
                logger.experiment.add_text("samples", _markdown(rows), trainer.global_step - 1)

    def _rows(self, trainer: Trainer, batch: PromptBatch) -> list[tuple[str, str, str, str]]:
        rollout = batch.rollout
        assert rollout is not None
        assert rollout.rewards is not None
        assert rollout.num_timesteps is not None
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        group_size = len(rollout.completion_ids) // len(batch.problems)
        shown = rollout.completion_ids[: self.num]
        problems = [batch.problems[i // group_size] for i in range(len(shown))]
        texts = data.template.answers(shown, problems)
        rewards, timesteps = (
            rollout.rewards[: self.num].sum(dim=1).tolist(),
            rollout.num_timesteps[: self.num].tolist(),
        )
        return [
            (f"{rewards[i]:.2f}", str(timesteps[i]), problem.prompt, text)
            for i, (problem, text) in enumerate(zip(problems, texts, strict=True))
        ]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WIDTH else f"{line[: _WIDTH // 2 - 2]} .. {line[-_WIDTH // 2 + 2 :]}"


def _markdown(rows: list[tuple[str, str, str, str]]) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", "<br>")

    body = [
        f"| {reward} | {timesteps} | {cell(prompt)} | {cell(text)} |"
        for reward, timesteps, prompt, text in rows
    ]
    return "\n".join(["| reward | timesteps | prompt | completion |", "|---|---|---|---|", *body])
