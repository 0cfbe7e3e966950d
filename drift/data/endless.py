"""What training on a stream of prompts without end asks of its trainer."""

from __future__ import annotations

from lightning import Trainer

from drift.contract import ConfigError


def require_endless(trainer: Trainer) -> None:
    """Raises ConfigError where a trainer counts on epochs, which the stream of prompts does not have."""
    if trainer.max_steps < 0:
        raise ConfigError("trainer.max_steps is -1: the stream of prompts never ends; set the steps")
    if trainer.val_check_interval == 0:
        raise ConfigError(
            "trainer.val_check_interval is 0: set it to 1 or more steps; "
            "trainer.limit_val_batches 0 leaves validation out"
        )
    limit = trainer.limit_train_batches
    # 1.0 is all of them, and 1 is one.
    cut = isinstance(limit, int) or limit != 1.0
    if cut and not trainer.fast_dev_run:  # type: ignore[attr-defined]
        raise ConfigError(
            f"trainer.limit_train_batches is {limit}: the stream of prompts never ends, "
            "and would begin anew with the same ones after so many; leave it out, and set trainer.max_steps"
        )
