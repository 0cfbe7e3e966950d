"""Warns when the policy grows over-confident: it commits more tokens at once, and its answers get worse."""

from __future__ import annotations

from collections import deque
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from drift.contract import ConfigError


class CollapseCallback(Callback):
    """Compares the latest steps with the highest: in a collapse reward and timesteps per answer both fell.

    Args:
        window: steps that are averaged, >= 1.
        reward_drop: how far the mean reward must have fallen below its best, in units of reward, > 0.
        timestep_drop: share by which timesteps per answer must have fallen below their highest, in (0, 1).

    Raises:
        ConfigError: where a value is outside its range.
    """

    def __init__(self, window: int = 10, reward_drop: float = 0.1, timestep_drop: float = 0.1) -> None:
        if window < 1:
            raise ConfigError(f"collapse.window is {window}: set it to 1 or more steps")
        if reward_drop <= 0:
            raise ConfigError(f"collapse.reward_drop is {reward_drop}: set it to a positive number")
        if not 0 < timestep_drop < 1:
            raise ConfigError(f"collapse.timestep_drop is {timestep_drop}: set it in (0, 1)")
        self.window = window
        self.reward_drop = reward_drop
        self.timestep_drop = timestep_drop
        self.recent: deque[tuple[float, float]] = deque(maxlen=window)
        self.best: tuple[float, float] | None = None
        self.warned = False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on comparing."""
        return {"recent": list(self.recent), "best": self.best, "warned": self.warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the comparison of an earlier run."""
        self.recent = deque((tuple(pair) for pair in state_dict["recent"]), maxlen=self.window)
        self.best = None if state_dict["best"] is None else tuple(state_dict["best"])
        self.warned = state_dict["warned"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at the step's reward and timesteps."""
        metrics = trainer.callback_metrics
        if batch.rollout is None:  # a further update of a rollout that was looked at
            return
        if "reward/mean" not in metrics or "rollout/timesteps" not in metrics:
            return
        message = self.look(float(metrics["reward/mean"]), float(metrics["rollout/timesteps"]))
        if message is not None:
            rank_zero_warn(message)

    def look(self, reward: float, timesteps: float) -> str | None:
        """A warning, once, where the policy has collapsed; None otherwise.

        Args:
            reward: mean reward of the step.
            timesteps: mean denoising timesteps per answer.
        """
        self.recent.append((reward, timesteps))
        if len(self.recent) < self.window:
            return None
        now = (sum(r for r, _ in self.recent) / self.window, sum(t for _, t in self.recent) / self.window)
        # Each by itself: while the reward still grows, the timesteps are often falling already.
        best = self.best or now
        self.best = (max(best[0], now[0]), max(best[1], now[1]))
        fallen = self.best[0] - now[0] >= self.reward_drop and now[1] <= self.best[1] * (
            1 - self.timestep_drop
        )
        if self.warned or not fallen:
            return None
        self.warned = True
        return (
            f"over the last {self.window} steps the mean reward fell from {self.best[0]:.2f} to {now[0]:.2f} "
            f"and the timesteps per answer from {self.best[1]:.1f} to {now[1]:.1f}: the policy commits more "
            "tokens at once than it can get right (over-confident collapse); lower model.optimizer.lr, raise "
            "model.loss.beta, or go back to the best checkpoint"
        )
