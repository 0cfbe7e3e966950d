"""Warns when rollout and update disagree: they give the same tokens different probabilities."""

from __future__ import annotations

from collections import deque
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from drift.contract import ConfigError

# Growth counts from this share of the limit on: below it, a multiple of next to nothing is next to nothing.
_FLOOR = 0.1


class MismatchCallback(Callback):
    """Watches `mismatch/kl`, the KL between the probabilities of the rollout and those of the update.

    It is about half the mean square of the difference of the log-probabilities. At the default limit that is
    sqrt(2 * 0.05) = 0.32, a factor of 1.37: more than a PPO clip of 0.2 lets updates change a probability.

    Args:
        window: steps that are averaged, >= 1.
        kl_limit: mean `mismatch/kl` above which it warns, nats per token, > 0.
        growth: mean, in multiples of the first window's, from which it warns, > 1; only above a tenth of
            kl_limit.

    Raises:
        ConfigError: where a value is outside its range.
    """

    def __init__(self, window: int = 10, kl_limit: float = 0.05, growth: float = 3.0) -> None:
        if window < 1:
            raise ConfigError(f"mismatch.window is {window}: set it to 1 or more steps")
        if not kl_limit > 0:
            raise ConfigError(
                f"mismatch.kl_limit is {kl_limit}: set it to a positive number of nats per token"
            )
        if not growth > 1:
            raise ConfigError(f"mismatch.growth is {growth}: set it to a number above 1")
        self.window = window
        self.kl_limit = kl_limit
        self.growth = growth
        self.recent: deque[float] = deque(maxlen=window)
        self.first: float | None = None
        self.warned = False

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on comparing."""
        return {"recent": list(self.recent), "first": self.first, "warned": self.warned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up the comparison of an earlier run."""
        self.recent = deque(state_dict["recent"], maxlen=self.window)
        self.first = state_dict["first"]
        self.warned = state_dict["warned"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at the step's mismatch, where there was one to measure."""
        metrics = trainer.callback_metrics
        # A step without noisy states has no token to compare; its 0 says nothing. A skipped one logs none.
        skipped = float(metrics.get("update/skipped", 0.0))
        if "mismatch/kl" not in metrics or skipped or not float(metrics["update/noisy_states"]):
            return
        message = self.look(float(metrics["mismatch/kl"]))
        if message is not None:
            rank_zero_warn(message)

    def look(self, kl: float) -> str | None:
        """A warning, once, where the mismatch is too large or grew too much; None otherwise.

        Args:
            kl: of the step, nats per token.
        """
        self.recent.append(kl)
        if len(self.recent) < self.window:
            return None
        now = sum(self.recent) / self.window
        first = self.first = now if self.first is None else self.first
        grown = now >= self.growth * first and now > _FLOOR * self.kl_limit
        if self.warned or not (now > self.kl_limit or grown):
            return None
        self.warned = True
        why = f"above mismatch.kl_limit of {self.kl_limit}" if now > self.kl_limit else "growing"
        return (
            f"mismatch/kl was {now:.3g} nats per token over the last {self.window} steps ({first:.3g} over "
            f"the first), {why}: the update gives tokens other probabilities than the rollout did; "
            "set rollout.decode.use_cache to false or raise rollout.decode.horizon, set "
            "model.loss.importance_cap to 2.0, or make rollouts in float32 (trainer.precision 32-true, "
            "model.dtype float32)"
        )
