"""What Lightning keeps of training, put right: its counts after a resume, figures of earlier steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning import Trainer


def rewind_loops(trainer: Trainer, checkpoint: dict[str, Any], *, validated: bool) -> None:
    """Has the loops of a checkpoint stand between two steps, wherever they were when it was written.

    Lightning tells from the differences of its counts where it was, and takes other ways from there: a
    checkpoint of the end of training would start another epoch, one from within a step would count it twice.

    Args:
        trainer: that goes on.
        checkpoint: as read; its loops are changed in place.
        validated: whether the validation that is due after the last step is over; else it is done again.
    """
    loops = checkpoint["loops"]["fit_loop"]
    batches = checkpoint["global_step"] * trainer.accumulate_grad_batches
    _set(loops["epoch_loop.batch_progress"], _counts(batches))
    _set(loops["epoch_progress"], {"ready": 1, "started": 1, "processed": 0, "completed": 0})
    done = _counts(0)
    # One batch begun and not finished is how Lightning knows a validation that was broken off.
    begun = done if validated else done | {"ready": 1, "started": 1}
    validation = loops["epoch_loop.val_loop.batch_progress"]
    _set(validation, done)
    validation["total"] = begun
    # As it stands while the last step is validated; `at_boundary` has what comes after it.
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] = max(0, checkpoint["global_step"] - 1)


def at_boundary(trainer: Trainer) -> None:
    """Has metrics logged under the number of steps done before them.

    Lightning counts them apart, and depending on where a checkpoint was written is one off after a resume.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def forget(trainer: Trainer, names: Iterable[str]) -> None:
    """Has figures that a step doesn't have logged no more: Lightning repeats what it was given last.

    Args:
        trainer: whose training step it is.
        names: that earlier steps logged.
    """
    gone = set(names)
    for result in (trainer._results or {}).values():
        if result.meta.name in gone:
            result.reset()
    for name in gone:
        for metrics in (trainer.callback_metrics, trainer.logged_metrics):
            metrics.pop(name, None)


def _counts(number: int) -> dict[str, int]:
    return {"ready": number, "started": number, "processed": number, "completed": number}


def _set(progress: dict[str, Any], counts: dict[str, int]) -> None:
    for scope in ("total", "current"):
        progress[scope] = {**progress[scope], **counts}
    progress["is_last_batch"] = False
