"""Watches for collapse: an over-confident policy, rewards that do not differ, a policy far from its start."""

from __future__ import annotations

from collections import deque
from typing import Any, Literal, get_args

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.utilities import rank_zero_warn

from drift.contract import ConfigError, TrainingStopped

Action = Literal["warn", "stop", "ignore"]


class CollapseCallback(Callback):
    """Looks at the means of the latest steps, and warns once of each kind of collapse, or stops training.

    A stop is orderly: `last.ckpt` is written, the message names the figures and the best checkpoint, and the
    command's exit status is 1. From Python, `stopped` holds the message. The checkpoint of a stopped run is
    not gone on from, unless the action is changed: a job that restarts by itself must not train on.

    Args:
        window: steps that are averaged, >= 1.
        reward_drop: how far the mean reward must have fallen below its best, in units of reward, > 0.
        timestep_drop: share by which timesteps per answer must have fallen below their highest, in (0, 1).
        min_spread: least share of groups whose rewards differ (`reward/spread`), in [0, 1).
        kl_limit: highest mean `loss/kl`, nats per token, > 0; there is none where model.loss.beta is 0.
        overconfidence: `warn`, `stop` or `ignore` where reward and timesteps per answer both fell.
        no_spread: the same where the spread of the rewards is at min_spread or below.
        high_kl: the same where the KL is above kl_limit.

    Raises:
        ConfigError: where a value is outside its range, or a run that was stopped is to go on.
    """

    def __init__(
        self,
        window: int = 10,
        reward_drop: float = 0.1,
        timestep_drop: float = 0.1,
        min_spread: float = 0.01,
        kl_limit: float = 1.0,
        overconfidence: Action = "warn",
        no_spread: Action = "warn",
        high_kl: Action = "warn",
    ) -> None:
        if window < 1:
            raise ConfigError(f"collapse.window is {window}: set it to 1 or more steps")
        if reward_drop <= 0:
            raise ConfigError(f"collapse.reward_drop is {reward_drop}: set it to a positive number")
        if not 0 < timestep_drop < 1:
            raise ConfigError(f"collapse.timestep_drop is {timestep_drop}: set it in (0, 1)")
        if not 0 <= min_spread < 1:
            raise ConfigError(f"collapse.min_spread is {min_spread}: set it in [0, 1)")
        if not kl_limit > 0:
            raise ConfigError(f"collapse.kl_limit is {kl_limit}: set it to a positive number of nats")
        self.actions: dict[str, Action] = {
            "overconfidence": overconfidence,
            "no_spread": no_spread,
            "high_kl": high_kl,
        }
        for kind, action in self.actions.items():
            if action not in get_args(Action):
                raise ConfigError(
                    f"collapse.{kind} is {action!r}: choose one of {', '.join(get_args(Action))}"
                )
        self.window = window
        self.reward_drop = reward_drop
        self.timestep_drop = timestep_drop
        self.min_spread = min_spread
        self.kl_limit = kl_limit
        self.recent: deque[tuple[float, float]] = deque(maxlen=window)  # reward, timesteps
        self.spreads: deque[float] = deque(maxlen=window)
        self.kls: deque[float] = deque(maxlen=window)
        self.best: tuple[float, float] | None = None
        self.told: list[str] = []  # kinds
        self.stopped: str | None = None
        self._stopped_by = ""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on comparing."""
        return {
            "recent": list(self.recent),
            "spreads": list(self.spreads),
            "kls": list(self.kls),
            "best": self.best,
            "told": list(self.told),
            "stopped": self.stopped,
            "stopped_by": self._stopped_by,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the comparison of an earlier run."""
        self.recent = deque((tuple(pair) for pair in state_dict["recent"]), maxlen=self.window)
        self.spreads = deque(state_dict["spreads"], maxlen=self.window)
        self.kls = deque(state_dict["kls"], maxlen=self.window)
        self.best = None if state_dict["best"] is None else tuple(state_dict["best"])
        self.told = list(state_dict["told"])
        self.stopped, self._stopped_by = state_dict["stopped"], state_dict["stopped_by"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses to go on from where a run was stopped, unless that is what the settings now say."""
        if self.stopped is not None and self.actions[self._stopped_by] == "stop":
            raise ConfigError(
                f"ckpt_path: the run of this checkpoint was stopped: {self.stopped}; give an earlier "
                f"checkpoint, or set collapse.{self._stopped_by} to warn to go on from this one"
            )
        self.stopped, self._stopped_by = None, ""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at the step's figures, which are the same on every rank."""
        metrics = trainer.callback_metrics
        # A further update of a rollout says nothing new of it, and a skipped or empty one nothing of the KL.
        if batch.rollout is not None and {"reward/mean", "rollout/timesteps"} <= metrics.keys():
            reward = float(metrics["reward/mean"])
            self._act(trainer, "overconfidence", self.look(reward, float(metrics["rollout/timesteps"])))
            if "reward/spread" in metrics:
                self._act(trainer, "no_spread", self.look_at_spread(float(metrics["reward/spread"])))
        skipped = float(metrics.get("update/skipped", 0.0))
        if "loss/kl" in metrics and not skipped and float(metrics["update/noisy_states"]):
            self._act(trainer, "high_kl", self.look_at_kl(float(metrics["loss/kl"])))

    def look(self, reward: float, timesteps: float) -> str | None:
        """What to say where the policy has become over-confident; None otherwise.

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
        if not fallen:
            return None
        return (
            f"over the last {self.window} steps the mean reward fell from {self.best[0]:.2f} to {now[0]:.2f} "
            f"and the timesteps per answer from {self.best[1]:.1f} to {now[1]:.1f}: the policy commits more "
            "tokens at once than it can get right (over-confident collapse); lower model.optimizer.lr, raise "
            "model.loss.beta, or let it learn when to commit (rollout.decode.commit, --config rldf_commit)"
        )

    def look_at_spread(self, spread: float) -> str | None:
        """What to say where rewards don't differ any more; None otherwise. To be called after `look`.

        Args:
            spread: share of the step's groups whose rewards differ.
        """
        self.spreads.append(spread)
        now = sum(self.spreads) / self.window
        if len(self.spreads) < self.window or now > self.min_spread:
            return None
        reward = sum(r for r, _ in self.recent) / max(len(self.recent), 1)
        return (
            f"over the last {self.window} steps {1 - now:.0%} of the groups had equal rewards, {reward:.2f} "
            "in the mean: there is nothing to learn from them; give prompts that the policy sometimes gets "
            "right, or raise rollout.group_size or rollout.decode.temperature"
        )

    def look_at_kl(self, kl: float) -> str | None:
        """What to say where the policy is too far from the reference; None otherwise.

        Args:
            kl: `loss/kl` of the step, nats per token.
        """
        self.kls.append(kl)
        now = sum(self.kls) / self.window
        if len(self.kls) < self.window or now <= self.kl_limit:
            return None
        return (
            f"over the last {self.window} steps loss/kl was {now:.3g} nats per token, above "
            f"collapse.kl_limit of {self.kl_limit}: the policy is far from the reference; lower "
            "model.optimizer.lr or raise model.loss.beta"
        )

    def _act(self, trainer: Trainer, kind: str, message: str | None) -> None:
        action = self.actions[kind]
        if message is None or action == "ignore" or kind in self.told:
            return
        self.told.append(kind)
        message = f"{message}; {_way_back(trainer)}"
        if action == "stop" and self.stopped is None:
            self.stopped, self._stopped_by = f"step {trainer.global_step}: {message}", kind
            trainer.should_stop = True
        rank_zero_warn(message)


def require_not_stopped(trainer: Trainer) -> None:
    """Raises TrainingStopped where a collapse has stopped training, so that the command fails.

    On rank 0 alone: where another rank fails, the launcher kills rank 0, which may still be writing.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, CollapseCallback) and callback.stopped and trainer.is_global_zero:
            raise TrainingStopped(callback.stopped)


def stopped_for_good(trainer: Trainer) -> bool:
    """Whether training is to stop for a reason that is none of a later start's: of early stopping.

    That start may have more time (trainer.max_time), and it is asked about collapse by its own settings.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        remaining = callback.time_remaining() if isinstance(callback, Timer) else None
        if remaining is not None and remaining <= 0:
            return False
        if isinstance(callback, CollapseCallback) and callback.stopped is not None:
            return False
    return trainer.should_stop


def _way_back(trainer: Trainer) -> str:
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.best_model_path:
            score = callback.best_model_score
            figure = "" if score is None else f" ({callback.monitor} {float(score):.3f})"
            return f"the best checkpoint so far is {callback.best_model_path}{figure}"
    return "there is no checkpoint of an earlier validation to go back to"
