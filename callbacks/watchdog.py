"""Ends a run in which a rank has stopped, and says which, and what all of them were at."""

from __future__ import annotations

import os
import signal
import sys
from subprocess import Popen
from threading import Thread
from typing import Any

from lightning import Callback, LightningModule, Trainer

from drift.contract import ConfigError, SampleError, StorageError
from drift.distributed import rank, world_size
from drift.heartbeat import RankWatch, Stage
from drift.policy_module import PolicyModule


class WatchdogCallback(Callback):
    """With several ranks, ends all of them where nothing has moved for some time.

    A rank that hangs, is stopped or cut off makes the others wait for it, without a word. Here every rank
    tells the others what it is at; one that has been in the same stage for too long prints it for all of them
    and ends with exit status 1. Go on from the last checkpoint.

    Args:
        timeout_seconds: how long a stage (a block of a rollout, the rewards, a micro-batch, a checkpoint) may
            take, > 0; below the strategy's own `timeout`, which is 30 minutes, and above
            rollout.reward_timeout_seconds, both of which say less of the other ranks. None: no watchdog.

    Raises:
        ConfigError: where the time is not positive.
    """

    def __init__(self, timeout_seconds: float | None = 1500.0) -> None:
        if timeout_seconds is not None and not 0 < timeout_seconds < float("inf"):
            raise ConfigError(
                f"watchdog.timeout_seconds is {timeout_seconds}: set it to a positive number, or null for "
                "no watchdog"
            )
        self.timeout_seconds = timeout_seconds
        self.watch: RankWatch | None = None
        self.told = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts the watch, where there are others to wait for."""
        if self.timeout_seconds is None or world_size() == 1 or not isinstance(pl_module, PolicyModule):
            return
        pl_module.report("setup", 0, 1)
        launcher: Any = trainer.strategy.launcher

        def at() -> tuple[Stage, int]:
            return pl_module.stage, trainer.global_step

        def end(report: str) -> None:
            waited = f"rank {rank()} has waited for {self.timeout_seconds:g} s (watchdog.timeout_seconds)"
            _tell(f"stopped: {waited}", report)
            if launcher is not None:
                launcher.kill(signal.SIGKILL)  # a stopped process would stay, and keep its device
            os._exit(1)

        self.watch = RankWatch(self.timeout_seconds, at, end)
        self.watch.start()
        for number, process in enumerate(getattr(launcher, "procs", ()), start=rank() + 1):
            Thread(target=self._await_end, args=(number, process), daemon=True).start()

    def _await_end(self, number: int, process: Popen[bytes]) -> None:
        """Says at once that a rank was killed: Lightning's launcher kills the others for it within 5 s."""
        status = process.wait()
        watch = self.watch
        if watch is not None and status < 0:
            self.told = True
            _tell(f"rank {number} was killed by signal {-status}", watch.news(others_fail_too=False))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ends the watch."""
        if self.watch is not None:
            self.watch.stop()
            self.watch = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Says what all ranks were at, where this one fails: mostly because another one is gone."""
        own = isinstance(exception, SampleError | StorageError) or not isinstance(exception, RuntimeError)
        if self.watch is not None and not own:
            news = self.watch.news()
            if not self.told:
                _tell(f"rank {rank()} fails ({exception})", news)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The rollout is there."""
        _report(pl_module, "update")

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An evaluation in training."""
        _report(pl_module, "validation")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: Any) -> None:
        """All ranks wait for the one that writes."""
        _report(pl_module, "checkpoint")


def _tell(what: str, report: str) -> None:
    sys.stderr.write(f"drift: {what}:\n{report}\n")
    sys.stderr.flush()


def _report(module: LightningModule, stage: str) -> None:
    if isinstance(module, PolicyModule):
        module.report(stage, 0, 1)
