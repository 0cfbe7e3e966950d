"""Which run a command goes on with, and from which of its checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from drift.checkpoints import require_checkpoint_file
from drift.contract import ConfigError
from drift.storage import damage

CONFIG = "config.yaml"
_NAMES = ("last", "best")
LAST, BEST, PREVIOUS, RESCUE = "last.ckpt", "best.ckpt", "previous.ckpt", "rescue.ckpt"
RESUME_HELP = (
    "auto: go on from the newest whole checkpoint of this run, in its folder and logs, and start anew where "
    "there is none. The run is the newest version in the logger's folder with the same settings, apart from "
    "max_steps, devices, nodes, what saves memory, what watches and what is only shown; or the folder that "
    "checkpoint.dirpath or the logger's version names. A run that is complete stays as it is"
)
# What may differ between two starts of one run: how far and on what it runs, and what changes no number.
_MAY_DIFFER = re.compile(
    r"resume|ckpt_path|weights_only|verbose|(progress|summary|samples|prompt|curve)\..*"
    r"|(doctor|collapse|watchdog)\..*"
    r"|trainer\.(max_steps|max_time|accelerator|devices|num_nodes|strategy|enable_\w+)(\..*)?"
    r"|trainer\.(logger\..*|log_every_n_steps)|checkpoint\.every|rollout\.batch_size"
    r"|model\.(gather_for_rollout|activation_checkpointing|micro_batch_size|micro_batch_tokens)"
)


@dataclass
class Run:
    """Where an earlier start of a command left its results.

    Args:
        folder: of its logs and its config.yaml.
        checkpoints: of its checkpoints.
    """

    folder: Path
    checkpoints: Path

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole; None where there is none. Warns of each that is damaged."""
        last, rescue = self.checkpoints / LAST, self.folder / RESCUE
        # Older by design, for where the last is damaged; and so is what was rescued before that was written.
        before = [self.checkpoints / PREVIOUS, self.checkpoints / BEST]
        rescued_last = not last.exists() or (rescue.exists() and _written(rescue) > _written(last))
        groups = ([last, rescue], before) if rescued_last else ([last], [*before, rescue])
        for group in groups:
            found = [path for path in group if path.exists()]
            for path in sorted(found, key=_written, reverse=True):
                reason = damage(path)
                if reason is None:
                    return path
                rank_zero_warn(f"resume: {path} is left out: {reason}; looking for one before it")
        return None


def require_checkpoint(ckpt_path: str | None, resume: str | None, command: str) -> None:
    """Raises ConfigError where the checkpoint to start from is asked for in a way that cannot work."""
    if resume is None:
        if ckpt_path not in _NAMES:
            require_checkpoint_file(ckpt_path)
    elif command != "fit":
        raise ConfigError(f"resume is {resume!r}: only training goes on; give ckpt_path")
    elif ckpt_path is not None:
        raise ConfigError(f"resume is {resume!r} and ckpt_path {ckpt_path!r}: give one of the two")


def meet_anew() -> None:
    """Has ranks that torchrun has started again find each other, and not those that are gone.

    torchrun keeps one store for all of its restarts, in which the addresses of the first ranks stay (torch
    2.13). On one machine the ranks can make another by themselves.

    Raises:
        ConfigError: where torchrun may start them again on several machines, and they would not meet.
    """
    environment = os.environ
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    restarts = int(environment["TORCHELASTIC_MAX_RESTARTS"])
    if restarts and environment["GROUP_WORLD_SIZE"] != "1":
        raise ConfigError(
            f"torchrun's --max-restarts is {restarts}: ranks that it starts again would look for those that "
            "are gone; set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment, with --rdzv-backend "
            "c10d, or --max-restarts 0"
        )
    starts = int(environment["TORCHELASTIC_RESTART_COUNT"])
    if starts:
        # A port that is taken costs one more restart, which comes to the next.
        environment["MASTER_PORT"] = str(int(environment["MASTER_PORT"]) + starts)
        environment["TORCHELASTIC_USE_AGENT_STORE"] = "False"


def starting_checkpoint(trainer: Trainer, settings: Mapping[str, Any]) -> str | None:
    """The path of the checkpoint that a command starts from; None: from none.

    Where the command goes on with a run, the loggers do so in its folder.

    Args:
        trainer: not yet started.
        settings: all settings of the command, as plain values.

    Raises:
        ConfigError: where `last` or `best` is asked for and there is none.
    """
    path = _starting_checkpoint(trainer, settings)
    # A run has one folder, whatever it logs to.
    for logger in trainer.loggers[1:]:
        if getattr(logger, "_version", "") is None:
            logger._version = trainer.loggers[0].version  # pyright: ignore[reportAttributeAccessIssue]
    return path


