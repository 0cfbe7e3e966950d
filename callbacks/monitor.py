"""Which figures may decide over the best checkpoint."""

from __future__ import annotations

from lightning import Trainer

from drift.contract import ConfigError
from drift.evaluation import FIGURES
from drift.messages import nearest


def require_logged(monitor: str, trainer: Trainer) -> None:
    """Raises ConfigError where no validation logs what decides which checkpoint is best.

    Callbacks and modules of the user's own may log whatever they like: with one of them nothing is refused.

    Args:
        monitor: the figure's name.
        trainer: with its callbacks, and the module that is to be trained.
    """
    own = [callback for callback in trainer.callbacks if not _is_known(callback)]  # type: ignore[attr-defined]
    if own or not _is_known(trainer.lightning_module) or monitor.startswith("val/reward/"):
        return
    names = [f"val/{name}" for name in FIGURES]
    # Whatever training logs has a group of its own before the slash.
    if monitor not in names and (monitor.startswith("val/") or "/" not in monitor):
        raise ConfigError(
            f"checkpoint.monitor is {monitor!r}: nothing logs it{nearest(monitor, names)}; a validation has "
            f"{', '.join(names)}"
        )


def _is_known(thing: object) -> bool:
    return type(thing).__module__.partition(".")[0] in ("drift", "lightning")
