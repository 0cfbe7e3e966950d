"""Decides when checkpoints are written: at the best validation, as training goes on, and before it stops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from drift.callbacks.collapse import stopped_for_good
from drift.callbacks.monitor import require_logged
from drift.checkpoints import CheckedCheckpointIO
from drift.contract import ConfigError, StorageError
from drift.distributed import (
    gather_over_ranks,
    is_first_process,
    max_over_ranks,
    rank,
    require_agreement,
    world_size,
)
from drift.logs import PastLogs, flush
from drift.policy_module import PolicyModule
from drift.progress import at_boundary, rewind_loops
from drift.randomness import random_state, set_random_state
from drift.resume import BEST, LAST, PREVIOUS
from drift.signals import SignalWatch, Stopped, requeue_job, requeue_signal
from drift.storage import AtomicCheckpointIO, damage, leftovers, link, storage_error

_STATE = "drift_run"
_ALONE = ("rollout", "reward")  # stages in which ranks need not wait for each other


class CheckpointCallback(ModelCheckpoint):
    """Writes `best.ckpt` after a validation that beats the earlier ones, and `last.ckpt` as training goes on.

    A checkpoint is of the moment between two steps and resumes bit by bit: weights, optimizer, place in the
    prompt stream, rollout at hand, random streams, callbacks and logs. It is written under another name,
    synced and renamed; where the disk is full the one before stays. SIGINT, SIGTERM and SIGUSR1 write
    `last.ckpt` of the last finished step, and stop with exit status 128 + the signal's number; a second
    SIGINT or SIGTERM, a second later or more, stops at once. A rollout or validation is broken off for that,
    by the ranks that got the signal; with model.gather_for_rollout false the ranks go through with it.

    Args:
        every: optimizer steps between two writings of `last.ckpt`, >= 1; it is also written at the end.
        monitor: logged figure that decides which is best.
        mode: `max` or `min`.
        dirpath: folder; None: `checkpoints` in the run's folder.
        previous: also keep the one before the last, as `previous.ckpt`, for where the last gets damaged.

    Raises:
        ConfigError: where `every` is below 1.
    """

    def __init__(
        self,
        every: int = 50,
        monitor: str = "val/accuracy",
        mode: str = "max",
        dirpath: str | None = None,
        previous: bool = True,
    ) -> None:
        if every < 1:
            raise ConfigError(f"checkpoint.every is {every}: set it to 1 or more steps")
        super().__init__(
            dirpath=dirpath,
            filename=BEST.removesuffix(".ckpt"),
            monitor=monitor,
            mode=mode,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.every = every
        self.previous = previous
        self.continued = False
        self.start: str | None = None  # the checkpoint that training starts from, where that is known before
        self._watch: SignalWatch | None = None
        self._past: PastLogs | None = None
        self._saved_step = -1
        self._validated_step = -1
        self._max_steps: int | None = None  # of the trainer, where more are needed for a last validation
        self._random: dict[str, Any] = {}
        self._loaded: dict[str, Any] | None = None

    def continue_run(self, loggers: Sequence[Logger]) -> None:
        """Has training go on in the folder and the logs of an earlier start; to be called before `fit`."""
        self.continued = True
        if is_first_process():  # Lightning asks for the loggers' files before any callback is set up
            self._past = PastLogs(loggers)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Has checkpoints read and written safely, and clears away what was left half-written."""
        super().setup(trainer, pl_module, stage)
        io = trainer.strategy.checkpoint_io
        if not isinstance(io, CheckedCheckpointIO):
            inner = AtomicCheckpointIO() if type(io) is TorchCheckpointIO else io
            trainer.strategy.checkpoint_io = CheckedCheckpointIO(inner)
        # Of which step it is they compare when it is read: those without one would not be there.
        found = "none" if self.start is None else "there"
        require_agreement("the checkpoint to start from, which all ranks must see", found)
        if stage != "fit":
            return
        assert self.dirpath is not None
        require_logged(self.monitor or "", trainer)
        if trainer.is_global_zero:
            for path in leftovers(Path(self.dirpath)):
                rank_zero_warn(f"{path} was never finished: it is removed")
                path.unlink()
        if isinstance(pl_module, PolicyModule):
            pl_module.between_steps = partial(self._between_steps, trainer, pl_module)
            pl_module.meet = partial(self._meet, pl_module)
            pl_module.between_passes = partial(self._between_passes, pl_module)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Takes up the run's state, and has Lightning's loops start between two steps."""
        if not trainer.training and trainer.state.fn != "fit":
            return
        state = checkpoint.get(_STATE)
        if state is None:
            rank_zero_warn("ckpt_path: it has no random streams: training goes on, but not bit by bit")
            return
        require_agreement("the step of the checkpoint", checkpoint["global_step"])
        self._loaded = state
        self._validated_step = state["validated_step"]
        step = checkpoint["global_step"]
        left = state["validating"] and state["validated_step"] != step
        rewind_loops(trainer, checkpoint, validated=not left)
        if left and step == trainer.max_steps:
            # Lightning would see no step to take, and not come to the validation that is left.
            self._max_steps = trainer.max_steps
            trainer.fit_loop.epoch_loop.max_steps = step + 1
        if self.continued and state["stopped_early"]:
            trainer.should_stop = True  # early stopping had its way; a new start is none of its business

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the random streams of all ranks."""
        checkpoint[_STATE] = {
            "random": gather_over_ranks(self._random or random_state(pl_module.device)),
            "validated_step": self._validated_step,
            "validating": trainer.validating,
            "stopped_early": stopped_for_good(trainer),
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts logs and random streams where they were, and listens to signals from here on."""
        super().on_train_start(trainer, pl_module)
        self._cut_logs(trainer)
        if self._loaded is not None and len(self._loaded["random"]) == world_size():
            set_random_state(self._loaded["random"][rank()], pl_module.device)
        self._saved_step = self._validated_step
        self._keep_random(pl_module)
        environment = trainer._accelerator_connector.cluster_environment
        launcher: Any = trainer.strategy.launcher
        kill = getattr(launcher, "kill", None)  # of ranks that this process has started
        self._watch = SignalWatch(kill, also=requeue_signal(environment))
        self._watch.start()  # Lightning puts the earlier handlers back at the end of training

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remembers the random streams: validation, where it follows, may be broken off and done again."""
        self._keep_random(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes `best.ckpt` where this validation was the best."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._validated_step = trainer.global_step
            self._keep_random(pl_module)
            if self._max_steps is not None:
                trainer.fit_loop.epoch_loop.max_steps = self._max_steps
        super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes `last.ckpt` once more."""
        self._keep_random(pl_module)
        self._write_last(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the logs right where there was nothing left to train."""
        self._cut_logs(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up what was best, and the latest score, which Lightning saves and leaves."""
        super().load_state_dict(state_dict)
        self.current_score = state_dict["current_score"]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Where a signal has stopped training, writes `last.ckpt` of the last finished step."""
        if not isinstance(exception, Stopped):
            return
        self._write_last(trainer)
        rank_zero_info(
            f"drift: stopped by {exception.name} after step {trainer.global_step}: {self.last_model_path}; "
            "the same command with --resume auto goes on"
        )
        environment = trainer._accelerator_connector.cluster_environment
        if exception.number == requeue_signal(environment) and trainer.is_global_zero:
            rank_zero_info(f"drift: SLURM job {requeue_job()} is back in the queue")
        # Where one process ends, launchers kill the others, and rank 0 has most to do.
        trainer.strategy.barrier("stopped")
        if isinstance(environment, LightningEnvironment) and not trainer.is_global_zero:
            exception.code = 0  # Lightning kills rank 0 where one that it has started fails

    def _between_steps(self, trainer: Trainer, module: LightningModule) -> None:
        """Between two steps: writes what is due, and stops where that was asked for."""
        at_boundary(trainer)
        self._keep_random(module)
        step = trainer.global_step
        if step and step % self.every == 0 and step != self._saved_step:
            self._write_last(trainer)
        self._meet(module)

    def _meet(self, module: LightningModule) -> None:
        """Where all ranks come by: stops all of them where one was asked to."""
        number = max_over_ranks(0 if self._watch is None else self._watch.pending, module.device)
        if number:
            raise Stopped(number)

    def _between_passes(self, module: PolicyModule, stage: str) -> None:
        """Between two forward passes: breaks off what will be done again, and nothing that ranks share."""
        if self._watch is None or not self._watch.pending or stage == "checkpoint":
            return
        if world_size() == 1 or (stage in _ALONE and module.goes_alone):
            raise Stopped(self._watch.pending)

    def _cut_logs(self, trainer: Trainer) -> None:
        past, self._past = self._past, None
        if past is not None:
            past.cut(trainer.global_step)

    def _keep_random(self, module: LightningModule) -> None:
        self._random = random_state(module.device)

    def _write_last(self, trainer: Trainer) -> None:
        assert self.dirpath is not None
        path = Path(self.dirpath) / LAST
        if self._saved_step == trainer.global_step or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # Named before it is written: the checkpoint itself holds this callback's state.
        self.last_model_path = str(path)
        with _stored_on_all_ranks(path):
            if self.previous and trainer.is_global_zero and self._is_worth_keeping(path):
                link(path, path.with_name(PREVIOUS))
        with self._writing(trainer, path):
            trainer.save_checkpoint(path)
        self._saved_step = trainer.global_step
        self.start = None

    def _is_worth_keeping(self, path: Path) -> bool:
        """Whether there is a last checkpoint that is whole: training may have been started from another."""
        if not path.exists():
            return False
        is_start = self.start is None or Path(self.start) == path
        return is_start or damage(path) is None

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        with self._writing(trainer, Path(filepath)):
            super()._save_checkpoint(trainer, filepath)

    @contextmanager
    def _writing(self, trainer: Trainer, path: Path) -> Iterator[None]:
        """A context of writing a checkpoint, which takes all ranks."""
        with _stored_on_all_ranks(path):
            if trainer.is_global_zero:
                flush(trainer.loggers)
        with _stored_on_all_ranks(path):
            try:
                yield
            except StorageError:
                trainer.strategy.barrier("Trainer.save_checkpoint")  # the others are waiting there
                raise


@contextmanager
def _stored_on_all_ranks(path: Path) -> Iterator[None]:
    """A context that every rank must enter: what cannot be written by one is a StorageError on all."""
    failure = None
    try:
        yield
    except OSError as error:
        failure = str(storage_error(path, error))
    except StorageError as error:
        failure = str(error)
    found = next(filter(None, gather_over_ranks(failure)), None)
    if found is not None:
        raise StorageError(found)
