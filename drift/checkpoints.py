"""Reading checkpoints: what cannot be one is refused in one line, with the path."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from torch import nn

from drift.contract import ConfigError
from drift.storage import damage

_FIX = "give the path of a .ckpt file that drift wrote, such as checkpoints/last.ckpt"
_NO_PICKLE = (
    "weights_only is False: a checkpoint could then run code; set it to true, drift's hold tensors and plain "
    "values alone"
)
# What torch raises on files that are whole, but no checkpoints.
_UNREADABLE = (OSError, RuntimeError, EOFError, KeyError, ValueError, TypeError)


class CheckedCheckpointIO(_WrappingCheckpointIO):
    """Reads checkpoints through another plugin; what is none raises ConfigError."""

    def load_checkpoint(
        self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """The checkpoint, which holds weights at least.

        Args:
            path: of the file.
            map_location: device for its tensors.
            weights_only: True or None; False would let the file run code.
        """
        assert self.checkpoint_io is not None
        if weights_only is False:
            raise ConfigError(_NO_PICKLE)
        require_whole(path)
        try:
            checkpoint = self.checkpoint_io.load_checkpoint(path, map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            raise ConfigError(
                f"ckpt_path is {str(path)!r}: it is refused: it holds more than tensors and plain values, "
                f"which could run code; {_FIX}"
            ) from error
        except _UNREADABLE as error:
            # Its name alone: torch's own text goes on with the advice to switch off its protection.
            raise ConfigError(
                f"ckpt_path is {str(path)!r}: it cannot be read ({type(error).__name__}); it is damaged, cut "
                f"short or no checkpoint; {_FIX}"
            ) from error
        missing = {"state_dict", "global_step", "pytorch-lightning_version"} - set(
            checkpoint if isinstance(checkpoint, Mapping) else ()
        )
        if missing:
            raise ConfigError(f"ckpt_path is {str(path)!r}: it has no {sorted(missing)}; {_FIX}")
        return checkpoint


def require_whole(path: Any) -> None:
    """Raises ConfigError where a byte of a checkpoint is not as it was written."""
    reason = damage(Path(path))
    if reason is not None:
        raise ConfigError(
            f"ckpt_path is {str(path)!r}: it cannot be read: {reason}; {_FIX}, or previous.ckpt or best.ckpt "
            "beside it"
        )


def require_checkpoint_file(path: str | None) -> None:
    """Raises ConfigError where a checkpoint is asked for and there is no such file."""
    if path is None or Path(path).is_file():
        return
    what = "it is a folder" if Path(path).is_dir() else "there is no such file"
    hint = "; weights alone are given as model.policy" if Path(path).is_dir() else ""
    raise ConfigError(f"ckpt_path is {path!r}: {what}; {_FIX}{hint}")


def require_weights_of(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Raises ConfigError unless a checkpoint's weights are a module's, all of them finite numbers."""
    found, needed = checkpoint["state_dict"], module.state_dict()
    faults = {
        "missing": [name for name in needed if name not in found],
        "not part of the model": [name for name in found if name not in needed],
        "of another shape": [n for n, v in found.items() if n in needed and v.shape != needed[n].shape],
        "not finite": [n for n, v in found.items() if not bool(torch.isfinite(v).all())],
    }
    named = [f"{len(names)} tensors {what}, such as {names[0]}" for what, names in faults.items() if names]
    if named:
        raise ConfigError(
            f"ckpt_path: its weights do not fit model.policy: {'; '.join(named)}; give the checkpoint of a "
            "run with the same model.policy, or an earlier one"
        )


def require_adapters_of(found: Mapping[str, Any] | None, needed: Mapping[str, Any] | None) -> None:
    """Raises ConfigError unless a checkpoint's adapters are of the kind that a module has.

    Args:
        found: their settings in the checkpoint, and `weights`, the fingerprint of what they are added to;
            None: it holds the whole policy.
        needed: those of the module; None: the whole policy is trained.
    """
    if found == needed:
        return
    theirs, ours = (
        None if settings is None else {key: value for key, value in settings.items() if key != "weights"}
        for settings in (found, needed)
    )
    if theirs == ours:
        raise ConfigError(
            "ckpt_path: its adapters were trained on other weights than those of model.policy; set it to "
            "what they were trained on"
        )
    what = "a whole policy and no adapters" if theirs is None else f"adapters of model.lora {theirs}"
    raise ConfigError(
        f"ckpt_path: it holds {what}, but model.lora is {ours}; set model.lora to "
        f"{'null' if theirs is None else 'the same'}, or give the checkpoint of another run"
    )


def require_same_command(theirs: str, ours: str) -> None:
    """Raises ConfigError where another command wrote the checkpoint, whose optimizer is of another loss."""
    if theirs != ours:
        raise ConfigError(
            f"ckpt_path: `drift {theirs}` wrote it, and `drift {ours}` would go on with its optimizer and "
            "its count of steps; to start from its weights, `drift export` them and give that folder as "
            "model.policy"
        )


def require_resumable(checkpoint: Mapping[str, Any], max_steps: float, master_weights: bool = False) -> None:
    """Raises ConfigError where training cannot go on from a checkpoint, or has nothing left to do.

    Args:
        checkpoint: what was read.
        max_steps: optimizer steps after which training ends.
        master_weights: whether the optimizer to go on with keeps them.
    """
    if not checkpoint.get("optimizer_states"):
        raise ConfigError(
            "ckpt_path: it holds weights but no optimizer, so that training cannot go on from it; give "
            "checkpoints/last.ckpt or best.ckpt"
        )
    states = [s for found in checkpoint["optimizer_states"] for s in found.get("state", {}).values()]
    kept = any("master" in state for state in states)
    if states and kept != master_weights:
        raise ConfigError(
            f"model.optimizer.master_weights is {master_weights}: the checkpoint was written with {kept}; "
            "set it to the same"
        )
    if checkpoint["global_step"] >= max_steps:
        raise ConfigError(
            f"trainer.max_steps is {max_steps}: the checkpoint is already at step {checkpoint['global_step']}"
            "; set it to the step at which training is to end"
        )