def _starting_checkpoint(trainer: Trainer, settings: Mapping[str, Any]) -> str | None:
    ckpt_path, resume = settings.get("ckpt_path"), settings.get("resume")
    dirpath = settings["checkpoint"]["dirpath"]
    if resume is None:
        if ckpt_path not in _NAMES:
            return ckpt_path
        return str(named_checkpoint(find_run(trainer, dirpath, None), ckpt_path))
    run = find_run(trainer, dirpath, settings)
    path = None if run is None else run.newest()
    if path is None:
        where = "no earlier run with these settings" if run is None else f"no checkpoint in {run.checkpoints}"
        rank_zero_info(f"resume: {where}: starting anew")
        return None
    rank_zero_info(f"resume: going on from {path}, step {step_of(path)}")
    return str(path)


def find_run(trainer: Trainer, dirpath: str | None, settings: Mapping[str, Any] | None) -> Run | None:
    """The newest run that had these settings, whose folder the loggers then go on in.

    Args:
        trainer: not yet started.
        dirpath: checkpoint.dirpath; None: in the run's folder.
        settings: all settings of the command; None: any run will do that has a last checkpoint.

    Returns:
        the run; None where there is none, and the loggers will start a new folder.
    """
    logger = next(iter(trainer.loggers), None)
    if logger is None and dirpath is None:
        return _unlogged_run(Path(trainer.default_root_dir), settings)
    if logger is None or getattr(logger, "_version", "") is not None:
        # The folder is given by name: it is the run's.
        folder = Path(trainer.default_root_dir if logger is None else _log_dir(logger))
        known = folder.exists() or dirpath is not None
        return Run(folder, Path(dirpath or folder / "checkpoints")) if known else None
    root = Path(str(logger.root_dir))
    for number, folder in _versions(root):
        checkpoints = Path(dirpath or folder / "checkpoints")
        if settings is None:
            found = (checkpoints / LAST).exists() or (checkpoints / BEST).exists()
        else:
            changed = differences(folder / CONFIG, settings)
            found = not changed
            if changed:
                rank_zero_info(f"resume: {folder} is another run: it differs in {', '.join(changed[:5])}")
        if found:
            logger._version = number  # pyright: ignore[reportAttributeAccessIssue]
            return Run(folder, checkpoints)
    return Run(root, Path(dirpath)) if dirpath is not None else None


def _unlogged_run(folder: Path, settings: Mapping[str, Any] | None) -> Run | None:
    """The run whose checkpoints are in the working folder, where there is no logger to give it its own."""
    run = Run(folder, folder / "checkpoints")
    left = [*(run.checkpoints / name for name in (LAST, BEST, PREVIOUS)), folder / RESCUE]
    if not any(path.exists() for path in left):
        return None
    changed = [] if settings is None else differences(run.checkpoints / CONFIG, settings)
    if changed:
        raise ConfigError(
            f"--resume auto: {run.checkpoints} is of another run: it differs in {', '.join(changed[:5])}; "
            "set checkpoint.dirpath to a folder of this run's own, or give it a logger"
        )
    return run


def differences(config: Path, settings: Mapping[str, Any]) -> list[str]:
    """The settings in which a run's config.yaml differs from others, but for those that don't make a run."""
    if not config.is_file():
        return ["config.yaml, which it does not have"]
    try:
        theirs = dict(_flat(yaml.safe_load(config.read_text(encoding="utf-8"))))
    except yaml.YAMLError:
        return ["config.yaml, which cannot be read"]
    ours = dict(_flat(settings))
    return [
        key
        for key in sorted({*theirs, *ours})
        if not _MAY_DIFFER.fullmatch(key) and theirs.get(key) != ours.get(key)
    ]


def named_checkpoint(run: Run | None, name: str) -> Path:
    """The run's `last.ckpt` or `best.ckpt`.

    Raises:
        ConfigError: where there is none.
    """
    path = None if run is None else run.checkpoints / f"{name}.ckpt"
    if path is None or not path.exists():
        where = "there is no earlier run" if path is None else f"there is no {path}"
        raise ConfigError(
            f"ckpt_path is {name!r}: {where}; give the path of a checkpoint, or none to start anew"
        )
    return path


def step_of(path: Path) -> int:
    """The optimizer steps taken when a checkpoint was written; its tensors are not read."""
    if path.is_dir():
        return torch.load(path / "meta.pt", weights_only=True, map_location="cpu")["global_step"]
    return torch.load(path, weights_only=True, map_location="cpu", mmap=True)["global_step"]


def _written(path: Path) -> int:
    return path.stat().st_mtime_ns


def _log_dir(logger: Any) -> str:
    return logger.log_dir or logger.save_dir


def _versions(root: Path) -> list[tuple[int, Path]]:
    found = [(re.fullmatch(r"version_(\d+)", path.name), path) for path in root.glob("version_*")]
    return sorted(((int(match[1]), path) for match, path in found if match), reverse=True)


def _flat(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(settings, Mapping) and settings:
        for key, value in settings.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, settings
